"""The ads repository: every row of the source tables with the version of each column, in SQL, and what changed.

Belongs here: the SQL tables, reading rows, writing updates, the changes and who has seen them. Does not belong here:
how records merge into a row (`rows`), when an update may be written (`updater`), and what is made of rows
(`enrichment`).

SQLite in WAL mode by default, PostgreSQL where many machines write or read. One writer at a time: whoever begins
`writing` waits for the one before. A `reading` sees one point of the repository, with whole transactions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from pipelines.ads import rows as registers
from pipelines.ads.rows import Row
from pipelines.ads.schema import TABLES
from pipelines.errors import TidemarkError
from pipelines.settings import Settings

IS_THERE = "is_there"
"""In a change: the row appeared, or is gone."""

_AT_ONCE = 1_000
_LOCK = 0x7469_6465  # of all who write to a PostgreSQL repository
_BUSY_S = 60.0
_IMMEDIATE = "tidemark_immediate"

_BIGINT = sa.BigInteger()
METADATA = sa.MetaData()

_ROWS: dict[str, sa.Table] = {
    table.name: sa.Table(
        f"repo_{table.name}",
        METADATA,
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("registers", sa.Text, nullable=False),
        sa.Column("deleted_version", _BIGINT, nullable=False),
        *(sa.Column(reference.column, sa.Text, index=True) for reference in table.references),
    )
    for table in TABLES.values()
}
CHANGES = sa.Table(
    "repo_changes",
    METADATA,
    sa.Column("seq", _BIGINT, primary_key=True, autoincrement=False),
    sa.Column("table_name", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("version", _BIGINT, nullable=False),
    sa.Column("changed", sa.Text, nullable=False),
    sa.Column("event_time_ms", _BIGINT),
    sa.Column("committed_at_ms", _BIGINT, nullable=False, index=True),
)
SUBSCRIBERS = sa.Table(
    "repo_subscribers",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("seq", _BIGINT, nullable=False),
)
PROGRESS = sa.Table(
    "repo_progress",
    METADATA,
    sa.Column("source", sa.Text, primary_key=True),
    sa.Column("position", sa.Text, nullable=False),
)
TRANSACTIONS = sa.Table(
    "repo_transactions",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("expected", _BIGINT),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("detail", sa.Text),
    sa.Column("seen_at_ms", _BIGINT, nullable=False, index=True),
)
WAITING = sa.Table(
    "repo_waiting",
    METADATA,
    sa.Column("transaction_id", sa.Text, primary_key=True),
    sa.Column("table_name", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("version", _BIGINT, primary_key=True),
    sa.Column("content_hash", _BIGINT, primary_key=True),
    sa.Column("said", sa.Text, nullable=False),
)


class RepositoryError(TidemarkError):
    """The repository cannot be reached, or refuses."""


class Update(NamedTuple):
    """What a record says of a row.

    Attributes:
        table: A table of `schema.TABLES`.
        key: The row's.
        version: The source's position in its log; from 1 to 2^53 - 1.
        values: By column, as `schema.checked` gives them; columns that are not named stay. None: the row is deleted.
        event_time_ms: When the source says that it happened.
    """

    table: str
    key: str
    version: int
    values: Mapping[str, Any] | None
    event_time_ms: int | None = None


class Change(NamedTuple):
    """What became visible of a row in one commit.

    Attributes:
        seq: Its number; a later commit's is greater.
        table: The table.
        key: The row's.
        version: The greatest version of the row by then.
        changed: Column → its value before and after; `IS_THERE` where the row appeared or is gone.
        event_time_ms: When the source says that the last of the records happened, where one said so.
        committed_at_ms: When it was committed.
    """

    seq: int
    table: str
    key: str
    version: int
    changed: Mapping[str, tuple[Any, Any]]
    event_time_ms: int | None
    committed_at_ms: int

    @property
    def names(self) -> frozenset[str]:
        """The changed columns as handlers name them: `campaigns.status`."""
        return frozenset(f"{self.table}.{column}" for column in self.changed)


class Repository:
    """The store. Threads may share it."""

    def __init__(self, uri: str) -> None:
        """``uri``: `sqlite:<path>` or `postgresql://user:password@host/db`.

        Raises:
            RepositoryError: it cannot be opened.
        """
        self.uri = uri
        self._engine = _engine(uri)
        try:
            self._make()
        except sa.exc.OperationalError as error:
            raise RepositoryError(
                f"the repository cannot be opened: {str(error.orig).strip()}",
                where=_shown(uri),
                remedy="see the setting ads.repository",
            ) from error

    def _make(self) -> None:
        """Of many who open a new one at once, one makes the tables; to open one that is made waits for no writer."""
        with self.reading() as connection:
            is_made = METADATA.tables.keys() <= set(sa.inspect(connection).get_table_names())
        if not is_made:
            with self.writing() as connection:
                METADATA.create_all(connection)

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction of the one writer: committed at the end, undone by an exception."""
        with self._engine.connect().execution_options(**{_IMMEDIATE: True}) as connection:
            with connection.begin():
                if connection.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One point of the repository, however long it is looked at."""
        options: dict[str, Any] = {}
        if self._engine.dialect.name == "postgresql":
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self._engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection


def opened(settings: Settings) -> Repository:
    """The repository of a home."""
    return Repository(settings.ads.repository)


# ------------------------------------------------------------------------------------------------ rows


def read(connection: Connection, table: str, keys: Iterable[str]) -> dict[str, Row]:
    """The rows of a table by key, those of which anything was ever said."""
    sql = _ROWS[table]
    columns = sa.select(sql.c.key, sql.c.registers, sql.c.deleted_version)
    found = connection.execute(columns.where(among(connection, sql.c.key, keys)))
    return {key: _row(said, deleted_version) for key, said, deleted_version in found}


def scan(connection: Connection, table: str, after: str = "") -> Iterator[tuple[str, Row]]:
    """All rows of a table with a key above ``after``, in the order of their keys."""
    sql = _ROWS[table]
    while True:
        page = sa.select(sql.c.key, sql.c.registers, sql.c.deleted_version).where(sql.c.key > after)
        found = connection.execute(page.order_by(sql.c.key).limit(_AT_ONCE)).all()
        for key, said, deleted_version in found:
            yield key, _row(said, deleted_version)
        if len(found) < _AT_ONCE:
            return
        after = found[-1][0]


def referring(connection: Connection, table: str, column: str, keys: Iterable[str]) -> Iterator[str]:
    """The keys of a table's rows whose column names one of these keys."""
    sql = _ROWS[table]
    yield from connection.execute(
        sa.select(sql.c.key).where(among(connection, sql.c[column], keys))
    ).scalars()


