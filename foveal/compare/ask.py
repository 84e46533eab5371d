"""Asking one method: contexts read once, questions over the compressed cache, turn after turn, and texts gone on with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch

from ..attach import Session, attach
from ..cache import Store
from ..method import Method
from ..replay import Recording, can_replay, record
from ..spec import written
from ..tasks import Sample, Task
from .drive import answer, follow
from .measure import Clock, Memory, explain, hardware, now, out_of_memory

TOGETHER = 10  # questions answered as one batch on a CPU
# On a GPU launches and not sequences bound a step: so many questions, of so many tokens together.
MOST, TOKENS = 64, 40_000
READINGS = (
    5  # of all texts together on a GPU, where one takes a moment and a single one may be a stray; the median counts
)
# Where the next turn begins, the last tokens of the question before may be written as others.
_SEAM = 4

Asked = tuple[Task, Sample]


@dataclass(frozen=True)
class Answers:
    """Scores and answers' read shares, one for each question; bytes resident and dense bytes for each context."""

    scores: list[float]
    reads: list[float | None]
    held: dict[tuple[int, ...], tuple[int, int]]


@dataclass(frozen=True)
class Prediction:
    """A text gone on with: nats of each target token, seconds of reading, of each step and of the attention in it (none on a GPU,
    where steps are captured whole), bytes, share of keys read."""

    losses: list[float]
    prefill_s: float
    steps_s: list[float]
    attention_s: list[float]
    peak_bytes: int
    held: tuple[int, int]
    read: float | None


@dataclass(frozen=True)
class Failed:
    """In place of an answer: what went wrong."""

    why: str


@dataclass(frozen=True)
class Questions:
    """Work: questions of kind "generate" for some methods. beside: all methods that the worker will ask the same ones, one call after
    another, so that a context is read once for them; default those of this call."""

    methods: tuple[Method | None, ...]
    asked: tuple[Asked, ...]
    beside: tuple[Method | None, ...] = ()


@dataclass(frozen=True)
class Texts:
    """Work: samples of a task, or any sample with any targets, gone on with token by token by some methods.

    alone: each method reads for itself, which tells what reading costs; else a reading is replayed where that is possible. beside: as for
    Questions.
    """

    methods: tuple[Method | None, ...]
    texts: tuple[tuple[Sample, tuple[int, ...]], ...]
    beside: tuple[Method | None, ...] = ()
    alone: bool = False


@dataclass(frozen=True)
class Unmade:
    """Work: the samples of a task at a length, see `Task.samples`; the result are these."""

    task: Task
    length: int
    count: int
    seed: int
    positions: int | None


@dataclass(frozen=True)
class Unready:
    """Work: samples of which only the dense model can tell something; the result are the samples, made ready."""

    task: Task
    samples: tuple[Sample, ...]


