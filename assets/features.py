"""Layer features: what models compute about pins and users, as tables. Each snapshot names the model that made it."""

import dagster as dg
import pyarrow as pa

from assets import columns
from assets.models import INTERACTIONS, PIN_ALS
from assets.platform import (
    AFTER_UPSTREAM,
    RETRIES,
    Platform,
    described,
    final,
    key,
    reported_metadata,
    summary,
)
from pipelines import lake, staging
from pipelines.index_rows import MODEL_ID
from pipelines.recommend import registry

PIN_VECTORS, USER_VECTORS = lake.FEATURES_PIN_VECTORS, lake.FEATURES_USER_VECTORS


@dg.asset(
    key=key(PIN_VECTORS.name),
    deps=[key(PIN_ALS), key(INTERACTIONS)],
    group_name="features",
    description=PIN_VECTORS.doc,
    kinds={"iceberg"},
    automation_condition=AFTER_UPSTREAM,
    retry_policy=RETRIES,
)
@final
def pin_vectors(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult:
    model_id = reported_metadata(context.instance, key(PIN_ALS)).get("model_id")
    vectors = _vectors(platform, model_id)
    lake.ensure(platform.spark, PIN_VECTORS)
    schema = platform.spark.table(PIN_VECTORS.identifier).schema
    said = summary(platform.read(context, INTERACTIONS).cut, None) | {MODEL_ID: model_id or ""}
    rows = platform.spark.createDataFrame(vectors, schema).alias(PIN_ALS)
    staged = staging.overwrite(platform.settings, rows, PIN_VECTORS, said)
    written = {**described(staged), **columns.traced(rows, PIN_VECTORS)}
    return dg.MaterializeResult(metadata={**written, "model_id": model_id or "none"})


def _vectors(platform: Platform, model_id: str | None) -> pa.Table:
    if model_id is None:
        kinds = {"pin_id": pa.string(), "vector": pa.list_(pa.float32()), "model_id": pa.string()}
        return pa.schema(list(kinds.items())).empty_table()
    return _named(registry.load(platform.settings, model_id)[0], model_id)


def _named(vectors: pa.Table, model_id: str) -> pa.Table:
    return vectors.append_column("model_id", pa.array([model_id] * vectors.num_rows, pa.string()))


@dg.asset(
    key=key(USER_VECTORS.name),
    deps=[key(PIN_ALS), key(INTERACTIONS)],
    group_name="features",
    description=USER_VECTORS.doc,
    kinds={"iceberg", "spark"},
    automation_condition=AFTER_UPSTREAM,
    retry_policy=RETRIES,
)
@final
def user_vectors(
    context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
) -> dg.MaterializeResult:
    from pipelines.recommend import als
    from pipelines.recommend import user_vectors as folding

    model_id = reported_metadata(context.instance, key(PIN_ALS)).get("model_id")
    spark, interactions = platform.spark, platform.read(context, INTERACTIONS)
    lake.ensure(spark, USER_VECTORS)
    if model_id is None:
        rows, plan = spark.createDataFrame([], spark.table(USER_VECTORS.identifier).schema), None
    else:
        vectors, parameters = registry.load(platform.settings, model_id)
        rows = folding.user_vectors(als.live(interactions.rows), vectors, parameters)
        named = spark.createDataFrame(_named(vectors, model_id)).alias(PIN_ALS)
        plan = folding.plan(als.live(interactions.rows), named)
    stands_on = summary(interactions.cut, None) | {MODEL_ID: model_id or ""}
    staged = staging.overwrite(platform.settings, rows, USER_VECTORS, stands_on)
    said = columns.traced(plan, USER_VECTORS) if plan is not None else {}
    written = {**described(staged), **said}
    return dg.MaterializeResult(metadata={**written, "model_id": model_id or "none"})


feature_assets = [pin_vectors, user_vectors]
