"""The index `pin_changes`: a timeline by pin of what was said of it, statement by statement.

Belongs here: the declaration and its transform. What a statement changed depends on those before it, and is worked out
by who reads them (`pipelines.users.inbox`). There is no horizon: it would take away what the next change is told by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.indexing import facts
from pipelines.indexing.spec import Family, IndexSpec, State, Timeline

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

STREAM = "pin_updates"
LAST_MS = 4_133_980_800_000
"""The end of 2100: no time is later."""

CATALOGUE, OFFER = "catalogue", "offer"
FIELDS = {
    CATALOGUE: ("title", "category", "department", "brand"),
    OFFER: ("price_usd_micros", "is_available"),
}
"""Family → its fields. A statement of one says nothing of the other's."""

CHANGE = pa.schema(
    [
        ("version", pa.int64()),
        ("family", pa.string()),
        ("is_gone", pa.bool_()),  # the record deletes the pin
        ("title", pa.string()),
        ("category", pa.string()),
        ("department", pa.string()),
        ("brand", pa.string()),
        ("price_usd_micros", pa.int64()),
        ("is_available", pa.bool_()),
    ]
)

_ID = "concat(lpad(lower(hex(version)), 16, '0'), ' ', told.family)"  # text, and in order by version
_SAID = ", ".join(
    f"CASE told.family WHEN '{family}' THEN {family}.{name} END AS {name}"
    for family, names in FIELDS.items()
    for name in names
)


def changes(rows: DataFrame, state: State) -> DataFrame:
    """Rows of `pin-updates` as events of their pins: one for each family that a record sets, two for a deletion.

    An event is what was said of (pin, version, family), and nothing takes it back: that a pin was deleted is an event,
    too. Its time is the record's, or else when it was taken. Of records with one version the rank of the family
    decides, as it does in the index `pins`; of those that say the same the earliest stands, so the time is in the rank.
    """
    told = rows.selectExpr(
        *("pin_id", "version", "is_deleted", "catalogue", "offer"),
        "unix_millis(coalesce(event_time, broker_time)) AS time_ms",
        "explode(filter(array(struct('catalogue' AS family, catalogue_hash AS content_hash),"
        " struct('offer' AS family, offer_hash AS content_hash)),"
        " one -> one.content_hash IS NOT NULL)) AS told",
    )
    return facts.frame(
        told,
        family="changes",
        identity=["pin_id", _ID],
        key="pin_id",
        id=_ID,
        time_ms="time_ms",
        version=["version", "cast(is_deleted AS bigint)", "told.content_hash", f"{LAST_MS} - time_ms"],
        is_deleted="false",
        content_hash="told.content_hash",
        payload=f"struct(version, told.family AS family, is_deleted AS is_gone, {_SAID})",
    )


PIN_CHANGES = IndexSpec(
    name="pin_changes",
    families=(Family("changes", CHANGE, STREAM, changes),),
    read=Timeline(),
)
