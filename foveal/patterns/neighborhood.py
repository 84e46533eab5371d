"""Generalized Neighborhood Attention (Hassani et al., 2025): windows on grids of one to three axes, and what speed they can reach.

Along each axis a query sees a window of keys. With a stride, neighbouring queries share the window of their leader, so that whole
tiles of queries see whole tiles of keys; stride = window is blocked attention, stride 1 a sliding window. A dilation d splits the
axis into d interleaved groups that see only themselves. A key is seen if every axis sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops import attend_boxes, merge
from foveal.ops.boxes import Boxes

from .blocks import TokenBlocks, attend_map, check_heads, fit_tile, tile_blocks

TILES = {1: (128,), 2: (8, 16), 3: (2, 8, 8)}
"""128 tokens, as compact as the grid allows, as in the paper's token permutation."""


@dataclass(frozen=True)
class Neighborhood:
    """A pattern on a grid of `shape`; every other field is one number for all axes or one for each.

    window: keys seen along an axis. stride: queries that share a window, 1 to window. dilation: step between the keys of a window,
    window * dilation <= axis. causal: the axis has an order, and later keys are hidden. Windows at a border are shifted, not cut, so
    that without causality each query sees exactly prod(window) keys; even windows reach one further to the left.
    Raises `InputError` for values beyond the axes.
    """

    shape: tuple[int, ...]
    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, Sequence) else (self.shape,)
        axes = len(shape)
        if not 1 <= axes <= 3 or any(type(n) is not int or n < 1 for n in shape):
            raise InputError(
                f"expected a grid of 1 to 3 axes with tokens, got {self.shape}; give the length of each axis"
            )
        object.__setattr__(self, "shape", shape)
        for name in ("window", "stride", "dilation", "causal"):
            value, kind = getattr(self, name), bool if name == "causal" else int
            value = tuple(value) if isinstance(value, Sequence) else (value,) * axes
            if len(value) != axes or any(type(x) is not kind for x in value):
                what = "a bool" if kind is bool else "a whole number"
                raise InputError(
                    f"expected {name} to be {what}, or one for each of the axes {shape}, got {getattr(self, name)!r}; match them"
                )
            object.__setattr__(self, name, value)
        for n, w, s, d in zip(self.shape, self.window, self.stride, self.dilation, strict=True):
            if w < 1 or d < 1 or w * d > n:
                raise InputError(
                    f"expected window * dilation from 1 to the axis of {n}, got {w} * {d}; take less of one"
                )
            if not 1 <= s <= w:
                raise InputError(f"expected a stride from 1 to the window of {w}, got {s}; longer ones would skip keys")

    def windows(self, axis: int, length: int) -> tuple[Tensor, Tensor]:
        """First and last key seen by each of the `length` members of one dilation group of an axis, `[length]` both."""
        window, stride = self.window[axis], self.stride[axis]
        at = torch.arange(length)
        if self.causal[axis]:
            leader = (at // stride * stride + stride - 1).clamp(max=length - 1)
            return (leader - window + 1).clamp(min=0), at
        leader = (at // stride * stride + stride // 2).clamp(max=length - 1)
        first = (leader - window // 2).clamp(0, length - window)
        return first, first + window - 1

    def groups(self, axis: int) -> list[int]:
        """Members of each dilation group of an axis."""
        n, d = self.shape[axis], self.dilation[axis]
        return [-(-(n - residue) // d) for residue in range(d)]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hood: Neighborhood,
    *,
    extra: tuple[Tensor, Tensor] | None = None,
    tile: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within neighbourhoods: q `[batch, heads, prod(shape), head_dim]`, k and v alike with any KV heads.

    `extra`: keys and values off the grid (text) that every query sees, a second attention joined by log-sum-exp. `tile`: tokens
    along each axis that are computed together, `TILES` unless given. Tiles seen as a whole and tiles seen in part are two attentions,
    joined by log-sum-exp; a pattern without the latter (`simulate(...).block_sparse`) needs one.
    Returns (out, lse). Raises `InputError` for inputs that are not the grid's and for tiles beyond an axis.
    """
    check_heads(q, k, v)
    grid = math.prod(hood.shape)
    if q.shape[2] != grid or k.shape[2] != grid:
        raise InputError(
            f"expected the {grid} tokens of a grid {hood.shape}, got {q.shape[2]} and {k.shape[2]}; match them"
        )
    tile = fit_tile(hood.shape, tile, TILES)
    if len(tile) != len(hood.shape) or any(not 1 <= t <= n for t, n in zip(tile, hood.shape, strict=True)):
        raise InputError(f"expected a tile of 1 up to the axes {hood.shape}, got {tile}; take a smaller one")
    groups = _groups(hood, tile, q.device)
    parts = [_attend_group(q, k, v, group, scale) for group in groups]
    if len(groups) == 1:
        out, lse = parts[0]
    else:
        back = torch.cat([group.tokens for group in groups]).argsort()
        out, lse = (torch.cat([part[n] for part in parts], 2)[:, :, back] for n in (0, 1))
    if extra is not None:
        text_map = torch.ones(-(-grid // 128), -(-extra[0].shape[2] // 128), dtype=torch.bool, device=q.device)
        out, lse = merge(out, lse, *attend_map(q, *extra, text_map, (128, 128), scale=scale))
    return out.to(q.dtype), lse


@dataclass(frozen=True, eq=False)
class _Group:
    """Tokens that see each other under the dilation: `blocks` of them, and the tiles they see as a whole and in part."""

    tokens: Tensor
    blocks: TokenBlocks
    whole: Tensor | None
    part: Tensor | None
    boxes: Boxes  # of places, by coordinates within the group


@lru_cache(maxsize=4)  # every layer of a model asks for the same
def _groups(hood: Neighborhood, tile: tuple[int, ...], device: torch.device) -> list[_Group]:
    index, found = torch.arange(math.prod(hood.shape)).view(hood.shape), []
    for residues in product(*map(range, hood.dilation)):
        members = index[tuple(slice(r, None, d) for r, d in zip(residues, hood.dilation, strict=True))]
        shape = tuple(members.shape)
        here = tuple(min(t, n) for t, n in zip(tile, shape, strict=True))
        blocks = tile_blocks(shape, here)
        local = blocks.tokens
        windows = [hood.windows(axis, n) for axis, n in enumerate(shape)]
        whole, part = (m.to(device) if bool(m.any()) else None for m in _maps(windows, shape, here))
        places = torch.stack(torch.unravel_index(local.flatten().clamp(min=0), shape))
        bounds = torch.stack([torch.stack([w[n][at] for w, at in zip(windows, places, strict=True)]) for n in (0, 1)])
        at = places.masked_fill(local.flatten() < 0, -1)  # beyond all windows
        boxes = Boxes(bounds.to(device, torch.int32), at.to(device, torch.int32))
        tokens = members.flatten()
        if shape != hood.shape:
            blocks = TokenBlocks(torch.where(local >= 0, tokens[local], -1), (len(local),))
        found.append(_Group(tokens.to(device), blocks.to(device), whole, part, boxes))
    return found


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: _Group, scale: float | None) -> tuple[Tensor, Tensor]:
    """Out and lse of the tokens of one group, in their own order."""
    blocks, found = group.blocks, []
    q, k, v = (blocks.permute(t) for t in (q, k, v))
    if group.whole is not None:
        valid = None if blocks.place.numel() == blocks.valid.numel() else blocks.valid
        found.append(attend_map(q, k, v, group.whole, (blocks.size, blocks.size), scale=scale, valid=valid))
    if group.part is not None:
        how = {"scale": q.shape[-1] ** -0.5 if scale is None else scale}
        found.append(attend_boxes(q, k, v, group.part, blocks.size, group.boxes, **how))
    out, lse = found[0] if len(found) == 1 else merge(*found[0], *found[1])
    return blocks.restore(out), blocks.restore(lse[..., None])[..., 0]


def _axis_maps(first: Tensor, last: Tensor, query_tile: int, key_tile: int) -> tuple[Tensor, Tensor]:
    """Key tiles that a query tile sees anything of, and those that all its queries see as a whole: bool `[nq, nk]` both."""
    length = len(first)
    starts = torch.arange(0, length, query_tile)
    ends = (starts + query_tile).clamp(max=length) - 1
    # Windows never move back along an axis, so the first and the last query of a tile bound all.
    low = torch.arange(0, length, key_tile)
    high = (low + key_tile).clamp(max=length) - 1
    touched = (high >= first[starts][:, None]) & (low <= last[ends][:, None])
    return touched, (low >= first[ends][:, None]) & (high <= last[starts][:, None])


def _maps(windows, shape, tile) -> tuple[Tensor, Tensor]:
    """(tiles seen as a whole, tiles seen in part), bool `[tiles, tiles]` both."""
    touched = whole = torch.ones(1, 1, dtype=torch.bool)
    for (first, last), t in zip(windows, tile, strict=True):
        touched_here, whole_here = _axis_maps(first, last, t, t)
        touched, whole = _outer(touched, touched_here), _outer(whole, whole_here)
    return whole, touched & ~whole


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Maps of two axes as the map of both."""
    both = a[:, None, :, None] & b[None, :, None, :]
    return both.flatten(0, 1).flatten(1, 2)


# ---------------------------------------------------------------------- the simulator


@dataclass(frozen=True)
class Work:
    """Tiles of queries x keys: of dense attention, visited, and seen as a whole; `bound`: dense products over those needed."""

    total: int
    visited: int
    whole: int
    bound: float

    @property
    def speedup(self) -> float:
        """What a kernel can gain over its own dense time, if each visited tile costs the same."""
        return self.total / self.visited

    @property
    def block_sparse(self) -> bool:
        """Every visited tile is seen as a whole: nothing is computed in vain, and no mask is needed."""
        return self.whole == self.visited


def simulate(
    hood: Neighborhood, query_tile: Sequence[int] | None = None, key_tile: Sequence[int] | None = None
) -> Work:
    """The tiles that a kernel visits, counted and not run; tiles are `TILES` unless given. Raises `InputError` for other axes."""
    query_tile, key_tile = _tiles_of(hood, query_tile, key_tile)
    axes = [_axis_work(hood, axis, query_tile[axis], key_tile[axis]) for axis in range(len(hood.shape))]
    total, visited, whole, pairs = (math.prod(counts) for counts in zip(*axes, strict=True))
    return Work(total, visited, whole, math.prod(hood.shape) ** 2 / pairs)


def _tiles_of(hood: Neighborhood, *tiles: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Tiles as given or `TILES`; raises `InputError` where they are not one length for each axis."""
    found = [fit_tile(hood.shape, tile, TILES) for tile in tiles]
    if any(len(t) != len(hood.shape) or any(not isinstance(n, int) or n < 1 for n in t) for t in found):
        raise InputError(
            f"expected tiles of whole numbers for the axes {hood.shape}, got {' and '.join(map(str, found))}; give one length each"
        )
    return found


def _axis_work(hood: Neighborhood, axis: int, query_tile: int, key_tile: int) -> tuple[int, int, int, int]:
    """(tiles of dense attention, visited, whole, pairs seen) along one axis; those of the grid are their products."""
    n = hood.shape[axis]
    visited = whole = pairs = 0
    for length in hood.groups(axis):
        first, last = hood.windows(axis, length)
        touched, full = _axis_maps(first, last, query_tile, key_tile)
        visited, whole = visited + int(touched.sum()), whole + int(full.sum())
        pairs += int((last - first + 1).sum())
    return -(-n // query_tile) * -(-n // key_tile), visited, whole, pairs


def best_stride(
    hood: Neighborhood, query_tile: Sequence[int] | None = None, key_tile: Sequence[int] | None = None
) -> Neighborhood:
    """The same pattern with the smallest strides that visit the fewest tiles; axes are independent of each other.

    Raises `InputError` for tiles of other axes.
    """
    query_tile, key_tile = _tiles_of(hood, query_tile, key_tile)
    strides = []
    for axis, window in enumerate(hood.window):

        def visited(stride: int, axis: int = axis) -> int:
            tried = replace(hood, stride=tuple(stride if a == axis else 1 for a in range(len(hood.shape))))
            return _axis_work(tried, axis, query_tile[axis], key_tile[axis])[1]

        strides.append(min(range(1, window + 1), key=visited))
    return replace(hood, stride=tuple(strides))
