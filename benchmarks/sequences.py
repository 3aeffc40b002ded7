"""How quickly sequences are answered over HTTP, and how soon an event is in one.

A base of made-up events, and one of their pins, is built by Spark and served. A sequence is a user's newest 256 events,
each with four fields of its own and five of its pin. Over one connection the same requests are asked again and again:
of one user who has as many events (`single_*`), then of 100 users, drawn as often as they act, who may have fewer
(`batch_*`). `single_p99_ms` is of answers in JSON, which pages and rankers read; `batch_p99_ms` of answers as Arrow
streams, which models read. The other form of each is `single_arrow_p99_ms` and `batch_json_p99_ms`. Then requests for
one user have their times, at rising rates, over 8 connections: `queries_per_s` is the highest rate at which 99 of 100
answers come within 8 ms of when they were due. All of that with nothing beside, and every answer is held against
DuckDB's over the same events and pins as Parquet.

Then all streams run, and events go through the shipped producer, most to the users that were asked for. One in 25 is of
a watched user, whose sequence is asked for every 35 ms, and is timed from the producer's call to the answer that has
it (`fresh_*`); one that is never seen is an error.
"""

from __future__ import annotations

import http.client
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from benchmarks import events, harness, serving
from benchmarks.counters import anonymous_mb, highest_rate
from benchmarks.events import Built, Population
from benchmarks.freshness import Event, Load, Watch, await_position
from benchmarks.harness import BenchmarkError, Timed, say
from pipelines.serving.routing import ARROW, JSON
from pipelines.settings import Settings

LENGTH = 256
BATCH = 100
SINGLES, BATCHES = 400, 40
WARM_UP_S, PATIENCE_S = 10, 60
PATH = "/v1/sequences:query"
FIELDS = ("event_id", "time_ms", "pin_id", "action")
ENRICH = (
    *("catalogue.title", "catalogue.category", "catalogue.brand"),
    *("offer.price_usd_micros", "offer.is_available"),
)
DEFINITION = {"max_length": LENGTH, "fields": FIELDS, "enrich": ENRICH}
Users = tuple[str, ...]
Found = dict[str, list[Event]]
"""User → events of the sequence."""


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        events=(5_000_000, "events in the base"),
        seconds=(15, "for how long each phase asks, or sends"),
        rate=(1_000, "events a second through the streams in the last phase"),
        seed=(1, "of the events"),
    )
    with harness.place("sequences", options.home) as settings:
        population, built = events.kept_or_served(settings, options.events, options.seed)
        machine = harness.machine()
        truth = Truth(built)  # before what is measured: it reads and sorts all of them
        load_s = events.start(settings)
        result = {"benchmark": "sequences"} | measured(settings, population, truth, options)
        result |= fresh(settings, truth, options)
        result |= {
            "anonymous_rss_mb": anonymous_mb(settings),
            "bytes_per_event": round(built.bytes / population.events, 1),
            "events": population.events,
            "users": population.users,
            "pins": population.pins,
            "build_s": built.seconds,
            "load_s": load_s,
        }
    harness.publish(result | machine)
    return 0 if result["errors"] == result["unseen"] == 0 else 1


# ------------------------------------------------------------------------------------------------ how quickly


def measured(settings: Settings, population: Population, truth: Truth, options: Any) -> dict[str, Any]:
    """The phases with nothing beside."""
    singles: list[Users] = [(user,) for user in truth.long_users(SINGLES, options.seed)]
    batches = truth.batches(BATCHES, options.seed)
    found: dict[str, Any] = {}
    errors = 0
    forms = ((JSON, from_json), (ARROW, from_arrow))
    for (name, asked), (form, read) in itertools.product((("single", singles), ("batch", batches)), forms):
        label = name if (name, form) in PLAIN else f"{name}_{'arrow' if form == ARROW else 'json'}"
        say(f"{BATCH if name == 'batch' else 1} users at a time, {form}")
        requests = [harness.post(PATH, body_of(users, population.until_ms), form) for users in asked]
        answers = serving.ask(settings, requests, 1, options.seconds)
        found[f"{label}_p50_ms"], found[f"{label}_p99_ms"] = serving.in_ms(answers, 50, 99)
        found[f"{label}_asked"] = len(answers)
        say("checking the answers")
        errors += wrong(answers, asked, read, truth)
    say("rising rates")
    requests = [harness.post(PATH, body_of(users, population.until_ms)) for users in singles]
    return found | {"queries_per_s": highest_rate(settings, requests), "errors": errors}


PLAIN = (("single", JSON), ("batch", ARROW))
"""The form of an answer that a name without a form is about."""


def body_of(users: Users, now_ms: int) -> dict[str, Any]:
    """A request for sequences."""
    return {"user_ids": users, "definition": DEFINITION, "now_ms": now_ms}


def wrong(
    answers: Sequence[Timed], asked: Sequence[Users], read: Callable[[bytes], Found], truth: Truth
) -> int:
    """How many answers are wrong; one connection asks in order, from the first on, again and again.

    Raises:
        BenchmarkError: Nothing was answered.
    """
    if not answers:
        raise BenchmarkError("nothing was answered")
    judged: dict[tuple[int, bytes], bool] = {}
    errors = 0
    for number, answer in enumerate(answers):
        place = number % len(asked)
        if (place, answer.body) not in judged:
            is_right = answer.status == 200 and read(answer.body) == truth.sequences(asked[place])
            judged[place, answer.body] = is_right
        errors += not judged[place, answer.body]
    return errors