class Asker:
    """One model and its tokenizer, asked under one method after another; a worker of `foveal.scale`."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self._readings: tuple[tuple, dict[tuple, Recording | None]] = ((), {})
        self._room: float = float("inf")  # tokens of questions at a time, where memory has run out before

    @property
    def machine(self) -> dict:
        """Where this one works."""
        return {"device": self.device.type} | hardware(self.device)

    @torch.no_grad()
    def __call__(self, work: Questions | Texts | Unmade | Unready) -> list:
        """For each method its Answers, or a list of a Prediction for each text, or Failed; for Unmade and Unready the samples."""
        if isinstance(work, Unready):
            return work.task.prepare(self.model, list(work.samples))
        if isinstance(work, Unmade):
            return work.task.samples(self.tokenizer, work.length, work.count, work.seed, positions=work.positions)
        if isinstance(work, Questions):
            return self._asked(work)
        out = []
        for method in work.methods:
            try:
                out.append(self._told(method, work))
            except Exception as error:
                out.append(Failed(explain(error)))
        return out

    def _asked(self, work: Questions) -> list[Answers | Failed]:
        """Answers of all methods; where memory runs out, to half of the questions at a time, now and later."""
        found: list[list[Answers | Failed]] = [[] for _ in work.methods]
        waiting = [work.asked]
        while waiting:
            part = waiting.pop()
            halves = _halves(part)
            if halves and _tokens(part) > self._room:
                waiting += reversed(halves)
                continue
            got = self._together(work, part, last=not halves)
            if got is None:
                self._room = _tokens(part) - 1
                waiting.append(part)
                continue
            for mine, answers in zip(found, got, strict=True):
                mine.append(answers)
        return [_joined(mine) for mine in found]

    def _together(self, work: Questions, part: tuple[Asked, ...], last: bool) -> list[Answers | Failed] | None:
        """Answers of all methods to these questions; None where memory runs out, unless this is the `last` way to ask them."""
        contexts = tuple(dict.fromkeys(s.context for _, s in part))
        out: list[Answers | Failed] = []
        for method in work.methods:
            try:
                readings = self._shared(contexts, work.beside or work.methods) if can_replay(method) else {}
                out.append(self.ask(method, part, readings))
                continue
            except Exception as error:
                tight, why = out_of_memory(error), explain(error)
            if tight:  # out here the exception holds nothing any more
                self._readings = (), {}
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                if not last:
                    return None
            out.append(Failed(why))
        return out

    def _told(self, method: Method | None, work: Texts) -> list[Prediction]:
        found, times = [], 1
        if work.alone:
            self._readings = (), {}  # their memory is nobody's cost
            if self.device.type == "cuda":  # nor is the first time: kernels are compiled then
                self.predict(method, *work.texts[0])
                times = -(-READINGS // len(work.texts))
        for sample, targets in work.texts:
            reading = None
            if not work.alone and can_replay(method):
                reading = self._shared((sample.context,), work.beside or work.methods)[sample.context]
            found.append(self.predict(method, sample, targets, reading, times))
        return found

    def _shared(self, contexts: tuple, methods: Sequence[Method | None]) -> dict[tuple, Recording | None]:
        """Readings of these contexts, those of the latest call where they are the same; none where nobody shares them."""
        if sum(map(can_replay, methods)) < 2:
            return dict.fromkeys(contexts)
        key = contexts, tuple(map(written, methods))
        if self._readings[0] != key:
            self._readings = (), {}  # memory first
            self._readings = key, {c: self.read(c, methods) for c in contexts}
        return self._readings[1]

    def read(self, document: tuple[int, ...], methods: Sequence[Method | None]) -> Recording | None:
        """A dense reading that all of `methods` that can may replay; None where one of them spoils it for all."""
        try:
            ids = torch.tensor([document], device=self.device)
            return record(self.model, ids, [m for m in methods if can_replay(m)])
        except Exception as error:
            if out_of_memory(error):
                raise
        return None  # then each reads for itself and answers for its own failure

    def ask(self, method: Method | None, chunk: Sequence[Asked], readings: Mapping[tuple, Recording | None]) -> Answers:
        """Questions of kind "generate", each after its context was read (or replayed) and compressed.

        Later turns of a conversation go on in the cache that read the earlier ones: what the method let go for an earlier turn is
        gone. The answers of earlier turns in it are the right ones; what the model said itself is not kept.
        """
        with attach(self.model, method) as session:
            contexts = dict.fromkeys(s.context for _, s in chunk)
            stores = {c: self._store(session, c, readings.get(c)) for c in contexts}
            held = {c: (s.nbytes, s.dense_nbytes) for c, s in stores.items()}
            questions_on = Counter(s.context for _, s in chunk)
            talks: dict[tuple, Talk] = {}
            found: dict[int, list[int]] = {}
            reads: dict[int, float | None] = {}
            for group in _groups(chunk):
                forks, questions = [], []
                for i in group:
                    task, sample = chunk[i]
                    if questions_on[sample.context] == 1:
                        store, rest = stores.pop(sample.context), sample.question
                    else:
                        talk = talks.setdefault((task.name, sample.context), Talk(stores[sample.context]))
                        store, rest = talk.begin(sample.question)
                    forks.append(store)
                    questions.append(rest)
                found |= zip(group, self._answer(forks, questions, chunk[group[0]][0].max_new_tokens), strict=True)
                reads |= dict.fromkeys(group, session.read_share)
                for i in group:
                    self._go_on(chunk, i, talks)
        texts = [self.tokenizer.decode(found[i], skip_special_tokens=True) for i in range(len(chunk))]
        scores = [task.score(sample, text) for (task, sample), text in zip(chunk, texts, strict=True)]
        return Answers(scores, [reads[i] for i in range(len(chunk))], held)

    def predict(
        self,
        method: Method | None,
        sample: Sample,
        targets: Sequence[int],
        reading: Recording | None = None,
        times: int = 1,
    ) -> Prediction:
        """Read a context (or replay it, which tells no time of reading) and feed what follows token by token, one sequence alone.

        times: how often it is read, the median of which counts.
        """
        clock = Clock() if self.device.type == "cpu" else None
        with attach(self.model, method) as session, Memory(self.device) as memory:
            if clock is not None:
                session.clock = clock
            seconds = []
            for _ in range(times):
                store = None  # its memory first
                start = now(self.device)
                store = self._store(session, sample.context, reading)
                seconds.append(now(self.device) - start)
            held = store.nbytes, store.dense_nbytes
            losses, times, attending = follow(self.model, store, [*sample.question, *targets], self.device, clock)
            read = session.read_share
        return Prediction(
            losses[len(sample.question) - 1 :], median(seconds), times, attending, memory.peak, held, read
        )

    def say(self, store: Store, question: tuple[int, ...], most: int) -> list[int]:
        """The greedy answer from a cache, without its stop token unless that is all of it; the model is attached already."""
        spare = store.fork()
        (ids,) = answer(self.model, store, [question], most, self._stops)
        return ids or answer(self.model, spare, [question], 1, set())[0]

    # ------------------------------------------------------------------ parts

    def _store(self, session: Session, context: tuple[int, ...], reading: Recording | None) -> Store:
        if reading is not None and can_replay(session.method):
            return reading.replay(session)[0]
        return self.model(torch.tensor([context], device=self.device), logits_to_keep=1).past_key_values

    def _answer(self, stores: list[Store], questions: list[tuple[int, ...]], most: int) -> list[list[int]]:
        """Greedy answers; the stores are used up, and gone from the list as their sequences join a batch."""
        # Layers with a window cannot hold questions of different lengths: there each is answered alone.
        size, out = 1 if len(stores[0].managed) < len(stores[0].layers) else len(stores), []
        for i in range(0, len(stores), size):
            joined = Store.join(stores[:size])
            del stores[:size]
            out += answer(self.model, joined, questions[i : i + size], most, self._stops)
        return out

    def _go_on(self, chunk: Sequence[Asked], i: int, talks: dict[tuple, Talk]) -> None:
        """Let the conversation's cache read what turn i shares with the next one."""
        task, sample = chunk[i]
        later = (s for t, s in chunk if (t.name, s.context, s.turn) == (task.name, sample.context, sample.turn + 1))
        following = next(later, None)
        if following is not None:
            talks[task.name, sample.context].advance(self.model, sample.question, following.question)

    @cached_property
    def _stops(self) -> set[int]:
        stops = self.model.generation_config.eos_token_id
        return set(stops) if isinstance(stops, list) else {stops}


