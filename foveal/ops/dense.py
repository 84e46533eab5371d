"""Dense causal attention with its log-sum-exp, and the pieces the other prefill operations are made of.

Every prefill operation takes queries `[batch, heads, length, head_dim]`, keys `[batch, kv_heads, total, head_dim]` and
values `[batch, kv_heads, total, value_dim]`; the queries are the last `length` of `total` positions, and `heads` is any
multiple of `kv_heads`. All of them share these keywords:

- `scale`: factor on the dot product.
- `softcap`: c turns the scaled logit x into c * tanh(x / c) (Gemma 2), before anything else is added.
- `bias`: `(phi_q [batch, heads, length, rank], phi_k [batch, heads or kv_heads, total, rank])`, adds phi_q . phi_k.
- `mass`: `[batch, kv_heads or heads, total]`, how many tokens a key stands for; adds log(mass), so 0 hides the key.
- `sinks`: `[heads]` learned sink logits (gpt-oss): they join the softmax denominator and carry no value.
- `need_lse`: also return the log-sum-exp.

They return `(out [batch, heads, length, value_dim], lse [batch, heads, length] or None)`. `lse` is in float32 (float64
for float64 inputs) and is that of *all* logits, bias, mass and sinks included, so `exp(logit - lse)` is the probability
a key got. A row that sees nothing returns 0; its lse is -inf, or the sink logit if there is one. Inputs may be strided
views and are never written to. Where gradients are wanted, every operation is differentiable; plain dense attention
without lse then keeps PyTorch's fused backward, everything else holds the probabilities it computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.merge import merge
from foveal.ops.numbers import check_numbers
from foveal.ops.route import Route, hopper, no_kernel, routed

# A hidden logit is finite, so that a row of hidden keys stays free of NaN and can be told by its log-sum-exp.
HIDDEN = -1e30
# Queries, and keys times heads, to which a mask and spread keys cost less than block lists.
_FEW, _SMALL = 128, 1 << 17
_LONG = 4096  # queries from which the block kernel beats PyTorch's choice on a Hopper
_TILE_NUMBERS = 1 << 20  # logits of one tile on a CPU: a few MB, so that it stays in the cache between passes


@dataclass(frozen=True)
class Prepared:
    """Queries and keys whose dot product is the logit: columns after `split` carry bias and log mass, unscaled."""

    q: Tensor  # [batch, heads, length, split + extra]
    k: Tensor  # [batch, kv_heads (or heads), total, split + extra]
    v: Tensor
    scale: float
    softcap: float | None
    split: int
    exact: bool  # no fused kernel can compute this: softcap, or gradients through more than plain attention

    def part(self, heads, kv_heads, queries: slice, keys: slice) -> "Prepared":
        """The same problem on fewer heads (lists or slices), queries and keys."""
        return self.replace(self.q[:, heads, queries], self.k[:, kv_heads, keys], self.v[:, kv_heads, keys])

    def replace(self, q: Tensor, k: Tensor, v: Tensor) -> "Prepared":
        """The same problem on other tensors."""
        return Prepared(q, k, v, self.scale, self.softcap, self.split, self.exact)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    mass: Tensor | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Dense causal attention: query i sees keys j <= i + total - length. Shapes and keywords: see the module.

    Raises `InputError` for shapes that do not fit together.
    """
    check(q, k, v, sinks=sinks, bias=bias, mass=mass)
    how = {"scale": scale, "softcap": softcap, "bias": bias, "mass": mass}
    route = _route(q, k, v, sinks=sinks, need_lse=need_lse, **how)
    if route.name == "sdpa":
        return _fused_plain(q, k, v, scale), None
    if route.name == "blocks":
        from .blocks import attend_band_by_blocks

        every = [k.shape[2]] * q.shape[1]
        whole = {"sink": [0] * q.shape[1], "recent": every, "scale": scale}
        return attend_band_by_blocks(q, k, v, sinks=sinks, bias=bias, mass=mass, need_lse=need_lse, **whole)
    if route.name == "folded":
        out, lse = _folded(q, k, v, scale, bias, mass)
        return finish(out, lse, q, sinks=sinks, holes=mass is not None, need_lse=need_lse)
    p = prepare(q, k, v, scale=scale, softcap=softcap, bias=bias, mass=mass, differentiable=(q, k, v, sinks))
    out, lse = causal(p)
    return finish(out, lse, q, sinks=sinks, holes=mass is not None, need_lse=need_lse)


