"""Shared by the tasks that hide facts in a long document and ask for them."""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveal.errors import InputError
from foveal.tasks.task import DEPTHS, Sample, Task, Turn, conversations, largest, prompt_size


@dataclass(frozen=True)
class Fact:
    """A fact to hide: its sentence, a question and the words that begin the answer, the digits, the depth (0 to 1)."""

    sentence: str
    question: str
    lead: str
    answer: str
    depth: float


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """Hide `per_context` facts at different depths in one document and ask for each of them separately.

    The samples of one document share an equal `context` and follow each other: one prefill serves them all.
    """

    per_context: int
    # The first words of the document.
    opening = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.per_context <= len(DEPTHS):
            raise InputError(
                f"Expected per_context from 1 to {len(DEPTHS)} (facts in one document, each at its own depth), "
                f"got {self.per_context}; choose one of them."
            )

    @abstractmethod
    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """The facts of document number `group`, one for each depth."""

    @abstractmethod
    def filler(self, seed: int, group: int) -> Callable[[int], list[str]]:
        """A function that gives the first so many pieces of the text around the facts of document `group`."""

    def samples(self, tokenizer, length, n, seed=0, query_aware=False, positions=None) -> list[Sample]:
        self._check(tokenizer, length, n, positions)
        found: list[Sample] = []
        for group in range(-(-n // self.per_context)):
            found += self._group(tokenizer, length, seed, group, query_aware)
        return found[:n]

    def _group(self, tokenizer, length: int, seed: int, group: int, query_aware: bool) -> list[Sample]:
        first = group * self.per_context
        facts = self.facts(seed, group, [DEPTHS[i % len(DEPTHS)] for i in range(first, first + self.per_context)])
        context, questions = self._fill(tokenizer, length, facts, self.filler(seed, group))
        samples = []
        for i, (fact, question) in enumerate(zip(facts, questions, strict=True), first):
            ids = context + question
            split = len(ids) - 1 if query_aware else len(context)
            turn = len(self.talk(facts, i - first)) - 1
            parts = tuple(ids[:split]), tuple(ids[split:])
            samples.append(Sample(*parts, fact.answer, length, fact.depth, i, seed, turn))
        return samples

    def _fill(self, tokenizer, length: int, facts: list[Fact], filler: Callable[[int], list[str]]):
        """Context and questions of the longest document that fits into `length` tokens."""

        def document(pieces: int) -> str:
            return self._document(filler(pieces), facts)

        fewest, talks = len(facts), [self.talk(facts, i) for i in range(len(facts))]
        longest = max(talks, key=lambda talk: prompt_size(tokenizer, document(fewest), talk))

        def size(pieces: int) -> int:
            return prompt_size(tokenizer, document(pieces), longest) + self.max_new_tokens

        pieces = largest(size, fewest, length)
        if pieces is None:
            raise InputError(
                f"Task '{self.name}' needs at least {size(fewest):,} tokens for {len(facts)} facts, a question and "
                f"{self.max_new_tokens} new tokens, but the length is {length:,}; ask for more tokens or fewer facts."
            )
        return conversations(tokenizer, document(pieces), talks)

    def talk(self, facts: list[Fact], i: int) -> list[Turn]:
        """The conversation in which fact `i` is asked for: its question alone."""
        return [(facts[i].question, facts[i].lead, facts[i].answer)]

    def _document(self, pieces: list[str], facts: list[Fact]) -> str:
        return self.opening + "".join(self._spread(pieces, facts))

    def _spread(self, pieces: list[str], facts: list[Fact]) -> list[str]:
        text = list(pieces)
        for fact in sorted(facts, key=lambda fact: -fact.depth):  # from the back, so that earlier places stay
            text.insert(round(fact.depth * len(pieces)), fact.sentence)
        return text

    def score(self, sample: Sample, answer: str) -> float:
        """1.0 if the first number in the answer with as many digits as the target is the target, else 0.0."""
        found = re.search(rf"(?<!\d)\d{{{len(sample.target)}}}(?!\d)", answer)
        return float(found is not None and found.group() == sample.target)
