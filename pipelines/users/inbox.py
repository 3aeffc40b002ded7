"""The inbox of a user: what became of what the user follows, since it is followed; put together when it is asked for.

Belongs here: which pins and users a user follows, and the entries that their timelines make; pure, over the views of
`user_follows`, `pin_changes` and `user_events`. Does not belong here: how entries are written (`serving`), and what a
follow or a change is as a fact (`follows`, `pipelines.pins.changes`).

Nothing is written for a follower: a pin with 100,000 of them is one event when it changes, as any other
(docs/adr/0021).

A statement about a pin counts when it is greater by version than all before it, family by family: only then did it
become what the pin says. An entry is the difference between what the pin's document said before and after. A document
is there while its catalogue is; what changes nothing that can be seen makes no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing.timelines import TimelineView, Within
from pipelines.pins.changes import CATALOGUE, FIELDS, LAST_MS, OFFER

PUBLIC_ACTIONS = ("save",)
"""Of followed users only these are told: what else they do is their own."""

MAX_FOLLOWS = 10_000
"""So many follows of a user are read, the newest first."""

MAX_EVENTS = 1_000
"""So many newest events of a followed user are looked through for public ones; older ones of one millisecond with the
first that is left out are left out with it."""

Before = tuple[int, bytes]
"""The place of an entry among the others: its time in ms, and its key."""


class Follow(NamedTuple):
    """A pin or a user that is followed, since when, and the version of the statement; one of the two is None."""

    pin_id: bytes | None
    followed_user_id: bytes | None
    since_ms: int
    version: int


class Follows(NamedTuple):
    """What a user follows, the newest first; `following`: the place behind which there is more, None: there is none."""

    follows: list[Follow]
    following: Before | None


class Change(NamedTuple):
    """A field of a pin that is not what it was."""

    field: str
    was: Any
    is_now: Any


class PinEntry(NamedTuple):
    """A followed pin changed; `what`: changed, gone, back (it had been gone) or new (it had never been there)."""

    time_ms: int
    key: bytes
    pin_id: bytes
    version: int
    what: str
    title: str | None
    changes: tuple[Change, ...]


class UserEntry(NamedTuple):
    """A followed user did something public."""

    time_ms: int
    key: bytes
    user_id: bytes
    event_id: bytes
    action: str
    pin_id: str | None
    category: str | None


InboxEntry = PinEntry | UserEntry


class Inbox(NamedTuple):
    """A page of an inbox.

    Attributes:
        entries: Newest first by (time_ms, key), descending.
        following: Where the next page begins, behind this; None: there is none.
        is_complete: Whether nothing was left out: no follows, and no statements or events since they began.
    """

    entries: list[InboxEntry]
    following: Before | None
    is_complete: bool


def follows(
    view: TimelineView, user: bytes, most: int = MAX_FOLLOWS, before: Before | None = None
) -> Follows:
    """What a user follows, at most so much of it, and what comes behind a place; of an unknown user nothing."""
    table = view.timeline(user, most + 1, before).table
    page = table.slice(0, most)
    columns = ("pin_id", "followed_user_id", "time_ms", "version")
    rows = zip(*(page.column(name).to_pylist() for name in columns), strict=True)
    found = [Follow(_key(pin), _key(followed), since, version) for pin, followed, since, version in rows]
    has_more = table.num_rows > most
    return Follows(found, (found[-1].since_ms, page.column("id")[-1].as_py()) if has_more else None)


def read(
    mine: Follows, changes: TimelineView, events: TimelineView, limit: int, before: Before | None = None
) -> Inbox:
    """A page of an inbox.

    Args:
        mine: What the user follows.
        changes: Of `pin_changes`.
        events: Of `user_events`.
        limit: So many entries at most.
        before: Only entries behind this one.
    """
    until_ms = LAST_MS if before is None else max(-1, min(before[0], LAST_MS))
    pins = {f.pin_id: f.since_ms for f in mine.follows if f.pin_id is not None}
    users = {f.followed_user_id: f.since_ms for f in mine.follows if f.followed_user_id is not None}
    parts = (_of_pins(changes, pins, until_ms), _of_users(events, users, until_ms))
    entries: list[InboxEntry] = []
    for entry in _newest_first(parts, limit + 1, before):
        entries.append(entry)
        if len(entries) > limit:
            break
    page = entries[:limit]
    following = (page[-1].time_ms, page[-1].key) if len(entries) > limit else None
    return Inbox(page, following, mine.following is None and all(part.is_complete for part in parts))


def rows_of(mine: Follows, changes: TimelineView, events: TimelineView) -> int:
    """How many rows an inbox may have to read; what it takes grows with them, and with the follows."""
    pins = [one.pin_id for one in mine.follows if one.pin_id is not None]
    users = [one.followed_user_id for one in mine.follows if one.followed_user_id is not None]
    return changes.rows_of(pins) + events.rows_of(users)


def key_of(entry: str, about: bytes, detail: bytes) -> bytes:
    """The key of an entry: no id has a NUL, so it is of one length, and in order by what it is about."""
    return entry.encode() + about + b"\0" + detail


# ------------------------------------------------------------------------------------------------ what may be an entry


class _Part(NamedTuple):
    """What may be entries, n of them.

    Attributes:
        times: When, int64[n].
        key: Of one by its number.
        written: Of some by their numbers the entries, None for what is none.
        is_complete: Whether nothing was left out.
    """

    times: np.ndarray
    key: Callable[[int], bytes]
    written: Callable[[Sequence[int]], list[Any]]
    is_complete: bool


def _newest_first(parts: Sequence[_Part], at_once: int, before: Before | None) -> Iterator[InboxEntry]:
    """Entries in their order, read in portions; those of one time are read together, for their keys order them."""
    times = np.concatenate([part.times for part in parts])
    of = np.repeat(np.arange(len(parts)), [len(part.times) for part in parts])
    numbers = np.concatenate([np.arange(len(part.times)) for part in parts])
    order = np.argsort(-times, kind="stable")
    ordered, start = -times[order], 0
    while start < len(order):
        last = ordered[min(start + 2 * at_once, len(order)) - 1]
        end = int(np.searchsorted(ordered, last, side="right"))
        portion = order[start:end]
        start = end
        places = [
            (int(times[one]), parts[of[one]].key(int(numbers[one])), int(of[one]), int(numbers[one]))
            for one in portion
        ]
        places = sorted((p for p in places if before is None or p[:2] < before), reverse=True)
        found: dict[tuple[int, int], Any] = {}
        for number, part in enumerate(parts):
            mine = [place[3] for place in places if place[2] == number]
            found |= {(number, one): entry for one, entry in zip(mine, part.written(mine), strict=True)}
        yield from (entry for place in places if (entry := found[place[2:]]) is not None)


def _newest(of: np.ndarray, times: np.ndarray, keys: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of each key are at most so many newest ones, bool[n], and the time of what was left out, int64[keys].

    Rows of one time with the first that is too many are left out with it; -1: nothing was.
    """
    floors = np.full(keys, -1, np.int64)
    order = np.lexsort((times, of))
    ends = np.searchsorted(of[order], np.arange(keys), side="right")
    starts = np.searchsorted(of[order], np.arange(keys), side="left")
    cut = np.flatnonzero(ends - starts > most)
    floors[cut] = times[order[ends[cut] - most - 1]]
    return times > floors[of], floors


