"""Two lineages of one index beside each other: on one topic, with records flowing, with a swap.

The transforms are two small ones of this module, so that each lineage has an oracle of its own: plain Python over
everything that was sent.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming import StreamingQuery

from pipelines.contracts import USER_INTERACTIONS, decode_table
from pipelines.indexing import build, delta, facts, lineages
from pipelines.indexing.base import Manifest
from pipelines.indexing.position import Position, merge_all
from pipelines.indexing.replica import Follower
from pipelines.indexing.spec import Family, IndexSpec, State, Timeline, lineage
from pipelines.indexing.streaming import HotStream, HotStreamRun
from pipelines.indexing.timelines import TimelineView
from pipelines.indexing.versions import Pointer, Versions
from pipelines.ingest import broker
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings

USERS = 9
Record = dict[str, Any]

OLD_COLUMNS = pa.schema([("pin_id", pa.string()), ("action", pa.string())])
NEW_COLUMNS = pa.schema([("pin_id", pa.string()), ("action", pa.string()), ("quantity", pa.int64())])


def _events(rows: DataFrame, payload: str) -> DataFrame:
    return facts.frame(
        rows,
        family="events",
        identity=["user_id", "event_id"],
        key="user_id",
        id="event_id",
        time_ms="coalesce(unix_millis(event_time), 0)",
        version=["version"],
        is_deleted="is_deleted",
        content_hash="content_hash",
        payload=payload,
    )


def as_it_was(rows: DataFrame, state: State) -> DataFrame:
    return _events(rows, "struct(pin_id, action)")


def as_it_will_be(rows: DataFrame, state: State) -> DataFrame:
    """Without what was hidden, the action in capitals, and one column more."""
    kept = rows.filter("is_deleted OR action <> 'hide'")
    return _events(kept, "struct(pin_id, upper(action) AS action, quantity)")


def spec_of(schema: pa.Schema, transform: Callable[[DataFrame, State], DataFrame]) -> IndexSpec:
    return IndexSpec("clicks", (Family("events", schema, "clicks", transform),), Timeline())


OLD, NEW = spec_of(OLD_COLUMNS, as_it_was), spec_of(NEW_COLUMNS, as_it_will_be)


def event(number: int) -> Record:
    """Of every seventh the action is edited by the eighth record after it."""
    is_edit = number % 7 == 0 and number >= 8
    of = number - 8 if is_edit else number
    return {
        "user_id": f"u{of % USERS}",
        "event_id": f"e{of}",
        "pin_id": f"p{of % 3}",
        "action": ("save", "view", "hide")[(number if is_edit else of) % 3],
        "event_time": 1_700_000_000_000 + of * 1000,
        "version": 2 if is_edit else 1,
        "quantity": 1 + of % 4,
    }


def expected(sent: list[Record], is_new: bool) -> dict[str, dict[str, tuple[Any, ...]]]:
    """User → event → what a lineage answers of it; the oracle, in plain Python."""
    standing: dict[tuple[str, str], Record] = {}
    for record in sent:
        if is_new and record["action"] == "hide":
            continue
        identity = (record["user_id"], record["event_id"])
        if identity not in standing or record["version"] > standing[identity]["version"]:
            standing[identity] = record
    found: dict[str, dict[str, tuple[Any, ...]]] = {f"u{number}": {} for number in range(USERS)}
    for (user, name), record in standing.items():
        action = record["action"].upper() if is_new else record["action"]
        found[user][name] = (record["pin_id"], action, record["quantity"] if is_new else None)
    return found


class World(NamedTuple):
    spark: SparkSession
    settings: Settings
    stream: HotStream
    sent: list[Record]

    @property
    def versions(self) -> Versions:
        return Versions(self.settings.paths.indices, "clicks")

    def path(self, spec: IndexSpec) -> Path:
        return delta.table_path(self.settings.paths.delta, spec.name, lineage(spec))

    def send(self, count: int) -> Position:
        new = [event(number) for number in range(len(self.sent), len(self.sent) + count)]
        with Producer(self.settings) as producer:
            values = [(r["user_id"].encode(), json.dumps(r).encode()) for r in new]
            deliveries = producer.send(self.stream.topics[0], values)
        self.sent.extend(new)
        return merge_all(delivery.position for delivery in deliveries)

    def run(self, spec: IndexSpec) -> HotStreamRun:
        paths = self.settings.paths
        return HotStreamRun(self.stream, [spec], deltas=paths.delta, checkpoints=paths.checkpoints)

    def feed(self, spec: IndexSpec) -> StreamingQuery:
        """What the streaming process of that code does."""
        lineages.say_feeding(self.path(spec), "test", Path.cwd())
        return self.run(spec).start(
            self.spark.newSession(),  # as if in another process: a session has one query of a name
            servers=self.settings.kafka.bootstrap_servers,
            topic_ids=broker.ensure_topics(self.settings, self.stream.topics),
            partitions=self.settings.kafka.partitions,
            trigger_ms=300,
            max_rows=10_000,
        )

    def build(self, spec: IndexSpec, cut: Position) -> Manifest:
        """A base of everything before a cut, read from the topic as a build reads the archive."""
        topic_ids = broker.ensure_topics(self.settings, self.stream.topics)
        (topic, topic_id), offsets = next(iter(topic_ids.items())), next(iter(cut.topics.values()))
        partitions = range(self.settings.kafka.partitions)
        source = (
            self.spark.read.format("kafka")
            .option("kafka.bootstrap.servers", self.settings.kafka.bootstrap_servers)
            .option("subscribe", topic)
            .option("endingOffsets", json.dumps({topic: {str(p): offsets.get(p, 0) for p in partitions}}))
            .load()
        )
        rows = source.selectExpr(
            "topic",
            f"'{topic_id}' AS topic_id",
            "partition",
            "offset",
            "cast(NULL AS string) AS load_id",
            "cast(NULL AS bigint) AS load_row",
            "timestamp AS broker_time",
            "key",
            "value",
        )
        decoded = self.stream.decode(rows.toArrow())
        version = self.versions.new_version(lineage(spec))
        meta = build.Meta(version, cut, None)
        found = self.run(spec).facts(spec, decoded, self.spark)
        return build.build_local(spec, found, self.versions.new_path(version), meta, shard_count=2)

    def follower(self, spec: IndexSpec, name: str) -> Follower:
        """A serving process with the code of a lineage."""
        paths = self.settings.paths
        topics = frozenset(self.stream.topics)
        return Follower(spec, paths.indices, paths.delta, topics=topics, max_facts=100_000, replica=name)


def accepted(records: pa.Table) -> pa.Table:
    return decode_table(USER_INTERACTIONS, records).accepted


@pytest.fixture
def world(own_spark: SparkSession, kafka_settings: Settings) -> World:
    topic = f"clicks-{uuid.uuid4().hex[:8]}"
    stream = HotStream("clicks", (topic,), accepted)
    broker.ensure_topics(kafka_settings, stream.topics)
    return World(own_spark, kafka_settings, stream, [])


def answers(follower: Follower) -> dict[str, dict[str, tuple[Any, ...]]]:
    view = follower.view
    assert isinstance(view, TimelineView)
    names = [field.name for field in follower.spec.families[0].schema]
    found = {}
    for number in range(USERS):
        rows = view.timeline(f"u{number}".encode()).table.to_pylist()
        assert all(set(row) == {"id", "time_ms", *names} for row in rows)
        found[f"u{number}"] = {
            row["id"].decode(): (row["pin_id"], row["action"], row.get("quantity")) for row in rows
        }
    return found


def without_quantity(found: dict[str, dict[str, tuple[Any, ...]]]) -> dict[str, dict[str, tuple[Any, ...]]]:
    return {user: {name: (*e[:2], None) for name, e in events.items()} for user, events in found.items()}


@contextmanager
def flowing(world: World) -> Iterator[list[Position]]:
    """Records are sent all the while; at the end the list has where they came to."""
    is_over, reached = threading.Event(), []

    def send() -> None:
        while not is_over.is_set():
            reached.append(world.send(6))
            time.sleep(0.15)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield reached
    finally:
        is_over.set()
        thread.join()


@contextmanager
def asking(followers: list[Follower]) -> Iterator[None]:
    """Readers all the while: what was answered once, and is in both lineages, is never missing again."""
    is_over, failures = threading.Event(), []

    def ask(follower: Follower) -> None:
        seen: set[str] = set()
        try:
            while not is_over.is_set():
                held = {n for events in answers(follower).values() for n, e in events.items()}
                missing = {name for name in seen - held if not is_hidden_once(name)}
                assert not missing, missing
                seen |= held
                time.sleep(0.02)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(follower,)) for follower in followers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def is_hidden_once(name: str) -> bool:
    """Whether any record of an event hides it, so that the lineages may differ about it."""
    number = int(name[1:])
    return "hide" in {event(number)["action"], event(number + 8)["action"]}


def await_that(is_true: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def publish(world: World, manifest: Manifest) -> Pointer:
    pointer = world.versions.publish(manifest.version)
    world.versions.wait_swapped(pointer, 60)
    return pointer


def test_a_new_lineage_is_fed_beside_the_old_one_published_as_a_pair_and_gone_back_from(world: World) -> None:
    """Freshness goes on all the while, and each lineage is what its own oracle says."""
    assert lineage(OLD) != lineage(NEW)
    first = world.build(OLD, world.send(40))
    world.versions.publish(first.version)
    old_query = world.feed(OLD)
    old_code, new_code = world.follower(OLD, "old"), world.follower(NEW, "new")
    for follower in (old_code, new_code):
        follower.start()
    queries = [old_query]
    try:
        with flowing(world) as reached, asking([old_code, new_code]):
            assert old_code.wait(world.send(5), 60)
            assert new_code.wait(reached[-1], 60), (
                "new code serves the old lineage until the new one is there"
            )
            assert not new_code.is_stale
            candidate = world.build(NEW, reached[-1])
            assert lineages.begin_at(world.path(NEW), candidate.cut)
            queries.append(world.feed(NEW))
            deltas = world.settings.paths.delta
            lineages.await_caught_up(deltas, first, candidate, 60)
            pointer = publish(world, candidate)
            assert lineages.end_others(deltas, candidate) == [lineage(OLD)]
            old_query.stop()
            assert [f.view.base.version for f in (old_code, new_code)] == [pointer.version] * 2
            time.sleep(1)
        for follower in (old_code, new_code):
            assert follower.wait(merge_all(reached), 60)
            assert not follower.is_stale
        assert answers(new_code) == expected(world.sent, True)
        assert answers(old_code) == without_quantity(expected(world.sent, True))
        starts = [marker.start for marker in delta.markers(world.path(NEW))]
        first_offsets, cut = min_offsets(starts), next(iter(candidate.cut.topics.values()))
        assert {p: first_offsets[p] for p in cut} == cut, "it begins at its base's cut"

        back = world.versions.rollback(first.version, deltas=deltas)
        world.versions.wait_swapped(back, 60)
        assert (old_code.is_stale, new_code.is_stale) == (True, True)
        until = lineages.progress(deltas, candidate).position()
        lineages.reopen(world.path(OLD), until)
        queries.append(world.feed(OLD))

        def is_fresh() -> bool:
            lineages.say_feeding(
                world.path(OLD), "test", Path.cwd()
            )  # as the streaming process does all the while
            if not queries[-1].isActive:  # which begins a query that failed again, too
                queries.append(world.feed(OLD))
            return not (old_code.is_stale or new_code.is_stale)

        await_that(is_fresh, "the old lineage to catch up")
        assert answers(old_code) == expected(world.sent, False)
        assert answers(new_code) == without_quantity(expected(world.sent, False))
    finally:
        for query in queries:
            query.stop()
        for follower in (old_code, new_code):
            follower.stop()


def min_offsets(starts: list[Position]) -> dict[int, int]:
    """Of each partition the first offset that any epoch has."""
    found: dict[int, int] = {}
    for offsets in (offsets for start in starts for offsets in start.topics.values()):
        for partition, offset in offsets.items():
            found[partition] = min(offset, found.get(partition, offset))
    return found
