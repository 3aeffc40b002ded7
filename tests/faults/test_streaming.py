"""The streaming process killed at every point that matters, its checkpoints deleted, its broker away.

One home for the whole module, with a broker of its own. Each test ends by looking for every event that was ever sent:
in its user's timeline, in the counts of its pin, in the archive.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from confluent_kafka import OFFSET_END, TopicPartition
from confluent_kafka.admin import AdminClient

from benchmarks import freshness
from benchmarks.freshness import Load
from jobs import processes
from pipelines import lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
from pipelines.indexing import delta
from pipelines.indexing.spec import lineage
from pipelines.indices import INDICES
from pipelines.ingest import broker as brokers
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings
from tests.conftest import small_settings
from tests.faults import running

RATE, SECONDS = 60, 2
LONGEST_OUTAGE_S = float(os.environ.get("TIDEMARK_TEST_OUTAGE_S", "10"))


class Ledger:
    """Everything that was accepted in this module, and a look for all of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loads: list[Load] = []

    def send(self, seconds: int = SECONDS) -> Load:
        """Some events over some seconds, so that several epochs carry them; returns when the broker has them."""
        load = Load(self.settings, uuid.uuid4().hex[:8], RATE, seconds)
        self.loads.append(load)
        load.run()
        return load

    def check(self) -> None:
        """Nothing is lost, nothing is there twice."""
        for load in self.loads:
            freshness.await_position(self.settings, load.position)
        found = [freshness.check(self.settings, load) for load in self.loads]
        assert [(lost, duplicated) for lost, duplicated, _ in found] == [(0, 0)] * len(self.loads)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A home with broker, collector and serving; the streams are the tests' own to start."""
    settings = small_settings(
        tmp_path_factory.mktemp("faults"), STREAMS__ARCHIVE_TRIGGER_MS=1000, STREAMS__NICE=0
    )
    with running.everything_stopped(settings):
        for name in ("broker", "collector", "serving"):
            running.start(settings, name)
        yield settings


@pytest.fixture(scope="module")
def ledger(home: Settings) -> Ledger:
    return Ledger(home)


def test_killed_at_every_point_in_turn_nothing_is_lost_or_counted_twice(
    home: Settings, ledger: Ledger
) -> None:
    """Each start first has to finish what the one before was killed in."""
    for failpoint in ("delta.before_commit", "delta.after_commit", "archive.after_iceberg_commit"):
        ledger.send()
        running.start_to_die(home, "streams", failpoint)
    ledger.send()
    running.start(home, "streams")
    ledger.check()


def test_a_record_that_breaks_its_contract_stops_nothing_and_is_a_dead_letter(
    home: Settings, ledger: Ledger
) -> None:
    running.start(home, "streams")
    with Producer(home) as producer:
        producer.send(USER_INTERACTIONS.topic, [(b"k", b'{"user_id": 7}'), (None, b"\xff"), (b"k", None)])
        producer.send(PIN_UPDATES.topic, [(b"k", b"[]")])
    ledger.send(1)
    ledger.check()
    listed = running.tidemark(home, "dead-letters", "list", "--json")
    counts = {(c["topic"], c["reason"]): c["count"] for c in json.loads(listed.stdout)["counts"]}
    assert sum(counts.values()) == 4
    assert counts[USER_INTERACTIONS.topic, "broken_utf8"] == 1
    assert counts[PIN_UPDATES.topic, "not_an_object"] == 1


def test_the_checkpoints_deleted_begin_a_new_incarnation_at_what_was_committed(
    home: Settings, ledger: Ledger
) -> None:
    running.start(home, "streams")
    ledger.send(1)
    ledger.check()
    processes.down(processes.supervisor(home), [running.process(home, "streams")])
    before = epochs(home)
    shutil.rmtree(home.paths.checkpoints)
    ledger.send()
    running.start(home, "streams")
    ledger.check()
    after = epochs(home)
    assert max(incarnation for incarnation, _ in after) == max(incarnation for incarnation, _ in before) + 1


