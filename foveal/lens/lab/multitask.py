"""Several regressions in one context: heads in pairs, a pair a task, or fewer heads that share them (2025 [7], its multi-task case)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...method import check_count
from .lab import FOUND, Curves, Finding, Lab, Tick, arm, at_least, at_most, descend, lab
from .regression import InContextRegression, best_rate, debiased_step


def prompts(batch: int, examples: int, dim: int, tasks: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [batch, examples, tasks * dim], y [batch, examples, tasks], a query [batch, tasks * dim] and its labels [batch, tasks].

    Each task has `dim` features of its own: normal x, weights of variance 1/dim drawn for each prompt, y = weights . its features + noise.
    """
    beta = torch.randn(batch, tasks, dim) / dim**0.5
    x = torch.randn(batch, examples + 1, tasks, dim)
    y = torch.einsum("bltd,btd->blt", x, beta) + noise * torch.randn(batch, examples + 1, tasks)
    x = x.flatten(2)
    return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


class Attention(nn.Module):
    """sum_h OV_h Z softmax(Z' KQ_h [query; 0]) over tokens Z = [x; y], and of it the entries of y; no mask, no positions.

    key_query [heads, width + tasks, width], width = tasks * dim; value [heads, tasks, width + tasks].
    """

    def __init__(self, dim: int, tasks: int, heads: int, std: float = 0.1):
        super().__init__()
        width = tasks * dim
        self.dim, self.tasks = dim, tasks
        self.key_query = nn.Parameter(std * torch.randn(heads, width + tasks, width))
        self.value = nn.Parameter(std * torch.randn(heads, tasks, width + tasks))

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        z = torch.cat([x, y], -1)
        weights = torch.einsum("bld,hde,be->bhl", z, self.key_query, query).softmax(-1)
        return torch.einsum("bhl,bld,htd->bt", weights, z, self.value)


@dataclass(frozen=True)
class Sharing:
    """How trained heads divide the tasks among them.

    w [heads, tasks]: the mean diagonal of KQ within each task's features.  m [heads, tasks, tasks]: what a head hands from label t to
    prediction s, m[:, s, t].  value: the share of the energy of OV off each label's own entry.  purity [heads]: the share of a head's w
    squared that is its largest task's.  zero_sum: |sum over heads of m_tt| / sum of sizes, the largest of the tasks.
    """

    w: Tensor
    m: Tensor
    value: float
    purity: Tensor
    zero_sum: float


@torch.no_grad()
def sharing(model: Attention) -> Sharing:
    """Read it off the matrices."""
    width = model.key_query.shape[2]
    w = model.key_query[:, :width].diagonal(dim1=1, dim2=2).unflatten(1, (model.tasks, model.dim)).mean(2)
    m = model.value[:, :, width:]
    own = m.diagonal(dim1=1, dim2=2)
    energy = w.square()
    return Sharing(
        w.cpu(),
        m.cpu(),
        float(1 - own.square().sum() / model.value.square().sum()),
        (energy.amax(1) / energy.sum(1)).cpu(),
        float((own.sum(0).abs() / own.abs().sum(0)).max()),
    )


def steps_of_tasks(x: Tensor, y: Tensor, query: Tensor, label: Tensor) -> Tensor:
    """The best centred gradient step of each task on its own features, [batch, tasks]."""
    tasks = y.shape[2]
    found = []
    for t, (own, asked) in enumerate(zip(x.chunk(tasks, 2), query.chunk(tasks, 1), strict=True)):
        step = debiased_step(own, y[..., t], asked)
        found.append(step * best_rate(step, label[:, t]))
    return torch.stack(found, 1)


@lab(
    "icl-multitask",
    paper=InContextRegression.paper,
    about="two heads a task learn a pair each; one head more than there are tasks share them and lose little, one a task cannot",
)
@dataclass(frozen=True)
class InContextTasks(Lab):
    """Layers of twice as many heads as tasks, of one more than tasks, and of as many, Adam with a rate that falls to zero, fresh prompts.

    To first order in small KQ a layer needs, for each task, weights m over heads with sum m = 0 and sum m w = its rate on that task alone:
    one equation more than there are tasks, hence tasks + 1 heads.  dim: features of a task.
    """

    steps: int = 5000
    tasks: int = 2
    dim: int = 3
    examples: int = 40
    noise: float = 0.1
    batch: int = 256
    rate: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("tasks", 2), ("dim", 1), ("examples", 2), ("batch", 1)):
            check_count(name, getattr(self, name), least)

    def experiment(self, device: torch.device, tick: Tick) -> tuple[list[Finding], Curves]:
        """Structure of the widest layer, and the errors of all three beside those of the best step."""
        sizes, curves, models = (2 * self.tasks, self.tasks + 1, self.tasks), {}, []
        for n, heads in enumerate(sizes):
            model, more = self._trained(heads, device, arm(tick, n, len(sizes)))
            models.append(model)
            curves |= more
        torch.manual_seed(self.seed + 1)
        with torch.no_grad():
            x, y, query, label = self._data(20_000, device)
            errors = [float((m(x, y, query) - label).square().mean()) for m in models]
            best = float((steps_of_tasks(x, y, query, label) - label).square().mean())
        whole, shared = sharing(models[0]), sharing(models[1])
        curves["errors.pairs,shared,single,step"] = [*errors, best]
        curves["structure.w"], curves["structure.purity"] = whole.w.flatten().tolist(), whole.purity.tolist()
        curves["structure.shared_w"], curves["structure.shared_purity"] = (
            shared.w.flatten().tolist(),
            shared.purity.tolist(),
        )
        pairs, few, least = sizes
        found = [
            at_most(f"{pairs} heads: energy of OV off each label's own entry", whole.value, 0.05, FOUND),
            at_least(
                f"{pairs} heads: share of KQ on one task, the least of them", float(whole.purity.min()), 0.9, FOUND
            ),
            at_most(f"{pairs} heads: |sum| of OV over sum of sizes, worst task", whole.zero_sum, 0.05, FOUND),
            at_most(f"{pairs} heads: error over that of the best step of each task", errors[0] / best, 1.1, FOUND),
            at_most(f"{few} heads: share of KQ on one task, the least of them", float(shared.purity.min()), 0.9, FOUND),
            at_most(f"{few} heads: error over that of {pairs}", errors[1] / errors[0], 1.1, FOUND),
            at_least(f"{least} heads: error over that of {pairs}", errors[2] / errors[0], 1.2, FOUND),
        ]
        return found, curves

    def _data(self, batch: int, device: torch.device) -> list[Tensor]:
        return [t.to(device) for t in prompts(batch, self.examples, self.dim, self.tasks, self.noise)]

    def _trained(self, heads: int, device: torch.device, tick: Tick) -> tuple[Attention, Curves]:
        torch.manual_seed(self.seed)
        model = Attention(self.dim, self.tasks, heads).to(device)
        by = torch.optim.Adam(model.parameters(), lr=self.rate)
        decay = torch.optim.lr_scheduler.LinearLR(by, 1.0, 1e-3, self.steps)
        title = f"{heads} heads"

        def loss_of() -> Tensor:
            x, y, query, label = self._data(self.batch, device)
            return (model(x, y, query) - label).square().mean()

        purity = lambda: (float(sharing(model).purity.min()),)
        return model, descend(title, self.steps, by, decay, loss_of, tick, ("purity",), purity)
