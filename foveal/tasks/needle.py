"""Needles in prose: magic numbers between the sentences of a novel (RULER's NIAH wording, Hsieh et al. 2024)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice, cycle

from foveal.data import book
from foveal.tasks.retrieval import Fact, Retrieval
from foveal.tasks.task import place

_KEYS = tuple("anchor basket candle dragon engine falcon garden hammer island jacket kettle ladder marble needle orange".split())


@cache
def _sentences() -> list[str]:
    return re.findall(r".+?(?:[.!?][\"')]*\s+|$)", book(), flags=re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Needle(Retrieval):
    """A stretch of *Moby-Dick* with one sentence for each 7-digit magic number, asked for by its key word."""

    name = "needle"
    opening = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n"
    )

    lead: str = "The special magic number for {key} mentioned in the provided text is"
    max_new_tokens: int = 12

    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """One fact for each depth, with distinct keys and numbers."""
        rng = self._rng(seed, group)
        keys = rng.sample(_KEYS, len(depths))
        numbers = rng.sample(range(1_000_000, 10_000_000), len(depths))
        return [
            Fact(
                sentence=f"One of the special magic numbers for {key} is: {number}. ",
                question=f"What is the special magic number for {key} mentioned in the provided text?",
                lead=self.lead.format(key=key),
                answer=str(number),
                depth=depth,
            )
            for key, number, depth in zip(keys, numbers, depths, strict=True)
        ]

    def filler(self, seed: int, group: int) -> Callable[[int], list[str]]:
        """Sentences from a place in the book that differs between documents and seeds."""
        sentences = _sentences()
        start = int(place(seed, group) * len(sentences))
        return lambda pieces: list(islice(cycle(sentences[start:] + sentences[:start]), pieces))
