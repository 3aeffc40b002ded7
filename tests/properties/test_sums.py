"""Split invariance of sums: edits that move an event to another key, bucket or amount, deletions, horizons."""

from __future__ import annotations

import pytest
from hypothesis import given

from pipelines.indexing import build, sums
from tests import oracle
from tests.oracle import Statement
from tests.properties import specs
from tests.properties.harness import CASES, Home, Ledger, drive
from tests.properties.strategies import KEYS, MINUTE_MS, START_MS, History, histories

AGES_MS = (None, 3 * MINUTE_MS, 0, 5 * MINUTE_MS + 1)
HISTORIES = histories(about="sums", feeds=specs.SUM_FEEDS, ages_ms=AGES_MS)
WEIGHTS = ((1, 0), (1, 3), (0, 1))


def check(home: Home, ledger: Ledger) -> None:
    """The sums of every key, in the whole horizon and in a narrower window, and the keys that have most."""
    view = home.view()
    served = ledger.served
    horizon = oracle.horizon_ms(
        ledger.history.age_ms, served.max_broker_time_ms if served else None, MINUTE_MS
    )
    expected = oracle.sums(ledger.visible(), MINUTE_MS, horizon)
    start = START_MS + len(ledger.committed) % 4 * MINUTE_MS
    windows = [(horizon, None), (max(start, horizon or start), start + 3 * MINUTE_MS)]
    for number, (begin, end) in enumerate(windows):
        for key in (*KEYS[:3], b"nobody"):
            within = {b: a for b, a in expected.get(key, {}).items() if b >= (begin or 0) and b < (end or 2**62)}
            assert view.sums(key, begin, end) == within, (key, begin, end)
        weights = WEIGHTS[(number + len(ledger.committed)) % 3]
        totals = oracle.top(expected, weights, begin or 0, end or 2**62)
        ranked = sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))
        for k in (1, 10):
            assert view.top(weights, k, begin, end) == ranked[:k], (weights, begin, end)
    if horizon is not None:
        for begin in (horizon - 1, None):
            with pytest.raises(sums.WindowTooEarly):
                view.sums(KEYS[0], begin)


def run(history: History) -> None:
    """One case; ``test_planted_bugs`` runs the same."""
    drive(specs.sums(history.age_ms), history, check)


@CASES
@given(HISTORIES)
def test_every_answer_equals_the_oracle(history: History) -> None:
    run(history)


HALF = 2**62
