"""The rows of a layer in pages: what the ragged store is made of on a GPU.

Keys and values lie in one pool of pages a layer, and each row (sequence, KV head) has a list of its own; what is per key
and small (token ids, scores, masses) stays a rectangle over logical slots, which methods read as plain tensors. Lengths,
page lists and the stack of free pages live on the device, so one key more or less needs no word from the host. The host
keeps what it can know without asking: exact lengths while every move was unconditional, and for how many more keys the
free pages are sure to last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError
from .ops.formats import check_format
from .ops.leave import Leaving, leave_page_keys
from .ops.pages import Pages, append_page_keys, as_bytes, drop_page_keys, pools, put
from .ops.recent import Recent
from .ops.scores import pool_newest
from .page_pool import SIZE, new_pool, packed, pages_of
from .rows import FIXED, Piece, Rows, pool, round_up

if TYPE_CHECKING:
    from .edits import Leave
    from .store import Layout

SPARE = 16  # a pool that must grow for rows that come grows by a sixteenth more, or every arrival would move it
ROOM = 128  # keys a row grows by, at least: memory that moves costs a captured graph


class PagedRows(Rows):
    """All rows of a layer. `fixed` rows show the host nothing but their capacity, as a captured graph must see them."""

    __slots__ = ("_bound", "assured", "fixed", "format", "free", "generation", "host", "lost", "pool", "table", "top")

    def __init__(
        self,
        pool: Pages,
        planes: dict[str, Tensor],
        fills: Mapping[str, float],
        lengths: Sequence[int],
        heads: frozenset[int],
        dtype: torch.dtype,
    ):
        """pool: pages 0, 1, ... are taken row by row for `lengths` keys each; the rest is free."""
        self.pool, self.planes, self.fills, self.heads, self.dtype = pool, planes, fills, heads, dtype
        self.index, self.fixed, self.pages = None, False, {}
        self.lost = False  # whether the latest step let keys go by the word of the device
        self.generation = 0  # grows when memory moves, which a captured graph cannot follow
        device, total = pool.key.device, pool.key.shape[0]
        self.arange = torch.arange(len(lengths), device=device)
        self.host: list[int] | None = list(lengths)
        self._bound = max(lengths, default=0)
        taken = sum(pages_of(n) for n in lengths)
        # entries past `top` mean nothing
        self.free = torch.arange(taken, taken + total, dtype=torch.int32, device=device)
        self.top = torch.full((1,), total - taken, dtype=torch.int32, device=device)
        self.assured = 0

    # ------------------------------------------------------------------ what there is

    paged = True

    @property
    def bound(self) -> int:
        return self.capacity if self.fixed else self._bound

    @property
    def length(self) -> Tensor | None:
        return None if self.even else self.pool.length.long()

    @property
    def even(self) -> bool:
        return not self.fixed and self.host is not None and len(set(self.host)) <= 1

    @property
    def view(self) -> Pages:
        """The pages as operations take them."""
        p = self.pool
        return dataclasses.replace(p, bound=self.bound)

    @property
    def capacity(self) -> int:
        return self.planes["token"].shape[1]

    @property
    def device(self) -> torch.device:
        return self.arange.device

    @property
    def widths(self) -> tuple[int, int]:
        halves = 2 if self.pool.format == "int4" else 1
        return self.pool.key.shape[2] * halves, self.pool.value.shape[2] * halves

    @property
    def nbytes(self) -> int:
        helpers = (self.pool.table, self.pool.length, self.arange, self.free, self.top)
        pooled = [page for page, _ in self.pages.values()]
        recent = () if self.pool.recent is None else self.pool.recent.tensors
        return sum(t.nbytes for t in (*pools(self.pool), *recent, *self.planes.values(), *helpers, *pooled))

    def held(self, heads: set[int], kv_heads: int) -> int | None:
        if self.fixed or self.host is None:
            return None
        found = {n for row, n in enumerate(self.host) if row % kv_heads in heads}
        return found.pop() if len(found) == 1 else None

    def lengths(self) -> list[int]:
        if self.host is None:
            self.host = self.pool.length.tolist()
            self._bound = max(self.host)
        return self.host

    def used(self) -> Tensor:
        return self.read("token") != self.fills["token"]

    def read(self, name: str) -> Tensor:
        if name not in FIXED:
            return self.planes[name][:, : self.bound]
        return self.gather(name, torch.arange(self.bound, device=self.device).expand(len(self.arange), -1))

    def gather(self, name: str, slots: Tensor) -> Tensor:
        if name in FIXED:
            return self.view.gather(name, slots, self.dtype)
        return self.planes[name][self.arange[:, None], slots]

    def put(self, name: str, slots: Tensor, x: Tensor) -> None:
        if name in FIXED:
            put(self.pool, slots, *((x, None) if name == "key" else (None, x)))
        else:
            self.planes[name][self.arange[:, None], slots] = x

    # ------------------------------------------------------------------ growing

    def reserve(self, extra: int) -> None:
        if extra <= self.assured and self._bound + extra <= self.capacity:
            return
        lengths = self.lengths()  # the bounds may have drifted from the truth: look before growing
        have = self.pool.key.shape[0] - sum(pages_of(n) for n in lengths)
        need = sum(pages_of(n + extra) - pages_of(n) for n in lengths)
        room = max(ROOM, round_up(self.capacity // 64, SIZE)) if self._bound else 0
        if have < need:
            more = max(need - have, len(lengths) * (room // SIZE))
            self._more_pages(have, more)
            have += more
        if self._bound + extra > self.capacity:
            self._more_slots(max(self._bound + extra, self.capacity + room))
        self.assured = max(extra, have // len(lengths) * SIZE)

    def _more_pages(self, have: int, more: int) -> None:
        p, old = self.pool, self.pool.key.shape[0]
        grown = {}
        for name in ("key", "value", "key_scale", "value_scale"):
            x = getattr(p, name)
            if x is not None:
                new = x.new_zeros(old + more, *x.shape[1:])
                as_bytes(new)[:old] = as_bytes(x)
                grown[name] = new
        self.pool = dataclasses.replace(p, **grown)
        self.generation += 1
        fresh = torch.arange(old, old + more, dtype=torch.int32, device=self.device)
        self.free = torch.cat([self.free[:have], fresh, self.free.new_zeros(old - have)])
        self.top = torch.full_like(self.top, have + more)

    def _more_slots(self, least: int) -> None:
        """Room for more slots in the rectangles and the page lists."""
        wanted = round_up(least, SIZE)
        for name, plane in self.planes.items():
            new = plane.new_full((plane.shape[0], wanted, *plane.shape[2:]), self.fills[name])
            new[:, : self._bound] = plane[:, : self._bound]
            self.planes[name] = new
        table = self.pool.table
        new = table.new_zeros(table.shape[0], wanted // SIZE)
        new[:, : table.shape[1]] = table
        recent = None if self.pool.recent is None else self.pool.recent.resized(wanted)
        self.pool = dataclasses.replace(self.pool, table=new, recent=recent)
        self.pages.clear()
        self.generation += 1

    def append(self, key: Tensor, value: Tensor, ids: int | Tensor) -> None:
        extra = key.shape[1]
        self.reserve(extra)
        if extra > 1:
            self._append_many(key, value, ids)
            return
        if not isinstance(ids, Tensor):
            ids = torch.full((len(self.arange),), ids, dtype=torch.int32, device=self.device)
        ids = ids.flatten().to(torch.int32).contiguous()
        append_page_keys(self.view, self.free, self.top, key[:, 0], value[:, 0], self.planes["token"], ids)
        self.advance(1)
        for source, size in {(what[0], size) for what, size in self.pages}:
            kinds = {what[1:]: x for (what, n), (x, _) in self.pages.items() if (what[0], n) == (source, size)}
            pool_newest(self.view, "key" if source == "k" else "value", size, kinds)

    def advance(self, steps: int, seen: bool = True) -> None:
        """What the host may note of keys that were appended. Not `seen`: by a captured graph that lets others go."""
        self._bound += steps
        self.assured -= steps
        self.host = [n + steps for n in self.host] if seen and self.host is not None else None

    def _append_many(self, key: Tensor, value: Tensor, ids: Tensor) -> None:
        lengths, extra = self.lengths(), key.shape[1]
        have = self.pool.key.shape[0] - sum(pages_of(n) for n in lengths)
        first = torch.tensor([pages_of(n) for n in lengths])
        counts = torch.tensor([pages_of(n + extra) for n in lengths]) - first
        new, row = int(counts.sum()), torch.arange(len(lengths)).repeat_interleave(counts)
        page = torch.arange(new) - (counts.cumsum(0) - counts - first).repeat_interleave(counts)
        row, page = torch.stack([row, page]).to(self.device, non_blocking=True)
        self.pool.table[row, page] = self.free[have - new : have]
        self.top.fill_(have - new)
        slots = self.pool.length.long()[:, None] + torch.arange(extra, device=self.device)
        put(self.pool, slots, key, value)
        if self.pool.recent is not None:
            self.pool.recent.remember(slots, ids.expand(len(self.arange), -1), key, value)
        self.planes["token"].scatter_(1, slots, ids.expand(len(self.arange), -1).to(torch.int32))
        self.pool.length.add_(extra)
        self.advance(extra)
        if self.pages:  # pooled pages are computed anew elsewhere
            self.pages.clear()
            self.generation += 1

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
        cls, key: Tensor, value: Tensor, planes: dict[str, Tensor], fills: Mapping[str, float], layout: Layout
    ) -> PagedRows:
        """Rows without keys for keys and values like these, [batch, kv_heads, length, head_dim]."""
        lengths = [0] * (key.shape[0] * key.shape[1])
        check_format(layout.format, key.shape[3], value.shape[3])
        pool = new_pool(key, value, layout.format, 0, lengths)
        if layout.residual:
            pool = dataclasses.replace(pool, recent=Recent.start(len(lengths), layout.residual, 0, key, value))
        return cls(pool, planes, fills, lengths, frozenset(range(key.shape[1])), key.dtype)

    def take(self, positions: Sequence[int], numbers: Sequence[int], total: int, heads: int) -> PagedRows:
        lengths = self.lengths()
        return self.pack([Piece(self, list(numbers), [lengths[p] for p in positions], None, list(positions))], heads)[0]

    @classmethod
    def pack(cls, pieces: Sequence[Piece], heads: int, length_class=None) -> list[PagedRows]:
        """New rows out of pieces that make up the whole store, without pages to spare."""
        pool, planes, lengths = packed(pieces)
        first = pieces[0].block
        return [cls(pool, planes, first.fills, lengths, frozenset(range(heads)), first.dtype)]

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
        self.arange = torch.arange(len(table), device=device)
        self.host = [*self.lengths(), *[0] * rows]
        self.assured = 0
        self.pages.clear()
        self.generation += 1

    def replace(self, first: int, source: PagedRows | None, rows: int) -> None:
        """Rows `first` .. `first + rows` give their pages back and take over the keys of `source` (None: none).

        Memory that others use stays where it is, so a captured graph goes on as long as pages and slots suffice.
        """
        lengths = list(self.lengths())
        have = self.pool.key.shape[0] - sum(pages_of(n) for n in lengths)
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
        self.host, self.assured = lengths, 0
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

    @property
    def spare(self) -> float:
        """The share of the pages that nobody uses."""
        total = self.pool.key.shape[0]
        return 1 - sum(pages_of(n) for n in self.lengths()) / total if total else 0.0

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
