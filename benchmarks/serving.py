"""How quickly answers come: recommendations over 8 connections from a second process, while streams run.

Every user who has a history is asked for once (`first_*`: nothing is kept of them yet). Then each connection asks again
as soon as it is answered (`p50_ms`, `p99_ms`, `rps`). Then requests have their times, 320 a second, and an answer is
timed from when its request was due, so that a slow answer counts for those that it holds up, too (`paced_*`).
Meanwhile 100 events a second go through Kafka into the users' timelines. Each answer is checked after it was timed: its
user, ten different pins in falling order of score. At the end some users are asked again, and held against an
independent solve in numpy. batchGet of 100 documents is timed in the same way.
"""

from __future__ import annotations

import collections
import itertools
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.freshness import Load, await_position, timeline
from benchmarks.harness import BenchmarkError, Timed, say
from jobs import client, demo
from pipelines.settings import Settings

BATCH = 100
SAMPLED = 20
FIRST_S = 300.0
"""The first round through the users ends by itself, or after this."""
K = 10
LIKED_EACH = 3
"""Each so-manieth place is an interest's (docs/patterns.md)."""


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        seconds=(30, "how long recommendations are asked for"),
        per_second=(320, "recommendations asked for a second where they have their times"),
        batch_seconds=(10, "how long batchGet is asked for"),
        connections=(8, "how many connections ask at once"),
        batch_connections=(1, "how many connections ask for documents"),
        rate=(100, "events a second through the streams meanwhile"),
        fraction=(1.0, "share of the real input in the base"),
    )
    with harness.place("serving", options.home) as settings:
        harness.prepare_base(settings, options.fraction)
        harness.start(settings, ["broker", "streams", "serving"])
        harness.await_ready(settings)
        machine = harness.machine()
        users, pins = population(settings)
        paths = [f"/v1/users/{client.quote(user)}/recommendations?k={K}" for user in users]
        requests = [harness.get(path) for path in paths]
        events = Load(settings, f"{int(time.time()):x}", options.rate, 1800, users, pins)
        stopper = Background(events)
        with stopper:
            say(f"each of {len(users)} users once")
            first = ask(settings, requests, options.connections, FIRST_S, is_once=True)
            say(f"as many as there are answers to, over {options.connections} connections")
            answers = ask(settings, requests, options.connections, options.seconds)
            say(f"{options.per_second} recommendations a second for {options.seconds} s")
            paced = ask(settings, requests, options.connections, options.seconds, options.per_second)
            say(f"batchGet of {BATCH} for {options.batch_seconds} s")
            batches = batch_requests(pins)
            documents = ask(settings, batches, options.batch_connections, options.batch_seconds)
        await_position(settings, events.position)
        say("checking the answers")
        errors = check_recommendations([*first, *answers, *paced], set(users)) + check_batches(
            documents, set(pins)
        )
        errors += sum(not is_exact(settings, user, events.position.token()) for user in users[:SAMPLED])
    harness.publish(result(options, first, answers, paced, documents, errors, stopper.sent) | machine)
    return 0 if errors == 0 else 1


def result(
    options: Any,
    first: list[Timed],
    answers: list[Timed],
    paced: list[Timed],
    documents: list[Timed],
    errors: int,
    events: int,
) -> dict[str, Any]:
    """The line that is printed."""
    p50, p90, p99, worst = in_ms(answers, 50, 90, 99, 100)
    first_p50, first_p99 = in_ms(first, 50, 99)
    paced_p50, paced_p99 = in_ms(paced, 50, 99)
    batch_p50, batch_p99 = in_ms(documents, 50, 99)
    return {
        "benchmark": "serving",
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "max_ms": worst,
        "rps": per_second(answers),
        "errors": errors,
        "paced_p50_ms": paced_p50,
        "paced_p99_ms": paced_p99,
        "paced_rps": per_second(paced),
        "first_p50_ms": first_p50,
        "first_p99_ms": first_p99,
        "first_rps": per_second(first),
        "batch_p50_ms": batch_p50,
        "batch_p99_ms": batch_p99,
        "requests": len(answers),
        "batches": len(documents),
        "connections": options.connections,
        "batch_connections": options.batch_connections,
        "events_per_s": options.rate,
        "events_sent": events,
        "base_fraction": options.fraction,
        "beside": [
            "broker",
            "archive stream",
            "2 hot streams",
            "the process that asks",
            "the process that sends",
        ],
    }


def in_ms(answers: list[Timed], *wanted: float) -> list[float]:
    """Percentiles of the times of answers."""
    return harness.percentiles([a.seconds for a in answers], wanted, 1000, 2)


def per_second(answers: list[Timed]) -> float:
    """Answers a second, from the first request to the last answer."""
    span = max(a.at + a.seconds for a in answers) - min(a.at for a in answers)
    return round(len(answers) / span, 1)


