"""Ada-KV: heads that spread their attention get more keys, heads that concentrate it get fewer."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...edits import Keep
from ...errors import InputError
from ...method import Budget, Method, check_budget, check_range, get_method, method, methods
from ...verify import Beats, Claim
from .scoring import PromptKeeper, best_of, check_rolling, exact


@method(
    "ada-kv",
    paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference (2024), arXiv 2407.11550",
    claim=Claim(
        "The same layer budget shared out by head keeps more attention mass, and answers better, than the same number for each head.",
        number="13 data sets of RULER, 16 of LongBench, question known or not: SnapKV and others better with shared budgets",
        experiments=(
            Beats("ada-kv(budget=0.2)", "snapkv(budget=0.2)", "needle", by=0.01, n=16, query_aware=True),
            Beats("ada-kv(budget=0.2)", "snapkv(budget=0.2)", "perplexity", by=0.0),
        ),
        setting="needles with the question in the prompt, and next tokens of a novel; better means any gain, or no loss in nats",
    ),
)
@dataclass(frozen=True)
class AdaKV(PromptKeeper):
    """Share the keys of a layer, `budget` times its KV heads, among the heads: as many for each as it has among the best scores of
    all heads together, mixed with the even share at the rate `safeguard` (0.2, section 4).

    scorer: the method whose scores decide, as text: "snapkv" (as in the paper), "snapkv(window=16)", or any other that scores keys
    at the end of a prompt; its own budget is not used. What it protects (SnapKV: the window) stays in every head and counts.
    rolling: compress after every piece that is read, be it a chunk or a later turn. Original positions.
    """

    budget: Budget = 1024
    safeguard: float = 0.2
    scorer: str = "snapkv"
    rolling: bool = False

    example = {"budget": 0.5, "scorer": "snapkv(window=8)"}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_range("safeguard", self.safeguard, 0, 1)
        check_rolling(self.rolling)
        _ = self._inner

    @property
    def _inner(self) -> PromptKeeper:
        return _scorer(self.scorer)

    @property
    def needs(self) -> frozenset[str]:
        return self._inner.needs

    @property
    def planes(self) -> dict:
        return dict(self._inner.planes)

    def setup(self, model):
        return self._inner.setup(model)

    def compress(self, step, size: int) -> Keep:
        scores = self._inner.score(step, size).masked_fill(~step.store.valid, -torch.inf)
        safe = scores == torch.inf
        fixed, held = (x.sum(-1)[0].tolist() for x in (safe, step.store.valid))
        open_ = [h - f for h, f in zip(held, fixed, strict=True)]
        total = max(0, min(step.G * size - sum(fixed), sum(open_)))
        rest = scores.masked_fill(safe, -torch.inf)
        best = rest.flatten().topk(total).indices // step.T
        among = torch.bincount(best, minlength=step.G).tolist()
        mixed = [self.safeguard * total / step.G + (1 - self.safeguard) * n for n in among]
        return Keep(mask=safe | best_of(step.store, rest, exact(mixed, total, 0, open_)))


@lru_cache(maxsize=64)
def _scorer(text: str) -> PromptKeeper:
    """The scoring method written as `text`."""
    keepers = {n: c.score for n, c in methods().items() if issubclass(c, PromptKeeper)}
    known = [n for n, score in keepers.items() if callable(score) and score is not PromptKeeper.score]
    inner = get_method(text) if isinstance(text, str) else text
    if not isinstance(inner, Method) or inner.name not in known:
        raise InputError(
            f"scorer = {text!r}: expected a method that scores keys at the end of a prompt: {', '.join(known)}"
        )
    return inner
