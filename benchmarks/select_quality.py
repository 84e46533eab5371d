"""What the default model still answers when methods choose what a prompt's queries read, against how much they read.

    python -m benchmarks.select_quality [--out benchmarks/results/select-quality-h100-DATE.json] [--lengths 2048,4096,8000]

Needles, two RULER tasks (one of four needles by key; chains of variables) with the question in the prompt, and the next tokens of a novel.
All methods answer the same samples, dense first. Density is the share of the keys before a query that it reads while the prompt of the
first sample is read, mean over queries, heads and layers.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import foveal
from foveal.hub import load, model_identity
from foveal.methods.select.work import work_of
from foveal.tasks import get_task
from foveal.verify.experiments import DENSE, Cell
from foveal.verify.lab import Lab

from .record import save

TASKS = ("needle", "niah_multikey_1", "vt", "perplexity")
ARMS = (
    DENSE,
    "pooled-blocks(budget=0.25)",
    "pooled-blocks(budget=0.25) | rectified",
    "minference(budget=0.25)",
    "flex-prefill(least=256, block=64)",
    "xattention(block=64)",
    "power-attention(block=64)",
    "token-sparse(least=256, window=64)",
    "token-sparse(least=256, window=64, layers='stable')",
    "token-sparse(least=256, window=64) | xattention(block=64)",
    "hip(budget=0.25)",
    "hip(budget=0.25, representative='middle')",
    "hisa(budget=0.25, block=64)",
    "dhsa(budget=0.25, block=64, first=64, local=64)",
    "dhsa(budget=0.25, block=64, first=64, local=64, boundaries='even')",
    "flux",
    "flux(decision='sparse', sink=16, recent=112)",  # the window of the default model's routers
)


@dataclass(frozen=True, eq=False)
class Seen(foveal.Method):
    """Notes the density of every layer of a prompt."""

    found: list[float] = field(default_factory=list)

    def mix(self, step, out):
        if not step.decode:
            self.found.append(work_of(step).density)
        return out


def read_share(model, arm: str, prompt: list[int]) -> float:
    """The share of the keys that a method's queries read in a prompt, mean over layers."""
    seen = Seen()
    with torch.no_grad(), foveal.attach(model, seen if arm == DENSE else foveal.get_method(arm) | seen):
        model.get_decoder()(input_ids=torch.tensor([prompt], device=model.device))
    return sum(seen.found) / len(seen.found)


def run(model, tokenizer, arms, tasks, lengths, samples: int, limit: float, out: Path | None) -> list[dict]:
    """Rows of method, task and length with the mean score, its values, and the density."""
    began, rows, lab = time.perf_counter(), [], Lab(model, tokenizer)
    for arm in arms:
        for length in lengths:
            if time.perf_counter() - began > limit:
                rows.append({"method": arm, "tokens": length, "skipped": f"{limit:.0f} s had passed"})
                continue
            prompt = (
                get_task("needle").samples(tokenizer, length, 1, query_aware=True, positions=length + 64)[0].context
            )
            try:
                share = read_share(model, arm, [*prompt])
                for task in tasks:
                    told = get_task(task).kind == "generate"
                    found = lab.scores(arm, Cell(task, length, samples if told else None, query_aware=told))
                    values = [round(x, 5) for x in found.values]
                    rows.append({"method": arm, "tokens": length, "task": task, "score": found.mean, "n": len(values)})
                    rows[-1] |= {"density": share, "values": values}
            except foveal.FovealError as error:  # nothing learned for this model, a text too short: the rest goes on
                rows.append({"method": arm, "tokens": length, "skipped": str(error)})
            told = {
                row.get("task", "skipped"): row.get("score", row.get("skipped"))
                for row in rows
                if row["method"] == arm and row["tokens"] == length
            }
            print(f"{time.perf_counter() - began:.0f} s  {arm}  {length}  {told}", flush=True)
        if out is not None:
            save(out, {"model": model_identity(model), "samples": samples, "rows": rows})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", default="2048,4096,8000")
    parser.add_argument("--samples", type=int, default=10, help="questions of each generating task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--arms", default=";".join(ARMS), help="methods in text form, between semicolons")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which nothing new is begun")
    chosen = parser.parse_args()
    model, tokenizer = load(device=chosen.device)
    lengths = [int(n) for n in chosen.lengths.split(",")]
    arms = [arm.strip() for arm in chosen.arms.split(";")]
    run(model, tokenizer, arms, chosen.tasks.split(","), lengths, chosen.samples, chosen.limit, chosen.out)


if __name__ == "__main__":
    main()
