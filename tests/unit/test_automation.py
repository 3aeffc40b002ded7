"""When assets are asked for: the roots every four hours, the rest after them, nothing behind a check that failed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest

from jobs.definitions import defs

START = datetime(2024, 3, 1, 1, 0, tzinfo=UTC)
RAW = {dg.AssetKey(["raw", "user_interactions"]), dg.AssetKey(["raw", "pin_updates"])}
CURATED = dg.AssetKey(["curated", "user_interactions"])


@pytest.fixture
def instance() -> dg.DagsterInstance:
    return dg.DagsterInstance.ephemeral()


def asked(instance: dg.DagsterInstance, at: datetime, cursor: object = None):  # type: ignore[no-untyped-def]
    result = dg.evaluate_automation_conditions(defs, instance, evaluation_time=at, cursor=cursor)  # type: ignore[arg-type]
    keys = {
        found.key for found in result.results if found.true_subset.size and isinstance(found.key, dg.AssetKey)
    }
    return keys, result.cursor


def test_everything_is_asked_for_every_four_hours_and_not_in_between(instance: dg.DagsterInstance) -> None:
    _, cursor = asked(instance, START)
    keys, cursor = asked(instance, START + timedelta(hours=1), cursor)
    assert keys == set()
    keys, cursor = asked(instance, START + timedelta(hours=3, minutes=1), cursor)
    assert keys == defs.resolve_asset_graph().get_all_asset_keys()
    keys, _ = asked(instance, START + timedelta(hours=3, minutes=2), cursor)
    assert keys == set()


@pytest.mark.parametrize("passed", [True, False])
def test_nothing_is_asked_for_behind_a_check_that_failed(instance: dg.DagsterInstance, passed: bool) -> None:
    _, cursor = asked(instance, START)
    for name in ("user_interactions", "pins_catalogue", "pins_offer"):
        key = dg.AssetKey(["curated", name])
        instance.report_runless_asset_event(dg.AssetMaterialization(key))
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=key, check_name="expectations", passed=passed or key != CURATED, blocking=True
            )
        )
    keys, _ = asked(instance, START + timedelta(minutes=1), cursor)
    behind = {key for key in keys if CURATED in defs.resolve_asset_graph().get(key).parent_keys}
    assert {key.path[0] for key in behind} == ({"index", "models", "features"} if passed else set())


def test_every_table_has_a_blocking_check_and_the_sensor_runs_by_itself() -> None:
    graph = defs.resolve_asset_graph()
    checked = {key.asset_key for key in graph.asset_check_keys if graph.get(key).blocking}
    assert checked == {key for key in graph.get_all_asset_keys() if key.path[0] in ("curated", "base")}
    sensor = defs.resolve_sensor_def("automation")
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
