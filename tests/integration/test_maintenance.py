"""Maintenance on real Spark, Iceberg and Delta: tables become small and stay the same, and nothing is forgotten."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import dagster as dg
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from assets import maintenance as upkeep
from assets.platform import Platform
from jobs.epochs import MarkerCopy
from pipelines import lake, maintenance, storage, undo
from pipelines.indexing import build, delta
from pipelines.indexing import facts as fact
from pipelines.indexing.position import Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Versions, reaches
from pipelines.indices import INDICES
from pipelines.lake import Column, TableSpec
from pipelines.maintenance import Ages
from pipelines.settings import Settings
from quality import gates

SORTED = TableSpec(
    name="features.sorted_things",
    doc="a thing",
    columns=(
        Column("id", "string", "which thing"),
        Column("at", "timestamp", "when", "UTC"),
        Column("noise", "string", "what fills the file"),
    ),
    owner="tests",
    partitioned_by=("days(at)",),
    sorted_by=("id",),
    target_file_bytes=2**20,
)
DAY = datetime(2024, 3, 1, tzinfo=UTC)


def all_old() -> Ages:
    """Everything up to now is old; of orphans, what Iceberg itself allows: a day."""
    now = time.time_ns() // 1_000_000
    return Ages(now, now, now - 25 * 3_600_000)


def things(spark: SparkSession, first: int, count: int, day: int = 0) -> DataFrame:
    shuffled = random.Random(first).sample(range(first, first + count), count)
    at = DAY + timedelta(days=day)
    rows = [(f"t{n:06d}", at + timedelta(seconds=n % 1000), f"{random.Random(n).random()}") for n in shuffled]
    return spark.createDataFrame(rows, "id string, at timestamp, noise string")


def rows_of(spark: SparkSession, spec: TableSpec) -> list[tuple[object, ...]]:
    return sorted(tuple(row) for row in lake.read(spark, spec.name).collect())


def files_of(spark: SparkSession, spec: TableSpec) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for row in spark.sql(
        f"SELECT file_path, cast(partition AS string) AS p FROM {spec.identifier}.files"
    ).collect():
        found.setdefault(row["p"], []).append(Path(urlsplit(row["file_path"]).path))
    return found


def test_small_files_become_few_and_sorted_and_the_rows_stay(
    own_spark: SparkSession, settings: Settings
) -> None:
    spark = own_spark
    lake.ensure(spark, SORTED)
    for n in range(6):
        lake.append(things(spark, 100 * n, 100, day=n % 2), SORTED)
    before = rows_of(spark, SORTED)
    report = maintenance.maintain_table(spark, settings, SORTED)
    assert report is not None
    assert (report.files_rewritten, report.files_written) == (6, 2)
    assert report.retries == 0
    assert rows_of(spark, SORTED) == before
    found = files_of(spark, SORTED)
    assert [len(files) for files in found.values()] == [1, 1]
    for (file,) in found.values():
        ids = pq.read_table(file).column("id").to_pylist()
        assert ids == sorted(ids)
    again = maintenance.maintain_table(spark, settings, SORTED)
    assert again is not None
    assert (again.files_rewritten, again.manifests_rewritten, again.snapshots_expired) == (0, 0, 0)


def test_large_files_are_about_as_large_as_declared_and_left_alone(
    own_spark: SparkSession, settings: Settings
) -> None:
    spark, spec = own_spark, SORTED._replace(target_file_bytes=100_000)
    lake.ensure(spark, spec)
    for n in range(5):
        lake.append(things(spark, 10_000 * n, 10_000), spec)
    maintenance.maintain_table(spark, settings, spec)
    maintenance.maintain_table(spark, settings, spec)
    sizes = [file.stat().st_size for files in files_of(spark, spec).values() for file in files]
    assert len(sizes) > 2
    assert sum(size < 50_000 for size in sizes) <= 1
    assert max(sizes) < 180_000
    last = maintenance.maintain_table(spark, settings, spec)
    assert last is not None
    assert last.files_rewritten == 0
    assert lake.read(spark, spec.name).count() == 50_000


def test_what_commits_said_outlives_them(own_spark: SparkSession, settings: Settings) -> None:
    spark, spec = own_spark, lake.RAW_DEAD_LETTERS._replace(name="raw.some")
    lake.ensure(spark, spec)
    empty = spark.createDataFrame([], spark.table(spec.identifier).schema)

    def commit(stream: str, incarnation: int, epoch: int, brought: Position, newest_ms: int) -> None:
        said = {lake.STREAM: stream, lake.INCARNATION: str(incarnation), lake.EPOCH: str(epoch)}
        lake.append(empty, spec, said | lake.bringing(settings, spec.name, brought, newest_ms))

    commit("archive", 1, 9, Position({"T": {0: 5}}), 70)
    commit("other", 3, 2, Position({"T": {1: 8}}), 90)
    commit("archive", 2, 4, Position({"U": {0: 1}}), 10)
    lake.append(empty, spec, {lake.LOAD_ID: "l", lake.POSITION: Position(loads=frozenset({"l"})).to_text()})
    for _ in range(3):
        lake.append(empty, spec)

    def said() -> tuple[object, ...]:
        asked = (
            ("archive", None),
            ("archive", 1),
            ("archive", 2),
            ("other", None),
            ("other", 1),
            ("none", None),
        )
        epochs = [lake.committed_epoch(settings, spec.name, *which) for which in asked]
        return lake.position(settings, spec.name), epochs, lake.bringing(settings, spec.name, Position(), 0)

    before = said()
    assert before[1] == [(2, 4), (1, 9), (2, 4), (3, 2), None, None]
    assert before[2][lake.MAX_BROKER_TIME_MS] == "90"  # type: ignore[index]
    for _ in range(3):  # what was said for others is said for again
        assert maintenance.expire_snapshots(spark, settings, spec.name, all_old().snapshots_ms) > 0
        assert len(list(lake.ancestors(settings, spec.name))) == maintenance.KEPT_SNAPSHOTS
        assert said() == before
        for _ in range(3):
            lake.append(empty, spec)
        assert said() == before


def test_commits_that_come_just_before_expiry_push_nothing_out(
    own_spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark, spec = own_spark, lake.RAW_DEAD_LETTERS._replace(name="raw.some")
    lake.ensure(spark, spec)
    empty = spark.createDataFrame([], spark.table(spec.identifier).schema)
    lake.append(empty, spec)
    said = {lake.STREAM: "quiet", lake.INCARNATION: "1", lake.EPOCH: "7"}
    lake.append(empty, spec, said | lake.bringing(settings, spec.name, Position({"T": {0: 5}}), 70))
    load = maintenance._iceberg

    def late(*about: object) -> object:
        if not lake.position(settings, spec.name).loads:
            for number in range(maintenance.KEPT_SNAPSHOTS):
                brought = Position(loads=frozenset({str(number)}))
                lake.append(empty, spec, lake.bringing(settings, spec.name, brought, 0))
        return load(*about)

    lake.append(empty, spec)
    monkeypatch.setattr(maintenance, "_iceberg", late)
    assert maintenance.expire_snapshots(spark, settings, spec.name, all_old().snapshots_ms) == 3
    assert lake.committed_epoch(settings, spec.name, "quiet", 1) == (1, 7)
    assert lake.position(settings, spec.name) == Position({"T": {0: 5}}, frozenset({"0", "1"}))


def test_a_rewrite_of_a_table_that_is_replaced_says_what_the_table_said(
    own_spark: SparkSession, settings: Settings
) -> None:
    spark = own_spark
    lake.ensure(spark, SORTED)
    position = Position({"T": {0: 7}})
    lake.overwrite(things(spark, 0, 10), SORTED, {lake.POSITION: Position({"T": {0: 99}}).to_text()})
    lake.overwrite(
        things(spark, 0, 10, day=1).union(things(spark, 10, 10, day=1)).repartition(2),
        SORTED,
        {lake.POSITION: position.to_text(), "tidemark.model_id": "m"},
    )
    lake.append(things(spark, 20, 5, day=1), SORTED)
    maintenance.maintain_table(spark, settings, SORTED, old=all_old())
    newest = lake.current_snapshot(settings, SORTED.name)
    assert newest is not None
    assert newest.summary["operation"] == "replace"
    assert newest.summary[lake.POSITION] == position.to_text()
    assert newest.summary["tidemark.model_id"] == "m"


def test_a_tagged_snapshot_is_spared_until_its_base_is_gone(
    own_spark: SparkSession, settings: Settings
) -> None:
    spark = own_spark
    lake.ensure(spark, SORTED)
    lake.append(things(spark, 0, 10), SORTED)
    tagged = lake.current_snapshot(settings, SORTED.name)
    assert tagged is not None
    base = settings.paths.indices / "pins" / "20240301T000000000Z-abc"
    base.mkdir(parents=True)
    (base / "manifest.json").write_text("{}")
    lake.tag(spark, SORTED.name, tagged.id, f"base-{base.name}")
    lake.tag(spark, SORTED.name, tagged.id, "mine")
    for n in range(1, 5):
        lake.append(things(spark, 100 * n, 10), SORTED)
    maintenance.maintain_table(spark, settings, SORTED, old=all_old())
    assert lake.read(spark, SORTED.name, tagged.id).count() == 10
    shutil.rmtree(base)
    report = maintenance.maintain_table(spark, settings, SORTED, old=all_old())
    assert report is not None
    assert report.tags_dropped == (f"base-{base.name}",)
    assert lake.read(spark, SORTED.name, tagged.id).count() == 10
    lake.drop_tag(spark, SORTED.name, "mine")
    maintenance.maintain_table(spark, settings, SORTED, old=all_old())
    with pytest.raises(Exception, match="snapshot"):
        lake.read(spark, SORTED.name, tagged.id).count()
    assert lake.read(spark, SORTED.name).count() == 50


def test_each_day_leaves_a_snapshot_that_says_by_itself_what_the_table_held(
    own_spark: SparkSession, settings: Settings
) -> None:
    spark, spec = own_spark, lake.RAW_DEAD_LETTERS._replace(name="raw.some")
    lake.ensure(spark, spec)
    empty = spark.createDataFrame([], spark.table(spec.identifier).schema)
    midnight = datetime.combine(datetime.now(UTC).date(), datetime.min.time(), UTC)

    def maintained(days_later: int) -> maintenance.TableReport:
        now_ms = int((midnight + timedelta(days=days_later, minutes=5)).timestamp() * 1000)
        old = Ages(now_ms, now_ms - 1, now_ms - 25 * 3_600_000)
        report = maintenance.maintain_table(spark, settings, spec, old=old, has_orphans=False)
        assert report is not None
        return report

    def tagged(days_later: int) -> int:
        table = lake.open_table(settings, spec.name)
        assert table is not None
        return table.metadata.refs[f"daily-{(midnight + timedelta(days_later)).date()}"].snapshot_id

    lake.append(empty, spec, {lake.POSITION: Position({"T": {0: 10}}).to_text()})
    alone = lake.current_snapshot(settings, spec.name)
    # Two that commit at once know nothing of each other.
    lake.append(empty, spec, {lake.POSITION: Position(loads=frozenset({"a"})).to_text()})
    assert maintained(0).tags_made == ()  # nothing is of the day before
    assert maintained(1).tags_made == (f"daily-{(midnight + timedelta(1)).date()}",)
    assert maintained(1).tags_made == ()
    held = Position({"T": {0: 10}}, frozenset({"a"}))
    assert alone is not None
    assert tagged(1) == alone.id
    assert lake.position(settings, spec.name, tagged(1)) == Position({"T": {0: 10}})
    assert lake.position(settings, spec.name) == held

    lake.append(empty, spec, lake.bringing(settings, spec.name, Position(), 0))  # the next one knows of both
    maintained(2)
    assert lake.position(settings, spec.name, tagged(2)) == held
    undone = undo.plan(settings, [spec.name], f"daily-{(midnight + timedelta(1)).date()}")
    assert [move.to_id for move in undone.moves] == [alone.id]
    last = 1 + settings.maintenance.daily_tags
    assert maintained(last).tags_dropped == (f"daily-{(midnight + timedelta(1)).date()}",)


def test_old_orphans_go_and_young_ones_stay(own_spark: SparkSession, settings: Settings) -> None:
    spark = own_spark
    lake.ensure(spark, SORTED)
    lake.append(things(spark, 0, 10), SORTED)
    (files,) = files_of(spark, SORTED).values()
    old, young = files[0].with_name("old.parquet"), files[0].with_name("young.parquet")
    for orphan in (old, young):
        orphan.write_bytes(b"12345")
    a_week_ago = time.time() - 7 * 86_400
    for path in (old, files[0]):  # a file that is needed stays, however old it is
        os.utime(path, (a_week_ago, a_week_ago))
    report = maintenance.maintain_table(spark, settings, SORTED)
    assert report is not None
    assert report.orphans == (1, 5)
    assert not old.exists()
    assert young.exists()
    assert lake.read(spark, SORTED.name).count() == 10


def test_old_rows_go_by_whole_days(own_spark: SparkSession, settings: Settings) -> None:
    spark, spec = own_spark, SORTED._replace(retention_days=30)
    lake.ensure(spark, spec)
    for day in range(3):
        lake.append(things(spark, 10 * day, 10, day=day), spec)
    now = int((DAY + timedelta(days=31, hours=5)).timestamp() * 1000)
    report = maintenance.maintain_table(spark, settings, spec, old=Ages(now, 0, 0))
    assert report is not None
    assert report.rows_deleted == 10
    assert {row[1].date().day for row in rows_of(spark, spec)} == {2, 3}  # type: ignore[attr-defined]
    again = maintenance.maintain_table(spark, settings, spec, old=Ages(now, 0, 0))
    assert again is not None
    assert again.rows_deleted == 0


def test_what_tables_take_up_is_recorded(
    own_spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark = own_spark
    lake.ensure(spark, SORTED)
    for n in range(4):
        lake.append(things(spark, 10 * n, 10, day=n // 2), SORTED)
    monkeypatch.setattr(maintenance, "specs", lambda: {SORTED.name: SORTED})
    storage.survey(spark, settings)
    lake.append(things(spark, 0, 10, day=2), SORTED)
    storage.survey(spark, settings, {SORTED.name: maintenance.Removed(3, 30)})
    (found,) = storage.newest(settings)
    assert (found["files"], found["orphan_files"], found["orphan_bytes"]) == (5, 3, 30)
    assert (found["partitions"], found["max_files_per_partition"]) == (3, 2)
    assert (found["small_files"], found["small_file_pct"]) == (
        2,
        50.0,
    )  # of the older days; one each is the rest
    assert (found["snapshots"], found["tags"], found["manifests"]) == (5, 0, 5)
    location = settings.home / "lake" / "warehouse" / "features" / "sorted_things"
    on_disk = sum(p.stat().st_size for p in location.rglob("*") if p.is_file() and p.suffix != ".crc")
    assert found["stored_bytes"] == on_disk
    assert 0 < found["metadata_bytes"] == on_disk - found["bytes"]
    told = (settings.paths.metrics / "storage.prom").read_text("utf-8")
    assert f'tidemark_storage_stored_bytes{{kind="table",name="{SORTED.name}"}} {float(on_disk)}' in told
    price = settings.maintenance.usd_micros_per_gib_month
    assert found["cost_usd_micros_month"] == -(-on_disk * price // 2**30) > 0
    (before,) = (row for row in lake.read(spark, "ops.storage").collect() if row["files"] == 4)
    assert (before["small_files"], before["small_file_pct"], before["orphan_files"]) == (1, 50.0, None)


# ------------------------------------------------------------------------------------------------ bases and deltas

SPEC = INDICES["pin_counts"]


def epoch_of(settings: Settings, number: int, day: date, mark: str | None = None) -> None:
    """Commit an epoch that ends at offset `number`, on a day."""
    path = delta.table_path(settings.paths.delta, SPEC.name, mark or lineage(SPEC))
    ends = [Position({"T": {0: offset}}) for offset in (number - 1, number)]
    marker = delta.Marker("user_interactions", 1, number, *ends, records=1)
    facts = fact.table(SPEC, [])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(delta, "datetime", _Clock(day))
        assert delta.DeltaWriter(SPEC, path).commit(marker, facts)


class _Clock:
    """Stands for the module `datetime` on another day."""

    def __init__(self, day: date) -> None:
        self.UTC = UTC
        self.datetime = self
        self._now = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)

    def now(self, zone: object) -> datetime:
        return self._now


def base_of(settings: Settings, cut: int, hours_ago: float) -> str:
    """A base whose cut is at an offset, built so long ago."""
    versions = Versions(settings.paths.indices, SPEC.name)
    version = versions.new_version(lineage(SPEC))
    meta = build.Meta(version, Position({"T": {0: cut}}), None)
    build.build_local(SPEC, fact.table(SPEC, []), versions.new_path(version), meta)
    manifest = versions.path(version) / "manifest.json"
    written = json.loads(manifest.read_text())
    written["built_at"] = (datetime.now(UTC) - timedelta(hours=hours_ago)).isoformat()
    manifest.write_text(json.dumps(written))
    return version


def test_epochs_go_that_every_kept_base_has_and_a_live_tailer_misses_nothing(settings: Settings) -> None:
    today = datetime.now(UTC).date()
    days = [today - timedelta(days=n) for n in (6, 5, 4, 3, 0)]
    for n, day in enumerate(days, 1):
        epoch_of(settings, n, day)
    path = delta.table_path(settings.paths.delta, SPEC.name, lineage(SPEC))
    tailer = delta.Tailer(SPEC, path)
    assert sorted(epoch.marker.epoch for epoch in tailer.snapshot()) == [1, 2, 3, 4, 5]
    versions = Versions(settings.paths.indices, SPEC.name)
    confirmed, dropped, *kept = (base_of(settings, cut, 100 - cut) for cut in (2, 3, 4, 5))
    versions.confirm(confirmed)
    for name, days_ago in (("died.building", 9), ("runs.building", 0)):
        (versions.folder / name).mkdir()
        os.utime(versions.folder / name, (time.time() - days_ago * 86_400,) * 2)
    report = maintenance.maintain_index(settings, SPEC)
    assert [manifest.version for manifest in report.bases_dropped] == [dropped]
    assert versions.names() == [confirmed, *kept]
    assert [path.name for path in versions.folder.glob("*.building")] == ["runs.building"]
    assert report.epochs_retired == 2  # what comes after the confirmed base's cut stays, however old it is
    assert [marker.epoch for marker in delta.markers(path)] == [3, 4, 5]
    assert all(reaches(settings.paths.delta, manifest) for manifest in versions.manifests())
    assert (delta.floor(path), report.lineages_dropped) == (Position({"T": {0: 2}}), ())
    versions.confirm(kept[1])
    epoch_of(settings, 6, today)
    again = maintenance.maintain_index(settings, SPEC)
    assert (len(again.bases_dropped), again.epochs_retired) == (1, 2)
    assert [marker.epoch for marker in delta.markers(path)] == [5, 6]
    assert polled(tailer) == [6]


def polled(tailer: delta.Tailer) -> list[int]:
    """The epochs that a tailer finds up to the head of the log."""
    found = []
    while tailer.version < tailer.head():
        epochs = tailer.poll()
        assert epochs is not None
        found += [epoch.marker.epoch for epoch in epochs]
    return found


def test_a_delta_is_compacted_beside_its_writer(own_spark: SparkSession, settings: Settings) -> None:
    today = datetime.now(UTC).date()
    path = delta.table_path(settings.paths.delta, SPEC.name, lineage(SPEC))
    for n in range(1, 8):
        epoch_of(settings, n, today)
    base_of(settings, 1, 0)
    tailer = delta.Tailer(SPEC, path)
    assert len(list(tailer.snapshot())) == 7
    assert maintenance.maintain_index(settings, SPEC).files_rewritten == 7
    epoch_of(settings, 8, today)
    assert len(delta.sizes(path)[today.isoformat()]) == 2
    assert [marker.epoch for marker in delta.markers(path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert polled(tailer) == [8]
    assert len(list(delta.Tailer(SPEC, path).snapshot())) == 8
    assert MarkerCopy(own_spark, settings).run() == 8  # as if they had been copied before they were compacted
    copied = [(row["epoch"], row["facts"]) for row in lake.read(own_spark, "ops.epochs").collect()]
    assert sorted(copied) == [(n, 0) for n in range(1, 9)]


def test_the_delta_of_a_lineage_that_no_base_has_goes_once_it_is_old(settings: Settings) -> None:
    today = datetime.now(UTC).date()
    for mark, days_ago in (("old", 9), ("young", 0), ("based", 9), (lineage(SPEC), 9)):
        epoch_of(settings, 1, today - timedelta(days=days_ago), mark)
    base_of(settings, 1, 0)
    manifest = Versions(settings.paths.indices, SPEC.name).path(base_of(settings, 1, 0)) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"lineage": "based"}))
    assert maintenance.maintain_index(settings, SPEC).lineages_dropped == ("old",)
    left = {path.name for path in (settings.paths.delta / SPEC.name).iterdir()}
    assert left == {"young", "based", lineage(SPEC)}


def test_what_indices_take_up(settings: Settings) -> None:
    epoch_of(settings, 1, datetime.now(UTC).date())
    base_of(settings, 1, 0)
    bases, deltas = storage.measure_index(settings, SPEC)
    assert (bases["kind"], bases["name"], bases["snapshots"]) == ("bases", SPEC.name, 1)
    assert (deltas["kind"], deltas["name"]) == ("delta", f"{SPEC.name}/{lineage(SPEC)}")
    assert (deltas["files"], deltas["small_files"], deltas["max_files_per_partition"]) == (1, 0, 1)
    for row, folder in ((bases, settings.paths.indices), (deltas, settings.paths.delta)):
        on_disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        assert on_disk == row["stored_bytes"] > row["bytes"] > 0


def test_the_assets_do_it_and_say_what_they_did(
    own_spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "specs", lambda: {SORTED.name: SORTED})
    lake.ensure(own_spark, SORTED)
    for n in range(3):
        lake.append(things(own_spark, 10 * n, 10), SORTED)
    dropped, *kept = (base_of(settings, 1, 100 - n) for n in range(3))
    result = dg.materialize(
        [upkeep.table_maintenance(SORTED), upkeep.index_maintenance(SPEC), upkeep.orphans, upkeep.storage],
        resources={"platform": Platform(lambda: settings, gates.examine)},
    )
    said = {
        "/".join(event.asset_key.path): {
            n: value.value for n, value in event.materialization.metadata.items()
        }
        for event in result.get_asset_materialization_events()
        if event.asset_key is not None
    }
    assert said["maintenance/features/sorted_things"]["files_rewritten"] == 3
    assert said[f"maintenance/indices/{SPEC.name}"]["bases_dropped"] == [dropped]
    assert said["maintenance/orphans"]["tables"] == {SORTED.name: 0}
    assert said["ops/storage"]["stored_bytes"] > said["ops/storage"]["bytes"] > 0
    assert Versions(settings.paths.indices, SPEC.name).names() == kept
    (event,) = lake.read(own_spark, "ops.index_versions").collect()
    assert (event["index"], event["version"], event["event"]) == (SPEC.name, dropped, "deleted")
    assert {row["kind"] for row in storage.newest(settings)} == {"table", "bases"}
