"""Retrieval heads in the one pass of a look, on a text whose end repeats a needle (Retrieval Head 2024 [51]; CompressKV 2025 [142])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..head_scores import copy_scores
from ..methods.keep.compress_kv_profile import needle_score
from .lens import Lens, Piece, Probe, Reading
from .result import HEADS, Measure

_ARGMAX = frozenset({"row_argmax"})


@dataclass(frozen=True)
class Retrieval(Lens):
    """Which heads look at a needle while the text goes on to repeat it.

    needle, answer: (first, stop) tokens of each. The queries are those that predict the answer's tokens. Gives "retrieval.copied", the
    share of the needle's tokens a head looked at most just when they were due [51], and "retrieval.semantic", its attention on the whole
    needle, summed over the tokens of the answer that stand in it [142]; both [layers, heads]. Where a model's own answer, greedily
    decoded, is the one in the text, these are the scores of `foveal.calibrate` and of the profile of compress-kv for this run; elsewhere
    it is asked what it did not say.
    """

    needle: tuple[int, int]
    answer: tuple[int, int]

    name: ClassVar[str] = "retrieval"
    paper: ClassVar[str] = "Retrieval Head Mechanistically Explains Long-Context Factuality (2024) [51]; [142]"

    def probe(self, reading: Reading) -> Probe:
        (a, b), (c, d) = self.needle, self.answer
        if not 0 <= a < b < c < d <= reading.length:
            raise InputError(
                f"expected a needle and, at least one token later, its answer, (first, stop) within {reading.length} tokens, "
                f"got {self.needle} and {self.answer}"
            )
        return _RetrievalProbe(self, reading)


class _RetrievalProbe(Probe):
    def __init__(self, lens: Retrieval, reading: Reading):
        self.lens, self.reading = lens, reading
        self.looked: dict[int, list[Tensor]] = {}
        self.mass: dict[int, list[Tensor]] = {}

    def attention(self, piece: Piece) -> None:
        """Notes where the queries before the answer's tokens look."""
        start = max(self.lens.answer[0] - 1 - piece.first, 0)
        stop = min(self.lens.answer[1] - 1 - piece.first, piece.q.shape[2])
        if start >= stop:
            return
        found = piece.measure(_ARGMAX, rows=(start, stop))["row_argmax"][0]
        self.looked.setdefault(piece.layer, []).append(found.cpu())
        on_needle = piece.weights(start, stop, *self.lens.needle).sum(-1)
        self.mass.setdefault(piece.layer, []).append(on_needle.float().cpu())

    def results(self) -> list[Measure]:
        ids, lens, layers = self.reading.ids, self.lens, self.reading.info.layers
        answer = ids[slice(*lens.answer)]
        looked, mass = (
            torch.stack([torch.cat(kept[i], 1) for i in layers]).permute(2, 0, 1) for kept in (self.looked, self.mass)
        )  # [steps, layers, heads]
        copied = copy_scores(looked, ids, lens.needle, answer)
        semantic = needle_score(mass, answer, ids[slice(*lens.needle)])
        copied, semantic = (self.reading.table(dict(zip(layers, x, strict=True))) for x in (copied, semantic))
        return [
            Measure.of("retrieval.copied", copied, HEADS, "share", "of the needle's tokens, looked at most when they were due"),
            Measure.of("retrieval.semantic", semantic, HEADS, "attention", "on the whole needle, summed over the answer's tokens"),
        ]  # fmt: skip
