"""What was answered so far, in one file that grows line by line: a run that stops, or is stopped, goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..hub import model_identity
from ..tasks import Sample, Task

FORMAT = "foveal answers 1"


class Answer(NamedTuple):
    """One method on one sample: its score (or the nats of each token that counts), (bytes, dense bytes) after reading, keys read."""

    scores: list[float]
    held: Sequence[int]
    read: float | None = None


def conditions(model, tasks: Sequence[Task], seed: int) -> dict[str, Any]:
    """Under which conditions answers may be set side by side: the model, the contents of the tasks' files, the seed."""
    files = sorted({file for task in tasks for file in task.files()})
    return {
        "model": model_identity(model) | {"name": ""},
        "dtype": str(model.dtype),
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "seed": seed,
    }


def task_key(task: Task, length: int) -> str:
    """A task with its options at a length, as a journal names it."""
    return f"{task} at {length} tokens"


def sample_key(sample: Sample) -> tuple[int, int]:
    """Which of a task's samples at a length this is."""
    return sample.index, sample.turn


class Journal:
    """Answers by (method as text, task key, sample key); `about` are their conditions, and files about others are refused.

    path: None keeps them in memory alone. What stands in the file is known from the start; `add` appends. A line that was cut off
    when the run was killed is dropped. fresh: begin anew instead; what stands there is set aside as NAME.old.jsonl once there is a
    first new answer, so that a run that never starts loses nothing. Raises InputError for a file that is none, of other conditions, or
    cannot be written.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], fresh: bool = False):
        self.path, self.about = path, json.loads(json.dumps(about, default=str))
        self.answers: dict[tuple[str, str, tuple[int, int]], Answer] = {}
        self._end = 0  # bytes of whole lines
        if path is not None and path.exists() and not fresh:
            self._read(path)

    def get(self, method: str, task: str, sample: Sample) -> Answer | None:
        """What is known of a method on a sample."""
        return self.answers.get((method, task, sample_key(sample)))

    def add(self, method: str, task: str, answers: Sequence[tuple[Sample, Answer]]) -> None:
        """Answers of a method, on disk when this returns."""
        lines = []
        for sample, answer in answers:
            key = sample_key(sample)
            self.answers[method, task, key] = answer
            lines.append(json.dumps({"method": method, "task": task, "sample": key} | answer._asdict()) + "\n")
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._end and self.path.exists():
                self.path.replace(self.path.with_suffix(".old.jsonl"))
            with self.path.open("r+b" if self._end else "wb") as file:
                file.seek(self._end)
                file.truncate()
                if not self._end:
                    file.write((json.dumps({"format": FORMAT, "about": self.about}) + "\n").encode())
                file.write("".join(lines).encode())
                self._end = file.tell()
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}; name another --out") from error

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}; name another --out") from error
        whole = data[: data.rfind(b"\n") + 1]
        if data and not whole:
            raise self._foreign("no whole line")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                if number == 1:
                    head = found["format"], found["about"]
                else:
                    key = found["method"], found["task"], tuple(found["sample"])
                    self.answers[key] = Answer(found["scores"], found["held"], found["read"])
            except (ValueError, KeyError, TypeError) as error:
                raise self._foreign(f"line {number}, {type(error).__name__}: {error}") from None
            if number == 1:
                self._check(*head)
        self._end = len(whole)

    def _foreign(self, why: str) -> InputError:
        return InputError(f"{self.path} is not what Foveal wrote ({why}): remove it or name another --out")

    def _check(self, form: str, about: dict[str, Any]) -> None:
        if form != FORMAT:
            raise self._foreign(f"format {form!r}")
        differs = [key for key in self.about if about.get(key) != self.about[key]]
        if differs:
            raise InputError(
                f"{self.path} holds answers under other conditions ({', '.join(differs)} differ): name another --out, "
                "or remove it to begin anew"
            )
