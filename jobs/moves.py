"""Moving an index between its base versions by hand: publish, roll back, resume.

Here: the same gate as a build's, the wait until every local replica has swapped, the live model, and the row in
`ops.index_versions`. Not here: the rules of the pointers (`pipelines.indexing.versions`), and building.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipelines.errors import TidemarkError
from pipelines.indexing import lineages
from pipelines.indexing.versions import Pointer, Versions
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pipelines.indexing.base import Manifest

SWAP_TIMEOUT_S = 120.0
CATCH_UP_TIMEOUT_S = 30.0
Say = Callable[[str], None]


class NotPublished(TidemarkError):
    """A candidate did not pass its gate."""


def publish(settings: Settings, index: str, version: str, say: Say = lambda text: None) -> Pointer:
    """Serve a newer version, if it passes the gate.

    Raises:
        NotPublished: it does not pass; the message says which checks, and what they found.
        VersionError: there is no such version, or it is older than the one that is served.
        NotCaughtUp: it is of another lineage, which does not hold yet what the served one does.
        SwapFailed: a replica did not swap.
    """
    from pipelines.indices import INDICES
    from pipelines.recommend import registry
    from quality import gates

    versions = Versions(settings.paths.indices, index)
    versions.path(version)
    served = versions.pointer()
    if served is not None and version < served.version:
        return versions.publish(version)  # which says why not, and what goes back
    refused = [finding for finding in gates.examine(settings, INDICES[index], version) if not finding.passed]
    if refused:
        raise NotPublished(
            f"{version} did not pass {', '.join(finding.name for finding in refused)}",
            where=f"index {index}",
            remedy="; ".join(finding.description for finding in refused),
        )
    manifest, current = _manifest(versions, version), versions.served()
    if current is not None and current.lineage != manifest.lineage:
        lineages.await_caught_up(settings.paths.delta, current, manifest, CATCH_UP_TIMEOUT_S)
    pointer = versions.publish(version)
    versions.wait_swapped(pointer, SWAP_TIMEOUT_S, say)
    lineages.end_others(settings.paths.delta, manifest)
    for model_id in sorted(set(manifest.models.values())):
        registry.set_live(settings, model_id)
    _record(settings, manifest, "published", None)
    return pointer


def rollback(
    settings: Settings, index: str, version: str | None, *, without_delta: bool, say: Say = lambda text: None
) -> Pointer:
    """Serve an older version, with the delta since its cut or without any.

    Raises:
        VersionError: there is no such older version, or the delta does not reach back to its cut.
        SwapFailed: a replica did not swap.
    """
    versions = Versions(settings.paths.indices, index)
    before = versions.pointer()
    pointer = versions.rollback(version, deltas=settings.paths.delta, without_delta=without_delta)
    versions.wait_swapped(pointer, SWAP_TIMEOUT_S, say)
    reason = f"from {before.version}" if before else None
    _record(settings, _manifest(versions, pointer.version), "rolled_back", reason)
    return pointer


def resume(settings: Settings, index: str, say: Say = lambda text: None) -> Pointer:
    """Serve the delta again.

    Raises:
        VersionError: nothing is served.
        SwapFailed: a replica did not swap.
    """
    versions = Versions(settings.paths.indices, index)
    pointer = versions.resume()
    versions.wait_swapped(pointer, SWAP_TIMEOUT_S, say)
    return pointer


def _manifest(versions: Versions, version: str) -> Manifest:
    from pipelines.indexing.base import read_manifest

    return read_manifest(versions.path(version))


def _record(settings: Settings, manifest: Manifest, event: str, reason: str | None) -> None:
    """A row in `ops.index_versions`, where builds have made that table; the pointer's own history has it anyway."""
    import pyarrow as pa

    from pipelines import lake

    table = lake.open_table(settings, lake.OPS_INDEX_VERSIONS.name)
    if table is None:
        return
    schema = table.schema().as_arrow()
    row = {
        "index": manifest.index,
        "version": manifest.version,
        "lineage": manifest.lineage,
        "event": event,
        "reason": reason,
        "position": manifest.cut.to_text(),
        "rows": manifest.counts.get("identities", 0),
        "bytes": sum(file.size_bytes for shard in manifest.shards for file in shard.files),
        "at": datetime.now(UTC),
    }
    table.append(pa.Table.from_pylist([row], schema=schema))
