"""The keys of the documents that changes concern, to the topics that the hot streams of the index `ads` read.

Belongs here: which topic a key goes to, acknowledging changes once their keys are there, and waiting until they are.
Does not belong here: whom a change concerns (`enrichment`), and what a stream does with a key.

A key may come twice: changes are acknowledged after their keys were delivered. None is lost. A change that concerns
many documents, as that of a shared pin, goes to a topic of its own, so that small changes do not wait behind it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from sqlalchemy.engine import Connection

from pipelines.ads import enrichment, handlers, repository
from pipelines.ads.repository import Change, Repository
from pipelines.ads.schema import CONTENT, CONTROL, PERFORMANCE
from pipelines.contracts import ads_keys
from pipelines.indexing.position import EMPTY, Position, merge_all
from pipelines.ingest.producer import Producer, position_of

SUBSCRIBER = "enrichment"
MOST_AT_ONCE = 100
"""A change that concerns more documents than this goes to the topic for backfills."""

_SENT_AT_ONCE = 10_000
_LARGE_KEPT = 10_000


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


class SentKeys(NamedTuple):
    """Keys that were sent to a topic: how many, and the position that covers them."""

    keys: int
    position: Position


class Published(NamedTuple):
    """What one call of `publish` sent.

    Attributes:
        seq: Up to which change it went.
        keys: How many keys each topic got.
        changes: Those that the keys are of.
        position: That covers the keys of all changes that concern few documents.
        large: (table, key) of a row whose change concerns many → the position that covers their keys.
    """

    seq: int
    keys: dict[str, int]
    changes: list[Change]
    position: Position
    large: dict[tuple[str, str], Position]


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
        counts = dict.fromkeys(TOPICS, 0)
        small, of_rows = EMPTY, dict[tuple[str, str], Position]()
        large: list[tuple[Route, Change]] = []
        for route in ROUTES:
            few, of_many = _sorted_out(connection, route, changes)
            sent = send(producer, route.topic, few.items())
            counts[route.topic] += sent.keys
            small = small.merge(sent.position)
            large += [(route, change) for change in of_many]
        for route, change in large:  # after all that is small
            many = ((key, change) for key in _concerned(connection, route, change))
            sent = send(producer, route.backfill_topic, many)
            counts[route.backfill_topic] += sent.keys
            row = change.table, change.key
            of_rows[row] = of_rows.get(row, EMPTY).merge(sent.position)
        seen = repository.seen(connection, SUBSCRIBER)
    if last > seen:
        with store.writing() as connection:
            repository.acknowledge(connection, SUBSCRIBER, last)
    return Published(last, counts, changes, small, of_rows)


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


def send(producer: Producer, topic: str, keys: Iterable[tuple[str, Change | None]]) -> SentKeys:
    """Send keys, each with the change that concerns its document (None: a refresh).

    Raises:
        NotDelivered: The broker did not take them.
    """
    count, reached, left = 0, EMPTY, iter(keys)
    while part := list(itertools.islice(left, _SENT_AT_ONCE)):
        records = [(key.encode(), orjson.dumps(_record(key, change))) for key, change in part]
        reached = reached.merge(position_of(producer.send(topic, records)))
        count += len(part)
    return SentKeys(count, reached)


def _record(key: str, change: Change | None) -> Mapping[str, Any]:
    """A key, and when what changed was said and written, by which its freshness is told."""
    return {
        "ad_id": key,
        "seq": change and change.seq,
        "event_time_ms": change and change.event_time_ms,
        "committed_at_ms": change and change.committed_at_ms,
    }


class Sent:
    """How far a process has sent keys, for those who wait for it. Threads share it."""

    def __init__(self) -> None:
        self._seq, self._position = -1, EMPTY
        self._large: dict[tuple[str, str], Position] = {}
        self._changed = threading.Condition()

    def begin(self, position: Position) -> None:
        """Take note of what was sent before this process, of changes that concern few documents."""
        with self._changed:
            self._position = self._position.merge(position)

    def add(self, published: Published) -> None:
        """Take note of what was sent."""
        with self._changed:
            self._seq = max(self._seq, published.seq)
            self._position = self._position.merge(published.position)
            for row, position in published.large.items():
                self._large.pop(row, None)  # it goes to the end
                self._large[row] = position
            for row in list(itertools.islice(self._large, max(0, len(self._large) - _LARGE_KEPT))):
                del self._large[row]
            self._changed.notify_all()

    def wait(self, seq: int, rows: Iterable[tuple[str, str]], timeout_s: float) -> Position | None:
        """The position that covers the keys of the changes of some rows, once all up to ``seq`` are sent.

        Returns:
            None where they were not sent in this time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._seq >= seq, timeout_s):
                return None
            return merge_all([self._position, *(self._large.get(row, EMPTY) for row in rows)])
