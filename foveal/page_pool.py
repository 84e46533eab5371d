"""Pools of pages: made empty, their pages dealt out row by row, and filled with rows of another pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .ops.formats import WIDTHS, code_like
from .ops.pages import Pages, pools
from .ops.recent import Recent
from .rows import Piece, places_of, round_up

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
    counts = torch.tensor([pages_of(n) for n in lengths])
    page = torch.arange(int(counts.max()) if lengths else 0)
    table = ((counts.cumsum(0) - counts)[:, None] + page) * (page < counts[:, None])
    table, length = (x.to(device, torch.int32, non_blocking=True) for x in (table, torch.tensor(list(lengths))))
    return Pages(*made, table, length, max(lengths, default=0), format, *scales)


def packed(pieces: Sequence[Piece]) -> tuple[Pages, dict[str, Tensor], list[int]]:
    """A pool and planes that hold the rows of all pieces, without pages to spare, and how many keys each row has."""
    places, first = sorted(places_of(pieces)), pieces[0].block
    lengths, old = [place.length for place in places], first.pool
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
    return pool, planes, lengths


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
