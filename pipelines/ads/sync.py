"""Data sync: the source database against the repository, and the repository's tables against each other.

Belongs here: which rows do not agree and why, and the records that make them agree. Does not belong here: when it is
done (`assets.ads`), and capturing changes as they come (`capture`).

A row may differ because its change is on its way: what differs is looked at again a little later, and counts if neither
side has moved. What is repaired goes through the topic like any change, so that the archive has it. Its version is a
position of the source's log that was read before the row: whatever happened to the row after it is newer, and wins.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import orjson
from psycopg import Connection, sql
from psycopg.rows import dict_row
from sqlalchemy.engine import Connection as Repo

from pipelines.ads import consumer, database, repository, updater
from pipelines.ads import rows as registers
from pipelines.ads.database import DatabaseError
from pipelines.ads.repository import Repository
from pipelines.ads.rows import Row
from pipelines.ads.schema import TABLES, Impossible, Table, checked
from pipelines.contracts import ADS_CHANGES
from pipelines.ingest import broker
from pipelines.ingest.broker import BrokerError
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings

MISSING, EXTRA, DIFFERS, OLDER, WAITS, IMPOSSIBLE, DANGLING = CAUSES = (
    "missing",
    "extra",
    "differs",
    "older",
    "waits",
    "impossible",
    "dangling",
)
"""The repository lacks the row; the source does; a value differs; so, and records are unread; a transaction waits for
the rest; the source has a value that is refused at the door; the row names one that is not there."""
REPAIRABLE = (MISSING, EXTRA, DIFFERS, OLDER, WAITS)

T = TypeVar("T")
_AT_ONCE = 1_000
_SETTLES_S = 30.0


class Unsynced(NamedTuple):
    """A row that does not agree; `detail`: which columns, or which row it names."""

    table: str
    key: str
    cause: str
    detail: str


class Sides(NamedTuple):
    """A row as the source has it (declared columns, as the door would; None: it has none), and as the repository."""

    source: Mapping[str, Any] | None
    held: Row


def compare(
    source: Connection,
    store: Repository,
    *,
    is_behind: Callable[[], bool] = lambda: False,
    grace_s: float = 5.0,
) -> Iterator[Unsynced]:
    """The rows of which source and repository do not say the same, table by table.

    Args:
        source: The database; statements commit alone.
        store: The repository.
        is_behind: Whether the topic has records that the repository does not.
        grace_s: After this what differs is looked at again.
    """
    for table in TABLES.values():
        suspects = dict(_suspects(source, store, table))
        if not suspects:
            continue
        time.sleep(grace_s)
        for keys in _parts(suspects):
            again = _sides(source, store, table, keys)
            waiting = _waiting(store, table, keys)
            for key in keys:
                if again[key] == suspects[key] and (found := _judged(table, key, again[key])):
                    if key in waiting:
                        found = found._replace(cause=WAITS, detail=f"transaction {waiting[key]}")
                    elif found.cause == DIFFERS and is_behind():
                        found = found._replace(cause=OLDER)
                    yield found


def dangling(store: Repository) -> Iterator[Unsynced]:
    """The rows of the repository that name a row that is not there, or none where they need one."""
    with store.reading() as connection:
        for table in TABLES.values():
            for part in _parts(repository.scan(connection, table.name)):
                rows = [(key, row) for key, row in part if registers.is_there(row, table)]
                for reference in table.references:
                    named = {key: registers.value(row, reference.column) for key, row in rows}
                    there = _there(connection, reference.table, {key for key in named.values() if key})
                    for key, other in named.items():
                        if other not in there:
                            what = (
                                f"{reference.table}/{other}" if other else f"it names no {reference.column}"
                            )
                            yield Unsynced(table.name, key, DANGLING, what)


def repairs(source: Connection, given: Iterable[Unsynced]) -> Iterator[tuple[bytes, bytes]]:
    """The change records that make these rows as the source has them; those that cannot be repaired are left out.

    Raises:
        DatabaseError: A transaction of the source stays open.
    """
    wanted: dict[str, list[str]] = {}
    for one in given:
        if one.cause in REPAIRABLE:
            wanted.setdefault(one.table, []).append(one.key)
    if not wanted:
        return
    version = settled_position(source)
    for name, keys in wanted.items():
        for part in _parts(keys):
            found = _of_source(source, TABLES[name], part)
            for key in part:
                said: dict[str, Any] = {"table": name, "key": key, "version": version}
                row = found.get(key)
                if row is None:
                    yield key.encode(), orjson.dumps(said | {"op": "delete"})
                else:
                    yield key.encode(), orjson.dumps(said | {"values": row})


def settled_position(source: Connection) -> int:
    """A position of the log such that whatever is read from now on has all that was written before it.

    A transaction writes to the log before it commits: so all that had begun to write by then are waited for.

    Raises:
        DatabaseError: One of them stays open.
    """
    (position,) = _one(source, "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    (mine,) = _one(
        source, "SELECT pg_current_xact_id()::text::bigint"
    )  # who has written already has a lesser one
    deadline = time.monotonic() + _SETTLES_S
    while _one(source, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")[0] < mine:
        if time.monotonic() > deadline:
            raise DatabaseError(
                f"a transaction of the source database stays open for more than {_SETTLES_S:.0f} s",
                remedy="end it (pg_stat_activity lists it), or try again later",
            )
        time.sleep(0.1)
    return int(position) - 1  # the next record may begin at the position itself


def counts(given: Iterable[Unsynced]) -> Counter[tuple[str, str]]:
    """How many rows do not agree, by table and cause."""
    return Counter((one.table, one.cause) for one in given)


def _parts(given: Iterable[T]) -> Iterator[list[T]]:
    left = iter(given)
    while part := list(islice(left, _AT_ONCE)):
        yield part


def _one(source: Connection, asked: str) -> tuple[Any, ...]:
    found = source.execute(asked).fetchone()
    assert found is not None
    return found


def _suspects(source: Connection, store: Repository, table: Table) -> Iterator[tuple[str, Sides]]:
    """What differs at first sight: of the rows of the source, then of those that the repository alone has."""
    for keys in _keys_of_source(source, table):
        yield from _differing(table, _sides(source, store, table, keys))
    with store.reading() as connection:
        held = [key for key, row in repository.scan(connection, table.name) if registers.is_there(row, table)]
    for part in _parts(held):
        known = _present(source, table, part)
        alone = [key for key in part if key not in known]
        yield from _differing(table, _sides(source, store, table, alone))


def _differing(table: Table, sides: Mapping[str, Sides]) -> Iterator[tuple[str, Sides]]:
    return ((key, one) for key, one in sides.items() if _judged(table, key, one) is not None)


def _judged(table: Table, key: str, sides: Sides) -> Unsynced | None:
    is_held = registers.is_there(sides.held, table)
    if sides.source is None:
        return Unsynced(table.name, key, EXTRA, "") if is_held else None
    wrong = [name for name, value in sides.source.items() if isinstance(value, Impossible)]
    if wrong:
        return Unsynced(table.name, key, IMPOSSIBLE, ", ".join(wrong))
    if not is_held:
        return Unsynced(table.name, key, MISSING, "")
    other = [name for name, value in sides.source.items() if value != registers.value(sides.held, name)]
    return Unsynced(table.name, key, DIFFERS, ", ".join(other)) if other else None


def _sides(source: Connection, store: Repository, table: Table, keys: Sequence[str]) -> dict[str, Sides]:
    found = _of_source(source, table, keys)
    with store.reading() as connection:
        held = repository.read(connection, table.name, keys)
    return {key: Sides(_checked(table, found.get(key)), held.get(key, registers.EMPTY)) for key in keys}


def _checked(table: Table, row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A row as the door takes it; an impossible value is what is wrong with it."""
    return (
        None if row is None else {column.name: _taken(column, row[column.name]) for column in table.sourced}
    )


