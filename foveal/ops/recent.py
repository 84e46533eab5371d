"""The newest keys of each row as they came, beside pages that hold codes: what KIVI calls the residual.

A token lies at its id modulo the window, so a new one takes the place of the oldest, whatever order the slots of its row are in.
The pages hold codes of these keys too; whoever reads a slot looks here first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal.errors import InputError

PAGE = 32  # windows are whole pages, so that the kernel over pages reads them too


@dataclass(frozen=True)
class Recent:
    """key [rows, window, head_dim], value [rows, window, value_dim] in full precision.

    slot: int32 [rows, window], where in its row a key lies, -1 for none.  hidden: float32 [rows, slots], -inf at these slots and 0
    elsewhere, which keeps attention over the pages from seeing them twice.
    table, full: page list and lengths of these keys as pages of their own.
    """

    key: Tensor
    value: Tensor
    slot: Tensor
    hidden: Tensor
    table: Tensor
    full: Tensor

    @staticmethod
    def start(rows: int, window: int, slots: int, key: Tensor, value: Tensor) -> Recent:
        """Nothing yet, for keys and values like these [..., head_dim]."""
        slot = torch.full((rows, window), -1, dtype=torch.int32, device=key.device)
        hidden = torch.zeros(rows, slots, device=key.device)
        return Recent.of(*(x.new_zeros(rows, window, x.shape[-1]) for x in (key, value)), slot, hidden)

    @staticmethod
    def of(key: Tensor, value: Tensor, slot: Tensor, hidden: Tensor) -> Recent:
        """These keys, with a page list of their own."""
        rows, window = slot.shape
        table = torch.arange(rows * window // PAGE, dtype=torch.int32, device=slot.device).view(rows, -1)
        return Recent(key, value, slot, hidden, table, torch.full_like(table[:, 0], window))

    @property
    def window(self) -> int:
        return self.slot.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.key, self.value, self.slot, self.hidden, self.table, self.full

    # ------------------------------------------------------------------ keys come, move and go

    def remember(self, slots: Tensor, ids: Tensor, key: Tensor, value: Tensor) -> None:
        """The newest keys of every row, in place: key [rows, m, head_dim] of consecutive token ids [rows, m] at slots [rows, m]."""
        slots, ids, key, value = (x[:, -self.window :] for x in (slots, ids, key, value))
        at = (ids % self.window).long()
        row = torch.arange(len(at), device=at.device)[:, None]
        self.key[row, at], self.value[row, at] = key.to(self.key.dtype), value.to(self.value.dtype)
        self.slot.scatter_(1, at, slots.to(torch.int32))
        self.refresh()

    def drop(self, slot: Tensor, last: Tensor, gone: Tensor) -> None:
        """The key at `last` [rows] moved into the place of the one at `slot` [rows], in the rows that are `gone` [rows]."""
        moved = torch.where(self.slot == last[:, None], slot[:, None].to(torch.int32), self.slot)
        moved = torch.where(self.slot == slot[:, None], -1, moved)
        self.slot.copy_(torch.where(gone[:, None], moved, self.slot))
        self.refresh()

    def write(self, name: str, slots: Tensor, x: Tensor) -> None:
        """Write keys or values x [rows, m, head_dim] of slots [rows, m], where they are held here; slots of a row differ."""
        at, here = self._at(slots)
        mine = getattr(self, name)
        row = torch.arange(len(at), device=at.device)[:, None].expand_as(at)
        mine[row[here], at[here]] = x[here].to(mine.dtype)

    def refresh(self) -> None:
        """Bring `hidden` up to date with `slot`."""
        self.hidden.zero_()
        mark = torch.where(self.slot >= 0, -math.inf, 0.0)
        self.hidden.scatter_reduce_(1, self.slot.clamp(min=0).long(), mark, "amin")

    # ------------------------------------------------------------------ reading

    def over(self, name: str, slots: Tensor, x: Tensor) -> Tensor:
        """x [rows, m, head_dim], what the pages say of slots [rows, m], with what is known better here."""
        at, here = self._at(slots)
        mine = getattr(self, name)
        return torch.where(here[..., None], mine.gather(1, at[..., None].expand(-1, -1, mine.shape[2])).to(x.dtype), x)

    def _at(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Where slots [rows, m] lie here, and whether they do."""
        place = torch.full((len(self.slot), self.hidden.shape[1] + 1), -1, device=self.slot.device)
        index = torch.where(self.slot >= 0, self.slot, self.hidden.shape[1]).long()
        place.scatter_(1, index, torch.arange(self.window, device=place.device).expand_as(index))
        place[:, -1] = -1
        at = place.gather(1, slots.long())
        return at.clamp(min=0), at >= 0

    # ------------------------------------------------------------------ other rows, other slots

    def resized(self, slots: int) -> Recent:
        """The same with room for so many slots a row."""
        hidden = self.hidden.new_zeros(len(self.hidden), slots)
        hidden[:, : self.hidden.shape[1]] = self.hidden[:, :slots]
        return replace(self, hidden=hidden)

    def put(self, target: Tensor, source: Recent, rows: Tensor, order: Tensor | None, lengths: Tensor) -> None:
        """Rows `target` [n] become rows `rows` [n] of another, whose slots come in `order` [n, m], the kept `lengths` [n] first."""
        slot = source.slot[rows]
        if order is not None:
            # what is not listed leaves
            rank = order.new_full((len(order), max(source.hidden.shape[1], order.shape[1])), -1)
            rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
            known = (slot >= 0) & (slot < rank.shape[1])
            slot = torch.where(known, rank.gather(1, (slot * known).long()).to(slot.dtype), -1)
        self.slot[target] = torch.where(slot < lengths[:, None], slot, -1).to(self.slot.dtype)
        self.key[target], self.value[target] = source.key[rows], source.value[rows]
        self.refresh()

    def clear(self, rows: slice) -> None:
        """These rows hold nothing any more."""
        self.slot[rows] = -1
        self.refresh()

    def more(self, rows: int) -> Recent:
        """The same with `rows` more rows that hold nothing."""
        fresh = Recent.start(rows, self.window, self.hidden.shape[1], self.key, self.value)
        return Recent.of(*(torch.cat(pair) for pair in list(zip(self.tensors, fresh.tensors, strict=True))[:4]))


def check_window(window: int, format: str | None) -> None:
    """Raise InputError unless a residual window of so many tokens goes with this format."""
    if window == 0:
        return
    if format is None:
        raise InputError(
            f"a residual of {window} tokens keeps them out of codes, and there is no format: name one, or leave it out"
        )
    if window < 0 or window & (window - 1) or window % PAGE:
        raise InputError(f"residual = {window}: expected 0 or a power of two from {PAGE} up")
