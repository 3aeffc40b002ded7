"""An overlay: a base and what its delta has after the base's cut, followed as it grows.

Belongs here: which epochs are folded, in what portions, up to which bound. The folding itself is ``rows``' and
``sums``'; when to swap is ``replica``'s. One thread drives an overlay; any number read ``view``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from pipelines.indexing import facts as fact
from pipelines.indexing import position as positions
from pipelines.indexing.base import Base
from pipelines.indexing.delta import Epoch, Marker, Tailer
from pipelines.indexing.freshness import Arrival
from pipelines.indexing.position import Position
from pipelines.indexing.view import View, view

PORTION_FACTS = 50_000
"""While catching up, so many facts are folded at once: few runs to merge, and bounded memory."""


class Overlay:
    """Folds the epochs that are not wholly at or before the base's cut; ``view`` is always whole."""

    def __init__(
        self,
        base: Base,
        path: Path | None,
        max_facts: int,
        is_news: Callable[[Arrival], bool] = lambda _: False,
    ) -> None:
        """``path``: the delta of the base's lineage; None: the base is served alone.
        ``is_news``: which epochs ``arrivals`` lists once they are read, those in the base too."""
        self.view: View = view(base)
        self.max_facts = max_facts
        self._tailer = Tailer(base.spec, path) if path else None
        self._last_epoch: str | None = None
        self._is_news = is_news
        self._arrivals: list[Arrival] = []
        self.folded: (
            list[Marker] | None
        ) = []  # by the last `advance`; None: more than one by one, to catch up
        self.freshness_s: float | None = (
            None  # of the last fold: from the broker to here, for its newest record
        )

    @property
    def last_epoch(self) -> str | None:
        """The name of the epoch that was folded last."""
        return self._last_epoch

    @property
    def is_full(self) -> bool:
        """Whether the declared bound is reached: nothing more is folded until a new base is served."""
        return self.view.overlay_facts >= self.max_facts

    @property
    def log_version(self) -> int:
        """The version of the delta's log up to which epochs were folded; -1: none."""
        return self._tailer.version if self._tailer else -1

    def head(self) -> int:
        """The newest version of the delta's log."""
        return self._tailer.head() if self._tailer else -1

    def arrivals(self) -> list[Arrival]:
        """The epochs that were news and were read since this was asked last."""
        arrived, self._arrivals = self._arrivals, []
        return arrived

    def catch_up(self) -> None:
        """Fold all that the delta has now."""
        while self.advance():
            pass

    def advance(self) -> bool:
        """Fold what the delta's next commit holds (at first, and where its log was cleaned up: all that it holds).

        Returns whether there was anything to read.
        """
        if self._tailer is None or self.is_full:
            return False
        before = self._tailer.version
        epochs = self._tailer.poll() if before >= 0 else None
        if epochs is None:
            self.folded = None
            self._fold_snapshot(self._tailer)
        else:
            fresh = list(self._after_cut(epochs))
            self.folded = [epoch.marker for epoch in fresh]
            if fresh:
                self._fold(fresh, positions.merge_all(epoch.marker.end for epoch in fresh))
        return self._tailer.version > before

    def _fold_snapshot(self, tailer: Tailer) -> None:
        """Fold a whole table in portions. Its epochs come in no order, so the position moves only at the end."""
        end = self.view.base.cut
        waiting: list[Epoch] = []
        count = 0
        for epoch in self._after_cut(tailer.snapshot()):
            waiting.append(epoch)
            count += epoch.facts.num_rows
            end = end.merge(epoch.marker.end)
            if count >= PORTION_FACTS:
                self._fold(waiting, positions.EMPTY)
                waiting, count = [], 0
                if self.is_full:
                    return
        if waiting:
            self._fold(waiting, end)
        elif not self.view.position.covers(end):
            self.view = self.view.folded(fact.schema(self.view.spec).empty_table(), end)

    def _after_cut(self, epochs: Iterable[Epoch]) -> Iterator[Epoch]:
        cut = self.view.base.cut
        for epoch in epochs:
            arrival = Arrival(epoch.marker, epoch.committed_at_ms)
            if self._is_news(arrival):
                self._arrivals.append(arrival)
            if not cut.covers(epoch.marker.end):
                yield epoch

    def _fold(self, epochs: list[Epoch], end: Position) -> None:
        facts = pa.concat_tables([epoch.facts for epoch in epochs])
        self.view = self.view.folded(facts, end)
        newest = max(
            epochs, key=lambda e: (e.marker.broker_time_max_ms or 0, e.marker.incarnation, e.marker.epoch)
        )
        self._last_epoch = newest.marker.name
        if newest.marker.broker_time_max_ms is not None:
            self.freshness_s = max(0.0, time.time() - newest.marker.broker_time_max_ms / 1000)