# ------------------------------------------------------------------------------------------------ pins


def _of_pins(view: TimelineView, since: Mapping[bytes, int], until_ms: int) -> _Part:
    """What may be entries of pins: the steps of their histories that changed what stands.

    Of pins of which something was said since, all that was ever said is looked at: whether a statement rose depends on
    all before it.
    """
    moved = _moved(view, since, until_ms)
    keys, since_ms = list(moved), np.array(list(moved.values()), np.int64)
    within = view.within(keys, 0, LAST_MS + 1)
    said = within.read(["time_ms", "version", "family"])
    times, versions = (said.column(name).to_numpy() for name in ("time_ms", "version"))
    is_offer = pc.equal(said.column("family"), OFFER).to_numpy().astype(bool)
    history = _history(within.of, times, versions, is_offer)
    history = history.taken((history.times >= since_ms[history.of]) & (history.times <= until_ms))
    return _Part(
        history.times,
        lambda number: key_of(
            "p", keys[history.of[number]], int(history.versions[number]).to_bytes(8, "big")
        ),
        lambda numbers: _pin_entries(within, keys, history, numbers),
        bool(within.is_complete.all()),
    )


def _moved(view: TimelineView, since: Mapping[bytes, int], until_ms: int) -> dict[bytes, int]:
    """Of pins those of which something was said since they are followed: of most of them, nothing was."""
    if not since:
        return {}
    keys, since_ms = list(since), np.array(list(since.values()), np.int64)
    if until_ms < (from_ms := int(since_ms.min())):
        return {}
    within = view.within(keys, from_ms, until_ms + 1)
    times = within.read(["time_ms"]).column("time_ms").to_numpy()
    numbers = np.unique(within.of[times >= since_ms[within.of]]).tolist()
    return {keys[number]: since[keys[number]] for number in numbers}


