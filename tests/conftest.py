"""What tests share: settings on a folder of their own; one Spark and one broker a run, started when asked for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.settings import Settings, load

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

KINDS = ("unit", "properties", "integration", "faults", "browser")
SMALL = {
    "TIDEMARK__SPARK__MASTER": "local[2]",
    "TIDEMARK__SPARK__DRIVER_MEMORY": "1g",
    "TIDEMARK__SPARK__SHUFFLE_PARTITIONS": "2",
    "TIDEMARK__KAFKA__HEAP_MB": "256",
}
PORTS = (
    "KAFKA__PORT",
    "KAFKA__CONTROLLER_PORT",
    "SERVING__PORT",
    "COLLECTOR__PORT",
    "DAGSTER__PORT",
    "TRINO__PORT",
    "ADS__PORT",
    "ADS__DATABASE_PORT",
    "ADS__CONNECT_PORT",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's folder is its marker: tests/faults/ → faults."""
    for item in items:
        for kind in KINDS:
            if kind in Path(item.path).parts:
                item.add_marker(kind)


@pytest.fixture(scope="session", autouse=True)
def _undisturbed() -> None:
    """Tests have settings of their own, whatever this shell has set. The cache of Java archives may be shared."""
    for name in list(os.environ):
        if name.startswith("TIDEMARK_") and name != "TIDEMARK__PATHS__JARS":
            del os.environ[name]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def small_settings(home: Path, **overrides: object) -> Settings:
    """Settings for a small machine on a folder, with free ports; KAFKA__PARTITIONS=1 overrides a key."""
    env = {"TIDEMARK_HOME": str(home)} | SMALL
    env |= {f"TIDEMARK__{name}": str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
    env |= {f"TIDEMARK__{name}": str(value) for name, value in overrides.items()}
    if jars := os.environ.get("TIDEMARK__PATHS__JARS"):
        env["TIDEMARK__PATHS__JARS"] = jars
    return load(env=env)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of this test alone."""
    return small_settings(tmp_path / "home")


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """For a test that needs keys of its own: make_settings(KAFKA__PARTITIONS=1)."""
    return lambda **overrides: small_settings(tmp_path / "home", **overrides)


@pytest.fixture(scope="session")
def shared_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of the run: those of the shared Spark and of the shared broker."""
    return small_settings(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def spark(shared_settings: Settings) -> Iterator[SparkSession]:
    """The one Spark of the run, on the shared settings. A test with its own `settings` asks
    `pipelines.spark.session(settings, …)` for a session on the same Spark, with a catalog of its own."""
    from pipelines.spark import session

    running = session(shared_settings, "tests", has_small_jobs=True)
    yield running
    running.stop()


@pytest.fixture
def own_spark(spark: SparkSession, settings: Settings) -> SparkSession:
    """A session on the one Spark of the run, whose catalog is this test's own."""
    from pipelines.spark import session

    return session(settings, "tests")


@pytest.fixture(scope="session")
def broker(shared_settings: Settings) -> Iterator[Settings]:
    """The one broker of the run; gives the settings that reach it."""
    from pipelines.ingest import broker as embedded

    embedded.start(shared_settings)
    yield shared_settings
    embedded.stop(shared_settings)


@pytest.fixture
def kafka_settings(broker: Settings, tmp_path: Path) -> Settings:
    """Settings of this test alone, with the broker of the run as if it were a user's."""
    servers = broker.kafka.bootstrap_servers
    return small_settings(tmp_path / "home", KAFKA__IS_EMBEDDED="false", KAFKA__BOOTSTRAP_SERVERS=servers)
