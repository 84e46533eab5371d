"""Attention over key blocks that queries see in part: each query the keys that lie in its box of coordinates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.block_lists import BlockLists
from foveal.ops.blocks import kernel_misfit
from foveal.ops.dense import check, spread, wants_grad, wide
from foveal.ops.route import Route, routed

_GATHERED_NUMBERS = 1 << 24  # logits held at a time: 64 MB in float32


class Boxes(NamedTuple):
    """Coordinates along one to three axes. A query sees a key if it does along every axis.

    bounds: int32 `[2, axes, length]`, the first and last coordinate that a query sees.  at: int32 `[axes, total]`, where keys lie; a
    key beyond all bounds is seen by nobody.
    """

    bounds: Tensor
    at: Tensor

    def see(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which of the keys `[rows, n]` the queries `[rows, m]` see, bool `[rows, m, n]`."""
        seen = True
        for axis, at in enumerate(self.at):
            key = at[keys][:, None]
            first, last = (bound[axis][queries][..., None] for bound in self.bounds)
            seen = seen & (key >= first) & (key <= last)
        return seen


def attend_boxes(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, size: int, boxes: Boxes, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention without a causal order over the keys of chosen blocks that lie in each query's box.

    `block_map` bool `[query blocks, key blocks]`, of all heads; lengths are multiples of `size`. Cost is proportional to the blocks
    chosen. Returns (out, lse); a row without keys is 0 with lse -inf. Differentiable in q, k and v. Raises `InputError` for shapes
    that do not fit.
    """
    check(q, k, v, causal=False)
    _check(q, k, block_map, size, boxes)
    if _choose(q, k, v, block_map, size, boxes, scale=scale).name == "torch":
        return _by_torch(q, k, v, block_map, size, boxes, scale)
    from foveal.ops.gpu import blocks_op

    lists = BlockLists.of(block_map.expand(*q.shape[:2], -1, -1), size, size)
    counts, indices = lists.counts.contiguous(), lists.indices.contiguous()
    return blocks_op.attend_boxes(
        q, k, v, counts, indices, boxes.bounds.contiguous(), boxes.at.contiguous(), size, size, scale
    )


@routed("attend_boxes")
def _choose(q, k, v, block_map, size, boxes, *, scale) -> Route:
    why = kernel_misfit(q, k, v, scale=scale)
    if why is None and wants_grad(q, k, v):
        why = "the kernels' backward pass knows no boxes"
    if why is None and size % 16:
        why = f"blocks of {size} are not multiples of 16"
    return Route("triton", f"blocks of {size} on a GPU") if why is None else Route("torch", why)


def _check(q: Tensor, k: Tensor, block_map: Tensor, size: int, boxes: Boxes) -> None:
    length, total = q.shape[2], k.shape[2]
    if length % size or total % size or block_map.shape != (length // size, total // size):
        raise InputError(
            f"expected lengths that are multiples of {size} and a map of their blocks, "
            f"got {length}, {total} and {list(block_map.shape)}; pad to whole blocks"
        )
    axes = boxes.at.shape[0]
    if not 1 <= axes <= 3 or boxes.bounds.shape != (2, axes, length) or boxes.at.shape != (axes, total):
        raise InputError(
            f"expected bounds [2, axes, {length}] and coordinates [axes, {total}] of one to three axes, "
            f"got {list(boxes.bounds.shape)} and {list(boxes.at.shape)}; give one of each query and key"
        )
    if boxes.bounds.dtype != torch.int32 or boxes.at.dtype != torch.int32:
        raise InputError(f"expected int32 boxes, got {boxes.bounds.dtype} and {boxes.at.dtype}; convert them")


def _by_torch(q, k, v, block_map: Tensor, size: int, boxes: Boxes, scale: float) -> tuple[Tensor, Tensor]:
    """By gathering blocks, rows that list as many together."""
    batch, heads = q.shape[:2]
    dtype = wide(q.dtype)
    k, v = (spread(t, heads).to(dtype) for t in (k, v))
    rows = q.to(dtype).unflatten(2, (-1, size))
    within = torch.arange(size, device=q.device)
    counts = block_map.sum(-1)
    outs, lses, order = [], [], []
    for count in counts.unique().tolist():
        members = (counts == count).nonzero()[:, 0]
        for some in members.split(max(1, _GATHERED_NUMBERS // max(1, batch * heads * size * size * count))):
            order.append(some)
            if not count:
                outs.append(v.new_zeros(batch, heads, len(some), size, v.shape[-1]))
                lses.append(v.new_full((batch, heads, len(some), size), -math.inf))
                continue
            keys = (block_map[some].nonzero()[:, 1].view(-1, count, 1) * size + within).flatten(1)
            hidden = ~boxes.see(some[:, None] * size + within, keys)
            x = (rows[:, :, some] @ k[:, :, keys].mT * scale).masked_fill(hidden, -math.inf)
            blind = hidden.all(-1)
            x = x.masked_fill(blind[..., None], 0.0)  # no NaN, neither in values nor in gradients
            weights = x.softmax(-1).masked_fill(blind[..., None], 0.0)
            outs.append(weights @ v[:, :, keys])
            lses.append(x.logsumexp(-1).masked_fill(blind, -math.inf))
    back = torch.cat(order).argsort()
    out, lse = torch.cat(outs, 2)[:, :, back].flatten(2, 3), torch.cat(lses, 2)[:, :, back].flatten(2, 3)
    return out.to(q.dtype), lse
