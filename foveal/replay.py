"""Read a prompt once for many methods.

Methods whose outputs while reading are the dense model's (`dense_prefill`) differ only in what they let go of. So one dense pass that keeps
the statistics they need is enough: each method's store is then filled and compacted from it, exactly as if it had read the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attach import Session, attach
from .errors import InputError
from .method import Method, iterate
from .ops.ragged import Logit
from .parts import let_go
from .step import Pass, Step

if TYPE_CHECKING:
    from .cache import Store


@dataclass
class LayerRecord:
    """What one layer computed for the prompt: q [1, heads, length, head_dim], k and v per KV head, statistics, how logits are made."""

    q: Tensor
    k: Tensor
    v: Tensor
    logit: Logit
    stats: dict[str, Tensor]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Recorder(Method):
    """Keeps what `replay` needs; changes nothing. `wanted` are the statistics to compute."""

    wanted: frozenset[str] = frozenset()
    layers: dict[int, LayerRecord] = field(default_factory=dict, compare=False)

    dense_prefill = True

    @property
    def needs(self) -> frozenset[str]:
        return self.wanted

    def after(self, step: Step) -> None:
        if not step.decode:
            self.layers[step.layer] = LayerRecord(
                step.q, step.k_new, step.v_new, step.logit, step.named_stats, step.seconds
            )


@dataclass
class Recording:
    """A prompt read densely: what each layer computed, and how long the pass took without the statistics.

    store: without the keys of these layers, which are kept with them; those of the layers that Foveal leaves alone are in it.
    """

    store: Store
    layers: dict[int, LayerRecord]
    ids: Tensor
    seconds: float

    def replay(self, session: Session) -> tuple[Store, float]:
        """The store the session's method would have left after reading the prompt, and the seconds reading would have taken.

        Raises InputError for a method that reads differently from the dense model.
        """
        parts = list(iterate(session.method))
        if not can_replay(session.method):
            raise InputError(
                f"{[m.name for m in parts]} reads differently from the dense model, so a dense reading cannot stand for it"
            )
        start = time.perf_counter()
        store = session.new_store()
        length = self.ids.shape[1]
        pass_ = Pass(session, store, [0], length, False, True, self.ids)
        for n, m in enumerate(parts):
            pass_.key[n] = m.begin(pass_)
        for i, recorded in self.layers.items():
            layer = store.layers[i]
            layer.rows.append(recorded.k, recorded.v, 0, pass_.once)
            layer.columns, layer.is_initialized = length, True
            step = Step(pass_, i, layer.rows, recorded.q, recorded.k, recorded.v, recorded.logit)
            active = session.active[i]
            for part in active:
                step.adopt(part.method.needs, recorded.stats)
            let_go(step, active)
        native = [i for i in range(len(self.store.layers)) if i not in self.layers]
        if native:
            copy = self.store.fork()
            for i in native:
                store.layers[i] = copy.layers[i]
        store.counts = [length]
        for m in parts:
            if "end" in m.asks:
                m.end(pass_)
        own = frozenset().union(*(m.needs for m in parts)) if parts else frozenset()
        statistics = sum(r.seconds.get(n, 0.0) for r in self.layers.values() for n in own)
        return store, self.seconds + statistics + time.perf_counter() - start


def can_replay(method: Method | None) -> bool:
    """Whether a dense reading of the prompt can stand for this method's own."""
    return all(m.dense_prefill for m in iterate(method))


@torch.no_grad()
def record(model, ids: Tensor, methods: Sequence[Method | None] = ()) -> Recording:
    """Read ids [1, length] densely, with all statistics that these methods need."""
    wanted = frozenset().union(*(m.needs for method in methods for m in iterate(method))) if methods else frozenset()
    recorder = Recorder(wanted)
    with attach(model, recorder) as session:
        _synchronise(ids)
        start = time.perf_counter()
        model(ids, logits_to_keep=1)
        _synchronise(ids)
        total = time.perf_counter() - start
        spent = sum(s for r in recorder.layers.values() for s in r.seconds.values())
        for rows in session.store.rows:
            rows.reset()
        return Recording(session.store, dict(recorder.layers), ids, total - spent)


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
