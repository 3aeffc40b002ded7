"""How fresh documents are: of an epoch's records, through its marker, by minute of serving."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines import freshness as minutes
from pipelines.indexing import delta, freshness
from pipelines.indexing.freshness import BACKFILL, LIVE, Arrival, Meter, Series, Stages, measured
from pipelines.indexing.position import EMPTY, Position

STAGES = Stages("id", (("event", "event_time"), ("updated", "committed_at")))
AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")


def rows(*given: tuple[str, str, float | None, float | None, float]) -> pa.Table:
    """Rows by topic, document, and how many ms after AT each stage had them."""
    columns = list(zip(*given, strict=True))

    def times(values: Sequence[float | None]) -> pa.Array:
        return pa.array([None if v is None else AT + timedelta(milliseconds=v) for v in values], TIME)

    return pa.table(
        {
            "topic_id": pa.array([f"{topic}@one" for topic in columns[0]]),
            "id": pa.array(columns[1]),
            "event_time": times(columns[2]),
            "committed_at": times(columns[3]),
            "broker_time": times(columns[4]),
        }
    )


def marker(ages: dict[str, freshness.Ages] | None, epoch: int = 0, end: int = 1) -> delta.Marker:
    start, stop = Position({"t@one": {0: end - 1}}), Position({"t@one": {0: end}})
    return delta.Marker("s", 1, epoch, start, stop, transformed_at_ms=now_ms(), ages=ages)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def test_a_document_of_several_records_counts_once_as_its_oldest() -> None:
    found = measured(rows(("t", "a", 50, 60, 70), ("t", "a", 10, 20, 80), ("t", "b", 30, 35, 40)), STAGES)
    assert found is not None and list(found) == [LIVE]
    by_stage = found[LIVE].by_stage(None, round(AT.timestamp() * 1000) + 100)
    assert by_stage["served"] == {90: 1, 70: 1}
    assert by_stage["updated"] == {10: 2}
    assert by_stage["sent"] == {70: 1, 10: 1}
    assert "committed" not in by_stage, "nobody knows any more when it was"


def test_backfill_is_apart_and_a_row_that_knows_no_event_begins_at_its_first_stage() -> None:
    found = measured(
        rows(("t", "a", 0, 10, 20), ("late", "a", None, 500, 900), ("late", "b", None, None, 950)),
        STAGES,
        frozenset({"late"}),
    )
    assert found is not None
    at_ms = round(AT.timestamp() * 1000)
    assert found[LIVE].by_stage(at_ms + 30, at_ms + 40)["committed"] == {30: 1}
    waited = found[BACKFILL].by_stage(at_ms + 1000, at_ms + 1100)
    assert waited["committed"] == {500: 1, 50: 1} and waited["served"] == {600: 1, 150: 1}
    assert waited["sent"] == {400: 1, 0: 1} and waited["updated"] == {0: 1}


def test_a_clock_that_is_behind_gives_no_negative_age() -> None:
    found = measured(rows(("t", "a", 100, 40, 60)), STAGES)
    assert found is not None
    by_stage = found[LIVE].by_stage(None, round(AT.timestamp() * 1000))
    assert by_stage == {"served": {0: 1}, "updated": {0: 1}, "sent": {0: 1}}


def test_a_marker_keeps_ages_and_without_them_is_as_it_was() -> None:
    ages = measured(rows(("t", "a", 10, 20, 30), ("late", "b", 10, 25, 31)), STAGES, frozenset({"late"}))
    text = marker(ages).to_text()
    assert delta.read_marker(text, with_ages=True).ages == ages
    assert delta.read_marker(text).ages is None
    assert "ages" not in marker(None).to_text()
    assert measured(rows(("t", "a", 10, 20, 30)), None) is None


def test_times_of_days_stay_small_and_no_age_is_less_than_the_truth() -> None:
    chance = np.random.default_rng(3)
    began_us = chance.integers(0, 2 * 86_400_000_000, 50_000)
    found = freshness.histogram(began_us)
    assert len(found.counts) <= freshness.MOST_BUCKETS and sum(n for _, n in found.counts) == 50_000
    assert len(json.dumps(found.to_json())) < 4_000
    told = np.repeat(*np.array(list(found.values)).T) * 1_000
    assert (np.sort(began_us) >= told).all() and (np.sort(began_us) - told < found.width_ms * 1_000).all()


def test_a_minute_is_written_once_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = Clock(monkeypatch)
    meter = Meter("i", "r", tmp_path)
    ages = measured(rows(("t", "a", 0, 10, 20), ("t", "b", 500, 510, 520)), STAGES)
    at.ms = round(AT.timestamp() * 1000) + 1_000
    meter.served([Arrival(marker(ages), at.ms - 100)], Position({"t@one": {0: 1}}))
    meter.turn()
    assert not list(tmp_path.glob("*.json")) and not meter.last_minute()
    at.ms += 60_000
    meter.turn()
    (file,) = tmp_path.glob("*.json")
    told = {row["stage"]: row for row in json.loads(file.read_text())}
    assert set(told) == {"updated", "sent", "committed", "served"}
    assert told["served"] == {
        "index": "i",
        "stream": "s",
        "kind": "live",
        "stage": "served",
        "minute": AT.isoformat(),
        "replica": "r",
        "documents": 2,
        "p50_ms": 500,
        "p90_ms": 1_000,
        "p99_ms": 1_000,
        "max_ms": 1_000,
    }
    assert meter.last_minute() == list(told.values())
    total = meter.totals()[Series("s", "live", "served")]
    assert total.sum_ms == 1_500 and total.counts.tolist() == [0, 0, 1, 1] + [0] * 12


def test_what_was_served_before_is_no_news_and_what_came_while_away_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Clock(monkeypatch)
    ages = measured(rows(("t", "a", 0, 10, 20)), STAGES)
    meter = Meter("i", "r", tmp_path)
    assert not meter.is_news(Arrival(marker(ages), at.ms - 1)), "it was there before the replica ever was"
    assert not meter.is_news(Arrival(marker(None), at.ms + 1)), "nothing is said of its documents"
    assert meter.is_news(Arrival(marker(ages, 1, 2), at.ms + 1))
    meter.served([], Position({"t@one": {0: 2}}))
    assert not meter.is_news(Arrival(marker(ages, 1, 2), at.ms + 1))
    meter.close()
    at.ms += 3_600_000
    again = Meter("i", "r", tmp_path)
    assert not again.is_news(Arrival(marker(ages, 1, 2), None))
    away = Arrival(marker(ages, 2, 3), None)
    again.served([away, away], Position({"t@one": {0: 3}}))
    again.served([away], EMPTY)
    again.close()
    (file,) = tmp_path.glob("*.json")
    served = next(row for row in json.loads(file.read_text()) if row["stage"] == "served")
    assert served["max_ms"] >= 3_600_000


class Clock:
    """The time as freshness knows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms: int = round(AT.timestamp() * 1000)
        monkeypatch.setattr(freshness, "_now_ms", self._read)

    def _read(self) -> Any:
        return self.ms


