"""Layer curated: for each identity what stands of it, and the account of every raw row."""

from collections.abc import Iterator

import dagster as dg

from assets import columns
from assets.platform import AFTER_UPSTREAM, RETRIES, Pinned, Platform, described, final, key, summary
from pipelines import lake, staging
from pipelines.curate import SOURCES, Account, Source, account_row, curate
from pipelines.ingest import evolution


def _curated(source: Source) -> dg.AssetsDefinition:
    specs = [lake.TABLES[part.table] for part in source.tables]

    @dg.multi_asset(
        name=f"curated_{source.contract.name}",
        specs=[
            dg.AssetSpec(
                key(spec.name),
                deps=[key(source.raw_table)],
                group_name="curated",
                description=spec.doc,
                kinds={"iceberg", "spark"},
                automation_condition=AFTER_UPSTREAM,
            )
            for spec in specs
        ],
        retry_policy=RETRIES,
        pool=specs[0].name,
    )
    def curated(
        context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> Iterator[dg.MaterializeResult]:
        yield from _written(source, platform.read(context, source.raw_table), platform)

    return curated


@final
def _written(source: Source, raw: Pinned, platform: Platform) -> list[dg.MaterializeResult]:
    cut = lake.position(platform.settings, raw.table, raw.snapshot.id)
    source = source.under(evolution.current(platform.settings, source.contract))
    result = curate(source, raw.rows, rows=raw.snapshot.rows, snapshot_id=raw.snapshot.id)
    account = dg.JsonMetadataValue(result.account.to_json())
    written: list[dg.MaterializeResult] = []
    for part in source.tables:
        spec = source.spec(part)
        evolution.grow(platform.settings, spec, source.contract)
        lake.ensure(platform.spark, spec)
        rows = result.table(part)
        staged = staging.overwrite(platform.settings, rows, spec, summary(cut, result.max_broker_time_ms))
        metadata = {**described(staged), **columns.traced(rows, spec), "account": account}
        written.append(dg.MaterializeResult(asset_key=key(spec.name), metadata=metadata))
    result.close()
    record_account(platform, result.account)
    return written


def record_account(platform: Platform, account: Account) -> None:
    """A row in `ops.account`."""
    lake.ensure(platform.spark, lake.OPS_ACCOUNT)
    schema = platform.spark.table(lake.OPS_ACCOUNT.identifier).schema
    lake.append(platform.spark.createDataFrame([account_row(account)], schema), lake.OPS_ACCOUNT)


curated_assets = [_curated(source) for source in SOURCES.values()]
