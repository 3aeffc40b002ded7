"""How quickly counters are answered from timelines, over HTTP, and how long DuckDB and SQLite take for the same.

A base of made-up events is built by Spark and served. One query (of one user, some objects, some days, by action) is
asked again and again over one connection: with nothing beside (`single_*`), then while events go through Kafka into the
timelines (`single_live_*`). A call of 300 pairs of user and object is asked alike (`batch_*`). Then requests have their
times, at rising rates, and an answer is timed from when it was due: `queries_per_s` is the highest rate at which 99 of
100 come within 8 ms. Users are asked about as often as they act. Every answer of the quiet phases is held against
DuckDB's over the same events as Parquet; DuckDB and SQLite (indexed by user and time) are timed in this process, for
the same queries.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import events, harness, serving
from benchmarks.events import DAY_MS, Population
from benchmarks.freshness import Load
from benchmarks.harness import BenchmarkError, Timed, say
from pipelines.settings import Settings

PAIRS = 300
OBJECTS = 20
WITHIN_MS = 8.0
RATES = (50, 100, 150, 200, 300, 400, 600, 800, 1_000, 1_500, 2_000)
AGES_MS = (3_600_000, DAY_MS, 7 * DAY_MS, 30 * DAY_MS, 90 * DAY_MS)
COLUMNS = ("user_id", "ad_id", "action", "time_ms")


class Question(NamedTuple):
    """Events of a user with some ads in the last while, by action."""

    user: str
    ads: tuple[str, ...]
    age_ms: int

    def body(self, now_ms: int) -> dict[str, Any]:
        """As JSON asks it."""
        return {
            "user_ids": [self.user],
            "where": {"ad_id": list(self.ads)},
            "age_ms": self.age_ms,
            "group_by": ["action"],
            "now_ms": now_ms,
        }

    def sql(self, now_ms: int) -> tuple[str, list[Any]]:
        """As the other engines are asked."""
        places = ", ".join("?" for _ in self.ads)
        text = (
            f"SELECT action, count(*) FROM events WHERE user_id = ? AND time_ms > ? AND time_ms <= ?"
            f" AND ad_id IN ({places}) GROUP BY action"
        )
        return text, [self.user, now_ms - self.age_ms, now_ms, *self.ads]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        events=(5_000_000, "events in the base"),
        seconds=(15, "for how long each phase asks"),
        rate=(1_000, "events a second through the streams in the live phase; 0: no live phase"),
        seed=(1, "of the events"),
    )
    with harness.place("counters", options.home) as settings:
        population, built = events.kept_or_served(settings, options.events, options.seed)
        machine = harness.machine()
        load_s = events.start(settings)
        others = Others(settings.home, built.parquet)
        result = {"benchmark": "counters"} | measured(settings, population, others, options)
        result |= {
            "events": population.events,
            "users": population.users,
            "bytes_per_event": round(built.bytes / population.events, 1),
            "build_s": built.seconds,
            "load_s": load_s,
            "anonymous_rss_mb": anonymous_mb(settings),
        }
    harness.publish(result | machine)
    return 0 if result["errors"] == 0 else 1


def measured(settings: Settings, population: Population, others: Others, options: Any) -> dict[str, Any]:
    """All phases."""
    now_ms = population.until_ms
    asked = others.questions(400, options.seed)
    pairs = others.pairs(40, options.seed)
    singles = [harness.post("/v1/counters:query", one.body(now_ms)) for one in asked]
    batches = [harness.post("/v1/counters:query", body_of(one, now_ms)) for one in pairs]
    say("one query at a time")
    single = serving.ask(settings, singles, 1, options.seconds)
    say(f"{PAIRS} pairs at a time")
    batch = serving.ask(settings, batches, 1, options.seconds)
    say("DuckDB and SQLite")
    theirs = {name: others.times(name, asked, now_ms) for name in ("duckdb", "sqlite")}
    say("checking the answers")
    errors = wrong(single, [others.counts(one, now_ms) for one in asked])
    errors += wrong(batch, [others.counts_of_pairs(one, now_ms) for one in pairs])
    say("rising rates")
    best = highest_rate(settings, singles)
    p50, p99 = serving.in_ms(single, 50, 99)
    batch_p50, batch_p99 = serving.in_ms(batch, 50, 99)
    found = {
        "single_p50_ms": p50,
        "single_p99_ms": p99,
        "batch_p50_ms": batch_p50,
        "batch_p99_ms": batch_p99,
        "queries_per_s": best,
        "ratio_to_duckdb": round(theirs["duckdb"][0] / p50, 2),
        "ratio_to_sqlite": round(theirs["sqlite"][0] / p50, 2),
        **{f"{name}_p50_ms": one[0] for name, one in theirs.items()},
        **{f"{name}_p99_ms": one[1] for name, one in theirs.items()},
        "asked": len(single),
        "batches": len(batch),
        "errors": errors,
    }
    if options.rate:
        found |= live(settings, singles, asked, options)
    return found


def live(settings: Settings, singles: list[bytes], asked: Sequence[Question], options: Any) -> dict[str, Any]:
    """The same queries while events come into the timelines of those that are asked about, and of others."""
    say(f"{options.rate} events a second through the streams")
    harness.start(settings, ["broker", "streams"])
    users = list(dict.fromkeys(one.user for one in asked))
    load = Load(settings, f"{int(time.time()):x}", options.rate, 600, users, ["p1"])
    with serving.Background(load) as sending:
        time.sleep(20)  # until the streams have begun
        answers = serving.ask(settings, singles, 1, options.seconds)
    p50, p99 = serving.in_ms(answers, 50, 99)
    return {
        "single_live_p50_ms": p50,
        "single_live_p99_ms": p99,
        "live_events_per_s": options.rate,
        "live_events": sending.sent,
        "live_errors": sum(answer.status != 200 for answer in answers),
    }


def highest_rate(settings: Settings, requests: list[bytes]) -> int:
    """The highest of the rates at which 99 of 100 answers come in time; 0: none."""
    best = 0
    for rate in RATES:
        answers = serving.ask(settings, requests, 8, 5, rate)
        (p99,) = serving.in_ms(answers, 99)
        say(f"{rate} a second: p99 {p99} ms")
        if p99 > WITHIN_MS or serving.per_second(answers) < 0.95 * rate:
            break
        best = rate
    return best


def body_of(pairs: Sequence[tuple[str, str]], now_ms: int) -> dict[str, Any]:
    """A call about pairs."""
    return {"pairs": list(map(list, pairs)), "object": "ad_id", "age_ms": 7 * DAY_MS, "now_ms": now_ms}


def wrong(answers: Sequence[Timed], expected: Sequence[Any]) -> int:
    """How many answers are not what is expected; one connection asks in order, from the first on, again and again.

    Raises:
        BenchmarkError: Nothing was answered.
    """
    if not answers:
        raise BenchmarkError("nothing was answered")
    errors = 0
    for place, answer in enumerate(answers):
        body = json.loads(answer.body) if answer.status == 200 else {"counts": None}
        errors += body["counts"] != expected[place % len(expected)]
    return errors


def anonymous_mb(settings: Settings) -> int:
    """The memory of serving that is not mapped from files, in MB."""
    from jobs import processes

    record = processes.Record.read(processes.supervisor(settings).pid_file("serving"))
    assert record is not None
    lines = Path(f"/proc/{record.pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) // 1024


class Others:
    """DuckDB and SQLite over the same events."""

    def __init__(self, folder: Path, parquet: Path) -> None:
        import duckdb

        say("the same events into DuckDB and SQLite")
        self.duckdb = duckdb.connect(str(folder / "events.duckdb"))
        self.duckdb.execute("SET threads = 2")
        self.duckdb.execute(
            "CREATE OR REPLACE TABLE events AS SELECT user_id, ad_id, action, epoch_ms(event_time) AS time_ms"
            f" FROM read_parquet('{parquet}/*.parquet') ORDER BY user_id, time_ms"
        )
        self.sqlite = sqlite3.connect(folder / "events.sqlite")
        self.sqlite.execute("DROP TABLE IF EXISTS events")
        self.sqlite.execute("CREATE TABLE events (user_id TEXT, ad_id TEXT, action TEXT, time_ms INTEGER)")
        found = self.duckdb.execute(f"SELECT {', '.join(COLUMNS)} FROM events")
        while part := found.fetchmany(200_000):
            self.sqlite.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", part)
        self.sqlite.execute("CREATE INDEX by_user ON events (user_id, time_ms, ad_id, action)")
        self.sqlite.commit()

    def questions(self, count: int, seed: int) -> list[Question]:
        """Of users as often as they act, about ads that they met, and others."""
        chance = np.random.default_rng(seed)
        drawn = self._drawn(count, seed)
        ads = [ad for _, ad in drawn]
        return [
            Question(
                user,
                tuple(dict.fromkeys([ad, *map(str, chance.choice(ads, OBJECTS - 1))])),
                int(chance.choice(AGES_MS)),
            )
            for user, ad in drawn
        ]

    def pairs(self, count: int, seed: int) -> list[list[tuple[str, str]]]:
        """So many lists of pairs: half of them met, half of them not."""
        drawn = self._drawn(count * PAIRS, seed + 1)
        chance = np.random.default_rng(seed)
        mixed = [
            (user, ad if chance.random() < 0.5 else drawn[int(chance.integers(len(drawn)))][1])
            for user, ad in drawn
        ]
        return [mixed[start : start + PAIRS] for start in range(0, len(mixed), PAIRS)]

    def _drawn(self, count: int, seed: int) -> list[tuple[str, str]]:
        """Users and ads of events, as often as there are events."""
        text = (
            "SELECT user_id, ad_id FROM (SELECT * FROM events WHERE ad_id IS NOT NULL)"
            f" USING SAMPLE reservoir({count} ROWS) REPEATABLE ({seed})"
        )
        return sorted(self.duckdb.execute(text).fetchall(), key=lambda pair: hash_of(pair, seed))

    def times(self, name: str, asked: Sequence[Question], now_ms: int) -> list[float]:
        """p50 and p99 of an engine's times for the queries, each asked twice and timed the second time, in ms."""
        engine: Any = getattr(self, name)
        took = []
        for one in asked:
            text, values = one.sql(now_ms)
            engine.execute(text, values).fetchall()
            began = time.perf_counter()
            engine.execute(text, values).fetchall()
            took.append(time.perf_counter() - began)
        return harness.percentiles(took, [50, 99], 1000, 3)

    def counts(self, one: Question, now_ms: int) -> list[dict[str, Any]]:
        """What must be answered."""
        found = self.duckdb.execute(*one.sql(now_ms)).fetchall()
        return [{"action": action, "count": count} for action, count in sorted(found)]

    def counts_of_pairs(self, pairs: Sequence[tuple[str, str]], now_ms: int) -> list[dict[str, Any]]:
        """What must be answered."""
        text = (
            "SELECT user_id, ad_id, count(*) FROM events WHERE time_ms > ? AND time_ms <= ?"
            f" AND user_id IN ({', '.join('?' for _ in pairs)}) GROUP BY ALL"
        )
        users = [user for user, _ in pairs]
        found = self.duckdb.execute(text, [now_ms - 7 * DAY_MS, now_ms, *users]).fetchall()
        counted = {(user, ad): count for user, ad, count in found}
        return [{"user_id": user, "ad_id": ad, "count": counted.get((user, ad), 0)} for user, ad in pairs]


def hash_of(pair: tuple[str, str], seed: int) -> int:
    """An order that has nothing to do with the events', and is the same each time."""
    import hashlib

    return int.from_bytes(hashlib.sha1(f"{seed} {pair}".encode()).digest()[:8])
