"""The search: methods x budgets x head roles, halved again and again while the samples double (Jamieson & Talwalkar, 2016).

What is measured is kept sample by sample in one file, so that a search that was stopped goes on where it was, and another limit on
the same prompts asks only what is new.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attach import attach
from ..compare.ask import Asked, Asker, Failed, Questions, Texts, Unready, chunks
from ..compare.journal import Answer, Journal, conditions
from ..compare.plan import Config, configurations, default_tasks
from ..compare.records import Comparison, Record, filled
from ..compare.rows import Row, summary_rows
from ..compare.run import PARTS
from ..errors import InputError
from ..hub import check_weights
from ..method import Method, check_count, get_method, methods
from ..scale import Crew, Lost, WorkersError, check_workers, crew
from ..spec import parse_task, written
from ..tasks import Sample, Task
from .answer import Tuning, decide
from .prompts import read_prompts

FIRST = 3  # samples of each task in the first round
LEAST = 4  # candidates that see all samples
SHARES = (0.5, 0.75, 0.95, 2.0)
"""Budgets tried, as shares of the memory limit: below it, for token ids and statistics take bytes too, and one beyond it."""
SAMPLES = 24
CONTROLS = ("random-keep",)  # a baseline of experiments, never an answer
ROLES = {"duo": ({}, {"score": "induction"}, {"score": "echo"})}
"""Head roles to choose whole heads by, for methods that leave the choice."""


def candidates(memory: float, names: Sequence[str | Method] | None = None) -> list[Config]:
    """The methods that let keys go, each at every budget and by each head role; `names` are tried instead where given."""
    check_memory(memory)
    budgets = [max(round(share * memory, 6), 1e-6) for share in SHARES if share * memory < 1]
    if names is None:
        kept = {"keep", "end"}
        names = [n for n, c in methods().items() if kept & set(c().asks) and "budget" in c.__dataclass_fields__]
        names = [n for n in names if n not in CONTROLS]
    out: list[Config] = []
    for name in names:
        variants = ROLES.get(name, ({},)) if isinstance(name, str) else ({},)
        for extra in variants:
            listed = configurations([name], budgets)[1:]
            if extra:
                listed = [Config(c.name, get_method(c.name, **c.method.params | extra), c.budget) for c in listed]
            out += listed
    return list({written(c.method): c for c in out}.values())


def check_memory(memory: float) -> None:
    """Raise unless it is a share of dense's bytes."""
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory <= 1:
        raise InputError(
            f"memory = {memory!r}: expected a share of the dense cache's bytes, above 0 and up to 1, like 0.25"
        )


def check_drop(drop: float) -> None:
    """Raise unless it is a share of dense's score."""
    if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < 1:
        raise InputError(f"max_drop = {drop!r}: expected a share of dense's score, from 0 and below 1, like 0.02")


