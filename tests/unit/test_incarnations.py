"""Where a stream goes on, where it begins again, and what it reads from the archive first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.indexing.position import Position
from pipelines.indexing.streaming import Committed, Gap, Incarnation, begin, drop_others, parts

TOPIC, ID = "events", "events@1"
NOTHING = Committed(0, Position())


def begun(
    folder: Path, committed: Committed, earliest: dict[int, int] | None = None, topic_id: str = ID
) -> Incarnation:
    first = Position({topic_id: earliest or {}})
    return begin(folder, "hot", {TOPIC: topic_id}, lambda: committed, 2, first)


def at(*offsets: int, topic_id: str = ID) -> Position:
    return Position({topic_id: dict(enumerate(offsets))})


def write_epochs(life: Incarnation, planned: list[tuple[int, int]], done: int) -> None:
    """A checkpoint as Spark writes it."""
    for name in ("offsets", "commits"):
        (life.checkpoint / name).mkdir(parents=True, exist_ok=True)
    for epoch, ends in enumerate(planned):
        said = json.dumps({TOPIC: {str(p): offset for p, offset in enumerate(ends)}})
        (life.checkpoint / "offsets" / str(epoch)).write_text(f"v1\n{{}}\n{said}\n")
        if epoch < done:
            (life.checkpoint / "commits" / str(epoch)).write_text("v1\n{}\n")


def starts(life: Incarnation) -> dict[str, int]:
    found: dict[str, int] = json.loads(life.starting_offsets)[TOPIC]
    return found


def test_the_first_begins_at_the_earliest_and_goes_on_while_its_checkpoint_is_there(tmp_path: Path) -> None:
    first = begun(tmp_path, NOTHING)
    assert (first.number, first.gaps, starts(first)) == (1, (), {"0": -2, "1": -2})
    assert begun(tmp_path, NOTHING) == first
    write_epochs(first, [(5, 7)], done=1)
    assert begun(tmp_path, Committed(1, at(5, 7))) == first
    shutil.rmtree(first.checkpoint)
    second = begun(tmp_path, Committed(1, at(5, 7)))
    assert (second.number, second.gaps, starts(second)) == (2, (), {"0": 5, "1": 7})


def test_a_topic_that_was_made_again_is_read_from_its_beginning(tmp_path: Path) -> None:
    write_epochs(begun(tmp_path, NOTHING), [(5, 7)], done=1)
    again = begun(tmp_path, Committed(1, at(5, 7)), topic_id="events@2")
    assert (again.number, again.gaps, starts(again)) == (2, (), {"0": -2, "1": -2})


def test_what_another_incarnation_kept_is_dropped_and_its_number_is_not_taken_again(tmp_path: Path) -> None:
    first = begun(tmp_path, NOTHING)
    write_epochs(first, [(5, 7)], done=1)
    second = begun(tmp_path, Committed(1, at(5, 7)), topic_id="events@2")
    assert not first.checkpoint.exists()
    write_epochs(second, [(1, 1)], done=1)
    drop_others([tmp_path / "hot"], second)
    assert begun(tmp_path, Committed(2, at(1, 1, topic_id="events@2")), topic_id="events@2") == second
    assert begun(tmp_path, NOTHING, topic_id="events@3").number == 3


@pytest.mark.parametrize("done", [1, 2])
def test_offsets_that_kafka_expired_begin_a_new_incarnation_behind_a_gap(tmp_path: Path, done: int) -> None:
    """The second epoch begins where the first ended: that it was planned does not mean that it was read."""
    first = begun(tmp_path, NOTHING)
    write_epochs(first, [(5, 7), (9, 9)], done)
    held = Committed(1, at(5, 7) if done == 1 else at(9, 9))
    still_there = {0: 5, 1: 7} if done == 1 else {0: 9, 1: 9}
    assert begun(tmp_path, held, still_there) == first
    later = begun(tmp_path, held, {0: 20, 1: 7})
    assert later.number == 3  # 2 is the archive's
    assert later.gaps == (Gap(ID, 0, held.position.topics[ID][0], 20),)
    assert starts(later) == {"0": 20, "1": held.position.topics[ID][1]}
    assert begun(tmp_path, held, {0: 20, 1: 7}) == later, "a crash before the first epoch changes nothing"
    assert begun(tmp_path, Committed(2, at(20, 7)), {0: 20, 1: 7}) == later, (
        "nor does one after the archive's"
    )
    worse = begun(tmp_path, Committed(2, at(12, 7)), {0: 30, 1: 7})
    assert (worse.number, worse.gaps) == (5, (Gap(ID, 0, 12, 30),))


def test_a_partition_of_which_nothing_was_committed_has_no_gap(tmp_path: Path) -> None:
    life = begun(tmp_path, Committed(0, Position({ID: {1: 4}})), {0: 100, 1: 2, 2: 50})
    assert (life.gaps, starts(life)) == ((), {"0": -2, "1": 4})


@pytest.mark.parametrize("max_rows", [1, 2, 7, 10, 1000])
def test_parts_cover_gaps_once_in_order_and_are_the_same_each_time(max_rows: int) -> None:
    gaps = (Gap(ID, 0, 3, 20), Gap(ID, 1, 0, 4), Gap("other@1", 0, 9, 10))
    found = list(parts(gaps, max_rows))
    assert found == list(parts(gaps, max_rows))
    for gap in gaps:
        mine = [part for cut in found for part in cut if part[:2] == gap[:2]]
        assert [offset for part in mine for offset in range(part.start, part.end)] == list(
            range(gap.start, gap.end)
        )
    assert all(sum(g.end - g.start for g in cut) <= max(max_rows, len(gaps)) for cut in found)
    assert list(parts((), max_rows)) == []
