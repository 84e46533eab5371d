"""Driving a model by hand over a store: greedy answers of a batch, and token by token along a given text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ..cache import Store
from ..errors import UnsupportedModel
from .measure import Clock, now


def answer(model, store: Store, questions: Sequence[Sequence[int]], most: int, stops: set[int]) -> list[list[int]]:
    """Greedy answers of a batch whose contexts are in `store`: token ids, ended before a stop token.

    Raises UnsupportedModel for questions of different lengths where some layers are not Foveal's.
    """
    padded = len({len(q) for q in questions}) > 1
    if padded and len(store.managed) < len(store.layers):
        raise UnsupportedModel(
            "a model with sliding-window or linear layers answers only questions of one length as a batch: ask one by one"
        )
    device, batch, width = model.device, len(questions), max(map(len, questions))
    ids = torch.zeros(batch, width, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for b, q in enumerate(questions):
        ids[b, width - len(q) :] = torch.tensor(q, device=device)
        mask[b, width - len(q) :] = 1
    at = store.seen.to(device)[:, None]
    positions = (at + mask.cumsum(-1) - 1).clamp(min=0)
    # Layers with a window take a mask to begin at the first column of the text, so it is given only where it is needed.
    mask = mask if padded else None
    got = model(ids, past_key_values=store, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    token, out, alive = got.logits[:, -1].argmax(-1), [], torch.ones(batch, dtype=torch.bool, device=device)
    stop = torch.tensor(sorted(s for s in stops if s is not None), device=device)
    for _ in range(most):
        out.append(token)
        alive &= ~torch.isin(token, stop)
        if len(out) == most or not bool(alive.any()):
            break
        positions = store.seen.to(device)[:, None]
        token = model(token[:, None], past_key_values=store, position_ids=positions).logits[:, -1].argmax(-1)
    rows = torch.stack(out, 1).tolist()
    return [_until(row, stops) for row in rows]


def follow(
    model, store: Store, tokens: Sequence[int], device: torch.device, clock: Clock | None = None
) -> tuple[list[float], list[float], list[float]]:
    """Feed tokens one by one; nats of each next token given those before, seconds of each step, and of these what `clock` counted."""
    losses, times, counted = [], [], []
    for token, target in pairwise(tokens):
        before = None if clock is None else clock.seconds
        start = now(device)
        logits = model(torch.tensor([[token]], device=device), past_key_values=store).logits[0, -1]
        times.append(now(device) - start)
        if clock is not None:
            counted.append(clock.seconds - before)
        losses.append(-logits.float().log_softmax(-1)[target].item())
    return losses, times, counted


def _until(row: list[int], stops: set[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in stops:
            return row[:i]
    return row
