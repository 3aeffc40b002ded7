"""How contracts evolve while everything runs: learned fields, kept with the raw table, and declarations, compared.

Belongs here: where learned fields are kept (properties of the topic's raw table, one a field), who may change them, and
`Known`, which a process asks for a contract as it is now. Does not belong here: what a type is and what a decision is
(`pipelines.contracts`).

The archive stream, and each load, learns: a field that accepted records have and nobody declared gets the type of its
values. It holds from `LEAD_MS` later on. Until then every process has read it (`REFRESH_S`), so that all decide alike;
and of two that learn one field at once the later stands, before it means anything.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table import Table
from pyiceberg.types import BooleanType, DoubleType, LongType, PrimitiveType, StringType

from pipelines import lake
from pipelines.contracts import Contract, Field, extended
from pipelines.contracts import fields as learned
from pipelines.contracts.contract import RECORD
from pipelines.errors import TidemarkError
from pipelines.settings import Settings

log = logging.getLogger(__name__)

FIELD = "tidemark.field."
DECLARED = "tidemark.contract"
_ICEBERG: dict[str | None, PrimitiveType] = {
    "bigint": LongType(),
    "double": DoubleType(),
    "string": StringType(),
    "boolean": BooleanType(),
    "json": StringType(),
}
LEAD_MS = 60_000
REFRESH_S = 10.0
_ATTEMPTS = 10


class EvolutionError(TidemarkError):
    """A contract cannot change in this way."""


class Shown(NamedTuple):
    """A field of a contract, for a person.

    Attributes:
        path: Its name; dotted inside an object.
        type: As a column's.
        origin: `declared`, `learned` or `forgotten`.
        since_ms: From which broker time on a learned one holds; None for a declared one.
    """

    path: str
    type: str | None
    origin: str
    since_ms: int | None


def current(settings: Settings, contract: Contract) -> Contract:
    """The contract with what was learned up to now; reads the catalog."""
    table = lake.open_table(settings, _raw(contract))
    return extended(contract, _fields(table)) if table is not None else contract


def learn(settings: Settings, contract: Contract, found: Mapping[str, Iterable[str]]) -> tuple[Field, ...]:
    """Learn fields that records have and nobody declared; what is known already stays as it is.

    Args:
        settings: Where the lake is.
        contract: Declared, or extended.
        found: Path → JSON kinds of its values.

    Returns:
        The fields that this call learned.
    """

    def more(known: tuple[Field, ...], now_ms: int) -> learned.Lesson:
        new = {path: kinds for path, kinds in found.items() if path not in learned.newest(known)}
        return learned.learn(contract.row_schema, known, new, now_ms + LEAD_MS, RECORD.names)

    lesson = _change(settings, contract, more) if found else learned.Lesson((), {})
    for path, why in lesson.passed_over.items():
        log.warning("%s: the field %s becomes no column: %s", contract.topic, path, why)
    for field in lesson.fields:
        log.info("%s: learned the field %s: %s", contract.topic, field.path, field.type)
    return lesson.fields


def learn_from(settings: Settings, contract: Contract, found: Mapping[str, Iterable[str]]) -> None:
    """`learn`, of records that are taken whether or not it succeeds."""
    try:
        learn(settings, contract, found)
    except EvolutionError as error:  # they will be seen again
        log.warning("%s: fields were not learned: %s", contract.topic, error)


def add(settings: Settings, contract: Contract, path: str, type: str) -> Field:
    """Say of which type a field is, before records do, or instead of what was learned; holds a minute later.

    Raises:
        EvolutionError: There is no such type, the contract declares the field, or its name cannot be a column's.
    """
    if type not in learned.TYPES:
        raise EvolutionError(f"there is no type {type!r}", remedy=f"use one of {', '.join(learned.TYPES)}")
    declared = learned.flat(contract.row_schema)
    outer = path.rpartition(".")[0]
    if path in declared and path not in learned.newest(contract.fields):
        raise EvolutionError(
            f"{contract.topic} v{contract.version} declares {path} as {declared[path]}, so it cannot be {type}",
            remedy="use another name, or a new version of the contract, which is a new topic",
        )
    if outer not in contract.grows:
        named = ", ".join(f"{name}.NAME" if name else "NAME" for name in contract.grows)
        remedy = f"use {named}" if named else "no field of its becomes a column"
        raise EvolutionError(f"{path} is in no part that grows", where=contract.topic, remedy=remedy)

    def more(known: tuple[Field, ...], now_ms: int) -> learned.Lesson:
        if path in learned.newest(known):
            return learned.Lesson((Field(path, type, now_ms + LEAD_MS),), {})
        kinds = {"bigint": {"integer"}, "double": {"number"}, "string": {"text"}, "json": {"object"}}
        found = {path: kinds.get(type, {type})}
        return learned.learn(contract.row_schema, known, found, now_ms + LEAD_MS, RECORD.names)

    lesson = _change(settings, contract, more)
    if lesson.passed_over:
        raise EvolutionError(f"{path} cannot be a column: {lesson.passed_over[path]}", where=contract.topic)
    return lesson.fields[0]


def forget(settings: Settings, contract: Contract, path: str) -> Field:
    """Make a learned field no column any more, and let records say of it what they want; holds a minute later.

    Raises:
        EvolutionError: Nothing was learned of it.
    """

    def more(known: tuple[Field, ...], now_ms: int) -> learned.Lesson:
        if path not in learned.newest(known):
            raise EvolutionError(
                f"{contract.topic} has learned no field {path}",
                remedy=", ".join(learned.newest(known)) or "it has learned none",
            )
        return learned.Lesson((Field(path, None, now_ms + LEAD_MS),), {})

    return _change(settings, contract, more).fields[0]


def declare(settings: Settings, contract: Contract) -> None:
    """Note what a contract declares, where its raw table is, once it is compatible with what was noted before.

    Raises:
        EvolutionError: A field is gone, or has another type, than it had when it was declared or learned.
    """
    for _ in range(_ATTEMPTS):
        table = lake.open_table(settings, _raw(contract))
        if table is None:
            return
        before = json.loads(table.properties.get(DECLARED, "{}"))
        now = learned.flat(contract.row_schema)
        _require_compatible(contract, before, now, _fields(table))
        if before == {"version": contract.version, "fields": now}:
            return
        said = json.dumps({"version": contract.version, "fields": now})
        if _committed(table, {DECLARED: said}):
            return
    raise _too_busy(contract)


def grow(settings: Settings, spec: lake.TableSpec, contract: Contract) -> None:
    """Give a table, if it is there, the columns of the fields that were learned; old snapshots stay readable.

    A field that was learned again with another type is another column of the same name: older snapshots have it as it
    was. A forgotten one goes.
    """
    table = lake.open_table(settings, spec.name)
    if table is None:
        return
    declared = {column.name for column in lake.TABLES[spec.name].columns}
    schema = table.schema()
    there = set(schema.column_names)
    mine = there | {
        column.name for column in spec.columns
    }  # a record's own fields are columns of one of its tables
    wanted = {
        path: field.type
        for path, field in learned.newest(contract.fields).items()
        if path.rpartition(".")[0] in declared or path in mine
    }
    gone = [path for path in wanted if path in there and schema.find_type(path) != _ICEBERG.get(wanted[path])]
    missing = [path for path, kind in wanted.items() if kind and (path in gone or path not in there)]
    if gone:
        with table.update_schema(allow_incompatible_changes=True) as update:
            for path in gone:
                update.delete_column(tuple(path.split(".")))
    if missing:
        with table.update_schema() as update:
            for path in missing:
                update.add_column(tuple(path.split(".")), _ICEBERG[wanted[path]], doc="learned from records")


def shown(settings: Settings, contract: Contract) -> list[Shown]:
    """The fields of a contract: those that it declares, then what was learned."""
    declared = learned.flat(contract.row_schema)
    table = lake.open_table(settings, _raw(contract))
    known = learned.newest(_fields(table)) if table is not None else {}
    return [
        *(Shown(path, kind, "declared", None) for path, kind in declared.items()),
        *(
            Shown(path, field.type, "learned" if field.type else "forgotten", field.since_ms)
            for path, field in known.items()
            if path not in declared
        ),
    ]


class Known:
    """Contracts as they are now, for a process that runs for long: read again every few seconds."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held: dict[str, tuple[Contract, float]] = {}
        self._lock = threading.Lock()

    def __call__(self, contract: Contract) -> Contract:
        """The contract with what was learned. Where the catalog is away, as it was when it was read last."""
        with self._lock:
            held = self._held.get(contract.topic)
            if held is not None and time.monotonic() - held[1] < REFRESH_S:
                return held[0]
            try:
                now = current(self._settings, contract)
            except (
                Exception
            ) as error:  # catalogs fail in ways of their own; what streams miss, the next base has
                if held is None:
                    raise
                log.warning("the fields of %s could not be read again: %s", contract.topic, error)
                now = held[0]
            self._held[contract.topic] = now, time.monotonic()
            return now


