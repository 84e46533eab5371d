"""Quest: read only the pages of the cache whose key bounds promise high logits for this query."""

from dataclasses import dataclass

import torch

from ...method import Budget, Method, check_budget, check_count, method
from ...selection import All, Selection, Tokens
from ...verify import Beats, Claim, StaysNear


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
        pages = -(-step.T // self.page)
        bound = self._bounds(step)
        past = step.past
        newest = past // self.page  # the page of the step's own key is read whatever its bound
        index = torch.arange(pages, device=step.device)
        newest = index == newest if isinstance(past, int) else index == newest[..., None]
        bound = bound.masked_fill(newest, float("inf"))
        if step.store.uniform is None:
            bound = bound.masked_fill(index > past[..., None] // self.page, float("-inf"))
        best, chosen = bound.topk(min(max(1, most // self.page), pages), dim=-1)
        slots = chosen * self.page
        if step.store.uniform is None:
            wanted = step.budget(self.budget, least=self.page) // self.page
            slots = step.ranked(slots.where(best > float("-inf"), -1), wanted)
        return Tokens(slots, self.page)

    def _bounds(self, step) -> torch.Tensor:
        """Upper bounds of the logits in each page, [batch, kv_heads, pages], up to the scale."""
        low, high = step.store.pooled("kmin", self.page), step.store.pooled("kmax", self.page)
        q = step.q.reshape(step.q.shape[0], step.G, -1, step.q.shape[3])
        return (q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT).amax(2)
