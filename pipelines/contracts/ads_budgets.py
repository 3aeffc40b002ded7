"""Topic `ads-budgets`: the columns of a row that stop or start spending, as they are after a commit of the repository.

    {"table": "campaigns", "key": "c1", "stand": 51, "event_time_ms": 1717243200000, "committed_at_ms": 1717243200040,
     "values": {"status": "paused", "daily_budget_usd_micros": 25000000, "lifetime_budget_usd_micros": null}}

The process `ads` writes them for itself, keyed by `<table>/<key>`: they are not archived, and of each row the newest is
kept. `values` has every column of `schema.LIGHT` of the table; `stand` is the version of the row's control columns
(`rows.stand`). Of a row the record with the greatest stand counts, in whatever order they come; a document that was
made of a row with that stand or a greater one is newer than the record.
"""

from __future__ import annotations

import orjson
import pyarrow as pa

from pipelines.ads.schema import LIGHT, Impossible, checked, light
from pipelines.contracts.contract import (
    MAX_VERSION,
    Contract,
    Record,
    Refused,
    Row,
    missing,
    read_integer,
    read_time,
    take_id,
    wrong_type,
)

BUDGETS = "ads-budgets"

ROW_SCHEMA = pa.schema(
    [
        pa.field("table", pa.string()),
        pa.field("key", pa.string()),
        pa.field("stand", pa.int64()),
        pa.field("values", pa.string()),  # a JSON object
        pa.field("event_time", pa.timestamp("us", tz="UTC")),  # when the source says that it happened
        pa.field("committed_at", pa.timestamp("us", tz="UTC")),  # when the repository had it
    ]
)


def _parse(record: Record, broker_time_ms: int) -> Row:
    table = record.get("table")
    if type(table) is not str or table not in LIGHT:
        raise Refused("unknown_table", f"table must be one of {', '.join(LIGHT)}", "table")
    key = take_id(record, "key")
    stand = read_integer(record, "stand", 1, MAX_VERSION)
    if stand is None:
        raise missing("stand", f"an integer from 1 to {MAX_VERSION}")
    text = orjson.dumps(_values(table, record), option=orjson.OPT_SORT_KEYS).decode()
    times = [read_time(record, name, broker_time_ms) for name in ("event_time_ms", "committed_at_ms")]
    return (table, key, stand, text, *times)


def _values(table: str, record: Record) -> Record:
    found = record.get("values")
    if type(found) is not dict:
        raise wrong_type(found, "values", "an object: column → value")
    if found.keys() != set(LIGHT[table]):
        raise Refused("missing_field", f"values must have exactly {', '.join(LIGHT[table])}", "values")
    values = {}
    for column in light(table):
        path = f"values.{column.name}"
        try:
            values[column.name] = checked(column, found[column.name])
        except Impossible as impossible:
            raise Refused(impossible.reason, f"{path}: {impossible}", path) from None
    return values


ADS_BUDGETS = Contract(
    topic=BUDGETS,
    version=1,
    key_field="key",
    row_schema=ROW_SCHEMA,
    parse=_parse,
    grows=(),
    examples=(
        {
            "table": "campaigns",
            "key": "c1",
            "stand": 51,
            "values": {
                "status": "paused",
                "daily_budget_usd_micros": 25_000_000,
                "lifetime_budget_usd_micros": None,
            },
            "event_time_ms": 1_588_334_400_000,
            "committed_at_ms": None,
        },
    ),
    is_compacted=True,
)
