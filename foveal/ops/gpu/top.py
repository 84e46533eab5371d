"""The largest scores of a row, exactly and without a sort. What is chosen: `foveal.ops.top`.

A float turns into an integer that orders alike, and the integer of the last one chosen is found bit by bit: a row of up to
8,192 scores stays in registers and is bisected, a longer one is read again for each 8 bits and counted by histogram.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent
from .variants import Variant

IN_REGISTERS = 8192  # wider rows spill
CHUNK = 8192  # scores of one step over a long row


@triton.jit
def _ordered(x):
    """int32 that orders like the float."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _scores(X, F, at, ok, HAS_FORCED: tl.constexpr):
    x = tl.load(X + at, mask=ok, other=float("-inf")).to(tl.float32)
    if HAS_FORCED:
        forced = tl.load(F + at, mask=ok, other=0) != 0
        x = tl.where(forced & (x > float("-inf")), float("inf"), x)
    return x


@triton.jit
def _slots(
    X, F, COUNT, OUT, n, x_row, k,
    NP: tl.constexpr, KP: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    x = _scores(X + row * x_row, F + row * n, i, i < n, HAS_FORCED)
    key = _ordered(x)
    visible = x > float("-inf")
    want = tl.minimum(k, tl.sum(visible.to(tl.int32), 0))
    if HAS_COUNT:
        want = tl.minimum(want, tl.maximum(tl.load(COUNT + row).to(tl.int32), 0))
    least = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= want, 0, -2147483648)
    for bit in tl.static_range(31):
        trial = least + (1 << (30 - bit))
        least = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= want, trial, least)
    above = key > least
    level = key == least
    room = want - tl.sum(above.to(tl.int32), 0)
    picked = (above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))) & visible & (want > 0)
    rank = tl.cumsum(picked.to(tl.int32), 0) - 1
    tl.store(OUT + row * k + rank, i, mask=picked)
    for j0 in range(0, k, KP):
        j = j0 + tl.arange(0, KP)
        tl.store(OUT + row * k + j, -1, mask=(j >= want) & (j < k))


@triton.jit
def _slots_long(
    X, F, COUNT, OUT, n, x_row, k,
    CH: tl.constexpr, KP: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    X += row * x_row
    F += row * n
    want = tl.full([], 0, tl.int32)
    least = tl.full([], 0, tl.int32)
    room = tl.full([], 0, tl.int32)
    digits = tl.arange(0, 256)
    for part in tl.static_range(4):
        seen = tl.zeros([256], tl.int32)
        for c in range(0, n, CH):
            i = c + tl.arange(0, CH)
            x = _scores(X, F, i, i < n, HAS_FORCED)
            key = _ordered(x)
            alive = x > float("-inf")
            if part == 0:
                byte = (key >> 24) + 128
            else:
                byte = (key >> (24 - 8 * part)) & 255
                alive = alive & ((key >> (32 - 8 * part)) == least)
            seen += tl.histogram(byte, 256, mask=alive)
        if part == 0:
            want = tl.minimum(k, tl.sum(seen, 0))
            if HAS_COUNT:
                want = tl.minimum(want, tl.maximum(tl.load(COUNT + row).to(tl.int32), 0))
            room = want
        reach = tl.cumsum(seen, 0, reverse=True)  # how many have this digit or a larger one
        digit = tl.sum((reach >= room).to(tl.int32), 0) - 1
        room -= tl.sum(tl.where(digits > digit, seen, 0), 0)
        if part == 0:
            least = digit - 128
        else:
            least = least * 256 + digit
    done = tl.full([], 0, tl.int32)
    level_before = tl.full([], 0, tl.int32)
    for c in range(0, n, CH):
        i = c + tl.arange(0, CH)
        x = _scores(X, F, i, i < n, HAS_FORCED)
        key = _ordered(x)
        level = key == least
        ties = tl.cumsum(level.to(tl.int32), 0) + level_before
        picked = ((key > least) | (level & (ties <= room))) & (x > float("-inf")) & (want > 0)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1 + done
        tl.store(OUT + row * k + rank, i, mask=picked)
        done += tl.sum(picked.to(tl.int32), 0)
        level_before += tl.sum(level.to(tl.int32), 0)
    for j0 in range(0, k, KP):
        j = j0 + tl.arange(0, KP)
        tl.store(OUT + row * k + j, -1, mask=(j >= want) & (j < k))


@torch.library.custom_op("foveal::top_slots", mutates_args=())
def top_slots(scores: Tensor, k: int, forced: Tensor | None, count: Tensor | None) -> Tensor:
    return launch_slots(scores, k, forced, count)


@top_slots.register_fake
def _(scores, k, forced, count):
    return scores.new_empty(scores.shape[0], k, dtype=torch.int32)


def launch_slots(scores: Tensor, k: int, forced: Tensor | None = None, count: Tensor | None = None) -> Tensor:
    rows, n = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    if not rows:
        return out
    forced = None if forced is None else forced.contiguous().view(torch.uint8)
    pdl, launching = dependent(scores)
    how = {"KP": 1024, "HAS_FORCED": forced is not None, "HAS_COUNT": count is not None, "PDL": pdl}
    how |= launching
    given = (scores, out if forced is None else forced, out if count is None else count, out, n, scores.stride(0), k)
    if n <= IN_REGISTERS:
        width = max(128, triton.next_power_of_2(n))
        _slots[(rows,)](*given, NP=width, **how, num_warps=slots_warps(width))
    else:
        _slots_long[(rows,)](*given, CH=CHUNK, **how, num_warps=16)
    return out


def slots_warps(width: int) -> int:
    """At most 16 scores a thread: more registers would spill."""
    return max(4, min(32, width // 512))


# ---------------------------------------------------------------------- rows of a block map


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
    """The launches of these kernels over widths and options."""
    found = []
    base = {"X": "*fp32", "F": "*u8", "COUNT": "*i32", "OUT": "*i32", "n": "i32", "x_row": "i32", "k": "i32"}
    for width in (128, 2048, 8192):
        constants = {"NP": width, "KP": 1024, "HAS_FORCED": width == 8192, "HAS_COUNT": width == 2048, "PDL": True}
        found.append(Variant(f"slots {width}", _slots, base, constants, {"num_warps": slots_warps(width)}))
    for forced in (False, True):
        constants = {"CH": CHUNK, "KP": 1024, "HAS_FORCED": forced, "HAS_COUNT": forced, "PDL": True}
        found.append(Variant(f"slots long forced={forced}", _slots_long, base, constants, {"num_warps": 16}))
    numbers = ("rows", "nq", "nk", "query_block", "key_block", "past", "first", "last")
    signature = {"X": "*fp32", "K": "*i32", "OUT": "*i8", "mass": "fp32"} | dict.fromkeys(numbers, "i32")
    for width in (64, 1024, 8192):
        for mass in (False, True):
            constants = {"NP": width, "MASS": mass, "SOFTMAX": width != 64, "DIAGONAL": True, "CAUSAL": True}
            options = {"num_warps": blocks_warps(width)}
            found.append(Variant(f"blocks {width} mass={mass}", _blocks, signature, constants, options))
    return found
