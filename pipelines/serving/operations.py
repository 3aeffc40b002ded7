"""The OpenAPI descriptions of the routes, with examples.

Belongs here: parameters, answers and their examples, as OpenAPI wants them. What routes do is theirs.
"""

from __future__ import annotations

from typing import Any

from pipelines.serving import documents
from pipelines.serving.inputs import MAX_BATCH, MAX_ID_BYTES, MAX_K, MAX_LIMIT, MAX_TIME_MS

TOKEN = "eyJ0b3BpY3MiOnt9LCJsb2FkcyI6W119"
HEADERS = {
    "Tidemark-Base-Version": {
        "description": "The base version of the index; for several indices each is named: `pins=…, user_events=…`.",
        "schema": {"type": "string"},
        "example": "pins=20260801T120000000Z-1f2e, user_events=20260801T120100000Z-9a8b",
    },
    "Tidemark-Position": {
        "description": "The position that the answer stands on; pass it back as `min_position`.",
        "schema": {"type": "string"},
        "example": TOKEN,
    },
    "Tidemark-Stale": {
        "description": "Whether the index no longer follows its streams; for several indices each is named.",
        "schema": {"type": "string"},
        "example": "pins=false, user_events=false",
    },
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"field": {"type": "string"}, "message": {"type": "string"}, "allowed": {}},
            "required": ["field", "message", "allowed"],
        }
    },
}


def path_id(name: str, example: str) -> dict[str, Any]:
    """An id in the path."""
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": f"Percent-encoded UTF-8 of 1 to {MAX_ID_BYTES} bytes; a slash in it is %2F.",
        "schema": {"type": "string"},
        "example": example,
    }


USER = path_id("user_id", "900")
PIN = path_id("pin_id", "1029743")


