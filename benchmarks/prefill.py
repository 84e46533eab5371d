"""The whole prefill of a Llama-3-8B-shaped model with chosen key blocks, through the ordinary session, against dense.

    python -m benchmarks.prefill [--out benchmarks/results/prefill-h100-DATE.json]

Which blocks are read is drawn at random once for each density: this measures what sparsity is worth in time, not a method.
Dense is the stock model with cuDNN attention.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveal
from foveal.selection import All, Blocks

from .llama import HEADS, LAYERS, llama_8b
from .ops.prefill import BLOCK, _sdpa, executed_flops, inputs, random_map
from .ops.timing import interleaved_ms
from .record import save


@dataclass(frozen=True)
class Drawn(foveal.Method):
    """Read the blocks of one map in every layer of a prompt."""

    density: float = 0.1

    def setup(self, model) -> dict:
        return {}

    def select(self, step):
        if step.decode:
            return All()
        if step.L not in step.plan:
            step.plan[step.L] = random_map(step.L, self.density)
        return Blocks(step.plan[step.L], BLOCK)


def seconds(call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def run(lengths: list[int], out: Path | None) -> None:
    model, rows = llama_8b(), []
    for length in lengths:
        ids = torch.randint(0, 1000, (1, length), device="cuda")
        read = lambda ids=ids: model(ids, logits_to_keep=1)
        rounds = 3 if length <= 65536 else 1
        with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            model(ids[:, :4096], logits_to_keep=1)
            dense = min(seconds(read) for _ in range(rounds))
        q, k, v = inputs(length)
        attention = interleaved_ms(
            {"dense": lambda q=q, k=k, v=v: _sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)}, rounds=3
        )
        rows.append(
            {"tokens": length, "prefill": "dense, cuDNN", "s": dense, "attention_s": attention["dense"] * LAYERS / 1e3}
        )
        for density in (1.0, 0.25, 0.1):
            method = None if density == 1 else Drawn(density)
            with torch.no_grad(), foveal.attach(model, method):
                model(ids[:, :4096], logits_to_keep=1)
                if method is not None:
                    read()  # draws the map
                ours = min(seconds(read) for _ in range(rounds))
            row = {
                "tokens": length,
                "prefill": f"ours, {density:.0%} of the blocks",
                "s": ours,
                "of_dense": ours / dense,
            }
            if method is not None:
                row["executed_PFLOP"] = executed_flops(random_map(length, density, HEADS)) * LAYERS / 1e15
            rows.append(row)
        for row in rows[-4:]:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if out is not None:
            save(out, {"rows": rows})
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lengths", default="32768,131072")
    options = parser.parse_args()
    run([int(n) for n in options.lengths.split(",")], options.out)


if __name__ == "__main__":
    main()
