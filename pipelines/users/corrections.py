"""What a new base of `user_events` corrected in what was served before it, counted by cause.

Belongs here: the comparison of two bases and the delta between them. Does not belong here: when it is done (`assets`),
and what is done about it.

The streams say everything at once, but not everything: loads come to no stream, a stream may have been stopped, a
contract may have learned. Until the next base, timelines lack that. What the base brought, which neither the base
before it nor the delta after that had, is a correction:

- `load`: it came with a load.
- `not_streamed`: no epoch of the delta had read its record: the stream was stopped or behind, or Kafka had expired it.
- `joined_anew`: the event was known; what it was joined with has another version by now.
- `decided_otherwise`: an epoch had read the record, and made another fact of it or none: what a record means is known
  otherwise by now.
- `withdrawn`: served before, by the base or by the delta after it, and gone: a load that was undone, or a record that
  is refused by now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipelines import index_rows, lake
from pipelines.indexing import delta
from pipelines.indexing.facts import VERSION_COLUMNS
from pipelines.indexing.spec import IndexSpec
from pipelines.indexing.versions import Versions
from pipelines.users.index import USER_EVENTS

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import DataFrame, SparkSession

    from pipelines.indexing.base import Manifest
    from pipelines.indexing.delta import Marker
    from pipelines.indexing.position import Position
    from pipelines.settings import Settings

CAUSES = LOAD, NOT_STREAMED, JOINED_ANEW, DECIDED_OTHERWISE, WITHDRAWN = (
    "load",
    "not_streamed",
    "joined_anew",
    "decided_otherwise",
    "withdrawn",
)
_OWN, _JOINED = VERSION_COLUMNS[:2], VERSION_COLUMNS[2:]  # as `indexed` says: the event's, then its pin's
_RANK = (*VERSION_COLUMNS, "is_deleted", "content_hash")
_FACT = ["identity_hash", *_RANK]


def before(spark: SparkSession, settings: Settings, after: Manifest) -> Manifest | None:
    """The base that was served before one; None where there was none, or it is gone, or it was counted already.

    A base comes to be served when it is published or rolled back to; the last of that before ``after`` was published.
    """
    counted_ones = lake.read(spark, lake.OPS_TIMELINE_CORRECTIONS.name)
    if not counted_ones.filter(f"version = {lake.quoted(after.version)}").isEmpty():
        return None
    versions = lake.read(spark, lake.OPS_INDEX_VERSIONS.name)
    moves = versions.filter(f"`index` = {lake.quoted(after.index)} AND event IN ('published', 'rolled_back')")
    moved = [
        (row["version"], row["event"]) for row in moves.orderBy("at").select("version", "event").collect()
    ]
    came = max((n for n, move in enumerate(moved) if move == (after.version, "published")), default=0)
    earlier = [version for version, _ in moved[:came] if version != after.version]
    held = {one.version: one for one in Versions(settings.paths.indices, after.index).manifests()}
    return held.get(earlier[-1]) if earlier else None


def counted(
    spark: SparkSession, settings: Settings, before: Manifest, after: Manifest, spec: IndexSpec = USER_EVENTS
) -> dict[tuple[str, str], int]:
    """How many facts the base ``after`` corrected, by family and cause; those that are none are left out.

    Args:
        spark: The session.
        settings: Where lake and deltas are.
        before: Of the base that was served until then.
        after: Of the base that took its place.
        spec: Of the index: a timeline of events by user.
    """
    table = index_rows.table(spec).name
    old, new = (lake.read(spark, table, manifest.sources[table]) for manifest in (before, after))
    path = delta.table_path(settings.paths.delta, spec.name, before.lineage)
    known = old.select(*_FACT)
    epochs = delta.markers(path)
    streamed = _streamed(spark, path)
    if streamed is not None:
        known = known.unionByName(streamed.select(*_FACT))
    brought = _with_joins(new.join(known, _FACT, "left_anti"), known)
    cause = _cause(epochs)
    found: dict[tuple[str, str], int] = {}
    for name, source in index_rows.inputs(spec).items():
        rows = lake.read(spark, source, after.sources[source])
        placed = rows.selectExpr(
            "cast(user_id AS binary) AS key", "cast(event_id AS binary) AS id", f"{cause} AS cause"
        )
        of_family = brought.filter(f"family = '{name}'").join(placed, ["key", "id"])
        told = of_family.selectExpr(f"CASE WHEN is_joined_anew THEN '{JOINED_ANEW}' ELSE cause END AS cause")
        found |= {(name, row["cause"]): row["count"] for row in told.groupBy("cause").count().collect()}
    was, stays = (facts.select("family", "identity_hash") for facts in (old, new))
    if streamed is not None:
        was = was.unionByName(_overlaid(spark, streamed, epochs, before.cut))
        stays = stays.unionByName(_overlaid(spark, streamed, epochs, after.cut))
    gone = was.join(stays, ["identity_hash"], "left_anti").distinct().groupBy("family").count().collect()
    return found | {(row["family"], WITHDRAWN): row["count"] for row in gone}


def _with_joins(brought: DataFrame, known: DataFrame) -> DataFrame:
    """Family, key and id of facts, and whether what was known differs in no more than what it was joined with."""
    same = ["identity_hash", *_OWN, "is_deleted"]
    joined = known.selectExpr(*same, f"struct({', '.join(_JOINED)}) AS was").distinct()
    is_anew = f"coalesce(bool_or(was != struct({', '.join(_JOINED)})), false) AS is_joined_anew"
    told = brought.join(joined, same, "left").groupBy("family", "key", "id", *_JOINED)
    from pyspark.sql import functions as F

    return told.agg(F.expr(is_anew))


def _streamed(spark: SparkSession, path: Path) -> DataFrame | None:
    """The facts of a delta, as far as it still goes."""
    if not (path / "_delta_log").exists():
        return None
    return spark.read.format("delta").load(str(path)).filter("marker IS NULL")


def _overlaid(spark: SparkSession, streamed: DataFrame, epochs: Iterable[Marker], cut: Position) -> DataFrame:
    """What a delta says over a base of this cut: family and identity of the epochs that are not wholly in it."""
    named = [(one.stream, one.incarnation, one.epoch) for one in epochs if not cut.covers(one.end)]
    after = spark.createDataFrame(named, "stream string, incarnation bigint, epoch bigint")
    return streamed.join(after, after.columns, "left_semi").select("family", "identity_hash")


def _cause(epochs: Iterable[Marker]) -> str:
    """The cause of a curated row, as an expression of Spark SQL; ``epochs``: those that the delta has."""
    read: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for marker in epochs:
        for topic_id, partitions in marker.places.items():
            for partition, spans in partitions.items():
                read[topic_id, partition] += spans
    is_read = " OR ".join(
        f"(topic_id = {lake.quoted(topic_id)} AND `partition` = {partition}"
        f" AND `offset` >= {start} AND `offset` < {end})"
        for (topic_id, partition), spans in read.items()
        for start, end in _joined(spans)
    )
    is_read = is_read or "false"
    return (
        f"CASE WHEN load_id IS NOT NULL THEN '{LOAD}' WHEN {is_read} THEN '{DECIDED_OTHERWISE}'"
        f" ELSE '{NOT_STREAMED}' END"
    )


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges [start, end) as the fewest that have the same offsets: epochs follow each other by the thousand."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def rows(found: dict[tuple[str, str], int], before: Manifest, after: Manifest) -> list[dict[str, Any]]:
    """Rows of `ops.timeline_corrections`: each family with each cause, also where there were none."""
    families: Iterable[str] = (family.name for family in USER_EVENTS.families)
    at = datetime.now(UTC)
    return [
        {
            "at": at,
            "index": after.index,
            "version": after.version,
            "before": before.version,
            "family": family,
            "cause": cause,
            "facts": found.get((family, cause), 0),
        }
        for family in families
        for cause in CAUSES
    ]
