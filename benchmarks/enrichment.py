"""What it costs to say of each event what its pin was: kept in the event when it was indexed, or joined when it is
read.

A base of made-up events and one of their pins are built by Spark and served. Sequences of a user's newest 256 events,
with four fields of their own and five of the pin, are asked for over one connection, again and again: of one user who
has as many, in JSON, and of 100 users, drawn as often as they act, as Arrow streams (`batch_…`). Where the five are
kept in the event it is `stored_…`; where they are joined from the pins it is `joined_…`. Both must say the same, event
by event.

`base_bytes_per_event` is a base of the same events without the five, `stored_bytes_per_event` what they add. Then one
pin in ten changes: `stale_pct` of the events in answers are kept as the pin was before. `look_up_…` is what an epoch of
`ROWS` events waits for its look-up in the stream; with one in ten, an epoch of 50 pins is to be followed, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa

from benchmarks import events, harness, serving
from benchmarks.events import Population
from benchmarks.harness import BenchmarkError, Timed, say
from benchmarks.sequences import BATCHES, LENGTH, PATH, SINGLES, Truth, Users, from_arrow, from_json
from pipelines import indices
from pipelines.indexing import build, delta
from pipelines.indexing import facts as fact
from pipelines.indexing.base import read_manifest
from pipelines.indexing.build import Meta
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Versions
from pipelines.pins.index import PINS
from pipelines.serving.routing import ARROW, JSON
from pipelines.settings import Settings
from pipelines.users.index import OWN, STREAM, TIME_MS, USER_EVENTS
from pipelines.users.indexed import INDEXED, KEPT, RELATION

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

OWN_FIELDS = ("event_id", "time_ms", "pin_id", "action")
JOINED = tuple(".".join(of) for of in KEPT.values())
WAYS = {
    "stored": {"max_length": LENGTH, "fields": [*OWN_FIELDS, *KEPT]},
    "joined": {"max_length": LENGTH, "fields": OWN_FIELDS, "enrich": JOINED},
}
ROWS, EPOCHS = 1_000, 200
TOPIC_ID = "pin-updates@bench"


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        events=(1_000_000, "events in the base"),
        seconds=(15, "for how long each phase asks"),
        seed=(1, "of the events"),
    )
    population = events.of_size(options.events, options.seed)
    with harness.place("enrichment", options.home) as settings:
        built = events.serve(settings, population, with_parquet=True)
        alone = bytes_alone(settings, population)
        machine = harness.machine()
        events.start(settings)
        truth = Truth(built)
        found = asked(settings, population, truth, options)
        found |= after_changes(settings, population, truth, options.seed)
        found |= looked_up(settings, population, options.seed)
    per_event = built.bytes / population.events
    result = {
        "benchmark": "enrichment",
        **found,
        "base_bytes_per_event": round(alone / population.events, 1),
        "stored_bytes_per_event": round(per_event - alone / population.events, 1),
        "events": population.events,
        "users": population.users,
        "pins": population.pins,
    }
    harness.publish(result | machine)
    return 0 if found["errors"] == 0 else 1


def bytes_alone(settings: Settings, population: Population) -> int:
    """The bytes of a base of the same events that keep nothing of their pins."""
    from pipelines.spark import session

    say("the same base without what is kept of pins")
    first, *others = USER_EVENTS.families
    spec = USER_EVENTS._replace(families=(first._replace(schema=OWN, looks_up=()), *others))
    spark = session(settings, "tidemark benchmark")
    try:
        folder = settings.home / "alone"
        shards = max(1, -(-population.events // settings.build.shard_facts))
        build.build(
            spec,
            facts_alone(events.rows(spark, population)),
            folder,
            Meta("alone", EMPTY),
            shard_count=shards,
        )
    finally:
        spark.stop()
    return sum(file.size_bytes for shard in read_manifest(folder).shards for file in shard.files)


def facts_alone(rows: DataFrame) -> DataFrame:
    """Events as facts, without what is kept of pins."""
    return fact.frame(
        rows,
        family="interactions",
        identity=["user_id", "event_id"],
        key="user_id",
        id="event_id",
        time_ms=TIME_MS,
        version=["version"],
        is_deleted="is_deleted",
        content_hash="content_hash",
        payload=f"struct({', '.join(OWN.names)})",
    )


# ------------------------------------------------------------------------------------------------ how quickly


def asked(settings: Settings, population: Population, truth: Truth, options: Any) -> dict[str, Any]:
    """Both ways in turns, and whether they say the same."""
    singles: list[Users] = [(user,) for user in truth.long_users(SINGLES, options.seed)]
    batches = truth.batches(BATCHES, options.seed)
    found: dict[str, Any] = {}
    errors = 0
    for kind, users, form in (("", singles, JSON), ("batch_", batches, ARROW)):
        answers: dict[str, list[Timed]] = {}
        for way, definition in WAYS.items():
            say(f"{way}: {len(users[0])} users at a time, {form}")
            requests = [
                harness.post(
                    PATH, {"user_ids": one, "definition": definition, "now_ms": population.until_ms}, form
                )
                for one in users
            ]
            serving.ask(settings, requests, 1, 2)  # what is mapped is in memory for both
            answers[way] = serving.ask(settings, requests, 1, options.seconds)
            p50, p99 = serving.in_ms(answers[way], 50, 99)
            found |= {
                f"{way}_{kind}p50_ms": p50,
                f"{way}_{kind}p99_ms": p99,
                f"{way}_{kind}asked": len(answers[way]),
            }
        errors += differing(answers, len(users), form)
    return found | {"errors": errors}


def differing(answers: dict[str, list[Timed]], count: int, form: str) -> int:
    """How many users' sequences are not the same in both ways, of the first answer to each request."""
    errors = 0
    for stored, joined in zip(*(answers[way][:count] for way in WAYS), strict=False):
        if stored.status != 200 or joined.status != 200:
            raise BenchmarkError(f"{stored.status}, {joined.status}: {stored.body[:500]!r}", where=PATH)
        read = from_arrow if form == ARROW else from_json
        both = [
            {user: [tuple(event.values()) for event in of_user] for user, of_user in read(one.body).items()}
            for one in (stored, joined)
        ]
        errors += sum(both[0][user] != both[1][user] for user in both[1])
    return errors


