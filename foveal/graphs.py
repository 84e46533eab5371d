"""Captured decode: on a GPU a decode step is hundreds of small launches, replayed as one CUDA graph.

The decoder's own `forward` is replaced while a session lasts, so `generate`, a server and a plain call all gain. A step is
captured once its shapes have settled; whatever a graph cannot hold (a method that looks at the device, a layer that grows
its own cache) runs as before, and `Graphs.why` says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .cache import ACTIVE, Store, StoreLayer
from .ops.route import has_triton

if TYPE_CHECKING:
    from .paged import PagedRows
    from .step import Pass

SETTLED = 4  # steps of one shape before a capture pays
AHEAD = 64  # keys a row can grow by, at least, before memory moves and a new capture is due
_STATIC = ("input_ids", "position_ids")
_DROPPED = ("attention_mask", "cache_position", "past_key_values")


@dataclass
class Captured:
    """One graph: its inputs and outputs, and the memory it was recorded against."""

    key: tuple
    rows: list[PagedRows]
    generations: list[int]
    graph: torch.cuda.CUDAGraph
    output: ModelOutput
    read: int
    held: int
    lost: list[bool]  # which rows let keys go, so that the host cannot count them
    horizon: int | None  # tokens a sequence may have seen, where a share of them fixed a shape

    def fits(self, key: tuple, rows: list[PagedRows], seen: int) -> bool:
        return (
            self.key == key
            and (self.horizon is None or seen <= self.horizon)
            and all(a is b for a, b in zip(self.rows, rows, strict=True))
            and self.generations == [c.generation for c in rows]
        )


class Graphs:
    """Stands in for `decoder.forward` and replays decode steps."""

    def __init__(self, plain: Callable[..., Any]):
        self.plain = plain
        self.why: str | None = None  # why nothing is captured any more
        self.captured: Captured | None = None
        self.inputs: dict[str, Tensor] = {}
        self.counts: Tensor | None = None
        self._last: tuple | None = None
        self._settled = 0

    @staticmethod
    def possible() -> bool:
        """There is a GPU, and kernels for it."""
        return torch.cuda.is_available() and has_triton()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward pass, captured where that is possible."""
        pass_ = ACTIVE.get()
        if self.why is not None or args or pass_ is None or not _fits(pass_, kwargs):
            return self.plain(*args, **kwargs)
        rows = [rows.classes[0] for rows in pass_.store.rows]
        for c in rows:
            c.reserve(1)
        key = self._key(pass_, kwargs)
        if self.captured is not None and self.captured.fits(key, rows, max(pass_.counts) + 1):
            return self._replay(pass_, kwargs)
        self.captured = None
        self._settled = self._settled + 1 if key == self._last else 0
        self._last = key
        if self._settled < SETTLED:
            return self.plain(*args, **kwargs)
        return self._begin(pass_, kwargs, key, rows)

    def _key(self, pass_: Pass, kwargs: dict) -> tuple:
        others = tuple(sorted((k, v) for k, v in kwargs.items() if k not in (*_STATIC, *_DROPPED)))
        shape = None if kwargs.get("position_ids") is None else tuple(kwargs["position_ids"].shape)
        return (tuple(kwargs["input_ids"].shape), shape, tuple(pass_.key.items()), others)

    def _load(self, pass_: Pass, kwargs: dict) -> dict:
        """Put this step's numbers where the graph reads them."""
        ids = kwargs["input_ids"]
        counts = torch.tensor(pass_.counts, dtype=torch.int32)
        position = kwargs.get("position_ids")
        if position is None:  # as the model itself counts: columns of the batch
            position = torch.full(ids.shape, pass_.store.get_seq_length(), device=ids.device)
        now = {"input_ids": ids, "position_ids": position}
        if {k: x.shape for k, x in self.inputs.items()} != {k: x.shape for k, x in now.items()}:
            self.inputs = {name: x.clone() for name, x in now.items()}
            self.counts = counts.to(ids.device)
        for name, x in now.items():
            self.inputs[name].copy_(x)
        self.counts.copy_(counts.pin_memory(), non_blocking=True)
        rest = {k: v for k, v in kwargs.items() if k not in (*_STATIC, "attention_mask", "cache_position")}
        return {**rest, **self.inputs}

    def _begin(self, pass_: Pass, kwargs: dict, key: tuple, rows: list[PagedRows]) -> Any:
        """Run this step with lengths hidden from the host, then record the next one like it."""
        for c in rows:
            c.reserve(AHEAD)
        static, begun = self._load(pass_, kwargs), dict(pass_.state)
        lengths_hidden = partial(hidden, pass_, rows, self.counts)
        with lengths_hidden():
            output = self.plain(**static)  # a real step: compiles kernels, fills what is lazily made
        before = _host_state(pass_.store, rows)
        done, pass_.state = pass_.state, begun  # what methods left there belongs to the step that is over
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            reads = (pass_.read, pass_.held)
            with lengths_hidden(), torch.cuda.graph(graph):
                recorded = self.plain(**static)
        except Exception as error:
            first = error.__context__ or error  # ending a failed capture raises once more
            self.why = f"{type(first).__name__}: {str(first).splitlines()[0]}"
            warnings.warn(f"decode runs without a CUDA graph, because a step asks the host: {self.why}", stacklevel=2)
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream in place
            torch.cuda.synchronize()
            _recover()
        else:
            read, held = pass_.read - reads[0], pass_.held - reads[1]
            horizon, generations = pass_.horizon if pass_.bounded else None, [c.generation for c in rows]
            lost = [c.lost for c in rows]
            self.captured = Captured(key, rows, generations, graph, recorded, read, held, lost, horizon)
        pass_.state = done
        _restore(pass_.store, rows, before)
        return output

    def _replay(self, pass_: Pass, kwargs: dict) -> Any:
        g = self.captured
        self._load(pass_, kwargs)
        g.graph.replay()
        for layer in pass_.store.layers:
            layer.columns += 1
        for c, lost in zip(g.rows, g.lost, strict=True):
            c.advance(1, seen=not lost)
        pass_.read, pass_.held = g.read, g.held
        fields = {k: x.clone() if isinstance(x, Tensor) else x for k, x in g.output.items()}
        if "past_key_values" in fields:
            fields["past_key_values"] = pass_.store
        return type(g.output)(**fields)


