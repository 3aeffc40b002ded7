"""What the catalogue of signals says: datasets, their fields, and what depends on what.

Belongs here: collecting all of it from contracts, tables, indices and streams as they are declared, from the lineage of
the code, and from what the lake holds. Nothing is typed by hand: what is not declared is not in it. Does not belong
here: how it is drawn and written (`graph`, `page`).
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from assets import freshness, streams
from assets.maintenance import GROUP as MAINTENANCE
from pipelines import derived, index_rows, lake
from pipelines.column_lineage import OPAQUE, Lineage
from pipelines.contracts import CONTRACTS, INTERNAL
from pipelines.indexing import delta, facts, lineages
from pipelines.indexing.spec import Forward, IndexSpec, Inverted, Sums, Timeline
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES, STREAMS
from pipelines.ingest import archive
from pipelines.lake import TableSpec

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.settings import Settings

KINDS = (
    "topic",
    "stream",
    "raw",
    "repo",
    "curated",
    "model",
    "features",
    "index",
    "base",
    "delta",
    "answer",
    "ops",
)
"""In the order in which data goes through them; `ops` is what the platform writes of itself."""

_UNITS = {
    "_usd_micros": "micro-dollars",
    "_ms": "ms",
    "_bytes": "bytes",
    "_pct": "percent",
    "_time": "UTC",
    "_at": "UTC",
}
COPIED = {index_rows.delta_table(spec).name: spec.name for spec in INDICES.values()}
"""Table of copied facts → the index whose deltas they are of."""
MANY = 4
"""Of so many consumers in one table each is named; of more, how many they are."""


class Field(NamedTuple):
    """A signal: a column of a table, or a field inside of one.

    Attributes:
        path: Dotted inside a struct.
        type: As Spark SQL writes it.
        unit: As it is declared, or by the name's ending.
        doc: What it says; of a field inside a struct, what the struct does.
        sources: What its value is made of.
        consumers: What is made of it, and what it is read by.
        coverage_pct: Share of rows that have it; None where it was not measured.
    """

    path: str
    type: str
    unit: str | None
    doc: str
    sources: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    coverage_pct: float | None = None


class Freshness(NamedTuple):
    """How old a dataset may be, and is.

    Attributes:
        expected: In words; None where nothing is expected.
        updated_at_ms: When it was written last; None: never, or there is no lake.
        holds_until_ms: The newest broker time among its records.
        rows: How many it has.
    """

    expected: str | None = None
    updated_at_ms: int | None = None
    holds_until_ms: int | None = None
    rows: int | None = None


class Dataset(NamedTuple):
    """Something that has signals, or passes them on; `inputs` are the names of what it is made of."""

    name: str
    kind: str
    doc: str
    owner: str
    fields: tuple[Field, ...] = ()
    inputs: tuple[str, ...] = ()
    freshness: Freshness = Freshness()


class Catalogue(NamedTuple):
    """All datasets in the order of `KINDS`, as of a time (ms)."""

    at_ms: int
    datasets: tuple[Dataset, ...]

    def to_json(self) -> dict[str, Any]:
        """For `signals.json` and the page."""
        return {"at_ms": self.at_ms, "datasets": [_json(dataset) for dataset in self.datasets]}


def _json(dataset: Dataset) -> dict[str, Any]:
    return {
        **dataset._asdict(),
        "fields": [field._asdict() for field in dataset.fields],
        "freshness": dataset.freshness._asdict(),
    }


def collect(settings: Settings, spark: SparkSession) -> Catalogue:
    """The catalogue as of now. A lake that is not there yet leaves coverage and freshness open, and nothing else."""
    traced = derived.lineages(spark)
    consumed = _consumers(traced)
    tables = [_table(settings, spec, traced.get(name), consumed) for name, spec in derived.specs().items()]
    found = [*_topics(), *_streams(), *tables]
    for spec in INDICES.values():
        found += [_base(settings, spec), _delta(settings, spec), _answer(spec)]
    order = {kind: place for place, kind in enumerate(KINDS)}
    return Catalogue(time.time_ns() // 1_000_000, tuple(sorted(found, key=lambda d: (order[d.kind], d.name))))


# ------------------------------------------------------------------------------------------------ datasets


def _topics() -> list[Dataset]:
    return [
        Dataset(
            f"topic.{contract.topic}",
            "topic",
            f"records under version {contract.version} of their contract, keyed by {contract.key_field}",
            "producers" if contract.topic in CONTRACTS else "tidemark",
        )
        for contract in (*CONTRACTS.values(), *INTERNAL.values())
    ]


def _streams() -> list[Dataset]:
    topics = {archive.STREAM: tuple(CONTRACTS)} | {name: stream.topics for name, stream in STREAMS.items()}
    expected = Freshness(_policy(streams.GROUP))
    return [
        Dataset(
            f"stream.{asset.key.path[-1]}",
            "stream",
            str(asset.description).replace("`", ""),
            _team(asset.owners),
            inputs=tuple(f"topic.{topic}" for topic in topics[asset.key.path[-1]]),
            freshness=expected,
        )
        for asset in streams.stream_assets
    ]


def _table(
    settings: Settings,
    spec: TableSpec,
    lineage: Lineage | None,
    consumed: Mapping[tuple[str, str], Mapping[str, list[str]]],
) -> Dataset:
    namespace = spec.name.partition(".")[0]
    kind = {"models": "model"}.get(namespace, namespace)
    covered = coverage(settings, spec.name) if kind in ("raw", "curated", "features") else {}
    flat = [item for column in spec.columns for item in _inside(column.name, column.type, column)]
    fields = tuple(
        Field(
            path,
            kind_of_value,
            (column.unit if path == column.name else None) or unit_of(path),
            column.doc,
            _sources(lineage, path) if lineage else (),
            (*_readers(spec.name, path, consumed),),
            covered.get(path),
        )
        for path, kind_of_value, column in flat
    )
    is_of_topic = spec.name in {contract.raw_table for contract in CONTRACTS.values()}
    if is_of_topic or spec.name == lake.RAW_DEAD_LETTERS.name:
        inputs: tuple[str, ...] = (f"stream.{archive.STREAM}",)
    elif spec.name in COPIED:
        inputs = (f"delta.{COPIED[spec.name]}",)
    else:
        inputs = _tables(lineage) if lineage else ()
    group = MAINTENANCE if spec.name == lake.OPS_STORAGE.name else namespace
    expected = _policy(group) if is_of_topic or lineage or group == MAINTENANCE else None
    said = _freshness(settings, spec.name, expected)
    return Dataset(spec.name, kind, spec.doc, spec.owner, fields, inputs, said)


def _base(settings: Settings, spec: IndexSpec) -> Dataset:
    served = Versions(settings.paths.indices, spec.name).served()
    said = Freshness(_policy("published"))
    if served is not None:
        said = said._replace(
            updated_at_ms=int(datetime.fromisoformat(served.built_at).timestamp() * 1000),
            holds_until_ms=served.horizon_time_ms,
            rows=served.counts.get("identities"),
        )
    doc = f"the base of the index {spec.name} that is served, immutable, in memory-mapped shards"
    return Dataset(f"base.{spec.name}", "base", doc, "indexing", (), (index_rows.table(spec).name,), said)


def _delta(settings: Settings, spec: IndexSpec) -> Dataset:
    newest = None
    for mark in lineages.of_index(settings.paths.delta, spec.name):
        newest = max(filter(None, (newest, _committed_at_ms(settings, spec.name, mark))), default=None)
    return Dataset(
        f"delta.{spec.name}",
        "delta",
        f"facts of the index {spec.name} since its base, an epoch a commit",
        "indexing",
        inputs=tuple(f"stream.{name}" for name in spec.streams),
        freshness=Freshness(_policy(streams.GROUP), newest),
    )


def _committed_at_ms(settings: Settings, index: str, mark: str) -> int | None:
    try:
        (commit,) = DeltaTable(str(delta.table_path(settings.paths.delta, index, mark))).history(1)
    except TableNotFoundError:
        return None
    return int(commit["timestamp"])


def _answer(spec: IndexSpec) -> Dataset:
    """What is served of an index: base and delta merged, read in its way."""
    table = index_rows.table(spec).name
    fields = [
        Field(
            f"{family.name}.{column.name}",
            lake.sql_type(column.type),
            unit_of(column.name),
            f"of the family {family.name}" + ("" if family.stream else ", which only a base has"),
            (f"{table}.{facts.payload_column(family.name)}.{column.name}",),
            tuple(_access(spec, family.name, column.name)),
        )
        for family in spec.families
        for column in family.schema
    ]
    if isinstance(spec.read, Sums):
        fields += [
            Field(f"sum.{name}", "bigint", None, f"sum of {name}, by key and time", (f"{table}.amounts",))
            for name in spec.read.amounts
        ]
    how = {Timeline: "a key's events, newest first", Sums: "sums by key and time"}.get(
        type(spec.read), "the families of a key, joined"
    )
    inputs = (f"base.{spec.name}", f"delta.{spec.name}")
    doc = f"what is served of the index {spec.name}, base and delta merged: {how}"
    return Dataset(f"answer.{spec.name}", "answer", doc, "serving", tuple(fields), inputs)


def _access(spec: IndexSpec, family: str, column: str) -> Iterator[str]:
    for access in spec.access:
        if access.family != family:
            continue
        if isinstance(access, Forward):
            if column in access.columns:
                yield "read for many at once"
        elif access.column == column:
            yield f"{'searched' if isinstance(access, Inverted) else 'nearest neighbours'} as {access.name}"


# ------------------------------------------------------------------------------------------------ fields


def _inside(path: str, kind: str, column: lake.Column) -> Iterator[tuple[str, str, lake.Column]]:
    """A column and, where it is a struct, the fields in it."""
    is_struct = kind.startswith("struct<")
    yield path, "struct" if is_struct else kind, column
    if is_struct:
        for part in split(kind[len("struct<") : -1]):
            name, _, inner = part.partition(":")
            yield from _inside(f"{path}.{name}", inner, column)


def split(text: str) -> list[str]:
    """The parts of a list of types, by the commas that stand in no brackets.

    Examples:
        >>> split("a:string,b:struct<c:int,d:int>,e:decimal(10,2)")
        ['a:string', 'b:struct<c:int,d:int>', 'e:decimal(10,2)']
    """
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "<(") - (character in ">)")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def unit_of(path: str) -> str | None:
    """The unit that a name says by its ending.

    Examples:
        >>> unit_of("offer.price_usd_micros")
        'micro-dollars'
    """
    return next((unit for ending, unit in _UNITS.items() if path.endswith(ending)), None)


def _sources(lineage: Lineage, path: str) -> tuple[str, ...]:
    """What a value is made of; of code that cannot be looked into, the tables that it is given."""
    found = [d for d in lineage.of(path) if d.is_direct]
    hidden = {d.table for d in found if d.kind == OPAQUE}
    seen = {f"{d.table}.{d.column}" for d in found if d.table not in hidden}
    return (*sorted(seen), *sorted(f"{table}, by code" for table in hidden))


def _tables(lineage: Lineage) -> tuple[str, ...]:
    found = [*lineage.rows, *(d for deps in lineage.columns.values() for d in deps)]
    return tuple(sorted({d.table for d in found}))


def _consumers(traced: Mapping[str, Lineage]) -> dict[tuple[str, str], dict[str, list[str]]]:
    """(table, path) → table → its fields whose values are made of it."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for table, lineage in traced.items():
        inner = {path.rpartition(".")[0] for path in lineage.columns if "." in path}
        for path in lineage.columns.keys() - inner:  # a struct is consumed by its fields
            for source in lineage.sources(path):
                found[source][table].append(path)
    return found


