"""The ads repository: every row of the source tables with the version of each column, in SQL, and what changed.

Belongs here: the SQL tables, reading rows, writing updates, the changes and who has seen them. Does not belong here:
how records merge into a row (`rows`), when an update may be written (`updater`), and what is made of rows
(`enrichment`).

SQLite in WAL mode by default, PostgreSQL where many machines write or read. One writer at a time: whoever begins
`writing` waits for the one before. A `reading` sees one point of the repository, with whole transactions.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.compiler import compiles

from pipelines.ads import rows as registers
from pipelines.ads.rows import Row
from pipelines.ads.schema import TABLES
from pipelines.errors import TidemarkError
from pipelines.settings import Settings

IS_THERE = "is_there"
"""In a change: the row appeared, or is gone."""
CHANGES_AT_ONCE = 10_000
"""So many changes a subscriber is given at most, unless it says another number."""

_AT_ONCE = 1_000
_LOCK = 0x7469_6465  # of all who write to a PostgreSQL repository
_BUSY_S = 60.0
_IMMEDIATE = "tidemark_immediate"
_FROM_FEW_KEYS = "-c enable_hashjoin=off -c enable_mergejoin=off -c jit=off"
"""What joins here begins at few keys and follows indexes; a table that is not analyzed yet PostgreSQL would read whole,
and compile that."""

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
PAUSED = sa.Table(
    "repo_paused",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("since_ms", _BIGINT, nullable=False),
)
DROPPED = sa.Table(
    "repo_dropped",
    METADATA,
    sa.Column("at_ms", _BIGINT, primary_key=True, autoincrement=False),
    sa.Column("topic", sa.Text, primary_key=True),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("keys", _BIGINT, nullable=False),
)
INACTIVE = sa.Table(
    "repo_inactive",
    METADATA,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("since_ms", _BIGINT, nullable=False),
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

# What each batch of records and changes runs: to build a statement costs more than to run it.
_LAST = sa.select(sa.func.max(CHANGES.c.seq))
_PAUSED = sa.select(PAUSED)
_SEEN = sa.select(SUBSCRIBERS.c.seq).where(SUBSCRIBERS.c.name == sa.bindparam("subscriber"))
_NEWER = (
    sa.select(CHANGES)
    .where(CHANGES.c.seq > sa.bindparam("last"))
    .order_by(CHANGES.c.seq)
    .limit(sa.bindparam("most"))
)
_ACKNOWLEDGE = (
    sa.update(SUBSCRIBERS)
    .where(SUBSCRIBERS.c.name == sa.bindparam("subscriber"), SUBSCRIBERS.c.seq < sa.bindparam("dealt_with"))
    .values(seq=sa.bindparam("dealt_with"))
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


Way = tuple[tuple[str, str], ...]
"""From a row to those that refer to it, and so on: at each step a table, and its column that names the row before."""


class Repository:
    """The store. Threads may share it."""

    def __init__(self, uri: str) -> None:
        """``uri``: `sqlite:<path>` or `postgresql://user:password@host/db`.

        Raises:
            RepositoryError: it cannot be opened.
        """
        self.uri = uri
        self._engine = _engine(uri)
        self._turn = threading.Lock()
        self._make()

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
        """A transaction of the one writer: committed at the end, undone by an exception.

        Raises:
            RepositoryError: the store cannot be reached, or another process writes for too long.
        """
        # The threads of a process wait here for each other: SQLite's own waiting sleeps for longer and longer.
        with self._answering(), self._turn:
            with self._engine.connect().execution_options(**{_IMMEDIATE: True}) as connection:
                with connection.begin():
                    if connection.dialect.name == "postgresql":
                        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                    yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One point of the repository, however long it is looked at.

        Raises:
            RepositoryError: the store cannot be reached.
        """
        options: dict[str, Any] = {}
        if self._engine.dialect.name == "postgresql":
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self._answering(), self._engine.connect().execution_options(**options) as connection:
            with connection.begin():
                yield connection

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.OperationalError as error:
            raise RepositoryError(
                f"the repository does not answer: {str(error.orig).strip()}",
                where=_shown(self.uri),
                remedy="see that it runs; the setting ads.repository says where it is",
            ) from error