def count(connection: Connection, table: str) -> int:
    """How many rows of a table anything was ever said of."""
    return connection.execute(sa.select(sa.func.count()).select_from(_ROWS[table])).scalar_one()


def write(connection: Connection, updates: Iterable[Update]) -> list[Change]:
    """Merge updates into their rows, in the transaction of `Repository.writing`.

    Returns:
        What became visible by all of them together. An update that changes nothing that can be seen may still raise the
        versions of its row.
    """
    now_ms = time.time_ns() // 1_000_000
    by_table: dict[str, list[Update]] = {}
    for update in updates:
        by_table.setdefault(update.table, []).append(update)
    changes: list[Change] = []
    for table, given in by_table.items():
        changes += _write(connection, table, given, now_ms)
    if not changes:
        return []
    last = last_change(connection)
    numbered = [change._replace(seq=last + place) for place, change in enumerate(changes, 1)]
    put(
        connection,
        CHANGES,
        [
            {
                "seq": change.seq,
                "table_name": change.table,
                "key": change.key,
                "version": change.version,
                "changed": orjson.dumps(change.changed).decode(),
                "event_time_ms": change.event_time_ms,
                "committed_at_ms": change.committed_at_ms,
            }
            for change in numbered
        ],
    )
    return numbered


def _write(connection: Connection, table: str, updates: Sequence[Update], now_ms: int) -> list[Change]:
    before = read(connection, table, dict.fromkeys(update.key for update in updates))
    after = dict(before)
    event_times: dict[str, int | None] = {}
    for update in updates:
        held = after.get(update.key, registers.EMPTY)
        if update.values is None:
            row = registers.with_deletion(held, update.version)
        else:
            row = registers.with_values(held, update.version, update.values)
        if row is not held:
            after[update.key] = row
            event_times[update.key] = update.event_time_ms or event_times.get(update.key)
    if not event_times:
        return []
    _store(connection, table, {key: after[key] for key in event_times})
    changes = []
    for key, event_time_ms in event_times.items():
        old, new = before.get(key, registers.EMPTY), after[key]
        changed = registers.changed(old, new)
        if registers.is_there(old) != registers.is_there(new):
            changed[IS_THERE] = (registers.is_there(old), registers.is_there(new))
        if changed:
            version = max(new.deleted_version, *new.versions.values(), 0)
            changes.append(Change(0, table, key, version, changed, event_time_ms, now_ms))
    return changes


