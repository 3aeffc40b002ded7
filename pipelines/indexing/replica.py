"""A replica: the views that a serving process reads, kept fresh and swapped to new bases.

Belongs here: the threads that follow pointers and deltas of each index. HTTP is ``serving``'s. A swap opens the new
base and folds its delta beside the old view, and replaces the pair only when it is as fresh: no gap, no double count,
no torn read. A base that cannot be opened leaves the old view where it is, and says why.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipelines import failpoints
from pipelines.errors import TidemarkError
from pipelines.indexing import base as bases
from pipelines.indexing import delta, lineages
from pipelines.indexing.base import Base
from pipelines.indexing.freshness import Meter
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import Position
from pipelines.indexing.spec import IndexSpec, Vector, lineage
from pipelines.indexing.versions import Pointer, Versions, this_replica
from pipelines.indexing.view import View

POLL_S = 0.1
POINTER_POLL_S = 0.5
"""A thread that wakes takes the interpreter from what answers: polling every 20 ms made answers a third slower."""
log = logging.getLogger(__name__)


class Served(Protocol):
    """One index as a process serves it. `Follower` is one; what serves an index otherwise stands over one.

    Attributes:
        topics: The names of the topics whose positions it answers for.
        versions: The bases that there are.
        meter: How fresh what it serves is.
    """

    topics: frozenset[str]
    versions: Versions
    meter: Meter

    @property
    def view(self) -> View:
        """The view as of now. Take it once for an answer: the next call may give another."""

    @property
    def with_delta(self) -> bool:
        """Whether the delta is served (not so after a roll back without it)."""

    @property
    def is_ready(self) -> bool:
        """Whether it has all that there was at the start."""

    @property
    def is_stale(self) -> bool:
        """Whether the answer does not follow the streams."""

    def start(self) -> None:
        """Start following."""

    def stop(self) -> None:
        """Stop all threads and wait for them."""

    def covers(self, position: Position) -> bool:
        """Whether the view stands at or after a position, as far as it is about this index."""

    def wait(self, position: Position, timeout_s: float) -> bool:
        """Wait until the view covers a position; returns whether it does."""

    def status(self) -> dict[str, Any]:
        """What is served, and how fresh, as plain values."""


class Follower:
    """Keeps one index's view: one thread tails and folds, another prepares a swap while the first goes on."""

    def __init__(
        self,
        spec: IndexSpec,
        indices: Path,
        deltas: Path,
        *,
        topics: frozenset[str],
        max_facts: int,
        replica: str = "default",
        minutes: Path | None = None,
    ) -> None:
        """``topics``: the names of the topics whose positions this index answers for.
        ``minutes``: where it is written how fresh each minute was; None: nowhere."""
        self.spec = spec
        self.topics = topics
        self.versions = Versions(indices, spec.name)
        self._deltas = deltas
        self._max_facts = max_facts
        self._replica = replica
        self._code_lineage = lineage(spec)
        self.meter = Meter(spec.name, replica, minutes)
        self._overlay = self._opened(None, None)
        self._pointer: Pointer | None = None
        self._tried = 0  # the generation that was last prepared, with or without success
        self._prepared: tuple[Pointer, Overlay] | None = None
        self._error: str | None = None
        self._error_at = 0
        self._order, self._is_fed = lineages.Order(), True
        self._head_at_start = self._overlay.head()
        self._is_ready = False
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"tail-{spec.name}", daemon=True),
            threading.Thread(target=self._prepare, name=f"swap-{spec.name}", daemon=True),
        ]

    def start(self) -> None:
        """Start following."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop both threads and wait for them."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=30)
        self.meter.close()

    @property
    def view(self) -> View:
        """The view as of now. Take it once for an answer: the next call may give another."""
        return self._overlay.view

    @property
    def with_delta(self) -> bool:
        """Whether the delta is served (not so after a roll back without it)."""
        return self._pointer is None or self._pointer.with_delta

    @property
    def is_ready(self) -> bool:
        """Whether the overlay has reached the head that the delta had at the start."""
        return self._is_ready

    def covers(self, position: Position) -> bool:
        """Whether the view stands at or after a position, as far as it is about this index."""
        return self.view.position.covers(position.restricted_to(self.topics))

    def wait(self, position: Position, timeout_s: float) -> bool:
        """Wait until the view covers a position; returns whether it does."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self.covers(position):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.5))
        return True

    def status(self) -> dict[str, Any]:
        """What is served, and how fresh, as plain values."""
        overlay = self._overlay
        manifest = overlay.view.base.manifest
        return {
            "index": self.spec.name,
            "base_version": overlay.view.base.version,
            "built_at": manifest.built_at if manifest else None,
            "lineage": manifest.lineage if manifest else self._code_lineage,
            "is_stale": self.is_stale,
            "with_delta": self.with_delta,
            "cut": overlay.view.base.cut.to_json(),
            "position": overlay.view.position.to_json(),
            "position_token": overlay.view.position.token(),
            "overlay_facts": overlay.view.overlay_facts,
            "overlay_max_facts": overlay.max_facts,
            "is_overlay_full": overlay.is_full,
            "last_epoch": overlay.last_epoch,
            "freshness_s": overlay.freshness_s,
            "delta_version": overlay.log_version,
            "counts": manifest.counts if manifest else {},
            "models": manifest.models if manifest else {},
            "is_ready": self.is_ready,
            "error": self._error,
        }

    @property
    def is_stale(self) -> bool:
        """Whether the answer does not follow the streams: of a lineage that nobody feeds or whose streams have ended,
        without the delta, or over its bound."""
        manifest = self.view.base.manifest
        is_old = manifest is not None and manifest.lineage != self._code_lineage and not self._is_fed
        is_behind = self._order.is_ended or not self.view.position.covers(self._order.catch_up_to)
        return is_old or is_behind or not self.with_delta or self._overlay.is_full

    def _opened(self, base: Base | None, pointer: Pointer | None) -> Overlay:
        base = base or bases.empty(self.spec)
        of_lineage = base.manifest.lineage if base.manifest else self._code_lineage
        path = self._delta_path(of_lineage)
        has_delta = pointer is None or pointer.with_delta
        return Overlay(base, path if has_delta else None, self._max_facts, self.meter.is_news)

    def _delta_path(self, of_lineage: str) -> Path:
        return delta.table_path(self._deltas, self.spec.name, of_lineage)

    def _run(self) -> None:
        """Tail the delta; adopt a prepared overlay once it is as fresh as the one that is served."""
        while not self._stopping.is_set():
            try:
                moved = self._overlay.advance()
                self._measure(moved)
                self._adopt()
                if not self._is_ready and self._prepared is None and self._is_first_swap_done():
                    self._is_ready = self._overlay.log_version >= self._head_at_start or self._overlay.is_full
                if moved:
                    with self._changed:
                        self._changed.notify_all()
                    self._say_folded()
                else:
                    self._stopping.wait(POLL_S)
            except Exception as error:
                log.exception("following the delta of %s failed", self.spec.name)
                self._error = str(error)
                self._stopping.wait(1.0)

    def _measure(self, moved: bool) -> None:
        """How fresh what is served is, where more is than before: a fold moved it, or the swap before this."""
        arrivals = self._overlay.arrivals()
        if moved or arrivals:
            self.meter.served(arrivals, self.view.position)
        else:
            self.meter.turn()

    def _say_folded(self) -> None:
        """A line for each epoch that can be read from now on; one for all where the overlay had to catch up."""
        said = {"index": self.spec.name, "replica": self._replica}
        if self._overlay.folded is None:
            log.info("caught up", extra={**said, **_reached(self.view.position)})
        for marker in self._overlay.folded or ():
            epoch = {"stream": marker.stream, "incarnation": marker.incarnation, "epoch": marker.epoch}
            log.info("folded", extra={**said, **epoch, "places": marker.places})

    def _is_first_swap_done(self) -> bool:
        pointer = self.versions.pointer(self._replica)
        return pointer is None or self._tried >= pointer.generation

    def _adopt(self) -> None:
        if self._prepared is None:
            return
        pointer, overlay = self._prepared
        overlay.catch_up()
        if not self._is_as_fresh(pointer, overlay):
            wanted = self.versions.pointer(self._replica)
            if wanted is not None and wanted.generation > pointer.generation:
                self._prepared = None  # another is wanted by now
            return
        failpoints.hit("replica.before_swap")
        self._overlay, self._pointer, self._prepared = overlay, pointer, None
        self._error = None
        self._look_at_lineage()
        self.versions.report(this_replica(self._replica, pointer.generation, pointer.version, None))
        with self._changed:
            self._changed.notify_all()
        said = {"index": self.spec.name, "replica": self._replica, "base_version": pointer.version}
        reached = _reached(overlay.view.position)
        log.info("serves %s", pointer.version, extra={**said, "generation": pointer.generation, **reached})

    def _is_as_fresh(self, pointer: Pointer, overlay: Overlay) -> bool:
        """Two lineages are fed by streams of their own: the new one waits until no reader would see a step back."""
        old, new = self.view.base.manifest, overlay.view.base.manifest
        if pointer.action != "publish" or not old or not new or old.lineage == new.lineage:
            return True
        return overlay.view.position.covers(self.view.position)

    def _look_at_lineage(self) -> None:
        manifest = self.view.base.manifest
        path = self._delta_path(manifest.lineage if manifest else self._code_lineage)
        self._order, self._is_fed = lineages.order(path), lineages.feeding(path) is not None

    def _prepare(self) -> None:
        """Watch the pointer; open what it names and catch up, while the old view is served."""
        self.versions.report(this_replica(self._replica, 0, None, None))
        while not self._stopping.is_set():
            try:
                self._look_at_lineage()
                pointer = self.versions.pointer(self._replica)
                if pointer is not None and pointer.generation > self._tried and self._prepared is None:
                    self._prepare_one(pointer)
            except TidemarkError as error:
                self._error = str(error)
            except Exception as error:
                log.exception("preparing a swap of %s failed", self.spec.name)
                self._error = str(error)
            self._stopping.wait(POINTER_POLL_S)

    def _prepare_one(self, pointer: Pointer) -> None:
        try:
            served = self.view.base
            base = served if served.version == pointer.version else self._open_base(pointer.version)
            overlay = self._opened(base, pointer)
            overlay.catch_up()
            self._prepared = (pointer, overlay)
        except TidemarkError as error:
            log.error("%s cannot serve %s: %s", self.spec.name, pointer.version, error)
            self._error = str(error)
            version = self.view.base.version
            self.versions.report(this_replica(self._replica, pointer.generation, version, str(error)))
        finally:
            self._tried = pointer.generation

    def _open_base(self, version: str) -> Base:
        base = bases.open_base(self.spec, self.versions.path(version))
        for path in self.spec.access:  # graphs are read into memory now, not by the first request
            if isinstance(path, Vector) and base.shards:
                from pipelines.indexing.documents import DocumentsView

                DocumentsView(base).warm(path)
        return base


