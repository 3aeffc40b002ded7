"""What is served of patterns equals a naive evaluator over everything that was accepted, over real bases and deltas.

Statements come late, twice, edited and deleted; epochs are cut anywhere, some are read again by a new incarnation that
kept nothing, and a base may know more of one partition than the epochs after it begin with. Brokers' clocks step back,
and some users' records are in two partitions.
"""

from __future__ import annotations

import datetime
import random
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import USER_INTERACTIONS
from pipelines.contracts.contract import accepted_schema
from pipelines.indexing import build, delta
from pipelines.indexing.base import empty, open_base
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import Position
from pipelines.indexing.spec import limited
from pipelines.indexing.timelines import TimelineView
from pipelines.users import pattern_files, profiles
from pipelines.users.pattern_files import Declared
from pipelines.users.patterns import firing
from pipelines.users.patterns.index import spec_of
from tests import pattern_oracle
from tests.pattern_oracle import Firing, Said
from tests.planted import PATTERN_BUGS, Bug, planted
from tests.properties.harness import SCRATCH, cases

MINUTE_MS = 60_000
START_MS = 1_704_067_200_000
TOPIC = "user-interactions@one"
USERS = {"u0": 0, "grün": 0, "u2": 1, "u3": 1}
"""User → partition; of a user that wanders, the first."""
CATEGORIES = ("fruit", "bread", None)
PINS = ("p0", "p1", None)
ACTIONS = ("view", "add_to_basket", "purchase", "click")
SCHEMA = accepted_schema(USER_INTERACTIONS)


class Record(NamedTuple):
    """A record in its partition, and what it says."""

    partition: int
    offset: int
    broker_ms: int
    said: Said


class World(NamedTuple):
    """Rules as a file has them, the log in the order of its arrival, and how it is cut.

    Attributes:
        ends: Of epochs: how much of the log each has read.
        restarts: Before which epochs everything that was kept is lost, and the log is read from its beginning.
        cut: Of the base, by partition; None: there is none.
        beyond: So many records more than its cut does the base hold, of each partition.
        prefix: Of how much of the log the base is, where users wander, or the stream is behind it; None: of the
            partitions up to cut and beyond.
        horizon_ms: What fired before this neither the base has nor is it served, where there is a base.
    """

    file: dict[str, Any]
    log: list[Record]
    ends: list[int]
    restarts: set[int]
    cut: dict[int, int] | None
    beyond: int
    prefix: int | None = None
    horizon_ms: int = 0

    def epochs(self) -> list[tuple[int, int, list[Record]]]:
        """Incarnation, epoch, records."""
        found, incarnation, epoch, start = [], 1, 0, 0
        for number, end in enumerate(self.ends):
            if number in self.restarts:
                incarnation, epoch, start = incarnation + 1, 0, 0
                middle = end // 2
                found.append((incarnation, 0, self.log[:middle]))
                epoch, start = 1, middle
            found.append((incarnation, epoch, self.log[start:end]))
            epoch, start = epoch + 1, end
        return found

    def held(self) -> list[Record]:
        """What the base was built of."""
        cut = self.cut or {}
        if self.prefix is not None:
            return self.log[: self.prefix + self.beyond]
        return [one for one in self.log if one.offset < cut.get(one.partition, 0) + self.beyond]


def drawn(chance: random.Random) -> World:
    world = drawn_whole(chance)
    has_horizon = world.cut is not None and chance.random() < 0.3
    horizon_ms = START_MS + chance.choice((1, 20, 60)) * MINUTE_MS
    return world._replace(horizon_ms=horizon_ms) if has_horizon else world


