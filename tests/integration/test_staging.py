"""Write, audit, publish on real Spark and pyiceberg: what readers see of rows on a branch, and when."""

from __future__ import annotations

import pytest
from pyspark.sql import DataFrame, SparkSession

from pipelines import lake, staging
from pipelines.lake import Column, Conflict, Snapshot, TableSpec
from pipelines.settings import Settings

THINGS = TableSpec(
    name="features.things",
    doc="a thing's size",
    columns=(Column("id", "string", "which thing"), Column("size", "bigint", "how large", "bytes")),
    owner="tests",
    partitioned_by=("truncate(1, id)",),
)
REARRANGED = (
    "CALL lake.system.rewrite_data_files(table => 'features.things', options => map('rewrite-all', 'true'))"
)


@pytest.fixture
def things(own_spark: SparkSession) -> SparkSession:
    lake.ensure(own_spark, THINGS)
    return own_spark


def rows(spark: SparkSession, **sizes: int) -> DataFrame:
    return spark.createDataFrame(list(sizes.items()), "id string, size bigint")


def seen(spark: SparkSession, settings: Settings, snapshot_id: int | None = None) -> dict[str, int]:
    """What readers see, by Spark and by pyiceberg."""
    found = {row["id"]: row["size"] for row in lake.read(spark, THINGS.name, snapshot_id).collect()}
    table = lake.open_table(settings, THINGS.name)
    assert table is not None
    scanned = table.scan(snapshot_id=snapshot_id).to_arrow().to_pylist()
    assert found == {row["id"]: row["size"] for row in scanned}
    return found


def main(settings: Settings) -> Snapshot:
    found = lake.current_snapshot(settings, THINGS.name)
    assert found is not None
    return found


def test_staged_rows_are_seen_once_they_are_published(things: SparkSession, settings: Settings) -> None:
    first = staging.overwrite(settings, rows(things, a=1), THINGS, {"said": "first"})
    assert (first.rows, first.summary["said"]) == (1, "first")
    assert lake.current_snapshot(settings, THINGS.name) is None
    assert seen(things, settings) == {}
    staging.publish(settings, THINGS.name, first.id)
    assert main(settings).id == first.id
    assert seen(things, settings) == {"a": 1}
    assert staging.snapshot(settings, THINGS.name) is None

    second = staging.overwrite(settings, rows(things, a=2, b=3), THINGS)
    assert seen(things, settings) == {"a": 1}
    assert seen(things, settings, second.id) == {"a": 2, "b": 3}
    assert staging.snapshot(settings, THINGS.name) == second
    staging.publish(settings, THINGS.name, second.id)
    staging.publish(settings, THINGS.name, second.id)
    assert [found.id for found in lake.ancestors(settings, THINGS.name)][:2] == [second.id, first.id]
    assert seen(things, settings) == {"a": 2, "b": 3}


def test_what_was_refused_stays_until_something_else_is_staged(
    things: SparkSession, settings: Settings
) -> None:
    refused = staging.overwrite(settings, rows(things, a=-1), THINGS)
    branch = things.sql("SELECT id, size FROM lake.features.things VERSION AS OF 'staged'")
    assert [tuple(row) for row in branch.collect()] == [("a", -1)]
    good = staging.overwrite(settings, rows(things, a=1), THINGS)
    staging.publish(settings, THINGS.name, good.id)
    assert seen(things, settings) == {"a": 1}
    with pytest.raises(Conflict, match=f"after the snapshot {refused.id} was staged"):
        staging.publish(settings, THINGS.name, refused.id)
    assert main(settings).id == good.id


def test_some_rows_are_staged_and_the_others_stay(things: SparkSession, settings: Settings) -> None:
    lake.append(rows(things, a=1, b=1), THINGS)
    before = main(settings)
    staged = staging.overwrite_where(
        settings, rows(things, b=2), THINGS, "id >= 'b' AND id < 'c'", {}, since=before.id
    )
    assert seen(things, settings) == {"a": 1, "b": 1}
    staging.publish(settings, THINGS.name, staged.id)
    assert seen(things, settings) == {"a": 1, "b": 2}
    with pytest.raises(Conflict):
        staging.overwrite_where(
            settings, rows(things, b=3), THINGS, "id >= 'b' AND id < 'c'", {}, since=before.id
        )


def test_compaction_in_between_is_no_obstacle_and_a_commit_of_rows_is(
    things: SparkSession, settings: Settings
) -> None:
    for size in range(3):
        lake.append(rows(things, **{f"a{size}": size}), THINGS)
    for is_first in (True, False):
        before = main(settings)
        staged = staging.overwrite(settings, rows(things, b=2, c=int(is_first)), THINGS)
        things.sql(REARRANGED)
        assert main(settings).id != before.id
        staging.publish(settings, THINGS.name, staged.id)
        assert seen(things, settings) == {"b": 2, "c": int(is_first)}

    staged = staging.overwrite(settings, rows(things, d=4), THINGS)
    lake.append(rows(things, e=5), THINGS)
    with pytest.raises(Conflict, match="rows were changed"):
        staging.publish(settings, THINGS.name, staged.id)
    assert seen(things, settings) == {"b": 2, "c": 0, "e": 5}
    assert staging.snapshot(settings, THINGS.name) == staged


def test_a_table_that_was_set_back_meanwhile_is_not_overruled(
    things: SparkSession, settings: Settings
) -> None:
    lake.append(rows(things, a=1), THINGS)
    back_to = main(settings).id
    lake.append(rows(things, b=1), THINGS)
    staged = staging.overwrite(settings, rows(things, c=1), THINGS)
    things.sql(f"CALL lake.system.set_current_snapshot('features.things', {back_to})")
    with pytest.raises(Conflict, match="rows were changed"):
        staging.publish(settings, THINGS.name, staged.id)
    assert seen(things, settings) == {"a": 1}


def test_what_never_was_staged_is_told(things: SparkSession, settings: Settings) -> None:
    with pytest.raises(Conflict, match="snapshot 17 is gone"):
        staging.publish(settings, THINGS.name, 17)