def opened(settings: Settings) -> Repository:
    """The repository of a home."""
    return Repository(settings.ads.repository)


# ------------------------------------------------------------------------------------------------ rows


def read(connection: Connection, table: str, keys: Iterable[str]) -> dict[str, Row]:
    """The rows of a table by key, those of which anything was ever said."""
    return {key: row_of(said, deleted) for key, said, deleted in stored(connection, table, keys)}


def stored(connection: Connection, table: str, keys: Iterable[str]) -> list[Stored]:
    """The rows of a table with these keys as they are stored, of which anything was ever said."""
    if not (given := list(keys)):
        return []
    return [Stored(*row) for row in connection.execute(_of_keys(table), listed(given))]


@functools.cache
def _of_keys(table: str) -> sa.Select[Any]:
    sql = _ROWS[table]
    return sa.select(sql.c.key, sql.c.registers, sql.c.deleted_version).where(among(sql.c.key))


def scan(connection: Connection, table: str, after: str = "") -> Iterator[tuple[str, Row]]:
    """All rows of a table with a key above ``after``, in the order of their keys."""
    sql = _ROWS[table]
    while True:
        page = sa.select(sql.c.key, sql.c.registers, sql.c.deleted_version).where(sql.c.key > after)
        found = connection.execute(page.order_by(sql.c.key).limit(_AT_ONCE)).all()
        for key, said, deleted_version in found:
            yield key, row_of(said, deleted_version)
        if len(found) < _AT_ONCE:
            return
        after = found[-1][0]


class Stored(NamedTuple):
    """A row as it is stored: its key, the versions and values of its registers as JSON, and its deletion's version."""

    key: str
    registers: str
    deleted_version: int


def pages(connection: Connection, table: str, size: int) -> Iterator[list[Stored]]:
    """All rows of a table as they are stored, in no order, so many at a time; `row_of` reads one."""
    sql = _ROWS[table]
    streamed = connection.execution_options(yield_per=size, stream_results=True)
    found = streamed.execute(sa.select(sql.c.key, sql.c.registers, sql.c.deleted_version))
    for part in found.partitions():
        yield [Stored(*row) for row in part]


def keys(connection: Connection, table: str) -> Iterator[str]:
    """The keys of all rows of a table of which anything was ever said, in their order, as they are read."""
    column = _ROWS[table].c.key
    after: str | None = ""
    while after is not None:
        page = sa.select(column).where(column > after).order_by(column).limit(_AT_ONCE)
        found = connection.execute(page).scalars().all()
        yield from found
        after = found[-1] if len(found) == _AT_ONCE else None


def referring(connection: Connection, table: str, column: str, keys: Iterable[str]) -> Iterator[str]:
    """The keys of a table's rows whose column names one of these keys, as they are read."""
    found = _referring(table, column)
    yield from connection.execute(found, listed(keys), execution_options={"yield_per": _AT_ONCE}).scalars()


@functools.cache
def _referring(table: str, column: str) -> sa.Select[Any]:
    sql = _ROWS[table]
    return sa.select(sql.c.key).where(among(sql.c[column]))


def referring_to_each(
    connection: Connection, way: Way, keys: Iterable[str], most: int
) -> dict[str, list[str]]:
    """For each of these keys the keys of the rows at the end of a way from it; of more than so many the first.

    One query, which stops at so many for each: what a shared row concerns is not read to its end.
    """
    found = connection.execute(_first_referring(way), {**listed(keys), "most": most})
    return {key: referring or [] for key, referring in found}


