"""What heads are worth: the loss without them (AttentionInfluence 2025 [110]), and heads that sleep on some kinds of text (2024 [91])."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attach import attach
from ..errors import InputError
from ..method import check_count, check_range
from ..methods.mix.heads import Ablate
from ..model_info import ModelInfo
from .ranking import HeadRanking, Pairs
from .reading import look, tokens_of
from .result import HEADS, Look, Measure
from .sinks import Sinks

Progress = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Influence:
    """Losses in nats per token: base [documents], without the heads [documents], without as many random heads [controls, documents]."""

    heads: Pairs
    base: Tensor
    masked: Tensor
    control: Tensor

    @property
    def score(self) -> Tensor:
        """AttentionInfluence of each document: (masked - base) / base."""
        return (self.masked - self.base) / self.base

    @property
    def control_score(self) -> Tensor:
        """The same for the random heads, [controls, documents]."""
        return (self.control - self.base) / self.base


@torch.no_grad()
def influence(
    model,
    tokenizer,
    texts: Sequence[str | Sequence[int]],
    ranking: HeadRanking,
    count: int | None = None,
    *,
    mode: str = "uniform",
    controls: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Influence:
    """How much worse a model predicts each text without the first `count` heads of a ranking, and without random others.

    count: default 5 % of the heads (the paper's).  mode: "uniform", the paper's masking (a head attends equally to all it sees), or
    "zero".  controls: draws of as many other heads, of the same layers' measured heads.  Two texts are comparable within a domain only.
    Raises InputError for texts of fewer than two tokens and what `foveal.lens.look` refuses.
    """
    check_count("controls", controls)
    info = ModelInfo.of(model)
    documents = [tokens_of(model, tokenizer, t, info) for t in texts]
    if not documents or min(map(len, documents)) < 2:
        raise InputError("expected texts of at least two tokens each: there is nothing to predict otherwise")
    ranking.roles.for_model(model)
    count = max(1, round(0.05 * len(ranking))) if count is None else count
    heads = ranking.top(count)
    arms = [None, heads, *(ranking.control(count, seed + i) for i in range(controls))]
    losses = torch.zeros(len(arms), len(documents))
    for a, arm in enumerate(arms):
        with attach(model, None if arm is None else Ablate(arm, mode)):
            for d, ids in enumerate(documents):
                losses[a, d] = _loss(model, ids)
                if progress is not None:
                    progress("losses without heads", (a * len(documents) + d + 1) / losses.numel())
    return Influence(heads, losses[0], losses[1], losses[2:])


def _loss(model, ids: list[int]) -> float:
    x = torch.tensor([ids], device=model.device)
    logits = model(x, use_cache=False).logits[0, :-1]
    return float(F.cross_entropy(logits.float(), x[0, 1:]))


def dormancy(
    model, tokenizer, texts: Mapping[str, str | Sequence[int]], *, progress: Progress | None = None
) -> tuple[Look, ...]:
    """One look per domain with the lens "sinks": a head's dormancy on it is its mean attention on the first token.

    texts: domain -> text, at least two. Returns looks in that order; see `active_dormant`.
    """
    if len(texts) < 2:
        raise InputError(
            f"expected texts of at least two domains, got {len(texts)}: a head sleeps on one and not on another"
        )
    info = ModelInfo.of(model)
    ids = [tokens_of(model, tokenizer, text, info) for text in texts.values()]
    looks = []
    for n, text in enumerate(ids):
        step = None if progress is None else (lambda line, share, n=n: progress(line, (n + share) / len(ids)))
        looks.append(look(model, tokenizer, text, [Sinks()], progress=step))
    return tuple(looks)


def active_dormant(looks: Sequence[Look]) -> Measure:
    """How differently a head treats the first token on the domains: the largest less the smallest mean attention, [layer, head]."""
    first = torch.stack([x["sinks.first"] for x in looks])
    meaning = "mean attention on the first token: most less least over the domains"
    return Measure.of("dormancy.difference", first.amax(0) - first.amin(0), HEADS, "share", meaning)


def choose_documents(scores: Tensor, domains: Sequence[str], share: float = 0.2) -> list[int]:
    """The documents with the highest AttentionInfluence, `share` (0.2) of each domain [110], in their order.

    scores [documents]; domains: of each, since scores of different ones are not comparable. At least one document of a domain is taken;
    of equal scores the earlier. Raises InputError where they do not match.
    """
    check_range("share", share, 0, 1)
    if scores.ndim != 1 or len(scores) != len(domains):
        raise InputError(f"expected a domain for each of {scores.numel()} scores, got {len(domains)}")
    kept: list[int] = []
    for domain in dict.fromkeys(domains):
        own = torch.tensor([i for i, d in enumerate(domains) if d == domain])
        order = own[scores[own].argsort(descending=True, stable=True)]
        kept += order[: max(1, round(share * len(own)))].tolist()
    return sorted(kept)


@torch.no_grad()
def wakes(
    model, tokenizer, texts: Mapping[str, str | Sequence[int]], heads: Pairs, *, mode: str = "zero"
) -> dict[str, tuple[float, float]]:
    """The causal test of active and dormant heads [91]: domain -> (nats per token with, and without these heads).

    A head that sleeps on a domain should be missed on the others only. mode: "zero", the paper's, or "uniform". Raises InputError for
    texts of fewer than two tokens and for heads the model lacks.
    """
    info = ModelInfo.of(model)
    documents = {name: tokens_of(model, tokenizer, t, info) for name, t in texts.items()}
    if not documents or min(map(len, documents.values())) < 2:
        raise InputError("expected texts of at least two tokens each: there is nothing to predict otherwise")
    losses = []
    for arm in (None, Ablate(tuple(heads), mode)):
        with attach(model, arm):
            losses.append([_loss(model, ids) for ids in documents.values()])
    return dict(zip(documents, zip(*losses, strict=True), strict=True))
