"""The comparison: every method at every budget on the same prompts.

Each prompt is read densely once; methods that read like the dense model start from a replay of it, the others read for
themselves. The question comes after compression, and questions on texts of one length are answered as one batch (`ask.py`).
Speed and memory come from runs of their own, one sequence at a time by one worker (or by one on each GPU) while the others rest, so
that nothing shared is counted to anyone. Every answer goes to the journal as it comes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..attach import attach
from ..errors import InputError
from ..hub import check_weights, model_identity
from ..method import Budget, Method, check_count
from ..replay import can_replay
from ..scale import Crew, Lost, WorkersError, check_workers, crew
from ..spec import parse_task, written
from ..tasks import Sample, Task
from .ask import Asked, Asker, Failed, Prediction, Questions, Texts, Unmade, Unready, chunks
from .journal import Answer, Journal, conditions, task_key
from .measure import explain, hardware
from .plan import BUDGETS, LENGTHS, METHODS, SAMPLES, Config, configurations, default_tasks
from .records import Comparison, Record, filled
from .words import ATTENTION, NO_ATTENTION

PARTS = 4  # pieces of work for each worker, at least, so that none rests long before the end
ABREAST = 8  # configurations of a piece for one of several workers, at most: a run that is stopped loses little


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
    journal: str | Path | None = None,
    fresh: bool = False,
    workers: int | None = None,
    ray: str | None = None,
) -> Comparison:
    """Run methods x budgets x tasks x lengths on a model and return all measurements.

    tasks: names like "needle" or "needle(per_context=1)", or tasks; default `default_tasks()`. samples: questions per task and
    length. progress: called with a line and the share done. journal: a file that holds every answer as soon as it is given; what
    stands in it is not asked again, also when methods, budgets, tasks, lengths or samples have been added since; fresh: begin it anew
    and set aside what stands there. workers, ray: where the work is done, see `foveal.scale.crew`. A failing configuration is reported
    in its records and does not stop the rest; Ctrl-C returns what was measured, marked so. Raises InputError before any work for
    unknown names, bad values, weights that are not finite, lengths the model does not have, a journal of other conditions and a
    cluster that cannot be reached, UnsupportedModel for a model that cannot be attached.
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
    check_workers(workers)
    check_weights(model)
    attach(model).close()  # a model that cannot be attached is refused before any work
    known = Journal(None if journal is None else Path(journal), conditions(model, chosen, seed), fresh)
    lengths = list(dict.fromkeys(lengths))
    run = _Run(model, tokenizer, configs, chosen, lengths, samples, seed, progress, command, known, workers, ray)
    with crew(Asker, model, tokenizer, workers=workers, ray=ray) as hands:
        return run(hands)


