"""A dirty year: a shop's invoices, a file a day, through the shipped loader and audits. Is what is found what there is?

The files are UCI's Online Retail: customers that are missing, cancellations, negative quantities, lines said twice.
Late lines it has none: every line stands in the file of its own day (which is checked). So some are made: of each
thousand lines a few are held back, by a sum of their own text, and arrive at the end of the third file after.

What there is, is counted in the files by pandas, as text, by another way than the loader's. What is found: by day, the
dead letters of the day's load, by what they say; at each audit (every few files) what `raw`, `raw.dead_letters` and
`curated.user_interactions` measure (refused rows, their reasons, rows of each day of events, late ones with it), what
became of each row (repeated, superseded, current), and events of an earlier day than their file's. All of it must be
equal (`mismatches`).
"""

from __future__ import annotations

import io
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines import lake
from pipelines.curate import SOURCES, Account, curate
from pipelines.ingest import load, mapping
from pipelines.settings import ROOT, Settings
from pipelines.suites import SUITES
from quality.audit import audit
from quality.measures import WHOLE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

FILES = ROOT.parent / "shared" / "data" / "online_retail" / "by-day.tar.gz"
LATE_BY = 3
SOURCE = SOURCES["user_interactions"]
CURATED, LETTERS = SOURCE.parts[0].table, lake.RAW_DEAD_LETTERS.name
DEFECTS = ("missing_customer", "cancelled", "negative_quantity")


class Audited(NamedTuple):
    """What an audit found: refused rows by reason, rows by day of the events, what became of all rows, late events."""

    refused: dict[str, int]
    by_day: dict[str, int]
    fates: dict[str, int]
    late: int


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        days=(305, "how many files, from the first on"),
        audit_every=(7, "files between two audits"),
        late_per_mille=(4, "lines of a thousand that arrive late"),
        files=(str(FILES), "the archive of the files"),
    )
    machine = harness.machine()
    files = arriving(read(Path(options.files), options.days), options.late_per_mille)
    with harness.place("dirty-year", options.home) as settings:
        from pipelines.spark import session

        spark = session(settings, "tidemark dirty year", has_small_jobs=True)
        try:
            result = year(spark, settings, files, options.audit_every)
        finally:
            spark.stop()
    harness.publish({"benchmark": "dirty_year", **result, "beside": [], **machine})
    return 0


# ------------------------------------------------------------------------------------------------ what there is


def read(archive: Path, count: int) -> dict[str, pd.DataFrame]:
    """The files as text, by their day.

    Raises:
        BenchmarkError: there is no such archive, or a line stands in the file of another day.
    """
    if not archive.exists():
        raise BenchmarkError(
            "there is no archive of the shop's files", where=str(archive), remedy="give --files"
        )
    found = {}
    with tarfile.open(archive) as tar:
        members = {Path(member.name).stem: member for member in tar if member.name.endswith(".csv")}
        for day in sorted(members)[:count]:
            content = tar.extractfile(members[day])
            assert content is not None
            rows = pd.read_csv(io.BytesIO(content.read()), dtype=str, keep_default_na=False)
            if (rows["InvoiceDate"].str[:10] != day).any():
                raise BenchmarkError("a line stands in the file of another day", where=day)
            found[day] = rows
    return found


def arriving(files: dict[str, pd.DataFrame], late_per_mille: int) -> dict[str, pd.DataFrame]:
    """The files with some lines held back, which come at the end of the file of `LATE_BY` files later."""
    days = list(files)
    given = dict(files)
    for place, day in enumerate(days[:-LATE_BY]):
        text = files[day]["InvoiceNo"] + files[day]["StockCode"] + files[day]["Quantity"]
        is_late = text.map(lambda line: zlib.crc32(line.encode()) % 1000 < late_per_mille)
        later = days[place + LATE_BY]
        given[later] = pd.concat([given[later], files[day][is_late]], ignore_index=True)
        given[day] = pd.concat([files[day][~is_late], given[day][len(files[day]) :]], ignore_index=True)
    return given


