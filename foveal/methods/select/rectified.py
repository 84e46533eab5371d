"""Rectified sparse attention: what a choice of blocks left out is estimated from pooled queries and keys, and given back as means."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Method, check_count, check_range, method
from ...ops import pool_blocks
from ...ops.dense import spread, wide
from ...ops.ragged import logits
from ...patterns.rectified import passing, pooling_helps
from ...selection import All, Blocks, Selection
from ...verify import Claim
from .block_maps import is_whole_prompt


@method(
    "rectified",
    paper="Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video Generation (2025) [72]",
    claim=Claim(
        "Video is generated up to 3.33x faster, with less error than the chosen blocks alone leave.",
        number="HunyuanVideo at 720p 3.33 times as fast, Wan 2.1 2.08 times, FLUX at 4,096 x 4,096 1.6 times",
        untestable="it is about diffusion models, which attend both ways (`foveal.patterns.rectified`); the causal form is ours",
    ),
)
@dataclass(frozen=True)
class Rectified(Method):
    """While a prompt is read, blocks that were left out come back as their mean value, by the weight that their mean key has for the mean
    query, where pooling promises to help more than it hurts; what was read counts for so much less. Decode is dense.

    It corrects any choice of blocks on its left: xattention | rectified. Alone it makes the paper's choice: blocks of `block` keys
    until their estimated weight passes `mass`, at least the share 1 - `drop` of those before a query, the first block and its own
    (paper: 128, 0.3, and 0.75 to 0.9). Prompts of two blocks or less are dense.

    The paper corrects attention without an order, and estimates the weight of what was read by pooling too. This form is ours: what was
    read has its exact weight, by the log-sum-exp, for a text's first keys draw more than the mean of their block tells; blocks after
    a query never come back. As queries are pooled, weights depend on later queries of a block, values never do. The estimate knows
    nothing of biases that other methods add. What is not a choice of blocks is refused.
    """

    drop: float = 0.8
    mass: float = 0.3
    block: int = 128

    needs = frozenset({"whole_prompt", "lse"})
    neutral = {"drop": 0.0}
    example = {"block": 4}

    def __post_init__(self) -> None:
        check_range("drop", self.drop, 0, 1)
        check_range("mass", self.mass, 0, 1)
        check_count("block", self.block, 1)

    def select(self, step) -> Selection:
        if self.drop == 0 or not isinstance(step.visible, All) or not is_whole_prompt(step, 2 * self.block):
            return All()
        z, tokens = _pooled(step, self.block)
        index = torch.arange(len(tokens), device=step.device)
        before = index <= index[:, None]
        share = (z + tokens.log()).masked_fill(~before, -torch.inf).softmax(-1)
        least = ((1 - self.drop) * (index + 1) + 1e-6).long().clamp(min=1)
        chosen = passing(share, self.mass, least)
        return Blocks(chosen & before | (index == 0) & before | (index == index[:, None]), self.block)

    def mix(self, step, out: Tensor) -> Tensor:
        if isinstance(step.visible, All) or not is_whole_prompt(step, 0):
            return out
        if not isinstance(step.visible, Blocks):
            raise InputError(
                f"'rectified' corrects a choice of blocks, but a method beside it chose {type(step.visible).__name__.lower()}: "
                "put it to the right of one that chooses blocks, like xattention"
            )
        return corrected(step, out, step.visible.map, step.visible.size)


def _pooled(step, size: int) -> tuple[Tensor, Tensor]:
    """(logits of mean queries and keys of blocks [1, heads, blocks, blocks], tokens of each block)."""
    q, k = (pool_blocks(x, size).to(wide(x.dtype)) for x in (step.q, step.k_new))
    z = logits(q[0], spread(k, step.H)[0], step.logit)[None]
    return z, (step.L - torch.arange(z.shape[3], device=step.device) * size).clamp(max=size).to(z.dtype)


def corrected(step, out: Tensor, chosen: Tensor, size: int) -> Tensor:
    """Outputs [1, heads, length, value_dim] over the `chosen` blocks of `size` tokens, bool [1, heads or 1, blocks, blocks], rectified.

    A weight is exact where keys were read, so that sinks and a query's own block count for what they are, and pooled where blocks return.
    """
    z, tokens = _pooled(step, size)
    index, home = torch.arange(len(tokens), device=step.device), torch.arange(step.L, device=step.device) // size
    helps = pooling_helps(step.q, step.k_new, lambda x: pool_blocks(x, size), lambda mean: mean[:, :, home])
    back = (index < index[:, None]) & ~chosen & helps
    z = (z + tokens.log()).masked_fill(~back, -torch.inf)
    most = z.amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    weight = (z - most).exp()  # of what comes back, by block of queries
    values = (
        weight
        @ spread(pool_blocks(step.v_new, size).to(weight.dtype), step.H)
        / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    )
    returned = (most[..., 0] + weight.sum(-1).log())[:, :, home]
    kept = torch.sigmoid(step.stats["lse"].to(returned.dtype) - returned)[..., None]
    return (kept * out + (1 - kept) * values[:, :, home]).to(out.dtype)
