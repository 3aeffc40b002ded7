"""The gate that a candidate base must pass before it is published. Pure: it reads files, and knows no orchestrator.

Belongs here: what is looked at in any base, from the index's specification alone. Does not belong here: blocking a
publish (`checks` in Dagster, `assets.index` by calling `examine` once more), and how files are verified (`indexing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines import lake
from pipelines.curate import SOURCES
from pipelines.errors import TidemarkError
from pipelines.indexing.base import Base, Manifest, check_files, open_base, read_manifest
from pipelines.indexing.facts import Hashes
from pipelines.indexing.position import Position
from pipelines.indexing.spec import Documents, IndexSpec, Vector, lineage
from pipelines.indexing.versions import Versions
from pipelines.settings import Settings

MAX_DROP_PCT = 20
"""How much less than the served base a candidate may hold, of anything that is counted."""
MIN_PRESENCE_PCT = 50
"""Of the keys of any family that a stream feeds, how many must have the presence family."""


class Finding(NamedTuple):
    """What the gate says of one thing."""

    name: str
    passed: bool
    description: str


def examine(settings: Settings, spec: IndexSpec, version: str) -> list[Finding]:
    """Look at a candidate beside what is served now.

    Args:
        settings: Where the versions are.
        spec: The index.
        version: The candidate.

    Returns:
        What was found, good or bad. A candidate that cannot be opened gives one finding, that it cannot.
    """
    versions = Versions(settings.paths.indices, spec.name)
    pointer = versions.pointer()
    served = None
    if pointer is not None and pointer.version in versions.names():
        served = _without_undone_loads(settings, read_manifest(versions.path(pointer.version)))
    try:
        directory = versions.path(version)
    except TidemarkError as error:
        return [Finding("is_readable", False, str(error))]
    return examine_base(spec, directory, served)


def examine_base(spec: IndexSpec, directory: Path, served: Manifest | None) -> list[Finding]:
    """As `examine`, of a folder, beside the manifest of what is served (None before the first publish)."""
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        base = open_base(spec, directory, verify_files=False)
    except TidemarkError as error:
        return [Finding("is_readable", False, str(error))]
    return [
        Finding("is_readable", True, f"every file of {manifest.version} has the checksum of its manifest"),
        _lineage(spec, manifest),
        _cut(manifest, served),
        *_counts(manifest, served),
        *_presence(spec, manifest),
        _identities(base),
        *_models(spec, manifest),
        *_vectors(base),
    ]


def _without_undone_loads(settings: Settings, served: Manifest) -> Manifest:
    """What is served, as a measure: a load that was undone need not come again, nor as many rows as it had."""
    undone: frozenset[str] = frozenset()
    if served.cut.loads:
        raw = [s.raw_table for s in SOURCES.values() if lake.open_table(settings, s.raw_table) is not None]
        undone = served.cut.loads - lake.positions(settings, raw).loads if raw else undone
    if not undone:
        return served
    return served._replace(cut=Position(served.cut.topics, served.cut.loads - undone), shards=())


def _lineage(spec: IndexSpec, manifest: Manifest) -> Finding:
    ours = lineage(spec)
    return Finding(
        "has_our_lineage", manifest.lineage == ours, f"built as {manifest.lineage}; this code is {ours}"
    )


def _cut(manifest: Manifest, served: Manifest | None) -> Finding:
    passed = served is None or manifest.cut.covers(served.cut)
    other = (
        "nothing is served yet"
        if served is None
        else f"the cut of {served.version} is {served.cut.to_text()}"
    )
    return Finding("cut_goes_forward", passed, f"the cut is {manifest.cut.to_text()}; {other}")


def _counts(manifest: Manifest, served: Manifest | None) -> Iterator[Finding]:
    if (
        served is None or served.lineage != manifest.lineage
    ):  # of two lineages, `comparison` says what is lost
        return
    for name, before in served.counts.items():
        if name != "identities" and not name.startswith(("live_", "contributing")):
            continue
        now = manifest.counts.get(name, 0)
        passed = 100 * now >= (100 - MAX_DROP_PCT) * before
        yield Finding(f"keeps_{name}", passed, f"{now} now, {before} served; at most {MAX_DROP_PCT} % may go")


def _presence(spec: IndexSpec, manifest: Manifest) -> Iterator[Finding]:
    if not isinstance(spec.read, Documents):
        return
    present = manifest.counts.get(f"live_{spec.read.presence}", 0)
    for family in spec.families:
        if family.stream is None or family.name == spec.read.presence:
            continue
        keys = manifest.counts.get(f"live_{family.name}", 0)
        passed = 100 * present >= MIN_PRESENCE_PCT * keys
        said = f"{present} keys have {spec.read.presence}, {keys} have {family.name}; at least {MIN_PRESENCE_PCT} %"
        yield Finding(f"presence_covers_{family.name}", passed, said)


def _identities(base: Base) -> Finding:
    doubled = sum(_doubled(shard.identities.hashes) for shard in base.shards)
    return Finding("identities_are_unique", doubled == 0, f"{doubled} identities are there more than once")


def _doubled(hashed: Hashes) -> int:
    """How many hashes repeat the one before, in a column that is sorted by its first half."""
    lookup, check = np.asarray(hashed.lookup), np.asarray(hashed.check)
    alike = np.flatnonzero(lookup[1:] == lookup[:-1])
    if not len(alike):
        return 0
    runs = np.union1d(alike, alike + 1)
    pairs = np.column_stack([lookup[runs], check[runs]])
    return len(pairs) - len(np.unique(pairs, axis=0))


def _models(spec: IndexSpec, manifest: Manifest) -> Iterator[Finding]:
    of_models = [family.name for family in spec.families if family.stream is None]
    if not of_models:
        return
    unnamed = [
        name for name in of_models if manifest.counts.get(f"live_{name}", 0) and name not in manifest.models
    ]
    used = set(manifest.models.values())
    pinned = {
        value["model_id"]
        for value in manifest.parameters.values()
        if isinstance(value, dict) and "model_id" in value
    }
    passed = not unnamed and len(used) <= 1 and pinned <= used
    said = f"models {sorted(used)}, parameters of {sorted(pinned)}, without a model: {unnamed}"
    yield Finding("has_one_model", passed, said)


def _vectors(base: Base) -> Iterator[Finding]:
    for path in base.spec.access:
        if not isinstance(path, Vector):
            continue
        # A model gives every row that it has a vector; a source need not.
        may_lack = base.spec.family(path.family).stream is not None
        broken = sum(
            _broken(shard.payload[path.family][path.column], path.dimensions, may_lack)
            for shard in base.shards
        )
        yield Finding(
            f"{path.name}_is_finite",
            broken == 0,
            f"{broken} vectors are not {path.dimensions} finite numbers",
        )


def _broken(vectors: pa.Array, dimensions: int, may_lack: bool) -> int:
    offsets, is_null = np.asarray(vectors.offsets), np.asarray(vectors.is_null())
    is_whole = (np.diff(offsets) == dimensions) & ~is_null
    values = np.asarray(vectors.values)
    bad_before = np.concatenate([[0], np.cumsum(~np.isfinite(values))])
    is_finite = bad_before[offsets[1:]] == bad_before[offsets[:-1]]
    is_broken = ~(is_whole & is_finite)
    return int(np.count_nonzero(is_broken & ~is_null if may_lack else is_broken))
