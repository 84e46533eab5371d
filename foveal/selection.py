"""Which keys a query may see. A selection is data; `mask` is its meaning, and ops do the same work faster.

In prefill the keys of a step are laid out as `step.view` says; in decode they are the slots of the store. Selections narrow from left to
right with `&`, and the keys of the step itself are always visible to later queries of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import CompositionError, InputError

if TYPE_CHECKING:
    from .step import Step

FOREVER = 2**31 - 1


class Selection:
    """Base: `mask(step, start, stop)` is bool [batch, kv_heads or heads or 1, stop - start, T] for queries start..stop."""

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        raise CompositionError(f"{type(self).__name__} has no mask of its own: resolve it against a step first")

    def __and__(self, other: Selection) -> Selection:
        if isinstance(self, All):
            return other
        if isinstance(other, All):
            return self
        return And((self, other))


@dataclass(frozen=True)
class All(Selection):
    """Every key that came before the query, and the query's own."""

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        return torch.ones(1, 1, stop - start, step.T, dtype=torch.bool, device=step.device)


@dataclass(frozen=True)
class Nothing(Selection):
    """These query heads see no key: their output is zero."""

    heads: tuple[int, ...]

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        seen = torch.ones(1, step.H, 1, 1, dtype=torch.bool, device=step.device)
        seen[:, list(self.heads)] = False
        return seen.expand(1, -1, stop - start, step.T)


@dataclass(frozen=True)
class Band(Selection):
    """The first `sink` tokens and the `recent` newest: query i sees key j when j < sink or i - j < recent.

    Both are token counts, one for all or one for each query head. FOREVER keeps a head dense. Cost: length x (sink + recent).
    """

    sink: int | Sequence[int]
    recent: int | Sequence[int]

    def __post_init__(self) -> None:
        least = min(self.recent) if isinstance(self.recent, Sequence) else self.recent
        if least < 1:
            raise InputError(f"Band needs recent >= 1 so that every query sees itself, got {least}")

    def per_head(self, heads: int) -> tuple[list[int], list[int]]:
        out = []
        for name in ("sink", "recent"):
            x = getattr(self, name)
            x = list(x) if isinstance(x, Sequence) else [x] * heads
            if len(x) != heads:
                raise InputError(f"Band.{name} needs one number or one for each of {heads} query heads, got {len(x)}")
            out.append(x)
        return out[0], out[1]

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        sink, recent = (torch.tensor(x, device=step.device).view(1, -1, 1, 1) for x in self.per_head(step.H))
        token = step.per_head(step.token).unsqueeze(2)  # [B, H, 1, T]
        age = step.q_token[:, None, start:stop, None] - token
        return (token < sink) | (age < recent)


@dataclass(frozen=True)
class Tokens(Selection):
    """Past keys by slot, [batch, kv_heads or heads, m], -1 for none.

    With `size` > 1 each number is the first slot of a run of that many.
    """

    slots: Tensor
    size: int = 1

    def expanded(self, limit: Tensor | int) -> Tensor:
        """One slot a key; what is not of the row's past is cut: the step's own keys are visible anyway, and count once.

        limit: where the past ends, a number or [batch, kv_heads or heads, 1, 1].
        """
        if self.size == 1:
            return self.slots.where(self.slots < (limit if isinstance(limit, int) else limit[..., 0]), -1)
        runs = self.slots[..., None] + torch.arange(self.size, device=self.slots.device)
        runs = runs.where((self.slots[..., None] >= 0) & (runs < limit), -1)
        return runs.flatten(-2)

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        past = step.past
        limit = past if isinstance(past, int) else step.per_head_like(past, self.slots.shape[1])[..., None, None]
        slots = self.expanded(limit).long()
        seen = torch.zeros(*slots.shape[:2], step.T + 1, dtype=torch.bool, device=step.device)
        seen.scatter_(2, slots.where(slots >= 0, step.T), True)
        seen = seen[..., : step.T] | step.per_head_like(step.new_keys, slots.shape[1])
        return seen[:, :, None].expand(-1, -1, stop - start, -1)


@dataclass(frozen=True)
class TokenIds(Selection):
    """Past keys by token id, [batch, 1 or kv_heads, m]: what may cross layers. Each layer looks up its own slots."""

    ids: Tensor

    def resolve(self, step: Step) -> Tokens:
        return Tokens(step.store.find(self.ids))

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        return self.resolve(step).mask(step, start, stop)


@dataclass(frozen=True)
class Blocks(Selection):
    """Blocks of `size` tokens: map bool [batch, heads, query blocks, key blocks]; block b holds tokens b * size .. b * size + size - 1."""

    map: Tensor
    size: int

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        rows = ((step.q_token[0, start:stop] - step.q_token[0, 0]) // self.size).long()
        token = step.token
        columns = (token // self.size).clamp(max=self.map.shape[3] - 1).long()
        seen = self.map[:, :, rows]  # [1, H, l, nk]
        columns = step.per_head(columns)[:, :, None].expand(-1, -1, rows.shape[0], -1)
        return seen.gather(3, columns) & step.per_head(token < self.map.shape[3] * self.size)[:, :, None]


@dataclass(frozen=True)
class Lists(Selection):
    """Prefill: each run of `size` queries reads the keys it lists, int slots [1, kv_heads or heads, ceil(length / size), m], in ascending
    order, -1 for none. The last `dense` queries see everything. Cost: length x m.
    """

    slots: Tensor
    size: int = 1
    dense: int = 0

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        first = start // self.size
        slots = self.slots[:, :, first : (stop - 1) // self.size + 1].long()
        seen = torch.zeros(*slots.shape[:3], step.T + 1, dtype=torch.bool, device=step.device)
        seen.scatter_(3, slots.where(slots >= 0, step.T), True)
        query = torch.arange(start, stop, device=step.device)
        return seen[:, :, query // self.size - first, : step.T] | (query >= step.L - self.dense)[:, None]


@dataclass(frozen=True)
class Subset(Selection):
    """Some keys and some queries of a prefill: keys bool [batch, kv_heads or heads, T], queries bool [batch, heads or 1, length].

    Queries that are not chosen return zero.
    """

    keys: Tensor
    queries: Tensor

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        queries = self.queries[:, :, start:stop, None]
        heads = max(self.keys.shape[1], queries.shape[1])
        return step.per_head_like(self.keys, heads)[:, :, None] & queries


@dataclass(frozen=True)
class And(Selection):
    """What several selections all allow."""

    parts: tuple[Selection, ...]

    def mask(self, step: Step, start: int, stop: int) -> Tensor:
        masks = [p.mask(step, start, stop) for p in self.parts]
        heads = max(m.shape[1] for m in masks)
        out = masks[0] if masks[0].shape[1] == heads else step.per_head_like(masks[0], heads)
        for m in masks[1:]:
            out = out & (m if m.shape[1] == heads else step.per_head_like(m, heads))
        return out

    def __and__(self, other: Selection) -> Selection:
        return self if isinstance(other, All) else And((*self.parts, other))
