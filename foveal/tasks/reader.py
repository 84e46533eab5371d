"""Shared by the readers of published benchmarks: rows of a local file, cut in the middle to the length asked for."""

import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from foveal.errors import InputError, suggest
from foveal.tasks.local import find, read_json, read_lines
from foveal.tasks.scoring import Scorer
from foveal.tasks.task import Sample, Task, Turn, conversations, encode, largest, prompt_size


@dataclass(frozen=True)
class Part:
    """One set of a benchmark: how its prompt is written, scored, and how many tokens are generated.

    template: the prompt around "{context}"; what stands before and in the context is read before compression, the rest
    is the question. chat: whether the prompt goes through the chat template. first_line: only the answer's is scored.
    """

    template: str
    scorer: Scorer
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False


class Source(NamedTuple):
    """The names a set's file may have in a folder, its paths on the hub, and what it is called inside a zip archive."""

    names: list[str]
    hub: tuple[str, ...]
    member: str | None = None


class Asked(NamedTuple):
    """A question on a context: its text, the golds, what else the scorer must know."""

    question: str
    golds: tuple[str, ...]
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reader(Task):
    """Base of the benchmark readers.

    subset: which of the benchmark's sets (`parts`). data: a folder or file with the original data, or the id of the
    data set on the hub. max_new_tokens: the benchmark's own for this set unless given. truncate: cut contexts that are
    too long in the middle, as the benchmarks do; if off, samples that do not fit are passed over. The rows are taken in
    an order drawn by the seed. Raises `InputError` for a missing or malformed file (with the line) before any work.
    """

    needs_data = True
    # The benchmark's name for people, where it is on the hub, and its sets.
    title = ""
    hub = ""
    parts: ClassVar[dict[str, Part]] = {}

    subset: str = ""
    data: str | Path | None = None
    truncate: bool = True
    max_new_tokens: int = field(default=None)

    def __post_init__(self) -> None:
        base = type(self).name
        if self._key not in self.parts:
            raise InputError(
                f"Expected a set of {self.title}, like '{base}:{next(iter(self.parts))}', got '{self.subset}'; "
                f"{suggest(self.subset, list(self.parts))}"
            )
        if self.max_new_tokens is None:
            object.__setattr__(self, "max_new_tokens", self.part.max_new_tokens)
        object.__setattr__(self, "name", f"{base}:{self.subset}")
        super().__post_init__()
        if self.data is None:
            raise InputError(
                f"Task '{self.name}' needs {self.title}: give its folder as `data`, or '{self.hub}' to fetch it."
            )
        for row in self.rows():
            for one in self.ask(row)[1]:
                self._check_golds(one, row[""])

    def _check_golds(self, one: Asked, line: int) -> None:
        """Raise for golds that the scorer cannot read, like a word where it compares numbers."""
        try:
            if not one.golds:
                raise ValueError("none")
            self._rate("0", one.golds, one.extra)
        except (ValueError, IndexError):
            raise InputError(
                f"Expected answers that can be scored on line {line} of {self.data}, got {one.golds!r:.60}; correct it."
            ) from None

    @property
    def _key(self) -> str:
        return self.subset

    @property
    def part(self) -> Part:
        """How this set is asked and scored."""
        return self.parts[self._key]

    @abstractmethod
    def source(self) -> Source:
        """Where the rows are."""

    def file(self) -> Path:
        """The file with the rows, here or fetched from the hub."""
        names, hub, _ = self.source()
        return find(self.data, names, f"{self.title}'s {names[0]}", hub)

    def files(self) -> list[Path]:
        """The file with the rows."""
        return [self.file()]

    def rows(self) -> Sequence[dict[str, Any]]:
        """The rows of the file: JSON lines, or a list in a ".json" file; read once as long as it is the same."""
        path = self.file()
        return _rows(path, self.source().member, path.stat().st_mtime_ns)

    @abstractmethod
    def ask(self, row: dict[str, Any]) -> tuple[str, list[Asked]]:
        """The context of a row and the questions on it."""

    def talks(self, asked: list[Asked]) -> list[list[Turn]]:
        """The conversation for each question: itself alone."""
        return [[(one.question, "", "")] for one in asked]

    def samples(self, tokenizer, length, n, seed=0, query_aware=False, positions=None) -> list[Sample]:
        self._check(tokenizer, length, n, positions)
        rows, found = self.rows(), []
        for index in random.Random(f"{self.name}/{seed}").sample(range(len(rows)), len(rows)):
            context, asked = self.ask(rows[index])
            fitted = self._fit(tokenizer, length, context, asked)
            if fitted is None:
                continue
            for turn, (one, question) in enumerate(zip(asked, fitted[1], strict=True)):
                ids, split = [*fitted[0], *question], len(fitted[0])
                split = len(ids) - 1 if query_aware else split
                parts = tuple(ids[:split]), tuple(ids[split:])
                found.append(Sample(*parts, one.golds, length, None, index, seed, turn, one.extra))
            if len(found) >= n:
                return found[:n]
        raise InputError(
            f"Task '{self.name}' was asked for {n:,} samples of {length:,} tokens, but only {len(found):,} of its "
            f"{len(rows):,} rows' questions fit; ask for fewer samples or more tokens."
        )

    def _fit(self, tokenizer, length: int, context: str, asked: list[Asked]):
        """Context and questions as token ids that fit `length`; None if they cannot."""
        before, _, _ = self.part.template.partition("{context}")
        talks, chat = self.talks(asked), self.part.chat
        longest = max(talks, key=lambda talk: prompt_size(tokenizer, before, talk, chat))

        def size(text: str) -> int:
            return prompt_size(tokenizer, before + text, longest, chat) + self.max_new_tokens

        if size(context) > length:
            if not self.truncate:
                return None
            ids = encode(tokenizer, context)
            kept = largest(lambda kept: size(_cut(tokenizer, ids, kept)), 1, length, len(ids))
            if kept is None:
                return None
            context = _cut(tokenizer, ids, kept)
        return conversations(tokenizer, before + context, talks, chat)

    def score(self, sample: Sample, answer: str) -> float:
        """The benchmark's own score of this set, from 0 to 1."""
        if self.part.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        return self._rate(answer, sample.target, sample.extra)

    def _rate(self, answer: str, golds: tuple[str, ...], extra: tuple[str, ...]) -> float:
        return self.part.scorer(answer, golds, extra)

    def question(self, **fields: str) -> str:
        """What follows the context in the template, its fields filled in."""
        text = self.part.template.partition("{context}")[2]
        return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), text)


def _cut(tokenizer, ids: list[int], kept: int) -> str:
    """The text of the first and last tokens, `kept` together."""
    front = (kept + 1) // 2
    halves = ids[:front], ids[len(ids) - (kept - front) :]
    return "".join(tokenizer.decode(half, clean_up_tokenization_spaces=False) for half in halves)


def texts(value: Any) -> tuple[str, ...]:
    """A gold, or a list of golds however nested, as texts; what is null is none."""
    if isinstance(value, list):
        return tuple(text for one in value for text in texts(one))
    return () if value is None else (str(value),)


def four(options: Any, where: str) -> tuple[str, ...]:
    """The four options of a question."""
    if len(found := texts(options)) != 4:
        raise InputError(f"Expected four options on {where}, got {len(found)}; correct it.")
    return found


@lru_cache(maxsize=4)
def _rows(path: Path, member: str | None, changed: int) -> list[dict[str, Any]]:
    if path.suffix != ".json":
        return read_lines(path, member)
    rows = read_json(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"Expected a list of objects in {path}, got {type(rows).__name__}; give the original file.")
    return [row | {"": number} for number, row in enumerate(rows, 1)]
