"""The topic `ads-changes` into the repository over a real broker: once, whole, and from where it was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from pipelines.ads import consumer, generator, repository, rows, updater
from pipelines.ads.repository import Repository
from pipelines.ads.schema import TABLES
from pipelines.contracts import ADS_CHANGES
from pipelines.indexing.position import Position
from pipelines.ingest import broker
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings


@pytest.fixture
def store(kafka_settings: Settings) -> Iterator[Repository]:
    broker.ensure_topics(kafka_settings, [ADS_CHANGES.topic])
    store = repository.opened(kafka_settings)
    yield store
    store.close()


def sent(settings: Settings, records: list[dict[str, Any]]) -> Position:
    with Producer(settings) as producer:
        values = [(b"k", orjson.dumps(record)) for record in records]
        deliveries = producer.send(ADS_CHANGES.topic, values)
    reached = Position()
    for delivery in deliveries:
        reached = reached.merge(delivery.position)
    return reached


def following(settings: Settings, store: Repository, reached: Position) -> list[consumer.Batch]:
    """Read until a position is in the repository."""
    deadline = time.monotonic() + 60

    def is_over() -> bool:
        assert time.monotonic() < deadline
        return consumer.position(store).covers(reached)

    return list(consumer.follow(settings, store, is_over))


def record(update: repository.Update, transaction: dict[str, Any] | None = None) -> dict[str, Any]:
    said = {"table": update.table, "key": update.key, "version": update.version, "values": update.values}
    return said | ({"transaction": transaction} if transaction else {})


def visible(store: Repository, table: str) -> dict[str, dict[str, Any]]:
    with store.reading() as connection:
        return {
            key: rows.visible(row)
            for key, row in repository.scan(connection, table)
            if rows.is_there(row, TABLES[table])
        }


def test_an_account_and_its_changes_come_once_and_go_on_where_they_were(
    kafka_settings: Settings, store: Repository
) -> None:
    account = list(generator.updates(200, seed=7))
    first = sent(kafka_settings, [record(update) for update in account])
    batches = following(kafka_settings, store, first)
    before = sum(batch.records for batch in batches)
    assert before >= len(account) and not any(batch.refused for batch in batches)
    wanted = {(u.table, u.key): dict(u.values or {}) for u in account}
    changes = [
        (update, {"id": f"t{number}", "count": len(updates)})
        for number, updates in enumerate(generator.transactions(200, 7, 100, account[-1].version + 1))
        for update in updates
    ]
    for update, _ in changes:
        wanted[update.table, update.key].update(update.values or {})
    second = sent(kafka_settings, [record(update, said) for update, said in changes])
    batches = following(kafka_settings, store, second)
    assert sum(batch.records for batch in batches) == len(changes)
    for table in {table for table, _ in wanted}:
        assert visible(store, table) == {key: row for (t, key), row in wanted.items() if t == table}
    assert consumer.position(store).covers(first.merge(second))


def test_a_transaction_of_which_a_record_is_refused_waits_and_says_why(
    kafka_settings: Settings, store: Repository
) -> None:
    good = {
        "table": "campaigns",
        "key": "refused",
        "version": 9,
        "values": {"status": "paused"},
        "transaction": {"id": "refused-1", "count": 2},
    }
    bad = good | {"table": "advertisers", "values": {"balance_usd_micros": -1}}
    (batch,) = following(kafka_settings, store, sent(kafka_settings, [good, bad]))[-1:]
    assert batch.refused == {"out_of_range": 1}
    with store.reading() as connection:
        (held,) = [one for one in updater.held(connection) if one.id == "refused-1"]
    assert (held.state, held.arrived) == (updater.REFUSED, 1) and "-1 is not from 0" in str(held.detail)
    assert "refused" not in visible(store, "campaigns")
    following(kafka_settings, store, sent(kafka_settings, [bad | {"values": {"balance_usd_micros": 1}}]))
    assert visible(store, "campaigns")["refused"] == {"status": "paused"}
