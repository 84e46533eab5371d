"""Predictable heads: how alike a head's queries are in time, and which rotary channel carries its logits (TAPPA 2026 [103])."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..method import check_count
from ..rope import Rope
from .lens import Lens, Piece, Probe, Reading, lens
from .result import HEADS, Measure

_BEST = frozenset({"top_k_keys"})


@lens("patterns", paper="Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis (2026) [103]")
@dataclass(frozen=True)
class Patterns(Lens):
    """Self-similarity of queries and keys over time, and the dominant rotary channel of every head.

    Similarity is the mean cosine of all pairs: near one, a head changes slowly and its pattern is predictable; retrieval heads have less.
    "query" and "key" are over the last `window` (32) positions as attention sees them; "query_raw" over the first `raw` (1024) positions
    before the rotary embedding: two different numbers. The dominant channel is the pair of dimensions with the largest mean |q| times
    mean |k|; 2 pi over its angle is the spacing in tokens of the diagonals it draws. NaN without rotary embedding. "overlap" says directly
    how predictable a head is: what share of its `top` (8) keys two successive ones of the last `window` queries have in common.
    """

    window: int = 32
    raw: int = 1024
    top: int = 8

    def __post_init__(self) -> None:
        check_count("window", self.window, 2)
        check_count("raw", self.raw, 2)
        check_count("top", self.top, 1)

    def probe(self, reading: Reading) -> Probe:
        return _PatternProbe(self, reading)


class _PatternProbe(Probe):
    def __init__(self, lens: Patterns, reading: Reading):
        self.lens, self.reading = lens, reading
        self.rope = _rope(reading)
        self.tail = reading.length - min(lens.window, reading.length)
        self.sums: dict[str, dict[int, Tensor]] = {
            name: {} for name in ("query", "key", "query_raw", "q_size", "k_size")
        }
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self.best: dict[
            int, list[Tensor]
        ] = {}  # layer -> strongest keys of the last queries, [heads, queries, top] each

    def attention(self, piece: Piece) -> None:
        q, k, first = piece.q[0].float(), piece.k_new[0].float(), piece.first
        skip = min(q.shape[1], max(0, self.tail - first))
        self._add("query", piece.layer, _units(q[:, skip:]).sum(1))
        self._add("key", piece.layer, _units(k[:, skip:]).sum(1))
        if skip < q.shape[1]:
            top = min(self.lens.top, self.tail + 1)  # keys that each of these queries sees
            best = piece.measure(_BEST, top=top, rows=(skip, q.shape[1]))["top_k_keys"][0]
            self.best.setdefault(piece.layer, []).append(best)
        head = q[:, : max(0, self.lens.raw - first)]
        if self.rope is not None:
            place = torch.arange(first, first + head.shape[1], device=q.device)
            head = self.rope.unrotate(head, place, piece.layer)
            if piece.layer not in self.pairs:
                self.pairs[piece.layer] = channels(self.rope, piece.layer, q.shape[2], q.device)
            partner = self.pairs[piece.layer][0]
            for name, x in (("q_size", q), ("k_size", k)):
                self._add(name, piece.layer, (x.square() + x[..., partner].square()).sqrt().sum(1))
        self._add("query_raw", piece.layer, _units(head).sum(1))

    def _add(self, name: str, layer: int, x: Tensor) -> None:
        kept = self.sums[name]
        kept[layer] = kept[layer] + x if layer in kept else x

    def results(self) -> list[Measure]:
        reading = self.reading
        tail, raw = reading.length - self.tail, min(self.lens.raw, reading.length)
        counts = {"query": tail, "key": tail, "query_raw": raw}
        query, key, query_raw = (
            reading.table({i: similarity(x, n) for i, x in self.sums[name].items()}) for name, n in counts.items()
        )
        name, kv = "patterns.", ("layer", "kv_head")
        found = [
            Measure.of(name + "query", query, HEADS, "cosine", f"mean similarity of the last {tail} queries, rotary embedding included"),
            Measure.of(name + "key", key, kv, "cosine", f"the same of the last {tail} keys"),
            Measure.of(name + "query_raw", query_raw, HEADS, "cosine", f"of the first {raw} queries before rotary embedding"),
        ]  # fmt: skip
        overlap = reading.table({i: overlaps(torch.cat(x, 1)) for i, x in self.best.items()})
        found.append(
            Measure.of(
                name + "overlap", overlap, HEADS, "share", "of its strongest keys that the next query has as well"
            )
        )
        if self.rope is None:
            return found
        dominant = {i: self._dominant(i) for i in self.pairs}
        channel, spacing, share = (reading.table({i: d[n] for i, d in dominant.items()}) for n in range(3))
        return [
            *found,
            Measure.of(name + "channel", channel, HEADS, "pair", "the rotary channel with the largest logits, 0 turning fastest"),
            Measure.of(name + "spacing", spacing, HEADS, "tokens", "a full turn of that channel: the spacing of the diagonals it draws"),
            Measure.of(name + "channel_share", share, HEADS, "share", "its size among all channels"),
        ]  # fmt: skip

    def _dominant(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Channel, spacing and share of each head, [heads]."""
        partner, angle = self.pairs[layer]
        q, k = self.sums["q_size"][layer], self.sums["k_size"][layer]
        own = torch.arange(len(partner), device=q.device)
        size = q * k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        size = size.masked_fill(partner < own, 0.0)  # a pair counts once, at its first dimension
        best = size.argmax(-1)
        order = angle.masked_fill(partner <= own, -1.0).argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = own
        turns = angle[best] > 0
        nan = torch.tensor(math.nan, device=q.device)
        shown = rank[best].float().where(turns, nan), (2 * math.pi / angle[best]).where(turns, nan)
        return *shown, size.gather(-1, best[:, None])[:, 0] / size.sum(-1)


def similarity(total: Tensor, count: int) -> Tensor:
    """Mean cosine of all pairs of `count` vectors whose unit vectors sum to total [..., head_dim]; NaN for fewer than two."""
    if count < 2:
        return torch.full(total.shape[:-1], math.nan, device=total.device)
    return (total.double().square().sum(-1) - count) / (count * (count - 1))


def overlaps(best: Tensor) -> Tensor:
    """Mean share of keys that two successive queries share, [heads], best [heads, queries, top], -1 for none; NaN for one query."""
    same = (best[:, 1:, :, None] == best[:, :-1, None]).any(-1) & (best[:, 1:] >= 0)
    return same.double().mean((1, 2))


def channels(rope: Rope, layer: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(partner, angle) of each dimension, [head_dim]: what it is turned with, and by how much a position, in radians.

    Read off from turning the unit vectors by one position; a dimension that does not turn is its own partner, with angle 0.
    """
    unit = torch.eye(head_dim, device=device)
    turned = rope.rotate(unit, 1, layer)
    beside = (turned - torch.diag(turned.diagonal())).abs()
    sine, partner = beside.max(-1)
    angle = torch.atan2(sine, turned.diagonal())
    still = sine == 0
    own = torch.arange(head_dim, device=device)
    return partner.where(~still, own), angle.where(~still, 0.0)


def _rope(reading: Reading) -> Rope | None:
    try:
        return reading.info.rope
    except UnsupportedModel:
        return None


def _units(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)
