"""What an evaluation task is: samples of token ids, split where the cache is compressed, and a score."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from foveal.errors import InputError

# Depths of the answers in the document. Sample i asks at depth i modulo 5, so that five samples cover the range.
DEPTHS = (0.05, 0.275, 0.5, 0.725, 0.95)


@dataclass(frozen=True)
class Sample:
    """One question. `context + question` is the whole prompt; neighbours in a list may share an equal context.

    context: token ids that are prefilled, then compressed. question: token ids fed after that (never empty).
    target: the gold text (kind "generate") or the token ids to be scored by teacher forcing (kind "nll").
    length: the length asked for, in tokens. depth: where the answer stands, 0 the start to 1 the end of the document.
    index, seed: the sample is a function of these, the task, the length and the tokenizer alone.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    target: str | tuple[int, ...]
    length: int
    depth: float | None
    index: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Base of every task: a frozen dataclass with class attributes `name`, `kind`, `better` and the two methods below.

    kind "generate": generate up to `max_new_tokens` greedily after the question, then `score(sample, text)`.
    kind "nll": feed the question, then the target, then `score(sample, nll)` with nats per target token.
    """

    name = ""
    kind = "generate"
    better = "higher"

    max_new_tokens: int

    def __post_init__(self) -> None:
        _positive("max_new_tokens", self.max_new_tokens)

    @abstractmethod
    def samples(
        self,
        tokenizer,
        length: int,
        n: int,
        seed: int = 0,
        query_aware: bool = False,
        positions: int | None = None,
    ) -> list[Sample]:
        """`n` samples whose context, question and new tokens together fill at most `length` tokens.

        Query-agnostic by default: the question comes after compression. `query_aware` moves it into the context and
        leaves one token to be fed. `positions` is the most the model can hold (default: the tokenizer's own limit).
        Sample i does not depend on `n`. Raises `InputError` for a length that is too short or beyond `positions`.
        """

    @abstractmethod
    def score(self, sample: Sample, answer: str | Sequence[float]) -> float:
        """The score of one answer: text for kind "generate", nats per target token for kind "nll"."""

    def _check(self, tokenizer, length: int, n: int, positions: int | None) -> None:
        limit = tokenizer.model_max_length if positions is None else positions
        _positive("length", length)
        _positive("n", n)
        if length > limit:
            raise InputError(
                f"Task '{self.name}' was asked for {length:,} tokens, but the model has {limit:,} positions; "
                f"ask for a length of at most {limit:,}."
            )

    def _rng(self, seed: int, index: int) -> random.Random:
        return random.Random(f"{self.name}/{seed}/{index}")


def encode(tokenizer, text: str, special: bool = False) -> list[int]:
    """Token ids of `text`; `special` puts the tokenizer's own beginning-of-sequence token in front, if it uses one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if special and tokenizer.bos_token_id is not None:
        usual = tokenizer("a", verbose=False)["input_ids"]
        if usual[:1] == [tokenizer.bos_token_id] and ids[:1] != usual[:1]:
            ids = usual[:1] + ids
    return ids


def prompts(tokenizer, document: str, questions: Sequence[tuple[str, str]]) -> tuple[list[int], list[list[int]]]:
    """Token ids of `document + question` as a chat prompt for each question, split at one boundary for all of them.

    `questions` are pairs: the question, and the words that begin the answer. Returns the shared context and one rest
    per question; context + rest is exactly the tokenisation of the whole prompt. Without a chat template the prompt is
    plain text.
    """
    texts = [_render(tokenizer, document + question, lead) for question, lead in questions]
    tokenise = partial(encode, tokenizer, special=not tokenizer.chat_template)
    starts = [text.rfind(question) for text, (question, _) in zip(texts, questions, strict=True)]
    if -1 in starts:
        raise InputError(
            f"Expected a chat template that keeps the prompt as it is, but {type(tokenizer).__name__}'s changes it; "
            "use another template, or none."
        )
    wholes = [tokenise(text) for text in texts]
    # Tokens may span the boundary, so the context ends where all prompts and their beginning alone still agree.
    split = _agree([tokenise(texts[0][: starts[0]]), *wholes])
    return wholes[0][:split], [whole[split:] for whole in wholes]


def _render(tokenizer, content: str, lead: str) -> str:
    if not tokenizer.chat_template:
        return f"{content}\n{lead}"
    chat = [{"role": "user", "content": content}]
    # Templates of reasoning models heed enable_thinking; all others ignore it.
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return prompt + lead


def _agree(rows: list[list[int]]) -> int:
    for i, column in enumerate(zip(*rows, strict=False)):
        if len(set(column)) > 1:
            return i
    return min(map(len, rows))


def place(seed: int, index: int) -> float:
    """A place from 0 to 1 for text number `index`: multiples of the golden ratio keep the places of one seed apart."""
    return (random.Random(f"place/{seed}").random() + index * 0.6180339887498949) % 1.0


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"Expected {name} to be a positive whole number, got {value!r}; choose one.")
