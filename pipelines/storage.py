"""What tables, bases and deltas take up and cost: measured, kept in `ops.storage`, and told to Prometheus.

Belongs here: files, bytes, small files, snapshots and orphans of each. Does not belong here: making it less
(`maintenance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from pipelines import lake, maintenance
from pipelines.indexing import delta
from pipelines.indexing.spec import IndexSpec
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES
from pipelines.lake import TableSpec
from pipelines.maintenance import Removed
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

METRICS = "storage.prom"
_GAUGES = {
    "files": "Files that are read.",
    "bytes": "Size of the files that are read.",
    "stored_bytes": "Size of all that is stored, history and metadata too.",
    "metadata_bytes": "Size of the metadata.",
    "partitions": "Partitions.",
    "max_files_per_partition": "Files of the partition that has the most.",
    "small_files": "Files below half of their target size, one a partition apart.",
    "small_file_pct": "Share of small files.",
    "snapshots": "Snapshots of a table, or bases of an index.",
    "manifests": "Manifests of the newest snapshot.",
    "orphan_files": "Files that nothing referred to, removed when they were looked for last.",
    "orphan_bytes": "Size of those.",
    "cost_usd_micros_month": "What it costs to store, in micro-dollars a month.",
}
_GIB = 2**30


def small_files(
    partitions: Mapping[Any, Sequence[int]], target_bytes: int, hot: Any = None
) -> tuple[int, float]:
    """How many files are too small, and their share in percent.

    Args:
        partitions: The sizes of each partition's files.
        target_bytes: How large a file should be; below half of it, it is small.
        hot: The partition that is being written, and does not count.

    Examples:
        >>> small_files({"mon": [100, 10], "tue": [100, 10, 10], "wed": [1] * 99}, 100, hot="wed")
        (1, 20.0)
    """
    cold = [sizes for partition, sizes in partitions.items() if partition != hot]
    small = sum(max(0, sum(size < maintenance.SMALL * target_bytes for size in sizes) - 1) for sizes in cold)
    files = sum(map(len, cold))
    return small, round(100 * small / files, 2) if files else 0.0


def file_sizes(spark: SparkSession, spec: TableSpec) -> dict[str, list[int]]:
    """The sizes of the newest snapshot's files, by partition as text; of a table without partitions, by ''."""
    files = spark.table(f"{spec.identifier}.files")
    column = "cast(partition AS string)" if "partition" in files.columns else "''"
    found: dict[str, list[int]] = {}
    for row in files.selectExpr(f"{column} AS place", "file_size_in_bytes AS size").collect():
        found.setdefault(row["place"], []).append(row["size"])
    return found


def measure_table(
    spark: SparkSession, settings: Settings, spec: TableSpec, orphans: Removed | None = None
) -> dict[str, Any] | None:
    """A table as a row of `ops.storage`, with the orphans that were removed; None if there is no such table yet."""
    table = lake.open_table(settings, spec.name)
    if table is None:
        return None
    sizes = file_sizes(spark, spec)
    hot = max(sizes, default=None) if spec.partitioned_by else None
    location = table.location()
    snapshot = table.current_snapshot()
    return {
        "kind": "table",
        "name": spec.name,
        "snapshots": len(table.metadata.snapshots),
        "tags": len(maintenance.tags(settings, spec.name)),
        "manifests": len(snapshot.manifests(table.io)) if snapshot else 0,
        "stored_bytes": _stored(spark, location),
        "metadata_bytes": _stored(spark, f"{location}/metadata"),
        "orphan_files": orphans.files if orphans else None,
        "orphan_bytes": orphans.size_bytes if orphans else None,
        **_counted(sizes, spec.target_file_bytes, hot),
    }


