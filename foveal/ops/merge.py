"""Join partial attentions over disjoint key sets by their log-sum-exp, forward and backward."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.route import Route, no_kernel, routed

_WIDEST = 1024  # value_dim that one program of the kernel holds


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint key sets: `[..., length, value_dim]` weighed by their lse `[..., length]`.

    Returns (out, lse) of both sets together, in the dtype of `lse` (float32 or float64). A part that saw nothing has
    lse -inf and any finite output. Differentiable in all four. Raises `InputError` for shapes that do not fit.
    """
    _check((out, other), (lse, other_lse))
    if _route(out, lse, other, other_lse).name == "triton":
        from foveal.ops.gpu import merge as gpu

        return gpu.merge_two(out, lse, other, other_lse)
    return _join((out, other), (lse, other_lse))


def merge_many(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join n parts, `outs [n, ..., length, value_dim]` and `lses [n, ..., length]`; otherwise as `merge`."""
    if outs.dim() < 2 or outs.shape[0] == 0:
        raise InputError(f"expected outs [n, ..., length, value_dim] with n >= 1, got {list(outs.shape)}; stack them")
    _check((outs,), (lses,))
    if _route_many(outs, lses).name == "triton":
        from foveal.ops.gpu import merge as gpu

        return gpu.merge_stacked(outs, lses)
    return _join(outs.unbind(0), lses.unbind(0))


@routed("merge")
def _route(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Route:
    return _route_many(out, lse)


@routed("merge_many")
def _route_many(outs: Tensor, lses: Tensor) -> Route:
    reasons = {
        "the kernel computes in float32": lses.dtype != torch.float32 or outs.dtype == torch.float64,
        f"the kernel takes values of up to {_WIDEST} numbers": outs.shape[-1] > _WIDEST,
        "nothing to compute": outs.numel() == 0,
    }
    why = no_kernel(outs) or next((reason for reason, holds in reasons.items() if holds), None)
    return Route("torch", why) if why else Route("triton", "one pass over the parts, forward and backward")


def _join(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the kernel computes; where nothing was seen there is no NaN, neither in values nor in gradients."""
    with torch.no_grad():
        top = lses[0]
        for lse in lses[1:]:
            top = torch.maximum(top, lse)
        top = top.masked_fill(top.isneginf(), 0.0)  # nothing visible in any: weights of exp(-inf), not NaN
    shares = [(lse - top).exp() for lse in lses]
    total = sum(shares)
    seen = total > 0
    safe = total.where(seen, 1.0)
    joined = outs[0].to(safe.dtype) * (shares[0] / safe)[..., None]
    for out, share in zip(outs[1:], shares[1:], strict=True):
        joined = torch.addcmul(joined, out.to(safe.dtype), (share / safe)[..., None])
    return joined, torch.where(seen, safe.log() + top, -math.inf)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    out, lse = outs[0], lses[0]
    if any(t.shape != out.shape for t in outs) or any(t.shape != out.shape[:-1] for t in lses):
        shapes = [list(t.shape) for t in (*outs, *lses)]
        raise InputError(f"expected parts [..., length, value_dim] of one shape and lse [..., length], got {shapes}")
    if any(t.dtype not in (torch.float32, torch.float64) or t.dtype != lse.dtype for t in lses):
        raise InputError(f"expected lse in float32 or float64, got {[t.dtype for t in lses]}; half loses the weights")
