"""The key of each row that matters least is found and leaves, in one launch: what a decode step that evicts costs.

One program a row reads the token ids, and the scores where there are any, of the keys the row holds; the rest is a constant amount
of work. What leaves and why: `foveal.ops.leave`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent, given
from .pages import _recent, _remove
from .variants import Variant

if TYPE_CHECKING:
    from foveal.ops.leave import Leaving

TILE, WARPS = 4096, 16  # keys of one step of the search
MASS = 1024  # keys of one program of the sum by token


@triton.jit
def _ordered(x):
    """int32 that orders like the float."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _lower(a, at, b, bt):
    """The smaller of two values, of equal ones the smaller slot."""
    first = (a < b) | ((a == b) & (at < bt))
    return tl.where(first, a, b), tl.where(first, at, bt)


@triton.jit
def _least(value, slot):
    best = tl.min(value, 0)
    return best, tl.min(tl.where(value == best, slot, 2147483647), 0)


@triton.jit
def _fold(
    POOL, row, seed, slot, own, other, TABLE, table_stride, W: tl.constexpr, WIDEST: tl.constexpr, PAGE: tl.constexpr
):
    """The vector at `seed` becomes the mean of itself and the one at `slot`, weighted by their masses."""
    i = tl.arange(0, WIDEST)
    to = tl.load(TABLE + row * table_stride + seed // PAGE).to(tl.int64) * PAGE + seed % PAGE
    source = tl.load(TABLE + row * table_stride + slot // PAGE).to(tl.int64) * PAGE + slot % PAGE
    x = tl.load(POOL + to * W + i, mask=i < W, other=0.0).to(tl.float32)
    y = tl.load(POOL + source * W + i, mask=i < W, other=0.0).to(tl.float32)
    mean = x * (own / (own + other)) + y * (other / (own + other))
    tl.store(POOL + to * W + i, mean.to(POOL.dtype.element_ty), mask=i < W)


@triton.jit(do_not_specialize=["allowed", "recent", "after"])
def _leave(
    TOKEN, SCORE, P0, P1, LIMIT, RECENT, HEADS, GONE, LEFT, A, B, C, E, TABLE, LENGTH, FREE, TOP, PLACE, HIDDEN,
    plane_stride, score_stride, limit_row, limit_head, table_stride, hidden_stride, allowed, recent, after, kv_heads,
    BY: tl.constexpr, PLANES: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_RECENT: tl.constexpr, HAS_HEADS: tl.constexpr,
    HAS_GONE: tl.constexpr, FOLD: tl.constexpr, TELL: tl.constexpr, FILL0: tl.constexpr, FILL1: tl.constexpr,
    WA: tl.constexpr, WB: tl.constexpr, WC: tl.constexpr, WE: tl.constexpr, WIDEST: tl.constexpr, PAGE: tl.constexpr,
    SCALES: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BY: 0 the oldest leaves, 1 the least of SCORE by slot, 2 the least of SCORE by token id. P0, P1: planes that move with the keys, the
    first of which is the mass where FOLD. GONE: a token id of each sequence that leaves before any other; LEFT: the one that did."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    sequence, head = row // kv_heads, row % kv_heads
    n = tl.load(LENGTH + row)
    limit = allowed
    if HAS_LIMIT:
        limit = tl.load(LIMIT + sequence * limit_row + head * limit_head).to(tl.int32)
    if HAS_HEADS:
        limit = tl.where(tl.load(HEADS + head) != 0, limit, 2147483647)
    gone = tl.full([], -1, tl.int32)
    if HAS_GONE:
        gone = tl.load(GONE + sequence)
    slot = tl.full([], -1, tl.int32)
    leaver = tl.full([], -1, tl.int32)
    if (n > limit) | (gone >= 0):
        fresh = recent
        if HAS_RECENT:
            fresh = tl.load(RECENT + sequence).to(tl.int32)
        stop = tl.load(TOKEN + row * plane_stride + n - 1) - fresh  # the newest key is the last
        lane = tl.arange(0, BN)
        value = tl.full([BN], 2147483647, tl.int32)
        at = lane
        if FOLD:  # the oldest stays and takes in the next
            value2 = value
            at2 = lane
        found = tl.full([BN], -1, tl.int32)
        for n0 in range(0, n, BN):
            i = n0 + lane
            held = i < n
            token = tl.load(TOKEN + row * plane_stride + i, mask=held, other=2147483647)
            if HAS_GONE:
                found = tl.where(held & (token == gone), i, found)
            key = token
            if BY == 1:
                key = _ordered(tl.load(SCORE + row * score_stride + i, mask=held, other=0.0))
            elif BY == 2:
                key = _ordered(tl.load(SCORE + sequence * score_stride + token, mask=held, other=0.0))
            key = tl.where(held & (token >= after) & (token <= stop), key, 2147483647)
            if FOLD:
                later, later_at = _lower(key, i, value, at)
                value2, at2 = _lower(value2, at2, tl.where(later_at == i, value, key), tl.where(later_at == i, at, i))
                value, at = later, later_at
            else:
                value, at = _lower(value, at, key, i)
        best, first = _least(value, at)
        if FOLD:
            seed = first
            mine = at == seed
            best, first = _least(tl.where(mine, value2, value), tl.where(mine, at2, at))
        slot = tl.where((n > limit) & (best < 2147483647), first, -1)
        if HAS_GONE:
            hit = tl.max(found, 0)
            slot = tl.where((hit >= 0) & (gone >= 0), hit, slot)
        if slot >= 0:
            last = n - 1
            leaver = tl.load(TOKEN + row * plane_stride + slot)
            if FOLD:
                own = tl.load(P0 + row * plane_stride + seed)
                other = tl.load(P0 + row * plane_stride + slot)
                _fold(A, row, seed, slot, own, other, TABLE, table_stride, WA, WIDEST, PAGE)
                _fold(B, row, seed, slot, own, other, TABLE, table_stride, WB, WIDEST, PAGE)
                tl.debug_barrier()
                tl.store(P0 + row * plane_stride + seed, own + other)
            moved = tl.load(TOKEN + row * plane_stride + last)
            tl.debug_barrier()
            tl.store(TOKEN + row * plane_stride + slot, moved)
            tl.store(TOKEN + row * plane_stride + last, 2147483647)
            if PLANES > 0:
                x = tl.load(P0 + row * plane_stride + last)
                tl.debug_barrier()
                tl.store(P0 + row * plane_stride + slot, x)
                tl.store(P0 + row * plane_stride + last, FILL0)
            if PLANES > 1:
                y = tl.load(P1 + row * plane_stride + last)
                tl.debug_barrier()
                tl.store(P1 + row * plane_stride + slot, y)
                tl.store(P1 + row * plane_stride + last, FILL1)
            _remove(
                row, slot, n, A, B, C, E, TABLE, LENGTH, FREE, TOP, PLACE, HIDDEN, table_stride, hidden_stride,
                WA, WB, WC, WE, WIDEST, PAGE, SCALES, WINDOW,
            )  # fmt: skip
    if TELL:  # every head of a sequence lets go of the same token
        tl.store(LEFT + sequence, leaver, mask=head == 0)


@triton.jit
def _add_by_token(
    TOTAL, MASS, TOKEN, LENGTH, total_stride, mass_stride, plane_stride, G: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """TOTAL of the token in each slot grows by the MASS of its key, summed over the KV heads of the sequence."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sequence = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    held = n < tl.load(LENGTH + sequence * G)
    g = tl.arange(0, GP)
    at = MASS + (sequence * G + g)[:, None].to(tl.int64) * mass_stride + n[None, :]
    mass = tl.sum(tl.load(at, mask=(g < G)[:, None] & held[None, :], other=0.0), 0)
    token = tl.load(TOKEN + sequence.to(tl.int64) * G * plane_stride + n, mask=held, other=0)
    to = TOTAL + sequence * total_stride + token
    tl.store(to, tl.load(to, mask=held, other=0.0) + mass, mask=held)


# ---------------------------------------------------------------------- launching


def tile(fold: bool) -> int:
    """Keys of one step of the search; two minima at once take the registers of one tile twice as large."""
    return TILE // 2 if fold else TILE


def launch(x: Leaving) -> Tensor | None:
    """See `foveal.ops.leave.leave_page_keys`: the token id that left each sequence, int32 [batch], with `by_token`."""
    from foveal.ops.pages import pools

    pages, token = x.pages, x.token
    a, b, *scales = pools(pages)
    if x.fold:  # means are taken of numbers, not of bytes
        a, b = pages.key, pages.value
    c, e = scales or (a, b)
    widths = [p.shape[2] for p in (a, b, c, e)]
    pdl, how = dependent(token)
    window, place, hidden = _recent(pages)
    limit = x.allowed if isinstance(x.allowed, Tensor) else None
    recent = x.recent if isinstance(x.recent, Tensor) else None
    heads = None if x.heads is None else x.heads.view(torch.uint8)
    planes, fills = [p for p, _ in x.planes], [f for _, f in x.planes]
    score = x.by_token if x.by_token is not None else x.score
    left = None if x.by_token is None else token.new_empty(pages.rows // x.kv_heads)
    _leave[(pages.rows,)](
        token, given(score, token), *[*planes, token, token][:2], given(limit, token), given(recent, token), given(heads, token),
        given(x.gone, token), given(left, token), a, b, c, e, pages.table, pages.length, x.free, x.top, place, hidden,
        token.stride(0), 0 if score is None else score.stride(0), 0 if limit is None else limit.stride(0),
        0 if limit is None or limit.shape[1] == 1 else limit.stride(1), pages.table.stride(0), hidden.stride(0),
        0 if limit is not None else x.allowed, 0 if recent is not None else x.recent, x.after, x.kv_heads,
        BY=0 if score is None else 1 if x.by_token is None else 2, PLANES=len(planes), HAS_LIMIT=limit is not None,
        HAS_RECENT=recent is not None, HAS_HEADS=x.heads is not None, HAS_GONE=x.gone is not None, FOLD=x.fold, TELL=left is not None,
        FILL0=float([*fills, 0.0][0]), FILL1=float([*fills, 0.0, 0.0][1]), WA=widths[0], WB=widths[1], WC=widths[2], WE=widths[3],
        WIDEST=triton.next_power_of_2(max(widths)), PAGE=pages.size, SCALES=bool(scales), WINDOW=window, BN=tile(x.fold), PDL=pdl,
        num_warps=WARPS, **how,
    )  # fmt: skip
    return left


def add_by_token(total: Tensor, mass: Tensor, token: Tensor, length: Tensor, kv_heads: int) -> None:
    """See `foveal.ops.leave.add_by_token`."""
    pdl, how = dependent(mass)
    _add_by_token[(triton.cdiv(mass.shape[1], MASS), total.shape[0])](
        total, mass, token, length, total.stride(0), mass.stride(0), token.stride(0), G=kv_heads,
        GP=triton.next_power_of_2(kv_heads), BN=MASS, PDL=pdl, num_warps=4, **how,
    )  # fmt: skip


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """Eviction by age, by score and by token, with folding, codes and a residual window."""
    found = [
        _variant("oldest 128", 128, HAS_HEADS=True),
        _variant("oldest 96", 96, HAS_LIMIT=True),
        _variant("oldest codes", 64, SCALES=True, WINDOW=128, kind="u8"),
        _variant("folded 128", 128, FOLD=True, PLANES=1, HAS_HEADS=True, HAS_LIMIT=True, FILL0=1.0),
        _variant("folded 256 fp16", 256, FOLD=True, PLANES=1, FILL0=1.0, kind="fp16"),
        _variant("score 128", 128, BY=1, PLANES=1, HAS_LIMIT=True, HAS_RECENT=True),
        _variant("score 64 two planes", 64, BY=1, PLANES=2, FILL1=1.0),
        _variant("by token 128", 128, BY=2, PLANES=1, HAS_LIMIT=True, HAS_GONE=True, TELL=True),
    ]
    signature = {"TOTAL": "*fp32", "MASS": "*fp32", "TOKEN": "*i32", "LENGTH": "*i32"}
    signature |= dict.fromkeys(("total_stride", "mass_stride", "plane_stride"), "i32")
    constants = {"G": 8, "GP": 8, "BN": MASS, "PDL": True}
    return [*found, Variant("add by token", _add_by_token, signature, constants, {"num_warps": 4})]


def _variant(name: str, D: int, kind: str = "bf16", **flags) -> Variant:
    types = dict.fromkeys(("TOKEN", "GONE", "LEFT", "TABLE", "LENGTH", "FREE", "TOP", "PLACE"), "*i32")
    types |= dict.fromkeys(("SCORE", "P0", "P1", "HIDDEN"), "*fp32") | dict.fromkeys(("LIMIT", "RECENT"), "*i64")
    types |= {"HEADS": "*u8"} | dict.fromkeys("AB", f"*{kind}") | dict.fromkeys("CE", "*fp16")
    numbers = ("plane_stride", "score_stride", "limit_row", "limit_head", "table_stride", "hidden_stride")
    types |= dict.fromkeys((*numbers, "allowed", "recent", "after", "kv_heads"), "i32")
    constants = {"BY": 0, "PLANES": 0, "WINDOW": 0, "FILL0": 0.0, "FILL1": 0.0, "WA": D, "WB": D, "WC": 4, "WE": 4}
    names = ("HAS_LIMIT", "HAS_RECENT", "HAS_HEADS", "HAS_GONE", "FOLD", "TELL", "SCALES")
    constants |= dict.fromkeys(names, False) | {
        "WIDEST": triton.next_power_of_2(D),
        "PAGE": 32,
        "BN": tile(flags.get("FOLD", False)),
        "PDL": True,
    }
    loose = frozenset({"allowed", "recent", "after", "kv_heads", "limit_row", "limit_head"})
    return Variant(f"leave {name}", _leave, types, constants | flags, {"num_warps": WARPS}, loose)
