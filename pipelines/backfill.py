"""Days computed again: the rows of a day from raw, by the present code, in place of those that are there.

Belongs here: which rows a day has, how they differ from those that a table holds, and replacing these alone. Does not
belong here: what a record is (`contracts`), which of an identity's records stands (`curate`), and when it runs
(`assets`, `jobs`).

A day of a curated table is a day of events; a day of `raw.dead_letters` is a day of ingest. Either way a day has rows
of its own, and no others are touched: what the present code makes of other days is theirs to say.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import lake, staging
from pipelines.contracts import CONTRACTS, Contract, frames
from pipelines.curate import Part, Source, judge, standing
from pipelines.errors import TidemarkError
from pipelines.ingest import evolution
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

PLACE = ("topic", "topic_id", "partition", "offset", "load_id", "load_row")
"""What names a record: where it is from."""

_EXAMPLES = 5
_SLACK = datetime.timedelta(days=1)


class BackfillError(TidemarkError):
    """A day cannot be computed again."""


class Days(NamedTuple):
    """Days in UTC, the first and the last included."""

    first: datetime.date
    last: datetime.date

    def where(self, column: str, slack: datetime.timedelta = datetime.timedelta()) -> str:
        """The condition, in Spark SQL, that a time is on one of them (or up to `slack` before or after)."""
        begin, end = self.first - slack, self.last + datetime.timedelta(days=1) + slack
        return f"{column} >= TIMESTAMP '{begin} 00:00:00' AND {column} < TIMESTAMP '{end} 00:00:00'"

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


def days_of(text: str) -> Days:
    """Read `2026-11-20` or `2026-11-20..2026-11-22`.

    Raises:
        BackfillError: It is neither, or the last day is before the first.
    """
    first, _, last = text.partition("..")
    try:
        days = Days(datetime.date.fromisoformat(first), datetime.date.fromisoformat(last or first))
    except ValueError as error:
        raise BackfillError(
            f"{text!r} is no day: {error}", remedy="2026-11-20, or 2026-11-20..2026-11-22"
        ) from error
    if days.last < days.first:
        raise BackfillError(f"{days.last} is before {days.first}", remedy="give the first day first")
    return days


class Changes(NamedTuple):
    """How rows differ from those that a table holds.

    Attributes:
        table: The table.
        rows: Rows by the present code.
        added: How many of them the table does not have.
        removed: How many rows the table has that would go.
        changed: How many say something else.
        by_column: Of the changed ones, how many differ in each column.
        examples: A few of them: what happened, identity, and the columns before and after.
    """

    table: str
    rows: int
    added: int
    removed: int
    changed: int
    by_column: dict[str, int]
    examples: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json` and metadata."""
        return self._asdict() | {"examples": list(self.examples)}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Changes:
        """Read `to_json`."""
        return cls(**{**said, "examples": tuple(said["examples"])})


class Rebuilt(NamedTuple):
    """Rows for some days of a table, and the snapshot that they are to replace those days of; kept until `close`."""

    settings: Settings
    spec: lake.TableSpec
    rows: DataFrame
    where: str
    replaced: lake.Snapshot
    days: Days

    def before(self, spark: SparkSession) -> DataFrame:
        """The rows that the table holds for the days."""
        held = lake.read(spark, self.spec.name, self.replaced.id).filter(self.where)
        missing = [column for column in self.spec.columns if column.name not in held.columns]
        return held.selectExpr("*", *[f"cast(NULL AS {c.type}) AS `{c.name}`" for c in missing])

    def write(self) -> None:
        """Replace the rows of the days in one commit, which says of itself what the table said before.

        Raises:
            BackfillError: Another commit changed these days meanwhile; nothing was written.
        """
        with self._told():
            lake.overwrite_where(self.rows, self.spec, self.where, self._said(), since=self.replaced.id)

    def stage(self) -> lake.Snapshot:
        """As `write`, on the branch: readers see it once it is published."""
        with self._told():
            return staging.overwrite_where(
                self.settings, self.rows, self.spec, self.where, self._said(), since=self.replaced.id
            )

    def _said(self) -> dict[str, str]:
        return lake.standing(lake.ancestors(self.settings, self.spec.name, self.replaced.id))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except lake.Conflict as error:
            raise BackfillError(
                f"another commit changed these days meanwhile: {error.what}",
                where=f"{self.spec.name}, {self.days}",
                remedy="run it again",
            ) from error

    def close(self) -> None:
        """Let the rows go."""
        self.rows.unpersist()