def _store(connection: Connection, table: str, found: Mapping[str, Row]) -> None:
    references = [reference.column for reference in TABLES[table].references]
    values = [
        {
            "key": key,
            "registers": orjson.dumps([row.versions, row.values]).decode(),
            "deleted_version": row.deleted_version,
            **{column: registers.value(row, column) for column in references},
        }
        for key, row in found.items()
    ]
    put(connection, _ROWS[table], values, ("registers", "deleted_version", *references))


def _row(said: str, deleted_version: int) -> Row:
    versions, values = orjson.loads(said)
    return Row(versions, values, deleted_version)


# ------------------------------------------------------------------------------------------------ changes


def last_change(connection: Connection) -> int:
    """The number of the newest change; 0: there was none."""
    return connection.execute(sa.select(sa.func.max(CHANGES.c.seq))).scalar_one_or_none() or 0


def subscribe(connection: Connection, name: str) -> None:
    """Keep changes for a subscriber, from now on; one that is there stays where it is."""
    mine = {"name": name, "seq": last_change(connection)}
    put(connection, SUBSCRIBERS, [mine])


def unsubscribe(connection: Connection, name: str) -> None:
    """Keep no more changes for a subscriber."""
    connection.execute(sa.delete(SUBSCRIBERS).where(SUBSCRIBERS.c.name == name))


def changes_for(
    connection: Connection, subscriber: str, columns: frozenset[str], limit: int = 10_000
) -> tuple[list[Change], int]:
    """What a subscriber has not acknowledged of the changes of some columns, oldest first.

    Args:
        connection: Of `reading` or `writing`.
        subscriber: Its name.
        columns: As `campaigns.status`; `campaigns.is_there`: a row appeared or is gone. It gets these alone.
        limit: How many changes are looked at, whatever their columns.

    Returns:
        The changes, and the number to acknowledge when they are dealt with.

    Raises:
        RepositoryError: nobody of that name has subscribed.
    """
    held = sa.select(SUBSCRIBERS.c.seq).where(SUBSCRIBERS.c.name == subscriber)
    seen = connection.execute(held).scalar_one_or_none()
    if seen is None:
        raise RepositoryError(f"nobody has subscribed as {subscriber!r}", remedy="subscribe first")
    newer = sa.select(CHANGES).where(CHANGES.c.seq > seen).order_by(CHANGES.c.seq).limit(limit)
    found, last = [], seen
    for row in connection.execute(newer):
        last = row.seq
        wanted = {
            column: tuple(values)
            for column, values in orjson.loads(row.changed).items()
            if f"{row.table_name}.{column}" in columns
        }
        if wanted:
            found.append(
                Change(
                    row.seq,
                    row.table_name,
                    row.key,
                    row.version,
                    wanted,
                    row.event_time_ms,
                    row.committed_at_ms,
                )
            )
    return found, last


def acknowledge(connection: Connection, subscriber: str, seq: int) -> None:
    """A subscriber has dealt with the changes up to a number."""
    mine = sa.update(SUBSCRIBERS).where(SUBSCRIBERS.c.name == subscriber, SUBSCRIBERS.c.seq < seq)
    connection.execute(mine.values(seq=seq))


