"""What stands for many keys: page bounds, pooled blocks, the newest page of pooled keys. What they mean: `foveal.ops.scores`.

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

REDUCE = {"max": 0, "sum": 1, "mean": 2, "none": 3}
PAGES = 64  # pages of one program


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


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of these kernels over head sizes, types and options."""
    found = [_bound_variant(D, "bf16", 0, True) for D in (64, 96, 128, 256)]
    found += [_bound_variant(128, "bf16", by, False) for by in (2, 3)]
    found.append(_bound_variant(128, "fp32", 0, False))
    for D, largest in ((96, False), (128, True), (256, False)):
        numbers = ("H", "length", "blocks", "size", "x_batch", "x_head", "x_token")
        constants = {"D": D, "DP": padded(D), "BT": 32, "MAX": largest}
        signature = {"X": "*bf16", "OUT": "*fp32"} | dict.fromkeys(numbers, "i32")
        found.append(Variant(f"pool {D} max={largest}", _pool, signature, constants, {"num_warps": 4}))
    return [*found, *(_newest_variant(D, size) for D, size in ((128, 16), (256, 64)))]


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
