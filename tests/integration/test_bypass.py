"""Serving under the entries of `ads-budgets`, over a real broker: from the topic's beginning, and without a broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from pipelines import indices
from pipelines.ads import bypass as sender
from pipelines.ads import overrides, repository, retrieval, updater
from pipelines.ads.repository import Update
from pipelines.ads.retrieval import Context
from pipelines.ads.updater import Event
from pipelines.contracts import ADS_BUDGETS
from pipelines.indexing.replica import Replica
from pipelines.ingest import broker
from pipelines.ingest.producer import Producer
from pipelines.serving import bypass
from pipelines.settings import Settings
from tests import ads_world, serving_world
from tests.conftest import free_ports
from tests.topics import make_again

TOPIC = ADS_BUDGETS.topic


@contextmanager
def serving(settings: Settings) -> Iterator[Any]:
    """The follower of ads of a running replica."""
    followers = {"ads": indices.replica(settings).followers["ads"]}
    replica = bypass.under_entries(Replica(followers), settings)
    replica.start()
    try:
        until(lambda: replica.is_ready)
        yield replica.followers["ads"]
    finally:
        replica.stop()


def until(is_so: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def shown(follower: Any) -> list[str]:
    return [key.decode() for key, _ in retrieval.candidates(follower.view, Context(country="US"), 5, 10)]


def sent(settings: Settings, *values: bytes) -> None:
    broker.ensure_topics(settings, [TOPIC])
    with Producer(settings) as producer:
        producer.send(TOPIC, [(b"k%d" % place, value) for place, value in enumerate(values)])


def test_entries_are_read_from_the_beginning_and_as_they_come(kafka_settings: Settings) -> None:
    account = serving_world.account()
    ads_world.publish(kafka_settings, serving_world.ads_facts(account))
    make_again(kafka_settings, [TOPIC])
    store = repository.opened(kafka_settings)
    sender.subscribe(store)
    updates = [
        Update(table, key, 100, {name: value for name, value in row.items() if name != "stand"}, 1)
        for table, rows in account.items()
        for key, row in rows.items()
    ]

    def change(*changes: Update) -> None:
        updater.apply(store, [Event(update) for update in changes])
        with Producer(kafka_settings) as producer:
            sender.send(store, producer)

    change(*updates)
    change(Update("ads", "a3", 200, {"status": "active"}, 2))
    sent(kafka_settings, b"no entry")
    try:
        with serving(kafka_settings) as follower:
            assert shown(follower) == ["a2", "a1", "a3", "a4"]  # was in the topic when it began
            change(Update("campaigns", "c1", 300, {"status": "paused"}, 3))
            until(lambda: shown(follower) == ["a4"], within_s=10)
            (entry,) = overrides.newer_than(follower.view, b"a1")
            assert (entry.table, entry.key, entry.values["status"]) == ("campaigns", "c1", "paused")
            status = follower.status()
            assert status["is_bypass_read"] and status["bypass_error"] is None
            assert status["bypass_refused"] >= 1 and status["bypass_overridden"] == 3
    finally:
        store.close()


def test_ads_are_served_where_no_broker_is(make_settings: Callable[..., Settings]) -> None:
    (port,) = free_ports(1)
    settings = make_settings(KAFKA__IS_EMBEDDED="false", KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{port}")
    ads_world.publish(settings, serving_world.ads_facts(serving_world.account()))
    with serving(settings) as follower:
        assert shown(follower) == ["a2", "a1", "a4"]
        status = follower.status()
        assert not status["is_bypass_read"] and "broker" in status["bypass_error"].lower()
        record = {"table": "ads", "key": "a1", "stand": 9, "values": {"status": "paused"}}
        follower.take(orjson.dumps(record), serving_world.NEWEST_MS)  # what was read before stays
        until(lambda: shown(follower) == ["a2", "a4"])