class Background:
    """Sends events for as long as it is open."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.sent = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: BaseException | None = None

    def _run(self) -> None:
        try:
            self.load.run()
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.load.end()
        self._thread.join(30)
        self.sent = self.load.sent
        if self._failure is not None:
            raise BenchmarkError(f"sending failed: {self._failure!r}")


def population(settings: Settings) -> tuple[list[str], list[str]]:
    """Users with a history, and pins, from the base's own files, in a random order that is the same each time."""
    return ids(settings, "user_events", "interactions"), ids(settings, "pins", "catalogue")


def ids(settings: Settings, index: str, family: str) -> list[str]:
    """The keys that have rows of a family in the served base."""
    import pyarrow as pa
    import pyarrow.compute as pc

    folder = settings.paths.indices / index
    version = served_version(settings, index)
    found: list[str] = []
    for file in sorted((folder / version).glob("*/keys.arrow")):
        with pa.memory_map(str(file)) as mapped:
            keys = pa.ipc.open_file(mapped).read_all()
        has_rows = pc.less(keys.column(f"start_{family}"), keys.column(f"end_{family}"))
        found += [key.decode() for key in keys.column("key").filter(has_rows).to_pylist()]
    chosen = sorted(found)
    random.Random(3).shuffle(chosen)
    return chosen


def ask(
    settings: Settings,
    requests: Sequence[bytes],
    connections: int,
    seconds: float,
    per_s: float = 0.0,
    *,
    is_once: bool = False,
) -> list[Timed]:
    """Asks from a process of its own; each connection goes through the requests from another place on.

    ``is_once``: the connections share the requests, and end with them.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        arguments = (
            settings.serving.host,
            settings.serving.port,
            list(requests),
            connections,
            seconds,
            per_s,
            is_once,
        )
        return pool.apply(_ask_here, arguments)


def _ask_here(
    host: str,
    port: int,
    requests: list[bytes],
    connections: int,
    seconds: float,
    per_s: float,
    is_once: bool,
) -> list[Timed]:
    def from_place(number: int) -> Iterator[bytes]:
        if is_once:
            return iter(requests[number::connections])
        start = number * len(requests) // connections
        return itertools.cycle(requests[start:] + requests[:start])

    places = [from_place(number) for number in range(connections)]
    return harness.drive(host, port, places, seconds, per_s)


def batch_requests(pins: list[str]) -> list[bytes]:
    """Requests for 100 random documents each."""
    chance = random.Random(5)
    bodies = [{"pin_ids": chance.sample(pins, min(BATCH, len(pins)))} for _ in range(200)]
    return [harness.post("/v1/pins:batchGet", body) for body in bodies]


def check_recommendations(answers: list[Timed], users: set[str]) -> int:
    """How many answers are wrong: not 200, another user, not ten different pins in falling order.

    Each third place is an interest's, where the user has any: it stands for itself.

    Raises:
        BenchmarkError: nothing was answered.
    """
    if not answers:
        raise BenchmarkError("no recommendation was answered")
    errors = 0
    for answer in answers:
        body = json.loads(answer.body) if answer.status == 200 else {}
        items = body.get("recommendations", [])
        is_mixed = bool(body and body["basis"].get("interests"))
        scores = [
            item["score"] for at, item in enumerate(items, 1) if not (is_mixed and at % LIKED_EACH == 0)
        ]
        is_whole = len(items) == len({item["pin_id"] for item in items}) == K and body["user_id"] in users
        errors += not (is_whole and scores == sorted(scores, reverse=True))
    return errors


def is_exact(settings: Settings, user: str, position: str) -> bool:
    """Whether an answer has the scores of an independent solve, and nothing that the user bought."""
    base = harness.serving_url(settings)
    path = f"/v1/users/{client.quote(user)}/recommendations"
    body = client.request_at(base, path, {"k": K, "min_position": position}).body
    events = timeline(base, user)
    served = {item["pin_id"]: item["score"] for item in body["recommendations"]}
    if served.keys() & {event["pin_id"] for event in events if event["action"] == "purchase"}:
        return False
    if body["basis"]["kind"] != "folded":
        return True
    exact = demo.Items(settings.paths.indices / "pins" / served_version(settings, "pins")).scores(events)
    return all(
        pin in exact and abs(score - exact[pin]) <= demo.TOLERANCE * max(1e-9, abs(score))
        for pin, score in served.items()
    )


def served_version(settings: Settings, index: str) -> str:
    """The base version that the fleet's pointer names."""
    return str(json.loads((settings.paths.indices / index / "pointer.json").read_text())["version"])


def check_batches(documents: list[Timed], pins: set[str]) -> int:
    """How many answers are not 200, or lack a document.

    Raises:
        BenchmarkError: nothing was answered.
    """
    if not documents:
        raise BenchmarkError("no batchGet was answered")
    errors = 0
    for answer in documents:
        found = json.loads(answer.body)["documents"] if answer.status == 200 else []
        counted = collections.Counter(document["pin_id"] for document in found if document["catalogue"])
        errors += not (len(counted) == min(BATCH, len(pins)) and set(counted) <= pins)
    return errors
