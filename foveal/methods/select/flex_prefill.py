"""FlexPrefill: each head of each prompt decides how sparse it is, and whether pooled queries can tell where to look."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Method, check_count, check_range, method
from ...ops.scores import pooled_scores, window_scores
from ...selection import All, Blocks, Selection
from ...verify import Beats, Claim, StaysNear
from .block_maps import block_sums, is_whole_prompt, vertical_slash


@method(
    "flex-prefill",
    paper="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference (2025) [107]",
    claim=Claim(
        "At or above MInference on RULER and InfiniteBench, with attention of 128k tokens 2.4x to 3.5x faster than dense.",
        number="Llama 3.1 8B: at or above MInference; attention of 128k tokens 2.4 times (gamma 0.95) to 3.5 times (0.9) as fast as dense",
        experiments=(
            StaysNear("flex-prefill(least=64, block=16)", "needle", within=0.1, n=16, query_aware=True),
            Beats(
                *("flex-prefill(least=64, block=16)", "minference(budget=0.25, block=16)", "needle"),
                by=0.0,
                n=16,
                query_aware=True,
            ),
        ),
        setting="blocks and floor scaled to 1,024 tokens, the question in the prompt; both keep all keys, and how much of the prompt each "
        "reads is not equalised",
    ),
)
@dataclass(frozen=True)
class FlexPrefill(Method):
    """While a prompt is read, the exact weights of its last `block` queries give each query head the key blocks (vertical) and the
    diagonals of blocks (slash) that it reads, as many as hold a share `gamma` of the weights but at least `least` tokens of each.

    A head whose pooled attention foretells these weights (Jensen-Shannon distance below `tau`) takes the least of both and adds the
    best cells of its pooled map, as many as hold `gamma` of it. The first key block and the main diagonal are always read.
    Defaults are the paper's (section 4). Decode, a continued text and prompts up to max(2 blocks, `least`) are dense. As pooled queries
    look at whole blocks, what a query reads depends on later queries of its block (values stay causal).
    """

    gamma: float = 0.9
    tau: float = 0.1
    least: int = 512
    block: int = 128

    needs = frozenset({"whole_prompt"})
    neutral = {"gamma": 1.0}
    example = {"gamma": 0.5, "tau": 0.07, "least": 8, "block": 8}

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0, 1)
        check_range("tau", self.tau, 0, 1)
        check_count("least", self.least, 1)
        check_count("block", self.block, 1)
        if self.gamma == 0:
            raise InputError("gamma = 0: expected a share of the attention above 0 and up to 1")

    def select(self, step) -> Selection:
        b = self.block
        if self.gamma == 1 or not is_whole_prompt(step, max(2 * b, self.least)):
            return All()
        vertical, slash = window_scores(step.q, step.k_new, b, scale=step.scale, softcap=step.logit.softcap)
        vertical, slash = vertical / b, slash / b
        columns, diagonals = block_sums(vertical, b), block_sums(slash, b)
        aware = self._is_foretold(step, columns)
        floor = -(-self.least // b)
        counts = [torch.where(aware, floor, self._blocks_needed(x, floor)) for x in (vertical, slash)]
        columns[..., 0] = diagonals[..., 0] = float("inf")
        chosen = vertical_slash(columns, counts[0], diagonals, counts[1])
        return Blocks(chosen | self._best_cells(step) & aware[..., None, None], b)

    def _blocks_needed(self, mass: Tensor, floor: int) -> Tensor:
        """How many blocks the fewest tokens (or distances) that hold gamma of mass [batch, heads, tokens] would fill."""
        held = mass.sort(-1, descending=True).values.double().cumsum(-1)
        tokens = (held < self.gamma).sum(-1) + 1
        return (tokens.clamp(max=mass.shape[-1]) // self.block + 1).clamp(min=floor)

    def _is_foretold(self, step, weights: Tensor) -> Tensor:
        """Heads whose pooled attention of the last queries is near their weights [batch, heads, blocks]: bool [batch, heads]."""
        last = step.q[:, :, -self.block :]
        pooled = pooled_scores(last, step.k_new, self.block, self.block, scale=step.scale, causal=False)[:, :, 0]
        p, q = pooled.softmax(-1).double(), weights.double()
        middle = (p + q) / 2
        divergence = sum((torch.special.xlogy(x, x) - torch.special.xlogy(x, middle)).sum(-1) for x in (p, q)) / 2
        return divergence.clamp(min=0).sqrt() < self.tau

    def _best_cells(self, step) -> Tensor:
        """The largest cells of the pooled map that together hold at most gamma of it, bool [batch, heads, blocks, blocks]."""
        pooled = pooled_scores(step.q, step.k_new, self.block, self.block, scale=step.scale).softmax(-1)
        cells, order = pooled.flatten(2).sort(-1, descending=True)
        inside = cells.double().cumsum(-1) <= self.gamma * pooled.shape[2]
        return torch.zeros_like(inside).scatter_(2, order, inside & (cells > 0)).view_as(pooled)
