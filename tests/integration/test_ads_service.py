"""The process `ads` on a real broker and SQLite: by call and by topic the same, keys and the bypass right after it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource
from fastapi.testclient import TestClient

from pipelines.ads import consumer, generator, publisher, repository, rows, service
from pipelines.ads.repository import Repository, Update
from pipelines.ads.schema import CONTROL, TABLES
from pipelines.contracts import ADS_BUDGETS, ADS_CHANGES, Refusal, decode
from pipelines.indexing.position import Position, from_token, merge_all
from pipelines.ingest import broker
from pipelines.settings import Settings

TOPICS = (*publisher.TOPICS, ADS_BUDGETS.topic)
VERSION = 10**9
READ = ("quick-", "again-")  # rows of the tests that read the topics: keys that others caused may still come


@pytest.fixture
def client(kafka_settings: Settings) -> Iterator[TestClient]:
    broker.ensure_topics(kafka_settings, [ADS_CHANGES.topic, *TOPICS])
    with TestClient(service.create_app(kafka_settings)) as running:
        yield running


@pytest.fixture
def store(kafka_settings: Settings) -> Iterator[Repository]:
    opened = repository.opened(kafka_settings)
    yield opened
    opened.close()


def record(update: Update, transaction: dict[str, Any] | None = None) -> dict[str, Any]:
    said = {"table": update.table, "key": update.key, "version": update.version, "values": update.values}
    return said | ({"transaction": transaction} if transaction else {})


def sent(client: TestClient, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By calls; the lines of their answers."""
    lines = []
    for start in range(0, len(records), 500):
        answer = client.post("/v1/ads:update", json={"changes": records[start : start + 500]})
        assert answer.status_code == 200, answer.text
        lines += answer.json()["results"]
    return lines


def registers(store: Repository) -> dict[tuple[str, str], rows.Row]:
    with store.reading() as connection:
        return {(table, key): row for table in TABLES for key, row in repository.scan(connection, table)}


def newest_change(store: Repository) -> int:
    with store.reading() as connection:
        return repository.last_change(connection)


def read_to(store: Repository, reached: Position) -> None:
    """Wait until the process has read the topic up to there."""
    deadline = time.monotonic() + 60
    while not consumer.position(store).covers(reached):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_all(settings: Settings, store: Repository) -> None:
    """Wait until the process has read all that other tests sent to this broker."""
    topic_id = broker.topic_ids(settings, [ADS_CHANGES.topic])[ADS_CHANGES.topic]
    ends = {place: end for place, (_, end) in offsets(settings, ADS_CHANGES.topic)}
    read_to(store, Position({topic_id: ends}))


