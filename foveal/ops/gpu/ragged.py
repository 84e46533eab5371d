"""Decode attention over pages: every row (sequence, KV head) has its own length and its own list of pages.

Two kernels. The split kernel has a constant grid of pieces; each program works out from the lengths, on the device, which
row and which stretch of it is its own, so lengths may change under one captured graph. The queries of a group are packed
into one matrix product. The merge kernel joins the pieces of a row by their log-sum-exp. Logits are in base 2 inside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dependent, given
from .variants import Variant

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
GROUP = 16  # query rows of one matrix product; smaller groups are padded
TILE = 64  # keys of one step
LEAST = 2  # tiles of a piece, at least: smaller ones cost more in merging than they win
FORMATS = {
    None: 0,
    "fp8": 1,
    "int8": 1,
    "int4": 2,
}  # how codes are read: floats, one scale a key, two groups of nibbles


@triton.jit
def _share(
    LENGTH, rows, limit, pieces, RP: tl.constexpr, BN: tl.constexpr, LEAST_TILES: tl.constexpr, LISTED: tl.constexpr
):
    """Keys and pieces of every row, and tiles of a piece. LISTED: rows read lists of `limit` slots, whatever they hold."""
    r = tl.arange(0, RP)
    if LISTED:
        length = tl.where(r < rows, limit, 0)
    else:
        length = tl.minimum(tl.load(LENGTH + r, mask=r < rows, other=0), limit)
    tiles = (length + BN - 1) // BN
    chunk = tl.maximum((tl.sum(tiles, 0) + pieces - 1) // pieces, LEAST_TILES)
    return r, length, (tiles + chunk - 1) // chunk, chunk


@triton.jit
def _locate(
    LENGTH, pid, rows, limit, pieces, RP: tl.constexpr, BN: tl.constexpr, LEAST_TILES: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """Which row a piece belongs to: (row, piece of the row, keys of the row, tiles of a piece)."""
    r, length, n, chunk = _share(LENGTH, rows, limit, pieces, RP, BN, LEAST_TILES, LISTED)
    end = tl.cumsum(n, 0)
    row = tl.sum((end <= pid).to(tl.int32), 0)
    mine = r == row
    first = tl.sum(tl.where(mine, end - n, 0), 0)
    return row, pid - first, tl.sum(tl.where(mine, length, 0), 0), chunk


@triton.jit
def _codes(X, at, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `at` of a pool [keys, WIDTH]: [keys, PADDED], zero past the width."""
    di = tl.arange(0, PADDED)
    pointers = X + at[:, None] * WIDTH + di[None, :]
    if PADDED == WIDTH:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(di < WIDTH)[None, :], other=0.0)
    return x.to(tl.float32) if X.dtype.element_ty == tl.int8 else x  # through float32: not every target has it directly


@triton.jit
def _nibbles(x, dtype: tl.constexpr):
    """Both halves of bytes as numbers that are too large by a constant: the bits of 128 or 1024 with the nibble below them."""
    if dtype == tl.float32:
        low = (x & 15).to(tl.float32)
        high = (x >> 4).to(tl.float32)
    else:
        magic: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
        wide = x.to(tl.uint16)
        low = ((wide & 15) | magic).to(dtype, bitcast=True)
        high = ((wide >> 4) | magic).to(dtype, bitcast=True)
    return low, high


