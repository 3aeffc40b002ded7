"""Sequences equal a naive reading of their definition, over real bases and deltas with edits, deletions and repeats."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.indexing import facts as fact
from pipelines.indexing.spec import IndexSpec, Timeline
from pipelines.pins.index import PINS
from pipelines.users import sequences
from pipelines.users.index import USER_EVENTS
from tests import oracle
from tests.oracle import Statement
from tests.properties.harness import SCRATCH, Batch, Candidate, Home, cases, current
from tests.properties.strategies import IDS, KEYS, MINUTE_MS, START_MS, Choices

pytestmark = pytest.mark.timeout(1800)

PIN_IDS = ("p0", "p1", "p2", "grün", "unknown")
EVENT_IDS = (*IDS, b"e2", b"e3", b"e4")
ACTIONS = ("purchase", "view", "hide")
SURFACES = ("home", "search", None)
CATEGORIES = ("fruit", "bread", "grün", None)
UNIT_MS = {"m": MINUTE_MS, "h": 60 * MINUTE_MS, "d": 24 * 60 * MINUTE_MS}
EVENT_FIELDS = ("event_id", "time_ms", "pin_id", "action", "quantity", "value_usd_micros", "surface", "ad_id")
ENRICHMENTS = (
    *("catalogue.title", "catalogue.category", "catalogue.brand"),
    *("offer.price_usd_micros", "offer.is_available", "embedding.vector"),
)


class Told(NamedTuple):
    """What one index was told: `log` in the order of its stream, of which a base (if any) has the first `cut`, and
    the delta what comes from `again` records before that on, in epochs of `size`; `computed` comes with the base."""

    spec: IndexSpec
    log: tuple[Statement, ...]
    computed: tuple[Statement, ...]
    cut: int | None
    again: int
    size: int
    shards: int
    newest_ms: int

    @property
    def base(self) -> list[Statement] | None:
        """What the base was built from."""
        return None if self.cut is None else [*self.log[: self.cut], *self.computed]

    @property
    def visible(self) -> list[Statement]:
        """All that was said and is to be seen."""
        return [*self.log, *(() if self.cut is None else self.computed)]


class Asked(NamedTuple):
    """A definition as YAML or JSON would have it, of whom, and when."""

    said: Mapping[str, Any]
    users: tuple[bytes, ...]
    now_ms: int


class Case(NamedTuple):
    """Events and pins, and what is asked of them."""

    events: Told
    pins: Told
    asked: tuple[Asked, ...]
    lookup_bits: int


# ------------------------------------------------------------------------------------------------- the oracle


def expected(case: Case, asked: Asked, user: bytes) -> tuple[list[dict[str, Any]], bool]:
    """A user's sequence, event by event, and whether it is complete."""
    said, now_ms, read = asked.said, asked.now_ms, case.events.spec.read
    assert isinstance(read, Timeline)
    age_ms = int(said["age"][:-1]) * UNIT_MS[said["age"][-1]] if "age" in said else None
    horizon = oracle.horizon_ms(read.age_ms, None if case.events.base is None else case.events.newest_ms)
    held_ms = None if horizon is None else read.age_ms
    after_ms = now_ms - min([ms for ms in (age_ms, held_ms) if ms is not None], default=now_ms + 1)
    whole = oracle.timeline(
        case.events.visible,
        user,
        ["interactions"],
        base=case.events.base,
        age_ms=read.age_ms,
        count=read.count,
        max_broker_time_ms=case.events.newest_ms,
    )
    pins = oracle.documents(case.pins.visible, "catalogue")
    chosen, seen = [], set()
    for event in whole.events:
        payload = event.payloads["interactions"]
        pin = pins.get(payload["pin_id"].encode(), {})
        is_meant = (
            after_ms < event.time_ms <= now_ms
            and payload["action"] in said.get("actions", [payload["action"]])
            and payload["surface"] in said.get("surfaces", [payload["surface"]])
            and ("categories" not in said or pin.get("catalogue", {}).get("category") in said["categories"])
        )
        about = payload[said["deduplicate_by"]] if "deduplicate_by" in said else None
        if not is_meant or about in seen:
            continue
        seen |= set() if about is None else {about}
        own = {"event_id": event.id.decode(), "time_ms": event.time_ms, **payload}
        row = {name: own[name] for name in said["fields"]}
        for name in said.get("enrich", ()):
            family, column = name.split(".")
            row[name] = pin.get(family, {}).get(column)
        chosen.append(row)
    kept = chosen[: said["max_length"]]
    is_cut = whole.missing_ms is not None and whole.missing_ms > after_ms
    is_short = age_ms is not None and held_ms is not None and age_ms > held_ms
    is_before = horizon is not None and after_ms + 1 < horizon
    is_complete = not (is_cut or is_short or is_before) or len(kept) == said["max_length"]
    return kept[::-1] if said.get("order") == "oldest_first" else kept, is_complete


