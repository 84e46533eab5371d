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

import torch
from torch import Tensor
from torch.nn.functional import pad

from .once import Once
from .ops.pages import Pages, append_page_keys, as_bytes, pools, put
from .ops.scores import pool_newest
from .page_pool import SIZE, pages_of
from .rows import FIXED, Rows, round_up

ROOM = 128  # keys a row grows by, at least: memory that moves costs a captured graph


class PageRows(Rows):
    """All rows of a layer. `fixed` rows show the host nothing but their capacity, as a captured graph must see them."""

    __slots__ = (
        "_bound", "assured", "fixed", "format", "free", "generation", "host", "lost", "ordered", "pool", "table", "top",
    )  # fmt: skip

    def __init__(
        self,
        pool: Pages,
        planes: dict[str, Tensor],
        fills: Mapping[str, float],
        lengths: Sequence[int],
        heads: frozenset[int],
        dtype: torch.dtype,
        arange: Tensor | None = None,
        top: Tensor | None = None,
    ):
        """pool: pages 0, 1, ... are taken row by row for `lengths` keys each; the rest is free.

        arange: the numbers of the rows, where other rows have them already.  top: how many pages are free, int32 [1], where that is there.
        """
        self.pool, self.planes, self.fills, self.heads, self.dtype = pool, planes, fills, heads, dtype
        self.index, self.fixed, self.pages = None, False, {}
        self.lost = False  # whether the latest step let keys go by the word of the device
        self.generation = 0  # grows when memory moves, which a captured graph cannot follow
        device, total = pool.key.device, pool.key.shape[0]
        self.arange = torch.arange(len(lengths), device=device) if arange is None else arange
        self.host: list[int] | None = list(lengths)
        self._bound = max(lengths, default=0)
        taken = sum(pages_of(n) for n in lengths)
        self.ordered = 0 < taken == total and min(lengths) == self._bound  # see `Pages`; until a page is taken
        # a stack: entries past `top` mean nothing
        if taken == total:
            self.free = torch.empty(total, dtype=torch.int32, device=device)
        else:
            self.free = torch.arange(taken, taken + total, dtype=torch.int32, device=device)
        self.top = torch.full((1,), total - taken, dtype=torch.int32, device=device) if top is None else top
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
        return dataclasses.replace(p, bound=self.bound, ordered=self.ordered)

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
        return self.view.read(name, self.dtype)

    def gather(self, name: str, slots: Tensor) -> Tensor:
        if name in FIXED:
            return self.view.gather(name, slots, self.dtype)
        return self.planes[name][self.arange[:, None], slots]

    def put(self, name: str, slots: Tensor, x: Tensor) -> None:
        if name in FIXED:
            put(self.pool, slots, *((x, None) if name == "key" else (None, x)))
        else:
            self.planes[name][self.arange[:, None], slots] = x

    @property
    def spare_pages(self) -> int:
        """The pages that nobody uses."""
        return len(self.pool.key) - sum(map(pages_of, self.lengths()))

    @property
    def spare(self) -> float:
        """Their share of all."""
        return self.spare_pages / max(1, len(self.pool.key))

    # ------------------------------------------------------------------ growing

    def reserve(self, extra: int) -> None:
        if extra <= self.assured and self._bound + extra <= self.capacity:
            return
        lengths = self.lengths()  # the bounds may have drifted from the truth: look before growing
        have = self.spare_pages
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
        p, old, self.ordered = self.pool, self.pool.key.shape[0], False
        grown = {}
        for name in ("key", "value", "key_scale", "value_scale"):
            x = getattr(p, name)
            if x is not None:
                grown[name] = pad(as_bytes(x), (0, 0, 0, 0, 0, more)).view(x.dtype)
        self.pool = dataclasses.replace(p, **grown)
        self.generation += 1
        fresh = torch.arange(old, 2 * old + more - have, dtype=torch.int32, device=self.device)
        self.free = torch.cat([self.free[:have], fresh]) if have else fresh
        self.top = torch.full_like(self.top, have + more)

    def _more_slots(self, least: int) -> None:
        """Room for more slots in the rectangles and the page lists."""
        wanted = round_up(least, SIZE)
        for name, plane in self.planes.items():
            more = [0, 0] * (plane.ndim - 2) + [0, wanted - self._bound]
            self.planes[name] = pad(plane[:, : self._bound], more, value=self.fills[name])
        table = self.pool.table
        new = pad(table, (0, wanted // SIZE - table.shape[1]))
        recent = None if self.pool.recent is None else self.pool.recent.resized(wanted)
        self.pool = dataclasses.replace(self.pool, table=new, recent=recent)
        self.pages.clear()
        self.generation += 1

    def append(self, key: Tensor, value: Tensor, ids: int | Tensor, once: Once) -> None:
        extra = key.shape[1]
        self.reserve(extra)
        self.ordered = False  # before a page is taken
        if extra > 1:
            self._append_many(key, value, ids, once)
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

    def _append_many(self, key: Tensor, value: Tensor, ids: Tensor, once: Once) -> None:
        lengths, extra, have = self.lengths(), key.shape[1], self.spare_pages
        if self.even and self.pool.format is None and self.pool.recent is None:
            self._append_evenly(key, value, ids, have, once)
            return
        first = torch.tensor([pages_of(n) for n in lengths])
        counts = torch.tensor([pages_of(n + extra) for n in lengths]) - first
        new, row = int(counts.sum()), torch.arange(len(lengths)).repeat_interleave(counts)
        if new:
            page = torch.arange(new) - (counts.cumsum(0) - counts - first).repeat_interleave(counts)
            row, page = torch.stack([row, page]).to(self.device, non_blocking=True)
            self.pool.table[row, page] = self.free[have - new : have]
            self.top.fill_(have - new)
        slots = self.pool.length.long()[:, None] + torch.arange(extra, device=self.device)
        put(self.pool, slots, key, value)
        if self.pool.recent is not None:
            self.pool.recent.remember(slots, ids.expand(len(self.arange), -1), key, value)
        self.planes["token"].scatter_(1, slots, ids.expand(len(self.arange), -1).to(torch.int32))
        self._appended(extra)

    def _append_evenly(self, key: Tensor, value: Tensor, ids: Tensor, have: int, once: Once) -> None:
        """The same where all rows are equally long: what is computed a row there is known here."""
        rows, extra, length = len(self.arange), key.shape[1], self.host[0]
        first, last = length // SIZE, pages_of(length + extra)
        if new := last - pages_of(length):
            taken = slice(have - rows * new, have)
            self.pool.table[:, last - new : last] = self.free[taken].view(rows, new)
            self.top.fill_(taken.start)
        slots = lambda: torch.arange(length - first * SIZE, length - first * SIZE + extra, device=self.device)
        page = once(self.device, ("page of slots", length, extra), lambda: slots() // SIZE)
        inside = once(self.device, ("place in page", length, extra), lambda: slots() % SIZE)
        at = torch.add(inside, self.pool.table[:, first:last].index_select(1, page), alpha=SIZE)
        for pool, x in ((self.pool.key, key), (self.pool.value, value)):
            pool.flatten(0, 1)[at] = x.to(pool.dtype)
        self.planes["token"][:, length : length + extra] = ids
        self._appended(extra)

    def _appended(self, extra: int) -> None:
        self.pool.length.add_(extra)
        self.advance(extra)
        if self.pages:  # pooled pages are computed anew elsewhere
            self.pages.clear()
            self.generation += 1
