"""Declared schemas of payloads: which changes of a published one are refused, and what publishing asks for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.contracts import USER_INTERACTIONS, decode, frames, payload_files, user_interactions
from pipelines.contracts.contract import Refused
from pipelines.contracts.payload_files import declared, load, publish, read_ledger
from pipelines.contracts.payloads import BadSchema, Schema, parse, read_payload

NOW_MS = 1_767_225_600_000  # 2026-01-01
SAID: dict[str, Any] = {
    "about": "view",
    "owner": "home",
    "since": "2026-02-01T00:00:00Z",
    "fields": {
        "rank": {"type": "integer", "least": 1, "most": 9, "is_required": True},
        "share": {"type": "number"},
        "kind": {"type": "text", "one_of": ["card", "list"]},
        "query": {"type": "text", "most_bytes": 5},
        "tags": {"type": "texts", "most_texts": 2},
    },
}


def write(folder: Path, said: dict[str, Any], version: int = 1) -> Path:
    path = folder / payload_files.file_name("view", version)
    text = yaml.safe_dump(said, sort_keys=False)
    path.write_text(text.replace("'", ""))  # so that times are times
    return path


def changed(**of_fields: Any) -> dict[str, Any]:
    """The schema with other bounds of fields; None takes a bound, or a field, away."""
    fields = {name: dict(bounds) for name, bounds in SAID["fields"].items()}
    for name, bounds in of_fields.items():
        if bounds is None:
            del fields[name]
        else:
            fields[name] = fields.get(name, {}) | bounds
            fields[name] = {bound: value for bound, value in fields[name].items() if value is not None}
    return {**SAID, "fields": fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with a published schema."""
    write(tmp_path, SAID)
    publish(tmp_path, "view", NOW_MS)
    assert not load(tmp_path).problems
    return tmp_path


def test_the_projects_schemas_are_what_is_published() -> None:
    library = load()
    assert library.problems == ()
    assert {"view", "features"} <= set(library.schemas)
    assert declared() == library.schemas


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (changed(query=None), "fields had query"),
        (changed(rank={"most": 3}), "rank.most was 9 and is 3"),
        (changed(rank={"least": 2}), "rank.least was 1 and is 2"),
        (changed(share={"least": 0.5}), "share.least was -inf and is 0.5"),
        (changed(share={"is_required": True}), "share.is_required was false and is true"),
        (changed(share={"type": "integer"}), "share.type was number and is integer"),
        (changed(rank={"type": "number"}), "rank.type was integer and is number"),
        (changed(kind={"one_of": ["card"]}), "kind.one_of was card, list and is card"),
        (changed(query={"one_of": ["a"]}), "query.one_of was not limited and is a"),
        (changed(query={"most_bytes": 4}), "query.most_bytes was 5 and is 4"),
        (changed(tags={"most_texts": 1}), "tags.most_texts was 2 and is 1"),
        (changed(place={"type": "text", "is_required": True}), "place is new and required"),
        ({**SAID, "since": "2026-01-15T00:00:00Z"}, "since was 2026-02-01T00:00:00Z and is 2026-01-15"),
        ({**SAID, "since": "2026-03-01T00:00:00Z"}, "since was 2026-02-01T00:00:00Z and is 2026-03-01"),
    ],
)
def test_a_published_schema_is_not_narrowed(folder: Path, said: dict[str, Any], told: str) -> None:
    path = write(folder, said)
    for refused in (lambda: declared.__wrapped__(folder), lambda: publish(folder, "view", NOW_MS)):
        with pytest.raises(BadSchema) as caught:
            refused()
        assert told in str(caught.value)
        assert caught.value.where == str(path)
        assert "view.v2.yaml" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "said",
    [
        changed(place={"type": "text"}),
        changed(rank={"most": 10, "least": None, "is_required": None}),
        changed(kind={"one_of": ["tile", "list", "card"]}, tags={"most_texts": None}),
        changed(kind={"one_of": None}),
    ],
)
def test_what_widens_is_published_and_then_kept(folder: Path, said: dict[str, Any]) -> None:
    path = write(folder, said)
    with pytest.raises(BadSchema, match="not what was published.*`tidemark contracts payloads publish view`"):
        declared.__wrapped__(folder)
    publish(folder, "view", NOW_MS * 2)  # also when its `since` has passed
    assert not load(folder).problems
    write(folder, SAID)
    with pytest.raises(BadSchema, match="published with another meaning"):
        publish(folder, "view", NOW_MS)
    assert path.exists()


