"""Gradients of attention over block lists in plain Triton: the weights are computed again from the log-sum-exp.

Queries walk their lists, keys walk the transposed ones, so nothing is added atomically and results repeat to the bit. With
weights p, gradients `do` and `dlse`: dp = do v^T, ds = p (dp - delta), delta = rowsum(do * out) - dlse, dq = scale ds k,
dk = scale ds^T q, dv = p^T do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.gpu import lists
from foveal.ops.gpu.blocks import (
    Problem,
    Tiles,
    aligned,
    descriptor,
    divisor,
    empty_rows,
    list_start,
    tensordesc,
    visible,
    width,
    work_items,
)
from foveal.ops.gpu.launch import LOG2E
from foveal.ops.gpu.lists import ITEM
from foveal.ops.gpu.variants import Variant

_ROWS = 128  # rows of lse and delta are padded to a multiple of every tile


@triton.jit(do_not_specialize=["heads", "length"])
def _prepare(
    OUT, DOUT, LSE, DLSE, NORM, DELTA, out_b, out_h, out_l, dout_b, dout_h, dout_l, heads, length, padded, scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """-lse / scale and -delta; a row that saw nothing, or is none, gets -inf and 0, so that its weights are 0."""
    owner = tl.program_id(1).to(tl.int64)
    head, batch = owner % heads, owner // heads
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, D)
    inside = row < length
    see = inside[:, None] & (column < HEAD_DIM)[None, :]
    out = tl.load(OUT + batch * out_b + head * out_h + row[:, None] * out_l + column[None, :], mask=see, other=0.0)
    dout = tl.load(DOUT + batch * dout_b + head * dout_h + row[:, None] * dout_l + column[None, :], mask=see, other=0.0)
    lse = tl.load(LSE + owner * length + row, mask=inside, other=float("-inf"))
    dlse = tl.load(DLSE + owner * length + row, mask=inside, other=0.0)
    some = lse > float("-inf")
    delta = dlse - tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(NORM + owner * padded + row, tl.where(some, -lse / scale, float("-inf")), mask=row < padded)
    tl.store(DELTA + owner * padded + row, tl.where(some, delta, 0.0), mask=row < padded)


@triton.jit(do_not_specialize=["heads", "length", "total", "tiles", "rows", "width"])
def _query_gradient(
    Q, K, V, DOUT, NORM, DELTA, DQ, INDICES, ITEMS, FIRST, SINK, RECENT,
    stride_b, stride_h, stride_l, heads, length, padded, total, tiles, rows, width, scale, factor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, PACKED: tl.constexpr, BAND: tl.constexpr, ITEM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries, which walks its list as the forward pass does."""
    item = ITEMS + tl.program_id(0) * ITEM
    number = tl.load(item)
    a0, a3 = tl.load(item + 1), tl.load(item + 4)
    owner, tile = number // tiles, number % tiles
    head, batch = owner % heads, owner // heads
    kv_head = head // GROUP
    row = (owner * rows + tile * TILE // ROW).to(tl.int64)
    query = tile * TILE + tl.arange(0, TILE)
    position = query + total - length
    first, sink, recent = position, 0, 0
    if PACKED:
        first = tl.load(FIRST + position, mask=position < total, other=0)
    if BAND:
        sink, recent = tl.load(SINK + head), tl.load(RECENT + head)
    norm = tl.load(NORM + owner.to(tl.int64) * padded + query)
    delta = tl.load(DELTA + owner.to(tl.int64) * padded + query)
    q = Q.load([batch, head, tile * TILE, 0]).reshape([TILE, D])
    dout = DOUT.load([batch, head, tile * TILE, 0]).reshape([TILE, D])
    dq = tl.zeros([TILE, D], tl.float32)
    for place in tl.range(a0, a3, num_stages=STAGES):
        start = list_start(INDICES, place, row, width, BLOCK, STEP)
        k = K.load([batch, kv_head, start, 0]).reshape([STEP, D])
        v = V.load([batch, kv_head, start, 0]).reshape([STEP, D])
        p = tl.exp2((tl.dot(q, tl.trans(k)) + norm[:, None]) * factor)
        key = start + tl.arange(0, STEP)
        p = tl.where(visible(position[:, None], key[None, :], first[:, None], sink, recent, PACKED, BAND), p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v)) + delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    column = tl.arange(0, D)
    out = DQ + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + query.to(tl.int64)[:, None] * stride_l
    inside = (query < length)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + column[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["kv_heads", "length", "total", "tiles", "rows", "width"])
