"""Labels with their sequences: what is exported for a time is what was served then, and what plain Python says.

The histories are random, anew in each run; a failure prints the seed, and TIDEMARK_TEST_SEED=<seed> gives them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from pyspark.sql import SparkSession

from pipelines import lake
from pipelines.errors import TidemarkError
from pipelines.indexing.spec import limited
from pipelines.pins.index import PINS
from pipelines.settings import Settings
from pipelines.users import sequence_export, sequence_files, sequences
from pipelines.users.index import USER_EVENTS
from pipelines.users.sequences import BadDefinition, Definition
from tests.conftest import small_settings
from tests.oracle import Statement
from tests.properties import test_sequences as declared
from tests.properties.strategies import Choices

pytestmark = pytest.mark.timeout(1200)

SEED = int(os.environ.get("TIDEMARK_TEST_SEED") or random.randrange(2**32))
START_MS = 1_767_225_600_000
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
USERS, TIMES, DEFINITIONS = 50, 14, 8
LABELS, TARGET = "training.labels", "training.clicks"
AGES = {"600m": 10 * HOUR_MS, "1d": DAY_MS, "36h": 36 * HOUR_MS, "3d": 3 * DAY_MS}
HORIZON_DAYS = 5
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Record(NamedTuple):
    """A record as it was taken, and what it says, each statement of one family."""

    taken_ms: int
    value: bytes
    statements: tuple[Statement, ...]
    load_id: str | None = None


class Label(NamedTuple):
    """A label; its time has microseconds."""

    user_id: str
    time_us: int
    clicked: bool

    @property
    def time_ms(self) -> int:
        return self.time_us // 1000


class World(NamedTuple):
    """All that was ever taken, in the order of the topics, and the labels."""

    events: tuple[Record, ...]
    updates: tuple[Record, ...]
    labels: tuple[Label, ...]
    definitions: tuple[dict[str, Any], ...]


# ------------------------------------------------------------------------------------------------ drawing


def drawn(chance: random.Random) -> World:
    """Histories of ten days, and labels at a few times of them: some records come at just these times."""
    times = [START_MS + chance.randrange(10 * DAY_MS) for _ in range(TIMES)]
    events = [
        record
        for user in range(USERS)
        for number in range(chance.choice((0, 3, 10, 25)))
        for record in of_event(f"u{user}", f"e{number}", times, chance)
    ]
    updates = [record for pin in declared.PIN_IDS[:4] for record in of_pin(pin, times, chance)]
    labels = [
        Label(f"u{user}", time_ms * 1000 + chance.choice((0, 0, 1, 999)), chance.random() < 0.5)
        for user in (*range(USERS), "-nobody")
        for time_ms in chance.sample(times, 5)
    ]
    labels += labels[:3]
    some = (a_definition(chance) for _ in range(DEFINITIONS - 2))
    definitions = (ALL_OF_IT, {**ALL_OF_IT, "age": chance.choice([*AGES, "90d"])}, *some)
    chance.shuffle(events)
    chance.shuffle(updates)
    chance.shuffle(labels)
    return World(tuple(events), tuple(updates), tuple(labels), definitions)


def of_event(user: str, event: str, times: Sequence[int], chance: random.Random) -> list[Record]:
    """What was said of an event: said, corrected, moved, deleted, said again, in this order or not."""
    at_ms = a_time(times, chance)
    found = [interaction(user, event, at_ms, 1, chance)]
    if chance.random() < 0.4:
        moved_ms = chance.choice((at_ms, at_ms, a_time(times, chance)))
        found.append(interaction(user, event, moved_ms, chance.choice((1, 2, 2)), chance))
    if chance.random() < 0.25:
        found.append(deletion({"user_id": user, "event_id": event}, chance))
    if chance.random() < 0.15:
        found.append(interaction(user, event, at_ms, 3, chance))
    taken = [record._replace(taken_ms=a_delivery(at_ms, n, times, chance)) for n, record in enumerate(found)]
    repeated = [again._replace(taken_ms=again.taken_ms + chance.randrange(DAY_MS)) for again in taken]
    return [accepted(r) for r in (*taken, *(again for again in repeated if chance.random() < 0.2))]


def accepted(record: Record) -> Record:
    """A record, which says nothing where its event is more than an hour ahead of when it was taken."""
    is_ahead = any(said.time_ms > record.taken_ms + HOUR_MS for said in record.statements)
    return record._replace(statements=()) if is_ahead else record


def a_time(times: Sequence[int], chance: random.Random) -> int:
    """A moment of the ten days, often just at a label's, or just where its window begins."""
    if chance.random() < 0.25:
        return chance.choice(times) - chance.choice((0, *AGES.values())) + chance.choice((-1, 0, 0, 1))
    return START_MS + chance.randrange(10 * DAY_MS)


