"""Which models and methods can be held by several processes, each with its own heads: checked before any of them starts.

transformers' tensor parallel plan gives every process (rank) its share of the query and KV heads, in order. Inside, a rank looks like a
model with fewer heads. That changes nothing where a method judges every KV head by itself; one that ranks keys across the heads
of a layer, or knows heads by their number, would come to something else on a part of them. `check_apart` finds that out by trying.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_accelerate_available

from ..attach import attach
from ..errors import InputError
from ..method import Method, iterate
from ..spec import written

BY_HEADS = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
"""How a plan must cut attention for each rank to hold whole heads and nothing of the others'."""
PROMPT, STEPS = 160, 12  # tokens read and decoded by a trial
LAYERS, HEAD_DIM, KV_HEADS, VOCABULARY = 4, 16, 4, 64  # of its model


def check_shards(config: PreTrainedConfig, count: int, device: torch.device) -> None:
    """Raise InputError unless `count` processes on `device` ("cpu" or "cuda") can hold the model of this configuration together."""
    text = config.get_text_config(decoder=True)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if kv_heads % count:
        fits = [str(n) for n in range(2, kv_heads + 1) if kv_heads % n == 0]
        instead = f"choose {' or '.join(fits)}, or leave it out" if fits else "leave it out"
        raise InputError(
            f"--tensor-parallel {count}: the model has {kv_heads} KV heads, which {count} processes cannot share evenly: {instead}"
        )
    plan = getattr(text, "base_model_tp_plan", None) or {}
    if any(plan.get(f"layers.*.self_attn.{name}") != style for name, style in BY_HEADS.items()):
        raise InputError(
            f"--tensor-parallel {count}: transformers ships no plan that cuts the attention of '{config.model_type}' by heads: "
            "leave it out, or serve a model of another family, such as Llama, Mistral or Qwen"
        )
    if not is_accelerate_available():
        raise InputError(
            "accelerate is not installed, which --tensor-parallel needs: run pip install 'foveal[tensor-parallel]'"
        )
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise InputError(
            f"--tensor-parallel {count} needs {count} GPUs, and PyTorch sees {torch.cuda.device_count()}: choose a smaller number"
        )
    if device.index is not None or device.type not in ("cpu", "cuda"):
        raise InputError(
            f"--tensor-parallel takes the first {count} GPUs or the CPU, got --device {device}: leave the number out, and choose GPUs "
            "with CUDA_VISIBLE_DEVICES"
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise InputError(
            "--tensor-parallel on the CPU needs the GPUs out of sight: set CUDA_VISIBLE_DEVICES to an empty text"
        )


def keep_own_heads(model: PreTrainedModel, count: int) -> None:
    """Make the configuration of a rank's model say how many heads it holds itself: what `attach` and methods go by."""
    for config in {id(c): c for c in (model.config.get_text_config(decoder=True), model.get_decoder().config)}.values():
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.num_attention_heads //= count
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads //= count


# ---------------------------------------------------------------------- methods


def check_apart(methods: Iterable[Method | None], config: PreTrainedConfig) -> None:
    """Raise InputError naming the first method that comes to something else when a layer's heads are split.

    Each is tried on a small random model with the groups of query heads of `config`: once whole, with the output of all heads but one
    half's taken out, and once with that half alone. Tokens kept and logits must agree, for both halves.
    """
    text = config.get_text_config(decoder=True)
    group = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    tried: set[str] = set()
    for method in methods:
        for trial in _trials(method):
            if written(trial) in tried:
                continue
            tried.add(written(trial))
            if not _is_apart(trial, group):
                raise InputError(
                    f"--tensor-parallel splits a layer's heads over processes, but '{written(method)}' compares heads or knows each by its "
                    "number: choose another method, or leave --tensor-parallel out"
                )


def _trials(method: Method | None) -> Iterator[Method]:
    """The method with numbers under which it acts on a short text, all else as it was given; and as its kind comes."""
    parts = list(iterate(method))
    if not parts:
        return
    numbers = lambda m: {k: v for k, v in m.example.items() if type(v) in (int, float)}
    for change in (lambda m: replace(m, **numbers(m)), lambda m: type(m)(**m.example)):
        try:
            changed = [change(m) for m in parts]
        except InputError:  # its other parameters do not go with the example's
            changed = parts
        yield functools.reduce(operator.or_, changed)


def _is_apart(method: Method, group: int) -> bool:
    whole = _random_model(group, KV_HEADS)
    ids = torch.randint(VOCABULARY, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    for half in (0, 1):
        both, one = _muted(whole, half), _half(whole, group, half)
        try:
            (muted, kept), (alone, kept_alone) = _try(both, method, ids), _try(one, method, ids)
        except Exception:  # it needs what was measured on one model's heads, or names heads that are not there
            return False
        if not torch.equal(kept.chunk(2, 1)[half], kept_alone) or not torch.allclose(muted, alone, atol=1e-3):
            return False
    return True


@torch.no_grad()
def _try(model: PreTrainedModel, method: Method, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a prompt's last tokens and of every step after it, [tokens, vocabulary]; keys kept, [layers, kv_heads]."""
    with attach(model, method, graphs=False) as session:
        store = session.new_store()
        logits = [model(ids[:, :PROMPT], past_key_values=store).logits[0, -16:]]
        for i in range(PROMPT, ids.shape[1]):
            logits.append(model(ids[:, i : i + 1], past_key_values=store).logits[0])
        return torch.cat(logits), store.lengths[:, 0]


def _random_model(group: int, kv_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=KV_HEADS * group * HEAD_DIM // 2,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if weight.dim() == 2:  # attention logits with a standard deviation near 1: no two heads look at the same
                weight.normal_(std=1.0 if "embed" in name else weight.shape[1] ** -0.5)
    return model


def _muted(whole: LlamaForCausalLM, half: int) -> LlamaForCausalLM:
    """Its twin in which the output of the other half's heads goes nowhere."""
    twin = type(whole)(whole.config).eval().requires_grad_(False)
    twin.load_state_dict(whole.state_dict())
    for layer in twin.model.layers:
        layer.self_attn.o_proj.weight.chunk(2, 1)[1 - half].zero_()
    return twin


def _half(whole: LlamaForCausalLM, group: int, half: int) -> LlamaForCausalLM:
    """A model of one half of its heads."""
    part = _random_model(group, KV_HEADS // 2)
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if "self_attn" not in k}, strict=False)
    for mine, its in zip(part.model.layers, whole.model.layers, strict=True):
        for name in BY_HEADS:
            cut = getattr(its.self_attn, name).weight.chunk(2, 1 if name == "o_proj" else 0)
            getattr(mine.self_attn, name).weight.copy_(cut[half])
    return part
