"""An inbox equals a naive reading of what was followed, what became of it and when, over real bases and deltas."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from pipelines.indexing import facts as fact
from pipelines.indexing.timelines import TimelineView
from pipelines.pins.changes import PIN_CHANGES
from pipelines.users import inbox
from pipelines.users.follows import USER_FOLLOWS_INDEX
from pipelines.users.index import USER_EVENTS
from tests.oracle import Statement
from tests.properties.harness import cases
from tests.properties.strategies import MINUTE_MS, START_MS, Choices
from tests.properties.test_sequences import Told, served

USERS = ("u", "u1", "u2", "ü")
PIN_IDS = ("p", "p0", "p1", "grün", "u1")
CATALOGUE = ("title", "category", "department", "brand")
OFFER = ("price_usd_micros", "is_available")
FIELDS = {"catalogue": CATALOGUE, "offer": OFFER}
FOLLOWED = ("pin", "user")


class Follow(NamedTuple):
    """An accepted record of `user-follows`."""

    user: str
    kind: str
    followed: str
    version: int
    is_deleted: bool
    content_hash: int
    time_ms: int

    def statement(self) -> Statement:
        """As the index holds it."""
        named = {"pin_id": None, "followed_user_id": None}
        named["pin_id" if self.kind == "pin" else "followed_user_id"] = self.followed
        return Statement(
            "follows",
            self.user.encode(),
            (self.kind[0] + self.followed).encode(),
            (self.version, int(self.is_deleted), self.content_hash, -self.time_ms),
            self.is_deleted,
            self.content_hash,
            self.time_ms,
            (),
            None if self.is_deleted else {**named, "version": self.version},
        )


class Update(NamedTuple):
    """An accepted record of `pin-updates`; a family that it does not set is None."""

    pin: str
    version: int
    is_deleted: bool
    families: Mapping[str, Mapping[str, Any]]
    time_ms: int

    def hashed(self, family: str) -> int:
        """The content hash of what it says of a family."""
        return zlib.crc32(repr(self.families.get(family)).encode()) - 2**31

    def statements(self) -> list[Statement]:
        """As the index holds them."""
        named = FIELDS if self.is_deleted else self.families
        return [
            Statement(
                "changes",
                self.pin.encode(),
                f"{self.version:016x} {family}".encode(),
                (self.version, int(self.is_deleted), self.hashed(family), -self.time_ms),
                False,
                self.hashed(family),
                self.time_ms,
                (),
                {"version": self.version, "family": family, "is_gone": self.is_deleted}
                | {name: self.families.get(family, {}).get(name) for name in (*CATALOGUE, *OFFER)},
            )
            for family in named
        ]


class Event(NamedTuple):
    """An accepted record of `user-interactions`."""

    user: str
    event: str
    version: int
    is_deleted: bool
    content_hash: int

    @property
    def said(self) -> tuple[int, str, str | None]:
        """When what happened to which pin: of equal rank is only what says the same."""
        chance = random.Random(repr(tuple(self)))
        at_ms = START_MS + chance.randrange(6) * MINUTE_MS
        return at_ms, chance.choice(("save", "save", "view")), chance.choice((None, *PIN_IDS))

    def statement(self) -> Statement:
        """As the index holds it."""
        at_ms, action, pin = self.said
        payload = {"pin_id": pin, "action": action, "category": action + "s"}
        return Statement(
            "interactions",
            self.user.encode(),
            self.event.encode(),
            (self.version,),
            self.is_deleted,
            self.content_hash,
            at_ms,
            (),
            None if self.is_deleted else payload,
        )


class Case(NamedTuple):
    """What was said, how the three indices were told, and how inboxes are asked for."""

    follows: tuple[Follow, ...]
    updates: tuple[Update, ...]
    events: tuple[Event, ...]
    told: tuple[Told, Told, Told]
    most: tuple[int, int]
    limit: int
    lookup_bits: int


# ------------------------------------------------------------------------------------------------- the oracle

Written = tuple[Any, ...]


def expected_follows(case: Case, user: str) -> list[tuple[int, str, str]]:
    """What a user follows, since when, the newest first."""
    standing: dict[tuple[str, str], Follow] = {}
    for said in case.follows:
        held = standing.get((said.kind, said.followed))
        if said.user == user and (held is None or order_of(said) > order_of(held)):
            standing[said.kind, said.followed] = said
    live = [one for one in standing.values() if not one.is_deleted]
    live.sort(key=lambda one: (one.time_ms, (one.kind[0] + one.followed).encode()), reverse=True)
    return [(one.time_ms, one.kind, one.followed) for one in live]


def order_of(said: Follow) -> tuple[int, bool, int, int]:
    return said.version, said.is_deleted, said.content_hash, -said.time_ms


def expected(case: Case, user: str) -> tuple[list[Written], bool]:
    """The whole inbox of a user, newest first, and whether it is complete."""
    most_follows, most_events = case.most
    follows = expected_follows(case, user)
    found, is_complete = [], len(follows) <= most_follows
    for since_ms, kind, followed in follows[:most_follows]:
        if kind == "pin":
            entries, is_whole = of_pin(case, followed, since_ms), True
        else:
            entries, is_whole = of_user(case, followed, since_ms, most_events)
        found += entries
        is_complete = is_complete and is_whole
    return sorted(found, reverse=True, key=lambda entry: entry[:4]), is_complete


def newest(times: Iterable[int], most: int) -> int:
    """The time at or before which is left out what is too much; -1: nothing is."""
    ordered = sorted(times, reverse=True)
    return ordered[most] if len(ordered) > most else -1


def of_pin(case: Case, pin: str, since_ms: int) -> list[Written]:
    """What became of a pin since a time."""
    said: dict[tuple[int, str], tuple[Any, ...]] = {}
    for update in case.updates:
        for family in FIELDS if update.is_deleted else update.families:
            rank = (update.is_deleted, update.hashed(family), -update.time_ms)
            held = said.get((update.version, family))
            if update.pin == pin and (held is None or rank > held[0]):
                said[update.version, family] = (rank, update.families.get(family))
    steps: dict[tuple[int, int], dict[str, Any]] = {}
    for (version, family), (rank, values) in said.items():
        steps.setdefault((-rank[2], version), {})[family] = None if rank[0] else dict(values)
    stands: dict[str, Any] = {}
    greatest = dict.fromkeys(FIELDS, 0)
    found = []
    for (time_ms, version), families in sorted(steps.items()):
        before, has_been = document(stands), "catalogue" in stands
        for family, values in families.items():
            if version > greatest[family]:
                greatest[family], stands[family] = version, values
        after = document(stands)
        if before == after or time_ms < since_ms:
            continue
        what = "gone" if after is None else "changed" if before else "back" if has_been else "new"
        was = before or {}
        changes = {n: (was.get(n), now) for n, now in (after or {}).items() if was.get(n) != now}
        place = (time_ms, "p", pin.encode(), version.to_bytes(8, "big"))
        found.append((*place, what, (after or before or {})["title"], changes))
    return found


def document(stands: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a pin says."""
    if stands.get("catalogue") is None:
        return None
    return stands["catalogue"] | (stands.get("offer") or dict.fromkeys(OFFER))


