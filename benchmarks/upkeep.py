"""A simulated week of the archive stream, one commit each 10 s, with maintenance beside it: does the table stay good?

One process commits as Iceberg's own streaming writer does (a fast append of one file: its manifests are left to
maintenance), with the epoch and the position in the summary as the archive stream has them, and with a pause of
`--pause-ms` in place of the 10 s: with none at all, nobody else could commit. The rows carry the simulated time, so
that the table has its partitions. Another process runs the shipped maintenance each simulated hour, orphans once a
simulated day; snapshots expire after as many simulated hours as the settings say. Afterwards: no row is lost or
doubled, and the table says the last commit's position and epoch. Then two queries (a day, everything) on the table and
on the same rows freshly written, in turns.

A week is 60,480 commits of about a tenth of a second each on two cores, and the pauses between them:
`--simulated-days 7` takes hours. With `--home`, one that was stopped goes on where it was, and what the earlier pieces
did and failed to do counts (`commit_ms` and `streamed_s` are of the last piece). Much of a commit is reading and
writing the metadata of all snapshots that are kept; with `TIDEMARK__MAINTENANCE__SNAPSHOT_HOURS=1` there are a sixth of
them.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines import lake, maintenance, storage
from pipelines import settings as settings_module
from pipelines.indexing.position import Position
from pipelines.maintenance import Ages, MaintenanceError
from pipelines.settings import ROOT, Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SPEC = lake.RAW_USER_INTERACTIONS
FRESH = SPEC._replace(name="raw.freshly_written")
MONDAY = datetime(2024, 3, 4, tzinfo=UTC)
COMMIT_EVERY_S = 10
COMMITS_A_DAY = 86_400 // COMMIT_EVERY_S
COMMITS_AN_HOUR = 3_600 // COMMIT_EVERY_S
TOPIC_ID = "user-interactions@simulated"
PARTITIONS = 2
ROUNDS = 9
COUNTED = ("retries", "seconds", "files_rewritten", "bytes_rewritten", "snapshots_expired")


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        simulated_days=(0.5, "how much of the week"),
        rows=(100, "rows of a commit"),
        pause_ms=(40, "between two commits"),
        seed=(1, "of the rows"),
    )
    machine = harness.machine()
    commits = round(options.simulated_days * COMMITS_A_DAY)
    with harness.place("upkeep", options.home, SPARK__DRIVER_MEMORY="1g") as settings:
        from pipelines.spark import session

        spark = session(settings, "tidemark maintenance")
        try:
            lake.ensure(spark, SPEC)
            result = measure(spark, settings, Stream(commits, options.rows, options.pause_ms, options.seed))
        finally:
            spark.stop()
    harness.publish({"benchmark": "upkeep", **result, **machine})
    return 0


class Stream(NamedTuple):
    """What the writer is to do: so many commits of so many rows, and so long a pause between two."""

    commits: int
    rows: int
    pause_ms: int
    seed: int


def measure(spark: SparkSession, settings: Settings, stream: Stream) -> dict[str, Any]:
    """The simulated time, then the checks and the queries."""
    commits, rows = stream.commits, stream.rows
    diary = Diary(settings.home / "upkeep.jsonl")
    began = time.monotonic()
    with _Writer(settings, stream, diary) as writer:
        _maintain_beside(spark, settings, writer, diary)
    upkeep = diary.upkeep()
    streamed_s = time.monotonic() - began
    check(spark, settings, commits, rows)
    sizes = storage.file_sizes(spark, SPEC)
    measured = storage.measure_table(spark, settings, SPEC)
    assert measured is not None
    _, small_pct = storage.small_files(sizes, SPEC.target_file_bytes)
    slowdowns = compare(spark, commits)
    return {
        "max_files_per_partition": max(map(len, sizes.values())),
        "small_file_pct": small_pct,
        "failed_commits": len(diary.of("failed_commit")) + upkeep["failed"],
        "query_slowdown": max(slowdowns.values()),
        "metadata_mb": round(measured["metadata_bytes"] / 2**20, 2),
        "commits": commits,
        "simulated_days": round(commits / COMMITS_A_DAY, 3),
        "rows": commits * rows,
        "partitions": len(sizes),
        "query_slowdowns": slowdowns,
        "commit_ms": writer.milliseconds,
        "snapshots": measured["snapshots"],
        "snapshot_hours": settings.maintenance.snapshot_hours,
        "manifests": measured["manifests"],
        "maintenance": upkeep,
        "streamed_s": round(streamed_s),
        "pieces": len(diary.of("began")),
        "beside": ["the writer and maintenance, in a process each"],
    }


class Diary(NamedTuple):
    """What has been done so far, a line of JSON each, in the home: a piece that goes on knows what came before it."""

    file: Path

    def note(self, kind: str, **said: Any) -> None:
        """Keep a line."""
        with self.file.open("a") as file:
            file.write(json.dumps({"kind": kind, **said}) + "\n")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of a kind, oldest first."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [line for line in map(json.loads, lines) if line["kind"] == kind]

    def upkeep(self) -> dict[str, Any]:
        """What maintenance did in all pieces."""
        passes = self.of("pass")
        return {
            "failed": len(self.of("failed_pass")),
            "passes": len(passes),
            "retries": sum(done["retries"] for done in passes),
            "seconds_median": round(statistics.median(done["seconds"] for done in passes), 1),
            "files_rewritten": sum(done["files_rewritten"] for done in passes),
            "mb_rewritten": round(sum(done["bytes_rewritten"] for done in passes) / 2**20, 1),
            "snapshots_expired": sum(done["snapshots_expired"] for done in passes),
        }


# ------------------------------------------------------------------------------------------------ the writer


class _Writer:
    """The process that commits; `clock` has the wall time, in ms, of each of its commits so far."""

    def __init__(self, settings: Settings, stream: Stream, diary: Diary) -> None:
        self.commits = stream.commits
        self.clock = _earlier(settings)
        self.milliseconds: dict[str, float] = {}
        self._diary = diary
        diary.note("began", commit=len(self.clock))
        settings.paths.logs.mkdir(parents=True, exist_ok=True)
        self._log = settings.paths.logs / "writer.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.upkeep", *map(str, stream)],
                cwd=ROOT,
                env={**os.environ, **settings.environment},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "at_ms" in said:
                self.clock.append(said["at_ms"])
            elif "failed_epoch" in said:
                self._diary.note("failed_commit", epoch=said["failed_epoch"])
            else:
                self.milliseconds = said["milliseconds"]

    def await_commits(self, wanted: int) -> bool:
        """Return when so many are committed; False: all of them are.

        Raises:
            BenchmarkError: the writer ended before.
        """
        while len(self.clock) < min(wanted, self.commits):
            if self._process.poll() not in (None, 0):
                raise BenchmarkError(f"the writer ended: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)
        return len(self.clock) < self.commits

    def wall_ms(self, commit: int) -> int:
        """When a commit was made; 0 for one before the first."""
        return self.clock[commit] if commit >= 0 else 0  # 0, too, for one whose snapshot has expired

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._process.terminate()
        self._process.wait()
        self._thread.join()


def _earlier(settings: Settings) -> list[int]:
    """The wall time of each commit of the earlier pieces; 0 where its snapshot has expired."""
    clock = [0] * _next_epoch(settings)
    for snapshot in lake.ancestors(settings, SPEC.name):
        if lake.STREAM in snapshot.summary:
            clock[int(snapshot.summary[lake.EPOCH])] = snapshot.committed_at_ms
    return clock


def _next_epoch(settings: Settings) -> int:
    held = lake.committed_epoch(settings, SPEC.name, "archive", 1)
    return held[1] + 1 if held else 0


def write(settings: Settings, stream: Stream) -> None:
    """What the writer's process does: one commit after the other, each told on standard output."""
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    from pipelines.spark import session

    spark = session(settings, "tidemark archive", has_small_jobs=True)
    jvm: Any = spark._jvm
    table = jvm.org.apache.iceberg.spark.Spark3Util.loadIcebergTable(spark._jsparkSession, SPEC.identifier)
    held = lake.open_table(settings, SPEC.name)
    assert held is not None
    schema = schema_to_pyarrow(held.schema())
    folder = Path(urlsplit(held.location()).path) / "data"
    rows, epoch = stream.rows, _next_epoch(settings)
    took = []
    while epoch < stream.commits:
        file, day = _written(folder, schema, epoch, rows, stream.seed)
        began = time.perf_counter()
        data = jvm.org.apache.iceberg.DataFiles.builder(table.spec()).withPath(f"file://{file}")
        data = data.withFormat("parquet").withFileSizeInBytes(file.stat().st_size).withRecordCount(rows)
        update = table.newFastAppend().appendFile(data.withPartitionPath(f"ingested_at_day={day}").build())
        for name, value in _summary(epoch, rows).items():
            update = update.set(name, value)
        try:
            update.commit()
        except Exception as error:  # the stream's host would run the epoch again, if it is not there
            print(f"epoch {epoch}: {error}", file=sys.stderr, flush=True)
            print(json.dumps({"failed_epoch": epoch}), flush=True)
            if _next_epoch(settings) <= epoch:
                continue
        took.append(time.perf_counter() - began)
        print(json.dumps({"at_ms": time.time_ns() // 1_000_000}), flush=True)
        epoch += 1
        time.sleep(stream.pause_ms / 1000)
    p50, p99, most = harness.percentiles(took, (50, 99, 100), 1000, 1) if took else (0.0, 0.0, 0.0)
    print(json.dumps({"milliseconds": {"p50": p50, "p99": p99, "max": most}}), flush=True)
    spark.stop()


def _summary(epoch: int, rows: int) -> dict[str, str]:
    return {
        lake.STREAM: "archive",
        lake.INCARNATION: "1",
        lake.EPOCH: str(epoch),
        lake.POSITION: _end(epoch, rows).to_text(),
        lake.MAX_BROKER_TIME_MS: str(round(_time(epoch).timestamp() * 1000)),
    }


def _end(epoch: int, rows: int) -> Position:
    """Where an epoch ends: its records are spread over the partitions in turn."""
    records = (epoch + 1) * rows
    return Position({TOPIC_ID: {p: (records - p - 1) // PARTITIONS + 1 for p in range(PARTITIONS)}})


def _time(epoch: int) -> datetime:
    return MONDAY + timedelta(seconds=epoch * COMMIT_EVERY_S)


def _written(folder: Path, schema: pa.Schema, epoch: int, rows: int, seed: int) -> tuple[Path, str]:
    """The epoch's data file, and the day that it is of."""
    chance = random.Random(f"{seed} {epoch}")
    now = _time(epoch)
    numbers = range(epoch * rows, (epoch + 1) * rows)
    users = [f"u{chance.randrange(100_000)}" for _ in numbers]
    values = [
        json.dumps(
            {
                "user_id": user,
                "event_id": f"{chance.getrandbits(64):016x}",
                "pin_id": f"p{chance.randrange(1_000_000)}",
                "action": chance.choice(("view", "click", "save", "purchase")),
                "event_time": int(now.timestamp() * 1000) - chance.randrange(10_000),
            }
        ).encode()
        for user in users
    ]
    columns = {
        "topic_id": [TOPIC_ID] * rows,
        "partition": [number % PARTITIONS for number in numbers],
        "offset": [number // PARTITIONS for number in numbers],
        "load_id": [None] * rows,
        "load_row": [None] * rows,
        "broker_time": [now] * rows,
        "key": [user.encode() for user in users],
        "value": values,
        "ingested_at": [now] * rows,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    day = now.date().isoformat()
    file = folder / f"ingested_at_day={day}" / f"epoch-{epoch}-{chance.getrandbits(32):08x}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays, schema=schema), file, compression="zstd")
    return file, day


# ------------------------------------------------------------------------------------------------ beside it


def _maintain_beside(spark: SparkSession, settings: Settings, writer: _Writer, diary: Diary) -> None:
    """Maintenance each simulated hour, later where one takes longer; the last time when all is written."""
    hours_kept = settings.maintenance.snapshot_hours
    due = _due_after(len(writer.clock))
    is_going = True
    while is_going:
        is_going = writer.await_commits(due)
        at = len(writer.clock)
        old_ms = writer.wall_ms(at - 1 - hours_kept * COMMITS_AN_HOUR)
        now_ms = time.time_ns() // 1_000_000
        old = Ages(now_ms, old_ms, now_ms - settings.maintenance.orphan_hours * 3_600_000)
        is_daily = at // COMMITS_A_DAY > (at - COMMITS_AN_HOUR) // COMMITS_A_DAY or not is_going
        try:
            report = maintenance.maintain_table(spark, settings, SPEC, old=old, has_orphans=is_daily)
            assert report is not None
            diary.note("pass", **{name: getattr(report, name) for name in COUNTED})
            say(f"{at:,} of {writer.commits:,} commits: {report.to_json()}")
        except MaintenanceError as error:
            diary.note("failed_pass", error=str(error))
            say(str(error))
        due = _due_after(at)


def _due_after(commits: int) -> int:
    return commits - commits % COMMITS_AN_HOUR + COMMITS_AN_HOUR


# ------------------------------------------------------------------------------------------------ what came of it


def check(spark: SparkSession, settings: Settings, commits: int, rows: int) -> None:
    """Every row is there once, and the table says how far it is.

    Raises:
        BenchmarkError: it is not so.
    """
    from pyspark.sql import functions as F

    table = lake.read(spark, SPEC.name)
    places = table.select("topic_id", "partition", "offset")
    found = table.agg(F.count("*"), F.max("offset"), F.count("value")).first()
    assert found is not None
    distinct = places.distinct().count()
    last = -(-commits * rows // PARTITIONS) - 1
    wanted: list[Any] = [commits * rows, last, commits * rows, commits * rows]
    held: list[Any] = [*found, distinct]
    wanted += [_end(commits - 1, rows), (1, commits - 1), str(int(_time(commits - 1).timestamp() * 1000))]
    held += [lake.position(settings, SPEC.name), lake.committed_epoch(settings, SPEC.name, "archive")]
    held += [lake.bringing(settings, SPEC.name, Position(), 0)[lake.MAX_BROKER_TIME_MS]]
    if held != wanted:
        raise BenchmarkError(f"the table has {held}, committed were {wanted}", where=SPEC.name)


def compare(spark: SparkSession, commits: int) -> dict[str, float]:
    """How much longer each query takes than on the same rows freshly written; medians, in turns."""
    from pyspark.sql import functions as F

    lake.ensure(spark, FRESH)
    fresh = (
        lake.read(spark, SPEC.name).repartition(F.to_date("ingested_at")).sortWithinPartitions("ingested_at")
    )
    lake.overwrite(fresh, FRESH)  # an earlier piece may have come as far as this
    day = _time(commits // 2).date().isoformat()
    of_day = f"ingested_at >= '{day}' AND ingested_at < '{day}' + INTERVAL 1 DAY"
    shown = "get_json_object(cast(value AS string), '$.action')"
    queries = {
        "day": f"SELECT {shown}, count(*), max(offset) FROM {{}} WHERE {of_day} GROUP BY 1 ORDER BY 1",
        "scan": "SELECT count(*), count(DISTINCT key), sum(length(value)) FROM {}",
    }
    slowdowns = {}
    for name, query in queries.items():
        seconds: dict[str, list[float]] = {SPEC.identifier: [], FRESH.identifier: []}
        answers = set()
        for number in range(ROUNDS + 2):
            for table in seconds if number % 2 else reversed(seconds):
                began = time.perf_counter()
                answers.add(str(spark.sql(query.format(table)).collect()))
                seconds[table].append(time.perf_counter() - began)
        if len(answers) != 1:
            raise BenchmarkError(f"{query} has different answers on the same rows: {answers}")
        maintained, other = (statistics.median(took[2:]) for took in seconds.values())
        say(f"{name}: {maintained:.3f} s, freshly written {other:.3f} s")
        slowdowns[name] = round(maintained / other, 3)
    return slowdowns


if __name__ == "__main__":
    write(settings_module.load(), Stream(*map(int, sys.argv[1:5])))