class Talk:
    """The cache of one conversation: the context, and `seen`, what was said after it so far."""

    def __init__(self, document: Store):
        self.document, self.store, self.seen = document, document, ()

    def begin(self, question: tuple[int, ...]) -> tuple[Store, tuple[int, ...]]:
        """A cache to answer in and what of the question it has not read; the document's own for what does not go on."""
        n = len(self.seen)
        if question[:n] != self.seen or len(question) == n:
            self.store, self.seen, n = self.document, (), 0
        return self.store.fork(), question[n:]

    def advance(self, model, question: tuple[int, ...], following: tuple[int, ...]) -> None:
        """Read on to where the next turn parts from this one, if it is this one's continuation at all."""
        shared = 0
        while shared < min(len(question), len(following)) and question[shared] == following[shared]:
            shared += 1
        if shared < len(question) - _SEAM or shared <= len(self.seen):
            return
        if self.store is self.document:
            self.store = self.document.fork()
        ids = torch.tensor([question[len(self.seen) : shared]], device=model.device)
        at = self.store.seen.to(model.device)[:, None] + torch.arange(ids.shape[1], device=model.device)
        model(ids, past_key_values=self.store, position_ids=at, logits_to_keep=1)
        self.seen = question[:shared]


def together(device: torch.device, length: int) -> int:
    """Questions on texts of this length that are answered as one batch."""
    return TOGETHER if device.type == "cpu" else max(1, min(MOST, TOKENS // length))


def chunks(asked: Sequence[Asked], device: torch.device) -> Iterator[list[Asked]]:
    """Questions in batches, see `together`, those on one document never apart."""
    most = together(device, max((s.length for _, s in asked), default=1))
    chunk: list[Asked] = []
    for i, (task, sample) in enumerate(asked):
        fresh = i > 0 and asked[i - 1][1].context != sample.context
        if chunk and fresh and len(chunk) >= most:
            yield chunk
            chunk = []
        chunk.append((task, sample))
    if chunk:
        yield chunk


def _halves(asked: tuple[Asked, ...]) -> list[tuple[Asked, ...]]:
    """The same questions in two parts, those on one document never apart; none where they share one."""
    contexts = list(dict.fromkeys(s.context for _, s in asked))
    first = set(contexts[: len(contexts) // 2])
    parts = [tuple(a for a in asked if (a[1].context in first) == here) for here in (True, False)]
    return parts if first else []


def _tokens(asked: tuple[Asked, ...]) -> int:
    return sum(map(len, {s.context for _, s in asked}))


def _joined(parts: list[Answers | Failed]) -> Answers | Failed:
    """Answers to the questions of all parts; what failed in one of them failed."""
    for part in parts:
        if isinstance(part, Failed):
            return part
    held = {context: bytes_ for part in parts for context, bytes_ in part.held.items()}
    return Answers([x for p in parts for x in p.scores], [x for p in parts for x in p.reads], held)


def _groups(chunk: Sequence[Asked]) -> list[list[int]]:
    """Questions answered as one batch: those of one turn that may answer equally long."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (task, sample) in enumerate(chunk):
        groups.setdefault((sample.turn, task.max_new_tokens), []).append(i)
    return [groups[key] for key in sorted(groups)]
