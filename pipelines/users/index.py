"""The indices of what users do: ``user_events``, a timeline by user, and ``pin_counts``, hourly sums by pin.

Belongs here: the declarations and their transforms. Both are made of the same rows: a counter is another way to read
the same events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.contracts import ACTIONS
from pipelines.indexing import facts
from pipelines.indexing.spec import Family, IndexSpec, State, Sums, Timeline
from pipelines.users.indexed import CONTENT_HASH, INDEXED, RELATION, VERSION

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

STREAM = "user_interactions"
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
TIME_MS = "coalesce(unix_millis(event_time), 0)"

INTERACTION = pa.schema(
    [
        ("pin_id", pa.string()),
        ("action", pa.string()),
        ("quantity", pa.int64()),
        ("value_usd_micros", pa.int64()),
        ("surface", pa.string()),
        ("ad_id", pa.string()),
        ("campaign_id", pa.string()),
        ("advertiser_id", pa.string()),
        ("category", pa.string()),
        ("view_type", pa.string()),
        ("payload", pa.string()),
        *INDEXED,
    ]
)
"""What an event says, and what was known of its pin when it was indexed."""
OWN = pa.schema([field for field in INTERACTION if field.name not in INDEXED.names])
"""What an event says itself."""
FEATURES = pa.schema([("features", pa.string())])

COUNTED = pa.schema([("user_id", pa.string()), ("action", pa.string())])


def interactions(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``user-interactions``, with their pins looked up, as events of their users."""
    of_indexed = {"version": VERSION, "content_hash": CONTENT_HASH}
    return _of_events(rows, "interactions", "content_hash", INTERACTION, **of_indexed)


def features(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``user-interactions`` as what was found out later of their events."""
    return _of_events(rows, "features", "features_hash", FEATURES)


def counts(rows: DataFrame, state: State) -> DataFrame:
    """Rows of ``user-interactions`` as counts of their pins: one for the action, by hour; none without a pin."""
    return _of_events(
        rows,
        "counts",
        "content_hash",
        COUNTED,
        key="coalesce(pin_id, '')",  # what a tombstone, or an event without a pin, takes back, the fold knows
        amounts=[f"coalesce(action = '{action}' AND pin_id IS NOT NULL, false)" for action in ACTIONS],
    )


def _of_events(rows: DataFrame, family: str, hashed: str, payload: pa.Schema, **said: Any) -> DataFrame:
    """Facts about events, of the rows that say something of the family: those with the hash of it."""
    usual = {"key": "user_id", "version": ["version"], "content_hash": hashed}
    return facts.frame(
        rows.filter(f"{hashed} IS NOT NULL"),
        family=family,
        identity=["user_id", "event_id"],
        id="event_id",
        time_ms=TIME_MS,
        is_deleted="is_deleted",
        payload=f"struct({', '.join(payload.names)})",
        **(usual | said),
    )


USER_EVENTS = IndexSpec(
    name="user_events",
    families=(
        Family("interactions", INTERACTION, STREAM, interactions, looks_up=(RELATION,)),
        Family("features", FEATURES, STREAM, features),
    ),
    read=Timeline(age_ms=90 * DAY_MS),
)

PIN_COUNTS = IndexSpec(
    name="pin_counts",
    families=(Family("counts", COUNTED, STREAM, counts),),
    read=Sums(width_ms=HOUR_MS, amounts=ACTIONS),
)
