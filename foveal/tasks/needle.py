"""Needles in prose: magic numbers between the sentences of a novel (after the multi-key task of RULER, 2024)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from foveal.tasks.retrieval import Fact, Retrieval
from foveal.tasks.task import place
from foveal.tasks.words import sentences

_KEYS = (
    *("anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "hammer"),
    *("island", "jacket", "kettle", "ladder", "marble", "needle", "orange"),
)


@dataclass(frozen=True, kw_only=True)
class Needle(Retrieval):
    """A stretch of *Moby-Dick* with a sentence for each 7-digit magic number, asked for by its key word.

    The sentence begins as the answer does ("The magic number of the anchor is"): with RULER's own wording ("One of the
    special magic numbers for anchor is:") the default model mixes up several keys even with dense attention. With more
    than two numbers in a document, dense attention itself answers less than 85 % at 2,048 tokens.
    """

    name = "needle"
    opening = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n"
    )

    per_context: int = 2
    max_new_tokens: int = 12

    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """One fact for each depth, with distinct keys and numbers."""
        rng = self._rng(seed, group)
        keys = rng.sample(_KEYS, len(depths))
        numbers = rng.sample(range(1_000_000, 10_000_000), len(depths))
        facts = []
        for key, number, depth in zip(keys, numbers, depths, strict=True):
            lead = f"The magic number of the {key} is"
            question = f"What is the magic number of the {key}?"
            facts.append(Fact(f"{lead} {number}. ", question, lead, str(number), depth))
        return facts

    def filler(self, seed: int, group: int) -> Callable[[int], list[str]]:
        """Sentences from a place in the book that differs between documents and seeds."""
        text = sentences()
        start = int(place(seed, group) * len(text))
        return lambda pieces: list(islice(cycle(text[start:] + text[:start]), pieces))
