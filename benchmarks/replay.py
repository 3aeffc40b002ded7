"""A day of events again: `tidemark replay day DAY --apply` on a curated table whose day was damaged.

Two homes are given the same load. In one of them the day's rows are damaged (some are gone, some say something else)
and the bases are built of that, so that answers are wrong; then the day is replayed, which is timed from the command's
start to its end, and the bases are built of the curated table as it is by then. In the other everything is built from
nothing. Then every timeline and every counter of the two is compared.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines import lake
from pipelines.backfill import Days
from pipelines.contracts import ACTIONS
from pipelines.indexing.base import open_base
from pipelines.indexing.sums import SumsView
from pipelines.indexing.timelines import TimelineView
from pipelines.indexing.versions import Versions
from pipelines.indexing.view import view
from pipelines.indices import INDICES
from pipelines.settings import Settings

DAY = datetime.date(2024, 3, 2)
DAY_MS = 86_400_000
FED = ("user_events", "pin_counts")
WRONG = {"action": "'hide'", "pin_id": "'1'"}


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        events=(1_000_000, "events of the day; a twentieth as many are of the days beside it"),
        seed=(1, "of the events"),
    )
    machine = harness.machine()
    with harness.place("replay") as mended, harness.place("replay-from-nothing") as anew:
        table = events(options.events, options.seed)
        for settings in (mended, anew):
            say(f"loading {table.num_rows} rows (not timed)")
            load(settings, table)
        build(mended)
        spoil(mended)
        build(mended, "--after-curated")
        say("from nothing, in another home")
        build(anew)
        spoilt, _ = compare(mended, anew, table)
        if not spoilt:
            raise BenchmarkError(
                "the damage changed no answer", remedy="this benchmark would measure nothing"
            )
        say(f"{spoilt} answers are wrong; replaying {DAY}")
        began = time.perf_counter()
        report = harness.tidemark(mended, "replay", "day", str(DAY), "--apply")
        seconds = time.perf_counter() - began
        (changed,) = (one for one in report["tables"] if one["table"] == "curated.user_interactions")
        build(mended, "--after-curated")
        mismatches, answers = compare(mended, anew, table)
    result = {
        "benchmark": "replay",
        "events_per_s": round(options.events / seconds),
        "mismatches": mismatches,
        "answers": answers,
        "mismatches_before": spoilt,
        "events": options.events,
        "seconds": round(seconds, 1),
        "rows": changed["rows"],
        "added": changed["added"],
        "removed": changed["removed"],
        "changed": changed["changed"],
        "beside": [],
    }
    harness.publish(result | machine)
    return 0


def events(count: int, seed: int) -> pa.Table:
    """Events of a day and of those beside it, users and pins skewed; some are edited, repeated or deleted."""
    chosen = np.random.default_rng(seed)
    beside = count // 20
    number = np.arange(count + beside)
    users = np.minimum(chosen.zipf(1.3, len(number)), 20_000)
    pins = np.minimum(chosen.zipf(1.2, len(number)), 5_000)
    start_ms = int(datetime.datetime.combine(DAY, datetime.time(), datetime.UTC).timestamp()) * 1000
    time_ms = start_ms + chosen.integers(0, DAY_MS, len(number))
    time_ms[count:] += chosen.choice([-DAY_MS, DAY_MS], beside)
    table = _rows(number, users, pins, time_ms, chosen.integers(0, len(ACTIONS), len(number)))
    edited = chosen.choice(count, count // 50, replace=False)
    moved = _rows(
        edited, users[edited], pins[edited], time_ms[edited] + DAY_MS // 7, np.zeros(len(edited), int)
    )
    moved = moved.set_column(
        moved.schema.get_field_index("version"), "version", pa.array(np.full(len(edited), 2))
    )
    deleted = chosen.choice(count, count // 100, replace=False)
    gone = _rows(deleted, users[deleted], pins[deleted], time_ms[deleted], np.zeros(len(deleted), int))
    gone = gone.set_column(gone.schema.get_field_index("op"), "op", pa.array(["delete"] * len(deleted)))
    gone = gone.set_column(
        gone.schema.get_field_index("version"), "version", pa.array(np.full(len(deleted), 3))
    )
    whole = pa.concat_tables([table, moved, gone, table.slice(0, count // 100)])
    return whole.take(chosen.permutation(whole.num_rows))


def _rows(
    number: np.ndarray, users: np.ndarray, pins: np.ndarray, time_ms: np.ndarray, actions: np.ndarray
) -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array(users).cast(pa.string()),
            "event_id": pa.array(number).cast(pa.string()),
            "pin_id": pa.array(pins).cast(pa.string()),
            "action": pa.array(np.array(ACTIONS)[actions]),
            "event_time": pa.array(time_ms),
            "version": pa.array(np.ones(len(number), int)),
            "op": pa.nulls(len(number), pa.string()),
        }
    )


def load(settings: Settings, table: pa.Table) -> None:
    """The same file into a home."""
    file = settings.paths.run / "events.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    (loaded,) = harness.tidemark(settings, "load", str(file), "--topic", "user-interactions")["loads"]
    if loaded["rows"] != table.num_rows or loaded["refused"]:
        raise BenchmarkError(
            f"of {table.num_rows} rows these were loaded: {loaded}", where=str(settings.home)
        )


def build(settings: Settings, *options: str) -> None:
    """The bases that events feed."""
    chosen = [part for name in FED for part in ("--index", name)]
    harness.tidemark(settings, "build", *chosen, *options)


def spoil(settings: Settings) -> None:
    """Rows of the day go, and others say something else, as after a bug that somebody finds out about too late.

    A build reads the snapshot that was reported last: the damage is reported, too.
    """
    import dagster as dg

    from assets.platform import key
    from pipelines.spark import session

    spark, spec = session(settings, "tidemark benchmark"), lake.TABLES["curated.user_interactions"]
    said = lake.standing(lake.ancestors(settings, spec.name))
    of_day = f"{Days(DAY, DAY).where('event_time')} AND crc32(event_id) % 40"
    kept = lake.read(spark, spec.name).filter(f"NOT coalesce({of_day} = 0, false)")
    changed = {name: f"CASE WHEN {of_day} = 1 THEN {value} ELSE {name} END" for name, value in WRONG.items()}
    columns = [f"{changed.get(column.name, column.name)} AS {column.name}" for column in spec.columns]
    lake.overwrite(kept.selectExpr(*columns), spec, said)
    spark.stop()
    damaged = lake.current_snapshot(settings, "curated.user_interactions")
    if damaged is None:
        raise BenchmarkError("nothing was curated", where=str(settings.home))
    os.environ["DAGSTER_HOME"] = str(settings.paths.dagster)
    with dg.DagsterInstance.get() as instance:
        told = {"snapshot_id": str(damaged.id)}
        instance.report_runless_asset_event(
            dg.AssetMaterialization(key("curated.user_interactions"), metadata=told)
        )


def compare(one: Settings, other: Settings, table: pa.Table) -> tuple[int, int]:
    """How many answers differ, of how many: a user's whole timeline, a pin's counters of all hours."""
    left, right = (_views(settings) for settings in (one, other))
    users = [key.encode() for key in table.column("user_id").unique().to_pylist()]
    pins = [key.encode() for key in table.column("pin_id").unique().to_pylist()]
    wrong = sum(not left[0].timeline(key).table.equals(right[0].timeline(key).table) for key in users)
    wrong += sum(left[1].sums(key) != right[1].sums(key) for key in pins)
    return wrong, len(users) + len(pins)


def _views(settings: Settings) -> tuple[TimelineView, SumsView]:
    found: list[Any] = []
    for name in FED:
        versions = Versions(settings.paths.indices, name)
        pointer = versions.pointer()
        if pointer is None:
            raise BenchmarkError(f"{name} was not published", where=str(settings.home))
        found.append(view(open_base(INDICES[name], Path(versions.path(pointer.version)))))
    timelines, sums = found
    assert isinstance(timelines, TimelineView)
    assert isinstance(sums, SumsView)
    return timelines, sums
