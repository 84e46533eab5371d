"""Block lists on the device: a map becomes ascending lists, and lists become tiles of work for the attention kernels.

A *row* is a query block of one head with the key blocks it may see (or, transposed, a key block with the query blocks that
see it). A *tile* is the part of a row that one program computes; its *span* is four numbers `(a0, a1, a2, a3)` that count
tiles of the list: a0..a3 has anything visible, and a1..a2 is visible to every row of the tile, so that it needs no mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.gpu.variants import Variant

_CHUNK = 256  # list entries read at once
_BUCKETS = 64  # classes of weight when tiles are put in order
ITEM = 8  # numbers of a work item: tile, a0, a1, a2, a3, and room to a power of two


class Window(NamedTuple):
    """What else narrows causality, exactly to the token; each field may be None.

    first, last: int32 `[total]`, first key and end of the packed sequence that a position belongs to.
    sink, recent: int32 `[heads]`, position i sees key j if j < sink or i - j < recent; recent <= total.
    """

    first: Tensor | None = None
    last: Tensor | None = None
    sink: Tensor | None = None
    recent: Tensor | None = None

    @staticmethod
    def of(total: int, starts: Tensor | None, sink: Tensor | None, recent: Tensor | None) -> Window:
        """From the bounds of packed sequences, int32 `[n + 1]`, and the band of each head, int32 `[heads]`."""
        if starts is not None and sink is not None:
            raise InputError("expected packed sequences or a band, got both; pass each sequence alone with its band")
        first = last = None
        if starts is not None:
            # Whatever the numbers are, every position lies in one sequence: the ends of the text bound it too.
            inner = starts.to(torch.int32).clamp(0, total)
            edge = inner.new_zeros(1)
            bounds = torch.cat([edge, inner, edge + total])
            place = torch.searchsorted(bounds, torch.arange(total, device=bounds.device, dtype=torch.int32), right=True)
            place = place.clamp(1, bounds.shape[0] - 1)
            first, last = bounds[place - 1], bounds[place]
        return Window(first, last, sink, recent)

    def pointers(self, stand_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors; what is not there is `stand_in`, which the kernels do not read."""
        return tuple(stand_in if t is None else t for t in self)


# ---------------------------------------------------------------------- a map becomes lists


