"""A small HTTP client of Tidemark's own services, for the command line, the demo and the benchmarks' set-up.

Here: one request, one answer, and what a refusal means to a person. The load of a benchmark comes from elsewhere.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipelines.errors import TidemarkError


class ServiceError(TidemarkError):
    """A service does not answer, or refuses what was asked."""


class Answer(NamedTuple):
    """The body of an answer and its headers (names in lower case)."""

    body: Any
    headers: dict[str, str]
    status: int


def request(
    base: str,
    path: str,
    params: Mapping[str, Any] | None = None,
    body: Any = None,
    *,
    timeout_s: float = 30.0,
    service: str = "serving",
    is_error_an_answer: bool = False,
) -> Answer:
    """GET, or POST when there is a body.

    Raises:
        ServiceError: nothing answers there, or the answer is a 4xx or 5xx (unless that is wanted as an answer).
    """
    query = urllib.parse.urlencode({k: v for k, v in (params or {}).items() if v is not None})
    url = f"{base}{path}{'?' + query if query else ''}"
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=timeout_s) as got:
            return _answer(got)
    except urllib.error.HTTPError as error:
        answer = _answer(error)
        if is_error_an_answer:
            return answer
        return checked(answer, url)
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"{service} does not answer ({getattr(error, 'reason', error)})",
            where=base,
            remedy="start it with `tidemark up`, or see `tidemark status`",
        ) from None


def request_at(
    base: str,
    path: str,
    params: Mapping[str, Any] | None = None,
    body: Any = None,
    *,
    timeout_s: float = 60.0,
) -> Answer:
    """`request` with a `min_position`: the service waits a few seconds by itself; here it is asked again after a 409.

    Raises:
        ServiceError: as `request`; the position was not reached in this time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = request(base, path, params, body, is_error_an_answer=True)
        if answer.status != 409 or time.monotonic() > deadline:
            return checked(answer, f"{base}{path}")


def checked(answer: Answer, url: str) -> Answer:
    """The answer, unless it is a 4xx or 5xx: then that is raised as a `ServiceError`."""
    if answer.status >= 400:
        raise ServiceError(_reason(answer), where=f"{url} answers {answer.status}", remedy=_remedy(answer))
    return answer


def quote(part: str) -> str:
    """An id as one part of a path."""
    return urllib.parse.quote(part, safe="")


def _answer(got: Any) -> Answer:
    raw = got.read()
    try:
        body = json.loads(raw) if raw else None
    except ValueError:
        body = raw.decode(errors="replace")
    return Answer(body, {name.lower(): value for name, value in got.headers.items()}, got.status)


def _problem(answer: Answer) -> dict[str, Any]:
    """What the services say of a refusal: the field, the message, and what is allowed."""
    body = answer.body if isinstance(answer.body, dict) else {}
    problem = body.get("error", body)
    return problem if isinstance(problem, dict) else {"message": str(problem)}


def _reason(answer: Answer) -> str:
    problem = _problem(answer)
    message = problem.get("message") or problem.get("what") or problem.get("detail") or str(answer.body)[:300]
    return f"{problem['field']}: {message}" if problem.get("field") else str(message)


def _remedy(answer: Answer) -> str | None:
    problem = _problem(answer)
    allowed = problem.get("remedy") or problem.get("allowed")
    if isinstance(allowed, list):
        allowed = ", ".join(map(str, allowed))
    return f"allowed is {allowed}" if allowed and "allowed" in problem else allowed
