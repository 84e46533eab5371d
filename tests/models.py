"""Tiny random causal language models, one per attention family, with logits and attention that are far from uniform."""

import copy
import functools
import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

VOCAB, MAX_POSITIONS, WINDOW = 128, 512, 16

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,  # heads x head_dim: some families allow nothing else
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# family -> (transformers model type, settings beyond _BASE; None removes a setting)
_SETTINGS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 4,
            "layer_types": _HYBRID,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            # The released 50 would hardly bend logits of this size; a path that forgets the cap must be seen.
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": _HYBRID,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt_neox": (
        "gpt_neox",
        {
            "head_dim": None,
            "num_key_value_heads": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
    ),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", _EXPERTS | {"sliding_window": None}),
    "gpt_oss": (
        "gpt_oss",
        _EXPERTS
        | {
            "num_hidden_layers": 4,
            "layer_types": _HYBRID,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1.5e5,
                "factor": 4.0,
                "original_max_position_embeddings": MAX_POSITIONS // 4,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
}

FAMILIES = [*_SETTINGS]
HYBRID = ["gemma2", "gemma3", "gpt_oss"]
"""Families with both sliding and full attention layers."""

MLA = "deepseek_v3"
"""Stores latents instead of keys and values: built by `tiny` to be refused."""

# Not among the families every test runs over: each stands for one trait of the rotary embedding, or its absence.
_SETTINGS |= {
    MLA: (
        "deepseek_v3",
        {
            "head_dim": None,
            "num_key_value_heads": 6,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 3,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "cohere": ("cohere", {"head_dim": None}),  # neighbouring dimensions pair
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}),
    "hunyuan": ("hunyuan_v1_dense", {}),  # a learned norm follows the rotation
    "gpt2": ("gpt2", {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None}),
    "bloom": ("bloom", {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None}),
}


def tiny(family: str, *, fresh: bool = False, **overrides) -> PreTrainedModel:
    """A seeded random model of `family` (one of `FAMILIES`, or see above): float32, eval, frozen; H 6, G 2, D 16.

    Calls with equal arguments share one instance; ask for `fresh=True` before changing weights or configuration.
    `overrides` replace configuration fields (`rope_parameters={...}`); None removes a default of this file,
    except for `sliding_window` and the token ids, where None itself is the setting.
    """
    model = _build(family, json.dumps(overrides, sort_keys=True))
    return copy.deepcopy(model) if fresh else model


@functools.lru_cache(maxsize=64)
def _build(family: str, overrides: str) -> PreTrainedModel:
    model_type, settings = _SETTINGS[family]
    settings = _BASE | settings | json.loads(overrides)
    keep_none = {"sliding_window", "eos_token_id", "pad_token_id"}
    settings = {name: value for name, value in settings.items() if value is not None or name in keep_none}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
        _spread(model)
    # Greedy generation must reach its length: no token ends it.
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=None, pad_token_id=0, do_sample=False)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Redraw weights so that every projection keeps unit variance: attention logits get a standard deviation near 1."""
    embedding = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        if weight is embedding or name.endswith("sinks"):
            weight.normal_(std=1.0)
        elif weight.dim() >= 2 and "bias" not in name:
            weight.normal_(std=weight.shape[-1] ** -0.5)
        else:
            # Norm gains and biases: away from 1 and 0, so that a path that drops them is seen.
            weight.add_(torch.randn_like(weight), alpha=0.2)
