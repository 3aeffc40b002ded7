"""A naive evaluator of patterns: single-threaded, over everything at once, by what the documentation says.

It shares no code with what is shipped: rules are plain dicts as the file says them, spans are ms, events are dicts as
the contract's records. Everything is compared with everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

FILTERED = {"surfaces": "surface", "categories": "category", "view_types": "view_type"}
UNITS_MS = {"m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}


class Firing(NamedTuple):
    """What an evaluator says: the rule's name, the user, the event, when, and for which group."""

    rule: str
    user: str
    event: str
    at_ms: int
    group: str


class Said(NamedTuple):
    """One statement about one event of one user; ``record`` is None for a deletion."""

    user: str
    event: str
    version: int
    content: int
    record: Mapping[str, Any] | None


def span(text: str) -> int:
    """`10m` in ms."""
    return int(text[:-1]) * UNITS_MS[text[-1]]


def standing(said: Iterable[Said]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The live events: of all statements about one, the greatest."""
    greatest: dict[tuple[str, str], Said] = {}
    for one in said:
        held = greatest.get((one.user, one.event))
        if held is None or _order(one) > _order(held):
            greatest[one.user, one.event] = one
    return {place: one.record for place, one in greatest.items() if one.record is not None}


def _order(one: Said) -> tuple[int, bool, int]:
    return one.version, one.record is None, one.content


def firings(rules: Sequence[Mapping[str, Any]], said: Iterable[Said]) -> set[Firing]:
    """All that fires."""
    users: dict[str, list[tuple[int, bytes, str, Mapping[str, Any]]]] = {}
    for (user, event), record in standing(said).items():
        users.setdefault(user, []).append((record["event_time"], event.encode(), event, record))
    found = set()
    for user, events in users.items():
        events.sort(key=lambda one: one[:2])
        for rule in rules:
            found |= set(_of_rule(rule, user, events))
    return found


def _of_rule(rule: Mapping[str, Any], user: str, events: list[Any]) -> Iterable[Firing]:
    said = rule.get("count") or rule["absence"]
    actions = said["actions"] if "count" in rule else said["after"]
    within = span(said["within"])
    for place, (time_ms, _, event, record) in enumerate(events):
        group = record.get(said["by"])
        if group is None or not _concerns(said, actions, record):
            continue
        mine = [e for e in events if e[3].get(said["by"]) == group]
        if "count" in rule:
            subjects = [e for e in mine if _concerns(said, actions, e[3])]
            here = subjects.index(events[place])
            was_within = here > 0 and subjects[here - 1][0] > time_ms - within
            if _count(subjects, here, within) >= said["at_least"] and not (
                was_within and _count(subjects, here - 1, within) >= said["at_least"]
            ):
                yield Firing(rule["name"], user, event, time_ms, group)
        else:
            later = mine[mine.index(events[place]) + 1 :]
            if not any(e[3]["action"] in said["unless"] and e[0] <= time_ms + within for e in later):
                yield Firing(rule["name"], user, event, time_ms + within, group)


def _count(subjects: list[Any], place: int, within: int) -> int:
    return sum(subjects[place][0] - within < e[0] for e in subjects[: place + 1])


def _concerns(said: Mapping[str, Any], actions: Sequence[str], record: Mapping[str, Any]) -> bool:
    return record["action"] in actions and all(
        record.get(column) in said[name] for name, column in FILTERED.items() if name in said
    )
