"""What users like, out of the views, and what is kept of it between their requests.

Belongs here: a user's merged events turned into a vector and into what is not to be recommended, and when that has to
be done again. The arithmetic is `fold_in`'s, choosing pins `candidates`'.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.indexing.base import Places
from pipelines.recommend import candidates, fold_in

if TYPE_CHECKING:
    from pipelines.indexing.base import Base
    from pipelines.indexing.documents import DocumentsView
    from pipelines.indexing.timelines import TimelineView
    from pipelines.recommend.candidates import Answer

COLUMNS = ("time_ms", "pin_id", "action")
USERS_KEPT, ANSWERS_KEPT = 4096, 4
"""Of so many users, those who were asked for last, the history and so many answers are kept: some 40 KB each."""
NO_MODEL = fold_in.Parameters("", np.empty((0, 0)))


class Taste(NamedTuple):
    """What a user's merged events say.

    Attributes:
        vector: The user's, float64[d]; None where no pin that the user prefers has a vector, and without a model.
        settled: The pins that are not to be recommended: bought, or hidden.
        event_count: How many events are in the vector.
    """

    vector: fold_in.Float64s | None
    settled: Places
    event_count: int


class Told(NamedTuple):
    """A user's history, and where its pins stand."""

    history: fold_in.History
    places: Places


class _Kept(NamedTuple):
    """What is kept of a user, as it is from the fold on that changed the user's events last."""

    fold: int
    told: Told
    taste: Taste
    answers: dict[tuple[int, int, str | None], Answer | None]


class Personal:
    """Personal answers over one pair of bases.

    What a user likes is kept while the user's events are the same, and only new events are read where the timeline has
    just grown at its end. An answer is kept while the pins' overlay is the same too. Either way it is what the views
    of the moment would give. Used from one thread.
    """

    def __init__(self, pins: Base, events: Base, parameters: fold_in.Parameters | None) -> None:
        self._pins, self._events, self._parameters = pins, events, parameters
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    def is_of(self, pins: DocumentsView, events: TimelineView, parameters: fold_in.Parameters | None) -> bool:
        """Whether these views stand on the same bases, whatever came after them."""
        is_same_base = pins.base is self._pins and events.base is self._events
        return is_same_base and parameters is self._parameters

    def taste(self, pins: DocumentsView, events: TimelineView, user: bytes) -> Taste:
        """A user's taste, as these views have it."""
        return self._of(pins, events, user).taste

    def answer(
        self, pins: DocumentsView, events: TimelineView, user: bytes, k: int, category: str | None = None
    ) -> Answer | None:
        """What `candidates.personal` answers for these views."""
        kept = self._of(pins, events, user)
        wanted = (pins.last_fold(), k, category)
        if wanted not in kept.answers:
            if len(kept.answers) >= ANSWERS_KEPT:
                kept.answers.clear()
            kept.answers[wanted] = candidates.personal(pins, kept.taste, self._parameters, k, category)
        return kept.answers[wanted]

    def _of(self, pins: DocumentsView, events: TimelineView, user: bytes) -> _Kept:
        fold = events.last_fold(user)
        kept = self._kept.get(user)
        if kept is None or kept.fold != fold:
            told = self._grown(kept, events, user) if kept else None
            if told is None:
                told = self._told(events.timeline(user, columns=COLUMNS).table)
            kept = _Kept(fold, told, taste(pins, told, self._parameters), {})
            self._kept[user] = kept
        self._kept.move_to_end(user)
        if len(self._kept) > USERS_KEPT:
            self._kept.popitem(last=False)
        return kept

    def _told(self, events: pa.Table) -> Told:
        times = events.column("time_ms").to_numpy()
        read = fold_in.history(
            events.column("pin_id"), events.column("action"), times, self._parameters or NO_MODEL
        )
        return Told(read, self._pins.places(read.pins))

    def _grown(self, kept: _Kept, events: TimelineView, user: bytes) -> Told | None:
        """What was told before with the events that came since; None where they are not all newer."""
        added = events.added(user, kept.fold, COLUMNS)
        if added is None or not added.num_rows:
            return None
        newer, older = self._told(added), kept.told
        if len(older.history.times_ms) and added.column("time_ms")[-1].as_py() <= older.history.times_ms[0]:
            return None
        both, is_left = fold_in.joined(newer.history, older.history, self._parameters or NO_MODEL)
        return Told(both, Places(both.pins, np.concatenate([newer.places.at, older.places.at[is_left]])))


def taste(pins: DocumentsView, told: Told, parameters: fold_in.Parameters | None) -> Taste:
    """A user's taste; without a model, what is settled is said all the same."""
    read, places = told
    settled = Places(list(compress(read.pins, read.is_settled.tolist())), places.at[read.is_settled])
    if parameters is None or not read.pins:
        return Taste(None, settled, 0)
    weighed = fold_in.strengths(read, parameters)
    counted = Places(read.pins[: len(weighed)], places.at[: len(weighed)])
    vectors, has = pins.vectors(candidates.VECTOR, counted)
    return Taste(fold_in.solve(vectors[has], weighed[has], parameters), settled, len(read.codes))
