"""The ragged store: keys and values per sequence and per KV head, each row with its own length.

Rows of one layer are grouped in length classes (half-octaves); a class is one padded block of memory. Uniform methods have
a single class, which is then the plain [rows, capacity, head_dim] layout; a method that keeps 200 keys in one head and 8,000 in
its neighbour allocates just that. What is per key and not a key or a value (token ids, scores, masses) is a *plane* of the
same block, so bytes follow what is kept. Slots are logical: 0 .. length - 1 of a row, valid until the next `apply`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .edits import Keep, Plane
from .errors import InputError

FAR = 2**31 - 1  # token id of an empty slot: later than every query
FIXED = {"key", "value"}  # planes that hold the cache itself


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Rows:
    """One length class: `planes[name]` is [rows, capacity, ...]; `index` are the flat row numbers (None: every row, in order).

    `bound` is a length no row exceeds, known without asking the device. `length` [rows] is None while every row has exactly
    `bound` keys; otherwise it holds the true lengths.
    """

    __slots__ = ("arange", "bound", "heads", "index", "length", "pages", "planes")

    def __init__(
        self, planes: dict[str, Tensor], bound: int, length: Tensor | None, index: Tensor | None, heads: frozenset[int]
    ):
        self.planes, self.bound, self.length, self.index, self.heads = planes, bound, length, index, heads
        self.arange = torch.arange(planes["key"].shape[0], device=planes["key"].device)
        self.pages: dict = {}  # pooled planes, see LayerStore.pooled

    @property
    def capacity(self) -> int:
        return self.planes["key"].shape[1]

    def read(self, name: str) -> Tensor:
        return self.planes[name][:, : self.bound]

    def pick(self, x: Tensor) -> Tensor:
        """The rows of this class out of a tensor over all rows."""
        return x if self.index is None else x[self.index]

    def reserve(self, extra: int, fills: Mapping[str, float]) -> None:
        """Make room for `extra` more keys a row. Grows by a sixteenth, and by 64 keys at least."""
        if self.bound + extra <= self.capacity:
            return
        if self.length is not None:  # the bound may have drifted above the true lengths: look once before growing
            self.bound = int(self.length.max())
            if self.bound + extra <= self.capacity:
                return
        grown = round_up(max(self.bound + extra, self.capacity + max(64, self.capacity // 16)), 16)
        if self.bound == 0:
            grown = round_up(extra, 16)
        for name, plane in self.planes.items():
            new = plane.new_full((plane.shape[0], grown, *plane.shape[2:]), fills[name])
            new[:, : self.bound] = plane[:, : self.bound]
            self.planes[name] = new

    def lengths(self) -> list[int]:
        n = self.planes["key"].shape[0]
        return [self.bound] * n if self.length is None else self.length.tolist()


class LayerStore:
    """Keys, values and planes of one layer for a batch of sequences."""

    def __init__(self, planes: Mapping[str, Plane] | None = None):
        self.specs: dict[str, Plane] = dict(planes or {})
        self.fills = {"key": 0.0, "value": 0.0, "token": FAR} | {n: p.fill for n, p in self.specs.items()}
        self.classes: list[Rows] = []
        self.batch = self.heads = 0
        self.shift_bound = 0  # slots below it may carry a non-zero `shift` plane (positions inside the cache)

    # ------------------------------------------------------------------ what there is

    @property
    def empty(self) -> bool:
        return not self.classes

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
        return c.bound if c is not None and c.length is None else None

    def held(self, heads: Iterable[int]) -> int | None:
        """The number of keys in every row of these KV heads, if known to be the same; else None."""
        heads = set(heads)
        bounds = {c.bound if c.length is None else None for c in self.classes if c.heads & heads}
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
        return self.classes[0].planes["key"].device if self.classes else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.classes[0].planes["key"].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all allocated tensors: keys, values, token ids, planes, row lengths and pooled pages."""
        total = 0
        for c in self.classes:
            total += sum(p.nbytes for p in c.planes.values()) + sum(p.nbytes for p, _ in c.pages.values())
            total += sum(t.nbytes for t in (c.length, c.index, c.arange) if t is not None)
        return total

    # ------------------------------------------------------------------ planes as rectangles

    def plane(self, name: str) -> Tensor:
        """A plane as [batch, kv_heads, T, ...]; slots beyond a row's length hold the fill value."""
        if name not in self.fills:
            raise InputError(f"no plane '{name}' here; a method gets the planes it declares: {sorted(self.specs)}")
        T, c = self.T, self.single
        if c is not None:
            return c.read(name).unflatten(0, (self.batch, self.heads))
        like = self.classes[0].planes[name]
        out = like.new_full((self.batch * self.heads, T, *like.shape[2:]), self.fills[name])
        for c in self.classes:
            out[c.index, : c.bound] = c.read(name)
        return out.unflatten(0, (self.batch, self.heads))

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
                empty = c.read("token") == FAR
                new = new.masked_fill(empty.view(*empty.shape, *[1] * (new.ndim - 2)), 0.0 if add else self.fills[name])
            if add:
                target += new
            else:
                target.copy_(new)

    def keys(self) -> Tensor:
        """Keys as [batch, kv_heads, T, head_dim], zero where empty. A copy when rows are ragged: not for decode steps."""
        return self._zeroed("key")

    def values(self) -> Tensor:
        """Values as [batch, kv_heads, T, head_dim], zero where empty. A copy when rows are ragged: not for decode steps."""
        return self._zeroed("value")

    def _zeroed(self, name: str) -> Tensor:
        x = self.plane(name)
        return x if self.uniform is not None else x.masked_fill(~self.valid[..., None], 0.0)

    def find(self, ids: Tensor) -> Tensor:
        """Slots of token ids [batch, kv_heads or 1, m] in each row, -1 where a row no longer holds the token."""
        hit = self.token[:, :, None] == ids.to(torch.int32)[..., None]  # [B, G, m, T]
        slot = hit.int().argmax(-1)
        return slot.where(hit.any(-1), -1)

    def pooled(self, what: str, size: int) -> Tensor:
        """Pages of `size` consecutive slots pooled: [batch, kv_heads, pages, head_dim].

        what: "kmin", "kmax", "kmean" over keys, or "vmean" over values; the last page may be partial. Kept up to date at the cost
        of one page a step while rows only grow, computed anew after an eviction.
        """
        if self.single is None:
            return self._pool(self.plane("key" if what[0] == "k" else "value"), what, size, self.valid)
        c = self.single
        source = c.read("key" if what[0] == "k" else "value")
        count = -(-c.bound // size)
        old, done = c.pages.get((what, size), (None, 0))
        if old is None or old.shape[1] < count:
            new = source.new_zeros(source.shape[0], round_up(count, 64), source.shape[2])
            if old is not None:
                new[:, :done] = old[:, :done]
            old = new
        valid = None if c.length is None else c.read("token") != FAR
        first = done if valid is None else 0
        tail = source[:, first * size :].unsqueeze(0)
        old[:, first:count] = self._pool(tail, what, size, None if valid is None else valid.unsqueeze(0))[0]
        c.pages[what, size] = (old, c.bound // size if valid is None else 0)
        return old[:, :count].unflatten(0, (self.batch, self.heads))

    @staticmethod
    def _pool(x: Tensor, what: str, size: int, valid: Tensor | None) -> Tensor:
        """x [B, G, T, D] -> [B, G, ceil(T / size), D]."""
        kind = what[1:]
        if kind not in ("min", "max", "mean"):
            raise InputError(f"pooled pages are 'kmin', 'kmax', 'kmean' or 'vmean', not '{what}'")
        n = x.shape[2]
        if valid is None and n <= size:  # the usual decode step: only the newest page changed
            return getattr(x, "a" + kind)(2, keepdim=True) if kind != "mean" else x.mean(2, keepdim=True)
        valid = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) if valid is None else valid
        pad = round_up(n, size) - n
        fill = {"min": math.inf, "max": -math.inf, "mean": 0.0}[kind]
        x = torch.nn.functional.pad(x.masked_fill(~valid[..., None], fill), (0, 0, 0, pad), value=fill)
        x = x.unflatten(2, (-1, size))
        if kind != "mean":
            return getattr(x, "a" + kind)(3)
        count = torch.nn.functional.pad(valid, (0, pad)).unflatten(2, (-1, size)).sum(-1)
        return x.sum(3) / count.clamp(min=1)[..., None].to(x.dtype)

    # ------------------------------------------------------------------ growing and letting go

    def append(self, key: Tensor, value: Tensor, token: int | Tensor) -> None:
        """Append key, value [batch, kv_heads, length, head_dim]. token: id of the first one, or [batch] ids when length is 1."""
        B, G, L = key.shape[:3]
        if self.empty:
            self.batch, self.heads = B, G
            self.classes = [self._allocate(key, value)]
        if (B, G) != (self.batch, self.heads):
            raise InputError(
                f"the store holds {self.batch} sequences x {self.heads} KV heads but got keys for {B} x {G}: use one store for each batch"
            )
        # keys and values are data here: gradients flow through the attention call, never through the store
        key, value = key.detach().flatten(0, 1), value.detach().flatten(0, 1)
        for c in self.classes:
            c.reserve(L, self.fills)
            k, v = c.pick(key), c.pick(value)
            if isinstance(token, Tensor):
                ids = c.pick(token.to(torch.int32).repeat_interleave(G)).unsqueeze(1)
            else:
                ids = token if L == 1 else torch.arange(token, token + L, dtype=torch.int32, device=key.device)
            n = c.bound
            if c.length is None:
                c.planes["key"][:, n : n + L] = k
                c.planes["value"][:, n : n + L] = v
                c.planes["token"][:, n : n + L] = ids
                for name in self.specs:
                    c.planes[name][:, n : n + L] = self.fills[name]
            else:
                at = (c.arange[:, None], c.length[:, None] + torch.arange(L, device=key.device))
                c.planes["key"][at], c.planes["value"][at] = k, v
                c.planes["token"][at] = ids if isinstance(ids, Tensor) else torch.tensor(ids, dtype=torch.int32)
                for name in self.specs:
                    c.planes[name][at] = self.fills[name]
                c.length = c.length + L
            c.bound = n + L

    def _allocate(self, key: Tensor, value: Tensor) -> Rows:
        rows = key.shape[0] * key.shape[1]
        planes = {"key": key.new_empty(rows, 0, key.shape[3]), "value": value.new_empty(rows, 0, value.shape[3])}
        planes["token"] = torch.empty(rows, 0, dtype=torch.int32, device=key.device)
        for name, spec in self.specs.items():
            planes[name] = torch.empty(rows, 0, *spec.width, dtype=spec.dtype, device=key.device)
        return Rows(planes, 0, None, None, frozenset(range(key.shape[1])))

    def apply(self, keep: Keep) -> None:
        """Let go of what `keep` does not keep."""
        if keep.into is not None:
            self._absorb(keep)
        if keep.renumber:
            self._renumber(keep)
        if keep.mask is not None:
            self._compact(keep.mask)
        else:
            self._drop(keep)

    def _drop(self, keep: Keep) -> None:
        """Swap-remove: the last key of a row moves into the slot that becomes free."""
        drop = keep.drop.flatten()
        for c in self.classes:
            inside = c.heads if keep.heads is None else c.heads & set(keep.heads)
            if not inside:
                continue
            slot = c.pick(drop)
            c.pages.clear()
            if c.length is None and inside == c.heads and not keep.optional:
                last = c.bound - 1
                for name, plane in c.planes.items():
                    plane[c.arange, slot] = plane[:, last]
                    if name not in FIXED:
                        plane[:, last] = self.fills[name]
                c.bound = last
                continue
            length = torch.full_like(c.arange, c.bound) if c.length is None else c.length
            if inside != c.heads:
                member = torch.tensor([int(h in inside) for h in range(self.heads)], dtype=torch.bool, device=drop.device)
                slot = slot.where(member[(c.arange if c.index is None else c.index) % self.heads], -1)
            gone = slot >= 0
            last = length - 1
            slot = slot.where(gone, last)  # writing the last key onto itself changes nothing
            for name, plane in c.planes.items():
                moved = plane[c.arange, last]
                plane[c.arange, slot] = moved
                if name not in FIXED:
                    keepers = gone.view(-1, *[1] * (moved.ndim - 1))
                    plane[c.arange, last] = torch.where(keepers, torch.full_like(moved, self.fills[name]), moved)
            c.length = length - gone.long()

    def _compact(self, mask: Tensor) -> None:
        mask = (mask & self.valid).flatten(0, 1)
        counts = mask.sum(-1).tolist()
        order = None
        pieces = []
        for c in self.classes:
            index = range(len(counts)) if c.index is None else c.index.tolist()
            lens = [counts[r] for r in index]
            if lens == c.lengths():
                pieces.append((c, list(index), lens, None))
                continue
            order = (~mask).byte().argsort(dim=-1, stable=True) if order is None else order
            pieces.append((c, list(index), lens, c.pick(order)))
        if order is not None:
            self.classes = self._pack(pieces)

    def _pack(self, pieces: Sequence[tuple[Rows, list[int], list[int], Tensor | None]]) -> list[Rows]:
        """New classes from pieces (block, flat row numbers, kept lengths, order of the kept slots or None)."""
        plans: dict[int, list[tuple[int, int, int, int]]] = {}
        for p, (_, index, lens, _) in enumerate(pieces):
            for position, (row, n) in enumerate(zip(index, lens, strict=True)):
                plans.setdefault(round(2 * math.log2(max(n, 1))), []).append((row, p, position, n))
        total = sum(len(x) for x in plans.values())
        device, out = pieces[0][0].planes["key"].device, []
        for members in plans.values():
            members.sort()
            rows, lens = [m[0] for m in members], [m[3] for m in members]
            bound = max(lens)
            planes = {
                name: like.new_full((len(rows), round_up(bound, 16), *like.shape[2:]), self.fills[name])
                for name, like in pieces[0][0].planes.items()
            }
            for p, (block, _, _, order) in enumerate(pieces):
                here = [(i, m[2]) for i, m in enumerate(members) if m[1] == p]
                if here:
                    self._copy_rows(planes, block, order, here, bound)
            length = None if min(lens) == bound else torch.tensor(lens, device=device)
            if length is not None:
                empty = torch.arange(planes["key"].shape[1], device=device) >= length[:, None]
                for name, plane in planes.items():
                    if name not in FIXED:
                        plane[empty] = self.fills[name]
            index = None if len(rows) == total else torch.tensor(rows, device=device)
            out.append(Rows(planes, bound, length, index, frozenset(r % self.heads for r in rows)))
        return out

    @staticmethod
    def _copy_rows(planes: dict, block: Rows, order: Tensor | None, here: list[tuple[int, int]], bound: int) -> None:
        target, source = (torch.tensor(x, device=block.arange.device) for x in zip(*here, strict=True))
        n = min(bound, block.bound)
        if order is not None:  # entries past a row's kept keys are filler: keep them inside the block
            order = order[source, :n].clamp(max=block.bound - 1)
        for name, plane in planes.items():
            old = block.planes[name]
            plane[target, :n] = old[source, :n] if order is None else old[source[:, None], order]

    def _absorb(self, keep: Keep) -> None:
        """Fold what leaves into the slot `into` of the same row, as a mean weighted by mass."""
        if "mass" not in self.specs:
            raise InputError("Keep(into=...) needs the plane 'mass': declare planes = {'mass': Plane(1.0)} in the method")
        into = keep.into[..., None]  # [B, G, 1]
        mass, valid = self.plane("mass"), self.valid
        if keep.mask is not None:
            leaving = (~keep.mask & valid).to(mass.dtype) * mass
        else:
            slots = torch.arange(self.T, device=into.device)
            leaving = (slots == keep.drop[..., None]).to(mass.dtype) * mass
            if keep.heads is not None:
                member = torch.tensor([h in keep.heads for h in range(self.heads)], device=into.device)
                leaving = leaving * member[:, None]
        own = mass.gather(2, into)
        total = own + leaving.sum(-1, keepdim=True)
        share = leaving.scatter_add(2, into, own) / total  # [B, G, T], sums to one in each row
        for name in FIXED:
            self._scatter_slot(name, into[..., 0], (share.unsqueeze(2).to(self.dtype) @ self.plane(name)).squeeze(2))
        self._scatter_slot("mass", into[..., 0], total[..., 0])

    def _scatter_slot(self, name: str, slot: Tensor, x: Tensor) -> None:
        """Write one slot of each row: slot [B, G], x [B, G, ...]."""
        slot, x = slot.flatten(), x.flatten(0, 1)
        for c in self.classes:
            c.planes[name][c.arange, c.pick(slot)] = c.pick(x).to(c.planes[name].dtype)

    def _renumber(self, keep: Keep) -> None:
        """Positions inside the cache: a key moves forward by the number of keys that leave after it."""
        token, valid = self.token, self.valid
        if keep.mask is None:
            leaver = token.gather(2, keep.drop.clamp(min=0)[..., None])
            moved = (token < leaver) & valid & (keep.drop >= 0)[..., None]
            if keep.heads is not None:
                moved &= torch.tensor([h in keep.heads for h in range(self.heads)], device=token.device)[:, None]
        else:
            leaving = (~keep.mask & valid).to(torch.int32)
            by_age = token.argsort(-1)
            after = leaving.gather(2, by_age).flip(-1).cumsum(-1).flip(-1)
            moved = torch.zeros_like(after).scatter(2, by_age, after).where(keep.mask & valid, 0)
        self.add("shift", moved.to(torch.int32))
        self.shift_bound = max(self.shift_bound, min(keep.renumber, self.T))

    # ------------------------------------------------------------------ sequences come and go

    def take(self, sequences: Sequence[int]) -> LayerStore:
        """A new store with copies of these sequences, in this order (a sequence may occur more than once)."""
        new = self._like()
        new.batch, G = len(sequences), self.heads
        rows = [s * G + h for s in sequences for h in range(G)]
        pieces = []
        for c in self.classes:
            where = {r: i for i, r in enumerate(range(self.batch * G) if c.index is None else c.index.tolist())}
            picks = [(i, where[r]) for i, r in enumerate(rows) if r in where]
            if not picks:
                continue
            position = torch.tensor([p for _, p in picks], device=c.arange.device)
            planes = {name: plane[position] for name, plane in c.planes.items()}
            length = None if c.length is None else c.length[position]
            index = None if len(picks) == len(rows) else torch.tensor([i for i, _ in picks], device=position.device)
            pieces.append(Rows(planes, c.bound, length, index, frozenset(rows[i] % G for i, _ in picks)))
        new.classes = pieces
        return new

    def _like(self) -> LayerStore:
        new = LayerStore(self.specs)
        new.heads, new.shift_bound = self.heads, self.shift_bound
        return new

    def become(self, parts: Sequence[LayerStore]) -> None:
        """Hold the sequences of all parts, one after the other."""
        parts = [p for p in parts if not p.empty]
        if not parts:
            return
        if any(set(p.specs) != set(parts[0].specs) for p in parts):
            raise InputError("stores of different methods cannot join one batch: their planes differ")
        self.heads, self.batch = parts[0].heads, sum(p.batch for p in parts)
        self.shift_bound = max(p.shift_bound for p in parts)
        pieces, offset = [], 0
        for p in parts:
            for c in p.classes:
                index = range(p.batch * p.heads) if c.index is None else c.index.tolist()
                pieces.append((c, [offset + r for r in index], c.lengths(), None))
            offset += p.batch * p.heads
        one = len(pieces) == 1
        self.classes = [pieces[0][0]] if one else self._pack(pieces)

    def forget_after(self, counts: Sequence[int]) -> None:
        """Remove every key whose token id is not below its sequence's count."""
        limit = torch.tensor(list(counts), dtype=torch.int32, device=self.device)
        self._compact(self.token < limit[:, None, None])

    def reset(self) -> None:
        self.classes, self.batch, self.heads, self.shift_bound = [], 0, 0, 0
