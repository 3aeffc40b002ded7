"""Split invariance of documents: whatever is served equals one fold over everything that was accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    check_columns(home, ledger)
    check_changes(home, view, expected)


def check_columns(home: Home, ledger: Ledger) -> None:
    """The version of every family, and single columns of many documents."""
    standing = oracle.winners(ledger.visible(), ("family", "key"))
    found = oracle.documents(ledger.visible(), specs.PRESENCE)
    for family in ("control", "price", "vector"):
        stands = [standing.get((family, key)) for key in ASKED]
        wanted = [list((*(s.version if s else ()), 0, 0, 0, 0)[:4]) for s in stands]
        assert home.view().versions(family, ASKED).tolist() == wanted
    for family, columns in (("control", ["number", "words", "shape"]), ("price", ["text"])):
        of_family = [found.get(key, {}).get(family, {}) for key in ASKED]
        values = home.view().values(family, columns, ASKED)
        assert values == [[document.get(column) for document in of_family] for column in columns]


def check_changes(home: Home, view: Any, expected: Mapping[bytes, Any]) -> None:
    """Whatever differs from what the same base answered a step before is among the keys that changed since."""
    before, answered = home.noted.get(b"before", (None, {}))
    if before is not None and before.base is view.base and before.runs and view.runs:
        differing = {key for key in ASKED if answered.get(key) != expected.get(key)}
        assert differing <= set(view.keys_since(before.last_fold()))
    home.noted[b"before"] = (view, expected)


def run(history: History) -> None:
    """One case; ``test_planted_bugs`` runs the same."""
    drive(specs.documents(), history, check)


@CASES
@given(HISTORIES)
def test_every_answer_equals_the_oracle(history: History) -> None:
    run(history)
