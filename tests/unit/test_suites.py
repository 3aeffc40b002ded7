"""Suites: every table that an asset or a load writes has one, and each names only fields that its table declares."""

from __future__ import annotations

import pytest

from benchmarks.defects import defects
from jobs.definitions import defs
from pipelines import index_rows, lake, maintenance
from pipelines.indices import INDICES
from pipelines.lake import Column
from pipelines.suites import SUITES, Suite, derived, of_delta, of_index
from pipelines.users.index import OWN

OF_INDICES = [suite(spec) for spec in INDICES.values() for suite in (of_index, of_delta)]
COPIES = {index_rows.delta_table(spec).name.partition(".")[2] for spec in INDICES.values()}


def test_each_raw_curated_feature_and_dumped_table_has_a_suite_and_its_checks() -> None:
    declared = {name for name in lake.TABLES if name.split(".")[0] in ("raw", "curated", "features", "repo")}
    assert SUITES.keys() == declared
    graph = defs.resolve_asset_graph()
    assets = {key for key in graph.get_all_asset_keys() if ".".join(key.path) in SUITES}
    checks = {(key.asset_key, key.name) for key in graph.asset_check_keys}
    assert {(key, name) for key in assets for name in ("expectations", "history")} <= checks
    others = {name for _, name in checks} - {"expectations", "history", "gate", "account"}
    assert others >= COPIES
    beside = {"raw." + name for name in others - COPIES}
    assert {".".join(key.path) for key in assets} | beside == declared


@pytest.mark.parametrize("suite", [*SUITES.values(), *OF_INDICES], ids=lambda suite: suite.table)
def test_a_suite_names_only_what_its_table_declares(suite: Suite) -> None:
    specs = maintenance.specs()
    names = {column.name for column in specs[suite.table].columns}
    asked = {field.path.split(".")[0] for field in suite.fields} | set(suite.key)
    assert asked | {name for name in (suite.day, suite.arrival) if name} <= names
    for field in suite.fields:
        if field.refers_to:
            table, _, column = field.refers_to.rpartition(".")
            assert {column, *field.refers_with} <= {c.name for c in lake.TABLES[table].columns}
            assert set(field.refers_with) <= names


def test_events_and_features_are_asked_for_all_that_they_have() -> None:
    """A column of an event that nobody follows would drift unseen; what is JSON is asked to be."""
    events, features = SUITES["curated.user_interactions"], SUITES["curated.event_features"]
    followed = {field.path for field in events.fields if field.kind}
    assert set(OWN.names) <= followed
    rules = {suite.table: {rule.name for rule in suite.rules} for suite in (events, features)}
    assert "payload_is_json" in rules[events.table] and "features_is_json" in rules[features.table]
    (event,) = (field for field in features.fields if field.refers_to)
    assert (event.path, event.refers_to, event.refers_with) == (
        "event_id",
        "curated.user_interactions.event_id",
        ("user_id",),
    )
    of_rows = of_index(INDICES["user_events"])
    (family,) = (field for field in of_rows.fields if field.path == "family")
    assert family.one_of == ("interactions", "features")
    assert {rule.name for rule in of_rows.rules} == {"has_interactions", "has_features"}


def test_names_and_types_say_what_a_field_must_be() -> None:
    columns = (
        Column("price_usd_micros", "bigint", "d"),
        Column("is_new", "boolean", "d"),
        Column("at", "timestamp", "d"),
    )
    price, is_new, at = derived(lake.TableSpec("t.t", "d", columns, "o"))
    assert (price.least, price.is_always_required) == (0, False)
    assert is_new.is_always_required
    assert at.least == 0 and at.most is not None and at.most < 4_200_000_000


def test_the_benchmark_has_four_defects_of_each_of_ten_kinds() -> None:
    kinds = [defect.kind for defect in defects(1)]
    assert len(kinds) == 40
    assert {kinds.count(kind) for kind in kinds} == {4}
    for defect in defects(1):
        paths = {field.path for field in SUITES[defect.table].fields}
        assert all("." not in label or label.rpartition(".")[0] in paths for label in defect.wanted)
