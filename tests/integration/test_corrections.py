"""What a base corrected in what was served before it, by cause: on tables of the lake and a delta of their own."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from pipelines import curate, index_rows, lake
from pipelines.contracts import RECORD, USER_INTERACTIONS, decode_table
from pipelines.indexing import delta
from pipelines.indexing.base import Manifest
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.streaming import HotStreamRun
from pipelines.indexing.versions import Versions
from pipelines.indices import STREAMS
from pipelines.settings import Settings
from pipelines.users import corrections
from pipelines.users.index import USER_EVENTS
from pipelines.users.relations import with_pins

TOPIC = "user-interactions@one"
AT = datetime(2026, 1, 1, tzinfo=UTC)


def said(event: int, **more: Any) -> dict[str, Any]:
    return {
        "user_id": "u",
        "event_id": f"e{event}",
        "pin_id": "p",
        "action": "view",
        "event_time": int(AT.timestamp() * 1000) - event,
        **more,
    }


def records(of: list[tuple[int | str, dict[str, Any]]]) -> pa.Table:
    """Records of the topic at an offset, or of a load of that name."""
    rows = [
        {
            "topic_id": TOPIC if isinstance(place, int) else None,
            "partition": 0 if isinstance(place, int) else None,
            "offset": place if isinstance(place, int) else None,
            "load_id": None if isinstance(place, int) else place,
            "load_row": None if isinstance(place, int) else number,
            "broker_time": AT,
            "key": b"u",
            "value": json.dumps(record).encode(),
        }
        for number, (place, record) in enumerate(of)
    ]
    return pa.Table.from_pylist(rows, RECORD)


def base_of(
    spark: SparkSession, settings: Settings, version: str, raw: pa.Table, cut: Position = EMPTY
) -> Manifest:
    """The tables that a build would write of these records, and the manifest of its base."""
    source = curate.SOURCES["user_interactions"]
    made = curate.curate(source, spark.createDataFrame(raw), rows=raw.num_rows, snapshot_id=1)
    snapshots = {}
    for part in curate.SOURCES["pin_updates"].parts:
        lake.ensure(spark, lake.TABLES[part.table])
    for part in source.parts:
        lake.ensure(spark, lake.TABLES[part.table])
        lake.overwrite(made.table(part), lake.TABLES[part.table])
        snapshots[part.table] = lake.current_snapshot(settings, part.table)
    made.close()
    table = index_rows.table(USER_EVENTS)
    lake.ensure(spark, table)
    lake.overwrite(index_rows.rows(USER_EVENTS, lambda name: lake.read(spark, name)), table)
    snapshots[table.name] = lake.current_snapshot(settings, table.name)
    sources = {name: snapshot.id for name, snapshot in snapshots.items() if snapshot}
    return Manifest("user_events", version, lineage(USER_EVENTS), cut, None, "", {}, {}, sources, ())


class NoPins:
    """Nothing is known of any pin."""

    def look_up(self, name: str, rows: Any) -> Any:
        return with_pins(rows, None)


def stream(spark: SparkSession, settings: Settings, epoch: int, taken: pa.Table) -> None:
    """An epoch of the delta."""
    run = HotStreamRun(
        STREAMS["user_interactions"],
        [USER_EVENTS],
        deltas=settings.paths.delta,
        checkpoints=settings.paths.checkpoints,
        state=NoPins(),
    )
    made = run.facts(USER_EVENTS, decode_table(USER_INTERACTIONS, taken).accepted, spark)
    offsets = taken.column("offset").to_pylist()
    span = (Position({TOPIC: {0: at}}) for at in (min(offsets), max(offsets) + 1))
    path = delta.table_path(settings.paths.delta, "user_events", lineage(USER_EVENTS))
    DeltaWriter(USER_EVENTS, path).commit(Marker("user_interactions", 1, epoch, *span), made)


@pytest.fixture
def own(spark: SparkSession, settings: Settings) -> SparkSession:
    from pipelines.spark import session

    return session(settings, "tests")


def test_corrections_are_counted_by_cause(own: SparkSession, settings: Settings) -> None:
    history = [("old", said(0)), ("undone", said(1))]
    before = base_of(own, settings, "b1", records(history))
    streamed = [
        (0, said(10)),
        (1, said(11)),
        (
            2,
            {key: said(10)[key] for key in ("user_id", "event_id", "event_time")}
            | {"features": {"quality": 1}},
        ),
    ]
    stream(own, settings, 0, records(streamed))
    otherwise = (1, said(11, action="click"))  # what the record at 1 means is known otherwise by now
    later = [
        ("old", said(0)),
        ("new", said(2)),
        ("new", said(3)),
        *(streamed[0], otherwise, streamed[2]),
        (3, said(12)),  # no epoch has read it
        (4, said(12, version=2)),
        (5, {"op": "delete", "user_id": "u", "event_id": "e13"}),
    ]
    after = base_of(own, settings, "b2", records(later))
    found = corrections.counted(own, settings, before, after)
    assert found == {
        ("interactions", "load"): 2,
        ("interactions", "decided_otherwise"): 1,
        ("interactions", "not_streamed"): 2,
        ("features", "not_streamed"): 1,  # the tombstone's
        ("interactions", "withdrawn"): 1,
    }
    rows = corrections.rows(found, before, after)
    assert sum(row["facts"] for row in rows) == 7
    assert {(row["family"], row["cause"]) for row in rows} == {
        (family, cause) for family in ("interactions", "features") for cause in corrections.CAUSES
    }


def test_a_base_of_what_was_streamed_corrects_nothing(own: SparkSession, settings: Settings) -> None:
    before = base_of(own, settings, "b1", records([("old", said(0))]))
    taken = [(number, said(number + 1)) for number in range(4)]
    for epoch in (0, 1):
        stream(own, settings, epoch, records(taken[2 * epoch : 2 * epoch + 2]))
    after = base_of(own, settings, "b2", records([("old", said(0)), *taken]))
    assert corrections.counted(own, settings, before, after) == {}


def test_what_the_stream_brought_and_the_base_refuses_is_withdrawn_once(
    own: SparkSession, settings: Settings
) -> None:
    """By the first base whose cut covers the epochs that served it; an epoch that goes on above the cut serves on."""

    def reached(offset: int) -> Position:
        return Position({TOPIC: {0: offset}})

    old = ("old", said(0))
    about = {key: said(1)[key] for key in ("user_id", "event_id", "event_time")}
    bases = [base_of(own, settings, "b1", records([old]))]
    stream(own, settings, 0, records([(0, said(1)), (1, said(1, version=2)), (2, said(2))]))
    stream(own, settings, 1, records([(3, about | {"features": {"quality": 1}}), (4, said(3))]))
    stream(own, settings, 2, records([(5, said(4)), (6, said(5))]))
    kept = [old, (2, said(2)), (4, said(3))]  # of the stream's other records none keeps the contract by now
    for version, offset in (("b2", 6), ("b3", 7), ("b4", 7)):
        bases.append(base_of(own, settings, version, records(kept), reached(offset)))
    withdrawn = [
        {
            family: facts
            for (family, cause), facts in corrections.counted(own, settings, before, after).items()
            if cause == "withdrawn"
        }
        for before, after in itertools.pairwise(bases)
    ]
    assert withdrawn == [{"interactions": 1, "features": 1}, {"interactions": 2}, {}]


Moves = list[tuple[str, str]]
PUBLISHED: Moves = [("published", "b1"), ("published", "b2")]


@pytest.mark.parametrize(
    ("moves", "after", "expected"),
    [
        ([*PUBLISHED, ("published", "b3")], "b3", "b2"),
        ([*PUBLISHED, ("rolled_back", "b1"), ("published", "b3")], "b3", "b1"),
        ([*PUBLISHED, ("rolled_back", "b1"), ("published", "b2"), ("published", "b3")], "b3", "b2"),
        ([*PUBLISHED, ("published", "b3"), ("rolled_back", "b1"), ("published", "b3")], "b3", "b1"),
        ([*PUBLISHED, ("published", "b2")], "b2", "b1"),
        ([*PUBLISHED, ("built", "b4"), ("published", "b3"), ("refused", "b4")], "b3", "b2"),
        ([*PUBLISHED, ("rolled_back", "b1")], "b1", None),  # it took no base's place when it was published
        ([*PUBLISHED, ("deleted", "b1"), ("rolled_back", "b0"), ("published", "b3")], "b3", None),
    ],
)
def test_a_base_is_compared_with_what_was_served_before_it(
    own: SparkSession, settings: Settings, moves: Moves, after: str, expected: str | None
) -> None:
    held = {
        name: Manifest("user_events", name, "l", EMPTY, None, "", {}, {}, {}, ())
        for name in ("b1", "b2", "b3")
    }
    for name, manifest in held.items():
        folder = Versions(settings.paths.indices, "user_events").new_path(name)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    for table in (lake.OPS_TIMELINE_CORRECTIONS, lake.OPS_INDEX_VERSIONS):
        lake.ensure(own, table)
    schema = own.table(lake.OPS_INDEX_VERSIONS.identifier).schema
    rows = [
        dict.fromkeys(schema.names)
        | {"index": "user_events", "event": event, "version": version, "at": AT + timedelta(minutes=minute)}
        for minute, (event, version) in enumerate(moves)
    ]
    lake.append(own.createDataFrame(rows, schema), lake.OPS_INDEX_VERSIONS)
    found = corrections.before(own, settings, held[after])
    assert (found.version if found else None) == expected
