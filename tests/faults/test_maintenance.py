"""Maintenance racing with writers, and killed in the middle: nothing is lost, doubled or forgotten, neither fails."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from pipelines import failpoints, lake, maintenance, storage
from pipelines.indexing.position import Position
from pipelines.maintenance import Ages
from pipelines.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SPEC = lake.RAW_DEAD_LETTERS._replace(name="raw.racing", target_file_bytes=2**20)
STREAMS = ("one", "other")
EPOCHS = 25


def everything_is_old() -> Ages:
    now = time.time_ns() // 1_000_000
    return Ages(now, now, now - 25 * 3_600_000)


class Oracle:
    """What was committed, in plain Python: rows, ends, and the last epoch of each stream."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []
        self.ends: dict[str, int] = {}
        self.last: dict[str, tuple[int, int]] = {}
        self.newest_ms = 0


def write(spark: SparkSession, settings: Settings, stream: str, seed: str, oracle: Oracle) -> None:
    """Epochs of one stream, as the archive commits them: looked for first, some run again, now and then a new life."""
    chance = random.Random(f"{seed} {stream}")
    schema = spark.table(SPEC.identifier).schema
    incarnation, offset, epoch = 1, 0, -1
    for _ in range(EPOCHS):
        if chance.random() < 0.1 and epoch >= 0:
            incarnation, epoch = incarnation + 1, -1
        is_again = chance.random() < 0.2 and epoch >= 0
        epoch += not is_again
        last = lake.committed_epoch(settings, SPEC.name, stream, incarnation)
        assert last == (None if not is_again and epoch == 0 else (incarnation, epoch - (not is_again)))
        if is_again:  # found to be done, whatever was compacted or expired since
            continue
        count, newest_ms = chance.randrange(1, 4), chance.randrange(1_000)
        rows = [dict.fromkeys(schema.names) | {"topic": stream, "offset": offset + n} for n in range(count)]
        offset += count
        said = {lake.STREAM: stream, lake.INCARNATION: str(incarnation), lake.EPOCH: str(epoch)}
        brought = lake.bringing(settings, SPEC.name, Position({stream: {0: offset}}), newest_ms)
        lake.append(spark.createDataFrame(rows, schema).coalesce(1), SPEC, said | brought)
        oracle.rows += [(stream, row["offset"]) for row in rows]
        if (
            chance.random() < 0.2
        ):  # as the archive forgets dead letters: a delete, which compaction may refuse
            lake.delete(spark, SPEC, f"topic = '{stream}' AND `offset` = {offset - 1}")
            oracle.rows.pop()
        oracle.ends[stream] = offset
        oracle.last[stream] = (incarnation, epoch)
        oracle.newest_ms = max(oracle.newest_ms, newest_ms)


def check(spark: SparkSession, settings: Settings, oracle: Oracle) -> None:
    held = sorted((row["topic"], row["offset"]) for row in lake.read(spark, SPEC.name).collect())
    assert held == sorted(oracle.rows)
    assert lake.position(settings, SPEC.name) == Position({s: {0: end} for s, end in oracle.ends.items()})
    for stream, last in oracle.last.items():
        assert lake.committed_epoch(settings, SPEC.name, stream) == last
        assert lake.committed_epoch(settings, SPEC.name, stream, last[0]) == last
    said = lake.bringing(settings, SPEC.name, Position(), 0)
    assert said[lake.MAX_BROKER_TIME_MS] == str(oracle.newest_ms)


def test_writers_and_maintenance_beside_each_other(own_spark: SparkSession, settings: Settings) -> None:
    seed = os.environ.get("TIDEMARK_SEED") or str(random.SystemRandom().randrange(2**32))
    print(f"TIDEMARK_SEED={seed}")
    spark = own_spark
    lake.ensure(spark, SPEC)
    oracles = {stream: Oracle() for stream in STREAMS}
    errors: list[str] = []

    def run(stream: str) -> None:
        try:
            write(spark, settings, stream, seed, oracles[stream])
        except BaseException as error:
            errors.append(str(error))

    writers = [threading.Thread(target=run, args=(stream,)) for stream in STREAMS]
    for writer in writers:
        writer.start()
    reports = []
    while any(writer.is_alive() for writer in writers):
        reports.append(
            maintenance.maintain_table(spark, settings, SPEC, old=everything_is_old(), has_orphans=False)
        )
    reports.append(maintenance.maintain_table(spark, settings, SPEC, old=everything_is_old()))
    assert errors == []
    done = [report for report in reports if report is not None]
    assert sum(report.files_rewritten for report in done) > 0
    assert sum(report.snapshots_expired for report in done) > 0
    whole = Oracle()
    for oracle in oracles.values():
        whole.rows += oracle.rows
        whole.ends |= oracle.ends
        whole.last |= oracle.last
        whole.newest_ms = max(whole.newest_ms, oracle.newest_ms)
    check(spark, settings, whole)
    assert (
        len(list(lake.ancestors(settings, SPEC.name))) <= maintenance.KEPT_SNAPSHOTS + 3
    )  # its own are young
    assert sum(map(len, storage.file_sizes(spark, SPEC).values())) == 1


CHILD = """
import sys, time
from pipelines import maintenance, settings, spark
from pipelines.maintenance import Ages
from tests.faults.test_maintenance import SPEC, everything_is_old
s = settings.load()
maintenance.maintain_table(spark.session(s, "killed", has_small_jobs=True), s, SPEC, old=everything_is_old())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", ["maintenance.after_compaction", "maintenance.after_standing", "maintenance.after_expiry"]
)
def test_kill_9_in_the_middle(own_spark: SparkSession, settings: Settings, place: str) -> None:
    spark, oracle = own_spark, Oracle()
    lake.ensure(spark, SPEC)
    write(spark, settings, "one", "1", oracle)
    empty = spark.createDataFrame([], spark.table(SPEC.identifier).schema)
    for _ in range(maintenance.KEPT_SNAPSHOTS):  # so that what is kept does not say it by itself
        lake.append(empty, SPEC)
    if place == "maintenance.after_standing":
        maintenance.compact(spark, settings, SPEC)
        for _ in range(maintenance.KEPT_SNAPSHOTS):
            lake.append(empty, SPEC)
    environment = {**os.environ, **settings.environment, "PYTHONPATH": str(ROOT)}
    environment[failpoints.VARIABLE] = place
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, cwd=ROOT, check=False, timeout=300)
    assert child.returncode == -signal.SIGKILL
    check(spark, settings, oracle)
    maintenance.maintain_table(spark, settings, SPEC, old=everything_is_old())
    check(spark, settings, oracle)
