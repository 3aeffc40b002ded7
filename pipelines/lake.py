"""The lake: every Iceberg table that Tidemark declares, and the few ways in which tables are made, written and read.

Belongs here: table specifications (columns with units, partitioning, order, file size, retention, owner), creation,
append, overwrite, reading at a snapshot, and what a snapshot says of itself. Does not belong here: what the rows mean
(`contracts`, `curate`) and which Spark runs (`spark`).

A commit's summary carries what must be known with the data and committed with it: `tidemark.position` (all that the
table has, cumulative), `tidemark.stream`, `tidemark.incarnation`, `tidemark.epoch` or `tidemark.load_id`, and
`tidemark.max_broker_time_ms`. A commit that brings nothing (maintenance makes them) says what those before it
said, with `tidemark.epochs`, so that these may expire (`standing`).
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
from pyiceberg.table import Table
from pyiceberg.table import snapshots as iceberg

from pipelines.ads import schema as ads
from pipelines.contracts import ADS_CHANGES, PIN_UPDATES, PROVENANCE, USER_FOLLOWS, USER_INTERACTIONS
from pipelines.errors import TidemarkError
from pipelines.indexing.position import EMPTY, Position, from_text, merge_all
from pipelines.settings import CATALOG, Lake, Settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

POSITION = "tidemark.position"
STREAM = "tidemark.stream"
INCARNATION = "tidemark.incarnation"
EPOCH = "tidemark.epoch"
EPOCHS = "tidemark.epochs"
LOAD_ID = "tidemark.load_id"
DUMP_ID = "tidemark.dump_id"
MAX_BROKER_TIME_MS = "tidemark.max_broker_time_ms"

_OF_ONE_COMMIT = (STREAM, INCARNATION, EPOCH, LOAD_ID)
_MIB = 2**20
_ATTEMPTS = 6
_DELETE_ATTEMPTS = 15  # each is a coin's toss where a table is compacted all the time
_LOST_RACES = (
    "CommitFailedException",
    "CommitStateUnknownException",
    "ValidationException",
    "NotFoundException",  # of a file: a snapshot that was being read expired
    "FileNotFoundException",
    "UncheckedSQLException",  # the catalog's database was locked
    "rewrite commits failed",  # of a compaction: the reason is only logged
)


class LakeError(TidemarkError):
    """A table is missing, or is not what it is declared to be."""


class Conflict(TidemarkError):
    """Another commit came between."""


class Column(NamedTuple):
    """A column: its Spark SQL type, what it says, and its unit where the name does not tell."""

    name: str
    type: str
    doc: str
    unit: str | None = None


class TableSpec(NamedTuple):
    """What a table is declared to be.

    Attributes:
        name: Namespace and table, as `raw.pin_updates`; also the key of its asset.
        doc: What a row is.
        columns: In their order.
        owner: The part of the project that writes it.
        partitioned_by: Iceberg transforms, as `days(event_time)`.
        sorted_by: The order inside a file.
        target_file_bytes: How large a file should grow.
        retention_days: How long rows are kept; None: for good.
    """

    name: str
    doc: str
    columns: tuple[Column, ...]
    owner: str
    partitioned_by: tuple[str, ...] = ()
    sorted_by: tuple[str, ...] = ()
    target_file_bytes: int = 128 * _MIB
    retention_days: int | None = None

    @property
    def identifier(self) -> str:
        """The table's name in Spark and Trino, with the catalog."""
        return f"{CATALOG}.{self.name}"


class Snapshot(NamedTuple):
    """A snapshot of a table: its id, its summary, and the rows and bytes that the table has in it."""

    id: int
    summary: Mapping[str, str]
    rows: int
    bytes: int
    committed_at_ms: int
    parent_id: int | None = None


# ------------------------------------------------------------------------------------------------ the tables

_PROVENANCE_DOCS = {
    "topic_id": "id of the Kafka topic that the record is from; null for a load",
    "partition": "partition of the topic; null for a load",
    "offset": "offset in the partition; null for a load",
    "load_id": "the load that brought the record; null if it is from Kafka",
    "load_row": "number of the row in the load's source; null if the record is from Kafka",
    "broker_time": "when the broker, or the load, took the record",
}


def sql_type(kind: pa.DataType) -> str:
    """The Spark SQL type of an Arrow type."""
    from pyspark.sql.pandas.types import from_arrow_type

    return str(from_arrow_type(kind).simpleString())


def columns_of(
    schema: pa.Schema, docs: Mapping[str, str], units: Mapping[str, str] | None = None
) -> tuple[Column, ...]:
    """Columns from an Arrow schema; every one of them must have its doc."""
    units = units or {}
    return tuple(
        Column(field.name, sql_type(field.type), docs[field.name], units.get(field.name)) for field in schema
    )


_provenance = functools.partial(columns_of, PROVENANCE, _PROVENANCE_DOCS, {"broker_time": "UTC"})

_RECORD_COLUMNS = (
    *_provenance(),
    Column("key", "binary", "the record's key as it came; never trusted"),
    Column("value", "binary", "the record's original bytes; for a load, the JSON made of the source's row"),
)
_INGESTED_AT = Column("ingested_at", "timestamp", "when the row was written here", "UTC")


def _raw(topic: str, doc: str) -> TableSpec:
    return TableSpec(
        name=f"raw.{topic}",
        doc=doc,
        columns=(*_RECORD_COLUMNS, _INGESTED_AT),
        owner="ingest",
        partitioned_by=("days(ingested_at)",),
    )


