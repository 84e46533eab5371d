"""What the attention of a prompt costs under a selection, counted from the selection and not from a clock."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ...excerpt import Excerpt
from ...ops import BlockLists
from ...selection import All, Band, Blocks, Lists, Selection

TILE = 128
"""Queries and keys of a tile where a selection has no blocks of its own: those of the kernels."""
_CELLS = 1 << 26  # slots looked at in one piece


class Work(NamedTuple):
    """One layer of one prompt, all query heads together.

    dense: pairs of a query and a key before it or at it. read: those of them that the selection shows. flops: of both products, whole
    blocks and whole lists, as the operations compute them. bytes: of the keys and values they load, once for each run of queries that
    share them.
    """

    dense: int
    read: int
    flops: int
    bytes: int

    @property
    def density(self) -> float:
        """The share of the keys before a query that it reads, mean over pairs."""
        return self.read / self.dense


def work_of(step, selection: Selection | None = None) -> Work:
    """The work of a step that reads a whole prompt, under its selection or another; waits for the device."""
    selection = step.visible if selection is None else selection
    dense = step.H * step.L * (step.L + 1) // 2
    if isinstance(selection, Excerpt):
        text = work_of(selection.text, selection.within)
        return text._replace(dense=dense)
    read, computed, keys = _counted(step, selection)
    width = step.q.shape[3] + step.v_new.shape[3]
    return Work(dense, read, 2 * computed * width, keys * width * step.q.element_size())


def _counted(step, selection: Selection) -> tuple[int, int, int]:
    """(pairs read, pairs computed, keys loaded)."""
    length = step.L
    if isinstance(selection, Blocks):
        return _of_blocks(selection.map.expand(1, step.H, -1, -1), selection.size, length)
    if isinstance(selection, Lists):
        return _of_lists(step, selection)
    bands = zip(*selection.per_head(step.H), strict=True) if isinstance(selection, Band) else [(0, length)] * step.H
    read = tiles = 0
    for (sink, recent), heads in Counter(bands).items():
        read += heads * _band(sink, recent, length)
        tiles += heads * int(BlockLists.band(length, length, sink, recent, TILE, 1).counts.sum())
    if isinstance(selection, All | Band):
        return read, tiles * TILE * TILE, tiles * TILE
    few, index = max(1, _CELLS // (step.H * step.T)), torch.arange(length, device=step.device)
    read = 0
    for a in range(0, length, few):  # no operation of its own: a mask over dense attention
        seen = selection.mask(step, a, min(a + few, length)) & (index <= index[a : a + few, None])
        read += int(seen.sum()) * (step.H // seen.shape[1])
    return read, tiles * TILE * TILE, tiles * TILE


def _band(sink: int, recent: int, length: int) -> int:
    """Pairs of one head: query i sees min(i + 1, sink + recent) keys."""
    held = min(sink + recent, length)
    return held * (held + 1) // 2 + (length - held) * held


def _of_blocks(chosen: Tensor, size: int, length: int) -> tuple[int, int, int]:
    index = torch.arange(chosen.shape[2], device=chosen.device)
    rows = (length - index * size).clamp(max=size)
    pairs = rows[:, None] * rows
    pairs = pairs.tril(-1) + torch.diag(rows * (rows + 1) // 2)
    live = chosen & (index <= index[:, None])
    cells = int(live.sum())
    return int(live.sum((0, 1)).mul(pairs).sum()), cells * size * size, cells * size


def _of_lists(step, lists: Lists) -> tuple[int, int, int]:
    length, size, rest = step.L, lists.size, max(0, step.L - lists.dense)
    heads, m = lists.slots.shape[1], lists.slots.shape[3]
    share = step.H // heads  # query heads that read one list
    query = torch.arange(-(-rest // size) * size, device=step.device).view(-1, size)
    real = query < rest
    read = computed = keys = 0
    few = max(1, _CELLS // (heads * m * size))
    for a in range(0, len(query), few):
        q, there = query[a : a + few], real[a : a + few]
        slots = lists.slots[0, :, a : a + len(q)]
        seen = (slots[:, :, None] <= q[:, :, None]) & (slots >= 0)[:, :, None] & there[:, :, None]
        last = torch.where(there, q, -1).amax(1)
        held = ((slots >= 0) & (slots <= last[:, None])).sum((0, 2))
        read += int(seen.sum()) * share
        computed += int((held * there.sum(1)).sum()) * share
        keys += int(held.sum())
    tail = length * (length + 1) // 2 - rest * (rest + 1) // 2
    if tail:
        tiles = step.H * -(-(length - rest) // TILE) * -(-length // TILE)
        read, computed, keys = read + step.H * tail, computed + tiles * TILE * TILE, keys + tiles * TILE
    return read, computed, keys
