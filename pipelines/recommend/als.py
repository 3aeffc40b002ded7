"""Item vectors by alternating least squares for implicit feedback, on Spark.

Belongs here: from interactions to item vectors, their gram and their quality. Serving keeps no user vectors: it folds
a user in from the events of a second ago (`fold_in`). Does not belong here: where models are registered (`registry`).

A pin that nobody interacted with has no vector. Quantity does not count: how much of a thing fits a basket says little
about taste. Spark's weight of a pair is 1 + α |Σ weights of its actions|; a negative sum means no preference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from pipelines.errors import TidemarkError
from pipelines.recommend import evaluation, fold_in

UNREGISTERED = "unregistered"
"""The model id until `registry.log` gives one."""


class NothingToLearn(TidemarkError):
    """There are no interactions that a model could be learnt from."""


@dataclass(frozen=True)
class Hyperparameters:
    """How item vectors are learnt, and (`fold_in_*`) how users are folded in."""

    rank: int = 32
    iterations: int = 6
    regularization: float = 0.1
    alpha: float = 10.0
    seed: int = 7
    blocks: int = 2
    sample_users: int = 500
    fold_in_regularization: float = 0.1
    fold_in_alpha: float = 200.0
    fold_in_half_life_ms: int = 3_600_000
    fold_in_floor: float = 0.005
    fold_in_max_events: int = 500
    actions: dict[str, float] = field(default_factory=lambda: dict(fold_in.ACTION_WEIGHTS))

    def fold_in(self, gram: np.ndarray, model_id: str = UNREGISTERED) -> fold_in.Parameters:
        """What a base pins."""
        return fold_in.Parameters(
            model_id=model_id,
            gram=gram,
            regularization=self.fold_in_regularization,
            alpha=self.fold_in_alpha,
            half_life_ms=self.fold_in_half_life_ms,
            floor=self.fold_in_floor,
            max_events=self.fold_in_max_events,
            actions=self.actions,
        )

    def as_json(self) -> dict[str, Any]:
        """For a tracking server."""
        return asdict(self)


class Model(NamedTuple):
    """What a fit gives.

    Attributes:
        vectors: pin_id string, vector array<float>: a row for each pin that somebody interacted with.
        table: The same as Arrow, ordered by pin.
        parameters: To pin with a base; its `model_id` is given by `registry.log`.
        metrics: By name.
        hyperparameters: What it was fitted with.
    """

    vectors: DataFrame
    table: pa.Table
    parameters: fold_in.Parameters
    metrics: dict[str, float]
    hyperparameters: Hyperparameters


def fit(interactions: DataFrame, hyperparameters: Hyperparameters = Hyperparameters()) -> Model:
    """Learn item vectors from all interactions; measure them on what a sample of users did last.

    Args:
        interactions: user_id, pin_id, action, event_time; other columns are ignored. Deleted events are left out by
            the caller.

    Raises:
        NothingToLearn: No event has an action that says something.
    """
    told = _told(interactions, hyperparameters).persist()
    try:
        if told.isEmpty():
            raise NothingToLearn(
                "there are no interactions to learn from",
                where="pipelines.recommend.als",
                remedy="load interactions with one of the actions " + ", ".join(hyperparameters.actions),
            )
        metrics = _measured(told, hyperparameters)
        vectors = _vectors(told, hyperparameters).persist()
        table = vectors.orderBy("pin_id").toArrow()
        metrics |= {"interactions": float(told.count()), "pins": float(table.num_rows)}
    finally:
        told.unpersist()
    return Model(
        vectors, table, hyperparameters.fold_in(fold_in.gram_of(matrix(table))), metrics, hyperparameters
    )


def matrix(table: pa.Table) -> np.ndarray:
    """The vectors of a `Model.table` as float32[n, d]."""
    column = table.column("vector").combine_chunks()
    if not len(column):
        return np.empty((0, 0), np.float32)
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(column), -1)


def live(interactions: DataFrame) -> DataFrame:
    """Of the curated interactions those that a model learns from: what is gone, or about no pin, says nothing."""
    return interactions.filter("NOT is_deleted AND pin_id IS NOT NULL")


def vectors_plan(interactions: DataFrame, factorize: Callable[[DataFrame], DataFrame]) -> DataFrame:
    """The way from interactions to vectors as one plan, with something in the place of ALS: to be looked at, not run.

    Args:
        interactions: As `fit` takes them.
        factorize: From (user int, pin int, strength float) to (id int, features array<float>).
    """
    pairs = _pairs(_told(interactions, Hyperparameters()))
    pins = _numbered(pairs, "pin_id", "pin")
    return _by_pin(factorize(_in_numbers(pairs, pins)), pins)


def _told(interactions: DataFrame, hyperparameters: Hyperparameters) -> DataFrame:
    """What interactions say of tastes, each with its weight."""
    weight = _weight(hyperparameters).alias("weight")
    return interactions.select("user_id", "pin_id", "action", "event_time", weight).where("weight != 0")


def _weight(hyperparameters: Hyperparameters) -> Any:
    weights = [
        item for action, weight in hyperparameters.actions.items() for item in (F.lit(action), F.lit(weight))
    ]
    return F.coalesce(F.try_element_at(F.create_map(*weights), F.col("action")), F.lit(0.0))


def _vectors(told: DataFrame, hyperparameters: Hyperparameters) -> DataFrame:
    from pyspark.ml.recommendation import ALS

    pairs = _pairs(told).persist()
    pins = _numbered(pairs, "pin_id", "pin").persist()
    als = ALS(
        rank=hyperparameters.rank,
        maxIter=hyperparameters.iterations,
        regParam=hyperparameters.regularization,
        alpha=hyperparameters.alpha,
        seed=hyperparameters.seed,
        numUserBlocks=hyperparameters.blocks,
        numItemBlocks=hyperparameters.blocks,
        implicitPrefs=True,
        userCol="user",
        itemCol="pin",
        ratingCol="strength",
    )
    factors = als.fit(_in_numbers(pairs, pins)).itemFactors
    pairs.unpersist()
    return _by_pin(factors, pins)


def _pairs(told: DataFrame) -> DataFrame:
    return told.groupBy("user_id", "pin_id").agg(F.sum("weight").cast("float").alias("strength"))


def _in_numbers(pairs: DataFrame, pins: DataFrame) -> DataFrame:
    users = _numbered(pairs, "user_id", "user")
    return pairs.join(users, "user_id").join(pins, "pin_id").select("user", "pin", "strength")


def _by_pin(factors: DataFrame, pins: DataFrame) -> DataFrame:
    named = factors.join(pins, factors["id"] == pins["pin"])
    return named.select("pin_id", F.col("features").alias("vector"))


def _numbered(pairs: DataFrame, column: str, number: str) -> DataFrame:
    """Spark's ALS takes integers: the ids' dense ranks, the same for the same ids whatever their order was."""
    ids = pairs.select(column).distinct()
    return ids.select(column, F.row_number().over(Window.orderBy(column)).alias(number))


def _measured(told: DataFrame, hyperparameters: Hyperparameters) -> dict[str, float]:
    """Fit without the last visit of a sample of users, and see how much of it is foreseen."""
    newest = (
        told.where(F.col("action") == fold_in.PURCHASE)
        .groupBy("user_id")
        .agg(F.max("event_time").alias("newest"))
    )
    sample = newest.orderBy(F.xxhash64("user_id"), "user_id").limit(hyperparameters.sample_users).persist()
    start = F.unix_millis("newest") - evaluation.VISIT_MS
    held = F.col("newest").isNotNull() & (F.unix_millis("event_time") >= start)
    known = told.join(F.broadcast(sample), "user_id", "left").where(~held).drop("newest")
    events = (
        told.join(F.broadcast(sample), "user_id")
        .select("user_id", "pin_id", "action", F.unix_millis("event_time").alias("time_ms"))
        .toArrow()
    )
    tests = evaluation.cases(events)
    if not tests:
        return {"users": 0.0}
    table = _vectors(known, hyperparameters).toArrow()
    sample.unpersist()
    vectors = matrix(table)
    catalogue = evaluation.Catalogue(table.column("pin_id").cast(pa.binary()).to_pylist(), vectors)
    parameters = hyperparameters.fold_in(fold_in.gram_of(vectors))
    metrics = evaluation.evaluate(tests, catalogue, parameters)
    steady = parameters._replace(floor=1.0, alpha=hyperparameters.alpha)
    return metrics | {
        "recall_at_10_without_recency": evaluation.evaluate(tests, catalogue, steady)["recall_at_10"]
    }
