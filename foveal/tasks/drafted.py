"""Shared by the tasks whose prompt is a document of a chosen size, a question, and texts that the answer must hold."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from foveal.tasks.scoring import string_match_all
from foveal.tasks.task import Sample, Task, largest, prompt_size, prompts, too_short


class Prompt(NamedTuple):
    """A document, the question that follows it, the words that begin the answer, the golds, where the answer stands."""

    document: str
    question: str
    lead: str
    golds: tuple[str, ...]
    depth: float | None = None


class Draft(NamedTuple):
    """A prompt yet to be sized: the fewest pieces of haystack, the prompt with so many, the most there are."""

    fewest: int
    build: Callable[[int], Prompt]
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class Drafted(Task):
    """Base: `draft` says what sample `index` is with any number of pieces; the most that fit are taken.

    The score is the share of golds found in the answer (RULER's `string_match_all`) unless `scorer` says otherwise.
    """

    scorer = staticmethod(string_match_all)

    @abstractmethod
    def draft(self, tokenizer, length: int, seed: int, index: int) -> Draft:
        """Sample `index` of this length with any number of pieces of haystack."""

    def samples(self, tokenizer, length, n, seed=0, query_aware=False, positions=None) -> list[Sample]:
        self._check(tokenizer, length, n, positions)
        return [self._sample(tokenizer, length, seed, index, query_aware) for index in range(n)]

    def _sample(self, tokenizer, length: int, seed: int, index: int, query_aware: bool) -> Sample:
        draft = self.draft(tokenizer, length, seed, index)
        pieces = largest(lambda pieces: self._size(tokenizer, draft, pieces), draft.fewest, length, draft.most)
        if pieces is None:
            raise too_short(self, length, self._size(tokenizer, draft, draft.fewest), "its smallest prompt")
        prompt = draft.build(pieces)
        context, (question,) = prompts(tokenizer, prompt.document, [(prompt.question, prompt.lead)])
        ids = context + question
        split = len(ids) - 1 if query_aware else len(context)
        return Sample(tuple(ids[:split]), tuple(ids[split:]), prompt.golds, length, prompt.depth, index, seed)

    def _size(self, tokenizer, draft: Draft, pieces: int) -> int:
        prompt = draft.build(pieces)
        return prompt_size(tokenizer, prompt.document, [(prompt.question, prompt.lead, "")]) + self.max_new_tokens

    def score(self, sample: Sample, answer: str) -> float:
        """The share of golds found in the answer (`part`: 1 if any is), upper and lower case alike."""
        return self.scorer(answer, sample.target)
