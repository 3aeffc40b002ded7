"""The indices of what users do: ``user_events``, a timeline by user, and ``pin_counts``, hourly sums by pin.

Belongs here: the declarations and their transforms. Both are made of the same rows: a counter is another way to read
the same events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import functions as F

from pipelines.contracts import ACTIONS
from pipelines.indexing import facts
from pipelines.indexing.spec import Family, IndexSpec, State, Sums, Timeline

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

STREAM = "user_interactions"
HOUR_MS = 3_600_000

INTERACTION = pa.schema(
    [
        ("pin_id", pa.string()),
        ("action", pa.string()),
        ("quantity", pa.int64()),
        ("value_usd_micros", pa.int64()),
        ("surface", pa.string()),
    ]
)
COUNTED = pa.schema([("user_id", pa.string()), ("action", pa.string())])


def interactions(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``user-interactions`` as events of their users."""
    return facts.frame(
        rows,
        family="interactions",
        identity=[F.col("user_id"), F.col("event_id")],
        key=F.col("user_id"),
        id=F.col("event_id"),
        time_ms=_time_ms(),
        version=[F.col("version")],
        is_deleted=F.col("is_deleted"),
        content_hash=F.col("content_hash"),
        payload=F.struct(*INTERACTION.names),
    )


def counts(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``user-interactions`` as counts of their pins: one for the action, by hour."""
    return facts.frame(
        rows,
        family="counts",
        identity=[F.col("user_id"), F.col("event_id")],
        key=F.coalesce(
            F.col("pin_id"), F.lit("")
        ),  # a tombstone names no pin: what it takes back, the fold knows
        id=F.col("event_id"),
        time_ms=_time_ms(),
        version=[F.col("version")],
        is_deleted=F.col("is_deleted"),
        content_hash=F.col("content_hash"),
        amounts=[F.coalesce(F.col("action") == action, F.lit(False)).cast("bigint") for action in ACTIONS],
        payload=F.struct(*COUNTED.names),
    )


def _time_ms():  # type: ignore[no-untyped-def]
    return F.coalesce(F.unix_millis("event_time"), F.lit(0))


USER_EVENTS = IndexSpec(
    name="user_events",
    families=(Family("interactions", INTERACTION, STREAM, interactions),),
    read=Timeline(),
)

PIN_COUNTS = IndexSpec(
    name="pin_counts",
    families=(Family("counts", COUNTED, STREAM, counts),),
    read=Sums(width_ms=HOUR_MS, amounts=ACTIONS),
)
