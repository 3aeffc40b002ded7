"""Counters against a fold by hand: any events, edited, deleted and repeated, over base and delta; and SQL."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.indexing import build, facts
from pipelines.indexing.base import empty, open_base
from pipelines.indexing.position import EMPTY
from pipelines.indexing.timelines import TimelineView
from pipelines.indexing.view import view
from pipelines.users import counter_sql, counters
from pipelines.users.counters import Pairs, Query
from pipelines.users.index import USER_EVENTS
from pipelines.users.spans import MAX_SPAN_MS, MIN_SPAN_MS
from tests.properties.harness import cases

CASES = cases(200)
NOW_MS = 1_700_000_000_000
USERS = ("u1", "u2", "ü'3")
VALUES: Mapping[str, tuple[str | None, ...]] = {
    "pin_id": ("p1", "p2", "p'3"),
    "action": ("view", "click", "purchase"),
    "surface": (None, "home", "search"),
    "ad_id": (None, "a1", "a2"),
    "view_type": (None, "promoted"),
}
Said = dict[str, Any]


def said(chance: random.Random) -> Said:
    """One statement about one of a few events."""
    return {
        "user": chance.choice(USERS),
        "event": f"e{chance.randrange(6)}",
        "version": chance.randrange(1, 9),
        "is_deleted": chance.random() < 0.15,
        # what it says follows from what it is about and its version, or ranks would be equal and contents not
    }


def content(one: Said) -> dict[str, Any]:
    """What a statement says: always the same of the same version."""
    chance = random.Random(repr(sorted(one.items())))
    age = chance.choice((0, 1, MIN_SPAN_MS - 1, MIN_SPAN_MS, 10 * MIN_SPAN_MS, MAX_SPAN_MS, -1))
    return {"time_ms": NOW_MS - age, **{name: chance.choice(values) for name, values in VALUES.items()}}


def fact(one: Said) -> dict[str, Any]:
    """The same as the index has it."""
    told = content(one)
    payload = {name: told.get(name) for name in USER_EVENTS.families[0].schema.names}
    return {
        "family": "interactions",
        "identity": [one["user"].encode(), one["event"].encode()],
        "key": one["user"].encode(),
        "id": one["event"].encode(),
        "version": (one["version"],),
        "content_hash": 1,
        "is_deleted": one["is_deleted"],
        "time_ms": told["time_ms"],
        "payload": None if one["is_deleted"] else payload,
    }


def standing(given_: list[Said]) -> list[dict[str, Any]]:
    """The events that there are after all was said."""
    best: dict[tuple[str, str], Said] = {}
    for one in given_:
        held = best.get((one["user"], one["event"]))
        if held is None or (one["version"], one["is_deleted"]) > (held["version"], held["is_deleted"]):
            best[one["user"], one["event"]] = one
    return [content(one) | {"user_id": one["user"]} for one in best.values() if not one["is_deleted"]]


def viewed(chance: random.Random, given_: list[Said], folder: str) -> TimelineView:
    """A base of some, and the rest folded in, in any order, some of them again."""
    in_base = [one for one in given_ if chance.random() < 0.6]
    base = empty(USER_EVENTS)
    if in_base:
        path = Path(folder) / "base"
        build.build_local(
            USER_EVENTS, facts.table(USER_EVENTS, map(fact, in_base)), path, build.Meta("v", EMPTY)
        )
        base = open_base(USER_EVENTS, path)
    seen = view(base)
    later = [one for one in given_ if one not in in_base or chance.random() < 0.3]
    chance.shuffle(later)
    while later:
        part = [later.pop() for _ in range(min(len(later), chance.randrange(1, 5)))]
        seen = seen.folded(facts.table(USER_EVENTS, map(fact, part)), EMPTY)
    assert isinstance(seen, TimelineView)
    return seen


def holds(event: Mapping[str, Any], age_ms: int, where: Mapping[str, Any]) -> bool:
    """Whether an event is in the range and one of those asked for."""
    is_in_range = NOW_MS - age_ms < event["time_ms"] <= NOW_MS
    return is_in_range and all(event[name] in values for name, values in where.items())


def drawn_where(chance: random.Random, but: str = "") -> dict[str, tuple[str, ...]]:
    """A condition on some columns."""
    names = [name for name in VALUES if name != but and chance.random() < 0.4]
    texts = {name: [value for value in VALUES[name] if value is not None] for name in names}
    return {
        name: tuple(chance.sample(values, chance.randrange(1, len(values) + 1)))
        for name, values in texts.items()
    }


def drawn_age(chance: random.Random) -> int:
    return chance.choice((MIN_SPAN_MS, MIN_SPAN_MS + 1, 10 * MIN_SPAN_MS, MAX_SPAN_MS))


@CASES
@given(st.randoms(use_true_random=False), st.integers(0, 40))
def test_counts_equal_those_of_a_fold_by_hand(chance: random.Random, number: int) -> None:
    given_ = [said(chance) for _ in range(number)]
    events = standing(given_)
    with tempfile.TemporaryDirectory() as folder:
        seen = viewed(chance, given_, folder)
        for _ in range(3):
            check_groups(chance, seen, events)
            check_pairs(chance, seen, events)


def check_groups(chance: random.Random, seen: TimelineView, events: list[dict[str, Any]]) -> None:
    users = chance.sample([*USERS, "nobody"], chance.randrange(1, 5))
    grouped = tuple(chance.sample(["user_id", *VALUES], chance.randrange(0, 4)))
    age_ms, where = drawn_age(chance), drawn_where(chance)
    query = Query(tuple(user.encode() for user in users), age_ms, where, grouped)
    answer = counters.count(seen, query, NOW_MS)
    mine = [event for event in events if event["user_id"] in users and holds(event, age_ms, where)]
    expected = Counter(tuple(event[name] for name in grouped) for event in mine)
    if not grouped:
        expected[()] += 0
    assert dict(answer.groups) == dict(expected)
    assert len(answer.groups) == len(expected)
    order = [
        tuple(
            users.index(v) if n == "user_id" else (v is not None, v) for n, v in zip(grouped, g, strict=True)
        )
        for g, _ in answer.groups
    ]
    assert order == sorted(order)
    assert answer.incomplete == ()


def check_pairs(chance: random.Random, seen: TimelineView, events: list[dict[str, Any]]) -> None:
    about = chance.choice(("pin_id", "ad_id"))
    pairs = [
        (chance.choice([*USERS, "nobody"]), chance.choice(("p1", "p2", "p'3", "a1", "a2")))
        for _ in range(chance.randrange(1, 9))
    ]
    age_ms, where = drawn_age(chance), drawn_where(chance, but=about)
    asked = Pairs(tuple((user.encode(), value) for user, value in pairs), about, age_ms, where)
    expected = Counter((e["user_id"], e[about]) for e in events if holds(e, age_ms, where))
    assert counters.count_pairs(seen, asked, NOW_MS).events.tolist() == [expected[pair] for pair in pairs]


@CASES
@given(st.randoms(use_true_random=False))
def test_a_sentence_says_the_query_that_it_was_written_of(chance: random.Random) -> None:
    users = chance.sample(USERS, chance.randrange(1, 4))
    grouped = chance.sample(["user_id", *VALUES], chance.randrange(0, 4))
    where, (number, unit) = drawn_where(chance), chance.choice(((1, "m"), (36, "h"), (90, "d"), (2, "w")))
    named = {
        "user_id": ("user", "USER_ID", '"user"'),
        "pin_id": ("object", "pin", "pin_id"),
        "ad_id": ("Ad", "ad_id"),
    }

    def name(column: str) -> str:
        return chance.choice(named.get(column, (column, column.upper())))

    def condition(column: str, values: tuple[str, ...]) -> str:
        texts = ["'" + value.replace("'", "''") + "'" for value in values]
        if len(texts) == 1 and chance.random() < 0.5:
            return f"{name(column)} = {texts[0]}"
        return f"{name(column)} IN ({', '.join(texts)})"

    conditions = [condition(*one) for one in ({"user_id": tuple(users)} | where).items()]
    conditions.append(f"age < '{number}{unit}'")
    chance.shuffle(conditions)
    chosen = [name(column) for column in grouped]
    selected = list(chosen)
    selected.insert(chance.randrange(len(selected) + 1), chance.choice(("count(*)", "COUNT(*) AS n")))
    text = f"SELECT {', '.join(selected)}\nFROM events WHERE {' AND '.join(conditions)}"
    if grouped:
        text += " GROUP BY " + ", ".join(name(column) for column in chance.sample(grouped, len(grouped)))
    found = counter_sql.parse(text)
    unit_ms = {"m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}[unit]
    expected = Query(tuple(user.encode() for user in users), number * unit_ms, where, tuple(grouped))
    assert found.query == expected
    assert found.names == tuple(one.strip('"') for one in chosen)