def by_event_day(source: Source) -> tuple[Part, ...]:
    """The parts of a source whose tables are partitioned by day of event: those that have days."""
    return tuple(p for p in source.parts if "days(event_time)" in lake.TABLES[p.table].partitioned_by)


def event_days(spark: SparkSession, settings: Settings, source: Source, part: Part, days: Days) -> Rebuilt:
    """The rows that some days of a curated table have by the present code.

    For each identity the greatest of all its facts stands; it is a row of these days if its event is on one of them.
    Records of such an event were taken an hour before it at the earliest, so raw is read from the day before on; a
    greater fact that was taken earlier still has an event of an earlier day, and stands in the table there.

    Raises:
        BackfillError: The table or its raw table was never written.
    """
    source = source.under(evolution.current(settings, source.contract))
    part = next(p for p in source.parts if p.table == part.table)
    spec = source.spec(part)
    raw_at = _snapshot(settings, source.raw_table)
    replaced = _snapshot(settings, part.table)
    evolution.grow(settings, spec, source.contract)
    taken = lake.read(spark, source.raw_table, raw_at.id).filter(
        f"ingested_at >= TIMESTAMP '{days.first - _SLACK} 00:00:00'"
    )
    winners = standing(source, judge(source, frames.judged(source.contract, taken)), part)
    on_days = days.where("event_time")
    found = winners.filter(on_days)
    others = lake.read(spark, part.table).filter(f"NOT coalesce({on_days}, false)")
    return Rebuilt(
        settings, spec, _without_superseded(source, part, found, others).persist(), on_days, replaced, days
    )


def _without_superseded(source: Source, part: Part, found: DataFrame, standing: DataFrame) -> DataFrame:
    """The rows found, but for those of which another day has a greater fact."""
    rank = ["version", "is_deleted", part.content_hash]
    others = standing.selectExpr(
        *[f"{name} AS _{name}" for name in source.identity], f"struct({', '.join(rank)}) AS _rank"
    )
    same = " AND ".join(f"{name} = _{name}" for name in source.identity)
    return found.join(others, _sql(f"{same} AND _rank > struct({', '.join(rank)})"), "left_anti")


def letter_days(spark: SparkSession, settings: Settings, days: Days) -> Rebuilt:
    """The dead letters of records that were taken on some days, by the present contracts.

    An epoch that was tried twice, before midnight and after, has its letters a day before its records: letters of the
    days around stay, but for those of these records.

    Raises:
        BackfillError: Nothing was archived yet.
    """
    spec = lake.RAW_DEAD_LETTERS
    if lake.current_snapshot(settings, spec.name) is None:  # nothing was refused so far
        lake.ensure(spark, spec)
        lake.append(spark.createDataFrame([], spark.table(spec.identifier).schema), spec)
    replaced = _snapshot(settings, spec.name)
    parts = [
        _letters(evolution.current(settings, contract), lake.read(spark, contract.raw_table), days)
        for contract in CONTRACTS.values()
        if lake.current_snapshot(settings, contract.raw_table) is not None
    ]
    if not parts:
        raise BackfillError(
            "nothing was archived yet", where="raw", remedy="`tidemark up`, or load something"
        )
    taken = functools.reduce(_union, [rows for rows, _ in parts])
    now = functools.reduce(_union, [letters for _, letters in parts])
    around = days.where("ingested_at", _SLACK)
    before = lake.read(spark, spec.name, replaced.id).filter(around)
    others = at_places(before, taken, "left_anti")
    return Rebuilt(settings, spec, _union(now, others.select(*now.columns)).persist(), around, replaced, days)


