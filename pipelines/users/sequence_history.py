"""Sequences as they were at moments of the past: which statements stood then, and what a definition makes of them.

Belongs here: the history that statements make, and labels with the sequences that were to be had at their times; pure,
on Arrow tables. Does not belong here: what a definition means (`sequences.arranged`, the same function that answers
online), which of an identity's statements stands (`indexing.merge`), and where statements and labels come from
(`sequence_export`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import payloads
from pipelines.indexing.facts import hash_keys, identity_bytes
from pipelines.indexing.merge import Ranks, stood
from pipelines.indexing.rows import spans
from pipelines.indexing.spec import Documents, Family
from pipelines.indexing.timelines import Part, Within, first_at
from pipelines.pins.index import PINS
from pipelines.users.index import OWN, USER_EVENTS
from pipelines.users.indexed import KEPT
from pipelines.users.sequences import (
    CATEGORY,
    ENRICHMENTS,
    EVENT_FIELDS,
    FOUND_OUT,
    OBJECT,
    Definition,
    Sequences,
    arranged,
)

STATEMENT = pa.schema(
    [
        ("family", pa.string()),
        ("key", pa.string()),  # the user, the pin, or of features the event: `event_key`
        ("id", pa.binary()),  # which of the user's events; empty for a pin and for features
        ("time_ms", pa.int64()),  # when that happened; 0 for a pin
        ("version", pa.int64()),
        ("is_deleted", pa.bool_()),
        ("content_hash", pa.int64()),
        ("taken_ms", pa.int64()),  # when the broker, or the load, took the record
    ]
)
"""The columns of statements; and for each family a column of its name, a struct of its columns."""

FEATURES = USER_EVENTS.family(payloads.FEATURES)
EVENTS = USER_EVENTS.families[0]._replace(schema=OWN)
"""The family of events as records say them: without what is looked up when they are indexed."""

EVENT_KEY_JOINT = "\0"
"""Between the user and the event's id in the key of features: no id holds it."""
_PAIRS = 1_000_000
"""So many pairs of a label and an event are looked at at once; more only where one label has more."""


