"""What happens to the keys that stay when others leave: they take these in, or move forward inside the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .edits import Keep
from .errors import InputError
from .rows import FAR

if TYPE_CHECKING:
    from .store import LayerStore


def absorb(store: LayerStore, keep: Keep) -> None:
    """Fold what leaves into the slot `into` of the same row, as a mean weighted by mass."""
    if "mass" not in store.specs:
        raise InputError("Keep(into=...) needs the plane 'mass': declare planes = {'mass': Plane(1.0)} in the method")
    into = keep.into.flatten().clamp(min=0)  # rows that lose nothing may say -1
    gone = ~keep.mask.flatten(0, 1) if keep.mask is not None else keep.drop.flatten()[:, None]
    for c in store.of(keep.heads):
        at, mine = c.pick(into), c.pick(gone)
        if keep.mask is None:
            c.fold(at, mine >= 0, mine.clamp(min=0))
        elif c.bound > 0:
            c.fold(at, mine[:, : c.bound] & c.used(), None)


def renumber(store: LayerStore, keep: Keep) -> None:
    """Positions inside the cache: a key moves forward by the number of keys that leave after it."""
    token, valid = store.token, store.valid
    if keep.mask is None:
        leaver = token.gather(2, keep.drop.clamp(min=0)[..., None])
        moved = (token < leaver) & (leaver != FAR) & (keep.drop >= 0)[..., None]
        if keep.heads is not None:
            moved &= torch.tensor([h in keep.heads for h in range(store.heads)], device=token.device)[:, None]
    else:
        leaving = (~keep.mask & valid).to(torch.int32)
        by_age = token.argsort(-1)
        after = leaving.gather(2, by_age).flip(-1).cumsum(-1).flip(-1)
        moved = torch.zeros_like(after).scatter(2, by_age, after).where(keep.mask & valid, 0)
    store.add("shift", moved.to(torch.int32))
    store.shift_bound = max(store.shift_bound, min(keep.renumber, store.T))
