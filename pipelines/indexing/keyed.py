"""Keyed families: made of all that is known of a key together. A batch reads all rows of a key, a stream goes by steps.

Belongs here: running either on Spark; a stream's steps keep bytes of each key in Spark's state store, by
`transformWithState`. Does not belong here: what a step does (a domain), and what a hot stream is (`streaming`), whose
incarnations this shares.

A new incarnation has lost what was kept. It begins at the first record that Kafka has, not at what was committed: a
step that finds what it told before tells it again, as the same fact with a version that is not greater, and changes
nothing. What a step would have known of older records it does not know: it is told up to which time there were some,
and judges nothing that may hang on them; the next base does.

What an epoch tells of a key hangs on all epochs before it. So its marker ends where they have ended, too: an epoch is
not wholly before a base's cut while one before it is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import failpoints
from pipelines.errors import TidemarkError
from pipelines.indexing import facts as fact
from pipelines.indexing.delta import Marker
from pipelines.indexing.files import replace_text
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import Family, Keyed, Step
from pipelines.indexing.streaming import (
    Committed,
    Gap,
    HotStreamRun,
    Incarnation,
    begin,
    drop_others,
    extreme,
    offsets_of,
    records,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.streaming import StreamingQuery

log = logging.getLogger(__name__)

HOUR_MS = 3_600_000
MAX_NAMED = 5
"""So many keys are named in a line of the log."""
UNREAD = "unread_ms"
ROCKSDB = "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
STATE_OPTIONS = {
    "spark.sql.streaming.stateStore.providerClass": ROCKSDB,
    "spark.sql.streaming.stateStore.rocksdb.changelogCheckpointing.enabled": "true",
}
"""What a session needs for streams that keep something. With a changelog an epoch writes what changed, not all."""

_GROUPED = pa.schema([("key", pa.string()), ("rows", pa.binary()), ("said", pa.string())])
_TOLD = "key string, facts binary, left_out bigint, crowded_out bigint, said string"
_NOBODY = ""
"""The key of a part's account, beside the keys of its rows: ids are never empty."""


class NotKeyed(TidemarkError):
    """A stream of keyed families feeds something else, too."""


class _Account(NamedTuple):
    """What a part of an epoch held, for its marker: records, how many were refused, and their times in ms."""

    refused: int
    event_time_min_ms: int | None
    event_time_max_ms: int | None
    broker_time_min_ms: int | None
    broker_time_max_ms: int | None


def whole(
    rows: DataFrame, key: str, columns: Sequence[str], make: Callable[[pa.Table], pa.Table], made: pa.Schema
) -> DataFrame:
    """What a pure function makes of all rows of each key: the transform of a keyed family in a batch.

    Args:
        rows: All there are.
        key: The column by which rows belong together.
        columns: Those that `make` reads, the key among them.
        make: From one key's rows to facts; a key's rows must fit into a worker's memory.
        made: Their columns.
    """
    from pyspark.sql.pandas.types import from_arrow_schema

    def run(of_key: pa.Table) -> pa.Table:  # Spark looks at its signature
        return make(of_key)

    return rows.select(*columns).groupBy(key).applyInArrow(run, from_arrow_schema(made))


