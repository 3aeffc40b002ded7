"""When assets are materialized: every four hours, each after what it depends on and after its blocking checks.

Belongs here: the sensors that carry out the assets' automation conditions, and the job of a whole build. The conditions
stand with the assets (`assets.platform`, `assets.maintenance`). Maintenance has a sensor of its own: no run is both.
"""

from __future__ import annotations

import dagster as dg

from assets.maintenance import GROUP

BUILD = "build"
_MAINTENANCE = dg.AssetSelection.groups(GROUP)
_BUILT = dg.AssetSelection.all() - _MAINTENANCE

whole_build = dg.define_asset_job(
    BUILD,
    selection=_BUILT,
    description="from what the archive has to published bases",
)

automation = dg.AutomationConditionSensorDefinition(
    "automation",
    target=_BUILT,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,
)

upkeep = dg.AutomationConditionSensorDefinition(
    GROUP,
    target=_MAINTENANCE,
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=60,
)
