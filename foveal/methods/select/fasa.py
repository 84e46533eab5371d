"""FASA: a few rotary frequencies of each head rank the keys; attention is exact over the best."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Budget, Method, check_budget, check_range, method
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
            Beats("fasa(budget=0.25)", "streaming-llm(budget=0.25)", "needle", by=0.3, at="reads"),
        ),
        setting="a quarter of 1,024 tokens; reads are the keys attended to, without those looked at in a quarter of their dimensions",
    ),
)
@dataclass(frozen=True)
class Fasa(Method):
    """In decode, score every key with a `share` of each head's pairs of rotary dimensions (paper: 16 of 64), those that agreed best with
    the whole head when the model was measured, and attend to the best `budget` keys, the newest included. Prefill is dense, nothing is
    dropped, no other key is forced in. Original positions.

    chunks: None = as measured (a table ships for the default model; `python -m foveal.methods.select.frequency_chunks MODEL` makes
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

    def setup(self, model) -> dict[int, Tensor]:
        """For each layer the dimensions each head looks at, as zeros and ones [heads, 1, head_dim]."""
        table = None if self.chunks == "slowest" else table_for(model.model, self.chunks)
        return {i: self._dimensions(model, i, table) for i in model.layers}

    def _dimensions(self, model, layer: int, table) -> Tensor:
        pairs = rotary_pairs(model, layer)
        count = max(1, round(self.share * len(pairs)))
        if table is None:
            best = torch.arange(len(pairs) - count, len(pairs)).expand(model.heads, -1)
        else:
            best = table.best(self.budget if isinstance(self.budget, int) else 1024, count)[layer]
        chosen = torch.zeros(model.heads, model.head_dim).scatter_(1, pairs[best].flatten(1), 1.0)
        return chosen[:, None].to(model.model.device)

    def select(self, step) -> Selection:
        if not step.decode:
            return All()
        most = step.most(self.budget)
        if most >= step.T:
            return All()
        score = step.scores(q=step.q * step.plan[step.layer].to(step.q.dtype))[:, :, 0]
        if self.heads == "kv":
            score = step.group(score.softmax(-1), "sum")
        return Tokens(step.top(score, most - 1, step.budget(self.budget) - 1))
