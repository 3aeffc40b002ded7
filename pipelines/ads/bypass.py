"""What stops or starts spending, ahead of the documents: rows whose light columns changed, to the topic `ads-budgets`.

Belongs here: which rows are sent, and what a record says. Does not belong here: what a record must be (the contract),
and how the serving side reads documents with it.

A record says the row as it is when it is sent, so sending one again, or two changes at once, does no harm. Rows that
appeared are not sent: no document has them yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from pipelines.ads import repository, schema
from pipelines.ads import rows as registers
from pipelines.ads.repository import IS_THERE, Change, Repository
from pipelines.ads.rows import Row
from pipelines.ads.schema import CONTROL, LIGHT, TABLES
from pipelines.contracts.ads_budgets import BUDGETS
from pipelines.ingest.producer import Producer

SUBSCRIBER = "bypass"
COLUMNS = frozenset(
    f"{table}.{column}" for table, columns in LIGHT.items() for column in (*columns, IS_THERE)
)
"""The columns whose changes are looked at."""


class Sent(NamedTuple):
    """Up to which change it went, and how many records were sent."""

    seq: int
    records: int


def subscribe(store: Repository) -> None:
    """Keep changes from now on; nothing, if they are kept already."""
    with store.writing() as connection:
        repository.subscribe(connection, SUBSCRIBER)


def send(store: Repository, producer: Producer, limit: int = repository.CHANGES_AT_ONCE) -> Sent:
    """Send the rows that the next changes touched, then acknowledge the changes.

    Args:
        store: The repository.
        producer: To the broker that has the topic `ads-budgets`.
        limit: How many changes are looked at.

    Returns:
        What was sent. Where its `seq` is that of the time before, no change was left.

    Raises:
        NotDelivered: The broker did not take them; the changes are not acknowledged.
    """
    with store.reading() as connection:
        changes, last = repository.changes_for(connection, SUBSCRIBER, COLUMNS, limit)
        newest = {(change.table, change.key): change for change in changes if IS_THERE not in change.changed}
        records = [
            (f"{table}/{key}".encode(), orjson.dumps(_record(newest[table, key], row)))
            for table in LIGHT
            for key, row in repository.read(
                connection, table, [key for of, key in newest if of == table]
            ).items()
            if registers.is_there(row, TABLES[table])
        ]
        seen = repository.seen(connection, SUBSCRIBER)
    producer.send(BUDGETS, records)
    if last > seen:
        with store.writing() as connection:
            repository.acknowledge(connection, SUBSCRIBER, last)
    return Sent(last, len(records))


def _record(change: Change, row: Row) -> Mapping[str, Any]:
    return {
        "table": change.table,
        "key": change.key,
        "values": {
            column.name: value
            for column in schema.light(change.table)
            for value in schema.valid(column, [registers.value(row, column.name)])
        },
        "stand": registers.stand(row, TABLES[change.table], CONTROL),
        "event_time_ms": change.event_time_ms,
        "committed_at_ms": change.committed_at_ms,
    }
