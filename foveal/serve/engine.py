"""The engine: one step reads a piece of one prompt and decodes one token of every running sequence.

Prompts are cut at multiples of `chunk` counted from their own beginning, never by what else is going on, and every sequence has its
own keys, positions and random numbers. So what a request comes to does not depend on who runs beside it, except for the rounding
of matrix products over batches of other sizes: log-probabilities agree within 1e-4 in float32 (so the tests; about 2e-6 as a rule),
and greedy tokens are the same unless two are that close.

Where several processes hold the model together (`ranks`), each runs an engine over its own heads, and all take the same steps: rank 0
says who has come and who is over, and chooses the tokens; the bytes of a cache are those of the rank where it is largest.

Not for use from several threads; `Worker` runs it in one.
"""

from __future__ import annotations

import inspect
import logging
import time
import traceback
from collections import Counter, deque
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..attach import attach
from ..cache import Store
from ..method import Method
from ..spec import written
from ..store import Layout
from .batch import Batch
from .menu import Gate, Menu, end_tokens, token_bytes
from .prefix import Prefixes
from .ranks import Alone, First, Other
from .reader import Reader
from .request import Event, Finish, Request, Stats, Stream, Usage
from .sampling import Choice, Chooser, choose
from .scheduler import Live, Scheduler
from .sight import Pictures, try_methods
from .text import Text

log = logging.getLogger(__name__)
CHUNK = {"cpu": 256, "cuda": 2048}
LATELY = 5.0  # seconds over which speed is counted
TRIES = 2  # times a sequence may be in a step that fails


def where(error: BaseException) -> str:
    """What kind of exception, and the lines it came through, innermost first; never its words, which may quote a prompt."""
    places = reversed(traceback.extract_tb(error.__traceback__)[-4:])
    return f"{type(error).__name__} in {' < '.join(f'{p.filename}:{p.lineno}' for p in places)}"


