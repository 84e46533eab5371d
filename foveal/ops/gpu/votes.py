"""Votes of query heads on cached keys, and the least of a list. What they mean: `foveal.ops.votes`.

Choosing takes a launch over all keys (logits, and the log-sum-exp of each stretch), one that joins the stretches and adds up the
weights, and those of `top.py`, of which the first digit is counted along the way. Positions are turned where keys are read: one
program serves all KV heads of its tokens, so an angle is computed once for all of them. Logits are in base 2 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LOG2E, dependent, given, padded
from .ragged import GROUP, Wanted
from .ragged import launch as attend
from .top import _ordered, _tally, digits_of, launch_long, long_settings
from .variants import Variant

SHARE = {"sum": 0, "mean": 1, "max": 2}


@triton.jit
def _cos_sin(angle):
    """Both in float32, the angle first brought to an eighth of a turn; the library's functions take a slow path for large angles."""
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = angle - turns * 1.5703125  # a quarter of a turn in three parts, of which the products are exact
    x = x - turns * 4.837512969970703e-4
    x = x - turns * 7.549789954891882e-8
    z = x * x
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quarter = turns.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    return cos, tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _turned(low, high, cos, sin, dtype: tl.constexpr):
    """Both halves of vectors turned, rounded as cached keys are."""
    a = low.to(tl.float32)
    b = high.to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _ends(ENDS, batch, length, sink, recent, HAS_ENDS: tl.constexpr):
    """The first slot after the sinks, and the first of the window."""
    if HAS_ENDS:
        sink = tl.load(ENDS + batch * 2)
        recent = tl.load(ENDS + batch * 2 + 1)
    return sink, length - recent


