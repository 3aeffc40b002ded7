"""Views of the lake, in the catalog for Trino and Spark alike: made when their tables are there, kept as declared."""

from collections.abc import Iterator

import dagster as dg

from assets.platform import AFTER_UPSTREAM, RETRIES, Platform, key
from pipelines import views
from pipelines.explore import VIEWS

BUILT = ("curated", "features", "repo")
"""Layers that a build writes before; other tables come by themselves, and are no asset of it."""
_DEPS = [
    key(table)
    for table in dict.fromkeys(table for view in VIEWS.values() for table in view.tables)
    if table.split(".")[0] in BUILT
]
"""Of all views alike: they are made in one step."""


@dg.multi_asset(
    name="explore_views",
    specs=[
        dg.AssetSpec(
            key(view.identifier),
            deps=_DEPS,
            group_name=views.NAMESPACE,
            description=view.doc,
            kinds={"iceberg", "sql"},
            automation_condition=AFTER_UPSTREAM,
            skippable=True,
            metadata={"query": dg.MetadataValue.md(f"```sql{view.sql}\n```")},
        )
        for view in VIEWS.values()
    ],
    retry_policy=RETRIES,
)
def explore_views(platform: dg.ResourceParam[Platform]) -> Iterator[dg.MaterializeResult]:
    """Every view whose tables are there; another one waits for the next build."""
    done = views.ensure(platform.spark, platform.settings, list(VIEWS.values()))
    for view in VIEWS.values():
        if done[view.name] in (views.MADE, views.KEPT):
            yield dg.MaterializeResult(asset_key=key(view.identifier), metadata={"state": done[view.name]})


view_assets = [explore_views]
