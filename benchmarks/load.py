"""How fast files are loaded, and how that grows: the same events as CSV and as Parquet, beside DuckDB.

A source of events is made from a seed, at a quarter, at half and at the whole of `--rows`, as one CSV file and as one
Parquet file; one in two hundred breaks its contract. Each is loaded by the shipped loader into a lake of its own, from
looking at the file to the commit; Spark is started and warmed up before. DuckDB reads the same files and writes the
same rows (the columns of the raw table, each event as JSON bytes, zstd) with as many threads; it checks no contract,
keeps no dead letters and commits nothing.

`rows_per_s` are those of the whole source; `growth_exponent` is the slope of log(seconds) over log(rows) by least
squares, the worse of the two formats. `mismatches` counts the rows of the lakes whose values are not those of the
source, and dead letters that are missing, too many or for another reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from benchmarks import harness
from benchmarks.harness import say
from pipelines import lake
from pipelines.contracts import ACTIONS, USER_INTERACTIONS
from pipelines.ingest import dead_letters, load
from pipelines.settings import Settings

FORMATS = ("csv", "parquet")
BAD_EACH = 200
SURFACES = ("home", "search", "related", None)


class Run(NamedTuple):
    """One load: its format and rows, the seconds of the loader and of DuckDB, and what was wrong."""

    format: str
    rows: int
    seconds: float
    duckdb_s: float
    mismatches: int


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__, given, rows=(2_000_000, "events in the greatest source"), seed=(1, "of the source")
    )
    machine = harness.machine()
    with harness.place("load", options.home) as settings:
        runs = measure(settings, options.rows, options.seed)
    harness.publish({"benchmark": "load", **result(runs), "beside": []} | machine)
    return 0


def result(runs: Sequence[Run]) -> dict[str, Any]:
    """The fields of the result from all runs, the greatest source last."""
    whole = {run.format: run for run in runs}
    rates = {name: round(run.rows / run.seconds) for name, run in whole.items()}
    rates |= {f"duckdb_{name}": round(run.rows / run.duckdb_s) for name, run in whole.items()}
    growths = {name: growth([run for run in runs if run.format == name]) for name in FORMATS}
    return {
        "rows_per_s": rates,
        **{f"{name}_rows_per_s": rate for name, rate in rates.items()},
        **{f"{name}_of_duckdb": round(rates[name] / rates[f"duckdb_{name}"], 4) for name in FORMATS},
        "growth_exponent": max(growths.values()),
        "growth_exponents": growths,
        "mismatches": sum(run.mismatches for run in runs),
        "rows": sorted({run.rows for run in runs}),
        "seconds": {name: [round(run.seconds, 2) for run in runs if run.format == name] for name in FORMATS},
    }


def growth(runs: Sequence[Run]) -> float:
    """The slope of log(seconds) over log(rows)."""
    slope, _ = np.polyfit(np.log([run.rows for run in runs]), np.log([run.seconds for run in runs]), 1)
    return round(float(slope), 3)


def measure(settings: Settings, rows: int, seed: int) -> list[Run]:
    """Every format at every size, the smallest first."""
    from pipelines.spark import session

    spark = session(settings, "benchmark load")
    try:
        say("warming up (not timed)")
        for name in FORMATS:
            run_one(settings, name, source(min(rows, 100_000), seed + 1), "warm")
        runs = []
        for size in (rows // 4, rows // 2, rows):
            events = source(size, seed)
            for name in FORMATS:
                run = run_one(settings, name, events, str(size))
                say(f"{name}, {size:,} rows: {run.seconds:.1f} s; DuckDB {run.duckdb_s:.1f} s")
                runs.append(run)
        return runs
    finally:
        spark.stop()


def run_one(settings: Settings, name: str, events: pa.Table, label: str) -> Run:
    """Load a source into a lake of its own, and let DuckDB write the same."""
    from pipelines.spark import session

    own = harness.settings_at(settings.home / f"{name}-{label}")
    spark = session(own, "benchmark load")
    file = own.home / f"events.{name}"
    own.home.mkdir(parents=True, exist_ok=True)
    write(events, file)
    began = time.perf_counter()
    done = load.load_files(spark, own, file, USER_INTERACTIONS)
    seconds = time.perf_counter() - began
    duckdb_s = with_duckdb(file, own.home / "duckdb.parquet")
    return Run(name, events.num_rows, seconds, duckdb_s, mismatches(own, events, done))


# ------------------------------------------------------------------------------------------------ the source


def source(rows: int, seed: int) -> pa.Table:
    """Events as columns, in the order of their times; some name no action that there is, some have no quantity."""
    random = np.random.default_rng(seed)
    at = np.sort(random.integers(1_700_000_000_000_000, 1_710_000_000_000_000, rows))
    actions = pa.array([*ACTIONS, "stare"])
    action = random.integers(0, len(ACTIONS), rows)
    quantity = random.integers(1, 5, rows)
    action[BAD_EACH // 2 :: 2 * BAD_EACH] = len(ACTIONS)
    quantity[BAD_EACH + BAD_EACH // 2 :: 2 * BAD_EACH] = 0
    return pa.table(
        {
            "user_id": _named("u", random.integers(0, max(1, rows // 20), rows)),
            "event_id": _named("e", np.arange(rows)),
            "pin_id": _named("p", random.zipf(1.3, rows) % 100_000),
            "action": actions.take(pa.array(action)),
            "event_time": pa.array(at, pa.timestamp("us", "UTC")),
            "quantity": pa.array(quantity),
            "surface": pa.array(SURFACES).take(pa.array(random.integers(0, len(SURFACES), rows))),
        }
    )


def _named(letter: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")


def write(events: pa.Table, file: Path) -> None:
    """The source as a file, as other programs write one."""
    if file.suffix == ".parquet":
        pq.write_table(events, file, row_group_size=122_880)
        return
    time_ = pc.strftime(events["event_time"], "%Y-%m-%dT%H:%M:%SZ")
    place = events.column_names.index("event_time")
    pa.csv.write_csv(events.set_column(place, "event_time", time_), file)


# ------------------------------------------------------------------------------------------------ beside and after


def with_duckdb(file: Path, target: Path) -> float:
    """The seconds that DuckDB takes to write the raw table's columns from the file."""
    import duckdb

    reader = (
        f"read_csv('{file}', types={{'event_time': 'VARCHAR'}})"
        if file.suffix == ".csv"
        else f"read_parquet('{file}')"
    )
    began = time.perf_counter()
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(
            f"""COPY (
              SELECT NULL::VARCHAR AS topic_id, NULL::INTEGER AS partition, NULL::BIGINT AS "offset",
                'user_interactions:duckdb' AS load_id, row_number() OVER () - 1 AS load_row,
                now() AS broker_time, user_id::BLOB AS key,
                to_json({{user_id: user_id, event_id: event_id, pin_id: pin_id, action: action,
                  event_time: event_time, quantity: quantity, surface: surface}})::VARCHAR::BLOB AS value,
                now() AS ingested_at
              FROM {reader}
            ) TO '{target}' (FORMAT parquet, COMPRESSION zstd)"""
        )
    return time.perf_counter() - began


