"""HISA: score blocks first, then only the tokens inside the best blocks, and read the best tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, method, tokens_of
from ...ops.index import index_two_stage
from ...ops.top import top_slots
from ...selection import All, Lists, Selection, Tokens
from ...verify import Claim, StaysNear
from .block_maps import is_whole_prompt
from .lists import logits_at


@method(
    "hisa",
    paper="HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention (2026) [135]",
    claim=Claim(
        "Finds the tokens DeepSeek's flat indexer finds (over 99 % the same), 2x as fast at 32k and 4x at 128k, at equal quality.",
        number="DeepSeek V3.2, GLM-5: the indexer kernel 2 times as fast at 32k, 4 times at 128k; needles and LongBench equal",
        experiments=(
            StaysNear("hisa(budget=0.25, block=16, blocks=32)", "needle", within=0.05),
            StaysNear("hisa(budget=0.25, block=16, blocks=32)", "perplexity", within=0.05),
        ),
        setting="the model's own heads as the indexer, blocks scaled to 1,024 tokens; accuracy alone, `benchmarks.select` times indexers",
    ),
)
@dataclass(frozen=True)
class Hisa(Method):
    """Each query of a prompt and each decode step reads its `budget` best tokens (in decode the step's own is one of them whatever its
    score), found in two stages: of all blocks of `block` tokens the `blocks` best by the score of their mean key, of the tokens in these
    the best by their own. The first block and the newest are always searched. (Paper: 2,048 tokens of 64 blocks of 128; more blocks where
    a budget needs them.)

    A model trained with an indexer brings small heads for the scores (`foveal.ops.index_two_stage` works with those). Others have
    none, so here the query heads of a KV head are the indexer: the sum of their logits, without the ReLU, as most logits of a
    softmax head are negative. Each query keeps a list, which is meant for heads that all share their keys (latent
    attention): with several KV heads lists take length x kv_heads x budget x 4 bytes, and reading them costs more than dense attention.
    `query_block` queries of a prompt may share a list there, by the largest score among them (not in the paper; 1 is). A text that goes on
    after the prompt is dense.
    """

    budget: Budget = 2048
    block: int = 128
    blocks: int = 64
    query_block: int = 1

    needs = frozenset({"whole_prompt"})
    example = {"budget": 0.3, "block": 4, "blocks": 5}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("block", self.block, 1)
        check_count("blocks", self.blocks, 1)
        check_count("query_block", self.query_block, 1)
        if isinstance(self.budget, int) and self.block * self.blocks < self.budget:
            raise InputError(
                f"blocks = {self.blocks}: {self.blocks} blocks of {self.block} tokens cannot hold a budget of {self.budget}"
            )
        if isinstance(self.budget, int) and self.query_block > self.budget:
            raise InputError(
                f"query_block = {self.query_block}: the queries of a block need a budget of as many tokens, not {self.budget}"
            )

    def _searched(self, size: int | Tensor) -> int | Tensor:
        """Blocks whose tokens are scored for a budget."""
        needed = -(-size // self.block)
        return max(self.blocks, needed) if isinstance(needed, int) else needed.clamp(min=self.blocks)

    def select(self, step) -> Selection:
        if step.decode:
            return All() if step.most(self.budget) >= step.T else self._decode(step)
        size = tokens_of(self.budget, step.L)
        if not is_whole_prompt(step, size):
            return All()
        q = step.q[0].unflatten(0, (step.G, -1))  # KV heads as a batch of indexers
        how = {"block": self.block, "blocks": self._searched(size), "relu": False, "size": self.query_block}
        return Lists(index_two_stage(q, None, step.k_new[0], size, **how)[None], self.query_block)

    def _decode(self, step) -> Tokens:
        most, pages = step.most(self.budget), -(-step.T // self.block)
        mean = step.store.pooled("kmean", self.block).to(step.q.dtype)
        coarse = (step.group(step.q, "sum") @ mean.mT)[:, :, 0].float()  # [batch, kv_heads, pages]
        past, index = step.past, torch.arange(pages, device=step.device)
        past = past if isinstance(past, int) else past[..., None]
        newest = past // self.block
        coarse = coarse.masked_fill((index == 0) | (index == newest), float("inf")).masked_fill(
            index > newest, float("-inf")
        )
        chosen = self._best(coarse, min(pages, self._searched(most)), self._searched(step.budget(self.budget)))
        slots = chosen[..., None] * self.block + torch.arange(self.block, device=step.device)
        slots = slots.where(chosen[..., None] >= 0, -1).flatten(2)
        slots = slots.where(slots < past, -1)  # the step's own key is read anyway
        exact = step.group(logits_at(step, slots), "sum")
        best = self._best(exact, max(1, most - 1), step.budget(self.budget, least=2) - 1)
        return Tokens(slots.gather(2, best.clamp(min=0)).where(best >= 0, -1))

    @staticmethod
    def _best(score: Tensor, k: int, allowed: int | Tensor) -> Tensor:
        """The k best of each row [batch, kv_heads, n], or as many as each sequence is allowed: [batch, kv_heads, k], -1 for none."""
        count = None if isinstance(allowed, int) else allowed.expand(score.shape[:2]).flatten()
        return (
            top_slots(score.flatten(0, 1), min(k, allowed) if count is None else k, count=count)
            .long()
            .unflatten(0, score.shape[:2])
        )
