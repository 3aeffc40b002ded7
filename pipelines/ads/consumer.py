"""The topic `ads-changes` into the repository, batch by batch, each with how far it was read in the same commit.

Belongs here: reading from where the repository is, and what a batch of records says to the updater. Does not belong
here: hosting it (`jobs`), the archive and the dead letters (the archive stream has every record, refused ones too).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
from confluent_kafka import Consumer, Message, TopicPartition

from pipelines.ads import repository, updater
from pipelines.ads.repository import Change, Repository
from pipelines.ads.updater import Event
from pipelines.contracts import ADS_CHANGES, RECORD, decode_table
from pipelines.contracts.ads_changes import transaction_of
from pipelines.indexing.position import EMPTY, Position, from_text
from pipelines.ingest import broker
from pipelines.ingest.broker import BrokerError
from pipelines.settings import Settings

log = logging.getLogger(__name__)

SOURCE = ADS_CHANGES.topic
AT_ONCE = 5_000
_POLL_S = 0.2
_GATHER_S = 0.1
"""For so long the first record of a batch waits for others to be committed with: what a commit costs, and all that it
wakes, is by the batch, and a fresh answer has seconds."""

_silent = logging.getLogger("tidemark.kafka")


class Batch(NamedTuple):
    """Records that were written in one commit."""

    records: int
    refused: Counter[str]  # by reason
    changes: list[Change]
    position: Position


def position(store: Repository) -> Position:
    """Up to where the topic is in the repository."""
    with store.reading() as connection:
        said = repository.progress(connection).get(SOURCE)
    return from_text(said) if said else EMPTY


def follow(settings: Settings, store: Repository, is_over: Callable[[], bool]) -> Iterator[Batch]:
    """Write what comes, from where the repository is, until it is over.

    A topic that was made again is read from its beginning. Where Kafka no longer has what was not read, the log says
    so, and reading goes on at the first record that is there: the archive has the others.

    Raises:
        BrokerError: The broker cannot be reached, or the topic was made again meanwhile: begin anew.
    """
    topic_ids = broker.ensure_topics(settings, [SOURCE])
    topic_id = topic_ids[SOURCE]
    require_same = broker.sameness(settings, topic_ids)
    reached = position(store)
    with _reading(settings, topic_id, reached) as consumer:
        while not is_over():
            if (first := consumer.poll(_POLL_S)) is None:
                continue
            more = consumer.consume(AT_ONCE - 1, _GATHER_S)
            messages = [_checked(message) for message in (first, *more)]
            require_same()  # after reading: then these were the records of this topic
            ends: dict[int, int] = {}
            for message in messages:
                ends[message.partition() or 0] = (message.offset() or 0) + 1
            reached = reached.merge(Position({topic_id: ends}))
            yield write(store, _records(messages, topic_id), reached)


def write(store: Repository, records: pa.Table, reached: Position) -> Batch:
    """Decide records (the columns of `RECORD`), and write what they say; the transaction of a refused one waits."""
    decoded = decode_table(ADS_CHANGES, records)
    events = updater.events(decoded.accepted)
    refused = decoded.refused.select(["value", "reason", "detail"]).to_pylist()
    for one in refused:
        if (transaction_id := transaction_of(one["value"])) is not None:
            events.append(Event(None, transaction_id=transaction_id, refusal=one["detail"]))
    changes = updater.apply(store, events, SOURCE, reached.to_text())
    return Batch(records.num_rows, Counter(one["reason"] for one in refused), changes, reached)


@contextmanager
def _reading(settings: Settings, topic_id: str, reached: Position) -> Iterator[Consumer]:
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": "tidemark-ads-updater",
            "enable.auto.commit": False,
            "auto.offset.reset": "error",
        },
        logger=_silent,
    )
    try:
        consumer.assign(
            [
                TopicPartition(SOURCE, partition, _start(topic_id, partition, first, reached))
                for partition, (first, _) in broker.offsets(settings, SOURCE).items()
            ]
        )
        yield consumer
    finally:
        consumer.close()


def _start(topic_id: str, partition: int, first: int, reached: Position) -> int:
    offset = reached.topics.get(topic_id, {}).get(partition, 0)
    if 0 < offset < first:
        log.warning("%s has lost offsets %d to %d of partition %d", topic_id, offset, first - 1, partition)
    return max(offset, first)


def _checked(message: Message) -> Message:
    """The message, if it is one.

    Raises:
        BrokerError: It is what Kafka says of a failure.
    """
    if (error := message.error()) is not None:
        raise BrokerError(f"cannot read {SOURCE}: {error.str()}", remedy="it is read again from where it was")
    return message


def _records(messages: Sequence[Message], topic_id: str) -> pa.Table:
    columns = {field.name: pa.nulls(len(messages), field.type) for field in RECORD}
    columns["topic_id"] = pa.array([topic_id] * len(messages))
    columns["partition"] = pa.array([message.partition() for message in messages], pa.int32())
    columns["offset"] = pa.array([message.offset() for message in messages], pa.int64())
    times = pa.array([message.timestamp()[1] * 1000 for message in messages], pa.int64())
    columns["broker_time"] = times.cast(RECORD.field("broker_time").type)
    columns["key"] = pa.array([message.key() for message in messages], pa.binary())
    columns["value"] = pa.array([message.value() for message in messages], pa.binary())
    return pa.table([columns[field.name] for field in RECORD], schema=RECORD)
