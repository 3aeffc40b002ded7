"""What a contract is, and the one pure function that decides whether a record keeps it.

Belongs here: the machinery that every topic's contract is made of: reading JSON strictly, reading one field, hashing
content, deciding a whole Arrow table. Does not belong here: the fields of a topic (its own module), Spark (`frames`).

The decision is a function of the record's bytes and the broker's time and of nothing else, so that the archive
stream, the hot streams, the collector, a load and a later look at a dead letter all decide alike.

Compatibility. A contract has a `version`. Within a version it may only be widened: a new optional field, a new action
at the end of the list, a greater limit. Whatever would refuse or reinterpret a record that was accepted before is a new
version, and a new version is a new topic (`user-interactions-v2`): raw keeps its old records, and they stay decidable.
Fields that it does not know are allowed and count in the content hash, so a producer may be ahead of it; they become
typed columns when they have been learned (`fields`, `extended`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import fields as learned
from pipelines.contracts.fields import Field

MAX_VALUE_BYTES = 65_536
MAX_ID_BYTES = 512
MAX_VERSION = 2**61 - 1
MAX_QUANTITY = 10**9
MAX_USD_MICROS = 10**15
MAX_AHEAD_MS = 3_600_000
"""How far an event's time may be ahead of the broker's time (of a load's, for loads)."""

_read, _written, _SORTED = orjson.loads, orjson.dumps, orjson.OPT_SORT_KEYS
_from_iso = datetime.fromisoformat
_sha256 = hashlib.sha256
_signed = struct.Struct(">q").unpack_from
_MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_END_US = int((datetime(2101, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()) * 1_000_000
_TIME_RULE = "ISO 8601 in UTC (2024-05-01T12:00:00Z) or milliseconds since 1970, from 1970 to the end of 2100"

PROVENANCE = pa.schema(
    [
        pa.field("topic_id", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("load_id", pa.string()),
        pa.field("load_row", pa.int64()),
        pa.field("broker_time", pa.timestamp("us", tz="UTC")),
    ]
)
"""Where a record came from: a place in Kafka, or a row of a load; and the broker's time, or the load's."""

RECORD = pa.schema([*PROVENANCE, pa.field("key", pa.binary()), pa.field("value", pa.binary())])
"""What `decode_table` reads: provenance and the original bytes."""

VERDICT = pa.schema([pa.field("reason", pa.string()), pa.field("detail", pa.string())])


class Refusal(NamedTuple):
    """Why a record is not accepted.

    Attributes:
        reason: A stable slug, to count and filter by; one of `REASONS`.
        detail: What was found and what is allowed, for a person.
        field: The JSON field that it is about, dotted; None where it is the record as a whole.
    """

    reason: str
    detail: str
    field: str | None = None


REASONS = {
    "empty_value": "the record has no value, or one of no bytes",
    "too_large": "the value is longer than the contract allows",
    "broken_utf8": "the value is not UTF-8",
    "broken_json": "the value is not JSON",
    "too_deep": "the JSON is nested too deeply",
    "not_finite": "a number is NaN, infinite or too great for a double",
    "lone_surrogate": "a text holds half of a UTF-16 surrogate pair",
    "duplicate_key": "an object names a key twice",
    "not_an_object": "the JSON is not an object",
    "missing_field": "a required field is absent or null",
    "wrong_type": "a field has another JSON type",
    "empty_id": "an id is the empty text",
    "nul_character": "a text holds the character NUL",
    "too_long": "a text has too many bytes",
    "out_of_range": "a number or a time is outside the allowed range",
    "bad_time": "a time is not ISO 8601 in UTC or milliseconds",
    "time_ahead": "a time is too far ahead of the broker's",
    "unknown_action": "the contract does not name this action",
    "unknown_op": "op is neither upsert nor delete",
    "unknown_table": "the contract does not name this table",
    "no_family": "a record sets no column family",
    "contradiction": "fields of the record do not go together",
    "retyped_field": "a field has another type than it had before",
    "unknown_field": "a payload has a field that its schema does not declare",
}


class Refused(Exception):
    """Carries a `Refusal` out of a contract's `parse`; `decode` turns it into a value."""

    def __init__(self, reason: str, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.refusal = Refusal(reason, detail, field)


Record = dict[str, Any]
Row = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Contract:
    """The schema of a topic.

    Attributes:
        topic: The Kafka topic.
        version: The contract's version; see the module about compatibility.
        key_field: The field by which producers key their records. A record's own key is never trusted.
        row_schema: The columns of an accepted record.
        parse: From a record's JSON object and the broker's time in ms to the values of `row_schema`, times in
            microseconds since 1970; raises `Refused`. It may change the object, but not what it does not know in it.
        examples: Records that keep the contract.
        grows: The objects of a record whose unknown fields become columns; '' is the record itself.
        fields: The fields that were learned; see `extended`.
        is_compacted: Whether Kafka keeps of each key the newest record, and no other for long, instead of all records
            for some time.
    """

    topic: str
    version: int
    key_field: str
    row_schema: pa.Schema
    parse: Callable[[Record, int], Row]
    examples: tuple[Mapping[str, Any], ...] = ()
    grows: tuple[str, ...] = ("",)
    fields: tuple[Field, ...] = ()
    is_compacted: bool = False

    @property
    def name(self) -> str:
        """The topic's name as a table's."""
        return self.topic.replace("-", "_")

    @property
    def raw_table(self) -> str:
        """The table that holds every record of the topic."""
        return f"raw.{self.name}"

    def decide(self, record: Record, broker_time_ms: int) -> Row:
        """A record's row, learned fields too; raises `Refused`."""
        row = self.parse(record, broker_time_ms)
        return _with_learned(self, record, row, broker_time_ms) if self.fields else row


def extended(contract: Contract, fields: Iterable[Field]) -> Contract:
    """A declared contract with what was learned of fields that it does not declare.

    Its rows have a column for each of them (null in tombstones, and where a record says nothing); a record that was
    taken after a field was learned, and says it with another type, is refused.
    """
    fields = tuple(fields)
    return _extended(contract, fields) if fields else contract


@functools.lru_cache(maxsize=64)
def _extended(contract: Contract, fields: tuple[Field, ...]) -> Contract:
    undeclared = tuple(f for f in fields if not learned.is_declared(contract.row_schema, f.path))
    return replace(contract, row_schema=learned.grown(contract.row_schema, undeclared), fields=undeclared)


def _with_learned(contract: Contract, record: Record, row: Row, broker_time_ms: int) -> Row:
    names, deleted_at, columns = _plan(contract)
    extra: dict[str, Any] = dict.fromkeys(names[len(row) :])
    if row[deleted_at]:
        return (*row, *extra.values())
    for column in columns:
        value = learned.at(record, column.path)
        if value is None:
            continue
        held = learned.in_force(column.history, broker_time_ms)
        if held is not None and held.type is not None and not learned.fits(value, held.type):
            raise Refused(
                "retyped_field",
                f"{column.path} is {_kind(value)}; it has been {held.described()}",
                column.path,
            )
        target = extra if column.struct is None else row[column.struct]
        if column.type is not None and target is not None:
            target[column.name] = learned.converted(value, column.type)
    return (*row, *extra.values())


class _Learned(NamedTuple):
    """Where a learned field goes: its column, or the struct (by its place in the row) that it is a part of."""

    path: str
    name: str
    struct: int | None
    type: str | None
    history: tuple[Field, ...]


@functools.lru_cache(maxsize=64)
def _plan(contract: Contract) -> tuple[list[str], int, tuple[_Learned, ...]]:
    names = contract.row_schema.names
    columns = []
    for path, field in learned.newest(contract.fields).items():
        outer, _, name = path.rpartition(".")
        history = tuple(one for one in contract.fields if one.path == path)
        columns.append(_Learned(path, name, names.index(outer) if outer else None, field.type, history))
    return names, names.index("is_deleted"), tuple(columns)


class Decoded(NamedTuple):
    """A decided table.

    Attributes:
        accepted: The row schema and provenance.
        refused: The record, reason and detail.
        new_fields: Path → JSON kinds, of fields that accepted records have and the contract does not know; empty
            unless it was asked for.
    """

    accepted: pa.Table
    refused: pa.Table
    new_fields: Mapping[str, set[str]] = {}


def decode(contract: Contract, value: bytes | None, broker_time_ms: int) -> dict[str, Any] | Refusal:
    """Decide about one record. Never raises, whatever the bytes are.

    Args:
        contract: Of the topic that the record is from.
        value: The record's value, as the broker has it.
        broker_time_ms: When the broker (or the load) took it.

    Returns:
        The row (`contract.row_schema`; times as aware datetimes), or why there is none.

    Examples:
        >>> from pipelines.contracts import USER_INTERACTIONS
        >>> decode(USER_INTERACTIONS, b"[1]", 0)
        Refusal(reason='not_an_object', detail='the value is an array; an object is needed', field=None)
    """
    try:
        row = contract.decide(read_object(value), broker_time_ms)
    except Refused as refused:
        return refused.refusal
    return {
        field.name: _EPOCH + timedelta(microseconds=item)
        if item is not None and pa.types.is_timestamp(field.type)
        else item
        for field, item in zip(contract.row_schema, row, strict=True)
    }


def decode_table(
    contract: Contract, records: pa.Table | pa.RecordBatch, *, finds_new_fields: bool = False
) -> Decoded:
    """Decide about many records: `decode` for each, with everything around it in whole columns.

    Args:
        contract: Of the topic that the records are from.
        records: The columns of `RECORD`; others are ignored.
        finds_new_fields: Whether to look for fields that the contract does not know.
    """
    values = records.column("value").to_pylist()
    taken = (
        pc.floor(pc.divide(_microseconds(records.column("broker_time")), 1000)).cast(pa.int64()).to_pylist()
    )
    decide = contract.decide if contract.fields else contract.parse
    known = _known_names(contract) if finds_new_fields else {}
    deleted_at = contract.row_schema.get_field_index("is_deleted")
    new_fields: dict[str, set[str]] = {}
    rows: list[Row] = []
    places: list[int] = []
    refusals: list[Refusal] = []
    refused_places: list[int] = []
    for place, (value, broker_time_ms) in enumerate(zip(values, taken, strict=True)):
        try:
            record = read_object(value)
            row = decide(record, broker_time_ms)
            rows.append(row)
            places.append(place)
            if known and not row[deleted_at]:
                for outer, names in known.items():
                    _note_new(record, outer, names, new_fields)
        except Refused as refused:
            refusals.append(refused.refusal)
            refused_places.append(place)
    source = pa.table({field.name: _as(records.column(field.name), field.type) for field in RECORD})
    kept = source if not refusals else source.take(pa.array(places, pa.int64()))
    left = source.take(pa.array(refused_places, pa.int64()))
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(contract.row_schema)
    accepted = {
        field.name: _column(items, field.type)
        for field, items in zip(contract.row_schema, columns, strict=True)
    }
    accepted |= {name: kept.column(name) for name in PROVENANCE.names}
    refused_columns = {name: left.column(name) for name in RECORD.names}
    refused_columns["reason"] = pa.array([refusal.reason for refusal in refusals], pa.string())
    refused_columns["detail"] = pa.array([refusal.detail for refusal in refusals], pa.string())
    return Decoded(
        pa.table(accepted, schema=accepted_schema(contract)),
        pa.table(refused_columns, schema=REFUSED_SCHEMA),
        new_fields,
    )


def _known_names(contract: Contract) -> dict[str, frozenset[str]]:
    """For each object that grows the names that are known in it, forgotten ones too."""
    paths = [*learned.flat(contract.row_schema), *(field.path for field in contract.fields)]
    known = {
        outer: {p.rpartition(".")[2] for p in paths if p.rpartition(".")[0] == outer}
        for outer in contract.grows
    }
    if "" in known:
        known[""] |= {"op", "version", *contract.row_schema.names}
    return {outer: frozenset(names) for outer, names in known.items()}


def _note_new(record: Record, outer: str, known: frozenset[str], found: dict[str, set[str]]) -> None:
    held = record.get(outer) if outer else record
    if type(held) is not dict or held.keys() <= known:
        return
    for name in held.keys() - known:
        if held[name] is not None:
            found.setdefault(f"{outer}.{name}" if outer else name, set()).add(learned.kind(held[name]))


def accepted_schema(contract: Contract) -> pa.Schema:
    """The columns of `Decoded.accepted`."""
    return pa.schema([*contract.row_schema, *PROVENANCE])


REFUSED_SCHEMA = pa.schema([*RECORD, *VERDICT])


def _microseconds(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())


def _as(column: pa.ChunkedArray | pa.Array, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    return column if column.type == kind else column.cast(kind)


def _column(items: Iterable[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(items, kind)


# ------------------------------------------------------------------------------------------------ the value as a whole


def read_object(value: bytes | None) -> Record:
    """The JSON object that a record's value is; raises `Refused`. The usual record takes the short way."""
    if value and len(value) <= MAX_VALUE_BYTES and b"\\" not in value:
        try:
            record = _read(value)
            if type(record) is dict and value.count(b":") == _written(record).count(b":"):
                return record
        except (orjson.JSONDecodeError, TypeError, RecursionError):
            pass
    record = read_json(value)
    if (
        type(record) is not dict
    ):  # exact types throughout: JSON gives no others, true is no integer, and it is quick
        raise Refused("not_an_object", f"the value is {_kind(record)}; an object is needed")
    return record


def read_json(value: bytes | None, max_bytes: int = MAX_VALUE_BYTES) -> Any:
    """Strict JSON: no NaN, no lone surrogate, no key twice; raises `Refused`.

    orjson lets the last of two equal keys win and says nothing. But then the text has more colons than what was read
    has when it is written out again (a colon can also be spelt `\\u003a`), and that costs little to see; whatever
    looks so is read again, slowly, by a parser that sees each key.
    """
    if not value:
        raise Refused("empty_value", 'the value is empty; a deletion is written as {"op": "delete", …}')
    if len(value) > max_bytes:
        raise Refused("too_large", f"the value has {len(value)} bytes; at most {max_bytes} are allowed")
    try:
        parsed = _read(value)
    except orjson.JSONDecodeError as error:
        raise _why_broken(value, str(error)) from None
    try:
        written = _written(parsed)
    except (TypeError, RecursionError):
        raise Refused("too_deep", "the JSON is nested too deeply; at most 200 levels are allowed") from None
    if value.count(b":") != written.count(b":") or (b"\\" in value and b"\\u003" in value):
        _require_distinct_keys(value)
    return parsed


def _require_distinct_keys(value: bytes) -> None:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            shown = _shown(twice)
            raise Refused("duplicate_key", f"the key {shown} is there twice; each may be there once", twice)
        return found

    try:
        json.loads(value, object_pairs_hook=distinct, parse_int=str)
    except RecursionError:
        raise Refused("too_deep", "the JSON is nested too deeply; at most 200 levels are allowed") from None


def _why_broken(value: bytes, said: str) -> Refused:
    """The precise reason for what orjson does not read."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Refused(
            "broken_utf8", f"the value is not UTF-8: byte {error.start} is 0x{value[error.start]:02x}"
        )
    try:
        parsed = json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=str)
    except Refused as refused:
        return refused
    except RecursionError:
        return Refused("too_deep", "the JSON is nested too deeply; at most 200 levels are allowed")
    except ValueError:
        return Refused("broken_json", f"the value is not JSON: {said}")
    if (where := _surrogate_in(parsed)) is not None:
        return Refused(
            "lone_surrogate",
            f"{where or 'the value'} holds a lone surrogate; use valid Unicode",
            where or None,
        )
    return Refused("broken_json", f"the value is not JSON: {said}")


def _no_constant(name: str) -> None:
    raise Refused("not_finite", f"{name} is no JSON; a number must be finite")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise Refused("not_finite", f"the number {_shown(text)} is too great; a number must be finite")
    return number


def _surrogate_in(value: Any) -> str | None:
    """The dotted path of the first text with a lone surrogate; '' for the value itself, None if there is none."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        path, item = waiting.pop()
        if isinstance(item, str) and not _is_unicode(item):
            return path
        if isinstance(item, dict):
            for name, inner in item.items():
                if not _is_unicode(name):
                    return path
                waiting.append((f"{path}.{name}" if path else name, inner))
        elif isinstance(item, list):
            waiting.extend((f"{path}[{place}]", inner) for place, inner in enumerate(item))
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ one field


def take_id(record: Record, name: str) -> str:
    """A required id, taken out of the record: non-empty text of at most 512 bytes of UTF-8 without NUL."""
    found = record.pop(name, None)
    if type(found) is str and 0 < len(found) <= 128 and "\x00" not in found:
        return found
    if type(found) is not str:
        raise _not(found, name, "a text of 1 to 512 bytes")
    if not found:
        raise Refused("empty_id", f"{name} is empty; it must be a text of 1 to {MAX_ID_BYTES} bytes", name)
    if len(found.encode()) > MAX_ID_BYTES:
        raise Refused(
            "too_long", f"{name} has {len(found.encode())} bytes; at most {MAX_ID_BYTES} are allowed", name
        )
    if "\x00" in found:
        raise Refused("nul_character", f"{name} holds the character NUL; it is not allowed in a text", name)
    return found


def read_text(record: Record, name: str, max_bytes: int, path: str = "") -> str | None:
    """An optional text; null is absent."""
    found = record.get(name)
    if found is None:
        record.pop(name, None)
        return None
    full = path + name
    if type(found) is not str:
        raise _not(found, full, f"a text of at most {max_bytes} bytes, or absent")
    if 4 * len(found) > max_bytes and len(found.encode()) > max_bytes:
        raise Refused(
            "too_long", f"{full} has {len(found.encode())} bytes; at most {max_bytes} are allowed", full
        )
    if "\x00" in found:
        raise Refused("nul_character", f"{full} holds the character NUL; it is not allowed in a text", full)
    return found


def read_integer(record: Record, name: str, low: int, high: int, path: str = "") -> int | None:
    """An optional integer; null is absent. 1.0 and true are no integers."""
    found = record.get(name)
    if found is None:
        record.pop(name, None)
        return None
    if type(found) is int and low <= found <= high:
        return found
    if type(found) is not int:
        raise _not(found, path + name, f"an integer from {low} to {high}")
    raise Refused(
        "out_of_range", f"{path}{name} is {found}; it must be an integer from {low} to {high}", path + name
    )


def take_version(record: Record) -> int:
    """The record's version, taken out of it; 1 where it is absent."""
    if "version" not in record:
        return 1
    version = read_integer(record, "version", 1, MAX_VERSION)
    record.pop("version", None)
    return 1 if version is None else version


def take_op(record: Record) -> bool:
    """Whether the record is a tombstone; `op` is taken out of it."""
    if "op" not in record:
        return False
    op = record.pop("op")
    if op is None or op == "upsert":
        return False
    if op == "delete":
        return True
    if type(op) is not str:
        raise _not(op, "op", '"upsert" or "delete", or absent')
    raise Refused("unknown_op", f'op is {_shown(op)}; it must be "upsert" or "delete", or absent', "op")


def read_time(record: Record, name: str, broker_time_ms: int) -> int | None:
    """An optional time in microseconds; in the record it becomes that number, however it was spelt."""
    found = record.get(name)
    if found is None:
        record.pop(name, None)
        return None
    if type(found) is str:
        time_us = _iso_us(found, name)
    elif type(found) is int:
        time_us = found * 1000
    else:
        raise _not(found, name, _TIME_RULE)
    if not 0 <= time_us < _END_US:
        raise Refused("out_of_range", f"{name} is {_shown(found)}; it must be {_TIME_RULE}", name)
    if time_us > (broker_time_ms + MAX_AHEAD_MS) * 1000:
        taken = _EPOCH + timedelta(milliseconds=broker_time_ms)
        raise Refused(
            "time_ahead",
            f"{name} is {_shown(found)}; it must be at most one hour ahead of when it was taken ({taken:%FT%TZ})",
            name,
        )
    record[name] = time_us
    return time_us


def _iso_us(text: str, name: str) -> int:
    if (
        text[10:11] == "T"
        and (text[-1] == "Z" or text[-6:] == "+00:00")
        and len(text) <= 35
        and text.isascii()
    ):
        try:
            return (_from_iso(text) - _EPOCH) // _MICROSECOND
        except (ValueError, OverflowError):
            pass
    raise Refused("bad_time", f"{name} is {_shown(text)}; it must be {_TIME_RULE}", name)


def content_hash(payload: Any) -> int:
    """A signed 64-bit hash of what a family says: equal exactly if its canonical JSON (sorted keys) is."""
    hashed: int = _signed(_sha256(_written(payload, None, _SORTED)).digest())[0]
    return hashed


def missing(name: str, allowed: str) -> Refused:
    """A required field is absent."""
    return Refused("missing_field", f"{name} is missing; it must be {allowed}", name)


def _not(found: Any, name: str, allowed: str) -> Refused:
    if found is None:
        return missing(name, allowed)
    return Refused("wrong_type", f"{name} is {_kind(found)}; it must be {allowed}", name)


def wrong_type(found: Any, name: str, allowed: str) -> Refused:
    """A field is there, but of another type (or it is null, and required)."""
    return _not(found, name, allowed)


def _kind(found: Any) -> str:
    match found:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int():
            return f"the integer {found}"
        case float():
            return f"the number {found!r}"
        case str():
            return f"the text {_shown(found)}"
        case list():
            return "an array"
        case _:
            return "an object"


def _shown(found: Any, limit: int = 60) -> str:
    """A value for a message: quoted, cut, and never broken Unicode."""
    text = json.dumps(found) if not isinstance(found, str) else json.dumps(found[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"