def row(stream: str, stage: str, minute: int, p90_ms: int, max_ms: int, **said: Any) -> dict[str, Any]:
    """A row of `ops.freshness`."""
    told = {
        "index": "i",
        "stream": stream,
        "kind": "live",
        "stage": stage,
        "minute": AT + timedelta(minutes=minute),
        "replica": "r",
        "documents": 5,
        "p50_ms": p90_ms // 2,
        "p90_ms": p90_ms,
        "p99_ms": max_ms,
        "max_ms": max_ms,
    }
    return told | said


def test_a_period_is_told_by_stream_with_the_worst_replica_and_the_maximum_so_far() -> None:
    rows = [
        row("control", "served", 3, 70_000, 80_000),
        row("control", "served", 0, 2_000, 3_000),
        row("control", "sent", 0, 300, 400),
        row("control", "served", 0, 1_000, 90_000, replica="other", documents=4),
        row("control", "served", 1, 60_000, 60_001),
        row("content", "served", 0, 10, 20),
        row("content", "served", 0, 10**6, 10**6, kind="backfill"),
    ]
    streams = minutes.by_stream(rows)
    assert list(streams) == ["content", "control"]
    control = streams["control"]
    assert [minute.minute.minute for minute in control] == [0, 1, 3]
    assert [minute.running_max_ms for minute in control] == [90_000] * 3
    assert control[0].documents == 5
    assert control[0].stages == {
        "sent": minutes.Ages(150, 300, 400, 400),
        "served": minutes.Ages(1_000, 2_000, 90_000, 90_000),
    }
    assert minutes.within_pct(control) == 66.667, "a minute of exactly 60 s keeps it"
    assert minutes.within_pct(streams["content"]) == 100.0
    assert minutes.within_pct([]) is None
    assert minutes.by_stream(rows, "backfill")["content"][0].running_max_ms == 10**6
