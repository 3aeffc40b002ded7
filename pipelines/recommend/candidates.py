"""Which pins to answer with, out of the views: a user's recommendations, pins like a pin, what is popular.

Belongs here: the rules of candidates and their order, over views of `pins`, `user_events` and `pin_counts`. Does not
belong here: the user's vector (`tastes`), and how answers are written (`pipelines.serving`).

A score is the exact inner product in float64 of the served float32 vectors; equal scores are ordered by the pin's id.
Recommended is what the user has neither bought nor hidden, what is in the catalogue, and what no offer says is
unavailable. `similar` shows whatever is in the catalogue.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipelines.contracts import ACTIONS
from pipelines.recommend import fold_in

if TYPE_CHECKING:
    from pipelines.indexing.base import Places
    from pipelines.indexing.documents import DocumentsView
    from pipelines.indexing.sums import SumsView
    from pipelines.recommend.tastes import Taste

VECTOR, CATEGORY = "embedding", "category"
PARAMETERS = "als"
FAMILIES = ("catalogue", "offer")
DAY_MS = 86_400_000
WINDOWS_DAYS = (1, 7, 30, 90, 365, 3650)
"""How far back popularity looks; the next one is tried where too few pins are found, and everything after the last."""
UNIT = 10
POPULARITY = {"purchase": UNIT, "save": 6, "add_to_basket": 5, "click": 3, "view": 1, "hide": -UNIT}
"""What an event of each action adds to a pin's popularity, in tenths of a purchase."""
WEIGHTS = tuple(POPULARITY.get(action, 0) for action in ACTIONS)
MARGIN = 16
"""So many more are looked at than asked for: the search scores in float32, the order is by exact scores."""

LIKED_EACH, MOST_LIKED = 3, 3
"""While a user has just shown an interest in categories, each third pin is of one of them, of so many at most."""

Document = dict[str, dict[str, Any]]


class Item(NamedTuple):
    """One pin of an answer."""

    pin: bytes
    score: float
    document: Document


class Basis(NamedTuple):
    """What an answer was made from.

    Attributes:
        kind: `folded` (the user's vector), `vector` (the pin's vector), `category`, or `popular`.
        events_used: How many events are in the user's vector; 0 where there is none.
        model_id: Whose vectors; None where none were used.
        window_days: How far back popularity looked; None for everything, or where it did not count.
    """

    kind: str
    events_used: int = 0
    model_id: str | None = None
    window_days: int | None = None


class Answer(NamedTuple):
    """Items, best first, and what they were made from."""

    items: list[Item]
    basis: Basis


class Popularity:
    """What is popular in one view of the counts; the windows are relative to its newest bucket, and computed once."""

    def __init__(self, counts: SumsView) -> None:
        self.counts = counts
        self._found: dict[tuple[int | None, int], list[tuple[bytes, int]]] = {}

    def windows(self) -> Iterator[int | None]:
        """The windows in days, the narrowest first; None: all that is known."""
        yield from WINDOWS_DAYS
        yield None

    def top(self, days: int | None, k: int) -> list[tuple[bytes, int]]:
        """The ``k`` most popular pins of a window, and their tenths of a purchase."""
        if (days, k) not in self._found:
            horizon = self.counts.base.horizon_from_ms
            newest = self.counts.latest_bucket_ms
            start = horizon
            if days is not None and newest is not None:
                start = newest + self.counts.spec.read.width_ms - days * DAY_MS  # type: ignore[union-attr]
                start = start if horizon is None else max(start, horizon)
            self._found[days, k] = self.counts.top(WEIGHTS, k, from_ms=start)
        return self._found[days, k]


def parameters_of(pins: DocumentsView) -> fold_in.Parameters | None:
    """The parameters that the base of a view pins; None before there is a model.

    Raises:
        BadParameters: They cannot be read, or are of another model than the vectors: two models never meet.
    """
    said = pins.parameters.get(PARAMETERS)
    if said is None or pins.base.manifest is None:
        return None
    read = fold_in.from_json(said)
    of_vectors = pins.base.manifest.models.get(VECTOR)
    if of_vectors != read.model_id:
        raise fold_in.BadParameters(
            f"the parameters are of the model {read.model_id}, the vectors of {of_vectors}",
            where=pins.base.version,
            remedy="build the base again",
        )
    return read


def personal(
    pins: DocumentsView,
    told: Taste,
    parameters: fold_in.Parameters | None,
    k: int,
    category: str | None = None,
) -> Answer | None:
    """Recommendations by the user's vector; None for a user without one, who is answered with what is `popular`."""
    if parameters is None or told.vector is None:
        return None
    items = nearest(pins, told.vector, k, category, told.settled, only_available=True)
    return Answer(items, Basis("folded", told.event_count, parameters.model_id))


