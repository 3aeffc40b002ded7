"""Minutes of serving, copied into `ops.freshness`: how fresh each replica's documents were.

A replica writes a file for each minute (`pipelines.indexing.freshness`) and needs neither Spark nor the catalog for it.
Here: their rows, each once. Not here: when it runs (`jobs.streams`), and what is told of them (`pipelines.freshness`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import freshness, lake

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import StructType

    from pipelines.settings import Settings


class MinuteCopy:
    """Copies the rows of finished minutes, and removes their files."""

    def __init__(self, spark: SparkSession, settings: Settings) -> None:
        self._spark, self._settings = spark, settings
        self._schema: StructType | None = None

    def run(self) -> int:
        """Copies what is there; gives how many rows that were.

        Rows that are there already were copied before their files could be removed.
        """
        if self._schema is None:
            lake.ensure(self._spark, lake.OPS_FRESHNESS)
            self._schema = self._spark.table(lake.OPS_FRESHNESS.identifier).schema
        files = freshness.files(self._settings)
        rows = [row for file in files for row in freshness.rows_of(file)]
        if rows:
            since = min(row["minute"] for row in rows)
            held = {tuple(row.items()) for row in freshness.copied(self._settings, since)}
            rows = [row for row in rows if tuple(row.items()) not in held]
        if rows:
            lake.append(self._spark.createDataFrame(rows, self._schema).coalesce(1), lake.OPS_FRESHNESS)
        for file in files:
            file.unlink()
        return len(rows)