def _letters(contract: Contract, raw: DataFrame, days: Days) -> tuple[DataFrame, DataFrame]:
    from pyspark.sql import functions as F

    taken = raw.filter(days.where("ingested_at")).withColumn("topic", F.lit(contract.topic))
    letters = frames.letters(frames.examined(contract, taken)).withColumn("topic", F.lit(contract.topic))
    return taken, at_places(letters, taken, "inner").selectExpr("one.*", "other.ingested_at")


def at_places(one: DataFrame, other: DataFrame, how: str) -> DataFrame:
    """Two tables of records, joined as `one` and `other` where they are about the same record."""
    same = " AND ".join(f"one.`{name}` <=> other.`{name}`" for name in PLACE)
    return one.alias("one").join(other.alias("other"), _sql(same), how)


def changes(rebuilt: Rebuilt, before: DataFrame, identity: Sequence[str], columns: Sequence[str]) -> Changes:
    """How the rows that were made differ from those that the table holds for the days.

    Args:
        rebuilt: The rows that were made.
        before: The rows that the table holds.
        identity: The columns that name a row.
        columns: Those that are compared.
    """
    compared = [name for name in columns if name not in identity]
    now, was = rebuilt.rows.alias("now"), before.alias("was")
    same = " AND ".join(f"now.`{name}` <=> was.`{name}`" for name in identity)
    both = now.join(was, _sql(same), "full_outer")
    is_there = {side: f"{side}.`{identity[0]}` IS NOT NULL" for side in ("now", "was")}
    differs = {name: f"NOT (now.`{name}` <=> was.`{name}`)" for name in compared}
    is_changed = f"{is_there['now']} AND {is_there['was']} AND ({' OR '.join(differs.values())})"
    happened = (
        f"CASE WHEN NOT ({is_there['was']}) THEN 'added' WHEN NOT ({is_there['now']}) THEN 'removed' "
        f"WHEN {is_changed} THEN 'changed' END"
    )
    told = both.selectExpr(
        f"{happened} AS happened",
        is_there["now"] + " AS is_now",
        *[f"{is_changed} AND {condition} AS `{name}`" for name, condition in differs.items()],
        f"struct({', '.join(f'coalesce(now.`{n}`, was.`{n}`) AS `{n}`' for n in identity)}) AS identity",
        f"to_json(struct({', '.join(f'was.`{n}` AS `{n}`' for n in compared)})) AS was",
        f"to_json(struct({', '.join(f'now.`{n}` AS `{n}`' for n in compared)})) AS now",
    )
    counted = told.selectExpr(
        "count_if(is_now) AS rows",
        *[f"count_if(happened = '{name}') AS `{name}`" for name in ("added", "removed", "changed")],
        f"struct({', '.join(f'count_if(`{name}`) AS `{name}`' for name in compared)}) AS by_column",
    ).first()
    assert counted is not None
    examples = (
        told.filter("happened IS NOT NULL").select("happened", "identity", "was", "now").limit(_EXAMPLES)
    )
    return Changes(
        table=rebuilt.spec.name,
        rows=counted["rows"],
        added=counted["added"],
        removed=counted["removed"],
        changed=counted["changed"],
        by_column={name: count for name, count in counted["by_column"].asDict().items() if count},
        examples=tuple(
            {**row.asDict(recursive=True), "was": row["was"], "now": row["now"]} for row in examples.collect()
        ),
    )


def _snapshot(settings: Settings, name: str) -> lake.Snapshot:
    found = lake.current_snapshot(settings, name)
    if found is None:
        raise BackfillError("the table was never written", where=name, remedy="`tidemark build` comes first")
    return found


def _sql(condition: str) -> Column:
    from pyspark.sql import functions as F

    return F.expr(condition)


def _union(left: DataFrame, right: DataFrame) -> DataFrame:
    return left.unionByName(right)
