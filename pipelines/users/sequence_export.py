"""Training data of a sequence: each label with its user's sequence as it was to be had at the label's time.

Belongs here: the tables: labels, the records that are read for them, and what is written. Does not belong here: what
was known at a moment of the past, and what a definition makes of it (`sequence_history`).

Two times count. An event is in a label's sequence only if it happened by then, and what is said of it, and of its pin,
only if it was taken by then: by the broker, or by the load that brought it. So what was corrected or deleted after the
label is seen as it was before. The curated tables have only what stands now, so `raw` is read: all records up to the
newest label's time are decided by their contract again, as each build does.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from pipelines import indices, lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS, Contract, accepted_schema, frames
from pipelines.errors import TidemarkError
from pipelines.indexing.spec import Family
from pipelines.ingest import evolution
from pipelines.lake import Column, TableSpec
from pipelines.pins.index import PINS
from pipelines.settings import Settings
from pipelines.users.index import TIME_MS, USER_EVENTS
from pipelines.users.sequence_files import meaning
from pipelines.users.sequence_history import (
    EVENTS,
    FEATURES,
    as_of,
    families_read,
    features_read,
    list_type,
)
from pipelines.users.sequences import ENRICHMENTS, BadDefinition, Definition

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.pandas.group_ops import PandasCogroupedOps

SEQUENCE = "tidemark.sequence"
"""In a commit's summary: name, version and meaning of the sequence, as JSON."""
READ = "tidemark.read"
"""In a commit's summary: the tables that were read, each with its snapshot, as JSON."""
HORIZON_MS = "tidemark.horizon_ms"
"""In a commit's summary: how far back before its label an event was seen; `null`: as far as there is anything."""

_LABEL_COLUMNS = {"user_id": "string", "label_time": "timestamp"}
_BUCKET = "_bucket"
_OWN_COLUMNS = ("sequence", "is_complete", _BUCKET)
_NAME = re.compile(r"\w+\.\w+", re.ASCII)
_OWN = frozenset({"index", *(name.partition(".")[0] for name in lake.TABLES)})


class ExportError(TidemarkError):
    """Labels cannot be read, or their sequences cannot be written."""


class Exported(NamedTuple):
    """What was written.

    Attributes:
        table: Where to.
        name: Of the sequence.
        version: Of the sequence.
        snapshot_id: Of the table.
        labels: How many, which are the table's rows.
        empty: How many of them have a sequence without events.
        incomplete: How many of them may lack events, because the definition's age reaches beyond the index's horizon.
    """

    table: str
    name: str
    version: int
    snapshot_id: int
    labels: int
    empty: int
    incomplete: int


