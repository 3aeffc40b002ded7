"""What a call to the process `ads` may say, and what a record of the bypass must be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest

from pipelines import tracing
from pipelines.ads import calls
from pipelines.ads.publisher import Published, Sent
from pipelines.ads.refresh import FAMILIES, Choice
from pipelines.contracts import ADS_BUDGETS, Refusal, decode
from pipelines.indexing.position import EMPTY, Position
from pipelines.ingest.http import Problem

NOW_MS = 1_700_000_000_000
GOOD = ADS_BUDGETS.examples[0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[1]", "body"),
        (b"{}", "body"),
        (b'{"all": false}', "all"),
        (b'{"all": true, "ad_ids": ["a"]}', "all"),
        (b'{"all": true, "limit": 3}', "limit"),
        (b'{"ad_ids": []}', "ad_ids"),
        (b'{"ad_ids": "a1"}', "ad_ids"),
        (b'{"ad_ids": ["a", 1]}', "ad_ids[1]"),
        (b'{"ad_ids": ["a", ""]}', "ad_ids[1]"),
        (b'{"where": {}}', "where"),
        (b'{"where": {"campaign_id": "c", "pin_id": "p"}}', "where"),
        (b'{"where": {"name": "c"}}', "where.name"),
        (b'{"where": {"campaign_id": 1}}', "where.campaign_id"),
        (b'{"all": true, "families": []}', "families"),
        (b'{"all": true, "families": ["vector"]}', "families"),
        (b'{"all": true, "families": [["control"]]}', "families"),
        (orjson.dumps({"ad_ids": ["a"] * (calls.MAX_BACKFILLED + 1)}), "ad_ids"),
    ],
)
def test_a_body_that_chooses_no_ads_is_refused_by_its_field(body: bytes, field: str) -> None:
    with pytest.raises(Problem) as refused:
        calls.choice_of(body)
    assert (refused.value.status, refused.value.error["field"]) == (400, field)
    assert refused.value.error["allowed"]


def test_ads_are_chosen_by_id_by_row_or_all() -> None:
    every = list(FAMILIES)
    assert calls.choice_of(b'{"ad_ids": ["b", "a", "b"]}') == (Choice(ad_ids=("b", "a")), every)
    assert calls.choice_of(b'{"where": {"pin_id": "p"}}') == (Choice(where=("pin_id", "p")), every)
    assert calls.choice_of(b'{"all": true, "families": ["content"]}') == (Choice(), ["content"])


def test_who_waits_gets_the_position_that_covers_the_keys_of_its_rows() -> None:
    few, before, many = (Position({topic: {0: end}}) for topic, end in (("f@1", 9), ("f@1", 4), ("b@1", 500)))
    campaign = ("campaigns", "c1")
    sent = Sent()
    assert sent.wait(0, [campaign], 0.01) is None
    sent.begin(before)
    sent.add(Published(3, {}, [], EMPTY, {campaign: many}))
    assert sent.wait(3, [("ads", "a1")], 0) == before
    assert sent.wait(3, [("ads", "a1"), campaign], 0) == before.merge(many)
    assert sent.wait(4, [campaign], 0.01) is None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(sent.wait, 7, [("ads", "a1")], 60)
        sent.add(Published(8, {}, [], few, {}))
        assert waiting.result() == few
    sent.add(Published(2, {}, [], EMPTY, {}))  # nothing goes back
    assert sent.wait(8, [], 0) == few


def test_of_large_changes_the_newest_are_known() -> None:
    sent, position = Sent(), Position({"b@1": {0: 1}})
    for start in range(0, 12_000, 500):
        rows = {("pins", f"p{n}"): position for n in range(start, start + 500)}
        sent.add(Published(start, {}, [], EMPTY, {("pins", "often"): position} | rows))
    assert sent.wait(0, [("pins", "p0")], 0) == EMPTY
    for key in ("often", "p3000", "p11999"):
        assert sent.wait(0, [("pins", key)], 0) == position


@pytest.mark.parametrize("wait_ms", [-1, 5_001, "10", 1.5, True, None])
def test_a_time_to_wait_that_is_none_is_refused_before_anything_is_sent(wait_ms: Any) -> None:
    body = orjson.dumps({"changes": [{}], "wait_ms": wait_ms})
    with pytest.raises(Problem) as refused:
        calls.update(None, body, tracing.begin())  # type: ignore[arg-type]
    assert refused.value.error["field"] == "wait_ms"


def test_a_record_of_the_bypass() -> None:
    row = decode(ADS_BUDGETS, orjson.dumps(GOOD), NOW_MS)
    assert not isinstance(row, Refusal)
    assert (row["table"], row["key"], row["stand"], row["committed_at"]) == ("campaigns", "c1", 51, None)
    assert orjson.loads(row["values"]) == GOOD["values"]


@pytest.mark.parametrize(
    ("wrong", "reason", "field"),
    [
        ({"table": "pins"}, "unknown_table", "table"),
        ({"table": ["ads"]}, "unknown_table", "table"),
        ({"key": ""}, "empty_id", "key"),
        ({"stand": None}, "missing_field", "stand"),
        ({"stand": 0}, "out_of_range", "stand"),
        ({"values": None}, "missing_field", "values"),
        ({"values": {"status": "paused"}}, "missing_field", "values"),
        ({"values": GOOD["values"] | {"name": "x"}}, "missing_field", "values"),
        ({"values": GOOD["values"] | {"daily_budget_usd_micros": -1}}, "out_of_range", "values.daily_budget"),
        ({"committed_at_ms": "soon"}, "bad_time", "committed_at_ms"),
    ],
)
def test_a_record_of_the_bypass_that_says_less_is_refused(
    wrong: dict[str, Any], reason: str, field: str
) -> None:
    row = decode(ADS_BUDGETS, orjson.dumps({**GOOD, **wrong}), NOW_MS)
    assert isinstance(row, Refusal)
    assert row.reason == reason and str(row.field).startswith(field)