def of_user(case: Case, user: str, since_ms: int, most: int) -> tuple[list[Written], bool]:
    """What a user did in public since a time."""
    standing: dict[str, Event] = {}
    for event in case.events:
        held = standing.get(event.event)
        if event.user == user and (held is None or event[2:] > held[2:]):
            standing[event.event] = event
    live = [event for event in standing.values() if not event.is_deleted]
    since = [event for event in live if event.said[0] >= since_ms]
    floor = newest((event.said[0] for event in since), most)
    found: list[Written] = []
    for event in since:
        time_ms, action, pin = event.said
        if time_ms > floor and action == "save":
            found.append((time_ms, "u", user.encode(), event.event.encode(), action, pin, "saves"))
    return found, floor == -1


# ------------------------------------------------------------------------------------------------- drawing


def drawn(data: bytes) -> Case:
    """A case from small choices."""
    choices = Choices(data)
    follows = tuple(follow(choices) for _ in range(choices.below(30)))
    updates = tuple(update(choices) for _ in range(choices.below(50)))
    events = tuple(event(choices) for _ in range(choices.below(30)))
    logs = (
        (USER_FOLLOWS_INDEX, tuple(one.statement() for one in follows)),
        (PIN_CHANGES, tuple(said for one in updates for said in one.statements())),
        (USER_EVENTS, tuple(one.statement() for one in events)),
    )
    told = tuple(
        Told(
            spec,
            log,
            (),
            choices.below(len(log) + 1) if choices.below(4) else None,
            choices.below(5),
            choices.of((90, 25, 9, 4)),
            1 + choices.below(3),
            START_MS,
        )
        for spec, log in logs
    )
    most = choices.of((100, 100, 2)), choices.of((100, 100, 2))
    return Case(follows, updates, events, told, most, choices.of((100, 1, 2, 3)), choices.of((64, 64, 2)))


