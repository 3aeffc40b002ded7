"""A topic, read by place: whether Kafka still has a record, and what it has after a position.

Belongs here: the one consumer that `tidemark trace` uses. It commits nothing and joins no group, and what the broker
does not say is told instead of it. Does not belong here: the streams, which Spark reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from jobs.trace import Kafka
from pipelines import tracing
from pipelines.indexing.position import Position
from pipelines.ingest import broker
from pipelines.ingest.broker import BrokerError
from pipelines.tracing import Place

if TYPE_CHECKING:
    from pipelines.settings import Settings

MOST_RECORDS = 500_000
"""As many records are looked through for those that raw does not have yet."""
TIMEOUT_S = 5.0


class Topic:
    """A topic of the broker, read by place. What the broker does not say is said instead of it."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._name = name
        self._problem: BrokerError | None = None
        self._id = ""
        self._consumer: Consumer | None = None
        try:
            if not broker.is_ready(settings):
                raise BrokerError("the broker does not answer", where=settings.kafka.bootstrap_servers)
            self._id = broker.topic_ids(settings, [name])[name]
            self._consumer = Consumer(
                {
                    "bootstrap.servers": settings.kafka.bootstrap_servers,
                    "group.id": "tidemark-trace",
                    "enable.auto.commit": False,
                    "auto.offset.reset": "error",
                }
            )
        except BrokerError as error:
            self._problem = error

    def __enter__(self) -> Topic:
        return self

    def __exit__(self, *error: object) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def has(self, place: Place) -> Kafka:
        """Whether the broker has a record still, and its trace."""
        if self._consumer is None:
            return Kafka(False, "the broker does not answer")
        if place.topic_id != self._id:
            return Kafka(False, "its topic was deleted and made again since")
        try:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self._name, place.partition), timeout=TIMEOUT_S
            )
            if place.offset < low:
                return Kafka(False, "Kafka's retention has expired it")
            if place.offset >= high:
                return Kafka(False, "the broker's partition ends before it")
            for message in self._read({place.partition: place.offset}, 1):
                if message.offset() == place.offset:
                    return Kafka(True, trace=tracing.read(message.headers()))
            return Kafka(False, "the broker did not give it in time")
        except KafkaException as error:
            return Kafka(False, f"the broker does not give it ({error.args[0].str()})")

    def after(self, position: Position, notes: list[str]) -> Iterator[dict[str, Any]]:
        """The records after a position, as rows of raw, the oldest first.

        Raises:
            BrokerError: The broker does not answer.
        """
        if self._consumer is None:
            assert self._problem is not None
            raise self._problem
        try:
            known = self._consumer.list_topics(self._name, timeout=TIMEOUT_S).topics[self._name].partitions
            ends = {
                p: self._consumer.get_watermark_offsets(TopicPartition(self._name, p), timeout=TIMEOUT_S)
                for p in known
            }
            held = position.topics.get(self._id, {})
            starts = {p: max(held.get(p, 0), low) for p, (low, _) in ends.items()}
            starts = {p: start for p, start in starts.items() if start < ends[p][1]}
            count = sum(ends[p][1] - start for p, start in starts.items())
            if count > MOST_RECORDS:
                notes.append(
                    f"raw is {count:,} records behind Kafka; the first {MOST_RECORDS:,} of them were looked at"
                )
            for message in self._read(starts, min(count, MOST_RECORDS)):
                yield {
                    "topic_id": self._id,
                    "partition": message.partition(),
                    "offset": message.offset(),
                    "load_id": None,
                    "load_row": None,
                    "broker_time": datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC),
                    "value": message.value(),
                }
        except KafkaException as error:
            raise BrokerError(error.args[0].str(), where=self._name) from error

    def _read(self, starts: Mapping[int, int], count: int) -> Iterator[Any]:
        """Up to so many records from these offsets on."""
        assert self._consumer is not None
        if not starts or not count:
            return
        self._consumer.assign([TopicPartition(self._name, p, offset) for p, offset in starts.items()])
        deadline = time.monotonic() + TIMEOUT_S
        left = count
        while left > 0 and time.monotonic() < deadline:
            for message in self._consumer.consume(min(left, 10_000), timeout=0.5 if left > 1 else 2.0):
                if message.error() is not None:
                    raise KafkaException(message.error())
                left -= 1
                deadline = time.monotonic() + TIMEOUT_S
                yield message
        self._consumer.unassign()
