"""HiP: find the best keys by halving groups of keys, so that only a logarithm of them is ever scored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, method, tokens_of
from ...ops.tree import REPRESENTATIVES, block_tokens, halve, searched_blocks, tree_search
from ...selection import All, Lists, Selection, Tokens
from ...verify import Claim, StaysNear
from .block_maps import is_whole_prompt
from .lists import in_order, logits_at, tokens_seen, whole


@method(
    "hip",
    paper="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning (2024) [47]",
    claim=Claim(
        "Prompts in O(T log T) and decode attention up to 36.9x faster than dense at long context, at little loss and without training.",
        number="Llama 2 and 3.1, Qwen 1.5: decode attention up to 36.9 times as fast as FlashAttention; quality near dense",
        experiments=(
            StaysNear("hip(budget=0.25, sink=4, recent=32)", "needle", within=0.1),
            StaysNear("hip(budget=0.25, sink=4, recent=32)", "perplexity", within=0.1),
        ),
        setting="a quarter of 1,024 tokens, sinks and window scaled; accuracy alone",
    ),
)
@dataclass(frozen=True)
class HiP(Method):
    """Queries read the `sink` first tokens, the newest `recent` and the best of the rest as a binary search finds them, `budget` in all.

    The search serves a run of `query_block` queries of a prompt, or one query in decode. It begins with as many equal groups of keys
    as blocks of `key_block` keys are wanted, halves each, scores each half by the largest logit of its `representative` block ("first",
    "middle" or "random"), keeps the best halves, and so on until groups are single blocks. The first `dense` layers are dense.

    Defaults are those of the released version 1 (512 keys found, window 128, blocks of 32 queries and 2 keys, 3 dense layers), its sinks
    16; a budget too small for both ends still finds one block. stride: of the queries of a block every so many are scored.
    One list serves the query heads of a KV head, by the largest logit among them, which the paper has as an option; it keeps one per
    query head. The search begins anew for every token (the paper may keep a list for some steps), and positions stay the model's own
    (its extension of the context is not included). A text that goes on after the prompt is dense.
    """

    budget: Budget = 656
    sink: int = 16
    recent: int = 128
    query_block: int = 32
    key_block: int = 2
    representative: str = "first"
    stride: int = 1
    dense: int = 3

    needs = frozenset({"whole_prompt"})
    example = {"budget": 0.3, "sink": 2, "recent": 4, "query_block": 8, "dense": 1}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("sink", self.sink)
        check_count("dense", self.dense)
        for name in ("recent", "query_block", "key_block", "stride"):
            check_count(name, getattr(self, name), 1)
        if self.representative not in REPRESENTATIVES:
            raise InputError(f"representative = {self.representative!r}: expected one of {', '.join(REPRESENTATIVES)}")

    def where(self, model) -> tuple[int, ...]:
        return model.layers[self.dense :]

    def select(self, step) -> Selection:
        if step.decode:
            return All() if step.most(self.budget) >= step.T else self._decode(step)
        size = tokens_of(self.budget, step.L)
        return self._prompt(step, size) if is_whole_prompt(step, size) else All()

    @property
    def _layout(self) -> tuple[int, int, int]:
        return self.key_block, self.sink, self.recent

    def _wanted(self, size: int | Tensor) -> int | Tensor:
        """Blocks to be found for a budget."""
        rest = (size - self.sink - self.recent) // self.key_block
        return max(1, rest) if isinstance(rest, int) else rest.clamp(min=1)

    # ------------------------------------------------------------------ prompt

    def _prompt(self, step, size: int) -> Lists:
        found = tree_search(
            step.q, step.k_new, self._wanted(size), query_block=self.query_block, key_block=self.key_block, sink=self.sink,
            recent=self.recent, representative=self.representative, stride=self.stride,
        )  # fmt: skip
        whole = {"dtype": torch.int32, "device": step.device}
        first = torch.arange(0, step.L, self.query_block, **whole)  # of each run, its first query
        window = first[:, None] + torch.arange(1 - self.recent, self.query_block, **whole)
        window = window.masked_fill((window < self.sink) | (window >= step.L), -1)
        sinks = torch.arange(self.sink, **whole).expand(len(first), -1)
        sinks, window = (x.expand(1, step.G, -1, -1) for x in (sinks, window))
        return Lists(torch.cat([sinks, found, window], 3), self.query_block)

    # ------------------------------------------------------------------ decode

    def _decode(self, step) -> Tokens:
        own = step.q_token[:, :1]  # [batch, 1]
        count = searched_blocks(own, *self._layout).expand(-1, step.G)
        wanted = self._wanted(step.budget(self.budget))
        horizon = step.T if whole(step) else tokens_seen(step.pass_)
        width = self._wanted(step.most(self.budget))

        def score(blocks: Tensor) -> Tensor:
            best = step.group(logits_at(step, self._slots(step, block_tokens(blocks, own, *self._layout))), "max")
            return best.unflatten(-1, (-1, self.key_block)).amax(-1)

        if isinstance(wanted, Tensor):
            wanted = wanted.expand(-1, step.G)
        found = halve(count, wanted, width, -(-horizon // self.key_block), score, self.representative)
        sinks = torch.arange(self.sink, device=step.device).expand(own.shape[0], -1)
        window = own - torch.arange(self.recent - 1, 0, -1, device=step.device)
        ends = torch.cat([sinks.masked_fill(sinks >= own, -1), window.masked_fill(window < self.sink, -1)], 1)
        ids = torch.cat([block_tokens(found, own, *self._layout), ends[:, None].expand(-1, step.G, -1)], 2)
        return Tokens(self._slots(step, ids))

    def _slots(self, step, ids: Tensor) -> Tensor:
        """Slots of token ids [batch, kv_heads, m], -1 where a row does not hold the token."""
        return ids if in_order(step) else step.store.find(ids).where(ids >= 0, -1)