def looked_up(settings: Settings, population: Population, seed: int) -> dict[str, Any]:
    """What an epoch waits for its look-up, while pins change, too."""
    say(f"looking up the pins of {ROWS} events, {EPOCHS} times")
    chance = np.random.default_rng(seed)
    state = indices.state(settings, STREAM)
    times = []
    for number in range(EPOCHS):
        at = np.floor(population.pins * chance.random(ROWS) * chance.random(ROWS)).astype(int)
        rows = pa.table({"pin_id": pa.array([f"p{one}" for one in at])})
        if number % 10 == 0:
            change(settings, [f"p{one}" for one in at[:50]], 1 + number)
        began = time.perf_counter()
        found = state.look_up(RELATION, rows)
        times.append(time.perf_counter() - began)
        if found.column(INDEXED.names[0]).null_count == ROWS:
            raise BenchmarkError("no pin was known")
    first, *others = times
    p50, p99 = harness.percentiles(others, (50, 99), 1000)
    return {"look_up_first_ms": round(first * 1000, 1), "look_up_p50_ms": p50, "look_up_p99_ms": p99}


# ------------------------------------------------------------------------------------------------ how stale


def change(settings: Settings, pin_ids: Sequence[str], epoch: int) -> Position:
    """New categories and prices for pins, as an epoch of their stream; the position after it."""
    payloads = {
        "catalogue": {"title": "anew", "category": f"new {epoch}", "department": "new", "brand": None},
        "offer": {"price_usd_micros": 1 + epoch, "is_available": True},
    }
    rows = [
        {
            "family": family,
            "identity": [key],
            "key": key,
            "version": (2 + epoch,),
            "content_hash": 1,
            "payload": said,
        }
        for key in (pin.encode() for pin in dict.fromkeys(pin_ids))
        for family, said in payloads.items()
    ]
    writer = delta.DeltaWriter(PINS, delta_path(settings))
    start, end = (Position({TOPIC_ID: {0: number}}) for number in (epoch, epoch + 1))
    writer.commit(delta.Marker("pin_updates", 1, epoch, start, end, len(rows)), fact.table(PINS, rows))
    return end


def delta_path(settings: Settings) -> Path:
    """Where the changes of pins are."""
    assert Versions(settings.paths.indices, PINS.name).pointer() is not None
    return delta.table_path(settings.paths.delta, PINS.name, lineage(PINS))


def after_changes(settings: Settings, population: Population, truth: Truth, seed: int) -> dict[str, Any]:
    """Of how many events the kept columns differ from the pin's, before and after one pin in ten has changed."""
    chance = np.random.default_rng(seed + 1)
    users = truth.batches(BATCHES, seed)
    before = stale(settings, population, users, None)
    pins = [f"p{one}" for one in chance.choice(population.pins, population.pins // 10, replace=False)]
    end = change(settings, pins, 0)
    after = stale(settings, population, users, end)
    return {"stale_before_pct": before, "stale_pct": after}


def stale(
    settings: Settings, population: Population, users: Sequence[Users], position: Position | None
) -> float:
    """The share of the events of some sequences whose kept columns are not what the pin says now, in %."""
    import urllib.request

    different = whole = 0
    query = f"?min_position={position.token()}" if position else ""
    for one in users:
        fields = [*OWN_FIELDS, *KEPT]
        body = {
            "user_ids": one,
            "definition": {"max_length": LENGTH, "fields": fields, "enrich": JOINED},
            "now_ms": population.until_ms,
        }
        request = urllib.request.Request(
            harness.serving_url(settings) + PATH + query,
            orjson.dumps(body),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = orjson.loads(answer.read())
        for sequence in found["sequences"]:
            for event in sequence["events"]:
                whole += 1
                different += any(event[name] != event[".".join(of)] for name, of in KEPT.items())
    return round(100 * different / max(1, whole), 2)
