"""Where an event is: what is said of each stage, and why one is missing; and the ids that tie the stages together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import trace
from jobs.trace import Based, Commit, Door, Epoch, Evidence, Folded, Kafka, OfIndex, Record
from pipelines import tracing
from pipelines.contracts import ADS_CHANGES
from pipelines.curate import SOURCES, NotCurated, source_of
from pipelines.indexing.delta import Marker
from pipelines.indexing.position import Position
from pipelines.tracing import Place, Trace

TOPIC = "user-interactions@one"
PLACE = Place(TOPIC, 0, 7)
BEFORE, AFTER = Position({TOPIC: {0: 7}}), Position({TOPIC: {0: 8}})
T = 1_800_000_000_000
TABLE = "curated.user_interactions"
RECORD = Record("user-interactions", PLACE, None, T + 20, ("u", "e"), hashes={TABLE: 5}, event_time_ms=1)
LOADED = RECORD._replace(place=None, load=("user_interactions:l", 3))
REFUSED = RECORD._replace(identity=(), refusal=("wrong_type", "user_id is the integer 7"))
DOOR = Door(T, 30.0, "a" * 32, "req-1")
MARKER = Marker(
    "user_interactions", 1, 4, BEFORE, AFTER, 1, 0, None, None, None, None, T + 500, T + 600, T + 700
)
EPOCH = Epoch("l1", MARKER, T + 800)
BASED = Based("v2", T + 50_000, T + 60_000)


def served(position: Position, cut: Position = BEFORE, **said: Any) -> dict[str, Any]:
    return {
        "index": "user_events",
        "position": position.to_json(),
        "cut": cut.to_json(),
        "with_delta": True,
        **said,
    }


WHOLE = OfIndex(
    "user_interactions",
    EPOCH,
    (Folded("default", T + 900, "folded"),),
    BASED,
    served(AFTER, AFTER),
    "v2",
    True,
)
EVIDENCE = Evidence(
    Kafka(True, trace=Trace("a" * 32, "b" * 16, "req-1")),
    DOOR,
    Commit(99, T + 9_000, 1, 3, True),
    {"user_events": WHOLE},
    {"archive": "the archive runs", "user_interactions": "the stream runs"},
)


def told(record: Record, evidence: Evidence) -> dict[str, tuple[str, str]]:
    return {stage.stage: (stage.state, stage.detail) for stage in trace.stages(record, evidence)}


def in_index(**known: Any) -> Evidence:
    return EVIDENCE._replace(indices={"user_events": WHOLE._replace(**known)})


def test_every_stage_has_its_time_and_its_lag() -> None:
    stages = trace.stages(RECORD, EVIDENCE)
    assert [(s.stage, s.state, s.lag_ms) for s in stages] == [
        ("collector", "done", 0),
        ("kafka", "done", 20),
        ("archive", "done", 9_000),
        ("delta", "done", 800),
        ("overlay", "done", 900),
        ("base", "done", 60_000),
    ]
    assert [s.index for s in stages[3:]] == ["user_events"] * 3
    assert stages[3].facts["committed_at_ms"] == T + 800
    assert trace.is_visible(RECORD, EVIDENCE)
    assert stages[0].to_json()["at"] == "2027-01-15T08:00:00.000Z"


def test_a_refused_record_ends_as_a_dead_letter() -> None:
    stages = trace.stages(REFUSED, EVIDENCE)
    assert [s.stage for s in stages] == ["collector", "kafka", "archive", "dead letter"]
    assert stages[-1].state == "refused"
    assert "another JSON type" in stages[-1].detail


def test_a_load_is_served_from_the_next_base_on() -> None:
    known = OfIndex("user_interactions", served=served(AFTER), version="v1")
    evidence = EVIDENCE._replace(door=None, kafka=Kafka(False), indices={"user_events": known})
    found = told(LOADED, evidence)
    assert [state for state, _ in found.values()] == [
        *["not needed"] * 2,
        "done",
        *["not needed"] * 2,
        "waiting",
    ]
    assert "row 3" in found["archive"][1]
    assert not trace.is_visible(LOADED, evidence)
    base = Position(AFTER.topics, frozenset({"user_interactions:l"}))
    known = known._replace(base=BASED, served=served(base, base), version="v2")
    assert trace.is_visible(LOADED, evidence._replace(indices={"user_events": known}))


def test_why_the_archive_does_not_have_it() -> None:
    assert told(RECORD, EVIDENCE._replace(commit=None))["archive"] == ("waiting", "not yet: the archive runs")


@pytest.mark.parametrize(
    ("wanted", "status", "why"),
    [
        (True, {"s": {"state": "running"}}, "the stream s runs; it has begun"),
        (
            True,
            {"s": {"state": "running", "epoch": 7, "at": "2026-01-01T10:00:00.000Z"}},
            "the stream s runs; its newest epoch, 7, began 10:00:00.000Z",
        ),
        (False, {"s": {"state": "stopped"}}, "the stream s is stopped by request; `tidemark start s`"),
        (True, {}, "the streaming process does not run; `tidemark up streams`"),
        (True, {"s": {"state": "failing", "detail": "no broker"}}, "the stream s is failing (no broker)"),
        (True, {"s": {"state": "starting", "detail": ""}}, "the stream s is starting"),
    ],
)
def test_what_holds_a_stream_up(wanted: bool, status: dict[str, Any], why: str) -> None:
    assert trace.stream_state("s", wanted, status) == why


@pytest.mark.parametrize(
    ("changes", "state", "why"),
    [
        ({}, "done", "request req-1, trace " + "a" * 32),
        ({"door": None}, "unknown", "by the record's own header"),
        ({"door": None, "kafka": Kafka(True)}, "unknown", "its record has no header"),
        (
            {"door": None, "kafka": Kafka(False, "Kafka's retention has expired it")},
            "unknown",
            "has expired it",
        ),
    ],
)
def test_what_is_known_of_the_request(changes: dict[str, Any], state: str, why: str) -> None:
    found = told(RECORD, EVIDENCE._replace(**changes))["collector"]
    assert found[0] == state
    assert why in found[1]


def test_a_record_that_kafka_has_no_more_keeps_its_time() -> None:
    found = trace.stages(RECORD, EVIDENCE._replace(kafka=Kafka(False, "Kafka's retention has expired it")))[1]
    assert (found.state, found.at_ms) == ("done", T + 20)
    assert "expired" in found.detail


def test_a_commit_whose_elders_have_expired_says_so() -> None:
    late = EVIDENCE._replace(commit=Commit(99, T + 9_000, None, None, False))
    assert "it was there by then" in told(RECORD, late)["archive"][1]


@pytest.mark.parametrize(
    ("known", "stage", "state", "why"),
    [
        ({"epoch": None, "base": None}, "delta", "waiting", "not yet: the stream runs"),
        ({"epoch": None}, "delta", "unknown", "the base has"),
        ({"epoch": EPOCH._replace(is_retired=True)}, "delta", "done", "retired from the delta since"),
        ({"epoch": EPOCH._replace(committed_at_ms=None)}, "delta", "done", "transformed 08:00:00.700Z"),
        ({"folded": (), "served": None}, "overlay", "unknown", "serving does not answer"),
        (
            {"folded": (), "served": served(AFTER, AFTER)},
            "overlay",
            "not needed",
            "the base that is served has it",
        ),
        ({"folded": (), "served": served(AFTER)}, "overlay", "unknown", "no longer says since when"),
        ({"folded": (), "served": served(BEFORE)}, "overlay", "waiting", "its epoch is on its way"),
        (
            {"folded": (), "served": served(BEFORE), "epoch": None},
            "overlay",
            "waiting",
            "the delta does not have it",
        ),
        (
            {"folded": (), "served": served(BEFORE, is_overlay_full=True)},
            "overlay",
            "waiting",
            "overlay is full",
        ),
        ({"folded": (), "served": served(BEFORE, error="torn")}, "overlay", "waiting", "torn"),
        ({"served": served(BEFORE, with_delta=False)}, "overlay", "waiting", "tidemark resume user_events"),
        ({"base": None, "version": None}, "base", "waiting", "no base is served"),
        ({"base": None, "version": "v1"}, "base", "waiting", "its cut is before it"),
        ({"base": BASED._replace(published_at_ms=None)}, "base", "waiting", "was not published"),
        ({"version": "v1"}, "base", "waiting", "rolled back since to v1"),
        ({"version": "v3"}, "base", "done", "served is v3"),
        ({}, "base", "done", "which is served"),
    ],
)
def test_why_a_stage_of_an_index_is_missing(known: dict[str, Any], stage: str, state: str, why: str) -> None:
    found = told(RECORD, in_index(**known))[stage]
    assert found[0] == state
    assert why in found[1]


def test_a_stopped_stream_is_why_the_delta_does_not_have_it() -> None:
    stopped = in_index(epoch=None, base=None)._replace(streams={"user_interactions": "the stream is stopped"})
    assert told(RECORD, stopped)["delta"] == ("waiting", "not yet: the stream is stopped")


# ------------------------------------------------------------------------------------------------ what stands


def test_the_greatest_rank_stands() -> None:
    parts = SOURCES["user_interactions"].parts
    edit = RECORD._replace(place=Place(TOPIC, 0, 9), version=2)
    again = RECORD._replace(place=Place(TOPIC, 1, 9))
    deletion = RECORD._replace(place=Place(TOPIC, 0, 11), version=2, is_deleted=True)
    (one,) = trace.standing(RECORD, [RECORD, again], parts)
    assert (one.stands, one.detail) == (True, f"stands; {TOPIC}/1/9 says the same")
    (one,) = trace.standing(RECORD, [RECORD, edit], parts)
    assert (one.stands, one.by) == (False, f"{TOPIC}/0/9")
    assert one.detail == f"superseded by {TOPIC}/0/9, version 2 (this one is 1)"
    (one,) = trace.standing(edit, [RECORD, edit, deletion], parts)
    assert one.detail.startswith(f"deleted by {TOPIC}/0/11")
    (one,) = trace.standing(deletion, [RECORD, edit, deletion], parts)
    assert one.detail == "stands: it is deleted"
    assert trace.standing(REFUSED, [REFUSED, RECORD], parts) == []


def test_each_family_of_a_pin_stands_by_itself() -> None:
    parts = SOURCES["pin_updates"].parts
    both = Record(
        "pin-updates",
        PLACE,
        None,
        T,
        ("p",),
        1,
        hashes={"curated.pins_catalogue": 1, "curated.pins_offer": 2},
    )
    offer = both._replace(
        place=Place(TOPIC, 0, 8), version=2, hashes={"curated.pins_catalogue": None, "curated.pins_offer": 3}
    )
    said = {one.family: one.stands for one in trace.standing(both, [both, offer], parts)}
    assert said == {"pins_catalogue": True, "pins_offer": False}
    assert [one.family for one in trace.standing(offer, [both, offer], parts)] == ["pins_offer"]


# ------------------------------------------------------------------------------------------------ ids


def test_a_clients_trace_goes_on() -> None:
    begun = tracing.begin("00-" + "a" * 32 + "-" + "b" * 16 + "-01", "mine")
    assert (begun.trace_id, begun.request_id, begun.flags) == ("a" * 32, "mine", "01")
    assert begun.span_id != "b" * 16
    assert tracing.read(begun.record_headers) == begun


@pytest.mark.parametrize(
    "given",
    [None, "", "x", "00-" + "0" * 32 + "-" + "b" * 16 + "-01", "ff-" + "a" * 32 + "-" + "b" * 16 + "-01"],
)
def test_what_is_no_trace_is_as_if_it_were_not_there(given: str | None) -> None:
    begun = tracing.begin(given, "with blank")
    assert begun.request_id == begun.trace_id != tracing.begin(given).trace_id
    assert tracing.begin(begun.traceparent).trace_id == begun.trace_id


def test_headers_of_others() -> None:
    assert tracing.read(None) is None
    assert tracing.read([("traceparent", b"\xff"), ("x", None)]) is None


@given(st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 40)), max_size=40))
def test_ranges_have_exactly_their_places(chosen: set[tuple[str, int, int]]) -> None:
    ranges = tracing.ranges_of(Place(*one) for one in chosen)
    found = {
        (t, p, o) for t in "ab" for p in range(3) for o in range(42) if tracing.is_in(Place(t, p, o), ranges)
    }
    assert found == chosen


@pytest.mark.parametrize(
    "odd", [None, 3, [], {TOPIC: 3}, {TOPIC: {"0": 3}}, {TOPIC: {"0": [3]}}, {TOPIC: {"0": [[1]]}}]
)
def test_a_line_with_odd_places_is_nobodys(odd: object) -> None:
    assert not tracing.is_in(PLACE, odd)


def test_only_what_is_curated_can_be_traced() -> None:
    with pytest.raises(NotCurated, match="ads-changes") as raised:
        source_of(ADS_CHANGES)
    assert raised.value.remedy == "choose one of user-interactions, pin-updates, user-follows"