def export(spark: SparkSession, settings: Settings, definition: Definition, labels: str, to: str) -> Exported:
    """Write the labels of a table with their users' sequences, in one commit.

    The rows of ``to`` are the labels' columns, `sequence` (a list of structs of the definition's columns, in its order)
    and `is_complete`. An event that is as old as the horizon of the index, which the settings declare, is in none, as
    it is in no answer. A table that was written for the same meaning is replaced as a whole.

    Args:
        spark: The session.
        settings: Where the lake is.
        definition: With name and version.
        labels: A table with `user_id` (string), `label_time` (timestamp) and any other columns.
        to: The table to write.

    Raises:
        BadDefinition: The definition asks for what a model computes, which is not known as it was.
        ExportError: The labels are not there or not as they must be, or ``to`` holds something else. Nothing was
            written.
    """
    from pyspark import StorageLevel

    _require_known(definition)
    _require_free(settings, definition, to)
    horizon_ms = indices.horizon_ms(settings, USER_EVENTS)
    label_rows, labels_at = _labels(spark, settings, labels)
    counted = _counted(label_rows, labels)
    topics = [USER_INTERACTIONS, PIN_UPDATES] if families_read(definition) else [USER_INTERACTIONS]
    snapshots = {
        contract.raw_table: lake.current_snapshot(settings, contract.raw_table) for contract in topics
    }
    raw = {name: snapshot for name, snapshot in snapshots.items() if snapshot is not None}
    events, updates = (
        accepted(spark, settings, contract, raw.get(contract.raw_table), counted.newest_ms)
        for contract in (USER_INTERACTIONS, PIN_UPDATES)
    )
    rows_at_most = sum(snapshot.rows for snapshot in raw.values()) + counted.rows * definition.max_length
    buckets = max(1, math.ceil(rows_at_most / settings.build.shard_facts))
    users = label_rows.select("user_id").distinct()
    of_users = events.join(users, "user_id", "left_semi").persist(StorageLevel.DISK_ONLY)
    updates = updates.persist(StorageLevel.DISK_ONLY)  # both are read more than once
    try:
        rows = _with_sequences(label_rows, of_users, updates, definition, horizon_ms, buckets)
        _require_same_columns(settings, rows, to)
        read = {labels: labels_at.id, **{name: snapshot.id for name, snapshot in raw.items()}}
        said = {
            SEQUENCE: json.dumps(_identified(definition)),
            READ: json.dumps(read),
            HORIZON_MS: json.dumps(horizon_ms),
        }
        _write(settings, rows, _spec(definition, label_rows, labels, to), said)
    finally:
        of_users.unpersist()
        updates.unpersist()
    return _exported(spark, settings, definition, to)


def _exported(spark: SparkSession, settings: Settings, definition: Definition, to: str) -> Exported:
    snapshot = lake.current_snapshot(settings, to)
    assert snapshot is not None and definition.name is not None and definition.version is not None
    rows = lake.read(spark, to, snapshot.id)
    empty, incomplete = (rows.filter(which).count() for which in ("size(sequence) = 0", "NOT is_complete"))
    return Exported(to, definition.name, definition.version, snapshot.id, snapshot.rows, empty, incomplete)


# ---------------------------------------------------------------------------------------------- what can be exported


def _require_known(definition: Definition) -> None:
    streamed = [name for name in ENRICHMENTS if PINS.family(name.partition(".")[0]).stream is not None]
    for place, name in enumerate(definition.enrich):
        if name not in streamed:
            raise BadDefinition(
                f"enrich[{place}]",
                f"{name} is computed by a model for each base, and what it was at a label's time is not kept",
                streamed,
            )


def _require_free(settings: Settings, definition: Definition, to: str) -> None:
    if not _NAME.fullmatch(to):
        raise ExportError("it is no name of a table", where=to, remedy="use one as training.clicks")
    if to.partition(".")[0] in _OWN:
        raise ExportError(
            "the namespace is the platform's own", where=to, remedy="use another, as training.clicks"
        )
    if lake.current_snapshot(settings, to) is None:
        return
    held = lake.standing(lake.ancestors(settings, to)).get(SEQUENCE)
    if held is None:
        raise ExportError(
            "the table is there, and no sequence was exported to it", where=to, remedy="name another table"
        )
    if (found := json.loads(held)) != json.loads(json.dumps(_identified(definition))):
        raise ExportError(
            f"the table holds version {found['version']} of {found['name']} with another meaning",
            where=to,
            remedy="name another table, or drop this one",
        )


def _identified(definition: Definition) -> dict[str, Any]:
    """What a table of sequences says that they are."""
    return {"name": definition.name, "version": definition.version, "meaning": meaning(definition)}


def _labels(spark: SparkSession, settings: Settings, name: str) -> tuple[DataFrame, lake.Snapshot]:
    snapshot = lake.current_snapshot(settings, name) if _NAME.fullmatch(name) else None
    if snapshot is None:
        raise ExportError(
            "there is no such table of labels, or nothing is in it",
            where=name,
            remedy="write one with user_id (string) and label_time (timestamp), and name it as training.labels",
        )
    rows = lake.read(spark, name, snapshot.id)
    found = {field.name: field.dataType.simpleString() for field in rows.schema}
    for column, kind in _LABEL_COLUMNS.items():
        if found.get(column) != kind:
            is_what = f"is {found[column]}" if column in found else "is missing"
            raise ExportError(f"the column {column} {is_what}", where=name, remedy=f"make it a {kind}")
    for column in found:
        if column.lower() in _OWN_COLUMNS:
            raise ExportError(
                f"the column {column} is one that an export makes", where=name, remedy="rename it"
            )
    return rows, snapshot


