"""Dagster's asset checks. They block: what comes after a curated table or a candidate base waits for them to pass.

Belongs here: thin checks that call `expectations` and `gates`. No `from __future__ import annotations`: Dagster reads
the annotations of checks as they are.
"""

import dagster as dg

from assets.index import version_row
from assets.platform import Platform, key, record_version, reported_metadata
from pipelines.indexing.base import read_manifest
from pipelines.indexing.spec import IndexSpec
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES
from quality import expectations, gates


def curated_check(table: str) -> dg.AssetChecksDefinition:
    """The expectations of a curated table."""

    @dg.asset_check(
        asset=key(table),
        name="expectations",
        blocking=True,
        description=f"every row of {table} is valid",
    )
    def check(
        context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> dg.AssetCheckResult:
        pinned = platform.read(context, table)
        report = expectations.run(table, expectations.CURATED[table](), pinned.rows)
        return dg.AssetCheckResult(
            passed=report.passed,
            description="; ".join(report.failed) or "all hold",
            metadata={
                "snapshot_id": str(pinned.snapshot.id),
                "expectations": dg.JsonMetadataValue(report.findings),
            },
        )

    return check


def candidate_check(spec: IndexSpec) -> dg.AssetChecksDefinition:
    """The gate of a candidate base, and the expectations of the rows that it was built of."""
    asset = dg.AssetKey(["base", spec.name])

    @dg.asset_check(
        asset=asset,
        name="gate",
        blocking=True,
        description=f"the candidate of {spec.name} may be published",
    )
    def check(
        context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> dg.AssetCheckResult:
        version = str(reported_metadata(context.instance, asset)["version"])
        findings = gates.examine(platform.settings, spec, version)
        failed = [f"{finding.name}: {finding.description}" for finding in findings if not finding.passed]
        held = {finding.name: finding.description for finding in findings}
        if not failed or findings[0].passed:
            manifest = read_manifest(Versions(platform.settings.paths.indices, spec.name).path(version))
            rows = platform.read(context, f"index.{spec.name}").rows
            suite = expectations.index_rows(spec, manifest.counts["identities"])
            report = expectations.run(f"index.{spec.name}", suite, rows)
            held |= report.findings
            failed += report.failed
            if failed:
                record_version(platform, version_row(manifest, "refused", "; ".join(failed)))
        return dg.AssetCheckResult(
            passed=not failed,
            description="; ".join(failed) or "all passed",
            metadata={"version": version, "findings": dg.JsonMetadataValue(held)},
        )

    return check


curated_checks = [curated_check(table) for table in expectations.CURATED]
candidate_checks = [candidate_check(spec) for spec in INDICES.values()]
