"""Records again through the present code: what would become of them, and sending them once more.

Belongs here: choosing records (dead letters, a range of positions), deciding them again, comparing the facts that they
make with those of the newest base, and sending them. Does not belong here: days of a table (`backfill`).

A record that is sent again is a new record: raw keeps both, and the account counts the new one (as repeated, where the
old one is accepted by now). `ops.replays` says which were sent, and as what.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from pipelines import index_rows, lake
from pipelines.backfill import PLACE, at_places
from pipelines.contracts import Contract, frames
from pipelines.errors import TidemarkError
from pipelines.indexing import facts
from pipelines.indexing.position import EMPTY, Position, merge_all, topic_name
from pipelines.indexing.spec import IndexSpec, looked_up
from pipelines.indices import INDICES, topics
from pipelines.ingest import evolution
from pipelines.ingest.producer import Delivery, Producer
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

AT_ONCE = 10_000
_EXAMPLES = 5
_RANK = ("version_1", "version_2", "version_3", "version_4", "is_deleted", "content_hash")


class ReplayError(TidemarkError):
    """Records cannot be replayed."""


class Range(NamedTuple):
    """Offsets of one partition of a topic, the first included, the end not."""

    topic: str
    number: int
    start: int
    end: int


class Decision(NamedTuple):
    """So many records, decided then and now; a reason, or None where accepted."""

    was: str | None
    now: str | None
    records: int


class FactChange(NamedTuple):
    """So many facts of an index, beside those of its newest base.

    Attributes:
        index_name: The index.
        family: The column family.
        status: `same`; `changed` (the same version says something else); `superseded` (the base has a greater one);
            `newer` (the base has a lesser one); `absent` (the base has none).
        facts: How many.
    """

    index_name: str
    family: str
    status: str
    facts: int


class Outcome(NamedTuple):
    """What the present code makes of records.

    Attributes:
        records: How many there are.
        decisions: How they were decided, and are now.
        facts: What their facts are, beside the newest bases.
        examples: A few that are decided otherwise: place, was, now.
    """

    records: int
    decisions: tuple[Decision, ...]
    facts: tuple[FactChange, ...]
    examples: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "records": self.records,
            "decisions": [one._asdict() for one in self.decisions],
            "facts": [one._asdict() for one in self.facts],
            "examples": list(self.examples),
        }


# ------------------------------------------------------------------------------------------------ choosing records


def letters(
    spark: SparkSession,
    settings: Settings,
    contract: Contract,
    reason: str | None = None,
    load_id: str | None = None,
) -> DataFrame:
    """The records of a topic's dead letters that were not sent again yet: those that raw has, by their place."""
    from pyspark.sql import functions as F

    chosen = lake.read(spark, lake.RAW_DEAD_LETTERS.name).filter(F.col("topic") == contract.topic)
    if reason is not None:
        chosen = chosen.filter(F.col("reason") == reason)
    if load_id is not None:
        chosen = chosen.filter(F.col("load_id").isin(load_id, f"{contract.name}:{load_id}"))
    if lake.current_snapshot(settings, lake.OPS_REPLAYS.name) is not None:
        chosen = at_places(chosen, lake.read(spark, lake.OPS_REPLAYS.name), "left_anti")
    return at_places(records(spark, settings, contract), chosen, "left_semi")


def records(
    spark: SparkSession, settings: Settings, contract: Contract, chosen: Range | None = None
) -> DataFrame:
    """The records of a topic that raw has: all of them, or a range of one partition.

    Raises:
        ReplayError: Raw does not hold the whole range; it says what it holds.
    """
    from pyspark.sql import functions as F

    name = contract.raw_table
    if lake.current_snapshot(settings, name) is None:
        raise ReplayError("nothing was archived yet", where=name, remedy="`tidemark up`, or load something")
    raw = lake.read(spark, name).withColumn("topic", F.lit(contract.topic))
    if chosen is None:
        return raw
    in_range = f"partition = {chosen.number} AND offset >= {chosen.start} AND offset < {chosen.end}"
    newest = _topic_id(settings, name, chosen)
    return raw.filter(F.expr(in_range) & (F.col("topic_id") == newest))


def _topic_id(settings: Settings, name: str, chosen: Range) -> str:
    """The topic's id whose records raw has up to the range's end: the newest, where it was made again."""
    held = lake.position(settings, name).topics
    ends = {topic: offsets.get(chosen.number, 0) for topic, offsets in held.items()}
    for topic_id in reversed(list(ends)):
        if topic_name(topic_id) == chosen.topic and ends[topic_id] >= chosen.end > chosen.start >= 0:
            return topic_id
    shown = ", ".join(f"{topic} up to {end}" for topic, end in ends.items()) or "nothing"
    raise ReplayError(
        f"raw does not hold {chosen.start} to {chosen.end} of {chosen.topic}/{chosen.number}",
        where=name,
        remedy=f"it holds {shown}; the archive stream may be behind",
    )


# ------------------------------------------------------------------------------------------------ what they are now


