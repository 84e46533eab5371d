"""Quest: read only the pages of the cache whose key bounds promise high logits for this query."""

from dataclasses import dataclass

import torch

from ... import ops
from ...method import Budget, Method, check_budget, check_count, method
from ...selection import All, Selection, Tokens
from ...verify import Beats, Claim, StaysNear
from .lists import lengths, packed


@method(
    "quest",
    paper="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (2024)",
    claim=Claim(
        "Reading a fixed number of pages chosen by per-page key bounds answers needles that a window of equal size loses.",
        number="LongChat-7B, 32k tokens: attention 7 times as fast, whole model 2.2 times, accuracy near dense",
        experiments=(
            StaysNear("quest(budget=0.25)", "needle", within=0.1),
            Beats("quest(budget=0.25)", "streaming-llm(budget=0.31)", "needle", by=0.3, at="reads"),
        ),
        setting="accuracy alone; the window is given the keys that the first two layers, which stay dense, read on top",
    ),
)
@dataclass(frozen=True)
class Quest(Method):
    """In decode, bound each page's largest logit by its minimum and maximum key per dimension and attend to the best `budget` keys' worth
    of pages; the newest page is always read. Prefill is dense, nothing is dropped, the first `skip` layers stay dense (paper: 2).

    The bound of a KV head is the maximum over its query heads.
    """

    budget: Budget = 1024
    page: int = 16
    skip: int = 2

    dense_prefill = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("page", self.page, 1)
        check_count("skip", self.skip)

    def where(self, model) -> tuple[int, ...]:
        return tuple(i for i in model.layers if i >= self.skip)

    def select(self, step) -> Selection:
        if not step.decode:
            return All()
        most = step.most(self.budget)
        if most >= step.T:
            return All()
        bound = self._bounds(step).flatten(0, 1)
        wanted = step.budget(self.budget, least=self.page)
        count = None if isinstance(wanted, int) else (wanted[:, 0] // self.page).repeat_interleave(step.G)
        slots = ops.top_slots(bound, min(max(1, most // self.page), bound.shape[1]), count=count, unit=self.page)
        return Tokens(slots.unflatten(0, (-1, step.G)), self.page)

    def _bounds(self, step) -> torch.Tensor:
        """Upper bounds of the logits in each page, [batch, kv_heads, pages], up to the scale; that of the step's own key is infinite."""
        low, high = (step.store.pooled(what, self.page).flatten(0, 1) for what in ("kmin", "kmax"))
        held = {"count": lengths(step), "size": self.page, "keep_last": 1}
        return ops.page_bound(packed(step), low, high, group="max", **held)[:, 0].unflatten(0, (-1, step.G))
