"""The process `ads`: the topic `ads-changes` into the repository, and from there to whoever waits for changes.

Belongs here: the threads, what wakes them, what happens when one fails, housekeeping, and measuring how far behind each
is. Does not belong here: what they do (`consumer`, `publisher`, `bypass`), and what calls do (`calls`).

Each part has a thread of its own, and begins anew by itself: one whose broker or store is away holds up no other, and
no call. Publisher and bypass are woken by each commit of this process; what others write they find within a second.

Run it with `python -m pipelines.ads.service`; one at a time writes a repository.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from fastapi import FastAPI

from pipelines import interpreter, logs
from pipelines.ads import bypass, calls, consumer, publisher, repository, updater
from pipelines.ads.metrics import TOPIC, Metrics
from pipelines.contracts import ADS_BUDGETS, ADS_CHANGES
from pipelines.errors import TidemarkError
from pipelines.ingest import broker, http
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings, load

KEEP_CHANGES_S = 3_600
"""For so long changes stay that everybody has acknowledged, for a person to look at."""
KEEP_TRANSACTIONS_S = 7 * 86_400
"""For so long it is known that a transaction was written: as long as Kafka may bring its records again by default."""

_THREADS = 16
_LOOK_S, _HOUSEKEEPING_S, _MEASURE_S = 1.0, 60.0, 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
log = logging.getLogger("pipelines.ads.service")  # which is run as __main__, too


class Ads:
    """The store, the producer and the threads of a process; close it.

    Raises:
        RepositoryError: The repository cannot be opened.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.registry, self.requests = self.metrics.registry, self.metrics.requests
        self.store = repository.opened(settings)
        publisher.subscribe(self.store)
        bypass.subscribe(self.store)
        self.producer = Producer(settings)
        self.sent = publisher.Sent()
        self.threads = ThreadPoolExecutor(_THREADS, "ads-call")
        self._is_over = threading.Event()
        self._woken = {name: threading.Event() for name in (publisher.SUBSCRIBER, bypass.SUBSCRIBER)}
        parts: dict[str, Callable[[], None]] = {
            "updater": self._update,
            "publisher": self._publish,
            "bypass": self._bypass,
            "housekeeping": self._keep_house,
            "measuring": self._measure,
        }
        self._parts = [
            threading.Thread(target=self._restarting, args=(name, run), name=name, daemon=True)
            for name, run in parts.items()
        ]
        for part in self._parts:
            part.start()

    def close(self) -> None:
        """End every part where it stands."""
        self._is_over.set()
        self.tell()
        for part in self._parts:
            part.join()
        self.threads.shutdown()
        self.producer.close()
        self.store.close()

    def tell(self) -> None:
        """Something was committed that others wait for."""
        for woken in self._woken.values():
            woken.set()

    def what_is_missing(self) -> str | None:
        """The broker or the repository, if it does not answer."""
        if not self.producer.is_connected():
            return "the broker does not answer"
        try:
            with self.store.reading():
                return None
        except TidemarkError as error:
            return error.what

    def _restarting(self, name: str, run: Callable[[], None]) -> None:
        """Run a part until it is over; one that fails begins anew, after a pause that grows while it fails at once."""
        pause_s = _FIRST_PAUSE_S
        while not self._is_over.is_set():
            began = time.monotonic()
            try:
                run()
            except TidemarkError as error:
                log.warning("%s begins anew: %s", name, error.what)
            except Exception:
                log.exception("%s begins anew", name)
            else:
                return
            self.metrics.failures.labels(name).inc()
            has_run_well = time.monotonic() - began > 2 * _LONGEST_PAUSE_S
            pause_s = _FIRST_PAUSE_S if has_run_well else min(2 * pause_s, _LONGEST_PAUSE_S)
            self._is_over.wait(pause_s)

    def _update(self) -> None:
        for batch in consumer.follow(self.settings, self.store, self._is_over.is_set):
            if batch.changes:
                self.tell()
            self.metrics.count(TOPIC, batch.records - batch.refused.total(), list(batch.refused.elements()))
            self.metrics.observe_commit(batch.changes)

    def _publish(self) -> None:
        broker.ensure_topics(self.settings, publisher.TOPICS)
        self.sent.begin(broker.ends(self.settings, (route.topic for route in publisher.ROUTES)))

        def once() -> int:
            published = publisher.publish(self.store, self.producer)
            self.sent.add(published)
            self.metrics.count_keys(published.keys)
            self.metrics.observe_keys(published.changes)
            return published.seq

        self._after_commits(self._woken[publisher.SUBSCRIBER], once)

    def _bypass(self) -> None:
        broker.ensure_topics(self.settings, [ADS_BUDGETS.topic])

        def once() -> int:
            sent = bypass.send(self.store, self.producer)
            self.metrics.count_keys({ADS_BUDGETS.topic: sent.records})
            return sent.seq

        self._after_commits(self._woken[bypass.SUBSCRIBER], once)

    def _after_commits(self, woken: threading.Event, once: Callable[[], int]) -> None:
        """Do something after each commit, and at once again where it may not have come to the last change."""
        seen = -1
        while not self._is_over.is_set():
            woken.clear()  # before looking: a commit from here on is seen, or wakes
            seq = once()
            if seq - seen < repository.CHANGES_AT_ONCE:  # they are counted without gaps
                woken.wait(_LOOK_S)
            seen = seq

    def _keep_house(self) -> None:
        while not self._is_over.wait(_HOUSEKEEPING_S):
            now_ms = time.time_ns() // 1_000_000
            with self.store.writing() as connection:
                repository.drop_changes(connection, now_ms - 1000 * KEEP_CHANGES_S)
                updater.forget(connection, now_ms - 1000 * KEEP_TRANSACTIONS_S)

    def _measure(self) -> None:
        parts = ("updater", *self._woken)
        try:
            while not self._is_over.wait(_MEASURE_S):
                for part, count in zip(parts, (self._records_behind(), *self._changes_behind()), strict=True):
                    self.metrics.behind.labels(part).set(count)
                with self.store.reading() as connection:
                    for state, count in updater.held_by_state(connection).items():
                        self.metrics.held.labels(state).set(count)
        finally:
            for part in parts:
                self.metrics.behind.labels(part).set(math.nan)

    def _records_behind(self) -> int:
        topic_id = broker.topic_ids(self.settings, [ADS_CHANGES.topic])[ADS_CHANGES.topic]
        reached = consumer.position(self.store).topics.get(topic_id, {})
        known = broker.offsets(self.settings, ADS_CHANGES.topic)
        return sum(end - max(first, reached.get(place, 0)) for place, (first, end) in known.items())

    def _changes_behind(self) -> list[int]:
        with self.store.reading() as connection:
            last = repository.last_change(connection)
            return [last - repository.seen(connection, name) for name in self._woken]


def create_app(settings: Settings) -> FastAPI:
    """The service; its parts run as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = Ads(settings)
        yield
        app.state.service.close()

    app = FastAPI(title="Tidemark ads", version="1", lifespan=lifespan, redoc_url=None)
    http.add(app, calls.endpoints(), log)
    return app


def main() -> None:
    """Serve until the process is told to end."""
    logs.configure("ads")
    settings = load()
    interpreter.take_turns()  # while a call sends the keys of a backfill, small changes must go on
    interpreter.collect_rarely()
    options: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
    uvicorn.run(create_app(settings), host=settings.ads.host, port=settings.ads.port, **options)


if __name__ == "__main__":
    main()