class KeyedRun(HotStreamRun):
    """A hot stream of one keyed family: the same deltas, incarnations and markers, but its epochs go by steps.

    ``state_partitions``: into how many parts keys fall, which is how many tasks an epoch has at a time. The other
    queries of the process wait for tasks that run: on two cores, one part leaves them the other core. It is fixed for
    the life of a checkpoint.
    ``times``: gives the broker's time (ms) of the first record from an offset on, of partitions of a topic by name;
    those that have none, or do not answer, are left out.
    ``retention_ms``: for how long topics keep records; None: nobody knows.
    """

    state_partitions = 1
    times: Callable[[str, Mapping[int, int]], Mapping[int, int]] = staticmethod(lambda topic, offsets: {})
    retention_ms: int | None = None

    def start(
        self,
        spark: SparkSession,
        *,
        servers: str,
        topic_ids: Mapping[str, str],
        partitions: int,
        trigger_ms: int,
        max_rows: int,
        max_backfill_rows: int = 0,
        earliest: Position = EMPTY,
        archive: Callable[[Sequence[Gap]], DataFrame] | None = None,
        require_same_topics: Callable[[], None] = lambda: None,
    ) -> StreamingQuery:
        """Start the query; see `HotStreamRun.start`. The archive is not read: what is in it the next base has."""
        family = self._family()
        assert family.keyed is not None
        self._writers = {}
        self._require_same_topics = require_same_topics
        name = self._checkpoint_name()
        life = begin(self._checkpoints, name, topic_ids, self._nothing_kept, partitions, earliest)
        drop_others(self._checkpoints.glob(f"{super()._checkpoint_name()}-*"), life)  # kept by other steps
        own = spark.newSession()
        own.conf.set("spark.sql.shuffle.partitions", str(self.state_partitions))
        source = records(own, servers, topic_ids, life.starting_offsets, max_rows).coalesce(
            self.state_partitions
        )

        def run(batch: DataFrame, epoch: int) -> None:
            self.run_told(batch, epoch, life, topic_ids, earliest)

        self._warn_of_reach(family.keyed)
        unread_ms = self._unread_ms(name, topic_ids, earliest)
        told = stepped(source, self.stream.decode, family.keyed, unread_ms)
        writer = told.writeStream.outputMode("update").foreachBatch(run).queryName(self.stream.name)
        writer = writer.option("checkpointLocation", str(life.checkpoint))
        return writer.trigger(processingTime=f"{trigger_ms} milliseconds").start()

    def run_told(
        self,
        batch: DataFrame,
        epoch: int,
        life: Incarnation,
        topic_ids: Mapping[str, str],
        earliest: Position,
    ) -> Marker:
        """Commit what the steps of an epoch told; what is committed already stays. The checkpoint says what it read."""
        started_at_ms = _now_ms()
        told = batch.toArrow()
        done_at_ms = _now_ms()
        self._require_same_topics()
        start, end = read_by(life, epoch, topic_ids, earliest)
        account = _summed(told.column("said"))
        marker = Marker(
            stream=self.stream.name,
            incarnation=life.number,
            epoch=epoch,
            start=start,
            end=end,
            records=sum(last - first for _, _, first, last in _spans(start, end)),
            **account._asdict(),
            started_at_ms=started_at_ms,
            decoded_at_ms=done_at_ms,
            transformed_at_ms=done_at_ms,
        )
        (spec,) = self.specs
        parts = [fact.schema(spec).empty_table()]
        parts += [fact.conform(_opened(one.as_py()), spec) for one in told.column("facts").drop_null()]
        facts = pa.concat_tables(parts)
        self._writer(spec).commit(marker, facts)
        failpoints.hit("keyed.after_commit")
        left_out = pc.sum(told.column("left_out")).as_py() or 0
        if left_out:
            log.warning(
                "%s: %d events of epoch %d came too late to be judged; the next base has them",
                marker.stream,
                left_out,
                epoch,
            )
        crowded = told.filter(pc.greater(told.column("crowded_out"), 0))
        crowded_out = pc.sum(crowded.column("crowded_out")).as_py() or 0
        if crowded_out:
            named = ", ".join(map(repr, crowded.column("key").to_pylist()[:MAX_NAMED]))
            log.warning(
                "%s: more is known than is kept of %d keys (%s); epoch %d left out the %d oldest events of them",
                *(marker.stream, crowded.num_rows, named, epoch, crowded_out),
            )
        said = {"stream": marker.stream, "incarnation": life.number, "epoch": epoch, "places": marker.places}
        counts = {
            "records": marker.records,
            "refused": marker.refused,
            "facts": facts.num_rows,
            "left_out": left_out,
            "crowded_out": crowded_out,
        }
        took = {"indices": [spec.name], "took_ms": _now_ms() - started_at_ms}
        log.info("epoch %d committed", epoch, extra={**said, **counts, **took})
        return marker

    def _unread_ms(self, name: str, topic_ids: Mapping[str, str], earliest: Position) -> int | None:
        """Up to which broker time there were records that this incarnation never read; None: there were none.

        It is asked once an incarnation, before the first epoch, and stored beside its number: later on Kafka has
        expired what it has read.
        """
        file = self._checkpoints / name / "incarnation.json"
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if UNREAD not in stored:
            found: list[int] = []
            for topic, topic_id in topic_ids.items():
                firsts = {p: first for p, first in earliest.topics.get(topic_id, {}).items() if first > 0}
                times = self.times(topic, firsts) if firsts else {}
                found += [times.get(partition, _now_ms()) for partition in firsts]
            stored[UNREAD] = max(found, default=None)
            replace_text(file, json.dumps(stored))
        unread_ms: int | None = stored[UNREAD]
        if unread_ms is not None:
            log.info("%s never read what the broker took before %d, and has expired", name, unread_ms)
        return unread_ms

    def _warn_of_reach(self, keyed: Keyed) -> None:
        reach_ms = keyed.reach_ms()
        if self.retention_ms is not None and reach_ms > self.retention_ms:
            log.warning(
                "%s has to know %.1f h of records, and topics keep %.1f h: begun anew, it judges nothing until it has"
                " read as much; make kafka.retention_hours greater, or what it looks back on less",
                *(self.stream.name, reach_ms / HOUR_MS, self.retention_ms / HOUR_MS),
            )

    def _family(self) -> Family:
        families = [(spec, family) for spec in self.specs for family in spec.families]
        if len(families) != 1 or families[0][1].keyed is None:
            named = ", ".join(f"{spec.name}.{family.name}" for spec, family in families)
            raise NotKeyed(
                f"the stream {self.stream.name!r} goes by steps, and feeds {named or 'nothing'}",
                remedy="give each keyed family a stream of its own",
            )
        return families[0][1]

    def _nothing_kept(self) -> Committed:
        """What was committed is no place to begin at without what was kept: only its number counts."""
        return Committed(self.committed().incarnation, EMPTY)

    def _checkpoint_name(self) -> str:
        """Other steps have another checkpoint: what was kept means something else."""
        meanings = [f.keyed.meaning() for spec in self.specs for f in spec.families if f.keyed]
        digest = hashlib.sha256("|".join(meanings).encode()).hexdigest()[:8]
        return f"{super()._checkpoint_name()}-{digest}"


