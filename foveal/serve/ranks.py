"""The processes that hold one model together, and the few words a step between them: rank 0 serves, the others do as it does.

torch.distributed adds up what they compute (gloo on a CPU, NCCL on GPUs). What they decide by goes over pairs of local sockets, as JSON
(`wire.py`). A rank that is lost takes the whole with it: half a model cannot be repaired, only started anew.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import FovealError, InputError
from .sampling import Choice
from .wire import ALL_BROUGHT, BROUGHT, CHOSEN, ORDER, Brought, Failed, Form, Garbled, Wire

log = logging.getLogger("foveal.serve")
_PATIENCE = 10.0  # seconds that the others have to end
_STUCK = timedelta(minutes=10)  # that a rank waits for another one which is alive
# What such a process runs; it holds nothing that an interpreter would have to clear away, which takes seconds.
_FOLLOW = "import os, sys; from foveal.serve.together import follow; os._exit(follow(*sys.argv[1:]))"


class Alone:
    """The only process that holds a model. count: how many there are; rank: which of them this is."""

    count, rank = 1, 0

    def tell(self, *message: Any) -> None:
        """From rank 0 to all others."""

    def same(self, make: Callable[[], list[Choice]]) -> list[Choice]:
        """What `make` returns on rank 0, on every rank."""
        return make()

    def gather(self, mine: Brought) -> list[Brought]:
        """What each rank brings, on every rank."""
        return [mine]

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers, on every rank."""
        return max(self.gather(number))

    def fate(self) -> str | None:
        """Which rank is gone, and how, where that may be why something failed just now."""

    def close(self, gently: bool = True) -> None:
        """Leave the group; rank 0 ends the others, gently where they wait for a word."""


class First(Alone):
    """Rank 0 of several, which starts the others. `on_lost` hears which one is gone, and how, in another thread, before anybody does."""

    def __init__(self, count: int):
        self.count = count
        self._fate: str | None = None
        self._lost = threading.Event()
        self.on_lost: Callable[[str], None] = lambda why: None
        self._closing = False
        self._folder = tempfile.TemporaryDirectory(prefix="foveal-ranks-")
        self._lifeline = os.pipe()
        self._links: list[Wire] = []
        self._others: list[subprocess.Popen] = []
        for rank in range(1, count):
            self._start(rank)

    def _start(self, rank: int) -> None:
        mine, its = socket.socketpair()
        with its:
            numbers = (its.fileno(), self._lifeline[0])
            command = [sys.executable, "-c", _FOLLOW, *map(str, (rank, self.count, *numbers)), self._folder.name]
            self._others.append(subprocess.Popen(command, pass_fds=numbers, stdin=subprocess.DEVNULL))
        self._links.append(Wire(mine.detach()))
        threading.Thread(target=self._watch, args=(rank,), name=f"foveal-rank-{rank}", daemon=True).start()

    def meet(self, device: str) -> None:
        """Begin torch.distributed, which waits until the others do."""
        _meet(self._folder.name, 0, self.count, device)

    def tell(self, *message: Any) -> None:
        """To all others."""
        self._say(message)

    def _say(self, message: Any) -> None:
        for link in self._links:
            link.say(message)

    def same(self, make: Callable[[], list[Choice]]) -> list[Choice]:
        """What `make` returns here."""
        made = make()
        self._say(made)
        return made

    def gather(self, mine: Brought) -> list[Brought]:
        """Raises InputError with what a rank said that could not start."""
        found = [mine, *map(_heard, self._links)]
        self._say(found)
        return found

    def explained(self, error: Exception) -> Exception:
        """Why a start failed: what another rank said of it, or that it is gone, else the error itself."""
        if isinstance(error, FovealError):
            return error
        for link in self._links:
            try:
                while link.waits(0.5):
                    _heard(link)
            except InputError as said:
                return said
            except (EOFError, OSError, Garbled):
                continue
        fate = self.fate()
        return error if fate is None else RuntimeError(f"{fate} before the model was loaded")

    def fate(self) -> str | None:
        """Waits a moment, for a link is seen to be cut sooner than a process to have ended."""
        self._lost.wait(1.0)
        return self._fate

    def _watch(self, rank: int) -> None:
        code = self._others[rank - 1].wait()
        if self._closing or self._fate is not None:
            return
        why = f"rank {rank} of {self.count} ended with exit code {code}"
        log.error("%s, and the others with it", why)
        self._folder.cleanup()
        self.on_lost(why)
        self._fate = why
        self._lost.set()
        self._kill()

    def _kill(self) -> None:
        for other in self._others:
            if other.poll() is None:
                other.kill()

    def close(self, gently: bool = True) -> None:
        """End the others, gently where they wait for a word."""
        if self._closing:
            return
        self._closing = True
        with suppress(OSError, subprocess.TimeoutExpired):
            if gently and self._fate is None:
                self.tell("close")
                for other in self._others:
                    other.wait(_PATIENCE)
        self._kill()
        for link in self._links:
            link.close()
        for end in self._lifeline:
            os.close(end)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()


class Other(Alone):
    """Another rank. link: to rank 0. lifeline: a pipe that closes when rank 0 is gone, which ends this process then whatever it does;
    folder is removed with it."""

    def __init__(self, rank: int, count: int, link: int, lifeline: int, folder: str):
        self.rank, self.count, self._folder = rank, count, folder
        self._link = Wire(link)
        for number in (signal.SIGINT, signal.SIGTERM):  # those to stop are for rank 0, which tells the others in time
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._end_with, args=(lifeline,), name="lifeline", daemon=True).start()

    def _end_with(self, lifeline: int) -> None:
        os.read(lifeline, 1)  # returns when the other end is closed
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)  # a collective that waits for rank 0 cannot be left in another way

    def meet(self, device: str) -> None:
        """Begin torch.distributed."""
        _meet(self._folder, self.rank, self.count, device)

    def hear(self, form: Form = ORDER) -> tuple:
        """What rank 0 tells next."""
        return self._link.hear(form)

    def same(self, make: Callable[[], list[Choice]]) -> list[Choice]:
        """What rank 0 made."""
        return self._link.hear(CHOSEN)

    def gather(self, mine: Brought) -> list[Brought]:
        """As for all."""
        self._link.say(mine)
        return self._link.hear(ALL_BROUGHT)

    def fail(self, sentence: str) -> None:
        """Say why this rank cannot start."""
        with suppress(OSError):
            self._link.say(Failed(sentence))

    def close(self, gently: bool = True) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def _heard(link: Wire) -> Brought:
    found = link.hear(BROUGHT)
    if isinstance(found, Failed):
        raise InputError(found.sentence)
    return found


def _meet(folder: str, rank: int, count: int, device: str) -> None:
    """Over a file that only this user can reach; what follows goes over the loopback, or between the GPUs of this machine."""
    if sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    os.environ["LOCAL_RANK"] = str(rank)  # by which transformers finds a rank's GPU
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=dist.FileStore(str(Path(folder) / "meeting"), count),
        rank=rank,
        world_size=count,
        timeout=_STUCK,
        device_id=torch.device("cuda", rank) if gpu else None,
    )
