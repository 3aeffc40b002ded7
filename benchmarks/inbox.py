"""How quickly inboxes are put together, how soon a change is in them, and what it would take to write them instead.

Bases of made-up follows, changes of pins and events are built and served. Over one connection users who follow 10, 100
and 1,000 pins and users are asked for, each kind apart, with nothing beside (`inbox_p50_ms_10` and so on); every answer
is held against plain Python over the same records (`mismatches`). One pin has `--followers` followers.

For comparison one change of it is written as a fact for each follower, by the shipped writer of deltas, in epochs as
large as streams make them, and folded by the shipped overlay (`pushed_*`): what fan-out on write would cost.

Then all streams run, and that pin is changed `--changes` times through the shipped producer. A sample of its followers
is asked for every 35 ms, and each change is timed from the producer's call to the answer that has it (`fresh_*`);
`writes_per_change` is how many facts its delta has of it.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from benchmarks import events, harness, serving
from benchmarks.freshness import POLL_S
from benchmarks.harness import BenchmarkError, say
from jobs import client
from pipelines.contracts import PIN_UPDATES
from pipelines.indexing import base as bases
from pipelines.indexing import build, delta, facts
from pipelines.indexing.build import Meta
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import Family, IndexSpec, Timeline, lineage
from pipelines.indexing.versions import Versions
from pipelines.ingest.producer import Producer
from pipelines.pins.changes import PIN_CHANGES
from pipelines.settings import Settings
from pipelines.users.follows import USER_FOLLOWS_INDEX
from pipelines.users.index import USER_EVENTS

DAY_MS = 86_400_000
HOT = "hot"
SIZES = (10, 100, 1_000)
PAGE = 100
SAMPLED = 6
PATIENCE_S = 60
Row = dict[str, Any]


class World(NamedTuple):
    """Records: pin → (version, time, price) in order; user → saves (event, time, pin); user → what is followed."""

    changes: dict[str, list[tuple[int, int, int]]]
    saves: dict[str, list[tuple[str, int, str]]]
    follows: dict[str, list[tuple[str, str, int]]]
    asked: dict[int, list[str]]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        followers=(100_000, "of the one pin that has many"),
        pins=(20_000, "pins, with a dozen statements each at most"),
        users=(20, "users of each size who are asked for"),
        seconds=(8, "for how long each size is asked for"),
        changes=(30, "changes of the pin with many followers"),
        seed=(1, "of the records"),
    )
    made = world(options)
    with harness.place("inbox", options.home) as settings:
        say("building the bases")
        sizes = {spec.name: publish(settings, spec, rows) for spec, rows in rows_of(made)}
        machine = harness.machine()
        load_s = events.start(settings)
        result = {"benchmark": "inbox", "followers": options.followers} | measured(settings, made, options)
        result |= pushed(settings.home / "pushed", options.followers, settings.streams.max_rows_per_epoch)
        say(json.dumps(result))  # the streams are still to come
        result |= fresh(settings, options)
        result |= {"pins": options.pins, "facts": sizes, "load_s": load_s}
    harness.publish(result | machine)
    return 0 if result["mismatches"] == result["unseen"] == 0 else 1


# ------------------------------------------------------------------------------------------------ records


def world(options: Any) -> World:
    """What was said, from numbers and a seed."""
    chance, now_ms = np.random.default_rng(options.seed), int(time.time() * 1000) - 60_000
    names = [HOT, *(f"p{number}" for number in range(options.pins))]
    changes = {
        pin: [
            (version, int(at), int(chance.integers(1, 4)) * 500_000)
            for version, at in enumerate(times(chance, int(chance.integers(1, 12)), now_ms), 1)
        ]
        for pin in names
    }
    friends = [f"friend{number}" for number in range(2_000)]
    saves = {
        user: [
            (f"e{number}", int(at), f"p{chance.integers(options.pins)}")
            for number, at in enumerate(times(chance, 5, now_ms))
        ]
        for user in friends
    }
    follows = {f"u{number}": [("pin", HOT, now_ms)] for number in range(options.followers)}
    asked = {size: [f"f{size}-{number}" for number in range(options.users)] for size in SIZES}
    for size, users in asked.items():
        of_users = size // 10
        for user in users:
            pins = chance.choice(options.pins, size - of_users - 1, replace=False)
            followed = [("pin", HOT), *(("pin", f"p{pin}") for pin in pins)]
            followed += [
                ("user", friends[one]) for one in chance.choice(len(friends), of_users, replace=False)
            ]
            since = now_ms - chance.integers(60 * DAY_MS, size=len(followed))
            follows[user] = [(*one, int(at)) for one, at in zip(followed, since, strict=True)]
    return World(changes, saves, follows, asked)


def times(chance: np.random.Generator, count: int, now_ms: int) -> list[int]:
    """So many different times of the last 90 days, in order."""
    return sorted({int(now_ms - at) for at in chance.integers(90 * DAY_MS, size=count)})


def rows_of(made: World) -> list[tuple[IndexSpec, Iterable[Row]]]:
    """The facts of three indices."""
    return [
        (
            USER_FOLLOWS_INDEX,
            (
                follow(user, kind, followed, since)
                for user, all_ in made.follows.items()
                for kind, followed, since in all_
            ),
        ),
        (
            PIN_CHANGES,
            (row for pin, said in made.changes.items() for one in said for row in change(pin, *one)),
        ),
        (USER_EVENTS, (save(user, *one) for user, all_ in made.saves.items() for one in all_)),
    ]


def follow(user: str, kind: str, followed: str, since_ms: int) -> Row:
    about = (kind[0] + followed).encode()
    named = {"pin_id" if kind == "pin" else "followed_user_id": followed, "version": 1}
    return fact("follows", user, about, 1, since_ms, named)


def change(pin: str, version: int, time_ms: int, price: int) -> list[Row]:
    """A statement of a pin's offer, and the first one of its catalogue, too."""
    said: dict[str, Row] = {"offer": {"price_usd_micros": price, "is_available": True}}
    if version == 1:
        said["catalogue"] = {"title": pin}
    return [
        fact(
            "changes",
            pin,
            f"{version:016x} {family}".encode(),
            version,
            time_ms,
            {"version": version, "family": family, "is_gone": False, **told},
        )
        for family, told in said.items()
    ]


