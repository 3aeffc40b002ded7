"""Contracts on Spark: the same decision, in its Python workers.

Belongs here: running `decode_table` over a DataFrame of raw rows. Does not belong here: what is decided (`contract`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.contracts.contract import RECORD, REFUSED_SCHEMA, Contract, accepted_schema, decode_table

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def accepted(contract: Contract, raw: DataFrame) -> DataFrame:
    """The rows that keep the contract: `contract.row_schema` and provenance."""
    return _mapped(contract, raw, "accepted", accepted_schema(contract))


def refused(contract: Contract, raw: DataFrame) -> DataFrame:
    """The rows that do not: provenance, key, value, reason, detail."""
    return _mapped(contract, raw, "refused", REFUSED_SCHEMA)


def _mapped(contract: Contract, raw: DataFrame, which: str, schema: pa.Schema) -> DataFrame:
    from pyspark.sql.pandas.types import from_arrow_schema

    decide = functools.partial(_decide, contract.topic, which)
    return raw.select(*RECORD.names).mapInArrow(decide, from_arrow_schema(schema))


def _decide(topic: str, which: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    from pipelines.contracts import contract_of

    contract = contract_of(topic)
    for batch in batches:
        yield from getattr(decode_table(contract, batch), which).combine_chunks().to_batches()
