"""Topic `ads-changes`: what changed in an ads account's tables, from its database or from a producer.

    {"table": "campaigns", "key": "c1", "version": 17, "event_time": "2024-05-01T12:00:00Z",
     "values": {"status": "paused"}, "transaction": {"id": "t9", "count": 3}}
    {"op": "delete", "table": "ads", "key": "a1", "version": 18}

A record sets the columns that `values` names, and leaves the others as they are; its version is the source's position
in its log. Columns that are not declared are kept. The records of a transaction become visible together: each says how
many different ones there are, or an end says it. The other shape is that of Debezium with JSON converters without
schemas, for PostgreSQL: `before`, `after`, `op` (c, u, d, r), `source` (table, lsn, ts_ms), `transaction` (id); and its
records about transactions (`status` BEGIN or END, `id`, `event_count`).

Of Debezium's id of a transaction, PostgreSQL's number before the colon counts: the rest is a position in the log, which
differs among the records of one transaction (`PostgresTransactionMonitor`). Integers of its time columns are
microseconds (`timestamp`), texts ISO 8601 (`timestamptz`). A change of Debezium's has the whole row: a declared column
that it does not name was dropped upstream, and is refused as one that was retyped is: that table's changes stop here
until the two agree, and no other's.
"""

from __future__ import annotations

from typing import Any

import orjson
import pyarrow as pa

from pipelines.ads.schema import DIMENSIONS, TABLES, TIME, Impossible, Table, checked
from pipelines.contracts.contract import (
    Contract,
    Record,
    Refused,
    Row,
    content_hash,
    missing,
    read_integer,
    read_object,
    read_time,
    take_id,
    take_op,
    wrong_type,
)

MAX_VERSION = 2**53 - 1
"""So that the sum of the versions of a row's columns, of which there may be 255, is a signed 64-bit integer."""

MAX_TRANSACTION_COUNT = 1_000_000
UNAVAILABLE = "__debezium_unavailable_value"
"""What Debezium writes for a long value that an UPDATE did not touch."""

_COLUMNS = {table.name: {column.name: column for column in table.columns} for table in TABLES.values()}

ROW_SCHEMA = pa.schema(
    [
        pa.field("table", pa.string()),  # null in what is said of a transaction alone
        pa.field("key", pa.string()),  # there the transaction's id
        pa.field("version", pa.int64()),
        pa.field("event_time", pa.timestamp("us", tz="UTC")),
        pa.field("is_deleted", pa.bool_()),
        pa.field("values", pa.string()),  # a JSON object; null in deletions
        pa.field("content_hash", pa.int64()),
        pa.field("transaction_id", pa.string()),
        pa.field("transaction_count", pa.int64()),  # null where the record does not know
    ]
)


def _parse(record: Record, broker_time_ms: int) -> Row:
    if _is_captured(record):
        return _captured(record, broker_time_ms)
    if "status" in record and "table" not in record:
        return _boundary(record)
    return _plain(record, broker_time_ms)


def _is_captured(record: Record) -> bool:
    """Debezium's envelope names its table in `source` alone; a producer's record may have a field `source`, too."""
    return "source" in record and "table" not in record


def transaction_of(value: bytes | None) -> str | None:
    """The transaction that a record names, whatever else is wrong with it; None where it names none."""
    try:
        record = read_object(value)
        if type(record.get("transaction")) is not dict:
            return None
        found = take_id(record["transaction"], "id")
        return _xid(found) if _is_captured(record) else found
    except Refused:
        return None


def _plain(record: Record, broker_time_ms: int) -> Row:
    table = _table(record.get("table"), "table")
    is_deleted = take_op(record)
    version = _version(record, "version", "")
    event_time = read_time(record, "event_time", broker_time_ms)
    transaction_id, transaction_count = _transaction(record)
    if transaction_id is not None and transaction_count is None:  # nothing else would ever say it
        raise missing("transaction.count", f"an integer from 1 to {MAX_TRANSACTION_COUNT}")
    key = take_id(record, "key")
    values = None if is_deleted else _values(table, key, record.get("values"), "values")
    return _row(table, key, version, event_time, values, transaction_id, transaction_count)


def _captured(record: Record, broker_time_ms: int) -> Row:
    source, op = record["source"], record.get("op")
    if type(source) is not dict:
        raise wrong_type(source, "source", "an object")
    table = _table(source.get("table"), "source.table")
    if op not in ("c", "u", "d", "r"):
        raise Refused("unknown_op", "op must be c, u, d or r; a truncated table is deleted row by row", "op")
    version = _version(source, "lsn", "source.")
    event_time = read_time(dict(source), "ts_ms", broker_time_ms)
    transaction_id, _ = _transaction(record)
    if transaction_id is not None:
        transaction_id = _xid(transaction_id)
    image_name = "before" if op == "d" else "after"
    image = record.get(image_name)
    if type(image) is not dict:
        raise wrong_type(image, image_name, "an object: the row")
    key = take_id(dict(image), table.key)
    values = None if op == "d" else _values(table, key, _whole(table, image), "after")
    return _row(table, key, version, event_time, values, transaction_id, None)


