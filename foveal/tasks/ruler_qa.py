"""RULER-style tasks, regenerated: questions on documents among distracting ones, from a local SQuAD or HotpotQA."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from foveal.errors import InputError
from foveal.tasks.drafted import Draft, Prompt
from foveal.tasks.local import find, read_json
from foveal.tasks.ruler import Ruler
from foveal.tasks.scoring import string_match_part

_ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the numbers of the documents: needed, and distracting first of all."""

    text: str
    golds: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DocumentQuestions(Ruler):
    """Base: "Document i:" blocks, those needed and random others, shuffled; as many as fit.

    data: a file or a folder with the data set (see the task). The questions are asked in an order drawn by the seed;
    those whose own documents do not fit the length are passed over. Score: 1 if any gold is in the answer.
    """

    scorer = staticmethod(string_match_part)
    needs_data = True
    # What the data set is called, the names its file may have, and what reads it.
    what = ""
    names: ClassVar[tuple[str, ...]] = ()
    parse: ClassVar[Callable[[Path], tuple[tuple[Question, ...], tuple[str, ...]]]]

    data: str | Path | None = None
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.read()  # a missing or wrong file is told before work starts

    def read(self) -> tuple[tuple[Question, ...], tuple[str, ...]]:
        """All questions and all documents."""
        return self.parse(*self.files())

    def files(self) -> list[Path]:
        """The file of the data set."""
        if self.data is None:
            raise InputError(f"Task '{self.name}' needs a local {self.what}: give its folder or file as `data`.")
        return [find(self.data, list(self.names), self.what)]

    def samples(self, tokenizer, length, n, seed=0, query_aware=False, positions=None):
        self._check(tokenizer, length, n, positions)
        questions, _ = self.read()
        found = []
        for index in random.Random(f"{self.name}/{seed}").sample(range(len(questions)), len(questions)):
            draft = self.draft(tokenizer, length, seed, index)
            if self._size(tokenizer, draft, draft.fewest) <= length:
                found.append(self._sample(tokenizer, length, seed, index, query_aware))
            if len(found) == n:
                return found
        raise InputError(
            f"Task '{self.name}' was asked for {n:,} samples of {length:,} tokens, but only {len(found):,} of its "
            f"{len(questions):,} questions fit; ask for fewer samples or more tokens."
        )

    def draft(self, tokenizer, length, seed, index):
        questions, documents = self.read()
        question, rng = questions[index], self._rng(seed, index)
        near = rng.sample(question.near, len(question.near))
        known = {*question.needed, *near}
        far = [i for i in range(len(documents)) if i not in known]
        chosen = [*question.needed, *near, *rng.sample(far, len(far))]
        order = rng.getrandbits(64)

        def build(pieces: int) -> Prompt:
            shown = chosen[:pieces]
            random.Random(order).shuffle(shown)
            blocks = [f"Document {i}:\n{documents[number]}" for i, number in enumerate(shown, 1)]
            text = f"{_ORDER}\n\nThe following are given documents.\n\n" + "\n\n".join(blocks)
            return Prompt(f"{text}\n\n", f"{_ORDER}\n\nQuestion: {question.text}", "Answer:", question.golds)

        return Draft(len(question.needed), build, len(chosen))


@cache
def _squad(path: Path) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    with _as_expected(path, "SQuAD 2.0"):
        articles = [
            [(_text(p["context"]), p["qas"]) for p in article["paragraphs"]] for article in read_json(path)["data"]
        ]
        numbers = _numbered([text for article in articles for text, _ in article])
        questions = []
        for article in articles:
            for text, asked in article:
                near = tuple(dict.fromkeys(numbers[other] for other, _ in article if other != text))
                for q in asked:
                    golds = tuple(dict.fromkeys(_text(answer["text"]) for answer in q["answers"]))
                    if golds and not q.get("is_impossible", False):
                        questions.append(Question(_text(q["question"]), golds, (numbers[text],), near))
    return _some(questions, path), tuple(numbers)


@cache
def _hotpotqa(path: Path) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    with _as_expected(path, "HotpotQA"):
        rows = [
            (
                _text(row["question"]),
                _text(row["answer"]),
                [f"{title}\n{''.join(parts)}" for title, parts in row["context"]],
            )
            for row in read_json(path)
        ]
        numbers = _numbered([text for _, _, texts in rows for text in texts])
        questions = [
            Question(asked, (gold,), tuple(dict.fromkeys(numbers[text] for text in texts)))
            for asked, gold, texts in rows
        ]
    return _some(questions, path), tuple(numbers)


def _numbered(texts: Sequence[str]) -> dict[str, int]:
    return {text: i for i, text in enumerate(sorted(set(texts)))}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r:.40}")
    return value


def _some(questions: list[Question], path: Path) -> tuple[Question, ...]:
    if not questions:
        raise InputError(f"Expected questions with an answer in {path}, found none; give another file.")
    return tuple(questions)


@contextmanager
def _as_expected(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"Expected {what} in {path}, but its fields are others ({type(error).__name__}: {error}); give the original."
        ) from error


class Squad(DocumentQuestions):
    """SQuAD 2.0, questions that have an answer (data: dev-v2.0.json or squad.json).

    Other paragraphs of the same article are the first to distract.
    """

    name = "qa_1"
    what, names, parse = "SQuAD 2.0", ("squad.json", "dev-v2.0.json"), staticmethod(_squad)


class HotpotQA(DocumentQuestions):
    """HotpotQA with its ten paragraphs each (data: hotpot_dev_distractor_v1.json or hotpotqa.json)."""

    name = "qa_2"
    what, names, parse = "HotpotQA", ("hotpotqa.json", "hotpot_dev_distractor_v1.json"), staticmethod(_hotpotqa)
