"""The rows of a comparison as a table: for the terminal and for the README."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from foveal.compare.rows import Row, summary_rows, tasks_of
from foveal.compare.words import ATTENTION, NO_ATTENTION, amount, number, percent


class Column(NamedTuple):
    """head: its lines. text: what a row says there. least: to how few characters it may be broken over lines; None: not at all.
    spare: in a terminal that is too narrow it is left out."""

    head: str
    text: Callable[[Row], str]
    least: int | None = None
    spare: bool = False

    def width(self, rows: list[Row]) -> int:
        """Characters it cannot do without."""
        return self.least or max(map(cell_len, [*self.head.split("\n"), *map(self.text, rows)]))


def _columns(rows: list[Row]) -> list[Column]:
    """With attention timed, as on a CPU, bytes and attention stand first: there weights bound the speed of a small model."""
    held = Column("KV\nkept", lambda r: percent(r.kv_share))
    attends, reads = _attends(rows), any(r.read_share is not None for r in rows)
    costs = [
        Column("KV MB\nand kept", lambda r: f"{_megabytes(r.kv_bytes)} {percent(r.kv_share):>4}", 5),
        Column("attn. ms\nof dense", lambda r: f"{number(r.attention_ms)} {percent(r.attention_share):>4}", 5),
    ]
    read = Column("KV\nread", lambda r: percent(r.kv_share if r.read_share is None else r.read_share))
    return [
        Column("method", lambda r: r.series + ("*" if r.tasks and not r.complete else "")),
        Column("budget", lambda r: amount(r.budget)),
        *(costs if attends else []),
        Column("of dense\nand 95%", _quality, 7),
        *(_score(task, rows) for task in tasks_of(rows)),
        *([] if attends else [held]),
        *([read] if reads else []),
        Column("peak\nMB", lambda r: _megabytes(r.peak_bytes), spare=True),
        Column("prefill\ns", lambda r: number(r.prefill_s), spare=True),
        Column("decode\ntok/s", lambda r: number(r.decode_tok_s)),
    ]


def _attends(rows: list[Row]) -> bool:
    """Whether attention was timed."""
    return any(r.attention_ms is not None for r in rows)


def _quality(row: Row) -> str:
    interval = ""
    if not row.baseline and row.quality_low is not None and row.quality_high is not None:
        interval = f" {percent(row.quality_low).removesuffix('%')}-{percent(row.quality_high)}"
    return percent(row.quality) + interval


def _score(task: str, rows: list[Row]) -> Column:
    found = [row.tasks[task] for row in rows if task in row.tasks]
    counts = {s.n for s in found}
    head = f"{task}\n{'↓' if found[0].better == 'lower' else '↑'}" + (f" n={counts.pop()}" if len(counts) == 1 else "")
    return Column(head, lambda r: number(r.tasks[task].value) if task in r.tasks else "-", 5)


def _megabytes(size: float | None) -> str:
    return number(None if size is None else size / 1e6)


def _foot(results: dict, rows: list[Row]) -> list[str]:
    notes = []
    at = next((r.speed_length for r in rows if r.speed_length), None)
    if at:
        first = "MB, attention, peak" if _attends(rows) else "Peak"
        notes.append(f"{first} memory, prefill and decode speed at {at:,} tokens.")
    if _attends(rows):
        notes.append(ATTENTION)
    elif not str((results.get("meta") or {}).get("device") or "cpu").startswith("cpu"):
        notes.append(NO_ATTENTION)
    nothing = [t for r in rows if r.baseline for t, s in r.tasks.items() if s.value <= 0]
    if nothing:
        notes.append(
            f"Dense scores nothing in {', '.join(nothing)}, which {'is' if len(nothing) == 1 else 'are'} left out of its shares."
        )
    if any(r.tasks and not r.complete for r in rows):
        notes.append("* not every task and length finished.")
    return notes + [f"{r.label}: {p}" for r in rows for p in r.problems]


def rich_table(results: dict, width: int | None = None) -> Table:
    """The comparison for a terminal: which method, at which budget, costs what; failures stand in the caption.

    width: characters there are; where columns had to be cut, peak memory and then prefill are left out, and the caption says so.
    """
    rows = summary_rows(results)
    columns, gone = _fitting(_columns(rows), rows, width)
    notes = _foot(results, rows)
    if gone:
        notes.insert(0, f"Too narrow here for {', '.join(' '.join(c.head.split()) for c in gone)}.")
    caption = Text("\n".join(map(_plain, notes)))
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption, caption_justify="left")
    for i, c in enumerate(columns):
        how = {"justify": "right" if i else "left", "no_wrap": c.least is None, "min_width": c.least}
        table.add_column(Text(_plain(c.head)), overflow="fold", **how)
    for i, row in enumerate(rows):
        ends = i + 1 < len(rows) and rows[i + 1].series != row.series
        texts = [Text(_plain(c.text(row))) for c in columns]
        table.add_row(*texts, style="bold" if row.baseline else None, end_section=ends)
    return table


def _fitting(columns: list[Column], rows: list[Row], width: int | None) -> tuple[list[Column], list[Column]]:
    """The columns that fit, and the spare ones that do not, the first of them first."""
    gone: list[Column] = []
    for spare in [c for c in columns if c.spare]:
        left = [c for c in columns if c not in gone]
        if width is None or sum(c.width(rows) for c in left) + len(left) + 1 <= width:
            break
        gone.append(spare)
    return [c for c in columns if c not in gone], gone


def markdown_table(results: dict) -> str:
    """The comparison as a GitHub table, failures listed below it; ends with a newline."""
    rows = summary_rows(results)
    columns = _columns(rows)
    lines = [[_escaped(c.head) for c in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        cells = [_escaped(c.text(row)) for c in columns]
        lines.append([f"**{c}**" if row.baseline and c != "-" else c for c in cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"- {_escaped(note)}\n" for note in _foot(results, rows))
    return text + ("\n" + notes if notes else "")


def _plain(text: str) -> str:
    """Without control characters, so that a name or message cannot steer the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def _escaped(text: str) -> str:
    """Markdown without markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(_plain(text).split()))
