"""Keys and values in pages, one list of pages for each row (sequence, KV head), and moves of one key a row.

A row may hold 200 keys while its neighbour holds 100,000; lengths live on the device, so they change under one captured
graph. Slots are logical: slot n of a row lies in page `table[row, n // size]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import decode, encode
from .recent import Recent
from .route import no_kernel


@dataclass(frozen=True)
class Pages:
    """Keys and values of all rows.

    key: [pages, size, head_dim], value: [pages, size, value_dim], or their codes (see `foveal.ops.formats`).  table: int32 [rows, most],
    the pages of each row in order.  length: int32 [rows].  bound: no row is longer.  format, key_scale, value_scale: how codes are read.
    recent: the newest keys of each row as they came, which are read in the place of their codes.  ordered: the pages lie row by row,
    equally many of each and no others, so that the lists need not be asked.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    length: Tensor
    bound: int
    format: str | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    recent: Recent | None = None
    ordered: bool = False

    @property
    def size(self) -> int:
        """Keys of a page."""
        return self.key.shape[1]

    @property
    def rows(self) -> int:
        return self.table.shape[0]

    def overlaid(self, moved: Tensor | None) -> bool:
        """Some keys are known better than by their codes: the newest, or those that moved."""
        return self.recent is not None or (moved is not None and self.format is not None)

    def at(self, slots: Tensor) -> Tensor:
        """Where slots [rows, m] lie in the pools flattened over pages."""
        if self.ordered:
            total = len(self.key) * self.size
            return slots + torch.arange(0, total, total // self.rows, device=slots.device)[:, None]
        page = self.table.gather(1, (slots // self.size).long())
        return page.long() * self.size + slots % self.size

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Keys or values of all slots up to the bound as numbers: [rows, bound, head_dim]; a view where they lie so."""
        if self.ordered and self.format is None:
            return getattr(self, name).view(self.rows, -1, getattr(self, name).shape[2])[:, : self.bound]
        if self.recent is not None:
            return self.gather(name, torch.arange(self.bound, device=self.key.device).expand(self.rows, -1), dtype)
        pages = self.table[:, : -(-self.bound // self.size)]
        parts = (name,) if self.format is None else (name, name + "_scale")
        x, *scale = (_take(getattr(self, part), pages.flatten(), whole=True) for part in parts)
        x = x.to(dtype) if self.format is None else decode(x, *scale, self.format, dtype)
        return x.view(self.rows, -1, x.shape[-1])[:, : self.bound]

    def gather(self, name: str, slots: Tensor, dtype: torch.dtype, at: Tensor | None = None) -> Tensor:
        """Keys or values at slots [rows, m] as numbers: [rows, m, head_dim]. at: where these lie, if that is known."""
        at = (self.at(slots) if at is None else at).flatten()
        x = _take(getattr(self, name), at)
        x = (
            x.to(dtype)
            if self.format is None
            else decode(x, _take(getattr(self, name + "_scale"), at), self.format, dtype)
        )
        x = x.unflatten(0, slots.shape)
        return x if self.recent is None else self.recent.over(name, slots, x)


def _take(pool: Tensor, at: Tensor, whole: bool = False) -> Tensor:
    """What lies there, `at` numbering keys, or pages where they are taken `whole`."""
    flat = pool if whole else pool.flatten(0, 1)
    if flat.dtype == torch.float8_e4m3fn:  # not every device indexes it
        return flat.view(torch.uint8).index_select(0, at).view(flat.dtype)
    return flat.index_select(0, at)


def choosing_misfit(q: Tensor, pages: Pages) -> str | None:
    """Why no kernel can score the keys of pages for a choice; None if one can."""
    if (why := no_kernel(q)) is not None:
        return why
    if pages.format is not None:
        return "the kernel reads no codes"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or pages.key.dtype != q.dtype:
        return f"the kernel wants one dtype of half or single precision, not {q.dtype} and {pages.key.dtype}"
    return None


# ---------------------------------------------------------------------- moves of one key a row


def append_page_keys(
    pages: Pages, free: Tensor, top: Tensor, key: Tensor, value: Tensor, token: Tensor, ids: Tensor
) -> None:
    """One key a row, in place: key [rows, head_dim], value [rows, value_dim]; ids int32 [rows] are written into token [rows, most].

    free: int32 stack of page numbers nobody uses, top: int32 [1], how many there are; a row at a page's end takes one.
    """
    if no_kernel(key) is None:
        from .gpu.pages import append

        append(pages, free, top, key, value, token, ids)
        return
    n = pages.length.long()
    rows = torch.arange(len(n), device=n.device)
    turn = n % pages.size == 0
    taken = turn.long().cumsum(0)
    fresh = free[(top.long() - taken).clamp(min=0)]
    at = (rows, n // pages.size)
    pages.table[at] = torch.where(turn, fresh, pages.table[at])
    top -= taken[-1].to(top.dtype)
    put(pages, n[:, None], key[:, None], value[:, None])
    token[rows, n] = ids
    if pages.recent is not None:
        pages.recent.remember(n[:, None], ids[:, None], key[:, None], value[:, None])
    pages.length.add_(1)


def drop_page_keys(pages: Pages, free: Tensor, top: Tensor, slot: Tensor) -> None:
    """Swap-remove one key a row, in place: the last key moves into slot [rows]; -1 removes nothing. Emptied pages become free."""
    if no_kernel(slot) is None:
        from .gpu.pages import drop

        drop(pages, free, top, slot)
        return
    n = pages.length.long()
    gone = (slot >= 0) & (slot < n)
    last = (n - 1).clamp(min=0)
    source, target = pages.at(last[:, None]).flatten(), pages.at(slot.where(gone, last)[:, None]).flatten()
    for pool in pools(pages):
        flat = pool.flatten(0, 1)
        flat[target] = flat[source]
    if pages.recent is not None:
        pages.recent.drop(slot, last, gone)
    emptied = gone & (last % pages.size == 0)
    rank = top.long() + emptied.long().cumsum(0) - 1
    freed = pages.table.gather(1, (last // pages.size)[:, None]).flatten()
    free[rank[emptied]] = freed[emptied]
    top += emptied.sum().to(top.dtype)
    pages.length.sub_(gone.to(pages.length.dtype))


def put(pages: Pages, slots: Tensor, key: Tensor | None, value: Tensor | None) -> None:
    """Write keys or values [rows, m, head_dim] at slots [rows, m], encoded as the pages are."""
    at = pages.at(slots).flatten()
    for name, x in (("key", key), ("value", value)):
        if x is None:
            continue
        if pages.recent is not None:
            pages.recent.write(name, slots, x)
        pool, flat = getattr(pages, name).flatten(0, 1), x.flatten(0, 1)
        if pages.format is None:
            pool[at] = flat.to(pool.dtype)
        else:
            codes, scales = encode(flat, pages.format)
            getattr(pages, name + "_scale").flatten(0, 1)[at] = scales
            as_bytes(pool)[at] = as_bytes(codes)


def pools(pages: Pages) -> list[Tensor]:
    """Everything that is stored per key, in a type every device can index."""
    scales = [x for x in (pages.key_scale, pages.value_scale) if x is not None]
    return [as_bytes(pages.key), as_bytes(pages.value), *scales]


def as_bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
