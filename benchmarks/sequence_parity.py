"""Whether sequences and counters are the same online, exported and by hand, at the same visibility.

A random log of two topics is made from a seed: events of users, of which one in ten comes late by up to a day, with
corrections, deletions, repeats, events without a pin and records that break their contract; and pins that change, go
and come back. Then come moments. At each, what was taken by then and is new goes through the shipped streams' code into
the deltas, epoch by epoch, now and then some of it again under a new incarnation; and now and then a base of an earlier
cut is built by Spark and published. Serving runs as a process all the while.

A case is a definition, a user and a moment, all drawn. Its sequence is asked for three times: over HTTP when the moment
is there (`online`); from `raw`, in one Spark job for all cases, by the code of `tidemark sequences export`, and some
definitions by the export itself; and by hand, in plain Python that shares no code with either. All must be the same.
So with counters, as JSON, as SQL and as pairs: over HTTP, and by hand.

The last line is JSON: `cases` and `counter_cases`, `mismatches` and `counter_mismatches`. The first of them are told in
full; the exit status is 1 where there are any. `--seed` gives a log again.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import http.client
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines import curate, index_rows, indices, lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS, Contract, frames
from pipelines.indexing import build
from pipelines.indexing.build import Meta
from pipelines.indexing.position import Position, merge_all
from pipelines.indexing.spec import IndexSpec, lineage, looked_up
from pipelines.indexing.streaming import HotStreamRun
from pipelines.indexing.versions import Versions
from pipelines.indices import STREAMS
from pipelines.pins.index import PINS
from pipelines.settings import Settings
from pipelines.users import sequence_export, sequences
from pipelines.users.index import USER_EVENTS
from pipelines.users.sequence_history import as_of, families_read

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Said = Mapping[str, Any]
Rows = list[dict[str, Any]]

START_MS = 1_767_225_600_000
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
SPAN_MS = 14 * DAY_MS
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
AGES = {"1h": HOUR_MS, "600m": 10 * HOUR_MS, "1d": DAY_MS, "36h": 36 * HOUR_MS, "1w": 7 * DAY_MS}
AGES |= {"90d": 90 * DAY_MS}

PIN_IDS = (*(f"p{number}" for number in range(40)), "grün")
UNKNOWN = "unknown"
VALUES: Mapping[str, tuple[str | None, ...]] = {
    "pin_id": (*PIN_IDS, UNKNOWN, None, None, None, None, None),
    "action": ("purchase", "view", "view", "view", "click", "hide", "impression"),
    "surface": (None, "home", "search"),
    "ad_id": (None, None, "a0", "a1", "a'2"),
    "campaign_id": (None, "c0", "c1"),
    "advertiser_id": (None, "v0"),
    "category": (None, None, "fruit", "bread"),
    "view_type": (None, "promoted", "organic"),
}
OBJECTS = ("pin_id", "ad_id", "campaign_id", "advertiser_id", "category")
CATEGORIES = ("fruit", "bread", "grün", None)
EVENT_FIELDS = ("event_id", "time_ms", "quantity", "value_usd_micros", *VALUES)
KEPT = {
    "indexed_category": ("catalogue", "category"),
    "indexed_department": ("catalogue", "department"),
    "indexed_brand": ("catalogue", "brand"),
    "indexed_price_usd_micros": ("offer", "price_usd_micros"),
    "indexed_is_available": ("offer", "is_available"),
}
"""What an event keeps of its pin; compared in what is exported alone, for a base looks it up anew."""
ENRICHMENTS = (
    *("catalogue.title", "catalogue.category", "catalogue.department", "catalogue.brand"),
    *("offer.price_usd_micros", "offer.is_available"),
)
SHOWN = 5
"""So many mismatches are told in full."""
BUCKETS = 8
TOPIC_IDS = {contract.topic: f"{contract.topic}@parity" for contract in (USER_INTERACTIONS, PIN_UPDATES)}


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        cases=(2_000, "sequences: definition, user and moment"),
        counters=(2_000, "counter queries"),
        moments=(30, "at which cases are asked"),
        users=(300, "who did something"),
        exported=(2, "definitions that are exported for all labels, as a table"),
        seed=(0, "of everything that is drawn; 0: another each time"),
    )
    seed = options.seed or random.randrange(1, 2**32)
    say(f"seed {seed}")
    began = time.perf_counter()
    world = drawn(seed, options)
    with harness.place("sequence-parity", options.home, STREAMS__NICE="0") as settings:
        found = compared(settings, world, random.Random(seed + 1), options.exported)
    wrong = {name: [text for _, text in told] for name, told in found.wrong.items()}
    for text in [*wrong["sequences"][:SHOWN], *wrong["counters"][:SHOWN]]:
        say(text)
    result = {
        "benchmark": "sequence-parity",
        "cases": len(world.cases),
        "mismatches": len({case for case, _ in found.wrong["sequences"]}),
        "counter_cases": len(world.questions),
        "counter_mismatches": len({case for case, _ in found.wrong["counters"]}),
        **found.told,
        "records": len(world.events) + len(world.updates),
        "late_pct": round(100 * world.late, 1),
        "moments": len(world.moments),
        "users": options.users,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
    }
    harness.publish(result | harness.machine())
    return 1 if result["mismatches"] or result["counter_mismatches"] else 0


# ----------------------------------------------------------------------------------------------------- what is drawn


class Record(NamedTuple):
    """A record, and when the broker took it."""

    taken_ms: int
    value: bytes


class Case(NamedTuple):
    """A sequence that is asked for: the definition as JSON has it, of whom, and at which moment; as a label, it has
    microseconds."""

    said: Said
    user: str
    at_us: int

    @property
    def at_ms(self) -> int:
        """In whole ms."""
        return self.at_us // 1000


class Question(NamedTuple):
    """A counter that is asked for: the body of the request, and what it means, in plain values."""

    body: Said
    users: tuple[str, ...]
    age_ms: int
    where: Mapping[str, Sequence[str]]
    grouped: tuple[str, ...]
    names: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    at_ms: int


class World(NamedTuple):
    """All that was ever taken, each topic in the order of its offsets, and all that is asked."""

    events: tuple[Record, ...]
    updates: tuple[Record, ...]
    moments: tuple[int, ...]
    cases: tuple[Case, ...]
    questions: tuple[Question, ...]
    late: float


def drawn(seed: int, options: Any) -> World:
    """A log of two weeks, and what is asked of it."""
    chance = random.Random(seed)
    moments = sorted(START_MS + chance.randrange(4 * DAY_MS, SPAN_MS) for _ in range(options.moments))
    users = [f"u{number}" for number in range(options.users - 2)] + ["ü'3", "long"]
    late: list[bool] = []
    events = [
        record
        for user in users
        for number in range(400 if user == "long" else chance.choice((3, 10, 25, 60)))
        for record in of_event(user, f"e{number}", moments, chance, late)
    ]
    events += [
        Record(START_MS + chance.randrange(SPAN_MS), chance.choice(BROKEN)) for _ in range(len(events) // 100)
    ]
    updates = [record for pin in PIN_IDS for record in of_pin(pin, moments, chance)]
    asked = [*users, "nobody", *["long"] * (1 + len(users) // 20)]
    cases = (
        Case(
            a_definition(chance),
            chance.choice(asked),
            chance.choice(moments) * 1000 + chance.choice((0, 0, 1, 999)),
        )
        for _ in range(options.cases)
    )
    questions = (
        a_question([*users, "nobody"], chance.choice(moments), chance) for _ in range(options.counters)
    )
    return World(
        tuple(in_order(events, chance)),
        tuple(in_order(updates, chance)),
        tuple(moments),
        tuple(cases),
        tuple(questions),
        sum(late) / max(1, len(late)),
    )


BROKEN = (
    b"{",
    b'{"user_id": "u1", "event_id": "e1", "version": 9, "action": "stare", "pin_id": "p1", "event_time": 1}',
    b'{"user_id": "u1", "event_id": "e1", "version": 9, "action": "view", "event_time": 1767225600000}',
)


def in_order(records: list[Record], chance: random.Random) -> list[Record]:
    """Records as a topic holds them: by the time at which they were taken, those of one ms in any order."""
    chance.shuffle(records)
    return sorted(records, key=lambda record: record.taken_ms)


def of_event(
    user: str, event: str, moments: Sequence[int], chance: random.Random, late: list[bool]
) -> list[Record]:
    """What is said of an event: said, corrected, moved, deleted, said again, in this order or not."""
    at_ms = a_time(moments, chance)
    said = [interaction(user, event, at_ms, 1, chance)]
    if chance.random() < 0.3:
        moved_ms = chance.choice((at_ms, at_ms, a_time(moments, chance)))
        said.append(interaction(user, event, moved_ms, chance.choice((1, 2, 2)), chance))
    if chance.random() < 0.15:
        gone = {"op": "delete", "user_id": user, "event_id": event}
        said.append(with_version(gone, chance.choice((1, 2, 4)), chance))
    if chance.random() < 0.1:
        said.append(interaction(user, event, at_ms, 3, chance))
    is_late = chance.random() < 0.1
    late.append(is_late)
    found = []
    for number, value in enumerate(said):
        taken_ms = at_ms + (chance.randrange(DAY_MS) if is_late else chance.randrange(-5_000, 5_000))
        taken_ms += chance.randrange(3 * DAY_MS) if number else 0
        if chance.random() < 0.1:
            taken_ms = near(moments, at_ms, chance) or taken_ms
        found.append(Record(taken_ms, written(value)))
        if chance.random() < 0.1:
            found.append(Record(taken_ms + chance.randrange(DAY_MS), written(value)))
    return found


def near(moments: Sequence[int], at_ms: int, chance: random.Random) -> int | None:
    """A time at a moment, or next to it, after an event."""
    later = [moment for moment in moments if moment >= at_ms]
    return chance.choice(later) + chance.choice((-1, 0, 0, 1)) if later else None


def a_time(moments: Sequence[int], chance: random.Random) -> int:
    """A time of the two weeks, often a moment, or just where a window that ends there begins."""
    if chance.random() < 0.15:
        return max(
            1,
            chance.choice(moments) - chance.choice((0, *list(AGES.values())[:5])) + chance.choice((-1, 0, 1)),
        )
    return START_MS + chance.randrange(SPAN_MS)


def interaction(user: str, event: str, at_ms: int, version: int, chance: random.Random) -> dict[str, Any]:
    """A record of `user-interactions`; one in 50 is dated ahead of its time."""
    said: dict[str, Any] = {name: chance.choice(values) for name, values in VALUES.items()}
    said |= {"quantity": chance.choice((None, 1, 7)), "value_usd_micros": chance.choice((None, 0, 2**40))}
    if not any(said[name] for name in OBJECTS):
        said["ad_id"] = "a0"
    at_us = (at_ms + (2 * HOUR_MS if chance.random() < 0.02 else 0)) * 1000 + chance.choice((0, 0, 500))
    when: Any = (EPOCH + timedelta(microseconds=at_us)).isoformat().replace("+00:00", "Z")
    if at_us % 1000 == 0 and chance.random() < 0.3:
        when = at_us // 1000
    there = {name: value for name, value in said.items() if value is not None}
    return with_version({"user_id": user, "event_id": event, "event_time": when, **there}, version, chance)


def of_pin(pin: str, moments: Sequence[int], chance: random.Random) -> list[Record]:
    """What is said of a pin: its catalogue, its offer or both, and deletions; versions come in any order."""
    found = []
    for _ in range(chance.choice((2, 8, 20))):
        version = chance.randrange(1, 9)
        catalogue = {
            "title": chance.choice(("", "a title", "ein Titel – mit Strich")),
            "category": chance.choice(CATEGORIES),
            "department": chance.choice((None, "food")),
            "brand": chance.choice((None, "Private")),
        }
        offer = {"price_usd_micros": chance.choice((5, 1_500_000)), "is_available": chance.random() < 0.5}
        both = {"catalogue": {n: v for n, v in catalogue.items() if v is not None}, "offer": offer}
        families = chance.choice((("catalogue", "offer"), ("catalogue",), ("offer",)))
        value: dict[str, Any] = {"pin_id": pin, **{family: both[family] for family in families}}
        if chance.random() < 0.2:
            value = {"op": "delete", "pin_id": pin}
        taken_ms = START_MS + chance.randrange(SPAN_MS)
        if chance.random() < 0.3:
            taken_ms = chance.choice(moments) + chance.choice((-1, 0, 1))
        found.append(Record(taken_ms, written(with_version(value, version, chance))))
    return found


def with_version(value: dict[str, Any], version: int, chance: random.Random) -> dict[str, Any]:
    """Version 1 need not be said."""
    return {**value, "version": version} if version > 1 or chance.random() < 0.5 else value


def written(value: Said) -> bytes:
    """A record's bytes."""
    return json.dumps(value, ensure_ascii=False).encode()