def test_what_kafka_has_expired_is_read_from_the_archive(home: Settings, ledger: Ledger) -> None:
    running.start(home, "streams")
    ledger.send(1)
    ledger.check()
    assert running.tidemark(home, "stop", "user_interactions").returncode == 0
    before = epochs(home)
    missed = ledger.send()
    running.await_that(
        lambda: lake.position(home, "raw.user_interactions").covers(missed.position), "the archive to have it"
    )
    expire(home)
    ledger.send(1)
    assert running.tidemark(home, "start", "user_interactions").returncode == 0
    ledger.check()
    after = epochs(home)
    assert max(incarnation for incarnation, _ in after) == max(incarnation for incarnation, _ in before) + 2


def expire(home: Settings) -> None:
    """Let the broker delete all that it has of the events, as retention does after its time."""
    admin = AdminClient({"bootstrap.servers": home.kafka.bootstrap_servers})
    ids = brokers.topic_ids(home, [USER_INTERACTIONS.topic])
    partitions = admin.list_topics(timeout=10).topics[USER_INTERACTIONS.topic].partitions
    ends = [TopicPartition(USER_INTERACTIONS.topic, partition, OFFSET_END) for partition in partitions]
    for future in admin.delete_records(ends).values():
        future.result()
    running.await_that(
        lambda: any(o for offsets in brokers.earliest(home, ids).topics.values() for o in offsets.values()),
        "the broker to have deleted them",
    )


def epochs(home: Settings) -> list[tuple[int, int]]:
    spec = INDICES["user_events"]
    markers = delta.markers(delta.table_path(home.paths.delta, spec.name, lineage(spec)))
    return [(marker.incarnation, marker.epoch) for marker in markers]


def test_a_stream_stops_and_starts_by_name_and_the_others_go_on(home: Settings, ledger: Ledger) -> None:
    running.start(home, "streams")
    assert running.tidemark(home, "stop", "archive").returncode == 0
    archived = lake.position(home, "raw.user_interactions")
    load = ledger.send(1)
    freshness.await_position(home, load.position)
    time.sleep(2)
    assert lake.position(home, "raw.user_interactions") == archived
    assert running.tidemark(home, "start", "archive").returncode == 0
    ledger.check()


def test_the_broker_away_serving_answers_the_collector_refuses_the_streams_go_on(
    home: Settings, ledger: Ledger
) -> None:
    """Killed, not stopped. The collector answers 503, and whatever it acknowledged is there afterwards."""
    running.start(home, "streams")
    streams = running.record(home, "streams")
    before = ledger.send(1)
    freshness.await_position(home, before.position)
    acknowledged, refused = [], []
    ending = threading.Event()

    def post() -> None:
        while not ending.is_set():
            number = len(acknowledged) + len(refused)
            event = {
                "user_id": "away",
                "event_id": f"a{number}",
                "pin_id": "p",
                "action": "view",
                "event_time": 0,
            }
            answer = running.collector(home, "/v1/events", {"events": [event]})
            (acknowledged if answer.status == 200 else refused).append((answer.status, event["event_id"]))
            time.sleep(0.1)

    client = threading.Thread(target=post)
    client.start()
    try:
        running.await_that(lambda: len(acknowledged) > 5, "the collector to acknowledge some")
        os.kill(running.record(home, "broker").pid, signal.SIGKILL)
        deadline = time.monotonic() + LONGEST_OUTAGE_S
        while time.monotonic() < deadline:
            found = freshness.timeline(f"http://{home.serving.host}:{home.serving.port}", before.watched[0])
            assert len(found) > 0
            time.sleep(0.5)
        running.await_that(lambda: len(refused) > 0, "the collector to say 503")
        assert {status for status, _ in refused} == {503}
        count = len(acknowledged)
        running.start(home, "broker")
        running.await_that(lambda: len(acknowledged) > count + 3, "the collector to acknowledge again")
    finally:
        ending.set()
        client.join()
    ledger.send(1)
    ledger.check()
    assert running.record(home, "streams") == streams, "the streams were not to be started again"
    kept = {
        e["event_id"] for e in freshness.timeline(f"http://{home.serving.host}:{home.serving.port}", "away")
    }
    assert {event_id for _, event_id in acknowledged} <= kept