class _Refused(Impossible):
    """Two of the same column are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Refused) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


def _taken(column: Any, value: Any) -> Any:
    try:
        return checked(column, value)
    except Impossible as impossible:
        return _Refused(*impossible.args)


def _keys_of_source(source: Connection, table: Table) -> Iterator[list[str]]:
    """All keys, in parts, in the order of their bytes."""
    select = sql.SQL(
        'SELECT {key} FROM {table} WHERE {key} COLLATE "C" > %s ORDER BY {key} COLLATE "C" LIMIT %s'
    )
    asked = select.format(key=sql.Identifier(table.key), table=sql.Identifier(table.name))
    after = ""
    while keys := [row[0] for row in source.execute(asked, [after, _AT_ONCE])]:
        yield keys
        after = keys[-1]


def _present(source: Connection, table: Table, keys: Sequence[str]) -> set[str]:
    select = sql.SQL("SELECT {key} FROM {table} WHERE {key} = ANY(%s)")
    asked = select.format(key=sql.Identifier(table.key), table=sql.Identifier(table.name))
    return {row[0] for row in source.execute(asked, [list(keys)])}


def _of_source(source: Connection, table: Table, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of the source by key, their declared columns as JSON has them."""
    names = [table.key, *(column.name for column in table.sourced)]
    select = sql.SQL("SELECT {names} FROM {table} WHERE {key} = ANY(%s)").format(
        names=sql.SQL(", ").join(map(sql.Identifier, names)),
        table=sql.Identifier(table.name),
        key=sql.Identifier(table.key),
    )
    with source.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(select, [list(keys)]).fetchall()
    return {row.pop(table.key): {name: _json(value) for name, value in row.items()} for row in found}