@triton.jit
def _logits(
    Q, K, TABLE, LENGTH, ENDS, FREQUENCY, KEPT, Z, TOP, SUM, table_stride, z_stride, tiles, sink, recent, stand, scale, softcap,
    KV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    TURN: tl.constexpr, MIDDLE: tl.constexpr, HAS_ENDS: tl.constexpr, HAS_KEPT: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Z [rows, G, keys], and TOP, SUM [rows, G, tiles]: the largest logit of a tile and the sum of exp2 below it."""
    tile, batch = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    gi = tl.arange(0, GP)
    di = tl.arange(0, DB)
    some = (gi < G)[:, None]
    HALF: tl.constexpr = D // 2 if TURN else D
    inside = di < HALF
    if (
        TURN
    ):  # what does not depend on the launch before; keys go to position 0, the query comes from its own to `stand`
        f = tl.load(FREQUENCY + di, mask=inside, other=0.0)
        cos, sin = _cos_sin(n.to(tl.float32)[:, None] * f[None, :])
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kept = False
    if HAS_KEPT:
        kept = tl.load(KEPT + batch) != 0
    if not kept:
        if TURN:
            own = tl.load(LENGTH + batch * KV) - 1
            q_cos, q_sin = _cos_sin((stand - own).to(tl.float32) * f)
        for g in tl.range(0, KV, num_stages=STAGES):
            row = (batch * KV + g).to(tl.int64)
            length = tl.load(LENGTH + row)
            ok = n < length
            page = tl.load(TABLE + row * table_stride + n // PAGE, mask=ok, other=0)
            at = page.to(tl.int64) * PAGE + n % PAGE
            k_at = K + at[:, None] * D + di[None, :]
            q_at = Q + (row * G + gi[:, None]) * D + di[None, :]
            k = tl.load(k_at, mask=ok[:, None] & inside[None, :], other=0.0)
            q = tl.load(q_at, mask=some & inside[None, :], other=0.0)
            if TURN:
                k_high = tl.load(k_at + HALF, mask=ok[:, None] & inside[None, :], other=0.0)
                q_high = tl.load(q_at + HALF, mask=some & inside[None, :], other=0.0)
                k, k_high = _turned(k, k_high, cos, -sin, Q.dtype.element_ty)
                q, q_high = _turned(q, q_high, q_cos[None, :], q_sin[None, :], Q.dtype.element_ty)
                s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32")
                s = tl.dot(q_high, tl.trans(k_high), s, input_precision="ieee" if PRECISE else "tf32")
            else:
                s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32")
            s = s * scale
            if HAS_CAP:
                s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634
            if MIDDLE:
                first, stop = _ends(ENDS, batch, length, sink, recent, HAS_ENDS)
                ok = ok & (n >= first) & (n < stop)
            s = tl.where(ok[None, :], s, float("-inf"))
            top = tl.max(s, 1)
            base = tl.where(top == float("-inf"), 0.0, top)
            sum = tl.sum(tl.exp2(s - base[:, None]), 1)
            tl.store(Z + (row * G + gi[:, None]) * z_stride + n[None, :], s, mask=some & (n < z_stride)[None, :])
            tl.store(TOP + (row * G + gi) * tiles + tile, top, mask=gi < G)
            tl.store(SUM + (row * G + gi) * tiles + tile, sum, mask=gi < G)


@triton.jit
def _votes(
    Z, TOP, SUM, LENGTH, ENDS, KEPT, MARKS, OUT, HIST, n_all, tiles, chunks, marks_stride, sink, recent,
    HEADS: tl.constexpr, ROWS: tl.constexpr, HB: tl.constexpr, CH: tl.constexpr, TB: tl.constexpr, SHARE: tl.constexpr,
    OWN: tl.constexpr, HAS_ENDS: tl.constexpr, HAS_KEPT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weights of HEADS heads joined, what is forced at infinity and what is not offered at minus that; the first digit counted."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, o = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = chunk * CH + tl.arange(0, CH)
    length = tl.load(LENGTH + o * ROWS)
    vote = tl.zeros([CH], tl.float32)
    kept = False
    if HAS_KEPT:
        kept = tl.load(KEPT + o) != 0
    if kept:
        mark = tl.load(MARKS + o * ROWS * marks_stride + n, mask=n < length, other=0)
        vote = tl.where(mark != 0, 1.0, float("-inf"))
    else:
        for h0 in range(0, HEADS, HB):
            h = h0 + tl.arange(0, HB)
            top = tl.full([HB], float("-inf"), tl.float32)
            sum = tl.zeros([HB], tl.float32)
            for t0 in range(0, tiles, TB):
                t = t0 + tl.arange(0, TB)
                ok = (h < HEADS)[:, None] & (t < tiles)[None, :]
                at = (o * HEADS + h[:, None]) * tiles + t[None, :]
                x = tl.load(TOP + at, mask=ok, other=float("-inf"))
                new = tl.maximum(top, tl.max(x, 1))
                base = tl.where(new == float("-inf"), 0.0, new)
                part = tl.load(SUM + at, mask=ok, other=0.0) * tl.exp2(x - base[:, None])
                sum = sum * tl.exp2(top - base) + tl.sum(part, 1)
                top = new
            lse = tl.where(sum > 0, top + tl.log2(sum), 0.0)
            ok = (h < HEADS)[:, None] & (n < length)[None, :]
            z = tl.load(Z + (o * HEADS + h[:, None]) * n_all + n[None, :], mask=ok, other=float("-inf"))
            p = tl.exp2(z - lse[:, None])
            if SHARE == 2:
                vote = tl.maximum(vote, tl.max(p, 0))
            else:
                vote += tl.sum(p, 0)
        if SHARE == 1:
            vote = vote / HEADS
    first, stop = _ends(ENDS, o, length, sink, recent, HAS_ENDS)
    vote = tl.where((n < first) | (n >= stop), float("inf"), vote)
    vote = tl.where(n < length - (0 if OWN else 1), vote, float("-inf"))
    vote = vote.to(OUT.dtype.element_ty)
    tl.store(OUT + o * n_all + n, vote, mask=n < n_all)
    x = vote.to(tl.float32)
    seen = _tally(_ordered(x), x > float("-inf"), 0, 0)
    tl.store(HIST + (o * chunks + chunk) * 256 + tl.arange(0, 256), seen)


@torch.library.custom_op("foveal::vote_slots", mutates_args=())
def vote_slots(
    q: Tensor, key: Tensor, table: Tensor, length: Tensor, bound: int, kv_heads: int, scale: float, softcap: float | None, k: int,
    count: Tensor | None, sink: int, recent: int, ends: Tensor | None, middle: bool, own: bool, share: str, whole: bool,
    coarse: bool, frequency: Tensor | None, stand: int, kept: Tensor | None, marks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch(
        q, key, table, length, bound, kv_heads, scale, softcap, k, count, sink, recent, ends, middle, own, share, whole, coarse,
        frequency, stand, kept, marks,
    )  # fmt: skip


@vote_slots.register_fake
def _(q, key, table, length, bound, kv_heads, scale, softcap, k, count, sink, recent, ends, middle, own, share, whole, coarse,
      frequency, stand, kept, marks):  # fmt: skip
    rows = q.shape[0] // kv_heads if whole else q.shape[0]
    return q.new_empty(rows, k, dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


def launch(
    q, key, table, length, bound, kv_heads, scale, softcap, k, count=None, sink=0, recent=0, ends=None, middle=False, own=False,
    share="sum", whole=True, coarse=False, frequency=None, stand=0, kept=None, marks=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Slots [lists, k] and how many each list has, int32 [lists]; see `foveal.ops.vote_slots`."""
    rows, G, D = q.shape
    KV, batch, device = kv_heads, rows // kv_heads, q.device
    turn, (BN, warps, stages) = frequency is not None, logits_settings(D, q.element_size(), frequency is not None)
    tiles, heads, lists = max(1, triton.cdiv(bound, BN)), KV * G if whole else G, batch if whole else rows
    z = torch.empty(rows, G, bound, dtype=torch.float32, device=device)
    top = torch.empty(2, rows, G, tiles, dtype=torch.float32, device=device)
    pdl, launching = dependent(q)
    ended = {"HAS_ENDS": ends is not None, "HAS_KEPT": kept is not None, "PDL": pdl} | launching
    kept = None if kept is None else kept.view(torch.uint8)
    extra = [given(x, length) for x in (ends, frequency, kept)]
    _logits[(tiles, batch)](
        q.contiguous(), key, table, length, *extra, z, top[0], top[1], table.stride(0), bound, tiles, sink, recent, stand,
        scale if softcap is not None else scale * LOG2E, softcap or 0.0, KV=KV, G=G, GP=max(GROUP, triton.next_power_of_2(G)), D=D,
        DB=padded(D // 2 if turn else D), PAGE=key.shape[1], BN=BN, TURN=turn, MIDDLE=middle, HAS_CAP=softcap is not None,
        PRECISE=q.dtype == torch.float32, STAGES=stages, num_warps=warps, **ended,
    )  # fmt: skip
    score = torch.empty(lists, bound, dtype=torch.bfloat16 if coarse else torch.float32, device=device)
    chunk, chunks, _ = long_settings(lists, bound, score.dtype)
    hist = digits_of(score)
    marks = None if marks is None else marks.view(torch.uint8)
    _votes[(chunks, lists)](
        z, top[0], top[1], length, extra[0], extra[2], given(marks, length), score, hist, bound, tiles, chunks,
        0 if marks is None else marks.stride(0), sink, recent, HEADS=heads, ROWS=KV if whole else 1, HB=heads_at_once(heads, chunk),
        CH=chunk, TB=tiles_at_once(heads, chunk), SHARE=SHARE[share], OWN=own, num_warps=8, **ended,
    )  # fmt: skip
    return launch_long(score, k, count=count, tallied=hist)


def logits_settings(head_dim: int, itemsize: int, turn: bool) -> tuple[int, int, int]:
    """Keys of a tile, warps and pipeline stages."""
    if itemsize == 4 or head_dim > 128:
        return 32, 8 if turn else 4, 2
    return 64, 8 if turn else 4, 3


def heads_at_once(heads: int, chunk: int) -> int:
    return max(1, min(triton.next_power_of_2(heads), 8192 // chunk))


def tiles_at_once(heads: int, chunk: int) -> int:
    """Each program joins all tiles of all heads, one wait for memory after the other: as few as registers allow."""
    return max(128, 4096 // heads_at_once(heads, chunk))


# ---------------------------------------------------------------------- the least of a list


@triton.jit
def _least(
    LOGIT, SLOTS, MARKS, LENGTH, ALLOWED, m, slots_stride, marks_stride, allowed,
    G: tl.constexpr, GP: tl.constexpr, KV: tl.constexpr, BT: tl.constexpr, MEAN: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """LOGIT [rows, m + 1, G], the newest key last: it is marked, and the least of all is not any more where they are too many."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    gi = tl.arange(0, GP)
    own = tl.load(LENGTH + row) - 1
    if HAS_ALLOWED:
        allowed = tl.load(ALLOWED + row // KV).to(tl.int32)
    top = tl.full([GP], float("-inf"), tl.float32)
    sum = tl.zeros([GP], tl.float32)
    for n0 in range(0, m + 1, BT):
        n = n0 + tl.arange(0, BT)
        at = LOGIT + (row * (m + 1) + n)[None, :] * G + gi[:, None]
        s = tl.load(at, mask=(gi < G)[:, None] & (n <= m)[None, :], other=float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        sum = sum * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new
    lse = tl.where(sum > 0, top + tl.log2(tl.maximum(sum, 1e-30)), 0.0)
    least = tl.full([], float("inf"), tl.float32)
    place = tl.full([], 0, tl.int32)
    count = tl.full([], 1, tl.int32)
    for n0 in range(0, m + 1, BT):
        n = n0 + tl.arange(0, BT)
        at = LOGIT + (row * (m + 1) + n)[None, :] * G + gi[:, None]
        s = tl.load(at, mask=(gi < G)[:, None] & (n <= m)[None, :], other=float("-inf"))
        p = tl.exp2(s - lse[:, None])
        w = tl.sum(p, 0) / G if MEAN else tl.max(p, 0)
        slot = tl.load(SLOTS + row * slots_stride + n, mask=n < m, other=-1)
        count += tl.sum((slot >= 0).to(tl.int32), 0)
        w = tl.where((slot >= 0) | (n == m), w, float("inf"))
        here = tl.min(w, 0)
        first = tl.min(tl.where(w == here, n, m + 1), 0)
        place = tl.where(here < least, first, place)
        least = tl.minimum(here, least)
    lost = tl.load(SLOTS + row * slots_stride + place, mask=place < m, other=0)
    lost = tl.where(place < m, lost, own)
    over = count > allowed
    tl.store(MARKS + row * marks_stride + own, tl.where(over & (lost == own), 0, 1).to(tl.int8))
    tl.store(MARKS + row * marks_stride + lost, tl.full([], 0, tl.int8), mask=over & (lost != own))


@torch.library.custom_op("foveal::drop_least", mutates_args=("marks",))
def drop_least(
    q: Tensor, key: Tensor, value: Tensor, table: Tensor, length: Tensor, bound: int, scale: float, softcap: float | None,
    slots: Tensor, marks: Tensor, allowed: int, each: Tensor | None, kv_heads: int, mean: bool,
) -> None:  # fmt: skip
    launch_least(
        q, key, value, table, length, bound, scale, softcap, slots, marks, allowed, each, kv_heads, mean
    )  # fmt: skip


def launch_least(
    q, key, value, table, length, bound, scale, softcap, slots, marks, allowed, each, kv_heads, mean
) -> None:
    wanted = {"softcap": softcap, "slots": slots, "own": True, "want": Wanted(logits=True)}
    logit = attend(q.contiguous(), key, value, table, length, bound, scale, **wanted)[2]
    rows, G, _ = q.shape
    pdl, how = dependent(logit)
    GP = triton.next_power_of_2(G)
    _least[(rows,)](
        logit, slots, marks.view(torch.int8), length, given(each, slots), slots.shape[1], slots.stride(0), marks.stride(0), allowed,
        G=G, GP=GP, KV=kv_heads, BT=max(128, 4096 // GP), MEAN=mean, HAS_ALLOWED=each is not None, PDL=pdl, num_warps=8, **how,
    )  # fmt: skip


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over head sizes, types and options."""
    found = []
    for D in (64, 96, 128, 256):
        found += [_logits_variant(D, "bf16", turn) for turn in (False, True)]
    found += [
        _logits_variant(128, "fp16", True),
        _logits_variant(128, "fp32", True),
        _logits_variant(128, "bf16", False, cap=True),
    ]
    types = dict.fromkeys(("Z", "TOP", "SUM"), "*fp32") | dict.fromkeys(("LENGTH", "ENDS", "HIST"), "*i32")
    types |= dict.fromkeys(("KEPT", "MARKS"), "*u8")
    types |= dict.fromkeys(("n_all", "tiles", "chunks", "marks_stride", "sink", "recent"), "i32")
    for heads, chunk, share, out in (
        (32, 512, "sum", "bf16"),
        (4, 512, "max", "fp32"),
        (64, 1024, "sum", "bf16"),
        (9, 4096, "mean", "fp32"),
    ):
        constants = {
            "HEADS": heads,
            "ROWS": 8,
            "HB": heads_at_once(heads, chunk),
            "CH": chunk,
            "TB": tiles_at_once(heads, chunk),
            "SHARE": SHARE[share],
        }
        constants |= {"OWN": share == "max", "HAS_ENDS": heads == 64, "HAS_KEPT": heads == 64, "PDL": True}
        found.append(Variant(f"votes {heads} {chunk}", _votes, types | {"OUT": f"*{out}"}, constants, {"num_warps": 8}))
    types = dict.fromkeys(("SLOTS", "LENGTH", "ALLOWED"), "*i32") | {"LOGIT": "*fp32", "MARKS": "*i8"}
    types |= dict.fromkeys(("m", "slots_stride", "marks_stride", "allowed"), "i32")
    for G in (1, 4, 9):
        GP = triton.next_power_of_2(G)
        constants = {
            "G": G,
            "GP": GP,
            "KV": 8,
            "BT": max(128, 4096 // GP),
            "MEAN": G == 9,
            "HAS_ALLOWED": G == 1,
            "PDL": True,
        }
        found.append(Variant(f"least {G}", _least, types, constants, {"num_warps": 8}))
    return found


def _logits_variant(D: int, dtype: str, turn: bool, cap: bool = False) -> Variant:
    BN, warps, stages = logits_settings(D, 4 if dtype == "fp32" else 2, turn)
    types = {"Q": f"*{dtype}", "K": f"*{dtype}"} | dict.fromkeys(("TABLE", "LENGTH", "ENDS"), "*i32") | {"KEPT": "*u8"}
    types |= dict.fromkeys(("FREQUENCY", "Z", "TOP", "SUM"), "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
    types |= dict.fromkeys(("table_stride", "z_stride", "tiles", "sink", "recent", "stand"), "i32")
    constants = {
        "KV": 8,
        "G": 4,
        "GP": GROUP,
        "D": D,
        "DB": padded(D // 2 if turn else D),
        "PAGE": 32,
        "BN": BN,
        "TURN": turn,
    }
    constants |= {"MIDDLE": turn, "HAS_ENDS": dtype == "fp16", "HAS_KEPT": dtype == "fp16", "HAS_CAP": cap}
    constants |= {"PRECISE": dtype == "fp32", "STAGES": stages, "PDL": True}
    return Variant(f"logits {D} {dtype} turn={turn} cap={cap}", _logits, types, constants, {"num_warps": warps})
