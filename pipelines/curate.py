"""Raw to curated: which record of each identity stands, and the account of all the others.

Belongs here: deciding raw rows by their contract, choosing winners by the one rank, and counting what became of every
row. Does not belong here: what a contract allows (`contracts`), where tables are (`lake`), when it runs (`assets`).

A curated table holds, for one column family, the greatest fact of each identity by (version, is_deleted, content hash),
tombstones too: an older form may still arrive and must not rise.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines import lake
from pipelines.contracts import (
    PIN_UPDATES,
    PROVENANCE,
    USER_FOLLOWS,
    USER_INTERACTIONS,
    Contract,
    accepted_schema,
    frames,
)
from pipelines.errors import TidemarkError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

FATES = ("tombstones", "repeated", "superseded", "current")


class AccountError(TidemarkError):
    """The account of a raw table does not add up."""


class Part(NamedTuple):
    """One column family of a topic's records, and the curated table that holds it."""

    table: str
    content_hash: str
    columns: tuple[str, ...]


class Source(NamedTuple):
    """A raw table, what identifies its records, and the curated tables that it becomes.

    Attributes:
        contract: Of the topic.
        identity: The columns that identify a record.
        parts: What stands of it, family by family.
        history: A table of what was said version by version, whether it stands or not; None: there is none. It has no
            say in what becomes of a record.
    """

    contract: Contract
    identity: tuple[str, ...]
    parts: tuple[Part, ...]
    history: Part | None = None

    @property
    def raw_table(self) -> str:
        """The raw table of the topic."""
        return self.contract.raw_table

    @property
    def tables(self) -> tuple[Part, ...]:
        """The curated tables: of what stands, and of what was said."""
        return self.parts if self.history is None else (*self.parts, self.history)

    def under(self, contract: Contract) -> Source:
        """This source with what was learned of its contract's fields: the first part has the new columns, too."""
        declared = self.contract.row_schema.names
        learned = tuple(name for name in contract.row_schema.names if name not in declared)
        first, *others = self.parts
        grown = first._replace(columns=(*first.columns, *learned))
        return self._replace(contract=contract, parts=(grown, *others))

    def spec(self, part: Part) -> lake.TableSpec:
        """The declaration of a part's table, with the columns that were learned."""
        declared = lake.TABLES[part.table]
        schema = self.contract.row_schema
        columns = [
            column._replace(type=lake.sql_type(schema.field(column.name).type))
            if column.name in schema.names
            else column
            for column in declared.columns
        ]
        named = {column.name for column in columns}
        columns += [
            lake.Column(name, lake.sql_type(schema.field(name).type), "learned from records")
            for name in part.columns
            if name not in named
        ]
        return declared._replace(columns=tuple(columns))


def _said_in(spec: lake.TableSpec) -> tuple[str, ...]:
    """Of what a record of an event says, the columns that a curated table has."""
    held = {column.name for column in spec.columns}
    return tuple(name for name in USER_INTERACTIONS.row_schema.names if name in held)


SOURCES: dict[str, Source] = {
    source.contract.name: source
    for source in (
        Source(
            USER_INTERACTIONS,
            ("user_id", "event_id"),
            (
                Part("curated.user_interactions", "content_hash", _said_in(lake.CURATED_USER_INTERACTIONS)),
                Part("curated.event_features", "features_hash", _said_in(lake.CURATED_EVENT_FEATURES)),
            ),
        ),
        Source(
            PIN_UPDATES,
            ("pin_id",),
            tuple(
                Part(
                    f"curated.pins_{family}",
                    f"{family}_hash",
                    ("pin_id", "version", "event_time", "is_deleted", family, f"{family}_hash"),
                )
                for family in ("catalogue", "offer")
            ),
            Part("curated.pin_changes", "catalogue_hash", tuple(PIN_UPDATES.row_schema.names)),
        ),
        Source(
            USER_FOLLOWS,
            ("user_id", "kind", "followed_id"),
            (Part("curated.user_follows", "content_hash", tuple(USER_FOLLOWS.row_schema.names)),),
        ),
    )
}
"""What is curated, by the topic's name as a table's. Not every topic is: what stands of an ad is in its repository."""


