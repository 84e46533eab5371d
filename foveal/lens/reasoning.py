"""Which sentences of a reasoning trace matter: resampling, receiver heads, attention suppression (Thought Anchors 2025 [119])."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InputError
from ..method import check_count, check_range
from ..model_info import ModelInfo
from ..tasks.task import encode
from .attribution.ranks import kendall, nulls
from .attribution.tap import check_model
from .lens import Reading
from .reading import look, tokens_of
from .receivers import Receivers, sentences

TEMPERATURE = 0.6
NUCLEUS = 0.9999
MOST = 100
"""Tokens of a distribution that are compared at most (the paper's)."""
_LOGITS = 1 << 27  # held at once

Progress = Callable[[str, float], None]
Embed = Callable[[str], Sequence[float]]


# ---------------------------------------------------------------------- attention suppression


@dataclass(frozen=True, eq=False)
class Suppression:
    """How much later sentences change when no query may look at an earlier one.

    log_kl [sentences, sentences]: row i, column j < i: mean over the tokens of i of ln(KL + 1e-9) between their distributions without and
    with j suppressed, nats; NaN for j >= i and where nothing was suppressed.  spans: token ranges.  texts: the sentences.
    """

    log_kl: Tensor
    spans: tuple[tuple[int, int], ...]
    texts: tuple[str, ...]

    @property
    def effect(self) -> Tensor:
        """log_kl less its mean over j for each i: some sentences change more whatever is suppressed."""
        return self.log_kl - self.log_kl.nanmean(1, keepdim=True)

    @property
    def score(self) -> Tensor:
        """Mean effect of a sentence on those after it, [sentences]; NaN where there are none."""
        return self.effect.nanmean(0)


@torch.no_grad()
def suppression(
    model,
    tokenizer,
    text: str | Sequence[int],
    *,
    start: int = 0,
    temperature: float = TEMPERATURE,
    progress: Progress | None = None,
) -> Suppression:
    """Hide each sentence from every head of every layer, one at a time, and see which later sentences change.

    start: the token where the trace begins; sentences before it (the question) are kept and listed but never suppressed.  Positions stay
    as they are. Key 0 always stays visible: a query with no key at all would spread over the future. Costs one forward pass for each
    sentence.  Raises InputError for texts of fewer than two sentences and what `foveal.lens.look` refuses.
    """
    check_model(model)
    check_range("temperature", temperature, 1e-3)
    reading, spans = _read(model, tokenizer, text, start)
    n, ids = reading.length, torch.tensor([reading.ids], device=model.device)
    found = torch.full((len(spans), len(spans)), torch.nan)
    hidden = [j for j, (b, _) in enumerate(spans) if b >= start and j < len(spans) - 1]
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, min(8, _LOGITS // (n * vocabulary) - 1))
    for first in range(0, len(hidden), size):
        some = hidden[first : first + size]
        mask = torch.ones(len(some) + 1, n, dtype=torch.long, device=model.device)
        for row, j in enumerate(some):
            mask[row + 1, max(1, spans[j][0]) : spans[j][1]] = 0
        positions = torch.arange(n, device=model.device).expand(len(mask), -1)
        # The untouched run shares a batch with the others, so that what is equal is equal to the last bit.
        logits = model(ids.expand(len(mask), -1), attention_mask=mask, position_ids=positions, use_cache=False).logits
        for row, j in enumerate(some):
            after = spans[j][1]  # token t is predicted at position t - 1
            change = _divergence(logits[0, after - 1 : n - 1], logits[row + 1, after - 1 : n - 1], temperature)
            log = (change + 1e-9).log()
            for i in range(j + 1, len(spans)):
                found[i, j] = log[spans[i][0] - after : spans[i][1] - after].mean()
        if progress is not None:
            progress("sentences suppressed", (first + len(some)) / len(hidden))
    return Suppression(found, tuple(spans), tuple("".join(reading.words[b:e]) for b, e in spans))


def _read(model, tokenizer, text: str | Sequence[int], start: int) -> tuple[Reading, list[tuple[int, int]]]:
    info = ModelInfo.of(model)
    if tokenizer is None:
        raise InputError("expected the tokenizer, to tell sentences apart, got None: give it")
    reading = Reading(info, tokenizer, tokens_of(model, tokenizer, text, info), model.device)
    if not 0 <= start < reading.length:
        raise InputError(f"start = {start}: expected a token of the text, 0 to {reading.length - 1}")
    spans = sentences(reading.words)
    if sum(b >= start for b, _ in spans) < 2:
        raise InputError(
            f"expected a trace of at least two sentences from token {start} on: give a longer text, or an earlier start"
        )
    return reading, spans


def _divergence(base: Tensor, other: Tensor, temperature: float) -> Tensor:
    """KL(base || other) of each row, [rows], over the tokens in the nucleus of either, both made to sum to one there."""
    out = []
    for x, y in zip(base.split(64), other.split(64), strict=True):
        x, y = (z.double() / temperature for z in (x, y))
        keep = _nucleus(x) | _nucleus(y)
        p, q = (z.masked_fill(~keep, -torch.inf).log_softmax(-1) for z in (x, y))
        out.append((p.exp() * (p - q).masked_fill(~keep, 0.0)).sum(-1).clamp(min=0))
    return torch.cat(out)


def _nucleus(z: Tensor) -> Tensor:
    """The fewest tokens whose probabilities reach NUCLEUS together, at most MOST: bool like z."""
    p, order = z.softmax(-1).topk(min(MOST, z.shape[-1]), dim=-1)
    kept = p.cumsum(-1) - p < NUCLEUS
    return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, order, kept)


# ---------------------------------------------------------------------- resampling


@dataclass(frozen=True)
class Rollout:
    """One way a trace went on: its first sentence, and the answer it came to (None: none was found)."""

    sentence: str
    answer: Hashable | None


@dataclass(frozen=True)
class Resampled:
    """How the answers change with one sentence, in nats.

    counterfactual: KL of the answers where another sentence stood against those where this one (or one like it) did; NaN where no or every
    rollout was different.  resampling: KL of all rollouts from before it against those from after it.  different: share of the rollouts
    from before it whose first sentence says something else; low: overdetermined.  answered: rollouts with an answer, before and after.
    """

    counterfactual: float
    resampling: float
    different: float
    answered: tuple[int, int]


def counterfactual(
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    sentence: str,
    *,
    embed: Embed | None = None,
    threshold: float = 0.8,
) -> Resampled:
    """Importance of a sentence from rollouts sampled before it and after it (step 2 of the paper's method).

    embed: text -> vector; default counts of words. threshold: the paper's 0.8, which goes with the sentence embeddings of a MiniLM; a
    rollout whose first sentence has a cosine below it is different. Raises InputError where either list has no answer at all.
    """
    check_range("threshold", threshold, -1, 1)
    told, later = ([r for r in x if r.answer is not None] for x in (before, after))
    if not told or not later:
        raise InputError(
            f"expected answers in both lists of rollouts, got {len(told)} before and {len(later)} after: sample more or longer"
        )
    apart = [_cosine(r.sentence, sentence, embed) < threshold for r in told]
    other = [r.answer for r, a in zip(told, apart, strict=True) if a]
    same = [r.answer for r, a in zip(told, apart, strict=True) if not a] + [r.answer for r in later]
    importance = answer_divergence(other, same) if other else float("nan")
    return Resampled(
        importance,
        answer_divergence([r.answer for r in told], [r.answer for r in later]),
        sum(apart) / len(apart),
        (len(told), len(later)),
    )


def answer_divergence(some: Sequence[Hashable], others: Sequence[Hashable]) -> float:
    """KL(some || others) of two lists of answers, nats, every share smoothed by 1e-9."""
    p, q = Counter(some), Counter(others)
    names = sorted(p.keys() | q.keys(), key=repr)
    return _kl(torch.tensor([p[a] / len(some) for a in names]), torch.tensor([q[a] / len(others) for a in names]))


def _kl(p: Tensor, q: Tensor) -> float:
    p, q = ((x.double() + 1e-9) / (x.double() + 1e-9).sum() for x in (p, q))
    return float((p * (p / q).log()).sum())


def _cosine(a: str, b: str, embed: Embed | None) -> float:
    if embed is not None:
        x, y = (torch.as_tensor(embed(t)).double() for t in (a, b))
        return float(torch.nn.functional.cosine_similarity(x, y, dim=0))
    x, y = (Counter(re.findall(r"\w+", t.lower())) for t in (a, b))
    if not x or not y:
        return 1.0 if x == y else 0.0
    return sum(x[w] * y[w] for w in x) / (sum(c * c for c in x.values()) * sum(c * c for c in y.values())) ** 0.5


@torch.no_grad()
def resample(
    model,
    tokenizer,
    text: str,
    answer: Callable[[str], Hashable | None],
    *,
    start: int = 0,
    count: int = 100,
    max_new_tokens: int = 512,
    temperature: float = TEMPERATURE,
    top_p: float = 0.95,
    embed: Embed | None = None,
    threshold: float = 0.8,
    batch: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Resampled | None]:
    """Importance of every sentence of a trace from `count` rollouts before and after it; None for the question and the last sentence.

    answer: finds the answer in a whole text (question, trace so far, continuation), None where there is none.  max_new_tokens: the paper
    lets traces run to 16,000. Costs `count` generations for each sentence. Errors as `suppression` and `counterfactual`.
    """
    check_model(model)
    check_count("count", count, 2)
    check_count("batch", batch, 1)
    reading, spans = _read(model, tokenizer, text, start)
    trace = [j for j, (b, _) in enumerate(spans) if b >= start]
    sampled: dict[int, list[Rollout]] = {}
    kwargs = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "do_sample": True}
    for n, j in enumerate(trace):
        ids = reading.ids[: spans[j][0]]
        if ids:
            sampled[j] = [*_rollouts(model, tokenizer, ids, answer, count, batch, seed + j, kwargs)]
        if progress is not None:
            progress("rollouts", (n + 1) / len(trace))
    out: list[Resampled | None] = [None] * len(spans)
    for j in trace:
        if j in sampled and j + 1 in sampled:
            words = "".join(reading.words[spans[j][0] : spans[j][1]])
            out[j] = counterfactual(sampled[j], sampled[j + 1], words, embed=embed, threshold=threshold)
    return out