def tune(
    model,
    tokenizer,
    data: str | Path | None = None,
    *,
    memory: float = 0.25,
    max_drop: float = 0.02,
    names: Sequence[str | Method] | None = None,
    tasks: Sequence[str | Task] | None = None,
    length: int = 1024,
    samples: int | None = None,
    new_tokens: int = 64,
    plain: bool = False,
    seed: int = 0,
    out: str | Path = "foveal-tune",
    progress: Callable[[str, float], None] | None = None,
    command: str = "",
    workers: int | None = None,
    ray: str | None = None,
) -> Tuning:
    """Which method at which budget keeps this model's quality within `memory` of the dense cache's bytes?

    data: a file of JSON lines {"prompt", "answer"?}, see `foveal.tune.prompts`; None: generated `tasks` (default those of `compare`) of
    `length` tokens. samples: prompts, or questions of each task, that the last candidates answer; default all prompts, or 24. max_drop:
    the most of dense's score that may be lost, as a share. names: methods to try; default all that let keys go. out: the folder
    in which what is measured is kept; the same call goes on there. progress: called with a line and the share done.
    workers, ray: where the work is done, see `foveal.scale.crew`. Ctrl-C returns what is known, marked so. Raises InputError before any
    work for bad values and files, for a folder that holds another search and for a cluster that cannot be reached, and where the dense
    model scores nothing.
    """
    check_drop(max_drop)
    configs = [Config("dense", None, 1.0), *candidates(memory, names)]
    if len(configs) == 1:
        raise InputError("nothing to tune: name at least one method besides dense")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if samples is not None:
        check_count("samples", samples, 1)
    chosen: list[Task]
    if data is not None:
        if tasks is not None:
            raise InputError("give prompts or tasks, not both: prompts are the task")
        chosen = [read_prompts(data, plain=plain, max_new_tokens=new_tokens)]
        length, samples = positions or tokenizer.model_max_length, samples or len(chosen[0].rows())
    else:
        chosen = default_tasks() if tasks is None else [t if isinstance(t, Task) else parse_task(t) for t in tasks]
        samples = samples or SAMPLES
    check_workers(workers)
    check_weights(model)
    attach(model).close()
    asked = {t.name: t.samples(tokenizer, length, samples, seed, positions=positions) for t in chosen}
    if not chosen or len(asked) < len(chosen):
        raise InputError(f"expected each task once and at least one, got {', '.join(t.name for t in chosen) or 'none'}")
    about = conditions(model, chosen, seed) | {"tasks": [str(t) for t in chosen], "length": length}
    journal = Journal(Path(out) / "answers.jsonl", about)
    search = _Search(model, configs, chosen, asked, memory, max_drop, journal, seed, progress)
    with crew(Asker, model, tokenizer, workers=workers, ray=ray) as hands:
        return search(hands, command, str(data or ""))


