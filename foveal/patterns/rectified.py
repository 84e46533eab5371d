"""Rectified SpaAttn (2025): an output correction for block-sparse attention without a causal order, and the selection of its paper.

A softmax over chosen blocks alone gives them too much weight and the others none. From pooled queries and keys the weight of every
block is estimated; the sparse output is scaled by what the chosen blocks should have got, and dropped blocks come back as the mean of
their values, where pooling promises to help more than it hurts. `rectified_attention` works on any map of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import spread, wide
from foveal.ops.top import largest

from .blocks import TokenBlocks, attend_grid, check_heads, check_map, check_text

BLOCK = 128


@dataclass(frozen=True)
class Implicit:
    """Estimated attention of each query block: `blocks` `[batch, heads, nb, nb]` and `text` `[batch, heads, nb]`; together 1."""

    blocks: Tensor
    text: Tensor


def implicit_attention(
    q: Tensor, k: Tensor, blocks: TokenBlocks, *, text: int = 0, scale: float | None = None
) -> Implicit:
    """The whole attention of pooled queries over pooled grid keys and unpooled text keys (isolated pooling).

    A pooled key stands for the tokens of its block, so its share is multiplied by their number before all are normalised. Queries and
    keys are grid tokens and then `text` tokens. Raises `InputError` for other lengths.
    """
    check_heads(q, k, k)
    check_text(q, k, blocks, text)
    blocks = blocks.to(q.device)
    grid = blocks.place.numel()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qp, kp = blocks.mean(q[:, :, :grid]), spread(blocks.mean(k[:, :, :grid]), q.shape[1])
    pooled = qp @ kp.mT * scale + blocks.held.log().to(qp.dtype)
    words = qp @ spread(k[:, :, grid:], q.shape[1]).to(qp.dtype).mT * scale
    shares = torch.cat([pooled, words], -1).softmax(-1)
    return Implicit(shares[..., : blocks.number], shares[..., blocks.number :].sum(-1))


def critical_blocks(
    shares: Implicit, *, drop: float = 0.8, mass: float = 0.3, neighbours: Tensor | None = None
) -> Tensor:
    """The paper's selection: bool `[batch, heads, nb, nb]`.

    Each row keeps its best blocks until their share passes `mass` (0.3), at least (1 - drop) of all (drop: 0.75 to 0.9 in the paper,
    0.8 for HunyuanVideo), and its `neighbours` bool `[nb, nb]` (see `neighbour_blocks`). Raises `InputError` for shares outside 0 to 1
    and neighbours of other blocks.
    """
    if not 0 <= drop < 1 or not 0 <= mass <= 1:
        raise InputError(f"expected drop from 0 below 1 and mass from 0 to 1, got {drop} and {mass}; give shares")
    number = shares.blocks.shape[-1]
    if neighbours is not None:
        check_map(neighbours, (*shares.blocks.shape[:2], number, number))
    chosen = passing(shares.blocks, mass, max(1, int((1 - drop) * number + 1e-9)))
    return chosen if neighbours is None else chosen | neighbours.to(chosen.device)


def passing(shares: Tensor, mass: float, least: int | Tensor) -> Tensor:
    """Each row's largest shares `[..., n]` until they pass `mass`, and at least so many (a number, or one for each row): bool."""
    reached = shares.sort(-1, descending=True).values.cumsum(-1)
    return largest(shares, ((reached <= mass).sum(-1) + 1).clamp(min=least))


def rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: TokenBlocks,
    block_map: Tensor,
    *,
    text: int = 0,
    scale: float | None = None,
    shares: Implicit | None = None,
) -> Tensor:
    """Block-sparse attention over any map of blocks, rectified: `[batch, heads, length, value_dim]`.

    `block_map` bool `[batch or 1, heads or 1, nb, nb]` or `[nb, nb]`: blocks that are read exactly. `shares`: `implicit_attention(q, k,
    blocks, ...)`, made here unless given. A dropped block is added back if |qp . kp| is more than the mean deviations of queries and
    keys inside their blocks make of it; the share of the others goes to the chosen blocks.
    Text queries attend densely, text keys are always read.
    Raises `InputError` for lengths that do not fit and rows of the map without any block.
    """
    check_heads(q, k, v)
    check_text(q, k, blocks, text)
    blocks, grid = blocks.to(q.device), blocks.place.numel()
    found = (*q.shape[:2], blocks.number, blocks.number)
    check_map(block_map, found)
    if shares is not None and shares.blocks.shape != found:
        raise InputError(
            f"expected shares of {[*found]} blocks, got {[*shares.blocks.shape]}; estimate them from these q and k"
        )
    if block_map.is_cpu and not bool(block_map.any(-1).all()):
        raise InputError("expected every block to read one at least, got rows of the map without any; add the diagonal")
    out, _ = attend_grid(q, k, v, blocks, block_map, text=text, scale=scale)
    shares = implicit_attention(q, k, blocks, text=text, scale=scale) if shares is None else shares
    grids = (x[:, :, :grid] for x in (q, k))
    back = ~block_map.to(q.device) & pooling_helps(*grids, blocks.mean, lambda mean: mean[:, :, blocks.block_of])
    returned = shares.blocks.masked_fill(~back, 0.0)
    kept = 1 - returned.sum(-1, keepdim=True)
    mean_values = spread(blocks.mean(v[:, :, :grid]), q.shape[1])
    added = returned.to(mean_values.dtype) @ mean_values
    rectified = kept[:, :, blocks.block_of] * out[:, :, :grid] + added[:, :, blocks.block_of]
    return torch.cat([rectified.to(out.dtype), out[:, :, grid:]], 2)


