"""The process `ads` killed in the middle of traffic, and its broker away: what was accepted is there, with its keys."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from confluent_kafka import Consumer, TopicPartition

from jobs import client
from pipelines.ads import publisher, repository, rows, updater
from pipelines.ads.repository import CHANGES
from pipelines.contracts import ADS_BUDGETS, ADS_CHANGES
from pipelines.ingest import broker
from pipelines.ingest.producer import NotDelivered, Producer
from pipelines.settings import Settings
from tests.faults import running

pytestmark = pytest.mark.slow


@pytest.fixture
def home(settings: Settings) -> Iterator[Settings]:
    with running.everything_stopped(settings):
        for name in ("broker", "ads"):
            running.start(settings, name)
        yield settings


WAYS = ("call", "topic")


class Traffic:
    """Changes of one campaign after the other: half of them by call, half by topic, in transactions of two records."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.accepted: dict[str, int] = {}  # campaign → the greatest version that was acknowledged
        self.counts = dict.fromkeys(WAYS, 0)  # how many were acknowledged
        self.refused = 0
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(way,)) for way in WAYS]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, way: str) -> None:
        with Producer(self.settings, timeout_s=2) as producer:
            for version in range(2, 100_000):
                if self._is_over.is_set():
                    return
                key = f"{way}-{version % 20}"
                records = self._records(key, version, {"id": f"{way}{version}", "count": 2})
                try:
                    if way == "call":
                        base = f"http://{self.settings.ads.host}:{self.settings.ads.port}"
                        client.request(base, "/v1/ads:update", body={"changes": records}, timeout_s=10)
                    else:
                        values: list[tuple[bytes | None, bytes | None]] = [
                            (key.encode(), orjson.dumps(record)) for record in records
                        ]
                        producer.send(ADS_CHANGES.topic, values)
                    self.accepted[key] = version
                    self.counts[way] += 1
                    time.sleep(0.005)
                except (client.ServiceError, NotDelivered):
                    self.refused += 1
                    time.sleep(0.1)

    def go_on(self, count: int) -> None:
        """Wait until so many more were acknowledged, by call and by topic."""
        wanted = {way: done + count for way, done in self.counts.items()}
        running.await_that(
            lambda: all(self.counts[way] >= wanted[way] for way in WAYS), f"{wanted} to be acknowledged", 120
        )

    @staticmethod
    def _records(key: str, version: int, transaction: dict[str, Any]) -> list[dict[str, Any]]:
        said = {"version": version, "transaction": transaction}
        budget = {"daily_budget_usd_micros": version}
        return [
            {"table": "campaigns", "key": key, "values": budget, **said},
            {"table": "ad_groups", "key": key, "values": {"campaign_id": key, **budget}, **said},
        ]


def account(settings: Settings) -> None:
    """An ad for each campaign of the traffic."""
    records = [
        {"table": "ads", "key": f"{way}-{n}", "version": 1, "values": {"ad_group_id": f"{way}-{n}"}}
        for way in WAYS
        for n in range(20)
    ]
    base = f"http://{settings.ads.host}:{settings.ads.port}"
    client.request(base, "/v1/ads:update", body={"changes": records})


def budgets(settings: Settings, table: str) -> dict[str, int]:
    store = repository.opened(settings)
    with store.reading() as connection:
        found = {key: rows.visible(row) for key, row in repository.scan(connection, table)}
    store.close()
    return {key: row["daily_budget_usd_micros"] for key, row in found.items()}


def is_settled(settings: Settings) -> bool:
    """Whether nothing waits, and every change was published."""
    store = repository.opened(settings)
    with store.reading() as connection:
        last, seen = (
            repository.last_change(connection),
            [repository.seen(connection, name) for name in (publisher.SUBSCRIBER, "bypass")],
        )
        waiting = updater.held(connection)
    store.close()
    return not waiting and set(seen) == {last}


def everything_in(settings: Settings, topic: str) -> list[dict[str, Any]]:
    ends = broker.offsets(settings, topic)
    left = sum(end for _, end in ends.values())
    found: list[dict[str, Any]] = []
    consumer = Consumer({"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "test"})
    consumer.assign([TopicPartition(topic, place, 0) for place in ends])
    while len(found) < left:
        found += [
            json.loads(message.value() or b"") | {"_time_ms": message.timestamp()[1]}
            for message in consumer.consume(1_000, 5)
        ]
    consumer.close()
    return found


def assert_all_there(settings: Settings, traffic: Traffic) -> None:
    def is_there() -> bool:
        found = budgets(settings, "campaigns")
        return all(found.get(key, 0) >= version for key, version in traffic.accepted.items())

    running.await_that(is_there, "what was accepted", 60)
    running.await_that(lambda: is_settled(settings), "keys of all changes", 60)
    found = budgets(settings, "campaigns")
    assert found == budgets(settings, "ad_groups")  # transactions are whole
    newest: dict[str, int] = {}
    for entry in everything_in(settings, ADS_BUDGETS.topic):
        if entry["table"] == "campaigns":
            said = entry["values"]["daily_budget_usd_micros"]
            newest[entry["key"]] = max(said, newest.get(entry["key"], 0))
    assert newest == found
    sent_ms: dict[str, int] = {}
    for entry in everything_in(settings, "ads-control"):
        sent_ms[entry["ad_id"]] = max(entry["_time_ms"], sent_ms.get(entry["ad_id"], 0))
    assert sent_ms.keys() == found.keys()
    store = repository.opened(settings)
    with store.reading() as connection:
        latest = sa.select(CHANGES.c.key, sa.func.max(CHANGES.c.committed_at_ms)).group_by(CHANGES.c.key)
        for key, committed_at_ms in connection.execute(latest):
            assert sent_ms[key] >= committed_at_ms  # its key was sent after its last change
    store.close()


def test_killed_in_the_middle_of_traffic_it_loses_nothing(home: Settings) -> None:
    account(home)
    with Traffic(home) as traffic:
        for _ in range(3):
            traffic.go_on(50)
            killed = running.record(home, "ads")
            os.kill(killed.pid, signal.SIGKILL)
            running.await_death(killed)
            running.start(home, "ads")
        traffic.go_on(50)
    assert traffic.refused > 0
    assert len(traffic.accepted) == 40
    assert_all_there(home, traffic)


def test_the_broker_away_calls_are_refused_and_it_goes_on_by_itself(home: Settings) -> None:
    account(home)
    pid = running.record(home, "ads").pid
    with Traffic(home) as traffic:
        traffic.go_on(50)
        killed = running.record(home, "broker")
        os.kill(killed.pid, signal.SIGKILL)
        running.await_death(killed)
        refused = traffic.refused
        running.await_that(lambda: traffic.refused > refused + 2, "calls to be refused", 60)
        running.start(home, "broker")
        traffic.go_on(50)
    assert running.record(home, "ads").pid == pid
    assert_all_there(home, traffic)
