"""A row of the ads repository: a register for each column, and how records merge into it.

Belongs here: pure functions of rows: merging, what of a row is visible, its stand, what changed. Does not belong here:
how rows are stored (`repository`), and what a value may be (`schema`).

A row is what all its records say together, whatever their order and however often each came: the greatest version of
a column wins, and a column that is not above the row's deletion is void. Void columns stay in the row with their
versions, because a row that forgot them would depend on the order in which its records came.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from pipelines.ads.schema import TABLES, Table


class Row(NamedTuple):
    """The registers of a row: the greatest version of each column that a record named, and its value at it.

    Attributes:
        versions: By column.
        values: By column, also where it is void.
        deleted_version: The greatest version at which it was deleted; 0: never.
    """

    versions: Mapping[str, int]
    values: Mapping[str, Any]
    deleted_version: int


_ZEROS = itertools.repeat(0)

EMPTY = Row({}, {}, 0)
"""A row of which nothing has been said."""


def with_values(row: Row, version: int, values: Mapping[str, Any]) -> Row:
    """The row after a record that sets columns; the same object if it says nothing new.

    Two records with one version and different values are a producer's mistake: the greater JSON text wins, so that the
    row does not depend on which came first.
    """
    newer = {column: value for column, value in values.items() if _is_above(row, column, version, value)}
    if not newer:
        return row
    return Row(
        {**row.versions, **dict.fromkeys(newer, version)}, {**row.values, **newer}, row.deleted_version
    )


def with_deletion(row: Row, version: int) -> Row:
    """The row after its deletion; the same object if it was deleted at that version or a greater one."""
    return row._replace(deleted_version=version) if version > row.deleted_version else row


def visible(row: Row) -> Mapping[str, Any]:
    """The value of each column that was ever named; None where it is void. Nobody may change it."""
    if row.deleted_version == 0:
        return row.values
    return {column: value(row, column) for column in row.values}


def value(row: Row, column: str) -> Any:
    """A column's value; None where it is void or was never named."""
    return row.values.get(column) if row.versions.get(column, 0) > row.deleted_version else None


def is_there(row: Row, table: Table) -> bool:
    """Whether a column of the table's own family that a source has is above the row's deletion."""
    return max(map(row.versions.get, _makers(table.name), _ZEROS)) > row.deleted_version


def stand(row: Row, table: Table, family: str) -> int:
    """The version of a column family: the sum of its columns' versions and the deletion's.

    Every change of the family's visible columns raises it, also a late one, which the greatest version would not show.
    So does every change of whether the row is there: the columns of the table's own family are part of each family's
    stand. Columns that the table does not declare are of no family.
    """
    return row.deleted_version + sum(map(row.versions.get, _columns(table.name, family), _ZEROS))


@functools.cache
def _columns(table_name: str, family: str) -> tuple[str, ...]:
    """The names of the columns that are part of a family's stand."""
    table = TABLES[table_name]
    return tuple(column.name for column in table.columns if column.family in (table.family, family))


@functools.cache
def _makers(table_name: str) -> tuple[str, ...]:
    """The names of the columns that make a row."""
    table = TABLES[table_name]
    return tuple(column.name for column in table.sourced if column.family == table.family)


def stripped(row: Row) -> Row:
    """The row without the values of its void columns. Their versions stay: by them older records stay dead."""
    values = {
        column: value if row.versions[column] > row.deleted_version else None
        for column, value in row.values.items()
    }
    return row._replace(values=values)


def changed(old: Row, new: Row) -> dict[str, tuple[Any, Any]]:
    """The columns whose visible values differ, with the old and the new value; a column never named is None.

    ``new`` is what ``old`` became.
    """
    touched = [
        column
        for column, version in new.versions.items()
        if old.versions.get(column) != version or old.values[column] is not new.values[column]
    ]
    if old.deleted_version != new.deleted_version:
        touched = list(new.versions)
    pairs = ((column, value(old, column), value(new, column)) for column in sorted(touched))
    return {column: (was, now) for column, was, now in pairs if was is not now and _text(was) != _text(now)}


def _is_above(row: Row, column: str, version: int, value: Any) -> bool:
    held = row.versions.get(column, 0)
    if version != held:
        return version > held
    return _text(value) > _text(row.values[column])


def _text(value: Any) -> bytes:
    """Canonical JSON; unlike ``==`` it tells 1 from true and 1.0."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
