"""What events keep of their pins while pins change: epochs of both topics in turns, a base in between, in Spark.

The oracle is a dictionary: which statement of an event stands is for the event to say, and of the same statement, said
or looked up again, the newer pin.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pytest

from pipelines import curate
from pipelines.contracts import RECORD, Refusal, contract_of, decode, frames
from pipelines.curate import SOURCES
from pipelines.indexing import build
from pipelines.indexing import facts as fact
from pipelines.indexing.base import empty, open_base
from pipelines.indexing.delta import table_path
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import Position
from pipelines.indexing.spec import IndexSpec, lineage, looked_up
from pipelines.indexing.streaming import HotStreamRun
from pipelines.indices import STREAMS
from pipelines.pins.index import PINS
from pipelines.users.index import USER_EVENTS
from pipelines.users.relations import RELATIONS, PinsState
from tests.properties import test_indices as said

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SEED = said.SEED
CASES, RECORDS = 20, 150
EVENTS, UPDATES = "user-interactions", "pin-updates"
KEPT = said.KEPT_OF_PINS
NOTHING = ((0, False), 0, None)
BEGIN_US = (said.START_MS + 24 * said.HOUR_MS) * 1000


class Held(NamedTuple):
    """What stands of an event: its rank, its pin's, when it happened, and what was known of the pin."""

    rank: tuple[Any, ...]
    of_pin: tuple[Any, ...]
    time_ms: int
    pin_id: str | None
    kept: dict[str, Any]


