"""MoA's search: one window rule for each head, so that the least influence is hidden under a bound on the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from ...errors import InputError
from ...heads import HeadRoles

MIX = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far a plan favours one of the measured lengths: the paper's five points for each objective."""


class Rule(NamedTuple):
    """A window of alpha + beta * tokens."""

    alpha: int
    beta: float

    def blocks(self, tokens: int, block: int) -> int:
        return max(1, int(self.alpha // block + self.beta * tokens / block))


def rules(shortest: int, longest: int, served: int) -> list[Rule]:
    """The paper's search space for profiles from `shortest` to `longest` tokens: alpha from -shortest to longest in steps of half the
    shortest (there 1,024 for 2,048), beta in eighths; windows that are empty at the shortest or exceed the text at `served` are left out.
    """
    alphas = range(-shortest, longest + 1, max(1, shortest // 2))
    pairs = (Rule(a, b / 8) for a, b in product(alphas, range(9)))
    return [r for r in pairs if r.alpha + r.beta * shortest > 0 and r.alpha + r.beta * served <= served]


def search(
    profile: HeadRoles, budget: float, rows: int, block: int, layers: Sequence[int], positions: int | None
) -> dict[int, list[Rule]]:
    """The rule of each of `rows` heads (KV heads or query heads) of each layer.

    For several mixtures of the measured lengths a plan is built greedily, always with the step that uncovers most for what it costs;
    plans that another one beats at every length are dropped, and the one that hides least at the length held out of the search is taken.
    Raises InputError for another block size than the profile's.
    """
    if profile.source["block"] != block:
        raise InputError(
            f"block = {block}: the profile was measured in blocks of {profile.source['block']} tokens, so give that"
        )
    lengths, unseen = profile.source["lengths"], profile.source["unseen"]
    served = max(positions or 0, *lengths)
    space = rules(min(lengths), max(lengths), served)
    hidden = {n: _hidden(profile, n, rows, block, layers, space) for n in (*lengths, unseen)}
    bounds = [*lengths, unseen]
    while bounds[-1] < served:
        bounds.append(min(2 * max(bounds), served))
    cost = np.array([[min(1.0, (1 + r.blocks(n, block)) * block / n) for n in bounds] for r in space])
    plans = {tuple(_greedy(sum(w * hidden[n] for w, n in mix), cost, budget)) for mix in _mixtures(lengths)}
    best = min(_pareto(sorted(plans), hidden, lengths), key=lambda plan: _loss(hidden[unseen], plan))
    chosen = [space[r] for r in best]
    return {layer: chosen[i * rows : (i + 1) * rows] for i, layer in enumerate(layers)}


def _hidden(
    profile: HeadRoles, length: int, rows: int, block: int, layers: Sequence[int], space: Sequence[Rule]
) -> np.ndarray:
    """The influence each rule hides from each head at one length, [heads of all layers, rules], of 1 on average for the least window."""
    none = np.zeros(len(layers) * rows)
    table = {}
    for r in space:
        n = r.blocks(length, block)
        if n not in table:
            name = hidden_name(length, n)
            known = name in profile.scores
            table[n] = profile.kv(name, rows)[list(layers)].flatten().double().numpy() if known else none
    return np.stack([table[r.blocks(length, block)] for r in space], 1)


def hidden_name(length: int, blocks: int) -> str:
    """The score that says what a window of so many blocks hides at a length; there is none where it hides nothing."""
    return f"hidden:{length}:{blocks}"


def _mixtures(lengths: Sequence[int]) -> list[list[tuple[float, int]]]:
    even = 1 / len(lengths)
    return [[((1 - t) * even + t * (n == one), n) for n in lengths] for one in lengths for t in MIX]


def _greedy(loss: np.ndarray, cost: np.ndarray, budget: float) -> list[int]:
    """A rule for each head: loss [heads, rules], cost [rules, lengths], mean cost over heads at most `budget` at every length.

    Where no rule is that narrow (a short text and a small budget), the narrowest is what a length must bear.
    """
    heads = loss.shape[0]
    plan = np.full(heads, cost.sum(1).argmin())
    limit = heads * np.maximum(budget, cost[plan[0]]) + 1e-9
    used = heads * cost[plan[0]]
    mean = cost.mean(1)
    while True:
        gain = loss[np.arange(heads), plan][:, None] - loss
        dearer = mean - mean[plan][:, None]
        fits = (used + cost[None] - cost[plan][:, None] <= limit).all(-1)
        worth = np.where(fits & (gain > 1e-12), gain / np.maximum(dearer, 1e-9), 0.0)
        head, rule = np.unravel_index(worth.argmax(), worth.shape)
        if worth[head, rule] <= 0:
            return plan.tolist()
        used += cost[rule] - cost[plan[head]]
        plan[head] = rule


def _loss(hidden: np.ndarray, plan: Sequence[int]) -> float:
    return float(hidden[np.arange(len(plan)), list(plan)].sum())


def _pareto(
    plans: list[tuple[int, ...]], hidden: dict[int, np.ndarray], lengths: Sequence[int]
) -> list[tuple[int, ...]]:
    """The plans that no other beats at every length."""
    losses = {plan: np.array([_loss(hidden[n], plan) for n in lengths]) for plan in plans}

    def beaten(mine: np.ndarray) -> bool:
        return any((x <= mine).all() and (x < mine).any() for x in losses.values())

    return [plan for plan in plans if not beaten(losses[plan])]