def a_definition(chance: random.Random) -> dict[str, Any]:
    """A definition of everything that one may say."""
    said: dict[str, Any] = {
        "max_length": chance.choice((1, 2, 3, 5, 8, 50, 1000)),
        "fields": some(EVENT_FIELDS, chance) + (some([*KEPT], chance) if chance.random() < 0.2 else []),
    }
    optional = {
        "actions": lambda: some(("purchase", "view", "click", "hide", "save"), chance),
        "surfaces": lambda: some(("home", "search"), chance),
        "categories": lambda: some(CATEGORIES[:3], chance),
        "age": lambda: chance.choice([*AGES]),
        "deduplicate_by": lambda: chance.choice(OBJECTS),
        "order": lambda: chance.choice(("newest_first", "oldest_first")),
        "enrich": lambda: some(ENRICHMENTS, chance),
    }
    often = {"actions": 0.25, "surfaces": 0.15, "categories": 0.15, "age": 0.5, "deduplicate_by": 0.4}
    return said | {name: draw() for name, draw in optional.items() if chance.random() < often.get(name, 0.5)}


def some(options: Sequence[Any], chance: random.Random) -> list[Any]:
    """One or more, in any order."""
    return chance.sample(list(options), chance.randrange(1, len(options) + 1))


def a_question(users: Sequence[str], at_ms: int, chance: random.Random) -> Question:
    """A counter query, in one of its three forms."""
    way = chance.choice(("json", "sql", "pairs"))
    about = chance.choice(OBJECTS)
    columns = [name for name in VALUES if chance.random() < 0.2 and not (way == "pairs" and name == about)]
    where = {name: some(sorted({value for value in VALUES[name] if value})[:6], chance) for name in columns}
    text, age_ms = chance.choice([*AGES.items()])
    if way == "pairs":
        of_object = [value for value in VALUES[about] if value]
        pairs = tuple(
            (chance.choice(users), chance.choice(of_object)) for _ in range(chance.randrange(1, 40))
        )
        body = {"pairs": list(map(list, pairs)), "object": about, "where": where, "age_ms": age_ms}
        return Question({**body, "now_ms": at_ms}, (), age_ms, where, (about,), (), pairs, at_ms)
    asked = tuple(chance.sample(list(users), chance.randrange(1, 6)))
    grouped = tuple(chance.sample(["user_id", *VALUES], chance.randrange(0, 4)))
    if way == "sql":
        return sql_question(asked, text, where, grouped, at_ms, chance)
    age_ms += chance.choice((0, 0, 1))
    age_ms = min(age_ms, 90 * DAY_MS)
    body = {"user_ids": list(asked), "where": where, "age_ms": age_ms, "group_by": list(grouped)}
    return Question({**body, "now_ms": at_ms}, asked, age_ms, where, grouped, grouped, (), at_ms)


