"""The oracle: attend to the keys that really have the largest weights."""

from dataclasses import dataclass

from ...method import Budget, Method, check_budget, method
from ...selection import All, Selection, Tokens
from ...verify import Claim, StaysNear


@method(
    "top-k",
    paper="Exact top-k per KV head: the upper bound that selecting methods are measured against",
    claim=Claim(
        "Attending to the few keys with the largest weights is almost as good as attending to all.",
        experiments=(
            StaysNear("top-k(budget=0.1)", "perplexity", within=0.05),
            StaysNear("top-k(budget=0.1)", "needle", within=0.1),
        ),
    ),
)
@dataclass(frozen=True)
class TopK(Method):
    """In decode, score every key exactly and attend to the best `budget` of each KV head, the newest key included.

    Query heads that share a KV head share the list, by the mean of their attention weights. It reads all keys to choose: a bound on
    quality, not a way to save time. Prefill is dense, nothing is dropped.
    """

    budget: Budget = 1024

    dense_prefill = True

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def select(self, step) -> Selection:
        if not step.decode:
            return All()
        most = step.most(self.budget)
        if most >= step.T:
            return All()
        mass = step.group(step.scores()[:, :, 0].softmax(-1), "mean")
        return Tokens(step.top(mass, most - 1, step.budget(self.budget) - 1))
