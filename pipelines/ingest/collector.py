"""The collector: an HTTP service that checks records by their contract and writes them to Kafka.

Belongs here: HTTP, and what an answer promises. A record is answered as accepted, with its position, only after the
broker acknowledged it with acks=all; a refused one is not written. Each request has a trace, which its answer, its
records and the one log line about it carry. Does not belong here: what is valid (`contracts`), how records are sent
(`producer`), bodies, errors and traces (`http`).

Run it with `python -m pipelines.ingest.collector`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import orjson
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram

from pipelines import logs, tracing
from pipelines.contracts import (
    PIN_UPDATES,
    USER_FOLLOWS,
    USER_INTERACTIONS,
    Contract,
    Refusal,
    decode,
    payload_files,
)
from pipelines.ingest import http
from pipelines.ingest.evolution import Known
from pipelines.ingest.http import MAX_BODY_BYTES, RETRY_AFTER_S
from pipelines.ingest.producer import Delivery, NotDelivered, Producer, position_of
from pipelines.settings import Settings, load
from pipelines.tracing import Trace

_PAUSE_S = 1.0
"""After the broker did not answer, for so long requests are turned away at once, not each after its own wait."""
_THREADS = 32
_REFUSED_IN_LOG = 10
log = logging.getLogger("pipelines.ingest.collector")  # which is run as __main__, too


class Taken(NamedTuple):
    """Records of a contract that a path takes, one alone or several under a name."""

    path: str
    contract: Contract
    name: str
    summary: str


TAKEN = (
    Taken("/v1/events", USER_INTERACTIONS, "events", "Take events: what users did with pins."),
    Taken("/v1/pins:update", PIN_UPDATES, "pins", "Take new pins, changed pins and deletions."),
    Taken("/v1/follows", USER_FOLLOWS, "follows", "Take whom and what users follow, and follow no more."),
)


class Metrics:
    """What Prometheus asks for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.records = Counter(
            "tidemark_collector_records",
            "Records by topic and outcome; the reason of a refusal.",
            ("topic", "outcome", "reason"),
            registry=self.registry,
        )
        self.requests = http.counter_of_requests("tidemark_collector_requests", self.registry)
        self.seconds = Histogram(
            "tidemark_collector_delivery_seconds",
            "From a checked request to the broker's acknowledgement.",
            ("topic",),
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )


class Collector:
    """Checks and sends; one for a process."""

    def __init__(self, producer: Producer, known: Known) -> None:
        self.producer = producer
        self.known = known
        self.metrics = Metrics()
        self.registry, self.requests = self.metrics.registry, self.metrics.requests
        self.threads = ThreadPoolExecutor(_THREADS, "collector")
        self._pause_until = 0.0

    def take(self, taken: Taken, body: bytes, trace: Trace) -> tuple[int, dict[str, Any]]:
        """Answer a request's body: a status and a JSON object. One line of the log says what became of it.

        Raises:
            Problem: The body is not records; nothing was looked at further, and nothing was sent.
            NotDelivered: The broker did not acknowledge every valid record; the client should send all of them again.
        """
        contract, began = self.known(taken.contract), time.perf_counter()
        values = [orjson.dumps(record) for record in http.records(taken.name, body)]
        now_ms = time.time_ns() // 1_000_000
        rows = [decode(contract, value, now_ms) for value in values]
        sent = [
            (row[contract.key_field].encode(), value)
            for row, value in zip(rows, values, strict=True)
            if not isinstance(row, Refusal)
        ]
        deliveries = self._send(contract, sent, trace) if sent else []
        for row in rows:
            if isinstance(row, Refusal):
                self.metrics.records.labels(contract.topic, "refused", row.reason).inc()
        self.metrics.records.labels(contract.topic, "accepted", "").inc(len(sent))
        said = {
            "topic": contract.topic,
            "places": tracing.ranges_of(delivery.place for delivery in deliveries),
            "refused": _refused_in_log(contract, rows, values),
            "took_ms": round(1000 * (time.perf_counter() - began), 1),
        }
        log.info("took %d of %d records", len(sent), len(rows), extra=trace.fields | said)
        remaining = iter(deliveries)
        results = [
            http.refused(number, row) if isinstance(row, Refusal) else _accepted(number, next(remaining))
            for number, row in enumerate(rows)
        ]
        answer: dict[str, Any] = {
            "accepted": len(sent),
            "refused": len(rows) - len(sent),
            "position": position_of(deliveries).token() if deliveries else None,
            "results": results,
        }
        if sent:
            return 200, answer
        first = next(row for row in rows if isinstance(row, Refusal))
        return 400, answer | http.none_accepted(first)

    def what_is_missing(self) -> str | None:
        """The broker, if it does not answer."""
        return None if self.producer.is_connected() else "the broker does not answer"

    def _send(self, contract: Contract, records: list[tuple[bytes, bytes]], trace: Trace) -> list[Delivery]:
        if time.monotonic() < self._pause_until:
            raise NotDelivered(
                "the broker did not answer a moment ago", remedy=f"send them again after {RETRY_AFTER_S} s"
            )
        began = time.perf_counter()
        try:
            deliveries = self.producer.send(contract.topic, list(records), trace)
        except NotDelivered:
            self._pause_until = time.monotonic() + _PAUSE_S
            self.metrics.records.labels(contract.topic, "not_delivered", "").inc(len(records))
            raise
        self.metrics.seconds.labels(contract.topic).observe(time.perf_counter() - began)
        return deliveries


