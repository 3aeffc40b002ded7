"""The ads account looked after each day: whether its source and its repository agree, and garbage collection.

Belongs here: reading, calling, writing, metadata. Does not belong here: what is compared and collected
(`pipelines.ads.sync`, `collection`), and the index's base, which is built like any other.
"""

from typing import Any

import dagster as dg

from assets.platform import RETRIES, Platform, final, key
from pipelines import lake
from pipelines.ads import collection, repository, sync
from pipelines.ingest.producer import Producer

GROUP = "ads_upkeep"
EVERY_DAY = dg.AutomationCondition.on_cron("17 3 * * *")


@dg.asset(
    key=key(lake.OPS_ADS_UNSYNCED.name),
    group_name=GROUP,
    description=lake.OPS_ADS_UNSYNCED.doc,
    kinds={"iceberg", "postgres"},
    automation_condition=EVERY_DAY,
    retry_policy=RETRIES,
)
@final
def ads_unsynced(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
    report = sync.run(platform.settings)
    lake.ensure(platform.spark, lake.OPS_ADS_UNSYNCED)
    schema = platform.spark.table(lake.OPS_ADS_UNSYNCED.identifier).schema
    lake.append(platform.spark.createDataFrame(report.rows(), schema), lake.OPS_ADS_UNSYNCED)
    by_cause = {f"{cause} {table}": count for (table, cause), count in sync.counts(report.unsynced).items()}
    shown: dict[str, Any] = {"unsynced": len(report.unsynced), "by_cause": dg.JsonMetadataValue(by_cause)}
    return dg.MaterializeResult(metadata=shown | {"source_not_asked": report.note or ""})


@dg.asset(
    key=[GROUP, "collected"],
    group_name=GROUP,
    description="ads that were inactive for long leave the index, and after a grace period the repository",
    kinds={"kafka"},
    automation_condition=EVERY_DAY,
    retry_policy=RETRIES,
)
@final
def ads_collected(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
    settings = platform.settings
    store = repository.opened(settings)
    try:
        planned = collection.plan(store, settings.ads.gc_days, settings.ads.gc_grace_days)
        with Producer(settings) as producer:
            collection.carry_out(store, producer, planned)
    finally:
        store.close()
    counts = {name: len(found) for name, found in planned._asdict().items() if name != "run"}
    return dg.MaterializeResult(metadata={"run": str(planned.run), **counts})


ads_assets = [ads_unsynced, ads_collected]
