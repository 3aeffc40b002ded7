"""The rows of an index as a table: every family's facts, from the tables that its batch reads, and where they stand.

Belongs here: which table feeds which family, the table `index.<name>`, its rows, and the cut that follows from what was
read. Does not belong here: what a family's transform does (its domain), and building a base of the rows (`indexing`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.ads import relations as of_ads
from pipelines.curate import SOURCES
from pipelines.errors import TidemarkError
from pipelines.indexing import facts
from pipelines.indexing.position import EMPTY, Position, from_text
from pipelines.indexing.spec import Family, IndexSpec, looked_up
from pipelines.lake import DUMP_ID, MAX_BROKER_TIME_MS, POSITION, Column, Snapshot, TableSpec, columns_of
from pipelines.users import relations as of_users

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

MODEL_ID = "tidemark.model_id"
MODELS = "tidemark.models"
SOURCE_SNAPSHOTS = "tidemark.sources"

DELTA = "_delta"
"""What the name of a table of copied facts ends with."""

MODELLED = {("pins", "embedding"): "features.pin_vectors"}
"""(index, family) → the table of what a model computed, for families that no stream feeds."""

HISTORIES = {"pin_changes": "curated.pin_changes"}
"""Index → the table of all that was said, for those of which an event is a statement, and not what stands."""

FACT_DOCS = {
    "identity": "length-prefixed parts, the family among them",
    "identity_hash": "first 16 bytes of the identity's SHA-256",
    "family": "column family",
    "version_1": "first part of the version; the rank is (version, is_deleted, content_hash)",
    "version_2": "second part of the version",
    "version_3": "third part of the version",
    "version_4": "fourth part of the version",
    "is_deleted": "whether it is a tombstone",
    "content_hash": "hash of what the fact says",
    "key": "whose document, timeline or counter",
    "key_hash": "first 16 bytes of the key's SHA-256",
    "id": "the event's own id; empty for documents",
    "time_ms": "event time; 0 for documents",
    "amounts": "what it adds to sums",
}


DUMPED = {"ads_control": "repo.ads", "ads_content": "repo.ads"}
"""Stream of keys → the table whose rows are what it would look up, for streams whose records are no more than keys."""
SAME_RECORDS = {"user_patterns": "user_interactions"}
"""Stream → the one that reads the same records, and that the curated tables are named after."""
BESIDE = {"repo.ads": of_ads.READS}
"""Table → those that relations join to its rows: a build pins them with it."""
RELATIONS = {**of_ads.RELATIONS, **of_users.RELATIONS}
"""Relation → how a batch joins it to rows."""


class NoInput(TidemarkError):
    """No table is declared that a family's batch could read."""


class TwoDumps(TidemarkError):
    """Tables that are joined are not of one dump."""


class Standing(NamedTuple):
    """What a snapshot of `index.<name>` stands on; its commit's summary says so."""

    cut: Position
    max_broker_time_ms: int | None
    models: dict[str, str]
    sources: dict[str, int]

    def summary(self) -> dict[str, str]:
        """For the commit; `standing_of` reads it."""
        said = {
            POSITION: self.cut.to_text(),
            MODELS: json.dumps(self.models),
            SOURCE_SNAPSHOTS: json.dumps(self.sources),
        }
        if self.max_broker_time_ms is not None:
            said[MAX_BROKER_TIME_MS] = str(self.max_broker_time_ms)
        return said


def standing_of(snapshot: Snapshot) -> Standing:
    """What `Standing.summary` wrote."""
    said = snapshot.summary
    newest = said.get(MAX_BROKER_TIME_MS)
    return Standing(
        from_text(said[POSITION]),
        None if newest is None else int(newest),
        json.loads(said[MODELS]),
        json.loads(said[SOURCE_SNAPSHOTS]),
    )


def table(spec: IndexSpec) -> TableSpec:
    """The declaration of `index.<name>`, which follows from the index's own."""
    payloads = {facts.payload_column(f.name): f"what a live fact of {f.name} says" for f in spec.families}
    return TableSpec(
        name=f"index.{spec.name}",
        doc=f"the facts of the index {spec.name}, as its newest base was built of them",
        columns=columns_of(facts.schema(spec), FACT_DOCS | payloads, {"time_ms": "ms since 1970"}),
        owner="indexing",
    )


def delta_table(spec: IndexSpec) -> TableSpec:
    """The declaration of `index.<name>_delta`: the facts of the deltas as SQL can read them.

    Its partitions are those of the deltas, so that what goes there goes here.
    """
    rows = table(spec)
    return TableSpec(
        name=f"{rows.name}{DELTA}",
        doc=f"the facts of the index {spec.name} that its deltas hold, copied each minute; of every lineage",
        columns=(
            Column("lineage", "string", "whose delta: fingerprint of transform and schema"),
            Column("epoch_date", "string", "day (ISO) of the epoch in the delta"),
            Column("stream", "string", "which stream brought it"),
            Column("incarnation", "bigint", "incarnation of the stream"),
            Column("epoch", "bigint", "Spark's batch id"),
            Column("committed_at", "timestamp", "when the epoch was committed", "UTC"),
            *rows.columns,
        ),
        owner="indexing",
        partitioned_by=("lineage", "epoch_date"),
        target_file_bytes=64 * 2**20,
    )