@functools.cache
def _first_referring(way: Way) -> sa.Select[Any]:
    (table, column), *more = way
    first = last = _ROWS[table]
    rows: sa.FromClause = first
    for table, named in more:
        before, last = last, _ROWS[table]
        rows = rows.join(last, last.c[named] == before.c.key)
    of_one = sa.select(last.c.key).select_from(rows).where(first.c[column] == _LISTED.c.value)
    few = of_one.limit(sa.bindparam("most")).correlate(_LISTED).subquery()
    return sa.select(_LISTED.c.value, sa.select(_AsList(few.c.key)).scalar_subquery())


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
    put_rows(connection, table, {key: after[key] for key in event_times})
    changes = []
    for key, event_time_ms in event_times.items():
        old, new = before.get(key, registers.EMPTY), after[key]
        changed = registers.changed(old, new)
        was_there, is_there = (registers.is_there(row, TABLES[table]) for row in (old, new))
        if was_there != is_there:
            changed[IS_THERE] = (was_there, is_there)
        if changed:
            version = max(new.deleted_version, *new.versions.values(), 0)
            changes.append(Change(0, table, key, version, changed, event_time_ms, now_ms))
    return changes


def put_rows(connection: Connection, table: str, found: Mapping[str, Row]) -> None:
    """Rows instead of those that are there, and nobody is told: `write` merges them, and says what changed."""
    references = [reference.column for reference in TABLES[table].references]
    values = [
        {
            "key": key,
            "registers": said_of(row),
            "deleted_version": row.deleted_version,
            **{column: registers.value(row, column) for column in references},
        }
        for key, row in found.items()
    ]
    put(connection, _ROWS[table], values, ("registers", "deleted_version", *references))


def said_of(row: Row) -> str:
    """A row's registers as they are stored."""
    return orjson.dumps([row.versions, row.values]).decode()


def row_of(said: str, deleted_version: int) -> Row:
    """What `Stored` says."""
    versions, values = orjson.loads(said)
    return Row(versions, values, deleted_version)


# ------------------------------------------------------------------------------------------------ changes


def last_change(connection: Connection) -> int:
    """The number of the newest change; 0: there was none."""
    return connection.execute(_LAST).scalar_one_or_none() or 0


def subscribe(connection: Connection, name: str) -> None:
    """Keep changes for a subscriber, from now on; one that is there stays where it is."""
    mine = {"name": name, "seq": last_change(connection)}
    put(connection, SUBSCRIBERS, [mine])