class _Run:
    """One comparison under way."""

    def __init__(
        self, model, tokenizer, configs, tasks, lengths, samples, seed, progress, command, journal, workers, ray
    ):
        self.model, self.configs, self.tasks = model, configs, tasks
        self.lengths, self.samples, self.seed, self.journal = lengths, samples, seed, journal
        self.workers, self.ray, self.longest = workers, ray, max(lengths)
        self.progress = progress or (lambda line, share: None)
        self.records: dict[tuple, Record] = {}
        self.unscored: set[str] = set()  # tasks that could not be prepared
        self.interrupted = False
        self.started = datetime.now(UTC)
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # Several processes make the samples faster than this one; the first of each tells what cannot be asked at all.
        self.made = not workers or ray is not None
        self.cells = {
            (task.name, length): task.samples(
                tokenizer, length, self._count(task) if self.made else 1, seed, positions=self.positions
            )
            for length in lengths
            for task in tasks
            if task.kind == "generate" or length == self.longest
        }
        self.meta = self._meta(command)

    def __call__(self, hands: Crew) -> Comparison:
        start = time.perf_counter()
        try:
            if not self.made:
                self._make(hands)
            self._all(hands)
        except KeyboardInterrupt:
            self.interrupted = True
        self.meta["elapsed_s"] = round(time.perf_counter() - start, 1)
        self.meta["interrupted"] = self.interrupted
        if self.workers or self.ray is not None:
            self.meta["workers"] = {"count": hands.size, "on": "processes" if self.ray is None else "ray"}
            self.meta["machines"] = hands.machines
        self._paced()
        dense, records = self.configs[0], []
        for c in self.configs:
            for task, length in self.cells:
                base = None if c is dense else self._found(dense, task, length)
                r = self._record(c, task, length)
                records.append(filled(r, self._found(c, task, length), base, self.seed))
        return Comparison(self.meta, records)

    def _meta(self, command: str) -> dict[str, Any]:
        versions = {"foveal": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {
            "command": command or "foveal.compare.compare(...)",
            "date": self.started.isoformat(timespec="seconds"),
            "model": str(self.model.name_or_path),
            "model_identity": model_identity(self.model),
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "hardware": hardware(self.model.device),
            "versions": versions | {"python": platform.python_version()},
            "seed": self.seed,
            "samples": self.samples,
            "interrupted": False,
            "notes": [
                "Questions are asked after compression.",
                "Bytes are of allocated cache tensors after the prompt was read, token ids and statistics included.",
                "Attention, prefill, decode, peak memory and next tokens are of one sequence alone at the longest length; on a shared "
                "machine compare ratios only.",
                ATTENTION if self.model.device.type == "cpu" else NO_ATTENTION,
                "Where answers are generated n counts questions (95 % Wilson interval where each is right or wrong, else 95 % "
                "bootstrap interval), for perplexities the predicted tokens that count (95 % bootstrap interval).",
                "Shares of dense carry 95 % paired bootstrap intervals: both answered the same samples.",
            ],
        }

    # ------------------------------------------------------------------ order of work

    def _count(self, task: Task) -> int:
        """Questions to ask, or texts to go on with: one text for every four questions."""
        return self.samples if task.kind == "generate" else max(1, self.samples // 4)

    def _make(self, hands: Crew) -> None:
        """Let the workers make the samples, the longest ones first."""
        keys = sorted(self.cells, key=lambda key: -key[1])
        tasks = {t.name: t for t in self.tasks}
        work = [Unmade(tasks[n], length, self._count(tasks[n]), self.seed, self.positions) for n, length in keys]
        self.progress("writing the questions", 0.0)
        for i, made in hands.each(work):
            if isinstance(made, Lost):
                raise WorkersError(f"the questions of '{keys[i][0]}' could not be written: {made.why}")
            self.cells[keys[i]] = made

    def _all(self, hands: Crew) -> None:
        """Questions, lengths in the order asked for, so that something whole is there early; then texts, one method after another."""
        longest, scored = self.longest, [t for t in self.tasks if t.kind == "nll"]
        questions = list(self._questions(hands.size))
        asking = [self._weight(*piece) for piece in questions]
        texts = sum(len(self.cells[t.name, longest]) for t in scored) or 1
        self.done, self.total = 0.0, sum(asking) + len(self.configs) * texts * (longest + 1000)

        def begin(i: int) -> None:
            configs, chunk, _ = questions[i]
            names = configs[0].title if len(configs) == 1 else f"{len(configs)} configurations"
            self.progress(f"{names}: {len(chunk)} questions at {chunk[0][1].length:,} tokens", self.done / self.total)

        work = [Questions(tuple(c.method for c in configs), chunk, beside) for configs, chunk, beside in questions]
        for i, answers in hands.each(work, begin):
            self.done += asking[i]
            self._asked(*questions[i][:2], answers)
        for task in scored:
            self._prepare(hands, task, longest)
        self._predict(hands, longest, texts)
        self.progress("done", 1.0)

    def _questions(self, size: int) -> Iterator[tuple[list[Config], tuple[Asked, ...], tuple[Method | None, ...]]]:
        """(methods, questions, all methods that are asked them) that are still to be asked.

        One worker asks one method a piece, all of them before the next texts are read. Several take a length and a budget after the
        other, as many methods a piece as leave each of them a few pieces, those together that can share a reading.
        """
        plan = []
        for length in self.lengths:
            asked = [(t, s) for t in self.tasks if t.kind == "generate" for s in self.cells[t.name, length]]
            for configs in [self.configs] if size == 1 else self._slices():
                # on a document that is read again every question is asked: a later turn needs those before it
                lacks = {c: {(t.name, s.context) for t, s in asked if self._known(c, t, s) is None} for c in configs}
                open_ = set().union(*lacks.values())
                for chunk in chunks([(t, s) for t, s in asked if (t.name, s.context) in open_], self.model.device):
                    parts: dict[tuple[int, ...], list[Config]] = {}  # who was added later is asked more than the others
                    for c in configs:
                        part = tuple(i for i, (t, s) in enumerate(chunk) if (t.name, s.context) in lacks[c])
                        parts.setdefault(part, []).append(c)
                    plan += [(waiting, tuple(chunk[i] for i in part)) for part, waiting in parts.items() if part]
        step = min(ABREAST, sum(len(waiting) for waiting, _ in plan) // (PARTS * size)) if size > 1 else 1
        for waiting, chunk in plan:
            beside = tuple(c.method for c in waiting) if size == 1 else ()
            for at in range(0, len(waiting), max(1, step)):
                yield waiting[at : at + max(1, step)], chunk, beside

    def _slices(self) -> list[list[Config]]:
        """The configurations by budget, in the order asked for (dense and what has none first); who reads like dense stands together."""
        first = [c for c in self.configs if c.budget is None or c.method is None]
        slices = {None: first} if first else {}
        for c in self.configs[1:]:
            if c.budget is not None:
                slices.setdefault(repr(c.budget), []).append(c)
        return [sorted(some, key=lambda c: not can_replay(c.method)) for some in slices.values()]

    def _weight(self, configs: list[Config], chunk: tuple[Asked, ...], beside: tuple) -> float:
        length = chunk[0][1].length
        documents = len({s.context for _, s in chunk})
        own = sum(not can_replay(c.method) for c in configs) + (len(configs) / len(beside) if beside else 1)
        return own * length * documents + 25 * len(chunk) * len(configs)

    # ------------------------------------------------------------------ what comes back

    def _known(self, c: Config, task: Task, sample: Sample) -> Answer | None:
        return self.journal.get(written(c.method), task_key(task, sample.length), sample)

    def _keep(self, c: Config, found: Sequence[tuple[Asked, Answer]]) -> None:
        """Write answers down, those of one task together."""
        for key in dict.fromkeys(task_key(t, s.length) for (t, s), _ in found):
            mine = [(s, answer) for (t, s), answer in found if task_key(t, s.length) == key]
            self.journal.add(written(c.method), key, mine)

    def _asked(self, configs: list[Config], chunk: tuple[Asked, ...], answers: list | Lost) -> None:
        for c, got in zip(configs, [answers] * len(configs) if isinstance(answers, Lost) else answers, strict=True):
            if isinstance(got, Failed | Lost):
                self._fail([c], {(t.name, s.length) for t, s in chunk}, got.why)
                continue
            held = [got.held[s.context] for _, s in chunk]
            parts = zip(got.scores, held, got.reads, strict=True)
            self._keep(c, [(pair, Answer([x], h, read)) for pair, (x, h, read) in zip(chunk, parts, strict=True)])

    def _prepare(self, hands: Crew, task: Task, length: int) -> None:
        """Let the dense model, not attached, say what it must about the samples."""
        key = task.name, length
        try:
            ((_, ready),) = hands.each([Unready(task, tuple(self.cells[key]))])
            if isinstance(ready, Lost):
                raise InputError(ready.why)
        except Exception as error:
            self._fail(self.configs, {key}, explain(error))
            self.unscored.add(task.name)
        else:
            self.cells[key] = ready

    def _predict(self, hands: Crew, length: int, texts: int) -> None:
        """Read and go on, one sequence alone: the score of "nll" tasks, and what reading and each step cost."""
        cells = self._texts()
        waiting = [(c, own) for c in self.configs if (own := self._untold(c, cells))]
        self.done += (len(self.configs) - len(waiting)) * texts * (length + 1000)

        def begin(i: int) -> None:
            line = f"{waiting[i][0].title}: speed, memory and next tokens at {length:,} tokens"
            self.progress(line, self.done / self.total)

        pairs = lambda own: tuple((s, tuple(s.target) if t.kind == "nll" else ()) for t, s in own)
        work = [Texts((c.method,), pairs(own), alone=True) for c, own in waiting]
        for i, out in hands.each(work, begin, at_once=self._undisturbed(hands)):
            self.done += texts * (length + 1000)
            (got,), (c, own) = [out] if isinstance(out, Lost) else out, waiting[i]
            if isinstance(got, Failed | Lost):
                self._fail([c], {(t.name, length) for t, _ in own}, got.why)
            else:
                self._told(c, own, got)

    def _texts(self) -> list[Asked]:
        """What tells next tokens and speeds; where no task predicts, any text of the longest length tells the speed."""
        tasks = [t for t in self.tasks if self._scores(t)]
        cells = [(t, s) for t in tasks for s in self.cells[t.name, self.longest]]
        return cells or [(self.tasks[0], self.cells[self.tasks[0].name, self.longest][0])]

    def _paced(self) -> None:
        """Put the speeds that are known into the records."""
        sample = self._texts()[0][1]
        for c in self.configs:
            if known := self.journal.get(written(c.method), self._speed, sample):
                for task in self.tasks:
                    r = self._record(c, task.name, self.longest)
                    # journals of old say nothing of attention
                    r.prefill_s, r.decode_tok_s, r.peak_bytes, r.attention_ms = (*known.scores, None)[:4]

    def _undisturbed(self, hands: Crew) -> int:
        """Workers that may measure at once without taking time from each other: those that have a GPU each, or one."""
        mine = self.ray is None and self.model.device.type == "cuda" and self.model.device.index in (None, 0)
        return hands.size if mine and hands.size <= torch.cuda.device_count() else 1

    def _scores(self, task: Task) -> bool:
        """Whether its next tokens count."""
        return task.kind == "nll" and task.name not in self.unscored

    def _untold(self, c: Config, cells: list[Asked]) -> list[Asked]:
        """Texts that are still to be gone on with: those not known yet, or all where no speed is known."""
        if self.journal.get(written(c.method), self._speed, cells[0][1]) is None:
            return cells
        return [(t, s) for t, s in cells if self._scores(t) and self._known(c, t, s) is None]

    @property
    def _speed(self) -> str:
        """Speeds are kept by machine: those of two are never set side by side."""
        machine = self.meta["hardware"]
        texts = ", ".join(str(t) for t in self.tasks if t.kind == "nll")
        return f"speed on {machine['gpu'] or machine['cpu']} at {self.longest} tokens, {texts}"

    def _told(self, c: Config, cells: list[Asked], found: list[Prediction]) -> None:
        answers = [
            ((t, s), Answer(t.counted(s, got.losses), got.held, got.read))
            for (t, s), got in zip(cells, found, strict=True)
            if self._scores(t)
        ]
        self._keep(c, answers)
        first = self._texts()[0][1]
        if self.journal.get(written(c.method), self._speed, first) is not None:
            return
        stepping = [s for got in found for s in got.steps_s[1:]]
        attending = [1e3 * s for got in found for s in got.attention_s[1:]]
        pace = 1 / _median(stepping) if stepping else None  # one token alone tells no speed
        prefill, peak = _median([got.prefill_s for got in found]), max(got.peak_bytes for got in found)
        speed = [prefill, pace, peak, _median(attending) if attending else None]
        self.journal.add(written(c.method), self._speed, [(first, Answer(speed, found[0].held))])

    # ------------------------------------------------------------------ keeping records

    def _found(self, c: Config, name: str, length: int) -> list[tuple[Sample, float]]:
        """Samples with their scores, or with the nats of each token that counts, and the record's bytes on the way."""
        task = next(t for t in self.tasks if t.name == name)
        known = [(s, self._known(c, task, s)) for s in self.cells[name, length]]
        known = [(s, a) for s, a in known if a is not None]
        if known:
            r, last = self._record(c, name, length), known[-1][1]
            (r.kv_bytes, r.kv_bytes_dense), r.kv_read_share = last.held, last.read
        return [(s, x) for s, a in known for x in a.scores]

    def _record(self, c: Config, task: str, length: int) -> Record:
        key = (c, task, length)
        if key not in self.records:
            t = next(t for t in self.tasks if t.name == task)
            self.records[key] = Record(c.name, c.params, task, length, c.budget, better=t.better, kind=t.kind)
        return self.records[key]

    def _fail(self, configs: Sequence[Config], cells: set[tuple[str, int]], why: str) -> None:
        for c in configs:
            for task, length in cells:
                r = self._record(c, task, length)
                r.status, r.error = "error", why


def _median(x: list[float]) -> float:
    x = sorted(x)
    return x[len(x) // 2]


__all__ = ["Comparison", "Record", "compare"]
