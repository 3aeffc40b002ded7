"""Do patterns fire exactly as they should, and how soon: a log replayed with kill -9, then live events.

First the log of a past month is sent as fast as the broker takes it: events late, twice, edited and deleted. While it
is read, the streaming process is killed (SIGKILL) and started again, several times. What is served then is compared
with a naive single-threaded evaluator over everything that was sent: firings that are missing, and that are too many.
Then events of now come at a steady rate, and each firing is timed, from the broker's time of the statement that made it
to its being there for an answer.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from jobs import processes
from jobs.processes import Record
from pipelines import indices
from pipelines.contracts import USER_INTERACTIONS
from pipelines.indexing import delta
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import lineage
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings
from pipelines.users import pattern_files, profiles
from tests import pattern_oracle
from tests.pattern_oracle import Firing, Said

INDEX, STREAM = "user_profiles", "user_patterns"
BEGAN_MS = 1_488_326_400_000  # the first of March 2017
MINUTE_MS = 60_000
LONGEST_S = 600.0
CATEGORIES = ("fruit", "bread", "milk", "wine")
FAR_MS = 4_000_000_000_000


class Log(NamedTuple):
    """Records in the order in which they are sent, and what they say."""

    records: list[dict[str, Any]]
    said: list[Said]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        events=(20_000, "in the log that is replayed"),
        users=(400, "whose they are"),
        kills=(2, "how often the process is killed meanwhile"),
        rate=(200, "events a second, live"),
        seconds=(30, "for how long"),
        nice=(0, "of the streaming process"),
        trigger_ms=(1000, "from one epoch to the next"),
    )
    chosen = {"STREAMS__NICE": str(options.nice), "STREAMS__TRIGGER_MS": str(options.trigger_ms)}
    with harness.place("patterns", options.home, **chosen) as settings:
        harness.start(settings, ["broker", "streams"])
        machine = harness.machine()
        log = replay_log(random.Random(7), options.events, options.users)
        say(f"replaying {len(log.records)} records, with {options.kills} kills")
        began = time.monotonic()
        position = send(settings, log.records)
        kills_in(settings, position, options.kills)
        await_read(settings, position)
        replayed_s = time.monotonic() - began
        expected, found = compare(settings, log.said)
        say(f"{len(expected)} should have fired, {len(found)} did; now {options.rate} events a second")
        ages_s, live = live_ages(settings, options.rate, options.seconds, options.users)
        all_expected, all_found = compare(settings, [*log.said, *live])
    p50, p99 = harness.percentiles(ages_s, (50, 99))
    missed, spurious = len(all_expected - all_found), len(all_found - all_expected)
    harness.publish(
        {
            "benchmark": "patterns",
            "fired": len(all_found),
            "missed": missed,
            "spurious": spurious,
            "fresh_mean_s": round(sum(ages_s) / max(1, len(ages_s)), 3),
            "fresh_p50_s": p50,
            "fresh_p99_s": p99,
            "timed": len(ages_s),
            "events": len(log.records) + len(live),
            "replayed": len(log.records),
            "replayed_per_s": round(len(log.records) / replayed_s),
            "fired_in_replay": len(found),
            "missed_in_replay": len(expected - found),
            "spurious_in_replay": len(found - expected),
            "kills": options.kills,
            "rate": options.rate,
        }
        | machine
    )
    return 0 if missed == spurious == 0 else 1


# ------------------------------------------------------------------------------------------------ what is sent


def replay_log(chance: random.Random, count: int, users: int) -> Log:
    """A month of events of some users: visits of minutes, hours apart; some late, twice, edited, or deleted."""
    clocks = {f"user-{number}": BEGAN_MS + chance.randrange(86_400_000) for number in range(users)}
    recent: dict[str, list[dict[str, Any]]] = {user: [] for user in clocks}
    log = Log([], [])
    number = 0
    while len(log.records) < count:
        user = chance.choice(list(clocks))
        if chance.random() < 0.1:
            clocks[user] += chance.randrange(1, 72) * 3_600_000
            recent[user] = []
        for _ in range(chance.randrange(1, 7)):
            clocks[user] += chance.randrange(4 * MINUTE_MS)
            record = event(
                chance, user, f"e{number}", clocks[user] - chance.choice((0, 0, 0, 30 * MINUTE_MS))
            )
            number += 1
            recent[user].append(record)
            _say(log, record)
            if chance.random() < 0.1:
                _say(log, chance.choice(recent[user]))  # again
            if chance.random() < 0.1:
                _say(log, _changed(chance, recent[user]))
    return log


def event(chance: random.Random, user: str, event_id: str, time_ms: int) -> dict[str, Any]:
    """One event, as a record."""
    action = chance.choices(
        ("view", "add_to_basket", "purchase", "remove_from_basket", "click"), (8, 3, 2, 1, 2)
    )[0]
    record = {
        "user_id": user,
        "event_id": event_id,
        "pin_id": f"pin-{chance.randrange(8)}",
        "action": action,
        "event_time": time_ms,
        "category": chance.choice(CATEGORIES),
        "version": 1,
    }
    if chance.random() < 0.2:
        del record["category"]
    return record


def _changed(chance: random.Random, recent: list[dict[str, Any]]) -> dict[str, Any]:
    """An edit or a deletion of a recent event; it is said with a greater version."""
    place = chance.randrange(len(recent))
    before = recent[place]
    version = before["version"] + 1
    if chance.random() < 0.4:
        changed = {"op": "delete", **{k: before[k] for k in ("user_id", "event_id")}, "version": version}
        recent[place] = {**before, "version": version}
        return changed
    time_ms = before["event_time"] + chance.choice((0, -MINUTE_MS, 20 * MINUTE_MS))
    recent[place] = event(chance, before["user_id"], before["event_id"], time_ms) | {"version": version}
    return recent[place]


def _say(log: Log, record: dict[str, Any]) -> None:
    log.records.append(record)
    is_deleted = record.get("op") == "delete"
    content = hash(repr(sorted(record.items())))
    said = Said(
        record["user_id"], record["event_id"], record["version"], content, None if is_deleted else record
    )
    log.said.append(said)


def send(settings: Settings, records: Sequence[dict[str, Any]]) -> Position:
    """Send records; gives the position that covers them."""
    position = EMPTY
    with Producer(settings) as producer:
        for start in range(0, len(records), 2_000):
            sent = producer.send_objects(USER_INTERACTIONS, list(records[start : start + 2_000]))
            position = position.merge(sent)
    return position


# ------------------------------------------------------------------------------------------------ what becomes of it


def reached(settings: Settings) -> Position:
    """Up to where the stream has committed."""
    spec = indices.INDICES[INDEX]
    return delta.Ends(delta.table_path(settings.paths.delta, INDEX, lineage(spec))).position()


def _count(position: Position) -> int:
    return sum(offset for offsets in position.topics.values() for offset in offsets.values())


def kills_in(settings: Settings, position: Position, kills: int) -> None:
    """Kill the streaming process, and start it again, whenever another part of the log has been read."""
    for number in range(1, kills + 1):
        wanted = _count(position) * number // (kills + 1)
        _await(lambda wanted=wanted: _count(reached(settings)) >= wanted, f"{wanted} records to be read")
        found = Record.read(processes.supervisor(settings).pid_file("streams"))
        if found is None:
            raise BenchmarkError("the streaming process is gone")
        os.kill(found.pid, signal.SIGKILL)
        say(f"killed after {_count(reached(settings))} records")
        _await(lambda found=found: not processes.is_alive(found), "it to die")
        harness.start(settings, ["streams"])


def await_read(settings: Settings, position: Position) -> None:
    """Waits until the stream has committed all of this.

    Raises:
        BenchmarkError: it does not in time.
    """
    _await(lambda: reached(settings).covers(position), "the log to be read")


def _await(is_true: Any, what: str) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not is_true():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {LONGEST_S:.0f} s for {what}")
        time.sleep(0.1)


def compare(settings: Settings, said: Sequence[Said]) -> tuple[set[Firing], set[Firing]]:
    """What a naive evaluator says, and what is served; of all times."""
    rules = yaml.safe_load(pattern_files.PATTERNS_FILE.read_text(encoding="utf-8"))["rules"]
    expected = pattern_oracle.firings(rules, said)
    declared = pattern_files.load()
    view = indices.overlay(settings, INDEX).view
    found = {
        Firing(one.rule, user, one.event_id, one.at_ms, one.value)
        for user in {one.user for one in said}
        for one in profiles.fired(view, declared, user.encode(), FAR_MS)  # type: ignore[arg-type]
    }
    return expected, found


def live_ages(settings: Settings, rate: int, seconds: int, users: int) -> tuple[list[float], list[Said]]:
    """Events of now at a steady rate; for each firing how old its newest statement was when it was there, in s."""
    spec, chance = indices.INDICES[INDEX], random.Random(11)
    tailer = delta.Tailer(spec, delta.table_path(settings.paths.delta, INDEX, lineage(spec)))
    list(tailer.snapshot())
    log = Log([], [])
    ages_s: list[float] = []
    began, position = time.monotonic(), EMPTY
    with Producer(settings) as producer:
        while True:
            elapsed = time.monotonic() - began
            due = min(rate * seconds, int(elapsed * rate))
            batch = []
            while len(log.records) < due:
                user, event_id = f"live-{chance.randrange(users)}", f"live-{len(log.records)}"
                _say(log, event(chance, user, event_id, int(time.time() * 1000)))
                batch.append(log.records[-1])
            if batch:
                position = position.merge(producer.send_objects(USER_INTERACTIONS, batch))
            for epoch in tailer.poll() or ():
                known_ms = epoch.facts.column("version_1").to_pylist()
                ages_s += [time.time() - one / 1000 for one in known_ms]
            if len(log.records) == rate * seconds and reached(settings).covers(position):
                break
            if elapsed > seconds + LONGEST_S:
                raise BenchmarkError("the stream did not keep up")
            time.sleep(0.02)
    return ages_s, log.said