def defects(rows: pd.DataFrame) -> dict[str, int]:
    """How many lines of a file have each defect; a line may have several."""
    return {
        "missing_customer": int((rows["CustomerID"] == "").sum()),
        "cancelled": int(rows["InvoiceNo"].str.startswith("C").sum()),
        "negative_quantity": int((rows["Quantity"].astype(int) < 1).sum()),
    }


def expected(files: dict[str, pd.DataFrame], days: set[str]) -> Audited:
    """What an audit after these files must find, by day for the days that it has measured."""
    rows = pd.concat([rows.assign(file=day) for day, rows in files.items()])
    is_negative, is_nobody = rows["Quantity"].astype(int) < 1, rows["CustomerID"] == ""
    good = rows[~is_negative & ~is_nobody]
    identity = ["CustomerID", "InvoiceNo", "StockCode", "Quantity", "UnitPrice"]
    said = good.drop_duplicates([*identity, "InvoiceDate"])
    events = said.sort_values("InvoiceDate").drop_duplicates(identity)
    if (
        said.assign(day=said["InvoiceDate"].str[:10])
        .drop_duplicates([*identity, "day"])
        .duplicated(identity)
        .any()
    ):
        raise BenchmarkError("an event is told of two days: which one stands is not counted here")
    times = pd.to_datetime(events["InvoiceDate"]).dt.tz_localize("Europe/London").dt.tz_convert("UTC")
    by_day = Counter(times.dt.strftime("%Y-%m-%d"))
    return Audited(
        {"missing_field": int(is_nobody.sum()), "out_of_range": int((is_negative & ~is_nobody).sum())},
        {day: by_day[day] for day in sorted(days)},
        {
            "repeated": len(good) - len(said),
            "superseded": len(said) - len(events),
            "current": len(events),
            "tombstones": 0,
        },
        int((events["InvoiceDate"].str[:10] != events["file"]).sum()),
    )


# ------------------------------------------------------------------------------------------------ what is found


def year(
    spark: SparkSession, settings: Settings, files: dict[str, pd.DataFrame], audit_every: int
) -> dict[str, Any]:
    """Loads the files in turn, audits every few, and compares."""
    by = mapping.read(ROOT / "conf" / "mappings" / "online-retail.yaml")
    folder = settings.home / "files"
    folder.mkdir(parents=True, exist_ok=True)
    mismatches: list[str] = []
    load_of: dict[str, str] = {}
    load_s, audit_s, grown = [], [], 0
    alarms: list[str] = []
    before: dict[str, int] = {}
    for number, (day, rows) in enumerate(files.items(), 1):
        file = folder / f"{day}.csv"
        rows.to_csv(file, index=False)
        began = time.perf_counter()
        loaded = load.load_files(spark, settings, file, by=by)
        load_s.append(time.perf_counter() - began)
        load_of[loaded.load_id] = day
        if loaded.rows != len(rows):
            mismatches.append(f"{day}: {loaded.rows} rows were loaded of {len(rows)}")
        if number % audit_every and number < len(files):
            continue
        began = time.perf_counter()
        found, broken = audited(spark, settings, load_of)
        audit_s.append(time.perf_counter() - began)
        alarms += [f"{day}: {words}" for words in broken]
        there = expected(dict(list(files.items())[:number]), set(found.by_day))
        mismatches += [
            f"after {day}: {name} {a} instead of {b}"
            for name, a, b in zip(Audited._fields, found, there, strict=True)
            if a != b
        ]
        grown += sum(found.by_day.get(one, count) - count for one, count in before.items())
        before = found.by_day
        say(f"{day}: {number} of {len(files)} files, audit {audit_s[-1]:.1f} s, {len(mismatches)} mismatches")
    told = letters(spark, load_of)
    there_is = {day: defects(rows) for day, rows in files.items()}
    mismatches += [
        f"{day}: found {told.get(day)}, there are {counts}"
        for day, counts in there_is.items()
        if told.get(day, dict.fromkeys(DEFECTS, 0)) != counts
    ]
    return {
        "mismatches": len(mismatches),
        "different": mismatches[:20],
        "files": len(files),
        "rows": sum(map(len, files.values())),
        "found": {name: sum(counts[name] for counts in told.values()) for name in DEFECTS}
        | {"late": found.late, **found.fates},
        "there_are": {name: sum(counts[name] for counts in there_is.values()) for name in DEFECTS}
        | {"late": there.late, **there.fates},
        "late_after_an_audit": grown,
        "audits": len(audit_s),
        "alarms": len(alarms),
        "alarmed": alarms,
        "load_s": harness.percentiles(load_s, [50, 100], digits=2),
        "audit_s": harness.percentiles(audit_s, [50, 100], digits=2),
        "seconds": round(sum(load_s) + sum(audit_s), 1),
    }


