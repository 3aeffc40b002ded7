"""Times and snapshots: which one was current when, from a table's log and from its snapshots' parents."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import undo


def table(
    log: list[tuple[int, int]], snapshots: dict[int, tuple[int, int | None]], current: int | None
) -> Any:
    """Metadata of a table: its log as (ms, id), its retained snapshots as id → (ms, parent)."""
    kept = [
        SimpleNamespace(snapshot_id=id_, timestamp_ms=ms, parent_snapshot_id=parent)
        for id_, (ms, parent) in snapshots.items()
    ]
    entries = [SimpleNamespace(timestamp_ms=ms, snapshot_id=id_) for ms, id_ in log]
    return SimpleNamespace(
        metadata=SimpleNamespace(snapshots=kept, snapshot_log=entries, current_snapshot_id=current)
    )


def test_the_newest_that_was_current_at_the_time() -> None:
    found = table([(10, 1), (20, 2), (30, 3)], {1: (10, None), 2: (20, 1), 3: (30, 2)}, 3)
    assert [undo.current_at(found, at) for at in (9, 10, 19, 20, 99)] == [
        (True, None),  # before its first commit it had no rows
        (True, 1),
        (True, 1),
        (True, 2),
        (True, 3),
    ]


def test_a_table_that_was_set_back_was_what_the_log_says() -> None:
    found = table([(10, 1), (20, 2), (30, 1), (40, 3)], {1: (10, None), 2: (20, 1), 3: (40, 1)}, 3)
    assert [undo.current_at(found, at)[1] for at in (25, 35, 45)] == [2, 1, 3]


def test_a_snapshot_that_expired_is_not_replaced_by_another() -> None:
    found = table([(10, 1), (20, 2), (30, 3)], {3: (30, 2)}, 3)
    assert undo.current_at(found, 25) == (False, 2)
    assert undo.current_at(found, 30) == (True, 3)
    assert undo.current_at(found, 5)[0] is False


def test_where_the_log_was_cut_the_parents_say_it() -> None:
    found = table([(30, 3)], {1: (10, None), 2: (20, 1), 3: (30, 2)}, 3)
    assert [undo.current_at(found, at) for at in (5, 15, 25)] == [(True, None), (True, 1), (True, 2)]
    without = table([(30, 3)], {2: (20, 1), 3: (30, 2)}, 3)
    assert undo.current_at(without, 15) == (False, None)


def test_a_table_that_nobody_wrote_is_what_it_was() -> None:
    assert undo.current_at(table([], {}, None), 5) == (True, None)


def test_times() -> None:
    assert undo.moment("2024-03-01T10:00:00Z") == datetime(2024, 3, 1, 10, tzinfo=UTC)
    assert undo.moment("2024-03-01 10:00") == datetime(2024, 3, 1, 10, tzinfo=UTC)
    assert undo.moment("2024-03-01T10:00:00+02:00") == datetime(2024, 3, 1, 8, tzinfo=UTC)
    for text, why in (
        ("yesterday", "is no time"),
        ((datetime.now(UTC) + timedelta(days=1)).isoformat(), "lies ahead"),
    ):
        with pytest.raises(undo.UndoError, match=why):
            undo.moment(text)
