"""What of each index is served, where SQL finds it: the tag `published` on `index.<name>`, and a row in `ops.served`.

Belongs here: saying in the catalog what the pointer says. Does not belong here: moving the pointer
(`indexing.versions`, which is the truth), and the views that read this (`index_views`).

A view cannot look up of which snapshot a table is to be read. A tag can move: `FOR VERSION AS OF 'published'` is the
rows of the base that is served. What was served is said by whoever moves the pointer, and again by the streaming
process each minute, which mends what somebody who died left undone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pyarrow as pa
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.expressions import EqualTo
from pyiceberg.table import Table

from pipelines import index_rows, lake
from pipelines.indexing.base import Manifest, horizon_from
from pipelines.indexing.spec import BadSpec, IndexSpec, read_as
from pipelines.indexing.versions import Pointer, Versions
from pipelines.settings import Settings

TAG = "published"
_ATTEMPTS = 8


def record(settings: Settings, spec: IndexSpec) -> bool:
    """Say what of an index is served, where the catalog says otherwise or nothing yet; whether anything changed.

    Without the table `ops.served`, which a build or the streaming process makes, nothing is said.
    """
    if lake.open_table(settings, lake.OPS_SERVED.name) is None:
        return False
    return _again(lambda: _record(settings, spec))


def _record(settings: Settings, spec: IndexSpec) -> bool:
    versions = Versions(settings.paths.indices, spec.name)
    pointer, manifest = versions.pointer(), versions.served()
    rows = lake.open_table(settings, index_rows.table(spec).name)
    snapshot_id = manifest.sources.get(index_rows.table(spec).name) if manifest else None
    if rows is None or snapshot_id is None or rows.snapshot_by_id(snapshot_id) is None:
        snapshot_id = None  # a base of other rows than the catalog's: SQL says that there is no such tag
    is_tagged = rows is not None and _tag(rows, snapshot_id)
    wanted = _row(spec, pointer, manifest, snapshot_id) if pointer and manifest else None
    table = lake.open_table(settings, lake.OPS_SERVED.name)
    assert table is not None
    of_index = EqualTo("index", spec.name)  # type: ignore[call-arg,arg-type]  # its stubs know JSON alone
    held = table.scan(row_filter=of_index).to_arrow().to_pylist()
    if held == ([wanted] if wanted else []):
        return is_tagged
    row = pa.Table.from_pylist([wanted] if wanted else [], schema=table.schema().as_arrow())
    if held:
        table.overwrite(row, overwrite_filter=of_index)
    else:
        table.append(row)
    return True


def _tag(table: Table, snapshot_id: int | None) -> bool:
    """Move the tag; whether it was elsewhere."""
    held = table.metadata.refs.get(TAG)
    if (held.snapshot_id if held else None) == snapshot_id:
        return False
    with table.manage_snapshots() as manage:
        if snapshot_id is None:
            manage.remove_tag(TAG)
        else:
            manage.create_tag(snapshot_id, TAG)
    return True


def _row(spec: IndexSpec, pointer: Pointer, manifest: Manifest, snapshot_id: int | None) -> dict[str, Any]:
    return {
        "index": spec.name,
        "version": manifest.version,
        "lineage": manifest.lineage,
        "is_with_delta": pointer.with_delta,
        "snapshot_id": snapshot_id,
        "horizon_from_ms": _horizon(spec, manifest),
        "changed_at": datetime.fromisoformat(pointer.changed_at),
    }


def _horizon(spec: IndexSpec, manifest: Manifest) -> int | None:
    try:
        return horizon_from(read_as(spec, manifest.declaration), manifest.horizon_time_ms)
    except BadSpec:  # of a lineage that this code cannot read, nor the view
        return None


def _again(step: Callable[[], bool]) -> bool:
    """Another commit may come between: then all is read and decided again."""
    for attempt in range(_ATTEMPTS):
        try:
            return step()
        except CommitFailedException:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
    raise AssertionError
