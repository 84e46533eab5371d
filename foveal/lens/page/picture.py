"""What the page draws of every head, measured along with the lenses: blocks of the text, keys of tokens, and exact rows of some heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...method import check_count
from ..lens import Lens, Piece, Probe, Reading
from ..result import HEADS, Measure

SIDE = 128
"""Blocks a side of a head's block map, at most: 270 heads of them are 2.2 million numbers."""
BLOCKS = 2_800_000
"""Numbers of all block maps together, at most; more heads get larger blocks."""
COLUMNS = 9_000_000
"""Numbers of all columns together, at most; beyond, neighbouring tokens are averaged."""
ROOM = 32 << 20
"""Bytes of exact rows held, at most."""
GPU_BLOCK, GPU_FROM = 64, 2048  # the kernels take multiples of 64; shorter texts are quick without them


@dataclass(frozen=True)
class Picture(Lens):
    """Block maps, columns and exact rows; `look(..., picture=True)` adds it.

    The first token is the sink and apart from everything else: maps do not count it.  heads: (layer, head) pairs whose rows are kept
    exactly, before the others; these follow in order of the attention that their rows' `top` strongest keys get from far away (at least
    64 tokens, or an eighth of a shorter text).  block: tokens of a block; None: what gives up to 128 blocks a side and 2.8 million
    numbers in all, whole blocks of 64 on a GPU.  top: keys listed for each row.

    Measures: "picture.blocks" [layer, head, row, column], mean attention of the queries from `row_from[row]` on to the keys from
    `column * block` on, the first token not counted; "picture.first" [layer, head, row], their attention to the first token;
    "picture.columns" [layer, head, column], mean attention a key gets from the queries that see it; "picture.exact" [head, 2], layers
    and heads; "picture.top" and "picture.top_keys" [head, position, rank], 0 and -1 where there are fewer.
    """

    name = "picture"
    paper = "Plain attention weights"
    stats = frozenset({"block_map", "col_mass", "top_k", "top_k_keys"})

    heads: Sequence[tuple[int, int]] = ()
    block: int | None = None
    top: int = 8

    def __post_init__(self) -> None:
        check_count("top", self.top, 1)
        if self.block is not None:
            check_count("block", self.block, 1)

    def sizes(self, reading: Reading) -> dict[str, int]:
        return {"block": self.block_of(reading), "top": self.top}

    def block_of(self, reading: Reading) -> int:
        """Tokens of a block for this text."""
        if self.block is not None:
            return self.block
        heads = reading.info.n_layers * reading.info.heads
        block = math.ceil(reading.length / min(SIDE, max(8, math.isqrt(2 * BLOCKS // heads))))
        if reading.device.type == "cuda" and reading.length > GPU_FROM:
            block = GPU_BLOCK * math.ceil(block / GPU_BLOCK)
        return block

    def probe(self, reading: Reading) -> Probe:
        for layer, head in self.heads:
            if layer not in reading.info.layers or not 0 <= head < reading.info.heads:
                raise InputError(
                    f"expected heads among {reading.info.heads} of the layers with full attention ({_spans(reading.info.layers)}), "
                    f"got {layer}.{head}: name one of those"
                )
        return _PictureProbe(self, reading)


class _PictureProbe(Probe):
    def __init__(self, lens: Picture, reading: Reading):
        self.lens, self.reading = lens, reading
        self.block = lens.block_of(reading)
        self.columns = math.ceil(reading.length / self.block)
        self.dtype = torch.half if self.block > 1 else torch.float  # blocks of one token are exact
        self.row_from: list[int] = []
        self.blocks: dict[int, list[Tensor]] = {}
        self.first: dict[int, list[Tensor]] = {}
        self.exact = _Exact(lens, reading)

    def attention(self, piece: Piece) -> None:
        length = piece.q.shape[2]
        starts = range(0, length, self.block)
        if piece.layer == self.reading.info.layers[0]:
            self.row_from += [piece.first + s for s in starts]
        counts = torch.tensor([min(self.block, length - s) for s in starts], device=piece.q.device)
        sink = piece.weights(0, length, 0, 1)[..., 0]
        room = len(counts) * self.block - length
        first = torch.nn.functional.pad(sink, (0, room)).unflatten(1, (-1, self.block)).sum(-1)
        maps = piece.stats["block_map"][0]
        maps[..., 0] = (maps[..., 0] - first).clamp_(min=0)
        maps = torch.nn.functional.pad(maps / counts[:, None], (0, self.columns - maps.shape[2]))
        self.blocks.setdefault(piece.layer, []).append(maps.to(self.dtype).cpu())
        self.first.setdefault(piece.layer, []).append((first / counts).to(self.dtype).cpu())
        self.exact.add(piece)

    def results(self) -> list[Measure]:
        reading = self.reading
        blocks = _table(reading, {i: torch.cat(x, 1) for i, x in self.blocks.items()})
        first = _table(reading, {i: torch.cat(x, 1) for i, x in self.first.items()})
        pool = 1
        while reading.info.n_layers * reading.info.heads * math.ceil(reading.length / pool) > COLUMNS:
            pool *= 2
        columns = _table(reading, {i: _pooled(reading.importance(i), pool).half().cpu() for i in reading.columns})
        picks, top, keys = self.exact.results()
        share, name, rows = "share", "picture.", (*HEADS, "row")
        return [
            Measure(name + "blocks", blocks, (*rows, "column"), share, "mean attention to a block of keys without the first token"),
            Measure(name + "first", first, rows, share, "mean attention of queries to the first token"),
            Measure.of(name + "row_from", torch.tensor(self.row_from), ("row",), "position", "the first query of each block"),
            Measure.of(name + "block", self.block, (), "tokens", "the size of a block"),
            Measure(name + "columns", columns, (*HEADS, "column"), share, "mean attention a key gets from the queries that see it"),
            Measure.of(name + "pool", pool, (), "tokens", "how many neighbouring keys a column averages"),
            Measure.of(name + "exact", picks, ("pick", "place"), "layer, head", "heads whose rows are listed"),
            Measure(name + "top", top, ("pick", "position", "rank"), share, "the largest attention weights of each query"),
            Measure(name + "top_keys", keys, ("pick", "position", "rank"), "position", "their keys; -1: none"),
        ]  # fmt: skip


class _Exact:
    """The strongest keys of every query, of as many heads as there is room for: named ones, then those that look far with a few keys."""

    def __init__(self, lens: Picture, reading: Reading):
        self.lens, self.reading = lens, reading
        n = reading.length
        self.top = min(lens.top, n)
        self.far = min(64, max(1, n // 8))
        self.count = max(
            len(lens.heads), min(reading.info.n_layers * reading.info.heads, max(1, ROOM // (8 * n * self.top)))
        )
        self.values: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.began: dict[
            tuple[int, int], float
        ] = {}  # by the first piece alone, which decides who is listed in any order of reading
        self.scores: dict[tuple[int, int], float] = {}

    def add(self, piece: Piece) -> None:
        top, keys = (piece.stats[name][0, ..., : self.top] for name in ("top_k", "top_k_keys"))
        length = top.shape[1]
        query = torch.arange(piece.first, piece.first + length, device=top.device)[:, None]
        scores = (top * ((keys > 0) & (query - keys >= self.far))).sum((1, 2)).tolist()
        named = set(self.lens.heads)
        if piece.first == 0:
            found = {(piece.layer, h): x + (math.inf if (piece.layer, h) in named else 0) for h, x in enumerate(scores)}
            self.began = dict(sorted({**self.began, **found}.items(), key=lambda x: -x[1])[: self.count])
            self.scores = {head: self.scores.get(head, x) for head, x in self.began.items()}
            self.values = {head: x for head, x in self.values.items() if head in self.scores}
            mine = [h for layer, h in self.scores if layer == piece.layer]
            for h in mine:
                shape = (self.reading.length, self.top)
                self.values[piece.layer, h] = torch.zeros(shape), torch.full(shape, -1, dtype=torch.int32)
        else:
            mine = [h for layer, h in self.scores if layer == piece.layer]
            for h in mine:
                self.scores[piece.layer, h] += scores[h]
        if mine:
            top, keys = top[mine].float().cpu(), keys[mine].int().cpu()
            for i, h in enumerate(mine):
                value, key = self.values[piece.layer, h]
                value[piece.first : piece.first + length] = top[i]
                key[piece.first : piece.first + length] = keys[i]

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        picks = sorted(self.values, key=lambda x: -self.scores[x])
        values, keys = zip(*(self.values[x] for x in picks), strict=True)
        return torch.tensor(picks), torch.stack(values), torch.stack(keys)


def _table(reading: Reading, rows: dict[int, Tensor]) -> Tensor:
    """[layers, ...], NaN where nothing was measured."""
    like = next(iter(rows.values()))
    out = like.new_full((reading.info.n_layers, *like.shape), math.nan)
    for layer, x in rows.items():
        out[layer] = x
    return out


def _pooled(x: Tensor, pool: int) -> Tensor:
    """Means of `pool` neighbours along the last dimension; the last one of those that are left."""
    if pool == 1:
        return x
    n = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, -n % pool)).unflatten(-1, (-1, pool)).sum(-1)
    counts = torch.full(x.shape[-1:], float(pool), device=x.device)
    counts[-1] = n - pool * (x.shape[-1] - 1)
    return x / counts


def _spans(layers: Sequence[int]) -> str:
    """0..29 where they follow each other, else all of them."""
    together = len(layers) == layers[-1] - layers[0] + 1
    return f"{layers[0]}..{layers[-1]}" if together and len(layers) > 1 else ", ".join(map(str, layers))
