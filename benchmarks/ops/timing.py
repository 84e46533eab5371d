"""How the operations are timed.

Decode calls take microseconds, so they are recorded into one CUDA graph that rotates over input sets which together exceed
the L2 cache; clearing the cache between calls instead would charge its write-back to the call. Prefill calls take
milliseconds and are limited by power, so variants are interleaved over several rounds and medians are kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 30, rounds: int = 7) -> float:
    """Median microseconds of one call, out of a graph of `repeats` calls taken in turn from `calls`."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            calls[i % len(calls)]()
    graph.replay()
    times = [_elapsed(graph.replay) * 1e3 / repeats for _ in range(rounds)]
    del graph
    return statistics.median(times)


def interleaved_ms(calls: dict[str, Callable[[], object]], rounds: int = 5, least_ms: float = 30) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns, each long enough to be timed well."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        repeats[name] = max(1, min(50, round(least_ms / max(_elapsed(call), 1e-3))))
    for _ in range(rounds):
        for name, call in calls.items():
            n = repeats[name]
            times[name].append(_elapsed(lambda call=call, n=n: [call() for _ in range(n)]) / n)
    return {name: statistics.median(t) for name, t in times.items()}


def _elapsed(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((x.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()
