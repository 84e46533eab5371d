"""The engine in a thread of its own: what a server, a chat or a test holds in its hand."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..method import Budget, Method
from ..store import Layout
from .engine import Engine
from .ranks import Alone, First
from .request import Event, Full, Request, Stats, Stream, Unavailable
from .scheduler import Live
from .sight import Pictures, Sight

LONGEST_WAIT = 60  # seconds to come back after, at most


class Worker:
    """Runs the engine on `model` in a thread; every method below may be called from any thread and returns at once unless it says so.

    method, budget: the server's own, like `foveal.get_method` takes them (None: dense; budget None: the method's own). allow: the names
    a request may give as `method` and the specification each stands for, "snapkv(budget=0.25)" or "dense". budgets: what a request may give
    as `budget`. memory: bytes for all caches together. max_waiting: requests that may wait; max_running: that decode together;
    max_per_key: live requests of one API key (None: no limit). context: positions offered (None: the model's). chunk: prompt tokens
    read between two decode steps (None: 256 on a CPU, 2,048 on a GPU). layout: as in `foveal.attach`. prefix: reuse prompt prefixes.
    ranks: the processes that hold the model together with this one, as `foveal.serve.together.start` makes them; the worker ends them.
    sight: of a model that reads images, which prompts may then show.
    Raises InputError or UnsupportedModel before anything starts: unknown method, or memory that cannot hold a single short request.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        method: str | Method | None = None,
        budget: Budget | None = None,
        allow: Mapping[str, str] | None = None,
        budgets: Sequence[Budget] = (),
        memory: int = 2 << 30,
        max_waiting: int = 64,
        max_running: int = 64,
        max_per_key: int | None = None,
        context: int | None = None,
        chunk: int | None = None,
        layout: Layout | None = None,
        prefix: bool = True,
        ranks: First | None = None,
        sight: Sight | None = None,
    ):
        if type(memory) is not int or memory < 1 or max_waiting < 1 or max_running < 1:
            raise InputError("memory, max_waiting and max_running must be whole numbers of at least 1")
        self.tokenizer, self.max_waiting, self.max_per_key = tokenizer, max_waiting, max_per_key
        settings = {"method": method, "budget": budget, "allow": allow, "budgets": budgets, "memory": memory}
        settings |= {"max_running": max_running, "context": context, "chunk": chunk, "layout": layout, "prefix": prefix}
        self.ranks, self.sight = ranks or Alone(), sight
        settings["sees"] = sight is not None
        self._make = lambda: Engine(model, tokenizer, ranks=self.ranks, **settings)
        self._news = threading.Condition()  # guards everything below
        self._engine: Engine | None = None
        self._start()
        if ranks is not None:
            ranks.on_lost = self._lost

    def _start(self) -> None:
        self._engine = self._make()
        self._inbox: list[Live] = []
        self._asked: list[tuple[str, Future]] = []
        self._live: dict[str, Live] = {}
        self._keys: Counter[str] = Counter()
        self._closing = self._draining = False
        self._why: str | None = None
        self._stats = self._engine.stats()
        self._thread = threading.Thread(target=self._run, args=(self._engine,), name="foveal-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ from any thread

    def submit(self, request: Request, pictures: Pictures | None = None) -> Stream:
        """Queue a request, with the images of its prompt, which it uses until its last event. Raises TooLong, NotAllowed or InputError
        for what can never run, Full (with `retry_after`) when the queue or the key's share is full, Unavailable when draining, closed
        or dead."""
        with self._news:
            self._check_open()
            engine = self._engine
        engine.gate.check(request)
        with self._news:
            self._check_open()
            if request.id in self._live:
                raise InputError(f"a request with id '{request.id[:64]}' is running: give every request its own")
            if self.max_per_key is not None and self._keys[request.key] >= self.max_per_key:
                raise Full(f"this key has {self.max_per_key} requests running or waiting, which is all it may have", 1)
            if self._waiting() >= self.max_waiting:
                raise Full(
                    f"{self.max_waiting} requests are waiting, which is all the queue holds", self._retry_after()
                )
            live = engine.make(request, Stream(request), pictures)
            live.stream.on_cancel = lambda: self._cancel(live)
            live.stream.on_done = lambda: self._forget(live)
            self._live[request.id] = live
            self._keys[request.key] += 1
            self._inbox.append(live)
            if pictures is not None:
                pictures.join()
            self._news.notify_all()
        return live.stream

    def stats(self) -> Stats:
        """Counts as they are now, bytes and speed as of the end of the engine's latest step."""
        with self._news:
            e, waiting = self._engine, self._waiting()
            return replace(
                self._stats,
                alive=self.alive,
                draining=self._draining,
                why=self._why,
                waiting=min(waiting, len(self._live)),
                running=max(len(self._live) - waiting, 0),
                tokens_per_second=self._stats.tokens_per_second if self._live else 0.0,
                finished=dict(e.finished),
                prompt_tokens=e.prompt_tokens,
                completion_tokens=e.completion_tokens,
                cached_tokens=e.reader.cached,
            )

    def kept(self, id: str, timeout: float = 5.0) -> list[list[int]] | None:
        """Keys held per layer and KV head for a running request, [layers][kv_heads]; None where there is no such request. Waits for the
        end of the current step: in an asyncio loop call it through `asyncio.to_thread`."""
        with self._news:
            if not self.alive or id not in self._live:
                return None
            answer: Future = Future()
            self._asked.append((id, answer))
            self._news.notify_all()
        try:
            return answer.result(timeout)
        except TookTooLong:
            return None

    @property
    def alive(self) -> bool:
        """The engine's thread runs and has not died."""
        return self._why is None and not self._closing and self._thread.is_alive()

    @property
    def full(self) -> bool:
        """Nothing more may wait."""
        with self._news:
            return self._waiting() >= self.max_waiting

    @property
    def methods(self) -> dict[str, str]:
        """Names a request may give, with the specification each stands for; the server's own is under "default"."""
        return self._engine.menu.specs

    @property
    def context(self) -> int:
        """Positions offered: prompt and answer together."""
        return self._engine.gate.context

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until those accepted are done: True, or False after `timeout` seconds or when the engine dies."""
        with self._news:
            self._draining = True
            self._news.wait_for(lambda: not self._live or not self.alive, timeout)
            return not self._live and self.alive

    def close(self) -> None:
        """End now: requests still running get an error event, the model is left as it was found. Waits for the thread."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        # Where another rank is gone, the thread may wait for its part for long: it ends with the process.
        self._thread.join(None if self._why is None or self.ranks.count == 1 else 5.0)

    def restart(self) -> None:
        """A fresh engine on the same model, after death or close; requests that were lost got their error event when it died."""
        if self.alive:
            raise Unavailable("the engine is alive: close it before restarting")
        if self.ranks.count > 1:
            raise Unavailable("the processes that held the model together have ended: start the server anew")
        self.close()
        self._start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._why is not None:
            raise Unavailable(f"the engine has stopped ({self._why}): restart it")
        if not self.alive or self._draining:
            raise Unavailable("the server is shutting down: send the request elsewhere")

    def _waiting(self) -> int:
        return len(self._inbox) + len(self._engine.schedule.waiting)

    def _retry_after(self) -> int:
        """Seconds until a place in the queue may be free: the tokens asked for by those who wait, at the present speed."""
        ahead = sum(live.max_tokens for live in self._live.values()) / max(1, len(self._live))
        return min(LONGEST_WAIT, max(1, math.ceil(ahead / max(self._stats.tokens_per_second, 1))))

    def _cancel(self, live: Live) -> None:
        live.cancelled = True
        with self._news:
            self._news.notify_all()

    def _forget(self, live: Live) -> None:
        with self._news:
            known = self._live.pop(live.request.id, None) is not None
            if known:
                self._keys[live.request.key] -= 1
                if not self._keys[live.request.key]:
                    del self._keys[live.request.key]
            self._news.notify_all()
        if known and live.pictures is not None:
            live.pictures.leave()

    # ------------------------------------------------------------------ the engine's thread

    def _run(self, engine: Engine) -> None:
        try:
            while self._wait(engine):
                if engine.schedule.busy:
                    engine.step()
                self._report(engine)
        except BaseException as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"[:300]
            self._why = self._why or self.ranks.fate() or why
        finally:
            self._end(engine)

    def _wait(self, engine: Engine) -> bool:
        """Take in what has come; sleep while there is nothing to do. False when it is time to end."""
        with self._news:
            self._news.wait_for(lambda: self._closing or self._inbox or self._asked or engine.schedule.busy)
            for live in self._inbox:
                engine.add(live)
            self._inbox.clear()
            return not self._closing

    def _report(self, engine: Engine) -> None:
        with self._news:
            asked, self._asked = self._asked, []
        for id, answer in asked:
            answer.set_result(engine.kept(id))
        self._stats = engine.stats()

    def _end(self, engine: Engine) -> None:
        """Nobody is left waiting for an engine that is gone."""
        self._give_up(engine)
        engine.close()
        self.ranks.close(gently=self._why is None)
        self._stats = engine.stats()
        with self._news:
            self._news.notify_all()

    def _give_up(self, engine: Engine) -> None:
        lost = f"the engine stopped ({self._why})" if self._why else "the server is shutting down"
        with self._news:
            lives = list(self._live.values())
            self._live.clear()
            self._keys.clear()
            asked, self._asked = self._asked, []
            self._inbox.clear()
            if lives:
                engine.finished["error"] += len(lives)
        for live in lives:
            live.stream.put(Event("error", text=lost))
            if live.pictures is not None:
                live.pictures.leave()
        for _, answer in asked:
            answer.set_result(None)

    def _lost(self, why: str) -> None:
        """Another rank is gone, and the engine's thread may wait for its part for long: nobody is to wait for the thread."""
        self._why = self._why or why
        self._give_up(self._engine)
        with self._news:
            self._news.notify_all()
