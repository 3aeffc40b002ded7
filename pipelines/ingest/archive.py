"""The archive stream: every record of every topic into the raw tables, once, original bytes and all.

Belongs here: one epoch's commits, and the query that runs epochs. Does not belong here: where a new incarnation starts
(`indexing.streaming`), what is valid (`contracts`), hosting and restarting the query.

An epoch is one commit of the dead letters (if it has any), then one of each raw table that it has records for. Each
commit's summary says which epoch it is, and an epoch that is run again finds there what it has done. What a raw table
holds is told by its position; a dead letter counts once its raw table has the record.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines import failpoints, lake
from pipelines.contracts import CONTRACTS, RECORD, Contract, frames
from pipelines.errors import TidemarkError
from pipelines.indexing import streaming
from pipelines.indexing.position import Position, merge_all, topic_name
from pipelines.indexing.streaming import Committed, Gap, Incarnation
from pipelines.ingest import broker, evolution, writers
from pipelines.ingest.load import raw_spec
from pipelines.settings import Settings
from pipelines.tracing import Ranges

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming import StreamingQuery

log = logging.getLogger(__name__)

STREAM = "archive"
MAX_ROWS_PER_EPOCH = 200_000


class IncarnationEnded(TidemarkError):
    """The archive's incarnation was ended while it ran."""


