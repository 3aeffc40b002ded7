"""Layer models: fitted, measured and logged to MLflow. A model goes live when a base with it is published."""

from typing import Any

import dagster as dg

from assets import columns
from assets.platform import AFTER_UPSTREAM, RETRIES, Platform, final, key
from pipelines import derived
from pipelines.recommend import als, registry

PIN_ALS = derived.PIN_ALS.name
INTERACTIONS = derived.INTERACTIONS


@dg.asset(
    key=key(PIN_ALS),
    deps=[key(INTERACTIONS)],
    group_name="models",
    description="item vectors by implicit ALS, in MLflow with parameters, metrics and input snapshot",
    kinds={"spark", "mlflow"},
    automation_condition=AFTER_UPSTREAM,
    retry_policy=RETRIES,
)
@final
def pin_als(context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
    interactions = platform.read(context, INTERACTIONS)
    source: dict[str, Any] = {
        "snapshot_id": str(interactions.snapshot.id),
        "cut": dg.JsonMetadataValue(interactions.cut.to_json()),
    }
    try:
        model = als.fit(als.live(interactions.rows))
    except als.NothingToLearn as nothing:
        return dg.MaterializeResult(metadata={**source, "rows": 0, "note": str(nothing)})
    tags = {INTERACTIONS: str(interactions.snapshot.id), "cut": interactions.cut.to_text()}
    parameters = registry.log(platform.settings, model, tags)
    model.vectors.unpersist()
    metadata = {"model_id": parameters.model_id, "rows": model.table.num_rows, "bytes": model.table.nbytes}
    traced = columns.traced(derived.model_plan(lambda table: interactions.rows), derived.PIN_ALS)
    return dg.MaterializeResult(metadata={**source, **metadata, **model.metrics, **traced})


model_assets = [pin_als]
