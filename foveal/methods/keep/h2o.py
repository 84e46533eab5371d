"""H2O: keep the keys that have gathered the most attention, and the newest ones."""

from dataclasses import dataclass

from ...edits import Keep, Leave, Plane
from ...method import Budget, Method, check_budget, check_range, method
from ...verify import Beats, Claim, StaysNear
from .scoring import check_rolling


@method(
    "h2o",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (2023) [28]",
    claim=Claim(
        "20 % of the cache, half of it heavy hitters, matches the full cache where a window of equal size does not.",
        number="OPT, LLaMA and GPT-NeoX: the full cache's accuracy on short question answering with 20 % of it",
        experiments=(
            StaysNear("h2o(budget=0.2)", "perplexity", within=0.1),
            Beats("h2o(budget=0.2)", "streaming-llm(budget=0.2, sink=0)", "perplexity", by=0.1),
        ),
        setting="next tokens of a novel instead of question answering",
    ),
)
@dataclass(frozen=True)
class H2O(Method):
    """Accumulate attention received per key; hold `budget` keys a KV head, the share `recent` of them for the newest.

    Defaults are the paper's 10 % heavy + 10 % recent. Mass is summed over the query heads of a KV head (the original has one each). A
    dropped key's sum leaves with it. Original positions; sinks need no protection, they collect the largest sums. rolling: drop after every
    piece of a prompt that is read in chunks, so that no more than the budget and a piece is ever held; else nothing leaves before its end.
    """

    budget: Budget = 0.2
    recent: float = 0.5
    rolling: bool = False

    needs = frozenset({"col_mass"})
    columns = True
    planes = {"h2o": Plane(0.0)}
    dense_prefill = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_range("recent", self.recent, 0, 1)
        check_rolling(self.rolling)

    def keep(self, step) -> Keep | Leave | None:
        step.tally("h2o", "col_mass")
        if not (step.prompt_done or self.rolling):
            return None
        size = step.budget(self.budget)
        if isinstance(size, int) and size >= step.T:
            return None
        if step.decode:
            return Leave(size, "h2o", recent=self._newest(step, size))
        newest = step.token > step.q_token[:, -1, None, None] - self._newest(
            step, size
        )  # empty slots, too: never dropped
        return step.keep_best(step.store.plane("h2o"), size, protected=newest)

    def _newest(self, step, size):
        if isinstance(size, int):
            return int(size * self.recent)
        return step.once(("h2o", self), lambda: (size * self.recent).long())
