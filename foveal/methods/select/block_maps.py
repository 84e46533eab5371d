"""Maps of blocks over a whole prompt: what methods that choose blocks by estimate share."""

import torch
from torch import Tensor

from ...ops.top import largest


def is_whole_prompt(step, longer_than: int) -> bool:
    """A prompt read at once from its first token on, with more than so many tokens: what a map of blocks can be laid over."""
    return not step.decode and step.T == step.L > longer_than


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sums of x [..., tokens] over blocks of tokens, [..., blocks]."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def vertical_slash(vertical: Tensor, columns: Tensor | int, slash: Tensor, diagonals: Tensor | int) -> Tensor:
    """The best key blocks, read by every later query, and the best block diagonals: bool [batch, heads, blocks, blocks].

    vertical, slash: scores of key blocks and of block distances, [batch, heads, blocks]; +inf forces one. columns, diagonals: how many
    of each, a number or [batch, heads].
    """
    n = vertical.shape[-1]
    index = torch.arange(n, device=vertical.device)
    distance = index[:, None] - index
    chosen = largest(slash, diagonals)[..., distance.clamp(min=0)]
    return (largest(vertical, columns)[..., None, :] | chosen) & (distance >= 0)