def drop_changes(connection: Connection, before_ms: int) -> int:
    """Drop changes that all subscribers have acknowledged and that are older; returns how many.

    The newest one stays, for the numbers go on from it.
    """
    seen = connection.execute(sa.select(sa.func.min(SUBSCRIBERS.c.seq))).scalar_one_or_none()
    last = last_change(connection)
    until = min(last - 1, last if seen is None else seen)
    old = sa.delete(CHANGES).where(CHANGES.c.seq <= until, CHANGES.c.committed_at_ms < before_ms)
    return connection.execute(old).rowcount


# ------------------------------------------------------------------------------------------------ progress


def progress(connection: Connection) -> dict[str, str]:
    """How far each source of updates was written: source → its position."""
    return {row.source: row.position for row in connection.execute(sa.select(PROGRESS))}


def set_progress(connection: Connection, source: str, position: str) -> None:
    """A source was written up to a position."""
    said = {"source": source, "position": position}
    put(connection, PROGRESS, [said], ("position",))


# ------------------------------------------------------------------------------------------------ many rows at once


def among(connection: Connection, column: sa.Column[str], keys: Iterable[str]) -> sa.ColumnElement[bool]:
    """Whether a column is one of these keys, however many: they are one parameter."""
    given = list(keys)
    if connection.dialect.name == "postgresql":
        return column == sa.any_(sa.literal(given, postgresql.ARRAY(sa.Text)))
    listed = sa.func.json_each(orjson.dumps(given).decode()).table_valued("value")
    return column.in_(sa.select(listed.c.value))


def put(
    connection: Connection,
    table: sa.Table,
    values: Sequence[Mapping[str, Any]],
    overwriting: Sequence[str] = (),
) -> None:
    """Insert rows, all with the same columns; of a row that is there these columns are overwritten.

    PostgreSQL takes them as one parameter.
    """
    if not values:
        return
    names = list(values[0])
    if connection.dialect.name == "postgresql":
        typed = [sa.column(name, table.c[name].type) for name in names]
        said = sa.cast(sa.literal(orjson.dumps(list(values)).decode(), sa.Text), postgresql.JSON)
        rows = sa.func.json_to_recordset(said).table_valued(*typed).render_derived(with_types=True)
        insert: Any = postgresql.insert(table).from_select(names, sa.select(rows))
        connection.execute(_overwriting(insert, table, overwriting))
    else:
        connection.execute(_overwriting(sqlite.insert(table), table, overwriting), values)


def _overwriting(insert: Any, table: sa.Table, columns: Sequence[str]) -> Any:
    keys = [column.name for column in table.primary_key]
    if not columns:
        return insert.on_conflict_do_nothing(index_elements=keys)
    return insert.on_conflict_do_update(
        index_elements=keys, set_={name: insert.excluded[name] for name in columns}
    )


# ------------------------------------------------------------------------------------------------ the engine


def _engine(uri: str) -> Engine:
    scheme, _, rest = uri.partition(":")
    if scheme == "sqlite":
        path = Path(rest)
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(f"sqlite:///{path}", connect_args={"timeout": _BUSY_S})
        sa.event.listen(engine, "connect", _prepare)
        sa.event.listen(engine, "begin", _begin)
        return engine
    if scheme in ("postgresql", "postgres"):
        return sa.create_engine(f"postgresql+psycopg:{rest}", pool_pre_ping=True)
    raise RepositoryError(
        f"a repository is SQLite or PostgreSQL, not {scheme!r}",
        where="ads.repository",
        remedy="say sqlite:<path> or postgresql://user:password@host/db",
    )


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself: `_begin` does
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # what was acknowledged outlives the machine's power
    connection.execute("PRAGMA cache_size=-65536")  # KiB


def _begin(connection: Connection) -> None:
    is_immediate = connection.get_execution_options().get(_IMMEDIATE)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_immediate else "BEGIN")
    if not is_immediate:
        connection.exec_driver_sql(
            "SELECT 1 FROM sqlite_master LIMIT 1"
        )  # the point is that of the first read


def _shown(uri: str) -> str:
    """An address without its password."""
    return sa.engine.make_url(uri).render_as_string() if uri.startswith("postgres") else uri
