"""Routes that match the raw path and answer bytes: FastAPI's documentation without its work for each request.

Belongs here: how a request finds its endpoint and how what the endpoint gives becomes an answer. An endpoint takes a
`Call` and gives an `Answer`; both are plain. FastAPI keeps the OpenAPI document.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from fastapi.routing import APIRoute
from starlette.routing import Match

from pipelines import tracing
from pipelines.serving.inputs import MAX_BODY_BYTES, Problem, Query, read_id, segments_of
from pipelines.tracing import Trace

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

    from pipelines.serving.metrics import Metrics

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
SLOW_S = 1.0
"""An answer that took longer is told of in the log; at thousands a second, no other is."""
log = logging.getLogger(__name__)
_REQUEST_ID, _TRACEPARENT = tracing.REQUEST_ID.encode(), tracing.TRACEPARENT.encode()
_SEGMENTS = "tidemark.segments"


class Answer(NamedTuple):
    """A status, headers and a body."""

    body: bytes
    headers: Mapping[str, str] = {}
    status: int = 200
    content_type: str = JSON


def json_answer(value: Any, headers: Mapping[str, str] = {}, status: int = 200) -> Answer:
    """An answer of JSON."""
    return Answer(orjson.dumps(value), headers, status)


class Call:
    """A request, as far as an endpoint reads it."""

    def __init__(self, scope: Scope, receive: Receive, ids: Mapping[str, bytes]) -> None:
        self.ids = ids
        self._scope = scope
        self._receive = receive

    def query(self, *known: str) -> Query:
        """The query parameters; any that is not known is refused."""
        return Query(self._scope.get("query_string", b""), known)

    def header(self, name: bytes) -> str:
        """A header's value; empty where it is absent."""
        for key, value in self._scope["headers"]:
            if key == name:
                return str(value, "latin-1")
        return ""

    async def body(self) -> bytes:
        """The whole body, within the limit."""
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Problem(
                    400, "body", "the connection was closed before the body was whole", "a whole body"
                )
            part = message.get("body", b"")
            size += len(part)
            if size > MAX_BODY_BYTES:
                raise Problem(
                    413,
                    "body",
                    "the body is too large",
                    f"at most {MAX_BODY_BYTES} bytes",
                    {"Connection": "close"},
                )
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)


Endpoint = Callable[[Call], Awaitable[Answer]]


class RawRoute(APIRoute):
    """Matches the parts of the raw path, so that an id may hold whatever can be percent-encoded."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.allowed = frozenset(self.methods or ())
        self.parts = [
            (part[1:-1], b"") if part.startswith("{") else ("", part.encode()) for part in path.split("/")[1:]
        ]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether the path is this route's; FULL only if the method is, too."""
        if scope["type"] != "http":
            return Match.NONE, {}
        segments = scope.get(_SEGMENTS)
        if segments is None:
            segments = scope[_SEGMENTS] = segments_of(scope.get("raw_path") or scope["path"].encode())
        if len(segments) != len(self.parts):
            return Match.NONE, {}
        for (name, literal), segment in zip(self.parts, segments, strict=True):
            if not name and segment != literal:
                return Match.NONE, {}
        return (Match.FULL if scope["method"] in self.allowed else Match.PARTIAL), {"route": self}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; whatever is wrong with a request becomes a `Problem`'s answer."""
        metrics: Metrics = scope["app"].state.metrics
        began = time.perf_counter()
        status = 500
        try:
            answer = await self._answered(scope, receive)
            status = answer.status
        finally:
            took_s = time.perf_counter() - began
            metrics.observe(self.path, status, took_s)
        if took_s > SLOW_S and b"min_position" not in scope["query_string"]:  # which is asked to wait
            said = {"path": scope["path"], "status": status, "took_ms": round(1000 * took_s)}
            log.warning("a slow answer", extra={**trace_of(scope).fields, **said})
        await write(answer, send, echoed(scope))

    async def _answered(self, scope: Scope, receive: Receive) -> Answer:
        try:
            if scope["method"] not in self.allowed:
                allowed = ", ".join(sorted(self.allowed))
                raise Problem(
                    405, "method", f"{scope['method'][:20]} is not allowed here", allowed, {"Allow": allowed}
                )
            segments = zip(self.parts, scope[_SEGMENTS], strict=True)
            ids = {name: read_id(segment, name) for (name, _), segment in segments if name}
            answer: Answer = await self.endpoint(Call(scope, receive, ids))
            return answer
        except Problem as problem:
            return problem_answer(problem)


def problem_answer(problem: Problem) -> Answer:
    """A problem as an answer."""
    return Answer(problem.body(), problem.headers, problem.status)


def trace_of(scope: Scope) -> Trace:
    """The trace of a request."""
    said = dict(echoed(scope))
    return tracing.begin(
        said.get(_TRACEPARENT, b"").decode("latin-1"), said.get(_REQUEST_ID, b"").decode("latin-1")
    )


def echoed(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The headers by which a client knows its request again, as they came. Every request looks for them."""
    return [pair for pair in scope["headers"] if pair[0] == _REQUEST_ID or pair[0] == _TRACEPARENT]


async def write(answer: Answer, send: Send, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Send an answer, with more headers as they are."""
    headers = [
        *more,
        (b"content-type", answer.content_type.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        *((name.lower().encode(), value.encode("latin-1")) for name, value in answer.headers.items()),
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def add(
    app: FastAPI,
    method: str,
    path: str,
    endpoint: Endpoint,
    operation: Mapping[str, Any],
    *,
    is_documented: bool = True,
) -> None:
    """Register an endpoint; `operation` is its part of the OpenAPI document."""

    async def documented() -> None:
        raise AssertionError("a RawRoute calls its endpoint itself")

    documented.__name__ = endpoint.__name__
    extra = {key: value for key, value in operation.items() if key not in ("summary", "description", "tags")}
    app.router.add_api_route(
        path,
        documented,
        methods=[method],
        route_class_override=RawRoute,
        openapi_extra=extra,
        summary=operation["summary"],
        description=operation.get("description", ""),
        tags=operation.get("tags"),
        response_model=None,
        include_in_schema=is_documented,
    )
    route = app.router.routes[-1]
    assert isinstance(route, RawRoute)
    route.endpoint = endpoint
