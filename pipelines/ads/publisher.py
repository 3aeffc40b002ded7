"""The keys of the documents that changes concern, to the topics that the hot streams of the index `ads` read.

Belongs here: which topic a key goes to, and acknowledging changes once their keys are there. Does not belong here: whom
a change concerns (`enrichment`), and what a stream does with a key.

A key may come twice: changes are acknowledged after their keys were delivered. None is lost. A change that concerns
many documents, as that of a shared pin, goes to a topic of its own, so that small changes do not wait behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from sqlalchemy.engine import Connection

from pipelines.ads import enrichment, handlers, repository
from pipelines.ads.repository import Change, Repository
from pipelines.ads.schema import CONTENT, CONTROL, PERFORMANCE
from pipelines.contracts import ads_keys
from pipelines.ingest.producer import Producer

SUBSCRIBER = "enrichment"
MOST_AT_ONCE = 100
"""A change that concerns more documents than this goes to the topic for backfills."""

_SENT_AT_ONCE = 10_000


class Route(NamedTuple):
    """A hot stream's topics, and the families of the document that it makes."""

    families: tuple[str, ...]
    topic: str
    backfill_topic: str


ROUTES = (
    Route((CONTROL,), ads_keys.CONTROL, ads_keys.CONTROL_BACKFILL),
    Route((CONTENT, PERFORMANCE), ads_keys.CONTENT, ads_keys.CONTENT_BACKFILL),
)
"""Control waits for nothing else: its stream is its own."""

TOPICS = tuple(topic for route in ROUTES for topic in (route.topic, route.backfill_topic))
COLUMNS = frozenset(
    name for route in ROUTES for family in route.families for name in handlers.triggers(family)
)
"""The columns whose changes are published."""


class Published(NamedTuple):
    """Up to which change it went, how many keys were sent to each topic, and the changes that they are of."""

    seq: int
    keys: dict[str, int]
    changes: list[Change]


def subscribe(store: Repository) -> None:
    """Keep changes from now on; nothing, if they are kept already."""
    with store.writing() as connection:
        repository.subscribe(connection, SUBSCRIBER)


def publish(store: Repository, producer: Producer, limit: int = repository.CHANGES_AT_ONCE) -> Published:
    """Send the keys that the next changes concern, then acknowledge the changes.

    Args:
        store: The repository.
        producer: To the broker that has `TOPICS`.
        limit: How many changes are looked at.

    Returns:
        What was sent. Where its `seq` is that of the time before, no change was left.

    Raises:
        NotDelivered: The broker did not take the keys; the changes are not acknowledged.
    """
    with store.reading() as connection:
        changes, last = repository.changes_for(connection, SUBSCRIBER, COLUMNS, limit)
        sent = dict.fromkeys(TOPICS, 0)
        large: list[tuple[Route, Change]] = []
        for route in ROUTES:
            few, of_many = _sorted_out(connection, route, changes)
            sent[route.topic] += send(producer, route.topic, few.items())
            large += [(route, change) for change in of_many]
        for route, change in large:  # after all that is small
            many = ((key, change) for key in _concerned(connection, route, change))
            sent[route.backfill_topic] += send(producer, route.backfill_topic, many)
        seen = repository.seen(connection, SUBSCRIBER)
    if last > seen:
        with store.writing() as connection:
            repository.acknowledge(connection, SUBSCRIBER, last)
    return Published(last, sent, changes)


def _sorted_out(
    connection: Connection, route: Route, changes: Sequence[Change]
) -> tuple[dict[str, Change], list[Change]]:
    """The keys that changes concern which concern few, and the others: of a row that changed again the first."""
    few: dict[str, Change] = {}
    large: dict[tuple[str, str], Change] = {}
    of_families = [
        enrichment.fan_outs(connection, family, changes, MOST_AT_ONCE + 1) for family in route.families
    ]
    for change, *found in zip(changes, *of_families, strict=True):
        row = change.table, change.key
        if row in large:
            continue
        keys = dict.fromkeys(itertools.chain(*found))
        if len(keys) > MOST_AT_ONCE:
            large[row] = change
        else:
            few |= {key: few.get(key, change) for key in keys}
    return few, list(large.values())


def _concerned(connection: Connection, route: Route, change: Change) -> Iterator[str]:
    """The keys of the documents, each once, as they are read."""
    seen: set[str] = set()
    for family in route.families:
        for key in enrichment.fan_out(connection, family, change):
            if key not in seen:
                seen.add(key)
                yield key


def send(producer: Producer, topic: str, keys: Iterable[tuple[str, Change | None]]) -> int:
    """Send keys, each with the change that concerns its document (None: a refresh), and say how many they were.

    Raises:
        NotDelivered: The broker did not take them.
    """
    sent, left = 0, iter(keys)
    while part := list(itertools.islice(left, _SENT_AT_ONCE)):
        producer.send(topic, [(key.encode(), orjson.dumps(_record(key, change))) for key, change in part])
        sent += len(part)
    return sent


def _record(key: str, change: Change | None) -> Mapping[str, Any]:
    """A key, and when what changed was said and written, by which its freshness is told."""
    return {
        "ad_id": key,
        "seq": change and change.seq,
        "event_time_ms": change and change.event_time_ms,
        "committed_at_ms": change and change.committed_at_ms,
    }