@triton.jit
def _half(x, shift: tl.constexpr):
    return ((x >> shift) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _four(SCALE, at):
    """Scale and zero of both halves of a key, read as one number of 64 bits."""
    x = tl.load(SCALE + at)
    return _half(x, 0), _half(x, 16), _half(x, 32), _half(x, 48)


@triton.jit
def _split(
    Q, K, V, TABLE, LENGTH, HELD, SLOTS, EXTRA, MOVED, K_SCALE, V_SCALE, OUT, LSE, LOGIT,
    table_stride, slots_stride, extra_row, extra_head, logit_stride, moved, sink, listed, limit, rows, pieces, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    RP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, LEAST_TILES: tl.constexpr, FORMAT: tl.constexpr,
    HAS_SLOTS: tl.constexpr, RUN: tl.constexpr, OWN: tl.constexpr, HAS_EXTRA: tl.constexpr,
    HAS_MOVED: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    WRITE_LOGIT: tl.constexpr, VALUES: tl.constexpr, PRECISE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, piece, length, chunk = _locate(LENGTH, pid, rows, limit, pieces, RP, BN, LEAST_TILES, HAS_SLOTS)
    if row < rows:
        start = piece * chunk * BN
        end = tl.minimum(start + chunk * BN, length)
        HALVES: tl.constexpr = 2 if FORMAT == 2 else 1  # a byte of nibbles holds dimension i and i + D / 2
        OFFSET: tl.constexpr = 0 if PRECISE else 1024 if Q.dtype.element_ty == tl.float16 else 128
        DIMS: tl.constexpr = D // HALVES
        WIDE: tl.constexpr = DV // HALVES
        gi = tl.arange(0, GP)
        ni = tl.arange(0, BN)
        di = tl.arange(0, DP // HALVES)
        dv = tl.arange(0, DVP // HALVES)
        some = gi < G
        q_at = Q + row * G * D + gi[:, None] * D + di[None, :]
        q_ok = some[:, None] & (di < DIMS)[None, :]
        q = tl.load(q_at, mask=q_ok, other=0.0)
        if FORMAT == 2:
            q_high = tl.load(q_at + DIMS, mask=q_ok, other=0.0)
            q_sum = tl.sum(q.to(tl.float32), 1)
            q_high_sum = tl.sum(q_high.to(tl.float32), 1)
            high = tl.zeros([GP, DVP // HALVES], tl.float32)
        if HAS_SLOTS:
            held = tl.load(HELD + row) - (1 if OWN else 0)  # a list may name slots that have gone
        if HAS_WINDOW:
            skipped = tl.load(LENGTH + row) - length  # between the sinks and the window
        top = tl.full([GP], float("-inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DVP // HALVES], tl.float32)
        for n0 in tl.range(start, end, BN, num_stages=STAGES):
            n = n0 + ni
            ok = n < length
            slot = n
            if HAS_SLOTS:
                first = tl.load(SLOTS + row * slots_stride + n // RUN, mask=n < listed * RUN, other=-1)
                slot = first + n % RUN
                ok = (first >= 0) & (slot < held)
                if OWN:  # the newest key comes last, and only once
                    ok = ok | (n == listed * RUN)
                    slot = tl.where(n == listed * RUN, held, slot)
                slot = tl.where(ok, slot, 0)
            if HAS_WINDOW:
                slot = tl.where(n < sink, n, n + skipped)
            page = tl.load(TABLE + row * table_stride + slot // PAGE, mask=ok, other=0)
            at = page.to(tl.int64) * PAGE + slot % PAGE
            k = _codes(K, at, DIMS, DP // HALVES)
            if HAS_MOVED:  # the oldest slots have keys of their own: positions inside the cache
                other = MOVED + (row * moved + slot)[:, None] * D + di[None, :]
                own = (slot < moved)[:, None]
                k = tl.where(own, tl.load(other, mask=own & (di < D)[None, :], other=0.0), k)
            if FORMAT == 0:
                s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee" if PRECISE else "tf32")
            elif FORMAT == 1:
                s = tl.dot(q, tl.trans(k.to(q.dtype)))
                s = s * tl.load(K_SCALE + at)[None, :].to(tl.float32)
            else:
                low_k, high_k = _nibbles(k, q.dtype)
                a, b, c, d = _four(K_SCALE, at)
                s = tl.dot(q, tl.trans(low_k)) * a[None, :] + q_sum[:, None] * (b - OFFSET * a)[None, :]
                s += tl.dot(q_high, tl.trans(high_k)) * c[None, :] + q_high_sum[:, None] * (d - OFFSET * c)[None, :]
            s = s * scale
            if HAS_CAP:
                s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634
            if HAS_EXTRA == 2:
                s += tl.load(EXTRA + row * extra_row + slot, mask=ok, other=0.0)[None, :] * 1.4426950408889634
            elif HAS_EXTRA:
                more = tl.load(
                    EXTRA + row * extra_row + gi[:, None] * extra_head + slot[None, :],
                    mask=some[:, None] & ok[None, :], other=0.0,
                )  # fmt: skip
                s += more * 1.4426950408889634
            s = tl.where(ok[None, :], s, float("-inf"))
            if WRITE_LOGIT:  # the logits of a key lie together, so that a key is one store
                to = LOGIT + (row * logit_stride + n)[:, None] * G + gi[None, :]
                tl.store(to, tl.trans(s), mask=(n < length)[:, None] & some[None, :])
            if VALUES:
                new = tl.maximum(top, tl.max(s, 1))
                base = tl.where(new == float("-inf"), 0.0, new) if HAS_EXTRA or HAS_SLOTS else new
                fade = tl.exp2(top - base)
                p = tl.exp2(s - base[:, None])
                total = total * fade + tl.sum(p, 1)
                acc = acc * fade[:, None]
                v = _codes(V, at, WIDE, DVP // HALVES)
                if FORMAT == 0:
                    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee" if PRECISE else "tf32")
                elif FORMAT == 1:
                    p *= tl.load(V_SCALE + at)[None, :].to(tl.float32)
                    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc)
                else:
                    low_v, high_v = _nibbles(v, q.dtype)
                    a, b, c, d = _four(V_SCALE, at)
                    low_p = (p * a[None, :]).to(q.dtype)
                    acc = tl.dot(low_p, low_v, acc)
                    acc += tl.sum(p * b[None, :] - OFFSET * low_p.to(tl.float32), 1)[:, None]
                    high_p = (p * c[None, :]).to(q.dtype)
                    high = tl.dot(high_p, high_v, high * fade[:, None])
                    high += tl.sum(p * d[None, :] - OFFSET * high_p.to(tl.float32), 1)[:, None]
                top = new
        if VALUES:
            seen = tl.maximum(total, 1e-30)
            out_at = OUT + pid * G * DV + gi[:, None] * DV + dv[None, :]
            out_ok = some[:, None] & (dv < WIDE)[None, :]
            tl.store(out_at, acc / seen[:, None], mask=out_ok)
            if FORMAT == 2:
                tl.store(out_at + WIDE, high / seen[:, None], mask=out_ok)
            tl.store(LSE + pid * G + gi, tl.where(total > 0, top + tl.log2(seen), float("-inf")), mask=some)


@triton.jit
def _merge(
    PART, PART_LSE, LENGTH, SINKS, OUT, LSE, limit, rows, pieces,
    G: tl.constexpr, DV: tl.constexpr, DB: tl.constexpr, NB: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    LEAST_TILES: tl.constexpr, LISTED: tl.constexpr, MANY: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (row, query head, stretch of the value): the pieces of the row, joined."""
    pid = tl.program_id(0)
    stretch, head = pid % NB, pid // NB
    row, g = head // G, head % G
    r, _, n, _ = _share(LENGTH, rows, limit, pieces, RP, BN, LEAST_TILES, LISTED)
    first = tl.sum(tl.where(r < row, n, 0), 0)
    count = tl.sum(tl.where(r == row, n, 0), 0)
    di = stretch * DB + tl.arange(0, DB)
    many = tl.arange(0, MANY)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([DB], tl.float32)
    for p0 in range(0, count, MANY):
        ok = p0 + many < count
        at = (first + p0 + many) * G + g
        lse = tl.load(PART_LSE + at, mask=ok, other=float("-inf"))
        part = tl.load(PART + at[:, None] * DV + di[None, :], mask=ok[:, None] & (di < DV)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - base)
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(weight[:, None] * part, 0)
        top = new
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(top, sink)
        fade = tl.exp2(top - new)
        total = total * fade + tl.exp2(sink - new)
        acc = acc * fade
        top = new
    seen = tl.maximum(total, 1e-30)
    tl.store(OUT + head * DV + di, (acc / seen).to(OUT.dtype.element_ty), mask=di < DV)
    if stretch == 0:
        tl.store(LSE + head, tl.where(total > 0, (top + tl.log2(seen)) * 0.6931471805599453, float("-inf")))


@triton.jit
def _weigh(
    LOGIT, LSE, LENGTH, WEIGHT, logit_stride, width, limit,
    G: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, SUM: tl.constexpr, LOW: tl.constexpr, LISTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Logits to weights, [rows, group, width] or, summed over the group, [rows, width]; zero past a row's length.

    LOW: instead of a sum, how many of the group's weights are below uniform.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    gi = tl.arange(0, GP)
    length = limit if LISTED else tl.minimum(tl.load(LENGTH + row), limit)
    some = (gi < G)[:, None]
    lse = tl.load(LSE + row * G + gi, mask=gi < G, other=0.0) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    at = (row * logit_stride + n)[None, :] * G + gi[:, None]
    s = tl.load(LOGIT + at, mask=some & (n < length)[None, :], other=float("-inf"))
    p = tl.exp2(s - lse[:, None])
    if LOW:  # a tie with uniform attention is not low
        low = some & (n < length)[None, :] & (p < 0.99999 / length)
        tl.store(WEIGHT + row * width + n, tl.sum(low.to(tl.float32), 0), mask=n < width)
    elif SUM:
        tl.store(WEIGHT + row * width + n, tl.sum(p, 0), mask=n < width)
    else:
        tl.store(WEIGHT + (row * G + gi[:, None]) * width + n[None, :], p, mask=some & (n < width)[None, :])


# ---------------------------------------------------------------------- launching


class Wanted(NamedTuple):
    """What decode attention returns beside the output: weights of every query head, or summed over a group, or how many of a group are
    below uniform, or logits alone."""

    weights: bool = False
    mass: bool = False
    logits: bool = False
    low: bool = False

    @property
    def keys(self) -> bool:
        """One number a key, for the group as a whole."""
        return self.mass or self.low


NOTHING = Wanted()


def launch(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    length: Tensor,
    bound: int,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    extra: Tensor | None = None,
    slots: Tensor | None = None,
    run: int = 1,
    own: bool = False,
    moved: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    format: str | None = None,
    want: Wanted = NOTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels on checked arguments: (out, lse, weights or mass or logits); see `foveal.ops.attend_ragged`."""
    rows, G, D = q.shape
    PAGE, halves = key.shape[1], 2 if format == "int4" else 1
    DV = value.shape[2] * halves
    limit = bound if slots is None else slots.shape[1] * run + own
    if window is not None:
        limit = min(limit, sum(window))
    pieces = pieces_for(rows, q.device)
    part = q.new_empty(pieces + rows, G, DV, dtype=torch.float32)
    part_lse = q.new_empty(pieces + rows, G, dtype=torch.float32)
    explicit = any(want)
    logit = q.new_empty(rows, limit, G, dtype=torch.float32) if explicit else part
    pdl, how = dependent(q)
    RP = triton.next_power_of_2(rows)
    settings = tile_settings(D, DV, rows, q.element_size(), format)
    kind = 0 if extra is None else 2 if extra.shape[1] == 1 else 1  # none, one for each query, one for the group
    if format == "int4":
        scales = tuple(x.view(torch.int64) for x in scales)
    _split[(pieces + rows,)](
        q, key, value, table, length, length, given(slots, table), given(extra, part), given(moved, q), *(scales or (part, part)),
        part, part_lse, logit, table.stride(0), 0 if slots is None else slots.stride(0),
        0 if extra is None else extra.stride(0), 0 if extra is None else extra.stride(1),
        limit, 0 if moved is None else moved.shape[1], 0 if window is None else window[0],
        0 if slots is None else slots.shape[1], limit, rows, pieces,
        scale if softcap is not None else scale * LOG2E, softcap or 0.0,
        G=G, D=D, DP=triton.next_power_of_2(D), DV=DV, DVP=triton.next_power_of_2(DV), PAGE=PAGE, RP=RP, GP=GROUP,
        LEAST_TILES=LEAST, FORMAT=FORMATS[format], HAS_SLOTS=slots is not None, RUN=run, OWN=own, HAS_EXTRA=kind,
        HAS_MOVED=moved is not None, HAS_CAP=softcap is not None, HAS_WINDOW=window is not None, WRITE_LOGIT=explicit,
        VALUES=not want.logits, PRECISE=q.dtype == torch.float32, PDL=pdl, **settings, **how,
    )  # fmt: skip
    out, lse = q.new_empty(rows, G, DV), q.new_empty(rows, G, dtype=torch.float32)
    if want.logits:
        return out, lse, logit
    NB = 4 if DV >= 128 else 1
    _merge[(rows * G * NB,)](
        part, part_lse, length, given(sinks, part), out, lse, limit, rows, pieces, G=G, DV=DV,
        DB=triton.next_power_of_2(-(-DV // NB)), NB=NB, RP=RP, BN=settings["BN"], LEAST_TILES=LEAST, LISTED=slots is not None, MANY=64,
        HAS_SINKS=sinks is not None, PDL=pdl, num_warps=4, **how,
    )  # fmt: skip
    if not explicit:
        return out, lse, part_lse
    weights = q.new_empty((rows, limit) if want.keys else (rows, G, limit), dtype=torch.float32)
    _weigh[(triton.cdiv(limit, 512), rows)](
        logit, lse, length, weights, limit, limit, limit, G=G, GP=triton.next_power_of_2(G), BN=512, SUM=want.mass,
        LOW=want.low, LISTED=slots is not None, PDL=pdl, num_warps=4, **how,
    )  # fmt: skip
    return out, lse, weights


def pieces_for(rows: int, device: torch.device) -> int:
    """Pieces of all rows together: enough to keep every multiprocessor's loads in flight, few enough to merge cheaply."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(3 * processors, min(2048, 8 * rows))


def tile_settings(head_dim: int, value_dim: int, rows: int, itemsize: int, format: str | None) -> dict[str, int]:
    """Keys of a tile, pipeline stages and warps, by what is stored and how many rows share the device."""
    if itemsize == 4:
        return {"BN": 32, "STAGES": 2, "num_warps": 4}
    if max(head_dim, value_dim) > 128 or (rows <= 64 and format is None):
        return {"BN": TILE, "STAGES": 2 if max(head_dim, value_dim) > 128 else 3, "num_warps": 4}
    return {"BN": 2 * TILE, "STAGES": 2, "num_warps": 4}


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over head sizes, types and options."""
    found = []
    for D in (64, 96, 128, 256):
        for flags in ({}, {"WRITE_LOGIT": True}, {"HAS_EXTRA": 1, "HAS_SLOTS": True}, {"HAS_EXTRA": 2}):
            found.append(_variant(D, "bf16", None, **flags))
    found += [_variant(D, "bf16", format) for D in (64, 128) for format in ("fp8", "int8", "int4")]
    found += [_variant(D, "bf16", None, rows=256) for D in (64, 96, 128)]
    found.append(_variant(128, "fp16", None, HAS_CAP=True, HAS_WINDOW=True))
    found.append(_variant(128, "bf16", None, HAS_MOVED=True))
    for sinks in (False, True):
        signature = dict.fromkeys(("PART", "PART_LSE", "SINKS", "LSE"), "*fp32") | {"LENGTH": "*i32", "OUT": "*bf16"}
        signature |= dict.fromkeys(("limit", "rows", "pieces"), "i32")
        constants = {
            "G": 4,
            "DV": 128,
            "DB": 32,
            "NB": 4,
            "RP": 8,
            "BN": TILE,
            "LEAST_TILES": LEAST,
            "LISTED": False,
            "MANY": 64,
        }
        constants |= {"HAS_SINKS": sinks, "PDL": True}
        found.append(Variant(f"merge sinks={sinks}", _merge, signature, constants, {"num_warps": 4}))
    signature = dict.fromkeys(("LOGIT", "LSE", "WEIGHT"), "*fp32") | {"LENGTH": "*i32"}
    signature |= dict.fromkeys(("logit_stride", "width", "limit"), "i32")
    constants = {"G": 4, "GP": 4, "BN": 512, "SUM": False, "LOW": True, "LISTED": False, "PDL": True}
    found.append(Variant("weigh low", _weigh, signature, constants, {"num_warps": 4}))
    return found


def _variant(D: int, dtype: str, format: str | None, rows: int = 8, **flags) -> Variant:
    stored = {None: dtype, "fp8": "fp8e4nv", "int8": "i8", "int4": "u8"}[format]
    pointers = {"Q": f"*{dtype}", "MOVED": f"*{dtype}", "K": f"*{stored}", "V": f"*{stored}"}
    pointers |= dict.fromkeys(("TABLE", "LENGTH", "HELD", "SLOTS"), "*i32") | dict.fromkeys(
        ("K_SCALE", "V_SCALE"), "*i64" if format == "int4" else "*fp16"
    )
    pointers |= dict.fromkeys(("EXTRA", "OUT", "LSE", "LOGIT"), "*fp32")
    numbers = dict.fromkeys(("table_stride", "slots_stride", "extra_row", "extra_head", "logit_stride"), "i32")
    numbers |= dict.fromkeys(("moved", "sink", "listed", "limit", "rows", "pieces"), "i32") | {
        "scale": "fp32",
        "softcap": "fp32",
    }
    settings = tile_settings(D, D, rows, 2, format)
    constants = {"G": 4, "D": D, "DP": triton.next_power_of_2(D), "DV": D, "DVP": triton.next_power_of_2(D), "PAGE": 32}
    constants |= {
        "RP": 8,
        "GP": GROUP,
        "BN": settings["BN"],
        "LEAST_TILES": LEAST,
        "FORMAT": 0,
        "STAGES": settings["STAGES"],
    }
    constants |= dict.fromkeys(
        ("HAS_SLOTS", "HAS_EXTRA", "HAS_MOVED", "HAS_CAP", "HAS_WINDOW", "WRITE_LOGIT", "PRECISE"), False
    )
    constants |= {"VALUES": True, "PDL": True, "RUN": 16, "OWN": True} | flags
    name = f"decode {D} {dtype}/{stored} rows={rows} " + " ".join(k for k, v in flags.items() if v)
    return Variant(name, _split, pointers | numbers, constants, {"num_warps": settings["num_warps"]})
