"""The contract of `ads-changes`: both shapes, one row, and what is refused with which reason."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from pipelines.ads import updater
from pipelines.ads.repository import Update
from pipelines.ads.schema import ADVERTISERS, IMAGES, PINS, TABLES
from pipelines.contracts import ADS_CHANGES, RECORD, Refusal, decode, decode_table
from pipelines.contracts.ads_changes import MAX_VERSION, UNAVAILABLE, transaction_of

NOW_MS = 1_700_000_000_000
PLAIN = {"table": "campaigns", "key": "c1", "version": 17, "values": {"status": "paused"}}
IMAGE = {column.name: None for column in IMAGES.columns} | {"image_signature": "i1", "width_px": 800}
SOURCE = {"table": "images", "lsn": 5, "ts_ms": NOW_MS - 1}
CAPTURED = {"op": "u", "before": None, "after": IMAGE, "source": SOURCE, "transaction": {"id": "571:9"}}


def decided(record: dict[str, Any]) -> dict[str, Any] | Refusal:
    return decode(ADS_CHANGES, json.dumps(record).encode(), NOW_MS)


def row(record: dict[str, Any]) -> dict[str, Any]:
    found = decided(record)
    assert isinstance(found, dict), found
    return found


def reason(record: dict[str, Any]) -> tuple[str, str | None]:
    found = decided(record)
    assert isinstance(found, Refusal), found
    return found.reason, found.field


def test_a_record_names_what_changed() -> None:
    found = row(PLAIN | {"transaction": {"id": "t9", "count": 3}, "event_time": NOW_MS - 5})
    assert (found["table"], found["key"], found["version"], found["is_deleted"]) == (
        "campaigns",
        "c1",
        17,
        False,
    )
    assert found["values"] == '{"status":"paused"}'
    assert (found["transaction_id"], found["transaction_count"]) == ("t9", 3)
    assert found["event_time"].timestamp() * 1000 == NOW_MS - 5


def test_what_is_not_declared_flows_and_what_is_is_made_canonical() -> None:
    values = {
        "grown": {"b": 1, "a": [2]},
        "starts_at": "2023-11-14T22:13:20.0004Z",
        "labels": ["b", "a", "b"],
    }
    found = json.loads(row(PLAIN | {"values": values})["values"])
    assert found == {"grown": {"a": [2], "b": 1}, "starts_at": NOW_MS, "labels": ["a", "b"]}


def test_a_producers_record_may_have_fields_that_debezium_uses() -> None:
    more = PLAIN | {"source": "crm", "status": "new", "transaction": {"id": "t9", "count": 1}}
    assert row(more) == row(PLAIN | {"transaction": {"id": "t9", "count": 1}})
    assert transaction_of(json.dumps(more).encode()) == "t9"


def test_a_deletion_has_no_values() -> None:
    found = row({"op": "delete", "table": "ads", "key": "a1", "version": 18})
    assert found["is_deleted"] and found["values"] is None


def test_a_captured_row_says_all_its_columns_but_what_was_not_read() -> None:
    found = row(CAPTURED | {"after": IMAGE | {"annotations": UNAVAILABLE, "objects": [UNAVAILABLE]}})
    assert (found["table"], found["key"], found["version"]) == ("images", "i1", 5)
    assert set(json.loads(found["values"])) == {c.name for c in IMAGES.columns} - {"annotations", "objects"}
    assert (found["transaction_id"], found["transaction_count"]) == ("xid:571", None)
    deleted = row(CAPTURED | {"op": "d", "before": {"image_signature": "i1"}, "after": None})
    assert deleted["is_deleted"] and deleted["key"] == "i1"


def test_a_transaction_has_a_beginning_and_an_end() -> None:
    begun, ended = (
        row({"status": "BEGIN", "id": "571:9"}),
        row({"status": "END", "id": "571:9", "event_count": 2}),
    )
    assert begun["table"] is ended["table"] is None
    assert (begun["transaction_count"], ended["transaction_count"]) == (None, 2)
    assert begun["content_hash"] != ended["content_hash"]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (PLAIN | {"table": "campaign"}, ("unknown_table", "table")),
        (PLAIN | {"table": None}, ("missing_field", "table")),
        (PLAIN | {"key": ""}, ("empty_id", "key")),
        (PLAIN | {"key": 5}, ("wrong_type", "key")),
        ({k: v for k, v in PLAIN.items() if k != "key"}, ("missing_field", "key")),
        ({k: v for k, v in PLAIN.items() if k != "version"}, ("missing_field", "version")),
        (PLAIN | {"version": 0}, ("out_of_range", "version")),
        (PLAIN | {"version": MAX_VERSION + 1}, ("out_of_range", "version")),
        (PLAIN | {"values": None}, ("missing_field", "values")),
        (
            PLAIN | {"values": {"daily_budget_usd_micros": -1}},
            ("out_of_range", "values.daily_budget_usd_micros"),
        ),
        (
            PLAIN | {"values": {"daily_budget_usd_micros": 1.5}},
            ("wrong_type", "values.daily_budget_usd_micros"),
        ),
        (PLAIN | {"values": {"status": "gone"}}, ("out_of_range", "values.status")),
        (PLAIN | {"values": {"name": "\0"}}, ("nul_character", "values.name")),
        (PLAIN | {"values": {"advertiser_id": ""}}, ("empty_id", "values.advertiser_id")),
        (PLAIN | {"values": {"starts_at": "2023-11-14T22:13:20"}}, ("bad_time", "values.starts_at")),
        (PLAIN | {"values": {"labels": ["x"] * 2000}}, ("too_long", "values.labels")),
        (PLAIN | {"op": "truncate"}, ("unknown_op", "op")),
        (PLAIN | {"transaction": {"id": "t9", "count": 0}}, ("out_of_range", "transaction.count")),
        (PLAIN | {"transaction": "t9"}, ("wrong_type", "transaction")),
        (PLAIN | {"transaction": {"id": "t9"}}, ("missing_field", "transaction.count")),
        (PLAIN | {"event_time": NOW_MS + 7_200_000}, ("time_ahead", "event_time")),
        (CAPTURED | {"op": "t"}, ("unknown_op", "op")),
        (CAPTURED | {"source": SOURCE | {"table": "other"}}, ("unknown_table", "source.table")),
        (CAPTURED | {"after": None}, ("missing_field", "after")),
        (
            CAPTURED | {"after": {k: v for k, v in IMAGE.items() if k != "safety"}},
            ("missing_field", "after.safety"),
        ),
        (CAPTURED | {"after": IMAGE | {"safety": "high"}}, ("wrong_type", "after.safety")),
        ({"status": "DONE", "id": "571:9"}, ("unknown_op", "status")),
        ({"status": "END", "id": "571:9"}, ("missing_field", "event_count")),
    ],
)
def test_what_is_refused(record: dict[str, Any], wanted: tuple[str, str]) -> None:
    assert reason(record) == wanted


def test_one_tables_change_upstream_stops_no_other() -> None:
    dropped = {k: v for k, v in IMAGE.items() if k != "safety"}
    found = decided(CAPTURED | {"after": dropped})
    assert isinstance(found, Refusal) and "images has no column safety" in found.detail
    advertiser = {column.name: None for column in ADVERTISERS.columns} | {"advertiser_id": "v1"}
    assert row(CAPTURED | {"after": advertiser, "source": SOURCE | {"table": "advertisers"}})["key"] == "v1"


def test_the_records_of_one_transaction_of_debezium_have_one_id() -> None:
    """Its ids end in a position of the log, which is another one in each record."""
    records = [
        CAPTURED | {"transaction": {"id": "571:9", "total_order": 1}},
        CAPTURED | {"transaction": {"id": "571:17"}},
    ]
    records.append({"status": "END", "id": "571:24", "event_count": 2})
    assert {row(record)["transaction_id"] for record in records} == {"xid:571"}
    assert transaction_of(json.dumps(records[0]).encode()) == "xid:571"
    assert reason(CAPTURED | {"transaction": {"id": "t9"}}) == ("wrong_type", "transaction.id")


def test_a_captured_time_is_iso_or_microseconds() -> None:
    pin = {column.name: None for column in PINS.columns} | {"pin_id": "p1"}
    captured = CAPTURED | {"source": SOURCE | {"table": "pins"}}
    for spelt in ("2023-11-14T22:13:20.000999Z", NOW_MS * 1000 + 999):
        assert (
            json.loads(row(captured | {"after": pin | {"created_at": spelt}})["values"])["created_at"]
            == NOW_MS
        )


def test_the_key_among_the_values_is_the_rows() -> None:
    assert (
        row(PLAIN | {"values": {"campaign_id": "c1", "status": "paused"}})["values"] == '{"status":"paused"}'
    )
    assert reason(PLAIN | {"values": {"campaign_id": "c2"}}) == ("out_of_range", "values.campaign_id")


def test_a_refused_record_still_names_its_transaction() -> None:
    refused = PLAIN | {"values": {"daily_budget_usd_micros": -1}, "transaction": {"id": "t9", "count": 2}}
    assert transaction_of(json.dumps(refused).encode()) == "t9"
    for value in (b"[1]", b"{", b'{"transaction": "t9"}', b'{"transaction": {"id": 5}}', b"{}", None):
        assert transaction_of(value) is None


def test_versions_of_a_row_add_up_below_two_to_the_63() -> None:
    widest = max(len(table.columns) for table in TABLES.values()) + 1
    assert widest * MAX_VERSION < 2**63


def test_accepted_rows_are_the_updaters_events() -> None:
    deleted = {"op": "delete", "table": "ads", "key": "a1", "version": 18}
    values = [
        json.dumps(one).encode()
        for one in (PLAIN, deleted, {"status": "END", "id": "571:9", "event_count": 1})
    ]
    columns = {field.name: pa.nulls(len(values), field.type) for field in RECORD}
    columns["value"] = pa.array(values)
    columns["broker_time"] = pa.array([NOW_MS * 1000] * len(values)).cast(RECORD.field("broker_time").type)
    events = updater.events(decode_table(ADS_CHANGES, pa.table(columns, schema=RECORD)).accepted)
    assert [event.update for event in events] == [
        Update("campaigns", "c1", 17, {"status": "paused"}, None),
        Update("ads", "a1", 18, None, None),
        None,
    ]
    assert (events[2].transaction_id, events[2].transaction_count) == ("xid:571", 1)
