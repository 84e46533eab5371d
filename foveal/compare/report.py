"""A comparison as one HTML file: opens offline, fetches nothing, and treats every string in it as untrusted."""

from __future__ import annotations

import html
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from foveal.compare.rows import Row, front, lengths_of, summary_rows
from foveal.compare.table import markdown_table
from foveal.compare.words import amount, percent
from foveal.errors import InputError
from foveal.webpage import filled, inert, sha256

STATIC = Path(__file__).with_name("static")
# "Nearly all of dense's score": the bar the first sentence of the page asks methods to pass.
GOOD = 0.95


def write_report(results: dict, path: str | os.PathLike) -> None:
    """Write the page for `results` to `path`, whole or not at all.

    Raises InputError when `results` is not a comparison or the folder cannot be written to.
    """
    page, target = render(results), Path(path)
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
        umask = os.umask(0)
        os.umask(umask)
        Path(part).chmod(0o666 & ~umask)  # mkstemp makes files private; a report is as readable as any other file
        Path(part).replace(target)
    except OSError as error:
        if part:
            Path(part).unlink(missing_ok=True)
        raise InputError(
            f"expected a file path Foveal can write the report to, got {str(target)!r} ({error.strerror or error}); "
            "choose a folder that exists and is writable."
        ) from error


def render(results: dict) -> str:
    """The page for `results` as text: HTML with its style, scripts, chart library and licences inside.

    Raises InputError when `results` is not a comparison.
    """
    lengths = lengths_of(results)
    meta = results.get("meta") if isinstance(results.get("meta"), dict) else {}
    data = {
        "meta": meta,
        "answer": meta["answer"] if isinstance(meta.get("answer"), str) else headline(results),
        "views": {"all": _plain_rows(summary_rows(results))},
        "limits": meta.get("limits") if isinstance(meta.get("limits"), dict) else {},
        "lengths": lengths,
        "grids": _grids(results),
        "markdown": markdown_table(results),
    }
    if len(lengths) > 1:
        data["views"] |= {str(n): _plain_rows(summary_rows(results, n)) for n in lengths}
    scripts = [_static("echarts.min.js"), _static("report.js")]
    hashes = " ".join(f"'sha256-{sha256(script)}'" for script in scripts)
    parts = {
        "POLICY": f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; base-uri 'none'",
        "TITLE": html.escape(f"Attention methods compared on {meta.get('model') or 'a model'}"),
        "KICKER": "Foveal tune" if data["limits"] else "Foveal compare",
        "STYLE": _static("report.css"),
        "DATA": inert(data),
        "LIBRARY": scripts[0],
        "SCRIPT": scripts[1],
        "LICENSES": html.escape(_static("ECHARTS-LICENSES.txt")),
    }
    return filled(_static("report.html"), parts)


def headline(results: dict) -> str:
    """The answer in a sentence or two: at which budget which method keeps how much of dense's score."""
    rows = summary_rows(results)
    ranked = [r for r in rows if not r.baseline and r.complete and r.quality is not None]
    if not rows:
        return "This run holds no results yet."
    told = [score.value for r in rows if r.baseline for score in r.tasks.values()]
    if not told:
        return "This run has no finished dense baseline, so scores stand alone and shares of dense are not known."
    if max(told) <= 0:
        if not all(r.complete for r in rows if r.baseline):
            return "The dense model scores nothing in what it finished so far, so shares of it are not known yet."
        return "The dense model itself scores nothing here, so shares of it mean nothing: ask shorter texts or other tasks."
    if not ranked:
        return "No method finished every task and length, so none is named best; the table shows what did finish."
    shrinking = [r for r in ranked if r.budget is not None and r.kv_share is not None and r.kv_share < GOOD]
    reading = [r for r in ranked if r not in shrinking and r.read_share is not None and r.read_share < GOOD]
    sentences = [*_best_shrinking(shrinking), *_best_reading(reading)]
    return " ".join(sentences) or "No method in this run kept or read less of the cache than dense attention does."


def _best_shrinking(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    best = {b: max((r for r in rows if r.budget == b), key=lambda r: r.quality) for b in {r.budget for r in rows}}
    good = [b for b, r in best.items() if r.quality >= GOOD]
    budget = min(good) if good else max(best)
    row = best[budget]
    text = f"At {amount(budget)} of the cache, {row.series} keeps {_kept(row)} of dense's score"
    if abs(row.kv_share - budget) > 0.02:
        text += f" with {percent(row.kv_share)} of the bytes resident"
    others = sorted((r for r in rows if r.budget == budget and r is not row), key=lambda r: -r.quality)
    if others:
        second = others[0]
        close = row.quality_low is not None and second.quality >= row.quality_low
        text += f"; {second.series} is next with {percent(second.quality)}"
        text += ", too close to call from these samples" if close else ""
    sentences = [text + "."]
    if not good:
        sentences.append(f"No method kept {percent(GOOD)} at any budget tried.")
    elif min(best) < budget:
        least = best[min(best)]
        sentences.append(f"At {amount(least.budget)} the best is {least.series} with {percent(least.quality)}.")
    return sentences


def _best_reading(rows: list[Row]) -> list[str]:
    good = [r for r in rows if r.quality >= GOOD]
    row = min(good, key=lambda r: r.read_share) if good else max(rows, key=lambda r: r.quality, default=None)
    if row is None:
        return []
    return [
        f"{row.series} reads {percent(row.read_share)} of the keys and keeps {_kept(row)}, with the cache left whole."
    ]


def _kept(row: Row) -> str:
    if row.quality_low is None or row.quality_high is None:
        return percent(row.quality)
    return f"{percent(row.quality)} (95% interval {percent(row.quality_low)} to {percent(row.quality_high)})"


def _plain_rows(rows: list[Row]) -> list[dict]:
    best = {id(row) for row in front(rows)}
    return [asdict(row) | {"complete": row.complete, "front": id(row) in best} for row in rows]


def _grids(results: dict) -> list[dict]:
    """Per method, budget and task: the score at each length and depth or turn, for the heat maps; rows in the table's order."""
    panels = []
    for row in summary_rows(results):
        mine = [
            r
            for r in results["records"]
            if r["method"] == row.method and r.get("budget") == row.budget and (r.get("params") or {}) == row.params
        ]
        for task in row.tasks:
            cells = [
                {"length": r.get("length"), **{k: c.get(k) for k in ("depth", "turn", "score", "n")}}
                for r in mine
                if str(r.get("task")) == task and r.get("status", "ok") == "ok"
                for c in r.get("grid") or []
            ]
            if cells:
                panels.append({"series": row.series, "budget": row.budget, "task": task, "cells": cells})
    return panels


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")
