"""Measure what CompressKV rests on: which heads look at a whole needle, and how much each layer's output suffers from eviction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...attach import Session, attach
from ...errors import InputError, UnsupportedModel
from ...head_scores import RIGHT, Password, answer_span
from ...heads import HeadRoles
from ...hub import model_identity
from ...method import Method
from ...model_info import ModelInfo
from ...tasks import get_task
from ...tasks.task import Sample, encode
from .profiles import command, greedy
from .scoring import best_of, newest, observed, smoothed

LENGTHS = (512, 1024)
SAMPLES = 10
"""Needles of each length, so that each depth is asked for; the paper takes lengths to 50k."""
DATASETS = ("needle", "passkey", "perplexity")
PROBE = 32
"""Keys of the reduced cache of the error measurement (the paper's)."""


@dataclass(frozen=True, eq=False)
class NeedleProbe(Method):
    """Records in decode the attention each head gives to the tokens first..stop-1: record[layer] = [heads]."""

    span: list[int] = field(default_factory=lambda: [0, 0])
    record: dict[int, Tensor] = field(default_factory=dict)

    def after(self, step) -> None:
        if step.decode:
            first, stop = self.span
            inside = (step.token >= first) & (step.token < stop)
            mass = observed(step, 1)[:, :, 0] * step.per_head(inside)
            self.record[step.layer] = mass.sum(-1)[0].cpu()


@dataclass(frozen=True, eq=False)
class ErrorProbe(Method):
    """Records how far a layer's output is off when `PROBE` keys of the prompt, chosen by its voters, and the new ones are all it has.

    error[layer] sums the relative errors of the decode steps; project[layer] is its output projection.
    """

    voters: dict[int, list[int]]
    project: dict[int, nn.Linear]
    window: int = 8
    kernel: int = 5
    error: dict[int, float] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)

    def after(self, step) -> None:
        if not step.decode:
            mass = observed(step, self.window).sum(2)[:, self.voters[step.layer]].mean(1, keepdim=True)
            last = newest(step, self.window)[:, :1]
            votes = smoothed(mass.masked_fill(last, 0.0), self.kernel, "avg").masked_fill(last, torch.inf)
            stays = best_of(step.store, votes.expand(-1, step.G, -1), [PROBE] * step.G)
            self.chosen[step.layer] = step.token[0, 0][stays[0, 0]]
            return
        z, value = step.scores()[:, :, 0], step.per_head(step.store.values())
        token = step.per_head(step.token)
        known = torch.isin(token, self.chosen[step.layer]) | (token >= self._prompt(step))
        whole, part = (x.softmax(-1) for x in (z, z.masked_fill(~known, -torch.inf)))
        out, reduced = ((w.to(value.dtype)[:, :, None] @ value).flatten() for w in (whole, part))
        weight = self.project[step.layer].weight
        scale = (weight @ out).norm() + 1e-5
        self.error[step.layer] = self.error.get(step.layer, 0.0) + ((weight @ (reduced - out)).norm() / scale).item()

    def _prompt(self, step) -> int:
        return int(self.chosen[step.layer].max()) + 1  # the window, the prompt's last tokens, is among the chosen


