"""RULER-style tasks, regenerated: variable tracking and the counting of words (Hsieh et al., 2024)."""

import math
import random
import string
from dataclasses import dataclass
from itertools import pairwise

from foveal.errors import InputError
from foveal.tasks.drafted import Draft, Prompt
from foveal.tasks.ruler import NOISE, Ruler
from foveal.tasks.task import encode, largest
from foveal.tasks.words import vocabulary

_LETTERS = {"upper": string.ascii_uppercase, "lower": string.ascii_lowercase}


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Ruler):
    """A chain of assignments between noise lines: name every variable that holds the value.

    hops: assignments after the first (RULER: 4, so 5 names of 5 letters are the golds). An example of at most 500
    tokens, with names of 3 letters, comes first.
    """

    name = "vt"

    hops: int = 4
    max_new_tokens: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.hops, bool) or not isinstance(self.hops, int) or not 1 <= self.hops <= 100:
            raise InputError(f"Expected hops to be a whole number from 1 to 100, got {self.hops!r}; RULER's is 4.")

    def draft(self, tokenizer, length, seed, index):
        rng = self._rng(seed, index)
        chain, names, value = self._chain(rng, 5)
        order = rng.getrandbits(64)
        example = self._example(tokenizer, rng)

        def build(pieces: int) -> Prompt:
            prompt = self._prompt(chain, names, value, pieces, random.Random(order))
            return prompt._replace(document=f"{example}\n{prompt.document}")

        return Draft(len(chain), build)

    def _example(self, tokenizer, rng: random.Random) -> str:
        chain, names, value = self._chain(rng, 3)
        order = rng.getrandbits(64)

        def text(pieces: int) -> str:
            prompt = self._prompt(chain, names, value, pieces, random.Random(order))
            return f"{prompt.document}{prompt.question} {prompt.lead} {' '.join(names)}\n"

        return text(largest(lambda pieces: len(encode(tokenizer, text(pieces))), len(chain), 500) or len(chain))

    def _chain(self, rng: random.Random, letters: int) -> tuple[list[str], list[str], str]:
        names = _distinct(rng, self.hops + 1, letters, "upper")
        value = str(rng.randint(10_000, 99_999))
        following = [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        return [f"VAR {names[0]} = {value}", *following], names, value

    def _prompt(self, chain: list[str], names: list[str], value: str, pieces: int, rng: random.Random) -> Prompt:
        lines = [NOISE] * pieces
        for i, at in enumerate(sorted(rng.sample(range(pieces), len(chain)))):
            lines.insert(at + i, chain[i])
        task = "Memorize and track the chain(s) of variable assignment hidden in the following text."
        question = f"Question: Find all variables that are assigned the value {value} in the text above."
        lead = (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:"
        )
        return Prompt(f"{task}\n\n" + "\n".join(lines) + "\n", question, lead, tuple(names))


@dataclass(frozen=True, kw_only=True)
class CommonWords(Ruler):
    """A numbered list of words: ten of them stand in it 30 times, the others 3 times; name the ten.

    Below 4,096 tokens 6 times and once. An example of 40 words, 10 times and 3 times (below 4,096: 20 words, 3 times
    and once), comes first. A piece is a word, counted once.
    """

    name = "cwe"

    max_new_tokens: int = 120

    def draft(self, tokenizer, length, seed, index):
        rng = self._rng(seed, index)
        many, few = (30, 3) if length >= 4096 else (6, 1)
        words = rng.sample(vocabulary(), len(vocabulary()))
        small = (40, 10, 3) if length >= 4096 else (20, 3, 1)
        example = _counted(rng.sample(vocabulary(), small[0]), *small[1:], rng)
        said = " ".join(f"{i}. {word}" for i, word in enumerate(example.golds, 1))
        before = f"{example.document}{example.question} {example.lead} {said}\n"
        order = rng.getrandbits(64)

        def build(pieces: int) -> Prompt:
            prompt = _counted(words[:pieces], many, few, random.Random(order))
            return prompt._replace(document=before + prompt.document)

        return Draft(11, build, len(words))


def _counted(words: list[str], many: int, few: int, rng: random.Random) -> Prompt:
    listed = words[:10] * many + words[10:] * few
    rng.shuffle(listed)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    question = "Question: What are the 10 most common words in the above list?"
    lead = "Answer: The top 10 words that appear most often in the list are:"
    return Prompt(f"{task}\n{text}\n", question, lead, tuple(words[:10]))


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Ruler):
    """Coded words of 6 letters whose counts follow a zeta distribution: name the three most frequent.

    Of M words the one of rank k stands there floor(M / (k^2 zeta(2))) times; rank 1 is "...", ranks 2 to 4 the golds.
    The vocabulary has one word for every 50 tokens. A piece is one of the M words.
    """

    name = "fwe"

    max_new_tokens: int = 50

    def draft(self, tokenizer, length, seed, index):
        rng = self._rng(seed, index)
        room = max(length - self.max_new_tokens, 0)
        ranked = ["...", *_distinct(rng, max(room // 50, 5) - 1, 6, "lower")]
        order = rng.getrandbits(64)

        def build(pieces: int) -> Prompt:
            counts = [math.floor(pieces / (rank**2 * math.pi**2 / 6)) for rank in range(1, len(ranked) + 1)]
            words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
            random.Random(order).shuffle(words)
            task = (
                "Read the following coded text and track the frequency of each coded word. "
                "Find the three most frequently appeared coded words."
            )
            question = (
                "Question: Do not provide any explanation. Please ignore the dots '....'. "
                "What are the three most frequently appeared words in the above coded text?"
            )
            lead = "Answer: According to the coded text above, the three most frequently appeared words are:"
            return Prompt(f"{task} {' '.join(words)}\n", question, lead, tuple(ranked[1:4]))

        return Draft(100, build)  # from 73 on the fourth rank is more frequent than the fifth


def _distinct(rng: random.Random, count: int, letters: int, case: str) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(_LETTERS[case], k=letters))] = None
    return list(found)
