"""Operations on a CPU beside dense attention of PyTorch, at the shape of the default model.

    OMP_NUM_THREADS=2 python -m benchmarks.cpu_ops [--out benchmarks/results/cpu-ops-DATE.json]

The calls take turns and medians are kept; only the ratios mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from foveal import ops

from .record import save

HEADS, KV_HEADS, DIM, LENGTH, BLOCK, ROUNDS = 9, 3, 64, 4096, 64, 5


def calls() -> dict:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, LENGTH, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    how = {"scale": DIM**-0.5}
    n = LENGTH // BLOCK
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    quarter = (torch.rand(1, HEADS, n, n) < 0.25) & causal | torch.eye(n, dtype=torch.bool)
    _, lse = ops.attend(q, k, v, need_lse=True, **how)
    found = {
        "dense sdpa": partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True),
        "attend with its log-sum-exp": partial(ops.attend, q, k, v, need_lse=True, **how),
        "band, 4 + 508": partial(ops.attend_band, q, k, v, sink=4, recent=508, **how),
        "band, 4 + 1020": partial(ops.attend_band, q, k, v, sink=4, recent=1020, **how),
        "a quarter of the blocks of 64": partial(ops.attend_blocks, q, k, v, quarter, BLOCK, **how),
    }
    for name in ("col_mass", "col_low", "entropy", "sink_mass", "mean_distance", "row_max", "row_argmax", "block_map"):
        found[f"statistic: {name}"] = partial(ops.attention_stats, q, k, lse, want={name}, **how)
    found["pooled scores and top 16"] = lambda: ops.top_blocks(
        ops.pooled_scores(q, k, BLOCK, BLOCK, **how), k=16, size=BLOCK
    )
    return found


@torch.no_grad()
def run() -> list[dict]:
    todo, times = calls(), {}
    for _ in range(ROUNDS + 1):
        for name, call in todo.items():
            start = time.perf_counter()
            call()
            times.setdefault(name, []).append(time.perf_counter() - start)
    median = {name: statistics.median(t[1:]) for name, t in times.items()}
    dense = median["dense sdpa"]
    return [{"case": name, "ms": s * 1e3, "of_dense": s / dense} for name, s in median.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = run()
    for row in rows:
        print(f"{row['case']:32} {row['ms']:8.1f} ms {row['of_dense']:6.2f}")
    if options.out is not None:
        save(options.out, {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
