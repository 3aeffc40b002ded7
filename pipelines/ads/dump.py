"""The ads repository as tables: every row of `repo.*` as it was at one point, with its registers.

Belongs here: reading the repository at a point, the typed columns of a row, the commits, and which dumps there are
(`ops.repo_heads`). Does not belong here: what the tables are (`lake.REPO`), the audit and the publishing of what is
staged (`staging`, `quality`), and the way back into a repository (`restore`).

The driver copies rows as they are stored to files, for as short a time as the repository's point is held; executors
read the registers. So memory is that of a page, however many rows there are.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import failpoints, lake, staging
from pipelines.ads import repository
from pipelines.ads import rows as registers
from pipelines.ads.joined import ARROW
from pipelines.ads.repository import Repository, Stored
from pipelines.ads.schema import CONTENT, CONTROL, PERFORMANCE, TABLES, TIME, Column, Table, valid
from pipelines.contracts.ads_keys import ADS_KEYS
from pipelines.errors import TidemarkError
from pipelines.indexing.position import Position, from_text
from pipelines.ingest import broker
from pipelines.lake import DUMP_ID, OPS_REPO_HEADS, POSITION, REPO, Snapshot
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PAGE_ROWS = 20_000
_AT_ONCE = 500  # rows whose registers fit a processor's cache: twice as quick as a page at once
_TIME = pa.timestamp("us", tz="UTC")
_STORED = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("registers", pa.string()),
        pa.field("deleted_version", pa.int64()),
    ]
)

log = logging.getLogger(__name__)


class DumpError(TidemarkError):
    """A dump cannot be made, or there is none such."""


class Head(NamedTuple):
    """A dump.

    Attributes:
        dump_id: Names it.
        point_at: When the repository was read.
        seq: Number of the newest change that is in it.
        position: What of the streams' topics is surely in it.
        snapshots: Table, as `repo.ads` → its snapshot.
    """

    dump_id: str
    point_at: datetime
    seq: int
    position: Position
    snapshots: Mapping[str, int]


class Dump(NamedTuple):
    """A dump that was just staged: its head, and the snapshot of each table."""

    head: Head
    snapshots: Mapping[str, Snapshot]


def dump(spark: SparkSession, settings: Settings, store: Repository) -> Dump:
    """Stage all tables of a repository, at one point of it; `ops.repo_heads` says so once all are.

    Raises:
        DumpError: Another dump runs.
    """
    with _scratch(settings) as folder:
        position = _position(settings)  # before the point: what was published by then was committed before
        with store.reading() as connection:
            seq, point_at = repository.last_change(connection), datetime.now(UTC)
            for table in TABLES:
                copy(repository.pages(connection, table, PAGE_ROWS), folder / table)
        head = Head(f"{point_at:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}", point_at, seq, position, {})
        return stage(spark, settings, folder, head)


def copy(pages: Iterable[list[Stored]], folder: Path) -> None:
    """Rows of a table as they are stored, to files of the same columns, a page each."""
    folder.mkdir(parents=True)
    for number, page in enumerate(pages):
        stored = pa.table(list(zip(*page, strict=True)), schema=_STORED)
        pq.write_table(stored, folder / f"{number:06}.parquet", compression="lz4", use_dictionary=False)


def stage(spark: SparkSession, settings: Settings, folder: Path, head: Head) -> Dump:
    """Stage what `copy` wrote of every table, and say in `ops.repo_heads` that this dump is there.

    Args:
        spark: A session.
        settings: Where the catalog is.
        folder: Has a folder for each table.
        head: All of it but for the snapshots.
    """
    summary = {POSITION: head.position.to_text(), DUMP_ID: head.dump_id}
    staged = {}
    for table in TABLES.values():
        spec = REPO[f"repo.{table.name}"]
        lake.reshape(spark, spec)
        staged[spec.name] = staging.overwrite(settings, _read(spark, folder, table), spec, summary)
        failpoints.hit("ads.dump.staged")
    whole = head._replace(snapshots={name: snapshot.id for name, snapshot in staged.items()})
    _record(spark, whole, staged)
    return Dump(whole, staged)


def _read(spark: SparkSession, folder: Path, table: Table) -> DataFrame:
    from pyspark.sql.pandas.types import from_arrow_schema

    def made(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for start in range(0, batch.num_rows, _AT_ONCE):
                yield typed(table, batch.slice(start, _AT_ONCE))

    stored = spark.read.schema(from_arrow_schema(_STORED)).parquet(str(folder / table.name))
    return stored.mapInArrow(made, from_arrow_schema(typed_schema(table)))


@contextmanager
def _scratch(settings: Settings) -> Iterator[Path]:
    """A folder for one dump at a time; what a dump that died left there goes, too."""
    folder = settings.paths.run / "ads-dump"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DumpError(
                "another dump runs", where=str(folder), remedy="wait until it has ended"
            ) from None
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _position(settings: Settings) -> Position:
    """The ends of the topics of keys; as far as no broker answers, what the dump before had: it is in this one, too."""
    held = lake.position(settings, "repo.ads")
    if not broker.is_ready(settings):
        log.warning(
            "no broker answers: the dump stands at the position of the one before, %s", held.to_text()
        )
        return held
    return held.merge(broker.ends(settings, (contract.topic for contract in ADS_KEYS)))


# ------------------------------------------------------------------------------------------------ a row's columns


@functools.cache
def typed_schema(table: Table) -> pa.Schema:
    """The columns of `repo.<table>` in Arrow."""
    return pa.schema(
        [
            pa.field(table.key, pa.string()),
            pa.field("is_there", pa.bool_()),
            pa.field("deleted_version", pa.int64()),
            *(pa.field(f"stand_{family}", pa.int64()) for family in (CONTROL, CONTENT, PERFORMANCE)),
            *(pa.field(c.name, _TIME if c.type == TIME else ARROW[c.type]) for c in table.columns),
            pa.field("registers", pa.string()),
        ]
    )


def typed(table: Table, stored: pa.RecordBatch) -> pa.RecordBatch:
    """Stored rows (key, registers, deleted_version) as `typed_schema` says."""
    said, deleted = stored.column("registers"), stored.column("deleted_version")
    rows = list(map(repository.row_of, said.to_pylist(), deleted.to_pylist()))
    visible = [registers.visible(row) for row in rows]
    columns = [
        stored.column("key"),
        pa.array([registers.is_there(row, table) for row in rows], pa.bool_()),
        deleted,
        *(
            pa.array([registers.stand(row, table, family) for row in rows], pa.int64())
            for family in (CONTROL, CONTENT, PERFORMANCE)
        ),
        *(_values(column, [row.get(column.name) for row in visible]) for column in table.columns),
        said,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=typed_schema(table))


def _values(column: Column, said: list[Any]) -> pa.Array:
    found = pa.array(valid(column, said), ARROW[column.type])
    return found.cast(pa.timestamp("ms", tz="UTC")).cast(_TIME) if column.type == TIME else found


# ------------------------------------------------------------------------------------------------ the dumps there are


def head(settings: Settings, dump_id: str | None = None) -> Head | None:
    """The newest dump of which readers see every table, or a given one; None: there is none that they see.

    Raises:
        DumpError: The given one is not there, or a snapshot of it has expired.
    """
    found = heads(settings)
    if dump_id is None:
        seen = {name: {one.id for one in lake.ancestors(settings, name)} for name in REPO}
        whole = (one for one in found if all(at in seen[name] for name, at in one.snapshots.items()))
        return next(whole, None)
    wanted = next((one for one in found if one.dump_id == dump_id), None)
    if wanted is None:
        raise DumpError(
            f"there is no dump {dump_id!r}",
            where=OPS_REPO_HEADS.name,
            remedy=f"choose of {', '.join(one.dump_id for one in found[:10]) or 'none'}",
        )
    for name, at in wanted.snapshots.items():
        table = lake.open_table(settings, name)
        if table is None or table.snapshot_by_id(at) is None:
            raise DumpError(
                f"the snapshot {at} of {dump_id} has expired", where=name, remedy="choose a newer dump"
            )
    return wanted


def heads(settings: Settings) -> list[Head]:
    """Every dump that was staged whole, the newest first."""
    table = lake.open_table(settings, OPS_REPO_HEADS.name)
    if table is None:
        return []
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in table.scan().to_arrow().to_pylist():
        by_id.setdefault(row["dump_id"], []).append(row)
    found = [
        Head(
            dump_id,
            rows[0]["point_at"],
            rows[0]["seq"],
            from_text(rows[0]["position"]),
            {row["table"]: row["snapshot_id"] for row in rows},
        )
        for dump_id, rows in by_id.items()
    ]
    return sorted(found, key=lambda one: one.point_at, reverse=True)


def _record(spark: SparkSession, whole: Head, staged: Mapping[str, Snapshot]) -> None:
    lake.ensure(spark, OPS_REPO_HEADS)
    rows = [
        {
            "dump_id": whole.dump_id,
            "point_at": whole.point_at,
            "seq": whole.seq,
            "position": whole.position.to_text(),
            "table": name,
            "snapshot_id": snapshot.id,
            "rows": snapshot.rows,
        }
        for name, snapshot in staged.items()
    ]
    kinds = spark.table(OPS_REPO_HEADS.identifier).schema
    lake.append(spark.createDataFrame(rows, kinds), OPS_REPO_HEADS)
