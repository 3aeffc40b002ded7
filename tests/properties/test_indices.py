"""Every registered index through its own transform: as a batch, and epoch by epoch through ``foreachBatch`` in Spark.

Many small cases share one Spark job: each has ids of its own, and the records of all are shuffled into one log. What a
record means is read here once more, from its accepted row, in plain Python.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import curate
from pipelines.contracts import ACTIONS, RECORD, Refusal, contract_of, decode, frames
from pipelines.curate import SOURCES
from pipelines.indexing import build
from pipelines.indexing import facts as fact
from pipelines.indexing.base import empty, open_base
from pipelines.indexing.delta import table_path
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import Position
from pipelines.indexing.spec import Documents, IndexSpec, NoState, Sums, Timeline, lineage, looked_up
from pipelines.indexing.streaming import HotStreamRun
from pipelines.indexing.view import View
from pipelines.indices import ADS_STREAMS, INDICES, KEYED
from pipelines.indices import STREAMS as ALL_STREAMS
from pipelines.users.relations import RELATIONS, with_pins
from tests import oracle
from tests.oracle import Statement

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

STREAMS = {name: stream for name, stream in sorted(ALL_STREAMS.items()) if name not in {*ADS_STREAMS, *KEYED}}
"""Those whose records say what there is, each for itself: what only names it has a test of its own (`test_ads_index`),
and what is made of all that is known of a key, too (`test_patterns`)."""
NAMES = sorted(name for name, spec in INDICES.items() if set(spec.streams) <= set(STREAMS))
CASES = 60
RECORDS_A_CASE = 14
PARTITIONS = 2
EPOCHS = 4
SHARDS = 2
HOUR_MS = 3_600_000
START_MS = 1_704_067_200_000
SEED = int(os.environ.get("TIDEMARK_TEST_SEED", "0")) or random.randrange(2**32)
SEEN = ("ad_id", "campaign_id", "advertiser_id", "category", "view_type")
Row = Mapping[str, Any]


def interaction(case: int, choose: random.Random) -> dict[str, Any]:
    """A record of ``user-interactions`` about one of a few events of a case; now and then one that is refused."""
    about = {"user_id": f"{case}-u{choose.randrange(2)}", "event_id": f"e{choose.randrange(4)}"}
    if choose.random() < 0.8:
        about["version"] = choose.randint(1, 3)
    if choose.random() < 0.2:
        return about | {"op": "delete"}
    hour = choose.randrange(4)
    time_ms = START_MS + hour * HOUR_MS + choose.choice((0, 1, HOUR_MS - 1))
    found_out = {"features": {"is_converted": choose.random() < 0.5}}
    if choose.random() < 0.2:  # what is found out later, alone
        return about | found_out | {"event_time": time_ms}
    said = about | {
        "pin_id": f"{case}-p{choose.randrange(3)}",
        "action": choose.choice((*ACTIONS[:2], ACTIONS[-1])),
        "event_time": choose.choice((time_ms, f"2024-01-01T{hour:02d}:30:00Z")),
    }
    if choose.random() < 0.5:
        said["quantity"] = choose.choice((1, 2, 0))
    if choose.random() < 0.3:
        said["surface"] = choose.choice(("home", "grün"))
    for name in SEEN:
        if choose.random() < 0.2:
            said[name] = choose.choice(("x", "y", None))
    if choose.random() < 0.2:
        del said["pin_id"]  # then it is about what else it names, or it is refused
    if choose.random() < 0.3:
        said["payload"] = choose.choice(
            ({"rank": 1}, {"rank": 2}, {"rank": 0})
        )  # 0 breaks the schema of a view
    return said | found_out if choose.random() < 0.2 else said


def pin_update(case: int, choose: random.Random) -> dict[str, Any]:
    """A record of ``pin-updates`` about one of a few pins of a case; now and then one that is refused."""
    about: dict[str, Any] = {"pin_id": f"{case}-p{choose.randrange(3)}"}
    if choose.random() < 0.8:
        about["version"] = choose.randint(1, 4)
    if choose.random() < 0.2:
        return about | {"op": "delete"}
    if choose.random() < 0.6:
        about["catalogue"] = {
            "title": choose.choice(("a", "b", None)),
            "category": choose.choice(("x", "y")),
            "new": choose.choice((1, 2)),
        }
    if choose.random() < 0.6:
        about["offer"] = {
            "price_usd_micros": choose.choice((1, 2, -1)),
            "is_available": choose.random() < 0.5,
        }
    return about


def follow(case: int, choose: random.Random) -> dict[str, Any]:
    """A record of ``user-follows`` of one of a few users of a case; now and then one that is refused."""
    about: dict[str, Any] = {"user_id": f"{case}-u{choose.randrange(2)}"}
    if choose.random() < 0.6:
        about["pin_id"] = choose.choice(("p0", "p1", "x"))
    if choose.random() < 0.5:
        about["followed_user_id"] = choose.choice(("x", f"{case}-u0"))
    if choose.random() < 0.8:
        about["version"] = choose.randint(1, 3)
    if choose.random() < 0.2:
        return about | {"op": "delete"}
    if choose.random() < 0.4:
        about["event_time"] = START_MS + choose.randrange(3) * HOUR_MS
    if choose.random() < 0.2:
        about["from"] = choose.choice(("home", "grün"))
    return about


SAID: dict[str, Callable[[int, random.Random], dict[str, Any]]] = {
    "user-interactions": interaction,
    "pin-updates": pin_update,
    "user-follows": follow,
}
"""What can be said in each topic; a new topic adds its own."""


def about_user(row: Row) -> list[Statement]:
    """``user_events`` as the design says."""
    said = ("pin_id", "action", "quantity", "value_usd_micros", "surface", *SEEN, "payload")
    families = (("interactions", "content_hash", said), ("features", "features_hash", ("features",)))
    return [
        Statement(
            family,
            row["user_id"].encode(),
            row["event_id"].encode(),
            (row["version"],),
            row["is_deleted"],
            row[hashed],
            time_ms_of(row),
            (),
            {name: row[name] for name in names},
        )
        for family, hashed, names in families
        if row[hashed] is not None
    ]


def about_counts(row: Row) -> list[Statement]:
    """``pin_counts`` as the design says."""
    if row["content_hash"] is None:  # features alone
        return []
    return [
        Statement(
            "counts",
            (row["pin_id"] or "").encode(),
            b"",
            (row["version"],),
            row["is_deleted"],
            row["content_hash"],
            time_ms_of(row),
            tuple(int(row["action"] == action and row["pin_id"] is not None) for action in ACTIONS),
            None,
            json.dumps([row["user_id"], row["event_id"]]).encode(),
        )
    ]


def about_pin(row: Row) -> list[Statement]:
    """``pins`` as the design says: a record sets whole families, a deletion takes all that a stream feeds."""
    return [
        Statement(
            family,
            row["pin_id"].encode(),
            b"",
            (row["version"],),
            row["is_deleted"],
            row[f"{family}_hash"],
            payload=row[family],
        )
        for family in ("catalogue", "offer")
        if row["is_deleted"] or row[family] is not None
    ]


def about_follows(row: Row) -> list[Statement]:
    """``user_follows`` as the design says: of statements that are alike, the one that was made first."""
    followed = row["followed_id"]
    return [
        Statement(
            "follows",
            row["user_id"].encode(),
            (row["kind"][0] + followed).encode(),
            (row["version"], row["is_deleted"], row["content_hash"], -taken_ms_of(row)),
            row["is_deleted"],
            row["content_hash"],
            taken_ms_of(row),
            (),
            {
                "pin_id": followed if row["kind"] == "pin" else None,
                "followed_user_id": followed if row["kind"] == "user" else None,
                "version": row["version"],
            },
        )
    ]


def about_changes(row: Row) -> list[Statement]:
    """``pin_changes`` as the design says: what a record says of each family is an event, a deletion is one of both."""
    fields = ("title", "category", "department", "brand", "price_usd_micros", "is_available")
    return [
        Statement(
            "changes",
            row["pin_id"].encode(),
            f"{row['version']:016x} {family}".encode(),
            (row["version"], row["is_deleted"], row[f"{family}_hash"], -taken_ms_of(row)),
            False,
            row[f"{family}_hash"],
            taken_ms_of(row),
            (),
            {"version": row["version"], "family": family, "is_gone": row["is_deleted"]}
            | {name: (row[family] or {}).get(name) for name in fields},
        )
        for family in ("catalogue", "offer")
        if row["is_deleted"] or row[family] is not None
    ]


MEANT: dict[str, Callable[[Row], list[Statement]]] = {
    "user_events": about_user,
    "pin_counts": about_counts,
    "pins": about_pin,
    "user_follows": about_follows,
    "pin_changes": about_changes,
}
"""What an accepted row means in each index; a new index adds its own."""


def time_ms_of(row: Row) -> int:
    """The event time of a row; 0 where it has none."""
    return round(row["event_time"].timestamp() * 1000) if row["event_time"] else 0


def taken_ms_of(row: Row) -> int:
    """The event time of a row; the broker's where it has none."""
    return time_ms_of(row) or ms_of(row["broker_time"])


