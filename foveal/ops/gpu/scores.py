"""Scores to choose by: page bounds, pooled blocks, window sums, antidiagonals. What they mean: `foveal.ops.scores`.

All read queries and keys through their strides, so that neither a transposed layout nor a slice is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.dense import last_dense

from .launch import dependent, given, padded
from .variants import Variant

LOG2E = 1.4426950408889634
REDUCE = {"max": 0, "sum": 1, "mean": 2, "none": 3}
PAGES = 64  # pages of one program
WINDOW_KEYS = 1024  # keys of one program of the window's log-sum-exp
SCRATCH = 1 << 26  # numbers of intermediate block sums held at a time: 256 MB


# ---------------------------------------------------------------------- page bounds


@triton.jit
def _bound(
    Q, LO, HI, COUNT, OUT, pages, size, lo_row, lo_page, hi_row, hi_page, first, last,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, REDUCE_BY: tl.constexpr,
    HAS_COUNT: tl.constexpr, PRECISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    gi = tl.arange(0, GP)
    di = tl.arange(0, DP)
    page = tl.program_id(0) * BP + tl.arange(0, BP)
    held = pages
    if HAS_COUNT:
        held = tl.minimum((tl.load(COUNT + row).to(tl.int32) + size - 1) // size, pages)
    q = tl.load(Q + row * G * D + gi[:, None] * D + di[None, :], mask=(gi < G)[:, None] & (di < D)[None, :], other=0.0)
    zero = tl.zeros_like(q)
    up = tl.maximum(q, zero).to(q.dtype)
    down = tl.minimum(q, zero).to(q.dtype)
    ok = (page < held)[:, None] & (di < D)[None, :]
    hi = tl.load(HI + row * hi_row + page.to(tl.int64)[:, None] * hi_page + di[None, :], mask=ok, other=0.0)
    lo = tl.load(LO + row * lo_row + page.to(tl.int64)[:, None] * lo_page + di[None, :], mask=ok, other=0.0)
    s = tl.dot(up, tl.trans(hi), input_precision="ieee" if PRECISE else "tf32")
    s = tl.dot(down, tl.trans(lo), s, input_precision="ieee" if PRECISE else "tf32")
    forced = (page < first) | (page >= held - last)
    if REDUCE_BY == 3:
        s = tl.where(forced[None, :], float("inf"), s)
        s = tl.where((page < held)[None, :], s, float("-inf"))
        tl.store(
            OUT + (row * G + gi[:, None]) * pages + page[None, :], s, mask=(gi < G)[:, None] & (page < pages)[None, :]
        )
    else:
        if REDUCE_BY == 0:
            x = tl.max(tl.where((gi < G)[:, None], s, float("-inf")), 0)
        else:
            x = tl.sum(tl.where((gi < G)[:, None], s, 0.0), 0)
            if REDUCE_BY == 2:
                x = x / G
        x = tl.where(forced, float("inf"), x)
        x = tl.where(page < held, x, float("-inf"))
        tl.store(OUT + row * pages + page, x, mask=page < pages)


@torch.library.custom_op("foveal::page_bound", mutates_args=())
def page_bound(
    q: Tensor, lo: Tensor, hi: Tensor, group: str, count: Tensor | None, size: int, keep_first: int, keep_last: int
) -> Tensor:
    return launch_bound(q, lo, hi, group, count, size, keep_first, keep_last)


@page_bound.register_fake
def _(q, lo, hi, group, count, size, keep_first, keep_last):
    return q.new_empty(q.shape[0], q.shape[1] if group == "none" else 1, lo.shape[1], dtype=torch.float32)


def launch_bound(q, lo, hi, group="max", count=None, size=1, keep_first=0, keep_last=0) -> Tensor:
    rows, G, D = q.shape
    pages = lo.shape[1]
    q, lo, hi = q.contiguous(), last_dense(lo), last_dense(hi)
    out = q.new_empty(rows, G if group == "none" else 1, pages, dtype=torch.float32)
    if out.numel():
        pdl, launching = dependent(q)
        _bound[(triton.cdiv(pages, PAGES), rows)](
            q, lo, hi, q if count is None else count, out, pages, size, lo.stride(0), lo.stride(1), hi.stride(0), hi.stride(1),
            keep_first, keep_last, G=G, GP=max(16, triton.next_power_of_2(G)), D=D, DP=padded(D), BP=PAGES,
            REDUCE_BY=REDUCE[group], HAS_COUNT=count is not None, PRECISE=q.dtype == torch.float32, PDL=pdl, num_warps=4,
            **launching,
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------- pooled blocks


@triton.jit
def _pool(
    X, OUT, H, length, blocks, size, x_batch, x_head, x_token,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    block, bh = tl.program_id(0), tl.program_id(1)
    base = X + (bh // H).to(tl.int64) * x_batch + (bh % H).to(tl.int64) * x_head
    ti = tl.arange(0, BT)
    di = tl.arange(0, DP)
    start = block * size
    stop = tl.minimum(start + size, length)
    acc = tl.full([DP], float("-inf") if MAX else 0.0, tl.float32)
    for t0 in range(start, stop, BT):
        t = t0 + ti
        ok = (t < stop)[:, None] & (di < D)[None, :]
        at = base + t.to(tl.int64)[:, None] * x_token + di[None, :]
        x = tl.load(at, mask=ok, other=float("-inf") if MAX else 0.0).to(tl.float32)
        if MAX:
            acc = tl.maximum(acc, tl.max(x, 0))
        else:
            acc += tl.sum(x, 0)
    if not MAX:
        acc = acc / (stop - start)
    tl.store(OUT + (bh.to(tl.int64) * blocks + block) * D + di, acc, mask=di < D)


@torch.library.custom_op("foveal::pool_blocks", mutates_args=())
def pool_blocks(x: Tensor, size: int, pool: str) -> Tensor:
    return launch_pool(x, size, pool)


@pool_blocks.register_fake
def _(x, size, pool):
    return x.new_empty(*x.shape[:2], -(-x.shape[2] // size), x.shape[3], dtype=torch.float32)


def launch_pool(x: Tensor, size: int, pool: str) -> Tensor:
    x = last_dense(x)
    batch, H, length, D = x.shape
    blocks = -(-length // size)
    out = x.new_empty(batch, H, blocks, D, dtype=torch.float32)
    if out.numel():
        _pool[(blocks, batch * H)](
            x, out, H, length, blocks, size, *x.stride()[:3], D=D, DP=padded(D), BT=32, MAX=pool == "max", num_warps=4
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------- the newest page of pooled keys


@triton.jit
def _newest(
    X, TABLE, LENGTH, LOW, HIGH, MEAN, table_stride, low_row, low_page, high_row, high_page, mean_row, mean_page,
    SIZE: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, PAGE: tl.constexpr,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, HAS_MEAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Smallest, largest and mean key of the page that holds a row's newest key, by stretches of the dimensions."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(LENGTH + row)
    page = tl.maximum(length - 1, 0) // SIZE
    slot = page * SIZE + tl.arange(0, SP)
    di = tl.program_id(1) * DB + tl.arange(0, DB)
    held = (slot < length) & (tl.arange(0, SP) < SIZE)
    ok = held[:, None] & (di < D)[None, :]
    at = tl.load(TABLE + row * table_stride + slot // PAGE, mask=held, other=0).to(tl.int64) * PAGE + slot % PAGE
    x = tl.load(X + at[:, None] * D + di[None, :], mask=ok, other=0.0).to(tl.float32)
    inside = (di < D) & (length > 0)
    if HAS_LOW:
        low = tl.min(tl.where(ok, x, float("inf")), 0)
        tl.store(LOW + row * low_row + page * low_page + di, low.to(LOW.dtype.element_ty), mask=inside)
    if HAS_HIGH:
        high = tl.max(tl.where(ok, x, float("-inf")), 0)
        tl.store(HIGH + row * high_row + page * high_page + di, high.to(HIGH.dtype.element_ty), mask=inside)
    if HAS_MEAN:
        mean = tl.sum(x, 0) / tl.maximum(tl.sum(held.to(tl.int32), 0), 1)
        tl.store(MEAN + row * mean_row + page * mean_page + di, mean.to(MEAN.dtype.element_ty), mask=inside)


@torch.library.custom_op("foveal::pool_newest", mutates_args=("low", "high", "mean"))
def pool_newest(
    x: Tensor, table: Tensor, length: Tensor, size: int, low: Tensor | None, high: Tensor | None, mean: Tensor | None
) -> None:
    launch_newest(x, table, length, size, low, high, mean)


def launch_newest(x, table, length, size, low=None, high=None, mean=None) -> None:
    page, D = x.shape[1:]
    strides = [s for p in (low, high, mean) for s in (p.stride()[:2] if p is not None else (0, 0))]
    width = triton.next_power_of_2(size)
    stretch = min(padded(D), max(16, 2048 // width))
    pdl, launching = dependent(x)
    _newest[(table.shape[0], triton.cdiv(D, stretch))](
        x, table, length, *(given(p, x) for p in (low, high, mean)), table.stride(0), *strides, SIZE=size, SP=width, D=D,
        DB=stretch, PAGE=page, HAS_LOW=low is not None, HAS_HIGH=high is not None, HAS_MEAN=mean is not None, PDL=pdl,
        num_warps=4, **launching,
    )  # fmt: skip


# ---------------------------------------------------------------------- window sums


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


# ---------------------------------------------------------------------- antidiagonals


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
    found = []
    for D in (64, 96, 128, 256):
        found += [
            _bound_variant(D, "bf16", 0, True),
            _window_variant(D, "bf16", False),
            _window_variant(D, "bf16", True),
        ]
        found.append(_antidiagonal_variant(D, "bf16", 16, 8))
    found += [_bound_variant(128, "bf16", by, False) for by in (2, 3)]
    found.append(_bound_variant(128, "fp32", 0, False))
    found += [_window_variant(128, "fp16", True, cap=True), _antidiagonal_variant(128, "fp16", 8, 16)]
    found += [_window_variant(128, "fp32", True), _antidiagonal_variant(128, "fp32", 16, 8)]
    for D, largest in ((96, False), (128, True), (256, False)):
        numbers = ("H", "length", "blocks", "size", "x_batch", "x_head", "x_token")
        constants = {"D": D, "DP": padded(D), "BT": 32, "MAX": largest}
        signature = {"X": "*bf16", "OUT": "*fp32"} | dict.fromkeys(numbers, "i32")
        found.append(Variant(f"pool {D} max={largest}", _pool, signature, constants, {"num_warps": 4}))
    for D, size in ((128, 16), (256, 64)):
        found.append(_newest_variant(D, size))
    numbers = dict.fromkeys(("first_bh", "past", "rows", "blocks", "query_blocks"), "i32")
    for C in (8, 16):
        constants = {"S": 128 // C, "C": C, "BN": 128, "CAUSAL": True}
        signature = dict.fromkeys(("Z", "LSE", "OUT"), "*fp32") | numbers
        found.append(Variant(f"antidiagonal mean {C}", _antidiagonal_mean, signature, constants, {"num_warps": 4}))
    return found


def _bound_variant(D: int, dtype: str, reduce_by: int, counted: bool) -> Variant:
    signature = dict.fromkeys(("Q", "LO", "HI"), f"*{dtype}") | {"COUNT": "*i32", "OUT": "*fp32"}
    signature |= dict.fromkeys(("pages", "size", "lo_row", "lo_page", "hi_row", "hi_page", "first", "last"), "i32")
    constants = {"G": 4, "GP": 16, "D": D, "DP": padded(D), "BP": PAGES, "REDUCE_BY": reduce_by, "HAS_COUNT": counted}
    constants |= {"PRECISE": dtype == "fp32", "PDL": True}
    return Variant(f"bound {D} {dtype} {reduce_by}", _bound, signature, constants, {"num_warps": 4})


def _newest_variant(D: int, size: int) -> Variant:
    signature = dict.fromkeys(("X", "LOW", "HIGH", "MEAN"), "*bf16") | dict.fromkeys(("TABLE", "LENGTH"), "*i32")
    numbers = ("table_stride", "low_row", "low_page", "high_row", "high_page", "mean_row", "mean_page")
    constants = {"SIZE": size, "SP": size, "D": D, "DB": min(padded(D), 2048 // size), "PAGE": 32, "PDL": True}
    constants |= {"HAS_LOW": True, "HAS_HIGH": True, "HAS_MEAN": size == 64}
    return Variant(
        f"newest {D} {size}", _newest, signature | dict.fromkeys(numbers, "i32"), constants, {"num_warps": 4}
    )


def _window_variant(D: int, dtype: str, sums: bool, cap: bool = False) -> Variant:
    BM, BN, warps = window_settings(D, 4 if dtype == "fp32" else 2)
    signature = {"Q": f"*{dtype}", "K": f"*{dtype}"} | dict.fromkeys(("LSE", "VERTICAL", "SLASH"), "*fp32")
    numbers = ("H", "group", "last", "total", "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token")
    signature |= dict.fromkeys(numbers, "i32") | {"scale": "fp32", "softcap": "fp32"}
    constants = {"D": D, "DP": padded(D), "BM": BM, "BN": BN, "HAS_CAP": cap, "PRECISE": dtype == "fp32"}
    if sums:
        return Variant(f"window sums {D} {dtype}", _window_sums, signature, constants, {"num_warps": warps})
    constants |= {"CHUNK": WINDOW_KEYS, "STAGES": 2}
    return Variant(f"window lse {D} {dtype}", _window_lse, signature, constants, {"num_warps": warps})


def _antidiagonal_variant(D: int, dtype: str, stride: int, tiles: int) -> Variant:
    BM, BN, BK, warps = antidiagonal_settings(D, 4 if dtype == "fp32" else 2)
    signature = {"Q": f"*{dtype}", "K": f"*{dtype}", "Z": "*fp32", "LSE": "*fp32", "scale": "fp32"}
    numbers = ("H", "group", "first_bh", "length", "total", "rows", "columns", "blocks")
    strides = ("q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token")
    signature |= dict.fromkeys(numbers + strides, "i32")
    constants = {"D": D, "BK": BK, "S": stride, "C": tiles, "BM": BM, "BN": BN, "CAUSAL": True, "STAGES": 3}
    constants["PRECISE"] = dtype == "fp32"
    return Variant(f"antidiagonal {D} {dtype} {stride}", _antidiagonal, signature, constants, {"num_warps": warps})