class Engine:
    """`model` attached, and whoever uses it. Parameters as in `Worker`; memory is shared out evenly to the ranks."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        *,
        method: str | Method | None = None,
        budget: float | int | None = None,
        allow: Mapping[str, str] | None = None,
        budgets: Sequence[float | int] = (),
        memory: int = 2 << 30,
        max_running: int = 64,
        context: int | None = None,
        chunk: int | None = None,
        layout: Layout | None = None,
        prefix: bool = True,
        ranks: Alone | First | Other | None = None,
        sees: bool = False,
    ):
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.ranks = ranks or Alone()
        memory //= self.ranks.count
        self.menu = Menu(method, budget, allow or {}, budgets)
        alone = self.ranks.count == 1  # a captured step would hold the exchange between processes
        self.session = attach(model, self.menu.pick(None, None), layout=layout, graphs=alone)
        try:
            for m in self.menu:
                self.session.use(m)  # sets it up: what it needs and the model lacks is said now
            self.schedule = Scheduler(memory, max_running)
            self.gate = Gate(self.session, self.menu, self.schedule.usable, context)
            if sees:
                try_methods(self.session, self.menu)
        except Exception:
            self.session.close()
            raise
        chunk = chunk or CHUNK.get(self.device.type, CHUNK["cuda"])
        self.prefixes = Prefixes(chunk, memory // 2, self.ranks.most) if prefix else None
        self.reader = Reader(self.session, self._forward, chunk, self.prefixes)
        self.batches: list[Batch] = []
        self.ends = end_tokens(model, tokenizer)
        self.only_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.used = self.held = self.steps = self.prompt_tokens = self.completion_tokens = 0
        self.busy_seconds = self.model_seconds = 0.0
        self.finished: Counter[str] = Counter()
        self._lately: deque[tuple[float, int]] = deque()
        self._come: list[Request] = []  # of which the other ranks have not heard

    # ------------------------------------------------------------------ requests come

    def make(self, request: Request, stream: Stream, pictures: Pictures | None = None) -> Live:
        """A request that `gate` lets through, ready for `schedule.add`; pictures: what its prompt shows. From any thread."""
        method, most = self.gate.check(request)
        text = Text(self._decode_text, request.sampling.stop)
        size = token_bytes(self.session, method)
        chooser = Chooser(request.sampling)
        return Live(request, stream, method, written(method), most, size, text, chooser, pictures=pictures)

    def add(self, live: Live) -> None:
        """Queue it."""
        self.schedule.add(live)
        if self.ranks.count > 1:
            self._come.append(live.request)

    def _decode_text(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # ------------------------------------------------------------------ one step

    def step(self) -> None:
        """Let go of who is over, make room, read a chunk, decode a token each."""
        over = self.schedule.ended(time.monotonic())
        come, self._come = self._come, []
        self.ranks.tell("step", come, [(live.request.id, why) for live, why in over])
        self._step(over)

    def follow(self) -> None:
        """On another rank: do what rank 0 does, until it says that it is over."""
        while (told := self.ranks.hear())[0] != "close":
            if told[0] == "kept":
                self._kept(told[1])
                continue
            _, come, over = told
            for request in come:
                self.schedule.add(self.make(request, Stream(request)))
            known = {live.request.id: live for live in self.schedule.all()}
            self._step([(known[id], why) for id, why in over])

    @torch.no_grad()
    def _step(self, over: Sequence[tuple[Live, Finish]]) -> None:
        start = time.perf_counter()
        self._finish(over)
        self._admit()
        self._read()
        for batch in list(self.batches):
            self._decode(batch)
        self._count()
        self._relieve()
        self.steps += 1
        self.busy_seconds += time.perf_counter() - start

    def _count(self) -> None:
        stores = [b.store for b in self.batches]
        if self.schedule.reading is not None and self.schedule.reading.store is not None:
            stores.append(self.schedule.reading.store)
        self.held = self.ranks.most(sum(s.nbytes for s in stores))
        self.used = self.held + (self.prefixes.nbytes if self.prefixes else 0)

    def _relieve(self) -> None:
        """Where the next step may outgrow what is usable: let go of what nobody runs on, then the youngest step back."""
        while self.used + self._growth() > self.schedule.usable:
            if self._spare():
                continue
            victim = self.schedule.victim()
            if victim is not None:
                self._leave([victim])
                self.schedule.back(victim)
                for b in self.batches:
                    b.trim(now=True)
                self._count()
            elif self.schedule.running and self.used > self.schedule.usable:
                self._finish([(self.schedule.running[0], "length")])  # alone, and still too large
            else:
                return

    def _growth(self, newcomer: Live | None = None) -> int:
        """Bytes by which the caches may grow in one step, and by the places that somebody brings along."""
        joined = None if newcomer is None else self._batch(newcomer.method)
        return sum(b.growth for b in self.batches) + (0 if joined is None else joined.more * joined.place_bytes)

    def _spare(self) -> bool:
        """Give back memory held for growth or kept prefixes; False when there was nothing."""
        before = self.used
        for b in self.batches:
            b.trim()
        self._count()
        if self.used < before:
            return True
        dropped = self.prefixes is not None and self.prefixes.drop_oldest()
        self._count()
        return dropped

    def _admit(self) -> None:
        live = self.schedule.next()
        if live is None:
            return
        while not (fits := self.schedule.fits(live, self.used + self._growth(live))) and self._spare():
            pass
        if fits or not self.schedule.running:
            self.schedule.start(live)
            live.begun = live.begun or time.monotonic()

    # ------------------------------------------------------------------ reading prompts

    def _read(self) -> None:
        live = self.schedule.reading
        if live is None:
            return
        try:
            self.session.use(live.method)
            logits = self._timed(self.reader.read, live, self.schedule.usable - self.used)
            self._count()
            if logits is None:
                return
            self.prompt_tokens += len(live.request.prompt_ids) if not live.tokens else 0
            if not live.tokens and self._accept([live], self._timed(self._choose, logits, [live])):
                return
            self._join(live)
        except Exception as error:
            self._failed([live], error)

    def _join(self, live: Live) -> None:
        """A prompt is read: decode it with the others of its method."""
        store, live.store = live.store, None
        batch = self._batch(live.method)
        if batch is None:
            self.batches.append(Batch(live.method, live, store, self.schedule.max_running))
        else:
            batch.enter(live, store)
        self.schedule.run(live)
        self._count()

    def _batch(self, method: Method | None) -> Batch | None:
        return next((b for b in self.batches if b.method is method and b.has_room()), None)

    # ------------------------------------------------------------------ decoding

    def _decode(self, batch: Batch) -> None:
        try:
            self.session.use(batch.method)
            inputs = batch.inputs(self.device)
            for live in batch.members:
                live.fed += 1
            due = [(b, x) for b, x in enumerate(batch.places) if x is not None and x.fed == len(x.tokens)]
            choices = self._timed(self._next_tokens, batch.store, inputs, due)
        except Exception as error:
            self._failed(batch.members, error)
            return
        self._accept([live for _, live in due], choices)

    def _next_tokens(self, store: Store, inputs: dict, due: list[tuple[int, Live]]) -> list[Choice]:
        logits = self._forward(store, **inputs)
        if not due:  # all are being fed what they had generated before
            return []
        if len(due) < len(logits):
            logits = logits[[b for b, _ in due]]
        return self._choose(logits, [live for _, live in due])

    def _choose(self, logits: torch.Tensor, lives: Sequence[Live]) -> list[Choice]:
        return self.ranks.same(lambda: choose(logits, [live.chooser for live in lives]))

    def _forward(self, store: Store, **inputs) -> torch.Tensor:
        more = {"logits_to_keep": 1} if self.only_last else {}
        return self.model(**inputs, past_key_values=store, use_cache=True, **more).logits[:, -1]

    def _timed(self, work, *args, **kwargs):
        start = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self.model_seconds += time.perf_counter() - start

    def _accept(self, lives: Sequence[Live], choices: Sequence[Choice]) -> list[Live]:
        """Hand out new tokens; returns those that are done with it, and lets them go."""
        over: list[tuple[Live, Finish]] = []
        for live, choice in zip(lives, choices, strict=True):
            live.tokens.append(choice.token)
            if choice.token in self.ends:
                over.append((live, "stop"))
                continue
            shown, stopped = live.text.add(choice.token)
            live.stream.put(Event("token", choice.token, shown, choice.logprob, choice.top))
            if stopped or len(live.tokens) >= live.max_tokens:
                over.append((live, "stop" if stopped else "length"))
        self.completion_tokens += len(choices)
        self._lately.append((time.monotonic(), len(choices)))
        self._finish(over)
        return [live for live, _ in over]

    # ------------------------------------------------------------------ requests go

    def _finish(self, over: Sequence[tuple[Live, Finish]]) -> None:
        if not over:
            return
        usages = [self._usage(live) for live, _ in over]
        self._leave([live for live, _ in over])
        for (live, why), usage in zip(over, usages, strict=True):
            self.finished[why] += 1
            live.stream.put(Event("end", text=live.text.flush(), finish=why, usage=usage))

    def _usage(self, live: Live) -> Usage:
        kept = self._kept(live.request.id) or [[0]]
        mean = sum(map(sum, kept)) / max(1, sum(map(len, kept)))
        return Usage(len(live.request.prompt_ids), len(live.tokens), live.cached, round(mean), live.queued)

    def _leave(self, lives: Sequence[Live]) -> None:
        """Free what they hold, whatever they were doing."""
        for batch in list(self.batches):
            if all(live in lives for live in batch.members):
                self._drop(batch)
            else:
                batch.leave(lives)
        for live in lives:
            live.store = None
            self.schedule.remove(live)
        self.session.store = None
        self._count()

    def _drop(self, batch: Batch) -> None:
        self.batches.remove(batch)
        self.session.use(batch.method)
        if self.session.graphs is not None:  # a captured graph holds on to the memory it was recorded against
            self.session.graphs.captured = None

    def _failed(self, lives: Sequence[Live], error: Exception) -> None:
        """A step failed: its caches are half-way between two tokens, so all in it begin anew, once; then they are told."""
        if "CUDA error" in str(error) or self.ranks.count > 1:
            raise error  # nothing works in this process any more; or the other ranks, which may not have failed, wait for its part
        log.warning("a step with %d requests failed: %s", len(lives), where(error))
        self._leave(lives)
        for live in lives:
            live.failures += 1
            if live.failures < TRIES:
                self.schedule.back(live)
            else:
                self.finished["error"] += 1
                live.stream.put(Event("error", text=f"the engine failed on this request: {type(error).__name__}"))

    # ------------------------------------------------------------------ what is going on

    def kept(self, id: str) -> list[list[int]] | None:
        """Keys held per layer and KV head, [layers][kv_heads]; None for who holds none."""
        self.ranks.tell("kept", id)
        return self._kept(id)

    def _kept(self, id: str) -> list[list[int]] | None:
        """The heads of all ranks, whose engines are all asked now."""
        found = self.ranks.gather(self._own_kept(id))
        return None if None in found else [[n for own in layer for n in own] for layer in zip(*found, strict=True)]

    def _own_kept(self, id: str) -> list[list[int]] | None:
        for batch in self.batches:
            for live in batch.members:
                if live.request.id == id:
                    return batch.kept(live)
        reading = self.schedule.reading
        if reading is not None and reading.request.id == id and reading.store is not None and reading.store.counts:
            return reading.store.lengths[:, 0].tolist()
        return None

    def stats(self) -> Stats:
        now = time.monotonic()
        while self._lately and self._lately[0][0] < now - LATELY:
            self._lately.popleft()
        lives = [*self.schedule.running, *([self.schedule.reading] if self.schedule.reading else [])]
        return Stats(
            running=len(lives),
            waiting=len(self.schedule.waiting),
            bytes_used=self.held * self.ranks.count,
            prefix_bytes=(self.used - self.held) * self.ranks.count,
            bytes_limit=self.schedule.limit * self.ranks.count,
            dense_bytes=sum((x.read + x.fed) * x.token_bytes for x in lives) * self.ranks.count,
            tokens_per_second=sum(n for _, n in self._lately) / LATELY,
            preemptions=self.schedule.preemptions,
            prefix_hits=self.prefixes.hits if self.prefixes else 0,
            prefix_queries=self.prefixes.queries if self.prefixes else 0,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.reader.cached,
            scheduling=1 - self.model_seconds / self.busy_seconds if self.busy_seconds else 0.0,
            steps=self.steps,
            finished=dict(self.finished),
        )

    def close(self) -> None:
        """Let go of everything and leave the model as it was found."""
        self.batches.clear()
        self.schedule.clear()
        if self.prefixes is not None:
            self.prefixes.clear()
        self.held = self.used = 0
        self.session.close()
