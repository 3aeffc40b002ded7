"""What the rows of one ad say together: the tables that a document's family is joined of, and the columns of that join.

Belongs here: the path from an ad to each table, the columns and types of a joined row, and the version of what is
derived of it. Does not belong here: reading the rows (the repository, or its dump in batch), and what is made of them
(`handlers`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.ads import schema
from pipelines.ads.schema import CONTENT, CONTROL, PERFORMANCE, TABLES, Column, Table

ROOT = "ads"
KEY = "ad_id"

ARROW = {
    schema.INTEGER: pa.int64(),
    schema.NUMBER: pa.float64(),
    schema.BOOLEAN: pa.bool_(),
    schema.TEXT: pa.string(),
    schema.TERMS: pa.list_(pa.string()),
    schema.TIME: pa.int64(),
    schema.ID: pa.string(),
    schema.VECTOR: pa.list_(pa.float32()),
}
"""The Arrow type of each type of a source column; times are ms since 1970."""


class Input(NamedTuple):
    """A table that a family is joined of: how it is reached, and which of its column families counts.

    Attributes:
        table: Its name.
        by: The table and the column that hold its key; None: the ad itself.
        family: The column family whose stand is part of the document's version.
    """

    table: str
    by: tuple[str, str] | None
    family: str


INPUTS: dict[str, tuple[Input, ...]] = {
    CONTROL: (
        Input("ads", None, CONTROL),
        Input("ad_groups", ("ads", "ad_group_id"), CONTROL),
        Input("campaigns", ("ad_groups", "campaign_id"), CONTROL),
        Input("advertisers", ("campaigns", "advertiser_id"), CONTROL),
    ),
    CONTENT: (
        Input("ads", None, CONTROL),
        Input("pins", ("ads", "pin_id"), CONTENT),
        Input("images", ("pins", "image_signature"), CONTENT),
    ),
    PERFORMANCE: (Input("ads", None, PERFORMANCE),),
}
"""Family of the document → what it is joined of, in order of reference: the order of the parts of its version."""


def name_of(table: str, column: str) -> str:
    """The name of a table's column in a joined row: `campaigns.status`."""
    return f"{table}.{column}"


def relation(family: str) -> str:
    """The name under which a transform looks a family's joined rows up: `ads.control`."""
    return f"{ROOT}.{family}"


def columns(family: str) -> list[tuple[Table, Column]]:
    """The source columns of a joined row; of an ad those of the family, and its references."""
    found = []
    for given in INPUTS[family]:
        table = TABLES[given.table]
        references = {reference.column for reference in table.references}
        found += [
            (table, column)
            for column in table.columns
            if column.family == family or (column.family == given.family and column.name in references)
        ]
    return found


@functools.cache
def arrow_schema(family: str) -> pa.Schema:
    """The columns of a family's joined rows: the ad's key, and a struct for each table.

    A struct is never null. It says whether the row is there, and its stand; its columns are null where it is not there.
    """
    fields: dict[str, list[pa.Field]] = {
        given.table: [pa.field("is_there", pa.bool_()), pa.field("stand", pa.int64())]
        for given in INPUTS[family]
    }
    for table, column in columns(family):
        fields[table.name].append(pa.field(column.name, ARROW[column.type]))
    structs = [pa.field(table, pa.struct(of_table)) for table, of_table in fields.items()]
    return pa.schema([pa.field(KEY, pa.string()), *structs])


def names(family: str) -> list[str]:
    """The names of a joined row's columns but for the key: `campaigns.status`, as SQL and `pa.Table.flatten` say it."""
    fields = list(arrow_schema(family))[1:]
    return [name_of(field.name, part.name) for field in fields for part in field.type]


def joined(family: str, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Joined rows as Arrow: the ad's key, and for each table a mapping of its columns; one that is left out is not
    there, with a stand of 0."""
    missing = {"is_there": False, "stand": 0}
    whole = [
        {KEY: row[KEY], **{g.table: {**missing, **row.get(g.table, {})} for g in INPUTS[family]}}
        for row in rows
    ]
    return pa.Table.from_pylist(whole, schema=arrow_schema(family))


def versions(family: str) -> list[str]:
    """The columns of a joined row that are the version of what is derived of it, in their order."""
    return [name_of(given.table, "stand") for given in INPUTS[family]]


@functools.cache
def changed_by(family: str, table: str) -> tuple[tuple[str, str], ...]:
    """The way back from a row of a table to the ads that are joined of it: at each step a table, and its column that
    names the row before; of an ad itself there is none.

    Raises:
        KeyError: The family is not joined of it.
    """
    by_table = {given.table: given for given in INPUTS[family]}
    way, reference = [], by_table[table].by
    while reference is not None:
        way.append(reference)
        reference = by_table[reference[0]].by
    return tuple(way)
