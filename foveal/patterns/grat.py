"""GRAT (Ren et al., 2025): tokens of an image or video in cuboid groups, each group reading whole groups of a fixed region.

All queries of a group share their keys, so the pattern is exactly one of blocks: GRAT-X reads the groups of its own row, column and
frame (criss-cross), GRAT-B those around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.errors import InputError

from .blocks import TokenBlocks, attend_grid, fit_tile, tile_blocks

GROUPS = {2: (16, 16), 3: (4, 8, 8)}
"""256 tokens: HunyuanVideo's group in the paper, and for images a square of as many (reconstructed)."""


def group_blocks(grid: Sequence[int], group: Sequence[int] | None = None, device="cpu") -> TokenBlocks:
    """The groups of a grid of 2 or 3 axes; `GROUPS` unless given. Raises `InputError` for groups longer than an axis."""
    return tile_blocks(grid, fit_tile(grid, group, GROUPS), device)


def criss_cross(blocks: TokenBlocks) -> Tensor:
    """GRAT-X: a group reads those that share one coordinate with it, bool `[groups, groups]` (row or column; in space three slabs)."""
    at = blocks.coordinates
    return (at[:, None] == at[None]).any(-1)


def surrounding(blocks: TokenBlocks, radius: int | Sequence[int] = 1) -> Tensor:
    """GRAT-B: a group reads those up to `radius` groups away along every axis, bool `[groups, groups]`.

    At a border the region is shifted inwards, so that every group reads equally many; an axis with fewer groups is read as a whole.
    `radius`: one number or one for each axis (1: reconstructed). Raises `InputError` for others than whole numbers from 0.
    """
    axes = len(blocks.counts)
    radius = tuple(radius) if isinstance(radius, Sequence) else (radius,) * axes
    if len(radius) != axes or any(not isinstance(r, int) or r < 0 for r in radius):
        raise InputError(
            f"expected a whole radius from 0 for each of {axes} axes, got {radius}; give one number or {axes}"
        )
    at, near = blocks.coordinates, []
    for axis, (count, r) in enumerate(zip(blocks.counts, radius, strict=True)):
        centre = at[:, axis].clamp(min(r, count - 1), max(count - 1 - r, 0)) if 2 * r + 1 < count else at[:, axis]
        reach = r if 2 * r + 1 < count else count
        near.append((at[:, axis][None] - centre[:, None]).abs() <= reach)
    return torch.stack(near).all(0)


def grat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    *,
    region: str = "cross",
    radius: int | Sequence[int] = 1,
    group: Sequence[int] | None = None,
    text: int = 0,
    text_keys: int | Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of an image or video and the `text` tokens after it, over "cross" (GRAT-X) or "around" (GRAT-B) regions of groups.

    Grid queries see all real text keys, text queries see everything; `text_keys`: how many text keys are real, a number or `[batch]`.
    Returns (out, lse) in the order of q. Raises `InputError` for other regions and for grids, groups or lengths that do not fit.
    """
    if region not in ("cross", "around"):
        raise InputError(f"expected region to be 'cross' or 'around', got '{region}'; choose one")
    blocks = group_blocks(grid, group, q.device)
    groups = criss_cross(blocks) if region == "cross" else surrounding(blocks, radius)
    return attend_grid(q, k, v, blocks, groups, text=text, text_keys=text_keys, scale=scale)
