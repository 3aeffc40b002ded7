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
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import failpoints, lake
from pipelines.contracts import CONTRACTS, RECORD, Contract, decode_table
from pipelines.errors import TidemarkError
from pipelines.indexing import streaming
from pipelines.indexing.position import Position, merge_all, ranges, topic_name
from pipelines.indexing.streaming import Committed, Gap, Incarnation
from pipelines.ingest import broker, evolution, writers
from pipelines.ingest.load import raw_spec
from pipelines.settings import Settings

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
    """Commit one micro-batch, as far as it is not committed yet, and learn new fields from it; where it ends.

    What is valid is decided here, in the driver: an epoch has few records, and Spark's workers took longer to be asked
    than to answer (docs/adr/0018).
    """
    from pyspark.sql import functions as F

    said = {lake.STREAM: STREAM, lake.INCARNATION: str(incarnation), lake.EPOCH: str(epoch)}
    now = datetime.now(UTC)
    batch = batch.persist()
    try:
        records = batch.toArrow()
        if not records.num_rows:
            return Position()
        parts = [(contract, _of_topic(records, contract.topic)) for contract in contracts]
        parts = [(contract, part) for contract, part in parts if part.num_rows]
        if not _is_done(settings, lake.RAW_DEAD_LETTERS, incarnation, epoch):
            letters = pa.concat_tables(_letters(settings, *one) for one in parts)
            if letters.num_rows:
                found = batch.sparkSession.createDataFrame(letters).withColumn("ingested_at", F.lit(now))
                lake.append(found.coalesce(1), lake.RAW_DEAD_LETTERS, said)
        failpoints.hit("archive.after_dead_letters")
        newest_ms = streaming.extreme(records, "broker_time", pc.max) or 0
        ends = []
        for contract, part in parts:
            start, end = streaming.read_range(part)
            ends.append(end)
            spec = raw_spec(contract)
            if _is_done(settings, spec, incarnation, epoch):
                continue
            rows = batch.filter(F.col("topic") == contract.topic).withColumn("ingested_at", F.lit(now))
            brought = lake.bringing(settings, spec.name, end, newest_ms)
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
                    "places": ranges(start, end),
                },
            )
        return merge_all(ends)
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


def _of_topic(records: pa.Table, topic: str) -> pa.Table:
    return records.filter(pc.equal(records.column("topic"), topic))


def _letters(settings: Settings, contract: Contract, records: pa.Table) -> pa.Table:
    """The refused ones of a topic's records; new fields of the others are learned."""
    decoded = decode_table(contract, records, finds_new_fields=True)
    evolution.learn_from(settings, contract, decoded.new_fields)
    topic = pa.array([contract.topic] * decoded.refused.num_rows, pa.string())
    return decoded.refused.append_column("topic", topic)


def _is_done(settings: Settings, spec: lake.TableSpec, incarnation: int, epoch: int) -> bool:
    last = lake.committed_epoch(settings, spec.name, STREAM, incarnation)
    return last is not None and last[1] >= epoch
