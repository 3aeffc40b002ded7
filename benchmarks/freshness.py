"""How long until an event is in an answer: 500 events a second for a minute, every one of them checked.

All streams and serving run. Events go through the shipped producer (acks=all); one in 25 belongs to a user who is
watched over HTTP, and is timed from the producer's call to the answer that has it. Afterwards every event is looked for
in its user's timeline, in the counts of its pin and in the archive.
"""

from __future__ import annotations

import collections
import http.client
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import orjson

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from jobs import client
from pipelines import lake
from pipelines.contracts import ACTIONS, USER_INTERACTIONS
from pipelines.indexing.position import EMPTY, Position
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings

TIMED_EACH = 25
WATCHED = 4
USERS, PINS = 200, 400
TICK_S = 0.02
POLL_S = 0.035
LONGEST_POLL_S = 0.05
PAGE = 60
Event = dict[str, Any]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        rate=(500, "events a second"),
        seconds=(60, "for how long"),
        warm_up=(10, "seconds of the same before, not timed"),
        fraction=(1.0, "share of the real input in the base"),
    )
    with harness.place("freshness", options.home) as settings:
        harness.prepare_base(settings, options.fraction)
        harness.start(settings, ["broker", "streams", "serving"])
        harness.await_ready(settings)
        machine = harness.machine()
        run_id = f"{int(time.time()):x}"
        if options.warm_up:
            say("warming up")
            warm = Load(settings, f"{run_id}w", options.rate, options.warm_up)
            warm.run()
            await_position(settings, warm.position)
        say(f"{options.rate} events a second for {options.seconds} s")
        load = Load(settings, run_id, options.rate, options.seconds)
        watch = Watch(settings, load)
        watch.start()
        load.run()
        await_position(settings, load.position)
        watch.finish(20)
        say("looking for every event")
        lost, duplicated, archived = check(settings, load)
    harness.publish(result(options, load, watch, lost, duplicated, archived) | machine)
    return 0 if lost == duplicated == 0 else 1


def result(
    options: Any, load: Load, watch: Watch, lost: int, duplicated: int, archived: int
) -> dict[str, Any]:
    """The line that is printed."""
    p50, p90, p99, worst = harness.percentiles(watch.seconds(), (50, 90, 99, 100))
    gap_p99, gap_max = harness.percentiles(watch.gaps, (99, 100), 1000, 1)
    return {
        "benchmark": "freshness",
        "p50_s": p50,
        "p90_s": p90,
        "p99_s": p99,
        "max_s": worst,
        "lost": lost,
        "duplicated": duplicated,
        "events": len(load.events),
        "timed": len(watch.seen),
        "unseen": len(load.timed) - len(watch.seen),
        "archived": archived,
        "rate": options.rate,
        "sent_per_s": round(len(load.events) / load.took_s, 1),
        "seconds": options.seconds,
        "polls": len(watch.gaps),
        "poll_gap_p99_ms": gap_p99,
        "poll_gap_max_ms": gap_max,
        "polls_late": sum(gap > LONGEST_POLL_S for gap in watch.gaps),
        "base_fraction": options.fraction,
        "beside": ["broker", "archive stream", "2 hot streams", "serving"],
    }