@routed("attend")
def _route(q, k, v, *, scale, softcap=None, sinks=None, bias=None, mass=None, need_lse=False) -> Route:
    plain = softcap is None and sinks is None and bias is None and mass is None
    whole, grad = q.shape[2] in (1, k.shape[2]), wants_grad(q, k, v)
    if plain and not need_lse and grad:
        return Route("sdpa", "a fused backward")
    if q.is_cpu:
        return Route("torch", "tiles around PyTorch's fused CPU kernel")
    if plain and not need_lse and 1 < q.shape[2] <= _FEW and q.shape[1] * k.shape[2] <= _SMALL:
        return Route("sdpa", "few queries over a short past: the block kernel's lists take longer than the work")
    from .blocks import kernel_misfit

    why = kernel_misfit(q, k, v, scale=scale, softcap=softcap, bias=bias, mass=mass)
    more = need_lse or not whole or bias is not None or mass is not None
    if why is None and (more or (hopper(q) and q.shape[2] >= _LONG)) and q.shape[2] > 1:
        return Route(
            "blocks", "every block, by the block-sparse kernel, which returns the log-sum-exp and takes a bias"
        )
    if plain and not need_lse and whole:
        return Route("sdpa", "plain causal attention on an accelerator")
    wide_enough = bias is None or q.shape[3] + 6 * bias[0].shape[3] + 3 <= 256
    halves = q.dtype == k.dtype == v.dtype == torch.bfloat16 and no_kernel(q) is None
    if (
        halves
        and whole
        and softcap is None
        and not grad
        and wide_enough
        and q.shape[2] > 1
        and (bias or mass is not None)
    ):
        return Route("folded", f"bias and mass as columns of queries and keys of a fused kernel, since {why}")
    return Route("torch", why or "a fused kernel where one fits, else exact tiles")


def _folded(q: Tensor, k: Tensor, v: Tensor, scale: float, bias, mass) -> tuple[Tensor, Tensor]:
    """Bias and mass in the columns of a kernel that returns the log-sum-exp."""
    from .gpu.bias import fold_bias

    p = fold_bias(q, k, v, bias, mass, scale=scale)
    key, value = spread(p.k, q.shape[1]), spread(p.v, q.shape[1])
    fused = (p.q, key, value)
    if hopper(q):  # cuDNN has a kernel for every width; the other jumps from one template to the next
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*fused, None, True, 0.0, True, scale=scale)
        lse = lse.squeeze(-1)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*fused, 0.0, True, scale=scale)
    return out[..., : p.value_dim], lse


