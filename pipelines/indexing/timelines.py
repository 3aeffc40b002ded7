"""Timelines: base and overlay read as one, by key, newest first.

Belongs here: the view, and how events of base and overlay are brought together. Runs and folding are ``rows``'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.indexing import facts as fact
from pipelines.indexing.base import RowsShard
from pipelines.indexing.facts import Hashes, hash_keys
from pipelines.indexing.packing import taken
from pipelines.indexing.rows import NO_FOLD, NO_ROWS, RowsView, spans
from pipelines.indexing.spec import Timeline


class TimelineAnswer(NamedTuple):
    """A key's events, newest first.

    ``table`` has the columns id, time_ms and the payload's of the first family; further families are struct columns
    named like the family. Where ``is_complete`` is False a declared count cut events off that were asked for, or may
    have; those that are there are exact. ``cut_ms``, where no limit was given: what it cut off of this key is no newer
    than that; None: nothing was.
    """

    table: pa.Table
    is_complete: bool
    cut_ms: int | None


class Part(NamedTuple):
    """Rows of the events that one shard or run holds, by column."""

    events: Mapping[str, pa.Array]
    rows: np.ndarray


class Within(NamedTuple):
    """Events of several keys, n of them. What they say is read where it is asked for.

    Attributes:
        of: Which of the keys that were asked for each event is of, int64[n].
        parts: Where the events are, one part after the other.
        is_complete: Of each key, whether these are all of its events that were asked for. They may not be where the
            range begins before the horizon, or not after all that a declared count cut off.
        kinds: The columns that can be read, and their types.
    """

    of: np.ndarray
    parts: tuple[Part, ...]
    is_complete: np.ndarray
    kinds: Mapping[str, pa.DataType]

    def read(self, columns: Sequence[str], rows: np.ndarray | None = None) -> pa.Table:
        """Columns of all events; or of those whose numbers, from 0 to n - 1, are in ``rows``, in that order."""
        kinds = {name: self.kinds[name] for name in columns}
        parts = [pa.schema(list(kinds.items())).empty_table()]
        if rows is None:
            parts += [_picked(part.events, part.rows, kinds) for part in self.parts]
            return pa.concat_tables(parts)
        ends = np.cumsum([len(part.rows) for part in self.parts])
        held_by = np.searchsorted(ends, rows, side="right")
        found = []
        for number, (part, end) in enumerate(zip(self.parts, ends.tolist(), strict=True)):
            wanted = np.flatnonzero(held_by == number)
            if len(wanted):
                parts.append(_picked(part.events, part.rows[rows[wanted] - end], kinds))  # from its end back
                found.append(wanted)
        table = pa.concat_tables(parts).combine_chunks()
        return table if len(found) < 2 else table.take(pa.array(np.argsort(np.concatenate(found))))


class TimelineView(RowsView):
    """Timelines by key."""

    def timeline(
        self,
        key: bytes,
        limit: int | None = None,
        before: tuple[int, bytes] | None = None,
        columns: Sequence[str] | None = None,
    ) -> TimelineAnswer:
        """The newest ``limit`` events of a key (all, if None), inside the horizon.

        ``before``: only events that come after this (time_ms, id) in the answer's order, for paging. A declared
        count limits the whole timeline, pages included. ``columns``: only these of the table's; None: all.
        """
        read = self.spec.read
        assert isinstance(read, Timeline)
        family = self.spec.families[0].name
        hashed = hash_keys([key])
        standing = (
            [(run, rows[run.family[rows] == 0]) for run, rows, _ in self._newest(hashed)] if self.runs else []
        )
        hidden = np.concatenate([run.origins.base_row[rows] for run, rows in standing] or [NO_ROWS])
        hidden = hidden[hidden >= 0]
        bounds = [n for n in (read.count, limit if before is None else None) if n is not None]
        most = min(bounds, default=None)
        kinds = self._kinds(columns)
        older, recent, floor = [], [], None
        for shard, _, ordinals in self.base.place([key]):
            ordinal = ordinals[0]
            start, end = int(shard.starts[family][ordinal]), int(shard.ends[family][ordinal])
            if most is not None:
                start = max(start, end - most - len(hidden))
            rows = np.arange(start, end)
            rows = rows[~np.isin(rows, hidden)] if len(hidden) else rows
            older.append(_picked(shard.events(family), rows[::-1], kinds))
        for shard, _ in self.base.split(hashed):
            floor = _floor(shard, hashed)
        horizon = self.base.horizon_from_ms
        for run, rows in standing:
            rows = rows[~run.is_deleted[rows]]
            if horizon is not None:
                rows = rows[run.times[rows] >= horizon]
            if len(rows):
                recent.append(_picked(run.events, rows, kinds))
        events = _newest_first(older, recent, kinds)
        if floor is not None:
            events = _up_to(events, floor)
        cut_ms = None if floor is None else floor[0]
        if read.count is not None and events.num_rows > read.count:
            cut_ms = events.column("time_ms")[read.count].as_py()  # at or above the floor
            events = events.slice(0, read.count)
        if before is not None:
            events = _after(events, before)
        is_complete = cut_ms is None or (limit is not None and events.num_rows >= limit)
        events = events.slice(0, limit)
        for joined in self.spec.families[1:]:
            if columns is None or joined.name in columns:
                said = self.joined(
                    joined.name, [key], np.zeros(events.num_rows, np.int64), events.column("id")
                )
                events = events.append_column(joined.name, said)
        return TimelineAnswer(
            events if columns is None else events.select(list(columns)), is_complete, cut_ms
        )

    def added(self, key: bytes, since: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """What a timeline has gained since its ``last_fold`` was ``since``: the new events, newest first.

        None where it is not only longer: something was edited or deleted, the index declares a count, the columns are
        of further families too, or the overlay was begun anew. ``timeline`` tells then.
        """
        read = self.spec.read
        assert isinstance(read, Timeline)
        families = {family.name for family in self.spec.families[1:]}
        if read.count is not None or (families if columns is None else families.intersection(columns)):
            return None
        kinds, hashed, horizon = self._kinds(columns), hash_keys([key]), self.base.horizon_from_ms
        is_continued = since == NO_FOLD
        parts = []
        for run in self.runs:
            rows = run.rows_of(hashed)[0]
            folds = run.origins.fold[rows]
            is_continued |= bool((folds == since).any())
            rows = rows[(folds > since) & (run.family[rows] == 0)]
            if not len(rows):
                continue
            if run.is_deleted[rows].any() or not run.origins.is_addition[rows].all():
                return None
            if horizon is not None:
                rows = rows[run.times[rows] >= horizon]
            parts.append(_picked(run.events, rows, kinds))
        if not is_continued:
            return None
        events = _newest_first([], parts, kinds)
        return events if columns is None else events.select(list(columns))

    def within(self, keys: Sequence[bytes], from_ms: int, to_ms: int, most: int | None = None) -> Within:
        """The events of several keys in a time range, ``from_ms`` included, ``to_ms`` not, in no order.

        For who counts or filters: it reads all keys at once, and of the base no more than the range. ``most``: of each
        key no more than so many of the newest are needed; what is older may be left out.
        """
        family, horizon = self.spec.families[0].name, self.base.horizon_from_ms
        is_inside = horizon is None or horizon <= from_ms
        if self._is_cut:
            return self._within_cut(keys, from_ms, to_ms, is_inside)
        from_ms = from_ms if horizon is None else max(from_ms, horizon)
        found, hidden = [], [(NO_ROWS, NO_ROWS)]
        for run, rows, of in self._newest(hash_keys(keys)):
            is_event, replaced = run.family[rows] == 0, run.origins.base_row[rows]
            hidden.append((replaced[is_event], of[is_event]))
            stands = (
                is_event & ~run.is_deleted[rows] & (run.times[rows] >= from_ms) & (run.times[rows] < to_ms)
            )
            found.append((Part(run.events, rows[stands]), of[stands]))
        hidden_rows, hidden_of = map(np.concatenate, zip(*hidden, strict=True))
        for shard, queries, ordinals in self.base.place(keys):
            events = shard.events(family)
            times = events["time_ms"].to_numpy()
            starts, ends = shard.starts[family][ordinals], shard.ends[family][ordinals]
            first, last = first_at(times, starts, ends, from_ms), first_at(times, starts, ends, to_ms)
            if most is not None:
                first = np.maximum(first, last - most - len(hidden_rows))
            rows, span = spans(first, last)
            if len(hidden_rows):
                stands = ~np.isin(rows, hidden_rows[np.isin(hidden_of, queries)])
                rows, span = rows[stands], span[stands]
            found.append((Part(events, rows), queries[span]))
        return Within(
            np.concatenate([NO_ROWS, *(of for _, of in found)]),
            tuple(part for part, _ in found),
            np.full(len(keys), is_inside),
            self._kinds(None),
        )

    def rows_of(self, keys: Sequence[bytes]) -> int:
        """How many rows base and overlay hold of some keys' events, of all times: what it may cost to read them.

        An event that was said again after the base counts again.
        """
        family = self.spec.families[0].name
        of_base = sum(
            int((shard.ends[family][ordinals] - shard.starts[family][ordinals]).sum())
            for shard, _, ordinals in self.base.place(keys)
        )
        hashed = hash_keys(keys)
        return of_base + sum(len(run.rows_of(hashed)[0]) for run in self.runs)

    @property
    def _is_cut(self) -> bool:
        """Whether some timelines end before their oldest event."""
        read = self.spec.read
        assert isinstance(read, Timeline)
        return read.count is not None or any(len(shard.floor_times) for shard in self.base.shards)

    def _within_cut(self, keys: Sequence[bytes], from_ms: int, to_ms: int, is_inside: bool) -> Within:
        """`within`, key by key: what was cut off of a timeline depends on all that it has."""
        kinds = self._kinds(None)
        parts, of, is_complete = [], [NO_ROWS], []
        for place, key in enumerate(keys):
            answer = self.timeline(key, columns=list(kinds))
            times = answer.table.column("time_ms").to_numpy()
            rows = np.flatnonzero((times >= from_ms) & (times < to_ms))
            parts.append(Part(dict(zip(kinds, answer.table.columns, strict=True)), rows))
            of.append(np.full(len(rows), place))
            is_complete.append(is_inside and (answer.cut_ms is None or answer.cut_ms < from_ms))
        return Within(np.concatenate(of), tuple(parts), np.array(is_complete, bool), kinds)

    def _kinds(self, columns: Sequence[str] | None) -> dict[str, pa.DataType]:
        """The columns to read and their types; the order of events is always among them."""
        kinds = {field.name: field.type for field in self.spec.families[0].schema}
        wanted = kinds if columns is None else {name: kinds[name] for name in columns if name in kinds}
        return {"id": pa.binary(), "time_ms": pa.int64(), **wanted}

    def joined(
        self, family: str, keys: Sequence[bytes], of: np.ndarray, ids: pa.Array | pa.ChunkedArray
    ) -> pa.Array:
        """What another family says of n events, a struct each; null where it says nothing.

        Args:
            family: Which.
            keys: Of the timelines.
            of: Which of the keys each event is of, int64[n].
            ids: Of the events, n.
        """
        kind = pa.struct(list(self.spec.family(family).schema))
        values: list[dict[str, Any] | None] = [None] * len(ids)
        named = zip(of.tolist(), ids.to_pylist(), strict=True)
        parts = ([family.encode(), keys[place], event] for place, event in named)
        identities = hash_keys(map(fact.identity_bytes, parts))
        for shard, queries, at in self.base.locate(identities, hash_keys(keys).take(of)):
            rows = shard.identities.row[at]
            live = rows >= 0
            for query, payload in zip(
                queries[live].tolist(), shard.payloads(family, rows[live]), strict=True
            ):
                values[query] = payload
        horizon = self.base.horizon_from_ms
        for run in self.runs:
            at = run.find(identities)
            for query in np.flatnonzero(at >= 0).tolist():
                row = int(at[query])
                is_gone = run.is_deleted[row] or (horizon is not None and run.times[row] < horizon)
                values[query] = None if is_gone else run.value(family, row)
        return pa.array(values, kind)


def first_at(
    times: np.ndarray, starts: np.ndarray, ends: np.ndarray, time_ms: int | np.ndarray
) -> np.ndarray:
    """Of each span of rows, in which times ascend, the first row at or after a time; its end, if there is none.

    ``time_ms`` is one for all spans, or each has its own.
    """
    if not len(times):
        return starts.copy()
    first, last = times[np.minimum(starts, len(times) - 1)], times[ends - 1]
    # Most spans lie wholly on one side.
    low, high = np.where(last < time_ms, ends, starts), np.where(first >= time_ms, starts, ends)
    while (is_open := low < high).any():
        middle = (low + high) // 2
        is_before = is_open & (times[np.minimum(middle, len(times) - 1)] < time_ms)
        low, high = np.where(is_before, middle + 1, low), np.where(is_open & ~is_before, middle, high)
    return low


def _picked(columns: Mapping[str, pa.Array], rows: np.ndarray, kinds: dict[str, pa.DataType]) -> pa.Table:
    """Rows of some columns; base files are packed and have 64-bit offsets, answers are not and do not."""
    return pa.table({name: taken(columns[name], rows, kind) for name, kind in kinds.items()})


def _newest_first(older: list[pa.Table], recent: list[pa.Table], kinds: dict[str, pa.DataType]) -> pa.Table:
    """One table by (time, id) descending. ``older`` are the base's, which are in order; ``recent`` the overlay's."""
    if not recent:
        return older[0] if older else pa.schema(list(kinds.items())).empty_table()
    newest = _ordered(pa.concat_tables(recent))
    if not older or not older[0].num_rows:
        return newest
    both = pa.concat_tables([newest, *older]).combine_chunks()
    is_after = newest.column("time_ms")[-1].as_py() > older[0].column("time_ms")[0].as_py()
    return both if is_after else _ordered(both)


def _ordered(events: pa.Table) -> pa.Table:
    return (
        events.sort_by([("time_ms", "descending"), ("id", "descending")]) if events.num_rows > 1 else events
    )


def _floor(shard: RowsShard, hashed: Hashes) -> tuple[int, bytes] | None:
    at = fact.find(shard.floor_keys, hashed)[0]
    return (int(shard.floor_times[at]), shard.floor_ids[at].as_py()) if at >= 0 else None


def _up_to(events: pa.Table, floor: tuple[int, bytes]) -> pa.Table:
    """Events newest first, cut where they fall below the floor."""
    cut, ids = _of_time(events, floor[0])
    return events.slice(0, cut + sum(i >= floor[1] for i in ids))


def _after(events: pa.Table, before: tuple[int, bytes]) -> pa.Table:
    """Events newest first, from the first that comes after (time, id) on."""
    cut, ids = _of_time(events, before[0])
    return events.slice(cut + sum(i >= before[1] for i in ids))


def _of_time(events: pa.Table, time_ms: int) -> tuple[int, list[bytes]]:
    """Where the events of a time begin among events newest first, and their ids."""
    times = events.column("time_ms").to_numpy()
    first = int(np.searchsorted(-times, -time_ms, side="left"))
    last = int(np.searchsorted(-times, -time_ms, side="right"))
    return first, events.column("id").slice(first, last - first).to_pylist()
