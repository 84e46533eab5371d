"""The plainest facts about every head: how spread its attention is, over which distances, and a map of blocks of the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.stats import log_edges
from .lens import SINK, Lens, Piece, Probe, Reading, lens
from .result import HEADS, Measure


@lens("profile", paper="Plain statistics of attention weights")
@dataclass(frozen=True)
class Profile(Lens):
    """Entropy, attention on the first four keys, and how attention falls off with distance, in bins that double."""

    stats = frozenset({"entropy", "sink_mass", "offset_histogram"})

    def probe(self, reading: Reading) -> Probe:
        return _ProfileProbe(reading)


class _ProfileProbe(Probe):
    def __init__(self, reading: Reading):
        self.reading = reading
        self.sums: dict[str, dict[int, Tensor]] = {"entropy": {}, "sink": {}, "distance": {}}

    def attention(self, piece: Piece) -> None:
        stats = piece.stats
        histogram = stats["offset_histogram"][0]
        bins = len(log_edges(self.reading.length))
        found = {
            "entropy": stats["entropy"][0].sum(-1),
            "sink": stats["sink_mass"][0].sum(-1),
            "distance": torch.nn.functional.pad(histogram, (0, bins - histogram.shape[-1])),
        }
        for name, x in found.items():
            kept = self.sums[name]
            kept[piece.layer] = kept[piece.layer] + x if piece.layer in kept else x

    def results(self) -> list[Measure]:
        n = self.reading.length
        entropy, sink, distance = (self.reading.table(x) / n for x in self.sums.values())
        edges = torch.tensor(log_edges(n))
        bins = (*HEADS, "bin")
        return [
            Measure.of("profile.entropy", entropy, HEADS, "nats", "entropy of a query's attention, mean"),
            Measure.of("profile.sink", sink, HEADS, "share", f"attention on the first {SINK} keys, mean"),
            Measure.of("profile.distance", distance, bins, "share", "attention by distance, mean"),
            Measure.of("profile.distance_from", edges, ("bin",), "tokens", "the first distance of each bin"),
        ]
