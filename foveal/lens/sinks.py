"""Attention sinks: which keys take attention from everybody, and how much (Gu et al. 2024 [18])."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..method import check_count, check_range
from .lens import Lens, Probe, Reading, lens
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

    def results(self) -> list[Measure]:
        reading, eps = self.reading, self.lens.threshold
        listed = max(1, reading.length - self.lens.tail)
        first, keys, heights = {}, {}, {}
        rate = torch.zeros(reading.length, device=reading.device)
        by_layer = {}
        for layer in reading.columns:
            x = reading.importance(layer)
            is_sink = (x > eps).float()
            rate += is_sink.sum(0)
            by_layer[layer] = is_sink[:, 0].mean()
            first[layer] = x[:, 0]
            heights[layer], keys[layer] = x[:, :listed].topk(min(self.lens.top, listed), -1)
        rate /= len(reading.columns) * reading.info.heads
        where = reading.table(keys).nan_to_num(-1).long()
        above = f"share of heads in which it gets more than {eps} of the attention of a query that sees it, on average"
        return [
            Measure.of("sinks.first", reading.table(first), HEADS, "share", "mean attention on the first token"),
            Measure.of("sinks.rate", rate[0], (), "share", "the sink rate: first token, " + above),
            Measure.of("sinks.rate_by_layer", reading.table(by_layer), ("layer",), "share", "first token, " + above),
            Measure.of("sinks.rate_by_position", rate, ("position",), "share", above),
            Measure.of("sinks.keys", where, (*HEADS, "rank"), "position", "tokens with the most attention; -1: not measured"),
            Measure.of("sinks.importance", reading.table(heights), (*HEADS, "rank"), "share", "their mean attention"),
        ]  # fmt: skip


def sink_rate(model, tokenizer, texts: int = 100, length: int = 64, threshold: float = 0.3, seed: int = 0) -> Measure:
    """The paper's own number: the sink rate of every position, mean over `texts` stretches of a novel of `length` tokens each.

    100 texts of 64 tokens, threshold 0.3 (the paper's). Returns a Measure [position]. Raises InputError for no texts and lengths below 3.
    """
    from ..tasks.perplexity import Perplexity
    from .reading import look

    check_count("texts", texts, 1)
    task = Perplexity(max_new_tokens=1)
    samples = task.samples(tokenizer, length, texts, seed=seed)
    rates = []
    for s in samples:
        ids = [*s.context, *s.question, *s.target]
        rates.append(look(model, None, ids, [Sinks(threshold=threshold)])["sinks.rate_by_position"])
    meaning = f"sink rate at {threshold}, mean of {texts} texts of {length} tokens"
    return Measure.of("sinks.rate_of_texts", torch.stack(rates).mean(0), ("position",), "share", meaning)
