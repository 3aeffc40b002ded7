"""Random histories: statements in logs and loads, and what is done with them step by step.

Belongs here: data to draw, with few keys and few ids so that everything collides. Does not belong here: the product
(``harness`` drives it) and the answers (``tests.oracle`` knows them).

A history is drawn as one short run of bytes whose every byte is a choice among few. That is some twenty times quicker
than a strategy for each field, has no bias towards short lists, and shrinks to zeros, which mean the simplest choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.oracle import Statement

MINUTE_MS = 60_000
START_MS = 1_700_000_000_000 // MINUTE_MS * MINUTE_MS

KEYS = (b"k0", b"k1", "schlüssel".encode(), b"k", b"k0k1")
IDS = (b"e0", b"e1", b"e10", b"\xf0\x9f\x8d\x8b", b"a", b"~")
TEXTS = ("red", "", None, "blue", "grün", "'--")
WORDS = (["a", "b"], [], None, ["b"], ["c", "a"], ["c"])
SHAPES = (
    [1.0, 0.0, 0.5, -1.0],
    None,
    [2.0, 1.0, 0.0, 0.0],
    [1.0],
    [0.0, 0.0, 0.0, 0.0],
    [-2.0, 1.5, 1.0, 2.0],
)
GREATEST = 2**63 - 1


class Feed(NamedTuple):
    """A family of the index under test and the stream that feeds it (None: only bases have it)."""

    family: str
    stream: str | None


class Record(NamedTuple):
    """What one record of a topic or a load says, with the time at which the broker (or the load) took it."""

    statements: tuple[Statement, ...]
    broker_time_ms: int


Offsets = Mapping[int, int]
"""The next offset of each partition."""


class Epoch(NamedTuple):
    """A stream's next micro-batch: it reads each partition up to an offset."""

    stream: str
    upto: Offsets


class Again(NamedTuple):
    """A micro-batch of the running incarnation that Spark repeats after a crash, the last one or one before."""

    stream: str
    back: int


class Incarnation(NamedTuple):
    """The checkpoint of a stream is gone; it begins anew some records before its last committed position."""

    stream: str
    reread: int


class Build(NamedTuple):
    """A base of what the archive holds, and a few records that it took beyond the cut."""

    archived: Mapping[str, Offsets]
    loads: tuple[str, ...]
    beyond: int
    shards: int
    is_curated: bool
    """Whether the builder is given what is current alone, as ``curated`` keeps it, or every record."""
    model: int


class Publish(NamedTuple):
    """The newest candidate is published, after whatever came since its cut."""

    is_slow: bool
    """Whether the old view is still served, and follows the delta, while the new one is made ready."""


class Rollback(NamedTuple):
    """An older base of those published before is served again."""

    back: int
    without_delta: bool


class Resume(NamedTuple):
    """The delta counts again after a roll back without it."""


class Restart(NamedTuple):
    """Serving starts anew: it maps the base, takes the delta table's snapshot and follows its log from there."""


class Compact(NamedTuple):
    """Maintenance rewrites the delta's files into one and deletes the old ones."""

    is_late: bool
    """Whether it happens right after the next commit, before that was read."""


Step = Epoch | Again | Incarnation | Build | Publish | Rollback | Resume | Restart | Compact


class History(NamedTuple):
    """A whole case; every example begins with an empty home."""

    logs: Mapping[str, tuple[tuple[Record, ...], ...]]
    """stream → partitions → records in the order of their offsets"""
    loads: Mapping[str, tuple[Record, ...]]
    models: tuple[tuple[Statement, ...], ...]
    """what the base-only families hold in the bases of each model"""
    steps: tuple[Step, ...]
    lookup_bits: int
    """how many bits of a hash are searched by: few, so that hashes collide"""
    age_ms: int | None
    count: int | None
    ends_with_restart: bool