class History(NamedTuple):
    """What was said of k things, with the time in which each statement stood; deletions are left out.

    Attributes:
        keys: Of whom or what, k texts.
        starts: Where each key's rows begin, int64[k].
        ends: And where they end, int64[k].
        rows: `id`, `time_ms`, the family's columns, `from_ms` and `until_ms`; by key, then by `time_ms` and `from_ms`.
    """

    keys: pa.Array
    starts: np.ndarray
    ends: np.ndarray
    rows: pa.Table

    def numbers(self, name: str) -> np.ndarray:
        """A column of integers."""
        found: np.ndarray = self.rows.column(name).to_numpy()
        return found

    def spans(self, keys: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of each of n keys: first and end; none where nothing was said of it or it is null."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        at = pc.index_in(keys, value_set=self.keys, skip_nulls=True)
        at = pc.fill_null(at, -1).to_numpy()
        return np.where(at < 0, 0, self.starts[at]), np.where(at < 0, 0, self.ends[at])

    def stands(self, rows: np.ndarray, at_ms: np.ndarray) -> np.ndarray:
        """Whether each row stood at its time, bool[n]."""
        from_ms, until_ms = self.numbers("from_ms")[rows], self.numbers("until_ms")[rows]
        found: np.ndarray = (from_ms <= at_ms) & (at_ms < until_ms)
        return found


def history(statements: pa.Table, family: Family) -> History:
    """The history that statements of one family make, in any order and however often each is there.

    Args:
        statements: With the columns of `STATEMENT`, of this family and maybe others.
        family: Which.
    """
    mine = statements.filter(pc.equal(statements.column("family"), family.name)).combine_chunks()
    found = stood(hash_keys(_identities(mine)), _ranks(mine), mine.column("taken_ms").to_numpy())
    is_live = ~mine.column("is_deleted").to_numpy()[found.rows]
    rows, from_ms, until_ms = found.rows[is_live], found.from_ms[is_live], found.until_ms[is_live]
    keys = pc.dictionary_encode(mine.column("key").take(rows).combine_chunks())
    codes, times = keys.indices.to_numpy(), mine.column("time_ms").to_numpy()[rows]
    order = np.lexsort((from_ms, times, codes))
    numbers = np.arange(len(keys.dictionary))
    payload = mine.column(family.name).take(rows[order]).combine_chunks()
    said = {
        "id": mine.column("id").take(rows[order]),
        "time_ms": times[order],
        **{field.name: pc.struct_field(payload, field.name) for field in family.schema},
        "from_ms": from_ms[order],
        "until_ms": until_ms[order],
    }
    return History(
        keys.dictionary,
        np.searchsorted(codes[order], numbers, side="left"),
        np.searchsorted(codes[order], numbers, side="right"),
        pa.table(said),
    )


def _identities(statements: pa.Table) -> Iterator[bytes]:
    keys, ids = (statements.column(name).cast(pa.binary()).to_pylist() for name in ("key", "id"))
    return (identity_bytes(parts) for parts in zip(keys, ids, strict=True))


def _ranks(statements: pa.Table) -> Ranks:
    versions = np.zeros((statements.num_rows, 4), np.int64)
    versions[:, 0] = statements.column("version").to_numpy()
    is_deleted, content_hash = (statements.column(name).to_numpy() for name in ("is_deleted", "content_hash"))
    return Ranks(versions, is_deleted, content_hash)


def as_of(
    labels: pa.Table, statements: pa.Table, definition: Definition, horizon_ms: int | None = None
) -> pa.Table:
    """Labels with their users' sequences: the columns of the labels, `sequence` and `is_complete`.

    A label's time counts in whole milliseconds, as those of events and of answers do.

    Args:
        labels: `user_id`, `label_time` and others.
        statements: About the labels' users and their events' pins, all that were taken up to the newest label; with the
            columns of `STATEMENT`.
        definition: Of the sequence.
        horizon_ms: How far back the index reaches; None: as far as there is anything.
    """
    events = history(statements, EVENTS)
    pins = {family.name: history(statements, family) for family in families_read(definition)}
    events = _indexed(events, pins, indexed_read(definition))
    features = history(statements, FEATURES) if features_read(definition) else None
    now_ms = labels.column("label_time").cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy() // 1000
    users = labels.column("user_id")
    found = list(_sequences(events, pins, features, users, now_ms, definition, horizon_ms))
    sequence = pa.concat_arrays([pa.array([], list_type(definition)), *map(_lists, found)])
    is_complete = np.concatenate([np.empty(0, bool), *(part.is_complete for part in found)])
    return labels.append_column("sequence", sequence).append_column("is_complete", pa.array(is_complete))


def _indexed(events: History, pins: Mapping[str, History], names: Sequence[str]) -> History:
    """The same with columns of `indexed.KEPT`: what was known of each row's pin when the row began to stand."""
    if not names:
        return events
    wanted = [".".join(KEPT[name]) for name in names]
    rows = np.arange(events.rows.num_rows)
    found = _of_pins(pins, events.numbers("from_ms"), events.rows.column(OBJECT), rows, wanted)
    table = events.rows
    for name, column in zip(names, found, strict=True):
        table = table.append_column(name, column)
    return events._replace(rows=table)


def indexed_read(definition: Definition) -> tuple[str, ...]:
    """The fields of a definition that an event keeps of its pin."""
    return tuple(name for name in definition.fields if name in KEPT)


def features_read(definition: Definition) -> bool:
    """Whether a definition reads what was found out of events later."""
    return not FOUND_OUT.isdisjoint(definition.fields)


def _sequences(
    events: History,
    pins: Mapping[str, History],
    features: History | None,
    users: pa.ChunkedArray,
    now_ms: np.ndarray,
    definition: Definition,
    horizon_ms: int | None,
) -> Iterator[Sequences]:
    """The sequences of n users, each at its time; in parts, for what is looked at is more than what is answered."""
    starts, ends = events.spans(users)
    times, kinds = events.numbers("time_ms"), {field.name: field.type for field in events.rows.schema}
    columns = dict(zip(events.rows.column_names, events.rows.columns, strict=True))
    firsts = first_at(times, starts, ends, now_ms - definition.reach_ms(horizon_ms) + 1)
    lasts = first_at(times, starts, ends, now_ms + 1)
    for start, end in _parts(lasts - firsts):
        at_ms = now_ms[start:end]
        rows, of = spans(firsts[start:end], lasts[start:end])
        stands = np.flatnonzero(events.stands(rows, at_ms[of]))
        is_complete = np.full(len(at_ms), definition.is_inside(horizon_ms))
        within = Within(of[stands], (Part(columns, rows[stands]),), is_complete, kinds)
        of_pins = functools.partial(_of_pins, pins, at_ms)
        mine = users.slice(start, end - start)
        yield arranged(within, definition, of_pins, functools.partial(_of_features, features, mine, at_ms))


def _parts(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Labels in runs, first and end, with about `_PAIRS` events in each."""
    number = np.cumsum(counts) // _PAIRS
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return itertools.pairwise([*starts.tolist(), len(counts)])


def _of_pins(
    pins: Mapping[str, History],
    at_ms: np.ndarray,
    pin_ids: pa.ChunkedArray,
    of: np.ndarray,
    names: Sequence[str],
) -> list[pa.Array]:
    """What pins said at the times of the labels that n events are of, as `sequences.PinValues`.

    As in the view, there is no pin without its presence family, and without a pin nothing is known.
    """
    assert isinstance(PINS.read, Documents)
    rows = {family: _standing(held, pin_ids, at_ms[of]) for family, held in pins.items()}
    is_gone = rows[PINS.read.presence] < 0
    found = []
    for family, _, column in (name.partition(".") for name in names):
        at = pa.array(rows[family], mask=(rows[family] < 0) | is_gone)
        found.append(pins[family].rows.column(column).combine_chunks().take(at))
    return found


def _of_features(
    held: History | None, users: pa.ChunkedArray, at_ms: np.ndarray, ids: pa.ChunkedArray, of: np.ndarray
) -> pa.Array:
    """What was found out of n events at the times of the labels that they are of, as `sequences.FeatureValues`."""
    assert held is not None
    keys = pc.binary_join_element_wise(users.take(pa.array(of)), ids.cast(pa.string()), EVENT_KEY_JOINT)
    rows = _standing(held, keys, at_ms[of])
    return held.rows.column(FEATURES.schema.names[0]).combine_chunks().take(pa.array(rows, mask=rows < 0))


def _standing(held: History, keys: pa.ChunkedArray, at_ms: np.ndarray) -> np.ndarray:
    """For each key the row that stood at its time, int64[n]; -1: none did. Of documents, a key has one identity."""
    starts, ends = held.spans(keys)
    last = first_at(held.numbers("from_ms"), starts, ends, at_ms + 1) - 1
    found = np.where(last >= starts, last, -1)
    known = np.flatnonzero(found >= 0)
    found[known[~held.stands(found[known], at_ms[known])]] = -1
    return found


def _lists(found: Sequences) -> pa.ListArray:
    events = pa.StructArray.from_arrays(
        [column.combine_chunks() for column in found.table.columns], fields=list(found.table.schema)
    )
    offsets = np.concatenate([[0], np.cumsum(found.lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), events)


def list_type(definition: Definition) -> pa.DataType:
    """The type of a column of sequences."""
    kinds = {**EVENT_FIELDS, **ENRICHMENTS}
    return pa.list_(pa.struct([(name, kinds[name]) for name in definition.columns]))


def families_read(definition: Definition) -> tuple[Family, ...]:
    """The families of pins that a definition reads."""
    assert isinstance(PINS.read, Documents)
    names = (*definition.enrich, *([CATEGORY] if definition.categories else []))
    needed = {name.partition(".")[0] for name in names}
    needed |= {KEPT[name][0] for name in indexed_read(definition)}
    needed |= {PINS.read.presence} if needed else set()
    return tuple(family for family in PINS.families if family.name in needed)
