"""The only Definitions: assets, checks, resources, the build job and the sensors that keep things going.

Belongs here: putting together what other modules declare. `dagster dev -m jobs.definitions` shows and runs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets import freshness
from assets.ads import ads_assets
from assets.backfill import backfill_assets
from assets.columns import with_columns
from assets.curated import curated_assets
from assets.features import feature_assets
from assets.index import all_index_assets
from assets.maintenance import maintenance_assets
from assets.models import model_assets
from assets.platform import Platform
from assets.raw import raw_assets
from assets.repo import repo_assets
from assets.streams import stream_assets
from assets.users import user_assets
from assets.views import view_assets
from jobs.ads_jobs import ads_refresh
from jobs.lag import stream_lag
from jobs.openlineage import lineage_sensor
from jobs.schedules import automation, days_again, upkeep, whole_build
from pipelines import settings
from quality import gates
from quality.checks import all_checks


def build_defs(resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """The definitions, with other resources where a test or the command line has its own.

    Args:
        resource_overrides: Resource name → value; `platform` is the only one that there is.
    """
    platform = Platform(settings.load, gates.examine)
    configured = settings.load()
    days = backfill_assets(configured.build.first_day)
    told = [lineage_sensor(configured)] if configured.openlineage.url else []
    layers = (
        raw_assets,
        curated_assets,
        model_assets,
        feature_assets,
        repo_assets,
        all_index_assets,
        user_assets,
    )
    built = [*itertools.chain(*layers), *view_assets]
    return dg.Definitions(
        assets=[
            *freshness.expected([*stream_assets, *with_columns(built), *maintenance_assets, *ads_assets]),
            *days,
        ],
        asset_checks=all_checks,
        jobs=[whole_build, days_again, ads_refresh],
        sensors=[automation, upkeep, stream_lag, *told],
        resources={"platform": platform} | dict(resource_overrides or {}),
        executor=dg.in_process_executor,
    )


defs = build_defs()
