"""What methods that choose keys of a prompt find of what an exact choice of as many keys would read, on the default model.

    python -m benchmarks.select_recall [--out benchmarks/results/select-recall-cpu-DATE.json] [--lengths 2048]

Of some queries of every layer and head: the share of its exact top-k keys that a query reads, where k is how many it reads (`recall`), and
the weight of what it reads beside that of the exact top-k (`weight`, and `best`), all in the dense attention of its own queries and keys.
Queries that a method drops read nothing and are left out. The prompt is prose with needles and ends with the question.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch

import foveal
from foveal.hub import load, model_identity
from foveal.methods.select.work import work_of
from foveal.tasks import get_task

from .record import save
from .select_quality import ARMS, DENSE

QUERIES = 24
"""Queries looked at in each layer, evenly spaced, the prompt's last among them."""


def found(step, queries: int = QUERIES) -> torch.Tensor:
    """Sums over queries and heads: [recall, weight, weight of the exact top-k, how many], of those that read anything; float64."""
    total = torch.zeros(4, dtype=torch.float64)
    keys = step.per_head(step.k_new)[0]
    for i in torch.linspace(step.L // queries - 1, step.L - 1, queries).long().tolist():
        z = (step.q[0, :, i, None] @ keys[:, : i + 1].mT)[:, 0].double() * step.scale
        p = (z if step.logit.softcap is None else step.logit.softcap * (z / step.logit.softcap).tanh()).softmax(-1)
        seen = step.per_head_like(step.visible.mask(step, i, i + 1), step.H)[0, :, 0, : i + 1].expand(step.H, -1)
        count = seen.sum(-1)
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        best = torch.arange(i + 1, device=p.device) < count[:, None]
        hits = (seen.gather(1, order) & best).sum(-1) / count.clamp(min=1)
        row = torch.stack([hits.double(), (p * seen).sum(-1), (ranked * best).sum(-1), torch.ones_like(p[:, 0])])
        total += row[:, count > 0].sum(1).cpu()
    return total


@dataclass(frozen=True, eq=False)
class Probe(foveal.Method):
    """Notes what each layer of a prompt finds and how much it reads."""

    sums: list = field(default_factory=list)
    density: list = field(default_factory=list)

    def mix(self, step, out):
        if not step.decode:
            self.sums.append(found(step))
            self.density.append(work_of(step).density)
        return out


def row(model, arm: str, prompt: list[int]) -> dict:
    """Means over queries, heads and layers; of layers that read everything only the density counts, and None stands for the rest."""
    probe = Probe()
    with torch.no_grad(), foveal.attach(model, foveal.get_method(arm) | probe):
        model.get_decoder()(input_ids=torch.tensor([prompt], device=model.device))
    sparse = [s for s, d in zip(probe.sums, probe.density, strict=True) if d < 1]
    row = {"density": sum(probe.density) / len(probe.density), "layers": len(sparse)}
    if not sparse:
        return row | dict.fromkeys(("recall", "weight", "best"))
    recall, weight, best, n = torch.stack(sparse).sum(0).tolist()
    return row | {"recall": recall / n, "weight": weight / n, "best": best / n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", default="2048")
    parser.add_argument("--arms", default=";".join(ARMS), help="methods in text form, between semicolons")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    model, tokenizer = load(device=chosen.device)
    rows = []
    for length in map(int, chosen.lengths.split(",")):
        (sample,) = get_task("needle").samples(tokenizer, length, 1, query_aware=True, positions=length + 64)
        for arm in (a.strip() for a in chosen.arms.split(";")):
            if arm == DENSE:
                continue
            rows.append({"method": arm, "tokens": len(sample.context), **row(model, arm, [*sample.context])})
            print({k: round(x, 4) if isinstance(x, float) else x for k, x in rows[-1].items()}, flush=True)
            if chosen.out is not None:
                save(chosen.out, {"model": model_identity(model), "queries": QUERIES, "rows": rows})


if __name__ == "__main__":
    main()
