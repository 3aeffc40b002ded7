"""When assets are materialized: every four hours, each after what it depends on and after its blocking checks.

Belongs here: the sensor that carries out the assets' automation conditions, and the job of a whole build. The
conditions stand with the assets (`assets.platform`).
"""

from __future__ import annotations

import dagster as dg

BUILD = "build"

whole_build = dg.define_asset_job(
    BUILD,
    selection=dg.AssetSelection.all(),
    description="from what the archive has to published bases",
)

automation = dg.AutomationConditionSensorDefinition(
    "automation",
    target=dg.AssetSelection.all(),
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,
)
