"""Prefill over lists of keys: keys and values gathered row by row inside the kernel. Meaning: `foveal.ops.tokens`.

One program computes a stretch of one list's rows, a row being a (query, query head) pair, so the heads that share a list
share its keys. It first walks the list alone to find where it may stop: neither padding nor what comes after the last
query of the stretch is loaded. Logits are in base 2 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.dense import last_dense

from .launch import LOG2E, padded
from .variants import Variant

WALK = 1024  # slots looked at in one step of the walk


@triton.jit
def _attend(
    Q, K, V, SLOTS, ROWS, COUNTS, OUT, LSE, m, size, nq, lists, length, total,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, scale,
    G: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """G query heads read one list; SHARE lists belong to one KV head."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    which = tl.program_id(0).to(tl.int64)  # (batch, list head, query block)
    a = (which % nq).to(tl.int32)
    head = ((which // nq) % lists).to(tl.int32)
    b = which // nq // lists
    count = tl.minimum(size, length - a * size)
    if HAS_ROWS:
        count = tl.load(COUNTS + which)
    if tile * BM < count * G:
        r = tile * BM + tl.arange(0, BM)
        real = r < count * G
        query = a * size + r // G
        if HAS_ROWS:
            query = tl.load(ROWS + which * size + r // G, mask=real, other=0)
        heads = head * G + r % G
        di = tl.arange(0, DP)
        dv = tl.arange(0, DVP)
        ni = tl.arange(0, BN)
        q_at = Q + b * q_batch + heads.to(tl.int64) * q_head + query.to(tl.int64) * q_token
        q = tl.load(q_at[:, None] + di[None, :], mask=real[:, None] & (di < D)[None, :], other=0.0)
        position = tl.where(real, query + total - length, -1)
        newest = tl.max(position, 0)
        list_at = SLOTS + which * m
        stop = tl.full([], 0, tl.int32)
        for c in range(0, m, STEP):
            i = c + tl.arange(0, STEP)
            slot = tl.load(list_at + i, mask=i < m, other=-1)
            stop = tl.maximum(stop, tl.max(tl.where((slot >= 0) & (slot <= newest), i + 1, 0), 0))
        keys = K + b * k_batch + (head // SHARE).to(tl.int64) * k_head
        values = V + b * v_batch + (head // SHARE).to(tl.int64) * v_head
        top = tl.full([BM], -1e30, tl.float32)
        sum = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DVP], tl.float32)
        for n0 in tl.range(0, stop, BN, num_stages=STAGES):
            slot = tl.load(list_at + n0 + ni, mask=n0 + ni < stop, other=-1).to(tl.int32)
            ok = (slot >= 0) & (slot <= newest)
            at = tl.where(ok, slot, 0).to(tl.int64)
            k = tl.load(keys + at[:, None] * k_token + di[None, :], mask=ok[:, None] & (di < D)[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32") * scale
            see = ok[None, :] & (slot[None, :] <= position[:, None])
            s = tl.where(see, s, -1e30)
            new = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp2(top - new)
            p = tl.where(see, tl.exp2(s - new[:, None]), 0.0)
            sum = sum * fade + tl.sum(p, 1)
            v = tl.load(values + at[:, None] * v_token + dv[None, :], mask=ok[:, None] & (dv < DV)[None, :], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee" if PRECISE else "tf32")
            top = new
        seen = tl.where(sum > 0, sum, 1.0)
        to = (b * lists * G + heads) * length + query
        out_at = OUT + to[:, None] * DV + dv[None, :]
        tl.store(out_at, (acc / seen[:, None]).to(OUT.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
        lse = tl.where(sum > 0, (top + tl.log2(seen)) * 0.6931471805599453, float("-inf"))
        tl.store(LSE + to, lse, mask=real)


@torch.library.custom_op("foveal::attend_tokens", mutates_args=())
def attend_tokens(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, rows: Tensor | None, counts: Tensor | None, size: int, scale: float
) -> tuple[Tensor, Tensor]:
    return launch(q, k, v, slots, rows, counts, size, scale)


@attend_tokens.register_fake
def _(q, k, v, slots, rows, counts, size, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def launch(q, k, v, slots, rows, counts, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Out `[batch, heads, length, value_dim]` and lse; rows and counts as `foveal.ops.tokens._rows` makes them."""
    q, k, v = (last_dense(t) for t in (q, k, v))
    slots = slots.to(torch.int32).contiguous()
    batch, heads, length, D = q.shape
    kv_heads, total, DV = k.shape[1], k.shape[2], v.shape[3]
    lists, nq, m = slots.shape[1:]
    G = heads // lists
    out = q.new_zeros(batch, heads, length, DV) if rows is not None else q.new_empty(batch, heads, length, DV)
    lse = torch.full((batch, heads, length), float("-inf"), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    BM, BN, stages, warps = settings(min(size, length) * G, max(D, DV), q.element_size())
    _attend[(batch * lists * nq, triton.cdiv(min(size, length) * G, BM))](
        q, k, v, slots, slots if rows is None else rows.contiguous(), slots if counts is None else counts.contiguous(),
        out, lse, m, size, nq, lists, length, total, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale * LOG2E,
        G=G, SHARE=lists // kv_heads, D=D, DP=padded(D), DV=DV, DVP=padded(DV), BM=BM, BN=BN, STEP=WALK,
        HAS_ROWS=rows is not None, PRECISE=q.dtype == torch.float32, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out, lse


def settings(rows: int, head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, pipeline stages and warps, by the rows of a list and the head size."""
    if itemsize == 4:
        return 16, 32, 1, 4
    if rows <= 16:
        return 16, 64 if head_dim <= 128 else 32, 3 if head_dim <= 128 else 2, 4
    if rows <= 64 or head_dim > 128:
        return 64, 64 if head_dim <= 128 else 32, 2, 4 if head_dim <= 128 else 8
    return 128, 64, 2, 8


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of the kernel over head sizes, types and rows of a list."""
    found = []
    for D in (64, 96, 128, 256):
        found += [_variant(D, D, "bf16", rows, False) for rows in (4, 64, 512)]
    found += [_variant(128, 128, "fp16", rows, True) for rows in (4, 512)]
    found += [_variant(192, 128, "bf16", 512, True), _variant(64, 64, "fp32", 512, False)]
    return found


def _variant(D: int, DV: int, dtype: str, rows: int, chosen: bool) -> Variant:
    BM, BN, stages, warps = settings(rows, max(D, DV), 4 if dtype == "fp32" else 2)
    signature = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}") | dict.fromkeys(("SLOTS", "ROWS", "COUNTS"), "*i32")
    strides = [f"{t}_{axis}" for t in "qkv" for axis in ("batch", "head", "token")]
    signature |= dict.fromkeys(("m", "size", "nq", "lists", "length", "total", *strides), "i32")
    signature |= {"LSE": "*fp32", "scale": "fp32"}
    constants = {
        "G": 4,
        "SHARE": 1,
        "D": D,
        "DP": padded(D),
        "DV": DV,
        "DVP": padded(DV),
        "BM": BM,
        "BN": BN,
        "STEP": WALK,
    }
    constants |= {"HAS_ROWS": chosen, "PRECISE": dtype == "fp32", "STAGES": stages}
    return Variant(f"tokens {D}/{DV} {dtype} rows={rows}", _attend, signature, constants, {"num_warps": warps})
