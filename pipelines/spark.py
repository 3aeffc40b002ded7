"""The only builder of a Spark session: Iceberg as `lake`, Delta as the session's own catalog, Kafka as a source.

Belongs here: every Spark setting that Tidemark relies on. Does not belong here: tables (`lake.py`) and streams.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from py4j.java_gateway import JavaClass, JavaMember, JVMView
from pyspark.sql import SparkSession

from pipelines import jars
from pipelines.errors import TidemarkError
from pipelines.indexing.keyed import STATE_OPTIONS
from pipelines.preflight import find_java
from pipelines.settings import CATALOG, ROOT, Settings

BARE = "com.globalmentor.apache.hadoop.fs.BareLocalFileSystem"
"""The local disk without starting processes: Hadoop's own starts a `chmod` for each file and folder that it makes, and
one more for the file of its checksum (docs/adr/0016)."""


class SparkError(TidemarkError):
    """A Spark session could not be had."""


def session(settings: Settings, app_name: str, *, has_small_jobs: bool = False) -> SparkSession:
    """A Spark session on these settings.

    A process has one Spark: the first call starts it. A later call with other settings gets a session of its own on the
    same Spark, with the other catalog in it; master and memory stay what they were.

    Args:
        settings: Where the catalog is and how Spark runs.
        app_name: What Spark's own pages and logs call this process.
        has_small_jobs: Whether it runs many jobs of milliseconds: Java then compiles once and quickly, for what its
            second compiler would take from them is more than it gives back.

    Raises:
        PreflightError: There is no Java that Spark runs on.
        JarError: What Spark needs could not be fetched.
        SparkError: Spark did not start.
    """
    catalog = _catalog(settings)
    if settings.lake.sqlite_path:
        settings.lake.sqlite_path.parent.mkdir(parents=True, exist_ok=True)
    running = SparkSession.getActiveSession() or SparkSession._instantiatedSession
    if running is not None and running._jsc.sc().isStopped():
        running = None
    if running is not None:
        if all(running.conf.get(name, None) == value for name, value in catalog.items()):
            return running
        other = running.newSession()
        for name, value in catalog.items():
            other.conf.set(name, value)
        return other
    return _start(settings, app_name, catalog, has_small_jobs)


def _start(settings: Settings, app_name: str, catalog: dict[str, str], has_small_jobs: bool) -> SparkSession:
    remember_names()
    archives = jars.resolve("spark", settings)
    scratch = settings.paths.run / "spark"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ["JAVA_HOME"] = str(find_java().home)
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    builder = SparkSession.builder.appName(app_name).master(settings.spark.master)
    options = _options(settings, archives, scratch, has_small_jobs) | catalog | settings.spark.extra
    for name, value in options.items():
        builder = builder.config(name, value)
    try:
        spark = builder.getOrCreate()
    except Exception as error:  # pyspark raises bare RuntimeErrors and Py4J errors alike
        raise SparkError(
            f"Spark did not start: {str(error).strip().splitlines()[0]}",
            where=settings.spark.master,
            remedy="look at what it printed above; a small machine may need TIDEMARK__SPARK__DRIVER_MEMORY=1g",
        ) from error
    spark.sparkContext.setLogLevel("WARN")
    # PySpark logs what it raises, with Java's whole trace: whoever catches it says what was wrong.
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    if not settings.spark.is_local:
        spark.sparkContext.addPyFile(str(_packed(scratch)))
    return spark


def remember_names() -> None:
    """Ask the JVM once for what a name of Java stands for: a class of a view, a static member of a class.

    py4j asks each time that a name is used, and Java then looks through every archive for each package that the name
    might be in: a third of what an epoch of a stream cost. Both are the same for as long as the JVM lives.
    """
    for kind in (JVMView, JavaClass):
        if not hasattr(kind.__getattr__, "__wrapped__"):
            kind.__getattr__ = _remembered(kind.__getattr__)


def _remembered(asked: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    @functools.wraps(asked)
    def ask(self: Any, name: str) -> Any:
        found = asked(self, name)
        if isinstance(found, JavaClass | JavaMember):
            self.__dict__[name] = found
        return found

    return ask


def _catalog(settings: Settings) -> dict[str, str]:
    """The Iceberg catalog, under the name that pyiceberg and Trino know it by too."""
    lake = settings.lake
    options = {
        "type": lake.catalog_type,
        "uri": lake.catalog_uri if lake.catalog_type == "rest" else lake.jdbc_uri,
        "warehouse": lake.warehouse,
        # A table is read as it is now: another process may have committed since this one looked.
        "cache-enabled": "false",
    }
    if lake.catalog_type == "jdbc":
        options["jdbc.schema-version"] = "V1"
    if lake.sqlite_path:
        options["clients"] = "1"
    if settings.spark.is_local:
        # Not for all that Spark reads: it does not list a folder that is a link, and files of a user's may be in one.
        options["hadoop.fs.file.impl"] = BARE
        options["hadoop.fs.file.impl.disable.cache"] = "true"
    prefix = f"spark.sql.catalog.{CATALOG}"
    return {prefix: "org.apache.iceberg.spark.SparkCatalog"} | {
        f"{prefix}.{name}": value for name, value in options.items()
    }


def _options(settings: Settings, archives: list[Path], scratch: Path, has_small_jobs: bool) -> dict[str, str]:
    java = f"-Duser.timezone=UTC -Dlog4j2.configurationFile='{ROOT / 'conf' / 'spark' / 'log4j2.properties'}'"
    java += " -XX:+UseParallelGC " + (
        "-XX:TieredStopAtLevel=1" if has_small_jobs else "-XX:ReservedCodeCacheSize=256m"
    )
    options = {
        "spark.driver.memory": settings.spark.driver_memory,
        "spark.driver.extraJavaOptions": java,
        "spark.executorEnv.PYTHONPATH": str(ROOT),
        "spark.local.dir": str(scratch),
        "spark.ui.enabled": str(settings.spark.ui_enabled).lower(),
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.extensions": "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions,"
        "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.catalogImplementation": "in-memory",
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "true",
        "spark.sql.shuffle.partitions": str(settings.spark.shuffle_partitions),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.execution.pythonUDF.arrow.enabled": "true",
        "spark.sql.streaming.stopTimeout": "30s",
        "spark.sql.streaming.minBatchesToRetain": "20",
        "spark.databricks.delta.snapshotPartitions": "1",
        "spark.serializer": "org.apache.spark.serializer.KryoSerializer",
        **STATE_OPTIONS,
    }
    if settings.spark.is_local:
        # On the class path from the start: `spark.jars` would copy them to a scratch folder at every start.
        options["spark.driver.extraClassPath"] = os.pathsep.join(map(str, archives))
        options["spark.python.daemon.module"] = "pipelines.worker_daemon"
        options["spark.driver.host"] = options["spark.driver.bindAddress"] = "127.0.0.1"
        if has_small_jobs:
            options["spark.hadoop.fs.file.impl"] = BARE
            checkpointing = "org.apache.spark.sql.execution.streaming.checkpointing"
            options["spark.sql.streaming.checkpointFileManagerClass"] = (
                f"{checkpointing}.FileSystemBasedCheckpointFileManager"
            )
    else:
        options["spark.jars"] = ",".join(map(str, archives))
    return options


def _packed(scratch: Path) -> Path:
    """Our own packages as one file, for executors on other machines."""
    handle, name = tempfile.mkstemp(prefix="tidemark-", suffix=".zip", dir=scratch)
    with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for source in sorted((ROOT / "pipelines").rglob("*.py")):
            archive.write(source, source.relative_to(ROOT))
    return Path(name)
