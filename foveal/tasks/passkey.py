"""A pass key in a repeated filler: does a method keep what stands out? (Mohtashami and Jaggi, 2023)"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveal.tasks.retrieval import Fact, Retrieval

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_PEOPLE = ("Alice", "Henry", "Maria", "Peter", "Sarah", "David", "Emma", "Frank", "Julia", "Oscar")


@dataclass(frozen=True, kw_only=True)
class Passkey(Retrieval):
    """Lines of filler around a line with a 5-digit pass key; with several in one document, each belongs to a person.

    One by default: in a filler that only repeats itself, small models mix up several keys even with dense attention.
    Without "Answer with the number." the default model explains what a pass key is when the line stands far back.
    """

    name = "passkey"
    opening = (
        "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about it.\n"
    )

    # What the number is called.
    what = "pass key"

    per_context: int = 1
    max_new_tokens: int = 10

    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """One fact for each depth, with distinct people and keys."""
        rng = self._rng(seed, group)
        people = rng.sample(_PEOPLE, len(depths))
        keys = self._keys(rng, len(depths))
        facts = []
        for person, key, depth in zip(people, keys, depths, strict=True):
            what = self.what if len(depths) == 1 else f"{self.what} of {person}"
            sentence = f"The {what} is {key}. Remember it. {key} is the {what}.\n"
            facts.append(Fact(sentence, f"What is the {what}? Answer with the number.", f"The {what} is", key, depth))
        return facts

    def _keys(self, rng: random.Random, count: int) -> list[str]:
        return [str(key) for key in rng.sample(range(10_000, 100_000), count)]

    def filler(self, seed: int, group: int) -> Callable[[int], list[str]]:
        """The same line over and over."""
        return lambda pieces: [_NOISE] * pieces
