"""Epochs, copied from the deltas into the lake: their markers to `ops.epochs`, their facts to `index.<name>_delta`.

A delta is cleaned up, the record of its epochs is kept; and SQL engines read the lake, where the facts stand beside the
base that they correct (`pipelines.index_views`).

Here: which epochs are new, and their rows. Not here: when it runs (`jobs.streams`), and what of the facts goes again
(`pipelines.maintenance`: the days that went from the delta).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from pyiceberg.table import Table

from pipelines import index_rows, index_views, lake, served, views
from pipelines.indexing import delta
from pipelines.indexing.delta import Marker
from pipelines.indexing.spec import IndexSpec
from pipelines.indices import INDICES

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from pipelines.settings import Settings

log = logging.getLogger(__name__)

FACTS_A_COMMIT = 250_000

Source = tuple[str, str, int]  # lineage, stream, incarnation


class Found(NamedTuple):
    """An epoch in a data file of a delta: its marker, how many facts it has, when it was committed."""

    lineage: str
    marker: Marker
    facts: int
    committed_at: datetime
    file: Path

    @property
    def source(self) -> Source:
        """Whose epoch it is; each has its epochs in order."""
        return self.lineage, self.marker.stream, self.marker.incarnation


class NewEpochs:
    """The epochs of an index that were not copied yet, of every lineage that has a delta, whatever code feeds it.

    Each is given once: an incarnation commits its epochs in order, so the greatest copied one says what is new.
    """

    def __init__(self, deltas: Path, copied: dict[Source, int]) -> None:
        self._deltas, self._copied = deltas, copied
        self._seen: set[str] = set()
        self._looked: set[str] = set()

    def find(self) -> list[Found]:
        """Those that are new, each source's in order. A file is looked into once, if `done` says so of its epochs."""
        found: list[Found] = []
        self._looked = set()
        for path in sorted(self._deltas.glob("*/_delta_log")):
            found += self._of_lineage(path.parent)
        new, newest = [], dict(self._copied)
        for epoch in sorted(found, key=lambda one: (one.marker.incarnation, one.marker.epoch)):
            if epoch.marker.epoch > newest.get(epoch.source, -1):
                newest[epoch.source] = epoch.marker.epoch
                new.append(epoch)
        return new

    def done(self, copied: list[Found]) -> None:
        """These, the first of what was found, are copied."""
        for epoch in copied:
            self._copied[epoch.source] = epoch.marker.epoch

    def all_done(self) -> None:
        """All that was found is copied: its files need not be looked into again."""
        self._seen |= self._looked

    def _of_lineage(self, path: Path) -> Iterator[Found]:
        try:
            added = pa.table(DeltaTable(str(path)).get_add_actions(flatten=True))
        except TableNotFoundError:
            return
        for file in added.select(["path", "modification_time"]).to_pylist():
            name = f"{path.name}/{file['path']}"
            if name not in self._seen:
                self._looked.add(name)
                yield from _epochs(path, path / file["path"], file["modification_time"])


def _epochs(path: Path, file: Path, modified: Any) -> list[Found]:
    named = ["stream", "incarnation", "epoch"]
    rows = pq.ParquetFile(file).read(columns=[*named, "marker"])
    counts = {
        tuple(counted[name] for name in named): counted["count_all"] - 1  # the marker is a row too
        for counted in rows.group_by(named).aggregate([([], "count_all")]).to_pylist()
    }
    at = modified if isinstance(modified, datetime) else datetime.fromtimestamp(modified / 1000, UTC)
    markers = [delta.read_marker(text) for text in rows.column("marker").drop_null().to_pylist()]
    return [
        Found(path.name, m, counts[m.stream, m.incarnation, m.epoch], at.astimezone(UTC), file)
        for m in markers
    ]


# ------------------------------------------------------------------------------------------------ markers


