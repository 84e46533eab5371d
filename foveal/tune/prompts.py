"""The user's own prompts as a task: answers are compared with the given ones, or the model's words with the dense model's."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..attach import attach
from ..compare.ask import Asker
from ..errors import InputError
from ..tasks import Sample, Task
from ..tasks.local import read_lines
from ..tasks.scoring import normalized
from ..tasks.task import encode


@dataclass(frozen=True, kw_only=True)
class Prompts(Task):
    """Prompts of a file of JSON lines, {"prompt": text}, as the chat template puts them (plain: as they are).

    The prompt is read and compressed whole, but for its last token, as `generate` does. max_new_tokens: tokens answered or compared.
    """

    name = "prompts"

    data: Path
    plain: bool = False
    max_new_tokens: int = 64

    def rows(self) -> list[dict[str, Any]]:
        """The lines, each checked; raises InputError naming the line that cannot be used."""
        rows = read_lines(self.data)
        for row in rows:
            if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise InputError(
                    f'expected a text as "prompt" on line {row[""]} of {self.data}, got {row.get("prompt")!r:.60}: add it'
                )
        return rows

    def files(self) -> list[Path]:
        """The file of prompts."""
        return [self.data]

    def samples(self, tokenizer, length, n, seed=0, query_aware=False, positions=None) -> list[Sample]:
        """The first `n` prompts in an order drawn by the seed; `length` is the most tokens, new ones included."""
        rows, found = self.rows(), []
        limit = min(length, positions or length)
        for index in random.Random(f"{self.name}/{seed}").sample(range(len(rows)), min(n, len(rows))):
            ids = self._encode(tokenizer, rows[index]["prompt"])
            if len(ids) < 2:
                raise InputError(
                    f"the prompt on line {rows[index]['']} of {self.data} has {len(ids)} tokens, expected at least 2 (all but the last "
                    "are compressed): lengthen it or take it out"
                )
            if len(ids) + self.max_new_tokens > limit:
                raise InputError(
                    f"the prompt on line {rows[index]['']} of {self.data} has {len(ids):,} tokens; with {self.max_new_tokens} "
                    f"new ones expected up to {limit:,}, which is what the model holds: shorten it or take it out"
                )
            parts = tuple(ids[:-1]), tuple(ids[-1:])
            found.append(Sample(*parts, self.target(rows[index]), len(ids), None, index, seed))
        return found

    def target(self, row: dict[str, Any]) -> tuple:
        """What the scorer compares with."""
        return ()

    def _encode(self, tokenizer, text: str) -> list[int]:
        if not tokenizer.chat_template or self.plain:
            return encode(tokenizer, text, special=True)
        talk = [{"role": "user", "content": text}]
        return encode(tokenizer, tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))


@dataclass(frozen=True, kw_only=True)
class Answered(Prompts):
    """Prompts with an "answer" (a text, or a list of them): the score is the share of its words in what the model says.

    That is ROUGE-1 recall after SQuAD's normalisation (case, articles, punctuation), the best over the given answers.
    """

    def target(self, row):
        answer = row["answer"]
        golds = answer if isinstance(answer, list) else [answer]
        if not golds or not all(isinstance(g, str | int | float) and normalized(str(g)) for g in golds):
            raise InputError(
                f'expected a text as "answer" on line {row[""]} of {self.data}, got {answer!r:.60}: correct it'
            )
        return tuple(map(str, golds))

    def score(self, sample: Sample, answer: str) -> float:
        said = Counter(normalized(answer).split())
        golds = (Counter(normalized(gold).split()) for gold in sample.target)
        return max((gold & said).total() / gold.total() for gold in golds)


@dataclass(frozen=True, kw_only=True)
class Continued(Prompts):
    """Prompts without answers: how well the dense model's own greedy continuation is predicted, in nats per token.

    Its exponential is a perplexity, and dense's divided by a method's is the share of dense.
    """

    kind = "nll"
    better = "lower"

    def prepare(self, model, samples: list[Sample]) -> list[Sample]:
        """The samples with what the dense model says as targets."""
        return [dataclasses.replace(s, target=self._says(model, s)) for s in samples]

    @torch.no_grad()
    def _says(self, model, sample: Sample) -> tuple[int, ...]:
        with attach(model):
            store = model(torch.tensor([sample.context], device=model.device), logits_to_keep=1).past_key_values
            return tuple(Asker(model, None).say(store, sample.question, self.max_new_tokens))

    def score(self, sample: Sample, answer: Sequence[float]) -> float:
        """Mean nats per token of the continuation."""
        return math.fsum(self.counted(sample, answer)) / len(answer)


def read_prompts(data: str | Path, *, plain: bool = False, max_new_tokens: int = 64) -> Prompts:
    """The task of a file: `Answered` where every line has an answer, `Continued` where none has.

    Raises InputError that names the line for what is not JSON, has no prompt, or has an answer where others have none.
    """
    path = Path(data).expanduser()
    options = {"data": path, "plain": plain, "max_new_tokens": max_new_tokens}
    rows = Continued(**options).rows()
    without = [row[""] for row in rows if "answer" not in row]
    if len(without) == len(rows):
        return Continued(**options)
    if without:
        raise InputError(
            f'expected an "answer" on every line of {path} or on none, but line {without[0]} has none: add it, or take them all out'
        )
    task = Answered(**options)
    for row in rows:
        task.target(row)
    return task