def outcome(
    spark: SparkSession, settings: Settings, contract: Contract, chosen: DataFrame, *, as_new: bool = False
) -> Outcome:
    """What the present code makes of records.

    Args:
        spark: The session.
        settings: Where the lake is.
        contract: Of their topic, as declared.
        chosen: Rows of raw, with their `topic`.
        as_new: Whether they are decided as if the broker took them now, as it will when they are sent again.
    """
    from pyspark.sql import functions as F

    known = evolution.current(settings, contract)
    taken = chosen.withColumn("broker_time", F.current_timestamp()) if as_new else chosen
    judged = frames.judged(known, taken).persist()
    try:
        was = lake.read(spark, lake.RAW_DEAD_LETTERS.name).filter(F.col("topic") == contract.topic)
        both = _with_letters(judged.withColumn("topic", F.lit(contract.topic)), was)
        counted = both.groupBy("was", "now").count().orderBy("was", "now").collect()
        decisions = tuple(Decision(row["was"], row["now"], row["count"]) for row in counted)
        others = both.filter("NOT (was <=> now)").limit(_EXAMPLES).collect()
        accepted = judged.filter("_reason IS NULL").drop("_reason")
        made = [
            change
            for spec in INDICES.values()
            if contract.topic in topics(spec)
            for change in _facts(spark, settings, spec, contract, accepted)
        ]
        return Outcome(
            records=sum(one.records for one in decisions),
            decisions=decisions,
            facts=tuple(made),
            examples=tuple(row.asDict() for row in others),
        )
    finally:
        judged.unpersist()


def _with_letters(judged: DataFrame, letters: DataFrame) -> DataFrame:
    joined = at_places(judged, letters.dropDuplicates(list(PLACE)), "left")
    place = "concat_ws('/', one.topic, one.load_id, one.load_row, one.partition, one.offset)"
    return joined.selectExpr(f"{place} AS place", "other.reason AS was", "one._reason AS now")


def _facts(
    spark: SparkSession, settings: Settings, spec: IndexSpec, contract: Contract, accepted: DataFrame
) -> Iterator[FactChange]:
    from pyspark.sql import functions as F

    table = index_rows.table(spec)
    if lake.current_snapshot(settings, table.name) is None:
        return
    base = lake.read(spark, table.name).alias("base")
    state = index_rows.TableState(lambda name: lake.read(spark, name))
    of_topic = [family for family in spec.families if family.stream == contract.name]
    for family in of_topic:
        given = looked_up(family, accepted, state)
        made = family.transform(given, state).dropDuplicates().alias("made")
        said = ["key", "id", "time_ms", "amounts", facts.payload_column(family.name)]
        said = [name for name in said if name in made.columns]
        rank = {side: f"struct({', '.join(f'{side}.{name}' for name in _RANK)})" for side in ("made", "base")}
        is_same = " AND ".join(f"made.`{name}` <=> base.`{name}`" for name in said)
        status = (
            f"CASE WHEN base.identity IS NULL THEN 'absent' WHEN {rank['base']} > {rank['made']} THEN 'superseded' "
            f"WHEN {rank['base']} < {rank['made']} THEN 'newer' WHEN {is_same} THEN 'same' ELSE 'changed' END"
        )
        joined = made.join(base, F.expr("made.identity = base.identity"), "left").selectExpr(
            f"{status} AS status"
        )
        counted = Counter({row["status"]: row["count"] for row in joined.groupBy("status").count().collect()})
        yield from (FactChange(spec.name, family.name, name, counted[name]) for name in sorted(counted))


# ------------------------------------------------------------------------------------------------ sending them again


def accepted_now(settings: Settings, contract: Contract, chosen: DataFrame) -> DataFrame:
    """Of records, those that would be accepted if they were sent now."""
    from pyspark.sql import functions as F

    known = evolution.current(settings, contract)
    now = frames.judged(known, chosen.withColumn("broker_time", F.current_timestamp()))
    good = now.filter("_reason IS NULL").withColumn("topic", F.lit(contract.topic))
    return at_places(chosen, good, "left_semi")


def send(spark: SparkSession, settings: Settings, contract: Contract, chosen: DataFrame) -> Position:
    """Send records again, and note in `ops.replays` what each of them became; the position that covers them.

    They are noted after each ten thousand: what is cut off in between is sent twice, which changes no answer.

    Raises:
        NotDelivered: The broker did not acknowledge them; those before are noted.
    """
    lake.ensure(spark, lake.OPS_REPLAYS)
    positions = [EMPTY]
    with Producer(settings) as producer:
        for rows in _batches(chosen.select(*PLACE, "key", "value")):
            pairs = [(row["key"] and bytes(row["key"]), row["value"] and bytes(row["value"])) for row in rows]
            delivered = producer.send(contract.topic, pairs)
            _note(settings, rows, delivered)
            positions.append(merge_all(delivery.position for delivery in delivered))
    return merge_all(positions)


def _batches(chosen: DataFrame) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for row in chosen.toLocalIterator():
        batch.append(row)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _note(settings: Settings, rows: list[Any], delivered: list[Delivery]) -> None:
    table = lake.open_table(settings, lake.OPS_REPLAYS.name)
    assert table is not None
    now = datetime.fromtimestamp(time.time(), UTC)
    noted = [
        {name: row[name] for name in PLACE}
        | {
            "as_topic_id": one.topic_id,
            "as_partition": one.partition,
            "as_offset": one.offset,
            "replayed_at": now,
        }
        for row, one in zip(rows, delivered, strict=True)
    ]
    table.append(pa.Table.from_pylist(noted, schema=table.schema().as_arrow()))


__all__ = [
    "Decision",
    "FactChange",
    "Outcome",
    "Range",
    "ReplayError",
    "accepted_now",
    "letters",
    "outcome",
    "records",
    "send",
]
