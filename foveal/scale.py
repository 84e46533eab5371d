"""Cells of work in this process, in local processes or on a Ray cluster: the same results, whatever dies on the way.

A cell is anything that can be pickled; a worker holds the model and turns a cell into a result. Workers take the next cell when
they are done with one. The cells of a worker that dies (out of memory, a lost node) go to another one.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import signal
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch

from .errors import FovealError, InputError

TRIES = 3
"""Times a cell is given to a worker that then dies, and times in a row that workers may fail to start, before it is given up."""
PATIENCE = 120.0  # seconds without a single worker
REACH = 5.0  # seconds to reach a cluster's address

Make = Callable[[Any, Any], Callable[[Any], Any]]


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


_RECORDS = "_output_capturing_hooks_installed"


def crew(make: Make, model, tokenizer, *, workers: int | None = None, ray: str | None = None) -> Crew:
    """Workers that hold `make(model, tokenizer)`, called with one cell after another.

    workers: local processes; None or 0 is this process.  ray: a cluster instead, see `connect`; `workers` then says how many (default
    one a GPU, without GPUs one a node), and the model, given on a CPU, moves to the GPU that Ray gives each of them. A worker with the
    attribute `machine` says where it works. Raises InputError for a cluster that cannot be reached or objects that cannot be sent.
    """
    check_workers(workers)
    if ray is not None:
        return _Cluster(make, model, tokenizer, workers, ray)
    return _Processes(make, model, tokenizer, workers) if workers else _Here(make(model, tokenizer))


def check_workers(workers: int | None) -> None:
    """Raise unless it is None or a number of workers."""
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise InputError(f"workers = {workers!r}: expected how many processes, like 4, or 0 for this one")


class _Here(Crew):
    """This process."""

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


def _packed(make: Make, model, tokenizer) -> bytes:
    """What a worker needs, with the weights on the CPU."""
    if model.device.type != "cpu" or any(hasattr(m, _RECORDS) for m in model.modules()):
        model = _without_recorders(copy.deepcopy(model).cpu())
    try:
        return pickle.dumps((make, model, tokenizer))
    except Exception as error:
        raise InputError(
            f"this model or its tokenizer cannot be sent to other processes ({error}): run without workers"
        ) from None


def _without_recorders(model):
    """Whoever was asked for hidden states carries hooks of transformers that no pickle takes; new ones come where they are needed."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                    del hooks[key]
        vars(module).pop(_RECORDS, None)
    return model


def _unpacked(data: bytes, device: str, threads: int) -> Callable[[Any], Any]:
    torch.set_num_threads(threads)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # kernels are launched on the current one
    make, model, tokenizer = pickle.loads(data)
    with torch.device(
        "meta"
    ):  # transformers notes once a process, where a model is made, which outputs its class records
        type(model)(model.config)
    return make(model.to(device), tokenizer)


# ---------------------------------------------------------------------- workers that may die


class _Died(Exception):
    """A worker is gone."""


class _Pool(Crew):
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
        """(worker, what it says: its machine if it just came, (done, result or exception), or _Died) of those that say something."""

    @abstractmethod
    def _stop(self, worker: Any) -> None:
        """Send a worker away, also a dead one."""

    def each(self, cells, begin=None, at_once=None):
        limit = min(at_once or self.size, self.size)
        waiting, tries = deque(range(len(cells))), [0] * len(cells)
        heard = time.monotonic()
        try:
            while waiting or self.busy:
                while len(self.idle) + len(self.busy) + len(self.coming) < self.size:
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
                    if not isinstance(what, _Died):
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
        if not isinstance(what, _Died):
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


# ---------------------------------------------------------------------- local processes


