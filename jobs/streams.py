"""The streaming process, `python -m jobs.streams`: one Spark session that hosts the archive and every hot stream.

Here: starting and stopping each stream as the switchboard (`jobs.controls`) asks, trying again when one fails, saying
how each is doing, and copying epoch markers to `ops.epochs`. Not here: what a stream computes (`pipelines`).

Each stream has a thread of its own, so that one that fails, or waits for a broker that is away, holds up no other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.controls import RUNNING, STOPPED, Controls

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.streaming import StreamingQuery

    from pipelines.settings import Settings

log = logging.getLogger("tidemark.streams")

POLL_S = 0.5
MARKERS_EVERY_S = 60.0
LONGEST_PAUSE_S = 30.0
HEALTHY_AFTER_S = 60.0
GOODBYE_S = 30.0


class Hosted(NamedTuple):
    """A stream by name, and how its query is begun (each time anew: from its checkpoint, or as a new incarnation)."""

    name: str
    begin: Callable[[], StreamingQuery]


class Runner(threading.Thread):
    """Keeps one stream as it is wanted, until told to end."""

    def __init__(self, hosted: Hosted, board: Controls, ending: threading.Event) -> None:
        super().__init__(name=f"stream-{hosted.name}", daemon=True)
        self.hosted, self.board, self.ending = hosted, board, ending
        self.query: StreamingQuery | None = None
        self.failures = 0
        self.state: dict[str, Any] = {"state": "starting", "detail": ""}

    def run(self) -> None:
        while not self.ending.is_set():
            pause = POLL_S
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - whatever it is, this stream alone waits and tries again
                self.failures += 1
                pause = min(2.0 ** (self.failures - 1), LONGEST_PAUSE_S)
                detail = first_line(error)
                log.warning("%s failed (%d), again in %.0f s: %s", self.hosted.name, self.failures, pause, detail)
                log.debug("%s", self.hosted.name, exc_info=error)
                self.state = {"state": "failing", "detail": detail, "failures": self.failures}
                self._forget_query()
            self.ending.wait(pause)
        self._end_query()

    def _turn(self) -> None:
        if not self.board.should_run(self.hosted.name):
            self._end_query()
            self.state = {"state": STOPPED, "detail": "by request"}
            return
        if self.query is None:
            self.state = {**self.state, "state": "starting" if not self.failures else "failing"}
            self.query = self.hosted.begin()
            self.began = time.monotonic()
            log.info("%s runs", self.hosted.name)
        if not self.query.isActive:
            raise self.query.exception() or RuntimeError("the query ended by itself")
        if time.monotonic() - self.began > HEALTHY_AFTER_S:
            self.failures = 0
        self.state = {"state": RUNNING, "detail": "", "failures": self.failures, **progress(self.query)}

    def _end_query(self) -> None:
        if self.query is not None:
            log.info("%s stops", self.hosted.name)
            with contextlib.suppress(Exception):
                self.query.stop()
        self._forget_query()

    def _forget_query(self) -> None:
        self.query = None


def progress(query: StreamingQuery) -> dict[str, Any]:
    """What a glance at the newest epoch shows."""
    last = query.lastProgress
    if last is None:
        return {}
    return {
        "epoch": last["batchId"],
        "rows": last["numInputRows"],
        "duration_ms": dict(last["durationMs"]).get("triggerExecution"),
        "at": last["timestamp"],
    }


def first_line(error: BaseException) -> str:
    """The telling line of an error, without Java's and Python's traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith(("Caused by:", "pipelines."))]
    return f"{type(error).__name__}: {(causes or lines or ['no message'])[-1 if causes else 0][:400]}"