def ms_of(time: datetime.datetime) -> int:
    """A time in whole ms since 1970."""
    return (time - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(milliseconds=1)


class World(NamedTuple):
    """What every topic holds, and the deltas that its stream made of it."""

    spark: SparkSession
    folder: Path
    records: dict[str, pa.Table]
    cut: Position
    vectors: dict[str, list[float]]

    def before(self, topic: str) -> pa.Table:
        """The records of a topic before the cut."""
        offsets = self.cut.topics[topic_id(topic)]
        rows = [r for r in self.records[topic].to_pylist() if r["offset"] < offsets[r["partition"]]]
        return pa.Table.from_pylist(rows, RECORD)


def topic_id(topic: str) -> str:
    """The id of a topic."""
    return f"id-of-{topic}"


def log_of(topic: str, choose: random.Random) -> pa.Table:
    """All cases' records, shuffled, some of them twice."""
    said = [SAID[topic](case, choose) for case in range(CASES) for _ in range(RECORDS_A_CASE)]
    said += choose.sample(said, len(said) // 8)
    choose.shuffle(said)
    ends = [0] * PARTITIONS
    rows = []
    for value in said:
        partition = choose.randrange(PARTITIONS)
        rows.append(
            {
                "topic_id": topic_id(topic),
                "partition": partition,
                "offset": ends[partition],
                "broker_time": (START_MS + 24 * HOUR_MS + choose.randrange(3)) * 1000
                + choose.choice((0, 999)),
                "key": b"",
                "value": json.dumps(value).encode(),
            }
        )
        ends[partition] += 1
    return pa.Table.from_pylist(rows, RECORD)


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Logs of every topic, run through every stream."""
    choose = random.Random(SEED)
    topics = sorted({topic for stream in STREAMS.values() for topic in stream.topics})
    records = {topic: log_of(topic, choose) for topic in topics}
    cut = {
        topic_id(topic): {
            p: choose.randint(0, sum(r == p for r in table.column("partition").to_pylist()))
            for p in range(PARTITIONS)
        }
        for topic, table in records.items()
    }
    vectors = {
        f"{case}-p{n}": [float(choose.randrange(-8, 8)) for _ in range(32)]
        for case in range(CASES)
        for n in range(4)
        if choose.random() < 0.7
    }
    folder = tmp_path_factory.mktemp("indices")
    made = World(spark, folder, records, Position(cut), vectors)
    for name in STREAMS:
        run_stream(made, name)
    return made


def run_stream(world: World, name: str) -> None:
    """Spark reads a stream's records in micro-batches and hands each to the shipped epoch function."""
    from pyspark.sql.pandas.types import from_arrow_schema

    stream = STREAMS[name]
    source = world.folder / "records" / name
    source.mkdir(parents=True)
    whole = pa.concat_tables([world.records[topic] for topic in stream.topics])
    size = -(-whole.num_rows // EPOCHS)
    for number in range(EPOCHS):
        file = source / f"{number}.parquet"
        pq.write_table(whole.slice(number * size, size), file)
        os.utime(file, (number + 1, number + 1))
    looks_up = any(f.looks_up for spec in INDICES.values() for f in spec.families if f.stream == name)
    run = HotStreamRun(
        stream,
        INDICES.values(),
        deltas=world.folder / "delta",
        checkpoints=world.folder / "checkpoints",
        state=frozen(world) if looks_up else None,  # pins are first: streams are in the order of their names
    )
    epochs: list[int] = []

    def epoch(batch: DataFrame, number: int) -> None:
        run.run_epoch(batch, number, 1)
        run.run_epoch(batch, number, 1)  # Spark may repeat an epoch
        epochs.append(number)

    reader = world.spark.readStream.schema(from_arrow_schema(RECORD)).option("maxFilesPerTrigger", 1)
    writer = reader.parquet(str(source)).writeStream.foreachBatch(epoch)
    query = writer.option("checkpointLocation", str(world.folder / "spark" / name)).trigger(availableNow=True)
    query.start().awaitTermination()
    assert len(epochs) == EPOCHS


class Frozen(NamedTuple):
    """Pins that stay as they are, for the rows of an epoch and of a batch."""

    view: DocumentsView
    tables: Mapping[str, DataFrame]

    def look_up(self, name: str, rows: Any) -> Any:
        if isinstance(rows, pa.Table):
            return with_pins(rows, self.view)
        return RELATIONS[name](rows, self.tables.__getitem__)


def frozen(world: World) -> Frozen:
    """What is known of pins when all of their records are read."""
    view = delta_view(world, INDICES["pins"], None)
    assert isinstance(view, DocumentsView)
    source = SOURCES["pin_updates"]
    raw = world.spark.createDataFrame(world.records[source.contract.topic])
    judged = curate.judge(source, frames.judged(source.contract, raw))
    return Frozen(view, {part.table: curate.standing(source, judged, part) for part in source.parts})


def indexed(world: World, said: list[Statement]) -> list[Statement]:
    """What users did, with what all records say of its pin."""
    pins = oracle.documents(statements(world, INDICES["pins"], world.records.__getitem__), "catalogue")
    found = []
    for one in said:
        if one.family != "interactions":
            found.append(one)
            continue
        assert one.payload is not None
        pin = pins.get((one.payload["pin_id"] or "").encode(), {})
        kept = {name: (pin.get(family) or {}).get(column) for name, (family, column) in KEPT_OF_PINS.items()}
        found.append(one._replace(payload={**one.payload, **kept}))
    return found


KEPT_OF_PINS = {
    "indexed_category": ("catalogue", "category"),
    "indexed_department": ("catalogue", "department"),
    "indexed_brand": ("catalogue", "brand"),
    "indexed_price_usd_micros": ("offer", "price_usd_micros"),
    "indexed_is_available": ("offer", "is_available"),
}


def statements(world: World, spec: IndexSpec, records: Callable[[str], pa.Table]) -> list[Statement]:
    """What records of the index's topics mean in it."""
    found = []
    for stream in spec.streams:
        for topic in STREAMS[stream].topics:
            for record in records(topic).to_pylist():
                broker_time_ms = ms_of(record["broker_time"])
                row = decode(contract_of(topic), record["value"], broker_time_ms)
                if not isinstance(row, Refusal):
                    found += MEANT[spec.name]({**row, "broker_time": record["broker_time"]})
    return indexed(world, found) if spec.name == "user_events" else found


def modelled(world: World, spec: IndexSpec) -> list[Statement]:
    """What the base-only families hold."""
    return [
        Statement(family.name, pin.encode(), payload={family.schema.names[0]: vector})
        for family in spec.families
        if family.stream is None
        for pin, vector in world.vectors.items()
    ]


def facts_of(world: World, spec: IndexSpec, records: Callable[[str], pa.Table]) -> DataFrame:
    """The facts of a batch, through the index's own transforms, in Spark."""
    parts = []
    for family in spec.families:
        if family.stream is None:
            vectors = pa.table({"pin_id": list(world.vectors), "vector": list(world.vectors.values())})
            parts.append(family.transform(world.spark.createDataFrame(vectors), None))
            continue
        stream = STREAMS[family.stream]
        raw = pa.concat_tables([records(topic) for topic in stream.topics])
        decoded = world.spark.createDataFrame(stream.decode(raw))
        state = frozen(world) if family.looks_up else NoState()
        parts.append(family.transform(looked_up(family, decoded, state), state))
    union = functools.reduce(lambda a, b: a.unionByName(b, allowMissingColumns=True), parts)
    return union.select(*fact.schema(spec).names)


def batch_view(
    world: World, spec: IndexSpec, name: str, cut: Position, records: Callable[[str], pa.Table]
) -> View:
    """A base that Spark's executors build of records, mapped, with the delta that the stream made."""
    directory = world.folder / "bases" / spec.name / name
    build.build(spec, facts_of(world, spec, records), directory, build.Meta(name, cut), shard_count=SHARDS)
    return delta_view(world, spec, directory)


def delta_view(world: World, spec: IndexSpec, directory: Path | None) -> View:
    """The delta over a base, or over none."""
    base = open_base(spec, directory) if directory else empty(spec)
    overlay = Overlay(base, table_path(world.folder / "delta", spec.name, lineage(spec)), 10**9)
    overlay.catch_up()
    return overlay.view


def flat(event: oracle.Event, families: list[str]) -> dict[str, Any]:
    """An event's columns, then its further families."""
    first, *others = families
    return dict(event.payloads[first] or {}) | {family: event.payloads.get(family) for family in others}


def assert_equal(view: View, spec: IndexSpec, accepted: Iterable[Statement]) -> None:
    """Every answer is what the oracle says."""
    accepted = list(accepted)
    keys = sorted({s.key for s in accepted})
    assert len({key.split(b"-")[0] for key in keys if b"-" in key}) >= 50, "too few cases"
    where = f"TIDEMARK_TEST_SEED={SEED}"
    match spec.read:
        case Documents(presence):
            expected = oracle.documents(accepted, presence)
            for key, found in zip(keys, view.get(keys), strict=True):
                assert found == expected.get(key), (where, key)
        case Timeline():
            families = [family.name for family in spec.families]
            by_key: dict[bytes, list[Statement]] = {}
            for statement in accepted:
                by_key.setdefault(statement.key, []).append(statement)
            for key in keys:
                wanted = oracle.events(by_key[key], key, families, None)
                table = view.timeline(key).table.to_pylist()
                found = [(r.pop("id"), r.pop("time_ms"), r) for r in table]
                assert found == [(e.id, e.time_ms, flat(e, families)) for e in wanted], (where, key)
        case Sums(width_ms):
            totals = oracle.sums(accepted, width_ms)
            for key in keys:
                assert view.sums(key) == totals.get(key, {}), (where, key)


def test_what_records_mean_is_known_for_every_index_and_topic() -> None:
    assert set(MEANT) == set(NAMES)
    assert {topic for stream in STREAMS.values() for topic in stream.topics} <= set(SAID)


@pytest.mark.parametrize("name", NAMES)
def test_epochs_alone_equal_the_oracle(world: World, name: str) -> None:
    spec = INDICES[name]
    view = delta_view(world, spec, None)
    assert_equal(view, spec, statements(world, spec, world.records.__getitem__))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_alone_equals_the_oracle(world: World, name: str) -> None:
    spec = INDICES[name]
    everything = Position({topic_id(t): dict.fromkeys(range(PARTITIONS), 10**6) for t in world.records})
    view = batch_view(world, spec, "whole", everything, world.records.__getitem__)
    assert view.overlay_facts == 0
    assert_equal(view, spec, statements(world, spec, world.records.__getitem__) + modelled(world, spec))


@pytest.mark.parametrize("name", NAMES)
def test_a_base_and_the_epochs_after_its_cut_equal_the_oracle(world: World, name: str) -> None:
    spec = INDICES[name]
    view = batch_view(world, spec, "cut", world.cut, world.before)
    accepted = statements(world, spec, world.records.__getitem__) + modelled(world, spec)
    assert_equal(view, spec, accepted)
