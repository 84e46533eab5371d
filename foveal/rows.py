"""One length class of the ragged store: a padded block of memory for rows of about equal length, and its moves.

What every move keeps true: slots past a row's length hold the fill value of their plane; in keys and values they hold
zeros or keys that left, so always finite numbers, because attention multiplies them with weights of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError
from .once import Once

FAR = 2**31 - 1  # token id of an empty slot: later than every query
FIXED = {"key", "value"}  # planes that hold the cache itself
GRAIN = 16  # capacities are multiples of it


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def length_class(n: int) -> int:
    """Rows of one class share a block: fifths of an octave of length, so that padding stays below an eighth."""
    return round(5 * math.log2(max(n, 1)))


class Layout(NamedTuple):
    """How keys and values lie in memory.

    paged: pages with lengths on the device (None: on CUDA devices, and wherever codes are stored). format: None, or codes of fewer bits,
    "fp8", "int8" or "int4", see `foveal.ops.formats`; they go with any method. residual: how many of the newest tokens of each row are
    read as they came, not as codes (KIVI has 128): 0, or a power of two from 32 up.
    """

    paged: bool | None = None
    format: str | None = None
    residual: int = 0


class Rows:
    """`planes[name]` is [rows, capacity, ...]; `index` are the flat row numbers (None: every row, in order).

    `bound` is a length no row exceeds, known without asking the device. `length` [rows] is None while every row has
    exactly `bound` keys; otherwise it holds the true lengths. `heads` are the KV heads that have a row here.
    """

    __slots__ = ("arange", "bound", "dtype", "fills", "heads", "index", "length", "loose", "pages", "planes", "room")

    def __init__(
        self,
        planes: dict[str, Tensor],
        fills: Mapping[str, float],
        bound: int,
        length: Tensor | None,
        index: Tensor | None,
        heads: frozenset[int],
    ):
        self.planes, self.fills, self.bound, self.length = planes, fills, bound, length
        self.index, self.heads, self.dtype = index, heads, planes["key"].dtype
        self.arange = torch.arange(planes["key"].shape[0], device=planes["key"].device)
        self.pages: dict[tuple[str, int], tuple[Tensor, int]] = {}  # pooled pages and how many of them are final
        self.room = GRAIN  # keys to grow by next time
        self.loose = False  # whether rows may have lost keys since the bound was exact

    # ------------------------------------------------------------------ what there is

    paged = False

    @property
    def capacity(self) -> int:
        return self.planes["key"].shape[1]

    @property
    def device(self) -> torch.device:
        return self.arange.device

    @property
    def widths(self) -> tuple[int, int]:
        """Sizes of a key and of a value."""
        return self.planes["key"].shape[2], self.planes["value"].shape[2]

    @property
    def even(self) -> bool:
        """Every row is known to have exactly `bound` keys."""
        return self.length is None

    def held(self, heads: Set[int], kv_heads: int) -> int | None:
        """Keys in every row of these KV heads, if known to be the same."""
        return self.bound if self.length is None else None

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor allocated here."""
        helpers = [t for t in (self.length, self.index, self.arange) if t is not None]
        return sum(t.nbytes for t in (*self.planes.values(), *helpers, *(page for page, _ in self.pages.values())))

    def read(self, name: str) -> Tensor:
        return self.planes[name][:, : self.bound]

    def gather(self, name: str, slots: Tensor) -> Tensor:
        """What a plane holds at slots [rows, m]: [rows, m, ...]."""
        plane = self.planes[name]  # one flat index copies whole rows, which a pair of indices does not
        flat = (slots + (self.arange * plane.shape[1])[:, None]).flatten()
        return plane.flatten(0, 1).index_select(0, flat).unflatten(0, slots.shape)

    def put(self, name: str, slots: Tensor, x: Tensor) -> None:
        """Write x [rows, m, ...] at slots [rows, m] of a plane."""
        self.planes[name][self.arange[:, None], slots] = x

    def pick(self, x: Tensor) -> Tensor:
        """The rows of this class out of a tensor over all rows."""
        return x if self.index is None else x[self.index]

    def numbers(self) -> list[int]:
        """Flat row numbers."""
        return list(range(self.arange.shape[0])) if self.index is None else self.index.tolist()

    def lengths(self) -> list[int]:
        return [self.bound] * self.arange.shape[0] if self.length is None else self.length.tolist()

    def used(self) -> Tensor:
        """Which slots hold a key, bool [rows, bound]."""
        return self.read("token") != FAR

    # ------------------------------------------------------------------ growing

    def reserve(self, extra: int) -> None:
        """Make room for `extra` more keys a row: little at first, as rows may only replace keys; later a sixteenth."""
        if self.bound + extra <= self.capacity:
            return
        if self.loose:  # the bound may have drifted above the true lengths: look once before growing
            self.bound, self.loose = int(self.length.max()), False
            if self.bound + extra <= self.capacity:
                return
        grown = round_up(self.bound + extra, GRAIN)
        if self.bound > 0:
            room = max(self.room, self.capacity // 64)
            grown = round_up(max(grown, self.capacity + room), GRAIN)
            self.room = min(2 * room, max(64, self.capacity // 16))
        for name, plane in self.planes.items():
            new = plane.new_empty(plane.shape[0], grown, *plane.shape[2:])
            new[:, : self.bound] = plane[:, : self.bound]
            new[:, self.bound :] = self.fills[name]
            self.planes[name] = new

    def append(self, key: Tensor, value: Tensor, ids: int | Tensor, once: Once) -> None:
        """key, value [rows, length, head_dim]; ids: a number, [length] or [rows, length]. Other planes are filled."""
        extra = key.shape[1]
        self.reserve(extra)
        if self.length is None:
            at = (slice(None), slice(self.bound, self.bound + extra))
        else:
            at = (self.arange[:, None], self.length[:, None] + torch.arange(extra, device=key.device))
            self.length = self.length + extra
        for name, new in (("key", key), ("value", value), ("token", ids)):
            self.planes[name][at] = new
        self.bound += extra

    # ------------------------------------------------------------------ letting go

    def drop(self, slot: Tensor, optional: bool) -> None:
        """Swap-remove one key a row: the last key moves into `slot` [rows]. With `optional`, -1 removes nothing."""
        if self.bound == 0:
            if optional:
                return
            raise InputError(
                "Keep(drop=...) on rows that hold no key: use optional=True with slot -1 for rows that lose nothing"
            )
        self.pages.clear()
        if self.length is None and not optional:
            self.bound -= 1
            for name, plane in self.planes.items():
                moved = plane[:, self.bound]
                # with a single row torch takes the view for an overlap
                plane[self.arange, slot] = moved.clone() if len(moved) == 1 else moved
                if name not in FIXED:
                    plane[:, self.bound] = self.fills[name]
            return
        length = torch.full_like(self.arange, self.bound) if self.length is None else self.length
        gone, last = (slot >= 0) & (slot < length), length - 1
        slot = slot.where(gone, last)  # writing the last key onto itself changes nothing
        for name, plane in self.planes.items():
            moved = plane[self.arange, last]
            plane[self.arange, slot] = moved
            if name not in FIXED:
                plane[self.arange, last] = moved.masked_fill(_like(gone, moved), self.fills[name])
        self.length, self.loose = length - gone.long(), True

    def fold(self, into: Tensor, leaving: Tensor, slots: Tensor | None) -> None:
        """Fold keys into the slot `into` [rows] of their row, as a mean weighted by the plane `mass`; masses add.

        leaving: bool [rows, m] over `slots` [rows, m] (None: over all slots). Means are taken in float32 or wider.
        """
        if self.bound == 0:
            return
        self.pages.clear()
        into = into[:, None]
        pick = self.read if slots is None else lambda name: self.gather(name, slots)
        mass = self.planes["mass"]
        weight = torch.where(leaving, pick("mass"), 0.0).to(_wide(mass))
        own = self.gather("mass", into)[:, 0].to(weight.dtype)
        total = own + weight.sum(-1)
        changed = total > own  # also keeps rows that lose nothing bit for bit, and 0 / 0 out
        for name in FIXED:
            before = self.gather(name, into)[:, 0]
            old = before.to(_wide(before))
            share = (weight / total[:, None]).to(old.dtype)
            leavers = (share.unsqueeze(1) @ pick(name).to(old.dtype)).squeeze(1)
            mean = old * (own / total)[:, None].to(old.dtype) + leavers
            self.put(name, into, mean.where(changed[:, None], old).to(before.dtype)[:, None])
        self.put("mass", into, total.to(mass.dtype)[:, None])

    # ------------------------------------------------------------------ copies

    def take(self, positions: Sequence[int], numbers: Sequence[int], total: int, heads: int) -> Rows:
        """A copy of the rows at `positions`, without spare room; they are the flat rows `numbers` of `total` there."""
        lengths = self.lengths()
        lengths = [lengths[p] for p in positions]
        bound, device = max(lengths), self.arange.device
        at = torch.tensor(positions, device=device)
        planes = {name: plane[at, : round_up(bound, GRAIN)] for name, plane in self.planes.items()}
        length = None if min(lengths) == bound else torch.tensor(lengths, device=device)
        index = None if len(numbers) == total else torch.tensor(numbers, device=device)
        return Rows(planes, self.fills, bound, length, index, frozenset(n % heads for n in numbers))

    def split(self, inside: Set[int], total: int, heads: int) -> Iterator[Rows]:
        """The rows of the KV heads `inside` and the rows of the others, each in a block of its own."""
        numbers = self.numbers()
        for side in (True, False):
            positions = [p for p, n in enumerate(numbers) if (n % heads in inside) == side]
            yield self.take(positions, [numbers[p] for p in positions], total, heads)

    @staticmethod
    def pack(pieces: Sequence[Piece], heads: int, once: Once | None = None) -> list[Rows]:
        """New classes out of pieces that make up the whole store: rows of equal `length_class(length)` share a block.

        The pieces are used up: a block that stays together is not copied. once: the pass's, for rows in pages.
        """
        classes: dict[int, list[_Place]] = {}
        for place in places_of(pieces):
            classes.setdefault(length_class(place.length), []).append(place)
        total = sum(len(places) for places in classes.values())
        packed = []
        for places in classes.values():
            places.sort()
            packed.append(_as_it_is(pieces, places, total, heads) or _pack_class(pieces, places, total, heads))
        return packed

    @staticmethod
    def join(pieces: Sequence[Piece], heads: int) -> list[Rows]:
        """As `pack`, for whole blocks one after the other."""
        return Rows.pack(pieces, heads)

    # ------------------------------------------------------------------ pages

    def pooled(self, what: str, size: int) -> Tensor:
        """Pages of `size` slots, [rows, pages, head_dim]; while rows grow together, only new ones are computed."""
        source, kind = self.read("key" if what[0] == "k" else "value"), what[1:]
        if self.length is not None:
            return pool(source, kind, size, self.used())
        count = -(-self.bound // size)
        pages, done = self.pages.get((what, size), (None, 0))
        if pages is None or pages.shape[1] < count:
            grown = source.new_zeros(source.shape[0], round_up(count, 64), source.shape[2])
            if pages is not None:
                grown[:, :done] = pages[:, :done]
            pages = grown
        if done < count:
            pages[:, done:count] = pool(source[:, done * size :], kind, size, None)
        self.pages[what, size] = (pages, self.bound // size)
        return pages[:, :count]


def pool(x: Tensor, kind: str, size: int, used: Tensor | None) -> Tensor:
    """x [rows, n, head_dim] to pages [rows, ceil(n / size), head_dim]: "min", "max" or "mean" of each page.

    used: which slots count, bool [rows, n] (None: all); a page without any is zero.
    """
    n = x.shape[1]
    if used is None and 0 < n <= size:  # the usual decode step: only the newest page changed
        return x.mean(1, keepdim=True) if kind == "mean" else getattr(x, "a" + kind)(1, keepdim=True)
    used = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if used is None else used
    pad = round_up(n, size) - n
    neutral = {"min": math.inf, "max": -math.inf, "mean": 0.0}[kind]
    x = torch.nn.functional.pad(x.masked_fill(~used[..., None], neutral), (0, 0, 0, pad), value=neutral).unflatten(
        1, (-1, size)
    )
    count = torch.nn.functional.pad(used, (0, pad)).unflatten(1, (-1, size)).sum(-1)[..., None]
    if kind == "mean":
        return (x.sum(2, dtype=_wide(x)) / count.clamp(min=1)).to(x.dtype)
    return getattr(x, "a" + kind)(2).masked_fill(count == 0, 0.0)


# ---------------------------------------------------------------------- classes anew


class Piece(NamedTuple):
    """Rows on their way into new classes.

    numbers: flat row numbers there.  lengths: keys to copy of each row.  order: slots [rows, T], kept ones first.  positions: which rows
    of the block they are (None: all, in order).
    """

    block: Rows
    numbers: list[int]
    lengths: list[int]
    order: Tensor | None = None
    positions: list[int] | None = None


class _Place(NamedTuple):
    """Where one row comes from; sorts by flat row number."""

    number: int
    piece: int
    position: int
    length: int


def places_of(pieces: Sequence[Piece]) -> Iterator[_Place]:
    for p, piece in enumerate(pieces):
        positions = range(len(piece.numbers)) if piece.positions is None else piece.positions
        for position, number, n in zip(positions, piece.numbers, piece.lengths, strict=True):
            yield _Place(number, p, position, n)


def _as_it_is(pieces: Sequence[Piece], places: list[_Place], total: int, heads: int) -> Rows | None:
    """The block itself under its new row numbers, where its rows stay together and lose no key."""
    piece = pieces[places[0].piece]
    block, here = piece.block, range(len(piece.block.arange))
    together = all(p.piece == places[0].piece for p in places) and [p.position for p in places] == list(here)
    if not together or piece.order is not None or [p.length for p in places] != block.lengths():
        return None
    numbers = [p.number for p in places]
    index = None if len(numbers) == total else torch.tensor(numbers, device=block.arange.device)
    new = Rows(block.planes, block.fills, block.bound, block.length, index, frozenset(n % heads for n in numbers))
    new.pages, new.room, new.loose = block.pages, block.room, block.loose
    return new


def _pack_class(pieces: Sequence[Piece], places: list[_Place], total: int, heads: int) -> Rows:
    first, lengths = pieces[0].block, [place.length for place in places]
    bound, device = max(lengths), first.arange.device
    planes = {
        name: like.new_full((len(places), round_up(bound, GRAIN), *like.shape[2:]), first.fills[name])
        for name, like in first.planes.items()
    }
    for p, piece in enumerate(pieces):
        moves = [(target, place.position) for target, place in enumerate(places) if place.piece == p]
        if moves:
            _copy(planes, piece, moves, bound)
    length = None if min(lengths) == bound else torch.tensor(lengths, device=device)
    if length is not None:
        empty = torch.arange(round_up(bound, GRAIN), device=device) >= length[:, None]
        for name, plane in planes.items():
            if name not in FIXED:
                plane[empty] = first.fills[name]
    numbers = [place.number for place in places]
    index = None if len(places) == total else torch.tensor(numbers, device=device)
    return Rows(planes, first.fills, bound, length, index, frozenset(n % heads for n in numbers))


def _copy(planes: dict[str, Tensor], piece: Piece, moves: list[tuple[int, int]], bound: int) -> None:
    block, order = piece.block, piece.order
    target, source = (torch.tensor(x, device=block.arange.device) for x in zip(*moves, strict=True))
    n = min(bound, block.bound)
    if order is not None:  # entries past a row's kept keys are filler: keep them inside the block
        order = order[source, :n].clamp(max=block.bound - 1)
    for name, plane in planes.items():
        old = block.planes[name]
        plane[target, :n] = old[source, :n] if order is None else old[source[:, None], order]


def _like(x: Tensor, target: Tensor) -> Tensor:
    return x.view(*x.shape, *[1] * (target.ndim - x.ndim))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
