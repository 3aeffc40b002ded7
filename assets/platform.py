"""What every asset is given: the settings, one Spark session a run, and the gate that a candidate base must pass.

Belongs here: resources, and what all assets share (keys, retries, automation, metadata of a snapshot). No
`from __future__ import annotations` in this folder: Dagster reads the annotations of assets as they are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar

import dagster as dg

from pipelines import lake, staging
from pipelines.errors import TidemarkError
from pipelines.indexing.position import EMPTY, Position, from_text
from pipelines.indexing.spec import IndexSpec
from pipelines.lake import Snapshot
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

EVERY_FOUR_HOURS = "0 */4 * * *"
ON_SCHEDULE = dg.AutomationCondition.on_cron(EVERY_FOUR_HOURS)
_DEPENDENCY_IS_GOOD = dg.AutomationCondition.will_be_requested() | dg.AutomationCondition.all_checks_match(
    dg.AutomationCondition.check_passed(), blocking_only=True
)
AFTER_UPSTREAM = dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_match(_DEPENDENCY_IS_GOOD)
"""After each update of what it depends on, unless a blocking check of that failed. What is asked for in the same tick
is in the same run, and there Dagster itself waits for the checks: a scheduled build is one run, with one Spark session.
(`all_deps_blocking_checks_passed` would make a run of each layer, for a check is no part of the tick.)"""
RETRIES = dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)


P = ParamSpec("P")
R = TypeVar("R")


class Result(Protocol):
    """What a gate says of one thing that it looked at."""

    @property
    def name(self) -> str: ...

    @property
    def passed(self) -> bool: ...

    @property
    def description(self) -> str: ...


Gate = Callable[[Settings, IndexSpec, str], Sequence[Result]]
"""From an index and the version of a candidate base to what was found; all must have passed before it is published."""


class Platform:
    """The settings, the gate, and Spark when it is first asked for: one session a run, for a run is a process."""

    def __init__(self, read_settings: Callable[[], Settings], gate: Gate) -> None:
        self._read_settings = read_settings
        self.gate = gate

    @functools.cached_property
    def settings(self) -> Settings:
        """Read when first needed, so that a code location loads without them."""
        return self._read_settings()

    @functools.cached_property
    def spark(self) -> "SparkSession":
        """The run's one session."""
        from pipelines.spark import session

        return session(self.settings, "tidemark build")

    def read(self, context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, table: str) -> "Pinned":
        """A table at the snapshot that its asset reported last, or at the newest that readers see."""
        snapshot = pinned(context.instance, self.settings, table)
        return Pinned(table, snapshot, lake.read(self.spark, table, snapshot.id))

    def read_staged(
        self, context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, table: str
    ) -> "Pinned":
        """As `read`; a snapshot that its asset staged and that is not published yet too."""
        staged = staging.snapshot(self.settings, table)
        if staged is None or str(staged.id) != _reported_snapshot(context.instance, table):
            return self.read(context, table)
        return Pinned(table, staged, lake.read(self.spark, table, staged.id))

    def newest(self, table: str) -> Snapshot:
        """The newest snapshot that readers see."""
        snapshot = lake.current_snapshot(self.settings, table)
        if snapshot is None:
            raise lake.LakeError(
                "the table has no rows yet", where=table, remedy="materialize the assets before it"
            )
        return snapshot


class Pinned(NamedTuple):
    """A table at one snapshot."""

    table: str
    snapshot: Snapshot
    rows: "DataFrame"

    @property
    def cut(self) -> Position:
        """The position that the snapshot says it holds."""
        return (
            from_text(self.snapshot.summary[lake.POSITION])
            if lake.POSITION in self.snapshot.summary
            else EMPTY
        )


def key(table: str) -> dg.AssetKey:
    """The asset key of a table: its namespace and its name."""
    return dg.AssetKey(table.split("."))


def pinned(instance: dg.DagsterInstance, settings: Settings, table: str) -> Snapshot:
    """The snapshot that the table's asset reported last; the newest one where it reported none that readers see.

    Raises:
        LakeError: The table has no snapshot at all.
    """
    reported = _reported_snapshot(instance, table)
    for snapshot in lake.ancestors(settings, table):
        if reported is None or str(snapshot.id) == reported:
            return snapshot
    newest = lake.current_snapshot(settings, table)
    if newest is None:
        raise lake.LakeError(
            "the table has no rows yet", where=table, remedy="materialize the assets before it"
        )
    return newest


def _reported_snapshot(instance: dg.DagsterInstance, table: str) -> str | None:
    found = reported_metadata(instance, key(table)).get("snapshot_id")
    return None if found is None else str(found)


def reported_metadata(instance: dg.DagsterInstance, asset_key: dg.AssetKey) -> Mapping[str, Any]:
    """What the newest materialization of an asset said of itself."""
    event = instance.get_latest_materialization_event(asset_key)
    if event is None or event.asset_materialization is None:
        return {}
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def described(snapshot: Snapshot) -> dict[str, Any]:
    """Metadata of a snapshot: rows, bytes, its id, and the cut that it holds."""
    metadata: dict[str, Any] = {
        "dagster/row_count": snapshot.rows,
        "rows": snapshot.rows,
        "bytes": snapshot.bytes,
        "snapshot_id": str(snapshot.id),  # as text: a browser's numbers do not hold 64 bits
    }
    if position := snapshot.summary.get(lake.POSITION):
        metadata["cut"] = dg.JsonMetadataValue(from_text(position).to_json())
    return metadata


def summary(cut: Position, max_broker_time_ms: int | None) -> dict[str, str]:
    """What a written snapshot says of itself, so that the next step reads it there and not from a stream."""
    said = {lake.POSITION: cut.to_text()}
    if max_broker_time_ms is not None:
        said[lake.MAX_BROKER_TIME_MS] = str(max_broker_time_ms)
    return said


def final(function: Callable[P, R]) -> Callable[P, R]:
    """An asset's function whose understood errors are told as they are and not tried again: they would come back."""

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TidemarkError as error:
            raise dg.Failure(
                str(error), metadata={"error": type(error).__name__}, allow_retries=False
            ) from error

    return told


def record_version(platform: Platform, event: Mapping[str, Any]) -> None:
    """A row in `ops.index_versions`: what happened to a base version."""
    lake.ensure(platform.spark, lake.OPS_INDEX_VERSIONS)
    schema = platform.spark.table(lake.OPS_INDEX_VERSIONS.identifier).schema
    row = dict.fromkeys(schema.names) | dict(event) | {"at": datetime.now(UTC)}
    lake.append(platform.spark.createDataFrame([row], schema), lake.OPS_INDEX_VERSIONS)
