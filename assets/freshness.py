"""How old each asset may become: Dagster's freshness policies, by how often an asset is asked for.

Belongs here: the policies, a group of assets each. Does not belong here: when assets are asked for (`platform`,
`maintenance`), and what Dagster makes of it.

Days that a person has computed again (`backfill`) have none: nothing expects them, and the tables that they are days of
have their own.
"""

from collections.abc import Iterable
from datetime import timedelta

import dagster as dg

from assets import ads, maintenance, streams

BUILT = dg.FreshnessPolicy.time_window(warn_window=timedelta(hours=5), fail_window=timedelta(hours=9))
"""A build every four hours, which takes a while: one that is missing warns, two fail."""
HOURLY = dg.FreshnessPolicy.time_window(warn_window=timedelta(hours=2), fail_window=timedelta(hours=6))
DAILY = dg.FreshnessPolicy.time_window(warn_window=timedelta(hours=26), fail_window=timedelta(hours=50))
FOLLOWED = dg.FreshnessPolicy.time_window(warn_window=timedelta(minutes=15), fail_window=timedelta(hours=1))
"""A stream that was neither caught up nor went on for so long (`jobs.lag` reports it when it is, or does)."""

BY_GROUP = {
    streams.GROUP: FOLLOWED,
    "raw": BUILT,
    "curated": BUILT,
    "models": BUILT,
    "features": BUILT,
    "repo": BUILT,
    "index": BUILT,
    "base": BUILT,
    "published": BUILT,
    "corrected": BUILT,
    "explore": BUILT,
    maintenance.GROUP: HOURLY,
    ads.GROUP: DAILY,
}


def expected(
    assets: Iterable[dg.AssetsDefinition | dg.AssetSpec],
) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """The same assets, each with its policy.

    Raises:
        KeyError: One is of a group that has none.
    """
    return list(dg.map_asset_specs(_with_policy, assets))


def _with_policy(asset: dg.AssetSpec) -> dg.AssetSpec:
    is_daily = asset.key in maintenance.orphans.keys
    return dg.apply_freshness_policy(asset, DAILY if is_daily else BY_GROUP[str(asset.group_name)])