class Choices:
    """Small choices, read one by one from drawn bytes; behind their end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound`` - 1."""
        self._at += 1
        return self._data[self._at - 1] % bound if self._at <= len(self._data) else 0

    def of(self, options: Sequence[Any]) -> Any:
        """One of the options; the first is the simplest."""
        return options[self.below(len(options))]

    def is_hit(self, one_in: int) -> bool:
        """True about once in so many times; False is simpler."""
        return self.below(one_in) == one_in - 1


def content_hash(variant: int) -> int:
    """A signed hash of a content variant; the order of hashes is not that of variants, and both ends occur."""
    if variant == 3:
        return -GREATEST - 1
    if variant == 4:
        return GREATEST
    return int.from_bytes(hashlib.sha256(b"%d" % variant).digest()[:8], "big", signed=True)


def is_equal_rank(a: Statement, b: Statement) -> bool:
    """Whether two statements say the same thing: then they have to be the same statement."""
    return (a.version, a.is_deleted, a.content_hash) == (b.version, b.is_deleted, b.content_hash)


class Crowd(NamedTuple):
    """How few things a case is about; the fewer, the more often it says something else of the same one."""

    keys: tuple[bytes, ...]
    ids: tuple[bytes, ...]
    places: int
    """how many integers a version has"""


def crowd(choices: Choices) -> Crowd:
    """One to four keys, two to six ids."""
    return Crowd(
        KEYS[: choices.of((1, 2, 2, 3, 4))], IDS[: choices.of((2, 3, 3, 4, 6))], choices.of((1, 1, 2, 3, 4))
    )


def version_of(choices: Choices, places: int) -> tuple[int, ...]:
    """One to four small integers; now and then a place at the limit."""
    version = [1 + choices.below(3)]
    version += [choices.below(3) for _ in range(places - 1)]
    if choices.is_hit(40):
        version[choices.below(places)] = 2**61 - 1
    return tuple(version)


def minute(choices: Choices) -> int:
    """An event time: few, so that equal times are common, and not all of them on a minute."""
    return START_MS + choices.below(8) * MINUTE_MS + choices.of((0, 0, 0, 1, 59_999))


def about_documents(choices: Choices, families: Sequence[str], among: Crowd) -> tuple[Statement, ...]:
    """A record that sets one or more whole families of a document, or deletes it in all of them."""
    key = choices.of(among.keys)
    version = version_of(choices, among.places)
    if choices.is_hit(4):
        tombstone = content_hash(choices.below(6)) if choices.is_hit(3) else 0
        return tuple(Statement(family, key, b"", version, True, tombstone) for family in families)
    first = choices.below(len(families))
    chosen = families[first : first + 1 + choices.below(2)]
    made = []
    for family in chosen:
        variant = choices.below(6)
        payload = {
            "text": TEXTS[variant],
            "number": None if variant == 5 else variant * 1000 - 1,
            "words": WORDS[variant],
            "shape": SHAPES[variant],
        }
        made.append(Statement(family, key, b"", version, False, content_hash(variant), payload=payload))
    return tuple(made)


def about_events(choices: Choices, families: Sequence[str], among: Crowd) -> tuple[Statement, ...]:
    """A record about one event of a timeline: what happened, an edit of it, or its deletion."""
    family = choices.of(families)
    key = choices.of(among.keys)
    event_id = choices.of(among.ids)
    version = version_of(choices, among.places)
    if choices.is_hit(5):
        tombstone = content_hash(choices.below(6)) if choices.is_hit(3) else 0
        return (Statement(family, key, event_id, version, True, tombstone),)
    variant = choices.below(6)
    time_ms = START_MS + (variant * 5 + event_id[0]) % 7 * MINUTE_MS + (0, 0, 0, 1, 59_999, 0)[variant]
    payload = {"text": TEXTS[variant], "number": None if variant == 5 else variant * 1000 - 1}
    return (Statement(family, key, event_id, version, False, content_hash(variant), time_ms, (), payload),)