RAW_USER_INTERACTIONS = _raw(
    USER_INTERACTIONS.name, "every record of the topic user-interactions and of its loads"
)
RAW_PIN_UPDATES = _raw(PIN_UPDATES.name, "every record of the topic pin-updates and of its loads")

RAW_USER_FOLLOWS = _raw(USER_FOLLOWS.name, "every record of the topic user-follows and of its loads")

RAW_ADS_CHANGES = _raw(ADS_CHANGES.name, "every record of the topic ads-changes")

RAW_DEAD_LETTERS = TableSpec(
    name="raw.dead_letters",
    doc="a record of a raw table that its contract refuses, and why; counts once the raw table has the record",
    columns=(
        Column("topic", "string", "name of the topic whose contract refused it"),
        *_RECORD_COLUMNS,
        Column("reason", "string", "why, as a slug"),
        Column("detail", "string", "why, in words"),
        _INGESTED_AT,
    ),
    owner="ingest",
    partitioned_by=("days(ingested_at)",),
)

RAW_HOUSEHOLDS = TableSpec(
    name="raw.households",
    doc="demographics of a household, which is a user",
    columns=(
        Column("user_id", "string", "the household"),
        Column("age", "string", "estimated age range", "years"),
        Column("income", "string", "range of the yearly income", "thousand USD"),
        Column("home_ownership", "string", "homeowner, renter, and so on; null if unknown"),
        Column("marital_status", "string", "null if unknown"),
        Column("household_size", "string", "number of members, up to 5+"),
        Column("household_comp", "string", "composition of the household"),
        Column("kids_count", "string", "number of children, up to 3+"),
        Column("load_id", "string", "the load that brought the row"),
        Column("load_row", "bigint", "number of the row in the load's source"),
        _INGESTED_AT,
    ),
    owner="ingest",
)

_OF_FEATURES = ("user_id", "event_id", "event_time", "version", "is_deleted", "features", "features_hash")

CURATED_USER_INTERACTIONS = TableSpec(
    name="curated.user_interactions",
    doc="for each (user_id, event_id) the statement that stands, tombstones too",
    columns=(
        *columns_of(
            pa.schema([f for f in USER_INTERACTIONS.row_schema if not f.name.startswith("features")]),
            {
                "user_id": "whose interaction",
                "event_id": "the event's own id, unique for a user",
                "pin_id": "with which pin; null if it is about something else",
                "action": "what the user did; null in a tombstone",
                "event_time": "when; null in a tombstone",
                "version": "version of the statement",
                "is_deleted": "whether it is a tombstone",
                "content_hash": "hash of what the record says, unknown fields included",
                "quantity": "how many; null if not said",
                "value_usd_micros": "for how much; null if not said",
                "surface": "where in the product; null if not said",
                "ad_id": "the ad that showed the pin; null if none did",
                "campaign_id": "the ad's campaign",
                "advertiser_id": "the ad's advertiser",
                "category": "the category that the user was in; null if not said",
                "view_type": "how it was shown; null if not said",
                "payload": "what events of this action have to say, as JSON; null if nothing",
            },
            {"event_time": "UTC", "value_usd_micros": "micro-dollars"},
        ),
        *_provenance(),
    ),
    owner="curate",
    partitioned_by=("days(event_time)",),
    sorted_by=("user_id", "event_id"),
    target_file_bytes=64 * _MIB,
)


CURATED_EVENT_FEATURES = TableSpec(
    name="curated.event_features",
    doc="for each (user_id, event_id) what was found out later, as it stands, tombstones too",
    columns=(
        *columns_of(
            pa.schema([USER_INTERACTIONS.row_schema.field(name) for name in _OF_FEATURES]),
            {
                "user_id": "whose event",
                "event_id": "which event",
                "event_time": "when it happened; null in a tombstone",
                "version": "version of the statement",
                "is_deleted": "whether it is a tombstone",
                "features": "what was found out, as JSON; null in a tombstone",
                "features_hash": "hash of it",
            },
            {"event_time": "UTC"},
        ),
        *_provenance(),
    ),
    owner="curate",
    partitioned_by=("days(event_time)",),
    sorted_by=("user_id", "event_id"),
    target_file_bytes=64 * _MIB,
)

CURATED_USER_FOLLOWS = TableSpec(
    name="curated.user_follows",
    doc="for each user and pin or user that is followed the statement that stands, tombstones too",
    columns=(
        *columns_of(
            USER_FOLLOWS.row_schema,
            {
                "user_id": "who follows",
                "kind": "what is followed: pin or user",
                "followed_id": "the pin, or the user, that is followed",
                "event_time": "when it was followed, if the record says so; null in a tombstone",
                "version": "version of the statement",
                "is_deleted": "whether it is a tombstone: followed no more",
                "content_hash": "hash of what the record says, unknown fields included",
            },
            {"event_time": "UTC"},
        ),
        *_provenance(),
    ),
    owner="curate",
    sorted_by=("user_id", "kind", "followed_id"),
    target_file_bytes=64 * _MIB,
)


