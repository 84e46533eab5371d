"""The page on speed, made from the committed results of the GPU benchmarks while the site is built, so that it cannot drift."""

import json
from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
PAGE = "speed.md"

INTRODUCTION = """\
# Speed on a GPU

Measured on one {gpu} with torch {torch} and Triton {triton}, {date}. Shapes unless said: bfloat16, 32 query heads, 8 KV
heads, head size 128. Baselines run in the same process: cuDNN and flash attention as PyTorch offers them, and
FlexAttention. What was tried and what bounds each number is in
`benchmarks/NOTES.md`.

"""

DECODE = """\
## A decode step of a model

A model of the shape of Llama 3 8B with random weights, through `foveal.attach` and ordinary calls; dense is the same model
on a contiguous cache, its attention the faster of cuDNN and flash, replayed as a CUDA graph. The bound is the bytes a step
must read, weights and kept keys, at the speed of a copy. "Per head": two of eight heads hold three times their share.

"""

PREFILL = """\
## A whole prefill

Every layer reads the same share of the blocks of 128 x 128, drawn at random; dense is the stock model with cuDNN attention.

"""

OPS = {
    "decode": "## Decode attention over pages\n\nMicroseconds of one call in a replayed graph over rotating inputs.\n\n",
    "prefill": "## Prefill attention\n\nTFLOP/s count whole blocks as executed; a backward counts 2.5 forwards.\n\n",
    "statistics": "## Second passes over the weights\n\nExact statistics from the log-sum-exp; memory grows with the length alone.\n\n",
    "selection": "## Choosing what to read\n\n",
}


def on_config(config):
    """Put the page into the navigation."""
    guide = next(item["Guide"] for item in config.nav if "Guide" in item)
    guide.insert(-1, {"Speed on a GPU": PAGE})
    return config


def on_files(files, config):
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    ops = _latest("ops-h100")
    meta = ops["meta"]
    parts = [INTRODUCTION.format(gpu=meta["gpu"], date=meta["date"], **meta["versions"])]
    parts += [DECODE, _decode(_latest("decode-h100")["rows"]), PREFILL, _table(_latest("prefill-h100")["rows"])]
    for name, words in OPS.items():
        part = ops[name]
        wrong = f", {len(part['wrong'])} of them wrong" if part["wrong"] else ""
        checked = (
            f"{part['checks']} checks against float32 or float64{wrong}; largest error {part['largest_error']:.1e}.\n\n"
        )
        parts += [words, checked, _table(part["rows"])]
    return "".join(parts)


def _latest(name: str) -> dict:
    return json.loads(sorted(RESULTS.glob(f"{name}-*.json"))[-1].read_text("utf-8"))


def _decode(rows: list[dict]) -> str:
    lines = [
        {
            "tokens": f"{r['tokens'] // 1024}k x {r['batch']}",
            "cache": r["cache"],
            "keys kept": f"{r['share']:.0%}",
            "ms a step": r["ms"],
            "tokens/s": r["tokens_per_s"],
            "bound, ms": r["bound_ms"],
            "cache, GB": r["cache_bytes"] / 1e9,
        }
        for r in rows
    ]
    return _table(lines)


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = f"| {' | '.join(columns)} |\n|{' --- |' + ' ---: |' * (len(columns) - 1)}\n"
    return head + "".join(f"| {' | '.join(_shown(row.get(c)) for c in columns)} |\n" for row in rows) + "\n"


def _shown(x) -> str:
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)
