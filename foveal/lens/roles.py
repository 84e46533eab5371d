"""Which heads turn away from the system when a user contradicts it, and is its role kept (Diagnose, Localize, Align 2025 [100])."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.conflicts import Conflict
from ..errors import InputError
from ..heads import HeadRoles, _circumstances
from ..hub import model_identity
from ..method import check_count, check_range
from ..model_info import ModelInfo
from .lens import Lens, Piece, Probe, Reading
from .ranking import HeadRanking, Pairs
from .reading import look
from .result import HEADS, Measure

Span = tuple[int, int]
Judge = Callable[[Conflict, str], float]
"""Adherence of an answer to the system's role, 1.00 to 5.00."""

Progress = Callable[[str, float], None]
_TILE = 64
_NAME = "drift"


def cras(goal: float, role: float, knowledge: float, constraint: float) -> float:
    """Role adherence: the mean of goal alignment, role consistency, knowledge boundary and constraint compliance, each 1 to 5."""
    scores = {"goal": goal, "role": role, "knowledge": knowledge, "constraint": constraint}
    for name, x in scores.items():
        check_range(name, x, 1, 5)
    return sum(scores.values()) / 4


def by_rule(conflict: Conflict, answer: str) -> float:
    """A judge without a model: 1 + 4 times how far the answer keeps to the rule of the pair (constraint compliance alone)."""
    return 1 + 4 * float(conflict.rule(answer))


@dataclass(frozen=True, eq=False)
class Drift:
    """How the attention of every head moves when the user contradicts the system.

    score [layers, heads]: mean over pairs of |change of adherence| * distance.  distance [pairs, layers, heads]: total variation between
    where answers look, over system, conflict and the rest, without and with the conflict, 0 to 1.  system [2, pairs, layers, heads]:
    attention on the system's instruction without and with.  adherence [2, pairs]: 1 to 5, without and with.  answers: likewise.
    Layers without full attention are 0.
    """

    score: Tensor
    distance: Tensor
    system: Tensor
    adherence: Tensor
    answers: tuple[tuple[str, str], ...]
    identity: dict[str, Any]
    source: dict[str, Any]
    measured: tuple[int, ...]

    def ranking(self) -> HeadRanking:
        """Heads by drift, the largest first."""
        return HeadRanking(HeadRoles(self.identity, {_NAME: self.score}, self.source, self.measured), _NAME)

    def focal(self, share: float = 0.05) -> Pairs:
        """The heads that drift most: a share of all measured, at least one."""
        check_range("share", share, 0, 1)
        order = self.ranking()
        return order.top(max(1, round(share * len(order))))

    def focal_layers(self, count: int = 4, share: float = 0.05) -> tuple[int, ...]:
        """The layers that hold most of the focal heads, ties to the larger drift: what the paper finetunes."""
        check_count("count", count, 1)
        held = torch.zeros(len(self.score))
        for layer, _ in self.focal(share):
            held[layer] += 1
        key = held.double() + self.score.double().sum(1) / (1 + self.score.double().sum())
        order = key[list(self.measured)].argsort(descending=True, stable=True)[:count].tolist()
        return tuple(sorted(self.measured[i] for i in order))


def instruction_drift(
    model,
    tokenizer,
    pairs: Sequence[Conflict],
    *,
    judge: Judge = by_rule,
    max_new_tokens: int = 32,
    progress: Progress | None = None,
) -> Drift:
    """Answer every question without and with the conflicting request, greedily, and see which heads look elsewhere.

    judge: the paper asks a language model for four scores (see `cras`); by default the rule that comes with each pair.  Attention is
    that of the queries that chose the answer's tokens.  The distance is our reading of the paper's localisation, whose formula is not
    public.
    Costs two generations and two forward passes a pair; no rows are held.
    Raises InputError without pairs, without a chat template or a fast tokenizer, and what `foveal.lens.look` refuses.
    """
    check_count("max_new_tokens", max_new_tokens, 1)
    if not pairs:
        raise InputError("expected at least one conflict, got none")
    info = ModelInfo.of(model)
    masses, adherence, answers = [], torch.zeros(2, len(pairs)), []
    for n, pair in enumerate(pairs):
        found = []
        for arm, conflict in enumerate((None, pair.conflict)):
            ids, spans = _prompt(tokenizer, pair, conflict)
            answer = _answer(model, tokenizer, ids, max_new_tokens)
            text = tokenizer.decode(answer, skip_special_tokens=True)
            adherence[arm, n] = judge(pair, text)
            seen = look(model, None, ids + answer, [Segments(spans, len(ids) - 1, len(ids) + len(answer) - 1)])
            found.append((seen["segments.mass"].nan_to_num(0.0), text))
            if progress is not None:
                progress("conflicts", (n + (arm + 1) / 2) / len(pairs))
        masses.append(torch.stack([m for m, _ in found]))
        answers.append((found[0][1], found[1][1]))
    mass = torch.stack(masses, 1)  # [2, pairs, layers, heads, segments]
    distance = (mass[0] - mass[1]).abs().sum(-1) / 2
    score = ((adherence[0] - adherence[1]).abs()[:, None, None] * distance).mean(0)
    source = {"pairs": len(pairs), "max_new_tokens": max_new_tokens, **_circumstances(model)}
    return Drift(score, distance, mass[..., 0], adherence, tuple(answers), model_identity(model), source, info.layers)


