"""A row of the ads repository: a register for each column, and how records merge into it.

Belongs here: pure functions of rows: merging, what of a row is visible, its stand, what changed. Does not belong here:
how rows are stored (`repository`), and what a value may be (`schema`).

A row is what all its records say together, whatever their order and however often each came: the greatest version of
a column wins, and a column that is not above the row's deletion is void. Void columns stay in the row with their
versions, because a row that forgot them would depend on the order in which its records came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from pipelines.ads.schema import Table


class Cell(NamedTuple):
    """A column's greatest version and its value at it."""

    version: int
    value: Any


class Row(NamedTuple):
    """The registers of a row.

    Attributes:
        cells: By column; only columns that a record named.
        deleted_version: The greatest version at which it was deleted; 0: never.
    """

    cells: Mapping[str, Cell]
    deleted_version: int


EMPTY = Row({}, 0)
"""A row of which nothing has been said."""


def with_values(row: Row, version: int, values: Mapping[str, Any]) -> Row:
    """The row after a record that sets columns; the same object if it says nothing new.

    Two records with one version and different values are a producer's mistake: the greater JSON text wins, so that the
    row does not depend on which came first.
    """
    newer = {
        column: Cell(version, value)
        for column, value in values.items()
        if _is_above(version, value, row.cells.get(column))
    }
    return row._replace(cells={**row.cells, **newer}) if newer else row


def with_deletion(row: Row, version: int) -> Row:
    """The row after its deletion; the same object if it was deleted at that version or a greater one."""
    return row._replace(deleted_version=version) if version > row.deleted_version else row


def visible(row: Row) -> dict[str, Any]:
    """The value of each column that was ever named; None where it is void."""
    return {
        column: cell.value if cell.version > row.deleted_version else None
        for column, cell in row.cells.items()
    }


def is_there(row: Row) -> bool:
    """Whether a column is above the row's deletion."""
    return any(cell.version > row.deleted_version for cell in row.cells.values())


def stand(row: Row, table: Table, family: str) -> int:
    """The version of a column family: the sum of its columns' versions and the deletion's.

    Every change of the family's visible columns raises it, also a late one, which the greatest version would not show.
    Columns that the table does not declare are of no family.
    """
    declared = (row.cells.get(column.name) for column in table.of_family(family))
    return row.deleted_version + sum(cell.version for cell in declared if cell is not None)


def changed(old: Row, new: Row) -> dict[str, tuple[Any, Any]]:
    """The columns whose visible values differ, with the old and the new value; a column never named is None."""
    before, after = visible(old), visible(new)
    return {
        column: (was, now)
        for column in sorted(before.keys() | after.keys())
        if (was := before.get(column)) is not (now := after.get(column)) and _text(was) != _text(now)
    }


def _is_above(version: int, value: Any, held: Cell | None) -> bool:
    if held is None or version != held.version:
        return held is None or version > held.version
    return _text(value) > _text(held.value)


def _text(value: Any) -> bytes:
    """Canonical JSON; unlike ``==`` it tells 1 from true and 1.0."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
