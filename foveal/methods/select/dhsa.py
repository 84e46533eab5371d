"""DHSA: a prompt is cut into chunks where its content changes, and blocks of queries read the tokens of the chunks that fit them best."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Budget, Method, check_budget, check_count, method, tokens_of
from ...ops.top import top_slots
from ...selection import All, Lists, Selection
from ...verify import Beats, Claim, StaysNear
from .block_maps import is_whole_prompt
from .boundaries import BoundaryPredictor, best_starts, gap_scores
from .learned import learned_for, load_into

KINDS = ("predicted", "even")
KEPT = 1 << 22  # blocks times tokens, up to which what they may and must read is kept for the next layer


@method(
    "dhsa",
    paper="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs (2025) [31]",
    claim=Claim(
        "Near dense on needles and LongBench, 6 to 18 % better than block-sparse attention at equal cost, with 20 to 60 % less latency.",
        number="Gemma 2 2B and 3 1B: needles and LongBench as dense, 6 to 18 % over block-sparse; 8k tokens in 1.19 s, not 1.65",
        experiments=(
            StaysNear("dhsa(budget=0.25, block=32, local=32, first=32)", "needle", within=0.05, n=16, query_aware=True),
            Beats(
                *("dhsa(budget=0.25, block=32, local=32, first=32)", "pooled-blocks(budget=0.25, block=32)", "needle"),
                by=0.06,
                n=16,
                query_aware=True,
            ),
        ),
        setting="a quarter of 1,024 tokens, blocks scaled to the text, the question in the prompt; a predictor for the default model",
    ),
)
@dataclass(frozen=True)
class Dhsa(Method):
    """While a prompt is read, each run of `block` queries reads `budget` tokens, the same for all heads: the `first`, the newest `local` up
    to the end of the run, and the tokens of the best chunks. The prompt's `last` queries, its instruction, are dense; so is decode.

    A chunk's score is the product of the run's queries and the chunk's keys, each a mean times the root of its length, averaged over
    heads (the released code averages queries and keys over heads first, and multiplies these); so a long chunk counts more than a short
    one, but less than in proportion. There are `chunks` of them for each block.
    Defaults are the paper's (2,048 tokens, blocks of 128, 8 chunks a block, first and local 128, last 64).

    boundaries: "predicted", at the best gaps at least `distance` apart, which a network finds that learned from this model's own
    attention, `python -m foveal.methods.select.dhsa_train`, in each layer from its keys; "even", all chunks alike, the control.
    share: the first layer's chunks serve all. predictor: a file of the training instead of what ships or the user's own.
    A budget smaller than `first` + `local` reads these. As a run's queries are pooled, what a query reads depends on later ones of its run.
    The later version of the method without a predictor is not included.
    """

    budget: Budget = 2048
    block: int = 128
    chunks: int = 8
    distance: int = 8
    first: int = 128
    local: int = 128
    last: int = 64
    boundaries: str = "predicted"
    share: bool = False
    predictor: str | None = None

    needs = frozenset({"whole_prompt"})
    neutral = {"budget": 1.0, "boundaries": "even"}
    example = {"budget": 0.4, "block": 8, "chunks": 2, "first": 2, "local": 8, "last": 4, "boundaries": "even"}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name in ("block", "chunks", "distance", "local"):
            check_count(name, getattr(self, name), 1)
        check_count("first", self.first)
        check_count("last", self.last)
        if self.local < self.block:
            raise InputError(
                f"local = {self.local}: expected at least the block, {self.block}, so that queries see themselves"
            )
        if self.chunks > self.block:
            raise InputError(f"chunks = {self.chunks}: expected at most the block, {self.block}")
        if self.boundaries not in KINDS:
            raise InputError(f"boundaries = {self.boundaries!r}: expected one of {', '.join(KINDS)}")

    def setup(self, model) -> BoundaryPredictor | None:
        if self.boundaries != "predicted":
            return None
        _ = model.rope  # raises now where keys have no positions to be taken off
        found = learned_for(model.model, "dhsa", self.predictor)
        predictor = BoundaryPredictor(model.kv_heads * model.head_dim, found.settings["window"])
        return load_into(predictor, found.weights).to(model.model.device, model.model.dtype)

    def select(self, step) -> Selection:
        size = max(tokens_of(self.budget, step.L), self.first + self.local) if not step.decode else 0
        if not is_whole_prompt(step, size):
            return All()
        chunk = self.starts(step).cumsum(0) - 1  # of each token
        slots = torch.cat([self._lists(step, rows, a, size) for a, rows in self._scores(step, chunk)])
        return Lists(slots.expand(1, step.G, -1, -1), self.block, min(self.last, step.L))

    def starts(self, step) -> Tensor:
        """Where chunks begin, bool [tokens]: at the boundaries, at 0 and where the instruction begins."""
        if self.share and "dhsa" in step.state:
            return step.state["dhsa"]
        if self.boundaries == "even":
            starts = torch.arange(step.L, device=step.device) % (self.block // self.chunks) == 0
        else:
            position = step.q_token[:, None].expand(-1, step.G, -1)
            keys = step.model.rope.unrotate(step.k_new, position, step.layer)[0].transpose(0, 1).flatten(1)
            starts = best_starts(gap_scores(step.plan, keys), self._count(step.L), self.distance)
        step.state["dhsa"] = starts = starts | step.once(("dhsa.always", self.last, step.L), lambda: self._always(step))
        return starts

    def _always(self, step) -> Tensor:
        index = torch.arange(step.L, device=step.device)
        return (index == 0) | (index == step.L - self.last)

    def _count(self, length: int) -> int:
        return max(1, self.chunks * length // self.block)

    def _scores(self, step, chunk: Tensor):
        """(first row, scores of query blocks and tokens [rows, tokens]), a few rows at a time."""
        most = -(-step.L // (self.block // self.chunks)) if self.boundaries == "even" else self._count(step.L)
        width = most + 2  # and those at the start and at the instruction
        keys = step.k_new[0].float()
        sums = keys.new_zeros(step.G, width, keys.shape[2]).index_add_(1, chunk, keys)
        length = keys.new_zeros(width).index_add_(0, chunk, torch.ones_like(chunk, dtype=keys.dtype))
        sums = (sums / length.clamp(min=1).sqrt()[:, None]).transpose(0, 1).flatten(1)  # [chunks, kv_heads * head_dim]
        q = step.group(step.q, "sum")[0].float()
        pad = -step.L % self.block
        q = torch.nn.functional.pad(q, (0, 0, 0, pad)).unflatten(1, (-1, self.block)).sum(2)
        root = step.once(("dhsa.root", self.block, step.L), lambda: self._root(q, pad))
        q = (q / root[:, None]).transpose(0, 1).flatten(1) / step.H
        few = max(1, (1 << 22 if step.device.type == "cpu" else 1 << 27) // step.L)
        for a in range(0, q.shape[0], few):
            yield a, (q[a : a + few] @ sums.mT)[:, chunk]

    def _root(self, q: Tensor, pad: int) -> Tensor:
        """The root of how many queries each run has."""
        rows = torch.full((q.shape[1],), self.block, device=q.device)
        rows[-1] = self.block - pad
        return rows.sqrt()

    def _lists(self, step, scores: Tensor, a: int, size: int) -> Tensor:
        """The tokens each query block reads, [rows, size], ascending."""
        make, whole = lambda: self._reach(step, a, len(scores)), len(scores) * self.block >= step.L
        later, forced = step.once(("dhsa.reach", self, step.L), make) if whole and scores.numel() <= KEPT else make()
        return top_slots(scores.masked_fill(later, -torch.inf), size, forced)

    def _reach(self, step, a: int, rows: int) -> tuple[Tensor, Tensor]:
        """What blocks of queries must not and what they must read, both bool [rows, tokens]."""
        token = torch.arange(step.L, device=step.device)
        end = (torch.arange(a, a + rows, device=step.device)[:, None] + 1) * self.block
        end = end.clamp(max=step.L)
        later = token >= end
        return later, ((token < self.first) | (token >= end - self.local)) & ~later
