"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import tempfile
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .parcel import Make, outcome, packed, unpacked
from .pool import Died, Pool

MOST_PER_CORE = 16
"""Processes a core that are still taken for meant: several share a GPU, but a thousand only fill the memory."""


class Processes(Pool):
    """Processes of this machine, on the model's device; a model on the first GPU is given to all GPUs that this process sees.

    Raises InputError for more than `MOST_PER_CORE` processes a core.
    """

    def __init__(self, make: Make, model, tokenizer, workers: int):
        most = MOST_PER_CORE * (os.cpu_count() or 1)
        if workers > most:
            raise InputError(
                f"workers = {workers:,}: this machine has {most // MOST_PER_CORE} cores, and each process holds a model of its "
                f"own; ask for at most {most}"
            )
        super().__init__(workers)
        self.devices, self.threads = _devices(model.device), max(1, torch.get_num_threads() // workers)
        self.folder = tempfile.TemporaryDirectory(prefix="foveal-")
        self.file = Path(self.folder.name) / "worker"
        try:
            self.file.write_bytes(packed(make, model, tokenizer))
        except BaseException:
            self.folder.cleanup()
            raise

    def _start(self):
        ours, theirs = get_context("spawn").Pipe()
        taken = [w.device for w in (*self.idle, *self.busy, *self.coming)]
        device = min(self.devices, key=taken.count)
        process = get_context("spawn").Process(
            target=_serve, args=(theirs, str(self.file), device, self.threads), daemon=True
        )
        process.start()
        theirs.close()
        return _Process(process, ours, device)

    def _send(self, worker, cell):
        data = pickle.dumps(cell)
        with contextlib.suppress(OSError):  # a death is heard by whoever waits
            worker.pipe.send_bytes(data)

    def _wait(self, workers, seconds):
        by_pipe = {w.pipe: w for w in workers}
        said = []
        for pipe in connection.wait(list(by_pipe), seconds):
            worker = by_pipe[pipe]
            try:
                said.append((worker, pipe.recv()))
            except (EOFError, OSError):
                worker.process.join(1)
                said.append((worker, Died(f"a process ended with code {worker.process.exitcode}")))
        return said

    def _stop(self, worker):
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()

    def close(self):
        super().close()
        self.folder.cleanup()


@dataclass(frozen=True, eq=False)
class _Process:
    process: Any
    pipe: connection.Connection
    device: str


def _devices(device: torch.device) -> list[str]:
    """Where workers of a model on this device may live: `cuda` and `cuda:0` stand for every GPU in sight, `cuda:1` for itself."""
    if device.type == "cuda" and not device.index:
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)]


def _serve(pipe: connection.Connection, file: str, device: str, threads: int) -> None:
    """The life of a local worker; it ends when the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of who asked
    worker = unpacked(Path(file).read_bytes(), device, threads)
    pipe.send(getattr(worker, "machine", None))
    while True:
        try:
            cell = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send(outcome(worker, cell))
