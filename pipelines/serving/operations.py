"""The OpenAPI descriptions of the routes, with examples.

Belongs here: parameters, answers and their examples, as OpenAPI wants them. What routes do is theirs.
"""

from __future__ import annotations

from typing import Any

from pipelines.ads.schema import AGE_BUCKETS, DEVICES, DIMENSIONS, GENDERS, PLACEMENTS
from pipelines.contracts import ACTIONS, OBJECTS
from pipelines.serving import documents
from pipelines.serving.inputs import (
    MAX_BATCH,
    MAX_ID_BYTES,
    MAX_K,
    MAX_LIMIT,
    MAX_TEXTS,
    MAX_TIME_MS,
    MAX_USERS,
)
from pipelines.serving.routing import ARROW
from pipelines.users import counter_sql, counters, inbox, sequences, spans

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


def json_body(example: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """A body of JSON."""
    return {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}


def ids_body(field: str, example: list[str]) -> dict[str, Any]:
    """The body of a `batchGet`."""
    ids = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_BATCH}
    schema = {
        "type": "object",
        "required": [field],
        "additionalProperties": False,
        "properties": {field: ids},
    }
    return json_body({field: example}, schema)


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
LIMIT = _number("limit", "How many of the newest.", 100, 1, MAX_LIMIT)
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
    "hidden, or are unavailable, are left out. A user without a history gets what is popular. While what "
    "a rule fired lasts, each third pin is of a category that it is about (`basis.interests`, `basis.segments`).",
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
PROFILE = operation(
    "What a user is like now",
    {
        "user_id": "900",
        "interests": [{"category": "dairy", "weight": 3.25, "of_events": 1.25, "of_firings": 2.0}],
        "segments": [{"segment": "browsing", "until": "2017-01-02T11:53:26.000Z"}],
        "last_seen": "2017-01-01T11:53:26.000Z",
        "firings": [
            {
                "rule": "category_browser",
                "fired_at": "2017-01-01T11:53:26.000Z",
                "until": "2017-01-02T11:53:26.000Z",
                "event_id": "v7:0",
                "by": "category",
                "value": "dairy",
                "category": "dairy",
                "segment": "browsing",
                "interest": 2.0,
            }
        ],
        "basis": {"now_ms": 1_483_271_606_000},
    },
    USER,
    _number("k", "How many interests.", 10, 1, MAX_K),
    _number("now_ms", "As of when, in ms since 1970; now, if it is absent.", None, 0, MAX_TIME_MS),
    MIN_POSITION,
    tag="users",
    description="Interests by category, of the user's events and of what the rules of conf/patterns.yaml fired, both "
    "fading; the segments that the user is in; the firings that last. An unknown user has an empty profile.",
    problems=BAD | LATE,
)
FOLLOWS = operation(
    "What a user follows, the newest first",
    {
        "user_id": "900",
        "follows": [documents.EXAMPLE_FOLLOW],
        "is_complete": True,
        "next_cursor": None,
    },
    USER,
    LIMIT,
    CURSOR,
    MIN_POSITION,
    tag="users",
    description="Of each one of `pin_id` and `followed_user_id` is null. A page says where the next one begins.",
    problems=BAD | LATE,
)
INBOX = operation(
    "What became of what a user follows, the newest first",
    {
        "user_id": "900",
        "entries": [documents.EXAMPLE_PIN_ENTRY, documents.EXAMPLE_USER_ENTRY],
        "follows_read": 2,
        "has_more_follows": False,
        "is_complete": True,
        "next_cursor": None,
    },
    USER,
    LIMIT,
    CURSOR,
    MIN_POSITION,
    tag="users",
    description="Put together from the followed pins' changes and the followed users' public actions "
    f"({', '.join(inbox.PUBLIC_ACTIONS)}), each since it is followed. `what` of a pin is changed, gone, back or new; "
    "`changes` has the fields of its document that are not what they were. A statement that changes nothing makes no "
    f"entry. Of the newest {inbox.MAX_FOLLOWS:,} follows; `has_more_follows` says whether there are more. An unknown "
    "user's inbox is empty.",
    problems=BAD | LATE,
)
PIN_DOCUMENT = operation(
    "A pin", documents.EXAMPLE_DOCUMENT, PIN, MIN_POSITION, tag="pins", problems=NO_PIN | LATE
)
_NO_COUNTS = dict.fromkeys(ACTIONS, 0)
COUNTS = operation(
    "How often a pin was acted on, by hour",
    {
        "pin_id": "1029743",
        "totals": {**_NO_COUNTS, "purchase": 2},
        "hours": [{"start_time": "2017-01-01T11:00:00.000Z", **_NO_COUNTS, "purchase": 2}],
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
    body=ids_body("pin_ids", ["1029743", "no-such-pin"]),
)
AD = path_id("ad_id", "a17")
NO_AD = {404: ("ad_id", "there is no such ad")}
AD_DOCUMENT = operation(
    "An ad",
    documents.EXAMPLE_AD,
    AD,
    MIN_POSITION,
    tag="ads",
    description="The document of all families with the stands of the rows that each was made of. `overridden_by` has "
    "the entries of the bypass that are newer than the document: it is shown as it is by them.",
    problems=NO_AD | LATE,
)
ADS_BATCH_GET = operation(
    "Many ads",
    {"documents": [documents.EXAMPLE_AD, documents.missing_ad("no-such-ad")]},
    MIN_POSITION,
    tag="ads",
    description=f"Up to {MAX_BATCH} ads, in the order asked for; an ad that is not there is marked `is_missing`.",
    problems={400: ("ad_ids[3]", "the id is not a text"), 413: ("body", "the body is too large")} | LATE,
    body=ids_body("ad_ids", ["a17", "no-such-ad"]),
)
_TEXT, _TEXTS = {"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_TEXTS}
ADS_CANDIDATES = operation(
    "The ads that may be shown in a context",
    {
        "ads": [
            {
                "ad_id": "a17",
                "score": 7512.5,
                "campaign_id": "c0",
                "pin_id": "p3",
                "effective_bid_usd_micros": 1_500_000,
            }
        ],
        "basis": {"kind": "light_score", "time_ms": 1_735_689_600_000},
    },
    MIN_POSITION,
    tag="ads",
    description="Those that are eligible, exactly, the best first by a light score: effective bid × smoothed click "
    "rate × (½ + quality) × (1 - hide rate); ties by id. With a `visual_embedding` they are ranked by its inner "
    "product with that of their image alone (basis `visual_similarity`). In a dimension of which the context says "
    "nothing only ads pass that are not targeted by it. `k` is from 1 to 500, 10 by default.",
    problems={400: ("context.device", "it is not allowed"), 413: ("body", "the body is too large")} | LATE,
    body=json_body(
        {"context": {"country": "US", "device": "ios_phone", "interests": ["oak", "garden"]}, "k": 10},
        {
            "type": "object",
            "required": ["context"],
            "additionalProperties": False,
            "properties": {
                "k": {"type": "integer", "minimum": 1, "maximum": MAX_K, "default": 10},
                "context": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "country": _TEXT,
                        "language": _TEXT,
                        "age": {"enum": list(AGE_BUCKETS)},
                        "gender": {"enum": list(GENDERS)},
                        "device": {"enum": list(DEVICES)},
                        "placement": {"enum": list(PLACEMENTS)},
                        "category": _TEXT,
                        "interests": _TEXTS,
                        "keywords": _TEXTS,
                        "excluded_advertisers": _TEXTS,
                        "excluded_categories": _TEXTS,
                        "visual_embedding": {
                            "type": "array",
                            "items": {"type": "number"},
                            "minItems": DIMENSIONS,
                            "maxItems": DIMENSIONS,
                        },
                        "time_ms": {"type": "integer", "minimum": 0, "maximum": MAX_TIME_MS},
                    },
                },
            },
        },
    ),
)
_IDS = {"type": "array", "items": _TEXT}
COUNTERS = operation(
    "How often users did something",
    {
        "counts": [{"action": "click", "count": 1}, {"action": "view", "count": 3}],
        "basis": {"now_ms": 1_735_689_600_000, "incomplete_user_ids": []},
    },
    MIN_POSITION,
    tag="users",
    description="Live events of users in the last `age_ms` (now - age < event time ≤ now), each once, counted from the "
    "timelines. Asked by `user_ids` with `where` and `group_by` (groups without events are left out), by `pairs` of "
    "user and object (each is answered, in their order), or by one sentence of SQL: `"
    + counter_sql.GRAMMAR
    + "`.",
    problems={
        400: ("sql", "at character 90 ('99d'): '99d' is not an age"),
        413: ("body", "the body is too large"),
    }
    | LATE,
    body=json_body(
        {
            "user_ids": ["900"],
            "where": {"ad_id": ["a17", "a18"]},
            "age_ms": 604_800_000,
            "group_by": ["action"],
        },
        {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "sql": _TEXT,
                "user_ids": _IDS | {"maxItems": counters.MAX_USERS},
                "pairs": {
                    "type": "array",
                    "items": _IDS | {"minItems": 2, "maxItems": 2},
                    "maxItems": counters.MAX_PAIRS,
                },
                "object": {"enum": list(OBJECTS)},
                "where": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": dict.fromkeys(counters.COLUMNS, _IDS | {"maxItems": counters.MAX_VALUES}),
                },
                "age_ms": {
                    "type": "integer",
                    "minimum": spans.MIN_SPAN_MS,
                    "maximum": spans.MAX_SPAN_MS,
                },
                "group_by": {
                    "type": "array",
                    "items": {"enum": [counters.USER, *counters.COLUMNS]},
                    "uniqueItems": True,
                },
                "now_ms": {"type": "integer", "minimum": 0, "maximum": MAX_TIME_MS},
            },
        },
    ),
)
FREQUENCY = operation(
    "What may be shown to a user by the rules of frequency",
    {
        "user_id": "900",
        "candidates": [
            {"is_allowed": True, "broken": []},
            {
                "is_allowed": False,
                "broken": [{"rule": "ad_daily", "ad_id": "a17", "at_most": 3, "measured": 3}],
            },
        ],
        "basis": {
            "now_ms": 1_735_689_600_000,
            "rules": ["ad_daily"],
            "is_complete": True,
            "incomplete_rules": [],
        },
    },
    MIN_POSITION,
    tag="users",
    description="Each candidate in its order, with the rules that do not allow it. A rule about an object that a "
    "candidate does not name does not concern it. The rules are those of `conf/frequency.yaml`. A rule among the "
    "`incomplete_rules` may have measured too little: within its time the user's timeline is cut off, by a count or by "
    "the index's horizon.",
    problems={400: ("rules[0]", "it is not allowed"), 413: ("body", "the body is too large")} | LATE,
    body=json_body(
        {
            "user_id": "900",
            "candidates": [{"ad_id": "a18"}, {"ad_id": "a17", "campaign_id": "c8"}],
            "rules": ["ad_daily"],
        },
        {
            "type": "object",
            "required": ["user_id", "candidates"],
            "additionalProperties": False,
            "properties": {
                "user_id": _TEXT,
                "candidates": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_K,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "minProperties": 1,
                        "properties": dict.fromkeys(OBJECTS, _TEXT),
                    },
                },
                "rules": {**_TEXTS, "minItems": 1},
                "now_ms": {"type": "integer", "minimum": 0, "maximum": MAX_TIME_MS},
            },
        },
    ),
)
_SEVERAL_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": sequences.MAX_TEXTS}
_DEFINITION = {
    "type": "object",
    "required": list(sequences.REQUIRED),
    "additionalProperties": False,
    "example": {"actions": ["purchase"], "age": "30d", "max_length": 10, "fields": ["pin_id", "time_ms"]},
    "properties": {
        "name": _TEXT,
        "version": {"type": "integer", "minimum": 1},
        "description": _TEXT,
        "owner": _TEXT,
        "actions": {"type": "array", "items": {"enum": list(ACTIONS)}, "minItems": 1},
        "surfaces": _SEVERAL_TEXTS,
        "categories": _SEVERAL_TEXTS,
        "age": {"type": "string", "pattern": f"^{spans.PATTERN}$", "example": "90d"},
        "max_length": {"type": "integer", "minimum": 1, "maximum": sequences.MAX_LENGTH},
        "deduplicate_by": {"enum": list(OBJECTS)},
        "order": {"enum": list(sequences.ORDERS), "default": sequences.NEWEST_FIRST},
        "fields": {"type": "array", "items": {"enum": list(sequences.EVENT_FIELDS)}, "minItems": 1},
        "enrich": {"type": "array", "items": {"enum": list(sequences.ENRICHMENTS)}, "minItems": 1},
    },
}
SEQUENCES = operation(
    "The sequences of many users",
    {
        "name": "bought_lately",
        "version": 1,
        "now_ms": 1_488_000_000_000,
        "sequences": [
            {
                "user_id": "900",
                "events": [
                    {
                        "pin_id": "1095275",
                        "time_ms": 1_487_994_806_000,
                        "catalogue.title": "FLUID MILK WHITE ONLY",
                        "catalogue.category": "FLUID MILK PRODUCTS",
                        "offer.price_usd_micros": 500_000,
                        "offer.is_available": True,
                    }
                ],
                "is_complete": True,
            }
        ],
    },
    MIN_POSITION,
    tag="users",
    description="By a declared `name`, of the newest published version unless `version` says otherwise, or by a "
    "`definition` that comes with the request. Sequences are in the order in which users were asked for; of an unknown "
    "user it is empty. Events are those that happened up to `now_ms` (now, if it is absent); enrichments are as they "
    f"are now. With `Accept: {ARROW}` the answer is an Arrow stream with a row an event: `user_id` and the same "
    "columns; what is not a column (name, version, now_ms, and of each user the `length` in rows and whether it "
    "`is_complete`) stands as JSON in the schema's metadata `tidemark.sequences`.",
    problems={
        400: ("definition.fields[0]", "pinid is not allowed; did you mean `pin_id`?"),
        413: ("body", "the body is too large"),
    }
    | LATE,
    body=json_body(
        {"user_ids": ["900", "1312"], "name": "bought_lately", "now_ms": 1_488_000_000_000},
        {
            "type": "object",
            "required": ["user_ids"],
            "additionalProperties": False,
            "properties": {
                "user_ids": {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_USERS},
                "name": _TEXT,
                "version": {"type": "integer", "minimum": 1},
                "definition": _DEFINITION,
                "now_ms": {"type": "integer", "minimum": 0, "maximum": MAX_TIME_MS},
            },
        },
    ),
)
SEQUENCES["responses"]["200"]["content"][ARROW] = {"schema": {"type": "string", "format": "binary"}}
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
