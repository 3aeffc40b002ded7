"""Layer repo: the dump of the ads repository, all of its tables at one point. Dagster asks for it by schedule."""

from collections.abc import Iterator

import dagster as dg

from assets.platform import ON_SCHEDULE, RETRIES, Platform, described, final, key
from pipelines import lake
from pipelines.ads import dump, repository

GROUP = "repo"


@dg.multi_asset(
    name="ads_repository",
    specs=[
        dg.AssetSpec(
            key(spec.name),
            group_name=GROUP,
            description=spec.doc,
            kinds={"iceberg", "spark"},
            automation_condition=ON_SCHEDULE,
        )
        for spec in lake.REPO.values()
    ],
    retry_policy=RETRIES,
    pool="ads_repository",
)
def ads_repository(platform: dg.ResourceParam[Platform]) -> Iterator[dg.MaterializeResult]:
    """The tables are joined: they are dumped together, or none is."""
    yield from _dumped(platform)


@final
def _dumped(platform: Platform) -> list[dg.MaterializeResult]:
    store = repository.opened(platform.settings)
    try:
        head, staged = dump.dump(platform.spark, platform.settings, store)
    finally:
        store.close()
    point_at = dg.TimestampMetadataValue(head.point_at.timestamp())
    return [
        dg.MaterializeResult(
            asset_key=key(name),
            metadata={**described(snapshot), "dump_id": head.dump_id, "point_at": point_at, "seq": head.seq},
        )
        for name, snapshot in staged.items()
    ]


repo_assets = [ads_repository]
