import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipelines.ingest import broker
from pipelines.ingest.broker import BrokerError, TopicMissing
from pipelines.preflight import PreflightError
from pipelines.settings import Settings

TOPIC = "things"


@pytest.fixture
def own(settings: Settings) -> Iterator[Settings]:
    """Settings whose broker is this test's, and stopped after it."""
    yield settings
    broker.stop(settings)


def send(settings: Settings, values: list[bytes]) -> list[str]:
    failed: list[str] = []
    producer = Producer(
        {"bootstrap.servers": settings.kafka.bootstrap_servers, "acks": "all", "log_level": 0}
    )
    for number, value in enumerate(values):
        producer.produce(
            TOPIC,
            value,
            partition=number % 2,
            timestamp=1000,
            on_delivery=lambda error, _: failed.append(str(error)) if error else None,
        )
    assert producer.flush(20) == 0
    return failed


def receive(settings: Settings, count: int) -> list[tuple[bytes, int]]:
    consumer = Consumer(
        {"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "test", "log_level": 0}
    )
    consumer.assign([TopicPartition(TOPIC, partition, OFFSET_BEGINNING) for partition in range(2)])
    found: list[tuple[bytes, int]] = []
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        message = consumer.poll(1.0)
        if message is not None and message.error() is None:
            found.append((message.value(), message.timestamp()[1]))
    consumer.close()
    return found


def test_a_life_with_a_violent_end(own: Settings) -> None:
    first = broker.start(own)
    assert broker.start(own) == first
    ids = broker.ensure_topics(own, [TOPIC])
    assert broker.ensure_topics(own, [TOPIC]) == ids
    assert send(own, [b"a", b"b", b"c"]) == []
    require_same_topics = broker.sameness(own, ids)
    require_same_topics()

    os.kill(first.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first.pid)] if psutil.pid_exists(first.pid) else [], timeout=10)
    assert broker.running_pid(own) is None
    assert not broker.is_ready(own)
    with pytest.raises(BrokerError, match="cannot describe the topic things"):
        require_same_topics()

    second = broker.start(own)
    assert second.pid != first.pid
    assert broker.topic_ids(own, [TOPIC]) == ids
    began = time.monotonic()
    require_same_topics()
    assert time.monotonic() - began < 5, "a kept connection finds the broker again"
    received = receive(own, 3)
    assert sorted(value for value, _ in received) == [b"a", b"b", b"c"]
    assert all(time_ms > 1_600_000_000_000 for _, time_ms in received), "a record's time is the broker's"

    assert broker.stop(own)
    assert not psutil.pid_exists(second.pid)
    assert not broker.stop(own)


def test_a_port_in_use_is_said_before_anything_starts(settings: Settings) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.kafka.port))
        other.listen()
        with pytest.raises(PreflightError, match=r"port \d+ on 127\.0\.0\.1 is in use"):
            broker.start(settings)
    assert not settings.paths.kafka.exists()


def test_a_broker_that_dies_says_why(own: Settings) -> None:
    data = own.paths.kafka / "data"
    data.mkdir(parents=True)
    (data / "meta.properties").write_text("version=1\ncluster.id=AAAAAAAAAAAAAAAAAAAAAA\nnode.id=7\n")
    with pytest.raises(BrokerError, match=r"ended while it started.*kafka\.log"):
        broker.start(own)
    assert broker.running_pid(own) is None


def test_a_users_broker_is_not_started(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(BrokerError, match="no embedded broker in these settings"):
        broker.start(make_settings(KAFKA__IS_EMBEDDED="false"))


def test_no_broker_is_said(make_settings: Callable[..., Settings]) -> None:
    with pytest.raises(BrokerError, match="no broker answered within 1 s"):
        broker.wait_ready(make_settings(KAFKA__IS_EMBEDDED="false"), timeout_s=1)


def test_topics_are_made_as_declared_and_only_when_asked(broker: Settings) -> None:
    from pipelines.ingest import broker as embedded

    with pytest.raises(TopicMissing, match="there is no topic nothing"):
        embedded.topic_ids(broker, ["nothing"])
    ids = embedded.ensure_topics(broker, ["declared"])
    described = AdminClient({"bootstrap.servers": broker.kafka.bootstrap_servers}).list_topics(timeout=10)
    assert len(described.topics["declared"].partitions) == broker.kafka.partitions == 2
    assert "nothing" not in described.topics
    assert re.fullmatch(r"declared@[A-Za-z0-9_-]{22}", ids["declared"])


def test_a_topic_made_again_has_another_id(broker: Settings) -> None:
    from pipelines.ingest import broker as embedded

    first = embedded.ensure_topics(broker, ["again"])["again"]
    require_same_topics = embedded.sameness(broker, {"again": first})
    require_same_topics()
    admin = AdminClient({"bootstrap.servers": broker.kafka.bootstrap_servers})
    admin.delete_topics(["again"])["again"].result()
    deadline = time.monotonic() + 10
    while embedded.ensure_topics(broker, ["again"])["again"] == first and time.monotonic() < deadline:
        time.sleep(0.2)
    assert embedded.ensure_topics(broker, ["again"])["again"] != first
    with pytest.raises(BrokerError, match="again was made again while it was read"):
        require_same_topics()