def test_nothing_is_decided_while_files_and_ledger_differ(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, changed(rank={"most": 3}))
    monkeypatch.setattr(payload_files, "FOLDER", folder)
    monkeypatch.setattr(user_interactions, "declared", declared.__wrapped__)
    monkeypatch.setattr(payload_files, "declared", declared.__wrapped__)
    record = {"user_id": "u", "event_id": "e", "pin_id": "p", "action": "view", "event_time": NOW_MS}
    raw: Any = None  # is not even looked at
    for decide in (
        lambda: decode(USER_INTERACTIONS, json.dumps(record).encode(), NOW_MS),
        lambda: frames.judged(USER_INTERACTIONS, raw),
        lambda: frames.examined(USER_INTERACTIONS, raw),
    ):
        with pytest.raises(BadSchema, match="published with another meaning"):
            decide()


def test_owner_docs_and_order_may_change(folder: Path) -> None:
    fields = dict(reversed(changed(kind={"one_of": ["list", "card"], "doc": "how"})["fields"].items()))
    write(folder, {**SAID, "owner": "ads", "fields": fields})
    assert not load(folder).problems


def test_a_new_version_holds_from_a_time_that_lies_ahead(folder: Path) -> None:
    narrower = changed(rank={"most": 3}, query=None)
    since_ms = load(folder).schemas["view"][0].since_ms + 86_400_000
    path = write(folder, {**narrower, "since": "2026-02-02T00:00:00Z"}, 2)
    with pytest.raises(BadSchema, match="version 2 of view is not published"):
        declared.__wrapped__(folder)
    with pytest.raises(BadSchema, match="since: 2026-02-02T00:00:00Z has passed") as caught:
        publish(folder, "view", since_ms)
    assert caught.value.where == str(path)
    assert publish(folder, "view", since_ms - 1).since_ms == since_ms
    assert [len(of) for of in declared.__wrapped__(folder).values()] == [2]


def test_a_first_version_holds_from_a_time_that_lies_ahead(tmp_path: Path) -> None:
    write(tmp_path, SAID)
    with pytest.raises(BadSchema, match="not published"):
        declared.__wrapped__(tmp_path)
    with pytest.raises(BadSchema, match="has passed"):
        publish(tmp_path, "view", NOW_MS * 2)


def test_a_published_file_stays(folder: Path) -> None:
    write(folder, {**SAID, "since": "2026-02-02T00:00:00Z"}, 2)
    publish(folder, "view", NOW_MS)
    for version in (2, 1):
        (folder / payload_files.file_name("view", version)).unlink()
        with pytest.raises(BadSchema, match=f"version {version} of view was published, and its file is gone"):
            declared.__wrapped__(folder)
    assert len(load(folder).problems) == 2


def test_versions_are_numbered_and_come_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path, SAID)
    path = write(tmp_path, SAID, 3)
    with pytest.raises(BadSchema, match="one by one"):
        publish(tmp_path, "view", NOW_MS)
    path = path.rename(tmp_path / "view.v2.yaml")
    with pytest.raises(BadSchema, match="no later"):
        publish(tmp_path, "view", NOW_MS)
    write(tmp_path, {**changed(share={"type": "integer"}), "since": "2026-02-02T00:00:00Z"}, 2)
    with pytest.raises(BadSchema, match="share of view is integer, and was number before"):
        publish(tmp_path, "view", NOW_MS)
    path.rename(tmp_path / "view.v1.yaml")
    with pytest.raises(BadSchema, match=r"call it view\.yaml"):
        publish(tmp_path, "view", NOW_MS)