class _Counted(NamedTuple):
    rows: int
    newest_ms: int


def _counted(labels: DataFrame, name: str) -> _Counted:
    """How many labels there are, and the newest time; none may be without user or time."""
    counted = labels.selectExpr(
        "count(*) AS rows",
        "count_if(user_id IS NULL OR label_time IS NULL) AS broken",
        "coalesce(unix_millis(max(label_time)), 0) AS newest_ms",
    ).first()
    assert counted is not None
    if counted["broken"]:
        raise ExportError(
            f"{counted['broken']:,} of {counted['rows']:,} labels have no user_id or no label_time",
            where=name,
            remedy="leave them out",
        )
    return _Counted(counted["rows"], counted["newest_ms"])


# ---------------------------------------------------------------------------------------------------------- in Spark


def accepted(
    spark: SparkSession, settings: Settings, contract: Contract, raw: lake.Snapshot | None, until_ms: int
) -> DataFrame:
    """The records of a topic that keep their contract, of those taken up to a time; none where nothing was archived."""
    from pyspark.sql.pandas.types import from_arrow_schema

    if raw is None:
        return spark.createDataFrame([], from_arrow_schema(accepted_schema(contract)))
    taken = lake.read(spark, contract.raw_table, raw.id).filter(
        f"broker_time < timestamp_millis({until_ms + 1})"
    )
    return frames.judged(evolution.current(settings, contract), taken).filter("_reason IS NULL")


def _statements(
    rows: DataFrame,
    family: Family,
    *,
    key: str,
    id: str,
    time_ms: str,
    content_hash: str,
    said: Sequence[str],
) -> DataFrame:
    """What accepted records say of one family, a row a statement, with the time at which it was taken.

    All but ``family`` are expressions of Spark SQL over the records; ``said`` those of the family's columns. A record
    without a hash of the family says nothing of it.
    """
    return rows.filter(f"{content_hash} IS NOT NULL").selectExpr(
        f"'{family.name}' AS family",
        f"{key} AS key",
        f"cast({id} AS binary) AS id",
        f"cast({time_ms} AS bigint) AS time_ms",
        "version",
        "is_deleted",
        f"{content_hash} AS content_hash",
        "unix_millis(broker_time) AS taken_ms",
        f"struct({', '.join(said)}) AS {family.name}",
    )


def event_statements(rows: DataFrame) -> DataFrame:
    """What accepted records of `user-interactions` say, as statements."""
    return _statements(
        rows,
        EVENTS,
        key="user_id",
        id="event_id",
        time_ms=TIME_MS,
        content_hash="content_hash",
        said=EVENTS.schema.names,
    )


def feature_statements(rows: DataFrame) -> DataFrame:
    """What accepted records of `user-interactions` say of features, as statements."""
    return _statements(
        rows,
        FEATURES,
        key="concat(user_id, char(0), event_id)",
        id="''",
        time_ms=TIME_MS,
        content_hash="features_hash",
        said=FEATURES.schema.names,
    )


def pin_statements(rows: DataFrame, family: Family) -> DataFrame:
    """What accepted records of `pin-updates` say of one family, as statements."""
    return _statements(
        rows,
        family,
        key="pin_id",
        id="''",
        time_ms="0",
        content_hash=f"{family.name}_hash",
        said=[f"{family.name}.{name}" for name in family.schema.names],
    )