def a_delivery(at_ms: int, number: int, times: Sequence[int], chance: random.Random) -> int:
    """When a statement of an event is taken: at once, a tenth late by up to a day; what corrects it, in some days."""
    if chance.random() < 0.1:
        at_label = [at for at in times if at >= at_ms - HOUR_MS // 2]
        if at_label:
            return chance.choice(at_label) + chance.choice((-1, 0, 0, 1))
    late_ms = chance.randrange(DAY_MS) if chance.random() < 0.1 else chance.randrange(-5000, 5000)
    return at_ms + late_ms + (chance.randrange(3 * DAY_MS) if number else 0)


def interaction(user: str, event: str, at_ms: int, version: int, chance: random.Random) -> Record:
    at_us = at_ms * 1000 + chance.choice((0, 0, 500))  # an answer's times are whole milliseconds
    said = {
        "pin_id": chance.choice(declared.PIN_IDS),
        "action": chance.choice(declared.ACTIONS),
        "quantity": chance.choice((None, 1, 7)),
        "value_usd_micros": chance.choice((None, 0, 2**40)),
        "surface": chance.choice(declared.SURFACES),
        "ad_id": chance.choice((None, "a0", "a1")),
    }
    there = {name: value for name, value in said.items() if value is not None}
    time = (EPOCH + timedelta(microseconds=at_us)).isoformat().replace("+00:00", "Z")
    value = {"user_id": user, "event_id": event, "event_time": time, **there}
    statement = Statement(
        "interactions",
        user.encode(),
        event.encode(),
        (version,),
        False,
        hashed({**there, "event_time": at_us}),
        at_ms,
        payload=said,
    )
    return Record(0, written(value, version, chance), (statement,), a_load(chance))


def deletion(identity: dict[str, str], chance: random.Random) -> Record:
    version = chance.choice((1, 1, 2, 4))
    if "event_id" in identity:
        key, event = identity["user_id"].encode(), identity["event_id"].encode()
        said = (Statement("interactions", key, event, (version,), True, hashed({})),)
    else:
        key = identity["pin_id"].encode()
        said = tuple(Statement(f, key, b"", (version,), True, hashed({})) for f in ("catalogue", "offer"))
    return Record(0, written({"op": "delete", **identity}, version, chance), said, a_load(chance))


def of_pin(pin: str, times: Sequence[int], chance: random.Random) -> list[Record]:
    """What was said of a pin in ten days: its catalogue, its offer or both, and deletions."""
    found = []
    for _ in range(chance.choice((3, 8, 16))):
        version = chance.randrange(1, 6)
        catalogue = {
            "title": chance.choice(("", "a title")),
            "category": chance.choice(declared.CATEGORIES),
            "brand": chance.choice((None, "Private")),
        }
        offer = {"price_usd_micros": chance.choice((5, 1_500_000)), "is_available": chance.random() < 0.5}
        both = {"catalogue": catalogue, "offer": offer}
        families = chance.choice((("catalogue", "offer"), ("catalogue",), ("offer",), ("offer",)))
        there = {f: {n: v for n, v in both[f].items() if v is not None} for f in families}
        said = tuple(
            Statement(f, pin.encode(), b"", (version,), False, hashed(there[f]), payload=both[f])
            for f in families
        )
        record = Record(0, written({"pin_id": pin, **there}, version, chance), said, a_load(chance))
        if chance.random() < 0.25:
            record = deletion({"pin_id": pin}, chance)
        found.append(record._replace(taken_ms=a_time(times, chance)))
    return found


def written(value: dict[str, Any], version: int, chance: random.Random) -> bytes:
    """A record's bytes; version 1 need not be said."""
    if version > 1 or chance.random() < 0.5:
        value = {**value, "version": version}
    return json.dumps(value, ensure_ascii=False).encode()


def hashed(said: dict[str, Any]) -> int:
    """The content hash, as the design words it: of what is said, in canonical JSON."""
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def a_load(chance: random.Random) -> str | None:
    return "user-interactions/history" if chance.random() < 0.2 else None


ALL_OF_IT = {
    "max_length": 50,
    "fields": list(declared.EVENT_FIELDS),
    "enrich": [name for name in declared.ENRICHMENTS if name != "embedding.vector"],
}


def a_definition(chance: random.Random) -> dict[str, Any]:
    """A definition for histories of ten days, without what a model computes."""
    said = declared.definition(Choices(chance.randbytes(100)))
    said["max_length"] = chance.choice((1, 2, 4, 50))
    for name in ("actions", "surfaces", "categories", "age"):
        if chance.random() < 0.4:
            said.pop(name, None)
    if "age" in said:
        said["age"] = chance.choice((*AGES, "90d"))
    said["enrich"] = [name for name in said.get("enrich", []) if name != "embedding.vector"]
    return {name: value for name, value in said.items() if value != []}


# ------------------------------------------------------------------------------------------------ the three answers


def visible(records: Sequence[Record], at_ms: int) -> tuple[Statement, ...]:
    """What had been said by a time, in the order in which it was."""
    taken = sorted((r for r in records if r.taken_ms <= at_ms), key=lambda record: record.taken_ms)
    return tuple(statement for record in taken for statement in record.statements)


def told(spec: Any, log: tuple[Statement, ...], at_ms: int, chance: random.Random) -> declared.Told:
    """What an index was told by a time; a base with a horizon is always there, and up to a day old."""
    has_horizon = getattr(spec.read, "age_ms", None) is not None
    cut = chance.randrange(len(log) + 1) if has_horizon or chance.random() < 0.8 else None
    newest_ms = at_ms - chance.choice((0, chance.randrange(DAY_MS)))
    return declared.Told(spec, log, (), cut, chance.randrange(5), 150, 2, newest_ms)


def online(world: World, chance: random.Random) -> dict[tuple[int, str, int], Any]:
    """What was served at each label's time, by definition, user and time; and the oracle says the same."""
    parsed = [sequences.parse(said) for said in world.definitions]
    kept = limited(USER_EVENTS, HORIZON_DAYS * DAY_MS, None)
    found: dict[tuple[int, str, int], Any] = {}
    for at_ms in sorted({label.time_ms for label in world.labels}):
        users = sorted({label.user_id for label in world.labels if label.time_ms == at_ms})
        keys = tuple(user.encode() for user in users)
        events = told(kept, visible(world.events, at_ms), at_ms, chance)
        pins = told(PINS, visible(world.updates, at_ms), at_ms, chance)
        with declared.served(events) as events_view, declared.served(pins) as pins_view:
            for number, definition in enumerate(parsed):
                asked = declared.Asked(world.definitions[number], keys, at_ms)
                case = declared.Case(events, pins, (asked,), 64)
                answer = sequences.read(events_view, pins_view, definition, keys, at_ms)
                declared.check(case, asked, answer)
                rows, ends = answer.table.to_pylist(), answer.lengths.cumsum().tolist()
                told_of = zip(users, ends, answer.lengths.tolist(), answer.is_complete.tolist(), strict=True)
                for user, end, length, is_complete in told_of:
                    found[number, user, at_ms] = rows[end - length : end], is_complete
    return found


def put(spark: SparkSession, name: str, records: Sequence[Record]) -> None:
    """Records into a raw table, as archive and loads would have put them, with the times at which they were taken."""
    rows = [
        (
            *((None, None, None, r.load_id, n) if r.load_id else ("topic@1", 0, n, None, None)),
            at(r.taken_ms * 1000),
            None,
            r.value,
            at(r.taken_ms * 1000),
        )
        for n, r in enumerate(records)
    ]
    spec = lake.TABLES[name]
    lake.ensure(spark, spec)
    lake.append(spark.createDataFrame(rows, spark.table(spec.identifier).schema), spec)


def put_labels(spark: SparkSession, labels: Sequence[Label]) -> None:
    rows = [(label.user_id, at(label.time_us), label.clicked) for label in labels]
    frame = spark.createDataFrame(rows, "user_id string, label_time timestamp, clicked boolean")
    spark.sql("CREATE NAMESPACE IF NOT EXISTS lake.training")
    frame.writeTo(f"lake.{LABELS}").using("iceberg").createOrReplace()


def at(time_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=time_us)


# ------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def world() -> World:
    return drawn(random.Random(SEED))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    horizon = f"{{user_events: {HORIZON_DAYS}}}"
    folder = tmp_path_factory.mktemp("export") / "home"
    return small_settings(folder, BUILD__SHARD_FACTS=1500, BUILD__HORIZON_DAYS=horizon)


@pytest.fixture(scope="module")
def lake_spark(spark: SparkSession, settings: Settings, world: World) -> SparkSession:
    from pipelines.spark import session

    own = session(settings, "tests")
    broken = Record(START_MS, b'{"user_id": "u1", "event_id": "e1", "version": 9, "action": "stare"}', ())
    put(own, "raw.user_interactions", [*world.events, broken])
    put(own, "raw.pin_updates", world.updates)
    put_labels(own, world.labels)
    return own


def test_what_is_exported_for_a_time_is_what_was_served_then(
    lake_spark: SparkSession, settings: Settings, world: World
) -> None:
    print(f"seed {SEED}")
    wanted = online(world, random.Random(SEED + 1))
    labels = sorted(world.labels)
    lengths = []
    for number, said in enumerate(world.definitions):
        definition = sequences.parse(said)._replace(name=f"drawn_{number}", version=1)
        found = sequence_export.export(lake_spark, settings, definition, LABELS, f"training.drawn_{number}")
        rows = lake.read(lake_spark, found.table).toArrow().to_pylist()
        exported = sorted(rows, key=lambda row: (row["user_id"], row["label_time"], row["clicked"]))
        assert [(row["user_id"], row["label_time"], row["clicked"]) for row in exported] == [
            (label.user_id, at(label.time_us), label.clicked) for label in labels
        ], SEED
        for label, row in zip(labels, exported, strict=True):
            answer = wanted[number, label.user_id, label.time_ms]
            assert (row["sequence"], row["is_complete"]) == answer, (SEED, said, label)
            assert all(tuple(event) == definition.columns for event in row["sequence"])
        lengths += [len(row["sequence"]) for row in exported]
        assert (found.labels, found.empty, found.incomplete) == (
            len(labels),
            sum(not row["sequence"] for row in exported),
            sum(not row["is_complete"] for row in exported),
        )
    assert sum(length > 1 for length in lengths) > len(lengths) / 10, SEED


def hour(time: float) -> int:
    """Hours after the start, in ms."""
    return START_MS + round(time * HOUR_MS)


def said(time: float, **value: Any) -> Record:
    return Record(hour(time), json.dumps(value).encode(), ())


def history_of(user: str, pin: str) -> tuple[list[Record], list[Record]]:
    """A purchase at one that is known at two, corrected at three and deleted at four; and its pin, known from half past
    two on, another price at half past three."""
    bought = {"user_id": user, "event_id": "bought", "pin_id": pin, "event_time": hour(1)}
    events = [
        said(2, action="purchase", quantity=1, **bought),
        said(3, action="purchase", quantity=2, version=2, **bought),
        said(4, op="delete", version=2, user_id=user, event_id="bought"),
    ]
    updates = [
        said(
            2.5, pin_id=pin, catalogue={"title": "tea"}, offer={"price_usd_micros": 5, "is_available": True}
        ),
        said(3.5, pin_id=pin, version=2, offer={"price_usd_micros": 7, "is_available": True}),
    ]
    return events, updates


STORY = Definition(
    name="story", version=1, max_length=5, fields=("quantity",), enrich=("offer.price_usd_micros",)
)


def test_a_label_sees_what_was_known_at_its_time(lake_spark: SparkSession, settings: Settings) -> None:
    events, updates = history_of("teller", "told")
    put(lake_spark, "raw.user_interactions", events)
    put(lake_spark, "raw.pin_updates", updates)
    times = (1.5, 2.0, 2.5, 3.0, 3.5, 3.99, 4.0)
    rows = [("teller", at(hour(time) * 1000), {"rank": time}) for time in times]
    kinds = "user_id string, label_time timestamp, shown struct<rank: double>"
    lake_spark.createDataFrame(rows, kinds).writeTo("lake.training.told").using("iceberg").create()
    found = sequence_export.export(lake_spark, settings, STORY, "training.told", "training.story")
    assert (found.labels, found.empty) == (7, 2)
    table = lake.open_table(settings, found.table)
    assert table is not None
    got = {row["shown"]["rank"]: row["sequence"] for row in table.scan().to_arrow().to_pylist()}
    known = [[], [(1, None)], [(1, 5)], [(2, 5)], [(2, 7)], [(2, 7)], []]
    assert got == {
        time: [{"quantity": quantity, "offer.price_usd_micros": price} for quantity, price in events]
        for time, events in zip(times, known, strict=True)
    }
    snapshot = lake.current_snapshot(settings, found.table)
    assert snapshot is not None and snapshot.id == found.snapshot_id
    told = json.loads(snapshot.summary[sequence_export.SEQUENCE])
    assert (told["name"], told["version"]) == ("story", 1)
    assert told["meaning"] == json.loads(json.dumps(sequence_files.meaning(STORY)))
    assert set(json.loads(snapshot.summary[sequence_export.READ])) == {
        "training.told",
        "raw.user_interactions",
        "raw.pin_updates",
    }


def test_what_was_found_out_is_what_was_known_of_it(lake_spark: SparkSession, settings: Settings) -> None:
    """Viewed at one; found out at two, otherwise at three, and no longer at four."""
    about = {"user_id": "finder", "event_id": "seen", "event_time": hour(1)}
    events = [
        said(1.5, action="view", pin_id="p", payload={"dwell_ms": 7}, **about),
        said(2, features={"quality": 0.25}, **about),
        said(3, features={"quality": 1, "is_converted": True}, version=2, **about),
        said(4, op="delete", version=2, user_id="finder", event_id="seen"),
    ]
    put(lake_spark, "raw.user_interactions", events)
    times = (1.4, 1.5, 2.0, 3.0, 4.0)
    rows = [("finder", at(hour(time) * 1000)) for time in times]
    kinds = "user_id string, label_time timestamp"
    lake_spark.createDataFrame(rows, kinds).writeTo("lake.training.finder").using("iceberg").create()
    fields = ("payload.view.dwell_ms", "features.quality", "features.is_converted")
    definition = Definition(name="found", version=1, max_length=5, fields=fields)
    found = sequence_export.export(lake_spark, settings, definition, "training.finder", "training.found")
    table = lake.open_table(settings, found.table)
    assert table is not None
    got = {row["label_time"]: row["sequence"] for row in table.scan().to_arrow().to_pylist()}
    known = [[], [(7, None, None)], [(7, 0.25, None)], [(7, 1.0, True)], []]
    assert got == {
        at(hour(time) * 1000): [dict(zip(fields, event, strict=True)) for event in events]
        for time, events in zip(times, known, strict=True)
    }


def test_what_an_event_keeps_of_its_pin_is_what_was_known_when_the_event_was(
    lake_spark: SparkSession, settings: Settings
) -> None:
    """Bought at two and corrected at three; the pin is known from half past one on, dearer at half past two and gone at
    half past three, when another is bought."""
    bought = {"user_id": "keeper", "event_id": "bought", "pin_id": "kept", "event_time": hour(1)}
    events = [
        said(2, action="purchase", **bought),
        said(3, action="purchase", quantity=2, version=2, **bought),
        said(3.6, action="purchase", **{**bought, "event_id": "last", "event_time": hour(3.5)}),
    ]
    updates = [
        said(
            1.5,
            pin_id="kept",
            catalogue={"category": "tea"},
            offer={"price_usd_micros": 5, "is_available": True},
        ),
        said(2.5, pin_id="kept", version=2, offer={"price_usd_micros": 7, "is_available": True}),
        said(3.5, pin_id="kept", version=3, op="delete"),
    ]
    put(lake_spark, "raw.user_interactions", events)
    put(lake_spark, "raw.pin_updates", updates)
    rows = [("keeper", at(hour(time) * 1000), time) for time in (2.0, 2.9, 3.0, 4.0)]
    kinds = "user_id string, label_time timestamp, hour double"
    lake_spark.createDataFrame(rows, kinds).writeTo("lake.training.keepers").using("iceberg").create()
    kept = ("indexed_category", "indexed_price_usd_micros")
    definition = Definition(name="kept", version=1, max_length=5, fields=(*kept, "quantity"))
    found = sequence_export.export(lake_spark, settings, definition, "training.keepers", "training.kept")
    table = lake.read(lake_spark, found.table).toArrow().to_pylist()
    got = {row["hour"]: [tuple(event.values()) for event in row["sequence"]] for row in table}
    first, second = ("tea", 5, None), ("tea", 7, 2)
    assert got == {2.0: [first], 2.9: [first], 3.0: [second], 4.0: [(None, None, None), second]}


def test_a_table_is_replaced_by_the_same_meaning_and_by_no_other(
    lake_spark: SparkSession, settings: Settings
) -> None:
    seen = Definition(name="seen", version=1, max_length=3, fields=("pin_id",))

    def export(definition: Definition, labels: str = LABELS, to: str = "training.seen") -> Any:
        return sequence_export.export(lake_spark, settings, definition, labels, to)

    first = export(seen)
    again = export(seen._replace(owner="others", actions=()))
    assert (again.labels, again.empty) == (first.labels, first.empty)
    assert again.snapshot_id != first.snapshot_id
    assert lake.read(lake_spark, "training.seen").count() == first.labels
    with pytest.raises(TidemarkError, match="holds version 1 of seen with another meaning"):
        export(seen._replace(max_length=4))
    with pytest.raises(TidemarkError, match="with another meaning"):
        export(seen._replace(version=2))
    with pytest.raises(TidemarkError, match="no sequence was exported to it"):
        export(seen, to=LABELS)
    lake_spark.sql(
        f"CREATE TABLE lake.training.fewer USING iceberg AS SELECT user_id, label_time FROM lake.{LABELS}"
    )
    with pytest.raises(TidemarkError, match="the table has other columns: clicked"):
        export(seen, labels="training.fewer")
    current = lake.current_snapshot(settings, "training.seen")
    assert current is not None and current.id == again.snapshot_id


@pytest.mark.parametrize(
    ("columns", "wrong"),
    [
        ("'u' AS user_id", "the column label_time is missing"),
        ("1 AS user_id, current_timestamp() AS label_time", "the column user_id is int"),
        ("'u' AS user_id, current_date() AS label_time", "the column label_time is date"),
        (
            "'u' AS user_id, current_timestamp() AS label_time, 1 AS sequence",
            "the column sequence is one that",
        ),
        (
            "cast(NULL AS string) AS user_id, current_timestamp() AS label_time",
            "1 of 1 labels have no user_id",
        ),
    ],
)
def test_labels_that_cannot_be_read_are_told(
    lake_spark: SparkSession, settings: Settings, columns: str, wrong: str
) -> None:
    lake_spark.sql(f"CREATE OR REPLACE TABLE lake.training.wrong USING iceberg AS SELECT {columns}")
    with pytest.raises(TidemarkError, match=wrong):
        sequence_export.export(lake_spark, settings, STORY, "training.wrong", "training.never")
    assert lake.open_table(settings, "training.never") is None


def test_what_cannot_be_exported_is_told(lake_spark: SparkSession, settings: Settings) -> None:
    def export(definition: Definition = STORY, labels: str = LABELS, to: str = "training.never") -> None:
        sequence_export.export(lake_spark, settings, definition, labels, to)

    for labels in ("training.nothing", "nothing", "a.b.c"):
        with pytest.raises(TidemarkError, match="no such table of labels"):
            export(labels=labels)
    with pytest.raises(TidemarkError, match="no name of a table"):
        export(to="clicks; drop")
    for to in ("curated.clicks", "index.clicks", "raw.user_interactions"):
        with pytest.raises(TidemarkError, match="platform's own"):
            export(to=to)
    with pytest.raises(BadDefinition, match=r"enrich\[0\]: embedding.vector is computed by a model"):
        export(STORY._replace(enrich=("embedding.vector",)))
    assert lake.open_table(settings, "training.never") is None


def test_a_write_that_fails_leaves_nothing(
    lake_spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(lake, "overwrite", fail)
    with pytest.raises(OSError, match="disk is full"):
        sequence_export.export(lake_spark, settings, STORY, LABELS, "training.failed")
    assert lake.open_table(settings, "training.failed") is None


def test_the_command_exports_what_is_declared(lake_spark: SparkSession, settings: Settings) -> None:
    table = "training.bought_lately_v1"

    def tidemark(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.cli", "sequences", "export", *arguments]
        environment = {**os.environ, **settings.environment}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    unknown = tidemark("bought_latly", "--labels", LABELS, "--to", "training.bought")
    assert (unknown.returncode, "did you mean `bought_lately`" in unknown.stderr) == (1, True)
    done = tidemark("bought_lately", "--labels", LABELS, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["name"], told["version"], told["table"]) == ("bought_lately", 1, table)
    assert told["labels"] == lake.read(lake_spark, table).count()
