"""The numbers of a comparison as rows: one a method and budget, for the terminal, the README and the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from foveal.errors import InputError

BASELINE = "dense"
PAIRED = ("dense_score", "gain")


@dataclass
class Score:
    """One task's score over the lengths that finished, its 95 % interval, and its share of dense on those lengths."""

    value: float
    low: float | None
    high: float | None
    n: int
    better: str
    share: float | None = None
    share_low: float | None = None
    share_high: float | None = None


@dataclass
class Row:
    """One method at one budget.

    `quality` is the mean over tasks of the score as a share of dense's (tasks weigh the same; for a lower-is-better task the share is
    dense / score; tasks in which dense scores nothing are left out). `kv_share` is resident KV bytes / dense KV bytes, `read_share` the
    share of keys read a step. Memory in bytes, prefill in seconds, decode in tokens/s, these three at `speed_length` tokens.
    `done` of `planned` (task, length) cells finished; `problems` says why the others did not.
    """

    method: str
    label: str
    series: str
    params: dict
    budget: float | None
    baseline: bool
    tasks: dict[str, Score] = field(default_factory=dict)
    quality: float | None = None
    quality_low: float | None = None
    quality_high: float | None = None
    kv_share: float | None = None
    read_share: float | None = None
    peak_bytes: float | None = None
    prefill_s: float | None = None
    decode_tok_s: float | None = None
    speed_length: int | None = None
    done: int = 0
    planned: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every (task, length) cell of the run finished for this row."""
        return self.done == self.planned > 0


def summary_rows(results: dict, length: int | None = None) -> list[Row]:
    """Aggregate the records per (method, params, budget): dense first, then methods as run, smallest budget first.

    Over lengths, scores are averaged with weights `n` (perplexity in log space) and their intervals combined as
    independent ones (MOVER: the half-widths add in quadrature, each side by itself; Zou & Donner 2008). Shares of dense
    use only the lengths that both finished and divide by dense's point score; their intervals are those of the paired
    gains on dense, or, in results that hold none, of the method's own scores.
    KV bytes are summed before dividing; peak, prefill and decode are medians at the run's longest length.
    length: only the records of this many tokens; default all. Raises InputError where `results` is not of the format.
    """
    records = [r for r in checked_records(results) if length is None or r.get("length") == length]
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["method"], _frozen(record.get("params")), record.get("budget")), []).append(record)
    series = _series_names(groups.values())
    cells = {(r.get("task"), r.get("length")) for r in records}
    longest = max((r["length"] for r in records if _number(r.get("length")) is not None), default=None)
    dense = [r for r in records if r["method"] == BASELINE and _finished(r)]
    rows = [_row(group, series[key[:2]], dense, cells, longest) for key, group in groups.items()]
    order = {name: i for i, name in reversed(list(enumerate(row.series for row in rows)))}
    return sorted(rows, key=lambda r: (not r.baseline, order[r.series], math.inf if r.budget is None else r.budget))


def checked_records(results: dict) -> list[dict]:
    """The records of a results file; raises InputError when it is not one."""
    records = results.get("records") if isinstance(results, dict) else None
    if not isinstance(records, list):
        raise InputError(
            f"expected comparison results with a list under 'records', got {type(results).__name__} without one; "
            "pass what `foveal compare` wrote."
        )
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("method"), str):
            raise InputError(f"expected record {i} to be an object with a 'method' name, got {record!r:.80}; rerun it.")
    return records


def lengths_of(results: dict) -> list[int]:
    """The context lengths in tokens that occur in the records, shortest first."""
    return sorted({r["length"] for r in checked_records(results) if _number(r.get("length")) is not None})


def front(rows: Iterable[Row]) -> list[Row]:
    """The Pareto front: rows that none beats in both resident bytes and quality, fewest bytes first."""
    known = [r for r in rows if r.kv_share is not None and r.quality is not None]
    out: list[Row] = []
    for r in sorted(known, key=lambda r: (r.kv_share, -r.quality)):
        if not out or r.quality > out[-1].quality:
            out.append(r)
    return out


def tasks_of(rows: Iterable[Row]) -> list[str]:
    """The tasks in which any row has a score, in the order they first occur."""
    return list(dict.fromkeys(task for row in rows for task in row.tasks))


def _row(group: list[dict], series: str, dense: list[dict], cells: set, longest: int | None) -> Row:
    first, ok = group[0], [r for r in group if _finished(r)]
    budget = first.get("budget")
    baseline = first["method"] == BASELINE
    label = series if baseline or budget is None else f"{series} at {amount(budget)}"
    row = Row(first["method"], label, series, dict(first.get("params") or {}), budget, baseline, planned=len(cells))
    for task in dict.fromkeys(r.get("task") for r in ok):
        mine = [r for r in ok if r.get("task") == task]
        row.tasks[str(task)] = score = _merged(mine)
        _share_of_dense(score, mine, [r for r in dense if r.get("task") == task])
    _mean_share(row, _telling(dense))
    row.kv_share = _ratio(ok, "kv_bytes", "kv_bytes_dense")
    reads = _numbers(ok, "kv_read_share")
    row.read_share = sum(reads) / len(reads) if reads else None
    at_longest = [r for r in ok if r.get("length") == longest]
    row.speed_length = longest
    row.peak_bytes, row.prefill_s, row.decode_tok_s = (
        median(values) if (values := _numbers(at_longest, name)) else None
        for name in ("peak_bytes", "prefill_s", "decode_tok_s")
    )
    row.done = len({(r.get("task"), r.get("length")) for r in ok})
    row.problems = list(dict.fromkeys(_problem(r) for r in group if not _finished(r)))
    return row


def _merged(records: list[dict]) -> Score:
    """One score from several records of a task, weighted by their sample counts."""
    first = records[0]
    weights = [max(_number(r.get("n")) or 0, 0) for r in records]
    n = int(sum(weights))
    weights = [w / n for w in weights] if n and all(weights) else [1 / len(records)] * len(records)
    values = [float(r["score"]) for r in records]
    geometric = _geometric(first) and min(values) > 0
    to, back = (math.log, math.exp) if geometric else (float, float)
    mean = sum(w * to(v) for w, v in zip(weights, values, strict=True))

    def bound(name: str, sign: int) -> float | None:
        ends = [_number(r.get(name)) for r in records]
        if any(e is None or (geometric and e <= 0) for e in ends):
            return None
        gaps = (w * (to(e) - to(v)) for w, e, v in zip(weights, ends, values, strict=True))
        return back(mean + sign * math.sqrt(sum(g * g for g in gaps)))

    return Score(back(mean), bound("score_low", -1), bound("score_high", 1), n, first.get("better") or "higher")


def _geometric(record: dict) -> bool:
    """Perplexity is the exponential of a mean log-likelihood, so runs of it average in log space."""
    return record.get("kind", "nll" if record.get("task") == "perplexity" else None) == "nll"


def _share_of_dense(score: Score, mine: list[dict], dense: list[dict]) -> None:
    """Fill in the share of dense, from the lengths that both finished."""
    both = {r.get("length") for r in mine} & {r.get("length") for r in dense}
    if not both:
        return
    mine = [r for r in mine if r.get("length") in both]
    if all(_number(r.get(name)) is not None for r in mine for name in PAIRED):
        _paired_share(score, mine)
        return
    ours, base = _merged(mine), _merged([r for r in dense if r.get("length") in both])
    lower = score.better == "lower"
    if base.value <= 0 or (lower and ours.value <= 0):
        return
    share: Callable[[float | None], float | None] = lambda v: (
        None if v is None or (lower and v <= 0) else base.value / v if lower else v / base.value
    )
    ends = (ours.high, ours.low) if lower else (ours.low, ours.high)
    score.share, score.share_low, score.share_high = share(ours.value), share(ends[0]), share(ends[1])


def _paired_share(score: Score, mine: list[dict]) -> None:
    """The share of dense and its interval from the gains on dense, sample by sample."""
    weights = [max(_number(r.get("n")) or 0, 1) for r in mine]
    weights = [w / sum(weights) for w in weights]
    mean = {name: sum(w * r[name] for w, r in zip(weights, mine, strict=True)) for name in PAIRED}

    def end(name: str) -> float | None:
        if any(_number(r.get(name)) is None for r in mine):  # one sample alone has no interval
            return None
        gaps = (w * (r[name] - r["gain"]) for w, r in zip(weights, mine, strict=True))
        return mean["gain"] + (-1 if name == "gain_low" else 1) * math.sqrt(sum(g * g for g in gaps))

    low, high, base = end("gain_low"), end("gain_high"), mean["dense_score"]
    if _geometric(mine[0]):  # gains are nats: more of them is worse
        share = lambda gain: None if gain is None else math.exp(min(-gain, 700))
        score.share, score.share_low, score.share_high = share(mean["gain"]), share(high), share(low)
    elif base > 0 and score.better == "higher":
        most = 1.0 if base <= 1 and score.value <= 1 else math.inf  # scores of answers do not pass one
        share = lambda gain: None if gain is None else min(max(base + gain, 0.0), most) / base
        score.share, score.share_low, score.share_high = share(mean["gain"]), share(low), share(high)


def _telling(dense: list[dict]) -> set[str]:
    """The tasks that dense finished and in which it scores at all: a share of nothing is none."""
    tasks = dict.fromkeys(r.get("task") for r in dense)
    return {str(t) for t in tasks if _merged([r for r in dense if r.get("task") == t]).value > 0}


def _mean_share(row: Row, expected: set[str]) -> None:
    """Mean share over the tasks dense finished; none at all when one is missing, for means over other tasks mislead."""
    scores = [row.tasks[task] for task in row.tasks if task in expected]
    if not scores or len(scores) < len(expected):
        return
    if any(s.share is None for s in scores):
        return
    mean = sum(s.share for s in scores) / len(scores)
    row.quality = mean
    for name, sign in (("low", -1), ("high", 1)):
        ends = [getattr(s, f"share_{name}") for s in scores]
        if all(e is not None for e in ends):
            spread = math.sqrt(sum((e - s.share) ** 2 for e, s in zip(ends, scores, strict=True))) / len(scores)
            setattr(row, f"quality_{name}", mean + sign * spread)


def _series_names(groups: Iterable[list[dict]]) -> dict[tuple[str, str], str]:
    """Name each (method, params) line; where a method ran with several settings, the ones that differ join its name."""
    variants: dict[str, dict[str, dict]] = {}
    for group in groups:
        params = group[0].get("params") or {}
        settings = {k: v for k, v in params.items() if k != "budget"}
        variants.setdefault(group[0]["method"], {})[_frozen(params)] = settings
    names = {}
    for method, by_key in variants.items():
        keys = dict.fromkeys(k for params in by_key.values() for k in params)
        differing = [k for k in keys if len({_frozen({"": p.get(k)}) for p in by_key.values()}) > 1]
        for key, params in by_key.items():
            names[method, key] = " ".join([method, *(f"{k}={params[k]}" for k in differing if k in params)])
    return names


def _finished(record: dict) -> bool:
    return record.get("status", "ok") == "ok" and _number(record.get("score")) is not None


def _problem(record: dict) -> str:
    status = record.get("status", "ok")
    where = " at ".join(str(v) for v in (record.get("task"), record.get("length")) if v is not None)
    reason = record.get("error") or (f"score is {record.get('score')}, not a finite number" if status == "ok" else "")
    return f"{where}: {'error' if status == 'ok' else status}{', ' + str(reason) if reason else ''}"


def _frozen(params: dict | None) -> str:
    return json.dumps(params or {}, sort_keys=True, default=str)


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _numbers(records: list[dict], name: str) -> list[float]:
    return [v for r in records if (v := _number(r.get(name))) is not None]


def _ratio(records: list[dict], top: str, bottom: str) -> float | None:
    pairs = [(_number(r.get(top)), _number(r.get(bottom))) for r in records]
    pairs = [(a, b) for a, b in pairs if a is not None and b]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None


def percent(share: float | None) -> str:
    """A share as text, with a decimal only below ten percent (0.25 -> '25%', 0.031 -> '3.1%')."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}" if abs(share) < 0.0995 else f"{100 * share:.0f}"
    return text.removesuffix(".0") + "%"


