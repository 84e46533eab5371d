"""Where experiments measure: one model, arms asked once, prompts read densely once for all arms that can share the reading."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..attach import Session, attach
from ..cache import Store
from ..compare.ask import TOGETHER
from ..compare.drive import answer
from ..heads import HeadRoles, roles_for
from ..method import STATISTICS, Method, get_method, iterate
from ..replay import Recording, can_replay, record
from ..spec import written
from ..tasks import Sample, Task, get_task
from .experiments import DENSE, Cell, Experiment

QUESTIONS, TEXTS, SCORED = 20, 4, 64
"""Questions of a task, texts to go on with, and tokens scored of each text."""
PROMPT, STEPS = 96, 8  # tokens read and decoded where logits are compared
QUICK = {"length": 384, "questions": 2, "prompts": 1, "answer": 8, "texts": 1, "scored": 8}
"""The most a quick run asks. `prompts`: questions that are part of a prompt; `answer`: tokens of an answer, as many as a needle's."""
RANDOM = "{random}"
_RECORDINGS = 1 << 31  # bytes of readings kept for the next claims


@dataclass(frozen=True)
class Arm:
    """What one arm gave on one cell.

    values: a score for each question, or nats for each predicted token.  sign: +1 where higher is better.  bounded: values lie
    in [0, 1].  bytes: resident after the prompt, as a share of dense.  reads: keys read in a decode step, as a share of all.
    documents: prompts read.
    """

    values: list[float]
    sign: int
    bounded: bool
    bytes: float
    reads: float
    documents: int

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def signed(self) -> list[float]:
        return [self.sign * x for x in self.values]

    @property
    def unit(self) -> str:
        return "share of answers" if self.sign > 0 else "nats per token"


def named(arm: str, roles: str = "random.json") -> Method | None:
    """The method of an arm in text form; `roles` is the file that '{random}' stands for, which nothing opens yet."""
    return None if arm == DENSE else get_method(arm.replace(RANDOM, roles))


