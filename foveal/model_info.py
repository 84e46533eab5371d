"""What a method may ask of the model it is put on, and which models can be attached at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from .errors import UnsupportedModel
from .rope import Rope


@dataclass(frozen=True)
class ModelInfo:
    """What a method may ask of the model it is put on."""

    model: PreTrainedModel
    layers: tuple[int, ...]
    """Indices of the layers with full causal attention: those Foveal manages."""
    n_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int | None

    @cached_property
    def rope(self) -> Rope:
        """The model's rotary embedding acting on cached keys; raises UnsupportedModel where that is not possible."""
        return Rope.of(self.model)

    @staticmethod
    def of(model: PreTrainedModel) -> ModelInfo:
        config = model.config.get_text_config(decoder=True)
        _refuse_model(model, config)
        native = DynamicCache(config=config).layers
        heads = config.num_attention_heads
        return ModelInfo(
            model=model,
            layers=tuple(i for i, layer in enumerate(native) if type(layer) is DynamicLayer),
            n_layers=len(native),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_positions=getattr(config, "max_position_embeddings", None),
        )


def _refuse_model(model: PreTrainedModel, config) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder: attach a decoder-only causal language model")
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModel(
            f"{name} caches one latent for all heads (multi-head latent attention), so there are no keys per head to keep or drop: "
            "use a model with ordinary or grouped key-value heads"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModel(
            f"{name} shares keys and values between layers, which cannot be attached: use a model without"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{name} does not route attention through transformers' attention interface, so it cannot be attached"
        )
    if not getattr(config, "is_causal", True):
        raise UnsupportedModel(f"{name} attends in both directions: only causal models keep a cache")
