"""Training data of a sequence: each label with its user's sequence as it was to be had at the label's time.

Belongs here: which statements were known at a moment of the past, and writing labels with their sequences into a
table. Does not belong here: what a definition means (`sequences.arranged`, the same function that answers online), and
which of an identity's statements stands (`indexing.merge`).

Two times count. An event is in a label's sequence only if it happened by then, and what is said of it, and of its pin,
only if it was taken by then: by the broker, or by the load that brought it. So what was corrected or deleted after the
label is seen as it was before. The curated tables have only what stands now, so `raw` is read: all records up to the
newest label's time are decided by their contract again, as each build does.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS, Contract, accepted_schema, frames
from pipelines.errors import TidemarkError
from pipelines.indexing.facts import hash_keys, identity_bytes
from pipelines.indexing.merge import Ranks, stood
from pipelines.indexing.rows import spans
from pipelines.indexing.spec import Documents, Family
from pipelines.indexing.timelines import Within, first_at
from pipelines.ingest import evolution
from pipelines.lake import Column, TableSpec
from pipelines.pins.index import PINS
from pipelines.settings import Settings
from pipelines.users.index import TIME_MS, USER_EVENTS
from pipelines.users.sequence_files import meaning
from pipelines.users.sequences import (
    CATEGORY,
    ENRICHMENTS,
    EVENT_FIELDS,
    BadDefinition,
    Definition,
    Sequences,
    arranged,
    columns_read,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SEQUENCE = "tidemark.sequence"
"""In a commit's summary: name, version and meaning of the sequence, as JSON."""
READ = "tidemark.read"
"""In a commit's summary: the tables that were read, each with its snapshot, as JSON."""

_LABEL_COLUMNS = {"user_id": "string", "label_time": "timestamp"}
_ADDED = ("sequence", "is_complete")
_NAME = re.compile(r"\w+\.\w+", re.ASCII)
_OWN = frozenset({"index", *(name.partition(".")[0] for name in lake.TABLES)})
_PAIRS = 1_000_000
"""So many pairs of a label and an event are looked at at once; more only where one label has more."""


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
    """

    table: str
    name: str
    version: int
    snapshot_id: int
    labels: int
    empty: int


def export(spark: SparkSession, settings: Settings, definition: Definition, labels: str, to: str) -> Exported:
    """Write the labels of a table with their users' sequences, in one commit.

    The rows of ``to`` are the labels' columns, `sequence` (a list of structs of the definition's columns, in its order)
    and `is_complete`. A table that was written for the same meaning is replaced as a whole.

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
    label_rows, labels_at = _labels(spark, settings, labels)
    counted = _counted(label_rows, labels)
    topics = [USER_INTERACTIONS, PIN_UPDATES] if _families(definition) else [USER_INTERACTIONS]
    snapshots = {
        contract.raw_table: lake.current_snapshot(settings, contract.raw_table) for contract in topics
    }
    raw = {name: snapshot for name, snapshot in snapshots.items() if snapshot is not None}
    events, updates = (
        _accepted(spark, settings, contract, raw.get(contract.raw_table), counted.newest_ms)
        for contract in (USER_INTERACTIONS, PIN_UPDATES)
    )
    rows_at_most = sum(snapshot.rows for snapshot in raw.values()) + counted.rows * definition.max_length
    buckets = max(1, math.ceil(rows_at_most / settings.build.shard_facts))
    users = label_rows.select("user_id").distinct()
    of_users = events.join(users, "user_id", "left_semi").persist(StorageLevel.DISK_ONLY)
    try:
        rows = _with_sequences(label_rows, of_users, updates, definition, buckets)
        _require_same_columns(settings, rows, to)
        read = {labels: labels_at.id, **{name: snapshot.id for name, snapshot in raw.items()}}
        said = {SEQUENCE: json.dumps(_identified(definition)), READ: json.dumps(read)}
        _write(settings, rows, _spec(definition, label_rows, labels, to), said)
    finally:
        of_users.unpersist()
    return _exported(spark, settings, definition, to)


def _exported(spark: SparkSession, settings: Settings, definition: Definition, to: str) -> Exported:
    snapshot = lake.current_snapshot(settings, to)
    assert snapshot is not None and definition.name is not None and definition.version is not None
    empty = lake.read(spark, to, snapshot.id).filter("size(sequence) = 0").count()
    return Exported(to, definition.name, definition.version, snapshot.id, snapshot.rows, empty)


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
    for column in _ADDED:
        if column in found:
            raise ExportError(f"the column {column} is what an export adds", where=name, remedy="rename it")
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


# ------------------------------------------------------------------------------------------------ what was known when


