"""One function an attribution method: from a question to one number for each token of the text."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn

from ...errors import InputError
from ...method import check_count
from .question import BATCH, Question, need_gradient
from .tap import Tap, output_matrix, tapped

# ---------------------------------------------------------------------- from the forward pass alone


class _Mean(Tap):
    """Mean over heads of some view of every layer's weights, kept one layer at a time, [length, length]."""

    def __init__(self, view: Callable[[Tensor, Tensor, nn.Module], Tensor], keep: Callable[[Tensor], None]):
        self.view, self.keep = view, keep

    def weights(self, layer: int, a: Tensor, v: Tensor, module: nn.Module) -> Tensor:
        self.keep(self.view(a, v, module)[0].mean(0))
        return a


def _layers(question: Question, view, keep) -> None:
    with torch.no_grad(), tapped(question.model, _Mean(view, keep)):
        question.logits(question.embeds)


def _averaged(question: Question, view, over: str) -> Tensor:
    if over not in ("row", "max"):
        raise InputError(f"over = '{over}': expected 'row' (the query that answers) or 'max' (over all queries)")
    means: list[Tensor] = []
    _layers(question, view, means.append)
    mean = torch.stack(means).mean(0)
    return mean[question.row] if over == "row" else mean.amax(0)


def attention(question: Question, over: str = "row") -> Tensor:
    """Attention, mean over layers and heads: of the query that answers ("row"), or its maximum over queries ("max", as in [120])."""
    return _averaged(question, lambda a, v, module: a, over)


def norms(question: Question, over: str = "row") -> Tensor:
    """The same with weights times the length of what they carry, |A[i, j] W_O v_j| for each head: empty values count nothing."""

    def view(a: Tensor, v: Tensor, module: nn.Module) -> Tensor:
        matrix = output_matrix(question.model, module).float()
        value = v.float().repeat_interleave(a.shape[1] // v.shape[1], 1)
        by_head = matrix.view(
            matrix.shape[0], a.shape[1], -1
        )  # the slice of each head: never split after summing heads
        length = torch.einsum("whd,bhjd->bhjw", by_head, value).norm(dim=-1)
        return a * length[:, :, None]

    return _averaged(question, view, over)


def rollout(question: Question) -> Tensor:
    """Attention rollout: the product over layers of (mean over heads + identity), rows made to sum to one, at the query that answers."""
    so_far: list[Tensor] = []

    def keep(mean: Tensor) -> None:
        step = mean + torch.eye(len(mean), device=mean.device)
        step = step / step.sum(-1, keepdim=True)
        so_far[:] = [step @ so_far[0]] if so_far else [step]

    _layers(question, lambda a, v, module: a, keep)
    return so_far[0][question.row]


# ---------------------------------------------------------------------- from gradients


class _Ones(Tap):
    """Weights of one query times ones: the gradient with respect to these ones is weight x gradient."""

    def __init__(self, row: int, layers: frozenset[int] | None = None):
        self.row, self.layers = row, layers
        self.ones: dict[int, Tensor] = {}

    def weights(self, layer: int, a: Tensor, v: Tensor, module: nn.Module) -> Tensor:
        if self.layers is not None and layer not in self.layers:
            return a
        one = self.ones[layer] = torch.ones_like(a[:1, :, self.row], requires_grad=True)
        row = torch.zeros(a.shape[2], 1, device=a.device)
        row[self.row] = 1
        return a * (1 + (one[:, :, None] - 1) * row)


def attention_times_gradient(question: Question, layers: frozenset[int] | None = None) -> dict[int, Tensor]:
    """A * d loss / d A of the query that answers, layer -> [heads, length], signed; the loss is minus the target's log-probability [98].

    layers: default all. The sum of a row is how the loss changes, to first order, as that row is scaled.
    """
    need_gradient(question.model)
    tap = _Ones(question.row, layers)
    with tapped(question.model, tap):
        loss = -question.score(question.embeds)[0]
    if not tap.ones:
        raise InputError(f"layers = {sorted(layers or ())}: none of them is an attention layer of the model")
    found = torch.autograd.grad(loss, list(tap.ones.values()))
    return {layer: g[0].detach().float() for layer, g in zip(tap.ones, found, strict=True)}


def row_normed(rows: dict[int, Tensor]) -> Tensor:
    """[layers, length]: mean over heads of |A * gradient|, each layer's row divided by its L2 norm (steps 2 and 3 of the card's paper)."""
    mean = torch.stack([x.abs().mean(0) for x in rows.values()])
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-9)


def attention_gradient(question: Question) -> Tensor:
    """Mean over layers of `row_normed`: attention times its gradient [98]."""
    return row_normed(attention_times_gradient(question)).mean(0)


def gradient_input(question: Question) -> Tensor:
    """Gradient of the target's log-probability times the token's embedding, summed over its dimensions; signed."""
    need_gradient(question.model)
    x = question.embeds.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(question.score(x)[0], x)
    return (gradient * x.detach()).sum(-1)[0].float()


