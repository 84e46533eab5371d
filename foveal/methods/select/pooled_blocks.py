"""Pooled block top-k: of a long prompt, each block of queries reads the key blocks whose mean key fits its mean query best."""

from dataclasses import dataclass

import torch

from ...method import Budget, Method, check_budget, check_count, method, tokens_of
from ...ops.scores import pooled_scores
from ...ops.top import top_blocks
from ...selection import All, Blocks, Selection
from ...verify import Claim, StaysNear
from .block_maps import is_whole_prompt


@method(
    "pooled-blocks",
    paper="Top-k over mean-pooled blocks: the plain baseline of sparse prefill",
    claim=Claim(
        "Mean query and mean key of a block tell well enough which blocks matter.",
        number="a baseline: no paper",
        experiments=(
            StaysNear("pooled-blocks(budget=0.25, block=32)", "needle", within=0.1),
            StaysNear("pooled-blocks(budget=0.25, block=32)", "perplexity", within=0.1),
        ),
        setting="blocks scaled to the text",
    ),
)
@dataclass(frozen=True)
class PooledBlocks(Method):
    """While a prompt is read, each block of `block` queries reads `budget` keys in whole blocks: of those its last query sees, the ones
    with the largest product of mean query and mean key, among them always the first block and its own. Each query head chooses for
    itself. Decode, a continued text and prompts of two blocks or less are dense.

    The mean query is that of the whole block, so what a query reads depends on later queries of its block (values stay causal).
    """

    budget: Budget = 0.25
    block: int = 64

    needs = frozenset({"whole_prompt"})
    example = {"budget": 0.4, "block": 8}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("block", self.block, 1)

    def select(self, step) -> Selection:
        if not is_whole_prompt(step, 2 * self.block):
            return All()
        ends = range(self.block, step.L + self.block, self.block)
        k = [-(-tokens_of(self.budget, min(n, step.L)) // self.block) for n in ends]
        scores = pooled_scores(step.q, step.k_new, self.block, self.block, scale=step.scale)
        counts = torch.tensor(k).to(step.device, non_blocking=True)
        return Blocks(top_blocks(scores, k=counts, size=self.block, keep_first=1), self.block)
