"""When assets are asked for: the roots every four hours, the rest after them, nothing behind a check that failed.
Maintenance each hour, and never with a build; days again by nobody but a person."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from assets import freshness, streams
from jobs.definitions import defs
from pipelines import indices
from pipelines.ads.schema import TABLES
from pipelines.contracts import CONTRACTS

START = datetime(2024, 3, 1, 1, 0, tzinfo=UTC)
RAW = {dg.AssetKey(["raw", contract.name]) for contract in CONTRACTS.values()}
MAINTENANCE = dg.AssetSelection.groups("maintenance").resolve(defs.resolve_asset_graph())
DAYS = dg.AssetSelection.groups("backfill").resolve(defs.resolve_asset_graph())
STREAMS = streams.ALL.resolve(defs.resolve_asset_graph())
ADS = dg.AssetSelection.groups("ads_upkeep").resolve(defs.resolve_asset_graph())
BUILT = defs.resolve_asset_graph().get_all_asset_keys() - MAINTENANCE - ADS - DAYS - STREAMS
CURATED = dg.AssetKey(["curated", "user_interactions"])


@pytest.fixture
def instance() -> dg.DagsterInstance:
    return dg.DagsterInstance.ephemeral()


def chosen(sensor: str) -> dg.AssetSelection:
    definition = defs.resolve_sensor_def(sensor)
    assert isinstance(definition, dg.AutomationConditionSensorDefinition)
    assert definition.default_status is dg.DefaultSensorStatus.RUNNING
    return definition.asset_selection


def asked(  # type: ignore[no-untyped-def]
    instance: dg.DagsterInstance, at: datetime, cursor: object = None, sensor: str = "automation"
):
    result = dg.evaluate_automation_conditions(
        defs,
        instance,
        asset_selection=chosen(sensor),
        evaluation_time=at,
        cursor=cursor,  # type: ignore[arg-type]
    )
    keys = {
        found.key for found in result.results if found.true_subset.size and isinstance(found.key, dg.AssetKey)
    }
    return keys, result.cursor


def test_everything_is_asked_for_every_four_hours_and_not_in_between(instance: dg.DagsterInstance) -> None:
    _, cursor = asked(instance, START)
    keys, cursor = asked(instance, START + timedelta(hours=1), cursor)
    assert keys == set()
    keys, cursor = asked(instance, START + timedelta(hours=3, minutes=1), cursor)
    assert keys == BUILT
    keys, _ = asked(instance, START + timedelta(hours=3, minutes=2), cursor)
    assert keys == set()


@pytest.mark.parametrize("passed", [True, False])
def test_nothing_is_asked_for_behind_a_check_that_failed(instance: dg.DagsterInstance, passed: bool) -> None:
    _, cursor = asked(instance, START)
    names = ("user_interactions", "event_features", "pins_catalogue", "pins_offer")
    curated = [["curated", name] for name in names]
    for path in [*curated, *(["repo", name] for name in TABLES)]:
        key = dg.AssetKey(path)
        instance.report_runless_asset_event(dg.AssetMaterialization(key))
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=key, check_name="expectations", passed=passed or key != CURATED, blocking=True
            )
        )
    keys, _ = asked(instance, START + timedelta(minutes=1), cursor)
    behind = {key for key in keys if CURATED in defs.resolve_asset_graph().get(key).parent_keys}
    assert {key.path[0] for key in behind} == (
        {"index", "models", "features", "explore"} if passed else set()
    )


def test_every_table_has_a_blocking_check_and_the_sensor_runs_by_itself() -> None:
    graph = defs.resolve_asset_graph()
    checked = {key.asset_key for key in graph.asset_check_keys if graph.get(key).blocking}
    assert checked == {
        key
        for key in graph.get_all_asset_keys()
        if key.path[0] in ("curated", "curated_days", "features", "repo", "base")
    }
    assert chosen("automation").resolve(graph) == BUILT


def test_maintenance_is_asked_for_each_hour_and_orphans_once_a_day_apart_from_builds(
    instance: dg.DagsterInstance,
) -> None:
    orphans = dg.AssetKey(["maintenance", "orphans"])
    _, cursor = asked(instance, START, sensor="maintenance")
    keys, cursor = asked(instance, START + timedelta(minutes=22), cursor, "maintenance")
    assert keys == set()
    keys, cursor = asked(instance, START + timedelta(minutes=24), cursor, "maintenance")
    assert keys == MAINTENANCE - {orphans}
    keys, cursor = asked(instance, START + timedelta(minutes=25), cursor, "maintenance")
    assert keys == set()
    keys, cursor = asked(instance, START + timedelta(hours=1, minutes=54), cursor, "maintenance")
    assert keys == MAINTENANCE
    assert MAINTENANCE & defs.resolve_job_def("build").asset_layer.executable_asset_keys == set()
    tables = {tuple(key.path[1:]) for key in MAINTENANCE if key.path[0] == "maintenance"}
    assert {("raw", "pin_updates"), ("index", "pins"), ("indices", "pins")} <= tables


def test_the_ads_account_is_looked_after_once_a_day_apart_from_builds(instance: dg.DagsterInstance) -> None:
    assert dg.AssetKey(["ops", "ads_unsynced"]) in ADS
    _, cursor = asked(instance, START, sensor="maintenance")
    _, cursor = asked(instance, START + timedelta(hours=2, minutes=16), cursor, "maintenance")
    keys, cursor = asked(instance, START + timedelta(hours=2, minutes=18), cursor, "maintenance")
    assert keys == ADS
    assert ADS & defs.resolve_job_def("build").asset_layer.executable_asset_keys == set()


def test_a_build_waits_for_no_stream() -> None:
    assert {key.path[1] for key in STREAMS} == {"archive", *indices.STREAMS}
    graph = defs.resolve_asset_graph()
    for key in STREAMS:
        assert not graph.get(key).is_executable
        assert key not in defs.resolve_job_def("build").asset_layer.executable_asset_keys
    assert graph.get(dg.AssetKey(["raw", "pin_updates"])).parent_keys == {streams.ARCHIVE}


def test_every_asset_that_is_expected_has_a_freshness_policy() -> None:
    graph = defs.resolve_asset_graph()
    without = {key for key in graph.get_all_asset_keys() if graph.get(key).freshness_policy is None}
    assert without == DAYS, "days are computed again by nobody but a person"
    assert graph.get(dg.AssetKey(["maintenance", "orphans"])).freshness_policy == freshness.DAILY
    assert graph.get(dg.AssetKey(["published", "pins"])).freshness_policy == freshness.BUILT
    assert graph.get(streams.ARCHIVE).freshness_policy == freshness.FOLLOWED