def _raw(contract: Contract) -> str:
    return contract.raw_table


def _fields(table: Table) -> tuple[Field, ...]:
    """What was learned, in the order of when it began to hold."""
    said = [
        Field(name.removeprefix(FIELD), kind, since_ms)
        for name, history in table.properties.items()
        if name.startswith(FIELD)
        for kind, since_ms in json.loads(history)
    ]
    return tuple(sorted(said, key=lambda field: (field.since_ms, field.path)))


def _history(fields: Iterable[Field], path: str) -> str:
    return json.dumps([[field.type, field.since_ms] for field in fields if field.path == path])


def _change(
    settings: Settings, contract: Contract, more: Callable[[tuple[Field, ...], int], learned.Lesson]
) -> learned.Lesson:
    """Add to what was learned."""
    for _ in range(_ATTEMPTS):
        table = lake.open_table(settings, _raw(contract))
        if table is None:
            raise EvolutionError(
                "nothing was archived yet", where=_raw(contract), remedy="`tidemark up`, or load something"
            )
        known = _fields(table)
        lesson = more(known, time.time_ns() // 1_000_000)
        grown = (*known, *lesson.fields)
        if not lesson.fields or _committed(
            table, {FIELD + field.path: _history(grown, field.path) for field in lesson.fields}
        ):
            return lesson
    raise _too_busy(contract)


def _committed(table: Table, properties: dict[str, str]) -> bool:
    """Set properties of a table; False where another commit won, and it should be read again."""
    try:
        with table.transaction() as change:
            change.set_properties(properties)
    except CommitFailedException:
        return False
    return True


def _too_busy(contract: Contract) -> EvolutionError:
    return EvolutionError(
        f"the table changed {_ATTEMPTS} times meanwhile", where=_raw(contract), remedy="try again"
    )


def _require_compatible(
    contract: Contract, before: Mapping[str, object], now: Mapping[str, str], known: tuple[Field, ...]
) -> None:
    named = f"{contract.topic} v{contract.version}"
    if before and before["version"] != contract.version:
        raise EvolutionError(
            f"{_raw(contract)} holds records of v{before['version']}, not of v{contract.version}",
            where=named,
            remedy="a new version of a contract is a new topic",
        )
    promised = dict(before.get("fields", {}))  # type: ignore[call-overload]
    broken = learned.broken_promises(promised, now)
    as_arrow = {"bigint": "int64", "boolean": "bool", "json": "string"}
    for field in learned.newest(known).values():
        if field.type and field.path in now and now[field.path] != as_arrow.get(field.type, field.type):
            broken.append(f"{field.path} was learned as {field.type}, and is now declared {now[field.path]}")
    if broken:
        raise EvolutionError(
            f"the contract breaks what it promised: {'; '.join(broken)}",
            where=named,
            remedy="keep the field as it was and add another one; or make a new version, which is a new topic",
        )