def pooling_helps(q: Tensor, k: Tensor, pool: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """Whether a pooled block's logit is larger than the mean deviations inside blocks may make it wrong (gain-aware pooling
    rectification), bool `[batch, heads, nb, nb]`. pool: tokens to the means of their blocks.  back: to each token its block's mean.
    """
    pooled, spans = [], []
    for x in (q, k):
        x = x.to(wide(x.dtype))
        mean = pool(x)
        pooled.append(spread(mean, q.shape[1]))
        spans.append(spread(pool((x - back(mean)).abs()), q.shape[1]))
    (qp, kp), (q_span, k_span) = pooled, spans
    return (qp @ kp.mT).abs() > (q_span @ kp.mT).abs() + (qp @ k_span.mT).abs()


# ---------------------------------------------------------------------- compact blocks on a grid


def hilbert_blocks(shape: Sequence[int], size: int = BLOCK) -> TokenBlocks:
    """Runs of `size` (128) tokens along a Hilbert curve through a grid of any number of axes; the last run may be partial.

    The curve is that of the smallest cube of a power of two around the grid, without the cells outside. Raises `InputError` for a
    grid with fewer tokens than one block.
    """
    shape = tuple(shape)
    total = math.prod(shape) if shape else 0
    if not 1 <= size <= total:
        raise InputError(
            f"expected blocks of 1 to the {total} tokens of the grid {shape}, got {size}; take smaller blocks"
        )
    order = _hilbert_index(torch.stack(torch.unravel_index(torch.arange(total), shape))).argsort()
    number = -(-total // size)
    tokens = torch.nn.functional.pad(order, (0, number * size - total), value=-1).view(number, size)
    return TokenBlocks(tokens, (number,))


def _hilbert_index(at: Tensor) -> Tensor:
    """Places along the curve of cells `at` [axes, n], by the exchange and inversion of low bits (Skilling, 2004)."""
    x, axes = list(at), len(at)
    bits = max(1, int(at.max()).bit_length())
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for n in range(axes):
            high = (x[n] >> bit & 1).bool()
            swap = torch.where(high, 0, (x[0] ^ x[n]) & low)
            x[n] = x[n] ^ swap
            x[0] = torch.where(high, x[0] ^ low, x[0] ^ swap)
    for n in range(1, axes):
        x[n] = x[n] ^ x[n - 1]
    turn = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        turn = torch.where((x[-1] >> bit & 1).bool(), turn ^ ((1 << bit) - 1), turn)
    index = torch.zeros_like(x[0])
    for bit in range(bits - 1, -1, -1):
        for value in x:
            index = index << 1 | ((value ^ turn) >> bit & 1)
    return index


def neighbour_blocks(shape: Sequence[int], blocks: TokenBlocks) -> Tensor:
    """Blocks that touch on the grid, along an axis, and each block itself: bool `[nb, nb]`.

    Raises `InputError` for blocks of another grid.
    """
    if math.prod(shape) != blocks.place.numel():
        raise InputError(
            f"expected blocks of the grid {tuple(shape)}, got some of {blocks.place.numel()} tokens; make both of one grid"
        )
    home = blocks.block_of.cpu().view(tuple(shape))
    touch = torch.eye(blocks.number, dtype=torch.bool)
    for axis in range(len(shape)):
        a, b = home.narrow(axis, 0, shape[axis] - 1).flatten(), home.narrow(axis, 1, shape[axis] - 1).flatten()
        touch[a, b] = touch[b, a] = True
    return touch
