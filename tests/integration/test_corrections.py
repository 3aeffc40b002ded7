"""What a base corrected in what was served before it, by cause: on tables of the lake and a delta of their own."""

from __future__ import annotations

import json
from datetime import UTC, datetime
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


def base_of(spark: SparkSession, settings: Settings, version: str, raw: pa.Table) -> Manifest:
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
    return Manifest("user_events", version, lineage(USER_EVENTS), EMPTY, None, "", {}, {}, sources, ())


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