def pause(connection: Connection, name: str) -> None:
    """Give a subscriber no changes until `unpause`, over restarts too; they are kept for it."""
    put(connection, PAUSED, [{"name": name, "since_ms": time.time_ns() // 1_000_000}])


def unpause(connection: Connection, name: str) -> None:
    """Give a subscriber its changes again, from where it was."""
    connection.execute(sa.delete(PAUSED).where(PAUSED.c.name == name))


def paused(connection: Connection) -> dict[str, int]:
    """The subscribers that are paused, and since when, in ms since 1970."""
    return {row.name: row.since_ms for row in connection.execute(_PAUSED)}


def unsubscribe(connection: Connection, name: str) -> None:
    """Keep no more changes for a subscriber."""
    connection.execute(sa.delete(SUBSCRIBERS).where(SUBSCRIBERS.c.name == name))


def subscribers(connection: Connection) -> dict[str, int]:
    """The number of the change up to which each subscriber has acknowledged, by its name."""
    return {row.name: row.seq for row in connection.execute(sa.select(SUBSCRIBERS))}


def seen(connection: Connection, subscriber: str) -> int:
    """The number of the change up to which a subscriber has acknowledged.

    Raises:
        RepositoryError: nobody of that name has subscribed.
    """
    found = connection.execute(_SEEN, {"subscriber": subscriber}).scalar_one_or_none()
    if found is None:
        raise RepositoryError(f"nobody has subscribed as {subscriber!r}", remedy="subscribe first")
    return found


def changes_for(
    connection: Connection, subscriber: str, columns: frozenset[str], limit: int = CHANGES_AT_ONCE
) -> tuple[list[Change], int]:
    """What a subscriber has not acknowledged of the changes of some columns, oldest first.

    Args:
        connection: Of `reading` or `writing`.
        subscriber: Its name.
        columns: As `campaigns.status`; `campaigns.is_there`: a row appeared or is gone. It gets these alone.
        limit: How many changes are looked at, whatever their columns.

    Returns:
        The changes, and the number to acknowledge when they are dealt with; none, while it is paused.

    Raises:
        RepositoryError: nobody of that name has subscribed.
    """
    last = seen(connection, subscriber)
    if subscriber in paused(connection):
        return [], last
    found = []
    for row in connection.execute(_NEWER, {"last": last, "most": limit}):
        last = row.seq
        change = _change(row)
        wanted = {
            column: values
            for column, values in change.changed.items()
            if f"{change.table}.{column}" in columns
        }
        if wanted:
            found.append(change._replace(changed=wanted))
    return found, last


def changes_of(connection: Connection, table: str, key: str) -> list[Change]:
    """What is kept of the changes of one row, oldest first."""
    mine = sa.select(CHANGES).where(CHANGES.c.table_name == table, CHANGES.c.key == key)
    return [_change(row) for row in connection.execute(mine.order_by(CHANGES.c.seq))]


def _change(row: Any) -> Change:
    changed = {column: tuple(values) for column, values in orjson.loads(row.changed).items()}
    told = row.version, changed, row.event_time_ms, row.committed_at_ms
    return Change(row.seq, row.table_name, row.key, *told)


def acknowledge(connection: Connection, subscriber: str, seq: int) -> None:
    """A subscriber has dealt with the changes up to a number."""
    connection.execute(_ACKNOWLEDGE, {"subscriber": subscriber, "dealt_with": seq})


def drop_changes(connection: Connection, before_ms: int) -> int:
    """Drop changes that all subscribers have acknowledged and that are older; returns how many.

    The newest one stays, for the numbers go on from it.
    """
    by_all = connection.execute(sa.select(sa.func.min(SUBSCRIBERS.c.seq))).scalar_one_or_none()
    last = last_change(connection)
    until = min(last - 1, last if by_all is None else by_all)
    old = sa.delete(CHANGES).where(CHANGES.c.seq <= until, CHANGES.c.committed_at_ms < before_ms)
    return connection.execute(old).rowcount


class Dropped(NamedTuple):
    """Keys of documents that were dropped from a topic, and why."""

    at_ms: int
    topic: str
    reason: str
    keys: int


def note_dropped(connection: Connection, dropped: Sequence[Dropped]) -> None:
    """Remember what was dropped, for whoever reports it."""
    put(connection, DROPPED, [one._asdict() for one in dropped])


def dropped(connection: Connection, since_ms: int = 0) -> list[Dropped]:
    """What was dropped since a time, oldest first."""
    found = sa.select(DROPPED).where(DROPPED.c.at_ms >= since_ms).order_by(DROPPED.c.at_ms, DROPPED.c.topic)
    return [Dropped(*row) for row in connection.execute(found)]


# ------------------------------------------------------------------------------------------------ garbage collection


def inactive_since(connection: Connection) -> dict[str, int]:
    """The ads that were seen inactive, and when first, in ms since 1970."""
    return {row.key: row.since_ms for row in connection.execute(sa.select(INACTIVE))}


def set_inactive(connection: Connection, since_ms: Mapping[str, int]) -> None:
    """These ads, and no others, are inactive."""
    connection.execute(sa.delete(INACTIVE))
    put(connection, INACTIVE, [{"key": key, "since_ms": since} for key, since in since_ms.items()])


def strip(connection: Connection, table: str, keys: Iterable[str]) -> None:
    """Drop the values of void columns from rows (`rows.stripped`): nothing that can be seen changes."""
    found = read(connection, table, keys)
    put_rows(connection, table, {key: registers.stripped(row) for key, row in found.items()})


# ------------------------------------------------------------------------------------------------ progress


def progress(connection: Connection) -> dict[str, str]:
    """How far each source of updates was written: source → its position."""
    return {row.source: row.position for row in connection.execute(sa.select(PROGRESS))}


def set_progress(connection: Connection, source: str, position: str) -> None:
    """A source was written up to a position."""
    said = {"source": source, "position": position}
    put(connection, PROGRESS, [said], ("position",))


# ------------------------------------------------------------------------------------------------ many rows at once


_KEYS = sa.bindparam("keys", type_=sa.Text)


class _Among(sa.sql.functions.GenericFunction[Any]):
    """Whether a column is in a list in JSON. PostgreSQL takes it as an array: then it looks the few up by an index."""

    inherit_cache = True


@compiles(_Among)
def _among(function: _Among, compiler: Any, **options: Any) -> str:
    column, keys = (compiler.process(given, **options) for given in function.clauses)
    return f"{column} IN (SELECT value FROM json_each({keys}))"


@compiles(_Among, "postgresql")
def _among_array(function: _Among, compiler: Any, **options: Any) -> str:
    column, keys = (compiler.process(given, **options) for given in function.clauses)
    return f"{column} = ANY(ARRAY(SELECT json_array_elements_text(CAST({keys} AS JSON))))"


class _Elements(sa.sql.functions.GenericFunction[Any]):
    """The texts of a list in JSON as rows, with a column `value`."""

    name = "json_each"
    inherit_cache = True


@compiles(_Elements, "postgresql")
def _elements(function: _Elements, compiler: Any, **options: Any) -> str:
    return f"json_array_elements_text(CAST({compiler.process(function.clauses, **options)} AS JSON))"


class _AsList(sa.sql.functions.GenericFunction[Any]):
    """The values of a group as a list."""

    name = "json_group_array"
    type = sa.JSON()
    inherit_cache = True


@compiles(_AsList, "postgresql")
def _as_list(function: _AsList, compiler: Any, **options: Any) -> str:
    return f"json_agg{compiler.process(function.clause_expr, **options)}"


_LISTED = _Elements(_KEYS).table_valued("value")


def among(column: sa.Column[str]) -> sa.ColumnElement[bool]:
    """Whether a column is one of the keys that the statement is given with `listed`."""
    return _Among(column, _KEYS)


def listed(keys: Iterable[str]) -> dict[str, str]:
    """The parameter of a statement with `among`: keys, however many."""
    return {"keys": orjson.dumps(list(keys)).decode()}


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
    dialect = connection.dialect.name
    rows: Any = {"rows": orjson.dumps(list(values)).decode()} if dialect == "postgresql" else values
    connection.execute(_insert(dialect, table, tuple(values[0]), tuple(overwriting)), rows)


@functools.cache
def _insert(dialect: str, table: sa.Table, names: tuple[str, ...], overwriting: tuple[str, ...]) -> Any:
    if dialect == "postgresql":
        typed = [sa.column(name, table.c[name].type) for name in names]
        said = sa.cast(sa.bindparam("rows", type_=sa.Text), postgresql.JSON)
        rows = sa.func.json_to_recordset(said).table_valued(*typed).render_derived(with_types=True)
        insert: Any = postgresql.insert(table).from_select(names, sa.select(rows))
    else:
        insert = sqlite.insert(table)
    keys = [column.name for column in table.primary_key]
    if not overwriting:
        return insert.on_conflict_do_nothing(index_elements=keys)
    return insert.on_conflict_do_update(
        index_elements=keys, set_={name: insert.excluded[name] for name in overwriting}
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
        options = {"options": _FROM_FEW_KEYS}
        return sa.create_engine(f"postgresql+psycopg:{rest}", pool_pre_ping=True, connect_args=options)
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