class History(NamedTuple):
    """What was said of k things, with the time in which each statement stood; deletions are left out.

    Attributes:
        keys: Of whom or what, k texts.
        starts: Where each key's rows begin, int64[k].
        ends: And where they end, int64[k].
        rows: `id`, `time_ms`, the family's columns, `from_ms` and `until_ms`; by key, then by `time_ms` and `from_ms`.
    """

    keys: pa.Array
    starts: np.ndarray
    ends: np.ndarray
    rows: pa.Table

    def numbers(self, name: str) -> np.ndarray:
        """A column of integers."""
        found: np.ndarray = self.rows.column(name).to_numpy()
        return found

    def spans(self, keys: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of each of n keys: first and end; none where nothing was said of it or it is null."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        at = pc.index_in(keys, value_set=self.keys, skip_nulls=True)
        at = pc.fill_null(at, -1).to_numpy()
        return np.where(at < 0, 0, self.starts[at]), np.where(at < 0, 0, self.ends[at])

    def stands(self, rows: np.ndarray, at_ms: np.ndarray) -> np.ndarray:
        """Whether each row stood at its time, bool[n]."""
        stood: np.ndarray = (self.numbers("from_ms")[rows] <= at_ms) & (
            at_ms < self.numbers("until_ms")[rows]
        )
        return stood


def history(statements: pa.Table, family: Family) -> History:
    """The history that statements of one family make, in any order and however often each is there.

    Args:
        statements: Columns of `statements`, of this and maybe other families.
        family: Which.
    """
    mine = statements.filter(pc.equal(statements.column("family"), family.name)).combine_chunks()
    found = stood(hash_keys(_identities(mine)), _ranks(mine), mine.column("taken_ms").to_numpy())
    is_live = ~mine.column("is_deleted").to_numpy()[found.rows]
    rows, from_ms, until_ms = found.rows[is_live], found.from_ms[is_live], found.until_ms[is_live]
    keys = pc.dictionary_encode(mine.column("key").take(rows).combine_chunks())
    codes, times = keys.indices.to_numpy(), mine.column("time_ms").to_numpy()[rows]
    order = np.lexsort((from_ms, times, codes))
    numbers = np.arange(len(keys.dictionary))
    payload = mine.column(family.name).take(rows[order]).combine_chunks()
    said = {
        "id": mine.column("id").take(rows[order]),
        "time_ms": times[order],
        **{field.name: pc.struct_field(payload, field.name) for field in family.schema},
        "from_ms": from_ms[order],
        "until_ms": until_ms[order],
    }
    return History(
        keys.dictionary,
        np.searchsorted(codes[order], numbers, side="left"),
        np.searchsorted(codes[order], numbers, side="right"),
        pa.table(said),
    )


def _identities(statements: pa.Table) -> Iterator[bytes]:
    keys, ids = (statements.column(name).cast(pa.binary()).to_pylist() for name in ("key", "id"))
    return (identity_bytes(parts) for parts in zip(keys, ids, strict=True))


def _ranks(statements: pa.Table) -> Ranks:
    versions = np.zeros((statements.num_rows, 4), np.int64)
    versions[:, 0] = statements.column("version").to_numpy()
    is_deleted, content_hash = (statements.column(name).to_numpy() for name in ("is_deleted", "content_hash"))
    return Ranks(versions, is_deleted, content_hash)


def as_of(labels: pa.Table, statements: pa.Table, definition: Definition) -> pa.Table:
    """Labels with their users' sequences: the columns of the labels, `sequence` and `is_complete`.

    A label's time counts in whole milliseconds, as those of events and of answers do.

    Args:
        labels: `user_id`, `label_time` and others.
        statements: About the labels' users and their events' pins, all that were taken up to the newest label; as of
            `event_statements` and `pin_statements`.
        definition: Of the sequence.
    """
    events = history(statements, USER_EVENTS.families[0])
    pins = {family.name: history(statements, family) for family in _families(definition)}
    now_ms = labels.column("label_time").cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy() // 1000
    starts, ends = events.spans(labels.column("user_id"))
    times, needed = events.numbers("time_ms"), events.rows.select(columns_read(definition))
    firsts = first_at(times, starts, ends, now_ms - definition.reach_ms + 1)
    lasts = first_at(times, starts, ends, now_ms + 1)
    lists, is_complete = [pa.array([], _list_type(definition))], [np.empty(0, bool)]
    for start, end in _parts(lasts - firsts):
        part = slice(start, end)
        rows, of = spans(firsts[part], lasts[part])
        at_ms = now_ms[part]
        stands = np.flatnonzero(events.stands(rows, at_ms[of]))
        within = Within(of[stands], needed.take(rows[stands]), np.ones(len(at_ms), bool))
        found = arranged(within, definition, functools.partial(_of_pins, pins, at_ms))
        lists.append(_lists(found))
        is_complete.append(found.is_complete)
    sequence = pa.concat_arrays(lists)
    return labels.append_column("sequence", sequence).append_column(
        "is_complete", pa.array(np.concatenate(is_complete))
    )


def _parts(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Labels in runs, first and end, with about `_PAIRS` events in each."""
    number = np.cumsum(counts) // _PAIRS
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return itertools.pairwise([*starts.tolist(), len(counts)])


def _of_pins(
    pins: Mapping[str, History],
    at_ms: np.ndarray,
    pin_ids: pa.ChunkedArray,
    of: np.ndarray,
    names: Sequence[str],
) -> list[pa.Array]:
    """What pins said at the times of the labels that n events are of, as `sequences.PinValues`.

    As in the view, there is no pin without its presence family, and without a pin nothing is known.
    """
    assert isinstance(PINS.read, Documents)
    rows = {family: _standing(held, pin_ids, at_ms[of]) for family, held in pins.items()}
    is_gone = rows[PINS.read.presence] < 0
    found = []
    for family, _, column in (name.partition(".") for name in names):
        at = pa.array(rows[family], mask=(rows[family] < 0) | is_gone)
        found.append(pins[family].rows.column(column).combine_chunks().take(at))
    return found


def _standing(held: History, keys: pa.ChunkedArray, at_ms: np.ndarray) -> np.ndarray:
    """For each key the row that stood at its time, int64[n]; -1: none did. Of documents, a key has one identity."""
    starts, ends = held.spans(keys)
    last = first_at(held.numbers("from_ms"), starts, ends, at_ms + 1) - 1
    found = np.where(last >= starts, last, -1)
    known = np.flatnonzero(found >= 0)
    found[known[~held.stands(found[known], at_ms[known])]] = -1
    return found


def _lists(found: Sequences) -> pa.ListArray:
    events = pa.StructArray.from_arrays(
        [column.combine_chunks() for column in found.table.columns], fields=list(found.table.schema)
    )
    offsets = np.concatenate([[0], np.cumsum(found.lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), events)


def _list_type(definition: Definition) -> pa.DataType:
    kinds = {**EVENT_FIELDS, **ENRICHMENTS}
    return pa.list_(pa.struct([(name, kinds[name]) for name in definition.columns]))


def _families(definition: Definition) -> tuple[Family, ...]:
    """The families of pins that a definition needs."""
    assert isinstance(PINS.read, Documents)
    names = (*definition.enrich, *([CATEGORY] if definition.categories else []))
    needed = {name.partition(".")[0] for name in names}
    needed |= {PINS.read.presence} if needed else set()
    return tuple(family for family in PINS.families if family.name in needed)


# ---------------------------------------------------------------------------------------------------------- in Spark


def _accepted(
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
    """What accepted records of `user-interactions` say, as `as_of` reads it."""
    (family,) = USER_EVENTS.families
    return _statements(
        rows,
        family,
        key="user_id",
        id="event_id",
        time_ms=TIME_MS,
        content_hash="content_hash",
        said=family.schema.names,
    )


def pin_statements(rows: DataFrame, family: Family) -> DataFrame:
    """What accepted records of `pin-updates` say of one family, as `as_of` reads it."""
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
    labels: DataFrame, events: DataFrame, updates: DataFrame, definition: Definition, buckets: int
) -> DataFrame:
    """Labels with their sequences, computed in as many groups of users as there are buckets.

    Args:
        labels: The labels.
        events: Accepted records of their users.
        updates: Accepted records of pins; each group gets those of the pins that are in its events.
        definition: Of the sequence.
        buckets: How many groups; one must fit an executor's memory.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.pandas.types import from_arrow_type
    from pyspark.sql.types import BooleanType, StructType

    def bucketed(rows: DataFrame, user: str) -> DataFrame:
        return rows.withColumn("_bucket", F.expr(f"pmod(xxhash64({user}), {buckets})"))

    said = bucketed(event_statements(events), "key")
    wanted = said.selectExpr("_bucket", "interactions.pin_id AS key").distinct()
    for family in _families(definition):
        of_family = pin_statements(updates, family).join(wanted, "key")
        said = said.unionByName(of_family, allowMissingColumns=True)
    schema = StructType(labels.schema.fields.copy())
    schema.add("sequence", from_arrow_type(_list_type(definition))).add("is_complete", BooleanType())
    run = functools.partial(_run, definition)
    left, right = bucketed(labels, "user_id").groupBy("_bucket"), said.groupBy("_bucket")
    return left.cogroup(right).applyInArrow(run, schema)


def _run(definition: Definition, labels: pa.Table, statements: pa.Table) -> pa.Table:
    return as_of(labels.drop_columns(["_bucket"]), statements, definition)


# ------------------------------------------------------------------------------------------------------- the table


def _spec(definition: Definition, labels: DataFrame, labels_name: str, to: str) -> TableSpec:
    kinds = {**EVENT_FIELDS, **ENRICHMENTS}
    said = ", ".join(f"`{name}`: {lake.sql_type(kinds[name])}" for name in definition.columns)
    carried = (
        Column(field.name, field.dataType.simpleString(), f"of {labels_name}") for field in labels.schema
    )
    return TableSpec(
        name=to,
        doc=f"labels, each with the sequence {definition.name}, version {definition.version}, as it was then",
        columns=(
            *carried,
            Column("sequence", f"array<struct<{said}>>", f"the user's events, {definition.order}"),
            Column("is_complete", "boolean", "whether these are all; all of history was read"),
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