def _prompt(tokenizer, pair: Conflict, conflict: str | None) -> tuple[list[int], tuple[Span, Span]]:
    """Token ids of the conversation, and the tokens of the system's instruction and of the conflict (empty where there is none)."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("expected a tokenizer with a chat template, to tell system and user apart: use a chat model")
    if not tokenizer.is_fast:
        raise InputError(
            "expected a fast tokenizer, which knows where each token stands in the text: load it with use_fast=True"
        )
    user = pair.question if not conflict else f"{pair.question} {conflict}"
    talk = [{"role": "system", "content": pair.system}, {"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids, offsets = with_offsets(tokenizer, text)
    spans = []
    for part in (pair.system, conflict):
        if not part:
            spans.append((0, 0))
            continue
        start = text.rfind(part)  # a template may show the instruction twice; the last is the one in its place
        if start < 0:
            raise InputError(f"the chat template leaves out {part!r}: use a model whose template has a system role")
        spans.append(token_span(offsets, start, start + len(part)))
    return ids, (spans[0], spans[1])


def with_offsets(tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Token ids of a text as it is, and the characters (start, stop) of each. Raises InputError for a slow tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "expected a fast tokenizer, which knows where each token stands in the text: load it with use_fast=True"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def token_span(offsets: Sequence[Span], start: int, stop: int) -> Span:
    """The tokens that hold the characters start .. stop - 1."""
    held = [i for i, (b, e) in enumerate(offsets) if b < stop and e > start]
    return held[0], held[-1] + 1


@torch.no_grad()
def _answer(model, tokenizer, ids: list[int], count: int) -> list[int]:
    x = torch.tensor([ids], device=model.device)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    mask = torch.ones_like(x)
    out = model.generate(x, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=pad)
    return out[0, len(ids) :].tolist()


@dataclass(frozen=True)
class Segments(Lens):
    """Attention of the queries start .. stop - 1 on spans of tokens, and on the rest, mean over the queries.

    Gives "segments.mass" [layers, heads, spans + 1]. Spans must not overlap; an empty one gets nothing.
    """

    spans: tuple[Span, ...]
    start: int
    stop: int

    name: ClassVar[str] = "segments"
    paper: ClassVar[str] = "Diagnose, Localize, Align (2025) [100]"

    def probe(self, reading: Reading) -> Probe:
        if not 0 <= self.start < self.stop <= reading.length:
            raise InputError(f"expected queries from 0 to {reading.length}, got {self.start} to {self.stop}")
        taken = sorted(s for s in self.spans if s[0] < s[1])
        if any(b < e for (_, e), (b, _) in pairwise(taken)):
            raise InputError(f"expected spans that do not overlap, got {self.spans}")
        return _SegmentProbe(self, reading)


class _SegmentProbe(Probe):
    def __init__(self, lens: Segments, reading: Reading):
        self.lens, self.reading = lens, reading
        self.got: dict[int, Tensor] = {}

    def attention(self, piece: Piece) -> None:
        first, stop = max(self.lens.start, piece.first), min(self.lens.stop, piece.first + piece.q.shape[2])
        for at in range(first, stop, _TILE):
            b, e = at - piece.first, min(at + _TILE, stop) - piece.first
            mass = [self._on(piece, b, e, *span) for span in self.lens.spans]
            rest = piece.row_sum[:, b:e].sum(-1) - sum(mass)
            kept = self.got.get(piece.layer, 0)
            self.got[piece.layer] = kept + torch.stack([*mass, rest], -1)

    @staticmethod
    def _on(piece: Piece, b: int, e: int, left: int, right: int) -> Tensor:
        right = min(right, piece.first + e)
        if left >= right:
            return piece.q.new_zeros(piece.q.shape[1], dtype=piece.lse.dtype)
        return piece.weights(b, e, left, right).sum((1, 2))

    def results(self) -> list[Measure]:
        count = self.lens.stop - self.lens.start
        mass = self.reading.table({i: x / count for i, x in self.got.items()})
        return [
            Measure.of(
                "segments.mass", mass, (*HEADS, "segment"), "share", "mean attention on each span, and on the rest"
            )
        ]


def sail_loss(
    chosen: Tensor, rejected: Tensor, chosen_reward: Tensor, rejected_reward: Tensor, beta: float = 0.1, a: float = 0.5
) -> Tensor:
    """The paper's token-weighted preference loss, a number.

    chosen, rejected [tokens]: ln(policy / reference) of each token of a response.  rewards [tokens]: ln(reward model / reference).
    beta 0.1 and a 0.5 are the released ones; a = 0 is plain DPO.
    """
    won = (beta * (1 + a * beta * chosen_reward) * chosen).sum()
    lost = (beta * (1 - a * beta * rejected_reward) * rejected).sum()
    return -F.logsigmoid(won - lost)
