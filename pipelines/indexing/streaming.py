"""Hot streams: Kafka records to facts in the deltas, epoch by epoch, through the same transforms as in batch.

Belongs here: incarnations, one epoch's way from records to commits, and starting the query. Hosting and restarting
queries is the streaming process's; what a record must be is its contract's, which a stream is given as ``decode``.

An incarnation is one life of a checkpoint. A checkpoint that is gone, a topic that was made again, or offsets that
Kafka has expired before they were read, begin a new one at the position that was committed last: what is read twice is
the same fact, and changes nothing. What Kafka no longer has is a gap, and is read from the archive first, as an
incarnation of its own.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing import delta
from pipelines.indexing import facts as fact
from pipelines.indexing import position as positions
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.files import replace_text
from pipelines.indexing.freshness import Stages, measured
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import Family, IndexSpec, NoState, State, lineage, looked_up

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming import StreamingQuery
    from pyspark.sql.types import StructType

log = logging.getLogger(__name__)
EARLIEST = -2  # Kafka's own number for the first offset that is there


class HotStream(NamedTuple):
    """One Structured Streaming query: topics under one contract, decoded, for all families that name the stream.

    ``decode`` takes records (provenance, key, value) to the accepted rows, with the provenance columns; the refused
    ones are the archive stream's to keep. ``backfill_topics`` are those whose records may wait: an epoch takes few of
    them, beside what the others have. ``stages``: where rows say when they were begun, by which the epochs' markers
    tell how fresh their documents are; None: they tell nothing of it.
    """

    name: str
    topics: tuple[str, ...]
    decode: Callable[[pa.Table], pa.Table]
    backfill_topics: frozenset[str] = frozenset()
    stages: Stages | None = None


class Committed(NamedTuple):
    """The last incarnation that committed something (0: none), and the position up to which all is committed."""

    incarnation: int
    position: Position


class Gap(NamedTuple):
    """Offsets of a partition that were not committed, and that Kafka no longer has: the first included, the end not."""

    topic_id: str
    partition: int
    start: int
    end: int


class Incarnation(NamedTuple):
    """A life of a checkpoint: its number, its folder, and where Spark begins if the folder is new.

    ``gaps`` are what lies between what is committed and there; the incarnation before this number is theirs.
    """

    number: int
    checkpoint: Path
    starting_offsets: str
    gaps: tuple[Gap, ...] = ()


def begin(
    checkpoints: Path,
    name: str,
    topic_ids: Mapping[str, str],
    committed: Callable[[], Committed],
    partitions: int,
    earliest: Position = EMPTY,
) -> Incarnation:
    """Go on with a stream's incarnation, or begin a new one.

    Args:
        checkpoints: The folder of all checkpoints.
        name: The stream's.
        topic_ids: The id of each of its topics by name.
        committed: What the stream's target holds; asked only when it is needed.
        partitions: How many partitions a topic has at least; those without a committed offset start at the earliest.
        earliest: The first offset that Kafka still has of each partition.
    """
    with _alone(checkpoints):  # what else feeds this stream, of other code, must not take the same number
        return _begin(checkpoints, name, topic_ids, committed, partitions, earliest)


def _begin(
    checkpoints: Path,
    name: str,
    topic_ids: Mapping[str, str],
    committed: Callable[[], Committed],
    partitions: int,
    earliest: Position,
) -> Incarnation:
    folder = checkpoints / name
    stored = _stored(folder / "incarnation.json")
    if stored and stored["topic_ids"] == dict(topic_ids):
        life = Incarnation(
            stored["number"],
            folder / str(stored["number"]),
            stored["starting_offsets"],
            tuple(Gap(*gap) for gap in stored.get("gaps", ())),
        )
        is_begun = any((life.checkpoint / "offsets").glob("[0-9]*"))
        if (is_begun or committed().incarnation < life.number) and _reaches(
            _following(life), topic_ids, earliest
        ):
            return life
    held = committed()
    number = max([held.incarnation, *_begun(checkpoints, name)]) + 1
    gaps = _gaps(held.position, topic_ids, earliest)
    offsets = {
        topic: {
            str(p): _start(held.position, earliest, topic_id, p)
            for p in range(max([partitions, *(q + 1 for q in held.position.topics.get(topic_id, {}))]))
        }
        for topic, topic_id in topic_ids.items()
    }
    number += bool(gaps)  # the archive's epochs are an incarnation, too
    incarnation = Incarnation(number, folder / str(number), json.dumps(offsets), gaps)
    replace_text(
        folder / "incarnation.json",
        json.dumps(
            {
                "number": number,
                "topic_ids": dict(topic_ids),
                "starting_offsets": incarnation.starting_offsets,
                "gaps": gaps,
            }
        ),
    )
    log.info("%s begins incarnation %d at %s", name, number, incarnation.starting_offsets)
    drop_others([folder], incarnation)
    return incarnation


def drop_others(folders: Iterable[Path], life: Incarnation) -> None:
    """Drop what other incarnations kept: none goes on from there again. Which numbers there were stays known."""
    for folder in folders:
        for checkpoint in folder.iterdir():
            if checkpoint.name.isdigit() and checkpoint != life.checkpoint:
                shutil.rmtree(checkpoint, ignore_errors=True)


def _start(held: Position, earliest: Position, topic_id: str, partition: int) -> int:
    offset = held.topics.get(topic_id, {}).get(partition)
    return max(offset, earliest.topics.get(topic_id, {}).get(partition, 0)) if offset else EARLIEST


def _gaps(held: Position, topic_ids: Mapping[str, str], earliest: Position) -> tuple[Gap, ...]:
    return tuple(
        Gap(topic_id, partition, offset, first)
        for topic_id in topic_ids.values()
        for partition, offset in sorted(held.topics.get(topic_id, {}).items())
        if 0 < offset < (first := earliest.topics.get(topic_id, {}).get(partition, 0))
    )


def _following(life: Incarnation) -> dict[str, dict[str, int]]:
    """The offsets, by topic and partition, at which the next epoch of a checkpoint begins."""
    offsets, commits = life.checkpoint / "offsets", life.checkpoint / "commits"
    done = [file for file in offsets.glob("[0-9]*") if file.name.isdigit() and (commits / file.name).exists()]
    newest = max((int(file.name) for file in done), default=None)
    found: dict[str, dict[str, int]] = json.loads(life.starting_offsets)
    return found if newest is None else found | offsets_of(life.checkpoint, newest)


def offsets_of(checkpoint: Path, epoch: int) -> dict[str, dict[str, int]]:
    """The offsets, by topic and partition, at which an epoch of a checkpoint ends."""
    found: dict[str, dict[str, int]] = {}
    lines = (checkpoint / "offsets" / str(epoch)).read_text(encoding="utf-8").splitlines()
    for line in lines[2:]:  # a version, metadata, and a line for each source: "-" where it had nothing yet
        found |= json.loads(line) if line != "-" else {}
    return found


def _reaches(
    offsets: Mapping[str, Mapping[str, int]], topic_ids: Mapping[str, str], earliest: Position
) -> bool:
    """Whether Kafka still has every record from these offsets on."""
    return all(
        offset < 0 or offset >= earliest.topics.get(topic_ids.get(topic, ""), {}).get(int(partition), 0)
        for topic, found in offsets.items()
        for partition, offset in found.items()
    )


def end(checkpoints: Path, name: str, number: int = 0) -> None:
    """End a stream's incarnation: the next start begins a greater one, at the position that is committed then.

    ``number``: the greatest incarnation that ever committed; no later one may be taken for it.
    """
    file = checkpoints / name / "incarnation.json"
    stored = _stored(file)
    number = max(number, stored["number"] if stored else 0)
    replace_text(file, json.dumps({"number": number, "topic_ids": {}, "starting_offsets": "{}"}))


def has_ended(checkpoints: Path, life: Incarnation, name: str) -> bool:
    """Whether an incarnation that runs was ended meanwhile."""
    stored = _stored(checkpoints / name / "incarnation.json")
    return stored is not None and (stored["number"] != life.number or not stored["topic_ids"])


def _begun(checkpoints: Path, name: str) -> list[int]:
    """The incarnations that a stream began, under whatever lineages: two of one number would be taken for one."""
    stream = name.partition("-")[0]
    files = [checkpoints / name / "incarnation.json", *checkpoints.glob(f"{stream}-*/incarnation.json")]
    return [stored["number"] for file in files if (stored := _stored(file))]


@contextmanager
def _alone(checkpoints: Path) -> Iterator[None]:
    checkpoints.mkdir(parents=True, exist_ok=True)
    with (checkpoints / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def records(
    spark: SparkSession, servers: str, topic_ids: Mapping[str, str], starting_offsets: str, max_rows: int
) -> DataFrame:
    """The records of topics as a stream: provenance (topic_id, partition, offset, broker_time …), key and value."""
    from pyspark.sql import functions as F

    offsets = {topic: of for topic, of in json.loads(starting_offsets).items() if topic in topic_ids}
    source = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", servers)
        .option("subscribe", ",".join(topic_ids))
        .option("startingOffsets", json.dumps(offsets))
        .option("maxOffsetsPerTrigger", max_rows)
        .option("failOnDataLoss", "true")
        .load()
    )
    topic_id = F.create_map(*[F.lit(text) for pair in topic_ids.items() for text in pair])[F.col("topic")]
    return source.select(
        F.col("topic"),
        topic_id.alias("topic_id"),
        "partition",
        "offset",
        F.lit(None).cast("string").alias("load_id"),
        F.lit(None).cast("bigint").alias("load_row"),
        F.col("timestamp").alias("broker_time"),
        "key",
        "value",
    )


def united(
    spark: SparkSession,
    servers: str,
    topic_ids: Mapping[str, str],
    starting_offsets: str,
    rows_of_source: Mapping[frozenset[str], int],
) -> DataFrame:
    """`records` of several sources as one stream; ``rows_of_source``: topics → how many of their rows an epoch has."""
    sources = [
        records(spark, servers, {t: topic_ids[t] for t in topic_ids if t in topics}, starting_offsets, most)
        for topics, most in rows_of_source.items()
        if topics
    ]
    return functools.reduce(lambda one, other: one.unionByName(other), sources)


class HotStreamRun:
    """A hot stream on its deltas: begins incarnations and runs epochs."""

    def __init__(
        self,
        stream: HotStream,
        specs: Iterable[IndexSpec],
        *,
        deltas: Path,
        checkpoints: Path,
        state: State | None = None,
    ) -> None:
        """``specs``: all indices; those with a family on this stream are fed."""
        self.stream = stream
        self.specs = [spec for spec in specs if stream.name in spec.streams]
        self._deltas = deltas
        self._checkpoints = checkpoints
        self._state = state or NoState()
        self._writers: dict[str, DeltaWriter] = {}
        self._require_same_topics: Callable[[], None] = lambda: None
        self._nullable: dict[tuple[str, str], StructType | None] = {}

    def start(
        self,
        spark: SparkSession,
        *,
        servers: str,
        topic_ids: Mapping[str, str],
        partitions: int,
        trigger_ms: int,
        max_rows: int,
        max_backfill_rows: int = 1_000,
        earliest: Position = EMPTY,
        archive: Callable[[Sequence[Gap]], DataFrame] | None = None,
        require_same_topics: Callable[[], None] = lambda: None,
    ) -> StreamingQuery:
        """Start the query; its epochs run until it is stopped or fails.

        Args:
            spark: The session.
            servers: Kafka's.
            topic_ids: The id of each topic by name.
            partitions: How many a topic has at least.
            trigger_ms: Time from one epoch to the next.
            max_rows: Of an epoch, at most.
            max_backfill_rows: Of its backfill topics, at most.
            earliest: The first offset that Kafka still has of each partition.
            archive: The archived records in gaps; what it has not, nobody has. None: the topics are not archived.
            require_same_topics: Raises where a topic was made again since.
        """
        self._writers = {}
        self._require_same_topics = require_same_topics
        life = begin(
            self._checkpoints, self._checkpoint_name(), topic_ids, self.committed, partitions, earliest
        )
        if life.gaps and archive is not None:
            self._fill(life, archive, max_rows)
        elif life.gaps:
            log.warning("%s has lost records that Kafka expired: %s", self.stream.name, life.gaps)
        backfill = self.stream.backfill_topics
        rows = {frozenset(topic_ids) - backfill: max_rows, backfill: max_backfill_rows}
        source = united(spark, servers, topic_ids, life.starting_offsets, rows)

        def run(batch: DataFrame, epoch: int) -> None:
            self.run_epoch(batch, epoch, life.number)

        writer = source.writeStream.foreachBatch(run).queryName(self.stream.name)
        writer = writer.option("checkpointLocation", str(life.checkpoint))
        return writer.trigger(processingTime=f"{trigger_ms} milliseconds").start()

    def _fill(self, life: Incarnation, archive: Callable[[Sequence[Gap]], DataFrame], max_rows: int) -> None:
        """Epochs from the archive. They are the same ones if they are tried again: those committed stay."""
        for epoch, part in enumerate(parts(life.gaps, max_rows)):
            marker = self.run_epoch(archive(part), epoch, life.number - 1)
            log.info("%s read %d records from the archive: %s", self.stream.name, marker.records, part)

    def run_epoch(self, batch: DataFrame, epoch: int, incarnation: int) -> Marker:
        """Take one micro-batch of records to facts in every delta of the stream; what is committed already stays."""
        started_at_ms = _now_ms()
        records = batch.toArrow()
        accepted = self.stream.decode(records)
        decoded_at_ms = _now_ms()
        self._require_same_topics()  # after reading: then these were the records of these topics
        start, end = read_range(records)
        marker = Marker(
            stream=self.stream.name,
            incarnation=incarnation,
            epoch=epoch,
            start=start,
            end=end,
            records=records.num_rows,
            refused=records.num_rows - accepted.num_rows,
            event_time_min_ms=extreme(accepted, "event_time", pc.min),
            event_time_max_ms=extreme(accepted, "event_time", pc.max),
            broker_time_min_ms=extreme(records, "broker_time", pc.min),
            broker_time_max_ms=extreme(records, "broker_time", pc.max),
            started_at_ms=started_at_ms,
            decoded_at_ms=decoded_at_ms,
            ages=measured(accepted, self.stream.stages, self.stream.backfill_topics),
        )
        for spec in self.specs:
            facts = self.facts(spec, accepted, batch.sparkSession)
            self._writer(spec).commit(marker._replace(transformed_at_ms=_now_ms()), facts)
        said = {"stream": marker.stream, "incarnation": incarnation, "epoch": epoch, "places": marker.places}
        indices = [spec.name for spec in self.specs]
        took = {"records": marker.records, "refused": marker.refused, "took_ms": _now_ms() - started_at_ms}
        log.info("epoch %d committed", epoch, extra={**said, "indices": indices, **took})
        return marker

    def facts(self, spec: IndexSpec, rows: pa.Table, spark: SparkSession) -> pa.Table:
        """The facts that rows make in an index, of all its families on this stream."""
        if not rows.num_rows:
            return fact.schema(spec).empty_table()
        mine = [family for family in spec.families if family.stream == self.stream.name]
        is_whole = all(family.takes_arrow or family.looks_up for family in mine)
        frame = None if is_whole else spark.createDataFrame(rows)
        parts = []
        for family in mine:
            given = rows if family.takes_arrow else frame
            if family.looks_up:
                given = looked_up(family, rows, self._state)
                given = given if family.takes_arrow else spark.createDataFrame(given)
            made = family.transform(given, self._state)
            whole = made if family.takes_arrow else self._with_nulls(spec, family, made).toArrow()
            parts.append(fact.conform(whole, spec))
        return pa.concat_tables(parts)

    def _with_nulls(self, spec: IndexSpec, family: Family, made: DataFrame) -> DataFrame:
        """Facts whose payload may lack anything: Arrow takes no tombstone where Spark holds a part for never null."""
        from pyspark.sql.types import StructField, StructType

        name = (spec.name, family.name)
        if name not in self._nullable:
            payload = made.schema[fact.payload_column(family.name)].dataType
            is_strict = payload != StructType([StructField("", payload)]).toNullable()[0].dataType
            self._nullable[name] = made.schema.toNullable() if is_strict else None
        schema = self._nullable[name]
        return made if schema is None else made.to(schema)

    def committed(self) -> Committed:
        """What the deltas hold of this stream: the least position of them all."""
        found = [delta.markers(self._path(spec), self.stream.name) for spec in self.specs]
        number = max((m.incarnation for markers in found for m in markers), default=0)
        number = max(
            [number, *(delta.last_incarnation(self._path(s), self.stream.name, number) for s in self.specs)]
        )
        floors = [
            delta.floor(self._path(spec)) for spec in self.specs
        ]  # a new lineage begins at its base's cut
        each = [
            positions.merge_all([floor, *(m.end for m in markers)])
            for floor, markers in zip(floors, found, strict=True)
        ]
        return Committed(number, positions.meet_all(each))

    def _writer(self, spec: IndexSpec) -> DeltaWriter:
        if spec.name not in self._writers:
            self._writers[spec.name] = DeltaWriter(spec, self._path(spec))
        return self._writers[spec.name]

    def _path(self, spec: IndexSpec) -> Path:
        return delta.table_path(self._deltas, spec.name, lineage(spec))

    def _checkpoint_name(self) -> str:
        """A new lineage of any index has its own checkpoint."""
        lineages = ",".join(f"{spec.name}={lineage(spec)}" for spec in self.specs)
        return f"{self.stream.name}-{hashlib.sha256(lineages.encode()).hexdigest()[:8]}"


def parts(gaps: Sequence[Gap], max_rows: int) -> Iterator[tuple[Gap, ...]]:
    """Gaps in parts of at most so many records (but one of each partition), always the same ones."""
    width = max(1, max_rows // max(1, len(gaps)))
    longest = max((gap.end - gap.start for gap in gaps), default=0)
    for done in range(0, longest, width):
        cut = (
            gap._replace(start=gap.start + done, end=min(gap.end, gap.start + done + width)) for gap in gaps
        )
        yield tuple(gap for gap in cut if gap.start < gap.end)


def read_range(rows: pa.Table) -> tuple[Position, Position]:
    """The positions [start, end) of the partitions that rows with provenance are from."""
    grouped = rows.group_by(["topic_id", "partition"]).aggregate([("offset", "min"), ("offset", "max")])
    start: dict[str, dict[int, int]] = {}
    end: dict[str, dict[int, int]] = {}
    for row in grouped.to_pylist():
        start.setdefault(row["topic_id"], {})[row["partition"]] = row["offset_min"]
        end.setdefault(row["topic_id"], {})[row["partition"]] = row["offset_max"] + 1
    return Position(start), Position(end)


def extreme(rows: pa.Table, column: str, which: Callable[[pa.ChunkedArray], pa.Scalar]) -> int | None:
    """The least or greatest time of a column, in ms since 1970; None where there is none."""
    if column not in rows.column_names or not rows.num_rows:
        return None
    times = rows.column(column).cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    value = which(times).as_py()
    return None if value is None else value // 1000


def _stored(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _now_ms() -> int:
    return int(time.time() * 1000)


__all__: Sequence[str] = [
    "Committed",
    "Gap",
    "HotStream",
    "HotStreamRun",
    "Incarnation",
    "begin",
    "end",
    "extreme",
    "has_ended",
    "parts",
    "read_range",
    "records",
]
