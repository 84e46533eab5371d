"""The ragged store: keys and values per sequence and per KV head, each row with its own length.

Rows of one layer are grouped in length classes (fifths of an octave, see rows.py); a class is one padded block of memory.
Uniform methods have a single class, which is the plain [rows, capacity, head_dim] layout; a method that keeps 200 keys
in one head and 8,000 in its neighbour allocates just that. What is per key and not a key or a value (token ids, scores,
masses) is a *plane* of the same block, so bytes follow what is kept. Slots are logical, 0 .. length - 1 of a row, and
valid until the next `apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .edits import Keep, Plane
from .errors import InputError
from .merging import absorb, renumber
from .once import Once
from .paged import PagedRows
from .rows import FAR, FIXED, Layout, Piece, Rows, round_up

__all__ = ["FAR", "FIXED", "LayerStore", "Layout", "Rows", "round_up"]


class LayerStore:
    """Keys, values and planes of one layer for a batch of sequences."""

    def __init__(self, planes: Mapping[str, Plane] | None = None, layout: Layout | None = None):
        self.layout = layout or Layout()
        self.specs: dict[str, Plane] = dict(planes or {})
        self.fills = {"key": 0.0, "value": 0.0, "token": FAR} | {n: p.fill for n, p in self.specs.items()}
        self._classes: list[Rows] = []
        self._apart: list[LayerStore] = []  # sequences that became one batch and lie apart until somebody looks
        self._named: dict[tuple[int, ...], Tensor] = {}  # which KV heads a tuple of heads means, on the device
        self.batch = self.heads = 0
        self.shift_bound = 0  # slots below it may carry a non-zero `shift` plane (positions inside the cache)

    # ------------------------------------------------------------------ what there is

    @property
    def empty(self) -> bool:
        return not (self._classes or self._apart)

    @property
    def classes(self) -> list[Rows]:
        """The blocks of memory that the rows lie in."""
        self.settle()
        return self._classes

    @classes.setter
    def classes(self, classes: list[Rows]) -> None:
        self._classes, self._apart = classes, []

    @property
    def single(self) -> Rows | None:
        """The only class, if rows of all heads and sequences share one block."""
        return self.classes[0] if len(self.classes) == 1 and self.classes[0].index is None else None

    @property
    def T(self) -> int:
        """Slots of the longest row (an upper bound known without asking the device)."""
        return max((c.bound for c in self.classes), default=0)

    @property
    def uniform(self) -> int | None:
        """The number of keys in every row, if all rows are known to hold the same; else None."""
        c = self.single
        return c.bound if c is not None and c.even else None

    def all_hold(self, count: int) -> bool:
        """Whether every row holds `count` keys; asks the device only where the host lost count."""
        return all(n == count for c in self.classes for n in c.lengths())

    def held(self, heads: Iterable[int]) -> int | None:
        """The number of keys in every row of these KV heads, if known to be the same; else None."""
        heads = set(heads)
        bounds = {c.held(heads, self.heads) for c in self.classes if c.heads & heads}
        return bounds.pop() if len(bounds) == 1 else None

    @property
    def len(self) -> Tensor:
        """Keys held, [batch, kv_heads]."""
        out = torch.zeros(self.batch * self.heads, dtype=torch.long, device=self.device)
        for c in self.classes:
            n = c.length if c.length is not None else c.bound
            if c.index is None:
                out[:] = n
            else:
                out[c.index] = n
        return out.view(self.batch, self.heads)

    @property
    def device(self) -> torch.device:
        return self.classes[0].device if self.classes else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.classes[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all allocated tensors: keys, values, token ids, planes, row lengths and pooled pages."""
        return sum(c.nbytes for c in self.classes)

    # ------------------------------------------------------------------ planes as rectangles

    def plane(self, name: str) -> Tensor:
        """A plane as [batch, kv_heads, T, ...]; slots beyond a row's length hold the fill value."""
        if name not in self.fills:
            raise InputError(f"no plane '{name}' here; a method gets the planes it declares: {sorted(self.specs)}")
        return self._rectangle(self.T, self.fills[name], lambda c: c.read(name))

    def _rectangle(self, width: int, fill: float, read: Callable[[Rows], Tensor]) -> Tensor:
        """What each class holds, [rows, width or less, ...], as [batch, kv_heads, width, ...]."""
        self._check_filled()
        if self.single is not None:
            return read(self.single).unflatten(0, (self.batch, self.heads))
        out = None
        for c in self.classes:
            x = read(c)
            out = x.new_full((self.batch * self.heads, width, *x.shape[2:]), fill) if out is None else out
            out[c.index, : x.shape[1]] = x
        return out.unflatten(0, (self.batch, self.heads))

    def _check_filled(self) -> None:
        if self.empty:
            raise InputError("the store is empty: append keys before reading or changing it")

    @property
    def token(self) -> Tensor:
        """Token id of each slot, [batch, kv_heads, T]; FAR where a slot is empty."""
        return self.plane("token")

    @property
    def valid(self) -> Tensor:
        """Which slots hold a key, bool [batch, kv_heads, T]."""
        return self.token != FAR

    def set(self, name: str, x: Tensor) -> None:
        """Write a whole plane, x [batch, kv_heads, T, ...]; empty slots keep the fill value."""
        self._write(name, x, add=False)

    def add(self, name: str, x: Tensor) -> None:
        """Add to a plane, x [batch, kv_heads, T, ...]; empty slots keep the fill value."""
        self._write(name, x, add=True)

    def _write(self, name: str, x: Tensor, add: bool) -> None:
        if name not in self.specs:
            raise InputError(f"no plane '{name}' here; a method gets the planes it declares: {sorted(self.specs)}")
        flat = x.flatten(0, 1)
        for c in self.classes:
            target, new = c.read(name), c.pick(flat)[:, : c.bound]
            if c.length is not None:
                empty = ~c.used()
                new = new.masked_fill(empty.view(*empty.shape, *[1] * (new.ndim - 2)), 0 if add else self.fills[name])
            if add:
                target += new
            else:
                target.copy_(new)

    def keys(self) -> Tensor:
        """Keys as [batch, kv_heads, T, head_dim], zero where empty. A copy when rows are ragged: not for decode."""
        return self._zeroed("key")

    def values(self) -> Tensor:
        """Values as [batch, kv_heads, T, head_dim], zero where empty. A copy when rows are ragged: not for decode."""
        return self._zeroed("value")

    def _zeroed(self, name: str) -> Tensor:
        x = self.plane(name)
        return x if self.uniform is not None else x.masked_fill(~self.valid[..., None], 0.0)

    def find(self, ids: Tensor) -> Tensor:
        """Slots of token ids [batch, kv_heads or 1, m] in each row, -1 where a row no longer holds the token."""
        hit = self.token[:, :, None] == ids.to(torch.int32)[..., None]  # [B, G, m, T]
        hit = torch.nn.functional.pad(hit, (0, 1), value=True)  # so that a row without the token has a first hit too
        slot = hit.int().argmax(-1)
        return slot.where(slot < self.T, -1)

    def pooled(self, what: str, size: int) -> Tensor:
        """Pages of `size` consecutive slots pooled: [batch, kv_heads, pages, head_dim].

        what: "kmin", "kmax", "kmean" over keys, or "vmean" over values. The last page may be partial; a page without
        keys is zero. Kept up to date at the cost of one page a step while rows grow together, else computed anew.
        """
        if what not in ("kmin", "kmax", "kmean", "vmean"):
            raise InputError(f"pooled pages are 'kmin', 'kmax', 'kmean' or 'vmean', not '{what}'")
        return self._rectangle(-(-self.T // size), 0.0, lambda c: c.pooled(what, size))

    # ------------------------------------------------------------------ growing and letting go

    def append(self, key: Tensor, value: Tensor, token: int | Tensor, once: Once | None = None) -> None:
        """Append key, value [batch, kv_heads, length, head_dim]. token: id of the first new one, or [batch] ids. once: the pass's."""
        B, G, L = key.shape[:3]
        if fresh := self.empty:
            self.batch, self.heads = B, G
        if (self.batch, self.heads) != (B, G):
            raise InputError(
                f"the store holds {self.batch} sequences x {self.heads} KV heads but got keys for {B} x {G}: "
                "use one store for each batch"
            )
        # keys and values are data here: gradients flow through the attention call, never through the store
        key, value = key.detach().flatten(0, 1), value.detach().flatten(0, 1)
        once = once or Once()
        if fresh and L > 1 and isinstance(token, int) and self._in_pages(key) and not self.layout.residual:
            format, heads = self.layout.format, frozenset(range(G))
            self.classes = [PagedRows.begin(key, value, token, self.specs, self.fills, format, heads, once)]
            return
        if fresh:
            self.classes = [self._allocate(key, value)]
        if isinstance(token, Tensor):
            ids = token.to(key.device, torch.int32).repeat_interleave(G)[:, None]
            ids = ids if L == 1 else ids + torch.arange(L, dtype=torch.int32, device=key.device)
        else:
            made = lambda: torch.arange(token, token + L, dtype=torch.int32, device=key.device)
            ids = token if L == 1 else once(key.device, ("new ids", token, L), made)
        for c in self.classes:
            c.append(c.pick(key), c.pick(value), c.pick(ids) if isinstance(token, Tensor) else ids, once)

    def _in_pages(self, key: Tensor) -> bool:
        paged, format, _ = self.layout
        return key.is_cuda or format is not None if paged is None else paged

    def _allocate(self, key: Tensor, value: Tensor) -> Rows:
        """Rows without keys for keys and values like these, [rows, length, head_dim]."""
        rows, device, heads = len(key), key.device, frozenset(range(self.heads))
        planes = {"token": torch.empty(rows, 0, dtype=torch.int32, device=device)}
        for name, spec in self.specs.items():
            planes[name] = torch.empty(rows, 0, *spec.width, dtype=spec.dtype, device=device)
        if self._in_pages(key):
            return PagedRows.start(key, value, planes, self.fills, self.layout, heads)
        planes |= {"key": key.new_empty(rows, 0, key.shape[2]), "value": value.new_empty(rows, 0, value.shape[2])}
        return Rows(planes, self.fills, 0, None, None, heads)

    def apply(self, keep: Keep, once: Once | None = None) -> None:
        """Let go of what `keep` does not keep. once: the pass's."""
        self._check_filled()
        if keep.heads is not None and self.classes[0].paged:
            keep = self._for_all_heads(keep)
        if keep.into is not None:
            absorb(self, keep)
        if keep.renumber:
            renumber(self, keep)
        if keep.slots is not None:
            self._stay(keep.slots, once)
        elif keep.mask is not None:
            self._compact(keep.mask)
        else:
            drop = keep.drop.flatten()
            for c in self.of(keep.heads):
                c.drop(c.pick(drop), keep.optional)

    def _for_all_heads(self, keep: Keep) -> Keep:
        """Pages let one head lose a key and its neighbour none, so nothing has to part ways."""
        return replace(keep, drop=keep.drop.where(self.named(keep.heads), -1), heads=None, optional=True)

    def named(self, heads: tuple[int, ...]) -> Tensor:
        """Which KV heads these are, bool [kv_heads] on the device."""
        if heads not in self._named:  # kept: a graph cannot fetch it from the host
            named = torch.zeros(self.heads, dtype=torch.bool)
            named[list(heads)] = True
            self._named[heads] = named.to(self.device)
        return self._named[heads]

    def of(self, heads: Iterable[int] | None) -> list[Rows]:
        """The classes of these KV heads (None: all). A class shared with other heads is split: its rows part ways."""
        if heads is None:
            return self.classes
        heads, total, classes = set(heads), self.batch * self.heads, []
        for c in self.classes:
            mixed = c.heads & heads and c.heads - heads
            classes += c.split(heads, total, self.heads) if mixed else [c]
        self.classes = classes
        return [c for c in classes if c.heads <= heads]

    def _stay(self, slots: Tensor, once: Once | None) -> None:
        """Keep these slots, [batch, kv_heads, n]: every row has them."""
        if slots.shape[:2] != (self.batch, self.heads) or slots.shape[2] > self.T:
            raise InputError(
                f"expected at most {self.T} slots that stay for {self.batch} sequences x {self.heads} KV heads, "
                f"got {list(slots.shape)}"
            )
        if (count := slots.shape[2]) < self.T:
            order = slots.flatten(0, 1)
            pieces = [Piece(c, c.numbers(), [count] * len(c.arange), c.pick(order)) for c in self.classes]
            self.classes = self.classes[0].pack(pieces, self.heads, once)

    def _compact(self, mask: Tensor) -> None:
        mask = (mask & self.valid).flatten(0, 1)
        counts = mask.sum(-1).tolist()
        order, pieces = None, []
        for c in self.classes:
            numbers = c.numbers()
            lengths = [counts[n] for n in numbers]
            if lengths == c.lengths():
                pieces.append(Piece(c, numbers, lengths))
                continue
            order = (~mask).byte().argsort(dim=-1, stable=True) if order is None else order
            pieces.append(Piece(c, numbers, lengths, c.pick(order)))
        if order is not None:
            self.classes = self.classes[0].pack(pieces, self.heads)

    # ------------------------------------------------------------------ sequences come and go

    def take(self, sequences: Sequence[int]) -> LayerStore:
        """A new store with copies of these sequences, in this order (a sequence may occur more than once)."""
        new, G = self.fresh(), self.heads
        new.batch, new.heads, new.shift_bound = len(sequences), G, self.shift_bound
        wanted = [s * G + h for s in sequences for h in range(G)]
        for c in self.classes:
            where = {n: p for p, n in enumerate(c.numbers())}
            numbers = [i for i, n in enumerate(wanted) if n in where]
            if numbers:
                new.classes.append(c.take([where[wanted[i]] for i in numbers], numbers, len(wanted), G))
        return new

    def fresh(self) -> LayerStore:
        """An empty store of the same planes and layout."""
        return LayerStore(self.specs, self.layout)

    def become(self, parts: Sequence[LayerStore]) -> None:
        """Hold the sequences of all parts, one after the other; the parts are used up, when somebody looks at the rows."""
        if not (parts := [p for p in parts if not p.empty]):
            return
        if any(p.specs != self.specs or p.heads != parts[0].heads for p in parts):
            raise InputError("stores of different methods or models cannot join one batch: planes or KV heads differ")
        self.heads, self.batch = parts[0].heads, sum(p.batch for p in parts)
        self.shift_bound = max(p.shift_bound for p in parts)
        self._classes, self._apart = [], parts

    def settle(self) -> None:
        """Lay what became one batch into one block of memory now."""
        if not self._apart:
            return
        parts, self._apart = self._apart, []
        pieces, offset = [], 0
        for p in parts:
            pieces += [Piece(c, [offset + n for n in c.numbers()], c.lengths()) for c in p.classes]
            offset += p.batch * p.heads
        first = parts[0].classes
        self._classes = first if len(parts) == 1 else first[0].join(pieces, self.heads)

    def alone(self) -> list[LayerStore]:
        """A store for each sequence; this one is used up where they lie apart."""
        if self._apart and all(p.batch == 1 for p in self._apart):
            return self._apart
        return [self.take([b]) for b in range(self.batch)]

    def leave(self, sequences: Sequence[int]) -> None:
        """Let these sequences go, but not all; the others are numbered anew. Blocks they had no row in are not copied."""
        G, gone = self.heads, set(sequences)
        stay = [s for s in range(self.batch) if s not in gone]
        number = {s * G + h: i * G + h for i, s in enumerate(stay) for h in range(G)}
        pieces = []
        for c in self.classes:
            left = [
                (p, number[n], length)
                for p, (n, length) in enumerate(zip(c.numbers(), c.lengths(), strict=True))
                if n in number
            ]
            if left:
                positions, numbers, lengths = (list(x) for x in zip(*left, strict=True))
                pieces.append(Piece(c, numbers, lengths, None, positions))
        self.batch, self.classes = len(stay), self.classes[0].pack(pieces, G)

    @property
    def in_place(self) -> bool:
        """Whether sequences can come and go without the others being copied (`widen`, `replace`)."""
        return bool(self.classes) and self.classes[0].paged

    def widen(self, sequences: int) -> None:
        """Places for `sequences` more sequences, without keys; in pages only."""
        self.classes[0].widen(sequences * self.heads)
        self.batch += sequences

    def replace(self, sequence: int, part: LayerStore | None) -> None:
        """Put the one sequence that `part` holds in the place of `sequence` (None: leave it without keys); in pages only."""
        c = self.classes[0]
        c.replace(sequence * self.heads, None if part is None else part.classes[0], self.heads)
        if part is not None and part.shift_bound > self.shift_bound:
            self.shift_bound = part.shift_bound
            c.generation += 1  # a shape follows from it

    def trim(self, most: float) -> None:
        """Give memory back where more than the share `most` of the pages is unused; in pages only."""
        c = self.classes[0]
        if c.spare > most:
            piece = Piece(c, c.numbers(), c.lengths())
            self.classes = c.pack([piece], self.heads)

    def forget_after(self, counts: Sequence[int]) -> None:
        """Remove every key whose token id is not below its sequence's count."""
        limit = torch.tensor(list(counts), dtype=torch.int32, device=self.device)
        self._compact(self.token < limit[:, None, None])

    def reset(self) -> None:
        self.classes, self.batch, self.heads, self.shift_bound = [], 0, 0, 0
