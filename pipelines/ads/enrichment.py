"""From changed rows to the documents that they concern: whose they are, and the joined rows that handlers make them of.

Belongs here: looking both up in the repository, in one of its transactions. Does not belong here: what a joined row is
(`joined`), what is made of it (`handlers`), and when and where it is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from sqlalchemy.engine import Connection

from pipelines.ads import handlers, joined, repository
from pipelines.ads import rows as registers
from pipelines.ads.joined import INPUTS, KEY, Input
from pipelines.ads.repository import Change
from pipelines.ads.rows import Row
from pipelines.ads.schema import TABLES, Column, Impossible, checked


def look_up(connection: Connection, family: str, ads: Iterable[str]) -> pa.Table:
    """The joined rows of ads for a family of the document, in the order given; each row of a table is read once.

    An ad of which nothing was ever said has a row, too: it is not there, with a stand of 0.

    Args:
        connection: Of `Repository.reading`, so that all rows are of one point.
        family: Of the document.
        ads: Their keys.

    Returns:
        As `joined.arrow_schema` says.
    """
    keys = list(dict.fromkeys(ads))
    wanted: dict[str, list[Column]] = {given.table: [] for given in INPUTS[family]}
    for table, column in joined.columns(family):
        wanted[table.name].append(column)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for given in INPUTS[family]:
        read = repository.read(connection, given.table, _referred(given, found) if given.by else keys)
        found[given.table] = {key: _seen(row, given, wanted[given.table]) for key, row in read.items()}
    return joined.joined(family, (_joined(family, key, found) for key in keys))


def fan_out(connection: Connection, family: str, change: Change) -> Iterator[str]:
    """The ads whose documents of a family a change concerns, as they are read: whoever has enough may stop.

    None, if no handler of the family looks at what changed and no join depends on it.
    """
    if not handlers.triggers(family) & change.names:
        return iter(())
    found: Iterator[str] = iter((change.key,))
    for step in joined.changed_by(family, change.table):
        if step.by is not None:
            found = _referring(connection, *step.by, found)
    return found


def _referring(connection: Connection, table: str, column: str, keys: Iterator[str]) -> Iterator[str]:
    """The keys of rows that refer to these, a part of them after the other."""
    while part := list(itertools.islice(keys, 1_000)):
        yield from repository.referring(connection, table, column, part)


def _referred(given: Input, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> set[str]:
    assert given.by is not None
    table, column = given.by
    return {row[column] for row in found[table].values() if row[column] is not None}


def _joined(family: str, key: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    parts: dict[str, Mapping[str, Any]] = {}
    for given in INPUTS[family]:
        at = key if given.by is None else parts.get(given.by[0], {}).get(given.by[1])
        row = found[given.table].get(at) if at is not None else None
        if row is not None:
            parts[given.table] = row
    return {KEY: key, **parts}


def _seen(row: Row, given: Input, columns: Iterable[Column]) -> dict[str, Any]:
    values = {column.name: _valid(column, registers.value(row, column.name)) for column in columns}
    stand = registers.stand(row, TABLES[given.table], given.family)
    return {"is_there": registers.is_there(row), "stand": stand, **values}


def _valid(column: Column, value: Any) -> Any:
    """A value that came before its column was declared may be impossible: it counts as never said."""
    try:
        return checked(column, value)
    except Impossible:
        return None
