"""Every user's vector as a table, to look at: what serving would fold in at the cut.

Belongs here: running `fold_in` over all users on Spark. Serving never reads these: it folds a user in from the events
of a second ago. Does not belong here: the arithmetic (`fold_in`), and learning item vectors (`als`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines import column_lineage
from pipelines.recommend import fold_in

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

SCHEMA = "user_id string, vector array<float>, event_count int, model_id string"
_ARROW = pa.schema(
    {
        "user_id": pa.string(),
        "vector": pa.list_(pa.float32()),
        "event_count": pa.int32(),
        "model_id": pa.string(),
    }
)


def user_vectors(interactions: DataFrame, vectors: pa.Table, parameters: fold_in.Parameters) -> DataFrame:
    """One row a user who prefers a pin that has a vector; the model's user vectors.

    Args:
        interactions: Live ones: user_id, event_id, pin_id, action, event_time.
        vectors: The model's item vectors: pin_id, vector (float32[d]).
        parameters: The model's.

    Returns:
        user_id, vector (float32[d]), event_count (how many events are in it), model_id.
    """
    shared = interactions.sparkSession.sparkContext.broadcast(vectors)
    folding = _Folding(shared, parameters)

    def fold(events: pa.Table) -> pa.Table:
        return folding.row(events)

    needed = interactions.select("user_id", "event_id", "pin_id", "action", "event_time")
    return needed.groupBy("user_id").applyInArrow(fold, SCHEMA)


def plan(interactions: DataFrame, vectors: DataFrame) -> DataFrame:
    """The same as a plan that shows both inputs, to be looked at, not run: `user_vectors` hands them over itself.

    Args:
        interactions: As `user_vectors` takes them.
        vectors: pin_id, vector, model_id.
    """
    needed = interactions.select("user_id", "event_id", "pin_id", "action", "event_time")
    return column_lineage.opaque(
        needed.crossJoin(vectors.withColumnRenamed("pin_id", "vector_pin_id")), SCHEMA
    )


class _Folding:
    """Folds one user in; what all users of a task share is made once."""

    def __init__(self, shared: Any, parameters: fold_in.Parameters) -> None:
        self._shared, self._parameters = shared, parameters

    @functools.cached_property
    def _places(self) -> dict[bytes, int]:
        pins = self._shared.value.column("pin_id").cast(pa.binary()).to_pylist()
        return {pin: place for place, pin in enumerate(pins)}

    @functools.cached_property
    def _vectors(self) -> np.ndarray:
        column = self._shared.value.column("vector").combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1)

    def row(self, events: pa.Table) -> pa.Table:
        """One row; none where nothing is preferred."""
        times = events.column("event_time").cast(pa.timestamp("ms")).cast(pa.int64()).to_numpy()
        ids = events.column("event_id").cast(pa.binary()).to_pylist()
        order = sorted(range(len(ids)), key=lambda row: (times[row], ids[row]), reverse=True)
        newest = events.take(pa.array(order))
        told = fold_in.history(
            newest.column("pin_id"), newest.column("action"), times[order], self._parameters
        )
        strengths = fold_in.strengths(told, self._parameters)
        places = np.array([self._places.get(pin, -1) for pin in told.pins[: len(strengths)]], np.int64)
        has = places >= 0
        solved = fold_in.solve(self._vectors[places[has]], strengths[has], self._parameters)
        rows = [] if solved is None else [solved.astype(np.float32)]
        user = events.column("user_id")[0].as_py()
        made = [(user, vector, len(told.codes), self._parameters.model_id) for vector in rows]
        return pa.Table.from_pylist([dict(zip(_ARROW.names, row, strict=True)) for row in made], _ARROW)
