"""Workers that are actors of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from typing import Any

from ..errors import InputError
from .parcel import Make, outcome, packed, unpacked
from .pool import Died, Pool

REACH = 5.0  # seconds to reach a cluster's address
SETTINGS = b"\x04"  # the type of the frame that an HTTP/2 connection begins with on both sides (RFC 9113, 3.4 and 6.5)
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)
"""Ray's servers speak gRPC, which is HTTP/2: what else listens at a port does not answer this with settings of its own."""


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
        with socket.create_connection((host, int(port)), REACH) as line:
            known = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")  # then nothing can be told
            if not known:
                line.settimeout(REACH)
                line.sendall(HELLO)
                known = line.recv(9)[3:4] == SETTINGS
    except (OSError, OverflowError) as error:
        raise InputError(
            f"cannot reach a Ray cluster at {address} ({error}): check that it runs and the port"
        ) from None
    if not known:
        raise InputError(f"what answers at {address} is no Ray cluster: check the host and the port")


def has_gpus() -> bool:
    """Whether the cluster that was joined has GPUs."""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


class Cluster(Pool):
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
        self.start = (ray.put(packed(make, model, tokenizer)), "cuda" if gpus else "cpu", 1 if gpus else threads)
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
                said.append((worker, Died(str(error).strip().splitlines()[0])))
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
        self.worker = unpacked(data, device, threads)

    def machine(self) -> Any:
        return getattr(self.worker, "machine", None)

    def do(self, cell: bytes) -> tuple[bool, Any]:
        return outcome(self.worker, pickle.loads(cell))
