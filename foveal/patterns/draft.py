"""DraftAttention (Shen et al., 2025): a low-resolution attention map of a video chooses the patches that are read in full.

Queries and keys are averaged over patches of each frame; the softmax between patches is the draft. The largest entries of the whole
draft of a head, not of each row, say which patches see which, and tokens are reordered so that a patch is a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops import top_blocks
from foveal.ops.dense import spread

from .blocks import TokenBlocks, attend_grid, check_heads, check_text, tile_blocks

PATCH = (8, 16)
"""Rows and columns of a patch: 128 tokens, one block of the sparse kernel; the paper's."""


def patch_blocks(grid: Sequence[int], patch: Sequence[int] = PATCH, device="cpu") -> TokenBlocks:
    """Patches of each frame of a grid (frames, rows, columns) or of an image (rows, columns), in raster order of the patches.

    Raises `InputError` for other grids and for patches larger than a frame.
    """
    if len(grid) not in (2, 3) or len(patch) != 2:
        raise InputError(
            f"expected a grid of 2 or 3 axes and a patch of 2, got {tuple(grid)} and {tuple(patch)}; match them"
        )
    return tile_blocks(grid, (1,) * (len(grid) - 2) + tuple(patch), device)


@torch.no_grad()
def draft_scores(q: Tensor, k: Tensor, blocks: TokenBlocks, *, scale: float | None = None) -> Tensor:
    """The draft: softmax between mean queries and mean keys of the patches, `[batch, heads, patches, patches]`.

    Tokens after the grid (text) are left out; the mean of a patch cut by the border is over the tokens it has.
    """
    check_heads(q, k, k)
    grid, blocks = blocks.place.numel(), blocks.to(q.device)
    qp, kp = blocks.mean(q[:, :, :grid]), spread(blocks.mean(k[:, :, :grid]), q.shape[1])
    return (qp @ kp.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)


def draft_map(scores: Tensor, *, sparsity: float = 0.9, text: int = 0) -> Tensor:
    """The largest (1 - sparsity) of each head's whole draft: bool `[batch, heads, patches, patches]`.

    `sparsity`: 0.9 for HunyuanVideo and 0.75 for Wan 2.1 in the paper. A threshold over the whole map may leave a row without any
    patch: without text, which all rows read, each patch reads itself first; with text, such a row reads its best patch. Raises
    `InputError` for a sparsity outside 0 to 1.
    """
    if not 0 <= sparsity < 1:
        raise InputError(
            f"expected a sparsity from 0 and below 1, got {sparsity}; give the share of pairs to leave out"
        )
    count = max(1, round((1 - sparsity) * scores.shape[-1] * scores.shape[-2]))
    return top_blocks(scores, k=count, per="head", diagonal=not text, causal=False)


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    *,
    patch: Sequence[int] = PATCH,
    sparsity: float = 0.9,
    text: int = 0,
    text_keys: int | Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a video (frames, rows, columns) and the `text` tokens after it, over the patches that the draft chooses.

    Text sees all and is seen by all; `text_keys` as in `attend_grid`. Where each layer or step is to be dense, call with sparsity 0.
    Returns (out, lse) `[batch, heads, length, ...]` in the order of q. Raises `InputError` for lengths, patches or a sparsity that
    do not fit.
    """
    check_heads(q, k, v)
    blocks = patch_blocks(grid, patch, q.device)
    check_text(q, k, blocks, text, text_keys)
    chosen = draft_map(draft_scores(q, k, blocks, scale=scale), sparsity=sparsity, text=text)
    return attend_grid(q, k, v, blocks, chosen, text=text, text_keys=text_keys, scale=scale)
