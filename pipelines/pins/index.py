"""The index ``pins``: what a pin is, what it costs, and where it lies among the others.

Belongs here: the declaration and the transforms of its families. ``catalogue`` and ``offer`` come from ``pin-updates``
(and the curated tables of the same names); ``embedding`` is what the model computed, and comes with a base alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import functions as F

from pipelines.indexing import facts
from pipelines.indexing.spec import Documents, Family, Forward, IndexSpec, Inverted, State, Vector

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

DIMENSIONS = 32
STREAM = "pin_updates"

CATALOGUE = pa.schema(
    [("title", pa.string()), ("category", pa.string()), ("department", pa.string()), ("brand", pa.string())]
)
OFFER = pa.schema([("price_usd_micros", pa.int64()), ("is_available", pa.bool_())])
EMBEDDING = pa.schema([("vector", pa.list_(pa.float32()))])


def catalogue(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``pin-updates`` that set the catalogue, and deletions."""
    return _family(rows, "catalogue")


def offer(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``pin-updates`` that set the offer, and deletions."""
    return _family(rows, "offer")


def _family(rows: DataFrame, family: str) -> DataFrame:
    of_family = rows.filter(F.col(f"{family}_hash").isNotNull())
    return facts.frame(
        of_family,
        family=family,
        identity=[F.col("pin_id")],
        key=F.col("pin_id"),
        version=[F.col("version")],
        is_deleted=F.col("is_deleted"),
        content_hash=F.col(f"{family}_hash"),
        payload=F.col(family),
    )


def embedding(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``features.pin_vectors``: pin_id, vector (float32[DIMENSIONS])."""
    return facts.frame(
        rows,
        family="embedding",
        identity=[F.col("pin_id")],
        key=F.col("pin_id"),
        version=[F.lit(1)],
        is_deleted=F.lit(False),
        content_hash=F.xxhash64("vector"),
        payload=F.struct(F.col("vector").cast("array<float>").alias("vector")),
    )


PINS = IndexSpec(
    name="pins",
    families=(
        Family("catalogue", CATALOGUE, STREAM, catalogue),
        Family("offer", OFFER, STREAM, offer),
        Family("embedding", EMBEDDING, None, embedding),
    ),
    read=Documents(presence="catalogue"),
    access=(
        Forward("catalogue", ("title", "category", "department", "brand")),
        Forward("offer", ("price_usd_micros", "is_available")),
        Inverted("category", "catalogue", "category"),
        Inverted("department", "catalogue", "department"),
        Vector("embedding", "embedding", "vector", DIMENSIONS),
    ),
)
