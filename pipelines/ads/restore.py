"""Tables into the ads repository: a repository rebuilt of a dump, and columns that a batch computed.

Belongs here: the updates that a table's rows say, and writing them in parts, each with how far it is in the same
commit: whoever is interrupted goes on from there. Does not belong here: how updates merge (`rows`), and the dump.

Both write as records from the topic are written: what is newer in the repository stays, and what changes is published.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.table import Table as Iceberg

from pipelines import lake
from pipelines.ads import dump, repository
from pipelines.ads.joined import ARROW
from pipelines.ads.repository import Repository, Update
from pipelines.ads.rows import Row
from pipelines.ads.schema import TABLES, TIME, Impossible, Table, checked
from pipelines.contracts.contract import MAX_VERSION
from pipelines.errors import TidemarkError
from pipelines.settings import Settings

PART_ROWS = 2_000
_TURN_S = 0.05  # between two commits, so that whoever else writes gets a turn


class RestoreError(TidemarkError):
    """Rows cannot be written into the repository."""


class Written(NamedTuple):
    """What became of a table's rows.

    Attributes:
        table: Of the catalog.
        rows: That it has.
        skipped: Of these, written by an earlier call.
        refused: Reason → rows that say something impossible, and were left out.
    """

    table: str
    rows: int
    skipped: int
    refused: dict[str, int]


def restore(settings: Settings, store: Repository, dump_id: str | None = None) -> list[Written]:
    """Merge every row of a dump into a repository: one that was empty has the same rows, versions and stands then.

    The topic `ads-changes` has what came after the dump; a repository without progress is given all of it again.

    Args:
        settings: Where the catalog is.
        store: The repository.
        dump_id: Which; the newest that readers see by default.

    Raises:
        DumpError: There is none such.
    """
    head = dump.head(settings, dump_id)
    if head is None:
        raise dump.DumpError("there is no dump that readers see", remedy="make one: `tidemark ads dump`")
    written = []
    for name, table in TABLES.items():
        source = f"restore:{head.dump_id}:{name}"
        stored = _Rows(settings, f"repo.{name}", head.snapshots[f"repo.{name}"])
        columns = (table.key, "registers", "deleted_version")

        def updates(batch: pa.RecordBatch, name: str = name) -> Iterator[Update]:
            for key, said, deleted in zip(*batch.to_pydict().values(), strict=True):
                yield from updates_of(name, key, repository.row_of(said, deleted))

        written.append(_write(store, source, stored, columns, updates, Counter()))
    return written


def updates_of(table: str, key: str, row: Row) -> list[Update]:
    """The records that say a row: one for each version of its columns, and its deletion."""
    by_version: dict[int, dict[str, Any]] = {}
    for column, version in row.versions.items():
        by_version.setdefault(version, {})[column] = row.values[column]
    said = [Update(table, key, version, values) for version, values in sorted(by_version.items())]
    return [*said, Update(table, key, row.deleted_version, None)] if row.deleted_version else said


def integrate(
    settings: Settings,
    store: Repository,
    source: str,
    into: str,
    version: int,
    columns: Sequence[str] = (),
) -> Written:
    """Write columns of a table of the catalog into a table of the repository, all at one version.

    Args:
        settings: Where the catalog is.
        store: The repository.
        source: A table of the catalog, with the key of `into` and any of its columns.
        into: A table of `schema.TABLES`.
        version: That the columns get: where the repository has a greater one, its value stays.
        columns: Which; by default all that both have.

    Returns:
        What was written. A row that says something impossible is left out as a whole.

    Raises:
        RestoreError: No such table, key or column, or a version that none can be.
    """
    target, snapshot = TABLES.get(into), lake.current_snapshot(settings, source)
    if target is None:
        raise RestoreError(f"the repository has no table {into!r}", remedy=f"choose of {', '.join(TABLES)}")
    if snapshot is None:
        raise RestoreError("there is no such table, or it has no rows", where=source)
    if not 1 <= version <= MAX_VERSION:
        raise RestoreError(f"{version} is no version", remedy=f"give one from 1 to {MAX_VERSION}")
    stored = _Rows(settings, source, snapshot.id)
    chosen = tuple(columns) or tuple(c.name for c in target.columns if c.name in stored.names)
    _require(stored, target, chosen)
    refused: Counter[str] = Counter()

    def updates(batch: pa.RecordBatch) -> Iterator[Update]:
        for row in _as_json(target, batch).to_pylist():
            try:
                yield _update(target, row, version)
            except Impossible as error:
                refused[error.reason] += 1

    name = f"integrate:{source}@{snapshot.id}:{into}:{version}:{','.join(chosen)}"
    return _write(store, name, stored, (target.key, *chosen), updates, refused)


def _require(stored: _Rows, target: Table, columns: Sequence[str]) -> None:
    undeclared = [name for name in columns if target.column(name) is None]
    missing = [name for name in (target.key, *columns) if name not in stored.names]
    if undeclared or missing or not columns:
        wrong = f"{target.name} declares no {', '.join(undeclared)}" if undeclared else ""
        lacking = f"it has no column {', '.join(missing)}" if missing else ""
        raise RestoreError(
            "; ".join(filter(None, (wrong, lacking))) or f"it has no column that {target.name} declares",
            where=stored.name,
            remedy=f"it needs {target.key}, and some of {', '.join(c.name for c in target.columns)}",
        )


def _as_json(target: Table, batch: pa.RecordBatch) -> pa.Table:
    """Times as milliseconds, as records say them; all else as it is, for `checked` to judge."""
    made = pa.Table.from_batches([batch])
    for at, field in enumerate(made.schema):
        column = target.column(field.name)
        if column is not None and column.type == TIME and pa.types.is_timestamp(field.type):
            ms = made.column(at).cast(pa.timestamp("ms", field.type.tz), safe=False)
            made = made.set_column(at, field.name, ms.cast(ARROW[TIME]))
    return made


def _update(target: Table, row: Mapping[str, Any], version: int) -> Update:
    """Raises Impossible."""
    key = row[target.key]
    if type(key) is not str or not key:
        raise Impossible("a key is a text that is not empty", "empty_id")
    values = {
        column.name: checked(column, row[column.name]) for column in target.columns if column.name in row
    }
    return Update(target.name, key, version, values)


# ------------------------------------------------------------------------------------------------ in parts


class _Rows:
    """The rows of a snapshot, always in the same order: file after file by their paths."""

    def __init__(self, settings: Settings, name: str, snapshot_id: int) -> None:
        table = lake.open_table(settings, name)
        assert table is not None
        self.name, self.snapshot_id = name, snapshot_id
        self._table: Iceberg = table
        self.names = {field.name for field in table.scan(snapshot_id=snapshot_id).projection().fields}

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Of these columns, in this order."""
        scan = self._table.scan(selected_fields=tuple(columns), snapshot_id=self.snapshot_id)
        reader = ArrowScan(self._table.metadata, self._table.io, scan.projection(), AlwaysTrue())
        for task in sorted(scan.plan_files(), key=lambda task: task.file.file_path):
            for batch in reader.to_record_batches([task]):
                yield batch.select(list(columns))


def _write(
    store: Repository,
    source: str,
    stored: _Rows,
    columns: Sequence[str],
    updates: Any,
    refused: Counter[str],
) -> Written:
    """Part after part, each with how many rows were written in its commit."""
    with store.reading() as connection:
        skipped = int(repository.progress(connection).get(source, 0))
    rows = 0
    for part in _parts(stored.batches(columns)):
        rows += part.num_rows
        if rows <= skipped:
            continue
        said = list(updates(part))
        with store.writing() as connection:
            repository.write(connection, said)
            repository.set_progress(connection, source, str(rows))
        time.sleep(_TURN_S)
    return Written(stored.name, rows, skipped, dict(refused))


def _parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """No part has more than `PART_ROWS`; where each ends depends on the rows alone."""
    for batch in batches:
        for start in range(0, batch.num_rows, PART_ROWS):
            yield batch.slice(start, PART_ROWS)
