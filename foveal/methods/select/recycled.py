"""Recycled Attention: between full steps, read only the keys that the last full step looked at most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...edits import Plane
from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, check_range, method
from ...selection import All, Selection, Subset, Tokens
from ...verify import Beats, Claim, StaysNear
from .lists import WIDTH, each_list, logits_at, packed, plain_pages, remember, similarity, slots_of_mask, top_mask


@method(
    "recycled",
    paper="Recycled Attention: Efficient inference for long-context language models (2024) [122]",
    claim=Claim(
        "A full step every 50 tokens and 4,096 recycled keys between keep 63 of 90 points of RULER at 32k where windows and H2O keep 22.",
        number="Llama 3.1 8B, RULER at 32k: 63 points; dense 90, StreamingLLM 22, H2O 21",
        experiments=(
            StaysNear("recycled(budget=0.125)", "needle", within=0.27, n=16, query_aware=True),
            Beats("recycled(budget=0.125)", "h2o(budget=0.2)", "needle", by=0.41, n=16, query_aware=True, at="reads"),
        ),
        setting="an eighth of 1,024 tokens as 4,096 is of 32k, the question in the prompt; H2O is given what a full step reads on top",
    ),
)
@dataclass(frozen=True)
class Recycled(Method):
    """Each row marks `budget` keys, those with the largest weights of the last query that read everything. Other decode steps read
    only these and their own key; each then joins the marked ones and the key with the smallest weight of the step leaves them.
    Nothing leaves the cache. Prefill is dense and ends with the choice by its last query. Original positions.

    Fixed schedule: every token whose number is a multiple of `stride` reads everything (paper: 50; 10 for language modelling).
    With `similar` (paper: 0.8, stride 5) such a step compares its queries of a layer with those of that layer's last full step and
    reads everything only where the cosine is below it; queries as attention sees them, all heads as one vector.
    share: how the query heads of a KV head rank its keys, "max" or "mean" of their weights.
    """

    budget: Budget = 4096
    stride: int = 50
    similar: float | None = None
    share: str = "max"

    dense_prefill = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("stride", self.stride, 1)
        if self.similar is not None:
            check_range("similar", self.similar, -1, 2)
        if self.share not in ("max", "mean"):
            raise InputError(f"share = {self.share!r}: expected 'max' or 'mean'")

    @property
    def planes(self) -> dict[str, Plane]:
        marked = {"recycled": Plane(0, torch.bool)}
        return marked if self.similar is None else marked | {"recycled_query": Plane(0.0, width=(WIDTH,))}

    def begin(self, pass_) -> tuple[bool, ...]:
        """Which sequences are due for a full step: other kernels run then."""
        return self._due(pass_) if pass_.decode else ()

    def _due(self, pass_) -> tuple[bool, ...]:
        return tuple((n + pass_.length) % self.stride == 0 for n in pass_.counts)

    def select(self, step) -> Selection:
        if not step.decode:
            return All()
        full = self._full(step)
        step.scratch["recycled_full"] = full
        if isinstance(full, list) and all(full):
            return All()
        marked = step.store.plane("recycled")
        if isinstance(full, Tensor) or any(full):
            every = self._each(step, full)[:, None, None]
            seen = (marked | every | step.new_keys) & step.store.valid
            return Subset(seen, torch.ones(1, 1, 1, dtype=torch.bool, device=step.device))
        chosen = Tokens(slots_of_mask(marked, max(2, step.most(self.budget)) - 1))
        step.scratch["recycled_tokens"] = chosen
        return chosen

    def _full(self, step) -> list[bool] | Tensor:
        """Which sequences read everything now: known on the host and by `_due` where they differ, else bool [batch] on the device."""
        counts = step.pass_.counts
        if step.most(self.budget) >= step.T:
            return [True] * len(counts)
        due = list(self._due(step.pass_))
        if self.similar is None or not any(due):
            return due
        moved = similarity(step, "recycled_query", step.q[:, :, 0]) < self.similar
        moved = moved if all(due) else moved & self._each(step, due)
        if step.device.type != "cpu" or step.pass_.on_device is not None:  # looking would stall the device
            return moved
        alike = bool(moved.all() == moved.any())
        return moved.tolist() if alike else moved

    def _each(self, step, full: list[bool] | Tensor) -> Tensor:
        """The same as bool [batch]; from the counts there, as a captured graph cannot copy from the host."""
        if isinstance(full, Tensor):
            return full
        if all(full) == any(full):
            return torch.full((len(full),), all(full), device=step.device)
        return step.seen() % self.stride == 0

    def after(self, step) -> None:
        full = step.scratch.get("recycled_full", [True])
        allowed = step.budget(self.budget, ahead=1, least=2) - 1  # room for the next step's own key
        some = isinstance(full, Tensor)
        if not self._by_pages(step, full, allowed):
            weight = self._weights(step).masked_fill(~step.store.valid, float("-inf"))
            best = top_mask(weight, allowed) if some or any(full) else None
            if some or not all(full):
                rest = self._without_least(step, weight, allowed)
                if best is not None:
                    rest = torch.where(self._each(step, full)[:, None, None], best, rest)
                best = rest
            step.store.set("recycled", best)
        if self.similar is not None and (some or any(full)):
            remember(step, "recycled_query", step.q[:, :, -1], self._each(step, full))

    def _by_pages(self, step, full: list[bool] | Tensor, allowed: int | Tensor) -> bool:
        """The same where keys lie in pages and all sequences do alike; false where nothing was done."""
        chosen, how = step.scratch.get("recycled_tokens"), {"kv_heads": step.G, "share": self.share}
        pages = plain_pages(step, besides=chosen) if step.decode else None
        if pages is None or isinstance(full, Tensor) or any(full) != all(full):
            return False
        marks, q, count = step.store.plane("recycled"), packed(step), each_list(allowed)
        if not any(full):
            slots, allowed = chosen.slots.flatten(0, 1), allowed if count is None else count
            ops.drop_least(q, pages, step.logit, slots, marks.flatten(0, 1), allowed, **how)
            return True
        k = allowed
        if count is not None:
            k, count = step.most(self.budget) + 1, count.repeat_interleave(step.G)
        slots = ops.vote_slots(q, pages, step.logit, k, whole=False, own=True, count=count, **how)[0].long()
        new = torch.zeros(slots.shape[0], step.T + 1, dtype=torch.bool, device=step.device)
        new.scatter_(1, slots.where(slots >= 0, step.T), True)
        step.store.set("recycled", new[:, : step.T].view_as(marks))
        return True

    def _weights(self, step) -> Tensor:
        """Weights of the step's last query, shared out to KV heads, [batch, kv_heads, T]; zero where it did not look."""
        chosen = step.scratch.get("recycled_tokens")
        if chosen is None:
            return step.group(step.scores(start=step.L - 1, stop=step.L)[:, :, 0].softmax(-1), self.share)
        past = step.past
        own = (
            torch.full((*chosen.slots.shape[:2], 1), past, device=step.device)
            if isinstance(past, int)
            else past[..., None]
        )
        slots = torch.cat([chosen.slots.long(), own], -1)
        weight = step.group(logits_at(step, slots, own=chosen).softmax(-1), self.share)
        out = weight.new_zeros(*slots.shape[:2], step.T + 1)
        return out.scatter_(2, slots.where(slots >= 0, step.T), weight)[..., : step.T]

    def _without_least(self, step, weight: Tensor, allowed: int | Tensor) -> Tensor:
        """The marked keys and the newest, without the one of smallest weight where they are more than allowed."""
        marked = step.store.plane("recycled") | step.new_keys
        least = weight.masked_fill(~marked, float("inf")).argmin(-1, keepdim=True)
        over = marked.sum(-1, keepdim=True) > (allowed if isinstance(allowed, int) else allowed[..., None])
        return marked.scatter(2, least, marked.gather(2, least) & ~over)