def _json(value: Any) -> Any:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def _there(connection: Repo, table: str, keys: set[str]) -> set[str]:
    found = repository.read(connection, table, keys)
    return {key for key, row in found.items() if registers.is_there(row, TABLES[table])}


def _waiting(store: Repository, table: Table, keys: Sequence[str]) -> dict[str, str]:
    """Key → a transaction that is not written and has a record about it."""
    with store.reading() as connection:
        held = {key: updater.held_about(connection, table.name, key) for key in keys}
    return {key: found[0].id for key, found in held.items() if found}


# ------------------------------------------------------------------------------------------------ a whole run


class Report(NamedTuple):
    """What did not agree when; `note`: why the source database was not asked, if it was not."""

    at: datetime
    unsynced: list[Unsynced]
    note: str | None

    def rows(self) -> list[dict[str, Any]]:
        """As rows of `ops.ads_unsynced`, and one that says that all was compared."""
        told = {"at": self.at, "has_source": self.note is None}
        found = [told | {"table": None, "cause": None, "rows": len(self.unsynced), "examples": None}]
        for (table, cause), count in sorted(counts(self.unsynced).items()):
            of_it = (one for one in self.unsynced if (one.table, one.cause) == (table, cause))
            examples = {one.key: one.detail for one in islice(of_it, _EXAMPLES)}
            said = {
                "table": table,
                "cause": cause,
                "rows": count,
                "examples": orjson.dumps(examples).decode(),
            }
            found.append(told | said)
        return found


_EXAMPLES = 20


def run(settings: Settings, *, grace_s: float = 5.0) -> Report:
    """Compare all that can be compared: without the source database, the repository's tables alone.

    Raises:
        RepositoryError: The repository cannot be reached.
    """
    at, note = datetime.now(UTC), None
    store = repository.opened(settings)
    try:
        found = list(dangling(store))
        try:
            with database.connected(settings) as source:
                found += compare(
                    source, store, is_behind=lambda: _is_behind(settings, store), grace_s=grace_s
                )
        except DatabaseError as error:
            note = error.what
        return Report(at, found, note)
    finally:
        store.close()


def repair(settings: Settings, producer: Producer, given: Iterable[Unsynced]) -> int:
    """Send what makes these rows as the source has them, to the topic `ads-changes`; returns how many records.

    Raises:
        DatabaseError: The source cannot be reached, or a transaction of it stays open.
        NotDelivered: The broker did not take them all; whatever it took does no harm.
    """
    sent = 0
    with database.connected(settings) as source:
        for part in _parts(repairs(source, given)):
            producer.send(ADS_CHANGES.topic, part)
            sent += len(part)
    return sent


def _is_behind(settings: Settings, store: Repository) -> bool:
    """Whether the topic has records that the repository does not; a broker that is away has none to tell of."""
    try:
        (topic_id,) = broker.topic_ids(settings, [ADS_CHANGES.topic]).values()
        reached = consumer.position(store).topics.get(topic_id, {})
        ends = broker.offsets(settings, ADS_CHANGES.topic)
    except BrokerError:
        return False
    return any(end > max(first, reached.get(number, 0)) for number, (first, end) in ends.items())
