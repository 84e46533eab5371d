"""Who does the work: this process, or a pool of workers that come, answer and die."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FovealError, InputError

TRIES = 3
"""Times a cell is given to a worker that then dies, and times in a row that workers may fail to start, before it is given up."""
PATIENCE = 300.0
"""Seconds without a single worker: a large model takes its time to arrive, and a busy machine its own to start."""


@dataclass(frozen=True)
class Lost:
    """In place of a result: the workers that had the cell died."""

    why: str


class WorkersError(FovealError):
    """Workers cannot start or are all gone; what was finished is kept."""


class Crew(ABC):
    """Workers, as a context; `size` of them work at once. `machines` describes those that came to work."""

    size: int = 1

    def __init__(self) -> None:
        self.machines: list[Any] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def each(
        self, cells: Sequence[Any], begin: Callable[[int], None] | None = None, at_once: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """(number of the cell, its result or Lost) for each cell, as they get done; at most `at_once` of them under way.

        begin: called with the number of a cell when a worker is given it. An exception of a worker is raised here. Raises
        WorkersError where no worker can be had.
        """

    @abstractmethod
    def close(self) -> None:
        """Send the workers home."""

    def _came(self, machine: Any) -> None:
        if machine is not None and machine not in self.machines:
            self.machines.append(machine)


class Here(Crew):
    """This process, which is the only worker."""

    def __init__(self, worker: Callable[[Any], Any]):
        super().__init__()
        self.worker = worker
        self._came(getattr(worker, "machine", None))

    def each(self, cells, begin=None, at_once=None):
        for i, cell in enumerate(cells):
            if begin is not None:
                begin(i)
            yield i, self.worker(cell)

    def close(self):
        self.worker = None


class Died(Exception):
    """A worker is gone."""


class Pool(Crew):
    """Hands out cells to workers that come, answer and die."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.idle: deque[Any] = deque()
        self.busy: dict[Any, int] = {}  # worker: its cell
        self.coming: set[Any] = set()
        self._failed = 0  # starts in a row

    @abstractmethod
    def _start(self) -> Any:
        """A new worker, on its way."""

    @abstractmethod
    def _send(self, worker: Any, cell: Any) -> None:
        """Let an idle worker begin."""

    @abstractmethod
    def _wait(self, workers: Sequence[Any], seconds: float) -> list[tuple[Any, Any]]:
        """(worker, what it says: its machine if it just came, (done, result or exception), or Died) of those that say something."""

    @abstractmethod
    def _stop(self, worker: Any) -> None:
        """Send a worker away, also a dead one."""

    def each(self, cells, begin=None, at_once=None):
        limit = min(at_once or self.size, self.size)
        waiting, tries = deque(range(len(cells))), [0] * len(cells)
        heard = time.monotonic()
        try:
            while waiting or self.busy:
                wanted = min(limit, len(waiting) + len(self.busy))  # each holds a model: none comes for nothing
                while len(self.idle) + len(self.busy) + len(self.coming) < wanted:
                    self.coming.add(self._start())
                while waiting and self.idle and len(self.busy) < limit:
                    self._hand(self.idle.popleft(), i := waiting.popleft(), cells[i], begin)
                said = self._wait([*self.busy, *self.coming], 1.0)
                if said or self.idle or self.busy:
                    heard = time.monotonic()
                elif time.monotonic() - heard > PATIENCE:
                    raise WorkersError(
                        f"no worker came within {PATIENCE:.0f} seconds: ask for fewer, or see what else runs there; "
                        "the same command goes on"
                    )
                for worker, what in said:
                    if worker in self.coming:
                        self._arrived(worker, what)
                        continue
                    i = self.busy.pop(worker)
                    if not isinstance(what, Died):
                        self.idle.appendleft(worker)  # one at a time is always the same worker
                        yield i, self._value(*what)
                        continue
                    self._stop(worker)
                    tries[i] += 1
                    if tries[i] < TRIES:
                        waiting.appendleft(i)
                    else:
                        yield i, Lost(f"{TRIES} workers died on it, the last one: {what}")
        finally:  # whoever asked has enough: nobody waits for what is under way
            for worker in list(self.busy):
                del self.busy[worker]
                self._stop(worker)

    def _hand(self, worker: Any, i: int, cell: Any, begin: Callable[[int], None] | None) -> None:
        self.busy[worker] = i
        if begin is not None:
            begin(i)
        try:
            self._send(worker, cell)
        except Exception as error:
            raise InputError(
                f"a method or a task cannot be sent to other processes ({error}): put its class into a module of its own"
            ) from None

    @staticmethod
    def _value(done: bool, value: Any) -> Any:
        if not done:
            raise value
        return value

    def _arrived(self, worker: Any, what: Any) -> None:
        self.coming.discard(worker)
        if not isinstance(what, Died):
            self._failed = 0
            self.idle.append(worker)
            self._came(what)
            return
        self._stop(worker)
        self._failed += 1
        if self._failed >= TRIES and not self.idle and not self.busy:
            raise WorkersError(
                f"workers cannot start ({what}): is Foveal installed and is there memory where they run? The same command goes on"
            )

    def close(self) -> None:
        for worker in (*self.idle, *self.busy, *self.coming):
            self._stop(worker)
        self.idle.clear()
        self.busy.clear()
        self.coming.clear()
