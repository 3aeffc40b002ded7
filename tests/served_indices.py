"""Indices that are served, of drawn statements: a base in the catalog and on disk, and a delta that corrects it.

Belongs here: making them through what is shipped, and what an index must then answer, in plain rows. Used by the tests
that ask SQL engines for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from pyspark.sql import SparkSession

from pipelines import index_rows, lake, served
from pipelines.indexing import build, delta
from pipelines.indexing import facts as fact
from pipelines.indexing.base import open_base
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import Position
from pipelines.indexing.spec import IndexSpec, Sums, Timeline, lineage
from pipelines.indexing.versions import Versions
from pipelines.indexing.view import View
from pipelines.settings import Settings
from tests.oracle import Statement
from tests.properties.harness import current, rows_of

START_MS = 1_700_000_000_000 // 3_600_000 * 3_600_000
SPREAD_MS = 6 * 3_600_000
KEYS = [f"k{n}" for n in range(8)] + ["schlüssel", "k'--"]


class World(NamedTuple):
    """An index's statements: those of the base, and the delta's, some of which the base has too."""

    spec: IndexSpec
    base: list[Statement]
    delta: list[Statement]

    @property
    def newest_ms(self) -> int:
        """The greatest broker time at the base's cut."""
        return START_MS + SPREAD_MS


def drawn(spec: IndexSpec, seed: int, count: int = 240) -> World:
    """Statements with few keys, ids and versions, so that they correct, delete and repeat each other."""
    chance = random.Random(seed)
    streamed = [family for family in spec.families if family.stream]
    made = [
        _statement(spec, chance.choice(streamed).name, 3 + number // 30, chance) for number in range(count)
    ]
    of_base = [family.name for family in spec.families if not family.stream]
    computed = [
        _statement(spec, name, 3, chance)._replace(is_deleted=False) for name in of_base for _ in KEYS
    ]
    computed = [_said(spec, statement) for statement in computed]
    return World(spec, [*made[: count * 2 // 3], *computed], made[count // 2 :])


def _statement(spec: IndexSpec, family: str, versions: int, chance: random.Random) -> Statement:
    about, event = chance.choice(KEYS), f"e{chance.randrange(12)}"
    told = Statement(
        family,
        about.encode(),
        version=(chance.randrange(1, versions),),
        is_deleted=chance.random() < 0.2,
        content_hash=chance.randrange(-2, 3),
    )
    if isinstance(spec.read, Timeline):
        told = told._replace(id=event.encode())
    if isinstance(spec.read, Sums):
        told = told._replace(event=f"{about}/{event}".encode(), id=event.encode())
    return _said(spec, told)


def _said(spec: IndexSpec, told: Statement) -> Statement:
    """What a statement says follows from what it is about and its rank: of equal ranks one is as good as the other."""
    chance = random.Random(repr(told))
    if isinstance(spec.read, Sums):
        amounts = tuple(chance.randrange(3) for _ in spec.read.amounts)
        told = told._replace(key=chance.choice(KEYS).encode(), amounts=() if told.is_deleted else amounts)
    if not hasattr(spec.read, "presence"):
        told = told._replace(time_ms=START_MS + chance.randrange(SPREAD_MS))
    if told.is_deleted:
        return told._replace(payload=None)
    schema = spec.family(told.family).schema
    return told._replace(payload={field.name: _value(field.type, chance) for field in schema})


def _value(kind: pa.DataType, chance: random.Random) -> Any:
    if pa.types.is_list(kind):
        given = [_value(kind.value_type, chance) for _ in range(4)]
        return [item for item in given if item is not None] if pa.types.is_string(kind.value_type) else given
    if pa.types.is_floating(kind):
        return chance.randrange(-8, 8) / 4
    if pa.types.is_boolean(kind):
        return chance.random() < 0.5
    return (
        chance.choice((None, 0, -(2**40), 7))
        if pa.types.is_integer(kind)
        else chance.choice((None, "", "grün", "'"))
    )


def publish(
    spark: SparkSession, settings: Settings, spec: IndexSpec, given: Sequence[Statement], newest_ms: int
) -> str:
    """A base of what stands of these statements: its rows in the catalog, and itself published and told of."""
    rows = fact.table(spec, rows_of(current(given)))
    table = index_rows.table(spec)
    lake.ensure(spark, table)
    lake.ensure(spark, lake.OPS_SERVED)
    lake.overwrite(spark.createDataFrame(rows), table)
    snapshot = lake.current_snapshot(settings, table.name)
    assert snapshot is not None
    versions = Versions(settings.paths.indices, spec.name)
    name = versions.new_version(lineage(spec))
    meta = build.Meta(name, Position(), newest_ms, sources={table.name: snapshot.id})
    build.build_local(spec, rows, versions.new_path(name), meta)
    versions.publish(name)
    served.record(settings, spec)
    return name


def commit(
    settings: Settings, spec: IndexSpec, epoch: int, said: Sequence[Statement], *, mark: str | None = None
) -> None:
    """An epoch of each stream, of what it brings of these statements."""
    writer = delta.DeltaWriter(spec, delta.table_path(settings.paths.delta, spec.name, mark or lineage(spec)))
    for stream in spec.streams:
        families = [family.name for family in spec.families if family.stream == stream]
        rows = fact.table(spec, rows_of(s for s in said if s.family in families))
        ends = [Position({f"topic-{stream}": {0: offset}}) for offset in (epoch, epoch + 1)]
        assert writer.commit(delta.Marker(stream, 1, epoch, *ends, records=rows.num_rows), rows)


def serving(settings: Settings, spec: IndexSpec) -> View:
    """What serving would read of it now."""
    versions = Versions(settings.paths.indices, spec.name)
    pointer = versions.pointer()
    assert pointer is not None
    path = delta.table_path(settings.paths.delta, spec.name, lineage(spec)) if pointer.with_delta else None
    overlay = Overlay(open_base(spec, versions.path(pointer.version)), path, 1_000_000)
    overlay.catch_up()
    return overlay.view
