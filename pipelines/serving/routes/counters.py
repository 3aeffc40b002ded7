"""Routes about how often users did something: counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.contracts import OBJECTS
from pipelines.serving import documents, operations
from pipelines.serving.inputs import (
    Problem,
    natural_of,
    now_ms_of,
    object_of,
    read_object,
    text_of,
    texts_of,
)
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import EVENTS
from pipelines.users import counter_sql, counters
from pipelines.users.counters import (
    CHOICES,
    COLUMNS,
    MAX_PAIRS,
    MAX_USERS,
    MAX_VALUES,
    USER,
    Counts,
    Pairs,
    Query,
)
from pipelines.users.spans import MAX_SPAN_MS, MIN_SPAN_MS

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.indexing.timelines import TimelineView
    from pipelines.serving.standing import Ground

_BODY = {
    "sql": counter_sql.GRAMMAR,
    "user_ids": f"a list of 1 to {MAX_USERS} ids",
    "pairs": f"a list of 1 to {MAX_PAIRS} pairs [user id, id of the object]",
    "object": list(OBJECTS),
    "where": dict.fromkeys(COLUMNS, f"a list of at most {MAX_VALUES} texts"),
    "age_ms": f"a whole number from {MIN_SPAN_MS} to {MAX_SPAN_MS}",
    "group_by": [USER, *COLUMNS],
    "now_ms": "ms since 1970; now, if it is absent",
}
_WAYS = {
    "sql": ("sql", "now_ms"),
    "user_ids": ("user_ids", "where", "age_ms", "group_by", "now_ms"),
    "pairs": ("pairs", "object", "where", "age_ms", "now_ms"),
}
"""How it may be asked, by the field that decides it → what may stand beside it."""
Said = dict[str, Any]


def register(app: FastAPI, ground: Ground) -> None:
    """Add the routes."""

    async def query(call: Call) -> Answer:
        position = call.query("min_position").min_position()
        said = read_object(await call.body(), call.header(b"content-type"), _BODY)
        way = _way(said)
        now_ms = now_ms_of(said)
        asked = _pairs(said) if way == "pairs" else _sentence(said) if way == "sql" else _query(said)
        standing = await ground.at(position, EVENTS)
        view: TimelineView = standing.views[EVENTS]
        _inside_horizon(view, now_ms, asked)
        counted, incomplete = _answered(view, asked, now_ms)
        basis = {"now_ms": now_ms, "incomplete_user_ids": [documents.text(user) for user in incomplete]}
        return json_answer({"counts": counted, "basis": basis}, standing.headers)

    add(app, "POST", "/v1/counters:query", query, operations.COUNTERS)


def _answered(
    view: TimelineView, asked: Query | Pairs | counter_sql.Sentence, now_ms: int
) -> tuple[list[Said], tuple[bytes, ...]]:
    if isinstance(asked, Pairs):
        found = counters.count_pairs(view, asked, now_ms)
        rows = zip(asked.pairs, found.events.tolist(), strict=True)
        counted = [
            {USER: documents.text(user), asked.object: value, "count": events}
            for (user, value), events in rows
        ]
        return counted, found.incomplete
    if isinstance(asked, Query):
        asked = counter_sql.Sentence(asked, asked.group_by, "count")
    groups: Counts = counters.count(view, asked.query, now_ms)
    counted = [
        {**dict(zip(asked.names, group.values, strict=True)), asked.count_name: group.events}
        for group in groups.groups
    ]
    return counted, groups.incomplete


def _inside_horizon(view: TimelineView, now_ms: int, asked: Query | Pairs | counter_sql.Sentence) -> None:
    """Raises `Problem` where the range begins before all that is kept."""
    age_ms = asked.query.age_ms if isinstance(asked, counter_sql.Sentence) else asked.age_ms
    horizon = view.base.horizon_from_ms
    if horizon is not None and now_ms - age_ms + 1 < horizon:
        allowed = f"a range that begins at {horizon} ms since 1970, or later"
        raise Problem(400, "age_ms", "the range begins before the horizon of the index", allowed)


# ------------------------------------------------------------------------------------------------ what is asked


def _way(said: Said) -> str:
    ways = [way for way in _WAYS if said.get(way) is not None]
    if len(ways) != 1:
        field = ways[1] if ways else "body"
        raise Problem(400, field, "it is asked in exactly one way", list(_WAYS))
    for name in said:
        if name not in _WAYS[ways[0]]:
            raise Problem(400, name, f"it cannot stand beside {ways[0]}", list(_WAYS[ways[0]]))
    return ways[0]


def _sentence(said: Said) -> counter_sql.Sentence:
    text = said["sql"]
    if not isinstance(text, str):
        raise Problem(400, "sql", "it is not a text", counter_sql.GRAMMAR)
    try:
        return counter_sql.parse(text)
    except counter_sql.BadSql as error:
        there = text[error.position : error.position + 20]
        where = f"at character {error.position}" + (f" ({there!r})" if there else ", its end")
        raise Problem(400, "sql", f"{where}: {error.message}", error.allowed) from None


def _query(said: Said) -> Query:
    users = texts_of(said, "user_ids", "user_ids", MAX_USERS)
    if not users:
        raise Problem(400, "user_ids", "there are no ids", _BODY["user_ids"])
    grouped = texts_of(said, "group_by", "group_by", choices=(USER, *COLUMNS))
    if len(set(grouped)) != len(grouped):
        raise Problem(400, "group_by", "a column is there twice", [USER, *COLUMNS])
    unique = tuple(dict.fromkeys(user.encode() for user in users))
    return Query(unique, _age_ms(said), _where(said), grouped)


def _pairs(said: Said) -> Pairs:
    about = text_of(said.get("object"), "object", OBJECTS)
    given = said["pairs"]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_PAIRS:
        raise Problem(400, "pairs", "it is not such a list", _BODY["pairs"])
    for place, pair in enumerate(given):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Problem(400, f"pairs[{place}]", "it is not a pair", _BODY["pairs"])
    pairs = tuple(
        (text_of(user, f"pairs[{place}][0]").encode(), text_of(value, f"pairs[{place}][1]"))
        for place, (user, value) in enumerate(given)
    )
    return Pairs(pairs, about, _age_ms(said), _where(said))


def _where(said: Said) -> dict[str, tuple[str, ...]]:
    if said.get("where") is None:
        return {}
    given = object_of(said["where"], "where", _BODY["where"])  # type: ignore[arg-type]
    found = {
        name: texts_of(given, name, f"where.{name}", MAX_VALUES, CHOICES.get(name, ())) for name in given
    }
    for name, values in found.items():
        if not values:
            raise Problem(400, f"where.{name}", "there are no texts", f"1 to {MAX_VALUES} texts")
    return found


def _age_ms(said: Said) -> int:
    found = natural_of(said, "age_ms", "age_ms", MIN_SPAN_MS, MAX_SPAN_MS)
    if found is None:
        raise Problem(400, "age_ms", "it is missing", _BODY["age_ms"])
    return found
