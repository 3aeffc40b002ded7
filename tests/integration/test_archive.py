"""The archive stream on a real broker and real Spark: every record once, whatever dies in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from pyspark.errors import StreamingQueryException
from pyspark.sql import SparkSession

from pipelines import curate, failpoints, lake
from pipelines.ads import evidence
from pipelines.ads.explain import Part
from pipelines.contracts import ADS_CHANGES, CONTRACTS, PIN_UPDATES, USER_INTERACTIONS, Contract
from pipelines.indexing.position import Position, merge_all
from pipelines.ingest import archive, dead_letters, load
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings
from pipelines.spark import session
from tests.conftest import small_settings
from tests.topics import make_again

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 120
Values = list[bytes | None]


class Crash(Exception):
    """Stands for the death of the process."""


@pytest.fixture
def own_archive(broker: Settings, spark: SparkSession, tmp_path: Path) -> tuple[SparkSession, Settings]:
    """A lake of its own, and topics that are made again for each test."""
    servers = broker.kafka.bootstrap_servers
    settings = small_settings(
        tmp_path / "home",
        KAFKA__IS_EMBEDDED="false",
        KAFKA__BOOTSTRAP_SERVERS=servers,
        STREAMS__ARCHIVE_TRIGGER_MS=500,
    )
    make_again(settings, list(CONTRACTS))
    return session(settings, "tests"), settings


def event(number: int, **changes: object) -> bytes:
    record = {
        "user_id": f"u{number % 7}",
        "event_id": str(number),
        "pin_id": "p",
        "action": "view",
        "event_time": 0,
    }
    return json.dumps(record | changes).encode()


def send(settings: Settings, contract: Contract, values: Values) -> Position:
    with Producer(settings) as producer:
        deliveries = producer.send(
            contract.topic, [(str(n).encode(), value) for n, value in enumerate(values)]
        )
    return merge_all(delivery.position for delivery in deliveries)


def held(settings: Settings) -> Position:
    return lake.positions(settings, ["raw.user_interactions", "raw.pin_updates"])


def run_until(spark: SparkSession, settings: Settings, position: Position) -> None:
    """Run the archive until the raw tables hold the position, as its host does: started again where it ends early.

    Spark 4.1.1 (SPARK-57438) ends a query after a batch that it runs again from its log: the Kafka source reports how
    far it lags behind offsets that it has not asked for yet. The batch is committed, and the next start goes on.
    """
    for _ in range(2):
        query = archive.start(spark, settings)
        try:
            wait(lambda query=query: held(settings).covers(position) or not query.isActive)  # type: ignore[misc]
            query.processAllAvailable()
            break
        except StreamingQueryException as error:
            assert 'value of "scala.Option.get()" is null' in str(error)  # noqa: PT017
        finally:
            query.stop()
    else:
        pytest.fail("the archive ended twice")
    assert held(settings).covers(position)


def wait(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def values_in(spark: SparkSession, name: str) -> list[bytes | None]:
    rows = lake.read(spark, name).collect()
    assert len({(row["topic_id"], row["partition"], row["offset"]) for row in rows}) == len(rows)
    assert all(row["load_id"] is None and row["broker_time"] is not None for row in rows)
    return sorted((row["value"] and bytes(row["value"]) for row in rows), key=lambda value: value or b"")


def in_order(values: Values) -> Values:
    return sorted(values, key=lambda value: value or b"")


def test_every_record_is_archived_and_the_bad_ones_are_dead_letters_too(
    own_archive: tuple[SparkSession, Settings],
) -> None:
    spark, settings = own_archive
    events: Values = [event(n) for n in range(50)] + [b"{", None, b"", b"\xff\x00", event(50, quantity=0)]
    pins: Values = [b'{"pin_id": "p", "catalogue": {}}', b"[]"]
    position = send(settings, USER_INTERACTIONS, events).merge(send(settings, PIN_UPDATES, pins))
    run_until(spark, settings, position)
    assert values_in(spark, "raw.user_interactions") == in_order(events)
    assert values_in(spark, "raw.pin_updates") == in_order(pins)
    assert held(settings) == position
    assert dead_letters.counted(settings) == {
        ("pin-updates", "not_an_object"): 1,
        ("user-interactions", "broken_json"): 1,
        ("user-interactions", "broken_utf8"): 1,
        ("user-interactions", "empty_value"): 2,
        ("user-interactions", "out_of_range"): 1,
    }
    (letter,) = dead_letters.listed(settings, reason="broken_utf8")
    assert letter.value == b"\xff\x00"
    assert dead_letters.explain(settings, letter.place).letter == letter
    newest = lake.current_snapshot(settings, "raw.user_interactions")
    assert newest is not None
    assert newest.summary[lake.STREAM] == "archive"
    assert newest.summary[lake.INCARNATION] == "1"
    # A restart goes on where it was, in the same incarnation.
    more: Values = [event(n) for n in range(100, 120)]
    run_until(spark, settings, send(settings, USER_INTERACTIONS, more))
    assert values_in(spark, "raw.user_interactions") == in_order(events + more)
    assert lake.committed_epoch(settings, "raw.user_interactions", archive.STREAM, 1) is not None


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_epoch_that_is_run_again_changes_nothing(
    own_archive: tuple[SparkSession, Settings], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """Dies after the dead letters, after the first raw table, after the second one."""
    spark, settings = own_archive
    events: Values = [event(n) for n in range(30)] + [b"{"] * 3
    pins: Values = [b'{"pin_id": "p", "catalogue": {}}', b"[]"]
    position = send(settings, USER_INTERACTIONS, events).merge(send(settings, PIN_UPDATES, pins))
    passed = []

    def crash(name: str) -> None:
        passed.append(name)
        if len(passed) == nth:
            raise Crash(name)

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", crash)
        query = archive.start(spark, settings)
        wait(lambda: not query.isActive)
        assert "Crash" in str(query.exception())
    counting = sum(dead_letters.counted(settings).values())
    assert counting == {1: 0, 2: 3, 3: 4}[nth]
    run_until(spark, settings, position)
    check_once(spark, settings, events, pins)


def check_once(spark: SparkSession, settings: Settings, events: Values, pins: Values) -> None:
    assert values_in(spark, "raw.user_interactions") == in_order(events)
    assert values_in(spark, "raw.pin_updates") == in_order(pins)
    assert len(values_in(spark, "raw.dead_letters")) == sum(dead_letters.counted(settings).values()) == 4


@pytest.mark.parametrize("nth", [1, 2])
def test_a_checkpoint_that_is_gone_begins_a_new_incarnation(
    own_archive: tuple[SparkSession, Settings], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    spark, settings = own_archive
    events: Values = [event(n) for n in range(30)] + [b"{"] * 3
    pins: Values = [b'{"pin_id": "p", "catalogue": {}}', b"[]"]
    run_until(spark, settings, send(settings, USER_INTERACTIONS, events[:10]))
    position = send(settings, USER_INTERACTIONS, events[10:]).merge(send(settings, PIN_UPDATES, pins))
    passed = []

    def crash(name: str) -> None:
        passed.append(name)
        if len(passed) == nth:
            raise Crash(name)

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "hit", crash)
        query = archive.start(spark, settings)
        wait(lambda: not query.isActive)
    shutil.rmtree(settings.paths.checkpoints)
    run_until(spark, settings, position)
    check_once(spark, settings, events, pins)
    last = lake.committed_epoch(settings, "raw.user_interactions", archive.STREAM)
    assert last is not None
    assert last[0] == 2 if nth == 1 else last[0] >= 1


def test_a_topic_that_is_made_again_is_another_topic(own_archive: tuple[SparkSession, Settings]) -> None:
    spark, settings = own_archive
    first: Values = [event(n) for n in range(10)]
    before = send(settings, USER_INTERACTIONS, first)
    run_until(spark, settings, before)
    make_again(settings, [USER_INTERACTIONS.topic])
    second: Values = [event(n) for n in range(10, 15)]
    after = send(settings, USER_INTERACTIONS, second)
    assert not after.topics.keys() & before.topics.keys()
    run_until(spark, settings, after)
    assert values_in(spark, "raw.user_interactions") == in_order(first + second)
    assert held(settings).covers(before.merge(after))


def test_what_the_broker_expired_before_it_was_archived_is_written_down(
    own_archive: tuple[SparkSession, Settings],
) -> None:
    spark, settings = own_archive
    first: Values = [event(n) for n in range(12)]
    run_until(spark, settings, send(settings, USER_INTERACTIONS, first))
    before = held(settings)
    lost = send(settings, USER_INTERACTIONS, [event(n) for n in range(12, 40)])
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    ends = [
        TopicPartition(USER_INTERACTIONS.topic, p, o)
        for o_of in lost.topics.values()
        for p, o in o_of.items()
    ]
    for future in admin.delete_records(ends).values():
        future.result()
    last: Values = [event(n) for n in range(40, 50)]
    run_until(spark, settings, send(settings, USER_INTERACTIONS, last))
    assert values_in(spark, "raw.user_interactions") == in_order(first + last)
    noted = {
        (r["topic_id"], r["partition"]): (r["start"], r["end"])
        for r in lake.read(spark, "ops.losses").collect()
    }
    assert noted == {
        (topic_id, partition): (before.topics[topic_id][partition], end)
        for topic_id, offsets in lost.topics.items()
        for partition, end in offsets.items()
        if before.topics[topic_id].get(partition, 0) not in (0, end)
    }
    assert noted


def test_explain_finds_what_was_said_of_a_row(own_archive: tuple[SparkSession, Settings]) -> None:
    spark, settings = own_archive
    records: list[tuple[bytes, dict[str, object]]] = [
        (b"c1", {"table": "campaigns", "key": "c1", "version": 1, "values": {"status": "active"}}),
        (b'{"campaign_id":"c1"}', {"table": "campaigns", "key": "c1", "version": 2, "op": "delete"}),
        (b"c1", {"table": "campaigns", "key": "c1", "version": 3, "values": {"daily_budget_usd_micros": -1}}),
        (b"c1", {"table": "pins", "key": "c1", "version": 4, "values": {"title": "x"}}),
        (b"c2", {"table": "campaigns", "key": "c2", "version": 5, "values": {"status": "active"}}),
    ]
    parts = [Part("campaigns", "c1"), Part("ads", "a1"), Part("advertisers", None)]
    assert evidence.of_archive(settings, parts) == {}  # nothing was archived yet
    with Producer(settings) as producer:
        taken = producer.send(ADS_CHANGES.topic, [(key, json.dumps(said).encode()) for key, said in records])
    position = merge_all(delivery.position for delivery in taken)
    query = archive.start(spark, settings)
    try:
        wait(lambda: lake.positions(settings, [ADS_CHANGES.raw_table]).covers(position))
    finally:
        query.stop()
    ((row, said),) = evidence.of_archive(settings, parts).items()
    assert row == ("campaigns", "c1")
    by_version = {one.version: one for one in said}
    assert {version: one.columns for version, one in by_version.items()} == {1: ("status",), 2: None, 0: ()}
    assert by_version[0].refusal is not None and by_version[0].refusal.startswith("out_of_range: ")
    assert {one.refusal for version, one in by_version.items() if version} == {None}
    assert {one.place for one in said} == {
        f"{one.topic_id}/{one.partition}/{one.offset}" for one in taken[:3]
    }


CHILD = """
import sys
from pipelines import settings, spark
from pipelines.ingest import archive
s = settings.load()
archive.start(spark.session(s, "killed"), s).awaitTermination(100)
"""


def test_kill_9_after_the_commit(own_archive: tuple[SparkSession, Settings]) -> None:
    spark, settings = own_archive
    events: Values = [event(n) for n in range(30)] + [b"{"] * 3
    pins: Values = [b'{"pin_id": "p", "catalogue": {}}', b"[]"]
    position = send(settings, USER_INTERACTIONS, events).merge(send(settings, PIN_UPDATES, pins))
    environment = {**os.environ, **settings.environment, "PYTHONPATH": str(ROOT)}
    environment[failpoints.VARIABLE] = "archive.after_iceberg_commit"
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, cwd=ROOT, check=False, timeout=300)
    assert child.returncode == -signal.SIGKILL
    assert not held(settings).covers(position)
    assert held(settings) != Position()
    run_until(spark, settings, position)
    check_once(spark, settings, events, pins)


def test_events_that_came_by_kafka_and_by_a_load_count_once(
    own_archive: tuple[SparkSession, Settings], tmp_path: Path
) -> None:
    """The load says twelve events, six of them in Kafka before it and three after; one is edited by Kafka."""
    spark, settings = own_archive
    lines = [json.loads(event(number)) for number in range(12)]
    file = tmp_path / "history.jsonl"
    file.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    run_until(spark, settings, send(settings, USER_INTERACTIONS, [event(n) for n in range(6)]))
    loaded = load.load_files(spark, settings, file, USER_INTERACTIONS)
    after = [event(9), event(10), event(11), event(11, version=2, action="save"), event(12)]
    run_until(spark, settings, send(settings, USER_INTERACTIONS, after))
    assert held(settings).covers(loaded.position)
    assert load.load_files(spark, settings, file, USER_INTERACTIONS).is_repeat
    snapshot = lake.current_snapshot(settings, "raw.user_interactions")
    assert snapshot is not None
    raw = lake.read(spark, "raw.user_interactions", snapshot.id)
    source = curate.SOURCES[USER_INTERACTIONS.name]
    curated = curate.curate(source, raw, rows=snapshot.rows, snapshot_id=snapshot.id)
    try:
        account = curated.account.to_json()
        assert {fate: account[fate] for fate in curate.FATES} == {
            "current": 13,
            "repeated": 9,
            "superseded": 1,
            "tombstones": 0,
        }
        rows = curated.table(source.parts[0]).collect()
        found = {row["event_id"]: (row["action"], row["version"]) for row in rows}
        assert len(rows) == 13
        assert found == {str(n): ("view", 1) for n in range(13)} | {"11": ("save", 2)}
    finally:
        curated.close()