class Lab:
    """One model and the samples it is asked.

    planned: the experiments to come; the statistics their arms need are computed while a prompt is read for the first time.
    quick: ask little (see QUICK).  tick: called with a line before each measurement.
    """

    def __init__(
        self,
        model,
        tokenizer,
        planned: Iterable[Experiment] = (),
        *,
        seed: int = 0,
        quick: bool = False,
        tick: Callable[[str], None] | None = None,
    ):
        self.model, self.tokenizer, self.seed, self.quick = model, tokenizer, seed, quick
        self.tick = tick or (lambda line: None)
        self._wanted: dict[Cell, list[Method | None]] = {}
        for arm, cell in (pair for e in planned for pair in e.arms()):
            if cell is not None and can_replay(method := named(arm)):
                self._wanted.setdefault(self._fit(cell), []).append(method)
        self._samples: dict[Cell, tuple[Task, list[Sample]]] = {}
        self._arms: dict[tuple[str, Cell], Arm] = {}
        self._logits: dict[str, Tensor] = {}
        self._recordings: dict[tuple, Recording] = {}

    # ------------------------------------------------------------------ what experiments ask for

    def scores(self, arm: str | Method, cell: Cell) -> Arm:
        """What an arm gives on a cell; the same question is measured once."""
        method, cell = self.method(arm), self._fit(cell)
        name = arm if isinstance(arm, str) else f"{arm.name} {len(getattr(arm, 'heads', ()))} heads"
        self.tick(f"{name}: {cell.task} at {cell.length:,} tokens")
        key = (written(method), cell)
        if key not in self._arms:
            with torch.no_grad():
                self._arms[key] = self._measure(method, cell)
        return self._arms[key]

    def logits(self, arm: str) -> Tensor:
        """Logits of the last tokens of a prompt and of the decode steps after it, [2 * STEPS, vocabulary], float32."""
        self.tick(f"{arm}: logits")
        if arm not in self._logits:
            with torch.no_grad():
                self._logits[arm] = self._step(self.method(arm))
        return self._logits[arm]

    def _step(self, method: Method | None) -> Tensor:
        task = get_task("perplexity", max_new_tokens=STEPS)
        (sample,) = task.samples(self.tokenizer, PROMPT + STEPS, 1, self.seed, positions=self._positions)
        ids = torch.tensor([[*sample.context, *sample.question, *sample.target]], device=self.model.device)
        with attach(self.model, method):
            got = self.model(ids[:, :PROMPT], logits_to_keep=STEPS)
            rows, store = [got.logits[0]], got.past_key_values
            for i in range(PROMPT, PROMPT + STEPS):
                rows.append(self.model(ids[:, i : i + 1], past_key_values=store).logits[0])
        return torch.cat(rows).float()

    def ablations(self, score: str, count: int, draws: int, mode: str) -> list[Method]:
        """Methods that take out the `count` best heads by a score, then, for each draw, as many random heads outside of these."""
        roles = roles_for(self.model)
        best = [(layer, head) for layer, head, _ in roles.best(score, count)]
        mask = torch.zeros_like(roles[score], dtype=torch.bool)
        mask[tuple(zip(*best, strict=True))] = True
        drawn = [roles.random_like(mask, self.seed + i, outside=mask).nonzero().tolist() for i in range(draws)]
        return [get_method("ablate", heads=tuple(map(tuple, heads)), mode=mode) for heads in (best, *drawn)]

    def method(self, arm: str | Method) -> Method | None:
        """The method of an arm; '{random}' becomes a file with shuffled head roles."""
        if isinstance(arm, Method):
            return arm
        return named(arm, str(self._shuffled) if RANDOM in arm else "")

    @cached_property
    def _shuffled(self) -> Path:
        """Head roles whose KV heads, with all their scores, changed places at random."""
        self._folder = tempfile.TemporaryDirectory()
        roles = roles_for(self.model)
        rows, groups = list(roles.measured), roles.identity["kv_heads"]
        order = torch.randperm(len(rows) * groups, generator=torch.Generator().manual_seed(self.seed))
        scores = {name: x.clone() for name, x in roles.scores.items()}
        for x in scores.values():
            heads = x[rows].unflatten(1, (groups, -1)).flatten(0, 1)
            x[rows] = heads[order].unflatten(0, (len(rows), groups)).flatten(1)
        shuffled = HeadRoles(
            roles.identity, scores, {"control": "KV heads shuffled", "seed": self.seed}, roles.measured
        )
        return shuffled.save(Path(self._folder.name) / "random.json")

    # ------------------------------------------------------------------ samples

    @property
    def _positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _fit(self, cell: Cell) -> Cell:
        """The cell with its number of samples, in a quick run with less of everything."""
        asked = self._task(cell.task).kind == "generate"
        n = cell.n or (QUESTIONS if asked else TEXTS)
        if self.quick:
            most = QUICK["texts" if not asked else "prompts" if cell.query_aware else "questions"]
            return cell._replace(n=min(n, most), length=min(cell.length, QUICK["length"]))
        return cell._replace(n=n)

    def _task(self, name: str) -> Task:
        options = {}
        if name == "needle":  # a few questions on one document: one reading serves them all
            options = {"per_context": QUICK["questions"] if self.quick else 4}
        if name == "perplexity":
            options = {"max_new_tokens": QUICK["scored"] if self.quick else SCORED}
        task = get_task(name, **options)
        if self.quick and task.kind == "generate":
            return replace(task, max_new_tokens=min(task.max_new_tokens, QUICK["answer"]))
        return task

    def _asked(self, cell: Cell) -> tuple[Task, list[Sample]]:
        if cell not in self._samples:
            task, seed = self._task(cell.task), self.seed + cell.draw
            samples = task.samples(
                self.tokenizer, cell.length, cell.n, seed, cell.query_aware, positions=self._positions
            )
            self._samples[cell] = task, samples
        return self._samples[cell]

    # ------------------------------------------------------------------ measuring

    def _measure(self, method: Method | None, cell: Cell) -> Arm:
        task, samples = self._asked(cell)
        values, held, reads = [], [], []
        for chunk in _chunks(samples):
            shared = {s.context: self._read(s.context, cell, method) for s in chunk} if can_replay(method) else {}
            with attach(self.model, method) as session:
                stores: dict[tuple, Store] = {}
                for context in dict.fromkeys(s.context for s in chunk):
                    if context in shared:
                        stores[context] = shared[context].replay(session)[0]
                    else:
                        ids = torch.tensor([context], device=self.model.device)
                        stores[context] = self.model(ids, logits_to_keep=1).past_key_values
                shares = [s.lengths.double().mean().item() / int(s.seen[0]) for s in stores.values()]
                held += [s.nbytes / s.dense_nbytes for s in stores.values()]
                values += self._go_on(session, task, chunk, stores)
                reads.append((session.read_share or 1.0) * sum(shares) / len(shares))
        return Arm(
            values,
            sign=1 if task.better == "higher" else -1,
            bounded=task.kind == "generate",
            bytes=sum(held) / len(held),
            reads=sum(reads) / len(reads),
            documents=len(held),
        )

    def _read(self, context: tuple[int, ...], cell: Cell, method: Method | None) -> Recording:
        """A dense reading with the statistics that this arm and all planned ones need on the cell, kept for the next arm."""
        key = (context, cell)
        known = self._recordings.get(key)
        if known is None or not _statistics(method) <= set(next(iter(known.layers.values())).stats):
            self._recordings.pop(key, None)
            ids = torch.tensor([context], device=self.model.device)
            known = record(self.model, ids, [*self._wanted.get(cell, []), method])
            self._remember(key, known)
        return known

    def _remember(self, key: tuple, reading: Recording) -> None:
        """Keep a reading if there is room. Those of other cells make way, those of its own do not: every arm goes through a cell from its
        first text on, so what would make way is what the next arm asks for first."""
        room = _RECORDINGS - _size(reading)
        for other in [k for k in self._recordings if k[1] != key[1]]:
            if self._held() <= room:
                break
            del self._recordings[other]
        if self._held() <= room:
            self._recordings[key] = reading

    def _held(self) -> int:
        return sum(map(_size, self._recordings.values()))

    def _go_on(self, session: Session, task: Task, chunk: list[Sample], stores: dict[tuple, Store]) -> list[float]:
        """Scores of the answers, or nats of the tokens, from caches that hold the contexts."""
        forks = [stores[s.context].fork() for s in chunk]
        # Layers with a window cannot hold prompts of different lengths: there each is answered alone.
        alone = len(forks[0].managed) < len(forks[0].layers)
        if task.kind == "nll":
            alone = alone or len({(len(s.question), len(s.target)) for s in chunk}) > 1
        size, out = 1 if alone else len(chunk), []
        for i in range(0, len(chunk), size):
            part, store = chunk[i : i + size], Store.join(forks[i : i + size])
            if task.kind == "generate":
                found = answer(self.model, store, [s.question for s in part], task.max_new_tokens, self._stops)
                texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
                out += [task.score(s, text) for s, text in zip(part, texts, strict=True)]
            else:
                rows = follow(self.model, store, [(*s.question, *s.target) for s in part])
                nats = [row[-len(s.target) :] for s, row in zip(part, rows, strict=True)]
                for sample, row in zip(part, nats, strict=True):
                    score = task.score(sample, row)
                    plain = math.isclose(score, math.fsum(row) / len(row), rel_tol=1e-9)
                    out += row if plain else [score]  # a mean over all tokens is resampled by token
        return out

    @cached_property
    def _stops(self) -> set[int]:
        stops = self.model.generation_config.eos_token_id
        return set(stops) if isinstance(stops, list) else {stops}


def follow(model, store: Store, tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    """Feed rows of tokens, all of one length, column by column to a batch; nats of each next token given those before."""
    ids, losses = torch.tensor(tokens, device=model.device), []
    for i in range(ids.shape[1] - 1):
        at = store.seen.to(model.device)[:, None]
        logits = model(ids[:, i : i + 1], past_key_values=store, position_ids=at).logits[:, -1].float()
        losses.append(-logits.log_softmax(-1).gather(1, ids[:, i + 1 : i + 2]))
    return torch.cat(losses, 1).tolist()


def _chunks(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Samples in batches of about `TOGETHER`, those on one document never apart."""
    chunk: list[Sample] = []
    for sample in samples:
        if len(chunk) >= TOGETHER and sample.context != chunk[-1].context:
            yield chunk
            chunk = []
        chunk.append(sample)
    yield chunk


def _statistics(method: Method | None) -> set[str]:
    needs = frozenset().union(*(m.needs for m in iterate(method)))
    return {need for need in needs if need.partition(":")[0] in STATISTICS}


def _size(recording: Recording) -> int:
    tensors = [x for r in recording.layers.values() for x in (r.q, r.k, r.v, *r.stats.values())]
    return recording.store.nbytes + sum(x.nbytes for x in tensors)