def _pins(family: str, doc: str) -> TableSpec:
    docs = {
        "pin_id": "which pin",
        "version": "version of the record",
        "event_time": "when, if the record says so",
        "is_deleted": "whether it is a tombstone",
        family: doc,
        f"{family}_hash": "hash of what the record says of the family, unknown fields included",
    }
    schema = pa.schema([field for field in PIN_UPDATES.row_schema if field.name in docs])
    return TableSpec(
        name=f"curated.pins_{family}",
        doc=f"for each pin the {family} that stands, tombstones too",
        columns=(*columns_of(schema, docs, {"event_time": "UTC"}), *_provenance()),
        owner="curate",
        sorted_by=("pin_id",),
        target_file_bytes=64 * _MIB,
    )


CURATED_PINS_CATALOGUE = _pins("catalogue", "title, category, department and brand; null in a tombstone")
CURATED_PINS_OFFER = _pins("offer", "price in micro-dollars, and availability; null in a tombstone")

CURATED_PIN_CHANGES = TableSpec(
    name="curated.pin_changes",
    doc="of each pin, version and family what was said, as it was said first: the history of the pins",
    columns=(
        *columns_of(
            PIN_UPDATES.row_schema,
            {
                "pin_id": "which pin",
                "version": "version of the record",
                "event_time": "when, if the record says so",
                "is_deleted": "whether the pin was deleted",
                "catalogue": "what it set of the catalogue; null if nothing, or if another row of the version has it",
                "catalogue_hash": "hash of that; null as it is",
                "offer": "what it set of the offer; as with the catalogue",
                "offer_hash": "hash of that; null as it is",
            },
            {"event_time": "UTC"},
        ),
        *_provenance(),
    ),
    owner="curate",
    sorted_by=("pin_id", "version"),
    target_file_bytes=64 * _MIB,
)

FEATURES_PIN_VECTORS = TableSpec(
    name="features.pin_vectors",
    doc="the model's vector of a pin",
    columns=(
        Column("pin_id", "string", "which pin"),
        Column("vector", "array<float>", "its place in the model's space"),
        Column("model_id", "string", "the model that made it; vectors of two models never meet"),
    ),
    owner="recommend",
    sorted_by=("pin_id",),
)

FEATURES_USER_VECTORS = TableSpec(
    name="features.user_vectors",
    doc="a user's vector, as serving would fold it in from what is curated; the product with a pin's is the score",
    columns=(
        Column("user_id", "string", "which user"),
        Column("vector", "array<float>", "the user's place in the model's space"),
        Column("event_count", "int", "how many of the user's events are in it"),
        Column("model_id", "string", "the model that made it; vectors of two models never meet"),
    ),
    owner="recommend",
    sorted_by=("user_id",),
)

_REPO_TYPES = {
    ads.INTEGER: "bigint",
    ads.NUMBER: "double",
    ads.BOOLEAN: "boolean",
    ads.TEXT: "string",
    ads.TERMS: "array<string>",
    ads.TIME: "timestamp",
    ads.ID: "string",
    ads.VECTOR: "array<float>",
}


def _repo(table: ads.Table) -> TableSpec:
    stands = (
        Column(
            f"stand_{family}",
            "bigint",
            f"version of its {family} columns: the sum of theirs and the deletion's",
        )
        for family in (ads.CONTROL, ads.CONTENT, ads.PERFORMANCE)
    )
    return TableSpec(
        name=f"repo.{table.name}",
        doc=f"rows of {table.name} as the ads repository had them at one point, deleted ones too",
        columns=(
            Column(table.key, "string", "names the row"),
            Column(
                "is_there",
                "boolean",
                "whether a column of its table's own family was said since it was deleted, if it was",
            ),
            Column("deleted_version", "bigint", "the greatest version at which it was deleted; 0: never"),
            *stands,
            *(
                Column(
                    column.name,
                    _REPO_TYPES[column.type],
                    column.doc,
                    "UTC" if column.type == ads.TIME else None,
                )
                for column in table.columns
            ),
            Column("registers", "string", "JSON: the version of each column, and its value at it"),
        ),
        owner="ads",
        sorted_by=(table.key,),
    )


REPO: dict[str, TableSpec] = {f"repo.{table.name}": _repo(table) for table in ads.TABLES.values()}
"""The dump of the ads repository; of a row that is not there the columns of its table's own family are null."""

OPS_REPO_HEADS = TableSpec(
    name="ops.repo_heads",
    doc="a table of a dump of the ads repository: all those of one dump are of one point",
    columns=(
        Column("dump_id", "string", "names the dump"),
        Column("point_at", "timestamp", "when the repository was read", "UTC"),
        Column("seq", "bigint", "number of the newest change that is in it"),
        Column("position", "string", "what of the streams' topics is surely in it"),
        Column("table", "string", "the table, as repo.ads"),
        Column("snapshot_id", "bigint", "its snapshot"),
        Column("rows", "bigint", "how many rows it has"),
    ),
    owner="ads",
)

OPS_ADS_UNSYNCED = TableSpec(
    name="ops.ads_unsynced",
    doc="rows of the ads account of which source database and repository, or two tables, did not agree",
    columns=(
        Column("at", "timestamp", "when they were compared", "UTC"),
        Column("table", "string", "the source table; null in the row that says that all was compared"),
        Column("cause", "string", "missing, extra, differs, older, waits, impossible or dangling"),
        Column("rows", "bigint", "how many"),
        Column("examples", "string", "some of them with what is wrong, as a JSON object by key"),
        Column("has_source", "boolean", "whether the source database could be asked"),
    ),
    owner="ads",
    retention_days=400,
)

