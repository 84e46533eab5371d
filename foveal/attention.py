"""The one attention call: store, select, weigh, attend, reweigh, mix, keep."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import ops
from .cache import ACTIVE, StoreLayer
from .decode import decode
from .errors import FovealError, InputError, UnsupportedModel
from .ops.ragged import Logit
from .parts import Part
from .prefill import prefill
from .step import Pass
from .store import LayerStore


def foveal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query [batch, heads, length, head_dim], key and value per KV head."""
    pass_ = ACTIVE.get()
    if pass_ is None:
        raise FovealError(
            "this model is set to attention 'foveal' but is not attached: use `with foveal.attach(model, method):`"
        )
    layer, pass_.pending = pass_.pending, None
    with pass_.session.clock:
        if layer is None:
            return _model_own(
                pass_, module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, kwargs
            )
        _refuse(module, kwargs, dropout)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if pass_.session.original == "sdpa":
            # where transformers still allows SDPA for such a model it leaves the soft-cap out, and so the model's own logits do
            softcap = None
        out = run(pass_, layer, query, key, value, Logit(scale, softcap, s_aux))
    return out.transpose(1, 2), None


def _model_own(pass_, module, query, key, value, mask, scaling, dropout, softcap, s_aux, kwargs):
    """Layers Foveal leaves alone (sliding windows) run the model's own implementation."""
    name = pass_.session.original
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    fn = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    extra = {k: v for k, v in (("softcap", softcap), ("s_aux", s_aux)) if v is not None}
    return fn(module, query, key, value, mask, scaling=scaling, dropout=dropout, **extra, **kwargs)


def _refuse(module: nn.Module, kwargs: dict, dropout: float) -> None:
    if kwargs.get("output_attentions"):
        raise InputError("attention weights are never held whole here: detach to use output_attentions, or ask a lens")
    if kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
        raise UnsupportedModel(
            f"{type(module).__name__} uses a position bias or attends both ways: only causal attention can be attached"
        )
    if dropout > 0:
        raise InputError(
            f"attention dropout is {dropout} in training mode: set the model's attention_dropout to 0 before attaching"
        )


# ---------------------------------------------------------------------- the path


def run(pass_: Pass, layer: StoreLayer, q: Tensor, k: Tensor, v: Tensor, logit: Logit) -> Tensor:
    """One layer of one forward pass; returns [batch, heads, length, value_dim]."""
    parts = pass_.session.active[layer.index]
    rows = layer.rows
    if pass_.decode:
        out = decode(pass_, layer.index, rows, parts, q, k, v, logit)
        return _NoBackward.apply(out, q) if torch.is_grad_enabled() and q.requires_grad else out
    cached = not rows.empty
    if not parts and _batch_is_plain(pass_, rows):
        out = _plain_prefill(pass_, rows, q, k, v, logit)
    else:
        out = _each_sequence(pass_, layer.index, rows, parts, q, k, v, logit)
    return _NoBackward.apply(out, q) if cached and torch.is_grad_enabled() and q.requires_grad else out


def _batch_is_plain(pass_: Pass, rows: LayerStore) -> bool:
    """No padding, equal counts, nothing ever let go: the whole batch can be read at once."""
    return pass_.same and all(c is None for c in pass_.columns) and (rows.empty or rows.uniform == pass_.counts[0])


def _plain_prefill(pass_: Pass, rows: LayerStore, q: Tensor, k: Tensor, v: Tensor, logit: Logit) -> Tensor:
    fresh = rows.empty
    rows.append(k, v, pass_.counts[0], pass_.once)
    keys, values = (k, v) if fresh else (rows.keys(), rows.values())
    return ops.attend(q, keys, values, scale=logit.scale, softcap=logit.softcap, sinks=logit.sinks)[0]


def _each_sequence(
    pass_: Pass, index: int, rows: LayerStore, parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, logit: Logit
) -> Tensor:
    batch = q.shape[0]
    if batch == 1 and pass_.columns[0] is None:
        return prefill(pass_.parts[0], index, rows, parts, q, k, v, logit)
    pieces = [rows.fresh() for _ in range(batch)] if rows.empty else rows.alone()
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, (sub, columns) in enumerate(zip(pass_.parts, pass_.columns, strict=True)):
        at = slice(None) if columns is None else columns
        one = [x[b : b + 1, :, at] for x in (q, k, v)]
        out[b, :, at] = prefill(sub, index, pieces[b], parts, *one, logit)[0].to(out.dtype)
    rows.become(pieces)
    rows.settle()  # here and not in the first decode step, which looks at nothing
    return out


class _NoBackward(torch.autograd.Function):
    """Keys in the store carry no gradient, so a backward pass through them must not look as if it worked."""

    @staticmethod
    def forward(ctx, out: Tensor, q: Tensor) -> Tensor:
        return out.detach().view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise FovealError(
            "no gradient flows through cached keys: for training, run the whole text in one forward pass with an empty cache"
        )