@dataclass
class _Search:
    """One search under way."""

    model: Any
    configs: list[Config]
    tasks: list[Task]
    asked: dict[str, list[Sample]]
    memory: float
    max_drop: float
    journal: Journal
    seed: int
    progress: Callable[[str, float], None] | None
    prepared: dict[str, int] = field(default_factory=dict)
    failed: dict[tuple[Config, str], str] = field(default_factory=dict)
    speeds: dict[Config, tuple[float, float]] = field(default_factory=dict)
    done: float = 0.0
    total: float = 1.0

    def __call__(self, hands: Crew, command: str, data: str) -> Tuning:
        start, interrupted, alive = time.perf_counter(), False, self.configs[1:]
        try:
            first = self._control(hands)
            before, rounds = 0, self.rounds(first)
            self.total = first + sum(work for _, _, work in rounds)
            for n, keep, _ in rounds:
                self._round(hands, [self.configs[0], *alive], before, n)
                alive, before = self._best(alive, n)[:keep], n
            self.speeds = self._speeds(hands, alive)
        except KeyboardInterrupt:
            interrupted = True
        if self.progress is not None and not interrupted:
            self.progress("done", 1.0)
        result = self.comparison()
        finals = [] if interrupted else alive
        tuning = decide(result, self._rows(), finals, self.memory, self.max_drop, self.speeds)
        tuning.finish(self, command, data, time.perf_counter() - start, interrupted)
        return tuning

    def rounds(self, first: int) -> list[tuple[int, int, int]]:
        """(samples of each task so far, candidates kept afterwards, answers asked for): samples double, candidates halve."""
        most, alive, seen, plan = max(map(len, self.asked.values())), len(self.configs) - 1, 0, []
        n = min(first, most)
        while seen < most:
            n = most if alive <= LEAST else min(n, most)
            keep = alive if n == most else max(LEAST, math.ceil(alive / 2))
            plan.append((n, keep, (alive + 1) * (n - seen)))
            seen, alive, n = n, keep, 2 * n
        return plan

    # ------------------------------------------------------------------ one round

    def _control(self, hands: Crew) -> int:
        """Samples of the first round: as many as it takes for dense, alone at first, to score on every task.

        Shares of dense mean nothing where it scores nothing. Raises InputError where that is so on all samples.
        """
        dense, most, n = self.configs[0], max(map(len, self.asked.values())), FIRST
        while True:
            self.total = n + sum(work for _, _, work in self.rounds(n))
            self._round(hands, [dense], 0, n)
            scores = {task: [x for _, x in self._found(dense, task, n)] for task in self.tasks}
            blank = [t for t, found in scores.items() if not found or (t.kind == "generate" and not any(found))]
            if not blank:
                return n
            if n >= most:
                raise InputError(
                    f"the dense model scores nothing on {len(self.asked[blank[0].name])} samples of '{blank[0].name}', so nothing "
                    "can be compared with it: give prompts or tasks that it can do"
                )
            n *= 2

    def _round(self, hands: Crew, configs: list[Config], before: int, n: int) -> None:
        """Let every candidate answer the samples of each task from number `before` to `n`."""
        parts: list[tuple[Task, tuple[Sample, ...], list[Config]]] = []
        for task in self.tasks:
            at, until = self._whole(task, before), self._whole(task, n)
            if any(self._waits(c, task, self.asked[task.name][:until]) for c in configs):
                self._prepare(hands, task, until)
            samples = self.asked[task.name][at:until]
            pieces = (
                chunks([(task, s) for s in samples], self.model.device)
                if task.kind == "generate"
                else [[(task, s)] for s in samples]
            )
            for piece in pieces:
                part = tuple(s for _, s in piece)
                waiting = [c for c in configs if self._waits(c, task, part)]
                self.done += (len(configs) - len(waiting)) * len(part) / len(self.tasks)
                if waiting:
                    parts.append((task, part, waiting))
        self._measure(hands, parts)

    def _measure(self, hands: Crew, parts: list[tuple[Task, tuple[Sample, ...], list[Config]]]) -> None:
        """Let the workers answer; one candidate after another where there is one worker, else enough pieces for all of them."""
        groups, pieces, work = -(-PARTS * hands.size // max(1, len(parts))), [], []
        for task, part, waiting in parts:
            step = 1 if hands.size == 1 else -(-len(waiting) // groups)
            beside = tuple(c.method for c in waiting) if hands.size == 1 else ()
            for at in range(0, len(waiting), step):
                some = waiting[at : at + step]
                pieces.append((task, part, some))
                work.append(_work(task, part, tuple(c.method for c in some), beside))

        def begin(i: int) -> None:
            task, part, some = pieces[i]
            if self.progress is not None:
                names = written(some[0].method) if len(some) == 1 else f"{len(some)} candidates"
                first = self.asked[task.name].index(part[0])
                line = f"{names}: {task.name} {first + 1} to {first + len(part)}"
                self.progress(line, min(0.99, self.done / self.total))

        for i, out in hands.each(work, begin):
            task, part, some = pieces[i]
            self.done += len(some) * len(part) / len(self.tasks)
            for c, got in zip(some, [out] * len(some) if isinstance(out, Lost) else out, strict=True):
                self._keep(c, task, part, got)

    def _keep(self, c: Config, task: Task, part: tuple[Sample, ...], got: Any) -> None:
        """Write answers down; a dense model that fails ends the search, a candidate that fails is out."""
        if isinstance(got, Failed | Lost):
            if c.method is None:
                raise WorkersError(f"the dense model could not be measured: {got.why}")
            self.failed[c, task.name] = got.why
        elif task.kind == "generate":
            found = [(s, Answer([x], got.held[s.context])) for s, x in zip(part, got.scores, strict=True)]
            self.journal.add(written(c.method), str(task), found)
        else:
            found = [(s, Answer(task.counted(s, p.losses), p.held)) for s, p in zip(part, got, strict=True)]
            self.journal.add(written(c.method), str(task), found)

    def _known(self, c: Config, task: Task, sample: Sample) -> Answer | None:
        return self.journal.get(written(c.method), str(task), sample)  # lengths are among the journal's conditions

    def _waits(self, c: Config, task: Task, samples: Sequence[Sample]) -> bool:
        """Whether any of these samples is still to be answered."""
        return (c, task.name) not in self.failed and any(self._known(c, task, s) is None for s in samples)

    def _whole(self, task: Task, n: int) -> int:
        """`n` samples, and those that share the last one's context: a conversation is not cut."""
        samples = self.asked[task.name]
        n = min(n, len(samples))
        while 0 < n < len(samples) and samples[n].context == samples[n - 1].context:
            n += 1
        return n

    def _prepare(self, hands: Crew, task: Task, n: int) -> None:
        """Fill in what only the dense model can tell about the first `n` samples."""
        samples, ready = self.asked[task.name], self.prepared.get(task.name, 0)
        if n <= ready:
            return
        ((_, made),) = hands.each([Unready(task, tuple(samples[ready:n]))])
        if isinstance(made, Lost):
            raise WorkersError(f"the dense model could not be asked: {made.why}")
        samples[ready:n], self.prepared[task.name] = made, n

    # ------------------------------------------------------------------ what is known

    def comparison(self, n: int | None = None) -> Comparison:
        """One record a candidate and task, on the (first `n`) samples it saw; the gains are on dense's scores of the same."""
        records, dense = [], self.configs[0]
        for c in self.configs:
            for task in self.tasks:
                error, known = self.failed.get((c, task.name)), self._answers(c, task, n)
                if error is None and not known:
                    continue
                length = max(s.length for s in self.asked[task.name])
                r = Record(c.name, c.params, task.name, length, c.budget, better=task.better, kind=task.kind)
                if error is not None:
                    r.status, r.error = "error", error
                else:
                    sizes = zip(*(answer.held for _, answer in known), strict=True)
                    r.kv_bytes, r.kv_bytes_dense = (sum(x) // len(known) for x in sizes)
                base = None if c is dense else self._found(dense, task, n)
                records.append(filled(r, self._found(c, task, n), base, self.seed))
        return Comparison({}, records)

    def _answers(self, c: Config, task: Task, n: int | None) -> list[tuple[Sample, Answer]]:
        """What is known of a candidate on a task, up to the first sample it has not seen."""
        found = []
        for s in self.asked[task.name][: None if n is None else self._whole(task, n)]:
            if (answer := self._known(c, task, s)) is None:
                break
            found.append((s, answer))
        return found

    def _found(self, c: Config, task: Task, n: int | None = None) -> list[tuple[Sample, float]]:
        """Samples with their scores, or the mean nats of the tokens that count."""
        return [(s, math.fsum(a.scores) / len(a.scores)) for s, a in self._answers(c, task, n) if a.scores]

    def _rows(self, n: int | None = None) -> dict[Config, Row]:
        rows = summary_rows(self.comparison(n).to_dict())
        known = {(r.method, repr(r.params), repr(r.budget)): r for r in rows}
        keyed = {c: known.get((c.name, repr(c.params), repr(c.budget))) for c in self.configs}
        return {c: row for c, row in keyed.items() if row is not None}

    def _best(self, alive: list[Config], n: int) -> list[Config]:
        """Those that ran, within memory first, best quality on the first `n` samples first, fewer bytes where equal.

        What a search that was stopped knows of later samples changes nothing, so that it goes the same way again.
        """
        rows = self._rows(n)
        ran = [c for c in alive if c in rows and rows[c].quality is not None and rows[c].kv_share is not None]
        if not ran:
            reasons = {p for c in alive if c in rows for p in rows[c].problems}
            raise InputError(f"no method could be measured: {'; '.join(sorted(reasons)) or 'none ran'}; name others")
        return sorted(ran, key=lambda c: (rows[c].kv_share > self.memory, -rows[c].quality, rows[c].kv_share))

    def _speeds(self, hands: Crew, alive: list[Config]) -> dict[Config, tuple[float, float]]:
        """Seconds of reading and decode steps a second, one sequence alone, of dense and the last candidates on one text."""
        sample = max((s for samples in self.asked.values() for s in samples), key=lambda s: len(s.context))
        filler = (sample.context * 16)[:16]  # any tokens tell the pace
        configs, out = [self.configs[0], *alive], {}
        work = [Texts((c.method,), ((sample, filler),), alone=True) for c in configs]
        for i, found in hands.each(work, at_once=1):
            if not isinstance(found, Lost) and not isinstance(found[0], Failed):
                (got,) = found[0]
                steps = sorted(got.steps_s[1:])
                out[configs[i]] = got.prefill_s, 1 / steps[len(steps) // 2]
        return out


def _work(task: Task, part: tuple[Sample, ...], methods: tuple, beside: tuple) -> Questions | Texts:
    if task.kind == "generate":
        asked: tuple[Asked, ...] = tuple((task, s) for s in part)
        return Questions(methods, asked, beside)
    return Texts(methods, tuple((s, tuple(s.target)) for s in part), beside)


__all__ = ["Tuning", "candidates", "tune"]
