"""Perplexity of the tokens that need the long context (LongPPL; Fang et al., 2025, arXiv 2410.23771)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foveal.errors import InputError
from foveal.tasks.perplexity import Perplexity
from foveal.tasks.task import Sample


@dataclass(frozen=True, kw_only=True)
class KeyPerplexity(Perplexity):
    """`perplexity` of key tokens alone: those that the dense model predicts well, and only with the long context.

    A target counts if its log-probability is higher by more than `gain` nats with the whole context than with a short
    one, and above `-floor` nats with the whole (section 3.1: 2 and 2). short: the tokens of the short context as a
    share of the length (the paper: 4,096 of 32,768); targets share a short context by `short / 4` tokens at a time.
    `prepare` asks the dense model which tokens count; without it there is nothing to score.
    """

    name = "key-perplexity"

    max_new_tokens: int = 256
    short: float = 0.125
    gain: float = 2.0
    floor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.short < 1:
            raise InputError(f"Expected short to be a share of the length between 0 and 1, got {self.short!r}.")
        for name in ("gain", "floor"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"Expected {name} to be a positive number of nats, got {getattr(self, name)!r}.")

    def prepare(self, model, samples: list[Sample]) -> list[Sample]:
        """The samples with the key tokens marked, which takes two dense passes each.

        Raises `InputError` if no token of any sample is a key token.
        """
        marked = [dataclasses.replace(sample, counted=self.key_tokens(model, sample)) for sample in samples]
        if not any(any(sample.counted) for sample in marked):
            targets = sum(len(sample.target) for sample in samples)
            raise InputError(
                f"Task '{self.name}' found no key token among {targets:,} targets of {samples[0].length:,} tokens; "
                "ask for more samples, more max_new_tokens, a longer length or a smaller gain."
            )
        return marked

    def key_tokens(self, model, sample: Sample) -> tuple[bool, ...]:
        """Which of a sample's targets are key tokens to this model, which must be the dense one."""
        ids = [*sample.context, *sample.question, *sample.target]
        first, short = len(ids) - len(sample.target), max(1, int(self.short * sample.length))
        if first <= short:
            raise InputError(
                f"Expected a context longer than the short one of {short:,} tokens, got {first:,}; ask for a longer "
                "length or fewer max_new_tokens."
            )
        long = nats(model, ids, len(sample.target))
        stride, little = max(1, short // 4), []
        for start in range(first, len(ids), stride):
            part = ids[start - short : start + stride]
            little += nats(model, part, len(part) - short)
        return tuple(b - a > self.gain and a < self.floor for a, b in zip(long, little, strict=True))

    def score(self, sample: Sample, answer: Sequence[float]) -> float:
        """Mean negative log-likelihood of the key tokens, in nats per token; `answer` holds all targets' nats."""
        if sample.counted is None:
            raise InputError(f"Task '{self.name}' has samples without key tokens marked; call its `prepare` first.")
        if not any(sample.counted):
            raise InputError(f"Task '{self.name}' has a sample without any key token; pool `counted` over samples.")
        return super().score(sample, answer)


@torch.no_grad()
def nats(model, ids: Sequence[int], last: int) -> list[float]:
    """Negative log-likelihood of each of the `last` tokens of a text given all before it, in one dense pass."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(tokens, logits_to_keep=last + 1, use_cache=False).logits[0, :-1].float()
    return (-logits.log_softmax(-1).gather(1, tokens[0, -last:, None])[:, 0]).tolist()
