"""Freshness: how old what is told of documents was by each stage, from the first that knew it to being served.

Belongs here: what an epoch says of its records' times, in its marker, and what a replica makes of it by minute. Does
not belong here: which columns are times of stages (a stream declares them), and where minutes go (`jobs.minutes`).

A marker holds, of the documents of an epoch, when their first stage was, as counts by bucket of time: whoever serves
the epoch then knows each document's age. A document of several records counts once, as its oldest. No number is less
than the truth, and none more than a bucket's width above it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing import position as positions
from pipelines.indexing.files import replace_text
from pipelines.indexing.position import Position

if TYPE_CHECKING:
    from pipelines.indexing.delta import Marker

WIDTH_MS = 10
MOST_BUCKETS = 256
"""Of a histogram; times further apart share buckets that are twice, four times, … as wide."""
MINUTE_MS = 60_000

LIVE, BACKFILL = "live", "backfill"
SENT, COMMITTED, SERVED = "sent", "committed", "served"
"""The stages of every stream: the broker had the record, the epoch was in the delta, a replica answered with it."""

SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3_600.0)
"""Upper bounds of the buckets that are told to Prometheus; each also has one without a bound."""


class Stages(NamedTuple):
    """Where a stream's rows say when earlier stages knew what they tell.

    Attributes:
        key: The column that names a row's document.
        times: Each stage's name and its column of times, from the first on. One may be null in a row.
    """

    key: str
    times: tuple[tuple[str, str], ...]


class Histogram(NamedTuple):
    """How many documents each bucket has; bucket ``n`` stands for ``n * width_ms``."""

    width_ms: int
    counts: tuple[tuple[int, int], ...]

    @property
    def values(self) -> Iterable[tuple[int, int]]:
        """What each bucket stands for, in ms, and how many documents it has."""
        return ((bucket * self.width_ms, count) for bucket, count in self.counts)

    def to_json(self) -> list[int]:
        """The width, then of each bucket how far it is from the one before, and its count."""
        told, before = [self.width_ms], 0
        for bucket, count in self.counts:
            told += [bucket - before, count]
            before = bucket
        return told


class Ages(NamedTuple):
    """Of the documents of an epoch: when the first stage of each was, and how long after it the others were.

    Attributes:
        began: Since 1970, rounded down.
        later: Stage → from then to the stage, rounded up, of the documents that know it.
    """

    began: Histogram
    later: Mapping[str, Histogram]

    def to_json(self) -> dict[str, Any]:
        """Lists of integers; `read_ages` reads them."""
        return {"began": self.began.to_json(), "later": {n: h.to_json() for n, h in self.later.items()}}

    def by_stage(self, committed_at_ms: int | None, served_at_ms: int) -> dict[str, Counter[int]]:
        """Stage → ms after the first stage → documents. A clock that is behind another's gives 0."""
        found = {name: _counted(h.values) for name, h in self.later.items()}
        for stage, at_ms in ((COMMITTED, committed_at_ms), (SERVED, served_at_ms)):
            if at_ms is not None:
                found[stage] = _counted((at_ms - began, n) for began, n in self.began.values)
        return found


def histogram(values_us: np.ndarray, *, rounds_up: bool = False) -> Histogram:
    """Values in microseconds as a histogram of as narrow buckets as `MOST_BUCKETS` allows."""
    width_ms = WIDTH_MS
    while True:
        width_us = 1_000 * width_ms
        buckets, counts = np.unique(
            -(-values_us // width_us) if rounds_up else values_us // width_us, return_counts=True
        )
        if len(buckets) <= MOST_BUCKETS:
            return Histogram(width_ms, tuple(zip(buckets.tolist(), counts.tolist(), strict=True)))
        width_ms *= 2


def measured(
    rows: pa.Table, stages: Stages | None, backfill_topics: frozenset[str] = frozenset()
) -> dict[str, Ages] | None:
    """What the accepted rows of an epoch say of their documents' ages, live and backfill apart.

    Args:
        rows: With the columns of `stages`, and ``topic_id`` and ``broker_time``.
        stages: The stream's; None: nothing is told.
        backfill_topics: Whose rows were let wait.
    """
    if stages is None or not rows.num_rows:
        return None
    waits = np.array([positions.topic_name(t or "") in backfill_topics for t in _texts(rows, "topic_id")])
    parts = {LIVE: rows.filter(pa.array(~waits)), BACKFILL: rows.filter(pa.array(waits))}
    return {kind: _ages(part, stages) for kind, part in parts.items() if part.num_rows}


def _ages(rows: pa.Table, stages: Stages) -> Ages:
    times = {name: _microseconds(rows.column(column)) for name, column in stages.times}
    times[SENT] = _microseconds(rows.column("broker_time"))
    table = pa.table({"key": rows.column(stages.key), "began": pc.coalesce(*times.values()), **times})
    table = table.sort_by([("began", "ascending"), (SENT, "ascending")])
    _, oldest = np.unique(_codes(table.column("key")), return_index=True)
    table = table.take(pa.array(oldest))
    began = table.column("began").to_numpy()
    later = {}
    for name in list(times)[1:]:
        is_known = ~np.asarray(table.column(name).is_null())
        if is_known.any():
            passed = table.column(name).fill_null(0).to_numpy() - began
            later[name] = histogram(passed[is_known], rounds_up=True)
    return Ages(histogram(began), later)


def read_ages(told: Mapping[str, Any]) -> Ages:
    """Read `Ages.to_json`."""
    return Ages(_histogram(told["began"]), {name: _histogram(said) for name, said in told["later"].items()})


def _histogram(told: Sequence[int]) -> Histogram:
    buckets = np.cumsum(told[1::2]).tolist()
    return Histogram(told[0], tuple(zip(buckets, told[2::2], strict=True)))


def _microseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)


