"""The geometry of representations: RankMe and alpha-ReQ of last-token features, over layers and over checkpoints (2025 [23])."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InputError
from ..method import check_count, check_range
from ..model_info import ModelInfo
from .reading import _blocks, tokens_of

Progress = Callable[[str, float], None]
WARM_UP, SEEKING, COMPRESSING = "warm-up", "entropy-seeking", "compression-seeking"

# ---------------------------------------------------------------------- two numbers of a cloud of features


def spectrum(features: Tensor, centred: bool = False) -> Tensor:
    """Eigenvalues of the covariance of features [samples, width], descending, float64, [min(samples, width)].

    centred: the columns have mean zero already. Raises InputError for fewer than two samples and for numbers that are not finite.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise InputError(f"expected features [samples, width] of at least two samples, got {list(features.shape)}")
    f = features.detach().double()
    if not f.isfinite().all():
        raise InputError("expected finite features, got some that are not: leave those samples out")
    if not centred:
        f = f - f.mean(0)
    gram = f @ f.T if f.shape[0] < f.shape[1] else f.T @ f
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0) / f.shape[0]


def rankme(features: Tensor, centred: bool = False) -> float:
    """exp of the entropy of the covariance's eigenvalues as shares: from 1 to min(samples - 1, width); NaN where all samples are equal.

    Of eigenvalues, as the paper does; the measure of that name for images takes singular values of the features.
    """
    return _rankme(spectrum(features, centred))


def alpha_req(features: Tensor, low: int = 10, high: int | None = None, centred: bool = False) -> float:
    """The decay of the covariance's eigenvalues: minus the slope of log eigenvalue against log rank, by least squares.

    low, high: first and last rank that count (10, and 1000 or the width); in a spectrum too short for two of them NaN. Larger is more
    compressed; it does not depend on the width.
    """
    check_count("low", low, 1)
    if high is not None:
        check_count("high", high, low + 1)
    return _alpha(spectrum(features, centred), low, high)


def _rankme(s: Tensor) -> float:
    p = s / s.sum()
    return float(torch.special.xlogy(p, p).sum().neg().exp())


def _alpha(s: Tensor, low: int, high: int | None) -> float:
    known = s[: min(high or 1000, len(s))]
    known = known[known > 1e-12 * s[0]][low - 1 :]  # below that is rounding, which has a slope of its own
    if len(known) < 2:
        return math.nan
    x = torch.arange(low, low + len(known), dtype=torch.double).log()
    x, y = x - x.mean(), known.cpu().log()
    return -float((x * y).sum() / x.square().sum())


# ---------------------------------------------------------------------- of a model


@dataclass(frozen=True, eq=False)
class Geometry:
    """Of one model on some texts: rankme [blocks + 1], alpha [blocks + 1], spectra [blocks + 1, min(texts, width)].

    Rows are the last token's state after each block, without the final norm; the last row is what the unembedding reads, after it.
    features: that last row's features [texts, width].
    """

    rankme: Tensor
    alpha: Tensor
    spectra: Tensor
    features: Tensor


@torch.no_grad()
def geometry(
    model,
    tokenizer,
    texts: Sequence[str | Sequence[int]],
    *,
    length: int = 512,
    low: int = 10,
    high: int | None = None,
    progress: Progress | None = None,
) -> Geometry:
    """RankMe and alpha-ReQ of the last real token's features after every block, over at least two texts.

    length: tokens read of each text (512).  low, high: see `alpha_req`. The paper takes 10,000 to 15,000 texts: neither number can
    exceed what so many samples span. Raises InputError for too few texts and for those `foveal.lens.look` refuses.
    """
    check_count("length", length, 1)
    check_count("low", low, 1)
    if len(texts) < 2:
        raise InputError(f"expected at least two texts, got {len(texts)}: a covariance needs samples")
    features = states(model, tokenizer, texts, length=length, progress=progress)
    spectra = torch.stack([spectrum(f) for f in features.unbind(1)])
    ranks = torch.tensor([_rankme(s) for s in spectra])
    return Geometry(ranks, torch.tensor([_alpha(s, low, high) for s in spectra]), spectra, features[:, -1])


@torch.no_grad()
def states(
    model, tokenizer, texts: Sequence[str | Sequence[int]], *, length: int = 512, progress: Progress | None = None
) -> Tensor:
    """The last token's state of each text after every block and after the final norm, [texts, blocks + 1, width], float32 on the CPU."""
    info = ModelInfo.of(model)
    cut = [_first(tokenizer, t, length) for t in texts]
    ids = [tokens_of(model, tokenizer, t, info) for t in cut]
    blocks = _blocks(model, info.n_layers)
    found: list[Tensor] = []
    rows: dict[int, Tensor] = {}

    def note(i: int):
        def hook(module, args, output) -> None:
            h = output[0] if isinstance(output, tuple) else output
            rows[i] = h[0, -1].float().cpu()

        return hook

    handles = [b.register_forward_hook(note(i)) for i, b in enumerate(blocks)]
    try:
        for n, x in enumerate(ids):
            out = model.get_decoder()(input_ids=torch.tensor([x], device=model.device), use_cache=False)
            last = out.last_hidden_state[0, -1].float().cpu()
            found.append(torch.stack([*(rows[i] for i in range(len(blocks))), last]))
            if progress is not None:
                progress("features of texts", (n + 1) / len(ids))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def _first(tokenizer, text: str | Sequence[int], length: int) -> str | Sequence[int] | list[int]:
    """The first `length` tokens of a text; an empty one stays as it is, for `tokens_of` to refuse."""
    if isinstance(text, str):
        if tokenizer is None or not text.strip():
            return text
        from ..tasks.task import encode

        text = encode(tokenizer, text, special=True)
    return text[:length]


