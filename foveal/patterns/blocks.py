"""Tokens of a grid in blocks, and attention without a causal order over a map of blocks: what every pattern is made of.

Queries are `[batch, heads, length, head_dim]`, keys and values `[batch, kv_heads, total, head_dim]`; `heads` is any multiple of
`kv_heads`. Grid tokens come in raster order, the last axis fastest; text tokens, where there are any, follow them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.errors import InputError
from foveal.ops import attend_blocks
from foveal.ops.dense import wide


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Which tokens of a grid stand together: `tokens` `[blocks, size]`, -1 where a block has fewer; `counts`: blocks along each axis.

    tile: tokens of a block along each axis, where tiles divide the grid: tokens then move as axes do, without an index.
    """

    tokens: Tensor
    counts: tuple[int, ...]
    tile: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Places of a block."""
        return self.tokens.shape[1]

    @property
    def number(self) -> int:
        """How many blocks there are."""
        return self.tokens.shape[0]

    @cached_property
    def valid(self) -> Tensor:
        """Places that hold a token, bool `[blocks * size]`."""
        return self.tokens.flatten() >= 0

    @cached_property
    def place(self) -> Tensor:
        """The place of each token, in ascending order of the tokens, `[grid tokens]`."""
        last = torch.iinfo(torch.int64).max
        return torch.where(self.valid, self.tokens.flatten(), last).argsort()[: int(self.valid.sum())]

    def to(self, device) -> TokenBlocks:
        """The same blocks on another device."""
        return (
            self
            if self.tokens.device == torch.device(device)
            else TokenBlocks(self.tokens.to(device), self.counts, self.tile)
        )

    def permute(self, x: Tensor) -> Tensor:
        """Tokens `[..., tokens, width]` to places `[..., blocks * size, width]`; places without a token are zero."""
        if self.tile is not None:
            split = [n for pair in zip(self.counts, self.tile, strict=True) for n in pair]
            lead, axes = x.dim() - 2, len(split)
            order = [*range(lead), *range(lead, lead + axes, 2), *range(lead + 1, lead + axes, 2), lead + axes]
            return x.unflatten(-2, split).permute(order).flatten(lead, -2)
        x = x.index_select(-2, self.tokens.flatten().clamp(min=0))
        return x if self.place.numel() == self.valid.numel() else x.masked_fill(~self.valid[:, None], 0)

    def restore(self, x: Tensor) -> Tensor:
        """Places back to tokens; undoes `permute`."""
        if self.tile is not None:
            lead, axes = x.dim() - 2, len(self.tile)
            pairs = [i for axis in range(axes) for i in (lead + axis, lead + axes + axis)]
            x = x.unflatten(-2, (*self.counts, *self.tile))
            return x.permute([*range(lead), *pairs, lead + 2 * axes]).flatten(lead, -2)
        return x.index_select(-2, self.place)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of the tokens of each block, `[..., blocks, width]` in float32 (float64 for float64)."""
        sums = self.permute(x.to(wide(x.dtype))).unflatten(-2, (self.number, self.size)).sum(-2)
        return sums / self.held[:, None]

    @cached_property
    def held(self) -> Tensor:
        """Tokens of each block, `[blocks]`."""
        return (self.tokens >= 0).sum(-1)

    @cached_property
    def block_of(self) -> Tensor:
        """The block of each token, `[grid tokens]`."""
        return self.place // self.size

    @cached_property
    def coordinates(self) -> Tensor:
        """Coordinates of each block among the blocks, `[blocks, axes]`."""
        axes = [torch.arange(n, device=self.tokens.device) for n in self.counts]
        return torch.cartesian_prod(*axes).view(self.number, -1)


