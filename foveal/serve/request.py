"""What goes into the engine and what comes out of it: plain data, checked before it is queued."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..errors import FovealError, InputError

MOST_LOGPROBS = 20  # what OpenAI's API allows
MOST_STOPS = 4

Finish = Literal["stop", "length", "cancelled", "deadline"]


def _number(name: str, value: float, low: float, high: float) -> None:
    ok = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    )
    if not ok:
        raise InputError(f"{name} = {value!r:.40}: expected a number from {low} to {high}")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"{name} = {value!r:.40}: expected a whole number from {low} to {high}")


def _text(name: str, value: str) -> None:
    """JSON between processes holds what UTF-8 can, and a lone surrogate is none of it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} = {value!r:.60}: expected text that UTF-8 can hold") from None


class TooLong(InputError):
    """The prompt does not fit the model's context; `prompt` and `limit` are in tokens."""

    def __init__(self, prompt: int, limit: int):
        super().__init__(
            f"the prompt has {prompt:,} tokens, but the context has {limit:,} and the answer needs one of them: shorten the prompt"
        )
        self.prompt, self.limit = prompt, limit

    def __reduce__(self):
        return TooLong, (self.prompt, self.limit)


class NotAllowed(InputError):
    """The request names a method or budget that this server does not offer."""


class Full(FovealError):
    """The queue, or this key's share of it, is full; `retry_after` is in whole seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self):
        return Full, (str(self), self.retry_after)


class Unavailable(FovealError):
    """The engine takes no requests: it is draining, closed or dead."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_p, seed and penalties then change nothing but the penalised logits.

    seed: None draws one; the tokens of a seed do not depend on other requests' seeds. stop: up to 4 strings, never part of the text.
    logprobs: None, or how many of the likeliest tokens (0 to 20) each token event lists besides its own log-probability; those are the
    model's under the method, before penalties, temperature and top_p. Penalties are OpenAI's: over the tokens generated so far, not the
    prompt. Raises InputError for values outside the ranges.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 2)
        _number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise InputError("top_p = 0: expected a number above 0; for greedy decoding set temperature to 0")
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _whole("max_tokens", self.max_tokens, 1, 2**31)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop = {self.stop!r:.60}: expected a tuple of strings that are not empty")
        if len(self.stop) > MOST_STOPS:
            raise InputError(f"stop has {len(self.stop)} strings: expected at most {MOST_STOPS}")
        for text in self.stop:
            _text("stop", text)


@dataclass(frozen=True)
class Request:
    """One generation. `id` is unique among live requests; prompt_ids are tokens, templates already applied.

    method: a name of the server's allow-list (None: the server's own). budget: one of the server's `budgets` (None: the method's own).
    key: the API key's id: prefixes are reused and limits counted within it. deadline: a `time.monotonic()` value after which the
    request ends with finish "deadline" (None: never). Raises InputError for an id or a key that UTF-8 cannot hold.
    """

    id: str
    prompt_ids: list[int]
    sampling: Sampling = Sampling()
    method: str | None = None
    budget: float | int | None = None
    key: str = ""
    deadline: float | None = None

    def __post_init__(self) -> None:
        _text("id", self.id)
        _text("key", self.key)


@dataclass(frozen=True)
class Usage:
    """prompt: tokens of the prompt. completion: tokens generated, an end-of-text token included. cached: prompt tokens taken from
    the prefix cache. kept: keys held for this request when it ended, the mean over layers and KV heads, rounded. queued: seconds from
    submission until its prompt began to be read, or until it ended before that."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    kept: int = 0
    queued: float = 0.0


@dataclass(frozen=True)
class Event:
    """token: one token; `text` is what can be shown with it (it may be empty, or belong to earlier tokens). end: the last event, with
    `finish`, `usage` and any text still held back. error: the last event instead, `text` says why in one sentence.

    logprob and top (pairs of token id and log-probability, best first) are there where `Sampling.logprobs` asked. An end-of-text
    token has no token event. The texts of all events joined are the whole answer.
    """

    kind: Literal["token", "end", "error"]
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None


class Stream:
    """The events of one request, for one reader: `async for event in stream` in an asyncio loop, or a plain `for` elsewhere.

    The engine never waits for the reader; what waits to be read is bounded by the request's max_tokens.
    """

    def __init__(self, request: Request):
        self.request = request
        self.on_cancel: Callable[[], None] = lambda: None
        self.on_done: Callable[[], None] = lambda: None
        self.done = False  # the last event was put
        self._events: deque[Event] = deque()
        self._arrived = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._finished = False  # the last event was read

    def cancel(self) -> None:
        """Stop: memory is free within one step of the engine, the last event says "cancelled". Harmless when over; any thread."""
        self.on_cancel()

    def put(self, event: Event) -> None:
        """For the engine: hand over an event, from any thread."""
        with self._arrived:
            if self.done:
                return
            self.done = event.kind != "token"
            self._events.append(event)
            self._arrived.notify()
            loop, wake = self._loop, self._wake
        if event.kind != "token":
            self.on_done()
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(wake.set)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        if self._finished:
            raise StopIteration
        with self._arrived:
            self._arrived.wait_for(lambda: self._events)
            return self._pop()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        if self._finished:
            raise StopAsyncIteration
        while True:
            with self._arrived:
                if self._loop is None:
                    self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
                if self._events:
                    return self._pop()
                self._wake.clear()
            await self._wake.wait()

    def _pop(self) -> Event:
        event = self._events.popleft()
        self._finished = event.kind != "token"
        return event


@dataclass(frozen=True)
class Stats:
    """The engine at one moment; counters grow until the engine is made anew.

    bytes_used: keys, values and what else the caches of running requests have allocated. prefix_bytes: those of kept prefixes, which
    make way when requests need the room; both together stay below bytes_limit. dense_bytes: what a cache that
    keeps everything would need for the same tokens. tokens_per_second: generated, over the last few seconds. scheduling: share of the
    engine's busy time that was not spent in the model.
    """

    alive: bool = True
    draining: bool = False
    running: int = 0
    waiting: int = 0
    bytes_used: int = 0
    prefix_bytes: int = 0
    bytes_limit: int = 0
    dense_bytes: int = 0
    tokens_per_second: float = 0.0
    preemptions: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    scheduling: float = 0.0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    """How many requests ended, by finish reason or "error"."""
    why: str | None = None
    """Why the engine died, if it did."""