def check(q: Tensor, k: Tensor, v: Tensor | None, *, sinks=None, bias=None, mass=None, causal=True) -> None:
    """Raise `InputError` unless the shapes fit together and, where looking costs little, all are numbers."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(
            "expected q [batch, heads, length, head_dim] and k [batch, kv_heads, total, head_dim] of one batch and "
            f"head_dim, got {list(q.shape)} and {list(k.shape)}; reshape them"
        )
    batch, heads, length, _ = q.shape
    kv_heads, total = k.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise InputError(f"expected heads to be a multiple of kv_heads, got {heads} and {kv_heads}; check q and k")
    if causal and length > total:
        raise InputError(f"expected at most as many queries as keys, got {length} and {total}; append the keys first")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise InputError(f"expected one value for each key, got k {list(k.shape)} and v {list(v.shape)}; match them")
    if sinks is not None and sinks.shape != (heads,):
        raise InputError(f"expected one sink logit for each of {heads} heads, got {list(sinks.shape)}; pass [heads]")
    if mass is not None and (mass.shape[0], mass.shape[-1], mass.dim()) != (batch, total, 3):
        raise InputError(f"expected mass [{batch}, kv_heads, {total}], got {list(mass.shape)}; give one for each key")
    if mass is not None and mass.shape[1] not in (kv_heads, heads):
        raise InputError(f"expected mass for {kv_heads} KV heads or {heads} heads, got {mass.shape[1]}; match one")
    if bias is not None:
        _check_bias(*bias, q, k)
    if length > 1:  # a decode step asks nothing of the device
        check_numbers(q=q, k=k, v=v, mass=mass)


def _check_bias(phi_q: Tensor, phi_k: Tensor, q: Tensor, k: Tensor) -> None:
    batch, heads, _, _ = q.shape
    fits = phi_q.dim() == 4 and phi_k.dim() == 4 and phi_q.shape[3] == phi_k.shape[3]
    fits = fits and phi_q.shape[:3] == q.shape[:3] and phi_k.shape[1] in (k.shape[1], heads)
    if not fits or phi_k.shape[0] != batch or phi_k.shape[2] != k.shape[2]:
        raise InputError(
            f"expected bias features for q {list(q.shape)} and k {list(k.shape)} with one rank, "
            f"got {list(phi_q.shape)} and {list(phi_k.shape)}; give one row for each query and each key"
        )


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    bias: tuple[Tensor, Tensor] | None,
    mass: Tensor | None,
    differentiable: tuple = (),
) -> Prepared:
    """Fold bias and mass into extra columns of queries and keys, so that one matrix product gives the whole logit."""
    split = q.shape[-1]
    exact = softcap is not None or wants_grad(*differentiable, *(bias or ()), mass)
    extra = [] if bias is None else [bias]
    if mass is not None:
        # Not log(0) with a clamp: its gradient is NaN.
        log_mass = torch.where(mass > 0, mass.to(wide(q.dtype)).clamp(min=1e-37).log(), HIDDEN)[..., None]
        extra.append((log_mass.new_ones(1).expand(*q.shape[:3], 1), log_mass))
    if extra:
        # bfloat16 would round log(mass) and the bias to two digits.
        dtype = wide(q.dtype)
        heads = max(k.shape[1], *(phi_k.shape[1] for _, phi_k in extra))
        q = torch.cat([q.to(dtype) * scale, *(phi_q.to(dtype) for phi_q, _ in extra)], -1)
        k = torch.cat([spread(k, heads).to(dtype), *(spread(phi_k, heads).to(dtype) for _, phi_k in extra)], -1)
        v, scale = spread(v, heads).to(dtype), 1.0
    return Prepared(q, k, v, scale, softcap, split, exact)


def spread(t: Tensor, heads: int) -> Tensor:
    """Repeat KV heads `[batch, kv_heads, ...]` for their query heads; nothing is copied where nothing repeats."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation and of the log-sum-exp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def finish(
    out: Tensor, lse: Tensor, q: Tensor, *, sinks: Tensor | None, holes: bool, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Zero the rows that saw nothing (only if there may be `holes`), let the sinks in, restore the dtype."""
    if holes:
        empty = lse < HIDDEN / 2
        lse = lse.masked_fill(empty, -math.inf)
        out = out.masked_fill(empty[..., None], 0.0)
    if sinks is not None:
        sink = sinks.to(lse.dtype)[None, :, None]
        out = out * torch.sigmoid(lse - sink)[..., None].to(out.dtype)
        lse = torch.logaddexp(lse, sink.expand_as(lse))
    return out.to(q.dtype), lse if need_lse else None


def causal(p: Prepared) -> tuple[Tensor, Tensor]:
    """Causal attention and lse of a prepared problem: the past without a mask, then the square causal chunk."""
    length, total = p.q.shape[2], p.k.shape[2]
    if p.exact or length == 0:
        return exact(p, causal=True)
    past = total - length
    if past == 0 or length == 1:
        return fused(p, causal=past == 0)
    every = slice(None)
    chunk = fused(p.part(every, every, every, slice(past, None)), causal=True)
    seen = fused(p.part(every, every, every, slice(past)), causal=False)
    return merge(*seen, *chunk)


def fused(p: Prepared, *, causal: bool, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention and lse by PyTorch's fused kernel where it fits, else exactly; keys and queries are aligned left.

    `mask` is added to the logits: `[length, total]`, 0, or `HIDDEN` where a query does not see a key.
    """
    heads, group = p.k.shape[1], p.q.shape[1] // p.k.shape[1]
    if p.exact:
        return exact(p, causal=causal, mask=mask)
    if p.q.device.type != "cpu":
        return _fused_elsewhere(p, causal, mask)
    width = max(p.q.shape[-1], p.v.shape[-1])
    q, k, v = (last_dense(_pad(t, width)) for t in (p.q, p.k, p.v))
    if mask is not None:
        mask = mask.to(wide(q.dtype))[None, None]
    if 1 in (heads, group):
        k, v = (t.expand(-1, heads * group, -1, -1) for t in (k, v))
        out, lse = _cpu_kernel(q, k, v, causal, mask, p.scale)
    else:
        # Head groups become batch entries, so that the shared keys are a stride of 0 and not a copy.
        parts = []
        for qb, kb, vb in zip(q, k, v, strict=True):
            kb, vb = (t[:, None].expand(-1, group, -1, -1) for t in (kb, vb))
            parts.append(_cpu_kernel(qb.unflatten(0, (heads, group)), kb, vb, causal, mask, p.scale))
        out, lse = (_stack([part[n].flatten(0, 1) for part in parts]) for n in (0, 1))
    return out[..., : p.v.shape[-1]], lse