class _History(NamedTuple):
    """Steps of pins' histories at which another statement came to stand, n of them; rows of -1: none stood.

    Attributes:
        of: Which pin, int64[n].
        times: When, int64[n].
        versions: Of which version, int64[n].
        stood: Family → the row that stood before, int64[n].
        stands: Family → the row that stands after, int64[n].
    """

    of: np.ndarray
    times: np.ndarray
    versions: np.ndarray
    stood: Mapping[str, np.ndarray]
    stands: Mapping[str, np.ndarray]

    def taken(self, chosen: np.ndarray) -> _History:
        """Those of the steps that are chosen, by a mask."""
        stood, stands = ({f: rows[chosen] for f, rows in held.items()} for held in (self.stood, self.stands))
        return _History(self.of[chosen], self.times[chosen], self.versions[chosen], stood, stands)


def _history(of: np.ndarray, times: np.ndarray, versions: np.ndarray, is_offer: np.ndarray) -> _History:
    """The steps that statements make, in any order; rows are their numbers."""
    rows = np.lexsort((versions, times, of))
    of, times, versions, is_offer = (column[rows] for column in (of, times, versions, is_offer))
    begins = np.ones(len(of), bool)
    begins[1:] = (of[1:] != of[:-1]) | (times[1:] != times[:-1]) | (versions[1:] != versions[:-1])
    first = np.flatnonzero(begins)
    last = np.append(first, len(of))[1:] - 1
    pin_begins = np.searchsorted(of, of, side="left")
    stood, stands = {}, {}
    for family, mine in ((CATALOGUE, ~is_offer), (OFFER, is_offer)):
        rose = np.full(len(of), -1, np.int64)
        numbers = np.flatnonzero(mine)
        numbers = numbers[_rises(of[numbers], versions[numbers])]
        rose[numbers] = numbers
        newest = np.maximum.accumulate(rose) if len(rose) else rose
        newest = np.where(newest >= pin_begins, newest, -1)
        earlier = np.where(first > pin_begins[first], newest[first - 1], -1)
        named = np.append(rows, -1)  # so that -1 stays -1
        stood[family], stands[family] = named[earlier], named[newest[last]]
    found = _History(of[first], times[first], versions[first], stood, stands)
    return found.taken((stood[CATALOGUE] != stands[CATALOGUE]) | (stood[OFFER] != stands[OFFER]))


def _rises(of: np.ndarray, versions: np.ndarray) -> np.ndarray:
    """Which statements, by pin and time, are of a greater version than all those before them of their pin, bool[n]."""
    ordinals = np.unique(versions, return_inverse=True)[1]
    heights = of * (len(of) + 1) + ordinals  # those of another pin are out of reach
    highest = np.maximum.accumulate(heights) if len(heights) else heights
    rises = np.ones(len(of), bool)
    rises[1:] = heights[1:] > highest[:-1]
    return rises