def tile_blocks(shape: Sequence[int], tile: Sequence[int], device="cpu") -> TokenBlocks:
    """A grid of `shape` cut into tiles, tiles in raster order; those at the end of an axis may be partial.

    The last few are kept: every layer of a model asks for the same.

    Raises `InputError` for a tile longer than its axis.
    """
    shape, tile = tuple(shape), tuple(tile)
    if not shape or len(shape) != len(tile) or min(shape, default=0) < 1:
        raise InputError(f"expected one tile length for each axis of the grid, got {tile} for {shape}; match them")
    if any(not isinstance(t, int) or not 1 <= t <= n for n, t in zip(shape, tile, strict=True)):
        raise InputError(
            f"expected tiles from 1 up to the axes {shape}, got {tile}; take a smaller tile or a larger grid"
        )
    return _tiles(shape, tile, torch.device(device))


@lru_cache(maxsize=8)
def _tiles(shape: tuple[int, ...], tile: tuple[int, ...], device: torch.device) -> TokenBlocks:
    counts = tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))
    index = torch.arange(math.prod(shape)).view(shape)
    pads = [pad for n, c, t in zip(shape, counts, tile, strict=True) for pad in (c * t - n, 0)]
    index = F.pad(index, pads[::-1], value=-1).view([n for pair in zip(counts, tile, strict=True) for n in pair])
    axes = len(shape)
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
    tokens = index.permute(order).reshape(math.prod(counts), math.prod(tile)).to(device)
    divides = not any(n % t for n, t in zip(shape, tile, strict=True))
    return TokenBlocks(tokens, counts, tile if divides else None)