def _readers(table: str, path: str, consumed: Mapping[tuple[str, str], Mapping[str, list[str]]]) -> list[str]:
    parts = path.split(".")
    of_path: dict[str, set[str]] = defaultdict(set)
    for length in range(1, len(parts) + 1):  # who reads a struct reads what is in it
        for reader, fields in consumed.get((table, ".".join(parts[:length])), {}).items():
            of_path[reader].update(fields)
    said = []
    for reader, its in sorted(of_path.items()):
        named = [f"{reader}.{field}" for field in sorted(its)]
        said += named if len(named) <= MANY else [f"{reader} ({len(named)} fields)"]
    if table.startswith("index."):
        said += _served_as(table.partition(".")[2], path)
    return said


def _served_as(index: str, path: str) -> Iterable[str]:
    """An index's row is served: its payload's fields by their names, its amounts as sums."""
    column, _, inner = path.partition(".")
    if inner and column.startswith("payload_"):
        return [f"answer.{index}.{column.removeprefix('payload_')}.{inner}"]
    return [f"answer.{index}"] if column in ("key", "id", "time_ms", "amounts") else []


# ------------------------------------------------------------------------------------------------ what the lake holds


def coverage(settings: Settings, name: str) -> dict[str, float]:
    """The share of a table's rows that have each field, in percent, by the metrics of its files; no row is read.

    A field inside a struct counts where the struct is there, too. Empty where there is no table, or no row.
    """
    table = lake.open_table(settings, name)
    if table is None or table.current_snapshot() is None:
        return {}
    files = [task.file for task in table.scan().plan_files()]
    rows = sum(file.record_count for file in files)
    measured = set.intersection(*(set(file.null_value_counts or {}) for file in files)) if files else set()
    names = {number: table.schema().find_column_name(number) for number in measured}
    nulls = {n: sum(file.null_value_counts[n] for file in files) for n in measured}
    return {str(names[n]): round(100 * (1 - nulls[n] / rows), 2) for n in measured if rows and names[n]}


def _freshness(settings: Settings, name: str, expected: str | None) -> Freshness:
    snapshot = lake.current_snapshot(settings, name)
    if snapshot is None:
        return Freshness(expected)
    newest = snapshot.summary.get(lake.MAX_BROKER_TIME_MS)
    return Freshness(expected, snapshot.committed_at_ms, int(newest) if newest else None, snapshot.rows)


@functools.cache
def _policy(group: str) -> str | None:
    policy: Any = freshness.BY_GROUP.get(group)
    if policy is None:
        return None
    warn, fail = policy.warn_window.to_timedelta(), policy.fail_window.to_timedelta()
    return f"renewed within {_long(warn)}, at most {_long(fail)}"


def _long(window: timedelta) -> str:
    minutes = int(window.total_seconds() // 60)
    return f"{minutes // 60} h" if minutes % 60 == 0 else f"{minutes} min"


def _team(owners: Iterable[str]) -> str:
    return ", ".join(owner.removeprefix("team:") for owner in owners)
