import dataclasses
from pathlib import Path

import pytest

from pipelines.settings import ROOT, SettingsError, load


def test_defaults_stand_under_home(tmp_path: Path) -> None:
    settings = load(env={"TIDEMARK_HOME": str(tmp_path)})
    assert settings.home == tmp_path
    assert settings.paths.indices == tmp_path / "indices"
    assert settings.lake.warehouse == f"file://{tmp_path}/lake/warehouse"
    assert settings.lake.jdbc_uri == f"jdbc:sqlite:{tmp_path}/lake/catalog.db?busy_timeout=10000"
    assert settings.lake.sqlalchemy_uri == f"sqlite:///{tmp_path}/lake/catalog.db"
    assert settings.mlflow.tracking_uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert settings.streams.trigger_ms == 1000
    assert settings.spark.is_local


def test_home_is_in_the_checkout_by_default_and_jars_are_not() -> None:
    settings = load(env={})
    assert settings.home == ROOT / "var"
    assert not settings.paths.jars.is_relative_to(settings.home)


def test_one_key_from_the_environment_reaches_what_refers_to_it() -> None:
    settings = load(env={"TIDEMARK__KAFKA__PORT": "19092"})
    assert settings.kafka.port == 19092
    assert settings.kafka.bootstrap_servers == "127.0.0.1:19092"


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kafka:\n  partitions: 7\n")
    settings = load(env={"TIDEMARK_CONF": str(file)})
    assert settings.kafka.partitions == 7
    assert settings.kafka.port == 9092


def test_a_child_process_gets_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kafka:\n  partitions: 7\n")
    settings = load(
        file, env={"TIDEMARK_HOME": str(tmp_path), "TIDEMARK__KAFKA__PORT": "19092", "OTHER": "x"}
    )
    assert load(env=settings.environment) == settings
    assert "OTHER" not in settings.environment


def test_the_cluster_example_is_valid_and_its_password_goes_to_java_and_python() -> None:
    uri = "postgresql://me:p%40ss@db:5433/lake"
    settings = load(ROOT / "conf" / "cluster.yaml", env={"TIDEMARK__LAKE__CATALOG_URI": uri})
    assert not settings.spark.is_local
    assert settings.lake.jdbc_uri == "jdbc:postgresql://db:5433/lake?user=me&password=p%40ss"
    assert settings.lake.sqlalchemy_uri == uri
    assert settings.lake.sqlite_path is None


def test_a_rest_catalog() -> None:
    settings = load(env={"TIDEMARK__LAKE__CATALOG_URI": "http://catalog:8181"})
    assert settings.lake.catalog_type == "rest"
    assert settings.lake.pyiceberg_properties["type"] == "rest"


def test_they_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(env={}).kafka.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"TIDEMARK__KAFKA__PRT": "1"}, "unknown setting `kafka.prt`.*did you mean `port`"),
        ({"TIDEMARK__KAFK__PORT": "1"}, "unknown section `kafk`.*did you mean `kafka`"),
        ({"TIDEMARK__KAFKA__PORT": "many"}, "'many' is not a whole number.*kafka.port"),
        ({"TIDEMARK__KAFKA__PORT": "true"}, "not a whole number"),
        ({"TIDEMARK__BUILD__FIRST_DAY": "soon"}, "not a day, as 2017-01-01"),
        ({"TIDEMARK__SPARK__UI_ENABLED": "7"}, "not true or false"),
        ({"TIDEMARK__SPARK__EXTRA": "7"}, "not names with values"),
        ({"TIDEMARK_CONF": "/nowhere.yaml"}, "cannot read the settings.*/nowhere.yaml"),
        ({"TIDEMARK__LAKE__WAREHOUSE": "{lake.warehouse}/x"}, "refers to itself"),
        ({"TIDEMARK__LAKE__WAREHOUSE": "{lake.warehous}"}, "did you mean `lake.warehouse`"),
    ],
)
def test_what_is_wrong_is_named(env: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(env=env)


@pytest.mark.parametrize("text", ["kafka: [1", "- 1", "kafka: 3", "kafka:\n  prt: 3", "other:\n  x: 1"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"mine\.yaml"):
        load(file, env={})


def test_extra_spark_settings_are_text() -> None:
    settings = load(env={"TIDEMARK__SPARK__EXTRA": "{spark.a: true, spark.b: 3}"})
    assert settings.spark.extra == {"spark.a": "true", "spark.b": "3"}
