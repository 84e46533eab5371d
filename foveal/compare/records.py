"""What a comparison returns: one record a measurement, and how they are written down."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..method import Budget
from ..stats import bootstrap, paired_bootstrap
from ..tasks import Sample
from .measure import wilson

_COLUMNS = 12  # depths shown one by one; more of them, unless they are an even grid, are shown in tenths


@dataclass
class Record:
    """One measurement: a method at a budget on a task at a length. Bytes and seconds are for one sequence.

    kind: the task's; the score of "nll" is a perplexity. dense_score: dense's score on the same samples; gain: the mean of score
    minus dense's over these pairs, with its 95 % interval (kind "nll": in nats per token, so below zero is better).
    attention_ms: milliseconds of a decode step that attention takes, all layers and all that the method does there; None on a GPU.
    grid: mean scores by "depth" in the document, or by "turn" of a conversation.
    """

    method: str
    params: dict[str, Any]
    task: str
    length: int
    budget: Budget | None
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    better: str = "higher"
    kind: str = "generate"
    dense_score: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    n: int = 0
    kv_bytes: int | None = None
    kv_bytes_dense: int | None = None
    kv_read_share: float | None = None
    peak_bytes: int | None = None
    prefill_s: float | None = None
    decode_tok_s: float | None = None
    attention_ms: float | None = None
    status: str = "ok"
    error: str | None = None
    grid: list[dict] = field(default_factory=list)


@dataclass
class Comparison:
    """Everything one run measured; `meta` says how, `records` what."""

    meta: dict[str, Any]
    records: list[Record]

    def to_dict(self) -> dict:
        return {"meta": self.meta, "records": [asdict(r) for r in self.records]}

    def save_json(self, path: str | Path) -> None:
        """Write all of it as JSON, whole or not at all."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, default=str) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                whole = Path(folder) / path.name
                whole.write_text(text)
                whole.replace(path)
        except OSError as e:
            raise InputError(f"cannot write {path}: {e.strerror or e}; choose another folder") from e


Scored = Sequence[tuple[Sample, float]]


def filled(r: Record, found: Scored, base: Scored | None, seed: int) -> Record:
    """The record with the mean of its single scores, what it gains on dense, intervals, and scores by depth or turn.

    found: samples with their scores, or nats of each token that counts. base: dense's, in the same order; None for dense itself.
    """
    if r.status == "error":
        return r
    if not found:
        if r.status == "ok":
            r.status, r.error = "skipped", "not reached before the run was stopped"
        return r
    scores = [s for _, s in found]
    r.n, mean = len(scores), math.fsum(scores) / len(scores)
    if not math.isfinite(mean):
        r.status, r.error = "error", "the score is not a finite number"
        return r
    r.score, (r.score_low, r.score_high) = mean, _interval(scores, seed)
    _compare(r, found, base, seed)
    if r.kind == "nll":
        for name in ("score", "score_low", "score_high", "dense_score"):
            value = getattr(r, name)  # e^709 is the largest float; a model beyond predicts nothing anyway
            setattr(r, name, None if value is None else math.exp(min(value, 700)))
    else:
        r.grid = _grid(found)
    return r


def _interval(scores: list[float], seed: int) -> tuple[float | None, float | None]:
    if all(s in (0.0, 1.0) for s in scores):
        return wilson(math.fsum(scores), len(scores))
    found = bootstrap(scores, seed=seed)
    return found.low, found.high


def _compare(r: Record, found: Scored, base: Scored | None, seed: int) -> None:
    if base is None or [s for s, _ in base[: r.n]] != [s for s, _ in found]:
        return
    dense = [score for _, score in base[: r.n]]
    if not all(map(math.isfinite, dense)):
        return
    scores = [score for _, score in found]
    bounded = r.kind == "generate" and all(0 <= s <= 1 for s in (*scores, *dense))
    gain = paired_bootstrap(scores, dense, bounds=(-1.0, 1.0) if bounded else None, seed=seed)
    r.dense_score, (r.gain, r.gain_low, r.gain_high, _) = math.fsum(dense) / r.n, gain


def _grid(found: Scored) -> list[dict]:
    """Mean scores by turn where there are conversations, else by depth where depths are known."""
    name = "turn" if any(s.turn for s, _ in found) else "depth"
    at = [(getattr(s, name), score) for s, score in found if getattr(s, name) is not None]
    values = sorted({where for where, _ in at})
    steps = [b - a for a, b in pairwise(values)]
    if name == "depth" and len(values) > _COLUMNS and max(steps) - min(steps) > 1e-6:
        at = [((min(int(10 * where), 9) + 0.5) / 10, score) for where, score in at]
    cells: dict[float, list[float]] = {}
    for where, score in sorted(at, key=lambda pair: pair[0]):
        cells.setdefault(where, []).append(score)
    return [{name: where, "score": math.fsum(x) / len(x), "n": len(x)} for where, x in cells.items()]
