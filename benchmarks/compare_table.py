"""Whole comparisons as a file that can be committed: `python -m benchmarks.compare_table ruler/results.json [...] [--name ruler]`.

Several results stand one after the other: lengths that were asked differently often. One row a method, budget and length: the mean score
over the tasks, its difference to dense with the paired interval, bytes and speed (on a CPU milliseconds of attention too), and each task's
score with the same. Only cells count in which every sample was answered; a row in which one is missing says which.
Writes benchmarks/results/compare-NAME-DATE.json.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from foveal.compare.rows import checked_records
from foveal.errors import InputError

ALIKE = ("model", "device", "dtype", "hardware", "versions", "seed")  # what results in one table share
KEPT = ("date", "command", *ALIKE, "workers", "notes")


def rows(results: dict) -> list[dict]:
    """A row for each method with its parameters and length, in the order of the run; tasks weigh the same."""
    samples = results["meta"]["samples"]
    groups: dict[tuple, list[dict]] = {}
    for r in checked_records(results):
        if r["kind"] == "generate":
            key = r["length"], r["method"], json.dumps(r["params"], sort_keys=True, default=str)
            groups.setdefault(key, []).append(r)
    return [_row(group, samples) for group in groups.values()]


def _row(group: list[dict], samples: int) -> dict:
    first = group[0]
    whole = [r for r in group if r["status"] == "ok" and r["n"] == samples]
    row = {"method": first["method"], "budget": first["budget"], "length": first["length"], "samples": samples}
    missing = {r["task"]: r["error"] or f"{r['n']} of {samples} samples" for r in group if r not in whole}
    if missing:
        row["missing"] = missing
    if not whole:
        return row
    row["score"] = _mean(whole, "score")
    paired = all(r["gain_low"] is not None for r in whole)
    if paired:
        row["gain"] = [_mean(whole, "gain"), *_ends(whole)]
    row["bytes"] = sum(r["kv_bytes"] for r in whole) // len(whole)
    row["kept"] = sum(r["kv_bytes"] for r in whole) / sum(r["kv_bytes_dense"] for r in whole)
    reads = [r["kv_read_share"] for r in whole if r["kv_read_share"] is not None]
    row["read"] = sum(reads) / len(reads) if reads else None
    for name in ("prefill_s", "decode_tok_s", "peak_bytes"):
        row[name] = next((r[name] for r in whole if r[name] is not None), None)
    if (attention := next((r["attention_ms"] for r in whole if r.get("attention_ms") is not None), None)) is not None:
        row["attention_ms"] = attention
    row["tasks"] = {r["task"]: [r["score"], *([r["gain_low"], r["gain_high"]] if paired else [])] for r in whole}
    return row


def _mean(records: list[dict], name: str) -> float:
    return math.fsum(r[name] for r in records) / len(records)


def _ends(records: list[dict]) -> list[float]:
    """Both ends of the mean gain over tasks: their half-widths add in quadrature, each side by itself."""
    mean = _mean(records, "gain")
    low, high = (
        math.sqrt(math.fsum((r[name] - r["gain"]) ** 2 for r in records)) / len(records)
        for name in ("gain_low", "gain_high")
    )
    return [mean - low, mean + high]


def published(*results: dict) -> dict:
    """What is committed: the runs' circumstances and their rows.

    Raises InputError for runs whose rows cannot stand side by side.
    """
    first = results[0]["meta"]
    for other in (r["meta"] for r in results[1:]):
        if differ := [f"{k} {first.get(k)} and {other.get(k)}" for k in ALIKE if first.get(k) != other.get(k)]:
            raise InputError(
                f"results of one table come from one kind of run, got {'; '.join(differ)}: write two tables"
            )
    meta = {k: first[k] for k in KEPT if k in first}
    meta["model"] = Path(meta["model"]).name
    meta["date"] = max(r["meta"]["date"] for r in results)[:10]
    meta["command"] = " && ".join(dict.fromkeys(r["meta"]["command"] for r in results))
    return {"meta": meta, "rows": [row for r in results for row in rows(r)]}


def written(data: dict) -> str:
    """As JSON, a row a line, numbers with four digits."""
    lines = ",\n".join("  " + json.dumps(_short(row)) for row in data["rows"])
    return f'{{\n "meta": {json.dumps(data["meta"])},\n "rows": [\n{lines}\n ]\n}}\n'


def _short(x):
    if isinstance(x, dict):
        return {k: _short(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_short(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="what `foveal compare` wrote")
    parser.add_argument("--name", default="ruler")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    data = published(*(json.loads(file.read_text("utf-8")) for file in options.results))
    path = options.out / f"compare-{options.name}-{data['meta']['date']}.json"
    path.write_text(written(data), "utf-8")
    print(f"{len(data['rows'])} rows, {path.stat().st_size:,} bytes: wrote {path}")


if __name__ == "__main__":
    main()
