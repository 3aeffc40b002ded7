"""A minute's percentiles, merged of its epochs' markers, beside the sorted ages of its documents."""

from __future__ import annotations

import json
import math
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.indexing import delta, freshness
from pipelines.indexing.freshness import Arrival, Meter, Stages, measured
from pipelines.indexing.position import Position

MINUTE = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
MINUTE_US = round(MINUTE.timestamp()) * 1_000_000
STAGES = Stages("id", (("event", "event_time"),))
BOUND_MS = 10

waited = st.integers(0, 2_400_000)  # µs: within 240 buckets of 10 ms
records = st.tuples(st.sampled_from("abcdefgh"), waited, st.integers(0, 900_000), st.booleans())
epochs = st.lists(st.lists(records, min_size=1, max_size=30), min_size=1, max_size=6)


@settings(deadline=None)
@given(epochs)
def test_minutes_are_what_the_sorted_ages_say(given_epochs: list[list[tuple[str, int, int, bool]]]) -> None:
    wanted: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, patch.object(freshness, "_now_ms") as clock:
        clock.return_value = MINUTE_US // 1_000
        meter = Meter("i", "r", Path(folder))
        for number, told in enumerate(given_epochs):
            served_us = MINUTE_US + 5_000_000 * (number + 1)
            clock.return_value = served_us // 1_000
            ages = measured(table(told, served_us), STAGES, frozenset({"late"}))
            text = delta.Marker("s", 1, number, place(number), place(number + 1), ages=ages).to_text()
            marker = delta.read_marker(text, with_ages=True)
            meter.served([Arrival(marker, served_us // 1_000 - 7)], place(number + 1))
            for key, value in naive(told, served_us).items():
                wanted.setdefault(key, []).extend(value)
        meter.close()
        rows = [row for file in Path(folder).glob("*.json") for row in json.loads(file.read_text())]
    assert {(row["kind"], row["stage"]) for row in rows} == set(wanted)
    for row in rows:
        ages_ms = sorted(wanted[row["kind"], row["stage"]])
        assert row["documents"] == len(ages_ms)
        for name, share in (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99), ("max_ms", 1.0)):
            truth = ages_ms[math.ceil(share * len(ages_ms)) - 1]
            assert 0 <= row[name] - truth <= BOUND_MS, (row, name, truth)


def place(offset: int) -> Position:
    return Position({"t@one": {0: offset}})


def table(told: list[tuple[str, int, int, bool]], served_us: int) -> pa.Table:
    """Records that waited so long for being served, and were sent so long after they happened."""
    began = [
        datetime.fromtimestamp(0, UTC) + timedelta(microseconds=served_us - age) for _, age, _, _ in told
    ]
    sent = [at + timedelta(microseconds=one[2]) for at, one in zip(began, told, strict=True)]
    kind = pa.timestamp("us", tz="UTC")
    return pa.table(
        {
            "topic_id": ["late@one" if is_late else "t@one" for *_, is_late in told],
            "id": [key for key, *_ in told],
            "event_time": pa.array(began, kind),
            "broker_time": pa.array(sent, kind),
        }
    )


def naive(told: list[tuple[str, int, int, bool]], served_us: int) -> dict[tuple[str, str], list[float]]:
    """Each document's ages in ms, by kind and stage: of its record that waited longest."""
    oldest: dict[tuple[bool, str], tuple[int, int]] = {}
    for key, age, until_sent, is_late in told:
        held = oldest.setdefault((is_late, key), (age, until_sent))
        oldest[is_late, key] = min(held, (age, until_sent), key=lambda one: (-one[0], one[1]))
    found: dict[tuple[str, str], list[float]] = {}
    for (is_late, _), (age, until_sent) in oldest.items():
        kind = "backfill" if is_late else "live"
        committed_us = served_us // 1_000 * 1_000 - 7_000
        found.setdefault((kind, "served"), []).append(age / 1_000)
        found.setdefault((kind, "committed"), []).append(max(0, committed_us - (served_us - age)) / 1_000)
        found.setdefault((kind, "sent"), []).append(until_sent / 1_000)
    return found
