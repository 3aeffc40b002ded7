"""What was loaded, file by file: the table `ops.loads`.

Belongs here: its rows, which of them count, writing those of a load. Does not belong here: loading (`load`).

A load writes its rows before it commits to the raw table, as it does with its dead letters: they count from the moment
when the raw table's position has the load, and not if it never does (the load died) or no longer does (the table was
rolled back).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import lake
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class LoadedFile(NamedTuple):
    """A file of a load: a row of `ops.loads`, whose columns say what the fields are."""

    load_id: str
    table: str
    number: int
    file: str | None
    digest: str | None
    reading: str | None
    bytes: int | None
    rows: int
    refused: Mapping[str, int]
    warnings: tuple[str, ...]
    loaded_at: datetime

    @property
    def accepted(self) -> int:
        """Rows that keep the contract."""
        return self.rows - sum(self.refused.values())


class Load(NamedTuple):
    """A load as a whole.

    Attributes:
        load_id: As positions have it.
        table: The raw table.
        files: How many files it was of; none if it was not of files.
        rows: All of them are in the raw table.
        refused: How many of them the contract refuses, by reason.
        warnings: What is odd about the accepted ones.
        loaded_at: When.
    """

    load_id: str
    table: str
    files: int
    rows: int
    refused: Mapping[str, int]
    warnings: tuple[str, ...]
    loaded_at: datetime

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        refused = sum(self.refused.values())
        return {
            "load_id": self.load_id,
            "table": self.table,
            "files": self.files,
            "rows": self.rows,
            "accepted": self.rows - refused,
            "refused": refused,
            "refused_by_reason": dict(self.refused),
            "warnings": list(self.warnings),
            "loaded_at": self.loaded_at.isoformat().replace("+00:00", "Z"),
        }


def counting(settings: Settings, table: str | None = None) -> list[LoadedFile]:
    """The rows that count (of one raw table): those of loads that the raw tables have. Needs no Spark."""
    wanted = [table] if table else [name for name in lake.TABLES if name.startswith("raw.")]
    held = {name: lake.position(settings, name).loads for name in wanted}
    found = lake.open_table(
        settings, lake.OPS_LOADS.name
    )  # after the raw tables: their loads are there by then
    rows = found.scan().to_arrow().to_pylist() if found is not None else []
    return [_file(row) for row in rows if row["load_id"] in held.get(row["table"], ())]


def listed(settings: Settings) -> list[Load]:
    """The loads that the raw tables have, the newest first."""

    def load_of(file: LoadedFile) -> tuple[str, str]:
        return file.table, file.load_id

    files = sorted(counting(settings), key=load_of)
    loads = [_whole(list(group)) for _, group in groupby(files, load_of)]
    return sorted(loads, key=lambda load: load.loaded_at, reverse=True)


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts by reason, added up, in the order of their names."""
    found: dict[str, int] = {}
    for count in counts:
        for reason, number in count.items():
            found[reason] = found.get(reason, 0) + number
    return dict(sorted(found.items()))


def record(spark: SparkSession, files: Sequence[LoadedFile]) -> None:
    """Write the rows of one load, in place of those of an attempt that came to nothing."""
    from pyspark.sql import functions as F

    spec, load_id = lake.OPS_LOADS, files[0].load_id
    if not lake.read(spark, spec.name).filter(F.col("load_id") == load_id).isEmpty():
        lake.delete(spark, spec, f"load_id = {lake.quoted(load_id)}")
    rows = [
        {
            **file._asdict(),
            "accepted": file.accepted,
            "refused": sum(file.refused.values()),
            "refused_by_reason": json.dumps(dict(file.refused)),
            "warnings": list(file.warnings),
        }
        for file in files
    ]
    schema = spark.table(spec.identifier).schema
    lake.append(spark.createDataFrame(rows, schema).coalesce(1), spec, {lake.LOAD_ID: load_id})


def _file(row: Mapping[str, Any]) -> LoadedFile:
    read = {
        name: row[name] for name in LoadedFile._fields if name not in ("refused", "warnings", "loaded_at")
    }
    return LoadedFile(
        **read,
        refused=json.loads(row["refused_by_reason"]),
        warnings=tuple(row["warnings"]),
        loaded_at=row["loaded_at"].astimezone(UTC),
    )


def _whole(files: Sequence[LoadedFile]) -> Load:
    first = files[0]
    return Load(
        first.load_id,
        first.table,
        sum(file.file is not None for file in files),
        sum(file.rows for file in files),
        total(file.refused for file in files),
        tuple(dict.fromkeys(warning for file in files for warning in file.warnings)),
        max(file.loaded_at for file in files),
    )
