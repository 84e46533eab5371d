"""Pools of pages: made empty, their pages dealt out row by row, and filled with rows of another pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ops.formats import WIDTHS, code_like, encode
from .ops.pages import Pages, as_bytes, pools
from .ops.recent import Recent
from .rows import Piece, places_of, round_up

if TYPE_CHECKING:
    from .once import Once
    from .page_rows import PageRows

SIZE = 32  # keys of a page: larger ones waste more of short rows, smaller ones cost page lists


def pages_of(n: int) -> int:
    """How many pages n keys take."""
    return -(-n // SIZE)


def new_pool(
    key: Tensor, value: Tensor, format: str | None, pages: int, lengths: Sequence[int], coded: bool = False
) -> Pages:
    """A pool of zeros for vectors (`coded`: codes) like these, its pages dealt out in order."""
    device = key.device
    kinds = [(x.dtype, x.shape[-1]) if coded else code_like(x, format) for x in (key, value)]
    made = [torch.zeros(pages, SIZE, width, dtype=kind, device=device) for kind, width in kinds]
    scales = [
        None if format is None else torch.zeros(pages, SIZE, WIDTHS[format], dtype=torch.float16, device=device)
        for _ in made
    ]
    most = max(lengths, default=0)
    if most == min(lengths, default=0):  # the host need not send a list
        each = pages_of(most)
        table = torch.arange(len(lengths) * each, dtype=torch.int32, device=device).view(len(lengths), each)
        length = torch.full((len(lengths),), most, dtype=torch.int32, device=device)
    else:
        counts = torch.tensor([pages_of(n) for n in lengths])
        page = torch.arange(int(counts.max()))
        table = ((counts.cumsum(0) - counts)[:, None] + page) * (page < counts[:, None])
        table, length = (x.to(device, torch.int32, non_blocking=True) for x in (table, torch.tensor(list(lengths))))
    return Pages(*made, table, length, most, format, *scales)


def packed(pieces: Sequence[Piece], once: Once) -> tuple[Pages, dict[str, Tensor], list[int], Tensor | None]:
    """A pool and planes that hold the rows of all pieces, without pages to spare, how many keys each row has, and what `first_pool` says of
    free pages, where it was asked."""
    places, first = sorted(places_of(pieces)), pieces[0].block
    lengths, old = [place.length for place in places], first.pool
    if len(pieces) == 1 and min(lengths) == max(lengths) > 0 and old.format is None and old.recent is None:
        pool, planes, top = _even(pieces[0], [place.position for place in places], lengths[0], once)
        return pool, planes, lengths, top
    counts = [pages_of(n) for n in lengths]
    capacity = round_up(max(lengths), SIZE)
    pool = new_pool(old.key, old.value, old.format, sum(counts), lengths, coded=True)
    if old.recent is not None:
        recent = Recent.start(len(places), old.recent.window, capacity, old.recent.key, old.recent.value)
        pool = dataclasses.replace(pool, recent=recent)
    planes = {
        name: like.new_full((len(places), capacity, *like.shape[2:]), first.fills[name])
        for name, like in first.planes.items()
    }
    moves: list[list[tuple[int, int, int, int]]] = [[] for _ in pieces]
    for target, (place, page) in enumerate(zip(places, accumulate(counts, initial=0), strict=False)):
        moves[place.piece].append((target, place.position, place.length, page * SIZE))
    for piece, some in zip(pieces, moves, strict=True):
        if some:
            _copy(pool, planes, piece, some)
    return pool, planes, lengths, None


def _even(piece: Piece, positions: list[int], length: int, once: Once) -> tuple[Pages, dict[str, Tensor], Tensor]:
    """The pool and planes of rows out of one block that keep equally many keys, and how many of its pages are free."""
    block, pool = piece.block, dataclasses.replace(piece.block.view, bound=length)
    planes, order = block.planes, piece.order
    if positions != list(range(pool.rows)):
        at = torch.tensor(positions).to(block.device, non_blocking=True)
        pool = dataclasses.replace(pool, table=pool.table[at], length=pool.length[at], ordered=False)
        planes, order = {name: plane[at] for name, plane in planes.items()}, None if order is None else order[at]
    kind = pool.key.dtype, pool.value.dtype
    if order is None:
        kept = {name: plane[:, :length] for name, plane in planes.items()}
        key, value = pool.read("key", kind[0]), pool.read("value", kind[1])
    else:
        order = order[:, :length]
        kept = {name: taken(plane, order) for name, plane in planes.items()}
        at = pool.at(order)
        key, value = pool.gather("key", order, kind[0], at), pool.gather("value", order, kind[1], at)
    pool, top = first_pool(key, value, pool.format, once)
    return pool, {name: filled_up(x, block.fills[name], once) for name, x in kept.items()}, top


def taken(plane: Tensor, slots: Tensor) -> Tensor:
    """What a plane [rows, capacity, ...] holds at slots [rows, n]."""
    if plane.ndim == 2:
        return plane.gather(1, slots)
    return plane[torch.arange(len(slots), device=slots.device)[:, None], slots]


def filled_up(x: Tensor, fill: float, once: Once) -> Tensor:
    """A copy of x [rows, n, ...] with slots up to the end of its last page."""
    room = -x.shape[1] % SIZE
    if room == 0:
        return x.clone(memory_format=torch.contiguous_format)
    shape = (len(x), room, *x.shape[2:])
    return torch.cat([x, once(x.device, ("room", shape, x.dtype, fill), lambda: x.new_full(shape, fill))], 1)


def first_pool(key: Tensor, value: Tensor, format: str | None, once: Once) -> tuple[Pages, Tensor]:
    """A pool of copies of keys and values [rows, length, head_dim], its pages in order, and how many of them are free: none."""
    (rows, most), device, made = key.shape[:2], key.device, {}
    pages = rows * pages_of(most)
    for name, x in (("key", key), ("value", value)):
        coded = (x,) if format is None else encode(x, format)
        for field, new in zip((name, name + "_scale"), coded, strict=False):
            made[field] = filled_up(as_bytes(new), 0, once).view(new.dtype).view(pages, SIZE, -1)
    sizes = [n for size in (pages, rows, 1) for n in (size, -size % 4)]  # each begins where 16 bytes do

    def numbers() -> Tensor:
        parts = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        table, _, length, *_ = parts.split(sizes)
        torch.arange(pages, out=table)
        length.fill_(most)
        return parts

    table, _, length, _, top, _ = once(device, ("first pool", rows, most), numbers).clone().split(sizes)
    return Pages(**made, table=table.view(rows, -1), length=length, bound=most, format=format), top


def end_to_end(blocks: Sequence[PageRows]) -> tuple[Pages, dict[str, Tensor], Tensor]:
    """A pool and planes of all their rows, each block's pages after those of the one before, and the stack of free pages."""
    old, first = [b.pool for b in blocks], blocks[0]
    sizes = [len(p.key) for p in old]
    begin, free = list(accumulate(sizes, initial=0)), [b.free[: b.spare_pages] for b in blocks]
    shift = torch.tensor(begin[:-1], dtype=torch.int32)
    by_row, by_page = (
        shift.repeat_interleave(torch.tensor([len(x) for x in parts])).to(first.device, non_blocking=True)
        for parts in ([p.table for p in old], free)
    )
    made = {}
    for name in ("key", "value", "key_scale", "value_scale"):
        parts = [getattr(p, name) for p in old]
        if parts[0] is not None:
            made[name] = torch.cat([as_bytes(x) for x in parts]).view(parts[0].dtype)
    table = _stacked([p.table for p in old], 0) + by_row[:, None]
    pool = dataclasses.replace(first.pool, **made, table=table, length=torch.cat([p.length for p in old]))
    planes = {name: _stacked([b.planes[name] for b in blocks], first.fills[name]) for name in first.planes}
    free = torch.cat(free) + by_page
    return pool, planes, torch.cat([free, free.new_zeros(begin[-1] - len(free))])


