"""Layer raw: pins down the snapshot of each raw table that a run builds on. Streams and loads write the tables."""

import dagster as dg

from assets import streams
from assets.platform import ON_SCHEDULE, RETRIES, Platform, described, final, key
from pipelines import lake
from pipelines.contracts import CONTRACTS, Contract


def _raw(contract: Contract) -> dg.AssetsDefinition:
    spec = lake.TABLES[contract.raw_table]

    @dg.asset(
        key=key(spec.name),
        deps=[streams.ARCHIVE],
        group_name="raw",
        description=spec.doc,
        kinds={"iceberg"},
        automation_condition=ON_SCHEDULE.ignore(streams.ALL),  # a build needs no stream
        retry_policy=RETRIES,
    )
    @final
    def raw(platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
        if lake.current_snapshot(platform.settings, spec.name) is None:
            lake.ensure(platform.spark, spec)
            lake.append(
                platform.spark.createDataFrame([], platform.spark.table(spec.identifier).schema), spec
            )
        snapshot = platform.newest(spec.name)
        cut = lake.position(platform.settings, spec.name, snapshot.id)
        return dg.MaterializeResult(
            metadata={**described(snapshot), "cut": dg.JsonMetadataValue(cut.to_json())}
        )

    return raw


raw_assets = [_raw(contract) for contract in CONTRACTS.values()]