@torch.no_grad()
def measure(
    model,
    tokenizer,
    progress: Callable[[str], None] = lambda line: None,
    *,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    voters: int = 4,
    seed: int = 0,
) -> HeadRoles:
    """The scores "semantic" (mass on the whole needle, summed over the steps that repeat one of its tokens, mean of the right runs) and
    "eviction" (a layer's share of the output error, mean of `DATASETS`; the same number for all heads of a layer).

    Raises InputError where no needle was found, UnsupportedModel where the model's output projections are not known.
    """
    info = ModelInfo.of(model)
    project = {i: output_projection(model, i) for i in info.layers}
    found = []
    for length in lengths:
        task = Password()
        runs = task.samples(tokenizer, length, samples, seed=seed, positions=info.max_positions)
        right = [s for s in (_semantic(model, tokenizer, task, run) for run in runs) if s is not None]
        found += right
        progress(f"{len(right)} of {len(runs)} needles found at {length:,} tokens")
    if not found:
        raise InputError("the model found no needle, so no head can be seen reading one: try shorter lengths")
    semantic = torch.stack(found).mean(0)
    best = semantic.argsort(dim=1, descending=True, stable=True)[:, :voters].tolist()
    shares = []
    for name in DATASETS:
        shares.append(_errors(model, tokenizer, name, max(lengths), seed, ErrorProbe(dict(enumerate(best)), project)))
        progress(f"eviction errors on {name}")
    error = torch.zeros(info.n_layers)
    error[list(info.layers)] = torch.stack(shares).mean(0)
    scores = {"semantic": semantic, "eviction": error[:, None].expand(-1, info.heads)}
    source = {
        "semantic": {"lengths": list(lengths), "samples": samples, "kept": len(found)},
        "eviction": {"datasets": list(DATASETS), "length": max(lengths), "keys": PROBE, "voters": voters},
        "seed": seed,
    }
    rounded = {name: x.contiguous().round(decimals=5) for name, x in scores.items()}
    return HeadRoles(model_identity(model), rounded, source, info.layers)


def needle_score(mass: Tensor, produced: Sequence[int], needle: Sequence[int]) -> Tensor:
    """mass [steps, layers, heads] of each step on the whole needle, summed over the steps whose token stands in the needle, once for
    each place where it stands: [layers, heads]."""
    times = torch.tensor([float(sum(t == n for n in needle)) for t in produced])
    return (mass * times[:, None, None]).sum(0)


def _semantic(model, tokenizer, task: Password, run: Sample) -> Tensor | None:
    prompt = [*run.context, *run.question]
    span = answer_span(prompt, [encode(tokenizer, lead + run.target) for lead in (" ", "")])
    if span is None:
        return None
    probe = NeedleProbe(list(span))
    with attach(model, probe) as session:
        mass, produced = [], []
        for token in greedy(session, tokenizer, prompt, task.max_new_tokens):
            produced.append(token)
            row = torch.zeros(session.info.n_layers, session.info.heads)
            for layer, at in probe.record.items():
                row[layer] = at
            mass.append(row)
    if task.score(run, tokenizer.decode(produced)) <= RIGHT:
        return None
    return needle_score(torch.stack(mass), produced, prompt[span[0] : span[1]])


def _errors(model, tokenizer, name: str, length: int, seed: int, probe: ErrorProbe) -> Tensor:
    """The share of each layer in the error of two samples of a task, [layers that are measured]."""
    task = get_task(name)
    with attach(model, probe) as session:
        for s in task.samples(tokenizer, length, 2, seed=seed, positions=session.info.max_positions):
            prompt = [*s.context, *s.question]
            if task.kind == "nll":
                _feed(session, [*prompt, *s.target], len(prompt))
            else:
                list(greedy(session, tokenizer, prompt, task.max_new_tokens))
        error = torch.tensor([probe.error[i] for i in session.info.layers])
    return error / error.sum()


def _feed(session: Session, ids: list[int], prompt: int) -> None:
    """Read the prompt but its last token, then the rest token by token."""
    session.decoder(input_ids=torch.tensor([ids[: prompt - 1]], device=session.model.device))
    store = session.store
    for token in ids[prompt - 1 : -1]:
        session.decoder(input_ids=torch.tensor([[token]], device=session.model.device), past_key_values=store)


def output_projection(model, layer: int) -> nn.Linear:
    """The linear map after the heads of a layer."""
    for name, module in model.get_decoder().layers[layer].named_modules():
        if "attn" in name.lower() or "attention" in name.lower():
            for last in ("o_proj", "out_proj", "dense"):
                if name.endswith("." + last) and isinstance(module, nn.Linear):
                    return module
    raise UnsupportedModel(
        f"{type(model).__name__} names the output projection of its attention in no known way: use errors='uniform'"
    )


if __name__ == "__main__":
    command("compress_kv", "Measure semantic retrieval heads and eviction errors for the method compress-kv.", measure)
