"""The comparison: every method at every budget on the same prompts, in one process.

Each prompt is read densely once; methods that read like the dense model start from a replay of it, the others read for
themselves. The question comes after compression, and questions on texts of one length are answered as one batch. Speed
and memory come from runs of their own, one sequence at a time, so that nothing shared is counted to anyone.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from .. import __version__
from ..attach import Session, attach
from ..cache import Store
from ..errors import FovealError, InputError
from ..hub import check_weights, model_identity
from ..method import Budget, Method, check_budget, check_count, get_method, methods
from ..replay import Recording, can_replay, record
from ..tasks import Sample, Task, get_task
from .drive import answer, follow
from .measure import Memory, bootstrap, hardware, now, out_of_memory, wilson
from .records import Comparison, Record

METHODS = ("streaming-llm", "h2o", "scissorhands", "razor", "duo", "quest")
BUDGETS = (0.5, 0.25)
LENGTHS = (512, 1024)
SAMPLES = 4
TOGETHER = 10  # questions answered as one batch


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

    tasks: names or tasks; default `default_tasks()`. samples: questions per task and length. progress: called with a line
    and the share done. A failing configuration is reported in its records and does not stop the rest; Ctrl-C returns what
    was measured, marked so. Raises InputError before any work for unknown names, bad values, weights that are not finite
    and lengths the model does not have, UnsupportedModel for a model that cannot be attached.
    """
    configs = configurations(methods, budgets)
    chosen = default_tasks() if tasks is None else [t if isinstance(t, Task) else get_task(t) for t in tasks]
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
        self.device = model.device
        self.records: dict[tuple, Record] = {}
        self.found: dict[tuple, list[tuple[Sample, float]]] = {}
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
        return Comparison(self.meta, [self._close(key, r) for key, r in self.records.items()])

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
                "Prefill, decode, peak memory and perplexity are of one sequence alone at the longest length; on a shared "
                "machine compare ratios only.",
                "For passkey and needle n counts questions (95 % Wilson interval), for perplexity predicted tokens (95 % "
                "bootstrap interval).",
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
            for chunk in _chunks(asked):
                reading: dict[tuple, Recording] = {}
                documents = list(dict.fromkeys(s.context for _, s in chunk))
                for document in documents:
                    yield length, f"read {len(document):,} tokens", lambda d=document, r=reading: self._read(d, r)
                for c in self.configs:
                    own = 0 if can_replay(c.method) else length * len(documents)
                    line = f"{_title(c)}: {len(chunk)} questions at {length:,} tokens"
                    yield own + 25 * len(chunk), line, lambda c=c, ch=chunk, r=reading: self._ask(c, ch, r)
                yield 0, "", reading.clear
        longest, scored = self.lengths[-1], [t for t in self.tasks if t.kind == "nll"]
        texts = sum(len(self.cells[t.name, longest]) for t in scored) or 1
        for c in self.configs:
            line = f"{_title(c)}: speed, memory and next tokens at {longest:,} tokens"
            yield texts * (longest + 1000), line, lambda c=c: self._predict(c, longest, scored)

    def _read(self, document: tuple[int, ...], reading: dict) -> None:
        ids = torch.tensor([document], device=self.device)
        replayed = [c.method for c in self.configs if can_replay(c.method)]
        # Where one method spoils the shared reading, each reads for itself and answers for its own failure.
        with suppress(Exception):
            reading[document] = record(self.model, ids, replayed)

    # ------------------------------------------------------------------ questions

    def _ask(self, c: Config, chunk: list[tuple[Task, Sample]], reading: dict[tuple, Recording]) -> None:
        lengths = {(t.name, s.length) for t, s in chunk}
        with self._guard(c, lengths):
            with attach(self.model, c.method) as session:
                stores, seen = [], {}
                for task, sample in chunk:
                    if sample.context not in seen:
                        seen[sample.context] = self._store(session, sample.context, reading)
                        self._bytes(c, task, sample, seen[sample.context])
                    stores.append(seen[sample.context].fork())
                most = max(t.max_new_tokens for t, _ in chunk)
                # Layers with a window cannot hold questions of different lengths: there each is answered alone.
                size = 1 if len(stores[0].managed) < len(stores[0].layers) else len(stores)
                answers = []
                for i in range(0, len(stores), size):
                    questions = [s.question for _, s in chunk[i : i + size]]
                    answers += answer(self.model, Store.join(stores[i : i + size]), questions, most, self._stops())
                self._reads(c, lengths, session)
            for (task, sample), ids in zip(chunk, answers, strict=True):
                text = self.tokenizer.decode(ids[: task.max_new_tokens], skip_special_tokens=True)
                self._note(c, task, sample, task.score(sample, text))

    def _store(self, session: Session, context: tuple[int, ...], reading: dict[tuple, Recording]) -> Store:
        if context in reading and can_replay(session.method):
            return reading[context].replay(session)[0]
        return self.model(torch.tensor([context], device=self.device), logits_to_keep=1).past_key_values

    def _stops(self) -> set[int]:
        stops = self.model.generation_config.eos_token_id
        return set(stops) if isinstance(stops, list) else {stops}

    # ------------------------------------------------------------------ next tokens, speed and memory

    def _predict(self, c: Config, length: int, tasks: list[Task]) -> None:
        """Read and go on, one sequence alone: the score of "nll" tasks, and what reading and each step cost."""
        cells = [(t, s) for t in tasks for s in self.cells[t.name, length]]
        if not cells:  # no task predicts here: any text of this length tells the speed
            t = self.tasks[0]
            cells = [(t, self.cells[t.name, length][0])]
        with self._guard(c, {(t.name, length) for t, _ in cells}):
            reading, stepping, peaks = [], [], []
            for task, sample in cells:
                targets = sample.target if task.kind == "nll" else sample.question[1:]
                with attach(self.model, c.method) as session, Memory(self.device) as memory:
                    start = now(self.device)
                    store = self.model(
                        torch.tensor([sample.context], device=self.device), logits_to_keep=1
                    ).past_key_values
                    reading.append(now(self.device) - start)
                    if task.kind == "nll":
                        self._bytes(c, task, sample, store)
                    losses, times = follow(self.model, store, [sample.question[0], *targets], self.device)
                    self._reads(c, {(task.name, length)} if tasks else set(), session)
                peaks.append(memory.peak)
                stepping += times[1:]
                if task.kind == "nll":
                    task.score(sample, losses)
                    self.found.setdefault((c, task.name, length), []).extend((sample, x) for x in losses)
            pace = 1 / _median(stepping) if stepping else None  # one token alone tells no speed
            speed = {"prefill_s": _median(reading), "decode_tok_s": pace, "peak_bytes": max(peaks)}
            for task in self.tasks:
                r = self._record(c, task.name, length)
                for name, value in speed.items():
                    setattr(r, name, value)

    # ------------------------------------------------------------------ keeping records

    def _record(self, c: Config, task: str, length: int) -> Record:
        key = (c, task, length)
        if key not in self.records:
            better = next(t.better for t in self.tasks if t.name == task)
            self.records[key] = Record(c.name, c.params, task, length, c.budget, better=better)
        return self.records[key]

    def _bytes(self, c: Config, task: Task, sample: Sample, store: Store) -> None:
        r = self._record(c, task.name, sample.length)
        r.kv_bytes, r.kv_bytes_dense = store.nbytes, store.dense_nbytes

    def _reads(self, c: Config, lengths: set[tuple[str, int]], session: Session) -> None:
        share = session.read_share
        for task, length in lengths:
            self._record(c, task, length).kv_read_share = share

    def _note(self, c: Config, task: Task, sample: Sample, score: float) -> None:
        self._record(c, task.name, sample.length)
        self.found.setdefault((c, task.name, sample.length), []).append((sample, score))

    def _close(self, key: tuple, r: Record) -> Record:
        """Turn the scores of single samples into a mean with its interval and, where depths are known, a grid."""
        found = self.found.get(key, [])
        if r.status == "error":
            return r
        if not found:
            if r.status == "ok":
                r.status, r.error = "skipped", "not reached before the run was stopped"
            return r
        scores = [s for _, s in found]
        r.n, r.score = len(scores), math.fsum(scores) / len(scores)
        if not math.isfinite(r.score):
            r.status, r.error, r.score = "error", "the score is not a finite number", None
            return r
        binary = all(s in (0.0, 1.0) for s in scores) and r.better == "higher"
        interval = wilson(math.fsum(scores), r.n) if binary else bootstrap(scores, self.seed)
        if r.task == "perplexity":
            r.score = math.exp(min(r.score, 700))  # e^709 is the largest float; such a model predicts nothing anyway
            interval = None if interval is None else tuple(math.exp(min(x, 700)) for x in interval)
        r.score_low, r.score_high = interval or (None, None)
        for depth in sorted({s.depth for s, _ in found if s.depth is not None}):
            here = [score for s, score in found if s.depth == depth]
            r.grid.append({"depth": depth, "score": math.fsum(here) / len(here), "n": len(here)})
        return r

    @contextmanager
    def _guard(self, c: Config, cells: set[tuple[str, int]]) -> Iterator[None]:
        """A failure of one configuration becomes the status of its records."""
        try:
            yield
        except Exception as error:
            for task, length in cells:
                r = self._record(c, task, length)
                r.status, r.error = "error", _explain(error)


def _explain(error: Exception) -> str:
    if out_of_memory(error):
        return "out of memory: use a smaller --lengths or a smaller model"
    return str(error) if isinstance(error, FovealError) else f"{type(error).__name__}: {error}"


def _chunks(asked: list[tuple[Task, Sample]]) -> Iterator[list[tuple[Task, Sample]]]:
    """Questions in batches, those on one document together."""
    chunk: list[tuple[Task, Sample]] = []
    for i, (task, sample) in enumerate(asked):
        fresh = i > 0 and asked[i - 1][1].context != sample.context
        if chunk and fresh and len(chunk) >= TOGETHER:
            yield chunk
            chunk = []
        chunk.append((task, sample))
    if chunk:
        yield chunk


def _title(c: Config) -> str:
    return c.name if c.budget is None or c.method is None else f"{c.name} at {c.budget:g}"


def _median(x: list[float]) -> float:
    x = sorted(x)
    return x[len(x) // 2]


__all__ = ["BUDGETS", "LENGTHS", "METHODS", "Comparison", "Record", "answer", "compare", "configurations", "follow"]
