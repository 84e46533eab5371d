"""Captured decode: on a GPU a decode step is hundreds of small launches, replayed as one CUDA graph.

The decoder's own `forward` is replaced while a session lasts, so `generate`, a server and a plain call all gain. Steps of one
kind (shapes, and what the method's `begin` answered) share a graph, recorded once the kind has come often enough, so a schedule
that goes from one kind to another and back replays both. What a graph cannot hold (a method that looks at the device, a layer
that grows its own cache) runs as before, and `Graphs.why` says why.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .cache import ACTIVE, Store, StoreLayer
from .once import Once
from .ops.route import has_triton

if TYPE_CHECKING:
    from .paged import PagedRows
    from .step import Pass

SETTLED = 4  # steps of one kind, in one cache, before a capture pays
MOST = 8  # graphs at a time: of a method with more kinds of steps, each comes seldom
AHEAD = 64  # keys a row can grow by, at least, before memory moves and a new capture is due
_STATIC = ("input_ids", "position_ids")
_DROPPED = ("attention_mask", "cache_position", "past_key_values")


@dataclass
class Captured:
    """One graph: its inputs and outputs, and the memory it was recorded against."""

    rows: list[PagedRows]
    generations: list[int]
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    output: ModelOutput
    read: int
    held: int
    lost: list[bool]  # which rows let keys go, so that the host cannot count them
    horizon: int | None  # tokens a sequence may have seen, where a share of them fixed a shape

    def fits(self, rows: list[PagedRows], seen: int) -> bool:
        return (
            (self.horizon is None or seen <= self.horizon)
            and all(a is b for a, b in zip(self.rows, rows, strict=True))
            and self.generations == [c.generation for c in rows]
        )


class Graphs:
    """Stands in for `decoder.forward` and replays decode steps."""

    def __init__(self, plain: Callable[..., Any]):
        self.plain = plain
        self.why: str | None = None  # why some kind of step is never captured
        self.captured: dict[tuple, Captured] | None = None  # by kind of step; they hold on to the cache's memory
        self._refused: set[tuple] = set()  # answers of `begin` to which a step asks the host
        self._cache: weakref.ref | None = None  # the one that the latest step was for, by its first layer
        self._came: Counter[tuple] = Counter()  # steps of each kind since its last capture, replayed or not

    @staticmethod
    def possible() -> bool:
        """There is a GPU, and kernels for it."""
        return torch.cuda.is_available() and has_triton()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward pass, captured where that is possible."""
        pass_ = ACTIVE.get()
        if args or pass_ is None or _answers(pass_) in self._refused or not _fits(pass_, kwargs):
            return self.plain(*args, **kwargs)
        rows = [rows.classes[0] for rows in pass_.store.rows]
        key = _key(pass_, kwargs)
        captured = self._usable(pass_, rows, extra=1)
        self._came[key] += 1
        if key in captured:
            return _replay(captured[key], pass_, kwargs)
        if self._came[key] <= SETTLED or len(captured) >= MOST:
            return self.plain(*args, **kwargs)
        return self._begin(pass_, kwargs, key, rows)

    def _usable(self, pass_: Pass, rows: list[PagedRows], extra: int) -> dict[tuple, Captured]:
        """Room for `extra` keys, and the graphs that hold there; the others go, and with them the memory they knew.

        Memory that moves as rows grow, at a time of its own in each layer, says nothing of what comes: a kind that came often is
        recorded again at once, in the next cache too. One that comes once in each cache, as with beams, never settles.
        """
        for c in rows:
            c.reserve(extra)
        cache = weakref.ref(pass_.store.rows[0])
        if cache != self._cache:
            self._cache, self._came = cache, Counter({key: n for key, n in self._came.items() if n > SETTLED})
        seen = max(pass_.counts) + 1
        fit = {key: g for key, g in (self.captured or {}).items() if g.fits(rows, seen)}
        self.captured = fit or None
        return fit

    def _begin(self, pass_: Pass, kwargs: dict, key: tuple, rows: list[PagedRows]) -> Any:
        """Run this step with lengths hidden from the host, then record the next one like it."""
        captured = self._usable(pass_, rows, extra=AHEAD)
        self._came[key] = 0
        device, begun = kwargs["input_ids"].device, dict(pass_.state)
        inputs = {name: x.to(device, copy=True) for name, x in _now(pass_, kwargs).items()}
        rest = {k: v for k, v in kwargs.items() if k not in (*_STATIC, "attention_mask", "cache_position")}
        static = rest | {name: inputs[name] for name in _STATIC}
        lengths_hidden = partial(hidden, pass_, rows, inputs["counts"])
        with lengths_hidden():
            output = self.plain(**static)  # a real step: compiles kernels, fills what is lazily made
        before = _host_state(pass_.store, rows)
        done, pass_.state = pass_.state, begun  # what methods left there belongs to the step that is over
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            reads = (pass_.read, pass_.held)
            pool = next((g.graph.pool() for g in captured.values()), None)  # one replay at a time: they may share
            with lengths_hidden(), torch.cuda.graph(graph, pool=pool):
                recorded = self.plain(**static)
        except Exception as error:
            first = error.__context__ or error  # ending a failed capture raises once more
            self._refused.add(_answers(pass_))
            self.why = f"{type(first).__name__}: {str(first).splitlines()[0]}"
            warnings.warn(f"decode runs without a CUDA graph, because a step asks the host: {self.why}", stacklevel=2)
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream in place
            torch.cuda.synchronize()
            _recover()
        else:
            read, held = pass_.read - reads[0], pass_.held - reads[1]
            horizon, generations = pass_.horizon if pass_.bounded else None, [c.generation for c in rows]
            lost = [c.lost for c in rows]
            new = Captured(rows, generations, graph, inputs, recorded, read, held, lost, horizon)
            self.captured = captured | {key: new}
        pass_.state = done
        _restore(pass_.store, rows, before)
        return output


def _answers(pass_: Pass) -> tuple:
    return tuple(pass_.key.items())


def _key(pass_: Pass, kwargs: dict) -> tuple:
    """The kind of a step: what its shapes and kernels follow from."""
    others = tuple(sorted((k, v) for k, v in kwargs.items() if k not in (*_STATIC, *_DROPPED)))
    shape = None if kwargs.get("position_ids") is None else tuple(kwargs["position_ids"].shape)
    return (tuple(kwargs["input_ids"].shape), shape, _answers(pass_), others)


def _now(pass_: Pass, kwargs: dict) -> dict[str, Tensor]:
    """This step's numbers as a graph reads them; `counts` are still on the host."""
    ids, position = kwargs["input_ids"], kwargs.get("position_ids")
    if position is None:  # as the model itself counts: columns of the batch
        position = torch.full(ids.shape, pass_.store.get_seq_length(), device=ids.device)
    return {"input_ids": ids, "position_ids": position, "counts": torch.tensor(pass_.counts, dtype=torch.int32)}


def _replay(g: Captured, pass_: Pass, kwargs: dict) -> Any:
    now = _now(pass_, kwargs)
    for name in _STATIC:
        g.inputs[name].copy_(now[name])
    g.inputs["counts"].copy_(now["counts"].pin_memory(), non_blocking=True)
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
    pass_.on_device, pass_.once = counts, Once()
    pass_.horizon = max(pass_.counts) + min(c.capacity - c._bound for c in rows)
    known = [c.host for c in rows]
    for c in rows:
        c.fixed, c.host, c.lost = True, None, False
    try:
        yield
    finally:
        pass_.on_device, pass_.once = None, Once()
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