def from_json(body: bytes) -> Found:
    """What an answer of JSON says."""
    return {one["user_id"]: one["events"] for one in orjson.loads(body)["sequences"]}


def from_arrow(body: bytes) -> Found:
    """What an Arrow stream says."""
    table = pa.ipc.open_stream(body).read_all()
    users = orjson.loads(table.schema.metadata[b"tidemark.sequences"])["users"]
    ends = itertools.accumulate(user["length"] for user in users)
    rows = table.to_pylist()
    for row in rows:
        del row["user_id"]
    return {user["user_id"]: rows[end - user["length"] : end] for user, end in zip(users, ends, strict=True)}


class Truth:
    """DuckDB over the same events and pins, in a file: in memory they would leave none to the base that is mapped."""

    def __init__(self, built: Built) -> None:
        import duckdb

        self._duckdb = duckdb.connect(str(built.parquet.with_name("truth.duckdb")))
        self._duckdb.execute("SET threads = 2")
        self._duckdb.execute("SET memory_limit = '3GB'")
        self._duckdb.execute(
            "CREATE OR REPLACE TABLE events AS"
            " SELECT user_id, event_id, epoch_ms(event_time) AS time_ms, pin_id, action"
            f" FROM read_parquet('{built.parquet}/*.parquet') ORDER BY user_id, time_ms"
        )
        self._duckdb.execute(
            "CREATE OR REPLACE TABLE pins AS SELECT pin_id, catalogue, offer"
            f" FROM read_parquet('{built.pins}/*.parquet')"
        )

    def long_users(self, count: int, seed: int) -> list[str]:
        """Users who have a whole sequence, at most so many.

        Raises:
            BenchmarkError: There is none.
        """
        users, counts = self._counts()
        long = [user for user, events in zip(users, counts.tolist(), strict=True) if events >= LENGTH]
        if not long:
            raise BenchmarkError(f"nobody has {LENGTH} events", remedy="make more of them: --events 100000")
        np.random.default_rng(seed).shuffle(long)
        return long[:count]

    def batches(self, count: int, seed: int) -> list[Users]:
        """So many batches of different users, drawn as often as they act."""
        users, counts = self._counts()
        chance, shares = np.random.default_rng(seed), counts / counts.sum()
        drawn = (chance.choice(len(users), BATCH, replace=False, p=shares) for _ in range(count))
        return [tuple(users[one] for one in batch) for batch in drawn]

    def _counts(self) -> tuple[list[str], np.ndarray]:
        """Users, and how many events each has."""
        text = "SELECT user_id, count(*) FROM events GROUP BY user_id ORDER BY user_id"
        users, counts = zip(*self._duckdb.execute(text).fetchall(), strict=True)
        return list(users), np.array(counts)

    def sequences(self, users: Users) -> Found:
        """What must be answered."""
        names = (*FIELDS, *ENRICH)
        rows = self._duckdb.execute(
            f"""WITH newest AS (
                SELECT * FROM events WHERE user_id IN ({", ".join("?" for _ in users)})
                QUALIFY row_number() OVER (PARTITION BY user_id ORDER BY time_ms DESC, event_id DESC) <= {LENGTH})
            SELECT user_id, {", ".join(names)} FROM newest LEFT JOIN pins USING (pin_id)
            ORDER BY user_id, time_ms DESC, event_id DESC""",
            users,
        ).fetchall()
        found: Found = {user: [] for user in users}
        for user, *values in rows:
            found[user].append(dict(zip(names, values, strict=True)))
        return found


# ------------------------------------------------------------------------------------------------ how soon


def fresh(settings: Settings, truth: Truth, options: Any) -> dict[str, Any]:
    """How soon an event is in the sequence of its user, while events come into those of many."""
    harness.start(settings, ["broker", "streams"])
    users, pins = truth.long_users(SINGLES, options.seed), [f"p{number}" for number in range(100)]
    run_id = f"{int(time.time()):x}"
    say("the streams begin")
    warm = Load(settings, f"{run_id}w", options.rate, WARM_UP_S, users, pins)
    warm.run()
    await_position(settings, warm.position)
    say(f"{options.rate} events a second")
    load = Load(settings, run_id, options.rate, options.seconds, users, pins)
    watch = SequenceWatch(settings, load)
    watch.start()
    load.run()
    watch.finish(PATIENCE_S)
    seconds = watch.seconds()
    p50, p99 = harness.percentiles(seconds, (50, 99))
    return {
        "fresh_mean_s": round(sum(seconds) / max(1, len(seconds)), 3),
        "fresh_p50_s": p50,
        "fresh_p99_s": p99,
        "unseen": len(load.timed) - len(watch.seen),
        "timed": len(watch.seen),
        "sent_per_s": round(len(load.events) / load.took_s, 1),
    }


class SequenceWatch(Watch):
    """Asks for the sequences of the watched users."""

    def request(self, connection: http.client.HTTPConnection, user: str, count: int) -> None:
        """Asks for the newest part of a sequence, pins and all."""
        body = {"user_ids": [user], "definition": {**DEFINITION, "max_length": count}}
        connection.request("POST", PATH, orjson.dumps(body), {"content-type": JSON})

    def events(self, answer: Any) -> list[Event]:
        """Those of an answer."""
        (found,) = answer["sequences"]
        events: list[Event] = found["events"]
        return events