OPS_INDEX_VERSIONS = TableSpec(
    name="ops.index_versions",
    doc="what happened to a base version",
    columns=(
        Column("index", "string", "which index"),
        Column("version", "string", "which base version"),
        Column("lineage", "string", "fingerprint of transform and schema"),
        Column("event", "string", "built, refused, published, rolled_back or deleted"),
        Column("reason", "string", "why, where it was refused or rolled back"),
        Column("position", "string", "its cut, as JSON"),
        Column("rows", "bigint", "facts in it"),
        Column("bytes", "bigint", "size of its files", "bytes"),
        Column("at", "timestamp", "when", "UTC"),
    ),
    owner="indexing",
)

OPS_EPOCHS = TableSpec(
    name="ops.epochs",
    doc="an epoch of a hot stream, copied from the delta's marker rows",
    columns=(
        Column("index", "string", "which index"),
        Column("stream", "string", "which stream"),
        Column("lineage", "string", "fingerprint of transform and schema"),
        Column("incarnation", "bigint", "incarnation of the stream"),
        Column("epoch", "bigint", "Spark's batch id"),
        Column("position", "string", "where the epoch ends, as JSON"),
        Column("rows", "bigint", "records read"),
        Column("facts", "bigint", "facts written"),
        Column("min_event_time_ms", "bigint", "oldest event", "ms since 1970"),
        Column("max_event_time_ms", "bigint", "newest event", "ms since 1970"),
        Column("stages", "string", "time of each stage, as JSON", "ms"),
        Column("committed_at", "timestamp", "when the epoch was committed", "UTC"),
    ),
    owner="indexing",
    partitioned_by=("days(committed_at)",),
    retention_days=90,
)

OPS_FRESHNESS = TableSpec(
    name="ops.freshness",
    doc="how long after its first stage a minute's documents came to a later one, as a replica served them",
    columns=(
        Column("index", "string", "which index"),
        Column("stream", "string", "which stream"),
        Column("kind", "string", "live, or backfill: what was let wait"),
        Column(
            "stage",
            "string",
            "to which stage: those that the stream declares, sent, committed (to the delta), served",
        ),
        Column("minute", "timestamp", "in which the documents were served first", "UTC"),
        Column("replica", "string", "of serving"),
        Column("documents", "bigint", "how many; one that changed in several epochs is several"),
        Column("p50_ms", "bigint", "half of them were no later", "ms"),
        Column("p90_ms", "bigint", "90 percent of them were no later", "ms"),
        Column("p99_ms", "bigint", "99 percent of them were no later", "ms"),
        Column("max_ms", "bigint", "none was later", "ms"),
    ),
    owner="indexing",
    partitioned_by=("months(minute)",),
    sorted_by=("index", "stream", "minute"),
    retention_days=90,
)

OPS_SERVED = TableSpec(
    name="ops.served",
    doc="what of an index is served; the tag `published` of `index.<name>` has the rows of that base",
    columns=(
        Column("index", "string", "which index"),
        Column("version", "string", "the base version that is served"),
        Column("lineage", "string", "fingerprint of its transform and schema, whose delta is served with it"),
        Column(
            "is_with_delta", "boolean", "whether the delta is served (not so after a roll back without it)"
        ),
        Column(
            "snapshot_id",
            "bigint",
            "the snapshot of `index.<name>` that it is built of; null if that is gone",
        ),
        Column(
            "horizon_from_ms",
            "bigint",
            "the oldest event that is answered; null: no horizon",
            "ms since 1970",
        ),
        Column("changed_at", "timestamp", "when the pointer moved", "UTC"),
    ),
    owner="indexing",
)

OPS_STORAGE = TableSpec(
    name="ops.storage",
    doc="what a table, a delta or the bases of an index take up, as maintenance left it",
    columns=(
        Column("at", "timestamp", "when it was measured", "UTC"),
        Column("kind", "string", "table, delta or bases"),
        Column("name", "string", "the table; index/lineage of a delta; the index of bases"),
        Column(
            "files",
            "bigint",
            "data files that a reader of the newest state reads; for bases, of all versions",
        ),
        Column("bytes", "bigint", "size of these", "bytes"),
        Column("partitions", "bigint", "partitions that have files; null for bases"),
        Column("max_files_per_partition", "bigint", "most files of one partition; null for bases"),
        Column(
            "small_files",
            "bigint",
            "files of less than half the declared target size, one of each partition apart (the rest that does not "
            "fill a file), in all partitions but the newest, which is being written; null for bases",
        ),
        Column(
            "small_file_pct", "double", "share of small_files among the files of these partitions", "percent"
        ),
        Column("snapshots", "bigint", "snapshots that are kept; of bases, versions; null for a delta"),
        Column("tags", "bigint", "tags that spare snapshots; null but for tables"),
        Column("manifests", "bigint", "manifests of the newest snapshot; null but for tables"),
        Column("stored_bytes", "bigint", "all that lies in its folder: history and metadata too", "bytes"),
        Column("metadata_bytes", "bigint", "the metadata in it; null for bases", "bytes"),
        Column("orphan_files", "bigint", "orphans that this run removed; null where it did not look for any"),
        Column("orphan_bytes", "bigint", "size of these", "bytes"),
        Column("cost_usd_micros_month", "bigint", "what stored_bytes cost in a month", "micro-dollars"),
    ),
    owner="maintenance",
    partitioned_by=("months(at)",),
    sorted_by=("kind", "name", "at"),
    retention_days=400,
)

