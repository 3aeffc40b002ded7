"""What the columns of a source mean: a small file that makes a record of each row, and a first draft of it.

Belongs here: reading a mapping, the Spark SQL that it stands for, suggesting one. Does not belong here: reading files
(`sources`), what a record must be (its contract).

    topic: user-interactions
    fields:
      user_id: CustomerID                       # a column, or any Spark SQL expression over the columns
      event_id: concat(InvoiceNo, ':', _row)    # _row names the row: shop/2024-05-01.csv:17
      action: {value: purchase}                 # the same in every record
      event_time: {from: InvoiceDate, type: time, format: yyyy-MM-dd HH:mm:ss, zone: Europe/London}
      quantity: {from: Quantity, type: number}

All columns are text; so is `_row`, the name of the file in what is loaded and the number of the row in it, which stays
what it is when more files are loaded. A field of an object is named with a dot (`offer.price_usd_micros`). `type` says
what a field is in the record's JSON: `text`, `number`, `boolean` or `time`. What cannot be read as that stays the text
that it is, so that the contract refuses the record and says what was there: a mapping loses no row and repairs none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import yaml

from pipelines import strict_yaml
from pipelines.contracts import Contract, contract_of
from pipelines.errors import TidemarkError
from pipelines.ingest.sources import LoadError
from pipelines.lake import quoted

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

TYPES = ("text", "number", "boolean", "time")
ROW, LOAD_ROW = OWN = ("_row", "_load_row")
"""What is added to the columns of a source: a row's name, for mappings; and its number in the load."""
TIME_FORMAT = "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX"
"""As Spark writes the time of a session in UTC for a contract."""
_NUMBER = r"^-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][-+]?[0-9]+)?$"
_OPTIONS = {"from", "value", "type", "format", "zone"}


class BadMapping(TidemarkError):
    """A mapping cannot be used."""


class Field(NamedTuple):
    """One field of a record.

    Attributes:
        expression: Spark SQL over the columns; None where ``value`` is the same in every record.
        type: One of `TYPES`.
        format: Of a time, as Spark writes it; None: as the contract reads it.
        zone: Of a time that names none.
        value: The constant.
    """

    expression: str | None
    type: str = "text"
    format: str | None = None
    zone: str = "UTC"
    value: Any = None


class FieldMapping(NamedTuple):
    """What makes a record of each row."""

    contract: Contract
    fields: dict[str, Field]

    @property
    def uses_row(self) -> bool:
        """Whether an expression names `_row`."""
        return any(ROW in (field.expression or "") for field in self.fields.values())

    def meaning(self) -> str:
        """The same for mappings that make the same records, however they are written."""
        return json.dumps({name: self.fields[name] for name in sorted(self.fields)}, default=str)


def read(path: Path) -> FieldMapping:
    """Read a mapping file.

    Raises:
        BadMapping: It cannot be read, or names something that is not known; with what is.
    """
    try:
        said = strict_yaml.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadMapping(f"the mapping cannot be read: {error}", where=path) from error
    if not isinstance(said, dict) or not isinstance(said.get("fields"), dict) or "topic" not in said:
        raise BadMapping("a mapping has `topic` and `fields`", where=path, remedy="see docs/operate.md")
    unknown = set(said) - {"topic", "fields"}
    if unknown:
        raise BadMapping(f"a mapping has no {', '.join(sorted(unknown))}", where=path)
    contract = contract_of(str(said["topic"]))
    fields = {str(name): _field(str(name), value, path) for name, value in said["fields"].items()}
    if contract.key_field not in fields:
        raise BadMapping(f"the field {contract.key_field} is missing", where=path, remedy="add it")
    return FieldMapping(contract, fields)