def integrated_gradients(question: Question, steps: int = 50) -> Tensor:
    """Integrated gradients from the baseline text, by captum; signed, and summing to score(text) - score(baseline) as `steps` grow."""
    need_gradient(question.model)
    if type(steps) is not int or steps < 2:
        raise InputError(f"steps = {steps!r}: expected at least 2 points on the path")
    by = _captum("IntegratedGradients")(question.score)
    found = by.attribute(question.embeds, _start(question), n_steps=steps, internal_batch_size=BATCH)
    return found.sum(-1)[0].detach().float()


def gradient_shap(question: Question, samples: int = 50, seed: int = 0) -> Tensor:
    """Gradient SHAP, by captum: gradients at random points between text and baseline, times their difference; signed.

    Its sum comes near score(text) - score(baseline) as `samples` (50) grow.
    """
    need_gradient(question.model)
    check_count("samples", samples, 1)
    with _drawn(question, seed):
        by = _captum("GradientShap")(question.score)
        found = sum(
            by.attribute(question.embeds, _start(question), n_samples=min(BATCH, samples - done)).detach()
            * (min(BATCH, samples - done) / samples)
            for done in range(0, samples, BATCH)
        )
    return found.sum(-1)[0].float()


def _captum(name: str):
    """A class of captum.attr."""
    try:
        return getattr(importlib.import_module("captum.attr"), name)
    except ImportError as error:
        raise InputError(f"{name} comes from captum, which is not installed: pip install 'foveal[captum]'") from error


def _start(question: Question) -> Tensor:
    """The baseline text, [1, length, width]."""
    return question.baseline.expand_as(question.embeds)


@contextmanager
def _drawn(question: Question, seed: int) -> Iterator[None]:
    """Inside, what is drawn at random follows from the seed; the caller's random state, and numpy's, stay as they were."""
    cards = [question.embeds.device] if question.embeds.is_cuda else []
    before = numpy.random.get_state()
    with torch.random.fork_rng(cards):
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        try:
            yield
        finally:
            numpy.random.set_state(before)


# ---------------------------------------------------------------------- from changed texts


def perturbation(question: Question, progress: Callable[[str, float], None] | None = None) -> Tensor:
    """How much the target's log-probability falls when a token is replaced by the baseline; one forward pass a token; signed."""
    n = len(question.ids)
    keep = torch.cat([torch.ones(1, n, dtype=torch.bool), ~torch.eye(n, dtype=torch.bool)])
    scores = question.without(keep, progress)
    return scores[0] - scores[1:]


def shapley(question: Question, samples: int = 25, seed: int = 0) -> Tensor:
    """Shapley values of tokens against the baseline, by captum: what a token adds when it joins others in a random order; signed.

    samples: orders (25), each one forward pass a token; any number of them sums to score(text) - score(baseline).
    """
    return _masked("ShapleyValueSampling", question, samples, seed)


def lime(question: Question, samples: int = 200, seed: int = 0) -> Tensor:
    """LIME, by captum: the coefficients of a linear model of the score on texts with random tokens replaced by the baseline; signed.

    samples: changed texts (200), weighed by their likeness to the text: captum's kernel of width 1 on the cosine distance of embeddings.
    The linear model is a ridge with penalty 1, which is what the method's authors fit.
    """
    return _masked("Lime", question, samples, seed, interpretable_model=_Ridge())


class _Ridge:
    """What captum's LIME fits: weighted least squares with a penalty of 1 on all coefficients but the constant."""

    def fit(self, data, **unused) -> dict:
        x, y, weight = (torch.cat(parts).double() for parts in zip(*data, strict=True))
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        penalty = torch.ones_like(x[0]).diag()
        penalty[-1, -1] = 0
        self.coefficients = torch.linalg.solve(
            x.mT @ (weight.view(-1, 1) * x) + penalty, x.mT @ (weight * y).view(-1, 1)
        )
        return {}

    def representation(self) -> Tensor:
        return self.coefficients[:-1].mT


@torch.no_grad()
def _masked(name: str, question: Question, samples: int, seed: int, **options) -> Tensor:
    """captum's methods that replace whole tokens by the baseline."""
    check_count("samples", samples, 1)
    tokens = torch.arange(len(question.ids), device=question.embeds.device)[None, :, None].expand_as(question.embeds)
    how = {"feature_mask": tokens.contiguous(), "n_samples": samples, "perturbations_per_eval": BATCH}
    with _drawn(question, seed):
        by = _captum(name)(question.score, **options)
        return by.attribute(question.embeds, _start(question), **how)[0, :, 0].float()


METHODS: dict[str, Callable[..., Tensor]] = {
    "attention": attention,
    "rollout": rollout,
    "norms": norms,
    "attention-gradient": attention_gradient,
    "gradient-input": gradient_input,
    "integrated-gradients": integrated_gradients,
    "gradient-shap": gradient_shap,
    "perturbation": perturbation,
    "shapley": shapley,
    "lime": lime,
}
"""Every attribution method by name."""
DRAWN = frozenset({"gradient-shap", "shapley", "lime"})
"""Methods that draw at random, with the options `samples` and `seed`."""
SIGNED = DRAWN | {"gradient-input", "integrated-gradients", "perturbation"}
"""Methods that tell tokens that help the target (positive) from those that hurt it."""
FORWARD = frozenset({"attention", "rollout", "norms"})
"""Methods that read weights only and never ask what they do to the answer."""
