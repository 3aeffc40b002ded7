"""Layer index: for each registered index its rows, a candidate base of them, and the published version.

Three assets an index, made from its specification alone: `index/<name>`, `base/<name>`, `published/<name>`. The checks
that stand between a candidate and its publishing are in `quality`; they block.
"""

import math
from typing import Any

import dagster as dg

from assets import columns
from assets.platform import (
    AFTER_UPSTREAM,
    RETRIES,
    Platform,
    described,
    final,
    key,
    record_version,
    reported_metadata,
)
from pipelines import index_rows, index_views, lake, served, staging, views
from pipelines.errors import TidemarkError
from pipelines.indexing import lineages
from pipelines.indexing.base import Manifest, read_manifest
from pipelines.indexing.build import Meta, build
from pipelines.indexing.spec import IndexSpec, lineage
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES, as_built
from pipelines.recommend import registry

SWAP_TIMEOUT_S = 300.0


class NotPublished(TidemarkError):
    """A candidate did not pass its gate."""


def index_assets(spec: IndexSpec) -> list[dg.AssetsDefinition]:
    """The three assets of an index."""
    table = index_rows.table(spec)
    reads = index_rows.reads(spec)

    @dg.asset(
        key=key(table.name),
        deps=[key(name) for name in reads],
        group_name="index",
        description=table.doc,
        kinds={"iceberg", "spark"},
        automation_condition=AFTER_UPSTREAM,
        retry_policy=RETRIES,
    )
    @final
    def rows(context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
        sources = {name: platform.read(context, name) for name in reads}
        stands_on = index_rows.standing(spec, {name: source.snapshot for name, source in sources.items()})
        lake.reshape(platform.spark, table)
        facts = index_rows.rows(spec, lambda name: (sources.get(name) or platform.read(context, name)).rows)
        written = described(staging.overwrite(platform.settings, facts, table, stands_on.summary()))
        return dg.MaterializeResult(metadata={**written, **columns.traced(facts, table)})

    @dg.asset(
        key=["base", spec.name],
        deps=[key(table.name)],
        group_name="base",
        description=f"a candidate base of the index {spec.name}: built, not yet served",
        kinds={"arrow", "spark"},
        automation_condition=AFTER_UPSTREAM,
        retry_policy=RETRIES,
    )
    @final
    def base(context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]) -> dg.MaterializeResult:
        facts = platform.read_staged(context, table.name)
        stands_on = index_rows.standing_of(facts.snapshot)
        versions = Versions(platform.settings.paths.indices, spec.name)
        version = versions.new_version(lineage(spec))
        meta = Meta(
            version=version,
            cut=stands_on.cut,
            horizon_time_ms=stands_on.max_broker_time_ms,
            models=stands_on.models,
            parameters=_parameters(platform, stands_on.models),
            sources={**stands_on.sources, table.name: facts.snapshot.id},
        )
        shards = max(1, math.ceil(facts.snapshot.rows / platform.settings.build.shard_facts))
        declared = as_built(platform.settings, spec)
        manifest = build(declared, facts.rows, versions.new_path(version), meta, shard_count=shards)
        for name, snapshot_id in manifest.sources.items():
            lake.tag(platform.spark, name, snapshot_id, f"base-{version}")
        record_version(platform, version_row(manifest, "built"))
        return dg.MaterializeResult(metadata=_described(manifest))

    @dg.asset(
        key=["published", spec.name],
        deps=[["base", spec.name]],
        group_name="published",
        description=f"the base of the index {spec.name} that is served",
        automation_condition=AFTER_UPSTREAM,
        retry_policy=RETRIES,
    )
    @final
    def published(
        context: dg.AssetExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> dg.MaterializeResult:
        version = str(reported_metadata(context.instance, dg.AssetKey(["base", spec.name]))["version"])
        refused = [result for result in platform.gate(platform.settings, spec, version) if not result.passed]
        if refused:
            raise NotPublished(
                f"{version} did not pass {', '.join(result.name for result in refused)}",
                where=f"index {spec.name}",
                remedy="; ".join(result.description for result in refused),
            )
        versions = Versions(platform.settings.paths.indices, spec.name)
        manifest = read_manifest(versions.path(version))
        lineages.require_succession(platform.settings.paths.delta, versions.served(), manifest)
        pointer = versions.publish(version)
        versions.wait_swapped(pointer, SWAP_TIMEOUT_S, context.log.info)
        manifests = {manifest.version: manifest for manifest in versions.manifests()}
        lineages.end_others(platform.settings.paths.delta, manifests[version])
        for model_id in sorted(set(manifest.models.values())):
            registry.set_live(platform.settings, model_id)
        record_version(platform, version_row(manifest, "published"))
        _say_served(platform, spec)
        kept = platform.settings.retention
        pruned = versions.prune(keep=kept.bases, hours=kept.hours)
        for name in pruned:
            record_version(platform, version_row(manifests[name], "deleted"))
        return dg.MaterializeResult(metadata={**_described(manifest), "pruned": dg.JsonMetadataValue(pruned)})

    return [rows, base, published]


def _say_served(platform: Platform, spec: IndexSpec) -> None:
    """SQL reads from now on what is served from now on."""
    lake.ensure(platform.spark, lake.OPS_SERVED)
    if lake.open_table(platform.settings, index_rows.delta_table(spec).name) is None:
        lake.ensure(platform.spark, index_rows.delta_table(spec))
    served.record(platform.settings, spec)
    views.ensure(platform.spark, platform.settings, [index_views.view(spec)])


def _parameters(platform: Platform, models: dict[str, str]) -> dict[str, object]:
    """What queries need of the models, pinned with the base."""
    if not models:
        return {}
    (model_id,) = set(models.values())
    return {"als": registry.load(platform.settings, model_id)[1].to_json()}


def version_row(manifest: Manifest, event: str, reason: str | None = None) -> dict[str, object]:
    """A base version as a row of `ops.index_versions`."""
    return {
        "index": manifest.index,
        "version": manifest.version,
        "lineage": manifest.lineage,
        "event": event,
        "reason": reason,
        "position": manifest.cut.to_text(),
        "rows": manifest.counts.get("identities", 0),
        "bytes": _bytes(manifest),
    }


def _described(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "rows": manifest.counts.get("identities", 0),
        "bytes": _bytes(manifest),
        "shards": len(manifest.shards),
        "counts": dg.JsonMetadataValue(manifest.counts),
        "cut": dg.JsonMetadataValue(manifest.cut.to_json()),
        "snapshot": dg.JsonMetadataValue({name: str(at) for name, at in manifest.sources.items()}),
        "models": dg.JsonMetadataValue(manifest.models),
    }


def _bytes(manifest: Manifest) -> int:
    return sum(file.size_bytes for shard in manifest.shards for file in shard.files)


all_index_assets = [asset for spec in INDICES.values() for asset in index_assets(spec)]
