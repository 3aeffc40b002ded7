"""Every table that is computed of other tables, and the very transform that computes it.

Belongs here: table → transform, as builds run them, so that what is told of the transforms (their lineage) is told of
the code itself; and what a model's registry keeps, as if it were a table. Does not belong here: the transforms
(`curate`, `index_rows`, the domains), and how a lineage is read off a plan (`column_lineage`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines import column_lineage, curate, index_rows, lake
from pipelines.column_lineage import Lineage
from pipelines.contracts import frames
from pipelines.curate import SOURCES, Part, Source
from pipelines.indices import INDICES
from pipelines.lake import TableSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Read = Callable[[str], "DataFrame"]

INTERACTIONS = lake.CURATED_USER_INTERACTIONS.name
PIN_ALS = TableSpec(
    name="models.pin_als",
    doc="the newest model's vectors, as the registry keeps them beside its parameters",
    columns=lake.FEATURES_PIN_VECTORS.columns,
    owner="recommend",
)


def transforms() -> dict[str, Callable[[Read], DataFrame]]:
    """Table → how it is made of what `read` gives of other tables, for every table that is."""
    curated = {
        part.table: functools.partial(_curated, source, part)
        for source in SOURCES.values()
        for part in source.tables
    }
    indices = {
        index_rows.table(spec).name: functools.partial(index_rows.rows, spec) for spec in INDICES.values()
    }
    features = {
        lake.FEATURES_PIN_VECTORS.name: lambda read: read(PIN_ALS.name),
        lake.FEATURES_USER_VECTORS.name: _user_vectors,
    }
    return {**curated, PIN_ALS.name: model_plan, **features, **indices}


def model_plan(read: Read) -> DataFrame:
    """The way to the model's vectors, with ALS as a step that cannot be looked into, and the model's own id."""
    from pyspark.sql import functions as F

    from pipelines.recommend import als

    def factorize(numbered: DataFrame) -> DataFrame:
        return column_lineage.opaque(numbered, "id int, features array<float>")

    vectors = als.vectors_plan(als.live(read(INTERACTIONS)), factorize)
    return vectors.withColumn("model_id", F.lit("the registry gives it"))


def _user_vectors(read: Read) -> DataFrame:
    from pipelines.recommend import als, user_vectors

    return user_vectors.plan(als.live(read(INTERACTIONS)), read(PIN_ALS.name))


def specs() -> dict[str, TableSpec]:
    """Every declared table, those of the indices and of models, too."""
    indices = [make(spec) for spec in INDICES.values() for make in (index_rows.table, index_rows.delta_table)]
    return {**lake.TABLES, PIN_ALS.name: PIN_ALS, **{spec.name: spec for spec in indices}}


def lineages(spark: SparkSession) -> dict[str, Lineage]:
    """The lineage of every table that is computed of others: its transform's plan over empty tables, as declared."""
    declared = specs()

    def read(name: str) -> DataFrame:
        columns = ", ".join(f"`{column.name}` {column.type}" for column in declared[name].columns)
        return spark.createDataFrame([], columns).alias(name)

    return {name: column_lineage.trace(transform(read)) for name, transform in transforms().items()}


def _curated(source: Source, part: Part, read: Read) -> DataFrame:
    decoded = frames.judged(source.contract, read(source.raw_table))
    return curate.standing(source, curate.judge(source, decoded), part)
