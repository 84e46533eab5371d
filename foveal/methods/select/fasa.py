"""FASA: a few rotary frequencies of each head rank the keys; attention is exact over the best."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Budget, Method, check_budget, check_range, method
from ...ops.few import few_slots
from ...selection import All, Selection, Tokens
from ...verify import Beats, Claim, StaysNear
from .frequency_chunks import rotary_pairs, table_for


@method(
    "fasa",
    paper="FASA: Frequency-aware Sparse Attention (2026) [131]",
    claim=Claim(
        "Near the full cache on LongBench with 256 tokens chosen by a quarter of the frequencies; 2.56x faster at 18.9 % of the cache.",
        number="LongBench: about 100 % of the full cache with 256 tokens, ahead of SnapKV, Quest, H2O and StreamingLLM",
        experiments=(
            StaysNear("fasa(budget=0.25)", "needle", within=0.1),
            StaysNear("fasa(budget=0.25, heads='kv')", "needle", within=0.1),
            Beats("fasa(budget=0.25, heads='kv')", "streaming-llm(budget=0.25)", "needle", by=0.3, at="reads"),
        ),
        setting="a quarter of 1,024 tokens; lists of each query head, as in the paper, may read a key for each of them, so where reads "
        "are compared one list serves a KV head; reads are the keys attended to, without those looked at in a quarter of their dimensions",
    ),
)
@dataclass(frozen=True)
class Fasa(Method):
    """In decode, score every key with a `share` of each head's pairs of rotary dimensions (paper: 16 of 64), those that agreed best with
    the whole head when the model was measured, and attend to the best `budget` keys, the newest included. Prefill is dense, nothing is
    dropped, no other key is forced in. Original positions.

    chunks: None = as measured (a table ships for the default model; `python -m foveal.methods.select.frequency_chunks --model ID` makes
    one); "slowest" = the slowest pairs, which needs no measurement and is the paper's control; else the path of a table.
    heads: "query" = each query head has its own list; "kv" = one list for the query heads that share a KV head, by the sum of their
    softmax over the partial scores, so that only that many keys are gathered.
    """

    budget: Budget = 256
    share: float = 0.25
    chunks: str | None = None
    heads: str = "query"

    dense_prefill = True
    neutral = {"budget": 1.0, "chunks": "slowest"}
    example = {"budget": 0.5, "chunks": "slowest"}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_range("share", self.share, 0, 1)
        if self.share == 0:
            raise InputError("share = 0: expected a share of the frequencies above 0 and up to 1")
        if self.heads not in ("query", "kv"):
            raise InputError(f"heads = {self.heads!r}: expected 'query' or 'kv'")

    def setup(self, model) -> dict[int, "Looks"]:
        table = None if self.chunks == "slowest" else table_for(model.model, self.chunks)
        return {i: self._looks(model, i, table) for i in model.layers}

    def _looks(self, model, layer: int, table) -> "Looks":
        pairs = rotary_pairs(model, layer)
        count = max(1, round(self.share * len(pairs)))
        if table is None:
            best = torch.arange(len(pairs) - count, len(pairs)).expand(model.heads, -1)
        else:
            best = table.best(self.budget if isinstance(self.budget, int) else 1024, count)[layer]
        dims = torch.zeros(model.heads, model.head_dim, dtype=torch.bool).scatter_(1, pairs[best].flatten(1), True)
        return Looks(*(x.to(model.model.device) for x in (dims, *_together(dims, model.kv_heads))))

    def select(self, step) -> Selection:
        if not step.decode:
            return All()
        most, looks = step.most(self.budget), step.plan[step.layer]
        if most >= step.T:
            return All()
        if most == 1:
            return Tokens(step.q_token.new_full((step.q.shape[0], step.G, 1), -1))
        rows = step.store.classes[0]
        plain = rows.paged and rows.pool.recent is None and step.bias is None and isinstance(step.visible, All)
        if plain and not {"mass", "shift"} & set(step.store.specs):
            return self._from_pages(step, rows.view, looks, most)
        score = step.scores(q=step.q * looks.dims[:, None].to(step.q.dtype))[:, :, 0]
        if self.heads == "kv":
            score = step.group(score.softmax(-1), "sum")
        return Tokens(step.top(score, most - 1, step.budget(self.budget) - 1))

    def _from_pages(self, step, pages, looks: "Looks", most: int) -> Selection:
        """The same, read from pages: only the dimensions that count."""
        batch, size, each = step.q.shape[0], step.budget(self.budget), self.heads == "query"
        lists, count, k = step.H if each else step.G, None, most - 1
        if isinstance(size, int):
            k = min(k, size - 1)
        else:
            count = step.once(("fasa", self), lambda: (size - 1).expand(-1, lists).flatten())
        q = step.q.reshape(batch * step.G, step.group_size, -1)
        slots = few_slots(q, pages, step.logit, looks.union, looks.chosen, k, each=each, count=count)
        return Tokens(slots.view(batch, lists, k))


class Looks(NamedTuple):
    """The dimensions each head looks at in a layer: dims bool [heads, head_dim]; union int32 [kv_heads, w], those of the heads that share a
    KV head, -1 for none, and chosen bool [heads, w], which of these."""

    dims: Tensor
    union: Tensor
    chosen: Tensor


def _together(dims: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """`union` and `chosen` of `dims`."""
    any_ = dims.unflatten(0, (kv_heads, -1)).any(1)
    order = (~any_).byte().argsort(dim=1, stable=True)[:, : int(any_.sum(1).max())]
    union = order.where(any_.gather(1, order), -1).int()
    chosen = dims.gather(1, order.repeat_interleave(len(dims) // kv_heads, 0))
    return union, chosen