def about_sums(choices: Choices, families: Sequence[str], among: Crowd) -> tuple[Statement, ...]:
    """A record about one event that counts; an edit may move it to another key, another bucket, other amounts."""
    family = choices.of(families)
    event = choices.of(among.ids)
    version = version_of(choices, among.places)
    if choices.is_hit(5):
        tombstone = content_hash(choices.below(6)) if choices.is_hit(3) else 0
        key = choices.of(among.keys)  # a deletion may name another key than the one that the event counts for
        amounts = choices.of(((0, 0), (), (2, 1)))  # whatever it carries, a deletion adds nothing
        time_ms = choices.of((0, START_MS))
        return (Statement(family, key, b"", version, True, tombstone, time_ms, amounts, None, event),)
    variant = choices.below(6)
    key = among.keys[(variant + event[0]) % len(among.keys)]
    time_ms = START_MS + (variant * 5 + event[0]) % 7 * MINUTE_MS + (0, 0, 0, 1, 59_999, 0)[variant]
    amounts = ((1, 0), (0, 0), (2, 5), (2**40, 1), (0, 1_000_003), (1, 1))[variant]
    return (
        Statement(family, key, b"", version, False, content_hash(variant), time_ms, amounts, None, event),
    )


ABOUT = {"documents": about_documents, "timeline": about_events, "sums": about_sums}


@st.composite
def histories(
    draw: st.DrawFn,
    *,
    about: str,
    feeds: Sequence[Feed],
    ages_ms: Sequence[int | None] = (None,),
    counts: Sequence[int | None] = (None,),
    most_records: int = 32,
    most_steps: int = 5,
    most_builds: int = 3,
) -> History:
    """A history of an index of this kind."""
    length = draw(st.integers(1, most_records))  # drawn first: lists are too short by themselves
    step_count = draw(st.integers(1, most_steps))
    choices = Choices(draw(st.binary(min_size=8 * step_count + 40, max_size=8 * step_count + 40)))
    drawn = Choices(draw(st.binary(min_size=16 * length, max_size=16 * length)))

    streams = tuple(dict.fromkeys(feed.stream for feed in feeds if feed.stream is not None))
    partitions = {stream: 1 + choices.below(2) for stream in streams}
    logs: dict[str, list[list[Record]]] = {stream: [[] for _ in range(n)] for stream, n in partitions.items()}
    loads: dict[str, list[Record]] = {name: [] for name in ("load-1", "load-2")[: choices.below(3)]}
    among = crowd(choices)
    said: list[tuple[str, Record]] = []
    for _ in range(length):
        stream, record = _record(drawn, said, about, feeds, streams, among)
        said.append((stream, record))
        if loads and drawn.is_hit(5):
            loads[drawn.of(sorted(loads))].append(record)
            if drawn.is_hit(2):
                continue  # in the load alone; otherwise the load overlaps what Kafka brings
        logs[stream][drawn.below(partitions[stream])].append(record)

    age_ms, count = choices.of(ages_ms), choices.of(counts)
    models = _models(choices, feeds)
    steps = _steps(choices, step_count, logs, sorted(loads), most_builds)
    return History(
        {stream: tuple(tuple(records) for records in log) for stream, log in logs.items()},
        {name: tuple(records) for name, records in loads.items()},
        models,
        steps,
        choices.of((64, 1, 2, 3)),
        age_ms,
        count,
        choices.is_hit(3),
    )


def _record(
    choices: Choices,
    said: Sequence[tuple[str, Record]],
    about: str,
    feeds: Sequence[Feed],
    streams: Sequence[str],
    among: Crowd,
) -> tuple[str, Record]:
    """A new record, one that was said before and is delivered again, or an older form of one, late."""
    if said and choices.is_hit(6):
        return said[choices.below(len(said))]
    if said and choices.is_hit(5):
        stream, record = said[choices.below(len(said))]
        older = record.statements[0]
        same = Crowd(
            among.keys if older.event else (older.key,), (older.event or older.id or IDS[0],), among.places
        )
        statements = ABOUT[about](choices, (older.family,), same)
        return stream, Record(tuple(s._replace(version=(1,)) for s in statements), minute(choices))
    stream = choices.of(streams)
    families = [feed.family for feed in feeds if feed.stream == stream]
    if choices.is_hit(4):  # versions of fewer places beside them
        among = among._replace(places=1 + choices.below(among.places))
    statements = ABOUT[about](choices, families, among)
    return stream, Record(statements, minute(choices))


