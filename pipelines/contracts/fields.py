"""Fields that a contract does not declare: what they are called, of which type, from when on.

Belongs here: the pure part of a contract's evolution: which type a new field has, how its values are read, what a
table's schema is with it, and whether a declaration is compatible with the one before. Does not belong here: where
learned fields are kept and who learns them (`pipelines.ingest.evolution`).

A field is learned from records once, with a time from which on it holds. A record that was taken before may say
anything; its value is in the column if it fits. From that time on another type is refused. So the decision about a
record stays a function of its bytes, its broker time and a list that only grows: whoever decides again, decides alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

MAX_FIELDS = 200

_COLUMN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
_ARROW = {
    "bigint": pa.int64(),
    "double": pa.float64(),
    "string": pa.string(),
    "boolean": pa.bool_(),
    "json": pa.string(),
}
TYPES = tuple(_ARROW)
"""The types that a learned field can have; `json` is an object or an array, as JSON text."""

_TYPE_OF_KINDS = {
    frozenset({"integer"}): "bigint",
    frozenset({"number"}): "double",
    frozenset({"integer", "number"}): "double",
    frozenset({"text"}): "string",
    frozenset({"boolean"}): "boolean",
    frozenset({"object"}): "json",
}
_IN_WORDS = {
    "bigint": "an integer",
    "double": "a number",
    "string": "a text",
    "boolean": "true or false",
    "json": "an object or an array",
}


class Field(NamedTuple):
    """A field that was learned, or forgotten.

    Attributes:
        path: Its name in the record; `catalogue.color` inside an object.
        type: One of `TYPES`; None where the field is no column any more, and is not checked.
        since_ms: From which broker time on this holds.
    """

    path: str
    type: str | None
    since_ms: int

    def described(self) -> str:
        """In words, for a refusal."""
        assert self.type is not None
        since = datetime.fromtimestamp(self.since_ms / 1000, UTC)
        return f"{_IN_WORDS[self.type]} ({self.type}) since {since:%FT%TZ}"


def newest(fields: Iterable[Field]) -> dict[str, Field]:
    """What was said last of each path."""
    return {field.path: field for field in fields}


def in_force(history: Sequence[Field], broker_time_ms: int) -> Field | None:
    """Of what was said of one path, in order, what holds for a record that was taken at this time."""
    return next((field for field in reversed(history) if field.since_ms <= broker_time_ms), None)


def kind(value: Any) -> str:
    """The JSON kind of a value that is not null."""
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "text"
        case _:
            return "object"


def fits(value: Any, type: str) -> bool:
    """Whether a value that is not null is of a type. An integer is a number, too."""
    match kind(value):
        case "integer":
            return type == "double" or (type == "bigint" and -(2**63) <= value < 2**63)
        case found:
            return _TYPE_OF_KINDS[frozenset({found})] == type


def converted(value: Any, type: str) -> Any:
    """A value as its column has it; None where it does not fit."""
    if value is None or not fits(value, type):
        return None
    if type == "double":
        return float(value)
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode() if type == "json" else value


def at(record: Mapping[str, Any], path: str) -> Any:
    """What a record has at a path; None where it has nothing there."""
    outer, _, name = path.rpartition(".")
    if outer:
        inner = record.get(outer)
        return inner.get(name) if type(inner) is dict else None
    return record.get(name)


def grown(schema: pa.Schema, fields: Iterable[Field]) -> pa.Schema:
    """A row schema with a column for each field that has a type; those inside an object are in its struct."""
    for field in newest(fields).values():
        if field.type is None or is_declared(schema, field.path):
            continue
        outer, _, name = field.path.rpartition(".")
        added = pa.field(name, _ARROW[field.type])
        if outer:
            place = schema.get_field_index(outer)
            struct = pa.struct([*schema.field(place).type.fields, added])
            schema = schema.set(place, schema.field(place).with_type(struct))
        else:
            schema = schema.append(added)
    return schema


def is_declared(schema: pa.Schema, path: str) -> bool:
    """Whether a row schema has a column, or a part of a struct, at a path."""
    return path in flat(schema)


def flat(schema: pa.Schema) -> dict[str, str]:
    """The type of every column by its path, those inside structs too."""
    found: dict[str, str] = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            found |= {f"{field.name}.{inner.name}": str(inner.type) for inner in field.type.fields}
        else:
            found[field.name] = str(field.type)
    return found


class Lesson(NamedTuple):
    """What is learned of new fields: `fields` to add, and why others are no columns, by path."""

    fields: tuple[Field, ...]
    passed_over: dict[str, str]


def learn(
    schema: pa.Schema,
    known: Iterable[Field],
    found: Mapping[str, Iterable[str]],
    since_ms: int,
    reserved: Iterable[str] = (),
) -> Lesson:
    """Types for fields that records have and nobody declared.

    Args:
        schema: What the contract declares.
        known: What was learned before.
        found: Path → the JSON kinds of its values.
        since_ms: From when on the new ones hold.
        reserved: Names of other columns that rows have.
    """
    fields: list[Field] = []
    passed_over: dict[str, str] = {}
    known = tuple(known)
    taken = {path.lower() for path in (*flat(schema), *schema.names, *reserved, *newest(known))}
    for path, kinds in sorted(found.items()):
        said = _TYPE_OF_KINDS.get(frozenset(kinds))
        if not _COLUMN_NAME.fullmatch(path.rpartition(".")[2]):
            passed_over[path] = "its name cannot be a column's: letters, digits and _ can, up to 63"
        elif path.lower() in taken:
            passed_over[path] = "another column has this name, but for upper and lower case"
        elif said is None:
            passed_over[path] = f"its values are of several kinds: {', '.join(sorted(kinds))}"
        elif len(newest(known)) + len(fields) >= MAX_FIELDS:
            passed_over[path] = f"{MAX_FIELDS} fields were learned already"
        else:
            fields.append(Field(path, said, since_ms))
            taken.add(path.lower())
    return Lesson(tuple(fields), passed_over)


def broken_promises(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """How a declaration breaks the one before: fields that are gone or of another type, each named with both."""
    return [
        f"{path} was {declared}, and now there is no such field"
        if path not in now
        else f"{path} was {declared}, and is now {now[path]}"
        for path, declared in sorted(before.items())
        if now.get(path) != declared
    ]
