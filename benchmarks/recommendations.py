"""How soon an action changes what its user is recommended: from the producer's call to the answer over HTTP.

Everything runs, and `--rate` events a second of others go through the streams. Meanwhile a few users at a time, each
with a history, do two things. They hide the pin that they are recommended first: the time ends with the answer that no
longer has it (`hide_…`). And they look at three pins of a category: the time ends with the answer that names it as an
interest, and gives each third place to it (`interest_…`); that takes the way through the stream of patterns. All
answers are looked at: a pin that went and comes back, or another category's pin in an interest's place, is an error.
"""

from __future__ import annotations

import http.client
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

from benchmarks import harness, serving
from benchmarks.freshness import POLL_S, Load, await_position
from benchmarks.harness import BenchmarkError, say
from benchmarks.serving import LIKED_EACH, Background
from jobs import client
from pipelines import indices
from pipelines.contracts import USER_INTERACTIONS
from pipelines.indexing.documents import DocumentsView
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings

WATCHERS = 3
K = 12
LOOKED_AT = 3
"""Views of one category that make an interest in it (`category_browser` in conf/patterns.yaml)."""
PATIENCE_S = 30.0
Answer = dict[str, Any]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        rate=(200, "events a second of others"),
        seconds=(60, "for how long"),
        fraction=(1.0, "share of the real input in the base"),
    )
    with harness.place("recommendations", options.home) as settings:
        harness.prepare_base(settings, options.fraction)
        harness.start(settings, ["broker", "streams", "serving"])
        harness.await_ready(settings)
        machine = harness.machine()
        users, pins = serving.population(settings)
        others = Load(settings, f"{int(time.time()):x}", options.rate, 1800, users[len(users) // 2 :], pins)
        by_category = categories(settings, pins)
        watchers = [
            Watcher(settings, users[number : len(users) // 2 : WATCHERS], by_category, number)
            for number in range(WATCHERS)
        ]
        with Background(others) as background:
            say("the streams begin")
            time.sleep(5)
            await_position(settings, others.position)
            say(f"actions for {options.seconds} s")
            deadline = time.monotonic() + options.seconds
            threads = [threading.Thread(target=one.run, args=(deadline,), daemon=True) for one in watchers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    for one in watchers:
        if one.failure is not None:
            raise BenchmarkError(f"watching failed: {one.failure!r}")
    harness.publish(result(options, watchers, background.sent) | machine)
    return 0 if not any(one.errors or one.unseen for one in watchers) else 1


def result(options: Any, watchers: Sequence[Watcher], sent: int) -> dict[str, Any]:
    """The line that is printed."""
    hides = [seconds for one in watchers for seconds in one.hides]
    interests = [seconds for one in watchers for seconds in one.interests]
    both = [*hides, *interests]
    found: dict[str, Any] = {"benchmark": "recommendations"}
    for name, seconds in (("fresh", both), ("hide", hides), ("interest", interests)):
        p50, p99 = harness.percentiles(seconds, (50, 99))
        mean = round(sum(seconds) / max(1, len(seconds)), 3)
        found |= {f"{name}_mean_s": mean, f"{name}_p50_s": p50, f"{name}_p99_s": p99}
    return found | {
        "timed": len(both),
        "unseen": sum(one.unseen for one in watchers),
        "errors": sum(one.errors for one in watchers),
        "answers": sum(one.answers for one in watchers),
        "events_per_s": options.rate,
        "events_sent": sent,
        "base_fraction": options.fraction,
        "beside": ["broker", "archive stream", "6 hot streams", "the process that sends and asks"],
    }


def categories(settings: Settings, pins: Sequence[str]) -> dict[str, list[str]]:
    """Category → pins of it, of those that have many."""
    view = indices.overlay(settings, "pins").view
    assert isinstance(view, DocumentsView)
    found: dict[str, list[str]] = {}
    chosen = [pin.encode() for pin in pins[:5_000]]
    for pin, document in zip(chosen, view.get(chosen, ("catalogue",)), strict=True):
        category = document and document["catalogue"].get("category")
        if category:
            found.setdefault(category, []).append(pin.decode())
    many = {category: of_it for category, of_it in sorted(found.items()) if len(of_it) >= 4 * K}
    if len(many) < 2:
        raise BenchmarkError("the catalogue has too few categories with many pins")
    return many


class Watcher:
    """One user after the other: does something, and asks until the answer knows it."""

    def __init__(
        self, settings: Settings, users: Sequence[str], by_category: dict[str, list[str]], number: int
    ) -> None:
        self.users, self.by_category = users, by_category
        self.hides: list[float] = []
        self.interests: list[float] = []
        self.unseen = self.errors = self.answers = 0
        self.failure: BaseException | None = None
        self._settings = settings
        self._chance = random.Random(number)
        self._ids = (f"watched-{int(time.time()):x}-{number}-{at}" for at in itertools.count())

    def run(self, deadline: float) -> None:
        """Goes on until then."""
        place = self._settings.serving
        connection = http.client.HTTPConnection(place.host, place.port, timeout=30)
        try:
            with Producer(self._settings) as producer:
                for user in itertools.takewhile(lambda _: time.monotonic() < deadline, self.users):
                    self._act(connection, producer, user)
        except BaseException as error:
            self.failure = error
        finally:
            connection.close()

    def _act(self, connection: http.client.HTTPConnection, producer: Producer, user: str) -> None:
        before = self._asked(connection, user)
        hidden = before["recommendations"][0]["pin_id"]

        def is_hidden(answer: Answer) -> bool:
            return hidden not in shown(answer)

        self._timed(connection, producer, user, [(hidden, "hide", None)], is_hidden, self.hides)
        category = self._chance.choice(list(self.by_category))
        looked_at = [
            (pin, "view", category) for pin in self._chance.sample(self.by_category[category], LOOKED_AT)
        ]

        def has_interest(answer: Answer) -> bool:
            if hidden in shown(answer):
                self.errors += 1
            interests = answer["basis"].get("interests", ())
            if [one["category"] for one in interests] != [category]:
                return False
            self.errors += any(
                one["catalogue"]["category"] != category
                for one in answer["recommendations"][LIKED_EACH - 1 :: LIKED_EACH]
            )
            return True

        self._timed(connection, producer, user, looked_at, has_interest, self.interests)

    def _timed(
        self,
        connection: http.client.HTTPConnection,
        producer: Producer,
        user: str,
        actions: Sequence[tuple[str, str, str | None]],
        is_known: Callable[[Answer], bool],
        seconds: list[float],
    ) -> None:
        """Sends actions and asks until the answer knows them."""
        now_ms = time.time_ns() // 1_000_000
        events = [
            {"user_id": user, "event_id": next(self._ids), "pin_id": pin, "action": action}
            | {"event_time": now_ms}
            | ({} if category is None else {"category": category})
            for pin, action, category in actions
        ]
        began = time.perf_counter()
        producer.send_objects(USER_INTERACTIONS, events)
        for answer, at in self._answers(connection, user, began):
            if is_known(answer):
                seconds.append(at - began)
                return
        self.unseen += 1

    def _answers(
        self, connection: http.client.HTTPConnection, user: str, began: float
    ) -> Iterator[tuple[Answer, float]]:
        """An answer each 35 ms, and when it was there, until patience ends."""
        while (asked := time.perf_counter()) < began + PATIENCE_S:
            answer = self._asked(connection, user)
            yield answer, time.perf_counter()
            time.sleep(max(0.0, asked + POLL_S - time.perf_counter()))

    def _asked(self, connection: http.client.HTTPConnection, user: str) -> Answer:
        connection.request("GET", f"/v1/users/{client.quote(user)}/recommendations?k={K}")
        reply = connection.getresponse()
        body = reply.read()
        if reply.status != 200:
            raise BenchmarkError(f"a watcher is answered {reply.status}: {body[:200]!r}")
        self.answers += 1
        answer: Answer = orjson.loads(body)
        if len(shown(answer)) != K:
            self.errors += 1
        return answer


def shown(answer: Answer) -> set[str]:
    """The pins of an answer."""
    return {one["pin_id"] for one in answer["recommendations"]}
