"""Fills the tables of the pages on keeping, comparing, kvpress, tuning and serving from the committed results of the benchmarks."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


def _beside(name: str) -> ModuleType:
    """A file of this folder, which the site's builder does not have on its path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


published, reading = _beside("published"), _beside("reading")

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
PAGES = ("keep.md", "compare.md", "kvpress.md", "tune.md", "serve.md")
AGAIN = "window read anew"
COLUMNS = {"decode_ms": ".2f", "decode_speedup": ".2f", "of_dense_bytes": ".3f", "reading_of_dense": ".2f"}


class Said(NamedTuple):
    """A number of a paper beside ours: of which row, of what, and the paper's with its setting."""

    method: str
    of: str
    number: str


STEP, SMALLER, LESS, READING, ANEW = (
    "a step, faster",
    "cache, smaller",
    "cache, less by",
    "prompt, faster",
    "a token, faster",
)
_FASA = "fasa(budget=0.189, chunks='slowest', heads='kv')"
SAID = (
    Said("streaming-llm(budget=1024)", ANEW, "up to 22.2x than reading the window anew"),
    Said("streaming-llm(budget=4096)", ANEW, "up to 22.2x than reading the window anew"),
    Said("duo()", SMALLER, "1.67x, half of the heads whole"),
    Said("duo()", STEP, "1.50x"),
    Said("duo()", READING, "1.63x"),
    Said("duo(whole=0.25)", SMALLER, "2.55x, a model with as many KV heads as query heads"),
    Said("duo(whole=0.25)", STEP, "2.18x, such a model"),
    Said("duo(whole=0.25)", READING, "1.73x, such a model"),
    Said("razor()", LESS, "over 70 %"),
    Said("razor(budget=0.3)", LESS, "over 70 %"),
    Said("scissorhands(budget=0.2)", SMALLER, "5x"),
    Said("scissorhands(budget=0.2, bits=4)", SMALLER, "20x"),
    Said("h2o(budget=0.2)", SMALLER, "5x"),
    Said("snapkv(budget=1024)", SMALLER, "8.2x at 16k"),
    Said("snapkv(budget=1024)", STEP, "3.6x at 16k"),
    Said("long-gen()", LESS, "62 %"),
    Said("long-gen()", STEP, "1.41x"),
    Said("long-gen()", READING, "1.67x"),
    Said("quest(budget=1024)", STEP, "2.23x at 32k, weights in 4 bits"),
    Said("tidal(budget=256)", STEP, "2.1x"),
    Said("token-select()", STEP, "2.28x end to end"),
    Said("token-select()", READING, "2.28x end to end"),
    Said(_FASA, STEP, "2.56x at 18.9 % of the cache"),
    Said("hip()", STEP, "up to 36.9x of attention alone"),
    Said("hip(refresh=8)", STEP, "up to 36.9x of attention alone"),
)
_MARK = re.compile(r"<!-- (results|reading): ([\w-]+) -->")


def on_page_markdown(markdown, page, config, files):
    """Put the newest results in the place of their marks."""
    return filled(markdown) if page.file.src_uri in PAGES else markdown


def filled(markdown: str, folder: Path = RESULTS) -> str:
    return _MARK.sub(lambda mark: _table(mark[1], mark[2], folder), markdown)


def _table(what: str, name: str, folder: Path) -> str:
    found = sorted(folder.glob(f"{name}-*.json"))
    if not found:
        return f"Not measured yet: `{COMMANDS[name]}` on a GPU writes the numbers."
    result = json.loads(found[-1].read_text("utf-8"))
    if what == "reading":
        return READINGS[name](result)
    meta = result["meta"]
    versions = meta["versions"]
    torch = versions["torch"] if "torch" in versions else versions["foveal"]["torch"]
    told = f"; `{found[-1].name}`, `{meta.get('command') or COMMANDS[name]}`"
    return f"{TABLES[name](result)}\n\nOne {published.machine(meta)}, torch {torch}, {meta['date'][:10]}{told}.\n"


