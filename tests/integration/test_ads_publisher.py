"""Keys of concerned documents on a real broker: large fan-outs apart, again after a failure, none lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipelines.ads import publisher
from pipelines.ads.publisher import MOST_AT_ONCE
from pipelines.ads.repository import Repository, Update
from pipelines.indexing.position import EMPTY, topic_name
from pipelines.ingest import broker
from pipelines.ingest.producer import NotDelivered, Producer
from pipelines.settings import Settings
from tests.ads_world import written

POPULAR = MOST_AT_ONCE + 50


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Repository]:
    store = Repository(f"sqlite:{tmp_path / 'repository.db'}")
    yield store
    store.close()


def ends(settings: Settings) -> dict[tuple[str, int], int]:
    broker.ensure_topics(settings, publisher.TOPICS)
    return {
        (topic, partition): end
        for topic in publisher.TOPICS
        for partition, (_, end) in broker.offsets(settings, topic).items()
    }


def read(settings: Settings, before: dict[tuple[str, int], int]) -> dict[str, list[dict[str, object]]]:
    """The records of each topic since then."""
    found: dict[str, list[dict[str, object]]] = {topic: [] for topic in publisher.TOPICS}
    wanted = sum(ends(settings).values()) - sum(before.values())
    servers = settings.kafka.bootstrap_servers
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "test-publisher"})
    try:
        consumer.assign([TopicPartition(topic, partition, at) for (topic, partition), at in before.items()])
        while sum(map(len, found.values())) < wanted:
            for message in consumer.consume(1_000, 5):
                topic, value = message.topic(), message.value()
                assert message.error() is None and topic is not None and value is not None
                found[topic].append(json.loads(value))
                assert message.key() == str(found[topic][-1]["ad_id"]).encode()
    finally:
        consumer.close()
    return found


def test_keys_go_where_their_streams_read_and_many_go_apart(
    kafka_settings: Settings, store: Repository
) -> None:
    ads = [
        Update("ads", f"a{n}", 1, {"ad_group_id": "g1", "pin_id": f"p{n % 2}"}) for n in range(2 * POPULAR)
    ]
    written(store, Update("ad_groups", "g1", 1, {"campaign_id": "c1"}), *ads)
    publisher.subscribe(store)
    before = ends(kafka_settings)
    written(
        store,
        Update("ads", "a0", 2, {"status": "paused"}),
        Update("ads", "a1", 2, {"clicks_7d": 5}),
        Update("ads", "a2", 2, {"not_declared": 5}),
        Update("pins", "p1", 2, {"title": "x"}, event_time_ms=17),
    )
    written(store, Update("ads", "a0", 3, {"status": "active"}))
    with Producer(kafka_settings) as producer:
        published = publisher.publish(store, producer)
        nothing = dict.fromkeys(publisher.TOPICS, 0)
        assert publisher.publish(store, producer) == (published.seq, nothing, [], EMPTY, {})
    found = read(kafka_settings, before)
    assert {topic: len(records) for topic, records in found.items()} == published.keys
    first = next(change for change in published.changes if change.key == "a0")
    assert [(record["ad_id"], record["seq"]) for record in found["ads-control"]] == [("a0", first.seq)]
    assert [record["ad_id"] for record in found["ads-content"]] == ["a1"]
    assert found["ads-control-backfill"] == []
    backfill = found["ads-content-backfill"]
    assert sorted(str(r["ad_id"]) for r in backfill) == sorted(
        ad.key for ad in ads if (ad.values or {})["pin_id"] == "p1"
    )
    assert {record["event_time_ms"] for record in backfill} == {17}
    assert set(published.large) == {("pins", "p1")}
    covered = published.position.merge(published.large["pins", "p1"])
    reached = {
        (topic_name(topic), place): end
        for topic, ends_ in covered.topics.items()
        for place, end in ends_.items()
    }
    assert {place for place, _ in reached} == {"ads-control", "ads-content", "ads-content-backfill"}
    after = ends(kafka_settings)
    assert reached == {place: end for place, end in after.items() if end > before[place]}


def test_what_was_not_delivered_is_sent_again(kafka_settings: Settings, store: Repository) -> None:
    publisher.subscribe(store)
    publisher.subscribe(store)  # again: nothing is forgotten
    written(store, Update("ads", "late", 1, {"status": "active"}))

    class Away(Producer):
        def send(self, *given: object, **more: object) -> list:  # type: ignore[override,type-arg]
            raise NotDelivered("the broker is away")

    before = ends(kafka_settings)
    with Away(kafka_settings) as away, pytest.raises(NotDelivered):
        publisher.publish(store, away)
    with Producer(kafka_settings) as producer:
        assert publisher.publish(store, producer).keys["ads-control"] == 1
    assert [record["ad_id"] for record in read(kafka_settings, before)["ads-control"]] == ["late"]
