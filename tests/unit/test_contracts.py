"""Contracts: what is accepted, what is refused, with which reason, and what the message says."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from pipelines.contracts import (
    ACTIONS,
    CONTRACTS,
    OBJECTS,
    PIN_UPDATES,
    REASONS,
    RECORD,
    USER_FOLLOWS,
    USER_INTERACTIONS,
    Refusal,
    UnknownTopic,
    accepted_schema,
    contract_of,
    decode,
    decode_table,
)
from pipelines.contracts.contract import MAX_VALUE_BYTES, REFUSED_SCHEMA

NOW_MS = 1_700_000_000_000
EVENT = {
    "user_id": "u",
    "event_id": "e",
    "pin_id": "p",
    "action": "view",
    "event_time": "2023-05-01T12:00:00Z",
}
PIN = {"pin_id": "p", "catalogue": {"title": "t"}}


def raw(record: Any) -> bytes:
    return json.dumps(record).encode()


def event(**changes: Any) -> dict[str, Any] | Refusal:
    record = {name: value for name, value in {**EVENT, **changes}.items() if value is not ...}
    return decode(USER_INTERACTIONS, raw(record), NOW_MS)


def pin(**changes: Any) -> dict[str, Any] | Refusal:
    record = {name: value for name, value in {**PIN, **changes}.items() if value is not ...}
    return decode(PIN_UPDATES, raw(record), NOW_MS)


def accepted(result: dict[str, Any] | Refusal) -> dict[str, Any]:
    assert not isinstance(result, Refusal), result
    return result


def refused(result: dict[str, Any] | Refusal, reason: str, field: str | None) -> str:
    assert isinstance(result, Refusal), result
    assert (result.reason, result.field) == (reason, field)
    assert result.reason in REASONS
    if field:
        assert field in result.detail
    return result.detail


def hash_of(result: dict[str, Any] | Refusal, column: str = "content_hash") -> int:
    found = accepted(result)[column]
    assert -(2**63) <= found < 2**63
    return found


def test_examples_keep_their_contracts() -> None:
    for contract in CONTRACTS.values():
        for example in contract.examples:
            row = accepted(decode(contract, raw(example), NOW_MS))
            assert list(row) == contract.row_schema.names
            pa.Table.from_pylist([row], contract.row_schema)


def test_a_whole_event() -> None:
    about = {"ad_id": "a", "campaign_id": "c", "advertiser_id": "v", "category": "", "view_type": "promoted"}
    row = accepted(event(quantity=2, value_usd_micros=0, surface="home", version=7, **about))
    content_hash = row.pop("content_hash")
    assert isinstance(content_hash, int)
    assert row == {
        "user_id": "u",
        "event_id": "e",
        "pin_id": "p",
        "action": "view",
        "event_time": datetime(2023, 5, 1, 12, tzinfo=UTC),
        "version": 7,
        "is_deleted": False,
        "quantity": 2,
        "value_usd_micros": 0,
        "surface": "home",
        **about,
        **dict.fromkeys(("payload", "features", "features_hash")),
    }


@pytest.mark.parametrize("name", ["ad_id", "campaign_id", "advertiser_id"])
def test_ids_of_what_else_an_event_is_about(name: str) -> None:
    assert accepted(event(**{name: "é" * 256}))[name] == "é" * 256
    assert accepted(event(**{name: None}))[name] is accepted(event())[name] is None
    assert hash_of(event(**{name: None})) == hash_of(event()) != hash_of(event(**{name: "x"}))
    refused(event(**{name: ""}), "empty_id", name)
    refused(event(**{name: 7}), "wrong_type", name)


@pytest.mark.parametrize("name", ["surface", "category", "view_type"])
def test_words_of_an_event(name: str) -> None:
    assert accepted(event(**{name: "x" * 128}))[name] == "x" * 128
    refused(event(**{name: "x" * 129}), "too_long", name)
    refused(event(**{name: ["x"]}), "wrong_type", name)


@pytest.mark.parametrize("name", ["user_id", "event_id", "pin_id"])
def test_ids(name: str) -> None:
    assert accepted(event(**{name: "é" * 256}))[name] == "é" * 256
    assert accepted(event(**{name: " a/b:c\n"}))[name] == " a/b:c\n"
    assert "512" in refused(event(**{name: "é" * 256 + "x"}), "too_long", name)
    refused(event(**{name: ""}), "empty_id", name)
    refused(event(**{name: "a\x00b"}), "nul_character", name)
    assert "512" in refused(event(**{name: 12}), "wrong_type", name)
    refused(event(**{name: None}), "missing_field", name)
    refused(event(**{name: ...}), "missing_field", name)


@pytest.mark.parametrize("name", ["user_id", "surface", "extra"])
def test_lone_surrogates(name: str) -> None:
    value = raw(EVENT)[:-1] + f', "{name}2": 1, "{name}": "\\ud83d!"}}'.encode()
    value = value.replace(b'"user_id": "u", ', b"") if name == "user_id" else value
    refused(decode(USER_INTERACTIONS, value, NOW_MS), "lone_surrogate", name)
    paired = value.replace(b"\\ud83d", b"\\ud83d\\ude00")
    accepted(decode(USER_INTERACTIONS, paired, NOW_MS))


def test_versions() -> None:
    assert accepted(event())["version"] == 1
    assert accepted(event(version=None))["version"] == 1
    assert accepted(event(version=2**61 - 1))["version"] == 2**61 - 1
    for wrong in (0, -1, 2**61, 2**63):
        assert "2305843009213693951" in refused(event(version=wrong), "out_of_range", "version")
    for wrong in (True, 1.0, "1", 2**70, [1]):
        assert "integer" in refused(event(version=wrong), "wrong_type", "version")


def test_actions() -> None:
    for action in ACTIONS:
        assert accepted(event(action=action))["action"] == action
    assert "purchase" in refused(event(action="Purchase"), "unknown_action", "action")
    refused(event(action=["view"]), "wrong_type", "action")
    refused(event(action=...), "missing_field", "action")


@pytest.mark.parametrize(
    ("spelt", "expected"),
    [
        ("2023-05-01T12:00:00Z", "2023-05-01T12:00:00+00:00"),
        ("2023-05-01T12:00:00+00:00", "2023-05-01T12:00:00+00:00"),
        ("2023-05-01T12:00Z", "2023-05-01T12:00:00+00:00"),
        ("2023-05-01T12:00:00.5Z", "2023-05-01T12:00:00.500000+00:00"),
        ("2023-05-01T12:00:00.123456Z", "2023-05-01T12:00:00.123456+00:00"),
        ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00+00:00"),
        (0, "1970-01-01T00:00:00+00:00"),
        (1_682_942_400_001, "2023-05-01T12:00:00.001000+00:00"),
    ],
)
def test_times(spelt: object, expected: str) -> None:
    assert accepted(event(event_time=spelt))["event_time"].isoformat() == expected


@pytest.mark.parametrize(
    "spelt",
    [
        "2023-05-01T12:00:00",
        "2023-05-01",
        "2023-05-01 12:00:00Z",
        "2023-05-01T12:00:00+02:00",
        "2023-13-01T12:00:00Z",
        "2023-05-01T25:00:00Z",
        "yesterday",
        "",
        "٢٠٢٣-05-01T12:00:00Z",
    ],
)
def test_times_that_are_none(spelt: str) -> None:
    assert "ISO 8601" in refused(event(event_time=spelt), "bad_time", "event_time")


def test_the_range_of_times() -> None:
    late = NOW_MS * 10
    for wrong in ("1969-12-31T23:59:59.999999Z", "2101-01-01T00:00:00Z", -1, 2**62, -(2**62)):
        result = decode(USER_INTERACTIONS, raw({**EVENT, "event_time": wrong}), late)
        assert "2100" in refused(result, "out_of_range", "event_time")
    last = decode(USER_INTERACTIONS, raw({**EVENT, "event_time": "2100-12-31T23:59:59.999999Z"}), late)
    assert accepted(last)["event_time"].year == 2100
    for wrong in (1.5, True, {}):
        refused(event(event_time=wrong), "wrong_type", "event_time")
    refused(event(event_time=...), "missing_field", "event_time")


def test_a_time_is_at_most_an_hour_ahead_of_the_broker() -> None:
    accepted(event(event_time=NOW_MS + 3_600_000))
    assert "one hour" in refused(event(event_time=NOW_MS + 3_600_001), "time_ahead", "event_time")
    taken = datetime.fromtimestamp(NOW_MS / 1000, UTC) + timedelta(hours=1, microseconds=1)
    refused(event(event_time=taken.isoformat().replace("+00:00", "Z")), "time_ahead", "event_time")


def test_amounts() -> None:
    refused(event(quantity=0), "out_of_range", "quantity")
    refused(event(quantity=-1), "out_of_range", "quantity")
    refused(event(quantity=10**9 + 1), "out_of_range", "quantity")
    refused(event(value_usd_micros=-1), "out_of_range", "value_usd_micros")
    refused(event(value_usd_micros=10**15 + 1), "out_of_range", "value_usd_micros")
    refused(event(value_usd_micros=1.5), "wrong_type", "value_usd_micros")
    refused(event(value_usd_micros=True), "wrong_type", "value_usd_micros")
    row = accepted(event(quantity=None, value_usd_micros=None, surface=None))
    assert (row["quantity"], row["value_usd_micros"], row["surface"]) == (None, None, None)
    refused(event(surface="x" * 129), "too_long", "surface")
    refused(event(surface="\x00"), "nul_character", "surface")


def test_tombstones() -> None:
    row = accepted(
        decode(
            USER_INTERACTIONS, raw({"op": "delete", "user_id": "u", "event_id": "e", "version": 3}), NOW_MS
        )
    )
    assert (row["is_deleted"], row["version"], row["pin_id"], row["event_time"]) == (True, 3, None, None)
    assert accepted(event(op="delete", action="nonsense"))["is_deleted"] is True
    assert accepted(event(op="upsert"))["is_deleted"] is False
    assert accepted(event(op=None))["is_deleted"] is False
    refused(event(op="remove"), "unknown_op", "op")
    refused(event(op=1), "wrong_type", "op")
    refused(event(op="delete", event_id=...), "missing_field", "event_id")


def test_the_content_hash() -> None:
    assert hash_of(event()) == hash_of(event(version=9)) == hash_of(event(op="upsert", version=None))
    assert hash_of(event()) == hash_of(event(event_time=1_682_942_400_000))
    assert hash_of(event()) == hash_of(event(quantity=None, surface=None))
    assert hash_of(event()) == hash_of(event(user_id="other", event_id="another"))
    backwards = dict(reversed(EVENT.items()))
    assert hash_of(event()) == hash_of(decode(USER_INTERACTIONS, raw(backwards), NOW_MS))
    different = [event(pin_id="q"), event(action="save"), event(quantity=1), event(surface=""), event(more=1)]
    different += [
        event(more=2),
        event(more={"a": [1, {"b": None}]}),
        event(event_time="2023-05-01T12:00:00.000001Z"),
    ]
    assert len({hash_of(one) for one in [event(), *different]}) == len(different) + 1
    assert hash_of(event(more={"a": 1, "b": 2})) == hash_of(event(more={"b": 2, "a": 1}))


def test_a_whole_pin() -> None:
    offer = {"price_usd_micros": 990_000, "is_available": True}
    row = accepted(
        pin(offer=offer, version=4, event_time=5, catalogue={"title": "t", "category": "c", "x": 1})
    )
    assert row["catalogue"] == {"title": "t", "category": "c", "department": None, "brand": None}
    assert row["offer"] == offer
    assert (row["version"], row["is_deleted"], row["event_time"].year) == (4, False, 1970)
    assert accepted(pin(catalogue=..., offer=offer))["catalogue_hash"] is None
    assert accepted(pin())["offer"] is None
    assert accepted(pin())["offer_hash"] is None
    assert accepted(pin(catalogue={}))["catalogue_hash"] is not None


def test_a_pin_that_is_none() -> None:
    refused(pin(catalogue=...), "no_family", "catalogue")
    refused(pin(catalogue=None, offer=None), "no_family", "catalogue")
    refused(pin(catalogue="t"), "wrong_type", "catalogue")
    refused(pin(catalogue={"title": 1}), "wrong_type", "catalogue.title")
    refused(pin(catalogue={"category": "x" * 513}), "too_long", "catalogue.category")
    refused(pin(offer={}), "missing_field", "offer.price_usd_micros")
    refused(pin(offer={"price_usd_micros": 1}), "missing_field", "offer.is_available")
    refused(pin(offer={"price_usd_micros": 1, "is_available": 1}), "wrong_type", "offer.is_available")
    refused(
        pin(offer={"price_usd_micros": -1, "is_available": True}), "out_of_range", "offer.price_usd_micros"
    )
    refused(
        pin(offer={"price_usd_micros": 0.5, "is_available": True}), "wrong_type", "offer.price_usd_micros"
    )
    refused(pin(event_time="soon"), "bad_time", "event_time")


def test_the_families_of_a_pin_are_hashed_apart() -> None:
    offer = {"price_usd_micros": 1, "is_available": True}
    both = pin(offer=offer)
    assert hash_of(both, "catalogue_hash") == hash_of(pin(), "catalogue_hash")
    assert hash_of(both, "offer_hash") == hash_of(pin(catalogue=..., offer=offer), "offer_hash")
    assert hash_of(pin(catalogue={"title": "t", "more": 1}), "catalogue_hash") != hash_of(
        pin(), "catalogue_hash"
    )
    assert hash_of(pin(catalogue={"title": "t", "brand": None}), "catalogue_hash") == hash_of(
        pin(), "catalogue_hash"
    )
    gone = accepted(pin(op="delete", version=2))
    assert (gone["is_deleted"], gone["catalogue"], gone["offer"]) == (True, None, None)
    assert isinstance(gone["catalogue_hash"], int)
    assert isinstance(gone["offer_hash"], int)


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        (None, "empty_value", None),
        (b"", "empty_value", None),
        (b" ", "broken_json", None),
        (b"{", "broken_json", None),
        (b"\xef\xbb\xbf{}", "broken_json", None),
        (b'{"a": "\x01"}', "broken_json", None),
        (b"\xff\xfe", "broken_utf8", None),
        (b'{"user_id": "\xed\xa0\x80"}', "broken_utf8", None),
        (b"[]", "not_an_object", None),
        (b"null", "not_an_object", None),
        (b'"x"', "not_an_object", None),
        (b"1", "not_an_object", None),
        (b'{"a": NaN}', "not_finite", None),
        (b'{"a": -Infinity}', "not_finite", None),
        (b'{"a": 1e999}', "not_finite", None),
        (b"[" * 100_000, "too_large", None),
        (b"[" * 60_000, "too_deep", None),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "too_deep", None),
        (b'{"a": "' + b"x" * MAX_VALUE_BYTES + b'"}', "too_large", None),
        (b'{"user_id": "a", "user_id": "a"}', "duplicate_key", "user_id"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "duplicate_key", "b"),
        (b'{"a": 1, "\\u0061": 1}', "duplicate_key", "a"),
        (b'{"a": "\\u003a", "a": "\\u003a"}', "duplicate_key", "a"),
        (b'{"a": "x\\u003a\\u003A", "a": ":"}', "duplicate_key", "a"),
    ],
    ids=lambda value: None if isinstance(value, bytes) and len(value) > 60 else repr(value),
)
@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=lambda contract: contract.topic)
def test_values_that_are_no_record(
    contract: Any, value: bytes | None, reason: str, field: str | None
) -> None:
    refused(decode(contract, value, NOW_MS), reason, field)


def test_colons_are_no_duplicates() -> None:
    for text in (":", '":"', "a:b:c", '\\":', "\\u003a"):
        accepted(event(user_id=text, more={text: [text]}))
    escaped = raw(EVENT).replace(b'"u"', b'"\\u003a\\u003A"')
    assert accepted(decode(USER_INTERACTIONS, escaped, NOW_MS))["user_id"] == "::"


def table(values: list[bytes | None], times: list[int] | None = None) -> pa.Table:
    count = len(values)
    return pa.table(
        {
            "topic_id": pa.array(["T"] * count),
            "partition": pa.array([1] * count, pa.int32()),
            "offset": pa.array(range(count), pa.int64()),
            "load_id": pa.nulls(count, pa.string()),
            "load_row": pa.nulls(count, pa.int64()),
            "broker_time": pa.array(
                [t * 1000 for t in times or [NOW_MS] * count], pa.timestamp("us", tz="UTC")
            ),
            "key": pa.array([b"k"] * count, pa.binary()),
            "value": pa.array(values, pa.binary()),
        },
        schema=RECORD,
    )


def test_a_table_is_decided_as_each_record_is() -> None:
    values = [raw(EVENT), b"{", raw({**EVENT, "event_time": NOW_MS}), None, raw({"op": "delete", **EVENT})]
    decoded = decode_table(USER_INTERACTIONS, table(values, [NOW_MS, NOW_MS, 0, NOW_MS, 0]))
    assert decoded.accepted.schema == accepted_schema(USER_INTERACTIONS)
    assert decoded.refused.schema == REFUSED_SCHEMA
    assert decoded.accepted.column("offset").to_pylist() == [0, 4]
    assert decoded.refused.column("offset").to_pylist() == [1, 2, 3]
    assert decoded.refused.column("reason").to_pylist() == ["broken_json", "time_ahead", "empty_value"]
    assert decoded.refused.column("value").to_pylist() == values[1:4]
    rows = decoded.accepted.select(USER_INTERACTIONS.row_schema.names).to_pylist()
    assert rows == [decode(USER_INTERACTIONS, values[0], NOW_MS), decode(USER_INTERACTIONS, values[4], 0)]


@pytest.mark.parametrize("values", [[], [raw(PIN)], [b"?"]], ids=["empty", "accepted", "refused"])
def test_tables_of_one_kind(values: list[bytes | None]) -> None:
    decoded = decode_table(PIN_UPDATES, table(values))
    assert decoded.accepted.num_rows + decoded.refused.num_rows == len(values)
    assert decoded.accepted.schema == accepted_schema(PIN_UPDATES)


def test_a_table_may_come_in_other_widths() -> None:
    wide = (
        table([raw(PIN)])
        .set_column(7, "value", pa.array([raw(PIN)], pa.large_binary()))
        .append_column("x", [[1]])
    )
    batch = wide.combine_chunks().to_batches()[0]
    assert decode_table(PIN_UPDATES, batch).accepted.num_rows == 1


def test_contracts_are_found_by_topic_and_by_table() -> None:
    assert contract_of("pin-updates") is contract_of("pin_updates") is PIN_UPDATES
    with pytest.raises(UnknownTopic, match="user-interactions"):
        contract_of("clicks")


@pytest.mark.parametrize("name", OBJECTS)
def test_an_event_is_about_whatever_it_names(name: str) -> None:
    about = {key: value for key, value in EVENT.items() if key != "pin_id"} | {name: "x"}
    found = decode(USER_INTERACTIONS, raw(about), NOW_MS)
    assert isinstance(found, dict)
    assert {key: found[key] for key in OBJECTS if found[key] is not None} == {name: "x"}


def test_an_event_about_nothing_is_refused() -> None:
    about = {key: value for key, value in EVENT.items() if key != "pin_id"}
    for nothing in ({}, {"pin_id": None, "ad_id": None}, {"category": ""}):
        found = decode(USER_INTERACTIONS, raw(about | nothing), NOW_MS)
        assert isinstance(found, Refusal)
        assert (found.reason, found.field) == ("missing_field", "pin_id")
        assert all(name in found.detail for name in OBJECTS)


def follow(**changed: object) -> object:
    """What is decided of a follow of a pin with some fields changed; None takes one away."""
    said = {"user_id": "u", "pin_id": "p", "version": 2, "event_time": NOW_MS} | changed
    return decode(USER_FOLLOWS, raw({k: v for k, v in said.items() if v is not None}), NOW_MS)


def test_a_follow_is_of_a_pin_or_of_a_user() -> None:
    found = accepted(follow())
    assert (found["kind"], found["followed_id"], found["version"]) == ("pin", "p", 2)
    found = accepted(follow(pin_id=None, followed_user_id="v"))
    assert (found["kind"], found["followed_id"]) == ("user", "v")
    assert accepted(decode(USER_FOLLOWS, b'{"user_id": "u", "pin_id": "p", "followed_user_id": null}', 0))


def test_a_follow_without_a_time_or_a_version_has_version_1_and_no_time() -> None:
    found = accepted(follow(version=None, event_time=None))
    assert (found["version"], found["event_time"]) == (1, None)


def test_a_follow_names_exactly_one_thing_and_never_the_user() -> None:
    refused(follow(pin_id=None), "missing_field", "pin_id")
    refused(follow(followed_user_id="v"), "contradiction", "pin_id")
    refused(follow(pin_id=None, followed_user_id="u"), "contradiction", "followed_user_id")
    assert accepted(follow(pin_id="u")), "a pin may be called as the user is"
    refused(follow(pin_id=""), "empty_id", "pin_id")
    refused(follow(pin_id=None, followed_user_id=7), "wrong_type", "followed_user_id")
    refused(follow(event_time=NOW_MS + 3_600_001), "time_ahead", "event_time")


def test_a_deletion_of_a_follow_needs_user_followed_and_version_alone() -> None:
    found = accepted(follow(op="delete", event_time="never"))
    assert found["is_deleted"] and found["event_time"] is None
    refused(follow(op="delete", pin_id=None), "missing_field", "pin_id")
    refused(follow(op="delete", user_id=None), "missing_field", "user_id")


def test_what_a_follow_says_beside_its_identity_counts_in_its_hash() -> None:
    same = accepted(follow())["content_hash"]
    assert accepted(follow(pin_id="q", version=9))["content_hash"] == same
    assert accepted(follow(surface="home"))["content_hash"] != same
    assert accepted(follow(event_time=NOW_MS - 1))["content_hash"] != same