def _pin_entries(
    within: Within, keys: Sequence[bytes], history: _History, numbers: Sequence[int]
) -> list[PinEntry | None]:
    chosen = np.array(numbers, np.int64)
    states = [held[family][chosen] for held in (history.stood, history.stands) for family in FIELDS]
    wanted = np.unique(np.concatenate(states))
    wanted = wanted[wanted >= 0]
    names = ("is_gone", *(name for fields in FIELDS.values() for name in fields))
    said = dict(zip(wanted.tolist(), within.read(names, wanted).to_pylist(), strict=True))
    found: list[PinEntry | None] = []
    for number, *rows in zip(numbers, *(state.tolist() for state in states), strict=True):
        before, after = (_document(*(said.get(row) for row in pair)) for pair in (rows[:2], rows[2:]))
        has_been = rows[0] >= 0
        entry = _difference(before, after, has_been)
        if entry is None:
            found.append(None)
            continue
        pin, version = keys[history.of[number]], int(history.versions[number])
        what, changed = entry
        title = (after or before or {}).get("title")
        key = key_of("p", pin, version.to_bytes(8, "big"))
        found.append(PinEntry(int(history.times[number]), key, pin, version, what, title, changed))
    return found


def _document(catalogue: Mapping[str, Any] | None, offer: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a pin says while these statements stand; None: it is not there."""
    if catalogue is None or catalogue["is_gone"]:
        return None
    has_offer = offer is not None and not offer["is_gone"]
    said = {name: catalogue[name] for name in FIELDS[CATALOGUE]}
    return said | {name: offer[name] if offer and has_offer else None for name in FIELDS[OFFER]}


def _difference(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, has_been: bool
) -> tuple[str, tuple[Change, ...]] | None:
    """What became of a pin; None: nothing that can be seen."""
    if after is None:
        return None if before is None else ("gone", ())
    was = dict.fromkeys(after) if before is None else before
    changed = tuple(Change(name, was[name], now) for name, now in after.items() if was[name] != now)
    if before is None:
        return ("back" if has_been else "new"), changed
    return ("changed", changed) if changed else None


# ------------------------------------------------------------------------------------------------ users


def _of_users(view: TimelineView, since: Mapping[bytes, int], until_ms: int) -> _Part:
    """The public actions of users, each since they are followed."""
    keys, since_ms = list(since), np.array(list(since.values()), np.int64)
    from_ms = int(since_ms.min()) if len(keys) else LAST_MS
    within = view.within(keys, from_ms, LAST_MS + 1, MAX_EVENTS + 1)
    said = within.read(["time_ms", "action"])
    all_times = said.column("time_ms").to_numpy()
    kept, floors = _newest(within.of, all_times, len(keys), MAX_EVENTS)
    kept &= (all_times >= since_ms[within.of]) & (all_times <= until_ms)
    kept &= pc.is_in(said.column("action"), value_set=pa.array(PUBLIC_ACTIONS)).to_numpy().astype(bool)
    rows = np.flatnonzero(kept)
    times, of = all_times[rows], within.of[rows]
    ids = within.read(["id"], rows).column("id").to_pylist()

    def key(number: int) -> bytes:
        return key_of("u", keys[of[number]], ids[number])

    def written(numbers: Sequence[int]) -> list[Any]:
        told = within.read(["action", "pin_id", "category"], rows[np.array(numbers, np.int64)]).to_pylist()
        return [
            UserEntry(int(times[number]), key(number), keys[of[number]], ids[number], **one)
            for number, one in zip(numbers, told, strict=True)
        ]

    is_complete = bool(within.is_complete.all()) and not (floors >= since_ms).any()
    return _Part(times, key, written, is_complete)


def _key(value: str | None) -> bytes | None:
    return None if value is None else value.encode()
