"""In-context linear regression: what one layer of softmax attention learns from random prompts, read off its matrices (2025 [7])."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...method import check_count, check_range
from .lab import FOUND, Curves, Finding, Lab, Tick, arm, at_least, at_most, descend, lab


def prompts(
    batch: int, examples: int, dim: int, noise: float, variance: Tensor | float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [batch, examples, dim], y [batch, examples], a query [batch, dim] and its label [batch].

    Normal x with this variance in each dimension, weights of variance 1/dim drawn for each prompt, y = weights . x + noise.
    """
    beta = torch.randn(batch, dim) / dim**0.5
    x = torch.randn(batch, examples + 1, dim) * torch.as_tensor(variance).sqrt()
    y = (x @ beta[:, :, None])[..., 0] + noise * torch.randn(batch, examples + 1)
    return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


class Attention(nn.Module):
    """sum_h OV_h Z softmax(Z' KQ_h [query; 0]) over tokens Z = [x; y], and of it the last entry; no mask, no positions.

    Of OV only the row of y, of KQ only the columns of x reach the prediction: key_query [heads, dim + 1, dim], value [heads, dim + 1].
    """

    def __init__(self, dim: int, heads: int, std: float = 0.1):
        super().__init__()
        self.key_query = nn.Parameter(std * torch.randn(heads, dim + 1, dim))
        self.value = nn.Parameter(std * torch.randn(heads, dim + 1))

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        z = torch.cat([x, y[..., None]], -1)
        weights = torch.einsum("bld,hde,be->bhl", z, self.key_query, query).softmax(-1)
        return torch.einsum("bhl,bld,hd->b", weights, z, self.value)


@dataclass(frozen=True)
class Structure:
    """How far a trained layer is from heads with KQ = w I and a value of y alone, m.

    w, m [heads].  key_query: the share of the energy of KQ off that form.  value: the same of OV.  zero_sum: |sum m| / sum |m|.
    homogeneity: the largest less the smallest |w|, over their mean.  agree: the share of heads whose w and m have one sign.
    """

    w: Tensor
    m: Tensor
    key_query: float
    value: float
    zero_sum: float
    homogeneity: float
    agree: float


@torch.no_grad()
def structure(model: Attention) -> Structure:
    """Read the form off the matrices."""
    kq, ov = model.key_query, model.value
    dim = kq.shape[2]
    w, m = kq[:, :dim].diagonal(dim1=1, dim2=2).mean(1), ov[:, -1]
    form = w[:, None, None] * torch.eye(dim + 1, dim, device=kq.device)
    size = w.abs()
    return Structure(
        w.cpu(),
        m.cpu(),
        float((kq - form).square().sum() / kq.square().sum()),
        float(ov[:, :-1].square().sum() / ov.square().sum()),
        float(m.sum().abs() / m.abs().sum()),
        float((size.max() - size.min()) / size.mean()),
        float((w.sign() == m.sign()).float().mean()),
    )


