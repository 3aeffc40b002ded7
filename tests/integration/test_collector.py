"""The producer and the collector against a real broker: what is acknowledged is there, and nothing else is promised."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition
from fastapi.testclient import TestClient

from pipelines.contracts import PIN_UPDATES, USER_FOLLOWS, USER_INTERACTIONS, Refusal, decode
from pipelines.indexing.position import Position, from_token, merge_all
from pipelines.ingest import broker as brokers
from pipelines.ingest import collector
from pipelines.ingest.producer import NotDelivered, Producer, RefusedRecord
from pipelines.settings import Settings

EVENT = {
    "user_id": "u",
    "event_id": "e",
    "pin_id": "p",
    "action": "view",
    "event_time": "2023-05-01T12:00:00Z",
}
PIN = {"pin_id": "p", "catalogue": {"title": "t"}}


def ends(settings: Settings, topic: str) -> dict[int, int]:
    """The next offset of each partition; asked again while a topic that was just made has no leader yet."""
    consumer = Consumer({"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "tests"})
    places = [TopicPartition(topic, partition) for partition in range(settings.kafka.partitions)]
    deadline = time.monotonic() + 20
    try:
        while True:
            try:
                return {
                    place.partition: consumer.get_watermark_offsets(place, timeout=10)[1] for place in places
                }
            except KafkaException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
    finally:
        consumer.close()


def read(
    settings: Settings, topic: str, since: dict[int, int], count: int
) -> list[tuple[int, int, bytes, bytes]]:
    consumer = Consumer({"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "tests"})
    consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in since.items()])
    found, deadline = [], time.monotonic() + 20
    try:
        while len(found) < count and time.monotonic() < deadline:
            message = consumer.poll(0.5)
            if message is not None and message.error() is None:
                found.append((message.partition(), message.offset(), message.key(), message.value()))
        return found
    finally:
        consumer.close()


@pytest.fixture
def topics(kafka_settings: Settings) -> dict[str, str]:
    return brokers.ensure_topics(
        kafka_settings, [USER_INTERACTIONS.topic, PIN_UPDATES.topic, USER_FOLLOWS.topic]
    )


@pytest.fixture
def client(kafka_settings: Settings, topics: dict[str, str]) -> Iterator[TestClient]:
    with TestClient(collector.create_app(kafka_settings)) as running:
        yield running


def test_the_producer_gives_positions(kafka_settings: Settings, topics: dict[str, str]) -> None:
    before = ends(kafka_settings, USER_INTERACTIONS.topic)
    with Producer(kafka_settings) as producer:
        deliveries = producer.send(
            USER_INTERACTIONS.topic, [(str(n).encode(), str(n).encode()) for n in range(100)]
        )
        assert producer.send(USER_INTERACTIONS.topic, []) == []
        assert producer.is_connected()
    found = read(kafka_settings, USER_INTERACTIONS.topic, before, 100)
    placed = {(partition, offset): value for partition, offset, _, value in found}
    assert [placed[d.partition, d.offset] for d in deliveries] == [str(n).encode() for n in range(100)]
    reached = merge_all(delivery.position for delivery in deliveries)
    assert reached == Position(
        {topics[USER_INTERACTIONS.topic]: ends(kafka_settings, USER_INTERACTIONS.topic)}
    )


def test_more_records_than_are_sent_at_once(kafka_settings: Settings, topics: dict[str, str]) -> None:
    with Producer(kafka_settings) as producer:
        deliveries = producer.send(PIN_UPDATES.topic, [(b"k", str(n).encode()) for n in range(25_000)])
    assert len({(d.partition, d.offset) for d in deliveries}) == 25_000


def test_objects_are_checked_and_keyed(kafka_settings: Settings, topics: dict[str, str]) -> None:
    before = ends(kafka_settings, PIN_UPDATES.topic)
    with Producer(kafka_settings) as producer:
        with pytest.raises(RefusedRecord, match=r"pin_id is missing.*record 1"):
            producer.send_objects(PIN_UPDATES, [PIN, {"catalogue": {}}])
        assert ends(kafka_settings, PIN_UPDATES.topic) == before
        position = producer.send_objects(PIN_UPDATES, [PIN])
    (found,) = read(kafka_settings, PIN_UPDATES.topic, before, 1)
    assert found[2:] == (b"p", json.dumps(PIN, separators=(",", ":")).encode())
    assert position == Position({topics[PIN_UPDATES.topic]: {found[0]: found[1] + 1}})


def test_a_topic_that_is_not_there(kafka_settings: Settings) -> None:
    with pytest.raises(NotDelivered), Producer(kafka_settings, timeout_s=2) as producer:
        producer.send("no-such-topic", [(b"k", b"v")])


def test_several_events(client: TestClient, kafka_settings: Settings, topics: dict[str, str]) -> None:
    before = ends(kafka_settings, USER_INTERACTIONS.topic)
    events = [EVENT, {**EVENT, "action": "nap"}, "text", {**EVENT, "event_id": "f"}]
    answer = client.post("/v1/events", json={"events": events})
    assert answer.status_code == 200
    body = answer.json()
    assert (body["accepted"], body["refused"]) == (2, 2)
    assert [result["status"] for result in body["results"]] == ["accepted", "refused", "refused", "accepted"]
    assert [result["index"] for result in body["results"]] == [0, 1, 2, 3]
    assert body["results"][1]["reason"] == "unknown_action"
    assert body["results"][1]["field"] == "action"
    assert "purchase" in body["results"][1]["message"]
    assert body["results"][2]["reason"] == "not_an_object"
    found = read(kafka_settings, USER_INTERACTIONS.topic, before, 2)
    assert len(found) == 2
    assert all(key == b"u" for _, _, key, _ in found)
    rows = [decode(USER_INTERACTIONS, value, 2**41) for _, _, _, value in found]
    assert [row["event_id"] for row in rows if not isinstance(row, Refusal)] == ["e", "f"]
    reached = from_token(body["position"])
    assert reached == merge_all(from_token(body["results"][n]["position"]) for n in (0, 3))
    assert set(reached.topics) == {topics[USER_INTERACTIONS.topic]}
    time.sleep(0.5)
    assert sum(ends(kafka_settings, USER_INTERACTIONS.topic).values()) == sum(before.values()) + 2


def test_one_record_alone(client: TestClient, kafka_settings: Settings, topics: dict[str, str]) -> None:
    assert client.post("/v1/events", json=EVENT).json()["accepted"] == 1
    answer = client.post("/v1/pins:update", json={"op": "delete", "pin_id": "p", "version": 2})
    assert (answer.status_code, answer.json()["accepted"]) == (200, 1)
    assert set(from_token(answer.json()["position"]).topics) == {topics[PIN_UPDATES.topic]}
    refused = client.post("/v1/pins:update", json={"pin_id": "p"})
    assert refused.status_code == 400
    assert refused.json()["error"]["field"] == "catalogue"
    assert refused.json()["position"] is None
    assert client.post("/v1/pins:update", json={"pins": [PIN, PIN]}).json()["accepted"] == 2


def test_follows(client: TestClient, topics: dict[str, str]) -> None:
    said = [
        {"user_id": "u", "pin_id": "p"},
        {"user_id": "u", "followed_user_id": "u"},
        {"op": "delete", "user_id": "u", "followed_user_id": "v", "version": 2},
    ]
    answer = client.post("/v1/follows", json={"follows": said}).json()
    assert [one["status"] for one in answer["results"]] == ["accepted", "refused", "accepted"]
    assert answer["results"][1]["reason"] == "contradiction"
    assert set(from_token(answer["position"]).topics) == {topics[USER_FOLLOWS.topic]}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body"),
        (b"[]", 400, "body"),
        (b"null", 400, "body"),
        (b"\xff", 400, "body"),
        (b'{"events": {}}', 400, "events"),
        (b'{"events": []}', 400, "events"),
        (b'{"events": [' + b"1," * 1000 + b"1]}", 400, "events"),
        (b'{"events": [1], "more": 1}', 400, "more"),
        (b'{"events": [1], "events": [2]}', 400, "events"),
        (b'{"events": [NaN]}', 400, "body"),
        (b'{"events": [1]}', 400, "body"),
        (b"[" * 100_000, 400, "body"),
        (b'{"events": [' + b"[" * 300 + b"]" * 300 + b"]}", 400, "body"),
        (b" " * (collector.MAX_BODY_BYTES + 1), 413, "body"),
    ],
    ids=lambda value: value[:20].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_bodies_that_are_no_records(client: TestClient, body: bytes, status: int, field: str) -> None:
    for sent in (
        body,
        iter([body[: len(body) // 2], body[len(body) // 2 :]]),
    ):  # with a length, and in chunks
        answer = client.post("/v1/events", content=sent)
        assert answer.status_code == status
        assert answer.json()["error"]["field"] == field
        assert set(answer.json()["error"]) == {"field", "message", "allowed"}


def test_other_paths(client: TestClient) -> None:
    assert client.get("/v1/nothing").json()["error"]["field"] == "path"
    wrong = client.get("/v1/events")
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (405, "method")


def test_health_metrics_and_documentation(client: TestClient) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    client.post("/v1/events", json=EVENT)
    client.post("/v1/events", json={**EVENT, "quantity": 0})
    text = client.get("/metrics").text
    assert (
        'tidemark_collector_records_total{outcome="accepted",reason="",topic="user-interactions"} 1.0' in text
    )
    assert 'outcome="refused",reason="out_of_range"' in text
    assert 'tidemark_collector_requests_total{path="/v1/events",status="200"} 1.0' in text
    document = client.get("/openapi.json").json()
    examples = document["paths"]["/v1/events"]["post"]["requestBody"]["content"]["application/json"][
        "examples"
    ]
    for example in examples.values():
        assert client.post("/v1/events", json=example["value"]).status_code == 200


def test_many_at_once_lose_nothing(client: TestClient, kafka_settings: Settings) -> None:
    before = ends(kafka_settings, USER_INTERACTIONS.topic)

    def post(number: int) -> list[Position]:
        events = [{**EVENT, "user_id": f"u{number}", "event_id": str(n)} for n in range(20)]
        results = client.post("/v1/events", json={"events": events}).json()["results"]
        return [from_token(result["position"]) for result in results]

    with ThreadPoolExecutor(8) as pool:
        positions = [position for some in pool.map(post, range(40)) for position in some]
    places = {
        (p, o) for position in positions for offsets in position.topics.values() for p, o in offsets.items()
    }
    assert len(places) == 800
    assert sum(ends(kafka_settings, USER_INTERACTIONS.topic).values()) == sum(before.values()) + 800


def test_without_a_broker_nothing_is_promised(make_settings: Any) -> None:
    settings = make_settings(KAFKA__IS_EMBEDDED="false")
    producer = Producer(settings, timeout_s=1)
    with TestClient(collector.create_app(settings, producer)) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        for limit_s in (4.0, 0.9):  # the second one is turned away at once
            began = time.monotonic()
            answer = client.post("/v1/events", json=EVENT)
            assert time.monotonic() - began < limit_s
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            assert "accepted" not in answer.json()
        refused = client.post("/v1/events", json={**EVENT, "quantity": 0})
        assert refused.status_code == 400
    producer.close()


def test_a_broker_that_comes_back_is_used(settings: Settings) -> None:
    brokers.start(settings)
    try:
        brokers.ensure_topics(settings, [USER_INTERACTIONS.topic])
        producer = Producer(settings, timeout_s=2)
        with TestClient(collector.create_app(settings, producer)) as client:
            first = from_token(client.post("/v1/events", json=EVENT).json()["position"])
            brokers.stop(settings)
            assert client.post("/v1/events", json={**EVENT, "event_id": "f"}).status_code == 503
            brokers.start(settings)
            deadline = time.monotonic() + 30
            while (answer := client.post("/v1/events", json={**EVENT, "event_id": "f"})).status_code == 503:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            assert from_token(answer.json()["position"]).covers(first)
        producer.close()
        values = [value for *_, value in read(settings, USER_INTERACTIONS.topic, {0: 0, 1: 0}, 3)]
        ids = [json.loads(value)["event_id"] for value in values]
        assert ids[0] == "e"
        assert set(ids) == {"e", "f"}
    finally:
        brokers.stop(settings)