def _boundary(record: Record) -> Row:
    status = record["status"]
    if status not in ("BEGIN", "END"):
        raise Refused("unknown_op", "status must be BEGIN or END", "status")
    transaction_id = _xid(take_id(record, "id"))
    count = read_integer(record, "event_count", 0, MAX_TRANSACTION_COUNT) if status == "END" else None
    if status == "END" and count is None:
        raise missing("event_count", f"an integer from 0 to {MAX_TRANSACTION_COUNT}")
    hashed = content_hash([status, transaction_id, count])
    return (None, transaction_id, 1, None, False, None, hashed, transaction_id, count)


def _row(
    table: Table,
    key: str,
    version: int,
    event_time: int | None,
    values: dict[str, Any] | None,
    transaction_id: str | None,
    transaction_count: int | None,
) -> Row:
    text = None if values is None else orjson.dumps(values, option=orjson.OPT_SORT_KEYS).decode()
    hashed = content_hash([table.name, key, values])
    return (
        table.name,
        key,
        version,
        event_time,
        values is None,
        text,
        hashed,
        transaction_id,
        transaction_count,
    )


def _table(found: Any, path: str) -> Table:
    if type(found) is not str:
        raise wrong_type(found, path, f"one of {', '.join(TABLES)}")
    if found not in TABLES:
        shown = found if found.isascii() and found.isprintable() and len(found) <= 60 else "something else"
        raise Refused("unknown_table", f"{path} is {shown}; it must be one of {', '.join(TABLES)}", path)
    return TABLES[found]


def _version(record: Record, name: str, path: str) -> int:
    version = read_integer(record, name, 1, MAX_VERSION, path)
    if version is None:
        raise missing(path + name, f"an integer from 1 to {MAX_VERSION}: the position in the source's log")
    return version


def _transaction(record: Record) -> tuple[str | None, int | None]:
    found = record.get("transaction")
    if found is None:
        return None, None
    if type(found) is not dict:
        raise wrong_type(found, "transaction", "an object, or absent")
    count = read_integer(found, "count", 1, MAX_TRANSACTION_COUNT, "transaction.")
    return take_id(dict(found), "id"), count


def _whole(table: Table, image: Record) -> Record:
    """The columns of a row that Debezium has captured, without those that it did not read."""
    dropped = [column.name for column in table.sourced if column.name not in image]
    if dropped:
        raise Refused(
            "missing_field",
            f"the table {table.name} has no column {dropped[0]} any more; it is declared, and must be there",
            f"after.{dropped[0]}",
        )
    read = {name: value for name, value in image.items() if value not in (UNAVAILABLE, [UNAVAILABLE])}
    for column in table.columns:
        if column.type == TIME and type(time_us := read.get(column.name)) is int:
            read[column.name] = time_us // 1000
    return read


def _xid(transaction_id: str) -> str:
    """PostgreSQL's transaction of an id of Debezium's."""
    number = transaction_id.partition(":")[0]
    if not (number.isascii() and number.isdigit()):
        raise Refused(
            "wrong_type", "the transaction's id must begin with PostgreSQL's number", "transaction.id"
        )
    return f"xid:{number}"


def _values(table: Table, key: str, found: Any, path: str) -> dict[str, Any]:
    """The columns as the repository keeps them; the key may be among them, if it is the row's."""
    if type(found) is not dict:
        raise wrong_type(found, path, "an object: column → value")
    if found.get(table.key, key) != key:
        raise Refused("out_of_range", f"{path}.{table.key} must be the row's key", f"{path}.{table.key}")
    values, columns = {}, _COLUMNS[table.name]
    for name, value in found.items():
        if name == table.key:
            continue
        column = columns.get(name)
        try:
            values[name] = value if column is None else checked(column, value)
        except Impossible as impossible:
            raise Refused(
                impossible.reason, f"{path}.{name} of {table.name}: {impossible}", f"{path}.{name}"
            ) from None
    return values


ADS_CHANGES = Contract(
    topic="ads-changes",
    version=1,
    key_field="key",
    row_schema=ROW_SCHEMA,
    parse=_parse,
    grows=(),
    examples=(
        {
            "table": "campaigns",
            "key": "c1",
            "version": 17,
            "event_time": "2020-05-01T12:00:00Z",
            "values": {"status": "paused", "daily_budget_usd_micros": 25_000_000},
            "transaction": {"id": "t9", "count": 2},
        },
        {"op": "delete", "table": "ads", "key": "a1", "version": 18},
        {
            "op": "u",
            "before": None,
            "after": {
                "image_signature": "i1",
                "width_px": 800,
                "height_px": 600,
                "dominant_color": "#aa3311",
                "annotations": ["chair", "red"],
                "objects": [],
                "text_share": 0.02,
                "sharpness": 0.9,
                "safety": 1.0,
                "aesthetics": 0.7,
                "is_animated": False,
                "visual_embedding": [1.0] + [0.0] * (DIMENSIONS - 1),
            },
            "source": {"table": "images", "lsn": 24_023_128, "ts_ms": 1_600_000_000_000},
            "transaction": {"id": "571:24023200", "total_order": 1},
        },
        {"status": "END", "id": "571:24023200", "event_count": 1},
    ),
)