def _number(name: str, description: str, default: int | None, least: int, most: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer", "minimum": least, "maximum": most}
    if default is not None:
        schema["default"] = default
    return {"name": name, "in": "query", "description": description, "schema": schema}


K = _number("k", "How many pins.", 10, 1, MAX_K)
LIMIT = _number("limit", "How many events.", 100, 1, MAX_LIMIT)
FROM = _number(
    "from_ms",
    "Count hours from this time on, in ms since 1970; by default all that is known.",
    None,
    0,
    MAX_TIME_MS,
)
TO = _number("to_ms", "Count hours that begin before this time, in ms since 1970.", None, 0, MAX_TIME_MS)
CATEGORY = {
    "name": "category",
    "in": "query",
    "description": "Only pins of this category.",
    "schema": {"type": "string"},
    "example": "FLUID MILK PRODUCTS",
}
CURSOR = {
    "name": "cursor",
    "in": "query",
    "description": "`next_cursor` of the page before.",
    "schema": {"type": "string"},
}
MIN_POSITION = {
    "name": "min_position",
    "in": "query",
    "description": "Wait until the answer stands on this position, as the collector gave it, or 409.",
    "schema": {"type": "string"},
}


def operation(
    summary: str,
    example: Any,
    *parameters: dict[str, Any],
    tag: str,
    description: str = "",
    problems: dict[int, tuple[str, str]] = {},  # noqa: B006 - never changed
    body: dict[str, Any] | None = None,
    has_headers: bool = True,
) -> dict[str, Any]:
    """The description of one route."""
    answered: dict[str, Any] = {
        "description": "The answer.",
        "content": {"application/json": {"schema": {"type": "object"}, "example": example}},
    }
    if has_headers:
        answered["headers"] = HEADERS
    responses = {"200": answered}
    for status, (field, message) in problems.items():
        responses[str(status)] = {
            "description": message,
            "content": {
                "application/json": {
                    "schema": ERROR,
                    "example": {"error": {"field": field, "message": message, "allowed": "…"}},
                }
            },
        }
    said: dict[str, Any] = {
        "summary": summary,
        "description": description,
        "tags": [tag],
        "parameters": list(parameters),
        "responses": responses,
    }
    if body is not None:
        said["requestBody"] = body
    return said


BAD = {400: ("k", "'0' is not allowed")}
LATE = {409: ("min_position", "the position was not reached within 5000 ms")}
NO_PIN = {404: ("pin_id", "there is no such pin")}

RECOMMENDATIONS = operation(
    "What to recommend to a user",
    {"user_id": "900", "recommendations": [documents.EXAMPLE_ITEM], "basis": documents.EXAMPLE_BASIS},
    USER,
    K,
    CATEGORY,
    MIN_POSITION,
    tag="users",
    description="By the user's events up to this second, folded into the vectors of the base; pins that were bought or "
    "hidden, or are unavailable, are left out. A user without a history gets what is popular (`basis.kind`).",
    problems=BAD | LATE,
)
EVENTS = operation(
    "A user's events, the newest first",
    {"user_id": "900", "events": [documents.EXAMPLE_EVENT], "is_complete": True, "next_cursor": None},
    USER,
    LIMIT,
    CURSOR,
    MIN_POSITION,
    tag="users",
    description="Equal times are ordered by event id, descending. A page says where the next one begins.",
    problems=BAD | LATE,
)
PIN_DOCUMENT = operation(
    "A pin", documents.EXAMPLE_DOCUMENT, PIN, MIN_POSITION, tag="pins", problems=NO_PIN | LATE
)
COUNTS = operation(
    "How often a pin was acted on, by hour",
    {
        "pin_id": "1029743",
        "totals": {"purchase": 2, "view": 0, "click": 0, "save": 0, "hide": 0},
        "hours": [
            {
                "start_time": "2017-01-01T11:00:00.000Z",
                "purchase": 2,
                "view": 0,
                "click": 0,
                "save": 0,
                "hide": 0,
            }
        ],
    },
    PIN,
    FROM,
    TO,
    MIN_POSITION,
    tag="pins",
    description="Live events by action and UTC hour; for an unknown or deleted pin, too.",
    problems=BAD | LATE,
)
SIMILAR = operation(
    "Pins like a pin",
    {
        "pin_id": "1029743",
        "similar": [documents.EXAMPLE_ITEM],
        "basis": {"kind": "vector", "events_used": 0, "model_id": "pin_als/3", "window_days": None},
    },
    PIN,
    K,
    CATEGORY,
    MIN_POSITION,
    tag="pins",
    description="By the inner product of the vectors. A pin without a vector (never acted on before the base) is "
    "answered with its category, the popular first (`basis.kind`).",
    problems=NO_PIN | LATE,
)
BATCH_GET = operation(
    "Many pins",
    {"documents": [documents.EXAMPLE_DOCUMENT, documents.missing("no-such-pin")]},
    MIN_POSITION,
    tag="pins",
    description=f"Up to {MAX_BATCH} pins, in the order asked for; a pin that is not there is marked `is_missing`.",
    problems={400: ("pin_ids[3]", "the id is not a text"), 413: ("body", "the body is too large")} | LATE,
    body={
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["pin_ids"],
                    "additionalProperties": False,
                    "properties": {
                        "pin_ids": {
                            "type": "array",
                            "items": {"type": "string"},
                            "minItems": 1,
                            "maxItems": MAX_BATCH,
                        }
                    },
                },
                "example": {"pin_ids": ["1029743", "no-such-pin"]},
            }
        },
    },
)
INDICES = operation(
    "What each index stands on",
    {
        "indices": [
            {
                "index": "pins",
                "base_version": "20260801T120000000Z-1f2e",
                "versions": ["20260801T120000000Z-1f2e"],
                "is_stale": False,
                "overlay_facts": 1200,
            }
        ]
    },
    tag="operations",
    has_headers=False,
)
HEALTH = operation("Whether the process answers", {"status": "ok"}, tag="operations", has_headers=False)
READY = operation(
    "Whether every overlay has reached the head that its delta had at the start",
    {"status": "ready"},
    tag="operations",
    problems={503: ("pins", "not ready yet")},
    has_headers=False,
)
METRICS = operation("Metrics for Prometheus", "", tag="operations", has_headers=False)
METRICS["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
