"""A row equals a naive reading of all its records at once, whatever their order and however often each came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
from hypothesis import given

from pipelines.ads import generator, rows
from pipelines.ads.schema import (
    ADS,
    CONTENT,
    CONTROL,
    PERFORMANCE,
    TABLES,
    Column,
    are_kept,
    checked,
)

COLUMNS = ("status", "name", "clicks_7d", "clicks_28d", "not_declared")
FAMILIES = (CONTROL, CONTENT, PERFORMANCE)


class Said(NamedTuple):
    """A record: what it sets, or None for a deletion."""

    version: int
    values: dict[str, Any] | None


values = st.sampled_from([None, True, 1, 1.0, "", "a", ["a"], [], {"b": 1, "a": 2}])
records = st.builds(
    Said,
    st.integers(1, 12),
    st.none() | st.dictionaries(st.sampled_from(COLUMNS), values, max_size=3),
)


def folded(said: Sequence[Said]) -> rows.Row:
    row = rows.EMPTY
    for record in said:
        row = after(row, record)
    return row


def after(row: rows.Row, record: Said) -> rows.Row:
    if record.values is None:
        return rows.with_deletion(row, record.version)
    return rows.with_values(row, record.version, record.values)


def naive(said: Sequence[Said]) -> dict[str, Any]:
    """Each column's value by sorting all that was ever said of it."""
    deleted = max((record.version for record in said if record.values is None), default=0)
    found = {}
    for column in COLUMNS:
        named = [r for r in said if r.values is not None and column in r.values]
        if named:
            last = sorted(named, key=lambda r: (r.version, json.dumps(r.values[column], sort_keys=True)))[-1]
            found[column] = last.values[column] if last.version > deleted else None
    return found


def typed(found: dict[str, Any]) -> str:
    return json.dumps(found, sort_keys=True)


@given(st.lists(records, max_size=12), st.randoms(use_true_random=False))
def test_a_row_is_what_its_records_say_together(said: list[Said], random: Any) -> None:
    disordered = [*said, *random.choices(said, k=3)] if said else []
    random.shuffle(disordered)
    row = folded(disordered)
    assert row == folded(said)
    assert typed(rows.visible(row)) == typed(naive(said))


@given(st.lists(records, max_size=8))
def test_a_row_is_there_if_a_column_of_its_own_is_above_its_deletion(said: list[Said]) -> None:
    deleted = max((record.version for record in said if record.values is None), default=0)
    named = {name for record in said if record.version > deleted for name in record.values or ()}
    assert rows.is_there(folded(said), ADS) == bool(named & {"status", "name"})


@given(st.lists(records, max_size=12, unique_by=lambda record: record.version))
def test_a_stand_grows_with_every_change_of_its_family(said: list[Said]) -> None:
    row = rows.EMPTY
    for record in said:
        newer = after(row, record)
        changed = rows.changed(row, newer)
        for family in FAMILIES:
            was, now = (rows.stand(one, ADS, family) for one in (row, newer))
            is_changed = any(column.name in changed for column in ADS.of_family(family))
            is_changed |= rows.is_there(row, ADS) != rows.is_there(newer, ADS)
            assert now > was if is_changed else now >= was
        row = newer


@given(st.lists(records, max_size=8), st.lists(records, max_size=4))
def test_what_changed_leads_from_the_old_row_to_the_new(before: list[Said], more: list[Said]) -> None:
    old, new = folded(before), folded([*before, *more])
    changed = rows.changed(old, new)
    was, now = naive(before), naive([*before, *more])
    expected = {
        column: [was.get(column), now.get(column)]
        for column in COLUMNS
        if json.dumps(was.get(column), sort_keys=True) != json.dumps(now.get(column), sort_keys=True)
    }
    assert typed(changed) == typed(expected)


def test_a_late_version_raises_the_stand_and_a_repeat_does_not() -> None:
    row = folded([Said(5, {"status": "active"}), Said(4, {"name": "late"})])
    assert rows.stand(row, ADS, CONTROL) == 9
    assert rows.with_values(row, 4, {"name": "late"}) is row
    assert rows.stand(rows.with_values(row, 7, {"not_declared": 1}), ADS, CONTROL) == 9


def test_one_and_true_and_one_point_zero_are_three_values() -> None:
    one, true, float_one = (folded([Said(1, {"not_declared": value})]) for value in (1, True, 1.0))
    assert typed(rows.changed(one, true)) == '{"not_declared": [1, true]}'
    assert typed(rows.changed(one, float_one)) == '{"not_declared": [1, 1.0]}'
    assert rows.changed(one, one) == {}


ODD = st.sampled_from(
    [
        None,
        True,
        0,
        1,
        -1,
        2**60,
        1.0,
        -0.5,
        200.0,
        "",
        "active",
        "a\0",
        "ß" * 300,
        "x" * 5_000,
        [],
        ["b", "a"],
    ]
)
KEPT = (
    ODD
    | st.lists(st.floats(-2e3, 2e3) | st.integers(0, 1), min_size=31, max_size=32)
    | st.lists(st.sampled_from(["a", "b", "", "c" * 300, "18-24", None, 1]), max_size=4)
)


@given(st.sampled_from([c for table in TABLES.values() for c in table.columns]), st.lists(KEPT, max_size=4))
def test_a_column_that_is_kept_as_a_whole_is_kept_value_by_value(column: Column, said: list[Any]) -> None:
    if are_kept(column, said):
        assert typed({"": [checked(column, value) for value in said]}) == typed({"": said})


def test_a_generated_account_is_kept_as_a_whole() -> None:
    for table, rows_ in generator.account(30, seed=1):
        for column in table.sourced:
            assert are_kept(column, rows_.column(column.name).to_pylist()), column.name
