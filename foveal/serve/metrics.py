"""What `/metrics` tells, in Prometheus' text format: few numbers, all of them exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .request import Stats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
ROUTES = ("/", "/health", "/metrics", "/openapi.json", "/v1/chat/completions", "/v1/completions", "/v1/models")


class Metrics:
    """Counters and histograms of the HTTP side, with the engine's own numbers beside them at the moment they are asked for."""

    def __init__(self, stats: Callable[[], Stats]):
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(stats))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"foveal_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"foveal_{name}", text, buckets=buckets, registry=self._registry)

        self._requests = counter(
            "requests", "HTTP requests answered, 499 where the client left first.", "route", "status"
        )
        self.finished = counter("generations", "Generations that ended, by reason.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of generations that ended.")
        self.generated_tokens = counter("generation_tokens", "Tokens generated, of generations that ended.")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens taken from the prefix cache.")
        self.restarts = counter("engine_restarts", "Times a dead engine was replaced.")
        self.queued = histogram("queue_time_seconds", "From submission until the prompt began to be read.", _SECONDS)
        self.first_token = histogram("time_to_first_token_seconds", "From submission to the first token.", _SECONDS)
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of one answer.", _BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From submission to the last token.", _SECONDS)

    def answered(self, route: str, status: int) -> None:
        """Count one HTTP request; routes that do not exist are one label, so that callers cannot make more."""
        if route.startswith("/v1/models/"):
            route = "/v1/models"
        self._requests.labels(route if route in ROUTES else "other", str(status)).inc()

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)


class _Engine:
    """The engine's numbers, read when the page is."""

    def __init__(self, stats: Callable[[], Stats]):
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []  # nothing to say before the engine is there

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "engine_up": (stats.alive, "1 while the engine runs."),
            "requests_running": (stats.running, "Requests that hold memory."),
            "requests_waiting": (stats.waiting, "Requests in the queue."),
            "generation_tokens_per_second": (stats.tokens_per_second, "Tokens generated, over the last few seconds."),
            "scheduling_share": (stats.scheduling, "Share of the engine's busy time outside of the model."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"foveal_{name}", text, value=float(value))
        sizes = GaugeMetricFamily(
            "foveal_kv_bytes",
            "Cache bytes: of running requests, of kept prefixes, the limit for both, what dense would need.",
            labels=["kind"],
        )
        for kind, value in (
            ("allocated", stats.bytes_used),
            ("prefixes", stats.prefix_bytes),
            ("limit", stats.bytes_limit),
            ("dense_equivalent", stats.dense_bytes),
        ):
            sizes.add_metric([kind], value)
        yield sizes
        counters = {
            "preemptions": (stats.preemptions, "Requests set aside for want of memory and resumed later."),
            "prefix_cache_queries": (stats.prefix_queries, "Prompts looked up in the prefix cache."),
            "prefix_cache_hits": (stats.prefix_hits, "Prompts of which it had a part."),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"foveal_{name}", text, value=value)
