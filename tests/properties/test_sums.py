"""Split invariance of sums: edits that move an event to another key, bucket or amount, deletions, horizons."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from pipelines.indexing import build, sums
from pipelines.indexing import facts as fact
from pipelines.indexing.build import SumOverflow
from pipelines.indexing.position import Position
from tests import oracle
from tests.oracle import Statement
from tests.properties import specs
from tests.properties.harness import CASES, Batch, Candidate, Home, Ledger, drive, rows_of
from tests.properties.strategies import KEYS, MINUTE_MS, START_MS, History, histories

pytestmark = pytest.mark.timeout(1800)  # about two minutes where nothing else runs

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
            within = {
                b: a for b, a in expected.get(key, {}).items() if b >= (begin or 0) and b < (end or 2**62)
            }
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


HALF = 2**62  # two of these do not fit into 64 bits


def statement(
    event: str, *, minute: int = 0, key: bytes = KEYS[0], version: int = 1, amount: int = HALF
) -> Statement:
    """One event that counts very much."""
    time_ms = START_MS + minute * MINUTE_MS
    return Statement("views", key, b"", (version,), False, 0, time_ms, (amount, 0), None, event.encode())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(specs.sums(None), tmp_path, ())


def commit(home: Home, epoch: int, *statements: Statement) -> None:
    """One epoch, folded."""
    assert home.commit(Batch("clicks", 0, epoch, {0: epoch}, {0: epoch + 1}, statements))
    home.follow()


def test_a_sum_that_overflows_in_the_delta_is_an_error_of_that_key_alone(home: Home) -> None:
    commit(home, 0, statement("a"), statement("b"), statement("c", key=KEYS[1], amount=7))
    with pytest.raises(SumOverflow):
        home.view().sums(KEYS[0])
    assert home.view().sums(KEYS[1]) == {START_MS: (7, 0)}


def test_an_overflow_ends_when_what_caused_it_is_taken_back(home: Home) -> None:
    commit(home, 0, statement("a"), statement("b"))
    commit(home, 1, statement("b", version=2, amount=1))
    assert home.view().sums(KEYS[0]) == {START_MS: (HALF + 1, 0)}


def test_a_sum_that_overflows_at_build_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    facts = fact.table(specs.sums(None), rows_of([statement("a"), statement("b")]))
    with pytest.raises(SumOverflow):
        build.build_local(specs.sums(None), facts, tmp_path / "v", build.Meta("v", Position()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_in_base", [False, True])
@pytest.mark.parametrize(
    ("weights", "statements"),
    [
        ((4, 0), [statement("a")]),
        ((1, 0), [statement("a"), statement("b", minute=1)]),
    ],
)
def test_a_weighted_total_that_overflows_is_an_error(
    home: Home, weights: tuple[int, int], statements: list[Statement], is_in_base: bool
) -> None:
    if is_in_base:
        candidate = Candidate(0, {"clicks": {0: 1}}, (), tuple(statements), tuple(statements), None, 1, 0)
        home.build(candidate)
        home.publish(candidate)
        home.prepare()
        home.follow()
    else:
        commit(home, 0, *statements)
    with pytest.raises(SumOverflow):
        home.view().top(weights, 3)
