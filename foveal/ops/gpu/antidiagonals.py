"""The mass of blocks by sums along strided antidiagonals. What it means: `foveal.ops.antidiagonal_scores`.

Queries and keys are read through their strides, so that neither a transposed layout nor a slice is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.dense import last_dense

from .launch import LOG2E
from .variants import Variant

SCRATCH = 1 << 26  # numbers of intermediate block sums held at a time: 256 MB


@triton.jit
def _antidiagonal(
    Q, K, Z, LSE, H, group, first_bh, length, total, rows, columns, blocks, q_batch, q_head, q_token, k_batch, k_head, k_token,
    scale, D: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Z `[heads, rows, blocks]`: log-sum-exp in base 2 over the C tiles of a key block; LSE `[heads, rows]` over all tiles."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late rows see the most: they start first
    local = tl.program_id(1)
    bh = local + first_bh
    b, h = bh // H, bh % H
    queries = Q + b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head
    keys = K + b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head
    r = tile * BM + tl.arange(0, BM)
    di = tl.arange(0, BK)
    bi = tl.arange(0, BN // C)
    past = total - length
    end = columns
    if CAUSAL:
        end = tl.minimum(columns, (past + (tile + 1) * BM * S - 1) // S + 1)
    top = tl.full([BM], -1e30, tl.float32)
    sum = tl.zeros([BM], tl.float32)
    for c0 in range(0, end, BN):
        c = c0 + tl.arange(0, BN)
        s = tl.zeros([BM, BN], tl.float32)
        for part in tl.range(0, S * (D // BK), num_stages=STAGES):
            step, d0 = part // (D // BK), part % (D // BK) * BK
            qt, kt = r * S + (S - 1 - step), c * S + step
            q = tl.load(
                queries + qt.to(tl.int64)[:, None] * q_token + (d0 + di)[None, :],
                mask=(qt < length)[:, None],
                other=0.0,
            )
            k = tl.load(
                keys + kt.to(tl.int64)[:, None] * k_token + (d0 + di)[None, :], mask=(kt < total)[:, None], other=0.0
            )
            s = tl.dot(q, tl.trans(k), s, input_precision="ieee" if PRECISE else "tf32")
        s = s * scale
        seen = (c < columns)[None, :]
        if CAUSAL:
            seen = seen & ((c * S)[None, :] <= (past + r * S + S - 1)[:, None])
        s = tl.reshape(tl.where(seen, s, -1e30), (BM, BN // C, C))
        high = tl.max(s, 2)
        z = high + tl.log2(tl.sum(tl.exp2(s - high[:, :, None]), 2))
        block = c0 // C + bi
        to = Z + (local.to(tl.int64) * rows + r)[:, None] * blocks + block[None, :]
        tl.store(to, z, mask=(r < rows)[:, None] & (block < blocks)[None, :])
        new = tl.maximum(top, tl.max(z, 1))
        sum = sum * tl.exp2(top - new) + tl.sum(tl.exp2(z - new[:, None]), 1)
        top = new
    tl.store(LSE + local.to(tl.int64) * rows + r, top + tl.log2(sum), mask=r < rows)


@triton.jit
def _antidiagonal_mean(
    Z, LSE, OUT, first_bh, past, rows, blocks, query_blocks,
    S: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    a, local = tl.program_id(0), tl.program_id(1)
    r = a * C + tl.arange(0, C)
    block = tl.program_id(2) * BN + tl.arange(0, BN)
    base = local.to(tl.int64) * rows
    seen = (r < rows)[:, None] & (block < blocks)[None, :]
    if CAUSAL:  # what no row of the first kernel's tile saw was never written
        seen = seen & ((block * C * S)[None, :] <= (past + r * S + S - 1)[:, None])
    z = tl.load(Z + (base + r)[:, None] * blocks + block[None, :], mask=seen, other=-1e30)
    lse = tl.load(LSE + base + r, mask=r < rows, other=0.0)
    mass = tl.sum(tl.exp2(z - lse[:, None]), 0) / tl.minimum(C, rows - a * C)
    to = OUT + ((local + first_bh).to(tl.int64) * query_blocks + a) * blocks + block
    tl.store(to, mass, mask=block < blocks)


@torch.library.custom_op("foveal::antidiagonal_scores", mutates_args=())
def antidiagonal_scores(q: Tensor, k: Tensor, block: int, stride: int, scale: float, causal: bool) -> Tensor:
    return launch_antidiagonal(q, k, block, stride, scale, causal)


@antidiagonal_scores.register_fake
def _(q, k, block, stride, scale, causal):
    return q.new_empty(*q.shape[:2], -(-q.shape[2] // block), -(-k.shape[2] // block), dtype=torch.float32)


def launch_antidiagonal(q: Tensor, k: Tensor, block: int, stride: int, scale: float, causal: bool) -> Tensor:
    q, k = last_dense(q), last_dense(k)
    batch, H, length, D = q.shape
    total, C = k.shape[2], block // stride
    rows, columns = -(-length // stride), -(-total // stride)
    query_blocks, blocks = -(-length // block), -(-total // block)
    out = q.new_empty(batch, H, query_blocks, blocks, dtype=torch.float32)
    if not out.numel():
        return out
    BM, BN, BK, warps = antidiagonal_settings(D, q.element_size())
    some = min(batch * H, max(1, SCRATCH // (rows * blocks)))
    z = q.new_empty(some, rows, blocks, dtype=torch.float32)
    lse = q.new_empty(some, rows, dtype=torch.float32)
    for first in range(0, batch * H, some):
        heads = min(some, batch * H - first)
        _antidiagonal[(triton.cdiv(rows, BM), heads)](
            q, k, z, lse, H, H // k.shape[1], first, length, total, rows, columns, blocks, *q.stride()[:3], *k.stride()[:3],
            scale / stride * LOG2E, D=D, BK=BK, S=stride, C=C, BM=BM, BN=BN, CAUSAL=causal,
            PRECISE=q.dtype == torch.float32, STAGES=3, num_warps=warps,
        )  # fmt: skip
        _antidiagonal_mean[(query_blocks, heads, triton.cdiv(blocks, 128))](
            z, lse, out, first, total - length, rows, blocks, query_blocks, S=stride, C=C, BN=128, CAUSAL=causal, num_warps=4
        )  # fmt: skip
    return out


def antidiagonal_settings(head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Tile rows, tile columns, dimensions of one product, warps."""
    if itemsize == 4:
        return 64, 64, 16, 4
    return 128, 128, 64 if head_dim % 64 == 0 else 32 if head_dim % 32 == 0 else 16, 8


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over head sizes, types and options."""
    found = [_variant(D, "bf16", 16, 8) for D in (64, 96, 128, 256)]
    found += [_variant(128, "fp16", 8, 16), _variant(128, "fp32", 16, 8)]
    numbers = dict.fromkeys(("first_bh", "past", "rows", "blocks", "query_blocks"), "i32")
    for C in (8, 16):
        constants = {"S": 128 // C, "C": C, "BN": 128, "CAUSAL": True}
        signature = dict.fromkeys(("Z", "LSE", "OUT"), "*fp32") | numbers
        found.append(Variant(f"antidiagonal mean {C}", _antidiagonal_mean, signature, constants, {"num_warps": 4}))
    return found


def _variant(D: int, dtype: str, stride: int, tiles: int) -> Variant:
    BM, BN, BK, warps = antidiagonal_settings(D, 4 if dtype == "fp32" else 2)
    signature = {"Q": f"*{dtype}", "K": f"*{dtype}", "Z": "*fp32", "LSE": "*fp32", "scale": "fp32"}
    numbers = ("H", "group", "first_bh", "length", "total", "rows", "columns", "blocks")
    strides = ("q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token")
    signature |= dict.fromkeys(numbers + strides, "i32")
    constants = {"D": D, "BK": BK, "S": stride, "C": tiles, "BM": BM, "BN": BN, "CAUSAL": True, "STAGES": 3}
    constants["PRECISE"] = dtype == "fp32"
    return Variant(f"antidiagonal {D} {dtype} {stride}", _antidiagonal, signature, constants, {"num_warps": warps})