# ---------------------------------------------------------------------- directions that matter


@dataclass(frozen=True, eq=False)
class Directions:
    """mean [width] of features and their principal directions, basis [k, width], strongest first."""

    mean: Tensor
    basis: Tensor

    @staticmethod
    def of(features: Tensor, k: int) -> Directions:
        """The top `k` of features [samples, width]; raises InputError where they span fewer."""
        check_count("k", k, 1)
        f = features.detach().double()
        mean = f.mean(0)
        _, s, v = torch.linalg.svd(f - mean, full_matrices=False)
        rank = int((s > 1e-9 * s[0]).sum())
        if k > rank:
            raise InputError(f"expected at most {rank} directions, the features' rank, got k = {k}: ask for fewer")
        return Directions(mean, v[:k])


@contextmanager
def restricted(model, directions: Directions, keep: bool = True) -> Iterator[None]:
    """Inside, what the unembedding reads keeps only its part along the directions (keep=False: loses it), about their mean.

    Features as in `Geometry.features`, after the final norm.
    """
    mean = directions.mean.to(model.device, torch.float32)
    basis = directions.basis.to(model.device, torch.float32)

    def hook(module, args, output):
        h = output.last_hidden_state.float() - mean
        along = h @ basis.T @ basis
        output["last_hidden_state"] = (mean + (along if keep else h - along)).to(output.last_hidden_state.dtype)
        return output

    handle = model.get_decoder().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------- over checkpoints


@dataclass(frozen=True)
class Phase:
    """A stretch between two turning points of RankMe, both included: name, and steps where it begins and ends."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Geometry over training: steps [checkpoints], rankme and alpha [checkpoints, blocks + 1], rows as in `Geometry`."""

    steps: tuple[int, ...]
    rankme: Tensor
    alpha: Tensor

    def phases(self, row: int = -1, *, window: int = 3, least: float = 0.05) -> list[Phase]:
        """Phases of one row, see `phases`."""
        return phases(self.steps, self.rankme[:, row].tolist(), window=window, least=least)

    @cached_property
    def agreement(self) -> Tensor:
        """Correlation over checkpoints of RankMe after every block with that of the last row, [blocks + 1]."""
        return torch.stack([torch.corrcoef(torch.stack([x, self.rankme[:, -1]]))[0, 1] for x in self.rankme.T])


def over_checkpoints(
    checkpoints: Iterable[tuple[int, object]],
    tokenizer,
    texts: Sequence[str | Sequence[int]],
    *,
    length: int = 512,
    low: int = 10,
    high: int | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    """Geometry of (step, model) pairs, which may be made one at a time; the paper takes log-spaced steps.

    Raises InputError unless steps ascend, and without any.
    """
    steps, ranks, alphas = [], [], []
    for step, model in checkpoints:
        if steps and step <= steps[-1]:
            raise InputError(f"expected checkpoints in order of their steps, got {step} after {steps[-1]}")
        found = geometry(model, tokenizer, texts, length=length, low=low, high=high, progress=progress)
        steps.append(step)
        ranks.append(found.rankme)
        alphas.append(found.alpha)
    if not steps:
        raise InputError("expected at least one checkpoint, got none")
    return Trajectory(tuple(steps), torch.stack(ranks), torch.stack(alphas))


def phases(steps: Sequence[int], values: Sequence[float], *, window: int = 3, least: float = 0.05) -> list[Phase]:
    """Phases of RankMe over training: where it falls at first, "warm-up"; where it rises, "entropy-seeking"; where it falls again,
    "compression-seeking"; further cycles go on so.

    window: checkpoints of the centred running mean (3; fewer at the ends).  least: a turn counts when the value has moved back by this
    share of the whole range (0.05). Raises InputError unless there is a value for each of at least two steps.
    """
    check_count("window", window, 1)
    check_range("least", least, 0, 1)
    if len(steps) != len(values) or len(steps) < 2:
        raise InputError(f"expected a value for each of at least two steps, got {len(steps)} and {len(values)}")
    half = window // 2
    smooth = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # even at the ends, so that the mean is never pulled to one side
        smooth.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
    edges = [0, *_turns(smooth, least * (max(smooth) - min(smooth))), len(smooth) - 1]
    found = []
    for a, b in pairwise(edges):
        falling = COMPRESSING if found else WARM_UP
        found.append(Phase(SEEKING if smooth[b] > smooth[a] else falling, steps[a], steps[b]))
    return found


def _turns(x: Sequence[float], least: float) -> list[int]:
    """Indices of the highs and lows after which x moves back by at least `least` (by anything, where that is 0)."""
    turns: list[int] = []
    best, way = 0, 0  # the extreme so far, and +1 while rising, -1 while falling, 0 before anything moved
    for i, value in enumerate(x):
        if way == 0:
            if value != x[0] and abs(value - x[0]) >= least:
                best, way = i, 1 if value > x[0] else -1
        elif (value - x[best]) * way >= 0:
            best = i
        elif (x[best] - value) * way >= least:
            turns.append(best)
            best, way = i, -way
    return turns
