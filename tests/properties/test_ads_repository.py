"""The repository after any records, in any order, again and with crashes, equals a naive fold of whole transactions."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import sqlalchemy as sa
from hypothesis import given, settings

from pipelines.ads import repository, rows, schema, updater
from pipelines.ads.repository import IS_THERE, Change, Repository, Update
from pipelines.ads.updater import Event

TABLES = ("campaigns", "ad_groups")
KEYS = ("k1", "k2", "k3")
COLUMNS = {"campaigns": ("status", "advertiser_id"), "ad_groups": ("campaign_id", "not_declared")}
ALL = frozenset(f"{table}.{column}" for table, columns in COLUMNS.items() for column in (*columns, IS_THERE))
VALUES = (None, "a", "b", 1, True, ["a"])
REFERENCES = (None, "a", "b")
Visible = dict[tuple[str, str], dict[str, Any]]


class Crash(Exception):
    """The process was killed before it could commit."""


class Step(NamedTuple):
    """Some records at once, and whether the first try is killed."""

    events: list[Event]
    is_killed: bool


@st.composite
def updates(draw: st.DrawFn, version: int) -> Update:
    table = draw(st.sampled_from(TABLES))
    values = st.fixed_dictionaries(
        {}, optional={c: st.sampled_from(REFERENCES if c.endswith("_id") else VALUES) for c in COLUMNS[table]}
    )
    return Update(table, draw(st.sampled_from(KEYS)), version, draw(st.none() | values))


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """What a source says: single records and transactions, some of which tell their size only at their end."""
    events: list[Event] = []
    versions = itertools.count(1)
    for number in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 3))
        said = [draw(updates(next(versions))) for _ in range(size)]
        match draw(st.sampled_from(["alone", "counted", "ended", "empty", "ended unread"])):
            case "alone":
                events += [Event(one, hashed(one)) for one in said]
            case "counted":
                events += [Event(one, hashed(one), f"t{number}", size) for one in said]
            case "ended":
                events.append(Event(None, 0, f"t{number}"))  # its beginning
                events += [Event(one, hashed(one), f"t{number}") for one in said]
                events.append(Event(None, 0, f"t{number}", size))
            case "empty":
                events += [Event(None, 0, f"t{number}"), Event(None, 0, f"t{number}", 0)]
            case _:  # its end never comes, and it stays invisible
                events += [Event(one, hashed(one), f"t{number}") for one in said]
    return events


@st.composite
def runs(draw: st.DrawFn) -> list[Step]:
    history = draw(histories())
    again = draw(st.lists(st.sampled_from(history), max_size=6))
    order = draw(st.permutations(history + again)) if draw(st.booleans()) else history + again
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=5)))
    parts = [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(order)])]
    return [Step(part, draw(st.booleans())) for part in parts]


def hashed(update: Update) -> int:
    return hash((update.table, update.key, json.dumps(update.values, sort_keys=True))) >> 1


def naive(arrived: Sequence[Event]) -> Visible:
    """All that was ever said by whole transactions, each row by sorting it; rows that are not there are left out."""
    counted = {}
    for name in {event.transaction_id for event in arrived}:
        mine = [event for event in arrived if event.transaction_id == name]
        said = {(e.update.table, e.update.key, e.update.version) for e in mine if e.update}
        sizes = [e.transaction_count for e in mine if e.transaction_count]
        counted[name] = name is None or (bool(sizes) and len(said) == sizes[0])
    whole = [event.update for event in arrived if event.update and counted[event.transaction_id]]
    found: Visible = {}
    for table, key in itertools.product(TABLES, KEYS):
        mine_too = sorted((u for u in whole if (u.table, u.key) == (table, key)), key=lambda u: u.version)
        deleted = max((u.version for u in mine_too if u.values is None), default=0)
        row = {
            column: value
            for update in mine_too
            if update.values is not None and update.version > deleted
            for column, value in update.values.items()
        }
        if row.keys() - {"not_declared"}:
            found[table, key] = row
    return found


def held(store: Repository) -> Visible:
    found = {}
    with store.reading() as connection:
        for table in TABLES:
            for key, row in repository.scan(connection, table):
                if rows.is_there(row, schema.TABLES[table]):
                    seen = rows.visible(row)
                    found[table, key] = {
                        c: v for c, v in seen.items() if row.versions[c] > row.deleted_version
                    }
    return found


def emptied(store: Repository) -> None:
    with store.writing() as connection:
        for table in repository.METADATA.sorted_tables:
            connection.execute(table.delete())


def applied(store: Repository, step: Step, position: str) -> None:
    if step.is_killed:
        with contextlib.suppress(Crash), store.writing() as connection:
            updater.write(connection, step.events, "topic", position)
            raise Crash
    updater.apply(store, step.events, "topic", position)


def as_told(tracked: Visible, changes: Sequence[Change]) -> None:
    """Follow the notifications: each says what the row was before, and what it is now."""
    for change in changes:
        row = tracked.setdefault((change.table, change.key), {})
        for column, (before, after) in change.changed.items():
            assert json.dumps(row.get(column)) == json.dumps(before if column != IS_THERE else before or None)
            row[column] = after if column != IS_THERE else after or None


@settings(deadline=None, max_examples=100)
@given(runs())
def test_after_every_commit_it_is_a_naive_fold_of_the_whole_transactions(
    store: Repository, run: list[Step]
) -> None:
    arrived: list[Event] = []
    tracked: Visible = {}
    emptied(store)
    with store.writing() as connection:
        repository.subscribe(connection, "test")
    for number, step in enumerate(run):
        applied(store, step, str(number))
        arrived += step.events
        wanted = naive(arrived)
        assert json.dumps(sorted(held(store).items()), sort_keys=True) == json.dumps(
            sorted(wanted.items()), sort_keys=True
        )
        with store.writing() as connection:
            assert repository.progress(connection) == {"topic": str(number)}
            changes, last = repository.changes_for(connection, "test", ALL)
            as_told(tracked, changes)
            repository.acknowledge(connection, "test", last)
            assert repository.changes_for(connection, "test", ALL) == ([], last)
        told = {
            at: {column: value for column, value in row.items() if column != IS_THERE and value is not None}
            for at, row in tracked.items()
            if row.get(IS_THERE)
        }
        visible = {at: {c: v for c, v in row.items() if v is not None} for at, row in wanted.items()}
        assert json.dumps(sorted(told.items()), sort_keys=True) == json.dumps(
            sorted(visible.items()), sort_keys=True
        )


def test_what_waits_is_read_once_however_many_parts_it_comes_in(store: Repository) -> None:
    emptied(store)
    said = [Update("campaigns", f"k{number}", 1, {"status": "a"}) for number in range(40)]
    reads: list[str] = []

    def note(*executed: Any) -> None:
        if executed[2].lstrip().startswith("SELECT") and "said" in executed[2]:
            reads.append(executed[2])

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        for start in range(0, 40, 10):
            assert reads == []
            given_now = [Event(one, hashed(one), "t1", 40) for one in said[start : start + 10]]
            changes = updater.apply(store, given_now)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert len(reads) == 1
    assert len(changes) == 40


@settings(deadline=None, max_examples=100)
@given(runs(), st.lists(st.sampled_from(KEYS), min_size=1))
def test_rows_are_found_by_what_they_refer_to(store: Repository, run: list[Step], keys: list[str]) -> None:
    references = ("a", "b")
    emptied(store)
    for number, step in enumerate(run):
        applied(store, step, str(number))
    visible = naive([event for step in run for event in step.events])
    with store.reading() as connection:
        for table, column in (("campaigns", "advertiser_id"), ("ad_groups", "campaign_id")):
            found = list(repository.referring(connection, table, column, references))
            wanted = [
                key for (t, key), row in visible.items() if t == table and row.get(column) in references
            ]
            assert sorted(found) == sorted(wanted)
        read = repository.read(connection, "campaigns", keys)
        assert set(read) <= set(keys)
        assert {k for k, row in read.items() if rows.is_there(row, schema.CAMPAIGNS)} == {
            key for t, key in visible if t == "campaigns" and key in keys
        }


@settings(deadline=None, max_examples=100)
@given(runs())
def test_what_is_held_back_is_listed_and_released(store: Repository, run: list[Step]) -> None:
    everything = [event for step in run for event in step.events]
    emptied(store)
    for step in run:
        updater.apply(store, step.events)
    with store.reading() as connection:
        waiting = updater.held(connection)
        kept = set(connection.execute(sa.select(repository.WAITING.c.transaction_id)).scalars())
    endless = {e.transaction_id for e in everything} - {None}
    endless -= {e.transaction_id for e in everything if e.transaction_count is not None}
    assert {one.id for one in waiting} == endless == kept
    for one in waiting:
        updater.release(store, one.id)
    with store.reading() as connection:
        assert updater.held(connection) == []
    updater.apply(store, everything)  # late repeats of what was released change nothing
    assert json.dumps(sorted(held(store).items()), sort_keys=True) == json.dumps(
        sorted(naive([e._replace(transaction_id=None) for e in everything]).items()), sort_keys=True
    )