class Oracle:
    """Pins and events, read naively."""

    def __init__(self) -> None:
        self.pins: dict[tuple[str, str], tuple[Any, ...]] = {}
        self.events: dict[tuple[str, str], Held] = {}

    def take(self, topic: str, value: bytes) -> None:
        """A record is read by its stream."""
        row = decode(contract_of(topic), value, BEGIN_US // 1000)
        if isinstance(row, Refusal):
            return
        if topic == UPDATES:
            for family in ("catalogue", "offer"):
                if row[f"{family}_hash"] is not None:
                    new = ((row["version"], row["is_deleted"]), row[f"{family}_hash"], row[family])
                    at = (row["pin_id"], family)
                    self.pins[at] = max(self.pins.get(at, NOTHING), new, key=lambda one: one[:2])
            return
        if row["content_hash"] is None:  # it says features alone
            return
        rank = (row["version"], row["is_deleted"], row["content_hash"])
        of_pin, kept = self.look_up(row["pin_id"])
        at = (row["user_id"], row["event_id"])
        new = Held(rank, of_pin, said.time_ms_of(row), row["pin_id"], kept)
        self.events[at] = max(self.events.get(at, new), new, key=lambda one: one[:2])

    def look_up(self, pin_id: str | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The rank of a pin, and what is kept of it."""
        there = {family: self.pins.get((pin_id or "", family), NOTHING) for family in ("catalogue", "offer")}
        is_there = there["catalogue"] != NOTHING and not there["catalogue"][0][1]
        values = {family: one[2] if is_there and not one[0][1] else None for family, one in there.items()}
        of_pin = (*(one[0] for one in there.values()), *(one[1] for one in there.values()))
        return of_pin, {name: (values[family] or {}).get(column) for name, (family, column) in KEPT.items()}

    def build(self) -> None:
        """A base looks everything up again."""
        for at, held in self.events.items():
            of_pin, kept = self.look_up(held.pin_id)
            self.events[at] = max(held, held._replace(of_pin=of_pin, kept=kept), key=lambda one: one[:2])


class Topic:
    """A topic, and its stream."""

    def __init__(self, spark: SparkSession, folder: Path, name: str, spec: IndexSpec, state: Any) -> None:
        self.name, self.spec, self.records = name, spec, []  # type: ignore[var-annotated]
        self._spark, self._folder, self._epoch = spark, folder, 0
        self._run = HotStreamRun(
            STREAMS[name.replace("-", "_")],
            [spec],
            deltas=folder / "delta",
            checkpoints=folder / "checkpoints",
            state=state,
        )

    def epoch(self, values: list[bytes]) -> None:
        """Records come, and are read."""
        first = len(self.records)
        self.records += [
            {
                "topic_id": self.name,
                "partition": 0,
                "offset": first + number,
                "broker_time": BEGIN_US,
                "key": b"",
                "value": value,
            }
            for number, value in enumerate(values)
        ]
        self._run.run_epoch(self.frame(self.records[first:]), self._epoch, 1)
        self._epoch += 1

    def frame(self, records: list[dict[str, Any]]) -> DataFrame:
        return self._spark.createDataFrame(pa.Table.from_pylist(records, RECORD))

    @property
    def delta(self) -> Path:
        return table_path(self._folder / "delta", self.spec.name, lineage(self.spec))

    def overlay(self, base: Path | None = None) -> Overlay:
        """Base and delta as they are now."""
        found = Overlay(open_base(self.spec, base) if base else empty(self.spec), self.delta, 10**9)
        found.catch_up()
        return found


def written(record: Callable[[int, random.Random], dict[str, Any]], chance: random.Random) -> list[bytes]:
    return [json.dumps(record(chance.randrange(CASES), chance)).encode() for _ in range(RECORDS)]


def built(spark: SparkSession, folder: Path, events: Topic, pins: Topic) -> Path:
    """A base of all that is known by now, as a batch makes it."""
    source = SOURCES["pin_updates"]
    judged = curate.judge(source, frames.judged(source.contract, pins.frame(pins.records)))
    tables = {part.table: curate.standing(source, judged, part) for part in source.parts}

    class Tables:
        def look_up(self, name: str, rows: Any) -> Any:
            return RELATIONS[name](rows, tables.__getitem__)

    rows = frames.judged(contract_of(EVENTS), events.frame(events.records)).filter("_reason IS NULL")
    parts = [f.transform(looked_up(f, rows, Tables()), Tables()) for f in events.spec.families]
    made = functools.reduce(lambda one, other: one.unionByName(other, allowMissingColumns=True), parts)
    number = len(events.records)
    cut = Position({EVENTS: {0: number - 1}})  # a lower bound
    build.build(
        events.spec,
        made.select(*fact.schema(events.spec).names),
        folder / f"base-{number}",
        build.Meta(f"b{number}", cut),
        shard_count=2,
    )
    return folder / f"base-{number}"


def check(overlay: Overlay, oracle: Oracle) -> int:
    """Every event keeps what the oracle says; how many know something of their pin."""
    known = 0
    by_user: dict[str, dict[str, Any]] = {}
    for (user, event), held in oracle.events.items():
        if not held.rank[1]:
            by_user.setdefault(user, {})[event] = (held.time_ms, held.pin_id, held.kept)
            known += held.kept["indexed_category"] is not None
    for user in {user for user, _ in oracle.events}:
        rows = overlay.view.timeline(user.encode()).table.to_pylist()  # type: ignore[union-attr]
        found = {
            r["id"].decode(): (r["time_ms"], r["pin_id"], {name: r[name] for name in KEPT}) for r in rows
        }
        assert found == by_user.get(user, {}), (f"TIDEMARK_TEST_SEED={SEED}", user)
    return known


@pytest.mark.timeout(600)
def test_an_event_keeps_its_pin_as_of_its_last_look_up(spark: SparkSession, tmp_path: Path) -> None:
    chance, oracle = random.Random(SEED), Oracle()
    pins = Topic(spark, tmp_path, UPDATES, PINS, None)
    state = PinsState(lambda: None, pins.overlay)
    events = Topic(spark, tmp_path, EVENTS, USER_EVENTS, state)
    base = None
    stale = []
    for number in range(5):
        for topic, record in ((pins, said.pin_update), (events, said.interaction)):
            values = written(record, chance)
            if topic is events and topic.records:  # some are read again
                values += [one["value"] for one in chance.sample(topic.records, 30)]
            topic.epoch(values)
            for value in values:
                oracle.take(topic.name, value)
        overlay = events.overlay(base)
        known = check(overlay, oracle)
        if number in (1, 3):
            before = dict(oracle.events)
            oracle.build()
            stale.append(sum(before[at].kept != held.kept for at, held in oracle.events.items()))
            base = built(spark, tmp_path, events, pins)
            check(events.overlay(base), oracle)
    assert known > 20
    assert all(stale), "no base had anything to mend"


def test_pins_that_cannot_be_followed_leave_what_was_known(spark: SparkSession, tmp_path: Path) -> None:
    pins = Topic(spark, tmp_path, UPDATES, PINS, None)
    pins.epoch([b'{"pin_id": "p", "catalogue": {"category": "fruit"}}'])
    is_broken = [True]

    def opened() -> Overlay:
        if is_broken[0]:
            raise OSError("the disk is away")
        return pins.overlay()

    served = iter(range(9))
    state = PinsState(functools.partial(next, served), opened)
    rows = pa.table({"pin_id": pa.array(["p", None, "q"])})

    def categories() -> list[Any]:
        return state.look_up("pins", rows).column("indexed_category").to_pylist()

    assert categories() == [None, None, None]
    is_broken[0] = False
    assert categories() == ["fruit", None, None]
    is_broken[0] = True
    assert categories() == ["fruit", None, None]
    assert state.look_up("pins", rows.slice(0, 0)).num_rows == 0
