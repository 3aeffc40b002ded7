"""The index `ads` served under the newest entries of `ads-budgets`: a pause counts within a second.

Belongs here: reading the topic from its beginning, and a follower whose view is the index's under what was read. Does
not belong here: what an entry does to a document (`pipelines.ads.overrides`), and sending it (`pipelines.ads.bypass`).

A broker that is away takes nothing down: ads are served as their documents and the entries read so far say, and the
status says that nothing is read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import OFFSET_BEGINNING as BEGINNING
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from pipelines.ads import overrides, retrieval
from pipelines.ads.index import ADS
from pipelines.ads.overrides import Entries, Entry
from pipelines.contracts import ADS_BUDGETS, Refusal
from pipelines.errors import TidemarkError
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.position import Position
from pipelines.indexing.replica import Replica, Served
from pipelines.ingest import broker
from pipelines.settings import Settings

TOPIC = ADS_BUDGETS.topic
AT_ONCE = 1_000
POLL_S = 0.1
"""How long it waits for an entry before it looks whether the index has moved."""
LONGEST_REST_S = 0.1
RETRY_S = 1.0
log = logging.getLogger(__name__)
_silent = logging.getLogger("tidemark.kafka")


def under_entries(replica: Replica, settings: Settings) -> Replica:
    """The same replica with the index `ads` served under the entries."""
    followers = dict(replica.followers)
    followers[ADS.name] = Bypass(followers[ADS.name], settings)
    return Replica(followers)


class Bypass:
    """`Served` over the follower of `ads`: one thread reads entries, another keeps the view under them."""

    def __init__(self, follower: Served, settings: Settings) -> None:
        self.topics, self.versions, self.meter = follower.topics, follower.versions, follower.meter
        self._follower, self._settings = follower, settings
        self._taken = deque[Entry]()  # left by the thread that reads; all else is the other's
        self._entries, self._fresh = Entries(), list[Entry]()
        self._served = overrides.plain(_documents(follower))
        self._is_under_entries = False
        self._is_at_end, self._is_read, self._refused = False, False, 0
        self._reading_error: str | None = None
        self._woken, self._stopping = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._read, name="read-bypass", daemon=True),
            threading.Thread(target=self._keep, name="keep-bypass", daemon=True),
        ]

    def start(self) -> None:
        """Start following and reading."""
        self._follower.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop all threads and wait for them."""
        self._stopping.set()
        self._woken.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)
        self._follower.stop()

    @property
    def view(self) -> DocumentsView:
        """The view as of now, under the entries read so far."""
        return self._served.view

    @property
    def is_stale(self) -> bool:
        """As the follower says."""
        return self._follower.is_stale

    @property
    def with_delta(self) -> bool:
        """As the follower says; without the delta entries do not count either."""
        return self._follower.with_delta

    @property
    def is_ready(self) -> bool:
        """Whether the follower is, and the view is under all that the topic had, or it cannot be read now."""
        is_caught_up = self._served.plain.base is self._follower.view.base
        is_read = self._is_read or self._reading_error is not None
        return self._follower.is_ready and is_caught_up and is_read

    def covers(self, position: Position) -> bool:
        """Whether the view stands at or after a position, as far as it is about this index."""
        return self.view.position.covers(position.restricted_to(self.topics))

    def wait(self, position: Position, timeout_s: float) -> bool:
        """Wait until the view covers a position; returns whether it does."""
        deadline = time.monotonic() + timeout_s
        while not self.covers(position):
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S / 10)
        return True

    def status(self) -> dict[str, Any]:
        """What is served, and how far the entries are read, as plain values."""
        return {
            **self._follower.status(),
            "is_ready": self.is_ready,
            "bypass_entries": len(self._entries),
            "bypass_overridden": len(self._served.newer),
            "bypass_refused": self._refused,
            "is_bypass_read": self._is_read and self._reading_error is None,
            "bypass_error": self._reading_error,
        }

    def take(self, value: bytes | None, broker_time_ms: int) -> None:
        """Take a record of the topic; the view is under it soon. One that is no entry is counted. Never waits."""
        entry = overrides.read(value, broker_time_ms)
        if isinstance(entry, Refusal):
            self._refused += 1
            log.warning("%s has a record that is no entry: %s", TOPIC, entry.detail)
            return
        self._taken.append(entry)
        self._woken.set()

    def refresh(self) -> None:
        """Bring the view under the entries up to date; for one thread at a time."""
        is_at_end = self._is_at_end  # looked at before what was taken, which is then all up to there
        for _ in range(len(self._taken)):
            entry = self._taken.popleft()
            if self._entries.add(entry):
                self._fresh.append(entry)
        view, is_under_entries = _documents(self._follower), self._follower.with_delta
        before = self._served if self._is_under_entries else None
        if before is None or before.plain is not view or not is_under_entries or self._fresh:
            if self._served.plain.base is not view.base:
                retrieval.warm(view)  # or the first request would wait for it
            if is_under_entries:
                self._served = overrides.over(view, self._entries, self._fresh, before)
            else:
                self._served = overrides.plain(view)
            self._is_under_entries, self._fresh = is_under_entries, []
        self._is_read = is_at_end

    def _keep(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            began = time.monotonic()
            try:
                self.refresh()
            except Exception:
                log.exception(
                    "ads are served as they were: they cannot be read under the entries of %s", TOPIC
                )
                self._stopping.wait(RETRY_S)
            # Answering needs the interpreter, too: refreshing takes half of the time at most, or it gets late.
            self._stopping.wait(min(time.monotonic() - began, LONGEST_REST_S))
            self._woken.wait(POLL_S)

    def _read(self) -> None:
        """Read until stopped; begin anew where that fails."""
        while not self._stopping.is_set():
            try:
                self._follow()
            except broker.TopicMissing:
                self._is_at_end, self._reading_error = True, None  # nobody sends entries yet
            except (TidemarkError, KafkaException) as error:
                self._failed(str(error))
            except Exception as error:
                log.exception("reading %s failed", TOPIC)
                self._failed(str(error))
            self._stopping.wait(RETRY_S)

    def _follow(self) -> None:
        servers = self._settings.kafka.bootstrap_servers
        if not broker.is_ready(self._settings):  # asking it for more would take as long as a request may
            raise broker.BrokerError("no broker answers", where=servers, remedy="it is tried again")
        broker.topic_ids(self._settings, [TOPIC])
        partitions = broker.offsets(self._settings, TOPIC)
        unread = set(partitions)
        with self._reading(partitions) as consumer:
            while not self._stopping.is_set():
                first = consumer.poll(POLL_S)
                # Then what is there: `consume` alone would wait until there are so many.
                for message in [] if first is None else [first, *consumer.consume(AT_ONCE - 1, 0)]:
                    error = message.error()
                    if error is None:
                        self.take(message.value(), message.timestamp()[1])
                    elif error.code() == KafkaError._PARTITION_EOF:
                        unread.discard(message.partition() or 0)
                    elif not error.retriable():
                        raise KafkaException(error)
                self._is_at_end = self._is_at_end or not unread
                if self._reading_error is not None and broker.is_ready(self._settings):
                    self._reading_error = None

    @contextmanager
    def _reading(self, partitions: Iterable[int]) -> Iterator[Consumer]:
        """A consumer of all partitions, each from its beginning; it commits nothing, for each process reads all."""
        consumer = Consumer(
            {
                "bootstrap.servers": self._settings.kafka.bootstrap_servers,
                "group.id": "tidemark-bypass",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "error_cb": lambda error: self._failed(error.str()),
            },
            logger=_silent,
        )
        try:
            consumer.assign([TopicPartition(TOPIC, partition, BEGINNING) for partition in partitions])
            yield consumer
        finally:
            consumer.close()

    def _failed(self, error: str) -> None:
        if self._reading_error is None:
            log.warning("%s cannot be read, and is tried again: %s", TOPIC, error)
        self._reading_error = error


def _documents(follower: Served) -> DocumentsView:
    view = follower.view
    assert isinstance(view, DocumentsView)
    return view
