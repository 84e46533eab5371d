"""How far heads look back: spans, local and global heads, and the curves of preplanning and anchors (PreplanAnchor 2025 [25])."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import check_count, check_range
from .lens import SINK, Lens, Piece, Probe, Reading, Unsuited, lens
from .result import HEADS, Measure

LOCAL, BETWEEN, GLOBAL = 0, 1, 2


@lens("distance", paper="Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm (2025) [25]")
@dataclass(frozen=True)
class Distance(Lens):
    """Mean attention distance of every head, its streaming share, and two curves over the text.

    start: the first query that counts, where the response begins (0: all).  share: the `share` of the heads with the shortest spans is
    local, that with the longest global (0.3).  window: distances are clipped to W in the windowed average attention distance (10).
    future: a key's future attention influence is its mean attention from the queries low..high places later (10, 50).  recent: keys
    that with the first four count as streaming (64).  curve_layers: the curves are means over the local and the global heads of so many
    evenly spaced layers in the middle third (5, as the paper reads them in training); None takes all.
    """

    start: int = 0
    share: float = 0.3
    window: int = 10
    future: tuple[int, int] = (10, 50)
    recent: int = 64
    curve_layers: int | None = 5

    stats = frozenset({"mean_distance"})

    def __post_init__(self) -> None:
        check_count("start", self.start)
        check_range("share", self.share, 0, 0.5)
        check_count("window", self.window, 1)
        check_count("recent", self.recent, 1)
        low, high = self.future
        check_count("future", low, 0)
        check_count("future", high, low)
        if self.curve_layers is not None:
            check_count("curve_layers", self.curve_layers, 1)

    def probe(self, reading: Reading) -> Probe:
        if self.start >= reading.length:
            raise Unsuited(f"distance: start = {self.start}, but the text has {reading.length} tokens: start within it")
        return _DistanceProbe(self, reading)


class _DistanceProbe(Probe):
    def __init__(self, lens: Distance, reading: Reading):
        self.lens, self.reading = lens, reading
        self.width = max(lens.window, lens.future[1] + 1, lens.recent)
        self.middle = middle_layers(reading.info.layers, reading.info.n_layers, lens.curve_layers)
        self.sums: dict[str, dict[int, Tensor]] = {k: {} for k in ("span", "mass", "rest", "waad", "fai", "stream")}
        self.curves: dict[int, tuple[Tensor, Tensor]] = {}
        n = reading.length
        low, high = lens.future
        key = torch.arange(n, device=reading.device)
        self.askers = ((key + high).clamp(max=n - 1) - (key + low).clamp(min=lens.start) + 1).clamp(min=0)

    def attention(self, piece: Piece) -> None:
        length = piece.q.shape[2]
        skip = max(0, self.lens.start - piece.first)
        if skip >= length:
            return
        near, rows = piece.near(self.width)[:, skip:], slice(skip, length)
        total = piece.row_sum[:, rows]
        position = torch.arange(piece.first + skip, piece.first + length, device=near.device)
        span = piece.stats["mean_distance"][0, :, rows]
        early = piece.weights(skip, length, 0, min(SINK, piece.first + length))  # [heads, rows, up to 4]
        back = position[:, None] - torch.arange(early.shape[2], device=near.device)
        window = self.lens.window
        short = near[..., :window] * torch.arange(window, 0, -1, device=near.device)
        waad = window * total - short.sum(-1)
        fresh = back >= self.lens.recent  # first tokens that are not among the recent ones
        parts = {
            "span": span.sum(-1),
            "mass": (total - early.sum(-1)).sum(-1),
            "rest": (span - (early * back).sum(-1)).sum(-1),
            "waad": waad.sum(-1),
            "fai": self._future(piece, near, waad, skip),
            "stream": (near[..., : self.lens.recent].sum(-1) + (early * fresh).sum(-1)).sum(-1),
        }
        for name, x in parts.items():
            kept = self.sums[name]
            kept[piece.layer] = kept[piece.layer] + x if piece.layer in kept else x

    def _future(self, piece: Piece, near: Tensor, waad: Tensor, skip: int) -> Tensor:
        """What this piece adds to the sum over keys of their future attention influence, [heads]; notes the curves."""
        low, high = self.lens.future
        first, length = piece.first + skip, near.shape[1]
        share = near.new_zeros(near.shape[0], self.reading.length)
        for back in range(low, min(high, first + length - 1) + 1):
            gone = max(0, back - first)  # queries that have no key so far back
            share[:, first + gone - back : first + length - back] += near[:, gone:, back]
        share /= self.askers.clamp(min=1)
        if piece.layer in self.middle:
            if piece.layer not in self.curves:
                self.curves[piece.layer] = (torch.zeros_like(share), torch.zeros_like(share))
            kept = self.curves[piece.layer]
            kept[0][:, first : first + length] = waad
            kept[1].add_(share)
        return share.sum(-1)

    def results(self) -> list[Measure]:
        lens, reading = self.lens, self.reading
        queries, keys = reading.length - lens.start, int((self.askers > 0).sum())
        s = {name: reading.table(kept) for name, kept in self.sums.items()}
        span = s["span"] / queries
        role = roles_by_span(span, lens.share)
        waad, fai = self._curves(span)
        low, high = lens.future
        name, position = "distance.", ("position",)
        return [
            Measure.of(name + "span", span, HEADS, "tokens", "mean distance of the keys looked at"),
            Measure.of(name + "span_without_sinks", s["rest"] / s["mass"].clamp(min=1e-9), HEADS, "tokens", "without the first keys"),
            Measure.of(name + "role", role, HEADS, "0, 1, 2; -1: not measured", "local, between, global: by span"),
            Measure.of(name + "streaming", s["stream"] / queries, HEADS, "share", f"on the first {SINK} and latest {lens.recent} keys"),
            Measure.of(name + "waad", s["waad"] / queries, HEADS, "tokens", f"mean distance, clipped to {lens.window}"),
            Measure.of(name + "fai", s["fai"] / max(1, keys), HEADS, "share", f"attention from {low} to {high} tokens later"),
            Measure.of(name + "waad_curve", waad, position, "tokens", f"distance clipped to {lens.window}, mean of local heads"),
            Measure.of(name + "fai_curve", fai, position, "share", f"attention from {low} to {high} tokens later, mean of global heads"),
        ]  # fmt: skip

    def _curves(self, span: Tensor) -> tuple[Tensor, Tensor]:
        """Means over the local and the global heads of the layers that are read; NaN before the response and where nobody asks."""
        role = roles_by_span(span[self.middle], self.lens.share)
        waad, fai = (torch.stack([self.curves[i][n] for i in self.middle]).cpu() for n in (0, 1))
        waad, fai = waad[role == LOCAL].mean(0), fai[role == GLOBAL].mean(0)
        waad[: self.lens.start] = torch.nan
        fai[self.askers.cpu() == 0] = torch.nan
        return waad, fai


def roles_by_span(span: Tensor, share: float) -> Tensor:
    """0 for the `share` of the heads with the shortest spans, 2 for that with the longest, 1 for others, -1 for NaN; [layers, heads].

    At least one head is local and one global where there are two; of equal spans the earlier head is the shorter one.
    """
    flat = span.flatten()
    known = flat.isfinite().nonzero().flatten()
    order = known[flat[known].argsort(stable=True)]
    count = min(max(1, round(share * len(order))), len(order) // 2)
    role = torch.full(flat.shape, -1)
    role[order] = BETWEEN
    role[order[:count]] = LOCAL
    role[order[len(order) - count :]] = GLOBAL if count else BETWEEN
    return role.view(span.shape)


def middle_layers(layers: tuple[int, ...], blocks: int, count: int | None) -> list[int]:
    """`count` evenly spaced ones of the measured layers within [blocks / 3, 2 blocks / 3] (of all, if none lies there)."""
    if count is None:
        return list(layers)
    inner = [i for i in layers if blocks / 3 <= i <= 2 * blocks / 3] or list(layers)
    picks = torch.linspace(0, len(inner) - 1, min(count, len(inner))).round().long().tolist()
    return [inner[i] for i in picks]
