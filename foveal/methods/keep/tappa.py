"""TAPPA: layers whose queries change from token to token are hard to predict, so they get more of the cache."""

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from ...edits import Keep
from ...method import Budget, check_budget, check_count, check_range, method
from ...store import LayerStore
from ...verify import Beats, Claim, StaysNear
from .scoring import PromptKeeper, check_window, exact, keep_best_of, newest, observed, prompt_ends, smoothed

LATE = 1 / 8
"""Part of the pool that earlier layers may hold beyond their shares: so each is evicted a few times, not after every layer."""


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
    the prompt is read no more than nine eighths of the budget and one layer are held: earlier layers give way a little late, to spare
    copies of them. A batch is evicted after its last layer, to the same result.
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
        return self._score(step, observed(step, self.window), size)

    def _score(self, step, weights: Tensor, size: int) -> Tensor:
        worth = weights.mean(2) + self.gamma * _variance(weights)
        earlier = step.group(worth, "mean").masked_fill(newest(step, self.window), 0.0)
        return smoothed(earlier, self.kernel, "avg").masked_fill(newest(step, min(self.window, size)), inf)

    def preference(self, step, weights: Tensor) -> Tensor:
        """How much of the cache this layer should get, next to others; a number on the device."""
        unlike = 1 - similarity(step.q[:, :, -self.window :])
        if self.alpha is None:
            return unlike.clamp(min=0)
        before = weights.masked_fill(step.per_head(newest(step, self.window))[:, :, None], 0.0)
        entropy, variance = -torch.special.xlogy(before, before).sum(), _variance(before).sum()
        return entropy ** (1 / self.tau_entropy) * variance ** (1 / self.tau_variance) + self.alpha * unlike

    # ------------------------------------------------------------------ eviction

    def keep(self, step) -> Keep | None:
        if not prompt_ends(step) or step.budget(self.budget) >= step.T:
            return None
        size, seen, stores = step.budget(self.budget), step.seen(), step.pass_.store.layers
        weights, window = observed(step, self.window), min(self.window, size)
        here = Layer(self.preference(step, weights), _by_token(step, self._score(step, weights, size)), seen)
        pool = step.state.setdefault("tappa", Pool((size - window) * len(step.model.layers), window, seen))
        pool.layers[step.layer] = here
        if step.store is not stores[step.layer].rows:
            return None  # one of several sequences, which are put together after this layer: `end` evicts
        pool.share()
        held = {i: stores[i].rows for i in pool.layers if i != step.layer}
        for i in pool.late(held):
            held[i].apply(_kept(held[i], pool.layers[i]))
        return _kept(step.store, here) if here.count < step.T else None

    def end(self, pass_) -> None:
        if (pool := pass_.state.pop("tappa", None)) is None:
            return
        pool.share()
        for i, layer in pool.layers.items():
            rows = pass_.store.layers[i].rows
            if layer.count < rows.T:
                rows.apply(_kept(rows, layer))


@dataclass
class Layer:
    """A layer that was read: its preference, what each token id is worth there, [1, kv_heads, tokens], and how many keys it may hold."""

    like: Tensor | float
    worth: Tensor
    count: int


@dataclass
class Pool:
    """The keys of one sequence, beside each layer's window, that all layers share, and the layers read so far."""

    size: int
    window: int
    seen: int
    layers: dict[int, Layer] = field(default_factory=dict)
    shared: int = 0

    def share(self) -> None:
        """Share the pool among the layers read so far, as after each one, but never more than before."""
        most = self.seen - self.window
        for n in range(self.shared + 1, len(self.layers) + 1):
            if n * most <= self.size:
                continue  # all of them may hold everything, so nobody need wait for what they prefer
            layers = [*self.layers.values()][:n]
            for x in layers:
                x.like = float(x.like)
            total = sum(x.like for x in layers)
            targets = [self.size * x.like / total if total > 0 else self.size / n for x in layers]
            for x, count in zip(layers, exact(targets, self.size, 1, [most] * n), strict=True):
                x.count = min(x.count, count + self.window)
        self.shared = len(self.layers)

    def late(self, held: dict[int, LayerStore]) -> list[int]:
        """Layers to evict now, furthest above their share first, until all together are above it by no more than `LATE` of the pool."""
        above = {i: max(0, rows.T - self.layers[i].count) for i, rows in held.items()}
        rest, now = sum(above.values()), []
        for i in sorted(above, key=above.get, reverse=True):
            if rest <= LATE * self.size:
                break
            rest -= above[i]
            now.append(i)
        return now


def similarity(q: Tensor) -> Tensor:
    """Mean cosine of all pairs of different queries, mean over heads: q [1, heads, queries, head_dim]."""
    unit, n = torch.nn.functional.normalize(q.float(), dim=-1), q.shape[2]
    total = unit.sum(2).square().sum(-1)
    return ((total - n) / max(1, n * (n - 1))).mean()


def _variance(weights: Tensor) -> Tensor:
    """Variance over the queries, [1, heads, T]."""
    return weights.var(2, correction=min(1, weights.shape[2] - 1))


def _by_token(step, scores: Tensor) -> Tensor:
    """Scores of slots as scores of token ids, which stay when slots move: [1, kv_heads, tokens]."""
    if step.whole:
        return scores
    seen = step.seen()
    table = scores.new_full((*scores.shape[:2], seen + 1), -inf)  # the last column is what empty slots write
    return table.scatter_(2, step.token.clamp(max=seen).long(), scores)[..., :seen]


def _kept(rows: LayerStore, layer: Layer) -> Keep:
    """The best keys of each row, as many as the layer may hold."""
    worth, last = layer.worth, layer.worth.shape[2] - 1
    if rows.uniform is None:  # empty slots have no token id, and no worth counts there
        worth = worth.gather(2, rows.token.clamp(max=last).long())
    elif rows.uniform <= last:
        worth = worth.gather(2, rows.token.long())
    return keep_best_of(rows, worth, layer.count)