OPS_ACCOUNT = TableSpec(
    name="ops.account",
    doc="what became of every row of a raw table: rows = accepted + refused, accepted = the four fates",
    columns=(
        Column("table", "string", "which raw table"),
        Column("snapshot_id", "bigint", "at which of its snapshots"),
        Column("rows", "bigint", "rows in it"),
        Column("accepted", "bigint", "rows that keep the contract"),
        Column("refused", "bigint", "rows that do not"),
        Column("tombstones", "bigint", "accepted rows that delete"),
        Column("repeated", "bigint", "accepted rows that say what was said before"),
        Column("superseded", "bigint", "accepted rows of which nothing stands"),
        Column("current", "bigint", "accepted rows of which something stands"),
        Column("refused_by_reason", "string", "refused rows by reason, as JSON"),
    ),
    owner="curate",
)

OPS_LOSSES = TableSpec(
    name="ops.losses",
    doc="offsets that the broker expired before they were archived: these records are lost",
    columns=(
        Column("topic_id", "string", "id of the Kafka topic"),
        Column("partition", "int", "partition of the topic"),
        Column("start", "bigint", "the first offset that was lost"),
        Column("end", "bigint", "the first offset after them"),
        Column("noted_at", "timestamp", "when the archive stream began again behind them", "UTC"),
    ),
    owner="ingest",
)

OPS_TIMELINE_CORRECTIONS = TableSpec(
    name="ops.timeline_corrections",
    doc="how many facts a new base of a timeline corrected in what was served before, by cause",
    columns=(
        Column("at", "timestamp", "when it was counted", "UTC"),
        Column("index", "string", "which index"),
        Column("version", "string", "the base that corrected"),
        Column("before", "string", "the base that was served until then"),
        Column("family", "string", "column family"),
        Column("cause", "string", "load, not_streamed, joined_anew, decided_otherwise or withdrawn"),
        Column("facts", "bigint", "so many; 0 is counted too"),
    ),
    owner="indexing",
    sorted_by=("at",),
    retention_days=400,
)

OPS_REPLAYS = TableSpec(
    name="ops.replays",
    doc="a record that was sent again, and as what",
    columns=(
        Column("topic", "string", "name of the topic"),
        *[column for column in _provenance() if column.name != "broker_time"],
        Column("as_topic_id", "string", "id of the topic that it was sent to"),
        Column("as_partition", "int", "its partition there"),
        Column("as_offset", "bigint", "its offset there"),
        Column("replayed_at", "timestamp", "when", "UTC"),
    ),
    owner="ingest",
)

OPS_LOADS = TableSpec(
    name="ops.loads",
    doc="a file of a load, or a load that was not of files; counts once the raw table has the load",
    columns=(
        Column("load_id", "string", "the load, as positions and the raw table have it"),
        Column("table", "string", "the raw table"),
        Column("number", "int", "the file's place in the load: its rows have load_row = number * 2^40 + row"),
        Column("file", "string", "its name in what was loaded; null if the load was not of files"),
        Column("digest", "string", "SHA-256 of its content, in hex"),
        Column("reading", "string", "fingerprint of how it was read: format, mapping, dialect"),
        Column("bytes", "bigint", "its size", "bytes"),
        Column("rows", "bigint", "rows in it, all of them in the raw table"),
        Column("accepted", "bigint", "rows that keep the contract"),
        Column("refused", "bigint", "rows that do not"),
        Column("refused_by_reason", "string", "refused rows by reason, as JSON"),
        Column("warnings", "array<string>", "what is odd about it"),
        Column("loaded_at", "timestamp", "when; also the broker_time of its rows", "UTC"),
    ),
    owner="ingest",
)

OPS_QUALITY = TableSpec(
    name="ops.quality",
    doc="a measure of a table at an audit, what it might be, and whether it was",
    columns=(
        Column("at", "timestamp", "when it was audited", "UTC"),
        Column("table", "string", "which table"),
        Column("snapshot_id", "bigint", "at which of its snapshots; null of what is not in the lake"),
        Column("batch", "string", "day (ISO) of its rows, or all"),
        Column("kind", "string", "what is wrong when it does not hold: nulls, volume, drift and so on"),
        Column("field", "string", "which field or rule; empty of the batch itself"),
        Column("measure", "string", "what was measured"),
        Column("value", "double", "the measure; null of a type"),
        Column("text", "string", "of a type, what was found"),
        Column("least", "double", "the least that was allowed; null: no bound"),
        Column("most", "double", "the greatest; null: no bound"),
        Column("basis", "string", "where the bounds were from; null: there were none"),
        Column("is_passed", "boolean", "whether it held; null where there were no bounds"),
        Column("is_blocking", "boolean", "whether what is built of the table waits for it"),
        Column("detail", "string", "in words"),
        Column("histogram", "string", "of a divergence, rows by bin, as JSON"),
    ),
    owner="quality",
    partitioned_by=("months(at)",),
    sorted_by=("table", "at"),
    retention_days=400,
)

