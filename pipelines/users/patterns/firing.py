"""When rules fire: a pure function of a user's statements, a step at a time.

Belongs here: the evaluator, and what it keeps of a user from one step to the next. Does not belong here: rules
(`rules`), and how facts are stored and served.

Of all statements about an event the one of greatest rank counts (version, is_deleted, content hash), so neither order
nor repeats matter. Events of a group are in the order of (time, id).

- A count fires at an event if that makes at least so many in the span that ends with it, and at the one before it, if
  that is in the span, there were fewer: at the rising edge.
- An absence fires when its span has passed after an event, unless one of the others came meanwhile. It is said at once,
  dated ahead, and taken back if one comes: whoever reads has a clock, and no timer is needed.

A step takes a user's new statements all at once, goes once over each group that they touch, and tells what has changed:
firings that now stand, and those that no longer do. A base may have been built after any part of the statements. So
where several of them touch a group, it tells all that stands near them again, and takes back what may have stood after
a part of them and does not now. It judges what is not older than the lateness behind the newest event that it knew
before, and what hangs on nothing that it does not know, or has forgotten; the rest it leaves as it was. A batch knows
all, and judges all.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts.contract import MAX_AHEAD_MS
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
READ = (
    *("user_id", "event_id", "version", "is_deleted", "content_hash", "event_time"),
    *("load_id", "partition", "offset", "broker_time"),
)
"""What the evaluator reads of a row, beside what rules look at."""
MARKED_MS = 7_258_118_400_000
"""Time of the fact that says what a base knew: the year 2200, newer than any firing. Whatever horizon or count a
base is cut off by (`build.horizon_days`, `build.newest_events`), it stays."""
MAX_EVENTS = 10_000
"""So many events of a user are kept, the newest: what is kept is read and written whole in each step that has events of
the user, and of so many that takes 30 to 100 ms. An event every nine seconds, day and night, makes as many in a day."""


class Event(NamedTuple):
    """The winning statement about one event. Of one that no rule looks at, the rank and `last_ms` are all that counts.

    ``last_ms``: the greatest time of all that was said of it (of a deletion: of the user's newest event then). Up to
    there an older statement may come again, and must not rise. ``marks`` are mappings' plain parts where they were
    kept: (rule, role, group).
    """

    version: int
    is_deleted: bool
    content_hash: int
    last_ms: int
    time_ms: int = 0
    category: str | None = None
    marks: Sequence[Mark] = ()

    @property
    def rank(self) -> tuple[int, bool, int]:
        """By which of two statements about an event one wins."""
        return self.version, self.is_deleted, self.content_hash


RANKED = 4
"""So many of an event's parts are kept of one that no rule looks at."""


class Fired(NamedTuple):
    """A firing that stands: when, for which group, and the category of the event."""

    at_ms: int
    group: str
    category: str | None


Place = tuple[int, str]
"""The number of a rule, and the event at which it fires, or after which."""
Group = tuple[int, str]
"""The number of a rule, and the value that the events of a group have in common."""


class Kept(NamedTuple):
    """What is kept of a user.

    Attributes:
        newest_ms: Time of the newest event; None before the first.
        whole_from_ms: All events of this time and later are known; None: all events.
        known: Of the newest statement: the broker's time in ms and the offset.
        read: Partition → the offset after the last statement that was read of it.
        events: By id.
        fired: By (number of the rule, event id): what was told and stands.
    """

    newest_ms: int | None
    whole_from_ms: int | None
    known: tuple[int, int]
    read: Mapping[str, int]
    events: dict[str, Event]
    fired: dict[Place, Fired]


RECKONED = 4
"""So many of its parts are as small for any user."""
NOTHING = Kept(None, None, (0, 0), {}, {}, {})


def columns(patterns: Patterns) -> tuple[str, ...]:
    """The columns of the contract's rows that a step reads."""
    looked_at = [name for rule in patterns.rules for name in rule.columns]
    return tuple(dict.fromkeys([*READ, "category", *looked_at]))


def step(patterns: Patterns, unread_ms: int | None, kept: bytes | None, rows: pa.Table) -> Stepped:
    """Take new statements of one user.

    Args:
        patterns: The rules.
        unread_ms: Records that the broker took up to this time may have been there, and the stream never read them;
            None: it began at the beginning.
        kept: What the step before gave to keep; None: nothing is known.
        rows: Accepted rows of one user, with `columns(patterns)`, in any order.
    """
    before = _read(kept) if kept else NOTHING
    said = _said(patterns, rows, before)
    before = before._replace(whole_from_ms=_whole_from(patterns, before, said, unread_ms))
    after, told, left_out = _taken(patterns, before, said, is_all=False)
    user = rows.column("user_id")[0].as_py()
    facts = [
        _firing(patterns.rules[place[0]], place[1], fired, after, not stands)
        for place, (fired, stands) in sorted(told.items(), key=lambda item: item[0])
    ]
    after, crowded_out = _pruned(patterns, after)
    return Stepped(_written(after), facts_of(user, facts), left_out, crowded_out)


def whole(patterns: Patterns, rows: pa.Table) -> pa.Table:
    """The facts of all that is known of one user: what fired, and up to where its statements are known.

    The latter is one fact more, without a rule: what a stream told while it knew less, and is not among these, was
    taken back since.
    """
    kept, _, _ = _taken(patterns, NOTHING, _said(patterns, rows, NOTHING), is_all=True)
    kept = kept._replace(
        read={}
    )  # a batch has the statements that stand, and not how far each partition was read
    told = [
        _firing(patterns.rules[number], event_id, fired, kept, False)
        for (number, event_id), fired in sorted(kept.fired.items())
    ]
    payload: dict[str, Any] = dict.fromkeys(FIRING.names)
    payload |= {"known_ms": kept.known[0], "known_offset": kept.known[1]}
    marker = Told(b"", MARKED_MS, False, _version(kept), payload)
    return facts_of(rows.column("user_id")[0].as_py(), [*told, marker])


# --------------------------------------------------------------------------------------------- taking statements in


Arrival = tuple[str, int]
"""Where a statement was read: partition and offset; of a load nowhere."""
NOWHERE = "", 0


class _Said(NamedTuple):
    """What rows say: how far they are known with them, and of each event the statements of greater rank, and a time.

    ``new`` are those that are greater than what stood before, in no order; ``last_ms`` as `Event.last_ms`.
    ``times_ms``: of all events that they tell of.
    """

    known: tuple[int, int]
    read: dict[str, int]
    new: dict[str, list[tuple[Arrival, Event]]]
    last_ms: dict[str, int]
    times_ms: list[int]


class _Touched(NamedTuple):
    """What touches a group in a step.

    Attributes:
        rows: How many statements: after one part of several, anything may have stood.
        forms: All that the events were in it: before, in between, and after.
        moved: Events that were more than one thing to the rule.
        events: All of them.
        fresh: Where events that no statement before put into a group were read, and what they are in it.
    """

    rows: int
    forms: set[Member]
    moved: set[str]
    events: set[str]
    fresh: list[tuple[Arrival, Member]]


def _said(patterns: Patterns, rows: pa.Table, before: Kept) -> _Said:
    said = _Said(before.known, dict(before.read), defaultdict(list), {}, [])
    known = said.known
    for row in _rows(rows):
        arrival = NOWHERE
        if row["load_id"] is None:
            known = max(known, (row["broker_ms"], row["offset"]))
            arrival = partition, offset = str(row["partition"]), row["offset"]
            said.read[partition] = max(said.read.get(partition, 0), offset + 1)
        event_id, old = row["event_id"], before.events.get(row["event_id"])
        event = _event(patterns, row)
        said.last_ms[event_id] = max(
            said.last_ms.get(event_id, 0), event.last_ms, 0 if old is None else old.last_ms
        )
        said.times_ms.extend([] if event.is_deleted else [event.time_ms])
        if old is None or event.rank > old.rank:
            said.new[event_id].append((arrival, event))
    return said._replace(known=known)


def _event(patterns: Patterns, row: Mapping[str, Any]) -> Event:
    rank, time_ms = (row["version"], row["is_deleted"], row["content_hash"]), row["event_ms"]
    if time_ms is None or row["is_deleted"]:
        return Event(*rank, time_ms or 0)
    return Event(*rank, time_ms, time_ms, row["category"], tuple(marks(patterns.rules, row)))


def _rows(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows about events as mappings, their times in ms since 1970. A row that brings features alone says nothing."""
    rows = rows.filter(pc.is_valid(rows.column("content_hash")))
    times = {"event_ms": rows.column("event_time"), "broker_ms": rows.column("broker_time")}
    plain = rows.drop_columns(["user_id", "event_time", "broker_time"])
    for name, column in times.items():
        microseconds = column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
        plain = plain.append_column(name, microseconds)
    for row in plain.to_pylist():
        for name in times:
            row[name] = None if row[name] is None else row[name] // 1000
        yield row


def _whole_from(patterns: Patterns, before: Kept, said: _Said, unread_ms: int | None) -> int | None:
    """From when on all events are known, where some statements were never read.

    They were there before the first that was read: they are not more than the lateness newer than any that was, nor
    further ahead of the broker's time than an event may be.
    """
    if unread_ms is None or before.newest_ms is not None:
        return before.whole_from_ms
    unread_up_to = [unread_ms + MAX_AHEAD_MS, *(time_ms + patterns.lateness_ms for time_ms in said.times_ms)]
    return min(unread_up_to) + 1


def _taken(
    patterns: Patterns, before: Kept, said: _Said, is_all: bool
) -> tuple[Kept, dict[Place, tuple[Fired, bool]], int]:
    """What is known with the statements; what to tell: firing, and whether it stands; how many events came too late.

    ``is_all``: nothing comes after it, and nothing was told.
    """
    newest = max([*said.times_ms, *([] if before.newest_ms is None else [before.newest_ms])], default=None)
    events, fired, left_out = dict(before.events), dict(before.fired), 0
    told: dict[Place, tuple[Fired, bool]] = {}
    touched: dict[Group, _Touched] = {}
    gone: dict[Place, tuple[Fired, Group]] = {}
    for event_id, last_ms in said.last_ms.items():
        old, new = before.events.get(event_id), said.new.get(event_id, [])
        if old is not None and not new:
            events[event_id] = old._replace(last_ms=last_ms)
            continue
        standing = max((event for _, event in new), key=lambda event: event.rank)
        is_long = standing.is_deleted and newest is not None
        last_ms = max(last_ms, newest or 0) if is_long else last_ms
        events[event_id] = standing._replace(last_ms=last_ms)
        forms = [*([] if old is None else [old]), *(event for _, event in new)]
        left_out += _is_left_out(patterns, before, old, forms)
        _touch(touched, event_id, old, new)
        subjects = {mark[0] for mark in standing.marks if mark[1] == SUBJECT}
        for form in forms:
            for number, role, group in form.marks:
                if role == SUBJECT and number not in subjects:
                    gone[number, event_id] = Fired(form.time_ms, group, form.category), (number, group)
    for place, (was, left) in gone.items():
        if place in fired:
            told[place] = fired.pop(place), False
        elif touched[left].rows > 1:
            told[place] = was, False
    members = _members(events, touched)
    for (number, group), by in touched.items():
        rule, judged_from_ms = patterns.rules[number], _judged_from(patterns, before, number)
        here = members[number, group]
        has_between = by.rows > 1 and not is_all and not _is_in_turn(rule, here, by)
        others = _others(rule, here, by) if has_between else []
        for from_ms, to_ms in _ranges(rule, by.forms):
            found = dict(_firing_among(rule, here, from_ms, to_ms))
            between = _between(rule, here, others, from_ms, to_ms) if has_between else set()
            for time_ms, _, role, event_id in _inside(here, from_ms, to_ms):
                if -role != SUBJECT or time_ms < judged_from_ms:
                    continue
                place, at_ms = (number, event_id), found.get(event_id)
                if at_ms is not None:
                    now = Fired(at_ms, group, events[event_id].category)
                    if has_between or before.fired.get(place) != now:
                        told[place] = now, True
                    fired[place] = now
                elif place in fired:
                    told[place] = fired.pop(place), False
                elif event_id in between or (has_between and event_id in by.moved):
                    told[place] = Fired(time_ms, group, None), False
    return Kept(newest, before.whole_from_ms, said.known, said.read, events, fired), told, left_out


def _touch(
    touched: dict[Group, _Touched], event_id: str, old: Event | None, new: Sequence[tuple[Arrival, Event]]
) -> None:
    """Note which groups an event touches that was, or is, all this."""
    of_groups: dict[Group, set[Member]] = defaultdict(set)
    for form in [*([] if old is None else [old]), *(event for _, event in new)]:
        for mark in form.marks:
            of_groups[mark[0], mark[2]].add(_member(event_id, form, Mark(*mark)))
    forms_of_rule: dict[int, set[tuple[str, Member]]] = defaultdict(set)
    for (number, value), members in of_groups.items():
        forms_of_rule[number] |= {(value, member) for member in members}
    for group, members in of_groups.items():
        by = touched.get(group, _Touched(0, set(), set(), set(), []))
        by.forms.update(members)
        by.events.add(event_id)
        if len(forms_of_rule[group[0]]) > 1:
            by.moved.add(event_id)
        if len(new) == 1 and not (old and old.marks):
            by.fresh.extend((new[0][0], member) for member in members)
        touched[group] = by._replace(rows=by.rows + len(new))


def _is_left_out(patterns: Patterns, before: Kept, old: Event | None, forms: Iterable[Event]) -> bool:
    """Whether an event is to some rule what cannot be judged any more.

    What a deletion takes away cannot be known, where its event may have been forgotten, or never have been read.
    """
    if before.newest_ms is None:
        return False
    if old is None and before.whole_from_ms is not None and all(form.is_deleted for form in forms):
        return True
    late_ms = before.newest_ms - patterns.lateness_ms
    return any(form.marks and form.time_ms < late_ms for form in forms)


def _pruned(patterns: Patterns, kept: Kept) -> tuple[Kept, int]:
    """Without what no event that is not late can change, and without the oldest of too many; how many those were."""
    if kept.newest_ms is None:
        return kept, 0
    floor, whole_from = kept.newest_ms - patterns.kept_ms, kept.whole_from_ms or 0
    events = {event_id: event for event_id, event in kept.events.items() if event.last_ms >= floor}
    if len(events) < len(kept.events):
        whole_from = max(whole_from, floor)
    too_many = heapq.nsmallest(
        max(0, len(events) - MAX_EVENTS), ((event.last_ms, event_id) for event_id, event in events.items())
    )
    for last_ms, event_id in too_many:
        del events[event_id]
        whole_from = max(whole_from, last_ms + 1)
    fired = {place: one for place, one in kept.fired.items() if place[1] in events}
    kept = kept._replace(whole_from_ms=whole_from or None, events=events, fired=fired)
    return kept, len(too_many)


# ------------------------------------------------------------------------------------------------------- judging


Member = tuple[int, bytes, int, str]
"""Of a group: time, id in bytes, the role negated (an event that is both comes not after itself), id."""


def _members(events: Mapping[str, Event], groups: Collection[Group]) -> dict[Group, list[Member]]:
    """The events of some groups by (time, id)."""
    found: dict[Group, list[Member]] = {group: [] for group in groups}
    for event_id, event in events.items():
        for mark in event.marks:
            if (of := (mark[0], mark[2])) in found:
                found[of].append(_member(event_id, event, Mark(*mark)))
    for members in found.values():
        members.sort()
    return found


def _member(event_id: str, event: Event, mark: Mark) -> Member:
    return event.time_ms, event_id.encode(), -mark.role, event_id


def _ranges(rule: Rule, forms: Iterable[Member]) -> Iterator[tuple[int, int]]:
    """From when to when events hang on these: on others before them, or after them. Ranges do not overlap."""
    span_ms = (0, 2 * rule.within_ms) if rule.kind == COUNT else (-rule.within_ms, 0)
    start: int | None = None
    end = 0
    for time_ms in sorted({form[0] for form in forms}):
        from_ms, to_ms = time_ms + span_ms[0], time_ms + span_ms[1]
        if start is not None and from_ms > end:
            yield start, end
            start = None
        start, end = from_ms if start is None else start, to_ms
    if start is not None:
        yield start, end


def _judged_from(patterns: Patterns, before: Kept, number: int) -> int:
    """From when on all is known that a firing of a rule hangs on, by the time of its event."""
    rule = patterns.rules[number]
    ahead_ms, behind_ms = (0, 2 * rule.within_ms) if rule.kind == COUNT else (rule.within_ms, 0)
    late_ms = 0 if before.newest_ms is None else before.newest_ms - patterns.lateness_ms - ahead_ms
    return max(late_ms, 0 if before.whole_from_ms is None else before.whole_from_ms + behind_ms)


def _is_in_turn(rule: Rule, members: Sequence[Member], by: _Touched) -> bool:
    """Whether after any part of a step fired what of it fires in the end: new events of a count came one by one."""
    if (
        rule.kind != COUNT
        or len(by.fresh) < by.rows
        or len({partition for (partition, _), _ in by.fresh}) > 1
    ):
        return False
    return [member for _, member in sorted(by.fresh)] == members[-len(by.fresh) :]


def _others(rule: Rule, members: Sequence[Member], by: _Touched) -> list[Member]:
    """Of an absence what kept it from firing all along, of a count all that may have been in the group, in order."""
    if rule.kind == ABSENCE:
        return [member for member in members if -member[2] == SUBJECT or member[3] not in by.events]
    return sorted({*members, *by.forms})


def _between(
    rule: Rule, members: Sequence[Member], others: Sequence[Member], from_ms: int, to_ms: int
) -> set[str]:
    """The events at which, or after which, something may have fired after some part of a step; maybe some more."""
    if rule.kind == ABSENCE:
        return {event_id for event_id, _ in _absent(rule, others, from_ms, to_ms)}
    return {
        event_id
        for time_ms, _, _, event_id in _inside(members, from_ms, to_ms)
        if _at(others, time_ms + 1) - _at(others, time_ms - rule.within_ms + 1) >= rule.at_least
    }


def _inside(members: Sequence[Member], from_ms: int, to_ms: int) -> Sequence[Member]:
    return members[_at(members, from_ms) : _at(members, to_ms + 1)]


def _at(members: Sequence[Member], time_ms: int) -> int:
    """The first member at or after a time."""
    return bisect_left(members, (time_ms,))


def _firing_among(
    rule: Rule, members: Sequence[Member], from_ms: int, to_ms: int
) -> Iterator[tuple[str, int]]:
    """The events from a time to a time at which a rule fires, or after which, and when."""
    return (_counted if rule.kind == COUNT else _absent)(rule, members, from_ms, to_ms)


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


# --------------------------------------------------------------------------------------------------- telling


class Told(NamedTuple):
    """One fact: the event's id in the index, its time, whether it is taken back, the version, the payload."""

    id: bytes
    time_ms: int
    is_deleted: bool
    version: tuple[int, int, int]
    payload: dict[str, Any]


def _firing(rule: Rule, event_id: str, fired: Fired, kept: Kept, is_deleted: bool) -> Told:
    known = kept.known
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
    return Told(f"{rule.digest}:{event_id}".encode(), fired.at_ms, is_deleted, _version(kept), payload)


def _version(kept: Kept) -> tuple[int, int, int]:
    """Of what is told with this known.

    The broker's time and the offset say who knows more, a base or a stream. They do not grow with each step, for a
    broker's clock may step back, and two partitions have two. What has been read does grow, and is the same in another
    life of the stream that has read as much.
    """
    return *kept.known, sum(kept.read.values())


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
        "version_3": [one.version[2] for one in told],
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
    events = {
        event_id: (*event[:-1], [tuple(mark) for mark in event.marks]) if event.marks else event[:RANKED]
        for event_id, event in kept.events.items()
    }
    fired = [(*place, *one) for place, one in kept.fired.items()]
    return orjson.dumps([*kept[:RECKONED], events, fired])


def _read(said: bytes) -> Kept:
    newest_ms, whole_from_ms, known, read, events, fired = orjson.loads(said)
    return Kept(
        newest_ms,
        whole_from_ms,
        (known[0], known[1]),
        read,
        {event_id: Event(*one) for event_id, one in events.items()},
        {(number, event_id): Fired(*one) for number, event_id, *one in fired},
    )