def _texts(rows: pa.Table, name: str) -> list[str | None]:
    return rows.column(name).to_pylist()


def _counted(values: Iterable[tuple[int, int]]) -> Counter[int]:
    found: Counter[int] = Counter()
    for value_ms, count in values:
        found[max(0, value_ms)] += count
    return found


def percentile(counts: Mapping[int, int], percent: int) -> int:
    """The least value that so many percent of the documents do not exceed (nearest rank)."""
    wanted = -(-percent * sum(counts.values()) // 100)
    passed = 0
    for value in sorted(counts):
        passed += counts[value]
        if passed >= wanted:
            return value
    raise ValueError("there is nothing to take a percentile of")


# ------------------------------------------------------------------------------------------------ minutes of serving


class Series(NamedTuple):
    """What is told apart in an index."""

    stream: str
    kind: str
    stage: str


class Total(NamedTuple):
    """All of a series since the replica began: documents by the buckets of `SECONDS`, and the sum of their ages."""

    counts: np.ndarray
    sum_ms: int


class Arrival(NamedTuple):
    """An epoch that a replica has read: its marker, and when it was committed, where its file still says so."""

    marker: Marker
    committed_at_ms: int | None


class Meter:
    """How fresh a replica serves an index, by minute. One thread feeds it; any may ask for totals.

    An epoch counts when it becomes served: where what was served before did not reach it. That position is kept with
    the minutes, so that what was committed while a replica was away counts when it is back. A replica that never was
    there before counts from its start.
    """

    def __init__(self, index: str, replica: str, folder: Path | None) -> None:
        """``folder``: where finished minutes are written; None: nowhere."""
        self._index, self._replica, self._folder = index, replica, folder
        self._reached_file = folder / f"{index}.{replica}.reached" if folder else None
        known = _stored(self._reached_file)
        self._began_ms = 0 if known is not None else _now_ms()
        self._reached = known or positions.EMPTY
        self._minute = _now_ms() // MINUTE_MS
        self._counts: dict[Series, Counter[int]] = {}
        self._totals: dict[Series, Total] = {}
        self._last: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def is_news(self, arrival: Arrival) -> bool:
        """Whether an epoch says something of documents that was not served yet."""
        marker = arrival.marker
        at_ms = arrival.committed_at_ms or marker.transformed_at_ms or 0
        return marker.ages is not None and at_ms >= self._began_ms and not self._reached.covers(marker.end)

    def served(self, arrivals: Iterable[Arrival], reached: Position) -> None:
        """From now on these epochs are served, and with them all up to this position."""
        now_ms = _now_ms()
        self.turn(now_ms)
        with self._lock:
            for arrival in arrivals:
                if self.is_news(arrival):
                    self._count(arrival, now_ms)
        self._reached = self._reached.merge(reached)

    def _count(self, arrival: Arrival, now_ms: int) -> None:
        for kind, ages in (arrival.marker.ages or {}).items():
            for stage, counts in ages.by_stage(arrival.committed_at_ms, now_ms).items():
                series = Series(arrival.marker.stream, kind, stage)
                self._counts.setdefault(series, Counter()).update(counts)
                self._totals[series] = _added(self._totals.get(series), counts)

    def turn(self, now_ms: int | None = None) -> None:
        """Write the minute that was, if it is over."""
        minute = (_now_ms() if now_ms is None else now_ms) // MINUTE_MS
        if minute > self._minute:
            self.close()
            self._minute = minute

    def close(self) -> None:
        """Write what the running minute has so far, and begin it anew."""
        rows = [self._row(series, counts) for series, counts in self._counts.items()]
        with self._lock:
            self._last, self._counts = rows, {}
        if self._folder is None or self._reached_file is None:
            return
        if rows:
            name = f"{self._index}.{self._replica}.{self._minute}.{_now_ms()}.json"
            replace_text(self._folder / name, json.dumps(rows))
        if self._reached != positions.EMPTY and self._reached != _stored(self._reached_file):
            replace_text(self._reached_file, self._reached.to_text())

    def totals(self) -> dict[Series, Total]:
        """Everything since the start."""
        with self._lock:
            return dict(self._totals)

    def last_minute(self) -> list[dict[str, Any]]:
        """The rows of the minute that was finished last."""
        return self._last

    def _row(self, series: Series, counts: Counter[int]) -> dict[str, Any]:
        """A series' minute as a row of `ops.freshness`."""
        minute = datetime.fromtimestamp(self._minute * MINUTE_MS / 1_000, UTC)
        named = {"index": self._index, **series._asdict(), "minute": minute.isoformat()}
        shares = {f"p{share}_ms": percentile(counts, share) for share in (50, 90, 99)}
        return {
            **named,
            "replica": self._replica,
            "documents": sum(counts.values()),
            **shares,
            "max_ms": max(counts),
        }


def _added(total: Total | None, counts: Counter[int]) -> Total:
    held = total or Total(np.zeros(len(SECONDS) + 1, np.int64), 0)
    values = np.fromiter(counts.keys(), np.int64, len(counts))
    documents = np.fromiter(counts.values(), np.int64, len(counts))
    places = np.searchsorted(np.array(SECONDS) * 1_000, values, side="left")
    more = np.bincount(places, weights=documents, minlength=len(SECONDS) + 1).astype(np.int64)
    return Total(held.counts + more, held.sum_ms + int(values @ documents))


def _stored(file: Path | None) -> Position | None:
    try:
        return positions.from_text(file.read_text(encoding="utf-8")) if file else None
    except FileNotFoundError:
        return None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