def _models(choices: Choices, feeds: Sequence[Feed]) -> tuple[tuple[Statement, ...], ...]:
    families = [feed.family for feed in feeds if feed.stream is None]
    models = []
    for model in range(2 if families else 0):
        statements = []
        for family in families:
            for number, key in enumerate(KEYS):
                if not choices.is_hit(3):
                    vector = [float(model + 1), float(number), float(choices.below(5)) - 2.0, 0.5]
                    statements.append(
                        Statement(family, key, b"", (model + 1,), False, 0, payload={"vector": vector})
                    )
        models.append(tuple(statements))
    return tuple(models)


def _steps(
    choices: Choices,
    step_count: int,
    logs: Mapping[str, Sequence[Sequence[Record]]],
    loads: Sequence[str],
    most_builds: int,
) -> tuple[Step, ...]:
    """Steps that make sense one after the other; the archive and each stream go forward, each at its own pace."""
    read = {stream: [0] * len(log) for stream, log in logs.items()}
    archived = {stream: [0] * len(log) for stream, log in logs.items()}
    lasting: list[str] = []
    steps: list[Step] = []

    def forward(at: Sequence[int], log: Sequence[Sequence[Record]]) -> list[int]:
        return [
            offset + _share(choices.below(8), len(records) - offset)
            for offset, records in zip(at, log, strict=True)
        ]

    def epoch() -> None:
        waiting = [s for s in sorted(logs) if any(o < len(r) for o, r in zip(read[s], logs[s], strict=True))]
        stream = choices.of(waiting if waiting and not choices.is_hit(12) else sorted(logs))
        read[stream] = forward(read[stream], logs[stream])
        steps.append(Epoch(stream, dict(enumerate(read[stream]))))

    def build() -> None:
        for stream, log in logs.items():
            archived[stream] = forward(archived[stream], log)
        lasting.extend(loads[len(lasting) : len(lasting) + choices.below(3)])
        steps.append(
            Build(
                {stream: dict(enumerate(offsets)) for stream, offsets in archived.items()},
                tuple(lasting),
                choices.of((0, 0, 0, 1, 3)),
                choices.of((1, 1, 1, 1, 2, 3)),
                choices.is_hit(3),
                choices.below(2),
            )
        )
        if not choices.is_hit(4):
            steps.append(Publish(choices.is_hit(3)))

    for _ in range(choices.of((1, 1, 0, 2))):
        epoch()
    build()
    builds = 1
    for _ in range(step_count):
        kind = choices.below(20)
        if kind < 6:
            epoch()
        elif (kind < 10 and builds < most_builds) or (kind < 15 and builds < 2):
            builds += 1
            build()
            if choices.is_hit(3):
                steps.append(Rollback(choices.below(2), choices.is_hit(2)))
        elif kind < 15:
            steps.append(Rollback(choices.below(2), choices.is_hit(2)))
        elif kind < 16:
            steps.append(Publish(choices.is_hit(3)))
        elif kind < 17:
            steps.append(choices.of((Resume(), Restart())))
        elif kind < 18:
            steps.append(Again(choices.of(sorted(logs)), choices.below(2)))
        elif kind < 19:
            steps.append(Compact(choices.is_hit(2)))
        else:
            steps.append(Incarnation(choices.of(sorted(logs)), choices.below(3)))
    if not choices.is_hit(4):  # mostly the streams catch up in the end, so that late and older forms come
        for stream, log in sorted(logs.items()):
            if any(offset < len(records) for offset, records in zip(read[stream], log, strict=True)):
                steps.append(
                    Epoch(stream, {partition: len(records) for partition, records in enumerate(log)})
                )
    return tuple(steps)


def _share(eighths: int, left: int) -> int:
    """Nothing, a part, or all of what is left; mostly a part."""
    return left * (3, 1, 2, 4, 5, 6, 8, 0)[eighths] // 8 + (0 if eighths == 7 else min(1, left * 3 // 8))
