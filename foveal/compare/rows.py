"""The records of a comparison as rows: one a method and budget, with means, intervals and shares of dense."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from foveal.compare.words import amount
from foveal.errors import InputError

BASELINE = "dense"
PAIRED = ("dense_score", "gain")
AT_LONGEST = ("kv_bytes", "attention_ms", "peak_bytes", "prefill_s", "decode_tok_s")


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
    share of keys read a step. Memory in bytes, prefill in seconds, decode in tokens/s, attention in milliseconds of a decode step and as a
    share of dense's: these at `speed_length` tokens, and so are `kv_bytes`, the resident KV bytes.
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
    kv_bytes: float | None = None
    read_share: float | None = None
    attention_ms: float | None = None
    attention_share: float | None = None
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
    KV bytes are summed before dividing; bytes, attention, peak, prefill and decode are medians at the run's longest length.
    length: only the records of this many tokens; default all. Raises InputError where `results` is not of the format.
    """
    records = [r for r in checked_records(results) if length is None or r.get("length") == length]
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["method"], _frozen(record.get("params")), record.get("budget")), []).append(record)
    series = _series_names(groups.values())
    cells = {(r.get("task"), r.get("length")) for r in records}
    longest = max(_numbers(records, "length"), default=None)
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
    return sorted(set(_numbers(checked_records(results), "length")))


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
    base = _by_task(dense)
    for task, mine in _by_task(ok).items():
        row.tasks[task] = score = _merged(mine)
        _share_of_dense(score, mine, base.get(task, []))
    # A share of nothing is none: dense must score at all.
    _mean_share(row, {task for task, records in base.items() if _merged(records).value > 0})
    row.kv_share = _ratio(ok, "kv_bytes", "kv_bytes_dense")
    reads = _numbers(ok, "kv_read_share")
    row.read_share = sum(reads) / len(reads) if reads else None
    at_longest = [r for r in ok if r.get("length") == longest]
    row.speed_length = longest
    for name in AT_LONGEST:
        setattr(row, name, _median(at_longest, name))
    attending = _median([r for r in dense if r.get("length") == longest], "attention_ms")
    if attending and row.attention_ms is not None:
        row.attention_share = row.attention_ms / attending
    row.done = len({(r.get("task"), r.get("length")) for r in ok})
    row.problems = list(dict.fromkeys(_problem(r) for r in group if not _finished(r)))
    return row


def _by_task(records: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(str(record.get("task")), []).append(record)
    return found


def _merged(records: list[dict]) -> Score:
    """One score from several records of a task, weighted by their sample counts."""
    n, weights = _weights(records)
    values = [float(r["score"]) for r in records]
    geometric = _geometric(records[0]) and min(values) > 0
    to, back = (math.log, math.exp) if geometric else (float, float)

    def merged(name: str, sign: int) -> float | None:
        ends = [_number(r.get(name)) for r in records]
        ends = [None if e is None or (geometric and e <= 0) else to(e) for e in ends]
        end = _end(weights, list(map(to, values)), ends, sign)
        return None if end is None else back(end)

    value, low, high = merged("score", 0), merged("score_low", -1), merged("score_high", 1)
    return Score(value, low, high, n, records[0].get("better") or "higher")


def _end(weights: list[float], values: list[float], ends: list[float | None], sign: int) -> float | None:
    """A weighted mean (sign 0) or an end of its interval, from the ends of the values' intervals; None where one has none."""
    if any(e is None for e in ends):
        return None
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    return mean + sign * math.hypot(*(w * (e - v) for w, v, e in zip(weights, values, ends, strict=True)))


def _weights(records: list[dict]) -> tuple[int, list[float]]:
    """How many samples the records have, and each one's share of them; equal shares where some do not tell."""
    counts = [max(_number(r.get("n")) or 0, 0) for r in records]
    total = sum(counts)
    return int(total), [c / total for c in counts] if all(counts) else [1 / len(records)] * len(records)


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
    ours, base = _merged(mine), _merged([r for r in dense if r.get("length") in both]).value
    lower = score.better == "lower"
    if base <= 0 or (lower and ours.value <= 0):
        return
    share = lambda v: None if v is None or (lower and v <= 0) else base / v if lower else v / base
    ends = (ours.high, ours.low) if lower else (ours.low, ours.high)
    score.share, score.share_low, score.share_high = share(ours.value), share(ends[0]), share(ends[1])


def _paired_share(score: Score, mine: list[dict]) -> None:
    """The share of dense and its interval from the gains on dense, sample by sample."""
    _, weights = _weights(mine)
    gains = [r["gain"] for r in mine]
    gain, low, high = (  # one sample alone has no interval
        _end(weights, gains, [_number(r.get(name)) for r in mine], sign)
        for name, sign in (("gain", 0), ("gain_low", -1), ("gain_high", 1))
    )
    base = sum(w * r["dense_score"] for w, r in zip(weights, mine, strict=True))
    if _geometric(mine[0]):  # gains are nats: more of them is worse
        share = lambda gain: None if gain is None else math.exp(min(-gain, 700))
        low, high = high, low
    elif base > 0 and score.better == "higher":
        most = 1.0 if base <= 1 and score.value <= 1 else math.inf  # scores of answers do not pass one
        share = lambda gain: None if gain is None else min(max(base + gain, 0.0), most) / base
    else:
        return
    score.share, score.share_low, score.share_high = share(gain), share(low), share(high)


def _mean_share(row: Row, expected: set[str]) -> None:
    """Mean share over the tasks dense finished; none at all when one is missing, for means over other tasks mislead."""
    scores = [row.tasks[task] for task in row.tasks if task in expected]
    if not scores or len(scores) < len(expected) or any(s.share is None for s in scores):
        return
    shares, weights = [s.share for s in scores], [1 / len(scores)] * len(scores)
    row.quality, row.quality_low, row.quality_high = (
        _end(weights, shares, [getattr(s, name) for s in scores], sign)
        for name, sign in (("share", 0), ("share_low", -1), ("share_high", 1))
    )


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


def _median(records: list[dict], name: str) -> float | None:
    values = _numbers(records, name)
    return median(values) if values else None


def _ratio(records: list[dict], top: str, bottom: str) -> float | None:
    pairs = [(_number(r.get(top)), _number(r.get(bottom))) for r in records]
    pairs = [(a, b) for a, b in pairs if a is not None and b]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None
