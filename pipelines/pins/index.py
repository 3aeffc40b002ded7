"""The index ``pins``: what a pin is, what it costs, and where it lies among the others.

Belongs here: the declaration and the transforms of its families. ``catalogue`` and ``offer`` come from ``pin-updates``
(and the curated tables of the same names); ``embedding`` is what the model computed, and comes with a base alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

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
    return _family(rows, "catalogue", CATALOGUE)


def offer(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``pin-updates`` that set the offer, and deletions."""
    return _family(rows, "offer", OFFER)


def _family(rows: DataFrame, family: str, schema: pa.Schema) -> DataFrame:
    declared = ", ".join(f"{family}.{name}" for name in schema.names)  # records may have learned more
    of_family = rows.filter(f"{family}_hash IS NOT NULL")
    return facts.frame(
        of_family,
        family=family,
        identity=["pin_id"],
        key="pin_id",
        version=["version"],
        is_deleted="is_deleted",
        content_hash=f"{family}_hash",
        payload=f"struct({declared})",
    )


def embedding(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``features.pin_vectors``: pin_id, vector (float32[DIMENSIONS])."""
    return facts.frame(
        rows,
        family="embedding",
        identity=["pin_id"],
        key="pin_id",
        version=["1"],
        is_deleted="false",
        content_hash="xxhash64(vector)",
        payload="struct(cast(vector AS array<float>) AS vector)",
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
