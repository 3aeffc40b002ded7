"""Maintenance: keeping tables, deltas and bases small and quick to read, by what each table declares of itself.

Belongs here: the steps for a lake table (old rows, compaction, manifests, days, snapshots, orphans), and for the deltas
and the bases of an index. Does not belong here: what a table declares (`lake`), how a delta is rewritten
(`indexing.delta`), what all of it takes up (`storage`), when it runs (`assets.maintenance`).

Every step may run beside writers, and beside itself. Iceberg decides a race by refusing one of two commits: whoever
appends wins or tries again by itself, and a step that loses is done again from the start. What a commit says of a
table's position and epochs outlives the commit: before snapshots expire, a newer one says it too (`lake.standing`).
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipelines import failpoints, index_rows, lake
from pipelines.errors import TidemarkError
from pipelines.indexing import delta
from pipelines.indexing.base import Manifest
from pipelines.indexing.spec import IndexSpec, lineage
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES
from pipelines.ingest import writers
from pipelines.lake import Snapshot, TableSpec
from pipelines.settings import CATALOG, Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)
T = TypeVar("T")

SMALL = 0.5
"""Of its target size, below which a file is small. Not more: of what compaction cuts into files of about the target
size, none is smaller than that, so that what was compacted is not compacted again."""
KEPT_SNAPSHOTS = 2
MAX_MANIFESTS = 20
ATTEMPTS = 6
CONCURRENT_REWRITES = 2
BASE_TAG = "base-"
DAILY_TAG = "daily-"


class MaintenanceError(TidemarkError):
    """A step lost against writers again and again, or the named thing is not there."""


class Ages(NamedTuple):
    """What is old: everything from before these times (ms since 1970)."""

    now_ms: int
    snapshots_ms: int
    orphans_ms: int


class Removed(NamedTuple):
    """How many files were removed, and their size."""

    files: int
    size_bytes: int


class TableReport(NamedTuple):
    """What maintenance did to a table.

    Attributes:
        table: Its name.
        rows_deleted: Rows older than the declared retention.
        files_rewritten: Files that compaction took.
        files_written: Files that it made of them.
        bytes_rewritten: Size of those that it took.
        manifests_rewritten: Manifests that were merged.
        snapshots_expired: Snapshots that are gone.
        tags_made: Tags of days.
        tags_dropped: Tags of bases that are gone, and of old days.
        orphans: Files that nothing referred to, removed; None where it did not look for any.
        retries: Steps that lost a race and were done again.
        seconds: How long it took.
    """

    table: str
    rows_deleted: int = 0
    files_rewritten: int = 0
    files_written: int = 0
    bytes_rewritten: int = 0
    manifests_rewritten: int = 0
    snapshots_expired: int = 0
    tags_made: tuple[str, ...] = ()
    tags_dropped: tuple[str, ...] = ()
    orphans: Removed | None = None
    retries: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For `--json` and for Dagster's pages."""
        orphans = self.orphans._asdict() if self.orphans else None
        tags = {"tags_made": list(self.tags_made), "tags_dropped": list(self.tags_dropped)}
        return {**self._asdict(), **tags, "orphans": orphans}


class IndexReport(NamedTuple):
    """What maintenance did to the bases and deltas of an index.

    Attributes:
        name: The index.
        bases_dropped: The manifests of versions that need not be kept any more.
        lineages_dropped: Deltas that no base refers to any more.
        epochs_retired: Epochs that every kept base has.
        files_rewritten: Delta files that compaction took.
        files_removed: Delta files that were vacuumed.
        copied_days_dropped: Days of a lineage whose copied facts went, for its delta has none of them any more.
        seconds: How long it took.
    """

    name: str
    bases_dropped: tuple[Manifest, ...] = ()
    lineages_dropped: tuple[str, ...] = ()
    epochs_retired: int = 0
    files_rewritten: int = 0
    files_removed: int = 0
    copied_days_dropped: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For `--json` and for Dagster's pages."""
        versions = [manifest.version for manifest in self.bases_dropped]
        return {**self._asdict(), "bases_dropped": versions, "lineages_dropped": list(self.lineages_dropped)}


def specs() -> dict[str, TableSpec]:
    """Every declared table by its name, those of the indices' rows too."""
    of_indices = [
        make(spec) for spec in INDICES.values() for make in (index_rows.table, index_rows.delta_table)
    ]
    return lake.TABLES | {table.name: table for table in of_indices}


def ages(settings: Settings, now_ms: int | None = None) -> Ages:
    """What is old by these settings, now."""
    now = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    keep = settings.maintenance
    return Ages(now, now - keep.snapshot_hours * 3_600_000, now - keep.orphan_hours * 3_600_000)


# ------------------------------------------------------------------------------------------------ tables