TABLES: dict[str, TableSpec] = {
    spec.name: spec
    for spec in (
        RAW_USER_INTERACTIONS,
        RAW_PIN_UPDATES,
        RAW_USER_FOLLOWS,
        RAW_ADS_CHANGES,
        RAW_DEAD_LETTERS,
        RAW_HOUSEHOLDS,
        CURATED_USER_INTERACTIONS,
        CURATED_EVENT_FEATURES,
        CURATED_PINS_CATALOGUE,
        CURATED_PINS_OFFER,
        CURATED_USER_FOLLOWS,
        CURATED_PIN_CHANGES,
        FEATURES_PIN_VECTORS,
        FEATURES_USER_VECTORS,
        *REPO.values(),
        OPS_REPO_HEADS,
        OPS_ADS_UNSYNCED,
        OPS_INDEX_VERSIONS,
        OPS_EPOCHS,
        OPS_FRESHNESS,
        OPS_SERVED,
        OPS_ACCOUNT,
        OPS_LOSSES,
        OPS_TIMELINE_CORRECTIONS,
        OPS_REPLAYS,
        OPS_LOADS,
        OPS_STORAGE,
        OPS_QUALITY,
    )
}
"""Every declared table by its name. (`index.<name>` follows from the index's own specification.)"""


# ------------------------------------------------------------------------------------------------ making and writing


def ensure(spark: SparkSession, spec: TableSpec) -> None:
    """Make the namespace and the table if they are not there. Several processes may do so at once.

    Raises:
        LakeError: The table is there with other columns.
    """
    for attempt in range(_ATTEMPTS):
        try:
            if not spark.catalog.tableExists(spec.identifier):
                _create(spark, spec)
            break
        except Exception:  # whoever loses the race gets one of several errors, by catalog and moment
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.05 * 2**attempt)
    _require_columns(spark, spec)


def reshape(spark: SparkSession, spec: TableSpec) -> bool:
    """As `ensure`; a column that is declared otherwise by now is dropped and made anew, empty.

    For tables whose rows are replaced whole. Older snapshots are read with the columns that they had.

    Returns:
        Whether any column was.
    """
    if not spark.catalog.tableExists(spec.identifier):
        ensure(spark, spec)
        return False
    nothing = ", ".join(f"CAST(NULL AS {column.type}) AS `{column.name}`" for column in spec.columns)
    wanted = {field.name: field.dataType for field in spark.sql(f"SELECT {nothing}").schema}
    found = {field.name: field.dataType for field in spark.table(spec.identifier).schema}
    if found == wanted:
        return False
    for name in [name for name, kind in found.items() if wanted.get(name) != kind]:
        spark.sql(f"ALTER TABLE {spec.identifier} DROP COLUMN `{name}`")
    for place, column in enumerate(spec.columns):
        if found.get(column.name) != wanted[column.name]:
            where = f"AFTER `{spec.columns[place - 1].name}`" if place else "FIRST"
            added = f"`{column.name}` {column.type} COMMENT {quoted(_comment(column))} {where}"
            spark.sql(f"ALTER TABLE {spec.identifier} ADD COLUMN {added}")
    _require_columns(spark, spec)
    return True


def _create(spark: SparkSession, spec: TableSpec) -> None:
    spark.sql(f"CREATE NAMESPACE IF NOT EXISTS {CATALOG}.{spec.name.split('.')[0]}")
    columns = ",\n".join(f"`{c.name}` {c.type} COMMENT {quoted(_comment(c))}" for c in spec.columns)
    partitioning = f"PARTITIONED BY ({', '.join(spec.partitioned_by)})" if spec.partitioned_by else ""
    spark.sql(
        f"CREATE TABLE IF NOT EXISTS {spec.identifier} ({columns}) USING iceberg {partitioning} "
        f"COMMENT {quoted(spec.doc)} TBLPROPERTIES ({_listed(properties(spec))})"
    )
    if spec.sorted_by:
        order = ", ".join(f"`{name}`" for name in spec.sorted_by)
        distribution = "DISTRIBUTED BY PARTITION " if spec.partitioned_by else ""
        spark.sql(f"ALTER TABLE {spec.identifier} WRITE {distribution}LOCALLY ORDERED BY {order}")


