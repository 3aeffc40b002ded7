"""When rules fire: a pure function of a user's statements, a step at a time.

Belongs here: the evaluator, and what it keeps of a user from one step to the next. Does not belong here: rules
(`rules`), and how facts are stored and served.

Of all statements about an event the one of greatest rank counts (version, is_deleted, content hash), so neither order
nor repeats matter. Events of a group are in the order of (time, id).

- A count fires at an event if that makes at least so many in the span that ends with it, and at the one before it, if
  that is in the span, there were fewer: at the rising edge.
- An absence fires when its span has passed after an event, unless one of the others came meanwhile. It is said at once,
  dated ahead, and taken back if one comes: whoever reads has a clock, and no timer is needed.

A step takes a user's new statements and tells what has changed: firings that now stand, and those that no longer do;
among these also what stood in between, after one of the statements, for a base may have been built just there. It
judges what is not older than the lateness behind the newest event that it knew before; what is older it leaves as it
was. Without anything kept, it judges all: that is how a batch uses it.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing import facts as fact
from pipelines.indexing.spec import Stepped
from pipelines.users.patterns.rules import ABSENCE, COUNT, SUBJECT, UNLESS, Mark, Patterns, Rule, marks

FAMILY = "firings"
FIRING = pa.schema(
    [
        ("rule", pa.string()),  # null in the one fact a user that says what the base knew
        ("rule_hash", pa.string()),
        ("event_id", pa.string()),  # at which it fired, or after which
        ("grouped_by", pa.string()),
        ("value", pa.string()),
        ("category", pa.string()),  # of that event; null if it does not say
        ("segment", pa.string()),
        ("interest", pa.float64()),
        ("until_ms", pa.int64()),
        (
            "known_ms",
            pa.int64(),
        ),  # of the newest statement known of the user: the broker's time, and its offset
        ("known_offset", pa.int64()),
    ]
)
MADE = fact.family_schema(FAMILY, FIRING)
READ = ("user_id", "event_id", "version", "is_deleted", "content_hash", "event_time", "broker_time", "offset")
"""What the evaluator reads of a row, beside what rules look at."""


class Event(NamedTuple):
    """The winning statement about one event. Of one that is deleted, or too old, the rank is all that counts.

    ``last_ms``: the greatest time of all that was said of it (of a deletion: of the user's newest event then). Up to
    there an older statement may come again, and must not rise.
    """

    version: int
    is_deleted: bool
    content_hash: int
    time_ms: int
    last_ms: int
    category: str | None
    marks: tuple[Mark, ...]

    @property
    def rank(self) -> tuple[int, bool, int]:
        """By which of two statements about an event one wins."""
        return self.version, self.is_deleted, self.content_hash


class Fired(NamedTuple):
    """A firing that stands: when, for which group, and the category of the event."""

    at_ms: int
    group: str
    category: str | None


class Kept(NamedTuple):
    """What is kept of a user.

    Attributes:
        newest_ms: Time of the newest event; None before the first.
        known: Of the newest statement: the broker's time in ms and the offset.
        events: By id.
        fired: By (number of the rule, event id): what was told and stands.
    """

    newest_ms: int | None
    known: tuple[int, int]
    events: dict[str, Event]
    fired: dict[Place, Fired]


NOTHING = Kept(None, (0, 0), {}, {})


def columns(patterns: Patterns) -> tuple[str, ...]:
    """The columns of the contract's rows that a step reads."""
    looked_at = [name for rule in patterns.rules for name in rule.columns]
    return tuple(dict.fromkeys([*READ, "load_id", "category", *looked_at]))


def step(patterns: Patterns, kept: bytes | None, rows: pa.Table) -> Stepped:
    """Take new statements of one user.

    Args:
        patterns: The rules.
        kept: What the step before gave to keep; None: nothing is known.
        rows: Accepted rows of one user, with `columns(patterns)`, in any order.
    """
    before = _read(kept) if kept else NOTHING
    after, taken_back, left_out = _taken(patterns, before, rows)
    changed: dict[Place, Fired | None] = dict.fromkeys(taken_back)
    changed |= {place: one for place, one in after.fired.items() if before.fired.get(place) != one}
    user = rows.column("user_id")[0].as_py()
    told = [
        _firing(
            patterns.rules[number],
            event_id,
            fired or taken_back[number, event_id],
            after.known,
            fired is None,
        )
        for (number, event_id), fired in sorted(changed.items(), key=lambda item: item[0])
    ]
    return Stepped(_written(_pruned(patterns, after)), facts_of(user, told), left_out)


def whole(patterns: Patterns, rows: pa.Table) -> pa.Table:
    """The facts of all that is known of one user: what fired, and up to where its statements are known.

    The latter is one fact more, without a rule: what a stream told while it knew less, and is not among these, was
    taken back since.
    """
    made = step(patterns, None, rows)
    standing = made.facts.filter(pc.invert(made.facts.column("is_deleted")))
    known = _read(made.kept).known
    said: dict[str, Any] = dict.fromkeys(FIRING.names)
    said |= {"known_ms": known[0], "known_offset": known[1]}
    marker = facts_of(rows.column("user_id")[0].as_py(), [Told(b"", 0, False, known, said)])
    return pa.concat_tables([standing, marker])


# --------------------------------------------------------------------------------------------- taking statements in


def _taken(patterns: Patterns, before: Kept, rows: pa.Table) -> tuple[Kept, dict[Place, Fired], int]:
    """What is known with the rows, the firings that stood and no longer do, and how many events came too late."""
    newest, known = before.newest_ms, before.known
    floor = None if newest is None else newest - patterns.kept_ms
    judged_from = None if newest is None else newest - patterns.lateness_ms
    events, left_out = dict(before.events), 0
    groups, fired = _Groups(patterns, events), dict(before.fired)
    taken_back: dict[Place, Fired] = {}
    for row in _rows(rows):
        if row["load_id"] is None:
            known = max(known, (row["broker_ms"], row["offset"]))
        event_id, time_ms = row["event_id"], row["event_ms"]
        old = events.get(event_id)
        rank = (row["version"], row["is_deleted"], row["content_hash"])
        last_ms = max(0 if time_ms is None else time_ms, 0 if old is None else old.last_ms)
        if old is not None and old.rank >= rank:
            events[event_id] = old._replace(last_ms=last_ms)
            continue
        is_forgotten = floor is not None and time_ms is not None and time_ms < floor
        left_out += judged_from is not None and (
            (time_ms is not None and time_ms < judged_from)
            or (old is not None and bool(old.marks) and old.time_ms < judged_from)
        )
        if is_forgotten and old is None:
            continue
        found: tuple[Mark, ...] = ()
        if time_ms is not None and not row["is_deleted"]:
            newest = time_ms if newest is None else max(newest, time_ms)
            found = () if is_forgotten else tuple(marks(patterns.rules, row))
        events[event_id] = new = Event(*rank, time_ms or 0, last_ms, row["category"], found)
        for place, one in groups.replaced(event_id, old, new):
            if one is not None and (judged_from is None or _is_judged(patterns, judged_from, events, place)):
                fired[place] = one
                taken_back.pop(place, None)
            elif one is None and place in fired:
                is_subject = Mark(place[0], SUBJECT, fired[place].group) in events[place[1]].marks
                if not is_subject or judged_from is None or _is_judged(patterns, judged_from, events, place):
                    taken_back[place] = fired.pop(place)
    for event_id, event in events.items():
        if event.is_deleted and event != before.events.get(event_id):
            events[event_id] = event._replace(last_ms=max(event.last_ms, newest or 0))
    return Kept(newest, known, events, fired), taken_back, left_out


def _rows(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows about events as mappings in the order in which the broker had them, their times in ms since 1970.

    A row that brings features alone says nothing of its event.
    """
    rows = rows.filter(pc.is_valid(rows.column("content_hash")))
    times = {"event_ms": rows.column("event_time"), "broker_ms": rows.column("broker_time")}
    plain = rows.drop_columns(["user_id", "event_time", "broker_time"])
    for name, column in times.items():
        microseconds = column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
        plain = plain.append_column(name, microseconds)
    for row in plain.sort_by([("broker_ms", "ascending"), ("offset", "ascending")]).to_pylist():
        for name in times:
            row[name] = None if row[name] is None else row[name] // 1000
        yield row


def _pruned(patterns: Patterns, kept: Kept) -> Kept:
    """Without what no event that is not too late can change."""
    if kept.newest_ms is None:
        return kept
    floor = kept.newest_ms - patterns.kept_ms
    events = {event_id: event for event_id, event in kept.events.items() if event.last_ms >= floor}
    fired = {place: one for place, one in kept.fired.items() if place[1] in events}
    return kept._replace(events=events, fired=fired)


# ------------------------------------------------------------------------------------------------------- judging


Place = tuple[int, str]
"""The number of a rule, and the event at which it fires, or after which."""
Member = tuple[int, bytes, int, str]
"""Of a group: time, id in bytes, the role negated (an event that is both comes not after itself), id."""


class _Groups:
    """The events of each group by (time, id), as they come and go."""

    def __init__(self, patterns: Patterns, events: Mapping[str, Event]) -> None:
        self._rules, self._events = patterns.rules, events
        self._members: dict[tuple[int, str], list[Member]] = defaultdict(list)
        for event_id, event in events.items():
            for mark in event.marks:
                self._members[mark.rule, mark.group].append(_member(event_id, event, mark))
        for members in self._members.values():
            members.sort()

    def replaced(self, event_id: str, old: Event | None, new: Event) -> Iterator[tuple[Place, Fired | None]]:
        """Take an event for another, and tell of all that may hang on it: what fires, or None where nothing does."""
        changed: dict[tuple[int, str], set[int]] = defaultdict(set)
        for mark in old.marks if old else ():
            assert old is not None
            self._members[mark.rule, mark.group].remove(_member(event_id, old, mark))
            changed[mark.rule, mark.group].add(old.time_ms)
            yield (mark.rule, event_id), None
        for mark in new.marks:
            insort(self._members[mark.rule, mark.group], _member(event_id, new, mark))
            changed[mark.rule, mark.group].add(new.time_ms)
        for (number, group), times_ms in changed.items():
            for time_ms in sorted(times_ms):
                yield from self._judged(number, group, time_ms)

    def _judged(self, number: int, group: str, time_ms: int) -> Iterator[tuple[Place, Fired | None]]:
        """What fires, or does not, of all that an event of that time has a say in."""
        rule, members = self._rules[number], self._members[number, group]
        from_ms, to_ms = time_ms - rule.within_ms, time_ms + 2 * rule.within_ms
        found = dict((_counted if rule.kind == COUNT else _absent)(rule, members, from_ms, to_ms))
        first, end = _at(members, from_ms), _at(members, to_ms + 1)
        for _, _, role, event_id in members[first:end]:
            if -role == SUBJECT:
                at_ms = found.get(event_id)
                category = self._events[event_id].category
                yield (number, event_id), None if at_ms is None else Fired(at_ms, group, category)


def _member(event_id: str, event: Event, mark: Mark) -> Member:
    return event.time_ms, event_id.encode(), -mark.role, event_id


def _at(members: Sequence[Member], time_ms: int) -> int:
    """The first member at or after a time."""
    return bisect_left(members, (time_ms,))


def _counted(rule: Rule, members: Sequence[Member], from_ms: int, to_ms: int) -> Iterator[tuple[str, int]]:
    """The events from a time to a time at which a count fires, and when."""
    first, was_enough, before_ms = _at(members, from_ms - 2 * rule.within_ms + 1), False, None
    for place in range(_at(members, from_ms - rule.within_ms + 1), _at(members, to_ms + 1)):
        time_ms, _, _, event_id = members[place]
        while members[first][0] <= time_ms - rule.within_ms:
            first += 1
        is_enough = place - first + 1 >= rule.at_least
        was_so_within = was_enough and before_ms is not None and before_ms > time_ms - rule.within_ms
        if is_enough and not was_so_within and time_ms >= from_ms:
            yield event_id, time_ms
        was_enough, before_ms = is_enough, time_ms


def _absent(rule: Rule, members: Sequence[Member], from_ms: int, to_ms: int) -> Iterator[tuple[str, int]]:
    """The events from a time to a time after which an absence fires, and when that is."""
    next_ms: int | None = None  # when the next of those comes that keep it from firing
    for place in reversed(range(_at(members, from_ms), _at(members, to_ms + rule.within_ms + 1))):
        time_ms, _, role, event_id = members[place]
        is_kept = next_ms is not None and next_ms <= time_ms + rule.within_ms
        if -role == SUBJECT and not is_kept and time_ms <= to_ms:
            yield event_id, time_ms + rule.within_ms
        if -role == UNLESS:
            next_ms = time_ms


def _is_judged(patterns: Patterns, judged_from_ms: int, events: Mapping[str, Event], place: Place) -> bool:
    """Whether all is known that this firing hangs on."""
    rule = patterns.rules[place[0]]
    ahead_ms = rule.within_ms if rule.kind == ABSENCE else 0
    return events[place[1]].time_ms >= judged_from_ms - ahead_ms


# --------------------------------------------------------------------------------------------------- telling


class Told(NamedTuple):
    """One fact: the event's id in the index, its time, whether it is taken back, the version, the payload."""

    id: bytes
    time_ms: int
    is_deleted: bool
    version: tuple[int, int]
    payload: dict[str, Any]


def _firing(rule: Rule, event_id: str, fired: Fired, known: tuple[int, int], is_deleted: bool) -> Told:
    payload = {
        "rule": rule.name,
        "rule_hash": rule.digest,
        "event_id": event_id,
        "grouped_by": rule.by,
        "value": fired.group,
        "category": fired.category,
        "segment": rule.segment,
        "interest": rule.interest,
        "until_ms": fired.at_ms + rule.lasts_ms,
        "known_ms": known[0],
        "known_offset": known[1],
    }
    return Told(f"{rule.digest}:{event_id}".encode(), fired.at_ms, is_deleted, known, payload)


def facts_of(user: str, told: Sequence[Told]) -> pa.Table:
    """Facts of a user, in the columns of `MADE`."""
    key = user.encode()
    identities = [fact.identity_bytes([FAMILY.encode(), key, one.id]) for one in told]
    key_hash = fact.hash_bytes(key) if told else b""
    columns: dict[str, list[Any]] = {
        "identity": identities,
        "identity_hash": [fact.hash_bytes(identity) for identity in identities],
        "family": [FAMILY] * len(told),
        "version_1": [one.version[0] for one in told],
        "version_2": [one.version[1] for one in told],
        "version_3": [0] * len(told),
        "version_4": [0] * len(told),
        "is_deleted": [one.is_deleted for one in told],
        "content_hash": [0 if one.is_deleted else _hashed(one.payload) for one in told],
        "key": [key] * len(told),
        "key_hash": [key_hash] * len(told),
        "id": [one.id for one in told],
        "time_ms": [one.time_ms for one in told],
        "amounts": [[] for _ in told],
        fact.payload_column(FAMILY): [None if one.is_deleted else one.payload for one in told],
    }
    return pa.table(columns, schema=MADE)


def _hashed(payload: Mapping[str, Any]) -> int:
    digest = hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


# --------------------------------------------------------------------------------------------------- keeping


def _written(kept: Kept) -> bytes:
    """What is kept, as bytes; `_read` reads them. Marks are of the rules' numbers: another set of rules begins anew."""
    events = {event_id: [*event[:6], event.marks] for event_id, event in kept.events.items()}
    fired = [[*place, *one] for place, one in kept.fired.items()]
    said = [kept.newest_ms, kept.known, events, fired]
    return json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()


def _read(said: bytes) -> Kept:
    newest_ms, known, events, fired = json.loads(said)
    return Kept(
        newest_ms,
        (known[0], known[1]),
        {
            event_id: Event._make([*plain, tuple(Mark(*mark) for mark in of_rules)])
            for event_id, (*plain, of_rules) in events.items()
        },
        {(number, event_id): Fired(*one) for number, event_id, *one in fired},
    )
