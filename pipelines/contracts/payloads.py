"""What an event's `payload` may say, by its action, and what `features` may say: as the teams that send them declare.

    about: view                       # an action, or `features`
    owner: home-feed
    since: 2026-01-01T00:00:00Z       # it holds for records that the broker takes from then on
    fields:
      dwell_ms: {type: integer, least: 0, most: 86400000, doc: how long it was looked at}
      query: {type: text, most_bytes: 256, doc: what was searched for}
      rank: {type: integer, least: 1, is_required: true, doc: its place in the list, from 1}

Belongs here: what a schema may say, and deciding one payload by it; both pure. Where schemas are kept, and how they may
change, is ``payload_files``'. Does not belong here either: which records have a payload (`user_interactions`).

Which schema of an action holds, the record's broker time says, so that whoever decides again decides alike. What nobody
has declared is taken as it is.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from pipelines.contracts.contract import Record, Refused, missing, wrong_type
from pipelines.errors import TidemarkError

FEATURES = "features"
MAX_BYTES = 4_096
"""Of a payload, and of features, as JSON."""
MAX_TEXTS = 100
MAX_INTEGER = 2**53
"""What every reader of JSON can hold."""

TYPES: Mapping[str, pa.DataType] = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "text": pa.string(),
    "boolean": pa.bool_(),
    "texts": pa.list_(pa.string()),
}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_NUMBERS: Mapping[str, tuple[tuple[type, ...], float]] = {
    "integer": ((int,), MAX_INTEGER),
    "number": ((int, float), sys.float_info.max),
}
"""What a bound of a type may be, and how far from 0."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_YEAR = 2100
_BOUNDS: Mapping[str, frozenset[str]] = {
    "integer": frozenset({"least", "most"}),
    "number": frozenset({"least", "most"}),
    "text": frozenset({"most_bytes", "one_of"}),
    "boolean": frozenset(),
    "texts": frozenset({"most_bytes", "one_of", "most_texts"}),
}
_ALWAYS = frozenset({"type", "doc", "is_required"})


class BadSchema(TidemarkError):
    """A file of `conf/payloads/` declares something that cannot be."""


class Field(NamedTuple):
    """A declared field.

    Attributes:
        name: In the payload.
        type: One of `TYPES`.
        is_required: Whether every payload has it.
        least: Of a number.
        most: Of a number.
        most_bytes: Of a text, in UTF-8.
        most_texts: Of a list.
        one_of: The texts that it may be; none: any.
        doc: What it means.
    """

    name: str
    type: str
    is_required: bool
    least: float
    most: float
    most_bytes: int
    most_texts: int
    one_of: tuple[str, ...]
    doc: str


class Schema(NamedTuple):
    """What is declared about one action, or about features, from a broker time on."""

    about: str
    owner: str
    since_ms: int
    fields: Mapping[str, Field]


Schemas = Mapping[str, tuple[Schema, ...]]
"""About what → the schemas, each later one in force later."""


Bad = Callable[[str, str, object], BadSchema]
"""Which field, what is wrong with it, and what is allowed, as the error."""


def parse(said: Any, where: object, known: Collection[str]) -> Schema:
    """A schema as a file says it.

    Args:
        said: What was read.
        where: The file, for the error.
        known: What a schema may be about.

    Raises:
        BadSchema: It says what may not be said; with the field, and what is allowed.
    """

    def bad(field: str, what: str, allowed: object) -> BadSchema:
        return BadSchema(f"{field}: {what}", where=where, remedy=f"use {allowed}")

    names = ("about", "owner", "since", "fields")
    if not isinstance(said, dict) or set(said) != set(names):
        raise bad("the file", "it has other fields", ", ".join(names))
    if said["about"] not in known:
        raise bad("about", f"{said['about']} is not known", f"one of {', '.join(known)}")
    if not isinstance(said["owner"], str) or not said["owner"].strip():
        raise bad("owner", "it is not a name", "the team that answers for it")
    if not isinstance(said["fields"], dict) or not said["fields"]:
        raise bad("fields", "there are none", "a mapping of names to types and bounds")
    since_ms = _since_ms(said["since"], bad)
    fields = {name: _field(name, one, bad) for name, one in said["fields"].items()}
    return Schema(said["about"], said["owner"].strip(), since_ms, fields)


