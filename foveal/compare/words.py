"""Shares, budgets and measured values as text."""

from __future__ import annotations

ATTENTION = "Attention is its part of a decode step, over all layers: storing keys, choosing them, attending, letting go; a median."
NO_ATTENTION = "Attention is timed apart on a CPU only: on a GPU a decode step is one captured graph."


def percent(share: float | None) -> str:
    """A share as text, with a decimal only below ten percent (0.25 -> '25%', 0.031 -> '3.1%')."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}" if abs(share) < 0.0995 else f"{100 * share:.0f}"
    return text.removesuffix(".0") + "%"


def amount(budget: float | int | None) -> str:
    """A budget as text: a share as percent, a whole number as tokens (0.125 -> '12.5%', 512 -> '512 tokens')."""
    if isinstance(budget, int):
        return f"{budget:,} token" + "s" * (budget != 1)
    return "-" if budget is None else f"{100 * budget:.4g}%"


def number(value: float | None) -> str:
    """A measured value as text: two decimals below ten, one below a hundred, else none (1234.5 -> '1,234')."""
    if value is None:
        return "-"
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