def sql_question(
    users: tuple[str, ...],
    age: str,
    where: Mapping[str, Sequence[str]],
    grouped: tuple[str, ...],
    at_ms: int,
    chance: random.Random,
) -> Question:
    """A query as a sentence."""

    def named(column: str) -> str:
        short = {"user_id": "user", "pin_id": "object"}.get(column, column.removesuffix("_id"))
        return chance.choice((column, short))

    def condition(column: str, values: Sequence[str]) -> str:
        texts = ["'" + value.replace("'", "''") + "'" for value in values]
        if len(texts) == 1 and chance.random() < 0.5:
            return f"{named(column)} = {texts[0]}"
        return f"{named(column)} IN ({', '.join(texts)})"

    conditions = [condition(column, values) for column, values in ({"user_id": users} | dict(where)).items()]
    conditions.append(f"age < '{age}'")
    chance.shuffle(conditions)
    names = tuple(named(column) for column in grouped)
    text = f"SELECT {', '.join([*names, 'count(*)'])} FROM events WHERE {' AND '.join(conditions)}"
    text += f" GROUP BY {', '.join(grouped)}" if grouped else ""
    return Question({"sql": text, "now_ms": at_ms}, users, AGES[age], where, grouped, names, (), at_ms)


# -------------------------------------------------------------------------------------------------------- by hand


