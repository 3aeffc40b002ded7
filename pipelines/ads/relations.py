"""The joined rows of ads as relations that a transform looks up: in the repository by a stream, in its dump by a batch.

Belongs here: both ways to the same rows (`joined.arrow_schema`). Does not belong here: what a joined row is (`joined`),
how rows are read (`enrichment`), and the dump itself (`dump`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.ads import enrichment, joined, prepared
from pipelines.ads.joined import INPUTS, KEY
from pipelines.ads.repository import Repository
from pipelines.ads.schema import TABLES, TIME

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

Read = Callable[[str], "DataFrame"]

READS = tuple(f"repo.{name}" for name in TABLES)
"""The tables of a dump that the relations join; all must be of one dump."""

FAMILIES = {joined.relation(family): family for family in INPUTS}
"""The relations, and the family of the document whose joined rows each has."""


class RepositoryState:
    """The state of a stream: the repository as it is when it is asked, one point of it each time."""

    def __init__(self, store: Repository) -> None:
        self._store = store
        self._tables = {family: prepared.of_family(family) for family in INPUTS}

    def look_up(self, name: str, rows: pa.Table) -> pa.Table:
        """Each ad that rows name, once, as the repository has it now."""
        with self._store.reading() as connection:
            family, ads = FAMILIES[name], rows.column(KEY).to_pylist()
            return enrichment.look_up(connection, family, ads, self._tables[family])


def plan(name: str, ads: DataFrame, read: Read) -> DataFrame:
    """Each row of `repo.ads` with the rows that it refers to: a join of the tables of one dump.

    Args:
        name: The relation.
        ads: Rows of `repo.ads`.
        read: Gives a table by its name.
    """
    from pyspark.sql import functions as F

    family = FAMILIES[name]
    kinds = {field.name: field.type for field in joined.arrow_schema(family)}
    made = ads.alias(joined.ROOT)
    for given in INPUTS[family]:
        if given.by is None:
            continue
        table = TABLES[given.table]
        rows = read(f"repo.{table.name}").alias(table.name)
        held_by = F.col(".".join(given.by))
        made = made.join(rows, held_by == F.col(f"{table.name}.{table.key}"), "left")
    structs = []
    for given in INPUTS[family]:
        names = [part.name for part in kinds[given.table]]
        columns = [_column(given.table, given.family, name).alias(name) for name in names]
        structs.append(F.struct(*columns).alias(given.table))
    return made.select(F.col(f"{joined.ROOT}.{KEY}"), *structs)


def _column(table: str, family: str, name: str) -> Column:
    """A column of a joined row; a row that is not there is said to be so, with a stand of 0."""
    from pyspark.sql import functions as F

    if name == "is_there":
        return F.coalesce(F.col(f"{table}.is_there"), F.lit(False))
    if name == "stand":
        return F.coalesce(F.col(f"{table}.stand_{family}"), F.lit(0).cast("bigint"))
    column = TABLES[table].column(name)
    assert column is not None
    found = F.col(f"{table}.{name}")
    return F.unix_millis(found) if column.type == TIME else found


RELATIONS: dict[str, Callable[[DataFrame, Read], DataFrame]] = {
    name: functools.partial(plan, name) for name in FAMILIES
}
"""Relation → how a batch makes it of the rows of `repo.ads`."""
