"""What Prometheus reads of the process `ads`: records, changes, keys, what waits, and how far behind it is.

Belongs here: the metrics and what is counted in them. Does not belong here: measuring the lag (`service`), freshness up
to the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pipelines.ads.repository import Change
from pipelines.ingest import http

TOPIC, CALL = "topic", "call"
"""How a record came: a record by call comes by the topic once more."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = http.counter_of_requests("tidemark_ads_requests", self.registry)
        self._records = self._counter(
            "records",
            "Change records by how they came and outcome; the reason of a refusal.",
            ("source", "outcome", "reason"),
        )
        self._changes = self._counter(
            "changes", "Rows of which something became visible, by table.", ("table",)
        )
        self._keys = self._counter("keys", "Keys and bypass records that were sent, by topic.", ("topic",))
        self.failures = self._counter("failures", "How often a part failed and began anew.", ("part",))
        self.held = self._gauge(
            "transactions_held", "Transactions that are not written, by state.", ("state",)
        )
        self.behind = self._gauge(
            "behind",
            "Records of the topic that the repository lacks (updater), changes of it that others lack; NaN: not known.",
            ("part",),
        )
        self._commit_s = self._histogram("commit_seconds", "From the event time of a change to its commit.")
        self._keys_s = self._histogram(
            "keys_seconds", "From the commit of a change to its keys' acknowledgement."
        )

    def count(self, source: str, accepted: int, reasons: Iterable[str]) -> None:
        """Count records that came."""
        self._records.labels(source, "accepted", "").inc(accepted)
        for reason in reasons:
            self._records.labels(source, "refused", reason).inc()

    def observe_commit(self, changes: Iterable[Change]) -> None:
        """What became visible in a commit."""
        for change in changes:
            self._changes.labels(change.table).inc()
            if change.event_time_ms is not None:
                self._commit_s.observe(max(0, change.committed_at_ms - change.event_time_ms) / 1000)

    def count_keys(self, sent: Mapping[str, int]) -> None:
        """Records that were sent, by topic."""
        for topic, count in sent.items():
            self._keys.labels(topic).inc(count)

    def observe_keys(self, changes: Iterable[Change]) -> None:
        """The keys of these changes were acknowledged a moment ago."""
        now_ms = time.time_ns() // 1_000_000
        for change in changes:
            self._keys_s.observe(max(0, now_ms - change.committed_at_ms) / 1000)

    def _counter(self, name: str, doc: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"tidemark_ads_{name}", doc, labels, registry=self.registry)

    def _gauge(self, name: str, doc: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(f"tidemark_ads_{name}", doc, labels, registry=self.registry)

    def _histogram(self, name: str, doc: str) -> Histogram:
        return Histogram(f"tidemark_ads_{name}", doc, buckets=_SECONDS, registry=self.registry)
