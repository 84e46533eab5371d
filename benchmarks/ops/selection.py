"""Choosing what to read: a Quest-like decode step as one graph, and prefill selection beside dense prefill."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend

from foveal import ops
from foveal.ops.paged_attention import attend_ragged

from .decode import DIM, LOGIT, _query, pages_of
from .prefill import SCALE, _sdpa, inputs
from .timing import graph_us, interleaved_ms

KEYS, KEPT, ROWS = 131072, 4096, 8


def grid() -> Iterator[dict]:
    """Slots and bounds against plain sorting and products."""
    torch.manual_seed(0)
    for n, k in ((37, 5), (4096, 128), (8192, 256), (100_000, 1000)):
        scores = torch.randn(6, n, device="cuda")
        scores[0, n // 2 :] = -torch.inf
        got = ops.top_slots(scores, k)
        best = scores.topk(min(k, n), -1)
        expected = best.indices.where(best.values > -torch.inf, n).sort(-1).values
        expected = expected.where(expected < n, -1)
        yield {"case": f"top_slots {n} {k}", "error": float((got.long() != expected).float().mean())}
    q = torch.randn(8, 4, 128, device="cuda", dtype=torch.bfloat16)
    lo, hi = torch.randn(2, 8, 333, 128, device="cuda", dtype=torch.bfloat16).sort(0).values
    got = ops.page_bound(q, lo, hi)
    wide = [x.float() for x in (q, lo, hi)]
    expected = (wide[0].clamp(min=0) @ wide[2].mT + wide[0].clamp(max=0) @ wide[1].mT).amax(1, keepdim=True)
    yield {"case": "page_bound", "error": ((got - expected).norm() / expected.norm()).item()}


def run() -> Iterator[dict]:
    yield from _quest()
    for length in (65536, 131072):
        yield from _prefill(length)


def _quest() -> Iterator[dict]:
    lengths = [KEYS] * ROWS
    inputs_ = [(_query(lengths), pages_of(lengths, seed=i)) for i in range(2)]
    dense = graph_us([lambda q=q, p=p: attend_ragged(q, p, LOGIT) for q, p in inputs_])
    yield {"case": "dense decode of 128k", "us": dense, "of_dense": 1.0}
    for size in (16, 32, 64):
        pages = KEYS // size
        planes = [
            torch.randn(2, ROWS, pages, DIM, device="cuda", dtype=torch.bfloat16).sort(0).values for _ in range(6)
        ]
        steps, parts = [], {"score": [], "choose": [], "attend": []}
        for i, (lo, hi) in enumerate(planes):
            q, p = inputs_[i % 2]
            steps.append(lambda q=q, p=p, lo=lo, hi=hi, size=size: _step(q, p, lo, hi, size))
            bound = ops.page_bound(q, lo, hi, keep_first=1, keep_last=1)[:, 0]
            slots = _slots(bound, size)
            parts["score"].append(lambda q=q, lo=lo, hi=hi: ops.page_bound(q, lo, hi, keep_first=1, keep_last=1))
            parts["choose"].append(lambda bound=bound, size=size: ops.top_slots(bound, KEPT // size))
            parts["attend"].append(
                lambda q=q, p=p, slots=slots, size=size: attend_ragged(q, p, LOGIT, slots=slots, run=size)
            )
        us = graph_us(steps)
        each = {f"{name}_us": graph_us(calls) for name, calls in parts.items()}
        yield {"case": f"Quest step, pages of {size}, 4k of 128k", "us": us, "of_dense": us / dense} | each


def _slots(bound: torch.Tensor, size: int) -> torch.Tensor:
    return ops.top_slots(bound, KEPT // size) * size


def _step(q, pages, lo, hi, size: int):
    bound = ops.page_bound(q, lo, hi, keep_first=1, keep_last=1)[:, 0]
    return attend_ragged(q, pages, LOGIT, slots=_slots(bound, size), run=size)


def _prefill(length: int) -> Iterator[dict]:
    q, k, v = inputs(length)
    choose = lambda x: ops.top_blocks(x, k=max(1, length // 1280), size=128)
    calls = {
        "dense cudnn": lambda: _sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION),
        "pooled scores, top k": lambda: choose(ops.pooled_scores(q, k, 128, 128, scale=SCALE)),
        "antidiagonal scores, mass 0.9": lambda: ops.top_blocks(
            ops.antidiagonal_scores(q, k, 128, 16, scale=SCALE), mass=0.9, size=128
        ),
        "window scores of 64": lambda: ops.window_scores(q, k, 64, scale=SCALE),
    }
    times = interleaved_ms(calls, rounds=3)
    for name, ms in times.items():
        yield {"case": f"{length}: {name}", "ms": ms, "of_dense": ms / times["dense cudnn"]}
