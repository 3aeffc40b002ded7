"""How much of its facts a base keeps is set for each build, and each base is read by its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipelines import settings as settings_module
from pipelines.indexing import base as bases
from pipelines.indexing import build, facts
from pipelines.indexing import view as views
from pipelines.indexing.base import open_base
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.position import EMPTY
from pipelines.indexing.spec import IndexSpec, Timeline, limited, lineage
from pipelines.indexing.timelines import TimelineView
from pipelines.indices import INDICES, as_built
from pipelines.settings import ROOT, Settings, SettingsError
from pipelines.users import counters, sequences
from pipelines.users.index import DAY_MS

NOW_MS = 1_700_000_000_000
EVENTS = INDICES["user_events"]


def settings(horizon_days: dict[str, str], newest_events: dict[str, str]) -> Settings:
    found = settings_module.load(env={})
    limits = {"horizon_days": horizon_days, "newest_events": newest_events}
    return dataclasses.replace(found, build=dataclasses.replace(found.build, **limits))


def test_the_settings_say_how_much_a_base_keeps() -> None:
    assert as_built(settings({}, {}), EVENTS).read == Timeline(90 * DAY_MS)
    assert as_built(settings({"user_events": "7"}, {"user_events": "3"}), EVENTS).read == Timeline(
        7 * DAY_MS, 3
    )
    assert as_built(settings({"user_events": "0"}, {}), EVENTS).read == Timeline()
    assert as_built(settings({"user_events": "7"}, {}), INDICES["pins"]) == INDICES["pins"]
    assert as_built(settings({"pin_counts": "7"}, {}), INDICES["pin_counts"]).read.age_ms == 7 * DAY_MS  # type: ignore[union-attr]


def test_the_demo_keeps_everything_and_a_cluster_what_is_declared() -> None:
    assert as_built(settings_module.load(env={}), EVENTS).read == Timeline()
    cluster = settings_module.load(ROOT / "conf" / "cluster.yaml", env={})
    assert as_built(cluster, EVENTS) == EVENTS


@pytest.mark.parametrize(
    ("days", "newest", "told"),
    [
        ({"user_event": "7"}, {}, "build.horizon_days"),
        ({"pins": "7"}, {}, "user_events, pin_counts"),
        ({"user_events": "-7"}, {}, "user_events: -7 is not allowed"),
        ({"user_events": "a week"}, {}, "whole number"),
        ({}, {"pin_counts": "7"}, "build.newest_events"),
    ],
)
def test_what_cannot_be_is_told(days: dict[str, str], newest: dict[str, str], told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        as_built(settings(days, newest), EVENTS)
    assert told in str(caught.value)


def test_a_horizon_begins_no_lineage() -> None:
    assert lineage(limited(EVENTS, 5, 5)) == lineage(limited(EVENTS, None, None)) == lineage(EVENTS)


@pytest.mark.parametrize(("age_ms", "count", "kept"), [(None, None, 5), (3 * DAY_MS, None, 4), (None, 2, 2)])
def test_a_base_is_read_by_its_own(tmp_path: Path, age_ms: int | None, count: int | None, kept: int) -> None:
    view = built(tmp_path, age_ms, count)
    assert view.timeline(b"u").table.column("id").to_pylist() == [b"%d" % day for day in range(kept)]
    assert view.within([b"u"], 0, NOW_MS + 1).of.tolist() == [0] * kept


def built(folder: Path, age_ms: int | None, count: int | None) -> TimelineView:
    """A base of one user's events of five days, one a day; the first is a save."""
    rows = facts.table(
        EVENTS,
        [
            {
                "family": "interactions",
                "identity": [b"u", b"%d" % day],
                "key": b"u",
                "version": (1,),
                "content_hash": day,
                "id": b"%d" % day,
                "time_ms": NOW_MS - day * DAY_MS,
                "payload": {"pin_id": "p", "action": "view" if day else "save"},
            }
            for day in range(5)
        ],
    )
    spec: IndexSpec = limited(EVENTS, age_ms, count)
    build.build_local(spec, rows, folder / "b", build.Meta("b", EMPTY, horizon_time_ms=NOW_MS))
    view = views.view(open_base(EVENTS, folder / "b"))
    assert isinstance(view, TimelineView)
    return view


DAYS = [1, 2, 3, 4, 30]
PINS = DocumentsView(bases.empty(INDICES["pins"]))


@pytest.mark.parametrize(
    ("age_ms", "count", "whole"),
    [(None, None, DAYS), (3 * DAY_MS, None, [1, 2, 3]), (None, 2, [1]), (None, 5, DAYS), (None, 9, DAYS)],
)
def test_what_was_cut_off_is_missed_wherever_events_are_asked_for(
    tmp_path: Path, age_ms: int | None, count: int | None, whole: list[int]
) -> None:
    view = built(tmp_path, age_ms, count)
    for days in DAYS:
        is_whole = days in whole
        assert view.within([b"u"], NOW_MS - days * DAY_MS + 1, NOW_MS + 1).is_complete.tolist() == [is_whole]
        query = counters.Query((b"u",), days * DAY_MS, {}, ("action",))
        assert counters.count(view, query, NOW_MS).incomplete == (() if is_whole else (b"u",))
        definition = sequences.parse({"max_length": 9, "fields": ["time_ms"], "age": f"{days}d"})
        found = sequences.read(view, PINS, definition, [b"u"], NOW_MS)
        assert found.is_complete.tolist() == [is_whole], days
        short = sequences.read(view, PINS, definition._replace(max_length=1), [b"u"], NOW_MS)
        assert short.is_complete.tolist() == [True]  # as many as were asked for
    assert view.timeline(b"u").is_complete == (count is None or count >= 5)
    assert view.timeline(b"u", 2).is_complete and view.timeline(b"u", 2).table.num_rows == 2


def test_the_delta_can_push_events_over_the_count(tmp_path: Path) -> None:
    """The base cut nothing off; what stands with the delta is more than a timeline may have."""
    fact = {"family": "interactions", "key": b"u", "version": (1,), "content_hash": 9}
    said = [
        fact
        | {"identity": [b"u", b"n%d" % n], "id": b"n%d" % n, "time_ms": NOW_MS + n}
        | {"payload": {"pin_id": "p", "action": "view"}}
        for n in range(2)
    ]
    view = built(tmp_path, None, 6).folded(facts.table(EVENTS, said), EMPTY)
    assert isinstance(view, TimelineView)
    assert (view.timeline(b"u").table.num_rows, view.timeline(b"u").is_complete) == (6, False)
    for days, is_whole in ((4, True), (5, False)):  # the event of four days ago gave way
        assert view.within([b"u"], NOW_MS - days * DAY_MS + 1, NOW_MS + 9).is_complete.tolist() == [is_whole]