def _with_sequences(
    labels: DataFrame,
    events: DataFrame,
    updates: DataFrame,
    definition: Definition,
    horizon_ms: int | None,
    buckets: int,
) -> DataFrame:
    """Labels with their sequences, computed in as many groups of users as there are buckets."""
    from pyspark.sql.pandas.types import from_arrow_type
    from pyspark.sql.types import BooleanType, StructType

    schema = StructType(labels.schema.fields.copy())
    schema.add("sequence", from_arrow_type(list_type(definition))).add("is_complete", BooleanType())
    run = functools.partial(_run, definition, horizon_ms)
    families, has_features = families_read(definition), features_read(definition)
    return grouped(labels, events, updates, families, buckets, has_features).applyInArrow(run, schema)


def grouped(
    labels: DataFrame,
    events: DataFrame,
    updates: DataFrame,
    families: Sequence[Family],
    buckets: int,
    has_features: bool = False,
) -> PandasCogroupedOps:
    """Labels, and beside them the statements that count for their users, in groups of users, for `as_of`.

    Args:
        labels: The labels.
        events: Accepted records of their users.
        updates: Accepted records of pins; each group gets those of the pins that are in its events.
        families: Of pins, those that are wanted.
        buckets: How many groups; one must fit an executor's memory.
        has_features: Whether what was found out of events is wanted, too.
    """
    from pyspark.sql import functions as F

    def bucketed(rows: DataFrame, user: str) -> DataFrame:
        return rows.withColumn(_BUCKET, F.expr(f"pmod(xxhash64({user}), {buckets})"))

    said = bucketed(event_statements(events), "key")
    wanted = said.selectExpr(_BUCKET, "interactions.pin_id AS key").distinct()
    for family in families:
        of_family = pin_statements(updates, family).join(wanted, "key")
        said = said.unionByName(of_family, allowMissingColumns=True)
    if has_features:
        found_out = bucketed(feature_statements(events), "substring_index(key, char(0), 1)")
        said = said.unionByName(found_out, allowMissingColumns=True)
    return bucketed(labels, "user_id").groupBy(_BUCKET).cogroup(said.groupBy(_BUCKET))


def _run(definition: Definition, horizon_ms: int | None, labels: pa.Table, statements: pa.Table) -> pa.Table:
    return as_of(labels.drop_columns([_BUCKET]), statements, definition, horizon_ms)


# ------------------------------------------------------------------------------------------------------- the table


def _spec(definition: Definition, labels: DataFrame, labels_name: str, to: str) -> TableSpec:
    said = ", ".join(
        f"`{field.name}`: {lake.sql_type(field.type)}" for field in list_type(definition).value_type
    )
    carried = (
        Column(field.name, field.dataType.simpleString(), f"of {labels_name}") for field in labels.schema
    )
    return TableSpec(
        name=to,
        doc=f"labels, each with the sequence {definition.name}, version {definition.version}, as it was then",
        columns=(
            *carried,
            Column("sequence", f"array<struct<{said}>>", f"the user's events, {definition.order}"),
            Column(
                "is_complete",
                "boolean",
                "whether these are all: False where its age reaches beyond the horizon",
            ),
        ),
        owner="users",
    )


def _require_same_columns(settings: Settings, rows: DataFrame, to: str) -> None:
    """A table that is there must have the columns that are to be written."""
    if lake.open_table(settings, to) is None:
        return
    held = lake.read(rows.sparkSession, to)
    found, wanted = (
        {field.name: field.dataType.simpleString() for field in one.schema} for one in (held, rows)
    )
    if found != wanted:
        differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        raise ExportError(
            f"the table has other columns: {', '.join(differing)}",
            where=to,
            remedy="name another table, or drop this one",
        )


def _write(settings: Settings, rows: DataFrame, spec: TableSpec, said: Mapping[str, str]) -> None:
    spark = rows.sparkSession
    lake.ensure(spark, spec)
    try:
        lake.overwrite(rows, spec, said)
    except BaseException:
        if lake.current_snapshot(settings, spec.name) is None:  # made for this, and empty
            spark.sql(f"DROP TABLE IF EXISTS {spec.identifier}")
        raise