def amount(budget: float | int | None) -> str:
    """A budget as text: a share as percent, a whole number as tokens (0.125 -> '12.5%', 512 -> '512 tokens')."""
    if isinstance(budget, int):
        return f"{budget:,} token" + "s" * (budget != 1)
    return "-" if budget is None else f"{100 * budget:.4g}%"


def number(value: float | None) -> str:
    """A measured value as text: two decimals below ten, one below a hundred, else none (1234.5 -> '1,234')."""
    if value is None:
        return "-"
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _cells(row: Row, tasks: list[str], reads: bool) -> list[str]:
    interval = ""
    if not row.baseline and row.quality_low is not None and row.quality_high is not None:
        interval = f" {percent(row.quality_low).removesuffix('%')}-{percent(row.quality_high)}"
    partial = "*" if row.tasks and not row.complete else ""
    scores = [number(row.tasks[t].value) if t in row.tasks else "-" for t in tasks]
    return [
        row.series + partial,
        amount(row.budget),
        percent(row.quality) + interval,
        *scores,
        percent(row.kv_share),
        *([percent(row.kv_share if row.read_share is None else row.read_share)] if reads else []),
        number(None if row.peak_bytes is None else row.peak_bytes / 1e6),
        number(row.prefill_s),
        number(row.decode_tok_s),
    ]


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
    rows = summary_rows(results)
    tasks, reads = tasks_of(rows), any(r.read_share is not None for r in rows)
    caption = Text("\n".join(map(_plain, _foot(rows))))
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, caption=caption, caption_justify="left")
    for i, header in enumerate(_headers(rows, tasks, reads)):
        # In a narrow terminal only the interval and the tasks' names may break over lines, numbers never.
        least = None if i < 2 or i > 2 + len(tasks) else 7 if i == 2 else 5
        justify = "right" if i else "left"
        table.add_column(Text(_plain(header)), justify=justify, no_wrap=least is None, min_width=least, overflow="fold")
    for i, row in enumerate(rows):
        ends = i + 1 < len(rows) and rows[i + 1].series != row.series
        cells = [Text(_plain(c)) for c in _cells(row, tasks, reads)]
        table.add_row(*cells, style="bold" if row.baseline else None, end_section=ends)
    return table


def markdown_table(results: dict) -> str:
    """The comparison as a GitHub table, failures listed below it; ends with a newline."""
    rows = summary_rows(results)
    tasks, reads = tasks_of(rows), any(r.read_share is not None for r in rows)
    headers = [_escaped(h) for h in _headers(rows, tasks, reads)]
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1)]
    for row in rows:
        cells = [_escaped(c) for c in _cells(row, tasks, reads)]
        lines.append([f"**{c}**" if row.baseline and c != "-" else c for c in cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"- {_escaped(note)}\n" for note in _foot(rows))
    return text + ("\n" + notes if notes else "")


def _plain(text: str) -> str:
    """Without control characters, so that a name or message cannot steer the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def _escaped(text: str) -> str:
    """Markdown without markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(_plain(text).split()))