def keep(result: dict) -> str:
    """A table for each length: what a method costs beside dense."""
    parts = []
    for tokens in sorted({r["tokens"] for r in result["rows"] if r["method"] == "dense"}):
        lines = [
            f"### {tokens:,} tokens\n",
            "| method | a step, ms | times dense | cache, of dense | reading, of dense |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        rows = [r for r in result["rows"] if r["tokens"] == tokens and not r["method"].startswith(AGAIN)]
        for r in rows:
            cells = [_number(r.get(key), how) for key, how in COLUMNS.items()]
            if r["method"] == "dense":
                cells[1:] = ["1.00", "1.000", "1.00"]
            cells[0] = r.get("error") or cells[0]
            lines.append(f"| `{r['method']}` | " + " | ".join(cells) + " |")
        notes = [f"- `{r['method']}`: {r['note']}." for r in rows if "note" in r]
        parts.append("\n".join([*lines, "", *notes] if notes else lines))
    again = [r for r in result["rows"] if r["method"].startswith(AGAIN)]
    if again:
        parts.append("; ".join(f"{r['method']}: {r['decode_ms']:.1f} ms a token" for r in again).capitalize() + ".")
    return "\n\n".join(parts)


def beside_papers(result: dict) -> str:
    """What papers say of speed and memory, and what the same method does here; then what bounds every step."""
    rows = {(r["method"], r["tokens"]): r for r in result["rows"]}
    again = {name: r for (name, _), r in rows.items() if name.startswith(AGAIN)}
    lengths = sorted({tokens for name, tokens in rows if name == "dense"})
    lines = [
        "| method, as it was run here | what | the paper | "
        + " | ".join(f"here, {n:,} tokens" for n in lengths)
        + " |",
        "| --- | --- | --- |" + " ---: |" * len(lengths),
    ]
    for said in SAID:
        cells = [_ours(said, rows.get((said.method, n), {}), again) for n in lengths]
        lines.append(f"| `{said.method}` | {said.of} | {said.number} | " + " | ".join(cells) + " |")
    bounds = []
    for n in lengths:
        timed = [r for (_, t), r in rows.items() if t == n and r.get("decode_speedup")]
        least = min(timed, key=lambda r: r["of_dense_bytes"], default=None)
        if least is not None:
            bounds.append(
                f"At {n:,} tokens a step over {least['of_dense_bytes']:.1%} of the cache takes {least['decode_ms']:.1f} ms where "
                f"dense takes {rows['dense', n]['decode_ms']:.1f}, {least['decode_speedup']:.2f}x."
            )
    return "\n".join(lines) + "\n\n" + " ".join(bounds)


def _ours(said: Said, row: dict, again: dict) -> str:
    """Our number in the paper's words."""
    if "decode_ms" not in row:
        return "not measured"
    if said.of == ANEW:
        size = re.search(r"budget=(\d+)", said.method)[1]
        anew = again.get(f"{AGAIN}, {size} tokens")
        return "not measured" if anew is None else f"{anew['decode_ms'] / row['decode_ms']:.1f}x"
    if said.of == LESS:
        return f"{1 - row['of_dense_bytes']:.0%}"
    if said.of == READING:
        return f"{1 / row['reading_of_dense']:.2f}x" if "reading_of_dense" in row else "not measured"
    return f"{1 / row['of_dense_bytes']:.1f}x" if said.of == SMALLER else f"{row['decode_speedup']:.2f}x"


def stream(result: dict) -> str:
    """Perplexity at the beginning, at the end and at its worst, and what is held."""
    lines = [
        "| reads | tokens | perplexity at first | at the end | at worst | bytes at the end | tokens a second |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in result["rows"]:
        points = r["points"]
        first, last, worst = (
            _perplexity(x) for x in (points[0]["nats"], points[-1]["nats"], max(p["nats"] for p in points))
        )
        end = points[-1]
        lines.append(
            f"| {r['reads']} | {end['tokens']:,} | {first} | {last} | {worst} | {end['bytes']:,} | {r['tokens_per_s']:,.0f} |"
        )
    whole, chunk = result["settings"]["tokens_of_the_novel"], result["settings"]["chunk"]
    return (
        "\n".join(lines)
        + f"\n\nThe novel has {whole:,} tokens and begins anew after its end; it is read in chunks of {chunk:,}."
    )


TABLES = {
    "keep-h100": keep,
    "stream-h100": stream,
    "compare-ruler": published.compare,
    "kvpress": published.kvpress,
    "tune": published.tune,
    "serve-load-cpu": published.load,
}
READINGS = {"compare-ruler": reading.reading, "keep-h100": beside_papers}
COMMANDS = {
    "keep-h100": "python -m benchmarks.keep",
    "stream-h100": "python -m benchmarks.stream",
    "compare-ruler": "foveal compare --methods all --tasks ruler",
    "kvpress": "python -m benchmarks.kvpress_side",
    "tune": "foveal tune --data prompts.jsonl",
    "serve-load-cpu": "python -m benchmarks.serve_load",
}


def _number(x: float | None, how: str) -> str:
    return "" if x is None else format(x, how)


def _perplexity(nats: float) -> str:
    return f"{math.exp(nats):,.2f}" if nats < 20 else f"e^{nats:.0f}"
