"""What Prometheus reads: latencies and statuses of requests, and how fresh each index is.

Belongs here: the metrics of one serving process. Each application has its own registry, so that tests may have several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from pipelines.indexing.replica import Replica

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
GAUGES = {
    "overlay_facts": "Facts that the overlay holds.",
    "overlay_max_facts": "Facts that the overlay may hold.",
    "is_overlay_full": "1 if the overlay has reached its bound and folds nothing more.",
    "is_stale": "1 if answers no longer follow the streams.",
    "is_ready": "1 if the overlay has reached the head that its delta had at the start.",
    "with_delta": "1 if the delta is served, 0 after a roll back without it.",
    "delta_version": "Version of the delta's log up to which epochs are folded.",
    "freshness_s": "Seconds from the newest broker time of the last folded epoch to the moment it was served.",
}


class Metrics:
    """The metrics of one application."""

    def __init__(self, replica: Replica) -> None:
        self.registry = CollectorRegistry()
        self._latency = Histogram(
            "tidemark_request_seconds",
            "Time to answer a request.",
            ["route"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._requests = Counter(
            "tidemark_requests_total",
            "Requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self._by_route: dict[tuple[str, int], tuple[Any, Any]] = {}
        self.registry.register(_Indices(replica))

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        held = self._by_route.get((route, status))
        if held is None:
            held = (self._latency.labels(route), self._requests.labels(route, str(status)))
            self._by_route[route, status] = held
        held[0].observe(seconds)
        held[1].inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Indices(Collector):
    """Reads the replica when it is asked."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._replica.status()
        for name, doc in GAUGES.items():
            family = GaugeMetricFamily(f"tidemark_index_{name}", doc, labels=["index"])
            for index, said in status.items():
                if said.get(name) is not None:
                    family.add_metric([index], float(said[name]))
            yield family
        served = GaugeMetricFamily(
            "tidemark_index_base", "1 for the base that is served.", labels=["index", "version"]
        )
        for index, said in status.items():
            served.add_metric([index, said["base_version"] or "none"], 1.0)
        yield served