def _field(name: str, said: Any, path: Path) -> Field:
    if isinstance(said, str):
        return Field(said)
    if not isinstance(said, dict) or not set(said) <= _OPTIONS or ("from" in said) == ("value" in said):
        raise BadMapping(
            f"{name}: {said!r} is no field",
            where=path,
            remedy="write a column or expression, {value: …}, or {from: …, type: …, format: …, zone: …}",
        )
    if "value" in said:
        return Field(None, value=said["value"])
    kind = str(said.get("type", "text"))
    if kind not in TYPES:
        raise BadMapping(
            f"{name}: there is no type {kind!r}", where=path, remedy=f"one of {', '.join(TYPES)}"
        )
    return Field(str(said["from"]), kind, said.get("format"), str(said.get("zone", "UTC")))


def by_name(contract: Contract, columns: Sequence[str], where: Path | str) -> FieldMapping:
    """The mapping of columns that are named as the contract's fields; others are kept as texts.

    Raises:
        LoadError: The column that records are keyed by is missing.
    """
    check_key(contract, columns, where)
    kinds = dict(_leaves(contract.row_schema))
    fields = {name: Field(identifier(name), _type(kinds.get(name))) for name in columns}
    return FieldMapping(contract, fields)


def check_key(contract: Contract, columns: Sequence[str], where: Path | str) -> None:
    """Whether the source has the column that records are keyed by; raises `LoadError`."""
    if contract.key_field not in columns:
        raise LoadError(
            f"the source has no column {contract.key_field}; it has {', '.join(columns)}",
            where=where,
            remedy=f"name the columns as the fields of {contract.topic}, or give --mapping (--suggest drafts one)",
        )


def identifier(column: str) -> str:
    """A column's name in Spark SQL."""
    return f"`{column.replace('`', '``')}`"


def _type(field: pa.Field | None) -> str:
    if field is None:
        return "text"
    if pa.types.is_integer(field.type):
        return "number"
    if pa.types.is_boolean(field.type):
        return "boolean"
    return "time" if pa.types.is_timestamp(field.type) else "text"


def records(rows: DataFrame, mapping: FieldMapping) -> DataFrame:
    """Records for `load`: the JSON of each row, the field that it is keyed by, and the row's number.

    Args:
        rows: Columns of text, and `_load_row`, the number of the row.
        mapping: Of the source.

    Raises:
        BadMapping: An expression names a column that is not there, or is no Spark SQL.
    """
    from pyspark.errors import PySparkException

    key = mapping.fields[mapping.contract.key_field]
    key_text = quoted(str(key.value)) if key.expression is None else f"cast({key.expression} AS string)"
    try:
        return rows.selectExpr(
            f"{LOAD_ROW} AS load_row",
            f"cast({key_text} AS binary) AS key",
            f"{_object(mapping.fields)} AS value",
        )
    except PySparkException as error:
        told = str(error).split(";")[0].splitlines()[0]
        columns = ", ".join(name for name in rows.columns if name not in OWN)
        raise BadMapping(f"{told}", where=f"the source has {columns}", remedy="mend the mapping") from error


def _object(fields: Mapping[str, Field]) -> str:
    """The JSON of an object in Spark SQL; fields with a dot are those of the objects within it."""
    inner: dict[str, dict[str, Field]] = {}
    pieces: dict[str, str] = {}
    for name, field in fields.items():
        outer, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(outer, {})[rest] = field
        pieces[outer] = _object(inner[outer]) if dot else rendered(field)
    named = [f"concat({quoted(_json(name) + ':')}, {piece})" for name, piece in pieces.items()]
    return f"concat('{{', concat_ws(',', {', '.join(named)}), '}}')"


def rendered(field: Field) -> str:
    """The JSON of a field in Spark SQL, null where it is to be left out: text that is not of the type stays text."""
    if field.expression is None:
        return quoted(_json(field.value))
    text = f"cast({field.expression} AS string)"
    test, shown = _read_as(field, text)
    as_text = f"substring(to_json(array({text})), 2, length(to_json(array({text}))) - 2)"
    return f"CASE WHEN {test} THEN {shown} WHEN {text} IS NOT NULL THEN {as_text} END"