class MarkerCopy:
    """Copies the marker of each epoch once."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self._spark, self._settings = spark, settings
        self._new: dict[str, NewEpochs] = {}

    def run(self) -> int:
        """Copies what is new; gives how many epochs that were."""
        if not self._new:
            lake.ensure(self._spark, lake.OPS_EPOCHS)
            copied = self._already_copied()
            self._new = {
                index: NewEpochs(self._settings.paths.delta / index, copied.get(index, {}))
                for index in INDICES
            }
        found = {index: new.find() for index, new in self._new.items()}
        rows = [row(index, epoch) for index, epochs in found.items() for epoch in epochs]
        if rows:
            schema = self._spark.table(lake.OPS_EPOCHS.identifier).schema
            lake.append(self._spark.createDataFrame(rows, schema), lake.OPS_EPOCHS)
        for index, new in self._new.items():
            new.done(found[index])
            new.all_done()
        return len(rows)

    def _already_copied(self) -> dict[str, dict[Source, int]]:
        table = lake.read(self._spark, lake.OPS_EPOCHS.name)
        copied: dict[str, dict[Source, int]] = {}
        for *source, newest in _newest(table, "index", "lineage", "stream", "incarnation"):
            copied.setdefault(source[0], {})[source[1], source[2], source[3]] = newest
        return copied


def _newest(table: DataFrame, *source: str) -> list[tuple[Any, ...]]:
    """The greatest epoch of each source, behind its names."""
    from pyspark.sql import functions as F

    return [tuple(row) for row in table.groupBy(*source).agg(F.max("epoch")).collect()]


def row(index: str, found: Found) -> dict[str, Any]:
    """An epoch as a row of `ops.epochs`."""
    marker = found.marker
    stages = {
        "started_at_ms": marker.started_at_ms,
        "decoded_at_ms": marker.decoded_at_ms,
        "transformed_at_ms": marker.transformed_at_ms,
        "broker_time_min_ms": marker.broker_time_min_ms,
        "broker_time_max_ms": marker.broker_time_max_ms,
        "refused": marker.refused,
    }
    return {
        "index": index,
        "stream": marker.stream,
        "lineage": found.lineage,
        "incarnation": marker.incarnation,
        "epoch": marker.epoch,
        "position": marker.end.to_text(),
        "rows": marker.records,
        "facts": found.facts,
        "min_event_time_ms": marker.event_time_min_ms,
        "max_event_time_ms": marker.event_time_max_ms,
        "stages": json.dumps(stages),
        "committed_at": found.committed_at,
    }


# ------------------------------------------------------------------------------------------------ facts


class FactCopy:
    """Copies the facts of each epoch once, beside the base that they correct, and keeps the views of what is served.

    A commit holds whole epochs, each source's in order, so that the greatest copied epoch says what is new.
    Arrow writes them in this process, with no job of Spark's: its streams do not wait.
    """

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self._spark, self._settings = spark, settings
        self._new: dict[str, NewEpochs] = {}

    def run(self) -> int:
        """Copies what is new, and says what is served; gives how many facts were copied.

        Where that fails for an index, the log says so, it is done for the others, and the first failure is raised.
        """
        count, failed = 0, []
        for spec in INDICES.values():
            try:
                count += self._run(spec)
            except Exception as error:
                log.warning("facts of %s were not copied", spec.name, exc_info=error)
                failed.append(error)
        if failed:
            raise failed[0]
        return count

    def _run(self, spec: IndexSpec) -> int:
        is_first = spec.name not in self._new
        if is_first:
            self._new[spec.name] = self._begin(spec)
        try:
            copied = self._copy(spec, self._new[spec.name])
        except BaseException:
            del self._new[spec.name]  # whether a commit was made, the table says
            raise
        if served.record(self._settings, spec) or is_first:
            done = views.ensure(self._spark, self._settings, [index_views.view(spec)])
            log.info("what is served of %s: %s", spec.name, done)
        return copied

    def _begin(self, spec: IndexSpec) -> NewEpochs:
        lake.ensure(self._spark, lake.OPS_SERVED)
        table = index_rows.delta_table(spec)
        if lake.reshape(self._spark, table):  # of another lineage: what the deltas hold is copied anew
            lake.delete(self._spark, table, "true")
        newest = _newest(lake.read(self._spark, table.name), "lineage", "stream", "incarnation")
        copied = {(mark, stream, incarnation): epoch for mark, stream, incarnation, epoch in newest}
        return NewEpochs(self._settings.paths.delta / spec.name, copied)

    def _copy(self, spec: IndexSpec, new: NewEpochs) -> int:
        count = 0
        for epochs in _commits(new.find()):
            if rows := _rows(spec, epochs):
                table: Table | None = lake.open_table(self._settings, index_rows.delta_table(spec).name)
                assert table is not None
                whole = pa.concat_tables(rows).cast(table.schema().as_arrow())
                table.append(whole)
                count += whole.num_rows
            new.done(epochs)
        new.all_done()
        return count


def _commits(epochs: list[Found]) -> Iterator[list[Found]]:
    """Epochs in their order, by what one commit takes."""
    part: list[Found] = []
    size = 0
    for epoch in epochs:
        if part and size + epoch.facts > FACTS_A_COMMIT:
            yield part
            part, size = [], 0
        part.append(epoch)
        size += epoch.facts
    if part:
        yield part


def _rows(spec: IndexSpec, epochs: list[Found]) -> list[pa.Table]:
    """The facts of epochs as rows of `index.<name>_delta`; of each that has any."""
    wanted = {(found.source, found.marker.epoch): found for found in epochs if found.facts}
    rows = []
    for file in dict.fromkeys(found.file for found in wanted.values()):
        mark, day = file.parent.parent.name, file.parent.name.partition("=")[2]
        for marker, facts, _ in delta.epochs_in(spec, file):
            found = wanted.get(((mark, marker.stream, marker.incarnation), marker.epoch))
            if found is not None and found.file == file and facts.num_rows:
                said = (mark, day, marker.stream, marker.incarnation, marker.epoch, found.committed_at)
                columns = [pa.repeat(value, facts.num_rows) for value in said]
                rows.append(pa.table([*columns, *facts.columns], names=_names(spec)))
    return rows


def _names(spec: IndexSpec) -> list[str]:
    return [column.name for column in index_rows.delta_table(spec).columns]
