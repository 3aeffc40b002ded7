"""Where the rows of an index stand: a lower bound of what was read."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines import index_rows, lake
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import Family
from pipelines.indices import INDICES
from pipelines.lake import Snapshot

EARLY = Position({"t": {0: 5, 1: 9}}, frozenset({"a"}))
LATE = Position({"t": {0: 7, 1: 8}, "u": {0: 1}}, frozenset({"a", "b"}))


def snapshot(number: int, cut: Position | None, **said: str) -> Snapshot:
    summary = dict(said) if cut is None else {lake.POSITION: cut.to_text(), **said}
    return Snapshot(number, summary, 1, 1, 0)


def test_the_lesser_of_two_positions_is_what_both_cover() -> None:
    both = index_rows.lesser(EARLY, LATE)
    assert both == Position({"t": {0: 5, 1: 8}}, frozenset({"a"}))
    assert EARLY.covers(both)
    assert LATE.covers(both)
    assert index_rows.lesser(EARLY, EMPTY) == EMPTY


def test_every_family_has_an_input_and_the_tables_are_those_of_its_stream() -> None:
    assert index_rows.inputs(INDICES["pins"]) == {
        "catalogue": "curated.pins_catalogue",
        "offer": "curated.pins_offer",
        "embedding": "features.pin_vectors",
    }
    assert index_rows.inputs(INDICES["user_events"]) == {
        "interactions": "curated.user_interactions",
        "features": "curated.event_features",
    }
    assert set(index_rows.inputs(INDICES["pin_counts"]).values()) == {"curated.user_interactions"}


def test_a_build_reads_what_is_looked_up_and_stands_on_its_own_input_alone() -> None:
    spec = INDICES["user_events"]
    of_pins = ["curated.pins_catalogue", "curated.pins_offer"]
    assert index_rows.reads(spec) == ["curated.user_interactions", "curated.event_features", *of_pins]
    assert index_rows.reads(INDICES["pin_counts"]) == ["curated.user_interactions"]
    newer: dict[str, Any] = {name: snapshot(2, LATE, **{lake.MAX_BROKER_TIME_MS: "20"}) for name in of_pins}
    mine = snapshot(1, EARLY, **{lake.MAX_BROKER_TIME_MS: "10"})
    both = {"curated.user_interactions": mine, "curated.event_features": mine}
    standing = index_rows.standing(spec, {**both, **newer})
    assert (standing.cut, standing.max_broker_time_ms) == (EARLY, 10)


@pytest.mark.parametrize("stream", [None, "nothing"])
def test_a_family_without_an_input_is_an_error(stream: str | None) -> None:
    family = INDICES["pins"].families[0]._replace(name="other", stream=stream)
    with pytest.raises(index_rows.NoInput):
        index_rows.input_of(INDICES["pins"], Family(*family))


def test_tables_of_one_topic_give_the_lesser_cut_and_the_model_has_no_say() -> None:
    snapshots: dict[str, Any] = {
        "curated.pins_catalogue": snapshot(1, EARLY, **{lake.MAX_BROKER_TIME_MS: "10"}),
        "curated.pins_offer": snapshot(2, LATE, **{lake.MAX_BROKER_TIME_MS: "20"}),
        "features.pin_vectors": snapshot(3, EMPTY, **{index_rows.MODEL_ID: "m/1"}),
    }
    standing = index_rows.standing(INDICES["pins"], snapshots)
    assert standing.cut == index_rows.lesser(EARLY, LATE)
    assert standing.max_broker_time_ms == 20
    assert standing.models == {"embedding": "m/1"}
    assert standing.sources == {
        "curated.pins_catalogue": 1,
        "curated.pins_offer": 2,
        "features.pin_vectors": 3,
    }
    assert index_rows.standing_of(Snapshot(9, standing.summary(), 1, 1, 0)) == standing