def _reached(position: Position) -> dict[str, Any]:
    """A position for a log line: everything before it can be read."""
    places = {
        topic: {str(p): [(0, end)] for p, end in ends.items()} for topic, ends in position.topics.items()
    }
    return {"places": places, "loads": sorted(position.loads)}


class Replica:
    """The followers of several indices."""

    def __init__(self, followers: Mapping[str, Served]) -> None:
        self.followers: dict[str, Served] = dict(followers)

    def start(self) -> None:
        """Start following every index."""
        for follower in self.followers.values():
            follower.start()

    def stop(self) -> None:
        """Stop all threads."""
        for follower in self.followers.values():
            follower.stop()

    def view(self, index: str) -> View:
        """The view of an index as of now."""
        return self.followers[index].view

    def wait(self, index: str, position: Position, timeout_s: float) -> bool:
        """Wait until an index covers a position; returns whether it does."""
        return self.followers[index].wait(position, timeout_s)

    def covers(self, index: str, position: Position) -> bool:
        """Whether the view of an index stands at or after a position."""
        return self.followers[index].covers(position)

    @property
    def is_ready(self) -> bool:
        """Whether every overlay has reached the head that its delta had at the start."""
        return all(follower.is_ready for follower in self.followers.values())

    def status(self) -> dict[str, dict[str, Any]]:
        """The status of every index by its name."""
        return {name: follower.status() for name, follower in self.followers.items()}
