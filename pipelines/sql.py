"""SQL on Trino, the embedded one or the user's: one statement, its columns and rows, and what is wrong with it.

Belongs here: the connection, errors that a person can mend, cancelling. Does not belong here: starting Trino
(`trino_server`), printing and the prompt (`jobs.cli.exploring`), views (`views`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from trino.auth import BasicAuthentication
from trino.dbapi import Connection, connect
from trino.exceptions import DatabaseError, TrinoConnectionError, TrinoQueryError

from pipelines import trino_server
from pipelines.errors import TidemarkError
from pipelines.settings import CATALOG, Settings

if TYPE_CHECKING:
    import pandas as pd

CONNECT_TIMEOUT_S = 10.0
BATCH_ROWS = 1000
_REMEDIES = {
    "TABLE_NOT_FOUND": "`tidemark sql 'SHOW TABLES FROM curated'` lists those of a schema",
    "SCHEMA_NOT_FOUND": "`tidemark sql 'SHOW SCHEMAS'` lists them",
    "COLUMN_NOT_FOUND": "`tidemark sql 'DESCRIBE curated.pins_offer'` lists a table's columns",
    "EXCEEDED_LOCAL_MEMORY_LIMIT": "ask for less at a time, or raise trino.heap_mb and conf/trino/config.properties",
}


class SqlError(TidemarkError):
    """Trino refused a statement, or it failed; `line` and `column` say where in it, from 1, if Trino does."""

    def __init__(
        self, what: str, *, where: str, remedy: str | None, location: tuple[int, int] | None = None
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.line = location[0] if location else None
        self.column = location[1] if location else 1


class TrinoAway(TidemarkError):
    """Trino cannot be reached."""


class Column(NamedTuple):
    """A column of an answer: its name, and its type in Trino's words."""

    name: str
    type: str


class Answer(NamedTuple):
    """What a statement gave; `rows` are fetched as they are asked for, once."""

    columns: tuple[Column, ...]
    rows: Iterator[tuple[Any, ...]]
    query_id: str


@contextmanager
def connection(settings: Settings) -> Iterator[Connection]:
    """A connection to Trino, in the catalog of the lake; sends nothing yet."""
    parts = urlsplit(settings.trino.url)
    password = unquote(parts.password) if parts.password else None
    user = unquote(parts.username) if parts.username else settings.trino.user
    opened = connect(
        host=parts.hostname,
        port=parts.port or (443 if parts.scheme == "https" else 80),
        http_scheme=parts.scheme,
        user=user,
        auth=BasicAuthentication(user, password) if password is not None else None,
        catalog=CATALOG,
        source="tidemark",
        request_timeout=CONNECT_TIMEOUT_S,
    )
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def answering(
    settings: Settings, statement: str, parameters: Sequence[Any] | None = None
) -> Iterator[Answer]:
    """Run a statement, and give its answer while the block lasts; left early, the query is cancelled.

    Args:
        settings: Where Trino is.
        statement: One statement, without a semicolon.
        parameters: Values for its question marks.

    Raises:
        SqlError: Trino refused it, or it failed; `where` says in which line and column.
        TrinoAway: Trino cannot be reached.
    """
    with connection(settings) as opened, _understood(settings):
        cursor = opened.cursor()
        try:
            cursor.execute(statement, parameters)
            described = cursor.description or []
            columns = tuple(Column(column.name, column.type_code) for column in described)
            yield Answer(columns, _rows(cursor), str(cursor.query_id))
        finally:
            cursor.cancel()


def rows(
    settings: Settings, statement: str, parameters: Sequence[Any] | None = None
) -> list[tuple[Any, ...]]:
    """All rows of a statement's answer; for what `answering` raises."""
    with answering(settings, statement, parameters) as answer:
        return list(answer.rows)


def frame(settings: Settings, statement: str, parameters: Sequence[Any] | None = None) -> pd.DataFrame:
    """A statement's answer for pandas; for what `answering` raises."""
    import pandas as pd

    with answering(settings, statement, parameters) as answer:
        return pd.DataFrame.from_records(
            list(answer.rows), columns=[column.name for column in answer.columns]
        )


def _rows(cursor: Any) -> Iterator[tuple[Any, ...]]:
    while batch := cursor.fetchmany(BATCH_ROWS):
        for row in batch:
            yield tuple(row)


def excerpt(statement: str, error: SqlError) -> str:
    """The line that an error is about, with a mark under the column; empty where it says none."""
    if error.line is None or error.line > len(lines := statement.splitlines()):
        return ""
    return f"{lines[error.line - 1]}\n{' ' * (error.column - 1)}^"


@contextmanager
def _understood(settings: Settings) -> Iterator[None]:
    try:
        yield
    except TrinoQueryError as error:
        # "line 1:8: Column 'x' cannot be resolved": the place is told apart.
        what = re.sub(r"^line \d+:\d+: ", "", error.message)
        location = error.error_location
        where = f"line {location[0]}, column {location[1]}" if location else f"query {error.query_id}"
        raise SqlError(
            what, where=where, remedy=_REMEDIES.get(error.error_name or ""), location=location
        ) from error
    except (TrinoConnectionError, DatabaseError) as error:
        raise away(settings, str(error)) from error


def away(settings: Settings, why: str) -> TrinoAway:
    """The error of a Trino that does not answer."""
    is_ours = settings.trino.is_embedded
    remedy = "`tidemark up trino` starts it" if is_ours else "see whether it runs, or mend trino.url"
    return TrinoAway(
        f"Trino does not answer: {why.strip().splitlines()[0]}",
        where=trino_server.origin(settings),
        remedy=remedy,
    )