def properties(spec: TableSpec) -> dict[str, str]:
    """The Iceberg properties that follow from a declaration."""
    return {
        "format-version": "2",
        "write.format.default": "parquet",
        "write.parquet.compression-codec": "zstd",
        "write.target-file-size-bytes": str(spec.target_file_bytes),
        # A file ends where what it has, and what is still in memory, uncompressed, reach the target: small row groups
        # keep the latter small, or files would become a fraction of the target.
        "write.parquet.row-group-size-bytes": str(spec.target_file_bytes // 8),
        "write.distribution-mode": "hash" if spec.partitioned_by and spec.sorted_by else "none",
        # Sorted rows come partition after partition: one open file a task, however many days there are.
        "write.spark.fanout.enabled": str(not spec.sorted_by).lower(),
        # Every commit writes all of the metadata anew; of thousands of snapshots that is an eighth, compressed.
        "write.metadata.compression-codec": "gzip",
        "write.metadata.delete-after-commit.enabled": "true",
        "write.metadata.previous-versions-max": "20",
        "commit.retry.num-retries": "20",
        "commit.retry.max-wait-ms": "2000",
        "tidemark.owner": spec.owner,
        "tidemark.retention-days": "" if spec.retention_days is None else str(spec.retention_days),
    }


def declare(spark: SparkSession, settings: Settings, spec: TableSpec) -> None:
    """Give a table that is there the properties of its declaration, where those have changed since it was made."""
    table = open_table(settings, spec.name)
    held = table.properties if table is not None else {}
    wanted = {name: value for name, value in properties(spec).items() if name != "format-version"}
    if changed := {name: value for name, value in wanted.items() if held.get(name) != value}:
        spark.sql(f"ALTER TABLE {spec.identifier} SET TBLPROPERTIES ({_listed(changed)})")


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{quoted(name)} = {quoted(value)}" for name, value in found.items())


def _require_columns(spark: SparkSession, spec: TableSpec) -> None:
    found = spark.table(spec.identifier).columns
    declared = [column.name for column in spec.columns]
    if set(found) != set(declared):
        raise LakeError(
            f"the table has the columns {', '.join(found)}; declared are {', '.join(declared)}",
            where=spec.identifier,
            remedy="migrate the table, or start with another TIDEMARK_HOME",
        )


def _comment(column: Column) -> str:
    return f"{column.doc} [{column.unit}]" if column.unit else column.doc


def quoted(text: str) -> str:
    """A text as a literal of Spark SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def append(df: DataFrame, spec: TableSpec, summary: Mapping[str, str] | None = None) -> None:
    """Append rows in one commit whose summary carries these properties."""
    _writer(df, spec, summary).append()


def overwrite(
    df: DataFrame, spec: TableSpec, summary: Mapping[str, str] | None = None, branch: str | None = None
) -> None:
    """Replace all rows in one commit, of the table or of a branch: a reader sees the old ones or the new ones."""
    from pyspark.sql import functions as F

    _writer(df, spec, summary, branch).overwrite(F.lit(True))


def overwrite_where(
    df: DataFrame,
    spec: TableSpec,
    condition: str,
    summary: Mapping[str, str],
    *,
    since: int,
    branch: str | None = None,
) -> None:
    """Replace the rows that a condition in Spark SQL names, in one commit.

    Args:
        df: The rows instead of them.
        spec: The table.
        condition: Names whole partitions.
        summary: Properties of the commit.
        since: The snapshot at which the rows were read.
        branch: Of the table, where it is not the table itself that is written.

    Raises:
        Conflict: A commit after `since` changed rows that the condition names; nothing was written.
    """
    from pyspark.sql import functions as F

    writer = _writer(df, spec, summary, branch).option("isolation-level", "serializable")
    try:
        writer.option("validate-from-snapshot-id", str(since)).overwrite(F.expr(condition))
    except Exception as error:  # py4j's error holds Iceberg's
        if "ValidationException" not in str(error):
            raise
        raise Conflict(
            "rows changed after they were read",
            where=f"{spec.name} WHERE {condition}",
            remedy="read them again",
        ) from error


def _writer(  # type: ignore[no-untyped-def]
    df: DataFrame, spec: TableSpec, summary: Mapping[str, str] | None, branch: str | None = None
):
    target = spec.identifier if branch is None else f"{spec.identifier}.branch_{branch}"
    writer = df.select(*[f"`{column.name}`" for column in spec.columns]).writeTo(target)
    for name, value in (summary or {}).items():
        writer = writer.option(f"snapshot-property.{name}", value)
    return writer


def delete(spark: SparkSession, spec: TableSpec, condition: str) -> None:
    """Delete the rows that a condition in Spark SQL names, in one commit.

    Where compaction replaced a file meanwhile, Iceberg refuses the commit: it is made again, of the new files.
    """
    for attempt in range(_DELETE_ATTEMPTS):
        try:
            spark.sql(f"DELETE FROM {spec.identifier} WHERE {condition}")
            return
        except Exception as error:
            if attempt == _DELETE_ATTEMPTS - 1 or not is_lost_race(error):
                raise
            time.sleep(
                random.uniform(0, min(0.2 * 2**attempt, 3.0))
            )  # not in step with whoever rewrites files


def is_lost_race(error: Exception) -> bool:
    """Whether a statement or an action failed because another writer was there first: it may be made again.

    Java's errors come as one kind, with their own name in the text.
    """
    return any(name in f"{type(error).__name__} {error}" for name in _LOST_RACES)


def tag(spark: SparkSession, name: str, snapshot_id: int, label: str) -> None:
    """Keep a snapshot from expiring for as long as something is built on it."""
    spark.sql(f"ALTER TABLE {CATALOG}.{name} CREATE TAG IF NOT EXISTS `{label}` AS OF VERSION {snapshot_id}")


def drop_tag(spark: SparkSession, name: str, label: str) -> None:
    """Let a snapshot expire that was kept."""
    spark.sql(f"ALTER TABLE {CATALOG}.{name} DROP TAG IF EXISTS `{label}`")


# ------------------------------------------------------------------------------------------------ reading


def read(spark: SparkSession, name: str, snapshot_id: int | None = None) -> DataFrame:
    """A table's rows, now or at a snapshot."""
    reader = spark.read
    if snapshot_id is not None:
        reader = reader.option("versionAsOf", snapshot_id)
    return reader.table(f"{CATALOG}.{name}")


def current_snapshot(settings: Settings, name: str) -> Snapshot | None:
    """The newest snapshot of a table; None if there is no table, or nothing was ever written. Needs no Spark."""
    return next(ancestors(settings, name), None)


def ancestors(settings: Settings, name: str, snapshot_id: int | None = None) -> Iterator[Snapshot]:
    """The retained snapshots of a table from the newest (or a given) one backwards; nothing if there is no table."""
    table = open_table(settings, name)
    if table is None:
        return
    wanted = snapshot_id if snapshot_id is not None else table.metadata.current_snapshot_id
    by_id = {snapshot.snapshot_id: snapshot for snapshot in table.metadata.snapshots}
    while wanted is not None and (found := by_id.get(wanted)) is not None:
        yield _snapshot(found)
        wanted = found.parent_snapshot_id


def _snapshot(found: iceberg.Snapshot) -> Snapshot:
    summary: dict[str, str] = {}
    if found.summary is not None:
        summary = {"operation": found.summary.operation.value, **found.summary.additional_properties}
    return Snapshot(
        id=found.snapshot_id,
        summary=summary,
        rows=int(summary.get("total-records", 0)),
        bytes=int(summary.get("total-files-size", 0)),
        committed_at_ms=found.timestamp_ms,
        parent_id=found.parent_snapshot_id,
    )


def position(settings: Settings, name: str, snapshot_id: int | None = None) -> Position:
    """What a table holds: the merge over all retained snapshots up to the newest (or a given) one.

    Each commit writes the merge of what it found and what it brings. Two that commit at once know nothing of each
    other, so that neither's summary has both; the merge over the ancestors has.
    """
    return merge_all(
        from_text(snapshot.summary[POSITION])
        for snapshot in ancestors(settings, name, snapshot_id)
        if POSITION in snapshot.summary
    )


def positions(settings: Settings, names: Mapping[str, int | None] | list[str] | tuple[str, ...]) -> Position:
    """The merge of several tables' positions, each at its newest snapshot or at the one that is given with it."""
    wanted = names if isinstance(names, Mapping) else dict.fromkeys(names)
    return functools.reduce(
        Position.merge, (position(settings, name, at) for name, at in wanted.items()), EMPTY
    )


def bringing(settings: Settings, name: str, brought: Position, max_broker_time_ms: int) -> dict[str, str]:
    """The summary of a commit that brings something: the table's position with it, and the greatest broker time."""
    before = standing(ancestors(settings, name))
    held = from_text(before[POSITION]) if POSITION in before else EMPTY
    return {
        POSITION: held.merge(brought).to_text(),
        MAX_BROKER_TIME_MS: str(max(int(before.get(MAX_BROKER_TIME_MS, 0)), max_broker_time_ms)),
    }


def committed_epoch(
    settings: Settings, name: str, stream: str, incarnation: int | None = None
) -> tuple[int, int] | None:
    """The last (incarnation, epoch) of a stream (in one incarnation) that a table has; None if there is none."""
    found = _epochs(snapshot.summary for snapshot in ancestors(settings, name)).get(stream, {})
    return max((last for last in found.items() if incarnation in (None, last[0])), default=None)


def _epochs(summaries: Iterable[Mapping[str, str]]) -> dict[str, dict[int, int]]:
    """Stream → incarnation → its last epoch, of commits and of what commits say of those before them."""
    found: dict[str, dict[int, int]] = {}
    for summary in summaries:
        said = [
            (stream, int(incarnation), epoch)
            for stream, lasts in json.loads(summary.get(EPOCHS, "{}")).items()
            for incarnation, epoch in lasts.items()
        ]
        if STREAM in summary:
            said.append((summary[STREAM], int(summary[INCARNATION]), int(summary[EPOCH])))
        for stream, incarnation, epoch in said:
            lasts = found.setdefault(stream, {})
            lasts[incarnation] = max(epoch, lasts.get(incarnation, epoch))
    return found


def standing(snapshots: Iterable[Snapshot]) -> dict[str, str]:
    """What a commit that brings nothing must say, so that nothing is forgotten when the ones before it expire.

    Positions, epochs and broker times are merged by maximum. So it does no harm if another commit comes in between: its
    own summary still has what it brought, and every reader merges both.

    Args:
        snapshots: From the newest backwards. One that replaced all rows ends the walk: what was before it is gone.
    """
    said: dict[str, str] = {}
    walked: list[Mapping[str, str]] = []
    for snapshot in snapshots:
        summary = {name: value for name, value in snapshot.summary.items() if name.startswith("tidemark.")}
        walked.append(summary)
        for name in summary.keys() - set(_OF_ONE_COMMIT):
            said.setdefault(name, summary[name])
        if is_replacing(snapshot):
            break
    if epochs := _epochs(walked):
        said[EPOCHS] = json.dumps(epochs, separators=(",", ":"), sort_keys=True)
    if POSITION in said:
        said[POSITION] = merge_all(from_text(s[POSITION]) for s in walked if POSITION in s).to_text()
    if MAX_BROKER_TIME_MS in said:
        said[MAX_BROKER_TIME_MS] = str(max(int(s.get(MAX_BROKER_TIME_MS, 0)) for s in walked))
    return said


def is_replacing(snapshot: Snapshot) -> bool:
    """Whether a commit replaced what the table said before: an overwrite with a position of its own, not a delete."""
    return POSITION in snapshot.summary and snapshot.summary.get("operation") == "overwrite"


def open_table(settings: Settings, name: str) -> Table | None:
    """The table through pyiceberg; None if it is not there."""
    try:
        return catalog(settings).load_table(name)
    except (NoSuchTableError, NoSuchNamespaceError):
        return None


def catalog(settings: Settings) -> Catalog:
    """The catalog through pyiceberg."""
    return _catalog(settings.lake)


@functools.lru_cache(maxsize=8)
def _catalog(lake: Lake) -> Catalog:
    if path := lake.sqlite_path:
        path.parent.mkdir(parents=True, exist_ok=True)
    warehouse = urlsplit(lake.warehouse)
    if warehouse.scheme in ("", "file"):
        Path(warehouse.path).mkdir(parents=True, exist_ok=True)
    return load_catalog(CATALOG, **lake.pyiceberg_properties)
