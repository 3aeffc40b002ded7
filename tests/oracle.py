"""The naive oracle: what an index must answer, from plain statements, by dictionaries and sorts.

Belongs here: the design's text, read literally and computed slowly. Does not belong here: anything that the product
computes with. It imports nothing of ``pipelines``, so that a mistake there cannot hide by being made twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Payload = Mapping[str, Any]


class Statement(NamedTuple):
    """One accepted statement about one column family of one thing."""

    family: str
    key: bytes
    id: bytes = b""
    version: tuple[int, ...] = (1,)
    is_deleted: bool = False
    content_hash: int = 0
    time_ms: int = 0
    amounts: tuple[int, ...] = ()
    payload: Payload | None = None
    event: bytes = b""
    """For sums: the event's own identity, whatever key it counts for."""


class Event(NamedTuple):
    """One entry of a timeline: the payloads of the families that it is joined from."""

    id: bytes
    time_ms: int
    payloads: Mapping[str, Payload]


class TimelineAnswer(NamedTuple):
    """Newest first; when it is not complete it is the exact beginning of the complete one.

    No event newer than ``missing_ms`` is missing from the whole timeline; None: none is missing at all.
    """

    events: list[Event]
    is_complete: bool
    missing_ms: int | None


def rank(statement: Statement) -> tuple[tuple[int, ...], bool, int]:
    """What decides between two statements about the same thing; a version has up to four places, 0 if absent."""
    places = statement.version + (0,) * (4 - len(statement.version))
    return places, statement.is_deleted, statement.content_hash


def winners(statements: Iterable[Statement], by: Sequence[str]) -> dict[tuple[Any, ...], Statement]:
    """The statement of greatest rank of each group, deletions included."""
    standing: dict[tuple[Any, ...], Statement] = {}
    for statement in statements:
        group = tuple(getattr(statement, name) for name in by)
        if group not in standing or rank(statement) > rank(standing[group]):
            standing[group] = statement
    return standing


def documents(statements: Iterable[Statement], presence: str) -> dict[bytes, dict[str, Payload]]:
    """Each key that has a live ``presence``: its live families."""
    found: dict[bytes, dict[str, Payload]] = {}
    for (family, key), statement in winners(statements, ("family", "key")).items():
        if not statement.is_deleted:
            assert statement.payload is not None
            found.setdefault(key, {})[family] = statement.payload
    return {key: families for key, families in found.items() if presence in families}


def matching(
    found: Mapping[bytes, Mapping[str, Payload]], where: Mapping[tuple[str, str], Any]
) -> set[bytes]:
    """The keys of documents whose (family, column) equal every wanted term."""
    return {
        key
        for key, families in found.items()
        if all(
            family in families and families[family][column] == term
            for (family, column), term in where.items()
        )
    }


def horizon_ms(age_ms: int | None, max_broker_time_ms: int | None, width_ms: int = 1) -> int | None:
    """The oldest time that is answered: back from the greatest broker time at the base's cut; None: there is none.

    Sums are answered in whole buckets of ``width_ms``, so for them it is the first bucket that lies wholly inside.
    """
    if age_ms is None or max_broker_time_ms is None:
        return None
    start = max_broker_time_ms - age_ms
    while start % width_ms:
        start += 1
    return start


def order(event: Event) -> tuple[int, bytes]:
    """Where an event stands in its timeline; the greatest comes first."""
    return event.time_ms, event.id


def events(
    statements: Iterable[Statement], key: bytes, families: Sequence[str], horizon: int | None
) -> list[Event]:
    """All of a key's live events inside the horizon, newest first; later families are joined to the first by id."""
    standing = winners((s for s in statements if s.key == key), ("family", "id"))
    found = []
    for (family, event_id), statement in standing.items():
        if family != families[0] or statement.is_deleted:
            continue
        if horizon is not None and statement.time_ms < horizon:
            continue
        joined = {}
        for other in families:
            part = standing.get((other, event_id))
            if part is not None and not part.is_deleted:
                assert part.payload is not None
                joined[other] = part.payload
        found.append(Event(event_id, statement.time_ms, joined))
    return sorted(found, key=order, reverse=True)


def timeline(
    accepted: Iterable[Statement],
    key: bytes,
    families: Sequence[str],
    *,
    limit: int | None = None,
    base: Iterable[Statement] | None = None,
    age_ms: int | None = None,
    count: int | None = None,
    max_broker_time_ms: int | None = None,
) -> TimelineAnswer:
    """What may be answered for a key when everything in ``accepted`` is known, over a base made of ``base``.

    A base keeps of each key what lies inside the horizon, and of that the newest ``count``. If it left any out
    there, the key was truncated and its floor is the oldest event that it kept: below it nothing can be said. What
    lies before the horizon is in no answer, so that leaving it out truncates nothing. A declared count limits every
    answer, whether there is a base or not. An answer is complete if nothing was left out of the timeline, or if it has
    as many events as were asked for.
    """
    horizon = horizon_ms(age_ms, max_broker_time_ms if base is not None else None)
    known = events(accepted, key, families, horizon)
    floor: tuple[int, bytes] | None = None
    if base is not None and count is not None:
        kept = events(base, key, families, horizon)
        if len(kept) > count:
            floor = order(kept[count - 1])
    exact = [event for event in known if floor is None or order(event) >= floor]
    missing = [] if floor is None else [floor[0]]
    if count is not None:
        missing += [event.time_ms for event in exact[count:]]
        exact = exact[:count]
    found = exact[:limit]
    is_complete = not missing or (limit is not None and len(found) == limit)
    return TimelineAnswer(found, is_complete, max(missing, default=None))


def sums(
    accepted: Iterable[Statement], width_ms: int, horizon: int | None = None
) -> dict[bytes, dict[int, tuple[int, ...]]]:
    """By key, then by the start of the time bucket: what the live events inside the horizon add up to.

    Buckets that add up to nothing are left out.
    """
    totals: dict[bytes, dict[int, tuple[int, ...]]] = {}
    for statement in winners(accepted, ("family", "event")).values():
        if statement.is_deleted or (horizon is not None and statement.time_ms < horizon):
            continue
        buckets = totals.setdefault(statement.key, {})
        start = statement.time_ms - statement.time_ms % width_ms
        before = buckets.get(start, (0,) * len(statement.amounts))
        buckets[start] = tuple(a + b for a, b in zip(before, statement.amounts, strict=True))
    without_zeros = {
        key: {start: total for start, total in buckets.items() if any(total)}
        for key, buckets in totals.items()
    }
    return {key: buckets for key, buckets in without_zeros.items() if buckets}


def top(
    totals: Mapping[bytes, Mapping[int, Sequence[int]]],
    weights: Sequence[int],
    from_ms: int,
    to_ms: int,
) -> dict[bytes, int]:
    """The weighted total of every key over the buckets that begin in the window; keys with nothing are left out."""
    found = {}
    for key, buckets in totals.items():
        total = sum(
            weight * amount
            for start, amounts in buckets.items()
            if from_ms <= start < to_ms
            for weight, amount in zip(weights, amounts, strict=True)
        )
        if total:
            found[key] = total
    return found
