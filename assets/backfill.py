"""Days: partitioned assets that compute single days of a table again, in ranges, each range in one run.

Belongs here: the partitions, and a step that replaces the rows of its days alone. A scheduled build computes whole
tables and is not partitioned: see docs/adr/0008. What a day is, is in `pipelines.backfill`.
"""

import datetime
from contextlib import closing
from typing import Any

import dagster as dg

from assets import columns
from assets.platform import RETRIES, Platform, described, final, key
from pipelines import backfill, lake
from pipelines.backfill import Changes, Days
from pipelines.contracts import CONTRACTS
from pipelines.curate import SOURCES, Part, Source
from pipelines.lake import Snapshot

GROUP = "backfill"


def day_partitions(first_day: datetime.date) -> dg.DailyPartitionsDefinition:
    """Days from the first one on, today included."""
    return dg.DailyPartitionsDefinition(start_date=first_day.isoformat(), end_offset=1)


def days_key(table: str) -> dg.AssetKey:
    """The asset key of the days of a table: `curated_days/user_interactions`."""
    namespace, name = table.split(".")
    return dg.AssetKey([f"{namespace}_days", name])


def backfill_assets(first_day: datetime.date) -> list[dg.AssetsDefinition]:
    """An asset for the days of each table that has days of its own."""
    days = day_partitions(first_day)
    parts = [(source, part) for source in SOURCES.values() for part in backfill.by_event_day(source)]
    return [_letter_days(days), *(_event_days(days, source, part) for source, part in parts)]


def _event_days(partitions: dg.DailyPartitionsDefinition, source: Source, part: Part) -> dg.AssetsDefinition:
    @dg.asset(
        key=days_key(part.table),
        deps=[key(source.raw_table)],
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=part.table,
        group_name=GROUP,
        description=f"days of events of {part.table}, computed again from raw; other days stay as they are",
        kinds={"iceberg", "spark"},
        retry_policy=RETRIES,
    )
    @final
    def event_days(
        context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult:
        days = _days(context)
        rebuilt = backfill.event_days(platform.spark, platform.settings, source, part, days)
        traced = columns.traced(rebuilt.rows, rebuilt.spec)
        with closing(rebuilt):
            changed = backfill.changes(rebuilt, rebuilt.before(platform.spark), source.identity, part.columns)
            staged = rebuilt.stage()
        context.log_event(dg.AssetMaterialization(key(part.table), metadata={**described(staged), **traced}))
        return dg.MaterializeResult(metadata=_told(changed, staged))

    return event_days


def _letter_days(partitions: dg.DailyPartitionsDefinition) -> dg.AssetsDefinition:
    spec = lake.RAW_DEAD_LETTERS

    @dg.asset(
        key=days_key(spec.name),
        deps=[key(contract.raw_table) for contract in CONTRACTS.values()],
        partitions_def=partitions,
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool=spec.name,
        group_name=GROUP,
        description=f"{spec.name} of records taken on these days, decided again by the present contracts",
        kinds={"iceberg", "spark"},
        retry_policy=RETRIES,
    )
    @final
    def letter_days(
        context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult:
        rebuilt = backfill.letter_days(platform.spark, platform.settings, _days(context))
        with closing(rebuilt):
            before = rebuilt.before(platform.spark)
            changed = backfill.changes(rebuilt, before, backfill.PLACE, ("reason", "detail"))
            rebuilt.write()
        return dg.MaterializeResult(metadata=_told(changed, platform.newest(spec.name)))

    return letter_days


def _told(changed: Changes, written: Snapshot) -> dict[str, Any]:
    return {
        "rows": changed.rows,
        "added": changed.added,
        "removed": changed.removed,
        "changed": changed.changed,
        "changes": dg.JsonMetadataValue(changed.to_json()),
        "snapshot_id": str(written.id),
    }


def _days(context: dg.AssetExecutionContext) -> Days:
    keys = context.partition_key_range
    return Days(datetime.date.fromisoformat(keys.start), datetime.date.fromisoformat(keys.end))
