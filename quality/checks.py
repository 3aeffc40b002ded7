"""Dagster's asset checks: `expectations`, what is declared of a table's rows, and `history`, whether they are as usual.

The former blocks: what comes after a curated or features table, or a candidate base, waits for it to pass. The latter
warns. Belongs here: thin checks that call `audit` and `gates`. No `from __future__ import annotations`: Dagster reads
the annotations of checks as they are.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import dagster as dg

from assets.backfill import days_key
from assets.curated import curated_assets
from assets.features import feature_assets
from assets.index import version_row
from assets.platform import Platform, final, key, record_version, reported_metadata
from assets.raw import raw_assets
from assets.repo import repo_assets
from pipelines import lake, staging
from pipelines.ads.index import ADS
from pipelines.backfill import by_event_day
from pipelines.curate import SOURCES
from pipelines.indexing.base import read_manifest
from pipelines.indexing.spec import IndexSpec
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES
from pipelines.suites import SUITES, Suite, of_delta, of_index
from quality import account_page as account
from quality import audit, gates, history, pages
from quality.expectations import Finding, Report, told
from quality.judgement import DECLARED

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

SHOWN = 5


class Audited(NamedTuple):
    """A report, and the snapshot that it is of."""

    report: Report
    snapshot_id: int

    def declared(self, asset: dg.AssetKey, suite: Suite) -> dg.AssetCheckResult:
        """Whether all that is declared holds."""
        mine = [finding for finding in self.report.findings if finding.expected.basis == DECLARED]
        severity = dg.AssetCheckSeverity.ERROR if suite.blocks else dg.AssetCheckSeverity.WARN
        return self._result("expectations", asset, mine, severity)

    def usual(self, asset: dg.AssetKey) -> dg.AssetCheckResult:
        """Whether all is as it was before."""
        mine = [finding for finding in self.report.findings if finding.expected.basis != DECLARED]
        return self._result("history", asset, mine, dg.AssetCheckSeverity.WARN)

    def _result(
        self, name: str, asset: dg.AssetKey, findings: list[Finding], severity: dg.AssetCheckSeverity
    ) -> dg.AssetCheckResult:
        broken = [finding for finding in findings if finding.passed is False]
        held = sum(finding.passed is True for finding in findings)
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        return dg.AssetCheckResult(
            asset_key=asset,
            check_name=name,
            passed=not broken,
            severity=severity,
            description=told(broken[:SHOWN]) + more if broken else f"{held} hold",
            metadata={
                "snapshot_id": str(self.snapshot_id),
                "held": held,
                "broken": dg.JsonMetadataValue([finding.words for finding in broken]),
                "not_judged": len(findings) - held - len(broken),
                "measures": dg.JsonMetadataValue({f.expected.name: f.expected.value for f in findings}),
            },
        )


def audited(
    context: dg.AssetCheckExecutionContext, platform: Platform, suite: Suite, exact_rows: int | None = None
) -> Audited:
    """Audit a table at the snapshot that its asset reported, staged or published, note it, and renew its page."""
    pinned = platform.read_staged(context, suite.table)

    def read(table: str) -> "DataFrame | None":
        is_there = lake.current_snapshot(platform.settings, table) or staging.snapshot(
            platform.settings, table
        )
        return platform.read_staged(context, table).rows if is_there else None

    noted = history.noted(platform.settings, suite.table)
    before = history.audits(noted, but=pinned.snapshot.id)
    found = audit.audit(suite, pinned.rows, read, before, datetime.now(UTC), exact_rows)
    new = history.record(platform.spark, found, pinned.snapshot.id, noted)
    pages.renew(platform.settings, suite.table, [*noted, *new])
    return Audited(found.report, pinned.snapshot.id)


@final
def publish(platform: Platform, suite: Suite, passed: Audited) -> None:
    """Let readers see what was audited."""
    staging.publish(platform.settings, suite.table, passed.snapshot_id)


def table_checks(suite: Suite, asset: dg.AssetKey) -> dg.AssetChecksDefinition:
    """The checks of what an asset writes to a table: what is declared of it, and its history; measured once for both.

    What holds all that is declared is published here. What does not stays on its branch; once the suite is mended, the
    check alone, run again, publishes it.
    """
    needed = [key(table) for table in suite.references]

    @dg.multi_asset_check(
        name=f"{'__'.join(asset.path)}_expectations",
        specs=[
            dg.AssetCheckSpec(
                "expectations",
                asset=asset,
                blocking=suite.blocks,
                description=f"every row of {suite.table} is what its suite declares",
                additional_deps=needed,
            ),
            dg.AssetCheckSpec(
                "history",
                asset=asset,
                description=f"the newest rows of {suite.table} are like those before them",
                additional_deps=needed,
            ),
        ],
    )
    def checks(
        context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> Iterator[dg.AssetCheckResult]:
        found = audited(context, platform, suite)
        if suite.blocks and not found.report.blocking:
            publish(platform, suite, found)
        # The one that may stop the run comes last.
        yield found.usual(asset)
        yield found.declared(asset, suite)

    return checks


def beside_check(asset: dg.AssetKey, suite: Suite, has_history: bool = True) -> dg.AssetChecksDefinition:
    """The checks of a table that is no asset, for a load or a stream writes it beside one that is.

    Args:
        asset: The one beside which it stands.
        suite: What its rows must be.
        has_history: Whether it should be as before: not so of copied deltas, whose rows come and go with each base.
    """
    told_of = ", and as it was before" if has_history else ""

    @dg.asset_check(
        asset=asset,
        name=suite.table.partition(".")[2],
        description=f"{suite.table} is what its suite declares{told_of}",
    )
    def check(
        context: dg.AssetCheckExecutionContext, platform: dg.ResourceParam[Platform]
    ) -> dg.AssetCheckResult:
        if lake.current_snapshot(platform.settings, suite.table) is None:
            return dg.AssetCheckResult(
                passed=True, description="no such table yet", severity=dg.AssetCheckSeverity.WARN
            )
        found = audited(context, platform, suite)
        broken = [one for one in found.report.broken if has_history or one.expected.basis == DECLARED]
        return dg.AssetCheckResult(
            passed=not broken,
            severity=dg.AssetCheckSeverity.WARN,
            description=told(broken) or "all holds",
            metadata={"snapshot_id": str(found.snapshot_id)},
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
            suite = of_index(spec)
            found = audited(context, platform, suite, manifest.counts["identities"])
            held |= {finding.expected.name: finding.words for finding in found.report.findings}
            failed += [finding.words for finding in found.report.blocking]
            if failed:
                record_version(platform, version_row(manifest, "refused", "; ".join(failed)))
            else:
                publish(platform, suite, found)
        return dg.AssetCheckResult(
            passed=not failed,
            description="; ".join(failed) or "all passed",
            metadata={"version": version, "findings": dg.JsonMetadataValue(held)},
        )

    return check


@dg.asset_check(
    asset=dg.AssetKey(["published", ADS.name]),
    name="account",
    description="the served base of the ads is like the one before: volume, and coverage of what a servable ad needs",
)
def ads_account_check(platform: dg.ResourceParam[Platform]) -> dg.AssetCheckResult:
    found = account.report(platform.settings)
    now = found.volumes[-1] if found.volumes else None
    counts = {"documents": now.documents, "servable": now.servable} if now else {}
    coverage = {field: now.coverage_pct(field) for field in now.covered} if now else {}
    return dg.AssetCheckResult(
        passed=not found.alarms,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(found.alarms) or "nothing is unusual",
        metadata={**counts, "coverage_pct": dg.JsonMetadataValue(coverage)},
    )


ASSETS = [
    key
    for asset in (*raw_assets, *curated_assets, *feature_assets, *repo_assets)
    for key in sorted(asset.keys)
]
suite_checks = [table_checks(SUITES[".".join(asset.path)], asset) for asset in ASSETS]
days_checks = [
    table_checks(SUITES[part.table], days_key(part.table))
    for source in SOURCES.values()
    for part in by_event_day(source)
]
beside_checks = [
    beside_check(key(lake.RAW_USER_INTERACTIONS.name), SUITES[spec.name])
    for spec in (lake.RAW_DEAD_LETTERS, lake.RAW_HOUSEHOLDS)
]
candidate_checks = [candidate_check(spec) for spec in INDICES.values()]
copy_checks = [
    beside_check(dg.AssetKey(["published", spec.name]), of_delta(spec), has_history=False)
    for spec in INDICES.values()
]
build_checks = [*suite_checks, *beside_checks, *candidate_checks, *copy_checks, ads_account_check]
all_checks = [*build_checks, *days_checks]
