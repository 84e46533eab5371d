"""What a search found, in one line, as a profile and as results for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from .. import __version__
from ..compare.measure import hardware
from ..compare.plan import Config
from ..compare.records import Comparison
from ..compare.rows import Row
from ..compare.words import amount, number, percent
from ..hub import model_identity
from ..profile import Profile
from ..spec import written


@dataclass
class Tuning:
    """What a search found.

    sentence: the answer in words. method: the candidate to use, None where none meets both limits. row: its numbers, or those of the
    nearest. comparison: all that was measured, for tables and the report. interrupted: stopped before the end.
    """

    sentence: str
    config: Config | None
    row: Row | None
    comparison: Comparison
    limits: dict[str, float]
    profile: Profile | None = None
    interrupted: bool = False
    evidence: dict[str, Any] = field(default_factory=dict)

    def finish(self, search, command: str, data: str, seconds: float, interrupted: bool) -> None:
        """Say how it was measured, and make the profile."""
        model, self.interrupted = search.model, interrupted
        date = datetime.now(UTC).isoformat(timespec="seconds")
        device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        self.comparison.meta = {
            "command": command or "foveal.tune.tune(...)",
            "date": date,
            "model": str(model.name_or_path),
            "model_identity": model_identity(model),
            "device": device,
            "dtype": dtype,
            "hardware": hardware(model.device),
            "versions": {
                "foveal": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "seed": search.seed,
            "elapsed_s": round(seconds, 1),
            "interrupted": interrupted,
            "answer": self.sentence,
            "limits": self.limits,
            "notes": [
                "Candidates were halved while samples doubled: n tells how many a row rests on, the last ones saw all.",
                "Intervals are 95 % paired bootstrap intervals over samples: both answered the same ones.",
                "Bytes are of allocated cache tensors after the prompt was read, token ids and statistics included.",
                "Speed is of one sequence alone, of the last candidates only; on a shared machine compare ratios only.",
            ],
        }
        if self.config is None or interrupted:
            return
        row = self.row
        self.evidence = {
            "answer": self.sentence,
            "prompts": data or ", ".join(t.name for t in search.tasks),
            "samples": max(s.n for s in row.tasks.values()),
            "of_dense": row.quality,
            "of_dense_low": row.quality_low,
            "of_dense_high": row.quality_high,
            "kv_share": row.kv_share,
            **self.limits,
            "device": device,
            "dtype": dtype,
            "date": date,
            "foveal": __version__,
        }
        self.profile = Profile(self.config.method, model_identity(model), evidence=self.evidence)


def decide(
    comparison: Comparison,
    rows: dict[Config, Row],
    finals: list[Config],
    memory: float,
    max_drop: float,
    speeds: dict[Config, tuple[float, float]],
) -> Tuning:
    """The best of the candidates that saw all samples, or the nearest to the limits where none meets both."""
    limits = {"memory": memory, "max_drop": max_drop}
    for c, (prefill, pace) in speeds.items():
        for r in comparison.records:
            if (r.method, repr(r.params), repr(r.budget)) == (c.name, repr(c.params), repr(c.budget)):
                r.prefill_s, r.decode_tok_s = prefill, pace
    if not finals:
        return Tuning("Stopped before the end; the same command goes on where it was.", None, None, comparison, limits)
    meets = [c for c in finals if rows[c].kv_share <= memory and rows[c].quality >= 1 - max_drop]
    if meets:
        # A thousandth of quality is no reason to hold more bytes.
        best = min(meets, key=lambda c: (-round(rows[c].quality, 3), rows[c].kv_share))
        dense = next((c for c in speeds if c.method is None), None)
        sentence = _praise(best, rows[best], max_drop, speeds.get(best), speeds.get(dense))
        return Tuning(sentence, best, rows[best], comparison, limits)
    near = finals[0]
    sentence = f"Nothing tried keeps {_limit(1 - max_drop)} of dense in {_limit(memory)} of the cache; {_nearest(near, rows, memory)}"
    least = [c for c, r in rows.items() if c.method is not None and r.quality is not None and r.quality >= 1 - max_drop]
    least = [c for c in least if rows[c].kv_share is not None]
    if least:
        c = min(least, key=lambda c: rows[c].kv_share)
        sentence += f" The least memory that kept enough was {percent(rows[c].kv_share)}, by {written(c.method)} (n={_n(rows[c])})."
    else:
        sentence += " No candidate kept enough with more memory either: allow a larger drop or more memory."
    return Tuning(sentence, None, rows[near], comparison, limits)


def _praise(c: Config, row: Row, max_drop: float, speed, dense) -> str:
    text = f"Use {written(c.method)}: it keeps {_kept(row)} of dense in {percent(row.kv_share)} of its cache"
    if speed and dense:
        text += f", reads the prompt in {number(speed[0] / dense[0])} times dense's time"
        text += f" and decodes at {number(speed[1] / dense[1])} times its speed"
    if row.quality_low is None:
        return f"{text}; one sample says nothing about how sure that is."
    if row.quality_low >= 1 - max_drop:
        return f"{text}; the whole 95% interval is within the limit."
    return f"{text}; not sure, for the 95% interval reaches below the limit of {_limit(1 - max_drop)}: more prompts would tell."


def _nearest(c: Config, rows: dict[Config, Row], memory: float) -> str:
    row = rows[c]
    over = " (more than asked for)" if row.kv_share > memory else ""
    return f"nearest is {written(c.method)}, which keeps {_kept(row)} in {_fine(row.kv_share) if over else percent(row.kv_share)}{over}."


def _kept(row: Row) -> str:
    if row.quality_low is None:
        return f"{_fine(row.quality)} (n={_n(row)})"
    return f"{_fine(row.quality)} (95%: {_fine(row.quality_low)} to {_fine(row.quality_high)}, n={_n(row)})"


def _n(row: Row) -> int:
    return max(score.n for score in row.tasks.values())


def _limit(share: float) -> str:
    """A limit as it was given: 0.125 is 12.5%, and 0.995 is not 100%."""
    return amount(float(share))


def _fine(share: float) -> str:
    """A share with a decimal, for limits are often a few percent."""
    return f"{100 * share:.1f}%"
