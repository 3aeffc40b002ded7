"""The source database of an ads account: its tables in PostgreSQL, an account in them, and changes as SQL.

Belongs here: the tables as `schema` declares them, making and loading them, and writing a source transaction. Does not
belong here: running PostgreSQL (`pipelines.postgres`), and capturing what changes (`capture`).

Nothing is refused here that the contract of `ads-changes` refuses: a source may be any database, and what a value may
be is decided once, at the door. Nor do references have foreign keys. They would make an order of what may come in any,
a writer of an ad would lock its group, campaign and advertiser, and rows of an account are archived, not deleted.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from psycopg import Connection, sql

from pipelines import postgres
from pipelines.ads import generator, schema
from pipelines.ads.repository import Update
from pipelines.ads.schema import TABLES, TERMS, TIME, VECTOR, Table
from pipelines.errors import TidemarkError
from pipelines.settings import Settings

NAME = "ads"
ROWS_AT_ONCE = 5_000
"""How many rows of an account are loaded in one transaction: whoever follows has that many that wait."""

_TYPES = {
    schema.INTEGER: "bigint",
    schema.NUMBER: "double precision",
    schema.BOOLEAN: "boolean",
    schema.TEXT: "text",
    schema.TERMS: "text[]",
    schema.TIME: "timestamptz",
    schema.ID: "text",
    schema.VECTOR: "double precision[]",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CONNECT_S = 10


class DatabaseError(TidemarkError):
    """The source database cannot be reached, or is not as it must be."""


class Place(NamedTuple):
    """Where a database is, and who logs in."""

    host: str
    port: int
    user: str
    password: str
    database: str


def place(settings: Settings) -> Place:
    """The parts of `ads.database`.

    Raises:
        DatabaseError: It is not the address of a database of PostgreSQL.
    """
    parts = urlsplit(settings.ads.database)
    name = parts.path.strip("/")
    if parts.scheme != "postgresql" or not parts.hostname or not name:
        raise DatabaseError(
            "the source database must be PostgreSQL",
            where="ads.database",
            remedy="set it to postgresql://user:password@host/db",
        )
    login = unquote(parts.username or ""), unquote(parts.password or "")
    return Place(parts.hostname, parts.port or 5432, *login, name)


@contextmanager
def connected(settings: Settings, name: str | None = None) -> Iterator[Connection]:
    """A connection that commits each statement alone, outside of `Connection.transaction`.

    Args:
        settings: Where the source database is.
        name: Another database of the same server.

    Raises:
        DatabaseError: It cannot be reached.
    """
    host, port, user, password, database = place(settings)
    try:
        connection = psycopg.connect(
            host=host,
            port=port,
            user=user or None,
            password=password or None,
            dbname=name or database,
            autocommit=True,
            connect_timeout=_CONNECT_S,
        )
    except psycopg.OperationalError as error:
        raise DatabaseError(
            f"the source database cannot be reached: {' '.join(str(error).split())}",
            where=f"{host}:{port}/{name or database}",
            remedy="`tidemark up ads-db` starts a private one; for your own, see ads.database",
        ) from None
    with connection:
        yield connection


def command(settings: Settings) -> list[str]:
    """What runs the private server in the foreground, with its data made; SIGINT stops it politely.

    Raises:
        DatabaseError: The settings name another database.
        PreflightError: There is no PostgreSQL on this machine.
        PostgresError: Its data could not be made.
    """
    port = settings.ads.database_port
    if settings.ads.database != postgres.address(port, NAME):
        raise DatabaseError(
            "these settings name a database of your own",
            where="ads.database",
            remedy="`tidemark up ads-connect` captures that one; leave the setting out for a private one",
        )
    return postgres.command(settings.home / "ads" / "postgres", port, {"wal_level": "logical"})


def make(settings: Settings) -> None:
    """Make the database, its tables and indices, where they are not there yet.

    The key is the replica identity: of a row that is deleted, no more is asked.

    Raises:
        DatabaseError: The server cannot be reached.
    """
    name = place(settings).database
    with connected(settings, "postgres") as server:
        if server.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with connected(settings) as connection, connection.transaction():
        for table in TABLES.values():
            for statement in definition(table):
                connection.execute(statement)


def definition(table: Table) -> list[sql.Composed]:
    """The statements that make a table as it is declared, and an index of each reference."""
    columns = [sql.SQL("{} text PRIMARY KEY").format(sql.Identifier(table.key))]
    columns += [
        sql.SQL("{} {}").format(sql.Identifier(column.name), sql.SQL(_TYPES[column.type]))
        for column in table.sourced
    ]
    name = sql.Identifier(table.name)
    return [
        sql.SQL("CREATE TABLE IF NOT EXISTS {} ({})").format(name, sql.SQL(", ").join(columns)),
        sql.SQL("ALTER TABLE {} {}").format(  # one of before a column was declared
            name,
            sql.SQL(", ").join(
                sql.SQL("ADD COLUMN IF NOT EXISTS {}").format(column) for column in columns[1:]
            ),
        ),
        *(
            sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} ({})").format(
                sql.Identifier(f"{table.name}_{reference.column}"), name, sql.Identifier(reference.column)
            )
            for reference in table.references
        ),
    ]


def load(settings: Settings, ads: int, seed: int) -> int:
    """Load the generator's account into empty tables, `ROWS_AT_ONCE` rows a transaction; returns how many rows.

    Raises:
        DatabaseError: The server cannot be reached, or there is an account already.
    """
    count = 0
    with connected(settings) as connection:
        _require_empty(connection)
        for table, rows in generator.account(ads, seed):
            for start in range(0, rows.num_rows, ROWS_AT_ONCE):
                _copy(connection, table, rows.slice(start, ROWS_AT_ONCE))
            count += rows.num_rows
    return count


def write(connection: Connection, updates: Iterable[Update]) -> None:
    """Write updates as one transaction; their versions are not: the database's log gives its own.

    A row that is not there is inserted, one without values is deleted. Rows are taken in the order of their keys, so
    that writers wait for each other, and do not block each other for ever.
    """
    with connection.transaction():
        for update in sorted(updates, key=lambda one: (one.table, one.key)):
            table = TABLES[update.table]
            if update.values is None:
                connection.execute(_deletion(table), [update.key])
            else:
                values = [_stored(table, name, value) for name, value in update.values.items()]
                connection.execute(_upsert(table, list(update.values)), [update.key, *values])


def _deletion(table: Table) -> sql.Composed:
    return sql.SQL("DELETE FROM {} WHERE {} = %s").format(
        sql.Identifier(table.name), sql.Identifier(table.key)
    )


def _upsert(table: Table, names: Sequence[str]) -> sql.Composed:
    columns = [sql.Identifier(name) for name in (table.key, *names)]
    changes = [sql.SQL("{0} = EXCLUDED.{0}").format(column) for column in columns[1:]]
    on_conflict = (
        sql.SQL("UPDATE SET {}").format(sql.SQL(", ").join(changes)) if changes else sql.SQL("NOTHING")
    )
    return sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT ({}) DO {}").format(
        sql.Identifier(table.name),
        sql.SQL(", ").join(columns),
        sql.SQL(", ").join([sql.Placeholder()] * len(columns)),
        columns[0],
        on_conflict,
    )


def _stored(table: Table, name: str, value: Any) -> Any:
    column = table.column(name)
    is_time = column is not None and column.type == TIME and value is not None
    return _EPOCH + timedelta(milliseconds=value) if is_time else value


def _require_empty(connection: Connection) -> None:
    for table in TABLES.values():
        found = connection.execute(sql.SQL("SELECT 1 FROM {} LIMIT 1").format(sql.Identifier(table.name)))
        if found.fetchone() is not None:
            raise DatabaseError(
                f"there is an account already: the table {table.name} has rows",
                where=f"the database {connection.info.dbname}",
                remedy="load into an empty database",
            )


def _copy(connection: Connection, table: Table, rows: pa.Table) -> None:
    """Rows as CSV through COPY, which takes in them ten times as fast as rows of Python's would come."""
    for place_of, name in enumerate(rows.column_names):
        column = table.column(name)
        if column is not None and column.type in (TERMS, TIME, VECTOR):
            rows = rows.set_column(place_of, name, _as_text(column.type, rows[name]))
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(rows, buffer, pyarrow.csv.WriteOptions(include_header=False))
    into = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
        sql.Identifier(table.name), sql.SQL(", ").join(map(sql.Identifier, rows.column_names))
    )
    with connection.cursor() as cursor, cursor.copy(into) as copy:
        copy.write(buffer.getbuffer())


def _as_text(kind: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times and lists as PostgreSQL reads them."""
    if kind == TIME:
        return column.cast(pa.timestamp("ms", tz="UTC"))
    if kind == VECTOR:
        column = column.cast(pa.list_(pa.string()))
    return pa.chunked_array([_arrays(chunk) for chunk in column.chunks], pa.string())


def _arrays(lists: pa.ListArray) -> pa.StringArray:
    """Lists of texts as literals of arrays: `{"red","oak"}`."""
    escaped = pc.replace_substring_regex(lists.flatten(), r'(["\\])', r"\\\1")
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths).cast(pa.int32())])
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, escaped), '","')
    full = pc.binary_join_element_wise('{"', joined, '"}', "")
    literals = pc.if_else(pc.equal(lengths, 0), "{}", full)
    return pc.if_else(lists.is_valid(), literals, pa.scalar(None, pa.string()))
