"""Maintenance as assets: one a table and one an index, each hour; orphans once a day; then what all of it takes up.

Not part of a build: a sensor of their own asks for them (`jobs.schedules`). What a step does is in
`pipelines.maintenance`.
"""

from typing import Any

import dagster as dg

from assets.index import version_row
from assets.platform import RETRIES, Platform, final, key, record_version
from pipelines import lake, maintenance
from pipelines.indexing.spec import IndexSpec
from pipelines.indices import INDICES
from pipelines.lake import TableSpec
from pipelines.maintenance import IndexReport, TableReport
from pipelines.storage import survey

GROUP = "maintenance"
EVERY_HOUR = dg.AutomationCondition.on_cron("23 * * * *")  # between the builds, which begin with the hour
EVERY_DAY = dg.AutomationCondition.on_cron("53 2 * * *")


def table_maintenance(spec: TableSpec) -> dg.AssetsDefinition:
    """What a table's declaration asks for: old rows, compaction, manifests, snapshots."""

    @dg.asset(
        key=[GROUP, *spec.name.split(".")],
        group_name=GROUP,
        description=f"{spec.name}: compacted by its declaration, old rows and snapshots gone",
        kinds={"iceberg", "spark"},
        automation_condition=EVERY_HOUR,
        retry_policy=RETRIES,
    )
    @final
    def maintained(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
        report = maintenance.maintain_table(platform.spark, platform.settings, spec, has_orphans=False)
        return dg.MaterializeResult(metadata=_shown(report) if report else {"note": "no such table yet"})

    return maintained


def index_maintenance(spec: IndexSpec) -> dg.AssetsDefinition:
    """What need not be kept of an index's bases and deltas goes, the rest is compacted."""

    @dg.asset(
        key=[GROUP, "indices", spec.name],
        group_name=GROUP,
        description=f"{spec.name}: old bases and epochs dropped, deltas compacted and vacuumed",
        kinds={"delta", "arrow"},
        automation_condition=EVERY_HOUR,
        retry_policy=RETRIES,
    )
    @final
    def maintained(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata=_shown(maintain_index(platform, spec)))

    return maintained


def maintain_index(platform: Platform, spec: IndexSpec) -> IndexReport:
    """Maintain an index, and record the bases that are gone in `ops.index_versions`."""
    report = maintenance.maintain_index(platform.settings, spec)
    for manifest in report.bases_dropped:
        record_version(platform, version_row(manifest, "deleted"))
    return report


@dg.asset(
    key=[GROUP, "orphans"],
    group_name=GROUP,
    description="files of the tables that nothing refers to, removed",
    kinds={"iceberg", "spark"},
    automation_condition=EVERY_DAY,
    retry_policy=RETRIES,
)
@final
def orphans(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
    found = {
        spec.name: maintenance.remove_orphans(platform.spark, platform.settings, spec)
        for spec in maintenance.specs().values()
    }
    survey(platform.spark, platform.settings, found)
    files = {name: removed.files for name, removed in found.items() if removed}
    return dg.MaterializeResult(
        metadata={
            "files": sum(files.values()),
            "bytes": sum(removed.size_bytes for removed in found.values() if removed),
            "tables": dg.JsonMetadataValue(files),
        }
    )


table_assets = [table_maintenance(spec) for spec in maintenance.specs().values()]
index_assets = [index_maintenance(spec) for spec in INDICES.values()]


@dg.asset(
    key=key(lake.OPS_STORAGE.name),
    deps=[*table_assets, *index_assets],
    group_name=GROUP,
    description=lake.OPS_STORAGE.doc,
    kinds={"iceberg"},
    automation_condition=EVERY_HOUR,
    retry_policy=RETRIES,
)
@final
def storage(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
    rows = survey(platform.spark, platform.settings)
    totals = ("files", "bytes", "stored_bytes", "cost_usd_micros_month")
    shown = {name: sum(row[name] for row in rows) for name in totals}
    worst = max(rows, key=lambda row: row["small_file_pct"] or 0, default=None)
    if worst is not None:
        shown["most_small_files"] = f"{worst['name']}: {worst['small_file_pct'] or 0} %"
    return dg.MaterializeResult(metadata=shown)


def _shown(report: TableReport | IndexReport) -> dict[str, Any]:
    """A report as metadata; what it lists, as JSON."""
    listed = {name: value for name, value in report.to_json().items() if value is not None}
    return {n: dg.JsonMetadataValue(v) if isinstance(v, list) else v for n, v in listed.items()}


maintenance_assets = [*table_assets, *index_assets, orphans, storage]
