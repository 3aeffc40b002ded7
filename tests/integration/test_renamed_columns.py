"""Renaming and dropping columns of a declared table: old snapshots stay readable, by Spark and by pyiceberg."""

from __future__ import annotations

import pytest
from pyspark.sql import SparkSession

from pipelines import lake, undo
from pipelines.lake import Column, LakeError, TableSpec
from pipelines.settings import Settings
from pipelines.spark import session

BEFORE = TableSpec(
    "features.renamed",
    "a table whose columns change",
    (Column("id", "bigint", "which"), Column("old", "string", "renamed"), Column("gone", "int", "dropped")),
    "tests",
    sorted_by=("id",),
)
AFTER = BEFORE._replace(columns=(Column("id", "bigint", "which"), Column("new", "string", "was old")))


def test_old_snapshots_keep_the_columns_that_they_had(settings: Settings, spark: SparkSession) -> None:
    spark = session(settings, "tests")
    lake.ensure(spark, BEFORE)
    lake.append(spark.sql("SELECT id, concat('v', id) AS old, 7 AS gone FROM range(3)"), BEFORE)
    first = lake.current_snapshot(settings, BEFORE.name)
    assert first is not None
    with pytest.raises(LakeError, match="declared are id, new"):
        lake.ensure(spark, AFTER)

    spark.sql(f"ALTER TABLE {BEFORE.identifier} RENAME COLUMN old TO new")
    spark.sql(f"ALTER TABLE {BEFORE.identifier} DROP COLUMN gone")
    lake.ensure(spark, AFTER)
    lake.append(spark.sql("SELECT 9L AS id, 'v9' AS new"), AFTER)
    assert [tuple(r) for r in lake.read(spark, AFTER.name).orderBy("id").collect()] == [
        (0, "v0"),
        (1, "v1"),
        (2, "v2"),
        (9, "v9"),
    ]

    old = lake.read(spark, AFTER.name, first.id).orderBy("id").collect()
    assert [row.asDict() for row in old] == [{"id": n, "old": f"v{n}", "gone": 7} for n in range(3)]
    table = lake.open_table(settings, AFTER.name)
    assert table is not None
    assert table.scan(snapshot_id=first.id).to_arrow().column_names == ["id", "old", "gone"]

    # Set back, it has the rows of then in the columns of now, and can be written on.
    undo.carry_out(settings, undo.plan(settings, [AFTER.name], first.id))
    assert lake.read(spark, AFTER.name).columns == ["id", "new"]
    assert [row["new"] for row in lake.read(spark, AFTER.name).orderBy("id").collect()] == ["v0", "v1", "v2"]
    lake.ensure(spark, AFTER)
    lake.append(spark.sql("SELECT 4L AS id, 'v4' AS new"), AFTER)
    assert lake.read(spark, AFTER.name).count() == 4