class _Processes(_Pool):
    """Processes of this machine, on the model's device; a model on the first GPU is given to all GPUs that this process sees."""

    def __init__(self, make: Make, model, tokenizer, workers: int):
        super().__init__(workers)
        self.devices, self.threads = _devices(model.device), max(1, torch.get_num_threads() // workers)
        self.folder = tempfile.TemporaryDirectory(prefix="foveal-")
        self.file = Path(self.folder.name) / "worker"
        try:
            self.file.write_bytes(_packed(make, model, tokenizer))
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
                said.append((worker, _Died(f"a process ended with code {worker.process.exitcode}")))
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
    worker = _unpacked(Path(file).read_bytes(), device, threads)
    pipe.send(getattr(worker, "machine", None))
    while True:
        try:
            cell = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        pipe.send(_outcome(worker, cell))


def _outcome(worker: Callable[[Any], Any], cell: Any) -> tuple[bool, Any]:
    """(True, result) or (False, exception), in a form that can be sent."""
    try:
        return True, worker(cell)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = FovealError(f"{type(error).__name__}: {error}")
        return False, error


# ---------------------------------------------------------------------- a Ray cluster


def connect(address: str) -> bool:
    """Join the Ray cluster at an address, "auto" being the one that runs here or stands in RAY_ADDRESS, "local" a new one here.

    Returns whether this call joined it (and `ray.shutdown` is due). Raises InputError without Ray and for what cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise InputError("Ray is not installed: run pip install 'foveal[ray]', or leave out --ray") from None
    if ray.is_initialized():
        return False
    if address not in ("auto", "local"):
        _check_reach(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except Exception as error:
        if address == "local":
            raise InputError(f"Ray cannot start here ({type(error).__name__}: {error})") from None
        what = "no Ray cluster runs here" if address == "auto" else f"{address} is no Ray cluster that can be joined"
        raise InputError(
            f"{what} ({type(error).__name__}: {str(error).strip().splitlines()[0]:.200}): give its address, or 'local' to start one"
        ) from None
    return True


def _check_reach(address: str) -> None:
    """Ray itself tries for minutes, and may end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(
            f"'{address}' is no address of a Ray cluster: give host:port, ray://host:port, 'auto' or 'local'"
        )
    try:
        socket.create_connection((host, int(port)), REACH).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot reach a Ray cluster at {address} ({error}): check that it runs and the port"
        ) from None


def has_gpus() -> bool:
    """Whether the cluster that was joined has GPUs."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


class _Cluster(_Pool):
    """Actors of a Ray cluster."""

    def __init__(self, make: Make, model, tokenizer, workers: int | None, address: str):
        self.joined = connect(address)
        import ray

        self.ray, whole = ray, ray.cluster_resources()
        gpus, cpus = int(whole.get("GPU", 0)), int(whole.get("CPU", 0))
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
        size = workers or gpus or len(nodes) or 1
        super().__init__(size)
        # Workers that share a GPU ask for a part of it; without GPUs each asks for its part of a node's cores.
        each = min((int(n["CPU"]) for n in nodes), default=1)
        threads = max(1, min(each, cpus // size))
        part = min(1.0, int(1000 * gpus / size) / 1000)
        self.options = {"num_gpus": part, "num_cpus": 0.01} if gpus else {"num_cpus": threads}
        self.options |= {"scheduling_strategy": "SPREAD", "max_restarts": 0}
        self.start = (ray.put(_packed(make, model, tokenizer)), "cuda" if gpus else "cpu", 1 if gpus else threads)
        self.refs: dict[Any, Any] = {}  # what is awaited: its worker

    def _start(self):
        worker = self.ray.remote(**self.options)(_Actor).remote(*self.start)
        self.refs[worker.machine.remote()] = worker
        return worker

    def _send(self, worker, cell):
        self.refs[worker.do.remote(pickle.dumps(cell))] = worker

    def _wait(self, workers, seconds):
        ready, _ = self.ray.wait(list(self.refs), num_returns=1, timeout=seconds)
        said = []
        for ref in ready:
            worker = self.refs.pop(ref)
            try:
                said.append((worker, self.ray.get(ref)))
            except self.ray.exceptions.RayError as error:
                said.append((worker, _Died(str(error).strip().splitlines()[0])))
        return said

    def _stop(self, worker):
        self.refs = {ref: w for ref, w in self.refs.items() if w is not worker}
        with contextlib.suppress(Exception):
            self.ray.kill(worker)

    def close(self):
        super().close()
        if self.joined:
            self.ray.shutdown()


class _Actor:
    """A worker on a Ray cluster."""

    def __init__(self, data: bytes, device: str, threads: int):
        self.worker = _unpacked(data, device, threads)

    def machine(self) -> Any:
        return getattr(self.worker, "machine", None)

    def do(self, cell: bytes) -> tuple[bool, Any]:
        return _outcome(self.worker, pickle.loads(cell))