class Tail:
    """What comes to topics from now on, of the rows `READ`."""

    def __init__(self, settings: Settings, topics: tuple[str, ...]) -> None:
        self._consumer = Consumer(
            {"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "test-ads"}
        )
        ends = [(topic, place, end) for topic in topics for place, (_, end) in offsets(settings, topic)]
        self._consumer.assign([TopicPartition(*place) for place in ends])
        self.found: dict[str, list[dict[str, Any]]] = {topic: [] for topic in topics}

    def until(self, is_enough: Callable[[dict[str, list[dict[str, Any]]]], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_enough(self.found):
            assert time.monotonic() < deadline, self.found
            for message in self._consumer.consume(1_000, 0.1):
                topic, value = message.topic(), message.value()
                assert message.error() is None and topic is not None and value is not None
                key = (message.key() or b"").decode()
                if key.removeprefix("campaigns/").startswith(READ):
                    self.found[topic].append(json.loads(value) | {"_key": key})

    def close(self) -> None:
        self._consumer.close()


def offsets(settings: Settings, topic: str) -> list[tuple[int, tuple[int, int]]]:
    return list(broker.offsets(settings, topic).items())


@pytest.fixture
def tail(kafka_settings: Settings, client: TestClient) -> Iterator[Tail]:
    opened = Tail(kafka_settings, TOPICS)
    yield opened
    opened.close()


def test_by_call_and_by_topic_the_same_rows_and_versions(
    client: TestClient, kafka_settings: Settings, store: Repository, tmp_path: Path
) -> None:
    by_topic = Repository(f"sqlite:{tmp_path / 'by-topic.db'}")
    topic_id = broker.topic_ids(kafka_settings, [ADS_CHANGES.topic])[ADS_CHANGES.topic]
    account = list(generator.updates(50, seed=3))
    said = [record(update) for update in account]
    said += [
        record(update, {"id": f"same-{number}", "count": len(updates)})
        for number, updates in enumerate(generator.transactions(50, 3, 60, account[-1].version + 1))
        for update in updates
    ]
    said.append({"op": "delete", "table": "ads", "key": account[-1].key, "version": VERSION})
    read_all(kafka_settings, store)
    lines = sent(client, said)
    mine, changes = registers(store), newest_change(store)
    assert {line["status"] for line in lines} == {"accepted"}
    assert {(update.table, update.key) for update in account} <= mine.keys()
    reached = merge_all(from_token(line["position"]) for line in lines)
    assert set(reached.topics) == {topic_id}
    read_to(store, reached)  # by the process itself
    assert (registers(store), newest_change(store)) == (mine, changes)  # without effect
    deadline = time.monotonic() + 60
    for _ in consumer.follow(kafka_settings, by_topic, lambda: consumer.position(by_topic).covers(reached)):
        assert time.monotonic() < deadline
    assert registers(by_topic) == mine
    by_topic.close()


def test_an_answer_says_what_became_visible_what_waits_and_what_is_refused(client: TestClient) -> None:
    first = {"table": "campaigns", "key": "said", "version": 5, "values": {"status": "paused", "name": "x"}}
    (line,) = sent(client, [first])
    assert line["visible"] == {
        "table": "campaigns",
        "key": "said",
        "changed": ["is_there", "name", "status"],
        "version": 5,
    }
    assert sent(client, [first])[0]["visible"] is None  # again
    half = {**first, "version": 6, "values": {"name": "y"}, "transaction": {"id": "said-1", "count": 2}}
    bad = {**half, "table": "advertisers", "values": {"balance_usd_micros": -1}}
    answer = client.post("/v1/ads:update", json={"changes": [bad, half, {**half, "table": "nothing"}]})
    body = answer.json()
    assert (answer.status_code, body["accepted"], body["refused"]) == (200, 1, 2)
    assert [one["status"] for one in body["results"]] == ["refused", "accepted", "refused"]
    assert body["results"][0]["reason"] == "out_of_range"
    assert body["results"][2]["reason"] == "unknown_table"
    assert (body["results"][1]["visible"], body["results"][1]["waits_for"]) == (None, "said-1")
    (waiting,) = body["waiting"]
    assert (waiting["transaction"], waiting["arrived"], waiting["expected"]) == ("said-1", 1, 2)
    answer = client.post("/v1/ads:update", json={**bad, "values": {"balance_usd_micros": 1}})
    assert answer.json()["waiting"] == []
    assert answer.json()["results"][0]["visible"]["changed"] == ["balance_usd_micros", "is_there"]
    none = client.post("/v1/ads:update", json=bad)
    assert (none.status_code, none.json()["position"]) == (400, None)
    assert none.json()["error"]["field"] == "values.balance_usd_micros"


def test_a_change_reaches_its_stream_and_the_bypass_in_a_moment(
    client: TestClient, kafka_settings: Settings, store: Repository, tail: Tail
) -> None:
    sent(
        client,
        [
            record(Update("campaigns", "quick-c", VERSION, {"status": "active", "name": "n"})),
            record(Update("ad_groups", "quick-g", VERSION, {"campaign_id": "quick-c", "status": "active"})),
            record(Update("ads", "quick-a", VERSION, {"ad_group_id": "quick-g", "pin_id": "quick-p"})),
        ],
    )
    tail.until(lambda found: any(one["ad_id"] == "quick-a" for one in found["ads-content"]))
    assert tail.found[ADS_BUDGETS.topic] == []  # rows that appear have no documents yet
    began = time.monotonic()
    sent(client, [record(Update("campaigns", "quick-c", VERSION + 1, {"status": "paused"}))])
    tail.until(lambda found: bool(found[ADS_BUDGETS.topic]) and len(found["ads-control"]) >= 2)
    assert time.monotonic() - began < 5
    (entry,) = tail.found[ADS_BUDGETS.topic]
    row = registers(store)["campaigns", "quick-c"]
    assert entry["_key"] == "campaigns/quick-c"
    assert (entry["table"], entry["key"]) == ("campaigns", "quick-c")
    assert entry["stand"] == rows.stand(row, TABLES["campaigns"], CONTROL)
    assert entry["values"] == {
        "status": "paused",
        "daily_budget_usd_micros": None,
        "lifetime_budget_usd_micros": None,
    }
    assert not isinstance(decode(ADS_BUDGETS, orjson.dumps(entry), 2**41), Refusal)
    assert tail.found["ads-control"][-1]["ad_id"] == "quick-a"
    admin = AdminClient({"bootstrap.servers": kafka_settings.kafka.bootstrap_servers})
    for topic, policy in ((ADS_BUDGETS.topic, "compact"), (ADS_CHANGES.topic, "delete")):
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        (described,) = admin.describe_configs([resource]).values()
        assert described.result()["cleanup.policy"].value == policy


def test_a_call_may_wait_for_the_position_at_which_its_documents_are_served(
    client: TestClient, kafka_settings: Settings, store: Repository
) -> None:
    read_all(kafka_settings, store)
    many = publisher.MOST_AT_ONCE + 1
    ads = [
        record(Update("ads", f"wait-{n}", VERSION, {"ad_group_id": "wait-g", "pin_id": f"wait-p{n}"}))
        for n in range(many)
    ]
    group = record(Update("ad_groups", "wait-g", VERSION, {"campaign_id": "wait-c"}))
    first = client.post("/v1/ads:update", json={"changes": [group, *ads], "wait_ms": 5_000}).json()
    assert first["is_published"]
    ids = broker.topic_ids(kafka_settings, publisher.TOPICS)

    def reached(answer: dict[str, Any]) -> dict[str, int]:
        """How many keys of each topic the position covers."""
        topics = from_token(answer["position"]).topics
        return {topic: sum(topics.get(ids[topic], {}).values()) for topic in ids}

    before = reached(first)
    assert before["ads-control"] > 0 < before["ads-content"]

    def said(table: str, key: str, version: int, **values: Any) -> dict[str, Any]:
        change = record(Update(table, key, VERSION + version, values))
        return client.post("/v1/ads:update", json={"changes": [change], "wait_ms": 5_000}).json()

    small = reached(said("pins", "wait-p0", 1, title="x"))
    assert (small["ads-content"], small["ads-content-backfill"]) == (before["ads-content"] + 1, 0)
    large = said("campaigns", "wait-c", 2, status="paused")  # of all of them
    assert reached(large)["ads-control-backfill"] >= many
    assert reached(large)["ads-control"] == small["ads-control"]
    again = said("campaigns", "wait-c", 2, status="paused")  # who asks again, because the answer was lost
    assert (again["is_published"], again["results"][0]["visible"]) == (True, None)
    assert reached(again) == reached(large)
    with store.writing() as connection:
        repository.pause(connection, publisher.SUBSCRIBER)
    try:
        answer = client.post(
            "/v1/ads:update",
            json={"changes": [record(Update("pins", "wait-p1", VERSION + 3, {"title": "y"}))], "wait_ms": 50},
        )
        assert (answer.status_code, answer.json()["is_published"]) == (200, False)
        assert set(from_token(answer.json()["position"]).topics).isdisjoint(ids.values())
    finally:
        with store.writing() as connection:
            repository.unpause(connection, publisher.SUBSCRIBER)


def test_documents_are_shown_and_sent_to_be_made_again(client: TestClient, tail: Tail) -> None:
    many = [
        record(Update("ads", f"again-{n}", VERSION, {"ad_group_id": f"again-g{n % 2}"})) for n in range(10)
    ]
    sent(
        client,
        [
            record(Update("campaigns", "again-c", VERSION, {"status": "paused"})),
            *(
                record(Update("ad_groups", f"again-g{n}", VERSION, {"campaign_id": "again-c"}))
                for n in (0, 1)
            ),
            *many,
        ],
    )
    answer = client.post("/v1/ads:enrich", json={"ad_ids": ["again-0", "nobody"], "families": ["control"]})
    known, unknown = answer.json()["ads"]
    assert (known["is_servable"], known["not_servable"]) == (False, "advertiser unknown")
    made = known["families"]["control"]
    assert made["version"] == {"ads": VERSION, "ad_groups": VERSION, "campaigns": VERSION, "advertisers": 0}
    assert (made["document"]["campaign_status"], made["document"]["campaign_id"]) == ("paused", "again-c")
    assert (unknown["is_servable"], unknown["not_servable"]) == (False, "ad unknown")
    assert unknown["families"]["control"] == {
        "version": {"ads": 0, "ad_groups": 0, "campaigns": 0, "advertisers": 0},
        "document": None,
    }
    body = {"where": {"campaign_id": "again-c"}, "families": ["control"]}
    assert client.post("/v1/ads:backfill", json=body).json()["sent"] == {"ads-control-backfill": 10}
    tail.until(lambda found: len(found["ads-control-backfill"]) >= 10)
    keys = {f"again-{n}" for n in range(10)}
    assert {one["ad_id"] for one in tail.found["ads-control-backfill"]} == keys
    assert {one["seq"] for one in tail.found["ads-control-backfill"]} == {None}
    everything = client.post("/v1/ads:backfill", json={"all": True}).json()["sent"]
    assert everything["ads-control-backfill"] == everything["ads-content-backfill"] >= 10
    tail.until(lambda found: keys <= {one["ad_id"] for one in found["ads-content-backfill"]})


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("update", {"changes": []}, "changes"),
        ("update", {"changes": [], "more": 1}, "more"),
        ("update", {"changes": [], "wait_ms": 99_999}, "changes"),
        ("update", {"changes": [{}], "wait_ms": 99_999}, "wait_ms"),
        ("update", [], "body"),
        ("enrich", {"ad_ids": []}, "ad_ids"),
        ("enrich", {"ad_ids": ["a"] * 1_001}, "ad_ids"),
        ("enrich", {"ad_ids": ["a"], "all": True}, "all"),
        ("backfill", {}, "body"),
        ("backfill", {"where": {"name": "x"}}, "where.name"),
    ],
)
def test_a_bad_body_is_refused_by_its_field(client: TestClient, path: str, body: Any, field: str) -> None:
    answer = client.post(f"/v1/ads:{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    assert answer.json()["error"]["allowed"]


def test_health_metrics_and_documentation(client: TestClient) -> None:
    sent(client, [record(Update("pins", "measured", VERSION, {"title": "x"}))])
    client.post("/v1/ads:update", json={"table": "pins"})
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    assert {"/v1/ads:update", "/v1/ads:enrich", "/v1/ads:backfill"} <= client.get("/openapi.json").json()[
        "paths"
    ].keys()
    deadline = time.monotonic() + 30
    wanted = (
        'tidemark_ads_records_total{outcome="refused",reason="missing_field",source="call"} 1.0',
        'tidemark_ads_records_total{outcome="accepted",reason="",source="topic"}',
        'tidemark_ads_changes_total{table="pins"}',
        'tidemark_ads_keys_total{topic="ads-content"}',
        'tidemark_ads_behind{part="updater"} 0.0',
        'tidemark_ads_behind{part="enrichment"} 0.0',
        'tidemark_ads_transactions_held{state="waits"}',
        "tidemark_ads_keys_seconds_bucket",
    )
    while missing := [one for one in wanted if one not in client.get("/metrics").text]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
