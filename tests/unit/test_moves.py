"""An index goes back to what it served at a time, and forward again; what its delta does not reach is refused."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from jobs import moves
from pipelines.indexing import delta
from pipelines.indexing.position import Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import VersionError, Versions
from pipelines.indices import INDICES
from pipelines.settings import Settings
from tests import serving_world
from tests.serving_world import INTERACTIONS, NEWEST_MS

INDEX = "user_events"


def publish(settings: Settings, events: int) -> str:
    rows = [serving_world.event("u", f"e{n}", "1", "view", NEWEST_MS - n)[0] for n in range(events)]
    return serving_world.publish(settings, INDEX, rows, Position({INTERACTIONS: {0: events}}), {})


def now() -> datetime:
    time.sleep(0.01)
    moment = datetime.now(UTC)
    time.sleep(0.01)
    return moment


def served(settings: Settings) -> tuple[str, bool]:
    pointer = Versions(settings.paths.indices, INDEX).pointer()
    assert pointer is not None
    return pointer.version, pointer.with_delta


def test_an_index_returns_to_what_it_served(settings: Settings) -> None:
    before = now()
    with pytest.raises(VersionError, match="never served any"):
        moves.plan_return(settings, INDEX, before)
    first = publish(settings, 10)
    at_first = now()
    second = publish(settings, 12)
    at_second = now()
    with pytest.raises(VersionError, match="it serves since"):
        moves.plan_return(settings, INDEX, before)
    assert not moves.plan_return(settings, INDEX, at_second).is_change
    back = moves.plan_return(settings, INDEX, at_first)
    assert (back.served, back.version, back.is_change) == (second, first, True)
    assert served(settings) == (second, True)  # a plan changes nothing
    moves.carry_out(settings, back)
    assert served(settings) == (first, True)
    moves.carry_out(settings, moves.plan_return(settings, INDEX, at_second))  # passes the gate again
    assert served(settings) == (second, True)
    moves.rollback(settings, INDEX, first, without_delta=True)
    alone = now()
    publish(settings, 13)
    moves.carry_out(settings, moves.plan_return(settings, INDEX, alone))
    assert served(settings) == (first, False)
    moves.carry_out(settings, moves.plan_return(settings, INDEX, at_first))
    assert served(settings) == (first, True)


def test_a_base_that_the_delta_does_not_reach_is_refused_before_anything_moves(settings: Settings) -> None:
    publish(settings, 10)
    at_first = now()
    second = publish(settings, 12)
    folder = delta.table_path(settings.paths.delta, INDEX, lineage(INDICES[INDEX]))
    folder.mkdir(parents=True)
    (folder / delta.FLOOR).write_text(Position({INTERACTIONS: {0: 11}}).to_text())
    with pytest.raises(VersionError, match="no longer reaches back"):
        moves.plan_return(settings, INDEX, at_first)
    assert served(settings) == (second, True)
