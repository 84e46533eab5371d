"""Every operation on the GPU, timed and checked.

    python -m benchmarks.ops [--only decode,prefill,statistics,selection] [--out benchmarks/results/ops-h100-DATE.json]

Shapes unless said: bfloat16, 32 query heads, 8 KV heads, head size 128. Errors are against float32 or float64 attention.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import save

from . import decode, prefill, selection, statistics

PARTS = {"decode": decode, "prefill": prefill, "statistics": statistics, "selection": selection}
ALLOWED = 2e-2  # relative error of half precision against float64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--no-grid", action="store_true", help="leave the check of correctness out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console, result = Console(width=160), {}
    for name in options.only.split(","):
        errors = [] if options.no_grid else list(_guarded(PARTS[name].grid(), name))
        bad = [e for e in errors if not e["error"] <= ALLOWED]
        if errors:
            worst = max(errors, key=lambda e: e["error"])
            console.print(
                f"{name}: {len(errors)} checks, largest error {worst['error']:.1e} ({worst['case']}), wrong: {bad}"
            )
        rows = []
        for row in _guarded(PARTS[name].run(), name):
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        result[name] = {
            "checks": len(errors),
            "wrong": bad,
            "largest_error": max((e["error"] for e in errors), default=None),
        }
        result[name]["rows"] = rows
        console.print(_table(name, rows))
        if options.out is not None:
            save(options.out, result)
        gc.collect()
        torch.cuda.empty_cache()


def _guarded(rows: Iterator[dict], part: str) -> Iterator[dict]:
    """A part that fails loses its own rows, not those of the others."""
    try:
        yield from rows
    except Exception as error:
        yield {"case": f"{part} FAILED: {type(error).__name__}: {str(error)[:300]}", "error": float("inf")}


def _table(name: str, rows: list[dict]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(_shown(row.get(c)) for c in columns))
    return table


def _shown(x: object) -> str:
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


if __name__ == "__main__":
    main()
