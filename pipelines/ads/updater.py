"""The updater: accepted change records into the repository, each source transaction whole or not at all.

Belongs here: which updates may be written now, and what waits for the rest of its transaction. Does not belong here:
what a record must be (the contract of `ads-changes`), how rows merge (`rows`), reading the topic (`jobs`).

A record of a transaction says how many records the transaction has, or the source says so at its end; until that many
different ones are there, they wait in the repository itself, so that a crash anywhere loses and repeats nothing.
Updates commute, so transactions need not be written in the order of the source, and any number of them goes into one
commit.

A transaction of which a record was refused is held back whole: it is listed, and a person sends the record again as it
should be, or releases the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from pipelines import failpoints
from pipelines.ads import repository
from pipelines.ads.repository import TRANSACTIONS, WAITING, Change, Repository, Update

WAITS, REFUSED, DONE = "waits", "refused", "done"
"""The states of a transaction: not all of its records are there, one was refused, it is written."""

_OF = WAITING.c.transaction_id
_KNOWN = sa.select(TRANSACTIONS).where(repository.among(TRANSACTIONS.c.id))
_ARRIVED = sa.select(_OF, sa.func.count()).where(repository.among(_OF)).group_by(_OF)
_HELD_UPDATES = sa.select(WAITING).where(repository.among(_OF))
_DROP_UPDATES = sa.delete(WAITING).where(repository.among(_OF))


class Event(NamedTuple):
    """What a record says to the updater.

    Attributes:
        update: Of a row; None: the record only says something of its transaction.
        content_hash: Of what it says, so that a record that comes twice counts once.
        transaction_id: The source transaction that it is of; None: it stands alone.
        transaction_count: How many records the transaction has, where the record knows.
        refusal: Why the record was refused, where it was; its transaction is then held back.
    """

    update: Update | None
    content_hash: int = 0
    transaction_id: str | None = None
    transaction_count: int | None = None
    refusal: str | None = None


class Held(NamedTuple):
    """A transaction that is not written."""

    id: str
    state: str
    expected: int | None
    arrived: int
    detail: str | None
    seen_at_ms: int


class _Transaction(NamedTuple):
    """What this call has of a transaction."""

    updates: dict[tuple[str, str, int, int], Update]
    counts: list[int]
    ends: list[int]
    refusals: list[str]


def events(rows: pa.Table) -> list[Event]:
    """Accepted rows of the contract of `ads-changes` as events."""
    return [event(row) for row in rows.to_pylist()]


def event(row: Mapping[str, Any]) -> Event:
    """An accepted row of the contract of `ads-changes`, as `contracts.decode` gives it, as an event."""
    transaction = row["content_hash"], row["transaction_id"], row["transaction_count"]
    if row["table"] is None:
        return Event(None, *transaction)
    values = None if row["is_deleted"] else orjson.loads(row["values"])
    time_ms = None if row["event_time"] is None else round(row["event_time"].timestamp() * 1000)
    return Event(Update(row["table"], row["key"], row["version"], values, time_ms), *transaction)


def apply(
    store: Repository, given: Iterable[Event], source: str | None = None, position: str = ""
) -> list[Change]:
    """Write what can be written, keep the rest, and note how far the source was read: one commit.

    Args:
        store: The repository.
        given: The events, in any order, any of them again.
        source: Who they are from.
        position: Up to where, with these.

    Returns:
        What became visible.
    """
    with store.writing() as connection:
        changes = write(connection, given, source, position)
        failpoints.hit("updater.written")
    failpoints.hit("updater.committed")
    return changes


def write(
    connection: Connection, given: Iterable[Event], source: str | None = None, position: str = ""
) -> list[Change]:
    """`apply` in a transaction of `Repository.writing`, for whoever writes more with it."""
    alone: list[Update] = []
    begun: dict[str, _Transaction] = {}
    for one in given:
        if one.transaction_id is not None:
            _add(begun.setdefault(one.transaction_id, _Transaction({}, [], [], [])), one)
        elif one.update is not None:
            alone.append(one.update)
    changes = repository.write(connection, [*alone, *_ready(connection, begun)])
    if source is not None:
        repository.set_progress(connection, source, position)
    return changes


def held(connection: Connection, among: Iterable[str] | None = None) -> list[Held]:
    """The transactions (of these, where they are given) that are not written, those seen first before the others."""
    arrived = (
        sa.select(sa.func.count()).where(WAITING.c.transaction_id == TRANSACTIONS.c.id).scalar_subquery()
    )
    columns = TRANSACTIONS.c
    found = sa.select(
        columns.id, columns.state, columns.expected, arrived, columns.detail, columns.seen_at_ms
    ).where(columns.state != DONE)
    if among is not None:
        found = found.where(repository.among(columns.id))
    keys = repository.listed(among or ())
    return [Held(*row) for row in connection.execute(found.order_by(columns.seen_at_ms, columns.id), keys)]


def held_about(connection: Connection, table: str, key: str) -> list[Held]:
    """The transactions that are not written and have records about a row."""
    of = sa.select(WAITING.c.transaction_id).where(WAITING.c.table_name == table, WAITING.c.key == key)
    names = connection.execute(of.distinct()).scalars().all()
    return held(connection, names) if names else []


def held_by_state(connection: Connection) -> dict[str, int]:
    """How many transactions are not written, by state."""
    columns, states = TRANSACTIONS.c, dict.fromkeys((WAITS, REFUSED), 0)
    found = sa.select(columns.state, sa.func.count()).where(columns.state != DONE).group_by(columns.state)
    for state, count in connection.execute(found):
        states[state] = count
    return states


def release(store: Repository, transaction_id: str) -> list[Change]:
    """Write what has arrived of a transaction, as if it were all; what comes later of it is written at once."""
    with store.writing() as connection:
        changes = repository.write(connection, _waiting(connection, [transaction_id]).get(transaction_id, []))
        _settle(connection, [transaction_id])
    return changes


def forget(connection: Connection, before_ms: int) -> int:
    """Drop what is known of transactions that were written before; returns of how many.

    A record of one that comes again after that would wait for the rest of it: no source may repeat itself so late.
    """
    old = sa.delete(TRANSACTIONS).where(TRANSACTIONS.c.state == DONE, TRANSACTIONS.c.seen_at_ms < before_ms)
    return connection.execute(old).rowcount


def _add(transaction: _Transaction, event: Event) -> None:
    if event.update is not None:
        one = event.update
        transaction.updates[one.table, one.key, one.version, event.content_hash] = one
    if event.transaction_count is not None:
        (transaction.ends if event.update is None else transaction.counts).append(event.transaction_count)
    if event.refusal is not None:
        transaction.refusals.append(event.refusal)


def _ready(connection: Connection, begun: dict[str, _Transaction]) -> list[Update]:
    """The updates of the transactions that are whole now; what is not is kept."""
    known = _known(connection, list(begun))
    ready: list[Update] = []
    done, kept = [], {}
    for name, transaction in begun.items():
        state, said = known.get(name, (WAITS, None))
        counts = [*transaction.counts, *transaction.ends, *([] if said is None else [said])]
        count, updates = max(counts, default=None), transaction.updates.values()
        is_whole = name not in known and count is not None and len(updates) >= count
        if state == DONE or is_whole:
            ready += updates
            if is_whole and (len(updates) > 1 or (updates and transaction.ends)):
                done.append(name)  # where a record of it that comes again could not tell that it is all
        elif any(transaction):  # its beginning says nothing
            kept[name] = (transaction, count, REFUSED if transaction.refusals else state)
    _keep(connection, kept)
    whole = _whole(connection, {name: count for name, (_, count, _) in kept.items() if count is not None})
    for held_updates in _waiting(connection, whole).values():
        ready += held_updates
    _settle(connection, [*done, *whole])
    return ready


def _known(connection: Connection, names: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    if not names:
        return {}
    found = connection.execute(_KNOWN, repository.listed(names))
    return {row.id: (row.state, row.expected) for row in found}


def _whole(connection: Connection, counts: Mapping[str, int]) -> list[str]:
    """Of the transactions that wait, by how many records they have, those that have all of them.

    They are counted where they are: a transaction of a million records that arrives in parts is read once.
    """
    if not counts:
        return []
    arrived = dict.fromkeys(counts, 0)
    for name, number in connection.execute(_ARRIVED, repository.listed(counts)):
        arrived[name] = number
    return [name for name, count in counts.items() if arrived[name] >= count]


def _waiting(connection: Connection, names: Sequence[str]) -> dict[str, list[Update]]:
    found: dict[str, list[Update]] = {}
    if not names:
        return found
    for row in connection.execute(_HELD_UPDATES, repository.listed(names)):
        said = orjson.loads(row.said)
        update = Update(row.table_name, row.key, row.version, said["values"], said["event_time_ms"])
        found.setdefault(row.transaction_id, []).append(update)
    return found


def _keep(connection: Connection, kept: dict[str, tuple[_Transaction, int | None, str]]) -> None:
    if not kept:
        return
    now_ms = time.time_ns() // 1_000_000
    updates = [
        {
            "transaction_id": name,
            "table_name": table,
            "key": key,
            "version": version,
            "content_hash": content_hash,
            "said": orjson.dumps({"values": one.values, "event_time_ms": one.event_time_ms}).decode(),
        }
        for name, (transaction, _, _) in kept.items()
        for (table, key, version, content_hash), one in transaction.updates.items()
    ]
    repository.put(connection, WAITING, updates)
    states = [
        {"id": name, "expected": count, "state": state, "seen_at_ms": now_ms}
        for name, (_, count, state) in kept.items()
    ]
    repository.put(connection, TRANSACTIONS, states, ("expected", "state"))
    for name, (transaction, _, _) in kept.items():
        if transaction.refusals:
            of_it = sa.update(TRANSACTIONS).where(TRANSACTIONS.c.id == name)
            connection.execute(of_it.values(detail="; ".join(transaction.refusals)))


def _settle(connection: Connection, names: Sequence[str]) -> None:
    """These transactions are written: nothing of them waits any more."""
    if not names:
        return
    connection.execute(_DROP_UPDATES, repository.listed(names))
    now_ms = time.time_ns() // 1_000_000
    written = [{"id": name, "state": DONE, "seen_at_ms": now_ms} for name in names]
    repository.put(connection, TRANSACTIONS, written, ("state", "seen_at_ms"))
