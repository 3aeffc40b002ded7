"""When assets are materialized: every four hours, each after what it depends on and after its blocking checks.

Belongs here: the sensor that carries out the assets' automation conditions, and the jobs: a whole build, and days
computed again, which nothing but a person asks for. The conditions stand with the assets (`assets.platform`).
"""

from __future__ import annotations

import dagster as dg

from assets import backfill

BUILD = "build"

BACKFILL = "backfill"

DAYS = dg.AssetSelection.groups(backfill.GROUP)

whole_build = dg.define_asset_job(
    BUILD,
    selection=dg.AssetSelection.all() - DAYS,
    description="from what the archive has to published bases",
)

days_again = dg.define_asset_job(
    BACKFILL, selection=DAYS, description="some days of events and of dead letters, computed again from raw"
)

automation = dg.AutomationConditionSensorDefinition(
    "automation",
    target=dg.AssetSelection.all() - DAYS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,
)
