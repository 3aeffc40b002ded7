"""Payloads of events: what a schema may declare, and what a record that breaks it is told.

How a schema may change is tested in `test_payload_files`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.contracts import USER_INTERACTIONS, Refusal, decode, payload_files
from pipelines.contracts.contract import Refused
from pipelines.contracts.payload_files import declared
from pipelines.contracts.payloads import MAX_BYTES, BadSchema, Schemas, read_payload

SINCE_MS = 1_767_225_600_000
VIEW = """
about: view
owner: home
since: 2026-01-01T00:00:00Z
fields:
  rank: {type: integer, least: 1, most: 9, is_required: true, doc: its place}
  share: {type: number, least: 0, most: 1}
  kind: {type: text, one_of: [card, list]}
  query: {type: text, most_bytes: 5}
  is_new: {type: boolean}
  tags: {type: texts, most_texts: 2, most_bytes: 3}
"""
EVENT = {"user_id": "u", "event_id": "e", "pin_id": "p", "action": "view", "event_time": SINCE_MS}


@pytest.fixture
def schemas(tmp_path: Path) -> Schemas:
    (tmp_path / "view.yaml").write_text(VIEW)
    payload_files.publish(tmp_path, "view", 0)
    return declared(tmp_path)


def read(schemas: Schemas, payload: Any, at_ms: int = SINCE_MS) -> str | None:
    return read_payload({"payload": payload}, "payload", "view", at_ms, schemas)


def refusal(schemas: Schemas, payload: Any) -> tuple[str, str | None, str]:
    with pytest.raises(Refused) as caught:
        read(schemas, payload)
    found = caught.value.refusal
    return found.reason, found.field, found.detail


def test_what_keeps_the_schema_is_kept_as_json(schemas: Schemas) -> None:
    said = {"share": 1, "rank": 9, "kind": "card", "query": "grün", "is_new": False, "tags": ["a", "ü"]}
    assert json.loads(read(schemas, said) or "") == said
    assert read(schemas, {"rank": 1, "kind": "list"}) == '{"kind":"list","rank":1}'
    assert read(schemas, None) is None


@pytest.mark.parametrize(
    ("said", "reason", "field", "allowed"),
    [
        ([], "wrong_type", "payload", "an object"),
        ({}, "missing_field", "payload.rank", "an integer from 1 to 9"),
        ({"rank": None}, "missing_field", "payload.rank", "an integer from 1 to 9"),
        ({"rank": 0}, "out_of_range", "payload.rank", "an integer from 1 to 9"),
        ({"rank": 1.0}, "wrong_type", "payload.rank", "an integer from 1 to 9"),
        ({"rank": True}, "wrong_type", "payload.rank", "an integer from 1 to 9"),
        ({"rank": 1, "share": 1.5}, "out_of_range", "payload.share", "a number from 0 to 1"),
        ({"rank": 1, "share": "1"}, "wrong_type", "payload.share", "a number from 0 to 1"),
        ({"rank": 1, "kind": "tile"}, "out_of_range", "payload.kind", "one of card, list"),
        ({"rank": 1, "query": "grünes"}, "too_long", "payload.query", "at most 5 bytes"),
        ({"rank": 1, "query": "a\0"}, "nul_character", "payload.query", "not allowed"),
        ({"rank": 1, "is_new": 1}, "wrong_type", "payload.is_new", "true or false"),
        ({"rank": 1, "tags": ["a", "b", "c"]}, "wrong_type", "payload.tags", "at most 2"),
        ({"rank": 1, "tags": ["a", 1]}, "wrong_type", "payload.tags[1]", "at most 3 bytes"),
        ({"rank": 1, "tags": ["long"]}, "too_long", "payload.tags[0]", "at most 3 bytes"),
        ({"rank": 1, "rnak": 2}, "unknown_field", "payload.rnak", "rank, share, kind, query, is_new, tags"),
    ],
)
def test_what_breaks_it_is_told_where_and_what_is_allowed(
    schemas: Schemas, said: Any, reason: str, field: str, allowed: str
) -> None:
    found = refusal(schemas, said)
    assert found[:2] == (reason, field)
    assert allowed in found[2]


def test_a_payload_is_bounded_where_nothing_is_declared(tmp_path: Path) -> None:
    assert read(declared(tmp_path), {"anything": [1, {"a": None}]}) == '{"anything":[1,{"a":null}]}'
    assert refusal(declared(tmp_path), {"a": "x" * MAX_BYTES})[:2] == ("too_long", "payload")


def test_the_brokers_time_says_which_schema_holds(schemas: Schemas, tmp_path: Path) -> None:
    narrower = VIEW.replace("2026-01-01", "2026-02-01").replace("most: 9,", "most: 3,")
    (tmp_path / "view.v2.yaml").write_text(narrower)
    payload_files.publish(tmp_path, "view", SINCE_MS)
    later = declared.__wrapped__(tmp_path)
    february_ms = SINCE_MS + 31 * 86_400_000
    assert read(later, {"rank": 9}, february_ms - 1) == '{"rank":9}'
    with pytest.raises(Refused, match="from 1 to 3"):
        read(later, {"rank": 9}, february_ms)
    assert read(later, {"no rank": 9}, SINCE_MS - 1) == '{"no rank":9}'  # before there was any


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("about: view", "about: glance"), "about: glance is not known"),
        (("about: view", "about: click"), "the file is about click"),
        (("owner: home", "owner: ''"), "owner: it is not a name"),
        (("since: 2026-01-01T00:00:00Z", "since: soon"), "since: soon is not such a time"),
        (("since: 2026-01-01T00:00:00Z", "since: 2201-01-01T00:00:00Z"), "to the end of 2100"),
        (("owner: home", "owner: home\nowner: ads"), "the key owner is there twice"),
        (("  kind:", "  share:"), "the key share is there twice"),
        (("most: 9", "most: nine"), "fields.rank.most: nine is not allowed"),
        (("least: 1,", "least: .nan,"), "fields.rank.least: nan is not allowed"),
        (("least: 1,", "least: 10,"), "fields.rank: least is 10 and most is 9, so no value is allowed"),
        (("least: 0, most: 1", "least: .nan"), "fields.share.least: nan is not allowed"),
        (("least: 0, most: 1", "most: -.inf"), "fields.share.most: -inf is not allowed"),
        (("most: 9", "most: 9007199254740993"), "fields.rank.most: 9007199254740993 is not allowed"),
        (("most_bytes: 5", "least: 5"), "fields.query.least: text has no such bound"),
        (("type: boolean", "type: bool"), "fields.is_new: it has no type that is known"),
        (("type: boolean", "type: [boolean]"), "fields.is_new: it has no type that is known"),
        (("one_of: [card, list]", "one_of: []"), "fields.kind.one_of: it is not a list of texts"),
        (("one_of: [card, list]", "one_of: [card, card]"), "each once"),
        (("one_of: [card, list]", "one_of: [card, list], most_bytes: 3"), "fields.kind.one_of[0]: it has 4"),
        (("one_of: [card, list]", "one_of: card"), "fields.kind.one_of: it is not a list of texts"),
        (("is_required: true", "is_required: yes please"), "fields.rank.is_required: yes please"),
        (("  share", "  Share"), "fields.Share: it is no name"),
        (("owner: home", "owner: [home"), "the file cannot be read"),
        (("owner: home", "team: home"), "the file: it has other fields"),
    ],
)
def test_a_schema_that_cannot_be_says_what_is_wrong(
    tmp_path: Path, change: tuple[str, str], told: str
) -> None:
    assert change[0] in VIEW
    (tmp_path / "view.yaml").write_text(VIEW.replace(*change))
    with pytest.raises(BadSchema) as caught:
        declared(tmp_path)
    assert told in str(caught.value)
    assert "view.yaml" in str(caught.value)


# ----------------------------------------------------------------------------------------------- in a whole record


def decided(said: dict[str, Any]) -> Any:
    return decode(USER_INTERACTIONS, json.dumps(said).encode(), SINCE_MS)


def test_an_event_with_a_payload() -> None:
    found = decided(EVENT | {"payload": {"rank": 3, "dwell_ms": 10}})
    assert found["payload"] == '{"dwell_ms":10,"rank":3}'
    assert found["features"] is found["features_hash"] is None
    assert found["content_hash"] != decided(EVENT)["content_hash"]
    refused = decided(EVENT | {"payload": {"rank": 0}})
    assert isinstance(refused, Refusal)
    assert refused.field == "payload.rank"


def test_features_alone_are_a_family_of_their_own() -> None:
    about = {key: EVENT[key] for key in ("user_id", "event_id", "event_time")}
    found = decided(about | {"features": {"quality": 0.5}, "version": 7})
    assert found["features"] == '{"quality":0.5}'
    assert found["version"] == 7
    assert found["content_hash"] is found["action"] is found["pin_id"] is None
    both = decided(EVENT | {"features": {"quality": 0.5}})
    assert both["features_hash"] == found["features_hash"]
    assert both["content_hash"] == decided(EVENT)["content_hash"]


def test_features_need_the_time_of_their_event() -> None:
    found = decided({"user_id": "u", "event_id": "e", "features": {}})
    assert isinstance(found, Refusal)
    assert (found.reason, found.field) == ("missing_field", "event_time")


def test_what_says_more_than_features_is_an_event() -> None:
    found = decided({key: EVENT[key] for key in EVENT if key != "action"} | {"features": {}})
    assert isinstance(found, Refusal)
    assert (found.reason, found.field) == ("missing_field", "action")


def test_a_deletion_takes_both() -> None:
    found = decided({"op": "delete", "user_id": "u", "event_id": "e", "version": 2})
    assert found["is_deleted"]
    assert found["content_hash"] == found["features_hash"] is not None