class ByHand:
    """What stands of the records taken so far, in dictionaries. Nothing here is shared with what is measured."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, str], tuple[Any, Said | None]] = {}
        self._pins: dict[tuple[str, str], tuple[Any, Said | None]] = {}
        self._kept: dict[tuple[str, str], Said] = {}

    def take(self, events: Iterable[Record], updates: Iterable[Record]) -> None:
        """More records were taken."""
        taken = [*((one.taken_ms, 0, one) for one in updates), *((one.taken_ms, 1, one) for one in events)]
        for _, is_event, record in sorted(taken, key=lambda one: one[:2]):
            (self._take_event if is_event else self._take_update)(record)

    def _take_event(self, record: Record) -> None:
        said = _read(record.value)
        if said is not None and _is_event(said, record.taken_ms):
            at = (said["user_id"], said["event_id"])
            if _put(self._events, at, said, _but(said, "user_id", "event_id")):
                pin = self.pin(said.get("pin_id"))
                self._kept[at] = {name: pin.get(f, {}).get(column) for name, (f, column) in KEPT.items()}

    def _take_update(self, record: Record) -> None:
        said = json.loads(record.value)
        is_gone = said.get("op") == "delete"
        for family in ("catalogue", "offer"):
            if is_gone or family in said:
                _put(self._pins, (said["pin_id"], family), said, {} if is_gone else said[family])

    def pin(self, pin_id: str | None) -> Mapping[str, Said]:
        """What is known of a pin; nothing where it has no catalogue."""
        held = {family: self._pins.get((pin_id or "", family)) for family in ("catalogue", "offer")}
        found = {family: one[1] for family, one in held.items() if one is not None and one[1] is not None}
        return found if "catalogue" in found else {}

    def of_user(self, user: str, from_ms: int, to_ms: int) -> Rows:
        """A user's events with from_ms ≤ time < to_ms, the newest first."""
        found: Rows = [
            {name: said.get(name) for name in (*VALUES, "quantity", "value_usd_micros")}
            | {"event_id": event, "user_id": user, "time_ms": _ms(said["event_time"])}
            | dict(self._kept[of, event])
            for (of, event), (_, said) in self._events.items()
            if of == user and said is not None
        ]
        inside = [event for event in found if from_ms <= event["time_ms"] < to_ms]
        return sorted(inside, key=lambda e: (e["time_ms"], e["event_id"].encode()), reverse=True)

    def sequence(self, said: Said, user: str, now_ms: int) -> Rows:
        """What a definition means."""
        from_ms = now_ms - AGES[said["age"]] + 1 if "age" in said else 0
        found: Rows = []
        seen = set()
        for event in self.of_user(user, from_ms, now_ms + 1):
            pin = self.pin(event["pin_id"])
            if "actions" in said and event["action"] not in said["actions"]:
                continue
            if "surfaces" in said and event["surface"] not in said["surfaces"]:
                continue
            if "categories" in said and pin.get("catalogue", {}).get("category") not in said["categories"]:
                continue
            about = event[said["deduplicate_by"]] if "deduplicate_by" in said else None
            if about is not None and about in seen:
                continue
            seen.add(about)
            row = {name: event[name] for name in said["fields"]}
            for name in said.get("enrich", ()):
                family, column = name.split(".")
                row[name] = pin.get(family, {}).get(column)
            found.append(row)
        kept = found[: said["max_length"]]
        return kept[::-1] if said.get("order") == "oldest_first" else kept

    def counts(self, asked: Question) -> list[dict[str, Any]]:
        """What a counter query is to be answered."""
        users = list(dict.fromkeys(user for user, _ in asked.pairs)) if asked.pairs else list(asked.users)
        events = [
            event
            for user in users
            for event in self.of_user(user, asked.at_ms - asked.age_ms + 1, asked.at_ms + 1)
            if all(event[name] in values for name, values in asked.where.items())
        ]
        if asked.pairs:
            (about,) = asked.grouped
            of_pair = Counter((event["user_id"], event[about]) for event in events)
            return [{"user_id": u, about: value, "count": of_pair[u, value]} for u, value in asked.pairs]
        groups = Counter(tuple(event[name] for name in asked.grouped) for event in events)
        if not asked.grouped:
            groups[()] += 0

        def place(values: tuple[Any, ...]) -> list[Any]:
            return [
                users.index(value) if name == "user_id" else (value is not None, value)
                for name, value in zip(asked.grouped, values, strict=True)
            ]

        return [
            {**dict(zip(asked.names, values, strict=True)), "count": groups[values]}
            for values in sorted(groups, key=place)
        ]


