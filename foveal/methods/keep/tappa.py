"""TAPPA: layers whose queries change from token to token are hard to predict, so they get more of the cache."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ...edits import Keep
from ...method import Budget, check_budget, check_count, check_range, method, tokens_of
from ...verify import Beats, Claim, StaysNear
from .scoring import PromptKeeper, best_of, check_window, exact, newest, observed, prompt_ends, smoothed


@method(
    "tappa",
    paper="Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis (2026) [103]",
    claim=Claim(
        "Layer budgets by query similarity score 47.55 on LongBench at 512 keys; CAKE 47.19, SnapKV 46.92, the whole cache 49.06.",
        number="LongBench at 512 keys: 1.5 points below the whole cache, 0.6 above SnapKV",
        experiments=(
            StaysNear("tappa(budget=0.2)", "needle", within=0.015, n=16, query_aware=True),
            Beats("tappa(budget=0.2)", "snapkv(budget=0.2)", "needle", by=0.006, n=16, query_aware=True),
        ),
        setting="needles with the question in the prompt; a fifth of 1,024 tokens instead of 512 keys; without CAKE",
    ),
)
@dataclass(frozen=True)
class Tappa(PromptKeeper):
    """Share `budget` keys a KV head and layer among the layers by how little alike the last `window` queries of the prompt are: a layer's
    preference is 1 - the mean cosine of all pairs of its rotated queries. In a layer, keep the window and, of the earlier keys, those with
    the largest mean plus `gamma` times variance of the window's attention weights, smoothed over `kernel` neighbours, per KV head.

    alpha: None is the paper's default, query similarity alone; a number adds `alpha` times it to CAKE's preference,
    entropy ^ (1 / tau_entropy) * variance ^ (1 / tau_variance) (paper for Llama-3.1-8B at 1,024 keys: 1.6 and 0.4).
    Every layer keeps the window and at least one key more. One sequence read alone is evicted layer by layer (cascading), so that while
    the prompt is read no more than the budget and one layer are held; a batch is evicted after its last layer, to the same result.
    Later turns and generated tokens are appended, where CAKE goes on evicting. Original positions.
    """

    budget: Budget = 512
    window: int = 32
    kernel: int = 5
    gamma: float = 200.0
    alpha: float | None = None
    tau_entropy: float = 1.6
    tau_variance: float = 0.4

    example = {"budget": 0.5, "window": 8}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_window(self.window, self.kernel)
        check_count("window", self.window, 2)
        check_range("gamma", self.gamma, 0)
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0)
        check_range("tau_entropy", self.tau_entropy, 1e-3)
        check_range("tau_variance", self.tau_variance, 1e-3)

    def score(self, step, size: int) -> Tensor:
        return self._score(step, observed(step, self.window)).masked_fill(newest(step, min(self.window, size)), inf)

    def _score(self, step, weights: Tensor) -> Tensor:
        worth = weights.mean(2) + self.gamma * _variance(weights)
        earlier = step.group(worth, "mean").masked_fill(newest(step, self.window), 0.0)
        return smoothed(earlier, self.kernel, "avg")

    def preference(self, step, weights: Tensor) -> float:
        """How much of the cache this layer should get, next to others."""
        unlike = 1 - similarity(step.q[:, :, -self.window :])
        if self.alpha is None:
            return max(unlike.item(), 0.0)
        before = weights.masked_fill(step.per_head(newest(step, self.window))[:, :, None], 0.0)
        entropy, variance = -torch.special.xlogy(before, before).sum(), _variance(before).sum()
        return (entropy ** (1 / self.tau_entropy) * variance ** (1 / self.tau_variance) + self.alpha * unlike).item()

    # ------------------------------------------------------------------ eviction

    def keep(self, step) -> Keep | None:
        if not prompt_ends(step) or step.budget(self.budget) >= step.T:
            return None
        pass_, layer = step.pass_, step.layer
        weights, seen = observed(step, self.window), step.seen()
        table = step.q.new_full((1, step.G, seen + 1), -inf, dtype=weights.dtype)  # by token id: slots move
        table.scatter_(2, step.token.long().clamp(max=seen), self.score(step, step.budget(self.budget)))
        known = pass_.state.setdefault("tappa", {})
        known[layer] = (self.preference(step, weights), table)
        if step.store is not pass_.store.layers[layer].rows:
            return None  # one of several sequences, which are put together after this layer: `end` evicts
        counts = self._counts(known, seen, len(step.model.layers))
        for i, count in counts.items():
            if i != layer:
                _evict(pass_.store.layers[i].rows, known[i][1], count)
        return _kept(step.store, table, counts[layer])

    def end(self, pass_) -> None:
        known = pass_.state.pop("tappa", {})
        if known:
            seen = pass_.counts[0] + pass_.length
            for i, count in self._counts(known, seen, len(pass_.session.info.layers)).items():
                _evict(pass_.store.layers[i].rows, known[i][1], count)

    def _counts(self, known: dict, seen: int, layers: int) -> dict[int, int]:
        """Keys each layer read so far may hold: the pool of all `layers` shared among them, never more than before."""
        size = tokens_of(self.budget, seen)
        window = min(self.window, size)
        counts: dict[int, int] = {}
        order = list(known)
        for n in range(1, len(order) + 1):
            likes = [known[i][0] for i in order[:n]]
            total, pool = sum(likes), (size - window) * layers
            targets = [pool * like / total if total > 0 else pool / n for like in likes]
            for i, count in zip(order, exact(targets, pool, 1, [seen - window] * n), strict=False):
                counts[i] = min(count + window, counts.get(i, seen))
        return counts


def similarity(q: Tensor) -> Tensor:
    """Mean cosine of all pairs of different queries, mean over heads: q [1, heads, queries, head_dim]."""
    unit, n = torch.nn.functional.normalize(q.float(), dim=-1), q.shape[2]
    total = unit.sum(2).square().sum(-1)
    return ((total - n) / max(1, n * (n - 1))).mean()


def _variance(weights: Tensor) -> Tensor:
    """Variance over the queries, [1, heads, T]."""
    return weights.var(2, correction=min(1, weights.shape[2] - 1))


def _kept(rows, table: Tensor, count: int) -> Keep:
    """The `count` best keys of each row, by a score for each token id."""
    scores = table.gather(2, rows.token.long().clamp(max=table.shape[2] - 1))
    return Keep(mask=best_of(rows, scores, [count] * rows.heads))


def _evict(rows, table: Tensor, count: int) -> None:
    if rows.uniform is None or rows.uniform > count:
        rows.apply(_kept(rows, table, count))
