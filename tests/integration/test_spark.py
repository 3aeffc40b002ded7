from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import deltalake
import pyarrow as pa
from pyiceberg.catalog import load_catalog

from pipelines.ingest import broker as embedded
from pipelines.settings import CATALOG, Settings
from pipelines.spark import _options, session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def double(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Runs in an executor's Python, and imports the project there."""
    from pipelines.errors import TidemarkError

    assert issubclass(TidemarkError, Exception)
    for batch in batches:
        yield pa.RecordBatch.from_pydict({"id": [2 * one.as_py() for one in batch["id"]]})


def test_an_iceberg_table_is_the_same_for_pyiceberg(own_spark: "SparkSession", settings: Settings) -> None:
    own_spark.sql(f"CREATE NAMESPACE {CATALOG}.raw")
    own_spark.range(10).writeTo(f"{CATALOG}.raw.numbers").tableProperty("format-version", "2").create()
    table = load_catalog(CATALOG, **settings.lake.pyiceberg_properties).load_table("raw.numbers")
    assert table.scan().to_arrow()["id"].to_pylist() == list(range(10))

    table.append(pa.table({"id": pa.array([10], pa.int64())}))
    assert own_spark.table(f"{CATALOG}.raw.numbers").count() == 11, "a commit from elsewhere is seen at once"


def test_each_home_has_a_catalog_of_its_own(own_spark: "SparkSession", spark: "SparkSession") -> None:
    own_spark.sql(f"CREATE NAMESPACE {CATALOG}.only_here")
    assert "only_here" in [row[0] for row in own_spark.sql(f"SHOW NAMESPACES IN {CATALOG}").collect()]
    assert "only_here" not in [row[0] for row in spark.sql(f"SHOW NAMESPACES IN {CATALOG}").collect()]


def test_the_same_settings_give_the_same_session(own_spark: "SparkSession", settings: Settings) -> None:
    own_spark.range(1).count()
    assert session(settings, "again").conf.get(f"spark.sql.catalog.{CATALOG}.uri") == settings.lake.jdbc_uri


def test_delta_tables_pass_between_spark_and_deltalake(spark: "SparkSession", settings: Settings) -> None:
    folder = str(settings.paths.delta / "numbers")
    deltalake.write_deltalake(folder, pa.table({"id": pa.array([1, 2], pa.int64())}))
    spark.range(3, 5).write.format("delta").mode("append").save(folder)
    assert sorted(deltalake.DeltaTable(folder).to_pyarrow_table()["id"].to_pylist()) == [1, 2, 3, 4]


def test_executors_have_our_packages(spark: "SparkSession") -> None:
    assert sorted(row.id for row in spark.range(5).mapInArrow(double, "id long").collect()) == [0, 2, 4, 6, 8]


def test_times_are_utc(spark: "SparkSession") -> None:
    row = spark.sql(
        "SELECT hour(timestamp_millis(0)) AS hour, date_format(timestamp_millis(0), 'XXX') AS zone"
    ).first()
    assert row is not None
    assert (row.hour, row.zone) == (0, "Z")


def test_kafka_is_a_source(spark: "SparkSession", broker: Settings) -> None:
    embedded.ensure_topics(broker, ["spark-reads"])
    servers = broker.kafka.bootstrap_servers
    (
        spark.createDataFrame([("k", "v")], "key string, value string")
        .write.format("kafka")
        .options(**{"kafka.bootstrap.servers": servers, "topic": "spark-reads"})
        .save()
    )
    found = (
        spark.read.format("kafka")
        .options(**{"kafka.bootstrap.servers": servers, "subscribe": "spark-reads"})
        .load()
        .collect()
    )
    assert [(bytes(row.key), bytes(row.value)) for row in found] == [(b"k", b"v")]


def test_tables_are_written_without_starting_a_process(own_spark: "SparkSession", settings: Settings) -> None:
    own_spark.sql(f"CREATE NAMESPACE {CATALOG}.raw")
    own_spark.range(4).writeTo(f"{CATALOG}.raw.numbers").create()
    table = own_spark._jvm.org.apache.iceberg.spark.Spark3Util.loadIcebergTable(
        own_spark._jsparkSession, f"{CATALOG}.raw.numbers"
    )
    path = own_spark._jvm.org.apache.hadoop.fs.Path(table.location())
    system = path.getFileSystem(table.io().conf())
    assert system.getRawFileSystem().toString() == "NakedLocalFS", "Hadoop's own starts `chmod` for each file"


def test_what_a_user_reads_goes_through_hadoops_own_file_system(settings: Settings, tmp_path: Path) -> None:
    options = _options(settings, [], tmp_path, has_small_jobs=False)
    assert "spark.hadoop.fs.file.impl" not in options, "the other one does not list a folder that is a link"
