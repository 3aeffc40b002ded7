"""The ads repository to Iceberg and back: what a batch reads of a dump is what a stream looks up in the repository."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from jobs.build import build
from pipelines import failpoints, index_rows, lake, postgres, staging
from pipelines.ads import dump, enrichment, generator, handlers, relations, repository, restore, schema
from pipelines.ads.dump import DumpError
from pipelines.ads.index import ADS
from pipelines.ads.repository import Repository, Update
from pipelines.ads.rows import Row
from pipelines.indexing.base import open_base
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.versions import Versions
from pipelines.indexing.view import view
from pipelines.preflight import PreflightError
from pipelines.settings import ROOT, Settings
from tests.conftest import free_ports

ACCOUNT, SEED = 60, 3
LATER = 1_000_000


@pytest.fixture(params=["sqlite", "postgresql"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    """An empty repository."""
    with contextlib.ExitStack() as stack:
        uri = f"sqlite:{tmp_path / 'other.db'}"
        if request.param == "postgresql":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.chmod(0o755)  # where this process is root, PostgreSQL is another user
            try:
                running = postgres.running(folder / "postgres", free_ports(1)[0], {"fsync": "off"})
                uri = stack.enter_context(running)
            except PreflightError as error:
                pytest.skip(str(error))
        opened = Repository(uri)
        stack.callback(opened.close)
        yield opened


@pytest.fixture
def store(settings: Settings) -> Iterator[Repository]:
    """A repository with an account, its changes, deletions, and values that no contract let in."""
    opened = repository.opened(settings)
    with opened.writing() as connection:
        repository.write(connection, generator.updates(ACCOUNT, SEED))
    for updates in generator.transactions(ACCOUNT, SEED, 200, LATER):
        with opened.writing() as connection:
            repository.write(connection, updates)
    with opened.writing() as connection:
        repository.write(connection, list(oddities(LATER + 10_000)))
    yield opened
    opened.close()


def oddities(version: int) -> Iterator[Update]:
    """Rows that are gone, gone and back, never there, and say what is not declared or cannot be."""
    yield Update("ads", "a1", version, None)
    yield Update("ads", "a2", version, None)
    yield Update("ads", "a2", version + 1, {"status": "paused"})
    yield Update("campaigns", "c0", version, None)
    yield Update("pins", "p1", version, {"not_declared": {"x": [1]}, "price_usd_micros": -5, "title": 7})
    yield Update(
        "ads", "a3", version, {"clicks_7d": True, "created_at": "2024-05-01T00:00:00Z", "name": "a\0b"}
    )
    yield Update("ads", "a4", version, {"ad_group_id": "unknown", "bid_multiplier": 1, "clicks_1d": 10**18})
    yield Update("ad_groups", "g1", version, {"countries": ["US", "DE", "US"], "bid_strategy": "none such"})
    yield Update("ads", "measured", version, {"clicks_7d": 3})
    yield Update("ads", "late", 5, {"pin_id": "p1"})
    yield Update("ads", "late", version, None)


def dumped(spark: SparkSession, settings: Settings, store: Repository) -> dump.Head:
    """A dump that readers see, as if every audit had passed."""
    made = dump.dump(spark, settings, store)
    for name, snapshot in made.snapshots.items():
        staging.publish(settings, name, snapshot.id)
    return made.head


def everything(store: Repository) -> dict[tuple[str, str], Row]:
    with store.reading() as connection:
        return {
            (table, key): row for table in schema.TABLES for key, row in repository.scan(connection, table)
        }


def by_ad(rows: pa.Table) -> dict[str, Any]:
    return {row.pop("ad_id"): row for row in rows.to_pylist()}


def looked_up(store: Repository, family: str) -> pa.Table:
    with store.reading() as connection:
        keys = [key for key, _ in repository.scan(connection, "ads")]
        return enrichment.look_up(connection, family, keys)


def test_the_join_of_a_dump_is_what_the_repository_says(
    own_spark: SparkSession, settings: Settings, store: Repository
) -> None:
    head = dumped(own_spark, settings, store)
    assert dump.head(settings) == head and head.snapshots.keys() == lake.REPO.keys()

    def read(name: str) -> Any:
        return lake.read(own_spark, name, head.snapshots[name])

    for name, family in relations.FAMILIES.items():
        found, wanted = relations.plan(name, read("repo.ads"), read).toArrow(), looked_up(store, family)
        assert by_ad(found.cast(wanted.schema)) == by_ad(wanted)
        assert found.num_rows == wanted.num_rows > ACCOUNT
    sums = by_ad(looked_up(store, schema.CONTROL))
    assert not sums["late"]["ads"]["is_there"] and sums["a3"]["ads"]["name"] is None
    assert not (settings.paths.run / "ads-dump").exists()


def test_a_dump_is_of_one_point_while_a_writer_goes_on(
    own_spark: SparkSession, settings: Settings, store: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(number: int) -> None:
        said = {"name": str(number)}
        tables = (("campaigns", "c1"), ("ads", "a5"), ("pins", "p0"))
        names = {"pins": "title"}
        with store.writing() as connection:
            updates = [
                Update(table, key, 2 * LATER + number, {names.get(table, "name"): said["name"]})
                for table, key in tables
            ]
            repository.write(connection, updates)

    write(0)
    copy, between = dump.copy, iter(range(1, 100))

    def copied(*given: Any) -> None:
        other = threading.Thread(target=write, args=(next(between),))
        other.start()
        other.join(10)
        assert not other.is_alive(), "a dump must not hold the writer up"
        copy(*given)

    monkeypatch.setattr(dump, "copy", copied)
    head = dumped(own_spark, settings, store)
    found = {
        lake.read(own_spark, f"repo.{table}", head.snapshots[f"repo.{table}"])
        .filter(f"{schema.TABLES[table].key} = '{key}'")
        .collect()[0][column]
        for table, key, column in (
            ("campaigns", "c1", "name"),
            ("ads", "a5", "name"),
            ("pins", "p0", "title"),
        )
    }
    assert found == {"0"}
    assert everything(store)["pins", "p0"].values["title"] == str(len(schema.TABLES))


def test_a_dump_that_dies_leaves_the_one_before(
    own_spark: SparkSession, settings: Settings, store: Repository
) -> None:
    before = dumped(own_spark, settings, store)
    child = (
        "from pipelines import settings, spark; from pipelines.ads import dump, repository;"
        "s = settings.load(); dump.dump(spark.session(s, 'dies'), s, repository.opened(s))"
    )
    environment = {**os.environ, **settings.environment, failpoints.VARIABLE: "ads.dump.staged:3"}
    died = subprocess.run([sys.executable, "-c", child], cwd=ROOT, env=environment, check=False, timeout=300)
    assert died.returncode == -9
    assert (settings.paths.run / "ads-dump").exists()
    assert dump.head(settings) == before and dump.heads(settings) == [before]
    again = dumped(own_spark, settings, store)
    assert dump.head(settings) == again and not (settings.paths.run / "ads-dump").exists()
    assert dump.head(settings, before.dump_id) == before
    with pytest.raises(DumpError, match="no dump"):
        dump.head(settings, "none-such")


def test_tables_of_two_dumps_are_not_joined(
    own_spark: SparkSession, settings: Settings, store: Repository
) -> None:
    dumped(own_spark, settings, store)
    second = dump.dump(own_spark, settings, store)
    staging.publish(settings, "repo.ads", second.snapshots["repo.ads"].id)
    assert dump.head(settings) != second.head, "readers see it when they see all of it"
    snapshots = {name: lake.current_snapshot(settings, name) for name in lake.REPO}
    with pytest.raises(index_rows.TwoDumps):
        index_rows.standing(ADS, {name: found for name, found in snapshots.items() if found})


def test_a_repository_is_restored_as_it_was_and_goes_on_where_it_stopped(
    own_spark: SparkSession,
    settings: Settings,
    store: Repository,
    other: Repository,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = dumped(own_spark, settings, store)
    with other.writing() as connection:
        repository.subscribe(connection, "mine")
        repository.write(connection, [Update("ads", "a6", 10 * LATER, {"name": "newer"})])
    monkeypatch.setattr(restore, "PART_ROWS", 7)
    write, parts = repository.write, iter(range(20))

    def dying(*given: Any) -> Any:
        if next(parts) == 12:
            raise KeyboardInterrupt
        return write(*given)

    monkeypatch.setattr(repository, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        restore.restore(settings, other, head.dump_id)
    monkeypatch.setattr(repository, "write", write)
    done = restore.restore(settings, other)
    assert 0 < sum(one.skipped for one in done) < sum(one.rows for one in done)
    found = everything(other)
    with store.writing() as connection:
        repository.write(connection, [Update("ads", "a6", 10 * LATER, {"name": "newer"})])
    wanted = everything(store)
    assert found == wanted
    with other.reading() as connection:
        changes, _ = repository.changes_for(connection, "mine", frozenset({"campaigns.is_there"}))
    assert {change.key for change in changes} == {
        key for (table, key), row in wanted.items() if table == "campaigns" and key != "c0"
    }
    assert [one.skipped for one in restore.restore(settings, other)] == [one.rows for one in done]


def test_columns_that_a_batch_computed_are_integrated(
    own_spark: SparkSession, settings: Settings, store: Repository
) -> None:
    own_spark.sql("CREATE NAMESPACE IF NOT EXISTS lake.features")
    own_spark.sql(
        """CREATE TABLE lake.features.performance USING iceberg AS SELECT * FROM VALUES
        ('a5', 41L, TIMESTAMP '2024-05-01 00:00:00', 'x'), ('a6', -1L, NULL, 'x'), ('a7', NULL, NULL, 'x')
        AS t(ad_id, clicks_7d, measured_at, beside)"""
    )
    before = everything(store)
    version = LATER + 5_000_000
    written = restore.integrate(settings, store, "features.performance", "ads", version)
    assert written == restore.Written("features.performance", 3, 0, {"out_of_range": 1})
    after = everything(store)
    assert after["ads", "a5"].values["clicks_7d"] == 41
    assert after["ads", "a5"].values["measured_at"] == 1_714_521_600_000
    assert after["ads", "a5"].versions["clicks_7d"] == version and "beside" not in after["ads", "a5"].values
    assert after["ads", "a7"].values["clicks_7d"] is None
    assert {at for at, row in after.items() if row != before.get(at)} == {("ads", "a5"), ("ads", "a7")}
    assert restore.integrate(settings, store, "features.performance", "ads", version).skipped == 3
    restore.integrate(settings, store, "features.performance", "ads", 7, ["clicks_7d"])
    assert everything(store) == after, "an older version changes nothing"
    for source, into, columns in (
        ("features.performance", "none", []),
        ("features.none", "ads", []),
        ("features.performance", "ads", ["beside"]),
        ("features.performance", "campaigns", []),
    ):
        with pytest.raises(restore.RestoreError):
            restore.integrate(settings, store, source, into, version, columns)


@pytest.mark.timeout(900)
def test_a_base_of_a_dump_serves_what_the_handlers_say_of_the_repository(
    own_spark: SparkSession, settings: Settings, store: Repository
) -> None:
    report = build(settings, indices=["ads"])
    assert report.passed, report.problem()
    head = dump.head(settings)
    assert head is not None
    versions = Versions(settings.paths.indices, "ads")
    served = view(open_base(ADS, versions.path(report.published["ads"])))
    assert isinstance(served, DocumentsView)
    for family in (schema.CONTROL, schema.CONTENT, schema.PERFORMANCE):
        given = looked_up(store, family)
        wanted = dict(
            zip(given.column("ad_id").to_pylist(), handlers.run(family, given).to_pylist(), strict=True)
        )
        there = {key for key, row in by_ad(given).items() if row["ads"]["is_there"]}
        assert {"a1", "late", "measured"} & there == set()
        documents = served.get([key.encode() for key in wanted], [family])
        for key, document in zip(wanted, documents, strict=True):
            assert (document is not None) == (key in there)
            if document is not None:
                assert document[family] == wanted[key]
