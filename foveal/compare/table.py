"""The rows of a comparison as a table: for the terminal and for the README."""

from __future__ import annotations

import re

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from foveal.compare.rows import Row, summary_rows, tasks_of
from foveal.compare.words import amount, number, percent


def _cells(row: Row, tasks: list[str], reads: bool) -> list[str]:
    interval = ""
    if not row.baseline and row.quality_low is not None and row.quality_high is not None:
        interval = f" {percent(row.quality_low).removesuffix('%')}-{percent(row.quality_high)}"
    partial = "*" if row.tasks and not row.complete else ""
    scores = [number(row.tasks[t].value) if t in row.tasks else "-" for t in tasks]
    read = row.kv_share if row.read_share is None else row.read_share
    return [
        row.series + partial,
        amount(row.budget),
        percent(row.quality) + interval,
        *scores,
        percent(row.kv_share),
        *([percent(read)] if reads else []),
        number(None if row.peak_bytes is None else row.peak_bytes / 1e6),
        number(row.prefill_s),
        number(row.decode_tok_s),
    ]


def _sheet(results: dict) -> tuple[list[Row], list[str], list[list[str]]]:
    """The rows, the headers of the table, and each row's cells as text."""
    rows = summary_rows(results)
    tasks, reads = tasks_of(rows), any(r.read_share is not None for r in rows)
    return rows, _headers(rows, tasks, reads), [_cells(row, tasks, reads) for row in rows]


def _headers(rows: list[Row], tasks: list[str], reads: bool) -> list[str]:
    def task_header(task: str) -> str:
        found = [row.tasks[task] for row in rows if task in row.tasks]
        counts = {s.n for s in found}
        arrow = "↓" if found[0].better == "lower" else "↑"
        return f"{task}\n{arrow}" + (f" n={counts.pop()}" if len(counts) == 1 else "")

    return [
        "method",
        "budget",
        "of dense\nand 95%",
        *(task_header(t) for t in tasks),
        "KV\nkept",
        *(["KV\nread"] if reads else []),
        "peak\nMB",
        "prefill\ns",
        "decode\ntok/s",
    ]


def _foot(rows: list[Row]) -> list[str]:
    notes = []
    at = next((r.speed_length for r in rows if r.speed_length), None)
    if at:
        notes.append(f"Peak memory, prefill and decode speed at {at:,} tokens.")
    nothing = [t for r in rows if r.baseline for t, s in r.tasks.items() if s.value <= 0]
    if nothing:
        notes.append(f"Dense scores nothing in {', '.join(nothing)}, which is left out of its shares.")
    if any(r.tasks and not r.complete for r in rows):
        notes.append("* not every task and length finished.")
    return notes + [f"{r.label}: {p}" for r in rows for p in r.problems]


def rich_table(results: dict) -> Table:
    """The comparison for a terminal: which method, at which budget, costs what; failures stand in the caption."""
    rows, headers, cells = _sheet(results)
    caption = Text("\n".join(map(_plain, _foot(rows))))
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption, caption_justify="left")
    for i, header in enumerate(headers):
        # In a narrow terminal only the interval and the tasks' names may break over lines, numbers never.
        least = None if i < 2 or i > 2 + len(tasks_of(rows)) else 7 if i == 2 else 5
        justify = "right" if i else "left"
        table.add_column(Text(_plain(header)), justify=justify, no_wrap=least is None, min_width=least, overflow="fold")
    for i, row in enumerate(rows):
        ends = i + 1 < len(rows) and rows[i + 1].series != row.series
        texts = [Text(_plain(c)) for c in cells[i]]
        table.add_row(*texts, style="bold" if row.baseline else None, end_section=ends)
    return table


def markdown_table(results: dict) -> str:
    """The comparison as a GitHub table, failures listed below it; ends with a newline."""
    rows, headers, cells = _sheet(results)
    lines = [list(map(_escaped, headers)), ["---"] + ["---:"] * (len(headers) - 1)]
    for row, line in zip(rows, cells, strict=True):
        lines.append([f"**{c}**" if row.baseline and c != "-" else c for c in map(_escaped, line)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"- {_escaped(note)}\n" for note in _foot(rows))
    return text + ("\n" + notes if notes else "")


def _plain(text: str) -> str:
    """Without control characters, so that a name or message cannot steer the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def _escaped(text: str) -> str:
    """Markdown without markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(_plain(text).split()))
