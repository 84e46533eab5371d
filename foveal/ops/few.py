"""Choosing keys by a few dimensions of each head (FASA), of cached keys in pages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import wide
from foveal.ops.paged_attention import MOST_QUERIES
from foveal.ops.pages import Pages, choosing_misfit
from foveal.ops.ragged import Logit, logits
from foveal.ops.route import Route, routed
from foveal.ops.top import top_slots


@torch.no_grad()
def few_slots(
    q: Tensor,
    pages: Pages,
    logit: Logit,
    dims: Tensor,
    chosen: Tensor,
    k: int,
    *,
    each: bool,
    count: Tensor | None = None,
) -> Tensor:
    """The k past keys of each list with the largest score, slots int32 in ascending order, -1 at the end where there are fewer.

    q: `[rows, group, head_dim]`, one query a head.  dims: int32 `[kv_heads, w]`, the dimensions that the query heads of a KV head look at,
    -1 for none; chosen: bool `[heads, w]`, which of them each head does. The score of a key is the logit from those dimensions alone.
    each: a list for each query head, `[rows * group, k]`; else one for each row, `[rows, k]`, by the sum of the heads' softmax over the
    row's keys. The newest key of a row is never listed. count: int `[lists]`, at most that many. Soft-cap and scale of `logit` count, its
    sinks do not. Raises InputError for shapes that do not fit.
    """
    _check(q, pages, dims, chosen, k)
    if _route(q, pages, dims).name == "triton":
        from .gpu import few as gpu

        return gpu.few_slots(
            q, pages.key, pages.table, pages.length, pages.bound, dims, chosen, logit.scale, logit.softcap, k, count, each
        )  # fmt: skip
    kv_heads, group = len(dims), q.shape[1]
    slot, length = torch.arange(pages.bound, device=q.device), pages.length[:, None].long()
    looks = torch.zeros(len(chosen), q.shape[2] + 1, dtype=torch.bool, device=q.device)
    at = dims.long().repeat_interleave(group, 0)
    looks.scatter_(1, at.where(chosen & (at >= 0), q.shape[2]), True)
    looks = looks[:, :-1].view(kv_heads, group, -1).repeat(len(q) // kv_heads, 1, 1)
    key = pages.gather("key", slot * (slot < length), wide(q.dtype))
    score = logits((q * looks).to(wide(q.dtype)), key, logit._replace(sinks=None), hidden=(slot >= length)[:, None])
    score = score.flatten(0, 1) if each else score.softmax(-1).nan_to_num(0.0).sum(1)
    last = length.repeat_interleave(group, 0) if each else length
    return top_slots(score.masked_fill(slot >= last - 1, -math.inf), k, count=count)


@routed("few_slots")
def _few_route(q, pages, logit, dims, chosen, k, *, each, count=None) -> Route:
    return _route(q, pages, dims)


def _route(q: Tensor, pages: Pages, dims: Tensor) -> Route:
    why = choosing_misfit(q, pages)
    if why is None and (q.shape[1] > MOST_QUERIES or dims.shape[1] > 128):
        why = f"the kernel takes groups to {MOST_QUERIES} and 128 dimensions, not {q.shape[1]} and {dims.shape[1]}"
    return Route("torch", why) if why else Route("triton", "only these dimensions are read")


def _check(q: Tensor, pages: Pages, dims: Tensor, chosen: Tensor, k: int) -> None:
    if q.dim() != 3 or q.shape[0] != pages.rows or dims.dim() != 2 or q.shape[0] % len(dims):
        raise InputError(
            f"expected q [{pages.rows} rows, group, head_dim] and dims [kv_heads, w], got {list(q.shape)}, {list(dims.shape)}"
        )
    if chosen.shape != (len(dims) * q.shape[1], dims.shape[1]) or chosen.dtype != torch.bool:
        raise InputError(
            f"expected chosen bool [{len(dims) * q.shape[1]}, {dims.shape[1]}], got {chosen.dtype} {list(chosen.shape)}"
        )
    if k < 1:
        raise InputError(f"expected k of at least 1 key, got {k}")