def nearest(
    pins: DocumentsView,
    vector: fold_in.Float64s,
    k: int,
    category: str | None,
    exclude: Collection[bytes] | Places,
    *,
    only_available: bool,
) -> list[Item]:
    """The ``k`` pins of greatest inner product with a vector."""
    where = None if category is None else {CATEGORY: category}
    query = vector.astype(np.float32)
    wanted = k + MARGIN
    while True:
        nearby = pins.search(VECTOR, query, wanted, where, exclude)
        found = [key for key, _ in nearby]
        exact = pins.vectors(VECTOR, found)[0].astype(np.float64) @ vector
        ordered = fold_in.ranked(found, exact, len(found))
        items = _shown(pins, ordered, k, only_available=only_available)
        if len(items) == k or len(nearby) < wanted:
            return items
        wanted *= 2


def _shown(
    pins: DocumentsView, ordered: Sequence[tuple[bytes, float]], k: int, *, only_available: bool
) -> list[Item]:
    """The first ``k`` that may be shown, with their documents, which are read in portions."""
    items: list[Item] = []
    for start in range(0, len(ordered), k):
        portion = ordered[start : start + k]
        documents = pins.get([key for key, _ in portion], FAMILIES)
        for (key, score), document in zip(portion, documents, strict=True):
            if document is not None and (is_available(document) or not only_available):
                items.append(Item(key, score, document))
        if len(items) >= k:
            break
    return items[:k]


def is_available(document: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether no offer says that the pin is unavailable."""
    offer = document.get("offer")
    return offer is None or offer.get("is_available") is not False


def popular(
    pins: DocumentsView,
    popularity: Popularity,
    k: int,
    category: str | None = None,
    exclude: Collection[bytes] = (),
    *,
    only_available: bool = True,
) -> Answer:
    """The ``k`` most popular pins in the narrowest window that has so many; fewer if there are no more."""
    inside = None if category is None else set(pins.match({CATEGORY: category}))
    items: list[Item] = []
    days: int | None = None
    if inside is None or inside:
        for days in popularity.windows():
            items = _popular_in(pins, popularity, days, k, inside, exclude, only_available=only_available)
            if len(items) == k:
                break
    return Answer(items, Basis("popular", window_days=days if items else None))


def _popular_in(
    pins: DocumentsView,
    popularity: Popularity,
    days: int | None,
    k: int,
    inside: Collection[bytes] | None,
    exclude: Collection[bytes],
    *,
    only_available: bool,
) -> list[Item]:
    wanted = 1024
    while True:
        found = popularity.top(days, wanted)
        ordered = [
            (pin, total / UNIT)
            for pin, total in found
            if pin not in exclude and (inside is None or pin in inside)
        ]
        items = _shown(pins, ordered, k, only_available=only_available)
        if len(items) == k or len(found) < wanted:
            return items
        wanted *= 16


def mixed(answer: Answer, liked: Sequence[Sequence[Item]], k: int) -> list[Item]:
    """``k`` items, of which each third is of what is liked, in turns; nothing twice. Where one runs out the others go
    on.

    Args:
        answer: What would be answered otherwise.
        liked: For each category that is liked its items, best first.
        k: How many at most.
    """
    taken: set[bytes] = set()
    of_liked, others = _in_turns(liked), iter(answer.items)
    items: list[Item] = []
    while len(items) < k:
        first, second = (of_liked, others) if (len(items) + 1) % LIKED_EACH == 0 else (others, of_liked)
        item = _next(first, taken) or _next(second, taken)
        if item is None:
            break
        taken.add(item.pin)
        items.append(item)
    return items


def _in_turns(lists: Sequence[Sequence[Item]]) -> Iterator[Item]:
    for place in range(max(map(len, lists), default=0)):
        yield from (items[place] for items in lists if place < len(items))


def _next(items: Iterator[Item], taken: Collection[bytes]) -> Item | None:
    return next((item for item in items if item.pin not in taken), None)


def similar(
    pins: DocumentsView,
    parameters: fold_in.Parameters | None,
    pin: bytes,
    k: int,
    category: str | None = None,
) -> Answer | None:
    """Pins like a pin, by its vector; None for a pin without one, which is answered `of_category`."""
    vectors, has = pins.vectors(VECTOR, [pin])
    if parameters is None or not has[0]:
        return None
    items = nearest(pins, vectors[0].astype(np.float64), k, category, {pin}, only_available=False)
    return Answer(items, Basis("vector", model_id=parameters.model_id))


def of_category(
    pins: DocumentsView, popularity: Popularity, category: str | None, k: int, exclude: Collection[bytes]
) -> Answer:
    """The pins of a category: the popular first, then the others by id."""
    if not category:
        return Answer([], Basis("category"))
    first = popular(pins, popularity, k, category, exclude, only_available=False)
    taken = {item.pin for item in first.items}.union(exclude)
    left = k - len(first.items)
    more = [key for key in pins.match({CATEGORY: category}) if key not in taken][:left] if left else []
    others = [
        Item(key, 0.0, found) for key, found in zip(more, pins.get(more, FAMILIES), strict=True) if found
    ]
    return Answer([*first.items, *others], Basis("category", window_days=first.basis.window_days))