def _key_gradient(
    Q, K, V, DOUT, NORM, DELTA, DK, DV, INDICES, SPANS, FIRST, SINK, RECENT,
    stride_b, stride_h, stride_l, kv_heads, length, padded, total, tiles, rows, width, scale, factor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr, PACKED: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys, which walks the transposed lists of all query heads of its KV head."""
    owner, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    kv_head, batch = owner % kv_heads, owner // kv_heads
    past = total - length
    key = tile * TILE + tl.arange(0, TILE)
    k = K.load([batch, kv_head, tile * TILE, 0]).reshape([TILE, D])
    v = V.load([batch, kv_head, tile * TILE, 0]).reshape([TILE, D])
    dk = tl.zeros([TILE, D], tl.float32)
    dv = tl.zeros([TILE, D], tl.float32)
    for member in tl.range(0, GROUP, num_stages=1):
        head = kv_head * GROUP + member
        lists_of = owner.to(tl.int64) * GROUP + member
        row = lists_of * rows + tile * TILE // ROW
        row0 = lists_of * padded
        span = SPANS + (lists_of * tiles + tile) * 4
        a0, a3 = tl.load(span), tl.load(span + 3)
        sink, recent = 0, 0
        if BAND:
            sink, recent = tl.load(SINK + head), tl.load(RECENT + head)
        for place in tl.range(a0, a3, num_stages=STAGES):
            start = list_start(INDICES, place, row, width, BLOCK, STEP)
            q = Q.load([batch, head, start, 0]).reshape([STEP, D])
            dout = DOUT.load([batch, head, start, 0]).reshape([STEP, D])
            query = start + tl.arange(0, STEP)
            position = query + past
            first = position
            if PACKED:
                first = tl.load(FIRST + position, mask=query < length, other=0)
            # lse and delta enter as what the products start from: beside them they would cost 32 registers a thread.
            norm = tl.broadcast_to(tl.load(NORM + row0 + query)[None, :], [TILE, STEP])
            p = tl.exp2(tl.dot(k, tl.trans(q), norm) * factor)
            p = tl.where(visible(position[None, :], key[:, None], first[None, :], sink, recent, PACKED, BAND), p, 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            delta = tl.broadcast_to(tl.load(DELTA + row0 + query)[None, :], [TILE, STEP])
            ds = p * tl.dot(v, tl.trans(dout), delta)
            dk = tl.dot(ds.to(q.dtype), q, dk)
    column = tl.arange(0, D)
    offset = batch.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h + key.to(tl.int64)[:, None] * stride_l
    inside = (key < total)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(DK + offset + column[None, :], (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + offset + column[None, :], dv.to(DV.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------- launch


def query_tiles(head_dim: int, query_block: int, key_block: int) -> Tiles:
    """The launch of the gradient of the queries: rows are queries, steps are keys."""
    return _tiles(head_dim, query_block, key_block)


def key_tiles(head_dim: int, query_block: int, key_block: int) -> Tiles:
    """The launch of the gradients of the keys and values: rows are keys, steps are queries."""
    return _tiles(head_dim, key_block, query_block)


def _tiles(head_dim: int, row: int, block: int) -> Tiles:
    wide = width(head_dim) > 128
    rows = divisor(row, 64 if wide else 128)
    return Tiles(rows, divisor(block, 64), warps=8 if rows == 128 or (wide and rows == 64) else 4, stages=2)


def transposed(counts: Tensor, indices: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Lists of the query blocks that see each of `blocks` key blocks; built on the device."""
    batch, heads, rows, columns = indices.shape
    listed = torch.arange(columns, device=indices.device) < counts[..., None]
    inside = listed & (indices >= 0) & (indices < blocks)
    seen = torch.zeros(batch, heads, rows, blocks + 1, dtype=torch.bool, device=indices.device)
    seen.scatter_(3, indices.where(inside, blocks).long(), True)
    return lists.compact(seen[..., :blocks].mT.contiguous())


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from those of the output `[batch, heads, length, head_dim]` and lse `[batch, heads, length]`."""
    (batch, heads, _, head_dim), kv_heads = p.q.shape, p.k.shape[1]
    length, total, group = p.numbers
    dq = empty_rows(batch, heads, length, head_dim, p.q)
    dk, dv = (empty_rows(batch, kv_heads, total, head_dim, p.k) for _ in "kv")
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    dout = aligned(dout)
    padded = -(-length // _ROWS) * _ROWS
    norm, delta = (torch.empty(batch, heads, padded, dtype=torch.float32, device=out.device) for _ in "nd")
    constants = {"GROUP": group, "HEAD_DIM": head_dim, "D": width(head_dim)}
    _prepare[(padded // 32, batch * heads)](
        out, dout, lse, dlse.contiguous(), norm, delta, *out.stride()[:3], *dout.stride()[:3], heads, length, padded,
        p.scale, HEAD_DIM=head_dim, D=width(head_dim), ROWS=32, num_warps=4,
    )  # fmt: skip
    _launch_queries(p, dout, norm, delta, dq, constants)
    _launch_keys(p, dout, norm, delta, dk, dv, constants)
    return dq, dk, dv


def _launch_queries(p: Problem, dout: Tensor, norm: Tensor, delta: Tensor, dq: Tensor, constants: dict) -> None:
    length, total, _ = p.numbers
    tiles = query_tiles(p.q.shape[3], p.query_block, p.key_block)
    items, _ = work_items(p, tiles)
    first, _, sink, recent = p.window.pointers(p.counts)
    _query_gradient[(items.shape[0],)](
        descriptor(p.q, tiles.rows), descriptor(p.k, tiles.step), descriptor(p.v, tiles.step),
        descriptor(dout, tiles.rows), norm, delta, dq, p.indices, items, first, sink, recent, *dq.stride()[:3],
        p.q.shape[1], length, norm.shape[2], total, -(-length // tiles.rows), p.indices.shape[2], p.indices.shape[3], p.scale,
        p.scale * LOG2E, **constants, ROW=p.query_block, TILE=tiles.rows, BLOCK=p.key_block, STEP=tiles.step,
        **p.flags, ITEM=ITEM, STAGES=tiles.stages, **tiles.options,
    )  # fmt: skip


def _launch_keys(
    p: Problem, dout: Tensor, norm: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, constants: dict
) -> None:
    length, total, _ = p.numbers
    tiles = key_tiles(p.q.shape[3], p.query_block, p.key_block)
    counts, indices = transposed(p.counts, p.indices, -(-total // p.key_block))
    spans = lists.spans(
        counts, indices, p.key_block, tiles.rows, p.query_block, tiles.step, length, total, p.window, transposed=True
    )
    first, _, sink, recent = p.window.pointers(p.counts)
    number = -(-total // tiles.rows)
    _key_gradient[(number * p.k.shape[0] * p.k.shape[1],)](
        descriptor(p.q, tiles.step), descriptor(p.k, tiles.rows), descriptor(p.v, tiles.rows),
        descriptor(dout, tiles.step), norm, delta, dk, dv, indices, spans, first, sink, recent, *dk.stride()[:3],
        p.k.shape[1], length, norm.shape[2], total, number, indices.shape[2], indices.shape[3], p.scale,
        p.scale * LOG2E, **constants, ROW=p.key_block, TILE=tiles.rows, BLOCK=p.query_block, STEP=tiles.step,
        **p.flags, STAGES=tiles.stages, **tiles.options,
    )  # fmt: skip


# ---------------------------------------------------------------------- compile without a GPU


def variants() -> list[Variant]:
    """The launches really used, for compilation without a GPU."""
    found = [_variant(kind, d, "bf16") for d in (64, 96, 128, 256) for kind in ("queries", "keys")]
    found += [_variant(kind, 128, "fp16", query_block=64, key_block=64) for kind in ("queries", "keys")]
    return [
        *found,
        *(_variant(kind, 128, "bf16", **{on: True}) for kind in ("queries", "keys") for on in ("packed", "band")),
    ]


def _variant(
    kind: str, head_dim: int, dtype: str, *, query_block=128, key_block=128, packed=False, band=False
) -> Variant:
    kernel, of = (_query_gradient, query_tiles) if kind == "queries" else (_key_gradient, key_tiles)
    tiles = of(head_dim, query_block, key_block)
    row, block = (query_block, key_block) if kind == "queries" else (key_block, query_block)
    signature = {n: "*i32" if n.isupper() else "i32" for n in kernel.arg_names}
    signature |= dict.fromkeys(("stride_b", "stride_h", "stride_l"), "i64") | dict.fromkeys(("scale", "factor"), "fp32")
    signature |= dict.fromkeys(("DQ", "DK", "DV"), f"*{dtype}") | dict.fromkeys(("NORM", "DELTA"), "*fp32")
    mine, others = (tensordesc(dtype, n, head_dim) for n in (tiles.rows, tiles.step))
    by_query, by_key = (mine, others) if kind == "queries" else (others, mine)
    signature |= {"Q": by_query, "DOUT": by_query, "K": by_key, "V": by_key}
    constants = {
        "GROUP": 4, "HEAD_DIM": head_dim, "D": width(head_dim), "ROW": row, "TILE": tiles.rows, "BLOCK": block,
        "STEP": tiles.step, "PACKED": packed, "BAND": band, "ITEM": ITEM, "STAGES": tiles.stages,
    }  # fmt: skip
    name = f"{kind}-{head_dim}-{dtype}-{query_block}x{key_block}" + "-packed" * packed + "-band" * band
    free = frozenset({"heads", "kv_heads", "length", "total", "tiles", "rows", "width"})
    known = {n: v for n, v in constants.items() if n in kernel.arg_names}
    return Variant(name, kernel, signature, known, tiles.options, free)
