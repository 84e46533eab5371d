"""Who waits, who is read, who decodes, and who must step back when memory is short. Knows bytes and time only as numbers.

First come, first served: a prompt is read when its keys fit, and nobody overtakes the one in front. When running sequences outgrow
the memory, the youngest steps back and waits in its old place in the queue; the oldest never does, so everybody's turn comes.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .request import Finish, Request, Stream
from .sampling import Chooser
from .text import Text

if TYPE_CHECKING:
    from ..cache import Store
    from ..method import Method
    from .sight import Pictures

SLACK = 16  # rows grow by up to a sixteenth at once, so this part of the memory is never given away
AHEAD = 128  # tokens by which a sequence in pages grows at once, so each is sure to have room for as many


@dataclass(eq=False)
class Live:
    """A request on its way. `tokens` are those generated; `fed` of them the cache has seen, `read` of the prompt's.

    After stepping back both are zero again: the prompt is read anew and the tokens are fed one by one as they were the first time, so
    that a method that acts while decoding comes to the same cache.
    """

    request: Request
    stream: Stream
    method: Method | None
    spec: str
    max_tokens: int
    token_bytes: int
    text: Text
    chooser: Chooser
    order: int = 0
    tokens: list[int] = field(default_factory=list)
    read: int = 0
    fed: int = 0
    cached: int = 0
    store: Store | None = None
    cancelled: bool = False
    failures: int = 0
    pictures: Pictures | None = None
    arrived: float = field(default_factory=time.monotonic)
    begun: float | None = None  # when its prompt began to be read, the first time

    @property
    def need(self) -> int:
        """Bytes of its keys before any are let go, and of those of its next tokens."""
        return (len(self.request.prompt_ids) + len(self.tokens) + AHEAD) * self.token_bytes

    @property
    def queued(self) -> float:
        """Seconds it waited before its prompt began to be read, or until now."""
        return (time.monotonic() if self.begun is None else self.begun) - self.arrived

    def over(self, now: float) -> Finish | None:
        """Whether it must end whatever it was doing."""
        if self.cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and now >= deadline else None


class Scheduler:
    """limit: bytes of all caches. max_running: sequences that decode or are read at once."""

    def __init__(self, limit: int, max_running: int):
        self.limit, self.max_running = limit, max_running
        self.usable = limit - limit // SLACK
        self.waiting: list[Live] = []
        self.reading: Live | None = None
        self.running: list[Live] = []
        self.preemptions = 0
        self._arrived = 0

    def add(self, live: Live) -> None:
        self._arrived += 1
        live.order = self._arrived
        self.waiting.append(live)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.reading)

    def all(self) -> Iterator[Live]:
        yield from self.running
        if self.reading is not None:
            yield self.reading
        yield from self.waiting

    def ended(self, now: float) -> list[tuple[Live, Finish]]:
        """Those that were cancelled or are out of time."""
        return [(live, why) for live in self.all() if (why := live.over(now)) is not None]

    def next(self) -> Live | None:
        """Whose turn it is to be read, if anybody's: nobody else is being read, and not too many run."""
        if self.reading is not None or not self.waiting or len(self.running) >= self.max_running:
            return None
        return self.waiting[0]

    def fits(self, live: Live, taken: int) -> bool:
        """Whether its keys, before any are let go, fit beside the bytes taken by others, their growth included."""
        return taken + live.need <= self.usable

    def start(self, live: Live) -> None:
        self.waiting.remove(live)
        self.reading = live

    def run(self, live: Live) -> None:
        self.reading = None
        self.running.append(live)

    def remove(self, live: Live) -> None:
        """It is over."""
        if live is self.reading:
            self.reading = None
        for group in (self.running, self.waiting):
            if live in group:
                group.remove(live)

    def clear(self) -> None:
        self.waiting, self.running, self.reading = [], [], None

    def victim(self) -> Live | None:
        """Who steps back: the youngest of those that hold memory; None when only one does."""
        holders = [*self.running, *([self.reading] if self.reading is not None else [])]
        return max(holders, key=lambda live: live.order) if len(holders) > 1 else None

    def back(self, live: Live) -> None:
        """It gives its memory up and waits, in its old place, to begin anew."""
        self.remove(live)
        live.read = live.fed = 0
        live.store = None
        self.preemptions += 1
        insort(self.waiting, live, key=lambda x: x.order)
