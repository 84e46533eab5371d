"""Attention sinks: which keys take attention from everybody, and how much (Gu et al. 2024 [18])."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..method import check_count, check_range
from .lens import Lens, Piece, Probe, Reading, lens
from .result import HEADS, Measure


@lens("sinks", paper="When Attention Sink Emerges in Language Models: An Empirical View (2024) [18]")
@dataclass(frozen=True)
class Sinks(Lens):
    """How much every head looks at the first token, and which tokens are sinks.

    The importance of key j in a head is the mean of its attention over the length - j queries that see it. threshold: a key with more
    is a sink of that head (0.3, the paper's); the sink rate of a position is the share of measured heads it is a sink of.  top: the
    strongest keys that are listed for each head; the last `tail` ones, which few queries see, are not among them.
    """

    threshold: float = 0.3
    top: int = 8
    tail: int = 4

    stats = frozenset({"col_mass"})

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, 1)
        check_count("top", self.top, 1)
        check_count("tail", self.tail, 0)

    def probe(self, reading: Reading) -> Probe:
        return _SinkProbe(self, reading)


class _SinkProbe(Probe):
    def __init__(self, lens: Sinks, reading: Reading):
        self.lens, self.reading = lens, reading
        self.aligned: dict[int, Tensor] = {}

    def attention(self, piece: Piece) -> None:
        """Adds up the cosine of every query with the first key: what holds a sink is a direction, not a long key."""
        key = F.normalize(piece.per_head(piece.k[:, :, :1]).float(), dim=-1)
        found = (F.normalize(piece.q.float(), dim=-1) * key).sum((0, 2, 3))
        self.aligned[piece.layer] = self.aligned.get(piece.layer, 0.0) + found

    def results(self) -> list[Measure]:
        reading, eps = self.reading, self.lens.threshold
        listed = max(1, reading.length - self.lens.tail)
        first, keys, heights = {}, {}, {}
        rate = torch.zeros(reading.length)
        by_layer = {}
        for layer in reading.columns:
            x = reading.importance(layer)
            is_sink = (x > eps).float()
            rate += is_sink.sum(0)
            by_layer[layer] = is_sink[:, 0].mean()
            first[layer] = x[:, 0]
            heights[layer], keys[layer] = x[:, :listed].topk(min(self.lens.top, listed), -1)
        rate /= len(reading.columns) * reading.info.heads
        cosine = reading.table(self.aligned) / reading.length
        where = reading.table(keys).nan_to_num(-1).long()
        above = f"share of heads in which it gets more than {eps} of the attention of a query that sees it, on average"
        return [
            Measure.of("sinks.first", reading.table(first), HEADS, "share", "mean attention on the first token"),
            Measure.of("sinks.rate", rate[0], (), "share", "the sink rate: first token, " + above),
            Measure.of("sinks.rate_by_layer", reading.table(by_layer), ("layer",), "share", "first token, " + above),
            Measure.of("sinks.rate_by_position", rate, ("position",), "share", above),
            Measure.of("sinks.cosine", cosine, HEADS, "cosine", "of a query with the first key, mean"),
            Measure.of("sinks.keys", where, (*HEADS, "rank"), "position", "tokens with the most attention; -1: not measured"),
            Measure.of("sinks.importance", reading.table(heights), (*HEADS, "rank"), "share", "their mean attention"),
        ]  # fmt: skip


CONTROLS = ("random", "repeated")


def sink_rate(
    model,
    tokenizer,
    texts: int = 100,
    length: int = 64,
    threshold: float = 0.3,
    seed: int = 0,
    *,
    control: str | None = None,
) -> Measure:
    """The paper's own number: the sink rate of every position, mean over `texts` stretches of a novel of `length` tokens each.

    100 texts of 64 tokens, threshold 0.3 (the paper's).  control: the paper's other inputs, "random" tokens of the vocabulary or one
    random token "repeated". Returns a Measure [position]. Raises InputError for no texts, lengths below 3 and other controls.
    """
    from .reading import look

    check_count("texts", texts, 1)
    check_count("length", length, 3)
    rates = []
    for ids in _texts(model, tokenizer, texts, length, seed, control):
        rates.append(look(model, None, ids, [Sinks(threshold=threshold)])["sinks.rate_by_position"])
    what = "texts" if control is None else f"texts of {control} tokens"
    meaning = f"sink rate at {threshold}, mean of {texts} {what} of {length} tokens"
    return Measure.of("sinks.rate_of_texts", torch.stack(rates).mean(0), ("position",), "share", meaning)


def _texts(model, tokenizer, texts: int, length: int, seed: int, control: str | None) -> list[list[int]]:
    if control is None:
        from ..tasks.perplexity import Perplexity

        samples = Perplexity(max_new_tokens=1).samples(tokenizer, length, texts, seed=seed)
        return [[*s.context, *s.question, *s.target] for s in samples]
    if control not in CONTROLS:
        raise InputError(f"control = {control!r}: expected {' or '.join(CONTROLS)}, or None for a novel")
    generator = torch.Generator().manual_seed(seed)
    size = 1 if control == "repeated" else length
    drawn = torch.randint(model.get_input_embeddings().num_embeddings, (texts, size), generator=generator)
    return drawn.expand(-1, length).tolist()


def heavy_columns(mass: Tensor, ratio: float = 10.0) -> list[int]:
    """The survey's detector [38]: keys whose column of attention exceeds `ratio` times the mean column; mass [length], a sum over queries.

    ratio: the survey leaves it open; 10 is chosen here. Unlike the importance above, it favours early keys, which more queries see.
    """
    if mass.ndim != 1 or not len(mass):
        raise InputError(f"expected the attention that each key got, [length], got {list(mass.shape)}")
    check_range("ratio", ratio, 0)
    return (mass > ratio * mass.mean()).nonzero().flatten().tolist()