def _read(value: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(value)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_event(said: Said, taken_ms: int) -> bool:
    """Whether a record keeps the contract, as far as the log breaks it."""
    if said.get("op") == "delete":
        return True
    is_about = any(said.get(name) for name in OBJECTS)
    return is_about and said["action"] != "stare" and _ms(said["event_time"]) <= taken_ms + HOUR_MS


def _put(
    held: dict[tuple[str, str], tuple[Any, Said | None]], key: tuple[str, str], said: Said, means: Said
) -> bool:
    """The greater of what was said of a thing stands: by version, then a deletion, then the hash of what is said.
    Whether this does from now on."""
    is_gone = said.get("op") == "delete"
    hashed = {k: v for k, v in means.items() if k not in ("version", "op")}
    if "event_time" in hashed:
        hashed["event_time"] = _us(hashed["event_time"])
    text = json.dumps({} if is_gone else hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    content = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    rank = (said.get("version", 1), is_gone, content)
    if key in held and rank <= held[key][0]:
        return False
    held[key] = (rank, None if is_gone else means)
    return True


def _but(said: Said, *names: str) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name not in names}


def _us(time: int | str) -> int:
    if isinstance(time, int):
        return time * 1000
    return (datetime.fromisoformat(time) - EPOCH) // timedelta(microseconds=1)


def _ms(time: int | str) -> int:
    return _us(time) // 1000


# ------------------------------------------------------------------------------------------------------ the platform


class Found(NamedTuple):
    """What was wrong, by kind: the number of the case and a text that tells all; and what else there is to tell."""

    wrong: dict[str, list[tuple[int, str]]]
    told: dict[str, Any]


class Topic:
    """One topic: its records in `raw`, its stream, and the index that it feeds."""

    def __init__(
        self,
        spark: SparkSession,
        settings: Settings,
        contract: Contract,
        spec: IndexSpec,
        records: Sequence[Record],
    ) -> None:
        self.spec, self.contract = spec, contract
        self._spark = spark
        self._taken = [record.taken_ms for record in records]
        self._versions = Versions(settings.paths.indices, spec.name)
        self._raw = _put_raw(spark, contract, records)
        name = contract.name
        self._run = HotStreamRun(
            STREAMS[name],
            [spec],
            deltas=settings.paths.delta,
            checkpoints=settings.paths.checkpoints,
            state=indices.state(settings, name),
        )
        self._done, self._cut = 0, 0
        self._life, self._epoch = 1, 0
        self.epochs, self.bases = 0, 0
        self.tables: Callable[[str], DataFrame] = self.curated

    def curated(self, table: str) -> DataFrame:
        """A curated table of what was streamed by now."""
        source = curate.SOURCES[self.contract.name]
        judged = curate.judge(
            source, frames.judged(self.contract, self._raw.filter(f"offset < {self._done}"))
        )
        (part,) = (part for part in source.parts if part.table == table)
        return curate.standing(source, judged, part)

    def position(self, offset: int) -> Position:
        """All before an offset."""
        return Position({TOPIC_IDS[self.contract.topic]: {0: offset}} if offset else {})

    def advance(self, at_ms: int, chance: random.Random) -> Position:
        """Streams what was taken by a moment, in one to three epochs; some of it again, in a new incarnation, at
        times."""
        end = bisect.bisect_right(self._taken, at_ms)
        if chance.random() < 0.15 and self._done:
            self._life, self._epoch = self._life + 1, 0
            self._done = max(0, self._done - chance.randrange(1, 80))
        while self._done < end:
            upto = end if chance.random() < 0.4 else self._done + chance.randrange(1, end - self._done + 1)
            batch = self._raw.filter(f"offset >= {self._done} AND offset < {upto}")
            self._run.run_epoch(batch, self._epoch, self._life)
            self._done, self._epoch, self.epochs = upto, self._epoch + 1, self.epochs + 1
        return self.position(self._done)

    def build(self, chance: random.Random) -> None:
        """Builds a base of what was taken up to some record, and publishes it."""
        self._cut = chance.randrange(self._cut, self._done + 1)
        rows = frames.judged(self.contract, self._raw.filter(f"offset < {self._cut}")).filter(
            "_reason IS NULL"
        )
        families = [family for family in self.spec.families if family.stream is not None]
        state = index_rows.TableState(self.tables)
        parts = [family.transform(looked_up(family, rows, state), state) for family in families]
        facts = functools.reduce(lambda one, other: one.unionByName(other, allowMissingColumns=True), parts)
        version = self._versions.new_version(lineage(self.spec))
        meta = Meta(version, self.position(self._cut), self._taken[self._cut - 1] if self._cut else None)
        build.build(
            self.spec, facts, self._versions.new_path(version), meta, shard_count=chance.randrange(1, 4)
        )
        self._versions.wait_swapped(self._versions.publish(version), 60)
        self.bases += 1


def _put_raw(spark: SparkSession, contract: Contract, records: Sequence[Record]) -> DataFrame:
    """Records into a raw table, as the archive would have put them; they, cached."""
    spec = lake.TABLES[contract.raw_table]
    lake.ensure(spark, spec)
    rows = [
        (TOPIC_IDS[contract.topic], 0, offset, None, None, taken, None, record.value, taken)
        for offset, record in enumerate(records)
        for taken in [EPOCH + timedelta(milliseconds=record.taken_ms)]
    ]
    lake.append(spark.createDataFrame(rows, spark.table(spec.identifier).schema), spec)
    return lake.read(spark, spec.name).coalesce(2).cache()


def compared(settings: Settings, world: World, chance: random.Random, exported: int) -> Found:
    """Every case in all its ways."""
    from pipelines.spark import session

    say(f"{len(world.events):,} records of events, {len(world.updates):,} of pins")
    spark = session(settings, "tidemark benchmark")
    try:
        events = Topic(spark, settings, USER_INTERACTIONS, USER_EVENTS, world.events)
        pins = Topic(spark, settings, PIN_UPDATES, PINS, world.updates)
        events.tables = pins.curated
        by_hand = wanted(world)
        found = online(settings, world, (events, pins), chance)
        say("exporting")
        found |= {"exported": exported_cases(spark, settings, world)}
        wrong: dict[str, list[tuple[int, str]]] = {"sequences": [], "counters": []}
        for number, case in enumerate(world.cases):
            for way in ("online", "exported"):
                right = by_hand["sequences"][number]
                if way == "online":
                    right, found[way][number] = without_kept(right), without_kept(found[way][number])
                if found[way][number] != right:
                    wrong["sequences"].append((number, told(way, case, found[way][number], right)))
        for number, question in enumerate(world.questions):
            if found["counters"][number] != by_hand["counters"][number]:
                wrong["counters"].append(
                    (number, told("online", question, found["counters"][number], by_hand["counters"][number]))
                )
        tables = as_tables(spark, settings, world, exported)
        wrong["sequences"] += tables.wrong
        lengths = [len(rows) for rows in by_hand["sequences"]]
        return Found(
            wrong,
            {
                "empty": sum(not length for length in lengths),
                "events_of_cases": sum(lengths),
                "table_cases": tables.cases,
                "epochs": events.epochs + pins.epochs,
                "bases": events.bases + pins.bases,
            },
        )
    finally:
        spark.stop()


def without_kept(rows: Any) -> Any:
    """A sequence without what its events keep of their pins."""
    return [_but(row, *KEPT) for row in rows] if isinstance(rows, list) else rows


def told(way: str, asked: Case | Question, found: Any, by_hand: Any) -> str:
    """A mismatch in full."""
    texts = (json.dumps(one, ensure_ascii=False) for one in (asked._asdict(), found, by_hand))
    return "{}: {}\n  found   {}\n  by hand {}".format(way, *texts)


def until(records: Sequence[Record], after_ms: int, at_ms: int) -> list[Record]:
    """Those that were taken after one time, and by another."""
    return [record for record in records if after_ms < record.taken_ms <= at_ms]


def wanted(world: World) -> dict[str, list[Any]]:
    """All answers by hand."""
    hand, before = ByHand(), -1
    sequences_: list[Any] = [None] * len(world.cases)
    counters_: list[Any] = [None] * len(world.questions)
    for at_ms in world.moments:
        hand.take(until(world.events, before, at_ms), until(world.updates, before, at_ms))
        before = at_ms
        for number, case in enumerate(world.cases):
            if case.at_ms == at_ms:
                sequences_[number] = hand.sequence(case.said, case.user, at_ms)
        for number, question in enumerate(world.questions):
            if question.at_ms == at_ms:
                counters_[number] = hand.counts(question)
    return {"sequences": sequences_, "counters": counters_}


# ---------------------------------------------------------------------------------------------------------- online


def online(
    settings: Settings, world: World, topics: tuple[Topic, Topic], chance: random.Random
) -> dict[str, list[Any]]:
    """All answers over HTTP, each at its moment."""
    found: dict[str, list[Any]] = {
        "online": [None] * len(world.cases),
        "counters": [None] * len(world.questions),
    }
    harness.start(settings, ["serving"])
    harness.await_ready(settings)
    for number, at_ms in enumerate(world.moments):
        for (
            topic
        ) in topics:  # some bases come between the records and the questions, others before the records
            if number and chance.random() < 0.3:
                topic.build(chance)
        position = merge_all(topic.advance(at_ms, chance) for topic in topics)
        for topic in topics:
            if chance.random() < 0.3:
                topic.build(chance)
        connection = http.client.HTTPConnection(settings.serving.host, settings.serving.port, timeout=60)
        with contextlib.closing(connection):
            asked_at(connection, position.token(), world, at_ms, found)
        say(f"moment {number + 1} of {len(world.moments)}")
    return found


def asked_at(
    connection: http.client.HTTPConnection, token: str, world: World, at_ms: int, found: dict[str, list[Any]]
) -> None:
    """Asks all that is to be asked at a moment."""
    for place, case in enumerate(world.cases):
        if case.at_ms == at_ms:
            body = {"user_ids": [case.user], "definition": case.said, "now_ms": at_ms}
            (answer,) = ask(connection, "/v1/sequences:query", body, token)["sequences"]
            found["online"][place] = answer["events"] if answer["is_complete"] else answer
    for place, question in enumerate(world.questions):
        if question.at_ms == at_ms:
            found["counters"][place] = ask(connection, "/v1/counters:query", question.body, token)["counts"]


def ask(connection: http.client.HTTPConnection, path: str, body: Said, token: str) -> Any:
    """An answer that stands on a position.

    Raises:
        BenchmarkError: It is none.
    """
    connection.request(
        "POST", f"{path}?min_position={token}", json.dumps(body), {"content-type": "application/json"}
    )
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise BenchmarkError(
            f"{answer.status}: {text.decode()[:1000]} to {json.dumps(body)[:1000]}", where=path
        )
    return json.loads(text)


# -------------------------------------------------------------------------------------------------------- exported


def exported_cases(spark: SparkSession, settings: Settings, world: World) -> list[Any]:
    """The sequences of all cases from `raw`, each for a label of its own, in one job."""
    from pyspark.sql.types import BooleanType, IntegerType, StringType, StructType

    definitions = [sequences.parse(dict(case.said)) for case in world.cases]
    labels = spark.createDataFrame(
        [
            (number, case.user, EPOCH + timedelta(microseconds=case.at_us))
            for number, case in enumerate(world.cases)
        ],
        "number int, user_id string, label_time timestamp",
    )
    events, updates = (
        sequence_export.accepted(
            spark, settings, contract, lake.current_snapshot(settings, contract.raw_table), 2**52
        )
        for contract in (USER_INTERACTIONS, PIN_UPDATES)
    )
    families = [family for family in PINS.families if family.stream is not None]
    made = (
        StructType()
        .add("number", IntegerType())
        .add("sequence", StringType())
        .add("is_complete", BooleanType())
    )
    run = functools.partial(_each, definitions)
    grouped = sequence_export.grouped(labels, events, updates, families, BUCKETS)
    rows = grouped.applyInArrow(run, made).toArrow().to_pylist()
    found: list[Any] = [None] * len(world.cases)
    for row in rows:
        events_ = json.loads(row["sequence"])
        found[row["number"]] = events_ if row["is_complete"] else row
    return found


def _each(definitions: Sequence[sequences.Definition], labels: pa.Table, statements: pa.Table) -> pa.Table:
    """Each label with the sequence of its own definition, as JSON."""
    found: dict[str, list[Any]] = {"number": [], "sequence": [], "is_complete": []}
    for place, number in enumerate(labels.column("number").to_pylist()):
        definition = definitions[number]
        names = [family.name for family in families_read(definition)]
        mine = statements
        for family in PINS.families:  # what the definition does not read must not matter
            if family.stream is not None and family.name not in names:
                mine = mine.drop_columns([family.name])
        (row,) = as_of(labels.slice(place, 1), mine, definition).to_pylist()
        found["number"].append(number)
        found["sequence"].append(json.dumps(row["sequence"]))
        found["is_complete"].append(row["is_complete"])
    return pa.table(
        found,
        schema=pa.schema([("number", pa.int32()), ("sequence", pa.string()), ("is_complete", pa.bool_())]),
    )


class Tables(NamedTuple):
    """What the export's own tables hold: how many labels, and what is wrong with them."""

    cases: int
    wrong: list[tuple[int, str]]


def as_tables(spark: SparkSession, settings: Settings, world: World, count: int) -> Tables:
    """The first definitions, each exported by the shipped command's function for the labels of all cases."""
    spark.sql("CREATE NAMESPACE IF NOT EXISTS lake.training")
    rows = [
        (number, case.user, EPOCH + timedelta(microseconds=case.at_us))
        for number, case in enumerate(world.cases)
    ]
    labels = spark.createDataFrame(rows, "number int, user_id string, label_time timestamp")
    labels.writeTo("lake.training.labels").using("iceberg").createOrReplace()
    wrong, cases = [], 0
    for place, first in enumerate(world.cases[:count]):
        named = {**first.said, "name": f"drawn_{place}", "version": 1}
        definition = sequences.parse(named)
        to = f"training.drawn_{place}"
        sequence_export.export(spark, settings, definition, "training.labels", to)
        found = {row["number"]: row for row in lake.read(spark, to).toArrow().to_pylist()}
        again = world._replace(
            cases=tuple(case._replace(said=first.said) for case in world.cases), questions=()
        )
        for number, rows_ in enumerate(wanted(again)["sequences"]):
            cases += 1
            if found[number]["sequence"] != rows_:
                wrong.append((number, told("a table", again.cases[number], found[number]["sequence"], rows_)))
    return Tables(cases, wrong)