# ------------------------------------------------------------------------------------------------- drawing


def drawn(data: bytes) -> Case:
    """A case from small choices."""
    choices = Choices(data)
    read = Timeline(choices.of((None, None, 3 * MINUTE_MS)), choices.of((None, 2, 3, 5)))
    events = told(USER_EVENTS._replace(read=read), choices, interaction, ())
    vectors = tuple(vector(pin, choices) for pin in PIN_IDS[:2])
    pins = told(PINS, choices, update, vectors)
    asked = tuple(question(choices) for _ in range(8))
    return Case(events, pins, asked, choices.of((64, 64, 2)))


def question(choices: Choices) -> Asked:
    """What is asked."""
    users = tuple(choices.of((*KEYS[:3], b"nobody")) for _ in range(1 + choices.below(4)))
    return Asked(
        definition(choices), users, START_MS + choices.below(8) * MINUTE_MS + choices.of((0, 0, 1, -1))
    )


def told(spec: IndexSpec, choices: Choices, record: Any, computed: tuple[Statement, ...]) -> Told:
    """What an index is told."""
    log = tuple(said for _ in range(choices.below(70)) for said in record(choices))
    cut = choices.below(len(log) + 1) if choices.below(4) else None
    newest_ms = START_MS + choices.below(9) * MINUTE_MS
    return Told(
        spec,
        log,
        computed,
        cut,
        choices.below(5),
        choices.of((90, 25, 9, 4)),
        1 + choices.below(3),
        newest_ms,
    )


def interaction(choices: Choices) -> list[Statement]:
    """A record of `user-interactions`."""
    about = Statement("interactions", choices.of(KEYS[:3]), choices.of(EVENT_IDS), *stand(choices))
    chance = random.Random(repr(about))  # of equal rank is only what says the same
    at_ms = START_MS + chance.randrange(6) * MINUTE_MS + chance.choice((0, 0, 1))
    if about.is_deleted:
        return [about._replace(time_ms=at_ms)]
    payload = {
        "pin_id": chance.choice(PIN_IDS),
        "action": chance.choice(ACTIONS),
        "quantity": chance.choice((None, 1, 7)),
        "value_usd_micros": chance.choice((None, 0, 2**40)),
        "surface": chance.choice(SURFACES),
        "ad_id": chance.choice((None, "a0", "a1")),
    }
    return [about._replace(time_ms=at_ms, payload=payload)]


def update(choices: Choices) -> list[Statement]:
    """A record of `pin-updates`: a deletion, or one or both families."""
    pin, (version, is_deleted, content_hash) = choices.of(PIN_IDS[:4]).encode(), stand(choices)
    families = (
        ("catalogue", "offer")
        if is_deleted
        else choices.of((("catalogue", "offer"), ("catalogue",), ("offer",)))
    )
    found = []
    for family in families:
        about = Statement(family, pin, b"", version, is_deleted, content_hash)
        chance = random.Random(repr(about))
        catalogue = {
            "title": chance.choice(("", "a title")),
            "category": chance.choice(CATEGORIES),
            "department": None,
            "brand": chance.choice((None, "Private")),
        }
        offer = {
            "price_usd_micros": chance.choice((None, 1_500_000)),
            "is_available": chance.choice((None, True, False)),
        }
        payload = catalogue if family == "catalogue" else offer
        found.append(about if is_deleted else about._replace(payload=payload))
    return found


