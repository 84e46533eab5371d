"""The largest scores of a row, exactly and without a sort. What is chosen: `foveal.ops.top`.

A float turns into an integer that orders alike, and the integer of the last one chosen is found bit by bit: a row of up to
8,192 scores stays in registers and is bisected. A longer one is shared out to many programs, which count how often each value
of the next 8 bits occurs; every launch adds up the counts of those before it, so nothing has to be zeroed or added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent, given
from .variants import Variant

IN_REGISTERS = 8192  # wider rows spill


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
    X, F, COUNT, OUT, n, x_row, k, unit,
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
    tl.store(OUT + row * k + rank, i * unit, mask=picked)
    for j0 in range(0, k, KP):
        j = j0 + tl.arange(0, KP)
        tl.store(OUT + row * k + j, -1, mask=(j >= want) & (j < k))


@triton.jit
def _counts(HIST, row, chunk, chunks, part_rows, part: tl.constexpr, CB: tl.constexpr):
    """How often each digit occurs in all chunks of a row, and in those before `chunk`: two of [256]."""
    digits = tl.arange(0, 256)
    total = tl.zeros([256], tl.int32)
    before = tl.zeros([256], tl.int32)
    base = HIST + (part * part_rows + row) * chunks * 256
    for c0 in range(0, chunks, CB):
        c = c0 + tl.arange(0, CB)
        x = tl.load(base + c[:, None] * 256 + digits[None, :], mask=(c < chunks)[:, None], other=0)
        total += tl.sum(x, 0)
        before += tl.sum(tl.where((c < chunk)[:, None], x, 0), 0)
    return total, before


@triton.jit
def _descend(total, least, room, part: tl.constexpr):
    """One digit more of the last one chosen, and how many of those that share it are wanted."""
    reach = tl.cumsum(total, 0, reverse=True)  # how many have this digit or a larger one
    digit = tl.sum((reach >= room).to(tl.int32), 0) - 1
    room -= tl.sum(tl.where(tl.arange(0, 256) > digit, total, 0), 0)
    if part == 0:
        least = digit - 128
    else:
        least = least * 256 + digit
    return digit, least, room


@triton.jit
def _wanted(COUNT, total, row, k, HAS_COUNT: tl.constexpr):
    want = tl.minimum(k, tl.sum(total, 0))
    if HAS_COUNT:
        want = tl.minimum(want, tl.maximum(tl.load(COUNT + row).to(tl.int32), 0))
    return want


@triton.jit
def _tally(key, alive, least, part: tl.constexpr):
    """Digit `part` of those keys that begin with `least`, counted."""
    if part == 0:
        byte = (key >> 24) + 128
    else:
        byte = (key >> (24 - 8 * part)) & 255
        alive = alive & ((key >> (32 - 8 * part)) == least)
    return tl.histogram(byte, 256, mask=alive)


@triton.jit
def _begun(
    X, F, COUNT, HIST, n, x_row, k, chunks, rows,
    CH: tl.constexpr, CB: tl.constexpr, PARTS: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_COUNT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A chunk's scores and what `PARTS` digits say of the row.

    Row, chunk, slots and scores; how many are wanted, the first digits of the last one chosen and how many of those that share them
    are wanted; and in earlier chunks how many are larger (`above`) and how many share them (`ties`).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i = chunk * CH + tl.arange(0, CH)
    x = _scores(X + row * x_row, F + row * n, i, i < n, HAS_FORCED)
    least = tl.full([], 0, tl.int32)
    room = tl.full([], 0, tl.int32)
    want = tl.full([], 0, tl.int32)
    above = tl.full([], 0, tl.int32)
    ties = tl.full([], 0, tl.int32)
    for part in tl.static_range(PARTS):
        total, before = _counts(HIST, row, chunk, chunks, rows, part, CB)
        if part == 0:
            want = _wanted(COUNT, total, row, k, HAS_COUNT)
            room = want
        digit, least, room = _descend(total, least, room, part)
        above += tl.sum(tl.where(tl.arange(0, 256) > digit, before, 0), 0)
        ties = tl.sum(tl.where(tl.arange(0, 256) == digit, before, 0), 0)
    return row, chunk, i, x, want, least, room, above, ties


@triton.jit
def _digit(
    X, F, COUNT, HIST, n, x_row, k, chunks, rows,
    CH: tl.constexpr, CB: tl.constexpr, PART: tl.constexpr, HAS_FORCED: tl.constexpr, HAS_COUNT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, chunk, _, x, _, least, _, _, _ = _begun(
        X, F, COUNT, HIST, n, x_row, k, chunks, rows, CH, CB, PART, HAS_FORCED, HAS_COUNT, PDL
    )
    seen = _tally(_ordered(x), x > float("-inf"), least, PART)
    tl.store(HIST + ((PART * rows + row) * chunks + chunk) * 256 + tl.arange(0, 256), seen)


@triton.jit
def _pack(
    X, F, COUNT, HIST, OUT, FOUND, n, x_row, k, unit, chunks, rows,
    CH: tl.constexpr, CB: tl.constexpr, KP: tl.constexpr, PARTS: tl.constexpr, HAS_FORCED: tl.constexpr,
    HAS_COUNT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, chunk, i, x, want, least, room, above, ties = _begun(
        X, F, COUNT, HIST, n, x_row, k, chunks, rows, CH, CB, PARTS, HAS_FORCED, HAS_COUNT, PDL
    )
    key = _ordered(x) >> (32 - 8 * PARTS)
    level = key == least
    equal = tl.cumsum(level.to(tl.int32), 0) + ties
    picked = ((key > least) | (level & (equal <= room))) & (x > float("-inf")) & (want > 0)
    rank = tl.cumsum(picked.to(tl.int32), 0) - 1 + above + tl.minimum(ties, room)
    tl.store(OUT + row * k + rank, i * unit, mask=picked)
    if chunk == 0:
        tl.store(FOUND + row, want)
        for j0 in range(0, k, KP):
            j = j0 + tl.arange(0, KP)
            tl.store(OUT + row * k + j, -1, mask=(j >= want) & (j < k))


@torch.library.custom_op("foveal::top_slots", mutates_args=())
def top_slots(scores: Tensor, k: int, forced: Tensor | None, count: Tensor | None, unit: int) -> Tensor:
    return launch_slots(scores, k, forced, count, unit)


@top_slots.register_fake
def _(scores, k, forced, count, unit):
    return scores.new_empty(scores.shape[0], k, dtype=torch.int32)


def launch_slots(
    scores: Tensor, k: int, forced: Tensor | None = None, count: Tensor | None = None, unit: int = 1
) -> Tensor:
    rows, n = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    forced = None if forced is None else forced.contiguous().view(torch.uint8)
    count = None if count is None else count.contiguous()  # one number for all rows comes without a stride
    if n > IN_REGISTERS:
        return launch_long(scores, k, forced, count, unit)[0]
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    if not rows:
        return out
    pdl, launching = dependent(scores)
    width = max(128, triton.next_power_of_2(n))
    _slots[(rows,)](
        scores, given(forced, out), given(count, out), out, n, scores.stride(0), k, unit, NP=width, KP=1024,
        HAS_FORCED=forced is not None, HAS_COUNT=count is not None, PDL=pdl, num_warps=slots_warps(width), **launching,
    )  # fmt: skip
    return out


def launch_long(
    scores: Tensor,
    k: int,
    forced: Tensor | None = None,
    count: Tensor | None = None,
    unit: int = 1,
    tallied: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Long rows, by many programs each: (slots [rows, k], how many of them are chosen, int32 [rows]).

    tallied: room for the digits, `digits_of` the scores, where who made the scores has counted the first digit already.
    """
    rows, n = scores.shape
    count = None if count is None else count.contiguous()
    chunk, chunks, parts = long_settings(rows, n, scores.dtype)
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    found = torch.empty(rows, dtype=torch.int32, device=scores.device)
    if not rows:
        return out, found
    hist = digits_of(scores) if tallied is None else tallied
    pdl, launching = dependent(scores)
    how = {"CH": chunk, "CB": 16, "HAS_FORCED": forced is not None, "HAS_COUNT": count is not None, "PDL": pdl}
    how |= launching | {"num_warps": long_warps(chunk)}
    base = (scores, given(forced, out), given(count, out), hist)
    for part in range(tallied is not None, parts):
        _digit[(chunks, rows)](*base, n, scores.stride(0), k, chunks, rows, PART=part, **how)
    _pack[(chunks, rows)](*base, out, found, n, scores.stride(0), k, unit, chunks, rows, KP=1024, PARTS=parts, **how)
    return out, found


