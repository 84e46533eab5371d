"""What a search has measured, in one file that is whole at any time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError

FORMAT = "foveal tuning 1"


@dataclass
class Cell:
    """One candidate on one task: for each sample so far its score (None: nothing in it counts) and its context's (bytes, dense bytes)."""

    scores: list[float | None] = field(default_factory=list)
    held: list[Sequence[int]] = field(default_factory=list)
    error: str | None = None


class State:
    """Cells by candidate and task; `about` says on which model and prompts, and files about others are refused."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about = path, json.loads(json.dumps(about, default=str))
        self.cells: dict[str, dict[str, Cell]] = {}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise KeyError(found["format"])
            cells = {n: {t: Cell(**cell) for t, cell in tasks.items()} for n, tasks in found["cells"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not what a search wrote ({type(error).__name__}: {error}): remove it or name another --out"
            ) from None
        differs = [key for key in self.about if found.get("about", {}).get(key) != self.about[key]]
        if differs:
            raise InputError(
                f"{path} holds a search on other conditions ({', '.join(differs)} differ): name another --out, or remove it to begin anew"
            )
        # What failed may have been put right since: it is tried again.
        self.cells = {n: {t: c for t, c in tasks.items() if c.error is None} for n, tasks in cells.items()}

    def cell(self, name: str, task: str) -> Cell | None:
        """What is known of a candidate on a task."""
        return self.cells.get(name, {}).get(task)

    def waits(self, name: str, task: str, until: int) -> bool:
        """Whether samples before number `until` are still to be answered."""
        cell = self.cell(name, task)
        return cell is None or (cell.error is None and len(cell.scores) < until)

    def add(
        self, name: str, task: str, at: int, scores: Sequence[float | None], held: Sequence[tuple[int, int]]
    ) -> None:
        """Scores and (bytes, dense bytes) of samples number `at` and following; written at once."""
        cell = self.cells.setdefault(name, {}).setdefault(task, Cell())
        cell.scores[at:], cell.held[at:] = scores, held
        self.save()

    def fail(self, name: str, task: str, error: str) -> None:
        """A candidate that could not be measured."""
        self.cells.setdefault(name, {}).setdefault(task, Cell()).error = error
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        cells = {n: {t: asdict(c) for t, c in tasks.items()} for n, tasks in self.cells.items()}
        text = json.dumps({"format": FORMAT, "about": self.about, "cells": cells}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name}.part")
            part.write_text(text, encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}; name another --out") from error
