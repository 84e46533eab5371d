"""How much of the last queries' attention each key and each distance gets. What it means: `foveal.ops.window_scores`.

Queries and keys are read through their strides, so that neither a transposed layout nor a slice is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.dense import last_dense

from .launch import LOG2E, padded
from .variants import Variant

WINDOW_KEYS = 1024  # keys of one program of the log-sum-exp


@triton.jit
def _window_keys(K, n, total, k_token, D: tl.constexpr, DP: tl.constexpr):
    di = tl.arange(0, DP)
    return tl.load(
        K + n.to(tl.int64)[:, None] * k_token + di[None, :], mask=(n < total)[:, None] & (di < D)[None, :], other=0.0
    )


@triton.jit
def _window_logits(q, k, n, i, first, total, scale, softcap, HAS_CAP: tl.constexpr, PRECISE: tl.constexpr):
    """Logits in base 2 `[queries, keys]` of keys n; query i stands at `first` + i."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee" if PRECISE else "tf32") * scale
    if HAS_CAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634
    return tl.where((n[None, :] <= (first + i)[:, None]) & (n < total)[None, :], s, -1e30)


@triton.jit
def _window_lse(
    Q, K, LSE, H, group, last, total, q_batch, q_head, q_token, k_batch, k_head, k_token, scale, softcap,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, in base 2, of the keys of one chunk: LSE `[batch * heads, chunks, last]`."""
    chunk, bh = tl.program_id(0), tl.program_id(1)
    i = tl.program_id(2) * BM + tl.arange(0, BM)
    b, h = bh // H, bh % H
    di = tl.arange(0, DP)
    q_at = Q + b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head + i[:, None] * q_token + di[None, :]
    q = tl.load(q_at, mask=(i < last)[:, None] & (di < D)[None, :], other=0.0)
    keys = K + b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head
    top = tl.full([BM], -1e30, tl.float32)
    sum = tl.zeros([BM], tl.float32)
    start = chunk * CHUNK
    for n0 in tl.range(start, tl.minimum(start + CHUNK, total), BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)
        k = _window_keys(keys, n, total, k_token, D, DP)
        s = _window_logits(q, k, n, i, total - last, total, scale, softcap, HAS_CAP, PRECISE)
        new = tl.maximum(top, tl.max(s, 1))
        sum = sum * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        top = new
    lse = tl.where(top > -1e29, top + tl.log2(sum), float("-inf"))
    tl.store(LSE + (bh.to(tl.int64) * tl.num_programs(0) + chunk) * last + i, lse, mask=i < last)


@triton.jit
def _window_sums(
    Q, K, LSE, VERTICAL, SLASH, H, group, last, total, q_batch, q_head, q_token, k_batch, k_head, k_token, scale, softcap,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_CAP: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Sums of one block of keys by key and by distance.

    The tile's rows are rotated by their number, which puts a diagonal into a column, or into two where it wraps around.
    Each of the two goes to an array of its own, `[2, query tiles, batch * heads, total]`: no two programs share an element.
    """
    n0, bh = tl.program_id(0) * BN, tl.program_id(1)
    b, h = bh // H, bh % H
    di = tl.arange(0, DP)
    n = n0 + tl.arange(0, BN)
    keys = K + b.to(tl.int64) * k_batch + (h // group).to(tl.int64) * k_head
    k = _window_keys(keys, n, total, k_token, D, DP)
    vertical = tl.zeros([BN], tl.float32)
    tiles = (last + BM - 1) // BM
    row = tl.arange(0, BM)[:, None]
    column = tl.arange(0, BN)[None, :]
    for t in tl.range(0, tiles, num_stages=1):  # one or two of them: nothing to pipeline
        i = t * BM + tl.arange(0, BM)
        q_at = Q + b.to(tl.int64) * q_batch + h.to(tl.int64) * q_head + i[:, None] * q_token + di[None, :]
        q = tl.load(q_at, mask=(i < last)[:, None] & (di < D)[None, :], other=0.0)
        s = _window_logits(q, k, n, i, total - last, total, scale, softcap, HAS_CAP, PRECISE)
        lse = tl.load(LSE + bh.to(tl.int64) * last + i, mask=i < last, other=1e30)
        p = tl.exp2(s - lse[:, None])
        vertical += tl.sum(p, 0)
        turned = tl.gather(p, (row + column) & (BN - 1), axis=1)
        inside = (row + column) < BN
        near = total - last + t * BM - n0 - tl.arange(0, BN)
        to = SLASH + (t * tl.num_programs(1) + bh).to(tl.int64) * total
        tl.store(to + near, tl.sum(tl.where(inside, turned, 0.0), 0), mask=(near >= 0) & (near < total))
        far = near + BN
        to += (tiles * tl.num_programs(1)).to(tl.int64) * total
        tl.store(to + far, tl.sum(tl.where(inside, 0.0, turned), 0), mask=(far >= 0) & (far < total))
    tl.store(VERTICAL + bh.to(tl.int64) * total + n, vertical, mask=n < total)


@torch.library.custom_op("foveal::window_scores", mutates_args=())
def window_scores(q: Tensor, k: Tensor, last: int, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    return launch_window(q, k, last, scale, softcap)


@window_scores.register_fake
def _(q, k, last, scale, softcap):
    shape = (q.shape[0], q.shape[1], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def launch_window(q: Tensor, k: Tensor, last: int, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    q, k = last_dense(q[:, :, q.shape[2] - last :]), last_dense(k)
    batch, H, _, D = q.shape
    total = k.shape[2]
    BM, BN, warps = window_settings(D, q.element_size())
    chunks, tiles = triton.cdiv(total, WINDOW_KEYS), triton.cdiv(last, BM)
    numbers = (H, H // k.shape[1], last, total, *q.stride()[:3], *k.stride()[:3])
    numbers += (scale * LOG2E if softcap is None else scale, softcap or 0.0)
    how = {"D": D, "DP": padded(D), "BM": BM, "BN": BN, "HAS_CAP": softcap is not None}
    how |= {"PRECISE": q.dtype == torch.float32, "num_warps": warps}
    lse = q.new_empty(batch * H, chunks, last, dtype=torch.float32)
    _window_lse[(chunks, batch * H, tiles)](q, k, lse, *numbers, CHUNK=WINDOW_KEYS, STAGES=2, **how)
    lse = torch.logsumexp(lse * (1 / LOG2E), 1) * LOG2E
    vertical = q.new_empty(batch, H, total, dtype=torch.float32)
    slash = q.new_zeros(2 * tiles, batch, H, total, dtype=torch.float32)
    _window_sums[(triton.cdiv(total, BN), batch * H)](q, k, lse, vertical, slash, *numbers, **how)
    return vertical, slash.sum(0)


def window_settings(head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """Queries and keys of a tile, and warps. A tile has at least as many keys as queries, or diagonals would wrap twice."""
    return (32, 32, 4) if itemsize == 4 else (64, 64, 4)


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over head sizes, types and options."""
    found = [_variant(D, "bf16", sums) for D in (64, 96, 128, 256) for sums in (False, True)]
    return [*found, _variant(128, "fp16", True, cap=True), _variant(128, "fp32", True)]


def _variant(D: int, dtype: str, sums: bool, cap: bool = False) -> Variant:
    BM, BN, warps = window_settings(D, 4 if dtype == "fp32" else 2)
    signature = {"Q": f"*{dtype}", "K": f"*{dtype}"} | dict.fromkeys(("LSE", "VERTICAL", "SLASH"), "*fp32")
    numbers = ("H", "group", "last", "total", "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token")
    signature |= dict.fromkeys(numbers, "i32") | {"scale": "fp32", "softcap": "fp32"}
    constants = {"D": D, "DP": padded(D), "BM": BM, "BN": BN, "HAS_CAP": cap, "PRECISE": dtype == "fp32"}
    if sums:
        return Variant(f"window sums {D} {dtype}", _window_sums, signature, constants, {"num_warps": warps})
    constants |= {"CHUNK": WINDOW_KEYS, "STAGES": 2}
    return Variant(f"window lse {D} {dtype}", _window_lse, signature, constants, {"num_warps": warps})