def digits_of(scores: Tensor) -> Tensor:
    """Room for how often each digit occurs in each chunk of a row."""
    _, chunks, parts = long_settings(*scores.shape, scores.dtype)
    return torch.empty(parts, scores.shape[0], chunks, 256, dtype=torch.int32, device=scores.device)


def long_settings(rows: int, n: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Scores of a program, programs of a row, and digits of a score: all that differs of a bfloat16 lies in two.

    Each program adds up the digits of all programs of its row: as few as fill the device with all rows together.
    """
    programs = max(32, min(128, 512 // rows))
    chunk = min(4096, max(512, triton.next_power_of_2(triton.cdiv(n, programs))))
    return chunk, max(1, triton.cdiv(n, chunk)), 2 if dtype == torch.bfloat16 else 4


def long_warps(chunk: int) -> int:
    return max(4, min(16, chunk // 256))


def slots_warps(width: int) -> int:
    """At most 16 scores a thread: more registers would spill."""
    return max(4, min(32, width // 512))


# ---------------------------------------------------------------------- slots of a mask

MASK = 2048  # slots of one program


@triton.jit
def _marked(M, OUT, n, m_row, k, CH: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, PDL: tl.constexpr):
    """The k first slots that are marked. Each program counts the marks before its own anew: bytes that lie in the cache."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    M += row * m_row
    start = chunk * CH
    sum = tl.zeros([CP], tl.int32)
    for c in range(0, start, CP):
        i = c + tl.arange(0, CP)
        sum += tl.load(M + i, mask=i < start, other=0).to(tl.int32)
    i = start + tl.arange(0, CH)
    mine = tl.load(M + i, mask=i < n, other=0).to(tl.int32)
    rank = tl.sum(sum, 0) + tl.cumsum(mine, 0) - 1
    tl.store(OUT + row * k + rank, i, mask=(mine > 0) & (rank < k))
    if chunk == tl.num_programs(0) - 1:
        found = tl.sum(sum, 0) + tl.sum(mine, 0)
        for j0 in range(0, k, KP):
            j = j0 + tl.arange(0, KP)
            tl.store(OUT + row * k + j, -1, mask=(j >= found) & (j < k))


@torch.library.custom_op("foveal::marked_slots", mutates_args=())
def marked_slots(mask: Tensor, k: int) -> Tensor:
    return launch_marked(mask, k)


@marked_slots.register_fake
def _(mask, k):
    return mask.new_empty(mask.shape[0], k, dtype=torch.int32)


def launch_marked(mask: Tensor, k: int) -> Tensor:
    rows, n = mask.shape
    mask = (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)
    out = torch.empty(rows, k, dtype=torch.int32, device=mask.device)
    if rows:
        pdl, launching = dependent(mask)
        _marked[(max(1, triton.cdiv(n, MASK)), rows)](
            mask, out, n, mask.stride(0), k, CH=MASK, CP=8192, KP=1024, PDL=pdl, num_warps=8, **launching
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over widths and options."""
    found = []
    base = {"X": "*fp32", "F": "*u8", "COUNT": "*i32", "OUT": "*i32"} | dict.fromkeys(
        ("n", "x_row", "k", "unit"), "i32"
    )
    for width in (128, 2048, 8192):
        constants = {"NP": width, "KP": 1024, "HAS_FORCED": width == 8192, "HAS_COUNT": width == 2048, "PDL": True}
        found.append(Variant(f"slots {width}", _slots, base, constants, {"num_warps": slots_warps(width)}))
    base |= dict.fromkeys(("HIST", "FOUND"), "*i32") | dict.fromkeys(("chunks", "rows"), "i32")
    for chunk in (512, 1024, 4096):
        given_ = {"HAS_FORCED": chunk == 512, "HAS_COUNT": chunk == 1024}
        constants = {"CH": chunk, "CB": 16, "PDL": True} | given_
        options = {"num_warps": long_warps(chunk)}
        for part in (0, 3):
            found.append(Variant(f"digit {part} of {chunk}", _digit, base, constants | {"PART": part}, options))
        for x, parts in (("*fp32", 4), ("*bf16", 2)):
            constants |= {"KP": 1024, "PARTS": parts}
            found.append(Variant(f"pack {chunk} {x}", _pack, base | {"X": x}, constants, options))
    constants = {"CH": MASK, "CP": 8192, "KP": 1024, "PDL": True}
    types = {"M": "*u8", "OUT": "*i32", "n": "i32", "m_row": "i32", "k": "i32"}
    found.append(Variant("marked", _marked, types, constants, {"num_warps": 8}))
    return found
