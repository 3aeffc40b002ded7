"""Tests of the tests: each planted bug is found, by the very cases that the shipped code passes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.planted import BUGS, Bug, planted
from tests.properties import test_documents, test_search, test_sums, test_timeline

MOST_CASES = 1000  # as many as each kind of read has
READS: dict[str, Any] = {
    "documents": test_documents,
    "search": test_search,
    "timeline": test_timeline,
    "joined": SimpleNamespace(HISTORIES=test_timeline.JOINED_HISTORIES, run=test_timeline.run_joined),
    "sums": test_sums,
}


class Found(Exception):
    """The property tests saw the bug."""


def search(read: str) -> Callable[[], None]:
    """The cases of a kind of read, up to the first that fails; the same cases every time."""
    module = READS[read]

    @settings(
        max_examples=MOST_CASES,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(module.HISTORIES)
    def find(history: Any) -> None:
        try:
            module.run(history)
        except Exception as error:
            raise Found from error

    return find


@pytest.mark.parametrize(
    ("bug", "read"),
    [pytest.param(bug, read, id=f"{read}: {bug.name}") for bug in BUGS for read in bug.reads],
)
def test_a_planted_bug_is_found(bug: Bug, read: str) -> None:
    with planted(bug), pytest.raises(Found):
        search(read)()


def test_every_kind_of_read_has_bugs_of_its_own() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 15
    assert {read for bug in BUGS for read in bug.reads} == set(READS)