def save(user: str, event: str, time_ms: int, pin: str) -> Row:
    return fact("interactions", user, event.encode(), 1, time_ms, {"pin_id": pin, "action": "save"})


def fact(family: str, key: str, about: bytes, version: int, time_ms: int, payload: Row) -> Row:
    return {
        "family": family,
        "identity": [key.encode(), about],
        "key": key.encode(),
        "id": about,
        "version": (version,),
        "content_hash": 1,
        "time_ms": time_ms,
        "payload": payload,
    }


def publish(settings: Settings, spec: IndexSpec, rows: Iterable[Row]) -> int:
    """A base of facts, served; how many there are."""
    versions = Versions(settings.paths.indices, spec.name)
    version, table = versions.new_version(lineage(spec)), facts.table(spec, rows)
    build.build_local(spec, table, versions.new_path(version), Meta(version, EMPTY))
    versions.publish(version)
    return int(table.num_rows)


# ------------------------------------------------------------------------------------------------ how quickly


def measured(settings: Settings, made: World, options: Any) -> dict[str, Any]:
    """Users of each size, with nothing beside."""
    found: dict[str, Any] = {}
    mismatches = 0
    for size, users in made.asked.items():
        say(f"users who follow {size}")
        asked = [harness.get(f"/v1/users/{user}/inbox") for user in users]
        answers = serving.ask(settings, asked, 1, options.seconds)
        if not answers:
            raise BenchmarkError("nothing was answered")
        p50, p99 = serving.in_ms(answers, 50, 99)
        found |= {
            f"inbox_p50_ms_{size}": p50,
            f"inbox_p99_ms_{size}": p99,
            f"asked_{size}": len(answers),
        }
        wanted = [expected(made, user)[:PAGE] for user in users]
        for number, answer in enumerate(answers):
            is_right = answer.status == 200 and told(answer.body) == wanted[number % len(users)]
            mismatches += not is_right
    return found | {"mismatches": mismatches}


def expected(made: World, user: str) -> list[tuple[Any, ...]]:
    """A user's whole inbox, newest first, in plain Python."""
    found: list[tuple[Any, ...]] = []
    for kind, followed, since in made.follows[user]:
        if kind == "user":
            found += [
                (at, "u", followed, event, pin) for event, at, pin in made.saves[followed] if at >= since
            ]
            continue
        before = None
        for version, at, price in made.changes[followed]:
            if at >= since and price != before:
                found.append((at, "p", followed, version, (before, price)))
            before = price
    return sorted(found, key=lambda one: one[:4], reverse=True)


def told(body: bytes) -> list[tuple[Any, ...]]:
    """What an answer says."""
    return [written(entry) for entry in orjson.loads(body)["entries"]]


