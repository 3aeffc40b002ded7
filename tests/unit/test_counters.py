"""The SQL of counters where it ends, and how counters are asked for over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.contracts import OBJECTS
from pipelines.serving.app import create_app
from pipelines.users import counter_sql
from pipelines.users.counter_sql import BadSql
from pipelines.users.counters import COLUMNS
from pipelines.users.spans import span_ms
from tests import serving_world as world
from tests.conftest import small_settings
from tests.unit.test_serving import Client

GOOD = "SELECT count(*) FROM events WHERE user = 'u' AND age < '1d'"


@pytest.mark.parametrize(
    ("text", "there", "said"),
    [
        ("", "", "not one sentence"),
        (GOOD + "; DROP TABLE events", "SELECT", "not one sentence"),
        ("DELETE FROM events", "events", "DELETE is not allowed"),
        (GOOD + " UNION " + GOOD, "count", "UNION is not allowed"),
        ("SELECT count(*) FROM events", "count", "there is no WHERE"),
        (GOOD.replace("'1d'", "'91d'"), "'91d'", "'91d' is not an age"),
        (GOOD.replace("'1d'", "'1 month'"), "'1 month'", "is not an age"),
        (GOOD.replace("'1d'", "1"), "1", "is not an age"),
        (GOOD.replace("AND", "OR"), "user = 'u' OR", "none of the conditions"),
        (GOOD.replace("=", ">"), "user >", "none of the conditions"),
        (GOOD.replace("= 'u'", "= u"), "u AND", "not a text"),
        (GOOD.replace("'u'", "''"), "'' AND", "the text is empty"),
        (GOOD.replace("= 'u'", "IN (SELECT user FROM events)"), "user IN", "none of the conditions"),
        (GOOD.replace("user = 'u' AND ", ""), "age", "whose events"),
        (GOOD.replace(" AND age < '1d'", ""), "user", "of what age"),
        (GOOD + " AND age < '2d'", "age < '2d'", "bounded twice"),
        (GOOD + " AND action = 'view' AND action = 'click'", "action = 'click'", "bounded twice"),
        (GOOD + " AND color = 'red'", "color", "no column 'color'"),
        (GOOD + " AND events.action = 'view'", "events.action", "no column"),
        (GOOD + " GROUP BY action", "action", "not those of GROUP BY"),
        (GOOD.replace("count(*)", "action, count(*)"), "action", "not those of GROUP BY"),
        (GOOD + " HAVING count(*) > 1", "count(*) > 1", "HAVING is not allowed"),
        (GOOD + " ORDER BY 1", "1", "ORDER is not allowed"),
        (GOOD + " LIMIT 5", "5", "LIMIT is not allowed"),
        (GOOD.replace("count(*)", "count(action)"), "count(action)", "only count(*) counts"),
        (GOOD.replace("count(*)", "sum(quantity)"), "sum", "no column"),
        (GOOD.replace("count(*)", "count(*), count(*)"), "count", "not selected once"),
        (GOOD.replace("count(*)", "count(*) OVER ()"), "count", "no column"),
        (GOOD.replace("events", "users"), "users", "nothing else"),
        (GOOD.replace("events", "events, users"), "users", "JOINS is not allowed"),
        (GOOD + " AND", "AND", "Required keyword"),
        (GOOD.replace("WHERE", "WHERE\n\n"), None, ""),
        (GOOD.replace("= 'u'", "= 'u"), "SELECT", "not SQL"),
        (GOOD + " AND " + "(" * 5_000, "SELECT", "not SQL"),
        (GOOD + " " * 70_000, "", "70,059 characters"),
        (f"SELECT count(*) FROM events WHERE user IN ({', '.join(map(repr, map(str, range(1_001))))}) AND age < '1d'",
         "user", "1,001 values"),
    ],
)  # fmt: skip
def test_a_text_that_leaves_the_grammar_is_refused_where_it_does(
    text: str, there: str | None, said: str
) -> None:
    if there is None:
        counter_sql.parse(text)
        return
    with pytest.raises(BadSql) as refused:
        counter_sql.parse(text)
    assert said in refused.value.message
    assert text[refused.value.position :].startswith(there)
    assert refused.value.allowed


def test_columns_are_the_texts_of_an_event() -> None:
    assert {"action", "surface", "view_type", *OBJECTS} == set(COLUMNS)


@pytest.mark.parametrize(
    ("text", "ms"),
    [("1m", 60_000), ("36 H", 129_600_000), ("2w", 1_209_600_000), ("0d", None), ("d", None), ("1.5d", None)],
)
def test_spans(text: str, ms: int | None) -> None:
    assert span_ms(text) == ms


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    settings = small_settings(tmp_path_factory.mktemp("counters"), SERVING__MAX_WAIT_MS=300)
    world.build_world(settings)
    shown = {"surface": "home", "view_type": "promoted", "campaign_id": "c1"}
    seen = [
        world.event(
            "u0", f"v{n}", str(n % 2), "view", world.NEWEST_MS - n * 60_000, ad_id=f"a{n % 2}", **shown
        )
        for n in range(5)
    ]
    with world.followed(settings) as replica:
        still = world.still(replica)
        still.followers["user_events"].fold([happened for happened, _ in seen])  # type: ignore[attr-defined]
        yield Client(create_app(settings, still))


def asked(client: Client, **body: Any) -> Any:
    reply = client.call("POST", "/v1/counters:query", json.dumps({"now_ms": world.NEWEST_MS} | body).encode())
    assert reply.status == 200, reply.body
    assert reply.headers["tidemark-base-version"]
    assert reply.json["basis"] == {"now_ms": world.NEWEST_MS, "incomplete_user_ids": []}
    return reply.json["counts"]


def test_counts_by_group(client: Client) -> None:
    hour = 3_600_000
    assert asked(client, user_ids=["u0"], age_ms=hour) == [{"count": 6}]  # e0 was bought just now
    by_action = [{"action": "purchase", "count": 1}, {"action": "view", "count": 5}]
    assert asked(client, user_ids=["u0", "nobody"], age_ms=hour, group_by=["action"]) == by_action
    where = {"ad_id": ["a1", "a7"], "view_type": ["promoted"]}
    grouped = asked(client, user_ids=["u1", "u0"], age_ms=hour, where=where, group_by=["user_id", "ad_id"])
    assert grouped == [{"user_id": "u0", "ad_id": "a1", "count": 2}]
    assert asked(client, user_ids=["u0"], age_ms=120_000, where={"action": ["view"]}) == [{"count": 2}]
    text = "SELECT Ad, count(*) AS n FROM events WHERE user = 'u0' AND age < '1h' AND action = 'view' GROUP BY ad"
    assert asked(client, sql=text) == [{"Ad": "a0", "n": 3}, {"Ad": "a1", "n": 2}]


def test_counts_of_pairs(client: Client) -> None:
    pairs = [["u0", "a1"], ["nobody", "a1"], ["u0", "a0"], ["u0", "a1"]]
    found = asked(client, pairs=pairs, object="ad_id", age_ms=3_600_000)
    assert [one["count"] for one in found] == [2, 0, 3, 2]
    assert found[1] == {"user_id": "nobody", "ad_id": "a1", "count": 0}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body"),
        ({"sql": GOOD, "user_ids": ["u"]}, "user_ids"),
        ({"sql": GOOD, "age_ms": 60_000}, "age_ms"),
        ({"sql": 7}, "sql"),
        ({"sql": "SELECT 1"}, "sql"),
        ({"user_ids": []}, "user_ids"),
        ({"user_ids": ["u"]}, "age_ms"),
        ({"user_ids": ["u"], "age_ms": 59_999}, "age_ms"),
        ({"user_ids": ["u"], "age_ms": 90 * 86_400_000 + 1}, "age_ms"),
        ({"user_ids": ["u", 7], "age_ms": 60_000}, "user_ids[1]"),
        ({"user_ids": ["u"] * 1_001, "age_ms": 60_000}, "user_ids"),
        ({"user_ids": ["u"], "age_ms": 60_000, "group_by": ["colour"]}, "group_by[0]"),
        ({"user_ids": ["u"], "age_ms": 60_000, "group_by": ["action", "action"]}, "group_by"),
        ({"user_ids": ["u"], "age_ms": 60_000, "where": {"colour": ["red"]}}, "where.colour"),
        ({"user_ids": ["u"], "age_ms": 60_000, "where": {"action": []}}, "where.action"),
        ({"user_ids": ["u"], "age_ms": 60_000, "where": ["view"]}, "where"),
        ({"user_ids": ["u"], "age_ms": 60_000, "object": "ad_id"}, "object"),
        ({"user_ids": ["u"], "age_ms": 60_000, "more": 1}, "more"),
        ({"pairs": [["u", "a"]], "age_ms": 60_000}, "object"),
        ({"pairs": [["u", "a"]], "age_ms": 60_000, "object": "surface"}, "object"),
        ({"pairs": [["u"]], "age_ms": 60_000, "object": "ad_id"}, "pairs[0]"),
        ({"pairs": [["u", ""]], "age_ms": 60_000, "object": "ad_id"}, "pairs[0][1]"),
        ({"pairs": [], "age_ms": 60_000, "object": "ad_id"}, "pairs"),
        ({"pairs": [["u", "a"]], "age_ms": 60_000, "object": "ad_id", "now_ms": -1}, "now_ms"),
    ],
)
def test_a_bad_question_is_refused_by_its_field(client: Client, body: Any, field: str) -> None:
    reply = client.call("POST", "/v1/counters:query", json.dumps(body).encode())
    assert (reply.status, reply.json["error"]["field"]) == (400, field), reply.body
    assert reply.json["error"]["allowed"]


def test_sql_is_refused_with_its_position(client: Client) -> None:
    body = json.dumps({"sql": GOOD.replace("'1d'", "'99d'")}).encode()
    error = client.call("POST", "/v1/counters:query", body).json["error"]
    assert error["message"].startswith("at character 55 (\"'99d'\")")