def start(
    spark: SparkSession, settings: Settings, contracts: Iterable[Contract] = tuple(CONTRACTS.values())
) -> StreamingQuery:
    """Start the archive stream: it goes on where it was, or begins a new incarnation at what the raw tables hold.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    contracts = tuple(contracts)
    topic_ids = broker.ensure_topics(settings, [contract.topic for contract in contracts])
    for spec in (*map(raw_spec, contracts), lake.RAW_DEAD_LETTERS):
        lake.ensure(spark, spec)
    for contract in contracts:
        evolution.declare(settings, contract)
    known = evolution.Known(settings)
    committed = functools.partial(held, settings, contracts)
    with writers.appending(settings):
        life = streaming.begin(
            settings.paths.checkpoints,
            STREAM,
            topic_ids,
            committed,
            settings.kafka.partitions,
            broker.earliest(settings, topic_ids),
        )
        note_losses(spark, settings, life.gaps)
        before = committed()
        if before.incarnation < life.number:
            forget_unfinished(spark, before.position, topic_ids)
    servers = settings.kafka.bootstrap_servers
    records = streaming.records(spark, servers, topic_ids, life.starting_offsets, MAX_ROWS_PER_EPOCH)
    require_same_topics = broker.sameness(settings, topic_ids)

    def run(batch: DataFrame, epoch: int) -> None:
        require_same_topics()
        with writers.appending(settings):
            require_same_incarnation(settings, life)
            archive_epoch(settings, map(known, contracts), batch, life.number, epoch)

    writer = records.writeStream.foreachBatch(run).queryName(STREAM)
    writer = writer.option("checkpointLocation", str(life.checkpoint))
    return writer.trigger(processingTime=f"{settings.streams.archive_trigger_ms} milliseconds").start()


def archive_epoch(
    settings: Settings, contracts: Iterable[Contract], batch: DataFrame, incarnation: int, epoch: int
) -> Position:
    """Commit one micro-batch, as far as it is not committed yet, and learn new fields from it; where it ends."""
    from pyspark.sql import functions as F

    contracts = tuple(contracts)
    said = {lake.STREAM: STREAM, lake.INCARNATION: str(incarnation), lake.EPOCH: str(epoch)}
    batch = batch.persist()
    try:
        ends, places, newest_ms = _ends(batch)
        if not ends:
            return Position()
        now = F.timestamp_millis(F.lit(time.time_ns() // 1_000_000))
        present = [contract for contract in contracts if contract.topic in ends]
        if not _is_done(settings, lake.RAW_DEAD_LETTERS, incarnation, epoch):
            letters = [_letters(contract, batch) for contract in present]
            found = functools.reduce(lambda one, other: one.unionByName(other), letters)
            found = found.withColumn("ingested_at", now).coalesce(1).persist()
            try:
                for contract in present:
                    evolution.learn_from(settings, contract, found.filter(F.col("topic") == contract.topic))
                buried = frames.letters(found)
                if not buried.isEmpty():
                    lake.append(buried, lake.RAW_DEAD_LETTERS, said)
            finally:
                found.unpersist()
        failpoints.hit("archive.after_dead_letters")
        for contract in present:
            spec = raw_spec(contract)
            if _is_done(settings, spec, incarnation, epoch):
                continue
            rows = batch.filter(F.col("topic") == contract.topic).withColumn("ingested_at", now)
            brought = lake.bringing(settings, spec.name, ends[contract.topic], newest_ms)
            lake.append(
                rows.coalesce(1), spec, said | brought
            )  # one file an epoch: there will be many epochs
            failpoints.hit("archive.after_iceberg_commit")
            log.info(
                "epoch %d archived",
                epoch,
                extra={
                    "stream": STREAM,
                    "incarnation": incarnation,
                    "epoch": epoch,
                    "table": spec.name,
                    "places": places[contract.topic],
                },
            )
        return merge_all(ends.values())
    finally:
        batch.unpersist()


def held(settings: Settings, contracts: Iterable[Contract]) -> Committed:
    """The last incarnation that committed anything, and the position up to which the raw tables have everything."""
    specs = [raw_spec(contract) for contract in contracts]
    found = [lake.committed_epoch(settings, spec.name, STREAM) for spec in (*specs, lake.RAW_DEAD_LETTERS)]
    position = lake.positions(settings, [spec.name for spec in specs])
    return Committed(max((last[0] for last in found if last), default=0), position)


def records_in(spark: SparkSession, gaps: Sequence[Gap]) -> DataFrame:
    """The archived records in gaps, as `streaming.records` has them."""
    from pyspark.sql import functions as F

    def within(gap: Gap) -> DataFrame:
        topic = topic_name(gap.topic_id)
        raw = lake.read(spark, f"raw.{topic.replace('-', '_')}").withColumn("topic", F.lit(topic))
        of_partition = f"`partition` = {gap.partition} AND `offset` >= {gap.start} AND `offset` < {gap.end}"
        chosen = raw.filter(F.expr(of_partition) & (F.col("topic_id") == gap.topic_id))
        return chosen.select("topic", *RECORD.names)

    return functools.reduce(lambda one, other: one.unionByName(other), map(within, gaps))


def note_losses(spark: SparkSession, settings: Settings, gaps: Sequence[Gap]) -> None:
    """Records that the broker expired before they were archived are lost, and that is written down."""
    if not gaps:
        return
    lake.ensure(spark, lake.OPS_LOSSES)
    table = lake.open_table(settings, lake.OPS_LOSSES.name)
    assert table is not None
    noted = table.scan(selected_fields=Gap._fields).to_arrow().to_pylist()
    lost = [gap._asdict() for gap in gaps if gap._asdict() not in noted]
    for gap in lost:
        log.error("the broker expired records that were not archived: %s", gap)
    if lost:
        now = datetime.now(UTC)
        rows = [{**gap, "noted_at": now} for gap in lost]
        table.append(pa.Table.from_pylist(rows, schema=table.schema().as_arrow()))


def forget_unfinished(spark: SparkSession, position: Position, topic_ids: Mapping[str, str]) -> None:
    """Before a new incarnation: remove the dead letters of epochs that raw does not have. They come again."""
    from pyspark.sql import functions as F

    letters = lake.read(spark, lake.RAW_DEAD_LETTERS.name)
    for topic_id in topic_ids.values():
        held_ends = position.topics.get(topic_id, {})
        ends = (
            letters.filter(F.col("topic_id") == topic_id)
            .groupBy("partition")
            .agg(F.max("offset").alias("last"))
            .collect()
        )
        for row in ends:
            end = held_ends.get(row["partition"], 0)
            if row["last"] >= end:
                place = f"topic_id = {lake.quoted(topic_id)} AND `partition` = {row['partition']}"
                lake.delete(spark, lake.RAW_DEAD_LETTERS, f"{place} AND `offset` >= {end}")


def require_same_incarnation(settings: Settings, life: Incarnation) -> None:
    """A raw table that was rolled back wants records again that this query has read.

    Raises:
        IncarnationEnded: It was. Starting again begins a new incarnation at what the raw tables hold.
    """
    if streaming.has_ended(settings.paths.checkpoints, life, STREAM):
        raise IncarnationEnded(
            f"incarnation {life.number} was ended while it ran: a raw table was rolled back",
            where=STREAM,
            remedy="start the stream again",
        )


def _letters(contract: Contract, batch: DataFrame) -> DataFrame:
    from pyspark.sql import functions as F

    rows = batch.filter(F.col("topic") == contract.topic).select(*RECORD.names)
    return frames.examined(contract, rows).withColumn("topic", F.lit(contract.topic))


def _ends(batch: DataFrame) -> tuple[dict[str, Position], dict[str, Ranges], int]:
    """Where the batch ends in each topic, the places that it has of it, and the newest broker time in it."""
    from pyspark.sql import functions as F

    found = batch.groupBy("topic", "topic_id", "partition").agg(
        F.min("offset").alias("first"),
        F.max("offset").alias("last"),
        F.max(F.unix_millis("broker_time")).alias("newest"),
    )
    ends: dict[str, Position] = {}
    places: dict[str, Ranges] = {}
    newest = 0
    for row in found.collect():
        end = Position({row["topic_id"]: {row["partition"]: row["last"] + 1}})
        ends[row["topic"]] = ends.get(row["topic"], Position()).merge(end)
        mine = places.setdefault(row["topic"], {}).setdefault(row["topic_id"], {})
        mine[str(row["partition"])] = [(row["first"], row["last"] + 1)]
        newest = max(newest, row["newest"])
    return ends, places, newest


def _is_done(settings: Settings, spec: lake.TableSpec, incarnation: int, epoch: int) -> bool:
    last = lake.committed_epoch(settings, spec.name, STREAM, incarnation)
    return last is not None and last[1] >= epoch
