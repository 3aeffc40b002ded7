"""Keys that wait in the topics of the hot streams, and dropping those that are too old to be worth making.

Belongs here: which keys nobody has taken yet, by age, and dropping them. Does not belong here: change records. Those
are never dropped: the repository needs each of them, once. A key only says that a document is to be made again; of a
key that is dropped the document stays as it is served until its next change, a refresh, or the next base.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from pipelines.ads import publisher, repository
from pipelines.ads.repository import Dropped, Repository
from pipelines.indexing.position import Position
from pipelines.ingest import broker
from pipelines.ingest.broker import BrokerError
from pipelines.settings import Settings

STALE = "stale"
"""The reason: the key was older than asked for."""
_TIMEOUT_S = 30.0


class Stale(NamedTuple):
    """How many keys of a topic nobody has taken and are too old, and up to which offset of each partition."""

    topic: str
    before: Mapping[int, int]
    keys: int


def stale(settings: Settings, before_ms: int, taken: Position) -> list[Stale]:
    """The stale keys of each topic of `publisher.TOPICS`.

    Args:
        settings: Where the broker is.
        before_ms: Older than this, by the broker's time.
        taken: Up to where the streams have read.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    ids = broker.ensure_topics(settings, publisher.TOPICS)
    found = []
    for topic in publisher.TOPICS:
        offsets = broker.offsets(settings, topic)
        until = _offsets_at(settings, topic, before_ms, {number: end for number, (_, end) in offsets.items()})
        reached = taken.topics.get(ids[topic], {})
        begins = {number: max(first, reached.get(number, 0)) for number, (first, _) in offsets.items()}
        keys = sum(max(0, until[number] - begins[number]) for number in offsets)
        found.append(Stale(topic, until, keys))
    return found


def drop(settings: Settings, store: Repository, given: Sequence[Stale]) -> list[Dropped]:
    """Drop stale keys from their topics, and note how many; the streams that read them must be stopped.

    Raises:
        BrokerError: The broker cannot be reached, or refuses.
    """
    wanted = [one for one in given if one.keys]
    if not wanted:
        return []
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    places = [TopicPartition(one.topic, *place) for one in wanted for place in one.before.items()]
    try:
        for future in admin.delete_records(places, request_timeout=_TIMEOUT_S).values():
            future.result()
    except KafkaException as error:
        raise BrokerError(f"keys could not be dropped: {error.args[0].str()}") from error
    now_ms = time.time_ns() // 1_000_000
    dropped = [Dropped(now_ms, one.topic, STALE, one.keys) for one in wanted]
    with store.writing() as connection:
        repository.note_dropped(connection, dropped)
    return dropped


def _offsets_at(settings: Settings, topic: str, time_ms: int, ends: Mapping[int, int]) -> dict[int, int]:
    """Of each partition the offset of the first record of that time or later; the end, where there is none."""
    consumer = Consumer(
        {"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "tidemark-backlog"}
    )
    try:
        asked = [TopicPartition(topic, number, time_ms) for number in ends]
        found = consumer.offsets_for_times(asked, timeout=_TIMEOUT_S)
    except KafkaException as error:
        raise BrokerError(f"cannot ask for the times of {topic}: {error.args[0].str()}") from error
    finally:
        consumer.close()
    return {place.partition: place.offset if place.offset >= 0 else ends[place.partition] for place in found}
