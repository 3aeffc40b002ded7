"""Epoch markers, copied from the deltas to `ops.epochs`: a delta is cleaned up, the record of its epochs is kept.

Here: which markers are new, and their rows. Not here: when it runs (`jobs.streams`).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from pipelines import lake
from pipelines.indexing import delta
from pipelines.indexing.delta import Marker
from pipelines.indices import INDICES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.settings import Settings

Source = tuple[str, str, str, int]  # index, lineage, stream, incarnation


class MarkerCopy:
    """Copies each epoch once: an incarnation commits its epochs in order, so the greatest copied one says what is new.

    Of every lineage that has a delta, whatever code feeds it.
    """

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self._spark, self._settings = spark, settings
        self._seen: set[str] = set()
        self._copied: dict[Source, int] | None = None

    def run(self) -> int:
        """Copies what is new; gives how many epochs that were."""
        if self._copied is None:
            lake.ensure(self._spark, lake.OPS_EPOCHS)
            self._copied = self._already_copied()
        copied = dict(self._copied)
        rows: list[dict[str, Any]] = []
        files: set[str] = set()
        for index in INDICES:
            for path in sorted((self._settings.paths.delta / index).glob("*/_delta_log")):
                found, read = self._new(index, path.parent, copied)
                rows += found
                files |= read
        if rows:
            schema = self._spark.table(lake.OPS_EPOCHS.identifier).schema
            lake.append(self._spark.createDataFrame(rows, schema), lake.OPS_EPOCHS)
        self._copied = copied
        self._seen |= files
        return len(rows)

    def _already_copied(self) -> dict[Source, int]:
        from pyspark.sql import functions as F

        columns = ("index", "lineage", "stream", "incarnation")
        table = lake.read(self._spark, lake.OPS_EPOCHS.name)
        return {
            tuple(row[name] for name in columns): row["newest"]
            for row in table.groupBy(*columns).agg(F.max("epoch").alias("newest")).collect()
        }

    def _new(
        self, index: str, path: Path, copied: dict[Source, int]
    ) -> tuple[list[dict[str, Any]], set[str]]:
        mark = path.name
        try:
            added = pa.table(DeltaTable(str(path)).get_add_actions(flatten=True))
        except TableNotFoundError:
            return [], set()
        files = added.select(["path", "modification_time"]).to_pylist()
        unread = [file for file in files if f"{index}/{file['path']}" not in self._seen]
        found = [item for file in unread for item in _markers(path / file["path"], file["modification_time"])]
        rows = []
        for marker, facts, committed_at in sorted(
            found, key=lambda item: (item[0].incarnation, item[0].epoch)
        ):
            source = (index, mark, marker.stream, marker.incarnation)
            if marker.epoch > copied.get(source, -1):
                copied[source] = marker.epoch
                rows.append(row(index, mark, marker, facts, committed_at))
        return rows, {f"{index}/{file['path']}" for file in unread}


def _markers(file: Path, modified: Any) -> list[tuple[Marker, int, datetime]]:
    """The markers of a data file, with the number of their facts, and when it was written."""
    named = ["stream", "incarnation", "epoch"]
    rows = pq.ParquetFile(file).read(columns=[*named, "marker"])
    counts = {
        tuple(counted[name] for name in named): counted["count_all"] - 1  # the marker is a row too
        for counted in rows.group_by(named).aggregate([([], "count_all")]).to_pylist()
    }
    at = modified if isinstance(modified, datetime) else datetime.fromtimestamp(modified / 1000, UTC)
    markers = [delta.read_marker(text) for text in rows.column("marker").drop_null().to_pylist()]
    return [(m, counts[m.stream, m.incarnation, m.epoch], at.astimezone(UTC)) for m in markers]


def row(index: str, mark: str, marker: Marker, facts: int, committed_at: datetime) -> dict[str, Any]:
    """An epoch as a row of `ops.epochs`."""
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
        "lineage": mark,
        "incarnation": marker.incarnation,
        "epoch": marker.epoch,
        "position": marker.end.to_text(),
        "rows": marker.records,
        "facts": facts,
        "min_event_time_ms": marker.event_time_min_ms,
        "max_event_time_ms": marker.event_time_max_ms,
        "stages": json.dumps(stages),
        "committed_at": committed_at,
    }