def audited(spark: SparkSession, settings: Settings, load_of: dict[str, str]) -> tuple[Audited, list[str]]:
    """The shipped audits as of now, and what they say of measures that are not as they should be."""

    def table(name: str) -> DataFrame | None:
        return lake.read(spark, name) if lake.current_snapshot(settings, name) else None

    now = datetime.now(UTC)
    raw = lake.read(spark, SOURCE.raw_table)
    of_letters = audit(SUITES[LETTERS], lake.read(spark, LETTERS), table, [], now)
    of_raw = audit(SUITES[SOURCE.raw_table], raw, table, [], now)
    curated = curate(SOURCE, raw, rows=of_raw.measured.rows, snapshot_id=1)
    try:
        events = curated.table(SOURCE.parts[0])
        of_curated = audit(SUITES[CURATED], events, table, [], now)
        days = events.groupBy("load_id", events.event_time.cast("date").cast("string").alias("day")).count()
        late = sum(row["count"] for row in days.collect() if load_of[row["load_id"]] != row["day"])
        account: Account = curated.account
    finally:
        curated.close()
    if blocking := of_curated.report.blocking:
        raise BenchmarkError(f"the audit of {CURATED} blocks: {blocking[0].words}")
    share = sum(
        batch.rows * batch.numbers["", "refused_pct"] / 100 for batch in of_raw.measured.batches.values()
    )
    reasons = dict(of_letters.measured.batches[WHOLE].histograms["reason"])
    if round(share) != sum(reasons.values()):
        raise BenchmarkError(f"raw says {share} refused rows, its dead letters are {reasons}")
    found = Audited(
        dict(sorted(reasons.items())),
        {day: batch.rows for day, batch in sorted(of_curated.measured.batches.items())},
        {name: getattr(account, name) for name in ("repeated", "superseded", "current", "tombstones")},
        late,
    )
    broken = [one.words for each in (of_letters, of_raw, of_curated) for one in each.report.broken]
    return found, broken


def letters(spark: SparkSession, load_of: dict[str, str]) -> dict[str, dict[str, int]]:
    """By day of the file, what its dead letters say of themselves."""
    said = {
        "missing_customer": "get_json_object(value, '$.user_id') IS NULL",
        "cancelled": "get_json_object(value, '$.event_id') LIKE 'C%'",
        "negative_quantity": "CAST(get_json_object(value, '$.quantity') AS bigint) < 1",
    }
    texts = lake.read(spark, LETTERS).selectExpr("load_id", "CAST(value AS string) AS value")
    counted = texts.selectExpr(
        "load_id", *[f"int({condition}) AS {name}" for name, condition in said.items()]
    )
    rows = counted.groupBy("load_id").sum(*DEFECTS).toDF("load_id", *DEFECTS).collect()
    return {load_of[row["load_id"]]: {name: int(row[name]) for name in DEFECTS} for row in rows}
