"""The lake on real Spark and pyiceberg: making tables, what commits say of themselves, reading at a snapshot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from pyspark.sql import DataFrame, SparkSession

from pipelines import lake
from pipelines.indexing.position import EMPTY, Position
from pipelines.lake import Column, LakeError, TableSpec
from pipelines.settings import Settings

THINGS = TableSpec(
    name="features.things",
    doc="a thing's size",
    columns=(Column("id", "string", "which thing"), Column("size", "bigint", "it's how large", "bytes")),
    owner="tests",
    sorted_by=("id",),
)


def things(spark: SparkSession, *sizes: int) -> DataFrame:
    return spark.createDataFrame([(size, f"t{size}") for size in sizes], "size bigint, id string")


def test_every_declared_table_can_be_made(own_spark: SparkSession, settings: Settings) -> None:
    for spec in lake.TABLES.values():
        assert all(column.doc for column in spec.columns)
        lake.ensure(own_spark, spec)
        lake.ensure(own_spark, spec)
        table = lake.open_table(settings, spec.name)
        assert table is not None
        assert table.metadata.format_version == 2
        assert table.properties["write.parquet.compression-codec"] == "zstd"
        assert table.properties["write.target-file-size-bytes"] == str(spec.target_file_bytes)
        assert [field.name for field in table.schema().fields] == [column.name for column in spec.columns]
        assert all(field.doc for field in table.schema().fields)
        assert len(table.spec().fields) == len(spec.partitioned_by)
        assert len(table.sort_order().fields) == len(spec.sorted_by)
        assert lake.current_snapshot(settings, spec.name) is None


def test_a_table_is_made_once_however_many_try(own_spark: SparkSession, settings: Settings) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: lake.ensure(own_spark, THINGS), range(4)))
    lake.append(things(own_spark, 1), THINGS)
    assert lake.read(own_spark, THINGS.name).count() == 1


def test_a_table_with_other_columns_is_refused(own_spark: SparkSession) -> None:
    lake.ensure(own_spark, THINGS)
    with pytest.raises(LakeError, match="id, size"):
        lake.ensure(own_spark, THINGS._replace(columns=THINGS.columns[:1]))


def test_commits_say_what_they_bring(own_spark: SparkSession, settings: Settings) -> None:
    lake.ensure(own_spark, THINGS)
    first = Position({"T": {0: 5}})
    said = lake.bringing(settings, THINGS.name, first, 1000)
    lake.append(
        things(own_spark, 1, 2), THINGS, {**said, lake.STREAM: "s", lake.INCARNATION: "2", lake.EPOCH: "7"}
    )
    held = lake.current_snapshot(settings, THINGS.name)
    assert held is not None
    assert held.rows == 2
    assert held.bytes > 0
    assert held.summary["added-records"] == "2"
    assert held.summary[lake.POSITION] == first.to_text()
    assert lake.position(settings, THINGS.name) == first

    second = Position({"T": {1: 3}}, frozenset({"l"}))
    lake.append(things(own_spark, 3), THINGS, lake.bringing(settings, THINGS.name, second, 500))
    newest = lake.current_snapshot(settings, THINGS.name)
    assert newest is not None
    assert newest.rows == 3
    assert newest.parent_id == held.id
    assert newest.summary[lake.MAX_BROKER_TIME_MS] == "1000"
    assert newest.summary[lake.POSITION] == first.merge(second).to_text()
    assert lake.position(settings, THINGS.name, held.id) == first
    assert lake.committed_epoch(settings, THINGS.name, "s") == (2, 7)
    assert lake.committed_epoch(settings, THINGS.name, "s", 2) == (2, 7)
    assert lake.committed_epoch(settings, THINGS.name, "s", 1) is None
    assert lake.committed_epoch(settings, THINGS.name, "other") is None
    assert lake.read(own_spark, THINGS.name, held.id).count() == 2
    assert lake.read(own_spark, THINGS.name).count() == 3


def test_the_position_is_that_of_all_commits_even_of_those_that_met(
    own_spark: SparkSession, settings: Settings
) -> None:
    lake.ensure(own_spark, THINGS)
    ours, theirs = Position({"T": {0: 5}}), Position(loads=frozenset({"l"}))
    both = [lake.bringing(settings, THINGS.name, one, 0) for one in (ours, theirs)]
    for said in both:  # each was said before the other was there
        lake.append(things(own_spark, 1), THINGS, said)
    assert lake.position(settings, THINGS.name) == ours.merge(theirs)
    assert lake.positions(settings, [THINGS.name, "raw.nothing"]) == ours.merge(theirs)


def test_an_overwrite_replaces_everything_at_once(own_spark: SparkSession, settings: Settings) -> None:
    lake.ensure(own_spark, THINGS)
    lake.append(things(own_spark, 1, 2), THINGS)
    before = lake.current_snapshot(settings, THINGS.name)
    assert before is not None
    lake.overwrite(things(own_spark, 3), THINGS, {"a": "b"})
    after = lake.current_snapshot(settings, THINGS.name)
    assert after is not None
    assert after.summary["a"] == "b"
    assert [row["size"] for row in lake.read(own_spark, THINGS.name).collect()] == [3]
    lake.overwrite(things(own_spark, 4).limit(0), THINGS)
    assert lake.read(own_spark, THINGS.name).isEmpty()
    assert lake.read(own_spark, THINGS.name, before.id).count() == 2


def test_a_commit_without_rows_is_a_snapshot(own_spark: SparkSession, settings: Settings) -> None:
    lake.ensure(own_spark, THINGS)
    brought = Position(loads=frozenset({"nothing"}))
    lake.append(things(own_spark, 1).limit(0), THINGS, lake.bringing(settings, THINGS.name, brought, 0))
    held = lake.current_snapshot(settings, THINGS.name)
    assert held is not None
    assert held.rows == 0
    assert lake.position(settings, THINGS.name) == brought


def test_a_tagged_snapshot_outlives_expiry(own_spark: SparkSession, settings: Settings) -> None:
    lake.ensure(own_spark, THINGS)
    for size in (1, 2, 3):
        lake.append(things(own_spark, size), THINGS)
    first = list(lake.ancestors(settings, THINGS.name))[-1]
    lake.tag(own_spark, THINGS.name, first.id, "base-1")
    lake.tag(own_spark, THINGS.name, first.id, "base-1")
    expire = f"table => '{THINGS.name}', older_than => TIMESTAMP '2100-01-01', retain_last => 1"
    own_spark.sql(f"CALL lake.system.expire_snapshots({expire})")
    assert lake.read(own_spark, THINGS.name, first.id).count() == 1


def test_what_is_not_there(settings: Settings) -> None:
    assert lake.open_table(settings, "raw.nothing") is None
    assert lake.current_snapshot(settings, "raw.nothing") is None
    assert lake.position(settings, "raw.nothing") == EMPTY


def test_a_table_takes_new_columns_and_its_older_snapshots_keep_theirs(
    own_spark: SparkSession, settings: Settings
) -> None:
    """As `index.<name>` does when a candidate of a new lineage is built."""

    def of(kind: str, *more: Column) -> TableSpec:
        return TableSpec("features.shaped", "a thing", (Column("said", kind, "what"), *more), "tests")

    def write(spec: TableSpec, values: str) -> int:
        lake.reshape(own_spark, spec)
        lake.overwrite(own_spark.sql(f"SELECT {values}"), spec)
        snapshot = lake.current_snapshot(settings, spec.name)
        assert snapshot is not None
        return snapshot.id

    old, extra = of("struct<a:int,b:string>"), Column("extra", "bigint", "one more")
    first = write(old, "named_struct('a', 1, 'b', 'x') AS said")
    lake.tag(own_spark, old.name, first, "kept")
    assert write(old, "named_struct('a', 2, 'b', 'y') AS said") != first
    write(of("struct<a:string,c:boolean>", extra), "named_struct('a', '3', 'c', true) AS said, 4L AS extra")
    assert [tuple(row) for row in lake.read(own_spark, old.name).collect()] == [(("3", True), 4)]
    assert [tuple(row) for row in lake.read(own_spark, old.name, first).collect()] == [((1, "x"),)]
    tagged = own_spark.sql("SELECT said.b FROM lake.features.shaped VERSION AS OF 'kept'").collect()
    assert [row["b"] for row in tagged] == ["x"]
    write(old, "named_struct('a', 5, 'b', 'z') AS said")
    assert lake.read(own_spark, old.name).columns == ["said"]
