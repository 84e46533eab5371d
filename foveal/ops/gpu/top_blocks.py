"""Rows of a block map: the best blocks by count or by mass, found bit by bit. What is chosen: `foveal.ops.top_blocks`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .top import _ordered
from .variants import Variant


@triton.jit
def _blocks(
    X, K, OUT, rows, nq, nk, query_block, key_block, past, first, last, mass,
    NP: tl.constexpr, MASS: tl.constexpr, SOFTMAX: tl.constexpr, DIAGONAL: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One row of a map. By count: the bisection counts blocks; by mass: it adds up their shares."""
    row = tl.program_id(0).to(tl.int64)
    a = (row % nq).to(tl.int32)
    i = tl.arange(0, NP)
    end = tl.minimum((past + (a + 1) * query_block - 1) // key_block + 1, nk)
    stop = nk
    if CAUSAL:
        stop = end
    allowed = i < stop
    x = tl.load(X + row * nk + i, mask=allowed, other=float("-inf")).to(tl.float32)
    visible = x > float("-inf")
    forced = (i < first) | (i >= stop - last)
    if DIAGONAL:
        forced = forced | ((i >= (past + a * query_block) // key_block) & (i < end))
    forced = forced & allowed
    rest = visible & (forced == 0)
    key = _ordered(x)
    if MASS:
        if SOFTMAX:
            share = tl.where(visible, tl.exp(x - tl.max(x, 0)), 0.0)
        else:
            share = tl.where(visible, tl.maximum(x, 0.0), 0.0)
        # Rounding must not add a block where the target is met exactly.
        goal = mass * (1 - 1e-6) * tl.sum(share, 0) - tl.sum(tl.where(forced, share, 0.0), 0)
        share = tl.where(rest, share, 0.0)
        least = tl.where(tl.sum(tl.where(key >= 0, share, 0.0), 0) >= goal, 0, -2147483648)
        for bit in tl.static_range(31):
            trial = least + (1 << (30 - bit))
            least = tl.where(tl.sum(tl.where(key >= trial, share, 0.0), 0) >= goal, trial, least)
        above = rest & (key > least)
        level = rest & (key == least)
        one = tl.max(tl.where(level, share, 0.0), 0)
        before = tl.sum(tl.where(above, share, 0.0), 0) + (tl.cumsum(level.to(tl.int32), 0) - 1) * one
        picked = above | (level & (before < goal))  # none of either where the forced blocks reach the goal
    else:
        want = tl.load(K + row).to(tl.int32) - tl.sum(forced.to(tl.int32), 0)
        want = tl.minimum(want, tl.sum(rest.to(tl.int32), 0))
        least = tl.where(tl.sum((rest & (key >= 0)).to(tl.int32), 0) >= want, 0, -2147483648)
        for bit in tl.static_range(31):
            trial = least + (1 << (30 - bit))
            least = tl.where(tl.sum((rest & (key >= trial)).to(tl.int32), 0) >= want, trial, least)
        above = rest & (key > least)
        level = rest & (key == least)
        room = want - tl.sum(above.to(tl.int32), 0)
        picked = (above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))) & (want > 0)
    picked = picked | forced
    if tl.sum(picked.to(tl.int32), 0) == 0:
        best = tl.min(tl.where(visible & (key == tl.max(key, 0)), i, NP), 0)
        picked = i == tl.where(best < NP, best, end - 1)
    tl.store(OUT + row * nk + i, picked.to(tl.int8), mask=i < nk)


@torch.library.custom_op("foveal::top_blocks", mutates_args=())
def _top_blocks(
    scores: Tensor, k: Tensor | None, mass: float, softmax: bool, query_block: int, key_block: int, past: int,
    keep_first: int, keep_last: int, diagonal: bool, causal: bool,
) -> Tensor:  # fmt: skip
    return launch_blocks(
        scores, k, mass, softmax, query_block, key_block, past, keep_first, keep_last, diagonal, causal
    )  # fmt: skip


@_top_blocks.register_fake
def _(scores, k, mass, softmax, query_block, key_block, past, keep_first, keep_last, diagonal, causal):
    return torch.empty_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)


def top_blocks(scores: Tensor, rule: int | float | Tensor, normalize: str, *shape) -> Tensor:
    """A list per row by count (an int or a tensor) or by mass (a float); `shape` as in `foveal.ops.top_blocks`."""
    if isinstance(rule, float):
        return _top_blocks(scores, None, rule, normalize == "softmax", *shape)
    rule = (
        torch.full((), rule, dtype=torch.int32, device=scores.device)
        if isinstance(rule, int)
        else rule.to(scores.device)
    )
    return _top_blocks(scores, rule.expand(scores.shape[:3]), 0.0, True, *shape)


def launch_blocks(
    scores, k, mass, softmax, query_block, key_block, past, keep_first, keep_last, diagonal, causal
) -> Tensor:
    scores = scores.contiguous()
    batch, heads, nq, nk = scores.shape
    rows = batch * heads * nq
    out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if rows:
        width = max(16, triton.next_power_of_2(nk))
        _blocks[(rows,)](
            scores, scores if k is None else k.contiguous(), out.view(torch.int8), rows, nq, nk, query_block, key_block, past,
            keep_first, keep_last, mass, NP=width, MASS=k is None, SOFTMAX=softmax, DIAGONAL=diagonal, CAUSAL=causal,
            num_warps=blocks_warps(width),
        )  # fmt: skip
    return out


def blocks_warps(width: int) -> int:
    """One warp up to 512 blocks, so that the many sums of a row need no barrier."""
    return max(1, min(32, width // 512))


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of this kernel over widths and rules."""
    found = []
    numbers = ("rows", "nq", "nk", "query_block", "key_block", "past", "first", "last")
    signature = {"X": "*fp32", "K": "*i32", "OUT": "*i8", "mass": "fp32"} | dict.fromkeys(numbers, "i32")
    for width in (64, 1024, 8192):
        for mass in (False, True):
            constants = {"NP": width, "MASS": mass, "SOFTMAX": width != 64, "DIAGONAL": True, "CAUSAL": True}
            options = {"num_warps": blocks_warps(width)}
            found.append(Variant(f"blocks {width} mass={mass}", _blocks, signature, constants, options))
    return found
