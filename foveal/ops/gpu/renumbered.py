"""Decode attention over listed keys at positions 0, 1, 2 .. in the order of the list. What it means: `foveal.ops.attend_renumbered`.

Keys are turned where they are read. The list is shared out in pieces, which are joined, as in `ragged.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LOG2E, dependent, given, padded
from .ragged import GROUP, LEAST, pieces_for
from .ragged_kernels import locate, merge_kernel
from .variants import Variant
from .votes import _cos_sin, _turned


@triton.jit
def _renumbered(
    Q, K, V, TABLE, LENGTH, SLOTS, FOUND, FREQUENCY, OUT, LSE, table_stride, slots_stride, listed, rows, pieces, scale, softcap,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    RP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, LEAST_TILES: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pieces as `ragged.py` shares them out, each key turned from its slot to its rank in the list, the newest key last."""
    pid = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, piece, length, chunk = locate(LENGTH, pid, rows, listed + 1, pieces, RP, BN, LEAST_TILES, True)
    if row < rows:
        start = piece * chunk * BN
        end = tl.minimum(start + chunk * BN, length)
        HALF: tl.constexpr = D // 2
        gi = tl.arange(0, GP)
        di = tl.arange(0, DB)
        dv = tl.arange(0, DVP)
        some = gi < G
        inside = (di < HALF)[None, :]
        held = tl.load(LENGTH + row) - 1
        rank = tl.load(FOUND + row // KV)
        f = tl.load(FREQUENCY + di, mask=di < HALF, other=0.0)
        q_cos, q_sin = _cos_sin((rank - held).to(tl.float32) * f)
        q_at = Q + row * G * D + gi[:, None] * D + di[None, :]
        q = tl.load(q_at, mask=some[:, None] & inside, other=0.0)
        q_high = tl.load(q_at + HALF, mask=some[:, None] & inside, other=0.0)
        q, q_high = _turned(q, q_high, q_cos[None, :], q_sin[None, :], Q.dtype.element_ty)
        top = tl.full([GP], float("-inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DVP], tl.float32)
        for n0 in tl.range(start, end, BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            slot = tl.load(SLOTS + (row // KV) * slots_stride + n, mask=n < tl.minimum(rank, listed), other=0)
            slot = tl.where(n == rank, held, slot)
            ok = n <= rank
            page = tl.load(TABLE + row * table_stride + slot // PAGE, mask=ok, other=0)
            at = page.to(tl.int64) * PAGE + slot % PAGE
            k_at = K + at[:, None] * D + di[None, :]
            k = tl.load(k_at, mask=ok[:, None] & inside, other=0.0)
            k_high = tl.load(k_at + HALF, mask=ok[:, None] & inside, other=0.0)
            cos, sin = _cos_sin((n - slot).to(tl.float32)[:, None] * f[None, :])
            k, k_high = _turned(k, k_high, cos, sin, Q.dtype.element_ty)
            s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32")
            s = tl.dot(q_high, tl.trans(k_high), s, input_precision="ieee" if PRECISE else "tf32") * scale
            if HAS_CAP:
                s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634
            s = tl.where(ok[None, :], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            fade = tl.exp2(top - base)
            p = tl.exp2(s - base[:, None])
            total = total * fade + tl.sum(p, 1)
            v = tl.load(V + at[:, None] * DV + dv[None, :], mask=ok[:, None] & (dv < DV)[None, :], other=0.0)
            acc = tl.dot(
                p.to(Q.dtype.element_ty), v, acc * fade[:, None], input_precision="ieee" if PRECISE else "tf32"
            )
            top = new
        seen = tl.maximum(total, 1e-30)
        out_at = OUT + pid * G * DV + gi[:, None] * DV + dv[None, :]
        tl.store(out_at, acc / seen[:, None], mask=some[:, None] & (dv < DV)[None, :])
        tl.store(LSE + pid * G + gi, tl.where(total > 0, top + tl.log2(seen), float("-inf")), mask=some)


@torch.library.custom_op("foveal::attend_renumbered", mutates_args=())
def attend_renumbered(
    q: Tensor, key: Tensor, value: Tensor, table: Tensor, length: Tensor, slots: Tensor, found: Tensor, frequency: Tensor,
    kv_heads: int, scale: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    return launch_renumbered(q, key, value, table, length, slots, found, frequency, kv_heads, scale, softcap, sinks)


@attend_renumbered.register_fake
def _(q, key, value, table, length, slots, found, frequency, kv_heads, scale, softcap, sinks):
    return q.new_empty(*q.shape[:2], value.shape[2])


def launch_renumbered(
    q, key, value, table, length, slots, found, frequency, kv_heads, scale, softcap=None, sinks=None
) -> Tensor:
    rows, G, D = q.shape
    DV, listed = value.shape[2], slots.shape[1]
    BN, warps, stages = renumbered_settings(max(D, DV), q.element_size())
    pieces, RP = pieces_for(rows, q.device), triton.next_power_of_2(rows)
    part = q.new_empty(pieces + rows, G, DV, dtype=torch.float32)
    part_lse = q.new_empty(pieces + rows, G, dtype=torch.float32)
    out, lse = q.new_empty(rows, G, DV), q.new_empty(rows, G, dtype=torch.float32)
    pdl, how = dependent(q)
    shared = {"RP": RP, "BN": BN, "LEAST_TILES": LEAST, "PDL": pdl} | how
    _renumbered[(pieces + rows,)](
        q.contiguous(), key, value, table, length, slots, found, frequency, part, part_lse, table.stride(0), slots.stride(0), listed,
        rows, pieces, scale if softcap is not None else scale * LOG2E, softcap or 0.0, KV=kv_heads, G=G, D=D, DB=padded(D // 2),
        DV=DV, DVP=padded(DV), PAGE=key.shape[1], GP=GROUP, HAS_CAP=softcap is not None, PRECISE=q.dtype == torch.float32,
        STAGES=stages, num_warps=warps, **shared,
    )  # fmt: skip
    NB = 4 if DV >= 128 else 1
    merge_kernel[(rows * G * NB,)](
        part, part_lse, length, given(sinks, part), out, lse, listed + 1, rows, pieces, G=G, DV=DV,
        DB=triton.next_power_of_2(-(-DV // NB)), NB=NB, LISTED=True, MANY=64, HAS_SINKS=sinks is not None, num_warps=4, **shared,
    )  # fmt: skip
    return out


def renumbered_settings(head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """Keys of a tile, warps and pipeline stages."""
    return (32, 4, 2) if itemsize == 4 or head_dim > 128 else (64, 8, 2)


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of this kernel over head sizes and types."""
    found = [_renumbered_variant(D, "bf16") for D in (64, 96, 128, 256)]
    return [*found, _renumbered_variant(128, "fp16", cap=True)]


def _renumbered_variant(D: int, dtype: str, cap: bool = False) -> Variant:
    BN, warps, stages = renumbered_settings(D, 2)
    types = dict.fromkeys("QKV", f"*{dtype}") | dict.fromkeys(("TABLE", "LENGTH", "SLOTS", "FOUND"), "*i32")
    types |= dict.fromkeys(("FREQUENCY", "OUT", "LSE"), "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
    types |= dict.fromkeys(("table_stride", "slots_stride", "listed", "rows", "pieces"), "i32")
    constants = {
        "KV": 8,
        "G": 4,
        "D": D,
        "DB": padded(D // 2),
        "DV": D,
        "DVP": padded(D),
        "PAGE": 32,
        "RP": 8,
        "GP": GROUP,
    }
    constants |= {"BN": BN, "LEAST_TILES": LEAST, "HAS_CAP": cap, "PRECISE": False, "STAGES": stages, "PDL": True}
    return Variant(f"renumbered {D} {dtype} cap={cap}", _renumbered, types, constants, {"num_warps": warps})
