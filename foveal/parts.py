"""What the parts of a method do in one step, in the order of the path: narrow, weigh, replace, reweigh, mix, look, keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .edits import Bias, Reweigh
from .errors import InputError
from .excerpt import Excerpt
from .method import STATISTICS, Method, Out
from .selection import All, Selection
from .step import Step


class Part(NamedTuple):
    """A method on an attached model, with what its setup returned."""

    method: Method
    plan: object

    def on(self, step: Step) -> Step:
        step.plan = self.plan
        return step


def needs_of(parts: Sequence[Part]) -> frozenset[str]:
    """The statistics that anybody named."""
    return frozenset().union(*(part.method.needs for part in parts)) - {"whole_prompt"}


def edits_weights(parts: Sequence[Part]) -> bool:
    return any("reweigh" in part.method.asks for part in parts)


def choose(step: Step, parts: Sequence[Part]) -> tuple[Selection, Out | None]:
    """Select and weigh; if a method replaces the softmax, what it returned."""
    selection = select(step, parts)
    step.bias = _sum(part.method.weigh(part.on(step)) for part in parts)
    replaced = None
    for part in parts:
        replaced = part.method.attend(part.on(step), selection, step.bias) or replaced
    return selection, replaced


def select(step: Step, parts: Sequence[Part]) -> Selection:
    """What all methods allow, each asked with what those before it left; after an excerpt they read the shortened text."""
    selection: Selection = All()
    for n, part in enumerate(parts, 1):
        selection = selection & part.method.select(part.on(step))
        if isinstance(selection, Excerpt):
            selection = selection.narrowed(select(selection.text, parts[n:]))
            step.visible = selection
            break
        step.visible = selection
    return selection


def statistic(step: Step, name: str, weights: Tensor, seen: Tensor | None) -> Tensor:
    """A statistic of explicit weights [batch, heads, queries, T]: [batch, heads, T] for columns, else [batch, heads, queries].

    seen: bool [batch, kv_heads or heads, queries, T], the keys each query sees; None where it sees all.
    """
    if name == "col_mass":
        return weights.sum(2)
    if name == "col_low":  # a tie with uniform attention is not low
        seen = None if seen is None else step.per_head_like(seen, step.H)
        count = weights.shape[-1] if seen is None else seen.sum(-1, keepdim=True).clamp(min=1)
        low = weights < (1 - 1e-5) / count
        return (low if seen is None else low & seen).sum(2).to(weights.dtype)
    if name == "entropy":
        return -torch.special.xlogy(weights, weights).sum(-1)
    if name == "sink_mass":
        return (weights * step.per_head(step.token < 4)[:, :, None]).sum(-1)
    if name == "row_argmax":
        return weights.argmax(-1)
    raise InputError(f"'{name}' is no statistic a method can name: choose from {', '.join(STATISTICS)}")


def edits_of(step: Step, parts: Sequence[Part]) -> Iterator[Reweigh | None]:
    """What each method that edits weights does to them in this step."""
    return (part.method.reweigh(part.on(step)) for part in parts if "reweigh" in part.method.asks)


def edited(step: Step, parts: Sequence[Part], weights: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Apply the methods' post-softmax edits, one after the other, to weights [batch, heads, queries, T]."""
    for edit in edits_of(step, parts):
        if edit is not None:
            weights = _reweighed(step, edit, weights, start, stop)
    return weights


def _reweighed(step: Step, edit: Reweigh, weights: Tensor, start: int, stop: int | None) -> Tensor:
    keys = step.per_head_like(edit.keys, step.H)[:, :, None]
    gain = edit.gain
    if isinstance(gain, Tensor):
        gain = gain[:, :, start:stop, None] if gain.ndim == 3 else gain[:, :, None, None]
    changed = torch.where(keys, weights * gain, weights)
    if edit.to is False:
        return changed
    others = ~keys if edit.to is None else step.per_head_like(edit.to, step.H)[:, :, None] & ~keys
    before = weights.sum(-1, keepdim=True)
    payers = (weights * others).sum(-1, keepdim=True)
    share = 1 + (before - changed.sum(-1, keepdim=True)) / payers.clamp(min=1e-30)
    edited = torch.where(others, changed * share.clamp(min=0), changed)
    # a gain may ask for more than the payers have: they give all, and the row is scaled back to its sum
    edited = torch.where(share < 0, edited * before / edited.sum(-1, keepdim=True).clamp(min=1e-30), edited)
    # a row with nobody to receive keeps its weights: there is nothing to redistribute to
    return torch.where(payers > 0, edited, weights)


def finish(step: Step, parts: Sequence[Part], out: Tensor) -> Tensor:
    for part in parts:
        out = part.method.mix(part.on(step), out)
    let_go(step, parts)
    return out


def let_go(step: Step, parts: Sequence[Part]) -> None:
    """The end of a step: everybody looks, then each method in turn keeps, seeing what those before it left.

    (A chain refuses a second keeper that needs statistics per key: they belong to the slots before the first one.)
    """
    for part in parts:
        part.method.after(part.on(step))
    for part in parts:
        keep = part.method.keep(part.on(step)) if "keep" in part.method.asks else None
        if keep is not None:
            step.apply(keep)


def _sum(biases: Iterator[Bias | None]) -> Bias | None:
    total = None
    for b in biases:
        if b is not None:
            total = b if total is None else total + b
    return total
