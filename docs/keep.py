"""Fills the tables of the pages on keeping, comparing, kvpress and tuning from the committed results of the benchmarks."""

import importlib.util
import json
import math
import re
from pathlib import Path

_BESIDE = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
published = importlib.util.module_from_spec(_BESIDE)
_BESIDE.loader.exec_module(published)

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
PAGES = ("keep.md", "compare.md", "kvpress.md", "tune.md")
AGAIN = "window read anew"
COLUMNS = {"decode_ms": ".2f", "decode_speedup": ".2f", "of_dense_bytes": ".3f", "reading_of_dense": ".2f"}
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
    """A table for each length: what a method costs beside dense, and what its paper says."""
    parts = []
    for tokens in sorted({r["tokens"] for r in result["rows"] if r["method"] == "dense"}):
        lines = [
            f"### {tokens:,} tokens\n",
            "| method | a step, ms | times dense | cache, of dense | reading, of dense | the paper says |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
        ]
        rows = [r for r in result["rows"] if r["tokens"] == tokens and not r["method"].startswith(AGAIN)]
        for r in rows:
            cells = [_number(r.get(key), how) for key, how in COLUMNS.items()]
            if r["method"] == "dense":
                cells[1:] = ["1.00", "1.000", "1.00"]
            says = r.get("error") or r.get("claim") or ""
            lines.append(f"| `{r['method']}` | " + " | ".join(cells) + f" | {says} |")
        parts.append("\n".join(lines))
    again = [r for r in result["rows"] if r["method"].startswith(AGAIN)]
    if again:
        parts.append("; ".join(f"{r['method']}: {r['decode_ms']:.1f} ms a token" for r in again).capitalize() + ".")
    return "\n\n".join(parts)


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
}
READINGS = {"compare-ruler": published.reading}
COMMANDS = {
    "keep-h100": "python -m benchmarks.keep",
    "stream-h100": "python -m benchmarks.stream",
    "compare-ruler": "foveal compare --methods all --tasks ruler",
    "kvpress": "python -m benchmarks.kvpress_side",
    "tune": "foveal tune --data prompts.jsonl",
}


def _number(x: float | None, how: str) -> str:
    return "" if x is None else format(x, how)


def _perplexity(nats: float) -> str:
    return f"{math.exp(nats):,.2f}" if nats < 20 else f"e^{nats:.0f}"
