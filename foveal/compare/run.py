"""The comparison: every method at every budget on the same prompts, in one process.

Each prompt is read densely once; methods that read like the dense model start from a replay of it, the others read for
themselves. The question comes after compression, and questions on texts of one length are answered as one batch (`ask.py`).
Speed and memory come from runs of their own, one sequence at a time, so that nothing shared is counted to anyone.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from .. import __version__
from ..attach import attach
from ..errors import FovealError, InputError
from ..hub import check_weights, model_identity
from ..method import Budget, Method, check_budget, check_count, get_method, methods
from ..replay import Recording, can_replay
from ..spec import parse_task
from ..tasks import Sample, Task, get_task
from .ask import TOGETHER, Asked, Asker, chunks
from .measure import hardware, out_of_memory
from .records import Comparison, Record, filled

METHODS = ("streaming-llm", "h2o", "scissorhands", "razor", "duo", "quest")
BUDGETS = (0.5, 0.25)
LENGTHS = (512, 1024)
SAMPLES = 4


@dataclass(frozen=True, eq=False)
class Config:
    """One line of the table: a method with its parameters, or the dense model. (By identity: budgets 1 and 1.0 are two.)"""

    name: str
    method: Method | None
    budget: Budget | None

    @property
    def params(self) -> dict[str, Any]:
        return {} if self.method is None else dict(self.method.params)


def configurations(names: Sequence[str | Method], budgets: Sequence[Budget]) -> list[Config]:
    """Dense first, then every method at every budget it takes. Raises InputError for unknown names and bad budgets."""
    for b in budgets:
        check_budget(b)
    if not budgets:
        raise InputError("nothing to compare: give at least one budget, like 0.25")
    out = [Config("dense", None, 1.0)]
    for name in names:
        if not isinstance(name, str | Method):
            raise InputError(
                f"expected the name of a method or a Method, got {name!r:.80}; `foveal methods` lists them"
            )
        if name == "dense":
            continue
        if isinstance(name, Method):
            out.append(Config(" | ".join(m.name for m in name.parts), name, name.params.get("budget")))
        elif "(" in name or "|" in name:
            out.append(Config(name.replace(" ", ""), get_method(name), None))
        elif "budget" not in methods().get(name, Method).__dataclass_fields__:
            out.append(Config(name, get_method(name), None))
        else:
            out += [Config(name, get_method(name, budget=b), b) for b in budgets]
    return list({(c.name, repr(c.method)): c for c in out}.values())  # asked twice, measured once


def default_tasks() -> list[Task]:
    """What two cores can ask in minutes: passkeys, needles that share one document, 24 tokens of a novel."""
    return [get_task("passkey"), get_task("needle", per_context=4), get_task("perplexity", max_new_tokens=24)]


def compare(
    model,
    tokenizer,
    methods: Sequence[str | Method] = METHODS,
    tasks: Sequence[str | Task] | None = None,
    budgets: Sequence[Budget] = BUDGETS,
    lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
    command: str = "",
) -> Comparison:
    """Run methods x budgets x tasks x lengths on a model and return all measurements.

    tasks: names like "needle" or "needle(per_context=1)", or tasks; default `default_tasks()`. samples: questions per task and
    length. progress: called with a line and the share done. A failing configuration is reported in its records and does not stop
    the rest; Ctrl-C returns what was measured, marked so. Raises InputError before any work for unknown names, bad values, weights
    that are not finite and lengths the model does not have, UnsupportedModel for a model that cannot be attached.
    """
    configs = configurations(methods, budgets)
    chosen = default_tasks() if tasks is None else [t if isinstance(t, Task) else parse_task(t) for t in tasks]
    if not chosen or not lengths:
        raise InputError("nothing to compare: give at least one task and one length")
    for name, values in (("samples", [samples]), ("lengths", lengths)):
        for value in values:
            check_count(name, value, 1)
    if len({t.name for t in chosen}) < len(chosen):
        raise InputError(
            f"expected each task once, got {', '.join(t.name for t in chosen)}; compare variants in two runs"
        )
    check_weights(model)
    attach(model).close()  # a model that cannot be attached is refused before any work
    run = _Run(model, tokenizer, configs, chosen, sorted(set(lengths)), samples, seed, progress, command)
    return run()


class _Run:
    """One comparison under way."""

    def __init__(self, model, tokenizer, configs, tasks, lengths, samples, seed, progress, command):
        self.model, self.tokenizer, self.configs, self.tasks = model, tokenizer, configs, tasks
        self.lengths, self.samples, self.seed = lengths, samples, seed
        self.progress = progress or (lambda line, share: None)
        self.asker, self.device = Asker(model, tokenizer), model.device
        self.records: dict[tuple, Record] = {}
        self.found: dict[tuple, list[tuple[Sample, float]]] = {}
        self.unscored: set[str] = set()  # tasks that could not be prepared
        self.interrupted = False
        self.started = datetime.now(UTC)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.cells = {
            (task.name, length): task.samples(tokenizer, length, self._count(task), seed, positions=positions)
            for length in lengths
            for task in tasks
            if task.kind == "generate" or length == lengths[-1]
        }
        self.meta = self._meta(command)

    def __call__(self) -> Comparison:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                self._all()
        except KeyboardInterrupt:
            self.interrupted = True
        self.meta["elapsed_s"] = round(time.perf_counter() - start, 1)
        self.meta["interrupted"] = self.interrupted
        for c in self.configs:
            for task, length in self.cells:
                self._record(c, task, length)
        dense = self.configs[0]
        for (c, task, length), r in self.records.items():
            base = None if c is dense else self.found.get((dense, task, length), [])
            filled(r, self.found.get((c, task, length), []), base, self.seed)
        return Comparison(self.meta, list(self.records.values()))

    def _meta(self, command: str) -> dict[str, Any]:
        versions = {"foveal": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {
            "command": command or "foveal.compare.compare(...)",
            "date": self.started.isoformat(timespec="seconds"),
            "model": str(self.model.name_or_path),
            "model_identity": model_identity(self.model),
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hardware": hardware(self.device),
            "versions": versions | {"python": platform.python_version()},
            "seed": self.seed,
            "samples": self.samples,
            "interrupted": False,
            "notes": [
                "Questions are asked after compression.",
                "Bytes are of allocated cache tensors after the prompt was read, token ids and statistics included.",
                "Prefill, decode, peak memory and next tokens are of one sequence alone at the longest length; on a shared "
                "machine compare ratios only.",
                "Where answers are generated n counts questions (95 % Wilson interval where each is right or wrong, else 95 % "
                "bootstrap interval), for perplexities the predicted tokens that count (95 % bootstrap interval).",
                "Shares of dense carry 95 % paired bootstrap intervals: both answered the same samples.",
            ],
        }

    # ------------------------------------------------------------------ order of work

    def _count(self, task: Task) -> int:
        """Questions to ask, or texts to go on with: one text for every four questions."""
        return self.samples if task.kind == "generate" else max(1, self.samples // 4)

    def _all(self) -> None:
        jobs = list(self._jobs())
        weights = [w for w, _, _ in jobs]
        done, total = 0.0, sum(weights)
        for weight, line, job in jobs:
            if line:
                self.progress(line, done / total)
            job()
            done += weight
        self.progress("done", 1.0)

    def _jobs(self) -> Iterator[tuple[float, str, Callable[[], None]]]:
        """(expected cost, what it is, the work), shortest texts first so that something is there early."""
        for length in self.lengths:
            asked = [(t, s) for t in self.tasks if t.kind == "generate" for s in self.cells[t.name, length]]
            for chunk in chunks(asked):
                reading: dict[tuple, Recording | None] = {}
                documents = list(dict.fromkeys(s.context for _, s in chunk))
                for document in documents:
                    yield length, f"read {len(document):,} tokens", lambda d=document, r=reading: self._read(d, r)
                for c in self.configs:
                    own = 0 if can_replay(c.method) else length * len(documents)
                    line = f"{_title(c)}: {len(chunk)} questions at {length:,} tokens"
                    yield own + 25 * len(chunk), line, lambda c=c, ch=chunk, r=reading: self._ask(c, ch, r)
                yield 0, "", reading.clear
        longest, scored = self.lengths[-1], [t for t in self.tasks if t.kind == "nll"]
        for task in scored:
            yield 0, "", lambda t=task: self._prepare(t, longest)
        texts = sum(len(self.cells[t.name, longest]) for t in scored) or 1
        for c in self.configs:
            line = f"{_title(c)}: speed, memory and next tokens at {longest:,} tokens"
            yield texts * (longest + 1000), line, lambda c=c: self._predict(c, longest, scored)

    def _read(self, document: tuple[int, ...], reading: dict) -> None:
        reading[document] = self.asker.read(document, [c.method for c in self.configs])

    # ------------------------------------------------------------------ questions

    def _ask(self, c: Config, chunk: list[Asked], reading: dict[tuple, Recording | None]) -> None:
        with self._guard([c], {(t.name, s.length) for t, s in chunk}):
            answers = self.asker.ask(c.method, chunk, reading)
            for (task, sample), score, read in zip(chunk, answers.scores, answers.reads, strict=True):
                r = self._record(c, task.name, sample.length)
                (r.kv_bytes, r.kv_bytes_dense), r.kv_read_share = answers.held[sample.context], read
                self.found.setdefault((c, task.name, sample.length), []).append((sample, score))

    # ------------------------------------------------------------------ next tokens, speed and memory

    def _prepare(self, task: Task, length: int) -> None:
        """Let the dense model, not attached, say what it must about the samples."""
        with self._guard(self.configs, {(task.name, length)}):
            self.unscored.add(task.name)
            self.cells[task.name, length] = task.prepare(self.model, self.cells[task.name, length])
            self.unscored.discard(task.name)

    def _predict(self, c: Config, length: int, tasks: list[Task]) -> None:
        """Read and go on, one sequence alone: the score of "nll" tasks, and what reading and each step cost."""
        cells = [(t, s) for t in tasks if t.name not in self.unscored for s in self.cells[t.name, length]]
        if not cells:  # no task predicts here: any text of this length tells the speed
            t = self.tasks[0]
            cells = [(t, self.cells[t.name, length][0])]
        with self._guard([c], {(t.name, length) for t, _ in cells}):
            done = []
            for task, sample in cells:
                scored = task.kind == "nll" and task.name not in self.unscored
                got = self.asker.predict(c.method, sample, sample.target if scored else ())
                done.append(got)
                if scored:
                    r = self._record(c, task.name, length)
                    (r.kv_bytes, r.kv_bytes_dense), r.kv_read_share = got.held, got.read
                    losses = task.counted(sample, got.losses)
                    self.found.setdefault((c, task.name, length), []).extend((sample, x) for x in losses)
            stepping = [s for got in done for s in got.steps_s[1:]]
            speed = {
                "prefill_s": _median([got.prefill_s for got in done]),
                "decode_tok_s": 1 / _median(stepping) if stepping else None,  # one token alone tells no speed
                "peak_bytes": max(got.peak_bytes for got in done),
            }
            for task in self.tasks:
                r = self._record(c, task.name, length)
                for name, value in speed.items():
                    setattr(r, name, value)

    # ------------------------------------------------------------------ keeping records

    def _record(self, c: Config, task: str, length: int) -> Record:
        key = (c, task, length)
        if key not in self.records:
            t = next(t for t in self.tasks if t.name == task)
            self.records[key] = Record(c.name, c.params, task, length, c.budget, better=t.better, kind=t.kind)
        return self.records[key]

    @contextmanager
    def _guard(self, configs: Sequence[Config], cells: set[tuple[str, int]]) -> Iterator[None]:
        """A failure becomes the status of the records it concerns."""
        try:
            yield
        except Exception as error:
            for c in configs:
                for task, length in cells:
                    r = self._record(c, task, length)
                    r.status, r.error = "error", explain(error)


def explain(error: Exception) -> str:
    """What went wrong, in one sentence for a table."""
    if out_of_memory(error):
        return "out of memory: use a smaller --lengths or a smaller model"
    return str(error) if isinstance(error, FovealError) else f"{type(error).__name__}: {error}"


def _title(c: Config) -> str:
    return c.name if c.budget is None or c.method is None else f"{c.name} at {c.budget:g}"


def _median(x: list[float]) -> float:
    x = sorted(x)
    return x[len(x) // 2]


__all__ = ["BUDGETS", "LENGTHS", "METHODS", "TOGETHER", "Comparison", "Record", "compare", "configurations"]
