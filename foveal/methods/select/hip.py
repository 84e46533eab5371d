"""HiP: find the best keys by halving groups of keys, so that only a logarithm of them is ever scored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...edits import Plane
from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, method, tokens_of
from ...ops.tree import REPRESENTATIVES, block_tokens, halve, searched_blocks, tree_search
from ...selection import All, Lists, Selection, Tokens
from ...verify import Claim, StaysNear
from .block_maps import is_whole_prompt
from .lists import in_order, logits_at, slots_of_mask, tokens_seen


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
    query head. Positions stay the model's own (the paper's extension of the context is not included). A text that goes on after the
    prompt is dense.

    refresh: in decode, search at tokens whose number is a multiple of this (paper: its list is kept for some steps; InfiniteHiP, the
    later version with three stages, refreshes them every 32, 16 and 8 steps), and once by the last query of a prompt or a later
    text. Steps between read the sinks, the list as it was found, and all tokens from where the window of the latest such token
    began up to their own: the window grows until the next search, by `refresh` - 1 tokens beyond the budget at most, so that no
    token is out of reach because it left the window after the list was made. The list is a mark on its keys, a byte each.
    """

    budget: Budget = 656
    sink: int = 16
    recent: int = 128
    query_block: int = 32
    key_block: int = 2
    representative: str = "first"
    stride: int = 1
    dense: int = 3
    refresh: int = 1

    needs = frozenset({"whole_prompt"})
    example = {"budget": 0.3, "sink": 2, "recent": 4, "query_block": 8, "dense": 1}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("sink", self.sink)
        check_count("dense", self.dense)
        for name in ("recent", "query_block", "key_block", "stride", "refresh"):
            check_count(name, getattr(self, name), 1)
        if self.representative not in REPRESENTATIVES:
            raise InputError(f"representative = {self.representative!r}: expected one of {', '.join(REPRESENTATIVES)}")

    def where(self, model) -> tuple[int, ...]:
        return model.layers[self.dense :]

    @property
    def planes(self) -> dict[str, Plane]:
        return {} if self.refresh == 1 else {"hip": Plane(0, torch.bool)}

    def begin(self, pass_) -> bool:
        """Whether a list is made in this decode step: the others run fewer kernels."""
        return pass_.decode and self._due(pass_)

    def _due(self, pass_) -> bool:
        """Whether any sequence is due for a search."""
        return any((n + 1) % self.refresh == 0 for n in pass_.counts)

    def select(self, step) -> Selection:
        if self.refresh > 1 and not (step.decode and not self._due(step.pass_)):
            self._mark(step)  # also where all is read: a longer sequence may join, and then the list counts
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
        since = self._since(own)
        sinks = torch.arange(self.sink, device=step.device).expand(own.shape[0], -1)
        window = own - torch.arange(self.recent + self.refresh - 2, 0, -1, device=step.device)
        window = window.masked_fill((window < self.sink) | (window <= since - self.recent), -1)
        ends = torch.cat([sinks.masked_fill(sinks >= own, -1), window], 1)[:, None].expand(-1, step.G, -1)
        if self.refresh == 1:
            return Tokens(self._slots(step, torch.cat([self._search(step, own), ends], 2)))
        return Tokens(torch.cat([self._listed(step, since), self._slots(step, ends)], 2))

    def _since(self, token: Tensor) -> Tensor:
        """The newest token up to `token` whose number, its id and one, is a multiple of `refresh`."""
        return token - (token + 1) % self.refresh

    def _search(self, step, since: Tensor) -> Tensor:
        """Token ids [batch, kv_heads, m] found by the step's last query before the window of token `since` [batch, 1]; -1 for none."""
        count = searched_blocks(since, *self._layout).expand(-1, step.G)
        wanted = self._wanted(step.budget(self.budget))
        horizon = step.T if step.whole else tokens_seen(step.pass_)
        logits = None if step.decode else step.scores(step.q.detach(), start=step.L - 1)[:, :, 0]

        def score(blocks: Tensor) -> Tensor:
            slots = self._slots(step, block_tokens(blocks, since, *self._layout))
            z = logits_at(step, slots) if logits is None else _gathered(logits, step.per_head(slots))
            return step.group(z, "max").unflatten(-1, (-1, self.key_block)).amax(-1)

        if isinstance(wanted, Tensor):
            wanted = wanted.expand(-1, step.G)
        width = self._wanted(step.most(self.budget))
        found = halve(count, wanted, width, -(-horizon // self.key_block), score, self.representative)
        return block_tokens(found, since, *self._layout)

    def _mark(self, step) -> None:
        """Search, and mark what is found, in the sequences that are due; after a prompt or a later text in any case."""
        slots = self._slots(step, self._search(step, self._since(step.q_token[:, -1:])))
        marks = torch.zeros(*slots.shape[:2], step.T + 1, dtype=torch.bool, device=step.device)
        marks = marks.scatter_(2, slots.where(slots >= 0, step.T).long(), True)[..., : step.T]
        due = step.seen() % self.refresh == 0  # [batch] where sequences may differ
        if step.decode and isinstance(due, Tensor):
            marks = torch.where(due[:, None, None], marks, step.store.plane("hip"))
        step.store.set("hip", marks)

    def _listed(self, step, since: Tensor) -> Tensor:
        """Slots of the marked keys [batch, kv_heads, m], -1 for none."""
        most = self._wanted(step.most(self.budget)) * self.key_block
        slots = slots_of_mask(step.store.plane("hip"), min(most, step.T)).long()
        ids = slots if in_order(step) else step.token.gather(2, slots.clamp(min=0))
        # a cache that was cropped may have marks from a later search, which the window now reads
        return slots.where(ids <= (since - self.recent)[..., None], -1)

    def _slots(self, step, ids: Tensor) -> Tensor:
        """Slots of token ids [batch, kv_heads, m], -1 where a row does not hold the token."""
        return ids if in_order(step) else step.store.find(ids).where(ids >= 0, -1)


def _gathered(logits: Tensor, slots: Tensor) -> Tensor:
    """Logits [batch, heads, T] at slots [batch, heads, m]; -inf for slot -1."""
    return logits.gather(2, slots.clamp(min=0)).masked_fill(slots < 0, float("-inf"))
