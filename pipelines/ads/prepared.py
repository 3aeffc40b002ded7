"""The rows of a table as a family's documents are joined of them: Arrow columns, kept from one look-up to the next.

Belongs here: reading rows of the repository into the columns of `joined.arrow_schema`, and telling whether one that was
read before is still as it was. Does not belong here: which rows a document is joined of (`enrichment`).

Reading a row's registers is most of what a document costs, and the same rows are asked for again and again: a campaign
that changes has its ads looked up each time, a backfill goes through all. A row is what its stored text says, so one
whose text has the hash that it had is not read again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from sqlalchemy.engine import Connection

from pipelines.ads import joined, repository
from pipelines.ads import rows as registers
from pipelines.ads.joined import Input
from pipelines.ads.rows import Row
from pipelines.ads.schema import TABLES, valid

MOST_ROWS = 100_000
"""So many rows of a table are kept, at about half a kilobyte each; with more it begins anew."""
_MOST_PARTS = 32
_NOTHING = np.zeros(1, np.int64)


class Prepared:
    """A table's rows for one family of the document.

    A row that was read has a number, by which is noted where it is among the rows of all parts, the hash of its
    registers' text, and its deletion. Number 0, at place 0, is the row that is not there.
    """

    def __init__(self, family: str, given: Input) -> None:
        self._table, self._family = TABLES[given.table], given.family
        of_table = (column for table, column in joined.columns(family) if table.name == given.table)
        self._columns = {column.name: column for column in of_table}
        self._type = joined.arrow_schema(family).field(given.table).type
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._place = self._text_hash = self._deleted = _NOTHING
        self._parts = [self._made([registers.EMPTY])]
        self._starts = [0]
        """The place of the first row of each part."""

    def look_up(self, connection: Connection, keys: Sequence[str | None]) -> pa.StructArray:
        """The row of each key as a struct; one that is not there says so, with a stand of 0."""
        distinct = list(dict.fromkeys(key for key in keys if key is not None))
        stored = list(repository.stored(connection, self._table.name, distinct))
        with self._lock:
            if len(self._numbers) > MOST_ROWS or len(self._parts) > _MOST_PARTS:
                self._gather()
            self._keep(stored)
            there = {one.key for one in stored}
            numbers = [self._numbers[key] if key in there else 0 for key in keys]
            return self._taken(self._place[np.array(numbers, np.int64)])

    def _keep(self, stored: Sequence[repository.Stored]) -> None:
        """Make those of these rows that are new, or not as they were."""
        numbers = np.array([self._numbers.get(one.key, 0) for one in stored], np.int64)
        text_hash = np.array([hash(one.registers) for one in stored], np.int64)
        deleted = np.array([one.deleted_version for one in stored], np.int64)
        is_kept = (self._text_hash[numbers] == text_hash) & (self._deleted[numbers] == deleted)
        fresh = np.flatnonzero(~is_kept | (numbers == 0))
        if not len(fresh):
            return
        new = fresh[numbers[fresh] == 0]
        numbers[new] = len(self._place) + np.arange(len(new))
        self._numbers.update(zip((stored[i].key for i in new.tolist()), numbers[new].tolist(), strict=True))
        end = self._starts[-1] + len(self._parts[-1])
        self._place = _changed(self._place, numbers[fresh], end + np.arange(len(fresh)), len(new))
        self._text_hash = _changed(self._text_hash, numbers[fresh], text_hash[fresh], len(new))
        self._deleted = _changed(self._deleted, numbers[fresh], deleted[fresh], len(new))
        rows = (repository.row_of(stored[i].registers, stored[i].deleted_version) for i in fresh.tolist())
        self._parts.append(self._made(list(rows)))
        self._starts.append(end)

    def _taken(self, places: np.ndarray) -> pa.StructArray:
        """The rows at these places, in their order."""
        part_of = np.searchsorted(self._starts, places, side="right") - 1
        order = np.argsort(part_of, kind="stable")
        found = [
            self._parts[part].take(pa.array(places[part_of == part] - self._starts[part]))
            for part in np.unique(part_of).tolist()
        ]
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_arrays([self._parts[0][:0], *found]).take(pa.array(back))

    def _gather(self) -> None:
        """Keep the newest of each row in one part; none, if they are too many."""
        if len(self._numbers) > MOST_ROWS:
            self._numbers = {}
            self._place = self._text_hash = self._deleted = _NOTHING
        self._parts, self._starts = [self._taken(self._place)], [0]
        self._place = np.arange(len(self._place))

    def _made(self, rows: Sequence[Row]) -> pa.StructArray:
        values: dict[str, list[Any]] = {
            "is_there": [registers.is_there(row, self._table) for row in rows],
            "stand": [registers.stand(row, self._table, self._family) for row in rows],
        }
        visible = [registers.visible(row) for row in rows]
        for name, column in self._columns.items():
            values[name] = valid(column, [row.get(name) for row in visible])
        arrays = [pa.array(values[field.name], field.type) for field in self._type]
        return pa.StructArray.from_arrays(arrays, fields=list(self._type))


def _changed(values: np.ndarray, at: np.ndarray, to: np.ndarray, more: int) -> np.ndarray:
    """A copy that has so many more values, and these at these places."""
    grown = np.concatenate([values, np.zeros(more, np.int64)])
    grown[at] = to
    return grown


def of_family(family: str) -> dict[str, Prepared]:
    """Nothing prepared yet, for each table that a family is joined of."""
    return {given.table: Prepared(family, given) for given in joined.INPUTS[family]}