def _stacked(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Rows [rows, slots, ...] of all parts, short ones filled up."""
    width = max(x.shape[1] for x in parts)
    if all(x.shape[1] == width for x in parts):
        return torch.cat(list(parts))
    out, at = parts[0].new_full((sum(map(len, parts)), width, *parts[0].shape[2:]), fill), 0
    for x in parts:
        out[at : at + len(x), : x.shape[1]] = x
        at += len(x)
    return out


def _copy(new: Pages, planes: dict[str, Tensor], piece: Piece, moves: list[tuple[int, int, int, int]]) -> None:
    """Copy the kept keys of one piece: (row there, row here, keys, where its pages begin there) a row. The host waits for nothing."""
    block, total = piece.block, sum(n for _, _, n, _ in moves)
    rows = torch.tensor(moves).T.to(block.device, non_blocking=True)
    length = rows[2]
    row = torch.arange(len(moves), device=block.device).repeat_interleave(length, output_size=total)
    n = torch.arange(total, device=block.device) - (length.cumsum(0) - length)[row]
    target, source, _, begin = rows[:, row]
    slot = n if piece.order is None else piece.order[source, n]
    for name, plane in planes.items():
        plane[target, n] = block.planes[name][source, slot]
    origin, goal = block.pool.table[source, slot // SIZE].long() * SIZE + slot % SIZE, begin + n
    for filled, old in zip(pools(new), pools(block.pool), strict=True):
        filled.flatten(0, 1)[goal] = old.flatten(0, 1)[origin]
    if new.recent is not None:
        order = None if piece.order is None else piece.order[rows[1]]
        new.recent.put(rows[0], block.pool.recent, rows[1], order, length)
