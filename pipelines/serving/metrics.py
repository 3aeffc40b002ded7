"""What Prometheus reads: latencies and statuses of requests, and how fresh each index is.

Belongs here: the metrics of one serving process. Each application has its own registry, so that tests may have several.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pipelines.indexing.freshness import SECONDS

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
    "bypass_entries": "Rows of which an entry of the bypass is known.",
    "bypass_overridden": "Documents that are read with an entry's values, because they are older.",
    "bypass_refused": "Records of the bypass that were no entries.",
    "is_bypass_read": "1 if the bypass was read to its end and is being read.",
    "freshness_s": "Seconds from the newest broker time of the last folded epoch to the moment it was served.",
}

_FRESHNESS_LABELS = ("index", "stream", "kind", "stage")
_OF_LAST_MINUTE = {
    "documents": "Documents that the replica began to serve in the minute that was finished last.",
    "p90_ms": "Of these, 90 percent were no later after their first stage, in ms.",
    "max_ms": "Of these, none was later after its first stage, in ms.",
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
        yield self._ages()
        yield from self._last_minutes()

    def _ages(self) -> Metric:
        family = HistogramMetricFamily(
            "tidemark_freshness_seconds",
            "Time from the first stage of a document that the replica began to serve to a later stage.",
            labels=_FRESHNESS_LABELS,
        )
        bounds = [*map(floatToGoString, SECONDS), "+Inf"]
        for index, follower in self._replica.followers.items():
            for series, total in follower.meter.totals().items():
                buckets = list(zip(bounds, map(float, total.counts.cumsum()), strict=True))
                family.add_metric([index, *series], buckets, total.sum_ms / 1_000)
        return family

    def _last_minutes(self) -> Iterator[Metric]:
        for name, doc in _OF_LAST_MINUTE.items():
            family = GaugeMetricFamily(f"tidemark_freshness_minute_{name}", doc, labels=_FRESHNESS_LABELS)
            for follower in self._replica.followers.values():
                for row in follower.meter.last_minute():
                    family.add_metric([row[label] for label in _FRESHNESS_LABELS], float(row[name]))
            yield family
