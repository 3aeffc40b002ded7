"""Served ads of joined rows, without Spark: facts that the shipped handlers make, and bases of them.

Belongs here: what tests and benchmarks of asking for ads share. What must be answered is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.ads import enrichment, generator, index, joined, repository
from pipelines.ads.index import ADS
from pipelines.ads.repository import Repository, Update
from pipelines.ads.schema import CONTROL, TABLES
from pipelines.indexing import build
from pipelines.indexing import facts as fact
from pipelines.indexing.base import Base, open_base
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Versions
from pipelines.settings import Settings

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Table → key → its columns; a row may have a `stand` (1, if it has none)."""


class Joined(NamedTuple):
    """A state that has these joined rows, whatever is asked for."""

    rows: pa.Table

    def look_up(self, name: str, rows: pa.Table) -> pa.Table:
        """All of them."""
        return self.rows


def written(store: Repository, *updates: Update) -> None:
    """Write updates in one commit."""
    with store.writing() as connection:
        repository.write(connection, updates)


def has_document(store: Repository) -> set[str]:
    """The ads of a repository whose control documents are there."""
    with store.reading() as connection:
        ads = list(repository.keys(connection, "ads"))
        made = index.facts_of(CONTROL, enrichment.look_up(connection, CONTROL, ads)).to_pylist()
    return {one["key"].decode() for one in made if not one["is_deleted"]}


def facts_of(family: str, given: pa.Table) -> pa.Table:
    """The facts of a family of joined rows, as its transform makes them."""
    return fact.conform(ADS.family(family).transform(given, Joined(given)), ADS)


def joined_rows(family: str, rows: Rows, ads: Iterable[str]) -> pa.Table:
    """The joined rows of ads, by following their references."""
    return joined.joined(family, [{joined.KEY: ad, **_parts(family, rows, ad)} for ad in ads])


def _parts(family: str, rows: Rows, ad: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for given in joined.INPUTS[family]:
        key = ad if given.by is None else found.get(given.by[0], {}).get(given.by[1])
        row = rows[given.table].get(key) if key is not None else None
        if row is not None:
            found[given.table] = {"stand": 1, **row, "is_there": True}
    names = {
        given.table: {field.name for field in _struct(family, given.table)} for given in joined.INPUTS[family]
    }
    return {
        table: {name: value for name, value in row.items() if name in names[table]}
        for table, row in found.items()
    }


def _struct(family: str, table: str) -> Iterator[pa.Field]:
    return iter(joined.arrow_schema(family).field(table).type)


def account(ads: int, seed: int, first: int = 0, count: int | None = None) -> pa.Table:
    """The facts of all families of some ads of a generated account, in whole columns."""
    tables = {table.name: rows for table, rows in generator.account(ads, seed)}
    wanted = np.arange(first, ads if count is None else min(ads, first + count))
    parts = []
    for family, inputs in joined.INPUTS.items():
        at = {"ads": wanted}
        structs = []
        for given in inputs:
            if given.by is not None:
                of_each = tables[given.by[0]].column(given.by[1]).take(pa.array(at[given.by[0]]))
                at[given.table] = np.array([int(key[1:]) for key in of_each.to_pylist()])
            rows = tables[given.table].take(pa.array(at[given.table])).combine_chunks()
            arrays = [_column(rows, field) for field in _struct(family, given.table)]
            structs.append(pa.StructArray.from_arrays(arrays, fields=list(_struct(family, given.table))))
        keys = tables["ads"].column(TABLES["ads"].key).take(pa.array(wanted))
        parts.append(facts_of(family, pa.table([keys, *structs], schema=joined.arrow_schema(family))))
    return pa.concat_tables(parts)


def _column(rows: pa.Table, field: pa.Field) -> pa.Array:
    if field.name == "is_there":
        return pa.array(np.ones(rows.num_rows, bool))
    if field.name == "stand":
        return pa.array(np.ones(rows.num_rows, np.int64))
    if field.name not in rows.column_names:
        return pa.nulls(rows.num_rows, field.type)  # what Tidemark itself keeps, no account has
    column = rows.column(field.name)
    return column.chunk(0).cast(field.type) if column.num_chunks else pa.array([], field.type)


def base_of(facts: pa.Table, directory: Path, shard_count: int = 1) -> Base:
    """A base of facts, opened."""
    build.build_local(ADS, facts, directory, build.Meta(directory.name, EMPTY), shard_count=shard_count)
    return open_base(ADS, directory, verify_files=False)


def publish(settings: Settings, facts: pa.Table, cut: Position = EMPTY) -> str:
    """Build a base of facts and publish it; returns its version."""
    versions = Versions(settings.paths.indices, ADS.name)
    version = versions.new_version(lineage(ADS))
    build.build_local(ADS, facts, versions.new_path(version), build.Meta(version, cut))
    versions.publish(version)
    return version
