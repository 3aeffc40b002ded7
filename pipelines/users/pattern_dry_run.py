"""A dry run of patterns: how often rules would have fired, over the curated history, by the evaluator itself.

Belongs here: running it on Spark, and counting. Does not belong here: when a rule fires (`patterns.firing`).
"""

from __future__ import annotations

import datetime
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from pipelines import lake
from pipelines.errors import TidemarkError
from pipelines.indexing import keyed
from pipelines.users.patterns import firing
from pipelines.users.patterns.index import USER
from pipelines.users.patterns.rules import Patterns

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from pipelines.settings import Settings

TABLE = lake.CURATED_USER_INTERACTIONS.name
_FIRED = pa.schema([("rule", pa.string()), ("user_id", pa.string()), ("fired_ms", pa.int64())])


class NoHistory(TidemarkError):
    """There is nothing to ask."""


class Tried(NamedTuple):
    """How often a rule would have fired.

    Attributes:
        rule: Its name.
        fired: How often.
        users: For how many users.
        by_day: Day (UTC, ISO) → how often; days without are left out.
    """

    rule: str
    fired: int
    users: int
    by_day: dict[str, int]


class DryRun(NamedTuple):
    """What became of a dry run: from a time to a time (not included), in ms since 1970, over a table's snapshot."""

    from_ms: int | None
    to_ms: int
    snapshot_id: int
    events: int
    rules: tuple[Tried, ...]


def run(
    spark: SparkSession,
    settings: Settings,
    patterns: Patterns,
    from_ms: int | None = None,
    to_ms: int | None = None,
) -> DryRun:
    """Ask history. A firing counts by when it fires; what lies ahead of the newest event is not known, and not counted.

    Args:
        spark: The session.
        settings: Where the lake is.
        patterns: The rules.
        from_ms: Only what fired from then on; None: from the beginning.
        to_ms: Only what fired before then; None: up to the newest event.

    Raises:
        NoHistory: No event was curated.
    """
    snapshot = lake.current_snapshot(settings, TABLE)
    events = None if snapshot is None else lake.read(spark, TABLE, snapshot.id)
    newest = None if events is None else _newest_ms(events)
    if events is None or snapshot is None or newest is None:
        raise NoHistory("no event was curated", where=TABLE, remedy="load some, and run `tidemark build`")
    end_ms = newest + 1 if to_ms is None else min(to_ms, newest + 1)
    found = fired(events, patterns).filter(f"fired_ms < {end_ms}")
    if from_ms is not None:
        found = found.filter(f"fired_ms >= {from_ms}")
    names = [rule.name for rule in patterns.rules]
    return DryRun(from_ms, end_ms, snapshot.id, snapshot.rows, tuple(_counted(found, names)))


def fired(events: DataFrame, patterns: Patterns) -> DataFrame:
    """Curated rows as what fires of them: rule, user_id, fired_ms."""
    make = functools.partial(_fired, patterns)
    return keyed.whole(events, USER, firing.columns(patterns), make, _FIRED)


def _fired(patterns: Patterns, rows: pa.Table) -> pa.Table:
    facts = firing.whole(patterns, rows)
    names = [said["rule"] for said in facts.column("payload_firings").to_pylist()]
    users = [rows.column(USER)[0].as_py()] * len(names)
    made = pa.table([names, users, facts.column("time_ms")], schema=_FIRED)
    return made.filter(made.column("rule").is_valid())


def _newest_ms(events: DataFrame) -> int | None:
    newest: Any = events.filter("NOT is_deleted").selectExpr("max(unix_millis(event_time)) AS newest").first()
    return None if newest is None else newest["newest"]


def _counted(found: DataFrame, names: list[str]) -> list[Tried]:
    """Counted by Spark in one pass, for the evaluator is what costs: of each rule its days, and in all (no day)."""
    from pyspark.sql import functions as F

    by_day = found.selectExpr("rule", "user_id", "floor(fired_ms / 86400000) AS day").rollup("rule", "day")
    counted = by_day.agg(F.count("*").alias("fired"), F.count_distinct("user_id").alias("users"))
    rows = counted.filter("rule IS NOT NULL").orderBy("day").collect()
    whole = {row["rule"]: (row["fired"], row["users"]) for row in rows if row["day"] is None}
    days: dict[str, dict[str, int]] = {name: {} for name in names}
    for row in rows:
        if row["day"] is not None:
            day = datetime.date(1970, 1, 1) + datetime.timedelta(days=row["day"])
            days[row["rule"]][day.isoformat()] = row["fired"]
    return [Tried(name, *whole.get(name, (0, 0)), days[name]) for name in names]
