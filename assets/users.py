"""What each new base of the users' timelines corrected in what was served before.

Belongs here: reading, calling, writing, metadata. Does not belong here: what a correction is
(`pipelines.users.corrections`).
"""

import dagster as dg

from assets.platform import AFTER_UPSTREAM, RETRIES, Platform, final, key
from pipelines import lake
from pipelines.indexing.versions import Versions
from pipelines.users import corrections
from pipelines.users.index import USER_EVENTS

CORRECTED = "corrected"
"""The group of what follows when a base was published."""


@dg.asset(
    key=key(lake.OPS_TIMELINE_CORRECTIONS.name),
    deps=[["published", USER_EVENTS.name]],
    group_name=CORRECTED,
    description=lake.OPS_TIMELINE_CORRECTIONS.doc,
    kinds={"iceberg", "spark"},
    automation_condition=AFTER_UPSTREAM,
    retry_policy=RETRIES,
)
@final
def timeline_corrections(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
    spark, settings = platform.spark, platform.settings
    lake.ensure(spark, lake.OPS_TIMELINE_CORRECTIONS)
    after = Versions(settings.paths.indices, USER_EVENTS.name).served()
    before = corrections.before(spark, settings, after) if after else None
    if after is None or before is None:
        return dg.MaterializeResult(metadata={"facts": 0, "note": "there was no base before"})
    found = corrections.counted(spark, settings, before, after)
    schema = spark.table(lake.OPS_TIMELINE_CORRECTIONS.identifier).schema
    said = spark.createDataFrame(corrections.rows(found, before, after), schema)
    lake.append(said, lake.OPS_TIMELINE_CORRECTIONS)
    by_cause = {f"{cause} of {family}": count for (family, cause), count in found.items()}
    return dg.MaterializeResult(
        metadata={"facts": sum(found.values()), "by_cause": dg.JsonMetadataValue(by_cause)}
    )


user_assets = [timeline_corrections]
