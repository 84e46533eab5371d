"""What heads copy: from a needle in a text (Wu et al. 2024), and from repeated random tokens (Tang et al. 2024)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attach import Session, attach
from .method import Method, check_range
from .model_info import ModelInfo
from .ops import ragged
from .ops.ragged import Logit
from .step import Step
from .tasks.needle import Needle
from .tasks.retrieval import Fact
from .tasks.task import Sample, encode

COPIES, TEXTS = 4, 4
"""The probe with random tokens: so many times over, in so many texts."""
RIGHT = 0.5
"""A run counts when more than this share of the answer's words came back."""

# ---------------------------------------------------------------------- scores of what was recorded


def copy_scores(looked: Tensor, prompt: Sequence[int], span: tuple[int, int], answer: Sequence[int]) -> Tensor:
    """Share of the needle's tokens prompt[a:b] that each head copied, [layers, heads].

    looked: [steps, layers, heads], the position each head looked at most in the pass that produced answer[step].
    A token is copied when it lies in the needle and equals the one produced.
    """
    a, b = span
    produced = torch.tensor(answer)[:, None, None]
    copied = [((looked == p) & (produced == prompt[p])).any(0) for p in range(a, b)]
    return torch.stack(copied).float().mean(0)


def answer_span(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Where one of the `answers` stands: exactly, else the first window with over 90 % of its distinct tokens."""

    def same(window: Sequence[int], answer: Sequence[int]) -> bool:
        return list(window) == list(answer)

    def alike(window: Sequence[int], answer: Sequence[int]) -> bool:
        return len(set(window) & set(answer)) > 0.9 * len(set(answer))

    for fits in (same, alike):
        for answer in answers:
            n = len(answer)
            for a in range(len(prompt) - n + 1):
                if fits(prompt[a : a + n], answer):
                    return a, a + n
    return None


def offset_mass(q: Tensor, k: Tensor, lse: Tensor, offset: int, logit: Logit) -> Tensor:
    """The attention weight of each query on the key `offset` places before it, [heads, length - offset].

    q [1, heads, length, head_dim], k [1, kv_heads, length, head_dim], lse [1, heads, length]. Costs one
    product a query.
    """
    groups, length, dim = k.shape[1:]
    rows = length - offset
    query = q[0, :, offset:].unflatten(0, (groups, -1)).transpose(1, 2).reshape(groups * rows, -1, dim)
    z = ragged.logits(query, k[0, :, :rows].reshape(groups * rows, 1, dim), logit)
    z = z.view(groups, rows, -1).transpose(1, 2).flatten(0, 1)
    return (z - lse[0, :, offset:]).exp()


def repeat_scores(q: Tensor, k: Tensor, lse: Tensor, start: int, period: int, logit: Logit) -> tuple[Tensor, Tensor]:
    """Echo and induction scores [heads] of one layer, on a prompt that repeats `period` tokens from `start` on.

    Echo is the weight on all earlier copies of the query's token, induction that on the tokens after them; both are
    means over the queries of the second copy and later. Shapes as in `offset_mass`.
    """
    length = q.shape[2]
    echo, induction = (torch.zeros(q.shape[1], device=q.device) for _ in range(2))
    for back in range(period, length - start, period):
        for total, offset in ((echo, back), (induction, back - 1)):
            mass = offset_mass(q, k, lse, offset, logit)
            total += mass[:, start + back - offset :].sum(1)
    queries = length - start - period
    return echo / queries, induction / queries


# ---------------------------------------------------------------------- probes


@dataclass(frozen=True, eq=False)
class CopyProbe(Method):
    """Records in decode which token each head looks at most: record[layer] = token ids [heads] of the latest step."""

    record: dict[int, Tensor] = field(default_factory=dict)

    def after(self, step: Step) -> None:
        # From one row of logits in decode; the statistic `row_argmax` would be computed for the whole prompt as well.
        if step.decode:
            slot = step.scores()[:, :, 0].argmax(-1, keepdim=True)
            self.record[step.layer] = step.per_head(step.token).gather(2, slot)[0, :, 0].long().cpu()


@dataclass(frozen=True, eq=False)
class RepeatProbe(Method):
    """Measures prompts that repeat `period` tokens from position `start` on.

    record[layer] = a pair (echo, induction), both [heads], for each sequence.
    """

    needs = frozenset({"lse"})

    start: int
    period: int
    record: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def after(self, step: Step) -> None:
        found = repeat_scores(step.q, step.k_new, step.stats["lse"], self.start, self.period, step.logit)
        self.record.setdefault(step.layer, []).append((found[0].cpu(), found[1].cpu()))


# ---------------------------------------------------------------------- runs

# fmt: off
_WORDS = (
    "amber", "anchor", "basket", "blanket", "bottle", "candle", "carpet", "copper", "cotton", "dragon", "engine",
    "falcon", "feather", "garden", "ginger", "hammer", "honey", "island", "jacket", "kettle", "ladder", "lemon",
    "marble", "mirror", "needle", "orange", "parrot", "pepper", "pillow", "pocket", "ribbon", "saddle", "silver",
    "spider", "ticket", "tiger", "tulip", "velvet", "violin",
)
_OWNERS = (
    "gardener", "librarian", "pianist", "dentist", "postman", "teacher", "plumber", "painter", "astronaut", "magician",
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Password(Needle):
    """A password of three words and a number, which no model can know, hidden once in a stretch of a novel."""

    name = "password"
    opening = "A secret password is hidden within the following text. Memorize it. I will ask for it afterwards.\n"

    per_context: int = 1
    max_new_tokens: int = 24

    def facts(self, seed: int, group: int, depths: Sequence[float]) -> list[Fact]:
        """The one fact of document number `group`."""
        rng = self._rng(seed, group)
        owner = rng.choice(_OWNERS)
        answer = " ".join([*rng.sample(_WORDS, 3), str(rng.randrange(1000, 10_000))])
        lead = f"The secret password of the {owner} is"
        return [Fact(f"{lead} {answer}. ", f"What is the secret password of the {owner}?", lead, answer, depths[0])]

    def score(self, sample: Sample, answer: str) -> float:
        """ROUGE-1 recall: the share of the password's words in the answer."""
        words = sample.target.split()
        return len(set(words) & set(re.findall(r"\w+", answer))) / len(words)


@torch.no_grad()
def copying(model, tokenizer, task: Password, runs: Sequence[Sample]) -> Iterator[Tensor | None]:
    """For each run the share of the needle each head copied, [layers, heads]; None where it was answered wrong."""
    probe = CopyProbe()
    with attach(model, probe) as session:
        for sample in runs:
            prompt = [*sample.context, *sample.question]
            span = answer_span(prompt, [encode(tokenizer, lead + sample.target) for lead in (" ", "")])
            looked, answer = _answer(session, tokenizer, prompt, probe, task.max_new_tokens)
            right = span is not None and task.score(sample, tokenizer.decode(answer)) > RIGHT
            yield copy_scores(looked, prompt, span, answer) if right else None


def _answer(session: Session, tokenizer, prompt: list[int], probe: CopyProbe, most: int) -> tuple[Tensor, list[int]]:
    """Greedy decoding to the end of the line: where each head looked [steps, layers, heads], and the tokens."""
    model, info = session.model, session.info
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    session.decoder(input_ids=torch.tensor([prompt[:-1]], device=model.device))
    store, looked, answer = session.store, [], [prompt[-1]]
    for _ in range(most):
        token = torch.tensor([answer[-1:]], device=model.device)
        answer.append(int(model(input_ids=token, past_key_values=store).logits[0, -1].argmax()))
        row = torch.full((info.n_layers, info.heads), -1)
        for layer, at in probe.record.items():
            row[layer] = at
        looked.append(row)
        if answer[-1] in ends or "\n" in tokenizer.decode(answer[-1:]):
            break
    return torch.stack(looked), answer[1:]


def random_texts(tokenizer, period: int, seed: int, limit: int) -> list[list[int]]:
    """`TEXTS` prompts of up to `limit` tokens: the tokenizer's first token, if it has one, and `COPIES` times `period`
    distinct random tokens."""
    pool = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    check_range("period", period, 2, min(len(pool), (limit - 1) // COPIES))
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [first + random.Random(f"repeat/{seed}/{i}").sample(pool, period) * COPIES for i in range(TEXTS)]


@torch.no_grad()
def repetition(model, texts: Sequence[Sequence[int]], period: int) -> dict[str, Tensor]:
    """Scores "induction" and "echo", [layers, heads], means over `texts` as `random_texts` makes them."""
    info = ModelInfo.of(model)
    probe = RepeatProbe(start=len(texts[0]) - COPIES * period, period=period)
    with attach(model, probe) as session:
        session.decoder(input_ids=torch.tensor(texts, device=model.device))
    echo, induction = (torch.zeros(info.n_layers, info.heads) for _ in range(2))
    for layer, found in probe.record.items():
        echo[layer], induction[layer] = (torch.stack(x).mean(0) for x in zip(*found, strict=True))
    # A weight taken from its log-sum-exp may exceed one by a rounding error.
    return {"induction": induction.clamp(0, 1), "echo": echo.clamp(0, 1)}
