"""Results of claims as words: a line while they come, a table at the end, the table of the docs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .experiments import FAILS, HOLDS, VOID
from .lab import QUICK
from .run import UNTESTABLE, Result

QUICKLY = (
    "quick: every line was applied, to at most {questions} questions ({prompts} of a prompt of its own) with answers of {answer} tokens, "
    "or {scored} tokens of {texts} text, at {length} tokens. "
    "That shows that all works and decides nothing; the same command without --quick does."
).format(**QUICK)
"""What to say below the table of a quick run."""
_STYLE = {HOLDS: "green", FAILS: "red", VOID: "yellow", UNTESTABLE: "dim"}


def line(result: Result) -> str:
    """One result in a line: name, verdict, seconds, and why."""
    tail = f": {result.why}" if result.why else ""
    return f"{result.name} {result.verdict} ({result.meta['seconds']:.0f} s){tail}"


def measured(finding: dict) -> str:
    """What was measured, its interval and the line it was held against: "-0.05 [-0.15, 0.00], at least -0.1, n = 20"."""
    interval = "" if finding["low"] in (None, finding["high"]) else f" [{finding['low']:.2f}, {finding['high']:.2f}]"
    return f"{finding['measured']:.3g}{interval}, {finding['condition']} {finding['line']:.3g}, n = {finding['n']}"


def verdict(finding: dict) -> str:
    """The verdict of one finding; "unsure" where its interval reaches over the line."""
    unsure = finding["verdict"] in (HOLDS, FAILS) and not finding["sure"]
    return f"{finding['verdict']} (unsure)" if unsure else finding["verdict"]


def setting(finding: dict, asked: dict | None = None) -> str:
    """Where an experiment was run: task and length, or nothing for identities. `asked`: the most a quick run asked."""
    cell = finding["settings"]
    if "task" not in cell:
        return "logits"
    return f"{cell['task']}, {min(cell['length'], (asked or cell)['length']):,} tokens"


def rich_table(results: Sequence[Result]) -> Table:
    """Claims with their findings, for the terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name, fold in (("method", False), ("what was tested", True), ("measured", True), ("verdict", True)):
        table.add_column(name, overflow="fold", no_wrap=not fold)
    for r in sorted(results, key=lambda r: r.name):
        style = _STYLE[r.verdict]
        plain = r.verdict == UNTESTABLE
        table.add_row(r.name, escape(r.words), "", f"[{style}]{r.verdict}[/]" + (f": {escape(r.why)}" if plain else ""))
        for f in r.findings:
            why = f": {escape(f['why'])}" if f["why"] else ""
            tested = f"{escape(f['says'])} ({setting(f, r.meta['asked'])})"
            table.add_row("", f"[dim]{tested}[/]", f"[dim]{measured(f)}[/]", verdict(f) + why)
    return table