def input_of(spec: IndexSpec, family: Family) -> str:
    """The table that a family's batch reads: the curated part of its stream's records, a dump, or the features table.

    Raises:
        NoInput: There is none; the message says what would be one.
    """
    if family.stream is None:
        if (spec.name, family.name) not in MODELLED:
            raise NoInput(f"no table is declared for {spec.name}.{family.name}", remedy="add it to MODELLED")
        return MODELLED[spec.name, family.name]
    if family.stream in DUMPED:
        return DUMPED[family.stream]
    if spec.name in HISTORIES:
        return HISTORIES[spec.name]
    stream = SAME_RECORDS.get(family.stream, family.stream)
    source = SOURCES.get(stream.replace("-", "_"))
    if source is None:
        raise NoInput(
            f"nothing is curated of the stream {family.stream!r}", where=spec.name, remedy=", ".join(SOURCES)
        )
    return next((part.table for part in source.parts if family.name in part.columns), source.parts[0].table)


def inputs(spec: IndexSpec) -> dict[str, str]:
    """Family → table, for every family of an index."""
    return {family.name: input_of(spec, family) for family in spec.families}


def reads(spec: IndexSpec) -> list[str]:
    """Every table that a build of the index reads: the inputs of its families, and what relations join to them."""
    found = [name for table in inputs(spec).values() for name in (table, *BESIDE.get(table, ()))]
    found += [name for f in spec.families for relation in f.looks_up for name in of_users.READS[relation]]
    return list(dict.fromkeys(found))


def rows(spec: IndexSpec, read: Callable[[str], DataFrame]) -> DataFrame:
    """The facts of every family, through the one transform that the streams use too, in the columns of the table."""
    state = TableState(read)
    parts = [
        family.transform(looked_up(family, read(table_name), state), state)
        for family, table_name in _with_inputs(spec)
    ]
    united = functools.reduce(lambda left, right: left.unionByName(right, allowMissingColumns=True), parts)
    return united.select(*[field.name for field in facts.schema(spec)])


class TableState(NamedTuple):
    """The state that a batch transform looks things up in: tables at the snapshots that the run has pinned."""

    read: Callable[[str], Any]

    def look_up(self, name: str, rows: DataFrame) -> DataFrame:
        """Rows joined with what the relation says of them."""
        return RELATIONS[name](rows, self.read)


def standing(spec: IndexSpec, snapshots: Mapping[str, Snapshot]) -> Standing:
    """What rows made of these snapshots stand on.

    The cut is a lower bound: of tables that come from one topic's records the lesser, over different topics both. What
    a model computed has no say in it, for no delta brings it.

    Raises:
        TwoDumps: Tables of a dump are of different ones.
    """
    if len(dumps := {s.summary[DUMP_ID] for s in snapshots.values() if DUMP_ID in s.summary}) > 1:
        raise TwoDumps(
            f"the tables that are joined are of the dumps {', '.join(sorted(dumps))}",
            where=f"index {spec.name}",
            remedy="build again: a table of the newer dump was refused, or came while the index was built",
        )
    by_stream: dict[str, list[Position]] = {}
    models = {}
    for family, table_name in _with_inputs(spec):
        said = snapshots[table_name].summary
        if family.stream is None:
            if said.get(MODEL_ID):
                models[family.name] = said[MODEL_ID]
        else:
            cut = from_text(said[POSITION]) if POSITION in said else EMPTY
            by_stream.setdefault(family.stream, []).append(cut)
    cuts = [functools.reduce(lesser, positions) for positions in by_stream.values()]
    aside = {name for f in spec.families for relation in f.looks_up for name in of_users.READS[relation]}
    times = [  # of what is looked up nothing follows: no event is newer for it
        int(s.summary[MAX_BROKER_TIME_MS])
        for name, s in snapshots.items()
        if MAX_BROKER_TIME_MS in s.summary and name not in aside
    ]
    return Standing(
        cut=functools.reduce(Position.merge, cuts, EMPTY),
        max_broker_time_ms=max(times, default=None),
        models=models,
        sources={name: snapshot.id for name, snapshot in snapshots.items()},
    )


def lesser(left: Position, right: Position) -> Position:
    """The greatest position that both cover."""
    topics = {
        topic: {p: min(o, right.topics[topic][p]) for p, o in offsets.items() if p in right.topics[topic]}
        for topic, offsets in left.topics.items()
        if topic in right.topics
    }
    return Position(topics, left.loads & right.loads)


def _with_inputs(spec: IndexSpec) -> list[tuple[Family, str]]:
    return [(family, input_of(spec, family)) for family in spec.families]