def measure_index(settings: Settings, spec: IndexSpec) -> list[dict[str, Any]]:
    """The bases of an index, and each of its deltas, as rows of `ops.storage`."""
    versions = Versions(settings.paths.indices, spec.name)
    rows: list[dict[str, Any]] = []
    if manifests := versions.manifests():
        files = [file.size_bytes for m in manifests for shard in m.shards for file in shard.files]
        rows.append(
            {
                "kind": "bases",
                "name": spec.name,
                "files": len(files),
                "bytes": sum(files),
                "snapshots": len(manifests),
                "stored_bytes": _folder_bytes(versions.folder),
            }
        )
    for path in maintenance.deltas(settings, spec.name):
        sizes = delta.sizes(path)
        rows.append(
            {
                "kind": "delta",
                "name": f"{spec.name}/{path.name}",
                "stored_bytes": _folder_bytes(path),
                "metadata_bytes": _folder_bytes(path / "_delta_log"),
                **_counted(sizes, delta.TARGET_FILE_BYTES, max(sizes, default=None)),
            }
        )
    return rows


def _counted(sizes: Mapping[str, Sequence[int]], target_bytes: int, hot: str | None) -> dict[str, Any]:
    small, share = small_files(sizes, target_bytes, hot)
    return {
        "files": sum(map(len, sizes.values())),
        "bytes": sum(map(sum, sizes.values())),
        "partitions": len(sizes),
        "max_files_per_partition": max(map(len, sizes.values()), default=0),
        "small_files": small,
        "small_file_pct": share,
    }


def survey(
    spark: SparkSession, settings: Settings, orphans: Mapping[str, Removed | None] | None = None
) -> list[dict[str, Any]]:
    """Measure every table, base and delta, and append it to `ops.storage` with the time and what it costs; the rows.

    Prometheus finds the same in `metrics/storage.prom`.

    Args:
        spark: The session.
        settings: Where everything is, and what storage costs.
        orphans: What was just removed from which table.
    """
    lake.ensure(spark, lake.OPS_STORAGE)
    removed = orphans or {}
    tables = (
        measure_table(spark, settings, spec, removed.get(spec.name)) for spec in maintenance.specs().values()
    )
    measured = [row for row in tables if row is not None]
    measured += [row for spec in INDICES.values() for row in measure_index(settings, spec)]
    price = settings.maintenance.usd_micros_per_gib_month
    now = datetime.now(UTC)
    schema = spark.table(lake.OPS_STORAGE.identifier).schema
    rows = [
        dict.fromkeys(schema.names)
        | row
        | {"at": now, "cost_usd_micros_month": -(-row["stored_bytes"] * price // _GIB)}
        for row in measured
    ]
    if rows:
        lake.append(spark.createDataFrame(rows, schema).coalesce(1), lake.OPS_STORAGE)
        _tell_prometheus(settings, rows)
    return rows


def _tell_prometheus(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file for the text file collector of Prometheus' node exporter: who measures has ended when it asks."""
    registry = CollectorRegistry()
    labels = ("kind", "name")
    gauges = {
        name: Gauge(f"tidemark_storage_{name}", doc, labels, registry=registry)
        for name, doc in _GAUGES.items()
    }
    at = Gauge(
        "tidemark_storage_measured_seconds", "When it was measured, since 1970.", labels, registry=registry
    )
    for row in rows:
        of = {label: row[label] for label in labels}
        at.labels(**of).set(row["at"].timestamp())
        for name, gauge in gauges.items():
            if row[name] is not None:
                gauge.labels(**of).set(row[name])
    settings.paths.metrics.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(settings.paths.metrics / METRICS), registry)


def newest(settings: Settings) -> list[dict[str, Any]]:
    """The newest row of everything in `ops.storage`, the greatest first. Needs no Spark."""
    table = lake.open_table(settings, lake.OPS_STORAGE.name)
    rows = table.scan().to_arrow().to_pylist() if table is not None else []
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["at"]):
        last[row["kind"], row["name"]] = row
    return sorted(last.values(), key=lambda row: -row["stored_bytes"])


def _stored(spark: SparkSession, location: str) -> int:
    jvm: Any = spark._jvm
    path = jvm.org.apache.hadoop.fs.Path(location)
    files = path.getFileSystem(spark._jsc.hadoopConfiguration())
    return int(files.getContentSummary(path).getLength())


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a temporary file, renamed or removed meanwhile
            continue
    return total
