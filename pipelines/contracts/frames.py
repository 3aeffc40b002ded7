"""Contracts on Spark: the same decision, in its Python workers.

Belongs here: running `decode_table` over a DataFrame of raw rows. Does not belong here: what is decided (`contract`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.contracts import payload_files
from pipelines.contracts.contract import (
    RECORD,
    REFUSED_SCHEMA,
    Contract,
    accepted_schema,
    decode_table,
    extended,
)
from pipelines.contracts.fields import Field

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_NEW_FIELDS = "_new_fields"
"""In `reason`: the row is no refused record; its `detail` says which fields records have that nobody declared."""


def judged(contract: Contract, raw: DataFrame) -> DataFrame:
    """Raw rows as the accepted schema, and `_reason`, which is null in accepted rows."""
    from pyspark.sql.pandas.types import from_arrow_schema

    payload_files.declared()  # a schema that cannot hold is told here, and not by a worker
    schema = accepted_schema(contract).append(pa.field("_reason", pa.string()))
    judge = functools.partial(_judge, contract.topic, contract.fields, schema)
    return raw.select(*RECORD.names).mapInArrow(judge, from_arrow_schema(schema))


def examined(contract: Contract, raw: DataFrame) -> DataFrame:
    """What is to be told of raw rows: provenance, key, value, reason, detail.

    `letters` are those that do not keep the contract; `new_fields` are the fields of the others that nobody declared.
    """
    from pyspark.sql.pandas.types import from_arrow_schema

    payload_files.declared()
    examine = functools.partial(_examine, contract.topic, contract.fields)
    return raw.select(*RECORD.names).mapInArrow(examine, from_arrow_schema(REFUSED_SCHEMA))


def letters(found: DataFrame) -> DataFrame:
    """Of what was told of rows, those that their contract refuses."""
    return found.filter(f"reason != '{_NEW_FIELDS}'")


def new_fields(found: DataFrame) -> dict[str, set[str]]:
    """Of what was told of rows, the fields that nobody declared: path → JSON kinds of their values."""
    fields: dict[str, set[str]] = {}
    for row in found.filter(f"reason = '{_NEW_FIELDS}'").select("detail").collect():
        for path, kinds in json.loads(row["detail"]).items():
            fields.setdefault(path, set()).update(kinds)
    return fields


def _judge(
    topic: str, fields: tuple[Field, ...], schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    contract = _contract(topic, fields)
    provenance = accepted_schema(contract).names[len(contract.row_schema) :]
    for batch in batches:
        decoded = decode_table(contract, batch)
        accepted = decoded.accepted.append_column("_reason", pa.nulls(decoded.accepted.num_rows, pa.string()))
        kept = {name: name for name in provenance} | {"_reason": "reason"}
        refused = pa.table(
            [
                decoded.refused.column(kept[field.name])
                if field.name in kept
                else pa.nulls(decoded.refused.num_rows, field.type)
                for field in schema
            ],
            schema=schema,
        )
        for part in (accepted, refused):
            yield from part.combine_chunks().to_batches()


def _examine(
    topic: str, fields: tuple[Field, ...], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    contract = _contract(topic, fields)
    found: dict[str, set[str]] = {}
    for batch in batches:
        decoded = decode_table(contract, batch, finds_new_fields=True)
        for path, kinds in decoded.new_fields.items():
            found.setdefault(path, set()).update(kinds)
        yield from decoded.refused.combine_chunks().to_batches()
    if found:
        detail = json.dumps({path: sorted(kinds) for path, kinds in found.items()})
        row = {field.name: pa.nulls(1, field.type) for field in REFUSED_SCHEMA}
        row |= {"reason": pa.array([_NEW_FIELDS]), "detail": pa.array([detail])}
        yield from pa.table(row, schema=REFUSED_SCHEMA).to_batches()


def _contract(topic: str, fields: tuple[Field, ...]) -> Contract:
    from pipelines.contracts import contract_of

    return extended(contract_of(topic), fields)
