"""Shared by methods that keep some KV heads whole and give the others sinks and a window."""

from dataclasses import dataclass

from torch import Tensor

from ...edits import Keep
from ...errors import InputError
from ...method import Budget, check_budget


@dataclass(frozen=True)
class HeadPlan:
    """Per layer, the KV heads that keep everything and the others."""

    whole: dict[int, tuple[int, ...]]
    others: dict[int, tuple[int, ...]]

    @staticmethod
    def of(whole: Tensor) -> "HeadPlan":
        """whole: bool [layers, kv_heads]."""
        rows = whole.tolist()
        return HeadPlan(
            {i: tuple(h for h, yes in enumerate(row) if yes) for i, row in enumerate(rows)},
            {i: tuple(h for h, yes in enumerate(row) if not yes) for i, row in enumerate(rows)},
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


def split(budget: float, most: float) -> tuple[float, float]:
    """A budget as (share of heads kept whole, share of the tokens that each other head keeps).

    Half of the budget goes to whole heads, up to the share `most` of the heads; the rest is spread evenly over the others.
    """
    whole = min(most, budget / 2)
    return whole, (budget - whole) / (1 - whole)


def outside(step, heads: tuple[int, ...], leaving: Tensor) -> Tensor:
    """What stays: everything but `leaving` [batch, kv_heads, T] in the given heads."""
    chosen = leaving.new_zeros(step.G)
    chosen[list(heads)] = True
    return ~(leaving & chosen[:, None])


def evict_oldest(step, heads: tuple[int, ...], after: int, held, **keep) -> Keep | None:
    """Decode: the oldest key with a token id of at least `after` leaves those heads that hold more than `held`."""
    return step.evict_one(step.oldest(after), held, heads=heads, **keep)
