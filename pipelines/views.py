"""Views of the lake: questions that people ask, as SQL that Trino and Spark both answer.

Belongs here: what a view is, and keeping the catalog's views as they are declared. Does not belong here: what they say
(each domain's own `views`), and asking them (`sql`).

A view is written once, in Trino's dialect, and kept as an Iceberg view with a representation for Spark beside it
(https://iceberg.apache.org/view-spec/), so that it needs neither engine to be there, nor names them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlglot
from sqlglot import exp

from pipelines.errors import TidemarkError
from pipelines.settings import CATALOG, Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

NAMESPACE = "explore"
DOC = "comment"
MADE, KEPT = "made", "kept"


class ViewError(TidemarkError):
    """A view does not say what it declares."""


class View(NamedTuple):
    """A view.

    Attributes:
        name: Without its namespace, which is `explore`.
        doc: The question that it answers.
        sql: The query, in Trino's dialect; tables by namespace and name.
        columns: What each column says, with its unit, in order.
        examples: Queries of it to begin with, in Trino's dialect.
    """

    name: str
    doc: str
    sql: str
    columns: Mapping[str, str]
    examples: tuple[str, ...] = ()

    @property
    def identifier(self) -> str:
        """Its name with its namespace."""
        return f"{NAMESPACE}.{self.name}"

    @property
    def tables(self) -> tuple[str, ...]:
        """What it reads, by namespace and name, each once."""
        found = sqlglot.parse_one(self.sql, dialect="trino").find_all(exp.Table)
        return tuple(dict.fromkeys(f"{table.db}.{table.name}" for table in found if table.db))

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """The tags that it reads tables at: (table, tag), each once."""
        found = sqlglot.parse_one(self.sql, dialect="trino").find_all(exp.Table)
        return tuple(
            dict.fromkeys(
                (f"{table.db}.{table.name}", table.args["version"].expression.this)
                for table in found
                if table.args.get("version") and table.args["version"].expression.is_string
            )
        )

    def query(self, dialect: str) -> str:
        """The query for `trino` or `spark`."""
        return in_dialect(self.sql, dialect)


def in_dialect(query: str, dialect: str) -> str:
    """A query of Trino's for another engine, with the catalog before each table."""
    tree = sqlglot.parse_one(query, dialect="trino")
    for table in tree.find_all(exp.Table):
        if table.db and not table.catalog:
            table.set("catalog", exp.to_identifier(CATALOG))
    return tree.sql(dialect=dialect, pretty=True)


def ensure(spark: SparkSession, settings: Settings, views: Sequence[View]) -> dict[str, str]:
    """Make the views whose tables and tags are all there, and those anew that are declared otherwise by now.

    A view of tables that do not have (or no longer have) a column that it names waits for it too: the served base of an
    index may be of another lineage than the code.

    Returns:
        By name: `MADE`, `KEPT`, or what is missing.

    Raises:
        ViewError: A view has other columns than it declares.
    """
    from pipelines import lake

    spark.sql(f"CREATE NAMESPACE IF NOT EXISTS {CATALOG}.{NAMESPACE}")
    done = {}
    for view in views:
        missing = [name for name in view.tables if lake.open_table(settings, name) is None]
        missing += [
            f"{name} at {tag}"
            for name, tag in view.tags
            if (table := lake.open_table(settings, name)) is not None and tag not in table.metadata.refs
        ]
        done[view.name] = f"waits for {', '.join(missing)}" if missing else _ensure(spark, view)
    return done


_NO_COLUMN = ("UNRESOLVED_COLUMN.WITH_SUGGESTION", "UNRESOLVED_COLUMN.WITHOUT_SUGGESTION", "FIELD_NOT_FOUND")


def _ensure(spark: SparkSession, view: View) -> str:
    from pyspark.errors import AnalysisException

    jvm: Any = spark._jvm
    loaded = jvm.org.apache.iceberg.spark.Spark3Util.loadIcebergCatalog(spark._jsparkSession, CATALOG)
    namespace = jvm.org.apache.iceberg.catalog.Namespace.of(_array(spark, [NAMESPACE]))
    identifier = jvm.org.apache.iceberg.catalog.TableIdentifier.of(namespace, view.name)
    queries = {dialect: view.query(dialect) for dialect in ("trino", "spark")}
    if loaded.viewExists(identifier) and _held(loaded.loadView(identifier)) == queries:
        return KEPT
    try:
        found = spark.sql(queries["spark"]).schema
    except AnalysisException as error:
        if error.getCondition() not in _NO_COLUMN:
            raise
        return f"waits for a column: {str(error).splitlines()[0]}"
    if found.names != list(view.columns):
        raise ViewError(
            f"it has the columns {', '.join(found.names)}",
            where=view.identifier,
            remedy=f"declare them, or mend its query: {', '.join(view.columns)} are declared",
        )
    for field in found:
        field.metadata = {DOC: view.columns[field.name]}
    schema = jvm.org.apache.iceberg.spark.SparkSchemaUtil.convert(
        jvm.org.apache.spark.sql.types.DataType.fromJson(found.json())
    )
    builder = loaded.buildView(identifier).withSchema(schema).withDefaultNamespace(namespace)
    builder = builder.withDefaultCatalog(CATALOG).withProperty(DOC, view.doc)
    for dialect, query in queries.items():
        builder = builder.withQuery(dialect, query)
    builder.createOrReplace()
    return MADE


def _held(view: Any) -> dict[str, str]:
    """The queries of a view that is there, by dialect."""
    representations = view.currentVersion().representations()
    found = (representations.get(number) for number in range(representations.size()))
    return {one.dialect(): one.sql() for one in found}


def _array(spark: SparkSession, values: Sequence[str]) -> Any:
    gateway: Any = spark.sparkContext._gateway
    made = gateway.new_array(gateway.jvm.java.lang.String, len(values))
    for number, value in enumerate(values):
        made[number] = value
    return made
