"""Topics of the ads index's hot streams: the key of a document that a change concerns, and when what changed was said.

    {"ad_id": "a1", "seq": 17, "event_time_ms": 1717243200000, "committed_at_ms": 1717243200040}

The process `ads` writes them for itself, from its repository: they are not archived. A key may be lost or come twice:
the document is as the repository is, and the next base has all (docs/adr/0017). Each stream has a topic for changes and
one for what may wait: large fan-outs, refreshes and backfills.
"""

from __future__ import annotations

import pyarrow as pa

from pipelines.ads.schema import MAX_TIME_MS
from pipelines.contracts.contract import MAX_VERSION, Contract, Record, Row, read_integer, take_id

CONTROL, CONTROL_BACKFILL = "ads-control", "ads-control-backfill"
CONTENT, CONTENT_BACKFILL = "ads-content", "ads-content-backfill"

ROW_SCHEMA = pa.schema(
    [
        pa.field("ad_id", pa.string()),
        pa.field("seq", pa.int64()),  # number of the change in the repository; null of a refresh
        pa.field("event_time", pa.timestamp("us", tz="UTC")),  # when the source says that it happened
        pa.field("committed_at", pa.timestamp("us", tz="UTC")),  # when the repository had it
    ]
)


def _parse(record: Record, broker_time_ms: int) -> Row:
    ad_id = take_id(record, "ad_id")
    seq = read_integer(record, "seq", 0, MAX_VERSION)
    return (ad_id, seq, _time_us(record, "event_time_ms"), _time_us(record, "committed_at_ms"))


def _time_us(record: Record, name: str) -> int | None:
    """A time that says how fresh a document is; whatever a clock says, its key is not refused for it."""
    time_ms = read_integer(record, name, 0, MAX_TIME_MS)
    return None if time_ms is None else 1_000 * time_ms


def _keys(topic: str) -> Contract:
    return Contract(
        topic=topic,
        version=1,
        key_field="ad_id",
        row_schema=ROW_SCHEMA,
        parse=_parse,
        grows=(),
        examples=({"ad_id": "a1", "seq": 17, "event_time_ms": 1_588_334_400_000, "committed_at_ms": None},),
    )


ADS_KEYS = tuple(_keys(topic) for topic in (CONTROL, CONTROL_BACKFILL, CONTENT, CONTENT_BACKFILL))
