"""What a comparison returns: one record a measurement, and how they are written down."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..method import Budget


@dataclass
class Record:
    """One measurement: a method at a budget on a task at a length. Bytes and seconds are for one sequence."""

    method: str
    params: dict[str, Any]
    task: str
    length: int
    budget: Budget | None
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    better: str = "higher"
    n: int = 0
    kv_bytes: int | None = None
    kv_bytes_dense: int | None = None
    kv_read_share: float | None = None
    peak_bytes: int | None = None
    prefill_s: float | None = None
    decode_tok_s: float | None = None
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
