"""Pass keys in a repeated filler: does a method keep what stands out? (Mohtashami & Jaggi 2023; RULER's noise text)"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveal.tasks.retrieval import Fact, Retrieval

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_NAMES = ("Alice", "Henry", "Maria", "Peter", "Sarah", "David", "Emma", "Frank", "Julia", "Oscar")


@dataclass(frozen=True, kw_only=True)
class Passkey(Retrieval):
    """Lines of filler with one line for each 5-digit pass key; each key belongs to a person and is asked for by name."""

    name = "passkey"
    opening = (
        "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about it.\n"
    )

    max_new_tokens: int = 10

    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """One fact for each depth, with distinct people and keys."""
        rng = self._rng(seed, group)
        people = rng.sample(_NAMES, len(depths))
        keys = rng.sample(range(10_000, 100_000), len(depths))
        return [
            Fact(
                sentence=f"The pass key of {person} is {key}. Remember it. {key} is the pass key of {person}.\n",
                question=f"What is the pass key of {person}?",
                lead=f"The pass key of {person} is",
                answer=str(key),
                depth=depth,
            )
            for person, key, depth in zip(people, keys, depths, strict=True)
        ]

    def filler(self, seed: int, group: int) -> Callable[[int], list[str]]:
        """The same line over and over."""
        return lambda pieces: [_NOISE] * pieces