def _read_as(field: Field, text: str) -> tuple[str, str]:
    """When a text is of the field's type, and its JSON then, in Spark SQL."""
    if field.type == "number":
        return f"trim({text}) RLIKE {quoted(_NUMBER)}", f"trim({text})"
    if field.type == "boolean":
        lower = f"lower(trim({text}))"
        return f"{lower} IN ('true', 'false')", lower
    if field.type == "time" and field.format:
        time = f"try_to_timestamp({text}, {quoted(field.format)})"
        utc = f"to_utc_timestamp({time}, {quoted(field.zone)})"
        return f"{time} IS NOT NULL", f"concat('\"', date_format({utc}, {quoted(TIME_FORMAT)}), '\"')"
    return "false", "NULL"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ a first draft

WORDS: Mapping[str, Sequence[str]] = {
    "user_id": ("user", "customer", "household", "visitor", "client", "account", "member"),
    "pin_id": ("stockcode", "sku", "product", "article", "pin", "item"),
    "event_id": ("event", "invoice", "order", "transaction", "basket"),
    "event_time": ("timestamp", "time", "date", "created"),
    "action": ("action", "event_type", "verb"),
    "quantity": ("quantity", "qty", "count", "units"),
    "value_usd_micros": ("usd_micros",),
    "surface": ("surface", "channel", "placement"),
    "title": ("title", "name", "description"),
    "category": ("category", "department"),
    "price_usd_micros": ("price_usd_micros",),
}
"""What columns that mean a field are often called."""
TIME_FORMATS = {
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d": "yyyy-MM-dd HH:mm:ss",
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.]\d{6}\+\d\d:\d\d": "yyyy-MM-dd HH:mm:ss.SSSSSSXXX",
    r"\d{4}-\d\d-\d\d \d\d:\d\d": "yyyy-MM-dd HH:mm",
    r"\d{4}-\d\d-\d\d": "yyyy-MM-dd",
    r"\d\d?/\d\d?/\d{4} \d\d?:\d\d": "M/d/yyyy H:mm",
    r"\d\d?[.]\d\d?[.]\d{4} \d\d?:\d\d": "d.M.yyyy H:mm",
}


def suggest(contract: Contract, sample: pa.Table) -> str:
    """A draft of a mapping, as the text of its file: columns by their names, types by what they hold.

    Args:
        contract: Of the topic.
        sample: The first rows of the source, columns of text.
    """
    lines = [f"topic: {contract.topic}", "fields:"]
    for name, field in _leaves(contract.row_schema):
        column = _column_for(name.rpartition(".")[2], sample.column_names)
        if column is not None:
            lines.append(f"  {name}: {_declared(field, column, sample.column(column))}")
        else:
            lines.append(f"  # {name}: no column is called like it")
    return "\n".join([*lines, f"# columns of the source: {', '.join(sample.column_names)}", ""])


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[tuple[str, pa.Field]]:
    """The fields that a record may have, those of objects with a dot; not what decoding adds."""
    for field in fields:
        if pa.types.is_struct(field.type):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        elif field.name not in ("version", "is_deleted") and not field.name.endswith("_hash"):
            yield prefix + field.name, field


def _column_for(field: str, columns: Sequence[str]) -> str | None:
    plain = {column: re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_") for column in columns}
    for column, name in plain.items():
        if name.replace("_", "") == field.replace("_", ""):
            return column
    for word in WORDS.get(field, ()):
        for column, name in plain.items():
            if word in name:
                return column
    return None


def _declared(field: pa.Field, column: str, values: pa.ChunkedArray) -> str:
    expression = column if re.fullmatch(r"[A-Za-z_]\w*", column) else _single_quoted(identifier(column))
    kind = _type(field)
    if kind == "text":
        return expression
    format_ = _time_format(values) if kind == "time" else None
    return f"{{from: {expression}, type: {kind}" + (f", format: {_json(format_)}}}" if format_ else "}")


def _single_quoted(text: str) -> str:
    """A text as YAML, whatever is in it."""
    return "'" + text.replace("'", "''") + "'"


def _time_format(values: pa.ChunkedArray) -> str | None:
    texts = [text for text in values.slice(0, 100).to_pylist() if text]
    for pattern, format_ in TIME_FORMATS.items():
        if texts and all(re.fullmatch(pattern, text) for text in texts):
            return format_
    return None
