"""What an evaluation task is: samples of token ids, split where the cache is compressed, and a score."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path

from foveal.errors import InputError

# Depths of the answers in the document. Sample i asks at depth i modulo 5, so that five samples cover the range.
DEPTHS = (0.05, 0.275, 0.5, 0.725, 0.95)


@dataclass(frozen=True)
class Sample:
    """One question. `context + question` is the whole prompt; neighbours in a list may share an equal context.

    context: token ids that are prefilled, then compressed. question: token ids fed after that (never empty).
    target: the gold text or texts (kind "generate") or the token ids to be scored by teacher forcing (kind "nll").
    length: the length asked for, in tokens. depth: where the answer stands, 0 the start to 1 the end of the document.
    index, seed: the sample is a function of these, the task, the length and the tokenizer alone.
    turn: how many questions on the same context were asked and answered before this one, in the same conversation.
    extra: what else the scorer must know (the classes to choose from, the metric of this turn).
    counted: which target tokens count for the score of kind "nll"; None is all of them.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    target: str | tuple[str, ...] | tuple[int, ...]
    length: int
    depth: float | None
    index: int
    seed: int
    turn: int = 0
    extra: tuple[str, ...] = ()
    counted: tuple[bool, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Base of every task: a frozen dataclass with class attributes `name`, `kind`, `better` and the two methods below.

    kind "generate": generate up to `max_new_tokens` greedily after the question, then `score(sample, text)`.
    kind "nll": feed the question, then the target, then `score(sample, nll)` with nats per target token.
    """

    name = ""
    kind = "generate"
    better = "higher"
    # Whether a data set must be given as `data`.
    needs_data = False

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

    def files(self) -> list[Path]:
        """The files of a data set that the samples are made from; generated tasks have none."""
        return []

    def prepare(self, model, samples: list[Sample]) -> list[Sample]:
        """What only the dense model can tell about the samples (which tokens count), filled in; most tasks ask nothing."""
        return samples

    def counted(self, sample: Sample, losses: Sequence[float]) -> list[float]:
        """Of the nats per target token, those that count for the score of kind "nll"."""
        if len(losses) != len(sample.target):
            raise InputError(
                f"Expected one value in nats for each of {len(sample.target)} target tokens, got {len(losses)}; "
                "score the whole target."
            )
        return [x for x, yes in zip(losses, sample.counted or [True] * len(losses), strict=True) if yes]

    def _check(self, tokenizer, length: int, n: int, positions: int | None) -> None:
        limit = tokenizer.model_max_length if positions is None else positions
        _positive("length", length)
        _positive("n", n)
        if length > limit:
            raise InputError(
                f"Task '{self.name}' was asked for {length:,} tokens, but the model has {limit:,} positions; "
                f"ask for a length of at most {limit:,}."
            )

    def _rng(self, seed: int, index: int | str) -> random.Random:
        return random.Random(f"{self.name}/{seed}/{index}")


def encode(tokenizer, text: str, special: bool = False) -> list[int]:
    """Token ids of `text`; `special` puts the tokenizer's own beginning-of-sequence token in front, if it uses one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if special and tokenizer.bos_token_id is not None:
        usual = tokenizer("a", verbose=False)["input_ids"]
        if usual[:1] == [tokenizer.bos_token_id] and ids[:1] != usual[:1]:
            ids = usual[:1] + ids
    return ids


# A conversation over a document: each turn a question, the words that begin its answer, and the answer. The last
# turn's answer is what the model is asked for and is not part of the prompt.
Turn = tuple[str, str, str]


def prompts(
    tokenizer, document: str, questions: Sequence[tuple[str, str]], chat: bool = True
) -> tuple[list[int], list[list[int]]]:
    """Token ids of `document + question` as a chat prompt for each question, split at one boundary for all of them.

    `questions` are pairs: the question, and the words that begin the answer. Returns the shared context and one rest
    per question; context + rest is exactly the tokenisation of the whole prompt. Without a chat template, or with
    `chat` off, the prompt is plain text.
    """
    return conversations(tokenizer, document, [[(question, lead, "")] for question, lead in questions], chat)


def conversations(
    tokenizer, document: str, talks: Sequence[Sequence[Turn]], chat: bool = True
) -> tuple[list[int], list[list[int]]]:
    """As `prompts`, for conversations of several turns: all begin with the document, which is the shared context."""
    texts, tokenise = _rendered(tokenizer, document, talks, chat)
    starts = [_boundary(text, document, talk[0][0]) for text, talk in zip(texts, talks, strict=True)]
    if -1 in starts:
        raise InputError(
            f"Expected a chat template that keeps the prompt as it is, but {type(tokenizer).__name__}'s changes it; "
            "use another template, or none."
        )
    wholes = [tokenise(text) for text in texts]
    # Tokens may span the boundary, so the context ends where all prompts and their beginning alone still agree.
    split = _agree([tokenise(texts[0][: starts[0]]), *wholes])
    return wholes[0][:split], [whole[split:] for whole in wholes]


def prompt_size(tokenizer, document: str, talk: Sequence[Turn], chat: bool = True) -> int:
    """The tokens of one conversation's prompt, context and rest together."""
    (text,), tokenise = _rendered(tokenizer, document, [talk], chat)
    return len(tokenise(text))


def _rendered(tokenizer, document: str, talks: Sequence[Sequence[Turn]], chat: bool):
    chat = chat and bool(tokenizer.chat_template)
    return [_render(tokenizer, document, talk, chat) for talk in talks], partial(encode, tokenizer, special=not chat)


def _render(tokenizer, document: str, talk: Sequence[Turn], chat: bool) -> str:
    messages = [document + talk[0][0]]
    for (_, lead, answer), (question, _, _) in pairwise(talk):
        messages += [f"{lead} {answer}".strip(), question]
    lead = talk[-1][1]
    if not chat:
        said = [f"{asked}\n{reply}\n\n" for asked, reply in zip(messages[:-1:2], messages[1::2], strict=True)]
        return "".join(said) + messages[-1] + (f"\n{lead}" if lead else "")
    roles = cycle(("user", "assistant"))
    turns = [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]
    # Templates of reasoning models heed enable_thinking; all others ignore it.
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return prompt + lead


def _boundary(text: str, document: str, question: str) -> int:
    """Where the first question begins in the rendered text (-1: the template changed it); some templates trim."""
    whole = document + question
    trimmed = whole.strip()
    at = text.find(trimmed)
    return at if at < 0 else at + len(document) - (len(whole) - len(whole.lstrip()))


def _agree(rows: list[list[int]]) -> int:
    for i, column in enumerate(zip(*rows, strict=False)):
        if len(set(column)) > 1:
            return i
    return min(map(len, rows))


def largest(size: Callable[[int], int], fewest: int, limit: int, most: int | None = None) -> int | None:
    """The largest count from `fewest` to `most` whose size fits into `limit`; None if not even `fewest` does.

    `size` grows with the count (a little unevenly is fine); every size is a tokenisation, so guesses are interpolated.
    """
    low, at_low = fewest, size(fewest)
    if at_low > limit:
        return None
    high, at_high, step = None, 0, max(1, fewest // 2)
    while high is None:
        if most is not None and low >= most:
            return most
        probe = low + step if most is None else min(low + step, most)
        if (got := size(probe)) <= limit:
            # The slope so far tells how far to leap; a little beyond, so that the limit is passed soon.
            leap = (limit - got) * (probe - low) / max(got - at_low, 1)
            low, at_low, step = probe, got, int(1.1 * leap) + 1
        else:
            high, at_high = probe, got
    turn = 0
    while high - low > 1:
        share = (limit - at_low) / (at_high - at_low) if turn % 3 < 2 else 0.5  # halve now and then, against bad slopes
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        turn += 1
        if (got := size(middle)) <= limit:
            low, at_low = middle, got
        else:
            high, at_high = middle, got
    return low


def too_short(task: Task, length: int, least: int, needed: str) -> InputError:
    """The error of a length that cannot hold the smallest prompt."""
    return InputError(
        f"Task '{task.name}' needs at least {least:,} tokens for {needed} and {task.max_new_tokens} new tokens, but the "
        f"length is {length:,}; ask for more tokens."
    )


def place(seed: int, index: int) -> float:
    """A place from 0 to 1 for text number `index`: multiples of the golden ratio keep the places of one seed apart."""
    return (random.Random(f"place/{seed}").random() + index * 0.6180339887498949) % 1.0


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"Expected {name} to be a positive whole number, got {value!r}; choose one.")
