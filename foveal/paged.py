"""Rows in pages on the move: keys that leave, rows that are copied, joined, and come and go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError
from .once import Once
from .ops.formats import check_format
from .ops.leave import Leaving, leave_page_keys
from .ops.pages import drop_page_keys, pools
from .ops.recent import Recent
from .page_pool import SIZE, end_to_end, filled_up, first_pool, new_pool, packed, pages_of
from .page_rows import PageRows
from .rows import Piece, pool

if TYPE_CHECKING:
    from .edits import Leave, Plane
    from .rows import Layout

SPARE = 16  # a pool that must grow for rows that come grows by a sixteenth more, or every arrival would move it


class PagedRows(PageRows):
    """All rows of a layer, with keys that leave, and rows that come and go."""

    __slots__ = ()

    # ------------------------------------------------------------------ letting go

    def drop(self, slot: Tensor, optional: bool) -> None:
        if self._bound == 0 and not self.fixed:
            if optional:
                return
            raise InputError(
                "Keep(drop=...) on rows that hold no key: use optional=True with slot -1 for rows that lose nothing"
            )
        slot, length = slot.contiguous(), self.pool.length.long()
        gone, last = (slot >= 0) & (slot < length), (length - 1).clamp(min=0)
        target = slot.where(gone, last)
        for name, plane in self.planes.items():
            moved = plane[self.arange, last]
            plane[self.arange, target] = moved
            at = gone.view(-1, *[1] * (moved.ndim - 1))
            plane[self.arange, last] = moved.masked_fill(at, self.fills[name])
        drop_page_keys(self.view, self.free, self.top, slot)
        for page in self.pages:
            for changed in (target, last):
                self._touch(*page, changed // page[1])
        if optional:
            self.host, self.lost = None, True
        elif self.host is not None:
            self.host = [n - 1 for n in self.host]
            self._bound -= 1
        else:
            self.lost = True

    def leaving(self, rule: Leave, kv_heads: int, heads: Tensor | None) -> Leaving:
        """The rows of this layer and a rule, as the operation takes them."""
        planes = [(plane, self.fills[name]) for name, plane in self.planes.items() if name not in ("token", "mass")]
        if "mass" in self.planes:  # where keys fold, it comes first
            planes.insert(0, (self.planes["mass"], self.fills["mass"]))
        score = None if rule.score is None else self.planes[rule.score]
        return Leaving(
            self.view, self.free, self.top, self.planes["token"], planes, kv_heads, rule.allowed, rule.after, rule.recent, score,
            rule.by_token, heads, rule.fold, rule.gone,
        )  # fmt: skip

    def leave(self, what: Leaving, certain: Sequence[bool] | None = None) -> Tensor | None:
        """Let one key of each row go where it is one too many. certain: which rows lose one, where the host knows."""
        left = leave_page_keys(what)
        if certain is None or self.host is None:
            self.host, self.lost = None, True
        else:
            self.host = [n - lose for n, lose in zip(self.host, certain, strict=True)]
            self._bound = max(self.host)
        return left

    # ------------------------------------------------------------------ copies

    @classmethod
    def start(
        cls,
        key: Tensor,
        value: Tensor,
        planes: dict[str, Tensor],
        fills: Mapping[str, float],
        layout: Layout,
        heads: frozenset[int],
    ) -> PagedRows:
        """Rows without keys for keys and values like these, [rows, length, head_dim]."""
        lengths = [0] * len(key)
        check_format(layout.format, key.shape[2], value.shape[2])
        pool = new_pool(key, value, layout.format, 0, lengths)
        if layout.residual:
            pool = dataclasses.replace(pool, recent=Recent.start(len(lengths), layout.residual, 0, key, value))
        return cls(pool, planes, fills, lengths, heads, key.dtype)

    @classmethod
    def begin(
        cls,
        key: Tensor,
        value: Tensor,
        token: int,
        specs: Mapping[str, Plane],
        fills: Mapping[str, float],
        format: str | None,
        heads: frozenset[int],
        once: Once,
    ) -> PagedRows:
        """Rows that hold keys and values [rows, length, head_dim] with token ids from `token` on, and have no page to spare.

        What small tensors hold is the same in every layer, so it is computed in the first and copied in the others.
        """
        check_format(format, key.shape[2], value.shape[2])
        (rows, length), device = key.shape[:2], key.device
        capacity = pages_of(length) * SIZE
        ids = lambda: torch.arange(token, token + length, dtype=torch.int32, device=device).expand(rows, -1)
        plane = once(device, ("token ids", token, rows, length), lambda: filled_up(ids(), fills["token"], once))
        planes = {"token": plane.clone()}
        for name, spec in specs.items():
            planes[name] = torch.full((rows, capacity, *spec.width), fills[name], dtype=spec.dtype, device=device)
        pool, top = first_pool(key, value, format, once)
        arange = once(device, ("rows", rows), lambda: torch.arange(rows, device=device))
        return cls(pool, planes, fills, [length] * rows, heads, key.dtype, arange, top)

    def take(self, positions: Sequence[int], numbers: Sequence[int], total: int, heads: int) -> PagedRows:
        lengths = self.lengths()
        return self.pack([Piece(self, list(numbers), [lengths[p] for p in positions], None, list(positions))], heads)[0]

    @classmethod
    def pack(cls, pieces: Sequence[Piece], heads: int, once: Once | None = None) -> list[PagedRows]:
        """New rows out of pieces that make up the whole store, without pages to spare. once: the pass's."""
        pool, planes, lengths, top = packed(pieces, once or Once())
        first = pieces[0].block
        arange = first.arange if len(first.arange) == len(lengths) else None
        return [cls(pool, planes, first.fills, lengths, frozenset(range(heads)), first.dtype, arange, top)]

    @classmethod
    def join(cls, pieces: Sequence[Piece], heads: int) -> list[PagedRows]:
        """As `pack`, for whole blocks one after the other: their pages are laid end to end, with those to spare unless they are many."""
        blocks = [p.block for p in pieces]
        first, lengths = blocks[0], [n for p in pieces for n in p.lengths]
        total, used = sum(len(b.pool.key) for b in blocks), sum(map(pages_of, lengths))
        if first.pool.recent is not None or total > 2 * used:
            return cls.pack(pieces, heads)
        pool, planes, free = end_to_end(blocks)
        new = cls(pool, planes, first.fills, lengths, frozenset(range(heads)), first.dtype)
        new.free, new.top, new.ordered = free, torch.full_like(new.top, total - used), False
        return [new]

    # ------------------------------------------------------------------ rows come and go where they are

    def widen(self, rows: int) -> None:
        """`rows` more rows without keys, after those there are."""
        p, device = self.pool, self.device
        for name, plane in self.planes.items():
            fresh = plane.new_full((rows, *plane.shape[1:]), self.fills[name])
            self.planes[name] = torch.cat([plane, fresh])
        table = torch.cat([p.table, p.table.new_zeros(rows, p.table.shape[1])])
        recent = None if p.recent is None else p.recent.more(rows)
        length = torch.cat([p.length, p.length.new_zeros(rows)])
        self.pool = dataclasses.replace(p, table=table, length=length, recent=recent)
        self.arange, self.ordered = torch.arange(len(table), device=device), False
        self.host = [*self.lengths(), *[0] * rows]
        self.assured = 0
        self.pages.clear()
        self.generation += 1

    def replace(self, first: int, source: PagedRows | None, rows: int) -> None:
        """Rows `first` .. `first + rows` give their pages back and take over the keys of `source` (None: none).

        Memory that others use stays where it is, so a captured graph goes on as long as pages and slots suffice.
        """
        lengths = list(self.lengths())
        have = self.spare_pages
        mine = slice(first, first + rows)
        left = [self.pool.table[first + r, : pages_of(n)] for r, n in enumerate(lengths[mine]) if n]
        if left:
            left = torch.cat(left)
            self.free[have : have + len(left)] = left
            have += len(left)
        for name, plane in self.planes.items():
            plane[mine] = self.fills[name]
        new = [0] * rows if source is None else source.lengths()
        lengths[mine] = new
        self.pool.length[mine] = torch.tensor(new, dtype=torch.int32, device=self.device)
        if self.pool.recent is not None:
            self.pool.recent.clear(mine)
        self.host, self.assured, self.ordered = lengths, 0, False
        if self.pages:  # pooled pages are computed anew elsewhere
            self.pages.clear()
            self.generation += 1
        if source is not None:
            have = self._take_over(first, source, have)
        self._bound = max(lengths)
        self.top.fill_(have)

    def _take_over(self, first: int, source: PagedRows, have: int) -> int:
        """Copy the pages and planes of `source` into rows from `first`; how many free pages are left."""
        lengths = source.lengths()
        counts = [pages_of(n) for n in lengths]
        need, longest = sum(counts), max(lengths)
        if have < need:
            more = need - have + self.pool.key.shape[0] // SPARE
            self._more_pages(have, more)
            have += more
        if longest > self.capacity:
            self._more_slots(longest)
        pages, start = self.free[have - need : have].clone(), 0
        for r, n in enumerate(counts):
            self.pool.table[first + r, :n] = pages[start : start + n]
            start += n
        if need:
            origin = torch.cat([source.pool.table[r, :n] for r, n in enumerate(counts)]).long()
            for mine, theirs in zip(pools(self.pool), pools(source.pool), strict=True):
                mine[pages.long()] = theirs[origin]
        for name, plane in self.planes.items():
            plane[first : first + len(lengths), :longest] = source.planes[name][:, :longest]
        if self.pool.recent is not None:
            mine = torch.arange(first, first + len(lengths), device=self.device)
            self.pool.recent.put(mine, source.pool.recent, source.arange, None, source.pool.length)
        return have - need

    # ------------------------------------------------------------------ pooled pages

    def pooled(self, what: str, size: int) -> Tensor:
        if (what, size) not in self.pages:
            source = self.gather(
                "key" if what[0] == "k" else "value",
                torch.arange(self.capacity, device=self.device).expand(len(self.arange), -1),
            )
            used = self.planes["token"] != self.fills["token"]
            self.pages[what, size] = (pool(source, what[1:], size, used), 0)
        return self.pages[what, size][0][:, : -(-self.bound // size)]

    def _touch(self, what: str, size: int, page: Tensor) -> None:
        """Pool one page of each row anew, page [rows]."""
        slots = page[:, None] * size + torch.arange(size, device=self.device)
        used = slots < self.pool.length[:, None]
        x = self.gather("key" if what[0] == "k" else "value", slots * used)
        self.pages[what, size][0][self.arange, page] = pool(x, what[1:], size, used)[:, 0]