class Load:
    """Events at a steady rate, through the shipped producer."""

    def __init__(
        self,
        settings: Settings,
        run_id: str,
        rate: int,
        seconds: int,
        users: Sequence[str] = (),
        pins: Sequence[str] = (),
    ) -> None:
        self.settings, self.rate = settings, rate
        chance = random.Random(run_id)
        users = users or [f"bench-{run_id}-user-{number}" for number in range(USERS)]
        pins = pins or [f"bench-{run_id}-pin-{number}" for number in range(PINS)]
        self.watched = [f"bench-{run_id}-watched-{n}" for n in range(WATCHED)]
        self.events: list[Event] = []
        self.timed: dict[str, float | None] = {}
        for number in range(rate * seconds):
            is_timed = number % TIMED_EACH == 0
            user = self.watched[number // TIMED_EACH % WATCHED]
            event_id = f"{run_id}-{number:06d}"
            if is_timed:
                self.timed[event_id] = None
            self.events.append(
                {
                    "user_id": user if is_timed else chance.choice(users),
                    "event_id": event_id,
                    "pin_id": chance.choice(pins),
                    "action": chance.choice(ACTIONS),
                }
            )
        self.position: Position = EMPTY
        self.took_s = 0.0
        self.sent = 0
        self._ending = threading.Event()

    def end(self) -> None:
        """Sends no more."""
        self._ending.set()

    def run(self) -> None:
        """Sends them all, each at its time or, when the broker held a batch up, as soon after as can be."""
        began = time.perf_counter()
        with Producer(self.settings) as producer:
            while self.sent < len(self.events) and not self._ending.is_set():
                due = min(len(self.events), int((time.perf_counter() - began) * self.rate) + 1)
                batch = self.events[self.sent : due]
                if batch:
                    self._stamp(batch)
                    self.position = self.position.merge(producer.send_objects(USER_INTERACTIONS, batch))
                    self.sent = due
                time.sleep(max(0.0, TICK_S - (time.perf_counter() - began) % TICK_S))
        self.took_s = time.perf_counter() - began

    def _stamp(self, batch: list[Event]) -> None:
        """The event's time, and the moment of the producer's call."""
        now_ms = time.time_ns() // 1_000_000
        for event in batch:
            event["event_time"] = now_ms
            if event["event_id"] in self.timed:
                self.timed[event["event_id"]] = time.perf_counter()


class Watch:
    """Asks for the events of the watched users, one connection a user, and notes when each is first there."""

    def __init__(self, settings: Settings, load: Load) -> None:
        self.settings, self.load = settings, load
        self.seen: dict[str, float] = {}
        self.gaps: list[float] = []
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(user,), daemon=True) for user in load.watched
        ]
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Begins to ask."""
        for thread in self._threads:
            thread.start()

    def finish(self, patience_s: float) -> None:
        """Asks until all were seen, or the patience is over.

        Raises:
            BenchmarkError: a watcher failed; its times would be too good.
        """
        deadline = time.monotonic() + patience_s
        while len(self.seen) < len(self.load.timed) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._ending.set()
        for thread in self._threads:
            thread.join()
        if self._failure is not None:
            raise BenchmarkError(f"watching failed: {self._failure!r}")

    def seconds(self) -> list[float]:
        """From the producer's call to the answer, for each that was seen."""
        return [at - sent for event, at in self.seen.items() if (sent := self.load.timed[event]) is not None]

    def _run(self, user: str) -> None:
        connection = http.client.HTTPConnection(
            self.settings.serving.host, self.settings.serving.port, timeout=30
        )
        try:
            asked = time.perf_counter()
            while not self._ending.is_set():
                unseen = self._ask(connection, user, PAGE)
                if unseen == PAGE:
                    self._ask(connection, user, 1000)
                time.sleep(max(0.0, asked + POLL_S - time.perf_counter()))
                now = time.perf_counter()
                self.gaps.append(now - asked)
                asked = now
        except BaseException as error:
            self._failure = error
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, user: str, count: int) -> int:
        self.request(connection, user, count)
        answer = connection.getresponse()
        body = answer.read()
        at = time.perf_counter()
        if answer.status != 200:
            raise BenchmarkError(f"a watcher is answered {answer.status}: {body[:200]!r}")
        new = [e["event_id"] for e in self.events(orjson.loads(body)) if e["event_id"] not in self.seen]
        self.seen.update(dict.fromkeys(new, at))
        return len(new)

    def request(self, connection: http.client.HTTPConnection, user: str, count: int) -> None:
        """Asks for a user's newest events."""
        connection.request("GET", f"/v1/users/{client.quote(user)}/events?limit={count}")

    def events(self, answer: Any) -> list[Event]:
        """Those of an answer."""
        found: list[Event] = answer["events"]
        return found


def await_position(settings: Settings, position: Position, timeout_s: float = 120.0) -> None:
    """Waits until an answer stands on everything that was sent."""
    for path in ("/v1/users/nobody/events", "/v1/pins/none/counts"):
        client.request_at(
            harness.serving_url(settings), path, {"min_position": position.token()}, timeout_s=timeout_s
        )


def check(settings: Settings, load: Load) -> tuple[int, int, int]:
    """How many events are lost, how many are there twice (in timelines or in counts), how many are archived."""
    base = harness.serving_url(settings)
    by_user: dict[str, dict[str, Event]] = collections.defaultdict(dict)
    wanted: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for event in load.events:
        by_user[event["user_id"]][event["event_id"]] = event
        wanted[event["pin_id"]][event["action"]] += 1
    missing = extra = 0
    for user, sent in by_user.items():
        found = collections.Counter((e["event_id"], e["pin_id"], e["action"]) for e in timeline(base, user))
        right = {(e["event_id"], e["pin_id"], e["action"]) for e in sent.values()}
        missing += len(right - set(found))
        extra += sum(found.values()) - len(right & set(found))
    too_few = too_many = 0
    for pin, actions in wanted.items():
        totals = client.request(base, f"/v1/pins/{client.quote(pin)}/counts").body["totals"]
        for action in ACTIONS:
            too_few += max(0, actions[action] - totals[action])
            too_many += max(0, totals[action] - actions[action])
    archived, again = archive(settings, load)
    unarchived = len(load.events) - archived
    return max(missing, too_few, unarchived), max(extra, too_many, again), archived


def timeline(base: str, user: str) -> list[Event]:
    """All events of a user."""
    found: list[Event] = []
    cursor = None
    while True:
        path = f"/v1/users/{client.quote(user)}/events"
        body = client.request(base, path, {"limit": 1000, "cursor": cursor}).body
        found += body["events"]
        cursor = body["next_cursor"]
        if cursor is None:
            return found


def archive(settings: Settings, load: Load, timeout_s: float = 120.0) -> tuple[int, int]:
    """How many of the events the archive has, and how many of its rows are there twice."""
    name = f"raw.{USER_INTERACTIONS.name}"
    deadline = time.monotonic() + timeout_s
    while not lake.position(settings, name).covers(load.position) and time.monotonic() < deadline:
        time.sleep(0.5)
    table = lake.open_table(settings, name)
    if table is None:
        return 0, 0
    scan = table.scan("topic_id IS NOT NULL", selected_fields=("partition", "offset", "value"))
    ids = {event["event_id"] for event in load.events}
    mine = [(row, found) for row in scan.to_arrow().to_pylist() if (found := _event_id(row["value"])) in ids]
    places = {(row["partition"], row["offset"]) for row, _ in mine}
    return len({event_id for _, event_id in mine}), len(mine) - len(places)


def _event_id(value: bytes) -> str | None:
    try:
        return orjson.loads(value).get("event_id")
    except (ValueError, AttributeError):
        return None
