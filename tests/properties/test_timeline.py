"""Split invariance of timelines, with horizons by age and by count, and truncated keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from pipelines.indexing.rows import NO_FOLD
from tests import oracle
from tests.properties import specs
from tests.properties.harness import CASES, FEWER_CASES, Home, Ledger, drive
from tests.properties.strategies import KEYS, MINUTE_MS, History, histories

pytestmark = pytest.mark.timeout(1800)  # about two minutes where nothing else runs

AGES_MS = (None, 3 * MINUTE_MS, 0, 5 * MINUTE_MS + 1)
COUNTS = (None, 1, 2, 3)
LIMITS = (None, 1, 2, 3)
HISTORIES = histories(about="timeline", feeds=specs.EVENT_FEEDS, ages_ms=AGES_MS, counts=COUNTS)
JOINED_HISTORIES = histories(about="timeline", feeds=specs.JOINED_FEEDS, counts=COUNTS)


def check(home: Home, ledger: Ledger) -> None:
    """Every timeline is what the oracle says, whole and limited, and says truly whether it is complete."""
    view = home.view()
    tables = {key: view.timeline(key).table for key in KEYS[:3]}
    for key, table in tables.items():
        home.recall((view.base.version, key, view.last_fold(key)), table)
    home.recall((view.base.version, view.last_fold()), tables)
    check_added(home, tables)
    families = [family.name for family in view.spec.families]
    visible, served = ledger.visible(), ledger.served
    for number, key in enumerate((*KEYS[:3], b"nobody")):
        for limit in (None, LIMITS[1 + (number + len(visible)) % 3]):
            expected = oracle.timeline(
                visible,
                key,
                families,
                limit=limit,
                base=served.statements if served else None,
                age_ms=ledger.history.age_ms,
                count=ledger.history.count,
                max_broker_time_ms=served.max_broker_time_ms if served else None,
            )
            answer = view.timeline(key, limit)
            found = [event(row, families) for row in answer.table.to_pylist()]
            assert (found, answer.is_complete) == (expected.events, expected.is_complete), (key, limit)
            assert view.timeline(key, limit, columns=("number",)).table == answer.table.select(["number"])
    check_within(home, ledger)


def check_within(home: Home, ledger: Ledger) -> None:
    """The events of several keys in a range are those of each, and never called complete where some are missing."""
    view, served, first = home.view(), ledger.served, home.view().spec.families[0].name
    visible = ledger.visible()
    keys = [*KEYS[:3], b"nobody"][:: 1 if len(visible) % 2 else -1]
    times = sorted({s.time_ms for s in visible} | {0})
    from_ms, to_ms = times[len(times) // 3], times[-1] + len(visible) % 2
    found = view.within(keys, from_ms, to_ms)
    table = found.read(("number", "id", "time_ms"))
    backwards = np.arange(len(found.of))[::-2]
    assert found.read(("id", "number"), backwards).to_pylist() == (
        table.take(pa.array(backwards)).select(["id", "number"]).to_pylist()
    )
    rows = list(zip(found.of.tolist(), table.to_pylist(), strict=True))
    check_newest(view, keys, (from_ms, to_ms), rows)
    horizon = oracle.horizon_ms(ledger.history.age_ms, served.max_broker_time_ms if served else None)
    for place, key in enumerate(keys):
        whole = oracle.timeline(
            visible,
            key,
            [first],
            base=served.statements if served else None,
            age_ms=ledger.history.age_ms,
            count=ledger.history.count,
            max_broker_time_ms=served.max_broker_time_ms if served else None,
        )
        expected = [(e.time_ms, e.id, e.payloads[first]["number"]) for e in whole.events]
        mine = sorted(((r["time_ms"], r["id"], r["number"]) for of, r in rows if of == place), reverse=True)
        assert mine == [one for one in expected if from_ms <= one[0] < to_ms], (key, from_ms, to_ms)
        assert len(whole.events) <= view.rows_of([key]) <= sum(said.key == key for said in visible)
        is_cut = whole.missing_ms is not None and whole.missing_ms >= from_ms
        is_inside = horizon is None or horizon <= from_ms
        assert found.is_complete[place] == (is_inside and not is_cut), key


def check_newest(
    view: Any, keys: Sequence[bytes], between: tuple[int, int], rows: list[tuple[int, dict[str, Any]]]
) -> None:
    """Where only the newest events of each key are needed, these are there, and none that is not among all of them."""
    for most in (1, 2, 5):
        limited = view.within(keys, *between, most=most)
        found = list(
            zip(limited.of.tolist(), limited.read(("number", "id", "time_ms")).to_pylist(), strict=True)
        )
        for place in range(len(keys)):
            mine, whole = (
                sorted(((r["time_ms"], r["id"], r["number"]) for of, r in some if of == place), reverse=True)
                for some in (found, rows)
            )
            assert mine[:most] == whole[:most], (keys[place], between, most)
            assert set(mine) <= set(whole)


def check_added(home: Home, tables: dict[bytes, pa.Table]) -> None:
    """What a timeline is said to have gained since the last check makes it of what it was then."""
    view = home.view()
    names = view.spec.families[0].schema.names
    for key, table in tables.items():
        base, fold, before = home.noted.get(key, (None, NO_FOLD, None))
        for columns in (table.column_names, ["id", "time_ms", *names]):
            added = view.added(key, fold, columns) if base is view.base else None
            if before is not None and added is not None:
                grown = pa.concat_tables([added, before.select(columns)])
                grown = grown.sort_by([("time_ms", "descending"), ("id", "descending")])
                assert grown == table.select(columns), key
        home.noted[key] = (view.base, view.last_fold(key), table)


def event(row: dict[str, object], families: list[str]) -> oracle.Event:
    """A row of an answer as the oracle has it."""
    payloads = {families[0]: {"text": row["text"], "number": row["number"]}}
    payloads |= {family: row[family] for family in families[1:] if row[family] is not None}
    return oracle.Event(row["id"], row["time_ms"], payloads)


def run(history: History) -> None:
    """One case; ``test_planted_bugs`` runs the same."""
    drive(specs.timeline(history.age_ms, history.count), history, check)


def run_joined(history: History) -> None:
    """The same of two families."""
    drive(specs.joined_timeline(history.count), history, check)


@CASES
@given(HISTORIES)
def test_every_answer_equals_the_oracle(history: History) -> None:
    run(history)


@FEWER_CASES
@given(JOINED_HISTORIES)
def test_events_joined_from_two_families_equal_the_oracle(history: History) -> None:
    run_joined(history)
