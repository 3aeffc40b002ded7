"""What an event's `payload` may say, by its action, and what `features` may say: as the teams that send them declare.

    about: view                       # an action, or `features`
    owner: home-feed
    since: 2026-01-01T00:00:00Z       # it holds for records that the broker takes from then on
    fields:
      dwell_ms: {type: integer, least: 0, most: 86400000, doc: how long it was looked at}
      query: {type: text, most_bytes: 256, doc: what was searched for}
      rank: {type: integer, least: 1, is_required: true, doc: its place in the list, from 1}

Belongs here: reading the files of `conf/payloads/`, and deciding one payload. Does not belong here: which records have
one (`user_interactions`).

`view.yaml` is the first schema of what it is about, `view.v2.yaml` the next: which of them holds, the record's broker
time says, so that whoever decides again decides alike. A schema that was in force is only ever widened (a new optional
field, a wider bound); what would refuse a record that it took is a new file with a later `since`. What nobody has
declared is taken as it is.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import yaml

from pipelines.contracts.contract import Record, Refused, missing, wrong_type
from pipelines.errors import TidemarkError

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "payloads"
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
_FILE = re.compile(r"([a-z_]+)(?:\.v([1-9][0-9]*))?")
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


@functools.cache
def declared(folder: Path = FOLDER) -> Schemas:
    """The schemas of a folder.

    Raises:
        BadSchema: A file cannot be read, or says what may not be said.
    """
    from pipelines.contracts.user_interactions import ACTIONS

    found: dict[str, list[tuple[int, Schema]]] = {}
    for path in sorted(folder.glob("*.yaml")):
        matched = _FILE.fullmatch(path.stem)
        schema = _read(path, (*ACTIONS, FEATURES))
        if matched is None or matched[1] != schema.about:
            raise BadSchema(
                f"the file is about {schema.about}", where=path, remedy=f"call it {schema.about}.yaml"
            )
        found.setdefault(schema.about, []).append((int(matched[2] or 1), schema))
    return {about: _in_order(about, numbered, folder) for about, numbered in found.items()}


def _in_order(about: str, numbered: list[tuple[int, Schema]], folder: Path) -> tuple[Schema, ...]:
    numbered.sort(key=lambda one: one[0])
    if [number for number, _ in numbered] != list(range(1, len(numbered) + 1)):
        raise BadSchema(f"the schemas of {about} are not numbered one by one", where=folder)
    schemas = tuple(schema for _, schema in numbered)
    types = {field.name: field.type for schema in schemas for field in schema.fields.values()}
    for schema in schemas:
        for field in schema.fields.values():
            if field.type != types[field.name]:
                raise BadSchema(
                    f"{field.name} of {about} has had another type before: {field.type}",
                    where=folder,
                    remedy="give the field another name",
                )
    for before, after in itertools.pairwise(schemas):
        if after.since_ms <= before.since_ms:
            raise BadSchema(
                f"a later schema of {about} is in force no later than the one before",
                where=folder,
                remedy="give it a later `since`",
            )
    return schemas


def _read(path: Path, known: tuple[str, ...]) -> Schema:
    def bad(field: str, what: str, allowed: object) -> BadSchema:
        return BadSchema(f"{field}: {what}", where=path, remedy=f"use {allowed}")

    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise bad("the file", f"it cannot be read: {error}", "YAML") from error
    names = ("about", "owner", "since", "fields")
    if not isinstance(said, dict) or set(said) != set(names):
        raise bad("the file", "it has other fields", ", ".join(names))
    if said["about"] not in known:
        raise bad("about", f"{said['about']} is not known", f"one of {', '.join(known)}")
    if not isinstance(said["owner"], str) or not said["owner"].strip():
        raise bad("owner", "it is not a name", "the team that answers for it")
    since = said["since"]
    if not isinstance(since, datetime):
        raise bad("since", f"{since} is not a time", "a time in UTC, as 2026-12-01T00:00:00Z")
    if not isinstance(said["fields"], dict) or not said["fields"]:
        raise bad("fields", "there are none", "a mapping of names to types and bounds")
    fields = {name: _field(name, one, bad) for name, one in said["fields"].items()}
    at = since.replace(tzinfo=UTC) if since.tzinfo is None else since
    return Schema(said["about"], said["owner"].strip(), int(at.timestamp() * 1000), fields)


def _field(name: Any, said: Any, bad: Callable[[str, str, object], BadSchema]) -> Field:
    path = f"fields.{name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad(path, "it is no name", "lower-case letters, digits and _, at most 63, a letter first")
    if not isinstance(said, dict) or said.get("type") not in TYPES:
        raise bad(path, "it has no type that is known", f"type: one of {', '.join(TYPES)}")
    kind = said["type"]
    allowed = _ALWAYS | _BOUNDS[kind]
    if unknown := sorted(map(str, set(said) - allowed)):
        raise bad(f"{path}.{unknown[0]}", f"{kind} has no such bound", ", ".join(sorted(allowed)))
    for bound in ("least", "most"):
        held = said.get(bound, 0)
        if type(held) not in ((int, float) if kind == "number" else (int,)):
            raise bad(f"{path}.{bound}", f"{held} is not allowed", f"a number that {kind} can be")
    for bound in ("most_bytes", "most_texts"):
        if type(said.get(bound, 1)) is not int or said.get(bound, 1) < 1:
            raise bad(f"{path}.{bound}", f"{said[bound]} is not allowed", "a whole number from 1 on")
    choices = said.get("one_of", [])
    if not isinstance(choices, list) or not all(isinstance(one, str) and one for one in choices):
        raise bad(f"{path}.one_of", "it is not a list of texts", "a list of texts")
    if type(said.get("is_required", False)) is not bool:
        raise bad(f"{path}.is_required", f"{said['is_required']} is not allowed", "true or false")
    return Field(
        name=name,
        type=kind,
        is_required=said.get("is_required", False),
        least=said.get("least", -MAX_INTEGER if kind == "integer" else -math.inf),
        most=said.get("most", MAX_INTEGER if kind == "integer" else math.inf),
        most_bytes=said.get("most_bytes", MAX_BYTES),
        most_texts=said.get("most_texts", MAX_TEXTS),
        one_of=tuple(choices),
        doc=str(said.get("doc", "")),
    )


# ------------------------------------------------------------------------------------------------------ one payload


def read_payload(
    record: Record, name: str, about: str, broker_time_ms: int, schemas: Schemas | None = None
) -> str | None:
    """An optional payload as JSON with sorted keys; raises `Refused` where it breaks the schema that is in force.

    Args:
        record: The record.
        name: Of the field that holds it.
        about: The event's action, or `FEATURES`.
        broker_time_ms: Of the record.
        schemas: Those that are declared; None: the project's.
    """
    found = record.get(name)
    if found is None:
        record.pop(name, None)
        return None
    if type(found) is not dict:
        raise wrong_type(found, name, "an object, or absent")
    schema = in_force((declared() if schemas is None else schemas).get(about, ()), broker_time_ms)
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


def fields(schemas: Schemas | None = None) -> dict[str, Field]:
    """What can be said, by name: `payload.<action>.<field>` and `features.<field>`; as it was declared last."""
    found: dict[str, Field] = {}
    for about, of in (declared() if schemas is None else schemas).items():
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