def debiased_step(x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """The direction of one step of gradient descent with centred inputs, [batch]: mean of y (x - mean x) . query."""
    centred = x - x.mean(1, keepdim=True)
    return torch.einsum("bl,bld,bd->b", y, centred, query) / x.shape[1]


def ridge(x: Tensor, y: Tensor, query: Tensor, noise: float) -> Tensor:
    """The Bayes prediction, [batch]: ridge regression with penalty noise^2 dim."""
    dim = x.shape[2]
    gram = x.mT @ x + noise**2 * dim * torch.eye(dim, device=x.device)
    return (torch.linalg.solve(gram, x.mT @ y[..., None])[..., 0] * query).sum(-1)


def best_rate(step: Tensor, label: Tensor) -> Tensor:
    """The factor of `step` that comes closest to the labels, by least squares."""
    return (step * label).sum() / step.square().sum()


@lab(
    "icl-regression",
    paper="In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability (2025) [7]",
    about="two softmax heads learn opposite signs and together do one step of centred gradient descent; one head cannot",
)
@dataclass(frozen=True)
class InContextRegression(Lab):
    """Layers of one and of `heads` heads, Adam with a rate that falls to zero, fresh prompts.

    dim 5, 40 examples, noise 0.1, small random start: the paper's. Squared error of the query's label.
    """

    steps: int = 5000
    heads: int = 2
    dim: int = 5
    examples: int = 40
    noise: float = 0.1
    batch: int = 256
    rate: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("heads", 2), ("dim", 1), ("examples", 2), ("batch", 1)):
            check_count(name, getattr(self, name), least)
        check_range("noise", self.noise, 0)

    def experiment(self, device: torch.device, tick: Tick) -> tuple[list[Finding], Curves]:
        """Structure of the matrices, and errors beside those of one head, of the best step and of Bayes."""
        one, curves = self._trained(1, device, arm(tick, 0, 2))
        many, more = self._trained(self.heads, device, arm(tick, 1, 2))
        torch.manual_seed(self.seed + 1)
        at = structure(many)
        with torch.no_grad():
            x, y, query, label = self._data(20_000, self.examples, device)
            guess, step = many(x, y, query), debiased_step(x, y, query)
            step = step * best_rate(step, label)
            error, single, best, bayes = (
                float((p - label).square().mean())
                for p in (guess, one(x, y, query), step, ridge(x, y, query, self.noise))
            )
            together = float(torch.corrcoef(torch.stack([guess, step]))[0, 1])
            x, y, query, label = self._data(20_000, 2 * self.examples, device)
            longer = float((many(x, y, query) - label).square().mean())
        curves["errors.many,one,step,bayes"] = [error, single, best, bayes]
        curves["structure.w"], curves["structure.m"] = at.w.tolist(), at.m.tolist()
        found = [
            at_most(f"{self.heads} heads: energy of KQ off the scaled identity", at.key_query, 0.05, FOUND),
            at_most(f"{self.heads} heads: energy of OV off the entry of y", at.value, 0.05, FOUND),
            at_most(f"{self.heads} heads: |sum| of OV over sum of sizes", at.zero_sum, 0.05, FOUND),
            at_most(f"{self.heads} heads: spread of |KQ| over heads", at.homogeneity, 0.05, FOUND),
            at_least(f"{self.heads} heads: share whose KQ and OV have one sign", at.agree, 1.0, FOUND),
            at_least("correlation with one centred gradient step", together, 0.99, FOUND),
            at_most("error over that of the best such step", error / best, 1.05),
            at_most("error over that of one head", error / single, 0.8, FOUND),
            at_most("error on prompts twice as long over that at its own length", longer / error, 1.0, FOUND),
        ]
        return found, curves | more

    def variance(self) -> Tensor:
        """Of x in each dimension, [dim]."""
        return torch.ones(self.dim)

    def _data(self, batch: int, examples: int, device: torch.device) -> list[Tensor]:
        return [t.to(device) for t in prompts(batch, examples, self.dim, self.noise, self.variance())]

    def _trained(self, heads: int, device: torch.device, tick: Tick) -> tuple[Attention, Curves]:
        torch.manual_seed(self.seed)
        model = Attention(self.dim, heads).to(device)
        by = torch.optim.Adam(model.parameters(), lr=self.rate)
        decay = torch.optim.lr_scheduler.LinearLR(by, 1.0, 1e-3, self.steps)
        title = f"{heads} heads" if heads > 1 else "1 head"

        def loss_of() -> Tensor:
            x, y, query, label = self._data(self.batch, self.examples, device)
            return (model(x, y, query) - label).square().mean()

        def measure() -> tuple[float, float]:
            at = structure(model)
            return at.key_query, at.zero_sum

        return model, descend(title, self.steps, by, decay, loss_of, tick, ("off_key_query", "zero_sum"), measure)


@lab(
    "icl-preconditioning",
    paper=InContextRegression.paper,
    about="where inputs vary more in some dimensions, the heads learn to divide by that variance",
)
@dataclass(frozen=True)
class InContextPreconditioning(InContextRegression):
    """The same layer on inputs whose variances run evenly (in logarithms) from 1 / root of `spread` to its root.

    With few examples the best preconditioner lies a little short of the inverse variance; hence the width of the line.
    """

    spread: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("dim", self.dim, 2)
        check_range("spread", self.spread, 1.01)

    def variance(self) -> Tensor:
        """From 1 / root of `spread` to its root."""
        edge = math.log(self.spread) / 2
        return torch.linspace(-edge, edge, self.dim).exp()

    def experiment(self, device: torch.device, tick: Tick) -> tuple[list[Finding], Curves]:
        """How the diagonal of KQ goes with the variance."""
        model, curves = self._trained(self.heads, device, tick)
        with torch.no_grad():
            kq = model.key_query[:, : self.dim]
            diagonal = kq.diagonal(dim1=1, dim2=2)
            off = 1 - float(diagonal.square().sum() / model.key_query.square().sum())
            size, variance = diagonal.abs().mean(0).log().cpu(), self.variance().log()
            slope = float((size * variance).sum() / variance.square().sum())  # the variances' logarithms have mean zero
        curves["structure.diagonal"] = diagonal.flatten().tolist()
        found = [
            at_most("energy of KQ off the diagonal", off, 0.05, FOUND),
            at_most("distance from -1 of the slope of log KQ against log variance", abs(slope + 1), 0.25, FOUND),
        ]
        return found, curves
