"""Columns in the metadata of assets: each table's schema as it is declared, and where each column comes from.

Belongs here: declarations and lineages in the words of Dagster, whose pages show them. Does not belong here: how a
lineage is read off a plan (`pipelines.column_lineage`), and what is declared (`pipelines.lake`).
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.platform import key
from pipelines import column_lineage, derived
from pipelines.column_lineage import OPAQUE, Lineage
from pipelines.lake import Column, TableSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

log = logging.getLogger(__name__)

LINEAGE = "tidemark/lineage"
"""The whole lineage as JSON (`column_lineage.from_json`): also what only decides about rows and values."""


def with_columns(assets: Iterable[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
    """The same assets; those that are a table say its columns, its name for SQL, and who owns it."""
    specs = derived.specs()

    def with_table(asset: dg.AssetSpec) -> dg.AssetSpec:
        table = specs.get(".".join(asset.key.path))
        return (
            asset if table is None else asset.merge_attributes(metadata=declared(table), owners=owners(table))
        )

    return list(dg.map_asset_specs(with_table, assets))


def declared(table: TableSpec) -> dict[str, Any]:
    """What a table's declaration says, as metadata of its asset."""
    return {"dagster/column_schema": schema(table), "dagster/table_name": table.identifier}


def owners(table: TableSpec) -> list[str]:
    """The part of the project that writes a table, as Dagster names teams."""
    return [f"team:{table.owner}"]


def schema(table: TableSpec) -> dg.TableSchema:
    """A table's columns with their types, what they say, and their units."""
    return dg.TableSchema(
        [dg.TableColumn(column.name, column.type, described(column)) for column in table.columns]
    )


def described(column: Column) -> str:
    """What a column says, with its unit."""
    return f"{column.doc} [{column.unit}]" if column.unit else column.doc


def traced(rows: "DataFrame", table: TableSpec) -> dict[str, Any]:
    """Metadata of what was just written: the columns that it has, and the lineage of the very plan that made them.

    A plan that cannot be traced is said in the log and in the metadata; the table is written all the same.
    """
    try:
        found = column_lineage.trace(rows)
    except Exception as error:  # what is told of a table must never fail its build
        log.warning("%s: no lineage of its columns: %s", table.name, error)
        return {"dagster/column_schema": schema(table), LINEAGE: f"unknown: {error}"}
    return {"dagster/column_schema": schema(table), **lineage_metadata(found, table)}


def lineage_metadata(found: Lineage, table: TableSpec) -> dict[str, Any]:
    """A lineage as Dagster shows it (what each column's value is made of), and the whole of it."""
    names = [column.name for column in table.columns]
    columns = {
        name: sorted({(table, path.partition(".")[0]) for table, path in found.sources(name)})
        for name in names
    }
    metadata: dict[str, Any] = {
        "dagster/column_lineage": dg.TableColumnLineage(
            {
                name: [dg.TableColumnDep(key(table), column) for table, column in sources]
                for name, sources in columns.items()
            }
        ),
        LINEAGE: dg.JsonMetadataValue(found.to_json()),
    }
    if unseen := [name for name in names if any(d.kind == OPAQUE for d in found.of(name))]:
        metadata["tidemark/lineage_note"] = (
            f"{', '.join(unseen)}: made by code that a plan does not show, so of all that it is given"
        )
    return metadata
