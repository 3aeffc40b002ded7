"""Moving an index between its base versions by hand: publish, roll back, return to what a time served, resume.

Here: the same gate as a build's, the wait until every local replica has swapped, the live model, and the row in
`ops.index_versions`. Not here: the rules of the pointers (`pipelines.indexing.versions`), and building.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from pipelines import failpoints
from pipelines.errors import TidemarkError
from pipelines.indexing import lineages
from pipelines.indexing.versions import Pointer, VersionError, Versions, reaches
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
    from pipelines import served
    from pipelines.indices import INDICES
    from pipelines.recommend import registry
    from quality import gates

    versions = Versions(settings.paths.indices, index)
    versions.path(version)
    before = versions.pointer()
    if before is not None and version < before.version:
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
    failpoints.hit("moves.after_pointer")
    versions.wait_swapped(pointer, SWAP_TIMEOUT_S, say)
    failpoints.hit("moves.after_swap")
    lineages.end_others(settings.paths.delta, manifest)
    failpoints.hit("moves.after_end")
    for model_id in sorted(set(manifest.models.values())):
        registry.set_live(settings, model_id)
    _record(settings, manifest, "published", None)
    served.record(settings, INDICES[index])
    return pointer


def rollback(
    settings: Settings, index: str, version: str | None, *, without_delta: bool, say: Say = lambda text: None
) -> Pointer:
    """Serve an older version, with the delta since its cut or without any.

    Raises:
        VersionError: there is no such older version, or the delta does not reach back to its cut.
        SwapFailed: a replica did not swap.
    """
    from pipelines import served
    from pipelines.indices import INDICES

    versions = Versions(settings.paths.indices, index)
    before = versions.pointer()
    pointer = versions.rollback(version, deltas=settings.paths.delta, without_delta=without_delta)
    versions.wait_swapped(pointer, SWAP_TIMEOUT_S, say)
    reason = f"from {before.version}" if before else None
    _record(settings, _manifest(versions, pointer.version), "rolled_back", reason)
    served.record(settings, INDICES[index])
    return pointer


class Return(NamedTuple):
    """An index on its way back to what it served at a time."""

    index: str  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    served: str | None
    version: str
    with_delta: bool
    is_change: bool


def plan_return(settings: Settings, index: str, when: datetime) -> Return:
    """What an index served at a time, by the history of its pointer.

    Raises:
        VersionError: it served nothing then, or that version is gone, or the delta no longer reaches back to its cut.
    """
    from pipelines.indexing.base import check_files, read_manifest

    versions = Versions(settings.paths.indices, index)
    changes = [entry for entry in versions.history() if entry["replica"] is None]
    before = [entry for entry in changes if datetime.fromisoformat(entry["changed_at"]) <= when]
    if not before:
        since = f"it serves since {changes[0]['changed_at']}" if changes else "it never served any"
        raise VersionError(
            f"{index} served no version at {when.isoformat()}; {since}", remedy="give a later time"
        )
    then, now = before[-1], versions.pointer()
    directory = versions.path(then["version"])
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    if then["with_delta"] and not reaches(settings.paths.delta, manifest):
        raise VersionError(
            f"the delta of {index} no longer reaches back to the cut of {then['version']}",
            remedy=f"`tidemark rollback {index} --to {then['version']} --without-delta`, or give a later time",
        )
    version, with_delta = then["version"], then["with_delta"]
    is_change = now is None or (now.version, now.with_delta) != (version, with_delta)
    return Return(index, now.version if now else None, version, with_delta, is_change)


def carry_out(settings: Settings, back: Return, say: Say = lambda text: None) -> Pointer | None:
    """Serve what was planned; None where it is served already.

    Raises:
        VersionError: it is not to be had any more.
        SwapFailed: a replica did not swap.
    """
    if not back.is_change:
        return None
    if back.served is not None and back.version > back.served:
        return publish(settings, back.index, back.version, say)
    if back.served == back.version and back.with_delta:
        return resume(settings, back.index, say)
    return rollback(settings, back.index, back.version, without_delta=not back.with_delta, say=say)


def resume(settings: Settings, index: str, say: Say = lambda text: None) -> Pointer:
    """Serve the delta again.

    Raises:
        VersionError: nothing is served.
        SwapFailed: a replica did not swap.
    """
    from pipelines import served
    from pipelines.indices import INDICES

    versions = Versions(settings.paths.indices, index)
    pointer = versions.resume()
    versions.wait_swapped(pointer, SWAP_TIMEOUT_S, say)
    served.record(settings, INDICES[index])
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
