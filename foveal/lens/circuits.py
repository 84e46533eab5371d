"""Which heads a task runs through: path patching, circuits, what tasks share (Circuit Component Reuse 2023 [71])."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.prompts import Contrast
from ..errors import InputError
from ..heads import HeadRoles, _circumstances
from ..hub import model_identity
from ..method import check_count
from ..model_info import ModelInfo
from .attribution.paths import Record, Runs, check_heads
from .attribution.ranks import pearson
from .attribution.tap import Tap, check_length, output_matrix, tapped
from .ranking import HeadRanking, Pairs

PARTS = ("q", "k", "v", "z")
_NAME = "effect"

Progress = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class PathEffects:
    """What each head sends to some receivers, as a share of what corrupting the whole prompt does.

    effect [layers, heads]: (F_patch - F_clean) / (F_corrupt - F_clean), 0 where a head lies behind all receivers; positive: the head
    speaks for the answer.  clean, corrupt: the metric F = logit(answer) - logit(distractor), mean over the prompts.
    """

    effect: Tensor
    clean: float
    corrupt: float
    identity: dict[str, Any]
    source: dict[str, Any]

    def ranking(self, ascending: bool = False) -> HeadRanking:
        """Heads by effect, the strongest first (ascending: those that speak against the answer)."""
        return HeadRanking(HeadRoles(self.identity, {_NAME: self.effect}, self.source), _NAME, ascending)


@torch.no_grad()
def path_patch(
    model,
    pairs: Sequence[Contrast],
    receivers: Pairs | None = None,
    part: str = "q",
    *,
    position: int | str | None = "auto",
    freeze_mlps: bool = False,
    batch: int = 25,
    progress: Progress | None = None,
) -> PathEffects:
    """Effect of every head through the receivers alone.

    A head's output is replaced by its value on the corrupt prompt while all other heads keep theirs on the clean one; what arrives at
    the receivers is then put into an otherwise clean run.  receivers: heads (layer, head), of which `part` "q", "k", "v" or "z" is put in;
    None: the final residual (direct effects on the logits).  With grouped heads k and v are those of the receiver's group.  position:
    where heads are replaced and receivers read; default the last position, all for "k" and "v"; None: all.  freeze_mlps: MLPs keep their
    clean outputs too, so that heads count without what MLPs make of them.  Costs two forward passes for each head and batch.
    Raises InputError for prompts of unequal lengths in a pair, unknown receivers or parts, and prompts that corruption does not change.
    """
    run = Runs(model, pairs, batch)
    info = run.info
    receivers = None if receivers is None else check_heads(receivers, info)
    if part not in PARTS:
        raise InputError(f"part = '{part}': expected one of {', '.join(PARTS)}")
    if position == "auto":
        position = None if receivers is not None and part in ("k", "v") else -1
    last = info.n_layers if receivers is None else max(layer for layer, _ in receivers)
    senders = [(i, h) for i in range(last) for h in range(info.heads)]
    total = torch.zeros(info.n_layers, info.heads)
    clean = corrupt = 0.0
    for b, (x, y, answer, distractor) in enumerate(run.batches):
        one, other = run.record(x, freeze_mlps), run.record(y, False)
        clean += float(run.metric(one.logits, answer, distractor).sum())
        corrupt += float(run.metric(other.logits, answer, distractor).sum())
        for s, sender in enumerate(senders):
            logits = run.through(x, one, other, {sender}, receivers, part, position)
            total[sender] += float(run.metric(logits, answer, distractor).sum())
            if progress is not None:
                progress("path patching", (b + (s + 1) / len(senders)) / len(run.batches))
    n = len(pairs)
    clean, corrupt = clean / n, corrupt / n
    effect = torch.zeros_like(total)
    effect[:last] = (total[:last] / n - clean) / run.difference(clean, corrupt)
    source = {"receivers": receivers, "part": part if receivers else "residual", "prompts": n, **_circumstances(model)}
    return PathEffects(effect, clean, corrupt, model_identity(model), source)


@torch.no_grad()
def patch(
    model,
    pairs: Sequence[Contrast],
    heads: Pairs = (),
    mlps: Sequence[int] = (),
    embeddings: bool = False,
    *,
    batch: int = 25,
) -> float:
    """Direct effect of several parts at once on the logits: heads, MLPs (by layer) and embeddings take their corrupt outputs, all others
    keep their clean ones. All of them together: 1; none: 0. Raises what `path_patch` does.
    """
    run = Runs(model, pairs, batch)
    heads = check_heads(heads, run.info) if heads else ()
    if any(not 0 <= i < run.info.n_layers for i in mlps):
        raise InputError(f"mlps = {list(mlps)}: expected layers below {run.info.n_layers}")
    sums = [0.0, 0.0, 0.0]
    for x, y, answer, distractor in run.batches:
        one, other = run.record(x, True), run.record(y, True)
        given = other.embeds if embeddings else one.embeds
        frozen = [other.mlps[i] if i in mlps else m for i, m in enumerate(one.mlps)]
        logits = run.through(x, Record(one.z, frozen, given, one.logits), other, set(heads), None, "z", None)
        for i, found in enumerate((one.logits, other.logits, logits)):
            sums[i] += float(run.metric(found, answer, distractor).sum())
    clean, corrupt, patched = (s / len(pairs) for s in sums)
    return (patched - clean) / run.difference(clean, corrupt)


# ---------------------------------------------------------------------- circuits


@dataclass(frozen=True, eq=False)
class Circuit:
    """Heads of one task by stage.

    stages: "movers" and "negative movers" (direct), "inhibition" (to the movers' queries), "content" (to the values of these).
    effects: the path effects each stage was chosen by.  total: heads of the model.
    """

    stages: dict[str, Pairs]
    effects: dict[str, PathEffects]
    total: int

    @property
    def heads(self) -> frozenset[tuple[int, int]]:
        return frozenset(pair for stage in self.stages.values() for pair in stage)

    def overlap(self, other: Circuit) -> Overlap:
        """What two circuits of one model share."""
        return Overlap(
            self.heads & other.heads,
            len(self.heads | other.heads),
            min(len(self.heads), len(other.heads)),
            self._chance(other),
        )

    def _chance(self, other: Circuit) -> float:
        return len(self.heads) * len(other.heads) / self.total


@dataclass(frozen=True)
class Overlap:
    """shared: heads in both.  union, smaller: how many are in either, in the smaller.  chance: what two random sets would share."""

    shared: frozenset[tuple[int, int]]
    union: int
    smaller: int
    chance: float

    @property
    def of_union(self) -> float:
        return len(self.shared) / self.union

    @property
    def of_smaller(self) -> float:
        return len(self.shared) / self.smaller


def find_circuit(
    model,
    pairs: Sequence[Contrast],
    count: int | None = None,
    *,
    freeze_mlps: bool = False,
    batch: int = 25,
    progress: Progress | None = None,
) -> Circuit:
    """The circuit of a task, traced backwards from the logits; count: heads a stage, default 2 % of all, at least one.

    Only heads with an effect of the stage's sign are taken. Errors as `path_patch`.
    """
    info = ModelInfo.of(model)
    total = info.n_layers * info.heads
    count = max(1, round(0.02 * total)) if count is None else count
    check_count("count", count, 1)
    effects: dict[str, PathEffects] = {}
    stages: dict[str, Pairs] = {}

    def trace(name: str, n: int, receivers: Pairs | None, part: str) -> None:
        step = None if progress is None else (lambda line, share: progress(f"{line}: {name}", (n + share) / 3))
        if receivers is not None and (not receivers or max(i for i, _ in receivers) == 0):
            stages[name] = ()  # nothing lies before the first layer
            return
        found = path_patch(model, pairs, receivers, part, freeze_mlps=freeze_mlps, batch=batch, progress=step)
        effects[name], stages[name] = found, _strong(found, min(count, total))

    trace("movers", 0, None, "z")
    stages["negative movers"] = _strong(effects["movers"], min(count, total), against=True)
    trace("inhibition", 1, stages["movers"], "q")
    trace("content", 2, stages["inhibition"], "v")
    return Circuit(stages, effects, total)


def _strong(found: PathEffects, count: int, against: bool = False) -> Pairs:
    sign = -1 if against else 1
    return tuple(p for p in found.ranking(ascending=against).top(count) if sign * float(found.effect[p]) > 0)


# ---------------------------------------------------------------------- roles


class _Last(Tap):
    """Attention of the last query and what each head puts out there."""

    def __init__(self):
        self.a: dict[int, Tensor] = {}
        self.z: dict[int, Tensor] = {}
        self.modules: dict[int, nn.Module] = {}

    def weights(self, layer: int, a: Tensor, v: Tensor, module: nn.Module) -> Tensor:
        self.a[layer], self.modules[layer] = a[:, :, -1], module
        return a

    def output(self, layer: int, z: Tensor, module: nn.Module) -> Tensor:
        self.z[layer] = z[:, :, -1]
        return z


@torch.no_grad()
def mover_score(model, pairs: Sequence[Contrast], head: tuple[int, int]) -> float:
    """Does a head write what it looks at: near 1 for movers, below 0 for negative movers.

    The correlation, over prompts and both candidates, of its last query's attention to a candidate and of its output along that
    candidate's unembedding (through W_O and W_U).
    """
    run = Runs(model, pairs, 25)
    ((layer, h),) = check_heads((head,), run.info)
    unembed, looked, wrote = model.get_output_embeddings().weight.float(), [], []
    for x, _, answer, distractor in run.batches:
        check_length(x.shape[1], "a mover score")
        with tapped(model, _Last()) as tap:
            run.logits(x)
        matrix = output_matrix(model, tap.modules[layer]).float().unflatten(1, (run.info.heads, -1))[:, h]
        out = tap.z[layer][:, h].float() @ matrix.T
        for token in (answer, distractor):
            looked.append((tap.a[layer][:, h].float() * (x == token[:, None])).sum(-1))
            wrote.append((out * unembed[token]).sum(-1))
    return pearson(torch.cat(looked).cpu(), torch.cat(wrote).cpu())


@torch.no_grad()
def inhibition_score(model, pairs: Sequence[Contrast], head: tuple[int, int], movers: Pairs) -> float:
    """Does a head turn movers away from the distractor: how much more of their last query's attention goes there, mean over movers and
    prompts, once the head's last output is that of the corrupt prompt. Above 0 for inhibiting heads.
    """
    run = Runs(model, pairs, 25)
    (sender,), movers = check_heads((head,), run.info), check_heads(movers, run.info)
    gained = 0.0
    for x, y, _, distractor in run.batches:
        check_length(x.shape[1], "an inhibition score")
        corrupt = run.record(y, False).z[sender[0]][:, sender[1], -1]

        class Swap(_Last):
            def output(self, layer: int, z: Tensor, module: nn.Module, corrupt=corrupt) -> Tensor:
                if layer == sender[0]:
                    z = z.clone()
                    z[:, sender[1], -1] = corrupt
                return super().output(layer, z, module)

        mass = []
        for tap in (_Last(), Swap()):
            with tapped(model, tap):
                run.logits(x)
            on = x == distractor[:, None]
            mass.append(sum(float((tap.a[i][:, h] * on).sum()) for i, h in movers))
        gained += mass[1] - mass[0]
    return gained / (len(pairs) * len(movers))
