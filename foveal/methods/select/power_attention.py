"""PowerAttention: blocks at distances that are powers of two, so that what a layer can reach doubles with every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import Method, check_count, method
from ...selection import All, Blocks, Selection, Tokens
from ...verify import Claim

PERIOD = 7
"""Layers of which `full` stay dense (paper: 2 of every 7 for hard retrieval)."""


def kept(distance: Tensor, key_block: Tensor, window: int) -> Tensor:
    """Whether a block is read by queries `distance` blocks after it: the first block, the window, and powers of two."""
    power = (distance & (distance - 1)) == 0
    return (distance >= 0) & ((key_block == 0) | (distance < window) | power)


@dataclass(frozen=True)
class PowerBlocks(Selection):
    """The pattern by token ids, for queries that begin anywhere."""

    block: int
    window: int

    def mask(self, step, start: int, stop: int) -> Tensor:
        query, key = step.q_token[:, None, start:stop, None] // self.block, step.token[:, :, None] // self.block
        return kept((query - key).int(), key, self.window)


@method(
    "power-attention",
    paper="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention (2025) [117]",
    claim=Claim(
        "After brief training 5 to 40 % better than windows at equal sparsity, since d layers reach 2^d blocks; 128k tokens 3.0x faster.",
        number="passkey and RULER: 5 to 40 % better; information carried over hops 56 % of the time before the training, 100 % after",
        untestable="it is about models trained with the pattern; a dense one has not learnt to pass information on in hops",
    ),
)
@dataclass(frozen=True)
class PowerAttention(Method):
    """Queries read the first block, the newest `window` blocks, their own included, and the blocks at distances 1, 2, 4, 8 ..; all heads
    alike, in prefill and decode. Nothing is dropped: every block comes back at some distance. (Paper: blocks of 256, window of 5.)

    full: of every 7 layers so many stay dense (paper: 0, or 2 where text must be found again word for word). A model that was
    not trained with this pattern has not learned to pass information on through the hops.
    """

    block: int = 256
    window: int = 5
    full: int = 0

    neutral = {"window": 1000, "block": 16}
    example = {"window": 1, "block": 4}

    def __post_init__(self) -> None:
        check_count("block", self.block, 1)
        check_count("window", self.window, 1)
        check_count("full", self.full)
        if self.full > PERIOD:
            raise InputError(f"full = {self.full}: expected at most {PERIOD}, the layers of one period")

    def where(self, model) -> tuple[int, ...]:
        return tuple(i for n, i in enumerate(model.layers) if n % PERIOD >= self.full)

    def select(self, step) -> Selection:
        if self.window * self.block >= step.T and step.whole:
            return All()
        if step.decode and step.whole:
            return self._decode(step)
        if step.T != step.L or step.decode:
            return PowerBlocks(self.block, self.window)
        index = torch.arange(-(-step.L // self.block), device=step.device)
        pattern = kept(index[:, None] - index, index, self.window)
        return Blocks(pattern.expand(1, step.H, -1, -1), self.block)

    def _decode(self, step) -> Tokens:
        own = step.pass_.counts[0] // self.block
        powers = {own - 2**i for i in range(own.bit_length())}
        blocks = sorted({0} | set(range(max(0, own - self.window + 1), own + 1)) | {b for b in powers if b >= 0})
        starts = torch.tensor(blocks).to(step.device, non_blocking=True) * self.block
        return Tokens(starts.expand(step.q.shape[0], step.G, -1), self.block)