def written(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    at = int(np.datetime64(entry["time"].rstrip("Z"), "ms").astype(np.int64))
    if entry["kind"] == "user":
        return (at, "u", entry["user_id"], entry["event_id"], entry["pin_id"])
    prices = [(c["from"], c["to"]) for c in entry["changes"] if c["field"] == "price_usd_micros"]
    return (at, "p", entry["pin_id"], entry["version"], *prices)


# ------------------------------------------------------------------------------------------------ how soon


def fresh(settings: Settings, options: Any) -> dict[str, Any]:
    """The pin with many followers changes, and a sample of them is asked for."""
    harness.start(settings, ["broker", "streams"])
    users = [f"u{number * (options.followers // SAMPLED)}" for number in range(SAMPLED)]
    seen: dict[tuple[str, int], float] = {}
    ending = threading.Event()
    failures: list[BaseException] = []
    watchers = [
        threading.Thread(target=watch, args=(settings, user, seen, ending, failures), daemon=True)
        for user in users
    ]
    sent: dict[int, float] = {}
    with Producer(settings) as producer:
        say("the streams begin")
        wait(settings, put(producer, 1_000, 7))
        for watcher in watchers:
            watcher.start()
        say(f"{options.changes} changes, one a second")
        for version in range(1_001, 1_001 + options.changes):
            sent[version] = time.perf_counter()
            position = put(producer, version, version)
            time.sleep(max(0.0, sent[version] + 1 - time.perf_counter()))
    wait(settings, position)
    deadline = time.monotonic() + PATIENCE_S
    wanted = {(user, version) for user in users for version in sent}
    while not wanted <= seen.keys() and time.monotonic() < deadline and not failures:
        time.sleep(0.05)
    ending.set()
    for watcher in watchers:
        watcher.join()
    if failures:
        raise BenchmarkError(f"watching failed: {failures[0]!r}")
    seconds = [seen[one] - sent[one[1]] for one in wanted & seen.keys()]
    p50, p99 = harness.percentiles(seconds, (50, 99))
    return {
        "fresh_mean_s": round(sum(seconds) / max(1, len(seconds)), 3),
        "fresh_p50_s": p50,
        "fresh_p99_s": p99,
        "unseen": len(wanted - seen.keys()),
        "timed": len(seconds),
        "writes_per_change": round(facts_in_delta(settings) / (1 + len(sent)), 2),
    }


def wait(settings: Settings, position: Position) -> None:
    """Until an inbox stands on what was sent."""
    at = {"min_position": position.token()}
    client.request_at(harness.serving_url(settings), "/v1/users/nobody/inbox", at, timeout_s=120)


def put(producer: Producer, version: int, price: int) -> Position:
    """The pin with many followers has another price."""
    said = {"price_usd_micros": price, "is_available": True}
    return producer.send_objects(PIN_UPDATES, [{"pin_id": HOT, "version": version, "offer": said}])


def watch(
    settings: Settings,
    user: str,
    seen: dict[tuple[str, int], float],
    ending: threading.Event,
    failures: list[BaseException],
) -> None:
    """Ask for the newest of a user's inbox, again and again, and note when each change is first there."""
    connection = http.client.HTTPConnection(settings.serving.host, settings.serving.port, timeout=30)
    try:
        while not ending.is_set():
            asked = time.perf_counter()
            connection.request("GET", f"/v1/users/{user}/inbox?limit=5")
            answer = connection.getresponse()
            body, at = answer.read(), time.perf_counter()
            if answer.status != 200:
                raise BenchmarkError(f"a watcher is answered {answer.status}: {body[:200]!r}")
            for entry in orjson.loads(body)["entries"]:
                seen.setdefault((user, entry.get("version", 0)), at)
            time.sleep(max(0.0, asked + POLL_S - time.perf_counter()))
    except BaseException as error:
        failures.append(error)
    finally:
        connection.close()


def facts_in_delta(settings: Settings) -> int:
    """How many facts the delta of changes has."""
    path = delta.table_path(settings.paths.delta, PIN_CHANGES.name, lineage(PIN_CHANGES))
    return sum(epoch.facts.num_rows for epoch in delta.Tailer(PIN_CHANGES, path).snapshot())


# ------------------------------------------------------------------------------------------------ written instead


def nothing(rows: Any, state: Any) -> Any:
    """No stream feeds the prototype: its facts are made here."""
    raise AssertionError(state)


PUSHED = IndexSpec(
    "pushed_inbox",
    (
        Family(
            "entries",
            pa.schema([("pin_id", pa.string()), ("version", pa.int64()), ("price_usd_micros", pa.int64())]),
            "pushed",
            nothing,
        ),
    ),
    Timeline(),
)


def pushed(folder: Path, followers: int, rows_per_epoch: int) -> dict[str, Any]:
    """One change as a fact for each follower: seconds to commit and to fold, and bytes; without making the facts."""
    say(f"one change written {followers:,} times")
    payload = {"pin_id": HOT, "version": 1, "price_usd_micros": 1}
    table = facts.table(
        PUSHED, (fact("entries", f"u{n}", b"p" + HOT.encode(), 1, 1, payload) for n in range(followers))
    )
    path = delta.table_path(folder, PUSHED.name, lineage(PUSHED))
    writer = delta.DeltaWriter(PUSHED, path)
    began = time.perf_counter()
    for epoch, start in enumerate(range(0, followers, rows_per_epoch)):
        before, after = (Position({"topic": {0: offset}}) for offset in (epoch, epoch + 1))
        part = table.slice(start, rows_per_epoch)
        writer.commit(delta.Marker("pushed", 1, epoch, before, after, part.num_rows), part)
    committed = time.perf_counter()
    overlay = Overlay(bases.empty(PUSHED), path, followers + 1)
    overlay.catch_up()
    folded = time.perf_counter()
    if overlay.view.overlay_facts != followers:
        raise BenchmarkError(f"{overlay.view.overlay_facts} facts were folded, not {followers}")
    return {
        "pushed_writes_per_change": followers,
        "pushed_commit_s": round(committed - began, 2),
        "pushed_fold_s": round(folded - committed, 2),
        "pushed_bytes": sum(file.stat().st_size for file in path.rglob("*.parquet")),
        "pushed_epochs": epoch + 1,
    }
