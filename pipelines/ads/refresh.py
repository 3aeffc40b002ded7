"""Documents made again without a change: the keys of chosen ads, to the topics for what may wait.

Belongs here: which ads a choice names, and sending their keys in parts. Does not belong here: what a stream makes of a
key, and who asks (the process `ads`, the command line).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sqlalchemy.engine import Connection

from pipelines.ads import enrichment, joined, publisher, repository
from pipelines.ads.joined import INPUTS
from pipelines.ads.publisher import ROUTES
from pipelines.ads.repository import Repository
from pipelines.ads.schema import TABLES
from pipelines.errors import TidemarkError
from pipelines.ingest.producer import Producer

FAMILIES = tuple(INPUTS)
PREDICATES = {
    TABLES[given.table].key: given.table
    for family in FAMILIES
    for given in INPUTS[family]
    if given.table != joined.ROOT
}
"""By what ads can be chosen: `campaign_id` → the table whose row they are joined of."""


class BadChoice(TidemarkError):
    """There are no such ads to choose, or no such families."""


class Choice(NamedTuple):
    """Which ads: those named, those joined of a row (`predicate` of `PREDICATES`, and its key), or else all."""

    ad_ids: tuple[str, ...] | None = None
    where: tuple[str, str] | None = None


_WITHOUT_REST, _REST = 2_000, 3.0
"""After so many keys a rest of so many times the time that they took."""


def send(
    store: Repository, producer: Producer, choice: Choice, families: Iterable[str] = FAMILIES
) -> dict[str, int]:
    """Send the keys of ads, so that the hot streams make their documents of these families again.

    Args:
        store: The repository.
        producer: To the broker that has `publisher.TOPICS`.
        choice: Of which ads; those that are gone are sent, too.
        families: Of the document. Families that one stream makes are made together.

    Returns:
        Topic → how many keys were sent to it.

    Raises:
        BadChoice: There is no such predicate or family.
        NotDelivered: The broker did not take them all; those that it took are made again once more.
    """
    wanted = set(families)
    if unknown := wanted - set(FAMILIES):
        raise BadChoice(f"there is no family {min(unknown)!r}", remedy=f"use {', '.join(FAMILIES)}")
    topics = [route.backfill_topic for route in ROUTES if wanted & set(route.families)]
    sent = {}
    for topic in topics:
        with store.reading() as connection:
            chosen = ((key, None) for key in _at_ease(keys(connection, choice)))
            sent[topic] = publisher.send(producer, topic, chosen).keys
    return sent


def _at_ease(given: Iterator[str]) -> Iterator[str]:
    """The keys, with rests between: whoever sends them has small changes to send, too, and the streams take a backfill
    much more slowly than it can be sent."""
    began = time.monotonic()
    for number, key in enumerate(given, 1):
        yield key
        if number % _WITHOUT_REST == 0:
            time.sleep(_REST * (time.monotonic() - began))
            began = time.monotonic()


def keys(connection: Connection, choice: Choice) -> Iterator[str]:
    """The chosen ads, each once, as they are read.

    Raises:
        BadChoice: There is no such predicate.
    """
    if choice.ad_ids is not None:
        return iter(dict.fromkeys(choice.ad_ids))
    if choice.where is None:
        return repository.keys(connection, joined.ROOT)
    predicate, key = choice.where
    if predicate not in PREDICATES:
        raise BadChoice(
            f"ads cannot be chosen by {predicate!r}", where="where", remedy=f"use {', '.join(PREDICATES)}"
        )
    table = PREDICATES[predicate]
    family = next(name for name in FAMILIES if table in {given.table for given in INPUTS[name]})
    return enrichment.joined_of(connection, family, table, key)