def _rollouts(
    model, tokenizer, ids: list[int], answer, count: int, batch: int, seed: int, kwargs: dict
) -> Iterator[Rollout]:
    """Sampled continuations of a prefix; the random state outside is left alone."""
    prompt = torch.tensor([ids], device=model.device)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for done in range(0, count, batch):
            size = min(batch, count - done)
            mask = torch.ones_like(prompt)
            out = model.generate(
                prompt, attention_mask=mask, num_return_sequences=size, pad_token_id=pad, top_k=0, **kwargs
            )
            for row in out.tolist():
                said = tokenizer.decode(row[len(ids) :], skip_special_tokens=True)
                ends = sentences([*said])  # a character a piece: ends then are places in the text
                yield Rollout(said[: ends[0][1]], answer(tokenizer.decode(ids, skip_special_tokens=True) + said))


@torch.no_grad()
def forced_answers(
    model,
    tokenizer,
    text: str | Sequence[int],
    cue: str,
    answers: Sequence[str],
    *,
    start: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """What the model would answer if it had to before each sentence and after the last: probabilities [sentences + 1, answers].

    cue: what forces an answer ("So the answer is").  answers: the candidates, among which probabilities are shared out. The forced-answer
    importance of sentence i is the divergence of row i from row i + 1: `forced_importance`. NaN before `start`.
    """
    check_model(model)
    if len(set(answers)) < 2 or len(set(answers)) < len(answers):
        raise InputError(f"expected at least two different answers, got {list(answers)}")
    reading, spans = _read(model, tokenizer, text, start)
    tails = [encode(tokenizer, a) for a in answers]
    if not all(tails):
        raise InputError("an answer is empty: give at least one token each")
    ends = [b for b, _ in spans] + [reading.length]
    found = torch.full((len(ends), len(answers)), torch.nan)
    for n, end in enumerate(ends):
        if end >= start:
            prefix = reading.ids[:end] + encode(tokenizer, cue)
            found[n] = torch.stack([logprob(model, prefix, tail) for tail in tails]).softmax(0)
        if progress is not None:
            progress("forced answers", (n + 1) / len(ends))
    return found


def logprob(model, prefix: list[int], tail: list[int]) -> Tensor:
    """Log-probability of the tokens `tail` after `prefix`, nats."""
    if not prefix:
        raise InputError("the text before the first sentence and the cue are both empty: give a question or a cue")
    x = torch.tensor([prefix + tail], device=model.device)
    logits = model(x, use_cache=False, logits_to_keep=len(tail) + 1).logits[0, -len(tail) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, x[0, -len(tail) :, None]).sum().cpu()


def forced_importance(probabilities: Tensor) -> Tensor:
    """KL of the forced answers before each sentence against those after it, [sentences]; NaN where they were not asked."""
    pairs = pairwise(probabilities)
    return torch.tensor([float("nan") if p.isnan().any() else _kl(p, q) for p, q in pairs])


# ---------------------------------------------------------------------- together


@dataclass(frozen=True, eq=False)
class Anchors:
    """The two measures that look inside, for each sentence, NaN where one has no score: attention (receiver heads) and suppression."""

    texts: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    attention: Tensor
    suppression: Tensor

    def agreement(self, draws: int = 200, seed: int = 0) -> tuple[float, float]:
        """(Kendall's tau of the two over the sentences that have both, what 95 % of shuffled orders stay below)."""
        both = ~(self.attention.isnan() | self.suppression.isnan())
        if int(both.sum()) < 3:
            raise InputError(
                f"expected at least 3 sentences with both scores, got {int(both.sum())}: give a longer trace"
            )
        x, y = self.attention[both], self.suppression[both]
        return kendall(x, y), float(nulls(x, y, kendall, draws, seed)["shuffle"].quantile(0.95))

    def top(self, count: int = 5, by: str = "suppression") -> list[tuple[int, str, float]]:
        """(sentence, text, score) of the highest by "suppression" or "attention"."""
        if by not in ("suppression", "attention"):
            raise InputError(f"by = '{by}': expected 'suppression' or 'attention'")
        score = getattr(self, by)
        order = score.nan_to_num(-torch.inf).argsort(descending=True, stable=True)[
            : min(count, int((~score.isnan()).sum()))
        ]
        return [(int(i), self.texts[i], float(score[i])) for i in order]


def thought_anchors(
    model,
    tokenizer,
    text: str | Sequence[int],
    *,
    start: int = 0,
    skip: int = 4,
    top: int = 20,
    progress: Progress | None = None,
) -> Anchors:
    """Sentence scores of a trace by receiver heads (skip and top as the lens "receivers") and by suppression. Resampling: `resample`.

    Raises what both do: at least skip + 4 sentences are needed.
    """
    seen = look(model, tokenizer, text, [Receivers(skip, top)])
    inside = suppression(model, tokenizer, text, start=start, progress=progress)
    attention = seen["receivers.score"].clone()
    attention[seen["receivers.start"] < start] = torch.nan
    return Anchors(inside.texts, inside.spans, attention, inside.score)