def _recover() -> None:
    """A capture that failed leaves PyTorch's random generator inside it; one that succeeds takes it out."""
    x = torch.zeros(1, device="cuda")
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)


@contextmanager
def hidden(pass_: Pass, rows: list[PagedRows], counts: Tensor) -> Iterator[None]:
    """Inside, lengths and counts come from the device and shapes from capacities, as a graph needs them; one step is done."""
    pass_.on_device, pass_.once = counts, {}
    pass_.horizon = max(pass_.counts) + min(c.capacity - c._bound for c in rows)
    known = [c.host for c in rows]
    for c in rows:
        c.fixed, c.host, c.lost = True, None, False
    try:
        yield
    finally:
        pass_.on_device, pass_.once = None, {}
        for c, lengths in zip(rows, known, strict=True):
            c.fixed = False
            if lengths is not None and not c.lost:
                c.host = [n + 1 for n in lengths]


def _host_state(store: Store, rows: list[PagedRows]) -> list[tuple]:
    columns = [layer.columns for layer in store.layers]
    return [(n, c._bound, c.assured, c.host) for n, c in zip(columns, rows, strict=True)]


def _restore(store: Store, rows: list[PagedRows], state: list[tuple]) -> None:
    """Recording a step did its bookkeeping on the host without doing the step."""
    for layer, c, (columns, bound, assured, host) in zip(store.layers, rows, state, strict=True):
        layer.columns, c._bound, c.assured, c.host = columns, bound, assured, host


def _fits(pass_: Pass, kwargs: dict) -> bool:
    ids = kwargs.get("input_ids")
    if (
        not pass_.decode
        or torch.is_grad_enabled()
        or ids is None
        or not ids.is_cuda
        or kwargs.get("inputs_embeds") is not None
    ):
        return False
    if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
        return False
    others = (v for k, v in kwargs.items() if k not in (*_STATIC, *_DROPPED))
    if any(v is not None and not isinstance(v, (bool, int, str)) for v in others):
        return False
    layers = pass_.store.layers
    return all(isinstance(x, StoreLayer) and len(x.rows.classes) == 1 and x.rows.classes[0].paged for x in layers)
