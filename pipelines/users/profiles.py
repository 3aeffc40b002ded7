"""Profiles: what a user is interested in, which segments the user is in, and when the user was last seen.

Belongs here: reading them, from the views of `user_profiles` (what fired), `user_events` and `pins`. Does not belong
here: when a rule fires (`patterns`), HTTP, and which pins follow (`recommend.candidates`).

A firing is shown once its time has come, while it lasts. Interests are the user's events by category: each weighs by
its action, and half as much after each half-life; what fired adds to them in the same way. The category of an event is
its own, or else its pin's as the pin is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.users.pattern_files import Declared
from pipelines.users.patterns.firing import FIRING, MARKED_MS

if TYPE_CHECKING:
    from pipelines.indexing.documents import DocumentsView
    from pipelines.indexing.timelines import TimelineView

HALF_LIVES = 10
"""An event counts for so many half-lives: what is left of it then is a thousandth."""


class Firing(NamedTuple):
    """What fired and stands.

    Attributes:
        rule: Its name.
        event_id: The event at which it fired, or after which.
        at_ms: When.
        until_ms: Up to when what follows lasts; that time not included.
        by: What the group is by.
        value: The group.
        category: Of the event, or of its pin; None where neither is known.
        segment: In which the user is; None: none.
        interest: What it added to the interest in the category, when it fired.
    """

    rule: str
    event_id: str
    at_ms: int
    until_ms: int
    by: str
    value: str
    category: str | None
    segment: str | None
    interest: float


class Interest(NamedTuple):
    """How much a user is interested in a category: by events, by what fired, and both."""

    category: str
    weight: float
    of_events: float
    of_firings: float


class Profile(NamedTuple):
    """A user's profile at a time.

    Attributes:
        interests: The greatest weight first.
        segments: Segment → up to when, in ms since 1970.
        firings: Those that last, the newest first.
        last_seen_ms: Time of the newest event; None for a user without one.
    """

    interests: list[Interest]
    segments: dict[str, int]
    firings: list[Firing]
    last_seen_ms: int | None


def fired(profiles: TimelineView, declared: Declared, user: bytes, now_ms: int) -> list[Firing]:
    """All firings of a user that stand and whose time has come, the newest first, also those that lasted.

    Only those of today's rules count. What a stream told before the base knew more, and the base does not say, was
    taken back since.
    """
    return _fired(profiles, declared, user, 0, now_ms)


def _fired(
    profiles: TimelineView, declared: Declared, user: bytes, from_ms: int, now_ms: int
) -> list[Firing]:
    """Those of a time and later."""
    rows = _rows(profiles, user, from_ms, now_ms + 1)
    if not rows:
        return []
    digests = {rule.digest for rule in declared.patterns.rules}
    markers = _rows(profiles, user, MARKED_MS, MARKED_MS + 1)
    known = max(((row["known_ms"], row["known_offset"]) for row in markers), default=(0, 0))
    return [
        Firing(
            row["rule"],
            row["event_id"],
            row["time_ms"],
            row["until_ms"],
            row["grouped_by"],
            row["value"],
            row["value"] if row["grouped_by"] == "category" else row["category"],
            row["segment"],
            row["interest"],
        )
        for row in rows
        if row["rule_hash"] in digests and (row["known_ms"], row["known_offset"]) >= known
    ]


def _rows(profiles: TimelineView, user: bytes, from_ms: int, to_ms: int) -> list[dict[str, Any]]:
    """What is told of a user from a time up to a time, which is not included, the newest first."""
    within = profiles.within([user], from_ms, to_ms)
    if not len(within.of):
        return []
    rows: list[dict[str, Any]] = within.read(["id", "time_ms", *FIRING.names]).to_pylist()
    return sorted(rows, key=lambda row: (row["time_ms"], row["id"]), reverse=True)


def lasting(
    profiles: TimelineView, pins: DocumentsView, declared: Declared, user: bytes, now_ms: int
) -> list[Firing]:
    """The firings of a user that last at a time, the newest first, each with its category if anybody knows it."""
    longest_ms = max((rule.lasts_ms for rule in declared.patterns.rules), default=0)
    begun = _fired(profiles, declared, user, now_ms - longest_ms + 1, now_ms)  # what fired before has lasted
    found = [one for one in begun if now_ms < one.until_ms]
    unknown = [one.value.encode() for one in found if one.category is None and one.by == "pin_id"]
    if not unknown:
        return found
    (categories,) = pins.joined([("catalogue", "category")], unknown)
    of_pins = dict(zip(unknown, categories.to_pylist(), strict=True))
    return [
        one._replace(category=of_pins.get(one.value.encode()))
        if one.category is None and one.by == "pin_id"
        else one
        for one in found
    ]


def of_firings(found: Sequence[Firing], declared: Declared, now_ms: int) -> dict[str, float]:
    """Category → what firings that last add to the interest in it, the greatest first."""
    weights: dict[str, float] = {}
    for one in found:
        if one.category is not None and one.interest:
            faded = one.interest * 0.5 ** ((now_ms - one.at_ms) / declared.half_life_ms)
            weights[one.category] = weights.get(one.category, 0.0) + faded
    return dict(sorted(weights.items(), key=lambda item: (-item[1], item[0])))


def segments(found: Sequence[Firing]) -> dict[str, int]:
    """Segment → up to when the user is in it, by firings that last."""
    until: dict[str, int] = {}
    for one in found:
        if one.segment is not None:
            until[one.segment] = max(until.get(one.segment, 0), one.until_ms)
    return dict(sorted(until.items()))


def read(
    profiles: TimelineView,
    events: TimelineView,
    pins: DocumentsView,
    declared: Declared,
    user: bytes,
    now_ms: int,
) -> Profile:
    """A user's profile at a time.

    Args:
        profiles: Of `user_profiles`.
        events: Of `user_events`.
        pins: For categories.
        declared: The rules in force, and how events weigh.
        user: Whose.
        now_ms: In ms since 1970.
    """
    found = lasting(profiles, pins, declared, user, now_ms)
    by_firings = of_firings(found, declared, now_ms)
    by_events = _of_events(events, pins, declared, user, now_ms)
    interests = [
        Interest(
            one,
            by_events.get(one, 0.0) + by_firings.get(one, 0.0),
            by_events.get(one, 0.0),
            by_firings.get(one, 0.0),
        )
        for one in {**by_events, **by_firings}
    ]
    interests.sort(key=lambda one: (-one.weight, one.category))
    last = events.timeline(user, 1, (now_ms + 1, b""), ["time_ms"]).table.column("time_ms").to_pylist()
    return Profile(interests, segments(found), found, last[0] if last else None)


def _of_events(
    events: TimelineView, pins: DocumentsView, declared: Declared, user: bytes, now_ms: int
) -> dict[str, float]:
    """Category → what the user's events weigh in it."""
    from_ms = now_ms - HALF_LIVES * declared.half_life_ms + 1
    rows = events.within([user], from_ms, now_ms + 1).read(["id", "time_ms", "action", "category", "pin_id"])
    actions = pa.array(list(declared.weights), pa.string())
    rows = rows.filter(pc.is_in(rows.column("action"), value_set=actions))
    if not rows.num_rows:
        return {}
    rows = rows.sort_by(
        [("time_ms", "ascending"), ("id", "ascending")]
    )  # so that sums are the same wherever they lie
    kinds = pc.index_in(rows.column("action"), value_set=actions).to_numpy()
    ages_ms = now_ms - rows.column("time_ms").to_numpy()
    weights = np.array(list(declared.weights.values()))[kinds] * 0.5 ** (ages_ms / declared.half_life_ms)
    weighed: dict[str, float] = {}
    categories = _categories(rows, pins)
    for category, weight in zip(categories, weights.tolist(), strict=True):
        if category is not None:
            weighed[category] = weighed.get(category, 0.0) + weight
    return weighed


def _categories(rows: pa.Table, pins: DocumentsView) -> list[str | None]:
    said: list[str | None] = rows.column("category").to_pylist()
    pin_ids = rows.column("pin_id").to_pylist()
    asked = sorted(
        {pin for pin, category in zip(pin_ids, said, strict=True) if category is None and pin is not None}
    )
    of_pins: Mapping[str, Any] = {}
    if asked:
        (found,) = pins.joined([("catalogue", "category")], [pin.encode() for pin in asked])
        of_pins = dict(zip(asked, found.to_pylist(), strict=True))
    return [
        of_pins.get(pin) if category is None else category
        for pin, category in zip(pin_ids, said, strict=True)
    ]