@triton.jit(do_not_specialize=["heads", "rows", "columns"])
def _compact(MAP, COUNTS, INDICES, stride_b, stride_h, stride_r, stride_c, heads, rows, columns, CHUNK: tl.constexpr):
    """One program a row: places of the true columns by a prefix sum, then `columns` up to the end."""
    row = tl.program_id(0).to(tl.int64)
    head, batch = (row // rows) % heads, row // rows // heads
    start = MAP + batch * stride_b + head * stride_h + (row % rows) * stride_r
    out = INDICES + row * columns
    count = 0
    for base in range(0, columns, CHUNK):
        column = base + tl.arange(0, CHUNK)
        listed = tl.load(start + column.to(tl.int64) * stride_c, mask=column < columns, other=0) != 0
        place = count + tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(out + place, column, mask=listed)
        count += tl.sum(listed.to(tl.int32), 0)
    for base in range(0, columns, CHUNK):
        place = base + tl.arange(0, CHUNK)
        tl.store(out + place, columns, mask=(place >= count) & (place < columns))
    tl.store(COUNTS + row, count)


def compact(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 `[batch, heads, rows]` and ascending indices int32 `[batch, heads, rows, columns]` of a bool map.

    Places after a row's count hold `columns`. No host synchronisation: the lists are as wide as the map.
    """
    batch, heads, rows, columns = block_map.shape
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=block_map.device)
    indices = torch.empty(batch, heads, rows, columns, dtype=torch.int32, device=block_map.device)
    if counts.numel():
        bits = block_map.view(torch.uint8)
        _compact[(counts.numel(),)](
            bits, counts, indices, *bits.stride(), heads, rows, columns, CHUNK=_CHUNK, num_warps=2
        )
    return counts, indices


# ---------------------------------------------------------------------- lists become spans and work items


@triton.jit
def _limits(
    tile, head, length, total, FIRST, LAST, SINK, RECENT,
    TILE: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Bounds on the other side of a tile: something visible in lo..hi, everything in full_lo..full_hi."""
    past = total - length
    if TRANSPOSED:  # rows are keys, the other side is query numbers
        begin = tile * TILE
        end = tl.minimum(begin + TILE, total) - 1
        lo = begin - past
        full_lo = end - past
        hi = length
        full_hi = length
        if PACKED:
            hi = tl.minimum(tl.load(LAST + end) - past, hi)
            full_hi = tl.minimum(tl.load(LAST + begin) - past, full_hi)
        if BAND:
            sink = tl.load(SINK + head)
            recent = tl.load(RECENT + head)
            hi = tl.where(begin < sink, hi, tl.minimum(end + recent - past, hi))
            full_hi = tl.where(end < sink, full_hi, tl.minimum(tl.maximum(begin, sink) + recent - past, full_hi))
    else:  # rows are queries, the other side is keys
        begin = past + tile * TILE
        end = tl.minimum(begin + TILE, total) - 1
        lo = 0
        full_lo = 0
        full_hi = begin + 1
        hi = end + 1
        if PACKED:
            lo = tl.load(FIRST + begin)
            full_lo = tl.load(FIRST + end)
        if BAND:
            sink = tl.load(SINK + head)
            recent = tl.load(RECENT + head)
            lo = tl.where(sink > 0, 0, begin - recent + 1)
            full_lo = end - recent + 1
            full_lo = tl.where(full_lo <= sink, 0, full_lo)
    return tl.maximum(lo, 0), tl.maximum(full_lo, 0), full_hi, hi


@triton.jit
def _ending_by(bound, start, STEP: tl.constexpr, PARTS: tl.constexpr):
    """How many of a block's PARTS tiles of STEP end at or before `bound`."""
    return tl.minimum(tl.maximum(bound - start, 0) // STEP, PARTS)


@triton.jit
def _starting_before(bound, start, STEP: tl.constexpr, PARTS: tl.constexpr):
    """How many of a block's PARTS tiles of STEP start before `bound`."""
    return tl.minimum((tl.maximum(bound - start, 0) + STEP - 1) // STEP, PARTS)


@triton.jit(do_not_specialize=["heads", "rows", "tiles", "width", "blocks", "length", "total", "group_tiles", "most"])
def _spans(
    COUNTS, INDICES, FIRST, LAST, SINK, RECENT, SPANS, HISTOGRAM, RANKS,
    heads, rows, tiles, width, blocks, length, total, group_tiles, most,
    ROW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr, BAND: tl.constexpr, SORT: tl.constexpr, BUCKETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a tile: its span, and with SORT its class of weight and its number within that class."""
    number = tl.program_id(0).to(tl.int64)
    owner, tile = number // tiles, (number % tiles).to(tl.int32)
    row = owner * rows + tile * TILE // ROW
    lo, full_lo, full_hi, hi = _limits(
        tile, owner % heads, length, total, FIRST, LAST, SINK, RECENT, TILE, TRANSPOSED, PACKED, BAND
    )
    PARTS: tl.constexpr = BLOCK // STEP
    count = tl.minimum(tl.load(COUNTS + row), width)
    a0, a1, a2, a3 = 0, 0, 0, 0
    for base in range(0, count, CHUNK):
        place = base + tl.arange(0, CHUNK)
        listed = place < count
        block = tl.load(INDICES + row * width + place, mask=listed, other=0)
        start = tl.minimum(tl.maximum(block, -1), blocks) * BLOCK  # out of range: never visible
        a0 += tl.sum(tl.where(listed, _ending_by(lo, start, STEP, PARTS), 0), 0)
        a1 += tl.sum(tl.where(listed, _starting_before(full_lo, start, STEP, PARTS), 0), 0)
        a2 += tl.sum(tl.where(listed, _ending_by(full_hi, start, STEP, PARTS), 0), 0)
        a3 += tl.sum(tl.where(listed, _starting_before(hi, start, STEP, PARTS), 0), 0)
    a3 = tl.maximum(a3, a0)
    a1 = tl.minimum(tl.maximum(a1, a0), a3)
    a2 = tl.minimum(tl.maximum(a2, a1), a3)
    out = SPANS + number * 4
    tl.store(out, a0)
    tl.store(out + 1, a1)
    tl.store(out + 2, a2)
    tl.store(out + 3, a3)
    if SORT:
        bucket = BUCKETS - 1 - tl.minimum((a3 - a0) * BUCKETS // (most + 1), BUCKETS - 1)
        rank = tl.atomic_add(HISTOGRAM + number // group_tiles * BUCKETS + bucket, 1, sem="relaxed")
        tl.store(RANKS + number * 2, bucket)
        tl.store(RANKS + number * 2 + 1, rank)


@triton.jit(do_not_specialize=["group_tiles"])
def _arrange(
    SPANS, HISTOGRAM, RANKS, ITEMS, group_tiles, BUCKETS: tl.constexpr, CHUNK: tl.constexpr, ITEM: tl.constexpr
):
    """Write the tiles of a group, heavy ones first, as work items: (tile, a0, a1, a2, a3)."""
    group = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = place < group_tiles
    tile = group * group_tiles + place
    bucket = tl.load(RANKS + tile * 2, mask=inside, other=0)
    rank = tl.load(RANKS + tile * 2 + 1, mask=inside, other=0)
    column = tl.arange(0, BUCKETS)
    sizes = tl.load(HISTOGRAM + group * BUCKETS + column)
    before = tl.sum(tl.where(column[None, :] < bucket[:, None], sizes[None, :], 0), 1)
    out = ITEMS + (group * group_tiles + before + rank) * ITEM
    tl.store(out, tile.to(tl.int32), mask=inside)
    for i in tl.static_range(4):
        tl.store(out + 1 + i, tl.load(SPANS + tile * 4 + i, mask=inside, other=0), mask=inside)


def spans(
    counts: Tensor, indices: Tensor, row: int, tile: int, block: int, step: int, length: int, total: int,
    window: Window, *, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """Spans int32 `[batch, heads, tiles, 4]` of the tiles of all rows, in list tiles of `step` (blocks of `block`)."""
    return _launch_spans(counts, indices, row, tile, block, step, length, total, window, transposed, None)[0]


def work(
    counts: Tensor, indices: Tensor, row: int, tile: int, block: int, step: int, length: int, total: int,
    window: Window, kv_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Work items int32 `[tiles, 8]`: (tile, a0, a1, a2, a3) of every tile of queries, and a counter at 0, int32 `[1]`.

    Tiles of the heads that share keys stay together, so that the keys stay in the L2 cache; within, heavy ones come first.
    """
    batch, heads = counts.shape[:2]
    tiles = -(-length // tile)
    groups, group_tiles = batch * kv_heads, heads // kv_heads * tiles
    zeros = torch.zeros(groups * _BUCKETS + 1, dtype=torch.int32, device=counts.device)
    table, ranks = _launch_spans(
        counts, indices, row, tile, block, step, length, total, window, False, (zeros, group_tiles)
    )
    items = torch.empty(groups * group_tiles, ITEM, dtype=torch.int32, device=counts.device)
    if items.numel():
        grid = (groups, triton.cdiv(group_tiles, 128))
        _arrange[grid](table, zeros, ranks, items, group_tiles, BUCKETS=_BUCKETS, CHUNK=128, ITEM=ITEM, num_warps=4)
    return items, zeros[-1:]


def _launch_spans(
    counts, indices, row, tile, block, step, length, total, window, transposed, order
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, width = indices.shape
    tiles = -(-(total if transposed else length) // tile)
    number = batch * heads * tiles
    table = torch.empty(batch, heads, tiles, 4, dtype=torch.int32, device=counts.device)
    histogram, group_tiles = order or (counts, 1)
    ranks = torch.empty(number, 2, dtype=torch.int32, device=counts.device) if order else counts
    blocks = -(-(length if transposed else total) // block)
    if number:
        _spans[(number,)](
            counts, indices, *window.pointers(counts), table, histogram, ranks,
            heads, rows, tiles, width, blocks, length, total, group_tiles, blocks * (block // step),
            ROW=row, TILE=tile, BLOCK=block, STEP=step, TRANSPOSED=transposed, PACKED=window.first is not None,
            BAND=window.sink is not None, SORT=order is not None, BUCKETS=_BUCKETS, CHUNK=_CHUNK, num_warps=2,
        )  # fmt: skip
    return table, ranks


def variants() -> list[Variant]:
    """The launches really used, for compilation without a GPU."""
    return [_variant_compact(), _variant_arrange(), *(_variant_spans(*kind) for kind in _KINDS)]


_KINDS = [
    ("rows", False, False, False),
    ("packed", True, False, False),
    ("band", False, True, False),
    ("columns", True, False, True),
]


def _variant_compact() -> Variant:
    signature = {"MAP": "*u8", "COUNTS": "*i32", "INDICES": "*i32"}
    signature |= {f"stride_{n}": "i64" for n in "bhrc"} | dict.fromkeys(("heads", "rows", "columns"), "i32")
    free = frozenset(n for n in signature if not n.isupper())
    return Variant("compact", _compact, signature, {"CHUNK": _CHUNK}, {"num_warps": 2}, free)


def _variant_arrange() -> Variant:
    signature = dict.fromkeys(("SPANS", "HISTOGRAM", "RANKS", "ITEMS"), "*i32") | {"group_tiles": "i32"}
    constants = {"BUCKETS": _BUCKETS, "CHUNK": 128, "ITEM": ITEM}
    return Variant("arrange", _arrange, signature, constants, {"num_warps": 4}, frozenset({"group_tiles"}))


def _variant_spans(name: str, packed: bool, band: bool, transposed: bool) -> Variant:
    signature = {n: "*i32" if n.isupper() else "i32" for n in _spans.arg_names}
    constants = {
        "ROW": 128, "TILE": 128, "BLOCK": 128, "STEP": 64, "TRANSPOSED": transposed, "PACKED": packed, "BAND": band,
        "SORT": not transposed, "BUCKETS": _BUCKETS, "CHUNK": _CHUNK,
    }  # fmt: skip
    free = frozenset(n for n in signature if not n.isupper())
    return Variant(f"spans-{name}", _spans, signature, constants, {"num_warps": 2}, free)