def _since_ms(said: Any, bad: Bad) -> int:
    if not isinstance(said, datetime) or not _EPOCH.year <= said.year <= _LAST_YEAR:
        allowed = f"a time in UTC from 1970 to the end of {_LAST_YEAR}, as 2026-12-01T00:00:00Z"
        raise bad("since", f"{said} is not such a time", allowed)
    at = said.replace(tzinfo=UTC) if said.tzinfo is None else said
    return (at - _EPOCH) // timedelta(milliseconds=1)


def time_of(at_ms: int) -> datetime:
    """A time in UTC, exactly."""
    return _EPOCH + timedelta(milliseconds=at_ms)


def _field(name: Any, said: Any, bad: Bad) -> Field:
    path = f"fields.{name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad(path, "it is no name", "lower-case letters, digits and _, at most 63, a letter first")
    kind = said.get("type") if isinstance(said, dict) else None
    if not isinstance(kind, str) or kind not in TYPES:
        raise bad(path, "it has no type that is known", f"type: one of {', '.join(TYPES)}")
    allowed = _ALWAYS | _BOUNDS[kind]
    if unknown := sorted(map(str, set(said) - allowed)):
        raise bad(f"{path}.{unknown[0]}", f"{kind} has no such bound", ", ".join(sorted(allowed)))
    if type(said.get("is_required", False)) is not bool:
        raise bad(f"{path}.is_required", f"{said['is_required']} is not allowed", "true or false")
    for bound in ("most_bytes", "most_texts"):
        if type(said.get(bound, 1)) is not int or said.get(bound, 1) < 1:
            raise bad(f"{path}.{bound}", f"{said[bound]} is not allowed", "a whole number from 1 on")
    said = said | {"one_of": _choices(said, path, bad), "doc": str(said.get("doc", ""))}
    unbounded = _unbounded(name, kind)
    field = unbounded._replace(
        **{key: said.get(key, getattr(unbounded, key)) for key in allowed | {"one_of"}}
    )
    if kind in _NUMBERS:
        _require_range(said, field, path, bad)
    for place, choice in enumerate(field.one_of):
        if (size := len(choice.encode("utf-8", "replace"))) > field.most_bytes:
            what = f"it has {size} bytes, and most_bytes is {field.most_bytes}"
            raise bad(f"{path}.one_of[{place}]", what, "a shorter text or a greater most_bytes")
    return field


def _require_range(said: Mapping[str, Any], field: Field, path: str, bad: Bad) -> None:
    types, furthest = _NUMBERS[field.type]
    for bound in ("least", "most"):
        held = said.get(bound, 0)
        if type(held) not in types or not abs(held) <= furthest:
            what = f"a number that {field.type} can be, from {-furthest} to {furthest}"
            raise bad(f"{path}.{bound}", f"{held} is not allowed", what)
    if field.least > field.most:
        what = f"least is {field.least} and most is {field.most}, so no value is allowed"
        raise bad(path, what, "a least that is not above most")


def _choices(said: Mapping[str, Any], path: str, bad: Bad) -> tuple[str, ...]:
    if "one_of" not in said:
        return ()
    choices = said["one_of"]
    is_list = isinstance(choices, list) and all(isinstance(one, str) and one for one in choices)
    if not is_list or not choices or len(set(choices)) < len(choices):
        raise bad(f"{path}.one_of", "it is not a list of texts", "a list of texts, each once, at least one")
    return tuple(choices)


def _unbounded(name: str, kind: str) -> Field:
    furthest = MAX_INTEGER if kind == "integer" else math.inf
    return Field(name, kind, False, -furthest, furthest, MAX_BYTES, MAX_TEXTS, (), "")


def plain(field: Field) -> dict[str, Any]:
    """A field as a file says it: its type, and what limits it."""
    unbounded = _unbounded(field.name, field.type)
    limits = {name: getattr(field, name) for name in ("is_required", *sorted(_BOUNDS[field.type]))}
    return {"type": field.type} | {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in limits.items()
        if value != getattr(unbounded, name)
    }


# ------------------------------------------------------------------------------------------------------ one payload


