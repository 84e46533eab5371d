"""Cells of work in this process, in local processes or on a Ray cluster: the same results, whatever dies on the way.

A cell is anything that can be pickled; a worker holds the model and turns a cell into a result. Workers take the next cell when
they are done with one. The cells of a worker that dies (out of memory, a lost node) go to another one.
"""

from __future__ import annotations

from ..errors import InputError
from .cluster import Cluster, connect, has_gpus
from .parcel import Make
from .pool import Crew, Here, Lost, WorkersError
from .processes import Processes

__all__ = ["Crew", "Lost", "Make", "WorkersError", "check_workers", "connect", "crew", "has_gpus"]


def crew(make: Make, model, tokenizer, *, workers: int | None = None, ray: str | None = None) -> Crew:
    """Workers that hold `make(model, tokenizer)`, called with one cell after another.

    workers: local processes; None or 0 is this process.  ray: a cluster instead, see `connect`; `workers` then says how many (default
    one a GPU, without GPUs one a node), and the model, given on a CPU, moves to the GPU that Ray gives each of them. A worker with the
    attribute `machine` says where it works. Raises InputError for a cluster that cannot be reached or objects that cannot be sent.
    """
    check_workers(workers)
    if ray is not None:
        return Cluster(make, model, tokenizer, workers, ray)
    return Processes(make, model, tokenizer, workers) if workers else Here(make(model, tokenizer))


def check_workers(workers: int | None) -> None:
    """Raise unless it is None or a number of workers."""
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise InputError(f"workers = {workers!r}: expected how many processes, like 4, or 0 for this one")
