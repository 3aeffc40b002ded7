"""What a call to the process `ads` may say, and what a record of the bypass must be."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from pipelines.ads import calls
from pipelines.ads.refresh import FAMILIES, Choice
from pipelines.contracts import ADS_BUDGETS, Refusal, decode
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