def _cpu_kernel(q, k, v, causal, mask, scale):
    if mask is not None:
        mask = mask.expand(q.shape[0], 1, -1, -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=causal, attn_mask=mask, scale=scale
    )


def _fused_elsewhere(p: Prepared, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """CUDA's memory-efficient kernel, which returns the lse; what it does not take is computed exactly."""
    aligned = p.q.shape[-1] % 8 == 0 and p.v.shape[-1] % 8 == 0
    if p.q.device.type != "cuda" or p.q.dtype == torch.float64 or mask is not None or not aligned:
        return exact(p, causal=causal, mask=mask)
    k, v = spread(p.k, p.q.shape[1]), spread(p.v, p.q.shape[1])
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        last_dense(p.q), last_dense(k), last_dense(v), None, True, 0.0, causal, scale=p.scale
    )
    return out, lse[..., : p.q.shape[2]]


def exact(p: Prepared, *, causal: bool, mask=None) -> tuple[Tensor, Tensor]:
    """Attention and lse by query tiles with float32 accumulation, differentiable in both.

    `causal` is lower-right aligned and skips the keys after a tile. `mask` is as for `fused`, or a function
    `(start, stop) -> bool [batch or 1, heads or kv_heads or 1, stop - start, total]`, called once for each tile.
    """
    batch, heads, length, _ = p.q.shape
    kv_heads, total = p.k.shape[1:3]
    group, dtype = heads // kv_heads, wide(p.q.dtype)
    k, v = p.k.to(dtype), p.v.to(dtype)
    kv_step = 1 if p.q.is_cpu else kv_heads
    rows = max(16, _TILE_NUMBERS // max(1, batch * group * total)) if p.q.is_cpu else 256
    outs, lses = [], []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        seen = total - length + stop if causal else total
        hide = _hider(mask, start, stop, seen, total - length if causal else None, heads, p.q.device)
        parts = []
        for kv in range(0, kv_heads, kv_step):
            some, kvs = slice(kv * group, (kv + kv_step) * group), slice(kv, kv + kv_step)
            x = _tile_logits(p, p.q[:, some, start:stop].to(dtype), k[:, kvs, :seen])
            hide(x, some)
            # The largest weight is exp(top - lse): one cheap pass gives the lse where logsumexp needs three.
            weights = torch.softmax(x, -1)
            parts.append((_grouped(weights, v[:, kvs, :seen]), x.amax(-1) - weights.amax(-1).log()))
        outs.append(torch.cat([o for o, _ in parts], 1))
        lses.append(torch.cat([lse for _, lse in parts], 1))
    if not outs:
        return p.q.new_zeros(batch, heads, 0, v.shape[-1]), p.q.new_zeros(batch, heads, 0, dtype=dtype)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _hider(mask, start: int, stop: int, seen: int, past: int | None, heads: int, device) -> Callable:
    """A function (logits of some heads, those heads) that hides, in place, what one tile of queries does not see."""
    hidden = None
    if callable(mask):
        hidden = ~mask(start, stop)[..., :seen].to(device)
        hidden = hidden if hidden.shape[1] == 1 else spread(hidden, heads)
    elif mask is not None:
        hidden = (mask[start:stop, :seen] < HIDDEN / 2)[None, None]
    later = None
    if past is not None:  # every query of the tile sees the keys before `first`
        first = past + start
        later = torch.ones(stop - start, seen - first, dtype=torch.bool, device=device).triu(1)

    def hide(x: Tensor, some: slice) -> None:
        if later is not None:
            x[..., first:].masked_fill_(later, HIDDEN)
        if hidden is not None:
            x.masked_fill_(hidden if hidden.shape[1] == 1 else hidden[:, some], HIDDEN)

    return hide


def _tile_logits(p: Prepared, q: Tensor, k: Tensor) -> Tensor:
    """Logits `[batch, heads, rows, keys]` of one tile of wide queries."""
    if p.softcap is None:
        return _grouped(q * p.scale, k.mT)
    x = _grouped(q[..., : p.split] * (p.scale / p.softcap), k[..., : p.split].mT).tanh_() * p.softcap
    return x + _grouped(q[..., p.split :], k[..., p.split :].mT) if k.shape[-1] > p.split else x


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """`a [batch, heads, rows, n] @ b [batch, kv_heads, n, m]`, the query heads of a KV head as rows of one product."""
    return torch.matmul(a.unflatten(1, (b.shape[1], -1)).flatten(2, 3), b).unflatten(2, (-1, a.shape[2])).flatten(1, 2)


def _fused_plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Plain causal attention through the differentiable public function."""
    length, total = q.shape[2], k.shape[2]
    see = None
    if 1 < length < total:
        kept = length * total <= 1 << 19 and type(q) is Tensor and not torch.is_grad_enabled()
        see = (_seen if kept else _seen.__wrapped__)(length, total, q.device)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (see is not None or q.dtype not in (torch.float16, torch.bfloat16)):
        # only the half-precision kernels know groups, and none of them a mask; others would fall back to one that holds all the logits
        k, v, grouped = spread(k, q.shape[1]), spread(v, q.shape[1]), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=see, is_causal=length == total, scale=scale, enable_gqa=grouped
    )


@lru_cache(maxsize=64)  # every layer asks for that of each sequence in turn
def _seen(length: int, total: int, device: torch.device) -> Tensor:
    """Which keys each of the newest queries sees, bool [length, total]."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)


def wants_grad(*tensors: Tensor | None) -> bool:
    """A gradient may be asked of what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _pad(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))


def last_dense(t: Tensor) -> Tensor:
    """The fused kernels read the last dimension with stride 1, without looking."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)
