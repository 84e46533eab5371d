"""Shared by methods that keep some KV heads whole and give the others sinks and a window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Budget, check_budget


@dataclass(frozen=True)
class HeadPlan:
    """Per layer, the KV heads that keep everything and the others; `window` is the share of the tokens the others keep."""

    whole: dict[int, tuple[int, ...]]
    others: dict[int, tuple[int, ...]]
    window: float | None

    @staticmethod
    def of(whole: Tensor, model, budget: float | None) -> "HeadPlan":
        """whole: bool [layers, kv_heads]. budget: the share of the cache that all heads together may keep; None = no such bound.

        Where a model has so few heads that the whole ones alone exceed the budget, none stays whole.
        """
        share = whole[list(model.layers)].float().mean().item()
        if budget is not None and share > budget:
            whole, share = torch.zeros_like(whole), 0.0
        window = None if budget is None else 1.0 if share == 1 else (budget - share) / (1 - share)
        rows = whole.tolist()
        return HeadPlan(
            {i: tuple(h for h, yes in enumerate(row) if yes) for i, row in enumerate(rows)},
            {i: tuple(h for h, yes in enumerate(row) if not yes) for i, row in enumerate(rows)},
            window,
        )


def check_share(name: str, budget: Budget | None) -> None:
    """A budget for methods that keep whole heads: a share, or None for the paper's own setting."""
    if budget is None:
        return
    check_budget(budget)
    if isinstance(budget, int):
        raise InputError(
            f"budget = {budget}: '{name}' keeps some heads whole, so its budget is a share of the tokens seen, not a count"
        )


def whole_share(budget: float, most: float) -> float:
    """The share of the heads that stay whole under a budget: half of the budget, up to `most`."""
    return min(most, budget / 2)


def outside(step, heads: tuple[int, ...], leaving: Tensor) -> Tensor:
    """What stays: everything but `leaving` [batch, kv_heads, T] in the given heads."""
    chosen = leaving.new_zeros(step.G)
    chosen[list(heads)] = True
    return ~(leaving & chosen[:, None])
