"""A log replayed through the shipped stream, killed in the middle: what fired is what a naive evaluator says."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks import patterns
from tests.conftest import small_settings
from tests.faults import running


def test_killed_twice_while_a_log_is_replayed_nothing_is_missed_and_nothing_is_spurious(
    tmp_path: Path,
) -> None:
    settings = small_settings(tmp_path, STREAMS__NICE=0, STREAMS__MAX_ROWS_PER_EPOCH=600)
    log = patterns.replay_log(random.Random(3), 3_000, 60)
    with running.everything_stopped(settings):
        running.start(settings, "broker")
        position = patterns.send(settings, log.records)
        running.start_to_die(
            settings, "streams", "keyed.after_commit"
        )  # committed, and Spark does not know it
        running.start(settings, "streams")
        patterns.kills_in(settings, position, 2)
        patterns.await_read(settings, position)
        expected, found = patterns.compare(settings, log.said)
    assert len(expected) > 100
    assert (expected - found, found - expected) == (set(), set())
