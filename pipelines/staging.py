"""Write, audit, publish: rows are written to a branch of their table, and readers see them once they are audited.

Belongs here: the branch, what stands on it, and the move of the table's `main` to it. Does not belong here: what an
audit is (`quality`), and who orders one. The method is Iceberg's (its documentation, "Branching and Tagging": audit
branch). What was refused stays on the branch, to be looked at, until something else is staged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table import Table

from pipelines import lake
from pipelines.lake import Conflict, Snapshot, TableSpec
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

BRANCH = "staged"
_ATTEMPTS = 10
_REARRANGED = "replace"  # the operation of a commit that changes files and no rows


def overwrite(
    settings: Settings, df: DataFrame, spec: TableSpec, summary: Mapping[str, str] | None = None
) -> Snapshot:
    """Stage rows instead of all that the table has."""
    _begin(settings, df, spec)
    lake.overwrite(df, spec, summary, branch=BRANCH)
    return _newest(settings, spec)


def overwrite_where(
    settings: Settings,
    df: DataFrame,
    spec: TableSpec,
    condition: str,
    summary: Mapping[str, str],
    *,
    since: int,
) -> Snapshot:
    """Stage rows instead of those that a condition in Spark SQL names.

    Args:
        settings: Where the catalog is.
        df: The rows instead of them.
        spec: The table.
        condition: Names whole partitions.
        summary: Properties of the commit.
        since: The snapshot at which the rows were read.

    Raises:
        Conflict: A commit after `since` changed rows that the condition names; nothing was written.
    """
    _begin(settings, df, spec)
    lake.overwrite_where(df, spec, condition, summary, since=since, branch=BRANCH)
    return _newest(settings, spec)


def snapshot(settings: Settings, name: str) -> Snapshot | None:
    """What is staged and not published; None: nothing is."""
    table = lake.open_table(settings, name)
    branch = table.metadata.refs.get(BRANCH) if table is not None else None
    return next(lake.ancestors(settings, name, branch.snapshot_id), None) if branch is not None else None


def publish(settings: Settings, name: str, snapshot_id: int) -> None:
    """Make a staged snapshot the one that readers see, and end its branch. Nothing to do where it is so already.

    Compaction in between is no obstacle: it changed no rows, and what was staged stands on the files before it.

    Raises:
        Conflict: Rows of the table were changed after the snapshot was staged, or it is no longer there; the table is
            as it was.
    """
    for _ in range(_ATTEMPTS):
        table = lake.open_table(settings, name)
        main = table.metadata.current_snapshot_id if table is not None else None
        if table is None or table.metadata.snapshot_by_id(snapshot_id) is None:
            raise Conflict(f"the staged snapshot {snapshot_id} is gone", where=name, remedy="build again")
        if snapshot_id in _line(table, main):
            return
        if not _is_unchanged(table, main, snapshot_id):
            raise Conflict(
                f"rows were changed after the snapshot {snapshot_id} was staged",
                where=name,
                remedy="build again",
            )
        changes = table.manage_snapshots().set_current_snapshot(snapshot_id)
        branch = table.metadata.refs.get(BRANCH)
        if branch is not None and branch.snapshot_id == snapshot_id:
            changes.remove_branch(BRANCH)
        try:
            changes.commit()  # refused where main, or the branch, is not what was just looked at
            return
        except CommitFailedException:
            continue
    raise Conflict("others commit to the table all the time", where=name, remedy="build again")


def _begin(settings: Settings, df: DataFrame, spec: TableSpec) -> None:
    """The branch anew, as the table is now."""
    spark, table = df.sparkSession, spec.identifier
    if lake.current_snapshot(settings, spec.name) is None:
        spark.sql(f"ALTER TABLE {table} DROP BRANCH IF EXISTS `{BRANCH}`")
    spark.sql(f"ALTER TABLE {table} CREATE OR REPLACE BRANCH `{BRANCH}`")


def _newest(settings: Settings, spec: TableSpec) -> Snapshot:
    found = snapshot(settings, spec.name)
    if found is None:
        raise Conflict(
            "what was staged is gone", where=spec.name, remedy="let one build run at a time, and build again"
        )
    return found


def _line(table: Table, snapshot_id: int | None) -> Iterator[int]:
    """A snapshot and those before it, as far as they are known."""
    while snapshot_id is not None:
        yield snapshot_id
        held = table.metadata.snapshot_by_id(snapshot_id)
        snapshot_id = held.parent_snapshot_id if held is not None else None


def _is_unchanged(table: Table, main: int | None, snapshot_id: int) -> bool:
    """Whether the table has the rows that it had when a snapshot was staged: as it was then, but for compaction."""
    staged = table.metadata.snapshot_by_id(snapshot_id)
    for between in _line(table, main):
        if staged is not None and between == staged.parent_snapshot_id:
            return True
        held = table.metadata.snapshot_by_id(between)
        if held is None or held.summary is None or held.summary.operation.value != _REARRANGED:
            return False
    return main is None