def follow(choices: Choices) -> Follow:
    user, kind = choices.of(USERS[:2]), choices.of(FOLLOWED)
    others = [one for one in (*USERS, "nobody") if one != user]
    followed = choices.of(PIN_IDS) if kind == "pin" else choices.of(others)
    is_deleted = choices.is_hit(5)
    return Follow(
        user, kind, followed, 1 + choices.below(3), is_deleted, choices.of((0, -1, 1)), time_of(choices)
    )


def update(choices: Choices) -> Update:
    pin, version = choices.of(PIN_IDS[:4]), 1 + choices.below(8)
    if choices.is_hit(7):
        return Update(pin, version, True, {}, time_of(choices))
    families: dict[str, dict[str, Any]] = {}
    named = choices.of((("catalogue", "offer"), ("catalogue",), ("offer",), ("offer",)))
    if "catalogue" in named:
        title, category = choices.of(("", "a title", None)), choices.of(("fruit", "fruit", "grün"))
        families["catalogue"] = {"title": title, "category": category, "department": None, "brand": "b"}
    if "offer" in named:
        price, is_available = choices.of((1, 2, 2**45)), choices.below(3) > 0
        families["offer"] = {"price_usd_micros": price, "is_available": is_available}
    return Update(pin, version, False, families, time_of(choices))


def event(choices: Choices) -> Event:
    user, about = choices.of(USERS[1:]), f"e{choices.below(6)}"
    return Event(user, about, 1 + choices.below(3), choices.is_hit(5), choices.of((0, -1, 1)))


def time_of(choices: Choices) -> int:
    """Few times, so that many things happen at once."""
    return START_MS + choices.below(6) * MINUTE_MS + choices.of((0, 0, 0, 1))


# ------------------------------------------------------------------------------------------------- the real


def written(entry: inbox.InboxEntry) -> Written:
    """An entry as the oracle writes it."""
    if isinstance(entry, inbox.PinEntry):
        changes = {change.field: (change.was, change.is_now) for change in entry.changes}
        place = (entry.time_ms, "p", entry.pin_id, entry.version.to_bytes(8, "big"))
        return (*place, entry.what, entry.title, changes)
    place = (entry.time_ms, "u", entry.user_id, entry.event_id)
    return (*place, entry.action, entry.pin_id, entry.category)


def check(case: Case, views: tuple[TimelineView, TimelineView, TimelineView]) -> None:
    """Every user's follows and inbox, page by page, are what the oracle says."""
    for user in (*USERS, "nobody"):
        whole = inbox.follows(views[0], user.encode())
        found = [
            (f.since_ms, *(("pin", f.pin_id) if f.pin_id is not None else ("user", f.followed_user_id)))
            for f in whole.follows
        ]
        assert found == [(t, kind, one.encode()) for t, kind, one in expected_follows(case, user)], user
        mine = inbox.follows(views[0], user.encode(), case.most[0])
        entries, is_complete = expected(case, user)
        before, read = None, []
        while True:
            page = inbox.read(mine, views[1], views[2], case.limit, before)
            assert len(page.entries) <= case.limit
            assert page.is_complete == is_complete or before is not None, user
            read += map(written, page.entries)
            before = page.following
            if before is None:
                break
            assert len(page.entries) == case.limit
        assert read == entries, user


CASES = st.binary(min_size=1600, max_size=1600).map(drawn)


@cases(300)
@given(CASES)
def test_an_inbox_is_what_became_of_what_is_followed(case: Case) -> None:
    before = fact.LOOKUP_BITS, inbox.MAX_EVENTS
    fact.LOOKUP_BITS, inbox.MAX_EVENTS = case.lookup_bits, case.most[1]
    try:
        follows, changes, events = case.told
        with served(follows) as one, served(changes) as two, served(events) as three:
            check(case, (one, two, three))
    finally:
        fact.LOOKUP_BITS, inbox.MAX_EVENTS = before