class NotCurated(TidemarkError):
    """Nothing is curated of a topic."""


def source_of(contract: Contract) -> Source:
    """What is curated of a topic.

    Raises:
        NotCurated: Nothing is.
    """
    found = SOURCES.get(contract.name)
    if found is None:
        raise NotCurated(
            "nothing is curated of its records",
            where=contract.topic,
            remedy=f"choose one of {', '.join(source.contract.topic for source in SOURCES.values())}",
        )
    return found


class Account(NamedTuple):
    """What became of every row of a raw table: rows = accepted + refused, accepted = the sum of the four fates.

    A record is counted once, as the first that fits: a tombstone; repeated (all that it says was said by an earlier
    record); superseded (none of its families stands); current.
    """

    table: str
    snapshot_id: int
    rows: int
    refused: Mapping[str, int]
    tombstones: int
    repeated: int
    superseded: int
    current: int

    @property
    def accepted(self) -> int:
        """Rows that keep the contract."""
        return self.tombstones + self.repeated + self.superseded + self.current

    def balanced(self) -> Account:
        """This account, if it adds up exactly.

        Raises:
            AccountError: it does not; the message has all the numbers.
        """
        refused = sum(self.refused.values())
        if self.rows != self.accepted + refused:
            fates = " + ".join(f"{getattr(self, fate)} {fate}" for fate in FATES)
            raise AccountError(
                f"{self.rows} rows are not {self.accepted} accepted ({fates}) + {refused} refused",
                where=f"{self.table} at snapshot {self.snapshot_id}",
                remedy="this is a defect of the platform: keep the snapshot and report these numbers",
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object, with the refused ones by reason."""
        return {**self._asdict(), "refused": dict(sorted(self.refused.items())), "accepted": self.accepted}


class Curated(NamedTuple):
    """The judged rows of one raw snapshot; `judged` is kept on disk until `close`."""

    source: Source
    judged: DataFrame
    account: Account
    max_broker_time_ms: int | None

    def table(self, part: Part) -> DataFrame:
        """The rows of a curated table: for each identity (and version, in a history) the fact that stands, with its
        provenance."""
        return standing(self.source, self.judged, part)

    def close(self) -> None:
        """Let the judged rows go."""
        self.judged.unpersist()


def curate(source: Source, raw: DataFrame, *, rows: int, snapshot_id: int) -> Curated:
    """Judge every row of a raw snapshot, and account for it.

    Args:
        source: What the rows are.
        raw: The rows of the raw table at `snapshot_id`.
        rows: How many rows the snapshot says it has: counted by whoever wrote it, not by this function.
        snapshot_id: The snapshot, for the account.

    Raises:
        AccountError: The fates of the rows do not add up to `rows`.
    """
    from pyspark import StorageLevel

    judged = judge(source, frames.judged(source.contract, raw)).persist(StorageLevel.DISK_ONLY)
    try:
        account, newest = _account(source, judged, rows, snapshot_id)
        return Curated(source, judged, account.balanced(), newest)
    except BaseException:
        judged.unpersist()
        raise


def judge(source: Source, decoded: DataFrame) -> DataFrame:
    """Decoded rows with `_fate`, and for each part `_first_<n>`: the one row that stands for its identity.

    Rows of equal rank say the same; which of them is kept is settled by provenance, so that building again from the
    same snapshot gives the same table.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    is_accepted = F.col("_reason").isNull()
    provenance = F.struct("broker_time", *[name for name in PROVENANCE.names if name != "broker_time"])
    alone = F.when(~is_accepted, provenance)  # refused rows have no identity; each is spread by its own place
    judged = decoded
    stands, says_nothing_new = [], []
    for at, part in enumerate(source.parts):
        rank = F.when(
            is_accepted & F.col(part.content_hash).isNotNull(),
            F.struct("version", "is_deleted", F.col(part.content_hash).alias("content_hash")),
        )
        judged = judged.withColumn(f"_rank_{at}", rank)
        mine = F.col(f"_rank_{at}")
        window = Window.partitionBy(*source.identity, alone).orderBy(mine.desc_nulls_last(), provenance)
        judged = judged.withColumns(
            {
                f"_first_{at}": mine.isNotNull() & (F.row_number().over(window) == 1),
                f"_stands_{at}": F.coalesce(mine == F.first(mine).over(window), F.lit(False)),
                f"_repeats_{at}": F.coalesce(mine == F.lag(mine).over(window), mine.isNull()),
            }
        )
        stands.append(F.col(f"_stands_{at}"))
        says_nothing_new.append(F.col(f"_repeats_{at}"))
    fate = (
        F.when(~is_accepted, "refused")
        .when(F.col("is_deleted"), "tombstones")
        .when(functools.reduce(_and, says_nothing_new), "repeated")
        .when(functools.reduce(_or, stands), "current")
        .otherwise("superseded")
    )
    firsts = [f"_first_{at}" for at in range(len(source.parts))]
    return judged.select(*accepted_schema(source.contract).names, "_reason", fate.alias("_fate"), *firsts)


def standing(source: Source, judged: DataFrame, part: Part) -> DataFrame:
    """Of judged rows those that stand in a part's table, with their provenance."""
    if part == source.history:
        return _told(source, judged).select(*part.columns, *PROVENANCE.names)
    winners = judged.filter(f"_first_{source.parts.index(part)}")
    return winners.select(*part.columns, *PROVENANCE.names)


def _told(source: Source, judged: DataFrame) -> DataFrame:
    """Accepted rows by what they were the first to say: of each identity, version and family one row has it.

    Of rows that say different things of one version the rank decides, of those that say the same which happened first;
    in a row that is neither the family is null, and a row without a family is left out.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    happened = F.coalesce("event_time", "broker_time")
    provenance = F.struct("broker_time", *[name for name in PROVENANCE.names if name != "broker_time"])
    told = judged.filter("_reason IS NULL")
    hashes = [part.content_hash for part in source.parts]
    for part in source.parts:
        mine = F.col(part.content_hash)
        order = [F.col("is_deleted").desc(), mine.desc_nulls_last(), happened, provenance]
        window = Window.partitionBy(*source.identity, "version").orderBy(*order)
        others = {name for other in source.parts if other != part for name in other.columns}
        is_first = F.row_number().over(window) == 1
        told = told.withColumn("_is_first", is_first)
        own = [name for name in part.columns if name not in others]
        told = told.withColumns({name: F.when(F.col("_is_first"), F.col(name)) for name in own})
    return told.filter(functools.reduce(_or, [F.col(name).isNotNull() for name in hashes]))


def _and(left: Column, right: Column) -> Column:
    return left & right


def _or(left: Column, right: Column) -> Column:
    return left | right


def _account(source: Source, judged: DataFrame, rows: int, snapshot_id: int) -> tuple[Account, int | None]:
    from pyspark.sql import functions as F

    counted = (
        judged.groupBy("_fate", "_reason")
        .agg(F.count(F.lit(1)).alias("rows"), F.max(F.unix_millis("broker_time")).alias("newest"))
        .collect()
    )
    by_fate = {row["_fate"]: row["rows"] for row in counted if row["_reason"] is None}
    account = Account(
        table=source.raw_table,
        snapshot_id=snapshot_id,
        rows=rows,
        refused={row["_reason"]: row["rows"] for row in counted if row["_reason"] is not None},
        **{fate: by_fate.get(fate, 0) for fate in FATES},
    )
    return account, max((row["newest"] for row in counted if row["newest"] is not None), default=None)


def account_row(account: Account) -> dict[str, Any]:
    """The account as a row of `ops.account`."""
    return {
        "table": account.table,
        "snapshot_id": account.snapshot_id,
        "rows": account.rows,
        "accepted": account.accepted,
        "refused": sum(account.refused.values()),
        **{fate: getattr(account, fate) for fate in FATES},
        "refused_by_reason": json.dumps(dict(sorted(account.refused.items()))),
    }
