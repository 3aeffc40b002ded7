"""Fields of payloads and of features in sequences: online and exported for moments of the past, against a fold by hand.

Features come after their events, before them, again with another version, and are taken back.
"""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.indexing import base as bases
from pipelines.indexing import build, facts
from pipelines.indexing import view as views
from pipelines.indexing.base import open_base
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.position import EMPTY
from pipelines.indexing.timelines import TimelineView
from pipelines.pins.index import PINS
from pipelines.users import sequences
from pipelines.users.index import USER_EVENTS
from pipelines.users.sequence_history import EVENTS, FEATURES, STATEMENT, as_of

FIELDS = [
    "event_id",
    "payload.view.dwell_ms",
    "payload.view.query",
    "features.quality",
    "features.is_converted",
]
START_MS = 1_700_000_000_000
USERS = ("u", "v")
Statement = dict[str, Any]


def drawn(chance: random.Random) -> list[Statement]:
    """What is said of a few events, in the order in which it was taken, a second apart."""
    said = []
    for number in range(60):
        user, event = chance.choice(USERS), f"e{chance.randrange(5)}"
        is_found_out = chance.random() < 0.5
        one: Statement = {
            "user": user,
            "event": event,
            "family": "features" if is_found_out else "interactions",
            "version": chance.randint(1, 4),
            "is_deleted": chance.random() < 0.15,
            "time_ms": START_MS + 1_000 * int(event[1:]),
            "taken_ms": START_MS + 1_000 * number,
        }
        if is_found_out:
            found = chance.choice(
                ({"quality": 0.5}, {"quality": 1, "is_converted": True}, {"quality": "odd"})
            )
            one["said"] = {"features": json.dumps(found)}
        else:
            action = chance.choice(("view", "click"))
            payload = chance.choice(
                (None, {"dwell_ms": number}, {"query": "tea", "dwell_ms": 1.5}, {"other": 1})
            )
            one["said"] = {"action": action, "payload": None if payload is None else json.dumps(payload)}
        said.append(one | {"content_hash": number})
    return said


def standing(said: list[Statement], at_ms: int) -> dict[tuple[str, str, str], Statement]:
    """By family, user and event what stands at a time."""
    found: dict[tuple[str, str, str], Statement] = {}
    for one in said:
        at = one["family"], one["user"], one["event"]
        if one["taken_ms"] <= at_ms and (at not in found or rank(one) > rank(found[at])):
            found[at] = one
    return {at: one for at, one in found.items() if not one["is_deleted"]}


def rank(one: Statement) -> tuple[int, bool, int]:
    return one["version"], one["is_deleted"], one["content_hash"]


def by_hand(said: list[Statement], user: str, at_ms: int) -> list[dict[str, Any]]:
    held = standing(said, at_ms)
    rows = []
    for event in sorted({e for family, u, e in held if (family, u) == ("interactions", user)}, reverse=True):
        own = held["interactions", user, event]["said"]
        payload = json.loads(own["payload"] or "{}") if own["action"] == "view" else {}
        later = held.get(("features", user, event))
        features = json.loads(later["said"]["features"]) if later else {}
        dwell, quality = payload.get("dwell_ms"), features.get("quality")
        rows.append(
            {
                "event_id": event,
                "payload.view.dwell_ms": dwell if type(dwell) is int else None,
                "payload.view.query": payload.get("query"),
                "features.quality": None if quality in (None, "odd") else float(quality),
                "features.is_converted": features.get("is_converted"),
            }
        )
    return rows


def online(said: list[Statement], at_ms: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """From a base of half of what is known, and the rest folded over it."""
    rows = [
        {
            "family": one["family"],
            "identity": [one["user"].encode(), one["event"].encode()],
            "key": one["user"].encode(),
            "id": one["event"].encode(),
            "time_ms": one["time_ms"],
            "version": (one["version"],),
            "is_deleted": one["is_deleted"],
            "content_hash": one["content_hash"],
            "payload": None if one["is_deleted"] else one["said"],
        }
        for one in said
        if one["taken_ms"] <= at_ms
    ]
    half = len(rows) // 2
    build.build_local(USER_EVENTS, facts.table(USER_EVENTS, rows[:half]), folder, build.Meta("b", EMPTY))
    view = views.view(open_base(USER_EVENTS, folder)).folded(facts.table(USER_EVENTS, rows[half:]), EMPTY)
    pins = views.view(bases.empty(PINS))
    assert isinstance(view, TimelineView)
    assert isinstance(pins, DocumentsView)
    definition = sequences.parse({"max_length": 10, "fields": FIELDS})
    found = sequences.read(view, pins, definition, [user.encode() for user in USERS], START_MS + 10**6)
    of = iter(found.table.to_pylist())
    return {
        user: [next(of) for _ in range(count)]
        for user, count in zip(USERS, found.lengths.tolist(), strict=True)
    }


def exported(said: list[Statement], labels: list[tuple[str, int]]) -> list[list[dict[str, Any]]]:
    statements = []
    for one in said:
        is_event = one["family"] == "interactions"
        statements.append(
            {
                "family": one["family"],
                "key": one["user"] if is_event else f"{one['user']}\0{one['event']}",
                "id": one["event"].encode() if is_event else b"",
                **{
                    name: one[name]
                    for name in ("time_ms", "version", "is_deleted", "content_hash", "taken_ms")
                },
                one["family"]: None if one["is_deleted"] else one["said"],
            }
        )
    families = [(family.name, pa.struct(list(family.schema))) for family in (EVENTS, FEATURES)]
    table = pa.Table.from_pylist(statements, pa.schema([*STATEMENT, *families]))
    times = [datetime.fromtimestamp(at_ms / 1000, UTC) for _, at_ms in labels]
    asked = pa.table(
        {"user_id": [user for user, _ in labels], "label_time": pa.array(times, pa.timestamp("us", "UTC"))}
    )
    definition = sequences.parse({"max_length": 10, "fields": FIELDS})
    return as_of(asked, table, definition).column("sequence").to_pylist()


@pytest.mark.parametrize("seed", range(12))
def test_online_and_exported_are_what_was_known(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    said = drawn(chance)
    moments = [START_MS + 1_000 * number + 500 for number in sorted(chance.sample(range(5, 60), 4))]
    labels = [(user, at_ms) for at_ms in moments for user in USERS]
    # What happened later than a label is in none; all events are over within the first five seconds.
    wanted = [by_hand(said, user, at_ms) for user, at_ms in labels]
    assert exported(said, labels) == wanted
    for place, at_ms in enumerate(moments):
        found = online(said, at_ms, tmp_path / str(place))
        assert [found[user] for user in USERS] == wanted[2 * place : 2 * place + 2]
    assert any(row["features.quality"] is not None for rows in wanted for row in rows)