def stepped(
    source: DataFrame, decode: Callable[[pa.Table], pa.Table], keyed: Keyed, unread_ms: int | None
) -> DataFrame:
    """Records as what the steps tell: a row for each key of an epoch, with its facts, if there are any.

    Rows travel as Arrow, a key's together: Spark's own way from rows to Python's objects and back costs a call each.
    """
    from pyspark.sql import Row
    from pyspark.sql.pandas.types import from_arrow_schema
    from pyspark.sql.streaming import StatefulProcessor

    columns, step = list(keyed.columns()), keyed.step(unread_ms)

    def decoded(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from _grouped(pa.Table.from_batches([batch]), decode, keyed.key, columns).to_batches()

    class Keeper(StatefulProcessor):
        """Spark's side of a step: hands it what was kept of the key, and keeps what it gives."""

        def init(self, handle: Any) -> None:
            self._kept = handle.getValueState("kept", "kept binary")

        def handleInputRows(self, key: Any, rows: Any, timerValues: Any) -> Any:  # noqa: N802, N803 - Spark's names
            parts = list(rows)
            said = json.dumps([json.loads(part["said"]) for part in parts if part["said"]])
            tables = [_opened(part["rows"]) for part in parts if part["rows"] is not None]
            if not tables:
                return iter([Row(key=_NOBODY, facts=None, left_out=0, crowded_out=0, said=said)])
            held = self._kept.get()
            made = _taken(step, None if held is None else bytes(held[0]), pa.concat_tables(tables))
            self._kept.update((made.kept,))
            counts = {"left_out": made.left_out, "crowded_out": made.crowded_out}
            return iter([Row(key=key[0], facts=_closed(made.facts), **counts, said=said)])

        def close(self) -> None:
            pass

    grouped = source.drop("topic").mapInArrow(decoded, from_arrow_schema(_GROUPED))
    return grouped.groupBy("key").transformWithState(Keeper(), _TOLD, "Update", "None")


def _taken(step: Step, kept: bytes | None, rows: pa.Table) -> Any:
    made = step(kept, rows)
    return made._replace(facts=made.facts if made.facts.num_rows else None)


def _grouped(
    raw: pa.Table, decode: Callable[[pa.Table], pa.Table], key: str, columns: Sequence[str]
) -> pa.Table:
    """Records decoded, a row for each key, and one that says what all were."""
    accepted = decode(raw)
    account = _Account(
        raw.num_rows - accepted.num_rows,
        extreme(accepted, "event_time", pc.min),
        extreme(accepted, "event_time", pc.max),
        extreme(raw, "broker_time", pc.min),
        extreme(raw, "broker_time", pc.max),
    )
    rows = accepted.select(columns).sort_by(key).combine_chunks()
    encoded = pc.run_end_encode(rows.column(key).combine_chunks()) if rows.num_rows else None
    keys = encoded.values.to_pylist() if encoded is not None else []
    ends = encoded.run_ends.to_pylist() if encoded is not None else []
    parts = [
        _closed(rows.slice(first, end - first)) for first, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return pa.table(
        {
            "key": [_NOBODY, *keys],
            "rows": [None, *parts],
            "said": [json.dumps(account), *[None] * len(keys)],
        },
        schema=_GROUPED,
    )


def _closed(rows: pa.Table | None) -> bytes | None:
    if rows is None:
        return None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def _opened(said: bytes) -> pa.Table:
    return pa.ipc.open_stream(bytes(said)).read_all()


def _summed(said: pa.ChunkedArray) -> _Account:
    accounts = [_Account(*one) for text in said.drop_null().to_pylist() for one in json.loads(text)]

    def of(place: int, which: Callable[..., int]) -> int | None:
        found = [one[place] for one in accounts if one[place] is not None]
        return which(found) if found else None

    return _Account(sum(one.refused for one in accounts), of(1, min), of(2, max), of(3, min), of(4, max))


def read_by(
    life: Incarnation, epoch: int, topic_ids: Mapping[str, str], earliest: Position
) -> tuple[Position, Position]:
    """Which records an epoch read, by its checkpoint: [start, end) of all partitions, also of those that had none."""
    begun: dict[str, dict[str, int]] = json.loads(life.starting_offsets)
    before = offsets_of(life.checkpoint, epoch - 1) if epoch else {}
    start: dict[str, dict[int, int]] = {}
    end: dict[str, dict[int, int]] = {}
    for topic, offsets in offsets_of(life.checkpoint, epoch).items():
        topic_id = topic_ids[topic]
        for partition, last in offsets.items():
            first = before.get(topic, {}).get(partition, begun.get(topic, {}).get(partition, -1))
            if first < 0:
                first = earliest.topics.get(topic_id, {}).get(int(partition), 0)
            start.setdefault(topic_id, {})[int(partition)] = min(first, last)
            end.setdefault(topic_id, {})[int(partition)] = last
    return Position(start), Position(end)


def _spans(start: Position, end: Position) -> Iterator[tuple[str, int, int, int]]:
    for topic_id, offsets in end.topics.items():
        for partition, last in offsets.items():
            yield topic_id, partition, start.topics[topic_id][partition], last


def _now_ms() -> int:
    return int(time.time() * 1000)


__all__: Sequence[str] = ["STATE_OPTIONS", "KeyedRun", "NotKeyed", "read_by", "stepped", "whole"]
