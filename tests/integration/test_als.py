"""Item vectors by ALS on Spark, and their life in the registry."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipelines.recommend import als, evaluation, fold_in, registry
from pipelines.recommend.user_vectors import user_vectors
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SMALL = als.Hyperparameters(rank=8, iterations=5, sample_users=40)
SCHEMA = "user_id string, pin_id string, action string, event_time timestamp, quantity bigint"


def interactions(spark: SparkSession) -> DataFrame:
    """Two tastes: even users buy of the first 30 pins, odd ones of the others; a visit a day for 6 days."""
    rng = np.random.default_rng(1)
    rows: list[tuple[Any, ...]] = []
    start = datetime.datetime(2024, 1, 1, 12)
    for user in range(60):
        pins = rng.permutation(30)[:24] + 30 * (user % 2)
        for day in range(6):
            visit = pins[4 * day : 4 * day + 4]
            at = start + datetime.timedelta(days=day)
            rows += [(f"ü{user}", f"pin/{pin}", "purchase", at, 1) for pin in visit]
    rows.append(("ü0", "only viewed", "view", start, None))
    rows.append(("ü0", "only hidden", "hide", start, None))
    rows.append(("ü0", "nothing", "sing", start, None))
    return spark.createDataFrame(rows, SCHEMA)


@pytest.fixture(scope="module")
def model(spark: SparkSession) -> als.Model:
    return als.fit(interactions(spark), SMALL)


def test_each_pin_that_was_acted_on_has_a_vector(model: als.Model) -> None:
    pins = model.table.column("pin_id").to_pylist()
    assert set(pins) == {f"pin/{n}" for n in range(60)} | {"only viewed", "only hidden"}
    assert pins == sorted(pins)
    assert als.matrix(model.table).shape == (62, 8)
    assert model.vectors.schema.simpleString() == "struct<pin_id:string,vector:array<float>>"
    assert model.vectors.count() == 62
    np.testing.assert_allclose(model.parameters.gram, fold_in.gram_of(als.matrix(model.table)))


def test_it_foresees_better_than_chance(model: als.Model) -> None:
    """A last visit holds 4 of the 10 pins of the user's taste that are new to the user, of 40 new ones in all."""
    assert model.metrics["users"] == 40
    assert model.metrics["recall_at_10"] > 0.8
    assert 0 < model.metrics["ndcg_at_10"] <= 1
    assert 0 < model.metrics["coverage_at_10"] <= 1
    assert model.metrics["pins"] == 62


def test_a_folded_user_is_near_what_the_user_likes(model: als.Model) -> None:
    pins = [pin.encode() for pin in model.table.column("pin_id").to_pylist()]
    catalogue = evaluation.Catalogue(pins, als.matrix(model.table))
    rows = catalogue.rows([b"pin/3", b"pin/4"])
    user = fold_in.solve(catalogue.vectors[rows], np.array([1.0, 0.5]), model.parameters)
    assert user is not None
    found = catalogue.best(user, {b"pin/3", b"pin/4"}, 10)
    assert all(pin.startswith(b"pin/") and int(pin[4:]) < 30 for pin in found)


def test_the_same_input_gives_the_same_vectors(spark: SparkSession, model: als.Model) -> None:
    again = als.fit(interactions(spark).repartition(3), SMALL)
    assert again.table.column("pin_id").equals(model.table.column("pin_id"))
    np.testing.assert_allclose(als.matrix(again.table), als.matrix(model.table), rtol=1e-2, atol=1e-3)


def test_nothing_to_learn_is_an_error(spark: SparkSession) -> None:
    with pytest.raises(als.NothingToLearn, match="load interactions"):
        als.fit(interactions(spark).where("action = 'sing'"), SMALL)


def test_users_without_a_history_are_no_test(spark: SparkSession) -> None:
    metrics = als.fit(interactions(spark).where("event_time < '2024-01-02'"), SMALL).metrics
    assert metrics["users"] == 0


def test_a_model_is_registered_and_made_live(model: als.Model, settings: Settings) -> None:
    assert registry.live(settings) is None
    first = registry.log(settings, model, {"curated.user_interactions": "17"})
    second = registry.log(settings, model)
    assert (first.model_id, second.model_id) == ("pin_als/1", "pin_als/2")
    registry.set_live(settings, first.model_id)
    assert registry.live(settings) == "pin_als/1"
    registry.set_live(settings, second.model_id)
    assert registry.live(settings) == "pin_als/2"
    table, parameters = registry.load(settings, "pin_als/1")
    assert table.equals(model.table)
    np.testing.assert_array_equal(parameters.gram, first.gram)
    for bad in ("pin_als", "pin_als/99", "other/1"):
        with pytest.raises(registry.RegistryError):
            registry.set_live(settings, bad)


def test_users_are_folded_in_as_serving_would(spark: SparkSession, model: als.Model) -> None:
    found = user_vectors(
        interactions(spark).selectExpr("*", "cast(uuid() AS string) AS event_id"),
        model.table,
        model.parameters,
    ).toArrow()
    vectors = dict(zip(model.table["pin_id"].to_pylist(), als.matrix(model.table), strict=True))
    given = interactions(spark).toPandas()
    assert sorted(found["user_id"].to_pylist()) == sorted(set(given["user_id"]))
    p = model.parameters
    for row in found.to_pylist():
        is_telling = given["action"].isin(list(p.actions))
        mine = given[(given["user_id"] == row["user_id"]) & is_telling]
        newest = mine["event_time"].max()
        strength: dict[str, float] = {}
        for event in mine.itertuples():
            age = (newest - event.event_time).total_seconds() * 1000
            recency = p.floor + (1 - p.floor) * 0.5 ** (age / p.half_life_ms)
            strength[event.pin_id] = strength.get(event.pin_id, 0) + p.actions.get(event.action, 0) * recency
        left, right = p.gram + p.regularization * np.eye(8), np.zeros(8)
        for pin, s in strength.items():
            if pin in vectors:
                y = vectors[pin].astype(np.float64)
                left = left + p.alpha * abs(s) * np.outer(y, y)
                right = right + (1 + p.alpha * abs(s)) * (s > 0) * y
        np.testing.assert_allclose(row["vector"], np.linalg.solve(left, right), rtol=1e-4, atol=1e-5)
        assert (row["event_count"], row["model_id"]) == (len(mine), als.UNREGISTERED)
