"""Receiver heads: heads whose later sentences all look back at the same few earlier ones (Thought Anchors 2025 [119])."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..method import check_count
from .lens import Lens, Piece, Probe, Reading, Unsuited, lens
from .result import HEADS, Measure

_COLUMNS = frozenset({"col_mass"})
_CLOSING = r"[\"')\]}\u00bb\u2019\u201d]*"
_END = re.compile(rf"(?:[.!?]+{_CLOSING}(?=\s+\S)|\n\s*\n(?=\S)|[\u3002\uff01\uff1f]{_CLOSING}(?=\s*\S))")


@lens("receivers", paper="Thought Anchors: Which LLM Reasoning Steps Matter? (2025) [119]")
@dataclass(frozen=True)
class Receivers(Lens):
    """How unevenly later sentences look at earlier ones, for every head.

    The vertical score of sentence j in a head is the mean, over the sentences at least `skip` (4) later, of the mean attention of their
    tokens to the tokens of j; the last `skip` sentences have none. Receiver-ness is its excess kurtosis over sentences. A sentence's
    score is the mean of its vertical scores in the `top` (20) heads.
    """

    skip: int = 4
    top: int = 20

    def __post_init__(self) -> None:
        check_count("skip", self.skip, 1)
        check_count("top", self.top, 1)

    def probe(self, reading: Reading) -> Probe:
        if reading.tokenizer is None:
            raise Unsuited("receivers needs the tokenizer, to tell sentences apart: give it, or leave this lens out")
        spans = sentences(reading.words)
        least = self.skip + 4  # a kurtosis of fewer than four numbers says nothing
        if len(spans) < least:
            raise Unsuited(
                f"receivers compares sentences and needs at least {least}, but the text has {len(spans)}: give a longer text, or leave "
                "this lens out"
            )
        return _ReceiverProbe(self, reading, spans)


class _ReceiverProbe(Probe):
    def __init__(self, lens: Receivers, reading: Reading, spans: list[tuple[int, int]]):
        self.lens, self.reading, self.spans = lens, reading, spans
        length = torch.tensor([e - b for b, e in spans], device=reading.device)
        self.sentence = torch.arange(len(spans), device=reading.device).repeat_interleave(length)  # of each token
        self.length = length
        self.got: dict[int, Tensor] = {}

    def attention(self, piece: Piece) -> None:
        """Adds what each key got, a query weighed by one over the length of its sentence, from sentences far enough behind."""
        first, stop = piece.first, piece.first + piece.q.shape[2]
        weigh = self.length[self.sentence[first:stop]].to(piece.lse.dtype).reciprocal()
        got = piece.measure(_COLUMNS, weigh)["col_mass"][0]
        # All columns at once, less the band of near sentences, which is small.
        tile = 64 if got.is_cpu else 512
        for b in range(first, stop, tile):
            e = min(b + tile, stop)
            left = self.spans[max(0, self._at(b) - self.lens.skip + 1)][0]
            for c in range(left, e, 8 * tile):  # a sentence may be long
                keys = slice(c, min(c + 8 * tile, e))
                near = self.sentence[b:e, None] - self.sentence[keys] < self.lens.skip
                weights = piece.weights(b - first, e - first, keys.start, keys.stop)
                got[:, keys] -= (weights * (near * weigh[b - first : e - first, None])).sum(1)
        by_sentence = got.new_zeros(got.shape[0], len(self.spans))
        by_sentence.index_add_(1, self.sentence[: got.shape[1]], got)
        kept = self.got.get(piece.layer)
        self.got[piece.layer] = by_sentence if kept is None else kept + by_sentence

    def _at(self, token: int) -> int:
        """The sentence of a token, without asking the device."""
        return bisect_right(self.spans, (token, self.reading.length + 1)) - 1

    def results(self) -> list[Measure]:
        count = len(self.spans)
        later = torch.arange(count - self.lens.skip, -self.lens.skip, -1, device=self.length.device).clamp(min=0)
        vertical = {i: x / self.length / later.where(later > 0, torch.nan) for i, x in self.got.items()}
        scored = count - self.lens.skip
        vertical = self.reading.table(vertical)
        receiver = kurtosis(vertical[..., :scored])
        known = receiver.flatten().nan_to_num(-torch.inf)
        best = known.argsort(descending=True, stable=True)[: min(self.lens.top, int(known.isfinite().sum()))]
        score = vertical.flatten(0, 1)[best].mean(0)
        starts, ends = torch.tensor(self.spans).T
        return [
            Measure.of("receivers.kurtosis", receiver, HEADS, "excess kurtosis", "how unevenly later sentences look at earlier ones"),
            Measure.of("receivers.vertical", vertical, (*HEADS, "sentence"), "share", "mean attention of later sentences to its tokens"),
            Measure.of("receivers.score", score, ("sentence",), "share", f"the same in the {len(best)} heads with the largest kurtosis"),
            Measure.of("receivers.start", starts, ("sentence",), "position", "a sentence's first token"),
            Measure.of("receivers.end", ends, ("sentence",), "position", "the token after its last"),
        ]  # fmt: skip


def kurtosis(x: Tensor) -> Tensor:
    """Excess kurtosis over the last dimension, biased (fourth over squared second central moment, less 3); NaN where all are equal."""
    x = x.double()
    d = x - x.mean(-1, keepdim=True)
    second = d.square().mean(-1)
    return (d.pow(4).mean(-1) / second.square() - 3).float()


def sentences(words: list[str]) -> list[tuple[int, int]]:
    """Token ranges (begin, end) that cover a text given token by token.

    A sentence ends at a full stop, question or exclamation mark with its closing quotes and brackets, where white space follows (at an
    ideographic full stop always), and at a blank line. Abbreviations count as ends: there is no list of them.
    """
    starts, at = [], 0
    for word in words:
        starts.append(at)
        at += len(word)
    edges = {bisect_left(starts, end.end()) for end in _END.finditer("".join(words))}
    return list(pairwise([0, *sorted(edges - {0, len(words)}), len(words)]))
