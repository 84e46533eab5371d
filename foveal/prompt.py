"""The prompt before the model runs: methods that say which of its tokens are read at all.

What is not read never enters the model: no layer computes it, no key of it is stored, and those that are read stand next to each other.
Callers see none of that: they go on counting the tokens of the text, and get an output for each of them (zero where nothing was read).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .cache import StoreLayer
from .errors import InputError
from .method import Method

if TYPE_CHECKING:
    from .attach import Session
    from .cache import Store
    from .model_info import ModelInfo
    from .step import Pass


PROMPT = -1
"""Where a session lists the methods that read: before the first layer."""


class Prompt:
    """What `read` looks at. ids: the tokens of one sequence, pads left out, [length]. plan: what the method's `setup` returned."""

    def __init__(self, session: Session, ids: Tensor, plan: Any):
        self._session, self.ids, self.plan = session, ids, plan

    @property
    def model(self) -> ModelInfo:
        return self._session.info

    @torch.no_grad()
    def run(self, ids: Tensor, probe: Method | None = None, **kwargs: Any) -> Any:
        """What the decoder returns for ids [batch, length] as texts of their own, with nothing but `probe` on the model."""
        with self._session.lent(probe):
            return self._session.decoder(input_ids=ids, use_cache=False, **kwargs)


def real_columns(mask: Tensor | None, batch: int, length: int, decode: bool) -> list[Tensor | slice | None]:
    """For each sequence the columns of this call that hold real tokens; None where all do."""
    if mask is None:
        return [None] * batch
    if mask.shape[0] != batch or mask.shape[1] < length:
        raise InputError(f"expected an attention mask [{batch}, at least {length}], got {list(mask.shape)}")
    if decode:
        # on a GPU looking would stall the device; there the newest column is taken to be real, as `generate` makes it
        if mask.device.type == "cpu" and not mask[:, -1].detach().numpy().all():
            raise InputError("a decode step has a masked newest column: drop finished sequences from the batch instead")
        return [None] * batch
    now = mask[:, -length:].bool()
    if bool(now.all()):
        return [None] * batch
    columns = [row.nonzero().flatten() for row in now.cpu()]
    for b, c in enumerate(columns):
        if len(c) == 0:
            raise InputError(f"sequence {b} of the batch is empty: every row needs at least one real token")
    return [None if len(c) == length else _run_of(c, mask.device) for c in columns]


def _run_of(columns: Tensor, device: torch.device) -> Tensor | slice:
    """The columns as a slice where they follow each other, so that taking them copies nothing."""
    run = slice(int(columns[0]), int(columns[-1]) + 1)
    return run if run.stop - run.start == len(columns) else columns.to(device)


def shorten(session: Session, store: Store, kwargs: dict, columns: list[Tensor | slice | None]) -> list[Tensor] | None:
    """Leave out of a call's inputs what the session's methods do not read; where in it stands what is left, a tensor of columns for each
    sequence. None where all is read. columns: where the real tokens of each sequence stand (None: everywhere)."""
    ids = kwargs.get("input_ids")
    names = " | ".join(part.method.name for part in session.active[PROMPT])
    if ids is None:
        raise InputError(
            f"'{names}' looks at the tokens of a prompt, but the model was given inputs_embeds: give input_ids"
        )
    if kwargs.get("output_hidden_states"):
        raise InputError(
            f"'{names}' lets the model read part of a prompt only: hidden states of all of it are not there"
        )
    batch, length = ids.shape
    every = torch.arange(length, device=ids.device)
    real = [every if c is None else every[c] for c in columns]
    places = [_read(session, row, at) for row, at in zip(ids, real, strict=True)]
    store.unread = [len(at) - len(p) for at, p in zip(real, places, strict=True)]
    if not any(store.unread):
        return None
    sizes = [len(p) for p in places]
    short = ids.new_zeros(batch, max(sizes))
    positions, mask = torch.zeros_like(short), torch.zeros_like(short)
    for b, (at, n) in enumerate(zip(places, sizes, strict=True)):
        short[b, -n:], positions[b, -n:], mask[b, -n:] = ids[b, at], every[:n], 1
    kwargs |= {
        "input_ids": short,
        "position_ids": positions,
        "attention_mask": mask if min(sizes) < max(sizes) else None,
    }
    kwargs.pop("cache_position", None)
    return places


def _read(session: Session, ids: Tensor, at: Tensor) -> Tensor:
    """Columns of one sequence that every method reads, one after the other; the newest token always is."""
    for m, plan in session.active[PROMPT]:
        chosen = m.read(Prompt(session, ids[at], plan))
        if chosen is None:
            continue
        if chosen.dtype != torch.bool or chosen.shape != at.shape:
            raise InputError(f"`read` of '{m.name}' must return a bool for each of {len(at)} tokens, or None")
        chosen = chosen.to(at.device).clone()
        chosen[-1] = True
        at = at[chosen]
    return at


def whole(pass_: Pass, output: Any) -> Any:
    """What the caller of a shortened call asked for: columns and outputs of the whole text, zero where nothing was read."""
    for layer in pass_.store.layers:
        if isinstance(layer, StoreLayer):
            layer.columns += pass_.asked - pass_.length
    hidden = output[0]
    spread = hidden.new_zeros(hidden.shape[0], pass_.asked, hidden.shape[2])
    for b, at in enumerate(pass_.places):
        spread[b, at] = hidden[b, -len(at) :]
    if isinstance(output, ModelOutput):
        output.last_hidden_state = spread
        return output
    return (spread, *output[1:])


def recount(store: Store, kwargs: dict, device: torch.device, length: int) -> None:
    """Positions of what follows a shortened prompt: callers count the text, the model counts what it read."""
    given = kwargs.get("position_ids")
    if given is not None:
        kwargs["position_ids"] = given - torch.tensor(store.unread, device=given.device)[:, None]
        return
    first = torch.tensor(store.counts, device=device)
    kwargs["position_ids"] = first[:, None] + torch.arange(length, device=device)
