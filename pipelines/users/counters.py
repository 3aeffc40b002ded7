"""Counters: how often users did something, or something with an object, in the last while; counted from timelines.

Belongs here: the two questions as values, the bounds of what may be asked, and counting. Does not belong here: how a
question is written (`counter_sql` and the routes of `serving`), and rules about what the counts mean (`frequency`).

An event counts once, whatever was said about it how often: a timeline has each event once, as it is now. It counts in
the last T at a time t where t - T < event time ≤ t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import ACTIONS
from pipelines.users.index import OWN

if TYPE_CHECKING:
    from pipelines.indexing.timelines import TimelineView, Within

USER = "user_id"
COLUMNS = tuple(field.name for field in OWN if pa.types.is_string(field.type) and field.name != "payload")
"""What events are told apart by: their fields that are texts."""
CHOICES: Mapping[str, Sequence[str]] = {"action": ACTIONS}
"""Column → all that it may hold, where that is known: another word is a mistake, and would count nothing."""

MAX_USERS, MAX_PAIRS, MAX_VALUES = 1_000, 1_000, 1_000

Where = Mapping[str, Sequence[str]]
"""Column → the values that an event may have there."""


class Query(NamedTuple):
    """How many events of some users there are in the last ``age_ms``, by group.

    Attributes:
        users: Whose events; at most `MAX_USERS`.
        age_ms: From `MIN_SPAN_MS` to `MAX_SPAN_MS`.
        where: Which of them; by columns of `COLUMNS`.
        group_by: Of `USER` and `COLUMNS`; none: they are counted together.
    """

    users: tuple[bytes, ...]
    age_ms: int
    where: Where
    group_by: tuple[str, ...]


class Pairs(NamedTuple):
    """How many events each of some users has with each's object in the last ``age_ms``.

    Attributes:
        pairs: User and value of the object; at most `MAX_PAIRS`.
        object: Of `OBJECTS`.
        age_ms: From `MIN_SPAN_MS` to `MAX_SPAN_MS`.
        where: Which events; by columns of `COLUMNS`.
    """

    pairs: tuple[tuple[bytes, str], ...]
    object: str
    age_ms: int
    where: Where


class Group(NamedTuple):
    """The values of the columns that a query groups by, in its order (None: the event says none), and how many."""

    values: tuple[str | None, ...]
    events: int


class Counts(NamedTuple):
    """An answer: groups without events are left out (but for that of a query without any); which users' timelines may
    lack older events of the range."""

    groups: list[Group]
    incomplete: tuple[bytes, ...]


class PairCounts(NamedTuple):
    """An answer: int64[pairs], in their order; which users' timelines may lack older events of the range."""

    events: np.ndarray
    incomplete: tuple[bytes, ...]


def count(view: TimelineView, query: Query, now_ms: int) -> Counts:
    """Count by group; the groups in the order of the users asked for, then of their values, None first."""
    named = [name for name in query.group_by if name != USER]
    found, table = _events(view, query.users, query.age_ms, query.where, now_ms, named)
    if not query.group_by:
        return Counts([Group((), table.num_rows)], _incomplete(found, query.users))
    grouped = table.group_by(list(query.group_by), use_threads=False).aggregate([([], "count_all")])
    rows = sorted(
        zip(*(grouped.column(name).to_pylist() for name in (*query.group_by, "count_all")), strict=True),
        key=lambda row: [(value is not None, value) for value in row],
    )
    groups = []
    for *values, events in rows:
        told = (
            query.users[value].decode() if name == USER else value
            for name, value in zip(query.group_by, values, strict=True)
        )
        groups.append(Group(tuple(told), events))
    return Counts(groups, _incomplete(found, query.users))


def count_pairs(view: TimelineView, asked: Pairs, now_ms: int) -> PairCounts:
    """Count for each pair."""
    users, of_user = _numbered([user for user, _ in asked.pairs])
    objects, of_object = _numbered([value for _, value in asked.pairs])
    found, table = _events(view, tuple(users), asked.age_ms, asked.where, now_ms, [asked.object])
    named = pc.index_in(table.column(asked.object), pa.array(objects, pa.string())).combine_chunks()
    is_asked = named.is_valid().to_numpy(zero_copy_only=False)
    of = table.column(USER).to_numpy()[is_asked] * len(objects)
    events = np.bincount(of + named.drop_null().to_numpy(), minlength=len(users) * len(objects))
    return PairCounts(events[of_user * len(objects) + of_object], _incomplete(found, users))


def _events(
    view: TimelineView,
    users: Sequence[bytes],
    age_ms: int,
    where: Where,
    now_ms: int,
    columns: Sequence[str],
) -> tuple[Within, pa.Table]:
    """What stands in the range, and those of it that are asked for: ``columns``, and in `USER` the user's place."""
    read = list(dict.fromkeys((*where, *columns)))
    found = view.within(users, now_ms - age_ms + 1, now_ms + 1)
    table = pa.table(dict(zip(read, found.read(read).columns, strict=True)) | {USER: found.of})
    for name, values in where.items():
        table = table.filter(pc.is_in(table.column(name), pa.array(list(values), pa.string())))
    return found, table


def _incomplete(found: Within, users: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(users[place] for place in np.flatnonzero(~found.is_complete).tolist())


def _numbered(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """The different values in their order, and the number of each of all."""
    numbers: dict[Any, int] = {}
    of = [numbers.setdefault(value, len(numbers)) for value in values]
    return list(numbers), np.array(of, np.int64)
