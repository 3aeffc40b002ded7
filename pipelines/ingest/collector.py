"""The collector: an HTTP service that checks records by their contract and writes them to Kafka.

Belongs here: HTTP, and what an answer promises. A record is answered as accepted, with its position, only after the
broker acknowledged it with acks=all; a refused one is not written. Each request has a trace, which its answer, its
records and the one log line about it carry. Does not belong here: what is valid (`contracts`), how records are sent
(`producer`).

Run it with `python -m pipelines.ingest.collector`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines import logs, tracing
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS, Contract, Refusal, decode
from pipelines.contracts.contract import Refused, read_json
from pipelines.indexing.position import merge_all
from pipelines.ingest.evolution import Known
from pipelines.ingest.producer import Delivery, NotDelivered, Producer
from pipelines.settings import Settings, load
from pipelines.tracing import Trace

MAX_BODY_BYTES = 4 * 2**20
MAX_RECORDS = 1_000
RETRY_AFTER_S = 2
_PAUSE_S = 1.0
"""After the broker did not answer, for so long requests are turned away at once, not each after its own wait."""
_THREADS = 32
_REFUSED_IN_LOG = 10
log = logging.getLogger("pipelines.ingest.collector")  # which is run as __main__, too


class Problem(Exception):
    """A request that cannot be taken: its status, the field that it is about, what is wrong, what is allowed."""

    def __init__(self, status: int, field: str, message: str, allowed: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"field": field, "message": message, "allowed": allowed}


class Endpoint(NamedTuple):
    """A path that takes records of a contract, one alone or several under a name."""

    path: str
    contract: Contract
    name: str
    summary: str


ENDPOINTS = (
    Endpoint("/v1/events", USER_INTERACTIONS, "events", "Take events: what users did with pins."),
    Endpoint("/v1/pins:update", PIN_UPDATES, "pins", "Take new pins, changed pins and deletions."),
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
        self.requests = Counter(
            "tidemark_collector_requests",
            "Requests by path and status.",
            ("path", "status"),
            registry=self.registry,
        )
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
        self.threads = ThreadPoolExecutor(_THREADS, "collector")
        self._pause_until = 0.0

    def take(self, endpoint: Endpoint, body: bytes, trace: Trace) -> tuple[int, dict[str, Any]]:
        """Answer a request's body: a status and a JSON object. One line of the log says what became of it.

        Raises:
            Problem: The body is not records; nothing was looked at further, and nothing was sent.
            NotDelivered: The broker did not acknowledge every valid record; the client should send all of them again.
        """
        contract, began = self.known(endpoint.contract), time.perf_counter()
        values = [orjson.dumps(record) for record in _records(endpoint, body)]
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
            _refused(number, row) if isinstance(row, Refusal) else _accepted(number, next(remaining))
            for number, row in enumerate(rows)
        ]
        answer: dict[str, Any] = {
            "accepted": len(sent),
            "refused": len(rows) - len(sent),
            "position": merge_all(delivery.position for delivery in deliveries).token()
            if deliveries
            else None,
            "results": results,
        }
        if sent:
            return 200, answer
        first = next(row for row in rows if isinstance(row, Refusal))
        answer["error"] = {"field": first.field or "body", "message": first.detail, "allowed": "see results"}
        return 400, answer

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
        app.state.collector = Collector(own, Known(settings))
        yield
        app.state.collector.threads.shutdown()
        if producer is None:
            own.close()

    app = FastAPI(title="Tidemark collector", version="1", lifespan=lifespan, redoc_url=None)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        paths = ", ".join(endpoint.path for endpoint in ENDPOINTS)
        field, allowed = ("method", "POST") if error.status_code == 405 else ("path", paths)
        return _json(
            error.status_code, {"error": {"field": field, "message": str(error.detail), "allowed": allowed}}
        )

    for endpoint in ENDPOINTS:
        _add(app, endpoint)

    @app.get("/healthz", summary="Whether the process lives.")
    async def healthz() -> Response:
        return _json(200, {"status": "ok"})

    @app.get("/readyz", summary="Whether the broker answers.")
    async def readyz(request: Request) -> Response:
        collector: Collector = request.app.state.collector
        loop = asyncio.get_running_loop()
        if await loop.run_in_executor(None, collector.producer.is_connected):
            return _json(200, {"status": "ready"})
        return _json(503, {"status": "the broker does not answer"}, {"Retry-After": str(RETRY_AFTER_S)})

    @app.get("/metrics", summary="Metrics for Prometheus.")
    async def metrics(request: Request) -> Response:
        collector: Collector = request.app.state.collector
        return Response(generate_latest(collector.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add(app: FastAPI, endpoint: Endpoint) -> None:
    async def post(request: Request) -> Response:
        collector: Collector = request.app.state.collector
        trace = tracing.begin(
            request.headers.get(tracing.TRACEPARENT), request.headers.get(tracing.REQUEST_ID)
        )
        headers = trace.headers
        try:
            body = await _body(request)
            loop = asyncio.get_running_loop()
            status, answer = await loop.run_in_executor(
                collector.threads, collector.take, endpoint, body, trace
            )
        except Problem as problem:
            status, answer = problem.status, {"error": problem.error}
        except NotDelivered as error:
            status, headers = 503, headers | {"Retry-After": str(RETRY_AFTER_S)}
            log.warning("not delivered: %s", error.what, extra=trace.fields)
            answer = {"error": {"field": "", "message": error.what, "allowed": error.remedy}}
        except ClientDisconnect:
            status, answer = (
                400,
                {"error": {"field": "body", "message": "the body is not whole", "allowed": "a whole body"}},
            )
        collector.metrics.requests.labels(endpoint.path, str(status)).inc()
        return _json(status, answer, headers)

    post.__name__ = endpoint.contract.name
    app.add_api_route(
        endpoint.path,
        post,
        methods=["POST"],
        summary=endpoint.summary,
        description=(
            "Each record is listed as accepted, with the position to pass to the serving side as `min_position`, or as "
            "refused, with the reason; a refused one is not written. 400: none was accepted. 503: the broker did not "
            "acknowledge all of them; send the request again, repeats change nothing. The answer has the request's "
            "`traceparent` and `X-Request-Id`, as they came or new ones; `tidemark trace` follows them."
        ),
        responses=_responses(endpoint),
        openapi_extra={"requestBody": _request_body(endpoint)},
    )


def _request_body(endpoint: Endpoint) -> dict[str, Any]:
    records = [dict(example) for example in endpoint.contract.examples]
    examples = {
        "several": {"summary": "Several records", "value": {endpoint.name: records}},
        "one": {"summary": "One record alone", "value": records[0]},
    }
    return {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}, "examples": examples}},
    }


def _responses(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    accepted = {
        "accepted": 1,
        "refused": 1,
        "position": "eyJ0b3BpY3MiOnt9fQ",
        "results": [
            {"index": 0, "status": "accepted", "position": "eyJ0b3BpY3MiOnt9fQ"},
            {
                "index": 1,
                "status": "refused",
                "reason": "missing_field",
                "field": "x",
                "message": "x is missing",
            },
        ],
    }
    error = {"error": {"field": endpoint.name, "message": "what is wrong", "allowed": "what would be right"}}

    def described(text: str, example: Mapping[str, Any]) -> dict[str, Any]:
        return {"description": text, "content": {"application/json": {"example": example}}}

    return {
        200: described("At least one record was accepted.", accepted),
        400: described("No record was accepted.", error),
        413: described(f"The body has more than {MAX_BODY_BYTES} bytes.", error),
        503: described("The broker does not acknowledge; try again after Retry-After seconds.", error),
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


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        parts.append(part)
    return b"".join(parts)


def _too_large() -> Problem:
    return Problem(413, "body", "the body is too large", f"at most {MAX_BODY_BYTES} bytes")


def _records(endpoint: Endpoint, body: bytes) -> list[Any]:
    allowed = f'{{"{endpoint.name}": [1 to {MAX_RECORDS} records]}}, or one record'
    try:
        parsed = read_json(body, MAX_BODY_BYTES)
    except Refused as refused:
        why = refused.refusal
        raise Problem(400, why.field or "body", why.detail, f"JSON: {allowed}") from None
    if not isinstance(parsed, dict):
        raise Problem(400, "body", "the body is not an object", allowed)
    if endpoint.name not in parsed:
        return [parsed]
    records = parsed[endpoint.name]
    if not isinstance(records, list):
        raise Problem(400, endpoint.name, f"{endpoint.name} is not an array", f"1 to {MAX_RECORDS} records")
    if unknown := [name for name in parsed if name != endpoint.name]:
        raise Problem(400, unknown[0][:100], f"a field beside {endpoint.name}", f"only {endpoint.name}")
    if not 1 <= len(records) <= MAX_RECORDS:
        raise Problem(400, endpoint.name, f"there are {len(records)} records", f"1 to {MAX_RECORDS} records")
    return records


def _accepted(number: int, delivery: Delivery) -> dict[str, Any]:
    return {"index": number, "status": "accepted", "position": delivery.position.token()}


def _refused(number: int, refusal: Refusal) -> dict[str, Any]:
    return {
        "index": number,
        "status": "refused",
        "reason": refusal.reason,
        "field": refusal.field,
        "message": refusal.detail,
    }


def _json(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, dict(headers or {}), "application/json")


def main() -> None:
    """Serve until the process is told to end."""
    logs.configure("collector")
    settings = load()
    host, port = settings.collector.host, settings.collector.port
    uvicorn.run(
        create_app(settings), host=host, port=port, log_config=None, log_level="warning", access_log=False
    )


if __name__ == "__main__":
    main()