def stand(choices: Choices) -> tuple[tuple[int, ...], bool, int]:
    """Version, whether it is a deletion, content hash: few, so that records correct and repeat each other."""
    return (1 + choices.below(3),), choices.is_hit(5), choices.of((0, -1, 1))


def vector(pin: str, choices: Choices) -> Statement:
    """What the model computed of a pin."""
    value = [choices.below(8) / 4 for _ in range(32)]
    return Statement("embedding", pin.encode(), payload={"vector": value})


def definition(choices: Choices) -> dict[str, Any]:
    """A definition."""
    said: dict[str, Any] = {
        "max_length": choices.of((1, 1, 2, 3, 5, 8)),
        "fields": some(EVENT_FIELDS, choices),
    }
    if choices.below(2):
        said["actions"] = some(ACTIONS, choices)
    if choices.is_hit(3):
        said["surfaces"] = some(SURFACES[:2], choices)
    if choices.is_hit(3):
        said["categories"] = some(CATEGORIES[:3], choices)
    if choices.below(2):
        said["age"] = choices.of(("1m", "3m", "4m", "5m", "90d"))
    if choices.below(2):
        said["deduplicate_by"] = choices.of(("pin_id", "pin_id", "ad_id"))
    if choices.below(2):
        said["order"] = choices.of(("newest_first", "oldest_first"))
    if choices.below(2):
        said["enrich"] = some(ENRICHMENTS, choices)
    return said


def some(options: tuple[Any, ...], choices: Choices) -> list[Any]:
    """One or more of the options, in any order."""
    left = list(options)
    return [left.pop(choices.below(len(left))) for _ in range(1 + choices.below(len(options)))]


# ------------------------------------------------------------------------------------------------- the real


@contextmanager
def served(told: Told) -> Iterator[Any]:
    """The view of an index that was told all that, through writer, base, tailer and follower."""
    directory = Path(tempfile.mkdtemp(prefix="tidemark-", dir=SCRATCH))
    (stream,) = told.spec.streams
    try:
        home = Home(told.spec, directory, [f"topic-{stream}"])
        if told.base is not None:
            base = tuple(told.base)
            number = {stream: {0: told.cut or 0}}
            candidate = Candidate(0, number, (), base, current(base), told.newest_ms, told.shards, 0)
            home.build(candidate)
            home.publish(candidate)
            home.prepare()
        begin = max(0, (told.cut or 0) - told.again)
        for epoch, start in enumerate(range(begin, len(told.log), told.size)):
            part = told.log[start : start + told.size]
            assert home.commit(Batch(stream, 0, epoch, {0: start}, {0: start + len(part)}, part))
        home.follow()
        yield home.view()
    finally:
        shutil.rmtree(directory)


CASES = st.binary(min_size=1000, max_size=1000).map(drawn)


@cases(150)
@given(CASES)
def test_a_sequence_is_what_its_definition_says(case: Case) -> None:
    bits, fact.LOOKUP_BITS = fact.LOOKUP_BITS, case.lookup_bits
    try:
        with served(case.events) as events, served(case.pins) as pins:
            for asked in case.asked:
                parsed = sequences.parse(dict(asked.said))
                check(case, asked, sequences.read(events, pins, parsed, asked.users, asked.now_ms))
    finally:
        fact.LOOKUP_BITS = bits


def check(case: Case, asked: Asked, found: sequences.Sequences) -> None:
    """An answer is what the oracle says, in columns of the declared names and types."""
    rows, ends = found.table.to_pylist(), found.lengths.cumsum().tolist()
    for place, user in enumerate(asked.users):
        wanted, is_complete = expected(case, asked, user)
        assert rows[ends[place] - found.lengths[place] : ends[place]] == wanted, (user, asked)
        assert found.is_complete[place] == is_complete, (user, asked)
    kinds = {**sequences.EVENT_FIELDS, **sequences.ENRICHMENTS}
    columns = [*asked.said["fields"], *asked.said.get("enrich", ())]
    assert found.table.schema == pa.schema([(name, kinds[name]) for name in columns])
