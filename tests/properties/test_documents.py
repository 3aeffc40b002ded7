"""Split invariance of documents: whatever is served equals one fold over everything that was accepted."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests import oracle
from tests.properties import specs
from tests.properties.harness import CASES, Home, Ledger, drive
from tests.properties.strategies import KEYS, History, histories

pytestmark = pytest.mark.timeout(1800)  # about two minutes where nothing else runs

ASKED = (*KEYS, b"nobody")
HISTORIES = histories(about="documents", feeds=specs.DOCUMENT_FEEDS)


def check(home: Home, ledger: Ledger) -> None:
    """Every document is what the oracle says, whole and by family."""
    view = home.view()
    expected = oracle.documents(ledger.visible(), specs.PRESENCE)
    assert view.get(ASKED) == [expected.get(key) for key in ASKED]
    home.recall((view.base.version, view.last_fold()), expected)
    for key in (KEYS[0], KEYS[1]):
        wanted = {k: v for k, v in expected.get(key, {}).items() if k in ("price", "vector")}
        assert view.get([key], ["price", "vector"]) == [wanted if key in expected else None]


def run(history: History) -> None:
    """One case; ``test_planted_bugs`` runs the same."""
    drive(specs.documents(), history, check)


@CASES
@given(HISTORIES)
def test_every_answer_equals_the_oracle(history: History) -> None:
    run(history)
