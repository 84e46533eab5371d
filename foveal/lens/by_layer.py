"""A long text block by block: all pieces pass one block before any enters the next, so keys and values of one layer are held at a time.

What a block is called with (positions, rotary factors) is recorded beforehand, in passes whose blocks compute nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Session
from ..cache import ACTIVE, Store
from ..step import Pass

Call = tuple[tuple, dict[str, Any]]
_HIDDEN = "hidden_states"


@dataclass(eq=False)
class Visit:
    """One piece of the text: its residual stream so far, [1, queries, width], and what each block is called with beside it."""

    hidden: Tensor | None = None
    pass_: Pass | None = None
    calls: list[Call] = field(default_factory=list)


class _Unlike(Exception):
    """The decoder does more than hand one block's output to the next."""


def record(
    session: Session, blocks: Sequence[nn.Module] | None, ids: Tensor, pieces: Sequence[tuple[int, int]]
) -> tuple[Store, list[Visit]] | None:
    """An empty store and a visit for each piece of ids [1, length]; None where blocks cannot be run one by one.

    That is where they are not known, where some layers keep a cache of their own, whose state masks depend on, or where the decoder changes
    or reads the residual stream between blocks.
    """
    if blocks is None or session.info.layers != tuple(range(len(blocks))):
        return None
    store, visits = session.new_store(), []
    for start, stop in pieces:
        visit = Visit()
        try:
            with _standing_in(blocks, visit), session.open_prompt():
                session.decoder(input_ids=ids[:, start:stop], past_key_values=store, use_cache=True)
        except _Unlike:
            return None
        if start == 0 and any(_has_nan(call) for call in visit.calls):
            return None
        visit.pass_.prompt_done = visit.pass_.parts[0].prompt_done = stop == ids.shape[1]
        visits.append(visit)
        for layer in store.layers:
            layer.columns = stop  # what the model takes for its length, from which positions follow
    for layer in store.layers:
        layer.columns = 0
    return store, visits


def run(store: Store, blocks: Sequence[nn.Module], visits: Sequence[Visit]) -> None:
    """Take the visits through all blocks. Uses them up."""
    for i, block in enumerate(blocks):
        for visit in visits:
            args, kwargs = visit.calls[i]
            given = {_HIDDEN: visit.hidden} if _HIDDEN in kwargs else {}
            first = () if given else (visit.hidden,)
            token = ACTIVE.set(visit.pass_)
            try:
                out = block(*first, *args, **{**kwargs, **given})
            finally:
                ACTIVE.reset(token)
            visit.hidden = out[0] if isinstance(out, tuple) else out
        store.layers[i].rows.reset()


@contextmanager
def _standing_in(blocks: Sequence[nn.Module], visit: Visit) -> Iterator[None]:
    """Inside, blocks note what they are called with and return NaN, which shows where it is read."""
    blank: list[Tensor] = []

    def forward(*args, **kwargs):
        hidden = kwargs[_HIDDEN] if _HIDDEN in kwargs else args[0]
        if not blank:
            visit.hidden, visit.pass_ = hidden, ACTIVE.get()
            blank.append(torch.full_like(hidden, torch.nan))
        elif hidden is not blank[0] or _changed(hidden):
            raise _Unlike
        named = _HIDDEN in kwargs
        visit.calls.append((args if named else args[1:], {**kwargs, _HIDDEN: None} if named else kwargs))
        return blank[0]

    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                del block.forward
            else:
                block.forward = before


def _changed(blank: Tensor) -> bool:
    """Whether it was written to, where torch keeps count."""
    return not blank.is_inference() and blank._version > 0


def _has_nan(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.is_floating_point() and bool(x.isnan().any())
    if isinstance(x, dict):
        return any(map(_has_nan, x.values()))
    return isinstance(x, (tuple, list)) and any(map(_has_nan, x))