def fit_tile(shape: Sequence[int], tile: Sequence[int] | None, defaults: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """The tile as given, or the default for so many axes, no longer than the grid's axes."""
    if tile is not None:
        return tuple(tile)
    if len(shape) not in defaults:
        raise InputError(f"expected a grid of {sorted(defaults)} axes, got {len(shape)}; give the tile yourself")
    return tuple(min(n, t) for n, t in zip(shape, defaults[len(shape)], strict=True))


def attend_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    size: tuple[int, int],
    *,
    scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention without a causal order over chosen blocks, by `foveal.ops.attend_blocks`: its kernels, its gradients.

    `block_map` bool `[batch or 1, heads or 1, ceil(length / size[0]), ceil(total / size[1])]`, or the last two axes alone;
    `size` = (query block, key block) in tokens; `bias` as in `foveal.ops.dense`; `valid` bool `[total]` or `[batch, total]`:
    keys that exist. `scale`: 1 / sqrt(head_dim) unless given. Returns (out, lse); a row without keys is 0 with lse -inf.
    Raises `InputError` for shapes that do not fit.
    """
    check_heads(q, k, v)
    batch, heads, length, width = q.shape
    total, (query_block, key_block) = k.shape[2], size
    if min(size) < 1:
        raise InputError(f"expected blocks of at least 1 token, got {size}; give the tokens of a block")
    rows, columns = -(-length // query_block), -(-total // key_block)
    check_map(block_map, (batch, heads, rows, columns))
    if valid is not None and (valid.dtype != torch.bool or valid.shape not in ((total,), (1, total), (batch, total))):
        raise InputError(
            f"expected valid bool {[batch, total]}, got {valid.dtype} {list(valid.shape)}; give each key one"
        )
    mass = None if valid is None else valid.to(wide(q.dtype)).view(-1, 1, total).expand(batch, k.shape[1], total)
    how = {
        "scale": width**-0.5 if scale is None else scale,
        "bias": bias,
        "mass": mass,
        "causal": False,
        "need_lse": True,
    }
    return attend_blocks(q, k, v, block_map.expand(batch, heads, rows, columns), size, **how)


def attend_grid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: TokenBlocks,
    block_map: Tensor,
    *,
    text: int = 0,
    text_keys: int | Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of grid tokens over a map of their blocks, with the `text` tokens after them seen by all and seeing all.

    `block_map` bool `[batch or 1, heads or 1, blocks, blocks]` (or the last two axes); `text_keys`: how many of the text keys are
    real, a number or `[batch]` (None: all). Tokens are brought into blocks and back. Returns (out, lse) in the order of q.
    Raises `InputError` for lengths that do not fit and, where the map lies on the CPU, for rows of it without any key; on a GPU, where
    looking would wait for the device, these are 0 with lse -inf.
    """
    check_text(q, k, blocks, text, text_keys)
    check_map(block_map, (*q.shape[:2], blocks.number, blocks.number))
    blocks = blocks.to(q.device)
    grid, seats = blocks.place.numel(), -(-text // blocks.size)
    if block_map.is_cpu and not bool((block_map.any(-1) | reads_text(text, text_keys, "cpu")).all()):
        raise InputError("expected every block to read one at least, got rows of the map without any; add the diagonal")
    pad = (0, 0, 0, seats * blocks.size - text)

    def arrange(x: Tensor) -> Tensor:
        images = blocks.permute(x[:, :, :grid])
        return torch.cat([images, F.pad(x[:, :, grid:], pad)], 2) if text else images

    def back(x: Tensor) -> Tensor:
        images, rest = x.split([blocks.valid.numel(), x.shape[2] - blocks.valid.numel()], 2)
        images = blocks.restore(images)
        return torch.cat([images, rest[:, :, :text]], 2) if text else images

    full = F.pad(block_map.to(q.device).to(torch.uint8), (0, seats, 0, seats), value=1).bool()
    count = torch.as_tensor(text if text_keys is None else text_keys, device=q.device)
    real = torch.arange(seats * blocks.size, device=q.device) < count.view(-1, 1).clamp(max=text)
    valid = torch.cat([blocks.valid.expand(real.shape[0], -1), real], -1)
    whole = grid == blocks.valid.numel() and text_keys is None and pad[-1] == 0
    size = (blocks.size, blocks.size)
    out, lse = attend_map(*map(arrange, (q, k, v)), full, size, scale=scale, valid=None if whole else valid)
    return back(out), back(lse[..., None])[..., 0]


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `InputError` unless q, k and v are of one dtype, one batch, matching heads and one key length."""
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"expected q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; convert them")
    if (
        q.dim() != 4
        or k.dim() != 4
        or v.shape[:3] != k.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
    ):
        raise InputError(
            f"expected q, k, v [batch, heads, length, head_dim] that fit, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; reshape them"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or 0 in (q.shape[2], k.shape[2]):
        raise InputError(
            f"expected queries, keys, and heads that are a multiple of KV heads, got {list(q.shape)} and {list(k.shape)}; check q and k"
        )


def check_map(block_map: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Raise `InputError` unless a map is bool and can be that of (batch, heads, query blocks, key blocks)."""
    found, fits = block_map.shape, block_map.dtype == torch.bool and 2 <= block_map.dim() <= 4
    lead = zip(found[:-2][::-1], shape[:2][::-1], strict=False)
    if not fits or found[-2:] != shape[2:] or any(a not in (1, b) for a, b in lead):
        raise InputError(f"expected a bool map of {[*shape]} blocks, got {block_map.dtype} {[*found]}; rebuild it")


def reads_text(text: int, text_keys: int | Tensor | None, device) -> Tensor:
    """Whether there is any real text, which all blocks read: bool `[batch or 1, 1, 1]`."""
    return (torch.as_tensor(text if text_keys is None else text_keys, device=device) > 0).view(-1, 1, 1) & (text > 0)


def check_text(q: Tensor, k: Tensor, blocks: TokenBlocks, text: int, text_keys: int | Tensor | None = None) -> None:
    """Raise `InputError` unless queries and keys are the grid's tokens and then the text's, of which `text_keys` are real."""
    if isinstance(text_keys, Tensor):
        if text_keys.shape not in ((), (1,), (q.shape[0],)) or text_keys.is_floating_point():
            raise InputError(
                f"expected text_keys to be a number or [{q.shape[0]}], got {text_keys.dtype} {[*text_keys.shape]}; count for each sequence"
            )
    elif text_keys is not None and not 0 <= text_keys <= text:
        raise InputError(f"expected from 0 to {text} real text keys, got {text_keys}; count those of this prompt")
    grid = blocks.place.numel()
    if text < 0 or q.shape[2] != grid + text or k.shape[2] != grid + text:
        raise InputError(
            f"expected {grid} grid tokens and {text} of text in q and k, "
            f"got {q.shape[2]} and {k.shape[2]}; give the grid and text of this input"
        )
