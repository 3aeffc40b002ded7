"""Rules: what they may say, as plain data, and which events concern them.

Belongs here: a rule's meaning. Does not belong here: reading one from a file (`users.pattern_files`), and when it fires
(`firing`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

COUNT, ABSENCE = "count", "absence"
SUBJECT, UNLESS = 0, 1
"""What an event is to a rule: one that it counts, or waits after; or one that keeps it from firing."""
FILTERS = {"surfaces": "surface", "categories": "category", "view_types": "view_type"}
"""A rule's filter → the column of the event that it is about."""


class Rule(NamedTuple):
    """One rule.

    Attributes:
        name: Its name.
        kind: `COUNT` or `ABSENCE`.
        by: Of the contract's `OBJECTS`: events with the same value are one group; one without a value is in none.
        actions: Of the events that it counts, or waits after.
        unless: Actions that keep an absence from firing.
        at_least: How many events within the span fire a count; 0 for an absence.
        within_ms: The span.
        filters: Filter of `FILTERS` → the values that a subject may have there.
        segment: Which segment a user is in who fired it; None: none.
        interest: What it adds to the user's interest in the group's category; 0: nothing.
        lasts_ms: For how long after it fired.
    """

    name: str
    kind: str
    by: str
    actions: tuple[str, ...]
    unless: tuple[str, ...]
    at_least: int
    within_ms: int
    filters: Mapping[str, tuple[str, ...]]
    segment: str | None
    interest: float
    lasts_ms: int

    @property
    def digest(self) -> str:
        """Fingerprint of all that the rule says, 16 hexadecimal digits: a changed rule is another one."""
        said = self._asdict() | {"filters": sorted(self.filters.items())}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of an event, what the rule looks at beside time and id."""
        return ("action", self.by, *(FILTERS[name] for name in self.filters))


class Patterns(NamedTuple):
    """The rules in force, and how late an event may come: `lateness_ms` behind its user's newest, by event time."""

    rules: tuple[Rule, ...]
    lateness_ms: int

    @property
    def kept_ms(self) -> int:
        """How far behind a user's newest event a stream must know all: whether a count fires hangs on two spans."""
        return self.lateness_ms + 2 * max((rule.within_ms for rule in self.rules), default=0)

    @property
    def digest(self) -> str:
        """Fingerprint of what a stream's state means."""
        said = [self.lateness_ms, *(rule.digest for rule in self.rules)]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


class Mark(NamedTuple):
    """What an event is to a rule: the rule's number, `SUBJECT` or `UNLESS`, and the group."""

    rule: int
    role: int
    group: str


def marks(rules: tuple[Rule, ...], event: Mapping[str, Any]) -> Iterator[Mark]:
    """What a live event is to the rules; ``event`` has the columns of the contract's rows."""
    for number, rule in enumerate(rules):
        group = event[rule.by]
        if group is None:
            continue
        if event["action"] in rule.actions and _passes(rule, event):
            yield Mark(number, SUBJECT, group)
        if event["action"] in rule.unless:
            yield Mark(number, UNLESS, group)


def _passes(rule: Rule, event: Mapping[str, Any]) -> bool:
    return all(event[FILTERS[name]] in values for name, values in rule.filters.items())
