"""The producer: records into topics, and the position that they are at once the broker has them.

Belongs here: the one Kafka producer that the collector, the command line and benchmarks use (idempotent, acks=all), and
what a failure of it means. Does not belong here: HTTP (`collector`), making topics (`broker`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import orjson
from confluent_kafka import KafkaError, KafkaException, Message
from confluent_kafka import Producer as KafkaProducer

from pipelines import tracing
from pipelines.contracts import Contract, Refusal, decode
from pipelines.errors import TidemarkError
from pipelines.indexing.position import Position
from pipelines.ingest import broker
from pipelines.ingest.broker import BrokerError
from pipelines.settings import Settings
from pipelines.tracing import Place, Trace

TIMEOUT_S = 5.0
_TOPIC_IDS_FOR_S = 2.0
_AT_ONCE = 10_000
Headers = list[tuple[str, str | bytes | None]]

_silent = logging.getLogger("tidemark.kafka")


class NotDelivered(TidemarkError):
    """The broker did not acknowledge everything in time. What it did not acknowledge may have been written all the
    same: sending it again is right, and repeats change nothing."""


class RefusedRecord(TidemarkError):
    """A record that its contract refuses was not sent."""


class Delivery(NamedTuple):
    """Where the broker put a record."""

    topic_id: str
    partition: int
    offset: int

    @property
    def position(self) -> Position:
        """The least position that covers the record."""
        return Position({self.topic_id: {self.partition: self.offset + 1}})

    @property
    def place(self) -> Place:
        """What names the record from now on."""
        return Place(self.topic_id, self.partition, self.offset)


def position_of(deliveries: Iterable[Delivery]) -> Position:
    """The least position that covers all of the records."""
    ends: dict[str, dict[int, int]] = {}
    for topic_id, partition, offset in deliveries:
        offsets = ends.setdefault(topic_id, {})
        offsets[partition] = max(offset + 1, offsets.get(partition, 0))
    return Position(ends)


class _Batch:
    """Records on their way, and what became of each."""

    def __init__(self, size: int) -> None:
        self.placed: list[tuple[int, int] | None] = [None] * size
        self.errors: list[KafkaError] = []
        self._left = size
        self._lock = threading.Lock()
        self.done = threading.Event()
        if not size:
            self.done.set()

    def reporter(self, place: int) -> Any:
        def report(error: KafkaError | None, message: Message) -> None:
            with self._lock:
                if error is None:
                    self.placed[place] = (message.partition() or 0, message.offset() or 0)
                else:
                    self.errors.append(error)
                self._left -= 1
                if self._left == 0:
                    self.done.set()

        return report


class Producer:
    """Sends records and waits for the broker's acknowledgement. Threads may share it; close it, or use `with`.

    Args:
        settings: Which broker.
        timeout_s: How long a record may take; after it the record counts as not delivered.
        linger_ms: How long a record waits for others to travel with.
    """

    def __init__(self, settings: Settings, timeout_s: float = TIMEOUT_S, linger_ms: int = 2) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._configuration = {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "enable.idempotence": True,
            "acks": "all",
            "compression.type": "lz4",
            "partitioner": "murmur2_random",
            "linger.ms": linger_ms,
            "message.timeout.ms": int(timeout_s * 1000),
            "reconnect.backoff.max.ms": 1000,
        }
        self._lock = threading.Lock()
        self._producer = self._connect()
        self._topic_ids: dict[str, tuple[str, float]] = {}
        self._is_closed = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="producer", daemon=True)
        self._poller.start()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let what is on its way arrive, then end."""
        self._producer.flush(self._timeout_s)
        self._is_closed.set()
        self._poller.join(2)

    def send(
        self, topic: str, records: Sequence[tuple[bytes | None, bytes | None]], trace: Trace | None = None
    ) -> list[Delivery]:
        """Send (key, value) pairs; returns when the broker has acknowledged all of them.

        Args:
            topic: The topic.
            records: Their keys and values.
            trace: What their headers say; a new one if there is none.

        Raises:
            NotDelivered: It has not, within the time (which each ten thousand of them have for themselves).
        """
        parts = [records[start : start + _AT_ONCE] for start in range(0, len(records), _AT_ONCE)]
        headers = (trace or tracing.begin()).record_headers
        return [delivery for part in parts for delivery in self._send(topic, part, headers)]

    def _send(
        self, topic: str, records: Sequence[tuple[bytes | None, bytes | None]], headers: Headers
    ) -> list[Delivery]:
        batch = _Batch(len(records))
        deadline = time.monotonic() + self._timeout_s
        for place, (key, value) in enumerate(records):
            self._produce(topic, key, value, headers, batch.reporter(place), deadline)
        if not batch.done.wait(max(0.0, deadline - time.monotonic()) + 1.0) or batch.errors:
            raise self._not_delivered(batch)
        topic_id = self._topic_id(topic)
        return [Delivery(topic_id, *found) for found in batch.placed if found is not None]

    def send_objects(
        self, contract: Contract, objects: Iterable[Mapping[str, Any]], trace: Trace | None = None
    ) -> Position:
        """Send JSON objects under their contract, keyed as it says; the position that covers them all.

        Raises:
            RefusedRecord: The contract refuses one; then none is sent.
            NotDelivered: The broker did not acknowledge them.
        """
        records = []
        for number, one in enumerate(objects):
            value = orjson.dumps(one)
            row = decode(contract, value, time.time_ns() // 1_000_000)
            if isinstance(row, Refusal):
                raise RefusedRecord(
                    row.detail,
                    where=f"record {number}",
                    remedy=f"see the contract of {contract.topic}: {row.reason}",
                )
            records.append((row[contract.key_field].encode(), value))
        return position_of(self.send(contract.topic, records, trace))

    def is_connected(self, timeout_s: float = 1.0) -> bool:
        """Whether the broker answers."""
        try:
            return bool(self._producer.list_topics(timeout=timeout_s).brokers)
        except KafkaException:
            return False

    def _connect(self) -> KafkaProducer:
        return KafkaProducer(self._configuration, logger=_silent)

    def _poll(self) -> None:
        while not self._is_closed.is_set():
            self._producer.poll(0.2)

    def _produce(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        report: Any,
        deadline: float,
    ) -> None:
        while True:
            producer = self._producer
            try:
                producer.produce(topic, value=value, key=key, headers=headers, on_delivery=report)
                return
            except BufferError:
                if time.monotonic() > deadline:
                    raise self._failure("too much is waiting for it already") from None
                time.sleep(0.01)
            except KafkaException as error:
                if not error.args[0].fatal():
                    raise self._failure(error.args[0].str()) from error
                self._replace(producer)
                if time.monotonic() > deadline:
                    raise self._failure(error.args[0].str()) from error

    def _replace(self, broken: KafkaProducer) -> None:
        """A producer that had a fatal error is of no more use."""
        with self._lock:
            if self._producer is broken:
                self._producer = self._connect()

    def _topic_id(self, topic: str) -> str:
        """Asked for after delivery, so that a topic that was made again is not taken for the one before."""
        known = self._topic_ids.get(topic)
        if known and time.monotonic() - known[1] < _TOPIC_IDS_FOR_S:
            return known[0]
        try:
            found = broker.topic_ids(self._settings, [topic])[topic]
        except BrokerError as error:
            if known:  # the records are written; the broker went away since
                return known[0]
            raise self._failure(error.what) from error
        self._topic_ids[topic] = (found, time.monotonic())
        return found

    def _not_delivered(self, batch: _Batch) -> NotDelivered:
        count = sum(place is None for place in batch.placed)
        why = batch.errors[0].str() if batch.errors else "no answer"
        return self._failure(f"{count} of {len(batch.placed)} records were not acknowledged ({why})")

    def _failure(self, what: str) -> NotDelivered:
        return NotDelivered(
            f"the broker did not take the records: {what}",
            where=self._settings.kafka.bootstrap_servers,
            remedy="send them again; `tidemark status` says whether the broker runs",
        )