def read_payload(record: Record, name: str, about: str, broker_time_ms: int, schemas: Schemas) -> str | None:
    """An optional payload as JSON with sorted keys; raises `Refused` where it breaks the schema that is in force.

    Args:
        record: The record.
        name: Of the field that holds it.
        about: The event's action, or `FEATURES`.
        broker_time_ms: Of the record.
        schemas: Those that are declared.
    """
    found = record.get(name)
    if found is None:
        record.pop(name, None)
        return None
    if type(found) is not dict:
        raise wrong_type(found, name, "an object, or absent")
    schema = in_force(schemas.get(about, ()), broker_time_ms)
    if schema is not None:
        _require_kept(found, name, schema)
    written = orjson.dumps(found, option=orjson.OPT_SORT_KEYS)
    if len(written) > MAX_BYTES:
        raise Refused(
            "too_long", f"{name} has {len(written)} bytes of JSON; at most {MAX_BYTES} are allowed", name
        )
    return written.decode()


def in_force(schemas: tuple[Schema, ...], broker_time_ms: int) -> Schema | None:
    """The schema that holds for a record that was taken at a time."""
    return next((one for one in reversed(schemas) if one.since_ms <= broker_time_ms), None)


def fields(schemas: Schemas) -> dict[str, Field]:
    """What can be said, by name: `payload.<action>.<field>` and `features.<field>`; as it was declared last."""
    found: dict[str, Field] = {}
    for about, of in schemas.items():
        prefix = about if about == FEATURES else f"payload.{about}"
        found |= {f"{prefix}.{field.name}": field for schema in of for field in schema.fields.values()}
    return found


def value_of(said: Mapping[str, Any] | None, field: Field) -> Any:
    """What a payload says of a field; None where it says nothing, or, before there was a schema, something else."""
    value: Any = None if said is None else said.get(field.name)
    kind = type(value)
    if field.type == "number":
        return float(value) if kind in (int, float) else None
    if field.type == "integer":
        return value if kind is int and abs(value) <= MAX_INTEGER else None
    if field.type == "texts":
        return value if kind is list and all(type(one) is str for one in value) else None
    return value if kind is {"text": str, "boolean": bool}[field.type] else None


def _require_kept(found: Mapping[str, Any], name: str, schema: Schema) -> None:
    for key in found:
        if key not in schema.fields:
            raise Refused(
                "unknown_field",
                f"{name}.{key[:60]} is not declared for {schema.about}; "
                f"it may say {', '.join(schema.fields)} (ask {schema.owner} for another)",
                f"{name}.{key[:60]}",
            )
    for field in schema.fields.values():
        value = found.get(field.name)
        if value is not None:
            _require_fit(value, f"{name}.{field.name}", field)
        elif field.is_required:
            raise missing(f"{name}.{field.name}", rule(field))


def _require_fit(value: Any, path: str, field: Field) -> None:
    if field.type == "boolean":
        if type(value) is not bool:
            raise wrong_type(value, path, "true or false, or absent")
    elif field.type in ("integer", "number"):
        if type(value) is not int and (field.type == "integer" or type(value) is not float):
            raise wrong_type(value, path, rule(field))
        if not field.least <= value <= field.most:
            raise Refused("out_of_range", f"{path} is {value}; it must be {rule(field)}", path)
    elif field.type == "text":
        _require_text(value, path, field)
    else:
        if type(value) is not list or len(value) > field.most_texts:
            raise wrong_type(value, path, rule(field))
        for place, one in enumerate(value):
            _require_text(one, f"{path}[{place}]", field)


def _require_text(value: Any, path: str, field: Field) -> None:
    if type(value) is not str:
        raise wrong_type(value, path, rule(field))
    if field.one_of and value not in field.one_of:
        raise Refused("out_of_range", f"{path} is {value[:60]!r}; it must be {rule(field)}", path)
    if (size := len(value.encode())) > field.most_bytes:
        raise Refused("too_long", f"{path} has {size} bytes; it must be {rule(field)}", path)
    if "\x00" in value:
        raise Refused("nul_character", f"{path} holds the character NUL; it is not allowed in a text", path)


def rule(field: Field) -> str:
    """What a field may be, in words: `an integer from 1 to 9`."""
    if field.type == "boolean":
        return "true or false"
    if field.type in ("integer", "number"):
        kind = "an integer" if field.type == "integer" else "a number"
        return f"{kind} from {field.least} to {field.most}"
    one = (
        f"one of {', '.join(field.one_of)}" if field.one_of else f"a text of at most {field.most_bytes} bytes"
    )
    return one if field.type == "text" else f"a list of at most {field.most_texts}, each {one}"
