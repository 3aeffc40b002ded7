"""When assets are materialized: every four hours, each after what it depends on and after its blocking checks.

Belongs here: the sensors that carry out the assets' automation conditions, and the jobs: a whole build, and days
computed again, which nothing but a person asks for. The conditions stand with the assets (`assets.platform`,
`assets.maintenance`, `assets.ads`). Maintenance, the daily comparison of the ads account among it, has a sensor of
its own: no run is both.
"""

from __future__ import annotations

import dagster as dg

from assets import ads, backfill, maintenance

BUILD, BACKFILL = "build", "backfill"
_MAINTENANCE = dg.AssetSelection.groups(maintenance.GROUP, ads.GROUP)
_DAYS = dg.AssetSelection.groups(backfill.GROUP)
_BUILT = dg.AssetSelection.all() - _MAINTENANCE - _DAYS

whole_build = dg.define_asset_job(
    BUILD,
    selection=_BUILT,
    description="from what the archive has to published bases",
)

days_again = dg.define_asset_job(
    BACKFILL, selection=_DAYS, description="some days of events and of dead letters, computed again from raw"
)

automation = dg.AutomationConditionSensorDefinition(
    "automation",
    target=_BUILT,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,
)

upkeep = dg.AutomationConditionSensorDefinition(
    maintenance.GROUP,
    target=_MAINTENANCE,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=60,
)