def test_every_problem_is_told(folder: Path) -> None:
    (folder / "click.yaml").write_text("about: [click")
    (folder / "save.yaml").write_text("about: save")
    assert [Path(str(one.where)).name for one in load(folder).problems] == ["click.yaml", "save.yaml"]
    with pytest.raises(BadSchema, match="cannot be read"):
        publish(folder, "view", NOW_MS)
    (folder / "click.yaml").unlink()
    (folder / "save.yaml").unlink()
    with pytest.raises(BadSchema, match="nothing is declared about click.*use one of view"):
        publish(folder, "click", NOW_MS)


@pytest.mark.parametrize(
    "text",
    ["[view]", "view: {}\nview: {}", "view: {one: {}}", "view: {1: {}}", "view: {1: {since: soon}}", "{"],
)
def test_a_ledger_that_cannot_be_read_is_told(folder: Path, text: str) -> None:
    (folder / payload_files.LEDGER).write_text(text)
    for refused in (lambda: declared.__wrapped__(folder), lambda: publish(folder, "view", NOW_MS)):
        with pytest.raises(BadSchema, match=r"published\.yaml"):
            refused()


def test_the_ledger_is_the_same_when_nothing_changed(folder: Path) -> None:
    ledger = folder / payload_files.LEDGER
    before = ledger.read_text()
    publish(folder, "view", NOW_MS)
    assert ledger.read_text() == before
    since = "2026-02-02T00:00:00.001Z"  # to the millisecond, as the broker's times
    write(folder, {**SAID, "since": since}, 2)
    publish(folder, "view", NOW_MS)
    assert not load(folder).problems
    assert sorted(read_ledger(folder)["view"]) == [1, 2]


# --------------------------------------------------------------------------------------------- against deciding itself

BOUNDS: dict[str, list[Callable[[random.Random], dict[str, Any]]]] = {
    "integer": [
        lambda chance: {"least": chance.randrange(3)},
        lambda chance: {"most": 2 + chance.randrange(3)},
    ],
    "text": [
        lambda chance: {"most_bytes": 1 + chance.randrange(3)},
        lambda chance: {"one_of": chance.sample("abcd", 1 + chance.randrange(3))},
    ],
    "texts": [lambda chance: {"most_texts": 1 + chance.randrange(2)}],
}
VALUES: dict[str, list[Any]] = {
    "integer": [0, 1, 2, 3, 4, 5],
    "text": ["a", "b", "c", "d", "bb", "ccc"],
    "texts": [[], ["a"], ["a", "b"], ["a", "b", "c"]],
}


def drawn(chance: random.Random) -> Schema:
    fields: dict[str, Any] = {}
    for name in chance.sample("xyz", 1 + chance.randrange(3)):
        kind = {"x": "integer", "y": "text", "z": "texts"}[name]
        fields[name] = {"type": kind, "is_required": chance.random() < 0.3}
        for bound in BOUNDS[kind]:
            fields[name] |= bound(chance) if chance.random() < 0.5 else {}
    since = payload_files.time_of(NOW_MS)
    return parse({"about": "view", "owner": "o", "since": since, "fields": fields}, "here", ["view"])


def takes(schema: Schema, payload: dict[str, Any]) -> bool:
    try:
        read_payload({"payload": payload}, "payload", "view", NOW_MS, {"view": (schema,)})
    except Refused:
        return False
    return True


def test_what_is_no_narrowing_takes_whatever_was_taken() -> None:
    chance = random.Random(7)
    payloads = [
        {name: chance.choice(VALUES[kind]) for name, kind in kinds.items() if chance.random() < 0.7}
        for kinds in [{"x": "integer", "y": "text", "z": "texts"}] * 150
    ]
    widened = 0
    for _ in range(2000):
        before, after = drawn(chance), drawn(chance)
        if payload_files.narrowings(before, after):
            continue
        widened += 1
        assert all(takes(after, payload) for payload in payloads if takes(before, payload))
    assert widened > 50