def drawn_whole(chance: random.Random) -> World:
    file = drawn_rules(chance)
    is_wandering, is_behind = chance.choice(((True, False), (False, True), (False, False), (False, False)))
    log = drawn_log(chance, pattern_oracle.span(file["lateness"]), is_wandering, not is_behind)
    ends = sorted([*chance.choices(range(1, len(log) + 1), k=chance.randrange(0, 8)), len(log)])
    counts = [sum(one.partition == p for one in log) for p in (0, 1)]
    cut = {p: chance.randint(0, n) for p, n in enumerate(counts)} if chance.random() < 0.7 else None
    if (
        cut is not None and chance.random() < 0.5
    ):  # of one partition where epochs end, so that some are wholly in it
        ahead = chance.choice((0, 1))
        cut[ahead] = sum(one.partition == ahead for one in log[: chance.choice(ends)])
    restarts = {number for number in range(1, len(ends)) if chance.random() < 0.15}
    beyond = chance.choice((0, 0, 1, 3))
    if is_behind:  # what the base knows counts, whatever the stream told before
        return World(file, log, ends[: len(ends) // 2], restarts, cut or {}, 0, len(log))
    if cut is None or not is_wandering:
        return World(file, log, ends, restarts, cut, beyond)
    # Of a user in two partitions nobody can say who knows more, but where all was known up to somewhere.
    prefix = chance.randint(0, len(log))
    cut = {p: sum(one.partition == p for one in log[:prefix]) for p in (0, 1)}
    return World(file, log, ends, restarts, cut, beyond, prefix)


def drawn_rules(chance: random.Random) -> dict[str, Any]:
    rules: list[dict[str, Any]] = []
    for number in range(chance.randrange(1, 4)):
        within, by = chance.choice(("1m", "3m", "20m")), chance.choice(("category", "pin_id"))
        filters = {"surfaces": ["home"]} if chance.random() < 0.2 else {}
        if chance.random() < 0.5:
            actions = chance.sample(ACTIONS, chance.randrange(1, 3))
            said = {
                "actions": actions,
                "by": by,
                "at_least": chance.randrange(1, 4),
                "within": within,
                **filters,
            }
            kind = "count"
        else:
            after, unless = chance.sample(ACTIONS, 2)
            if chance.random() < 0.1:
                unless = after
            said = {"after": [after], "unless": [unless], "by": by, "within": within, **filters}
            kind = "absence"
        rules.append({"name": f"rule_{number}", kind: said, "then": {"segment": "some", "lasts": "1d"}})
    return {"lateness": chance.choice(("5m", "1h")), "rules": rules}


def drawn_log(
    chance: random.Random, lateness_ms: int, is_wandering: bool, has_steps_back: bool
) -> list[Record]:
    """Statements about events that are not older than the lateness behind their user's newest."""
    newest = dict.fromkeys(USERS, START_MS)
    times: dict[tuple[str, str], list[int]] = {}
    ends, broker_ms = [0, 0], START_MS
    log: list[Record] = []
    for number in range(chance.choice((3, 20, 60))):
        user = chance.choice(list(USERS))
        if log and chance.random() < 0.15:
            said = chance.choice(log).said  # again, however old it is
        else:
            recent = [
                e for (u, e), of in times.items() if u == user and min(of) >= newest[user] - lateness_ms
            ]
            is_known = bool(recent) and chance.random() < 0.35
            event = chance.choice(recent) if is_known else f"e{number}"
            said = drawn_statement(chance, user, event, newest[user], lateness_ms)
            if said.record is not None:
                time_ms = said.record["event_time"]
                newest[user] = max(newest[user], time_ms)
                times.setdefault((user, event), []).append(time_ms)
        partition = chance.choice((0, 1)) if is_wandering else USERS[said.user]
        broker_ms += chance.choice((0, 0, 1, 1000, -1500) if has_steps_back else (0, 0, 1, 1000))
        log.append(Record(partition, ends[partition], broker_ms, said))
        ends[partition] += 1
    return log


def drawn_statement(chance: random.Random, user: str, event: str, newest_ms: int, lateness_ms: int) -> Said:
    version = chance.randint(1, 3)
    if chance.random() < 0.15:
        return Said(user, event, version, 7, None)
    steps = (0, 1, MINUTE_MS - 1, MINUTE_MS, 2 * MINUTE_MS, 20 * MINUTE_MS)
    back = min(chance.choice(steps), lateness_ms)
    ahead = 0 if chance.random() < 0.97 else 3 * lateness_ms
    time_ms = newest_ms - back if chance.random() < 0.4 else newest_ms + chance.choice(steps) + ahead
    record = {
        "action": chance.choice(ACTIONS),
        "event_time": time_ms,
        "category": chance.choice(CATEGORIES),
        "pin_id": chance.choice(PINS),
        "surface": chance.choice(("home", None)),
    }
    content = zlib.crc32(repr(record).encode()) - 2**31  # as the contract's hash: of what is said
    return Said(user, event, version, content, record)


def rows_of(log: Sequence[Record]) -> pa.Table:
    """Records as accepted rows."""
    rows = []
    for one in log:
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        record = dict(one.said.record or {})
        if record:
            record["event_time"] = stamp(record["event_time"])
        row |= record | {
            "user_id": one.said.user,
            "event_id": one.said.event,
            "version": one.said.version,
            "is_deleted": one.said.record is None,
            "content_hash": one.said.content,
            "topic_id": TOPIC,
            "partition": one.partition,
            "offset": one.offset,
            "broker_time": stamp(one.broker_ms),
        }
        rows.append(row)
    return pa.Table.from_pylist(rows, SCHEMA)


def stamp(time_ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time_ms // 1000, datetime.UTC) + datetime.timedelta(
        milliseconds=time_ms % 1000
    )


def position(ends: dict[int, int]) -> Position:
    return Position({TOPIC: ends} if ends else {}, frozenset())


def by_user(log: Sequence[Record]) -> dict[str, list[Record]]:
    return {user: mine for user in USERS if (mine := [one for one in log if one.said.user == user])}


def served(world: World, declared: Declared, folder: Path, chance: random.Random) -> TimelineView:
    """Base and delta of the world, as a replica has them."""
    spec = spec_of(lambda: declared.patterns)
    path = delta.table_path(folder, spec.name, "lineage")
    writer = DeltaWriter(spec, path)
    kept: dict[str, bytes] = {}
    before = 1
    read: dict[int, int] = {}
    for incarnation, epoch, records in world.epochs():
        if incarnation != before:
            kept, before, read = {}, incarnation, {}
        facts = [firing.MADE.empty_table()]
        for user, mine in by_user(records).items():
            chance.shuffle(mine)
            made = firing.step(declared.patterns, None, kept.get(user), rows_of(mine))
            kept[user] = made.kept
            facts.append(made.facts)
        starts, read = read, {p: read.get(p, 0) + sum(r.partition == p for r in records) for p in (0, 1)}
        marker = Marker("user_patterns", incarnation, epoch, position(starts), position(read), len(records))
        writer.commit(marker, pa.concat_tables(facts))
    base = empty(spec)
    if world.cut is not None:
        curated = by_user(winners(world.held()))
        made_of = [firing.whole(declared.patterns, rows_of(mine)) for mine in curated.values()]
        facts_of_base = pa.concat_tables([firing.MADE.empty_table(), *made_of])
        meta = build.Meta("one", position(world.cut), world.horizon_ms + MINUTE_MS)
        limits = limited(spec, MINUTE_MS if world.horizon_ms else None, None)
        build.build_local(limits, facts_of_base, folder / "base", meta, shard_count=2)
        base = open_base(spec, folder / "base")
    overlay = Overlay(base, path, 10**6)
    overlay.catch_up()
    assert isinstance(overlay.view, TimelineView)
    return overlay.view


def winners(log: Sequence[Record]) -> list[Record]:
    """What `curated` keeps: of each event one record of those that say the greatest."""
    found: dict[tuple[str, str], Record] = {}
    for one in log:
        held = found.get((one.said.user, one.said.event))
        rank = (one.said.version, one.said.record is None, one.said.content)
        if held is None or rank > (held.said.version, held.said.record is None, held.said.content):
            found[one.said.user, one.said.event] = one
    return list(found.values())


def check(chance: random.Random) -> None:
    world = drawn(chance)
    declared = pattern_files.declared(world.file, "drawn")
    expected = pattern_oracle.firings(world.file["rules"], [one.said for one in world.log])
    folder = Path(tempfile.mkdtemp(prefix="tidemark-", dir=SCRATCH))
    try:
        view = served(world, declared, folder, chance)
        times = [one.at_ms for one in expected] or [START_MS]
        for now_ms in (max(times), chance.choice(times), chance.choice(times) - 1):
            found = {
                Firing(one.rule, user, one.event_id, one.at_ms, one.value)
                for user in USERS
                for one in profiles.fired(view, declared, user.encode(), now_ms)
            }
            assert found == {one for one in expected if world.horizon_ms <= one.at_ms <= now_ms}
    finally:
        shutil.rmtree(folder)


@cases(300)
@given(st.randoms(use_true_random=False))
def test_what_is_served_is_what_a_naive_evaluator_says(chance: random.Random) -> None:
    check(chance)


@cases(100)
@given(st.randoms(use_true_random=False))
def test_a_batch_says_what_a_naive_evaluator_says(chance: random.Random) -> None:
    world = drawn(chance)
    declared = pattern_files.declared(world.file, "drawn")
    facts = [
        row
        for mine in by_user(winners(world.log)).values()
        for row in firing.whole(declared.patterns, rows_of(mine)).to_pylist()
    ]
    found = {
        Firing(said["rule"], row["key"].decode(), said["event_id"], row["time_ms"], said["value"])
        for row in facts
        if (said := row["payload_firings"])["rule"] is not None
    }
    assert found == pattern_oracle.firings(world.file["rules"], [one.said for one in world.log])
    assert len(facts) == len(found) + len(by_user(world.log))


MOST_CASES = 2_000


@pytest.mark.parametrize("bug", PATTERN_BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_found(bug: Bug) -> None:
    with planted(bug), pytest.raises(Exception):  # noqa: B017 - a bug may show in any way
        check_many()


def check_many() -> None:
    for seed in range(MOST_CASES):
        check(random.Random(seed))