def mismatches(settings: Settings, events: pa.Table, done: load.LoadResult) -> int:
    """Rows that are not as in the source, and dead letters that are not as they should be."""
    table = lake.open_table(settings, done.table)
    assert table is not None
    raw = table.scan(selected_fields=("load_row", "value")).to_arrow().sort_by("load_row")
    lines = b"\n".join(raw["value"].to_pylist())
    kinds = pa.schema([field for field in events.schema if field.name != "event_time"])
    found = pa.json.read_json(
        pa.BufferReader(lines),
        parse_options=pa.json.ParseOptions(explicit_schema=kinds.append(pa.field("event_time", pa.string()))),
    )
    if found.num_rows != events.num_rows or done.rows != events.num_rows:
        return max(abs(found.num_rows - events.num_rows), abs(done.rows - events.num_rows))
    wrong = pa.array(np.asarray(raw["load_row"]) != np.arange(events.num_rows))
    for name in events.column_names:
        expected, got = events[name], found[name]
        if name == "event_time":
            stamps = pc.replace_substring(got, "Z", "").cast(pa.timestamp("us"))
            got = pc.assume_timezone(stamps, "UTC")
        same = pc.or_(
            pc.fill_null(pc.equal(expected, got), False), pc.and_(pc.is_null(expected), pc.is_null(got))
        )
        wrong = pc.or_(wrong, pc.invert(same.combine_chunks()))
    expected_refused = Counter(
        "unknown_action" if action == "stare" else "out_of_range"
        for action, quantity in zip(events["action"].to_pylist(), events["quantity"].to_pylist(), strict=True)
        if action == "stare" or quantity == 0
    )
    letters = Counter({reason: count for (_, reason), count in dead_letters.counted(settings).items()})
    off = sum(
        abs(letters[reason] - expected_refused[reason]) for reason in letters.keys() | expected_refused.keys()
    )
    return int(pc.sum(wrong).as_py()) + off
