"""Perplexity of a novel: how well are the next tokens predicted from a compressed cache? (mean nats per token)"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from foveal.data import book
from foveal.errors import InputError
from foveal.tasks.task import Sample, Task, encode, place


@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """`length` tokens of *Moby-Dick*; the last `max_new_tokens` (64) are scored by teacher forcing.

    The context is all before them but one token, which is the question: feeding it gives the first target's logits.
    The same text serves query-aware and query-agnostic runs.
    """

    name = "perplexity"
    kind = "nll"
    better = "lower"

    max_new_tokens: int = 64

    def samples(self, tokenizer, length, n, seed=0, query_aware=False, positions=None) -> list[Sample]:
        self._check(tokenizer, length, n, positions)
        least = self.max_new_tokens + 2
        if length < least:
            raise InputError(
                f"Task '{self.name}' needs at least {least} tokens ({self.max_new_tokens} of them scored), but the "
                f"length is {length}; ask for more."
            )
        samples = []
        for i in range(n):
            ids = _tokens(tokenizer, length, place(seed, i))
            split = length - self.max_new_tokens
            context, question, target = ids[: split - 1], ids[split - 1 : split], ids[split:]
            samples.append(Sample(tuple(context), tuple(question), tuple(target), length, None, i, seed))
        return samples

    def score(self, sample: Sample, answer: Sequence[float]) -> float:
        """Mean negative log-likelihood of the target tokens, in nats per token; perplexity is its exponential."""
        return math.fsum(counted := self.counted(sample, answer)) / len(counted)


def _tokens(tokenizer, length: int, where: float) -> list[int]:
    text = book()
    start = text.find("\n\n", int(where * len(text))) + 2  # a paragraph's beginning; the book's, if none follows
    start = start if start > 1 else 0
    text, size = text[start:] + text[:start], 6 * length
    ids = encode(tokenizer, text[:size], special=True)
    while len(ids) < length + 8 and size < len(text):  # a cut changes the last tokens of what it leaves
        size *= 2
        ids = encode(tokenizer, text[:size], special=True)
    if len(ids) < length:
        raise InputError(f"The book has {len(ids):,} tokens, but the length is {length:,}; ask for at most as many.")
    return ids[:length]
