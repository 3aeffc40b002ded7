"""How far streams are behind a real broker: in records, and in the age of the oldest of them."""

from __future__ import annotations

import time

from confluent_kafka import Producer

from jobs import lag
from pipelines import indices
from pipelines.indexing import delta
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.facts import table
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import lineage
from pipelines.ingest import broker
from pipelines.settings import Settings

TOPIC = "pin-updates"


def test_records_and_seconds_are_counted_from_what_is_committed(kafka_settings: Settings) -> None:
    ids = broker.ensure_topics(kafka_settings, ["user-interactions", TOPIC])
    ends = {p: end for p, (_, end) in broker.offsets(kafka_settings, TOPIC).items()}
    producer = Producer({"bootstrap.servers": kafka_settings.kafka.bootstrap_servers})
    for partition in (0, 0, 1):
        producer.produce(TOPIC, b"{}", partition=partition)
    assert producer.flush(10) == 0
    time.sleep(1.2)
    producer.produce(TOPIC, b"{}", partition=0)
    assert producer.flush(10) == 0
    waited_s = 1.2

    commit(kafka_settings, 0, Position({ids[TOPIC]: {0: ends[0] + 1, 1: ends[1] + 1}}))
    behind = told(kafka_settings)["pin_updates"]
    assert (behind.state, behind.records_behind) == (lag.NOT_RUNNING, 2)
    assert behind.seconds_behind is not None
    assert waited_s <= behind.seconds_behind < 60, "the age of the older one of the two"

    commit(kafka_settings, 1, Position({ids[TOPIC]: {0: ends[0] + 3}}))
    assert told(kafka_settings)["pin_updates"][4:6] == (0, 0.0)
    archived = told(kafka_settings)["archive"]
    assert archived.records_behind is not None
    assert archived.records_behind >= 4, "it has archived nothing here"


def told(settings: Settings) -> dict[str, lag.Lag]:
    return {one.stream: one for one in lag.lags(settings)}


def commit(settings: Settings, epoch: int, end: Position) -> None:
    spec = indices.INDICES["pins"]
    path = delta.table_path(settings.paths.delta, spec.name, lineage(spec))
    DeltaWriter(spec, path).commit(Marker("pin_updates", 1, epoch, EMPTY, end), table(spec, []))