def maintain_table(
    spark: SparkSession,
    settings: Settings,
    spec: TableSpec,
    *,
    old: Ages | None = None,
    has_orphans: bool = True,
) -> TableReport | None:
    """Do all that a table's declaration asks for; None if there is no such table yet.

    Args:
        spark: The session.
        settings: Where the table is, and what is old.
        spec: What the table declares.
        old: What is old, where the settings are not to say it.
        has_orphans: Whether to look for orphans too, which lists all of the table's folder.

    Raises:
        MaintenanceError: A step lost against other writers again and again. Done steps stay done; a later run goes on.
    """
    if lake.current_snapshot(settings, spec.name) is None:
        return None
    started = time.monotonic()
    old = old or ages(settings)
    steps = _Retries(settings, spec.name)
    steps.run(lambda: lake.declare(spark, settings, spec))
    rows = steps.run(lambda: delete_old_rows(spark, spec, old.now_ms))
    taken, made, size = steps.run(lambda: compact(spark, settings, spec))
    failpoints.hit("maintenance.after_compaction")
    report = TableReport(
        spec.name,
        rows_deleted=rows,
        files_rewritten=taken,
        files_written=made,
        bytes_rewritten=size,
        manifests_rewritten=steps.run(lambda: rewrite_manifests(spark, settings, spec.name)),
        tags_made=steps.run(lambda: tag_day(spark, settings, spec.name, old.now_ms)),
        tags_dropped=steps.run(lambda: drop_tags(spark, settings, spec.name, old.now_ms)),
        snapshots_expired=steps.run(lambda: expire_snapshots(spark, settings, spec.name, old.snapshots_ms)),
    )
    failpoints.hit("maintenance.after_expiry")
    if has_orphans:
        report = report._replace(orphans=remove_orphans(spark, settings, spec, old))
    return report._replace(retries=steps.retries, seconds=round(time.monotonic() - started, 2))


