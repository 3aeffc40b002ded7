"""What the HTTP services that take records have in common: bodies, refusals, traces, and the answers to errors.

Belongs here: what is the same whatever a call does: its body within limits, strict JSON, the trace in and out, an error
as field, message and what is allowed, `/healthz`, `/readyz` and `/metrics`. Does not belong here: what a call does
(`collector`, `pipelines.ads.service`), and answers of the serving side.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines import tracing
from pipelines.contracts import Refusal
from pipelines.contracts.contract import Refused, read_json
from pipelines.errors import TidemarkError
from pipelines.tracing import Trace

MAX_BODY_BYTES = 4 * 2**20
MAX_RECORDS = 1_000
RETRY_AFTER_S = 2


class Problem(Exception):
    """A request that cannot be taken: its status, the field that it is about, what is wrong, what is allowed."""

    def __init__(self, status: int, field: str, message: str, allowed: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"field": field, "message": message, "allowed": allowed}


class Service(Protocol):
    """What an application has as `app.state.service` while it runs."""

    registry: CollectorRegistry
    requests: Counter  # by path and status
    threads: ThreadPoolExecutor  # in which calls are answered

    def what_is_missing(self) -> str | None:
        """Why no call can be answered; None if they can."""


class Endpoint(NamedTuple):
    """A path that takes a body.

    Attributes:
        path: The path.
        name: Of the operation, in the documentation.
        summary: In one sentence.
        description: What an answer promises.
        answer: The application's service, a body and its trace → a status and a JSON object; it may raise `Problem`,
            or another `TidemarkError` where something that it needs is away.
        examples: Bodies by name: an example's `summary` and `value`.
        answers: Status → what it means, and an example.
    """

    path: str
    name: str
    summary: str
    description: str
    answer: Callable[[Any, bytes, Trace], tuple[int, dict[str, Any]]]
    examples: Mapping[str, Mapping[str, Any]]
    answers: Mapping[int, tuple[str, Mapping[str, Any]]]


def counter_of_requests(name: str, registry: CollectorRegistry) -> Counter:
    """`Service.requests`."""
    return Counter(name, "Requests by path and status.", ("path", "status"), registry=registry)


def add(app: FastAPI, endpoints: Sequence[Endpoint], log: logging.Logger) -> None:
    """Give an application its endpoints, and what every service has beside them."""

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        paths = ", ".join(endpoint.path for endpoint in endpoints)
        field, allowed = ("method", "POST") if error.status_code == 405 else ("path", paths)
        return json(error.status_code, said(field, str(error.detail), allowed))

    for endpoint in endpoints:
        app.add_api_route(
            endpoint.path,
            _post(endpoint, log),
            methods=["POST"],
            name=endpoint.name,
            summary=endpoint.summary,
            description=endpoint.description,
            responses={
                status: {"description": text, "content": {"application/json": {"example": dict(example)}}}
                for status, (text, example) in endpoint.answers.items()
            },
            openapi_extra={"requestBody": _request_body(endpoint)},
        )

    @app.get("/healthz", summary="Whether the process lives.")
    async def healthz() -> Response:
        return json(200, {"status": "ok"})

    @app.get("/readyz", summary="Whether what the process needs answers.")
    async def readyz(request: Request) -> Response:
        service: Service = request.app.state.service
        loop = asyncio.get_running_loop()
        missing = await loop.run_in_executor(None, service.what_is_missing)
        if missing is None:
            return json(200, {"status": "ready"})
        return json(503, {"status": missing}, {"Retry-After": str(RETRY_AFTER_S)})

    @app.get("/metrics", summary="Metrics for Prometheus.")
    async def metrics(request: Request) -> Response:
        service: Service = request.app.state.service
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)


def _post(endpoint: Endpoint, log: logging.Logger) -> Callable[[Request], Awaitable[Response]]:
    async def post(request: Request) -> Response:
        service: Service = request.app.state.service
        trace = tracing.begin(
            request.headers.get(tracing.TRACEPARENT), request.headers.get(tracing.REQUEST_ID)
        )
        headers = trace.headers
        try:
            body = await _body(request)
            loop = asyncio.get_running_loop()
            status, answer = await loop.run_in_executor(
                service.threads, endpoint.answer, service, body, trace
            )
        except Problem as problem:
            status, answer = problem.status, {"error": problem.error}
        except TidemarkError as error:
            status, headers = 503, headers | {"Retry-After": str(RETRY_AFTER_S)}
            log.warning("%s is not answered: %s", endpoint.path, error.what, extra=trace.fields)
            answer = said("", error.what, error.remedy or f"try again after {RETRY_AFTER_S} s")
        except ClientDisconnect:
            status, answer = 400, said("body", "the body is not whole", "a whole body")
        service.requests.labels(endpoint.path, str(status)).inc()
        return json(status, answer, headers)

    post.__name__ = endpoint.name
    return post


def _request_body(endpoint: Endpoint) -> dict[str, Any]:
    examples = {name: dict(example) for name, example in endpoint.examples.items()}
    return {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}, "examples": examples}},
    }


# ------------------------------------------------------------------------------------------------ bodies


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


def read(body: bytes, allowed: str) -> dict[str, Any]:
    """A body's JSON object; ``allowed`` says what it may be.

    Raises:
        Problem: It is not JSON, or not an object.
    """
    try:
        parsed = read_json(body, MAX_BODY_BYTES)
    except Refused as refused:
        why = refused.refusal
        raise Problem(400, why.field or "body", why.detail, f"JSON: {allowed}") from None
    if not isinstance(parsed, dict):
        raise Problem(400, "body", "the body is not an object", allowed)
    return parsed


def records(name: str, body: bytes) -> list[Any]:
    """The records of a body: one alone, or several under a name.

    Raises:
        Problem: The body is not that, or there are too many.
    """
    return records_and(name, body, ())[0]


def records_and(name: str, body: bytes, options: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """The records of a body, and what it says beside several of them.

    Args:
        name: Of the field that has several records.
        body: The body.
        options: The names of fields that may stand beside it.

    Raises:
        Problem: The body is not that, or there are too many records.
    """
    parsed = read(body, f'{{"{name}": [1 to {MAX_RECORDS} records]}}, or one record')
    if name not in parsed:
        return [parsed], {}
    found = parsed.pop(name)
    if not isinstance(found, list):
        raise Problem(400, name, f"{name} is not an array", f"1 to {MAX_RECORDS} records")
    require_only(parsed, options)
    if not 1 <= len(found) <= MAX_RECORDS:
        raise Problem(400, name, f"there are {len(found)} records", f"1 to {MAX_RECORDS} records")
    return found, parsed


def require_only(parsed: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises `Problem` where an object has a field of another name."""
    if unknown := [name for name in parsed if name not in names]:
        raise Problem(400, unknown[0][:100], f"a field beside {', '.join(names)}", f"only {', '.join(names)}")


# ------------------------------------------------------------------------------------------------ answers


def said(field: str, message: str, allowed: str) -> dict[str, Any]:
    """An error as every answer has it."""
    return {"error": {"field": field, "message": message, "allowed": allowed}}


def refused(number: int, refusal: Refusal) -> dict[str, Any]:
    """The line of an answer about a record that its contract refuses."""
    return {
        "index": number,
        "status": "refused",
        "reason": refusal.reason,
        "field": refusal.field,
        "message": refusal.detail,
    }


def none_accepted(first: Refusal) -> dict[str, Any]:
    """The error of an answer to records of which none was accepted."""
    return said(first.field or "body", first.detail, "see results")


def json(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(body), status, dict(headers or {}), "application/json")
