"""CompressKV: a few heads that look at whole facts vote on what stays, and layers that suffer more from eviction keep more."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...edits import Keep
from ...errors import InputError
from ...heads import HeadRoles, roles_for
from ...method import Budget, check_budget, check_count, check_range, method
from ...verify import Beats, Claim, StaysNear
from .profiles import profile_for
from .scoring import PromptKeeper, check_window, exact, keep_best_of, newest, observed, smoothed

MEASURED = ("semantic", "eviction")
"""What the profile of a model holds: semantic retrieval scores of its heads, eviction errors of its layers."""


@method(
    "compress-kv",
    paper="CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation (2025) [142]",
    claim=Claim(
        "Chosen by four semantic retrieval heads a layer, 3 % of the cache keeps about 97 % of question answering, ahead of SnapKV.",
        number="LongBench, Llama 3.1 8B and Mistral 7B: about 97 % with 3 % of the cache, ahead of SnapKV from 128 to 2,048 keys",
        experiments=(
            StaysNear("compress-kv(budget=0.2)", "needle", within=0.03, n=16, query_aware=True),
            Beats("compress-kv(budget=0.2)", "snapkv(budget=0.2)", "needle", by=0.01, n=16, query_aware=True),
        ),
        setting="needles with the question in the prompt; a fifth of 1,024 tokens, for 3 % of so short a text is 30 keys",
    ),
)
@dataclass(frozen=True)
class CompressKV(PromptKeeper):
    """When the prompt has been read, the `voters` query heads of each layer with the highest `score` vote: the attention weights of the
    last `window` queries, summed, smoothed over `kernel` neighbours (average) and averaged over these heads. All KV heads of the layer
    keep the same keys, the best by vote and the window. Later turns and generated tokens are appended.

    A layer keeps `least` keys and its share of the others by its eviction error, at most `most` times the average; all layers together
    keep `budget` a layer, and what a layer cannot hold because the text is shorter goes to the others.

    score: "semantic" (the mass a head gives to a whole needle while the model repeats it) or a head role like "retrieval".
    errors: "eviction" (measured) or "uniform", the same budget for each layer. roles: a file with these scores (default: the profile of
    this model, measured once with `python -m foveal.methods.keep.compress_kv_profile`). Original positions.
    """

    budget: Budget = 512
    voters: int = 4
    window: int = 8
    kernel: int = 5
    least: int = 32
    most: float = 3.0
    score: str = "semantic"
    errors: str = "eviction"
    roles: str | None = None

    neutral = {"budget": 1.0, "score": "retrieval", "errors": "uniform"}
    example = {"budget": 0.5, "voters": 2, "least": 8, "score": "retrieval", "errors": "uniform"}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("voters", self.voters, 1)
        check_window(self.window, self.kernel)
        check_count("least", self.least, 1)
        check_range("most", self.most, 1)
        if self.errors not in ("eviction", "uniform"):
            raise InputError(f"errors = {self.errors!r}: expected 'eviction' or 'uniform'")

    def setup(self, model) -> dict[int, tuple[list[int], float]]:
        """For each layer the heads that vote and its share of the eviction error of all."""
        score = self._table(model.model, self.score)[self.score]
        layers = model.layers
        error = [1.0] * len(layers)
        if self.errors == "eviction":
            error = self._table(model.model, "eviction")["eviction"].amax(1)[list(layers)].tolist()
        best = score.argsort(dim=1, descending=True, stable=True)[:, : self.voters].tolist()
        return {i: (best[i], e / max(sum(error), 1e-12)) for i, e in zip(layers, error, strict=True)}

    def _table(self, model, name: str) -> HeadRoles:
        if self.roles is None and name not in MEASURED:
            return roles_for(model)
        return profile_for(model, "compress_kv", self.roles)

    def compress(self, step, size: int) -> Keep | None:
        count = self.layer_budgets(step.plan, size, step.T)[step.layer]
        return None if count >= step.T else keep_best_of(step.store, self._votes(step, count), count)

    def layer_budgets(self, plan: dict[int, tuple[list[int], float]], size: int, length: int) -> dict[int, int]:
        """Keys of each layer, `size` on average, of a text of `length` tokens."""
        least, total = min(self.least, size), size * len(plan)
        targets = [least + error * (total - least * len(plan)) for _, error in plan.values()]
        most = min(int(self.most * size), length)
        return dict(zip(plan, exact(targets, total, least, [most] * len(plan)), strict=True))

    def _votes(self, step, count: int) -> Tensor:
        """What each key is worth when `count` stay, [1, kv_heads, T]."""
        voters, seen = step.plan[step.layer][0], step.seen()
        mass = observed(step, self.window).sum(2)[:, voters]
        place = step.token.long().clamp(max=seen)  # votes are for tokens: KV heads may hold different ones
        ballot = mass.new_zeros(1, len(voters), seen + 1).scatter_(2, step.per_head(place)[:, voters], mass).mean(1)
        ballot[:, seen - min(self.window, step.L) :] = 0.0
        votes = smoothed(ballot[:, None], self.kernel, "avg").expand(-1, step.G, -1).gather(2, place)
        return votes.masked_fill(newest(step, min(self.window, count)), torch.inf)