class _Retries:
    """Runs steps, again where they lose a race, and counts how often they did.

    Each takes its turn with an undo: what a step's commit says of a raw table must still be so when it is made.
    """

    def __init__(self, settings: Settings, table: str) -> None:
        self.settings = settings
        self.table = table
        self.retries = 0

    def run(self, step: Callable[[], T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                with writers.appending(self.settings):
                    return step()
            except Exception as error:
                if not lake.is_lost_race(error):
                    raise
                if attempt == ATTEMPTS - 1:
                    raise MaintenanceError(
                        f"lost {ATTEMPTS} times against other writers: {str(error).strip().splitlines()[0]}",
                        where=self.table,
                        remedy="run `tidemark maintain` again when less is written",
                    ) from error
                self.retries += 1
                log.info("%s: lost a race, again: %s", self.table, str(error).splitlines()[0])
                time.sleep(0.2 * 2**attempt)
        raise AssertionError


def delete_old_rows(spark: SparkSession, spec: TableSpec, now_ms: int) -> int:
    """Delete the partitions that are wholly older than the declared retention; how many rows that were."""
    if spec.retention_days is None:
        return 0
    unit, column = _partitioning_time(spec)
    day = _day(now_ms) - timedelta(days=spec.retention_days)
    first = day.replace(day=1) if unit == "months" else day
    condition = f"`{column}` < TIMESTAMP '{first.isoformat()} 00:00:00'"
    rows = int(spark.table(spec.identifier).filter(condition).count())
    if rows:
        lake.delete(spark, spec, condition)
    return rows


def _partitioning_time(spec: TableSpec) -> tuple[str, str]:
    """`days` or `months`, and the column that says how old a row is.

    Raises:
        MaintenanceError: The table declares a retention, but not by what.
    """
    for transform in spec.partitioned_by:
        if found := re.fullmatch(r"(days|months)\((\w+)\)", transform):
            return found[1], found[2]
    raise MaintenanceError(
        "a table with a retention must be partitioned by days or months of a time",
        where=spec.name,
        remedy="declare partitioned_by, or no retention_days",
    )


def compact(spark: SparkSession, settings: Settings, spec: TableSpec) -> tuple[int, int, int]:
    """Rewrite the small files of each partition to the declared size, in the declared order.

    Returns:
        How many files were taken, how many were made of them, and the bytes of those that were taken.
    """
    action = _actions(spark).rewriteDataFiles(_iceberg(spark, spec.name))
    action = action.sort() if spec.sorted_by else action.binPack()
    options = {
        "target-file-size-bytes": spec.target_file_bytes,
        "min-file-size-bytes": int(spec.target_file_bytes * SMALL),
        "min-input-files": 2,
        "max-concurrent-file-group-rewrites": CONCURRENT_REWRITES,
        "partial-progress.enabled": "true",
        "partial-progress.max-failed-commits": 0,
    }
    for name, value in options.items():
        action = action.option(name, str(value))
    done = _saying(action, settings, spec.name).execute()
    if failed := done.failedDataFilesCount():
        raise MaintenanceError(f"rewrite commits failed: {failed} files were not rewritten", where=spec.name)
    return done.rewrittenDataFilesCount(), done.addedDataFilesCount(), done.rewrittenBytesCount()


def rewrite_manifests(spark: SparkSession, settings: Settings, name: str) -> int:
    """Merge the manifests where there are many; how many were."""
    table = _iceberg(spark, name)
    if len(table.currentSnapshot().dataManifests(table.io())) <= MAX_MANIFESTS:
        return 0
    done = _saying(_actions(spark).rewriteManifests(table), settings, name).execute()
    return len(list(done.rewrittenManifests()))


def tag_day(spark: SparkSession, settings: Settings, name: str, now_ms: int) -> tuple[str, ...]:
    """Keep the table as it was when the day (UTC) began, as a tag; the tag's name, if it is new.

    It is the last snapshot of the day before that says by itself what all before it say: those will expire, and an undo
    to it must still know what the table held. None, where that is not kept any more, or the table is younger.
    """
    today = _day(now_ms)
    label = f"{DAILY_TAG}{today.isoformat()}"
    if label in tags(settings, name):
        return ()
    began_ms = int(datetime(today.year, today.month, today.day, tzinfo=UTC).timestamp() * 1000)
    before = [s for s in lake.ancestors(settings, name) if s.committed_at_ms < began_ms]
    for place, snapshot in enumerate(before):
        if _held(before[place : place + 1]) == _held(before[place:]):
            lake.tag(spark, name, snapshot.id, label)
            return (label,)
    return ()


def _held(snapshots: Sequence[Snapshot]) -> dict[str, str | None]:
    """What they say that a table holds. Not the epochs: an undo ends those, and new ones begin."""
    said = lake.standing(snapshots)
    return {name: said.get(name) for name in (lake.POSITION, lake.MAX_BROKER_TIME_MS)}


def drop_tags(spark: SparkSession, settings: Settings, name: str, now_ms: int) -> tuple[str, ...]:
    """Drop the tags of bases that are gone, and of days before the last few.

    Tags are listed first: a base that is made meanwhile has its own after.
    """
    found = tags(settings, name)
    kept = {
        BASE_TAG + version for index in INDICES for version in Versions(settings.paths.indices, index).names()
    }
    oldest = _day(now_ms) - timedelta(days=settings.maintenance.daily_tags - 1)
    dropped = tuple(
        label
        for label in found
        if (label.startswith(BASE_TAG) and label not in kept)
        or (label.startswith(DAILY_TAG) and label < f"{DAILY_TAG}{oldest.isoformat()}")
    )
    for label in dropped:
        lake.drop_tag(spark, name, label)
    return dropped


def _day(now_ms: int) -> date:
    return datetime.fromtimestamp(now_ms / 1000, UTC).date()


def expire_snapshots(spark: SparkSession, settings: Settings, name: str, before_ms: int) -> int:
    """Expire the snapshots from before a time that no tag spares, with the files that only they have; how many.

    What they say of positions and epochs is said by a younger one first, and only age decides what is younger: whatever
    is committed until they expire may push out one that is kept for being among the newest. A table that is replaced
    whole needs none: each commit that replaces it says all.
    """
    found = list(lake.ancestors(settings, name))
    young = [s for s in found if s.committed_at_ms >= before_ms]
    if _snapshots(settings, name, before_ms) <= {s.id for s in found[:KEPT_SNAPSHOTS]}:
        return 0
    is_replaced = any(lake.is_replacing(snapshot) for snapshot in found)
    kept = found[: max(KEPT_SNAPSHOTS, len(young))] if is_replaced else young
    if lake.standing(found) != lake.standing(kept):
        _saying(_iceberg(spark, name).newFastAppend(), settings, name, "set").commit()
        failpoints.hit("maintenance.after_standing")
    before = _snapshots(settings, name)
    _iceberg(spark, name).expireSnapshots().expireOlderThan(before_ms).retainLast(KEPT_SNAPSHOTS).commit()
    return len(before - _snapshots(settings, name))


def remove_orphans(
    spark: SparkSession, settings: Settings, spec: TableSpec, old: Ages | None = None
) -> Removed | None:
    """Remove the old files that no snapshot refers to: those of writers that died. None if there is no such table."""
    if lake.current_snapshot(settings, spec.name) is None:
        return None
    before_ms = (old or ages(settings)).orphans_ms
    before = datetime.fromtimestamp(before_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    given = f"table => '{spec.identifier}', older_than => TIMESTAMP '{before}', dry_run => true"
    found = spark.sql(f"CALL {CATALOG}.system.remove_orphan_files({given})").collect()
    size = 0
    for row in found:
        path = _path(spark, row["orphan_file_location"])
        files = path.getFileSystem(spark._jsc.hadoopConfiguration())
        size += files.getFileStatus(path).getLen()
        files.delete(path, False)
    return Removed(len(found), size)


def _snapshots(settings: Settings, name: str, before_ms: int | None = None) -> set[int]:
    """The ids of all snapshots; or of those from before a time that no tag spares."""
    table = lake.open_table(settings, name)
    if table is None:
        return set()
    spared = {ref.snapshot_id for ref in table.metadata.refs.values() if ref.snapshot_ref_type == "tag"}
    return {
        s.snapshot_id
        for s in table.metadata.snapshots
        if before_ms is None or (s.timestamp_ms < before_ms and s.snapshot_id not in spared)
    }


def tags(settings: Settings, name: str) -> list[str]:
    """The tags of a table; none if there is no such table."""
    table = lake.open_table(settings, name)
    refs = table.metadata.refs if table is not None else {}
    return sorted(label for label, ref in refs.items() if ref.snapshot_ref_type == "tag")


def _saying(update: Any, settings: Settings, name: str, method: str = "snapshotProperty") -> Any:
    """An Iceberg update whose commit says what those before it said."""
    for key, value in lake.standing(lake.ancestors(settings, name)).items():
        update = getattr(update, method)(key, value)
    return update


def _iceberg(spark: SparkSession, name: str) -> Any:
    """The table in Java: its actions take a summary for what they commit, which the SQL procedures do not."""
    load = _jvm(spark).org.apache.iceberg.spark.Spark3Util.loadIcebergTable
    return load(spark._jsparkSession, f"{CATALOG}.{name}")


def _actions(spark: SparkSession) -> Any:
    return _jvm(spark).org.apache.iceberg.spark.actions.SparkActions.get(spark._jsparkSession)


def _jvm(spark: SparkSession) -> Any:
    return spark._jvm


def _path(spark: SparkSession, location: str) -> Any:
    return _jvm(spark).org.apache.hadoop.fs.Path(location)


# ------------------------------------------------------------------------------------------------ indices


def maintain_index(settings: Settings, spec: IndexSpec) -> IndexReport:
    """Drop the bases that need not be kept, and of the deltas what every kept base has; compact and vacuum the rest."""
    started = time.monotonic()
    keep, retention = settings.maintenance, settings.retention
    versions = Versions(settings.paths.indices, spec.name)
    before = versions.manifests()
    gone = versions.prune(keep=retention.bases, hours=retention.hours)
    dropped = tuple(manifest for manifest in before if manifest.version in gone)
    kept = [manifest for manifest in before if manifest.version not in gone]
    young = (datetime.now(UTC) - timedelta(hours=retention.hours)).date()
    lineages, retired, rewritten, removed = [], 0, 0, 0
    for path in deltas(settings, spec.name):
        cuts = [manifest.cut for manifest in kept if manifest.lineage == path.name]
        if not cuts and path.name != lineage(spec) and delta.newest_day(path) < young:
            shutil.rmtree(path)
            lineages.append(path.name)
            continue
        if cuts:
            retired += delta.retire(path, delta.first_needed_day(path, cuts, young))
        rewritten += delta.compact(path)
        removed += delta.vacuum(path, keep.vacuum_hours, keep.orphan_hours)
    copied = index_rows.delta_table(spec).name
    days = _Retries(settings, copied).run(lambda: drop_copied_days(settings, spec))
    seconds = round(time.monotonic() - started, 2)
    return IndexReport(spec.name, dropped, tuple(lineages), retired, rewritten, removed, days, seconds)


def drop_copied_days(settings: Settings, spec: IndexSpec) -> int:
    """Delete of `index.<name>_delta` the days that the deltas do not hold any more; how many, each of one lineage."""
    table = lake.open_table(settings, index_rows.delta_table(spec).name)
    if table is None:
        return 0
    held = {(path.name, day) for path in deltas(settings, spec.name) for day in delta.days(path)}
    copied = {
        (part["lineage"], part["epoch_date"])
        for part in table.inspect.partitions().column("partition").to_pylist()
    }
    gone = sorted(copied - held)
    if gone:
        table.delete(" OR ".join(f"(lineage = '{mark}' AND epoch_date = '{day}')" for mark, day in gone))
    return len(gone)


def deltas(settings: Settings, index: str) -> list[Path]:
    """The folders of an index's deltas, one a lineage."""
    return sorted(path.parent for path in (settings.paths.delta / index).glob("*/_delta_log"))