def create_app(settings: Settings, producer: Producer | None = None) -> FastAPI:
    """The service.

    Args:
        settings: Which broker.
        producer: Instead of one of its own; it is not closed.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        own = producer or Producer(settings)
        app.state.service = Collector(own, Known(settings))
        yield
        app.state.service.threads.shutdown()
        if producer is None:
            own.close()

    app = FastAPI(title="Tidemark collector", version="1", lifespan=lifespan, redoc_url=None)

    http.add(app, [_endpoint(taken) for taken in TAKEN], log)
    return app


def _endpoint(taken: Taken) -> http.Endpoint:
    records = [dict(example) for example in taken.contract.examples]

    def answer(collector: Collector, body: bytes, trace: Trace) -> tuple[int, dict[str, Any]]:
        return collector.take(taken, body, trace)

    return http.Endpoint(
        taken.path,
        taken.contract.name,
        taken.summary,
        "Each record is listed as accepted, with the position to pass to the serving side as `min_position`, or as "
        "refused, with the reason; a refused one is not written. 400: none was accepted. 503: the broker did not "
        "acknowledge all of them; send the request again, repeats change nothing. The answer has the request's "
        "`traceparent` and `X-Request-Id`, as they came or new ones; `tidemark trace` follows them.",
        answer,
        {
            "several": {"summary": "Several records", "value": {taken.name: records}},
            "one": {"summary": "One record alone", "value": records[0]},
        },
        _answers(taken),
    )


def _answers(taken: Taken) -> dict[int, tuple[str, Mapping[str, Any]]]:
    accepted = {
        "accepted": 1,
        "refused": 1,
        "position": "eyJ0b3BpY3MiOnt9fQ",
        "results": [
            {"index": 0, "status": "accepted", "position": "eyJ0b3BpY3MiOnt9fQ"},
            http.refused(1, Refusal("missing_field", "x is missing", "x")),
        ],
    }
    error = http.said(taken.name, "what is wrong", "what would be right")
    return {
        200: ("At least one record was accepted.", accepted),
        400: ("No record was accepted.", error),
        413: (f"The body has more than {MAX_BODY_BYTES} bytes.", error),
        503: ("The broker does not acknowledge; try again after Retry-After seconds.", error),
    }


def _refused_in_log(
    contract: Contract, rows: Sequence[Mapping[str, Any] | Refusal], values: Sequence[bytes]
) -> list[dict[str, Any]]:
    """The first refused records, with the ids that they have: nothing else keeps them."""
    named = [(row, value) for row, value in zip(rows, values, strict=True) if isinstance(row, Refusal)]
    found = []
    for row, value in named[:_REFUSED_IN_LOG]:
        record = orjson.loads(value)
        ids = {
            name: record[name]
            for name in contract.row_schema.names
            if name.endswith("_id") and isinstance(record, dict) and isinstance(record.get(name), str)
        }
        found.append({"reason": row.reason, "detail": row.detail, **ids})
    return found


def _accepted(number: int, delivery: Delivery) -> dict[str, Any]:
    return {"index": number, "status": "accepted", "position": delivery.position.token()}


def main() -> None:
    """Serve until the process is told to end."""
    logs.configure("collector")
    settings = load()
    payload_files.declared()  # a schema that cannot hold is told now, and not by the first event
    host, port = settings.collector.host, settings.collector.port
    uvicorn.run(
        create_app(settings), host=host, port=port, log_config=None, log_level="warning", access_log=False
    )


if __name__ == "__main__":
    main()
