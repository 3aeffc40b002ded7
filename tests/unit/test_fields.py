"""Fields that nobody declared: which types they get, what is refused, and that a decision never changes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from pipelines.contracts import (
    PIN_UPDATES,
    RECORD,
    USER_INTERACTIONS,
    Contract,
    Field,
    Refusal,
    decode,
    decode_table,
    extended,
)
from pipelines.contracts.fields import MAX_FIELDS, broken_promises, learn

NOW_MS = 1_700_000_000_000
EVENT = {"user_id": "u", "event_id": "e", "pin_id": "p", "action": "view", "event_time": 0}
PIN = {"pin_id": "p", "catalogue": {"title": "t"}, "offer": {"price_usd_micros": 1, "is_available": True}}


def decided(contract: Contract, record: dict[str, Any], at_ms: int = NOW_MS) -> dict[str, Any] | Refusal:
    return decode(contract, json.dumps(record).encode(), at_ms)


def found_in(contract: Contract, *records: dict[str, Any]) -> dict[str, set[str]]:
    columns = {field.name: pa.nulls(len(records), field.type) for field in RECORD}
    columns["value"] = pa.array([json.dumps(record).encode() for record in records], pa.binary())
    columns["broker_time"] = pa.array(
        [datetime.fromtimestamp(NOW_MS / 1000, UTC)] * len(records), RECORD.field("broker_time").type
    )
    return dict(decode_table(contract, pa.table(columns), finds_new_fields=True).new_fields)


def test_new_fields_are_found_where_they_may_grow_and_not_in_what_is_not_read() -> None:
    tombstone = {"op": "delete", "user_id": "u", "event_id": "e", "why": "spam"}
    refused = {**EVENT, "action": "fly", "altitude": 3}
    found = found_in(
        USER_INTERACTIONS,
        {**EVENT, "dwell_ms": 3, "is_new": True, "nothing": None},
        {**EVENT, "dwell_ms": 2.5, "tags": ["a"], "version": 2, "op": "upsert", "surface": "home"},
        tombstone,
        refused,
    )
    assert found == {"dwell_ms": {"integer", "number"}, "is_new": {"boolean"}, "tags": {"object"}}
    of_pins = found_in(PIN_UPDATES, {**PIN, "source": "erp", "catalogue": {"title": "t", "color": "red"}})
    assert of_pins == {"catalogue.color": {"text"}}


@pytest.mark.parametrize(
    ("kinds", "type"),
    [
        ({"integer"}, "bigint"),
        ({"integer", "number"}, "double"),
        ({"text"}, "string"),
        ({"boolean"}, "boolean"),
        ({"object"}, "json"),
    ],
)
def test_a_type_is_learned_from_the_kinds_of_values(kinds: set[str], type: str) -> None:
    lesson = learn(USER_INTERACTIONS.row_schema, (), {"x": kinds}, NOW_MS)
    assert lesson.fields == (Field("x", type, NOW_MS),)


@pytest.mark.parametrize(
    ("path", "kinds", "why"),
    [
        ("two words", {"text"}, "cannot be a column's"),
        ("x" * 64, {"text"}, "cannot be a column's"),
        ("User_ID", {"text"}, "another column"),
        ("content_hash", {"text"}, "another column"),
        ("topic_id", {"text"}, "another column"),
        ("known", {"text"}, "another column"),
        ("mixed", {"text", "integer"}, "several kinds: integer, text"),
    ],
)
def test_what_can_be_no_column_is_passed_over_and_why(path: str, kinds: set[str], why: str) -> None:
    known = (Field("known", "bigint", 0),)
    lesson = learn(USER_INTERACTIONS.row_schema, known, {path: kinds}, NOW_MS, RECORD.names)
    assert lesson.fields == ()
    assert why in lesson.passed_over[path]


def test_names_that_differ_in_case_alone_and_too_many_fields_are_passed_over() -> None:
    lesson = learn(USER_INTERACTIONS.row_schema, (), {"Dwell": {"text"}, "dwell": {"text"}}, NOW_MS)
    assert [field.path for field in lesson.fields] == ["Dwell"]
    many = {f"f{number:03}": {"text"} for number in range(MAX_FIELDS + 5)}
    lesson = learn(USER_INTERACTIONS.row_schema, (), many, NOW_MS)
    assert (len(lesson.fields), len(lesson.passed_over)) == (MAX_FIELDS, 5)


@pytest.mark.parametrize(
    ("type", "value", "held"),
    [
        ("bigint", 7, 7),
        ("double", 7, 7.0),
        ("double", 7.5, 7.5),
        ("string", "a", "a"),
        ("boolean", False, False),
        ("json", {"b": 1, "a": [2]}, '{"a":[2],"b":1}'),
        ("json", [], "[]"),
        ("bigint", None, None),
    ],
)
def test_a_value_that_fits_is_in_the_column(type: str, value: Any, held: Any) -> None:
    contract = extended(USER_INTERACTIONS, [Field("x", type, NOW_MS)])
    row = decided(contract, {**EVENT, "x": value})
    assert isinstance(row, dict)
    assert row["x"] == held
    assert pa.Table.from_pylist([row], contract.row_schema).column("x").to_pylist() == [held]


@pytest.mark.parametrize(
    ("type", "value"),
    [
        ("bigint", 7.0),
        ("bigint", True),
        ("bigint", "7"),
        ("double", "7"),
        ("string", 7),
        ("boolean", 0),
        ("json", 1),
    ],
)
def test_another_type_is_refused_once_it_holds_and_the_refusal_names_both(type: str, value: Any) -> None:
    contract = extended(USER_INTERACTIONS, [Field("x", type, NOW_MS)])
    refusal = decided(contract, {**EVENT, "x": value})
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.field) == ("retyped_field", "x")
    assert f"({type}) since 2023-11-14T22:13:20Z" in refusal.detail
    assert refusal.detail.startswith("x is ")
    before = decided(contract, {**EVENT, "x": value}, NOW_MS - 1)
    assert isinstance(before, dict)
    assert before["x"] is None


def test_fields_inside_a_family_are_in_its_struct() -> None:
    contract = extended(PIN_UPDATES, [Field("catalogue.color", "string", 0)])
    row = decided(contract, {**PIN, "catalogue": {"title": "t", "color": "red"}})
    assert isinstance(row, dict)
    assert row["catalogue"]["color"] == "red"
    assert (
        pa.Table.from_pylist([row], contract.row_schema).column("catalogue").to_pylist()[0]["color"] == "red"
    )
    assert isinstance(decided(contract, {"pin_id": "p", "offer": PIN["offer"]}), dict)
    refusal = decided(contract, {**PIN, "catalogue": {"title": "t", "color": 3}})
    assert isinstance(refusal, Refusal)
    assert refusal.field == "catalogue.color"


def test_the_newest_type_is_the_columns_and_each_time_has_its_own_rule() -> None:
    fields = [Field("x", "bigint", 100), Field("x", "double", 200), Field("x", None, 300)]
    retyped = extended(USER_INTERACTIONS, fields[:2])
    for at_ms, value, expected in [(150, 3, 3.0), (150, 3.5, Refusal), (250, 3.5, 3.5), (250, "3", Refusal)]:
        row = decided(retyped, {**EVENT, "x": value}, at_ms)
        assert row["x"] == expected if isinstance(row, dict) else expected is Refusal
    forgotten = extended(USER_INTERACTIONS, fields)
    assert "x" not in forgotten.row_schema.names
    assert isinstance(decided(forgotten, {**EVENT, "x": "3"}, 250), Refusal)
    assert isinstance(decided(forgotten, {**EVENT, "x": "3"}, 350), dict)
    assert "x" not in found_in(forgotten, {**EVENT, "x": 3})


def test_what_is_declared_by_now_is_not_learned_and_tombstones_have_none_of_it() -> None:
    assert (
        extended(USER_INTERACTIONS, [Field("surface", "string", 0)]).row_schema
        == USER_INTERACTIONS.row_schema
    )
    contract = extended(USER_INTERACTIONS, [Field("x", "bigint", 0)])
    row = decided(contract, {"op": "delete", "user_id": "u", "event_id": "e", "x": "not read"})
    assert isinstance(row, dict)
    assert row["x"] is None
    assert (
        row["content_hash"]
        == decided(USER_INTERACTIONS, {"op": "delete", "user_id": "u", "event_id": "e", "x": "not read"})[
            "content_hash"
        ]
    )  # type: ignore[index]


def test_a_broken_promise_names_what_was_and_what_is() -> None:
    before = {"a": "string", "b": "int64", "c": "bool"}
    assert broken_promises(before, {"a": "string", "b": "double", "d": "string"}) == [
        "b was int64, and is now double",
        "c was bool, and now there is no such field",
    ]
