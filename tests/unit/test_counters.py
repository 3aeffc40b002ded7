"""The SQL of counters where it ends, and how counters are asked for over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.contracts import ACTIONS, OBJECTS
from pipelines.serving.app import create_app
from pipelines.users import counter_sql
from pipelines.users.counter_sql import BadSql
from pipelines.users.counters import COLUMNS
from pipelines.users.spans import span_ms
from tests import serving_world as world
from tests.conftest import small_settings
from tests.unit.test_serving import Client

GOOD = "SELECT count(*) FROM events WHERE user = 'u' AND age < '1d'"
BY_ACTION = GOOD.replace("count(*)", "action, count(*)") + " GROUP BY action"
TWO_NAMES = GOOD.replace("count(*)", "{}, count(*)") + " GROUP BY {}"
IDS = [f"'{number}'" for number in range(1_001)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("¦", "not whole"),
        ("  -- nothing\n¦", "not whole"),
        (GOOD + "; ¦DROP TABLE events", "cannot stand here"),
        (GOOD + ";¦;", "cannot stand here"),
        ("¦DROP TABLE events", "cannot stand here"),
        ("¦DELETE FROM events", "cannot stand here"),
        ("¦FROM events SELECT count(*) WHERE user = 'u' AND age < '1d'", "cannot stand here"),
        ("¦" + GOOD.replace("S", "\u017f", 1), "cannot stand here"),
        (GOOD + " ¦UNION " + GOOD, "cannot stand here"),
        (GOOD + " ¦FOR UPDATE", "cannot stand here"),
        (GOOD + " ¦HAVING count(*) > 1", "cannot stand here"),
        (GOOD + " ¦ORDER BY 1", "cannot stand here"),
        (GOOD + " ¦LIMIT 10", "cannot stand here"),
        (GOOD + " ¦OFFSET 5", "cannot stand here"),
        (GOOD + " ¦/* not closed", "cannot stand here"),
        (GOOD + " ¦{# not SQL #}", "cannot stand here"),
        (GOOD + " /* a /* b */ ¦*/", "cannot stand here"),
        (BY_ACTION + " ¦WITH ROLLUP", "cannot stand here"),
        (BY_ACTION + ",¦", "not whole"),
        (BY_ACTION.replace("BY action", "BY¦"), "not whole"),
        (BY_ACTION.replace("BY ", "BY ¦ALL, "), "no column 'ALL'"),
        (BY_ACTION.replace("BY ", "BY ¦DISTINCT "), "no column 'DISTINCT'"),
        (BY_ACTION + ", ¦action", "action is named twice"),
        (BY_ACTION + ", ¦surface", "surface is not selected"),
        (GOOD + " GROUP BY ¦action", "action is not selected"),
        (GOOD.replace("count", "action, count") + "¦", "GROUP BY does not name action"),
        (GOOD.replace("count", "action, ad, count") + " GROUP BY action¦;", "GROUP BY does not name ad_id"),
        (TWO_NAMES.format("object, ¦pin_id AS b", "object"), "pin_id is selected twice"),
        (TWO_NAMES.format("action, ¦action AS b", "action"), "action is selected twice"),
        (TWO_NAMES.format("user, ¦user_id", "user"), "user_id is selected twice"),
        (TWO_NAMES.format("action AS b, ad AS ¦b", "action, ad"), "one name"),
        (TWO_NAMES.format("action AS ¦count", "action").replace("¦", "").replace(" count(", " ¦count("), "one name"),
        (TWO_NAMES.format('action AS ¦""', "action"), "0 characters"),
        (TWO_NAMES.format("action AS ¦" + "b" * 65, "action"), "65 characters"),
        (GOOD.replace("SELECT ", "SELECT ¦/*+ hint */ "), "cannot stand here"),
        (GOOD.replace("SELECT ", "SELECT ¦DISTINCT "), "no column 'DISTINCT'"),
        ("SELECT " + "¦DATE(" + "DATE(" * 4_000, "no column 'DATE'"),
        (GOOD.replace("count(*)", "count(*), ¦count(*)"), "count(*) is selected twice"),
        (GOOD.replace("count(*) ", "action ¦"), "count(*) is not selected"),
        (GOOD.replace("count(*)", "count(¦action)"), "cannot stand here"),
        (GOOD.replace("count(*)", "count(¦ALL *)"), "cannot stand here"),
        (GOOD.replace("count(*)", "count(* ¦EXCEPT (a))"), "cannot stand here"),
        (GOOD.replace("count(*)", "¦{fn count(*)}"), "cannot stand here"),
        (GOOD.replace("count(*)", '¦"count"(*)'), "no column 'count'"),
        (GOOD.replace("count(*)", "count(*) ¦OVER ()"), "cannot stand here"),
        (GOOD.replace("count(*)", "count(*) ¦n"), "cannot stand here"),
        (GOOD.replace("count(*)", "¦sum(quantity)"), "no column 'sum'"),
        (GOOD.replace("events", "¦users"), "nothing else"),
        (GOOD.replace("events", "events¦, users"), "cannot stand here"),
        (GOOD.replace("events", "events¦.events"), "cannot stand here"),
        ("SELECT count(*) FROM events¦", "not whole"),
        (GOOD.replace("'1d'", "¦'91d'"), "'91d' is not an age"),
        (GOOD.replace("'1d'", "¦'1 month'"), "'1 month' is not an age"),
        (GOOD.replace("'1d'", "¦1"), "cannot stand here"),
        (GOOD.replace("<", "¦="), "cannot stand here"),
        (GOOD.replace("AND", "¦OR"), "cannot stand here"),
        (GOOD.replace("=", "¦>"), "cannot stand here"),
        (GOOD.replace("=", "¦=="), "cannot stand here"),
        (GOOD.replace("user =", "user¦" + "::int" * 4_000 + " ="), "cannot stand here"),
        (GOOD.replace("user", "¦a" + ".a" * 4_000), "no column 'a'"),
        (GOOD.replace("= 'u'", "= ¦u"), "cannot stand here"),
        (GOOD.replace("= 'u'", "= ¦?"), "cannot stand here"),
        (GOOD.replace("= 'u'", "= ¦N'u'"), "cannot stand here"),
        (GOOD.replace("= 'u'", "= 'u' ¦'v'"), "cannot stand here"),
        (GOOD.replace("= 'u'", "= ¦''"), "the text is empty"),
        (GOOD.replace("= 'u'", "= ¦'\0'"), "the text is empty"),
        (GOOD.replace("= 'u'", "= ¦'\ud800'"), "the text is empty"),
        (GOOD.replace("= 'u'", f"= ¦'{'ü' * 257}'"), "the text is empty, too long"),
        (GOOD.replace("'1d'", "¦'1d"), "its quote is not closed"),
        (GOOD.replace("user = 'u'", '¦"user = 0'), "its quote is not closed"),
        *((GOOD.replace("'u'", f"¦{call}(" + f"{call}(" * 4_000 + "'u'" + ")" * 4_001), "cannot stand here")
          for call in ("DATE", "DECIMAL", "STRUCT", "")),
        (GOOD.replace("= 'u'", "IN (¦SELECT user FROM events)"), "cannot stand here"),
        (GOOD.replace("= 'u'", "IN ('u', ¦NULL)"), "cannot stand here"),
        (GOOD.replace("= 'u'", "IN ('u',¦)"), "cannot stand here"),
        (GOOD.replace("= 'u'", "IN (¦)"), "cannot stand here"),
        (GOOD.replace("= 'u'", f"IN ({', '.join(IDS[:-1])}, ¦{IDS[-1]})"), "more than 1,000 values"),
        (GOOD.replace("user = 'u' AND ", "") + "¦", "whose events"),
        (GOOD.replace(" AND age < '1d'", "") + " ¦;", "of what age"),
        (GOOD + " AND ¦age < '2d'", "bounded twice"),
        (GOOD + " AND action = 'view' AND ¦action = 'click'", "bounded twice"),
        (GOOD + " AND ¦color = 'red'", "no column 'color'"),
        (GOOD + " AND ¦events.action = 'view'", "no column 'events'"),
        (GOOD + " AND ¦NOT action = 'view'", "no column 'NOT'"),
        (GOOD + " AND ¦TRUE", "no column 'TRUE'"),
        (GOOD + " AND ¦" + "(" * 5_000, "cannot stand here"),
        (GOOD + " AND surface = ¦NULL", "cannot stand here"),
        (GOOD + " AND surface = ¦TRUE", "cannot stand here"),
        (GOOD + " AND action IN ('view', ¦'veiw')", "no action 'veiw'"),
        (GOOD + " AND¦", "not whole"),
        (GOOD + " " * (65_536 - len(GOOD)) + "¦ ", "65,537 characters"),
    ],
)  # fmt: skip
def test_a_text_that_leaves_the_grammar_is_refused_where_it_does(text: str, said: str) -> None:
    with pytest.raises(BadSql) as refused:
        counter_sql.parse(text.replace("¦", ""))
    assert said in refused.value.message
    assert refused.value.position == text.index("¦")
    assert refused.value.allowed


@pytest.mark.parametrize(
    "text",
    [
        GOOD + ";",
        GOOD.replace(" ", "\n\n"),
        GOOD.replace("events", '"events"'),
        GOOD.replace("events", "events -- all of them\n"),
        "/* how often */" + GOOD.replace("events", "events /* x */") + "-- so often",
        GOOD.replace("user = ", "user=").replace("age < ", '"AGE"<').lower(),
        GOOD.replace("count(*)", "COUNT ( * ) AS count"),
    ],
)
def test_the_same_sentence_is_written_in_many_ways(text: str) -> None:
    assert counter_sql.parse(text) == counter_sql.parse(GOOD)


def test_an_action_that_there_is_not_is_refused_with_the_choices() -> None:
    with pytest.raises(BadSql) as refused:
        counter_sql.parse(GOOD + " AND action = 'veiw'")
    assert refused.value.allowed == "one of " + ", ".join(ACTIONS)


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
        ({"user_ids": ["u"], "age_ms": 60_000, "where": {"action": ["view", "veiw"]}}, "where.action[1]"),
        ({"user_ids": ["u"], "age_ms": 60_000, "where": ["view"]}, "where"),
        ({"user_ids": ["u"], "age_ms": 60_000, "object": "ad_id"}, "object"),
        ({"user_ids": ["u"], "age_ms": 60_000, "more": 1}, "more"),
        ({"pairs": [["u", "a"]], "age_ms": 60_000}, "object"),
        ({"pairs": [["u", "a"]], "age_ms": 60_000, "object": "surface"}, "object"),
        (
            {"pairs": [["u", "a"]], "age_ms": 60_000, "object": "ad_id", "where": {"action": ["veiw"]}},
            "where.action[0]",
        ),
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
