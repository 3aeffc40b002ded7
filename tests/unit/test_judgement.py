"""What history allows: a fresh table alarms nobody, a bad day moves no bound, what is unlike all before is told."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.suites import Field, Suite
from quality import judgement
from quality.expectations import Report, hold
from quality.judgement import MIN_HISTORY, divergence
from quality.measures import WHOLE, Batch, Measured, Missing

SUITE = Suite("t", (Field("price", kind="number"), Field("colour", kind="category")), day="at")
WHOLE_SUITE = SUITE._replace(day=None)


def batch(rows: int = 1_000, price: float = 500.0, red: float = 0.3, null_pct: float = 0.0) -> Batch:
    numbers = {("price", "p50"): price, ("price", "null_pct"): null_pct, ("price", "distinct"): 40.0}
    colours = {"red": round(rows * red), "blue": rows - round(rows * red)}
    return Batch(rows, rows, numbers, {"colour": colours})


def wavering(count: int, seed: int = 1) -> list[Batch]:
    chance = random.Random(seed)
    return [
        batch(
            chance.randint(900, 1_100),
            chance.uniform(480, 520),
            chance.uniform(0.27, 0.33),
            chance.uniform(0, 1),
        )
        for _ in range(count)
    ]


def measured(**batches: Batch) -> Measured:
    days = {name.replace("d", "2024-03-"): found for name, found in batches.items()}
    return Measured(0, 0, {}, {}, {}, days, max(days, default=None), {})


def judged(newest: Batch, before: list[Batch]) -> Report:
    days = {f"d{number + 1:02}": found for number, found in enumerate([*before, newest])}
    return hold("t", judgement.against_history(SUITE, measured(**days), []))


def names(report: Report) -> set[str]:
    return {finding.expected.label for finding in report.broken}


def test_a_fresh_table_is_compared_with_nothing() -> None:
    report = judged(batch(5, 1e9), [batch() for _ in range(MIN_HISTORY - 1)])
    assert all(finding.passed is None for finding in report.findings)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_day_like_the_others_is_no_alarm(seed: int) -> None:
    *before, newest = wavering(20, seed)
    found = judgement.against_history(
        SUITE, measured(**{f"d{n + 1:02}": b for n, b in enumerate([*before, newest])}), []
    )
    outside = [
        one.name
        for one in found
        if isinstance(one.value, float | int)
        and (
            (one.most is not None and one.value > one.most)
            or (one.least is not None and one.value < one.least)
        )
    ]
    assert outside == []


@pytest.mark.parametrize(
    ("odd", "wanted"),
    [
        (batch(rows=300), "rows"),
        (batch(rows=3_000), "rows"),
        (batch(price=5.0), "price.p50"),
        (batch(price=50_000.0), "price.p50"),
        (batch(red=0.7), "colour.divergence"),
        (batch(null_pct=12.0), "price.null_pct"),
    ],
)
def test_what_is_unlike_all_before_is_told_even_behind_two_bad_days(odd: Batch, wanted: str) -> None:
    before = wavering(20)
    assert wanted in names(judged(odd, before))
    assert wanted in names(judged(odd, [*before[:8], batch(1, 1.0), *before[8:], odd]))


def test_a_day_that_is_not_over_may_have_fewer_rows_but_not_other_ones() -> None:
    days = {f"d{number + 1:02}": found for number, found in enumerate(wavering(20))}
    open_day = measured(**days, d21=batch(rows=60, price=5.0))._replace(newest_closed="2024-03-20")
    found = hold("t", judgement.against_history(SUITE, open_day, []))
    assert names(found) == {"price.p50"}
    assert {finding.expected.batch for finding in found.findings} == {"2024-03-20", "2024-03-21"}


def test_days_of_long_ago_are_no_history() -> None:
    old = {f"2023-01-{number + 1:02}": found for number, found in enumerate(wavering(20))}
    now = Measured(0, 0, {}, {}, {}, {**old, "2024-03-01": batch(5, 1.0)}, "2024-03-01", {})
    assert not hold("t", judgement.against_history(SUITE, now, [])).broken


def test_a_table_without_days_is_compared_with_its_audits() -> None:
    now = Measured(0, 0, {}, {}, {}, {WHOLE: batch(price=5.0)}, None, {})
    found = judgement.against_history(WHOLE_SUITE, now, wavering(MIN_HISTORY))
    assert names(hold("t", found)) == {"price.p50"}
    assert not hold("t", judgement.against_history(WHOLE_SUITE, now, wavering(MIN_HISTORY - 1))).broken


def test_a_field_that_is_gone_is_named_with_the_nearest_and_blocks() -> None:
    suite = Suite("t", (Field("quantitty", "bigint"), Field("price", "bigint")))
    gone = {"quantitty": Missing(None, "quantity"), "price": Missing("string", None)}
    report = hold("t", judgement.declared(suite, Measured(0, 0, {}, {}, gone, {}, None, {})))
    assert [finding.words for finding in report.blocking] == [
        "there is no field quantitty; the nearest is quantity",
        "price is string; declared is bigint",
    ]


def test_silence_and_lateness_are_told_by_the_day_of_arrival() -> None:
    usual = {
        f"2024-03-{n:02}": Batch(9, 9, {("", "silence_s"): 60.0, ("", "lag_s"): 5.0}, {})
        for n in range(1, 10)
    }
    silent = {**usual, "2024-03-10": Batch(0, 0, {("", "silence_s"): 86_460.0}, {})}
    late = {**usual, "2024-03-10": Batch(9, 9, {("", "silence_s"): 60.0, ("", "lag_s"): 90_000.0}, {})}
    late["2024-03-11"] = Batch(1, 1, {("", "silence_s"): 60.0, ("", "lag_s"): 5.0}, {})  # has just begun
    for arrived, wanted in ((usual, set()), (silent, {"silence_s"}), (late, {"lag_s"})):
        now = Measured(0, 0, {}, {}, {}, {}, None, arrived)
        assert names(hold("t", judgement.against_history(SUITE, now, []))) == wanted


def test_a_day_without_rows_is_missed_once_the_next_one_has_some() -> None:
    days = {f"2024-03-{n:02}": found for n, found in enumerate(wavering(20), 1)}
    arrived = {day: Batch(9, 9, {("", "silence_s"): 60.0, ("", "lag_s"): 5.0}, {}) for day in days}
    begun = {"2024-03-21": Batch(0, 0, {("", "silence_s"): 60.0}, {}), "2024-03-22": arrived["2024-03-20"]}
    now = Measured(0, 0, {}, {}, {}, days, "2024-03-20", arrived | begun)
    found = hold("t", judgement.against_history(SUITE, now, []))
    assert [(finding.expected.label, finding.expected.batch) for finding in found.broken] == [
        ("rows", "2024-03-21")
    ]
    closed = {day: batch for day, batch in days.items() if day not in ("2024-03-14", "2024-03-07")}
    quiet_days = now._replace(batches=closed)  # a shop that is closed on Thursdays
    slow = {
        day: one._replace(numbers={**one.numbers, ("", "lag_s"): 90_000.0}) for day, one in arrived.items()
    }
    for other in (quiet_days, now._replace(arrived=slow | begun)):
        assert not hold("t", judgement.against_history(SUITE, other, [])).broken


HISTOGRAMS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1_000), min_size=1)


@settings(deadline=None)
@given(HISTOGRAMS, HISTOGRAMS, HISTOGRAMS, st.integers(1, 9))
def test_divergence_is_a_metric_of_shares(a: dict, b: dict, c: dict, times: int) -> None:  # type: ignore[type-arg]
    assert 0 <= divergence(a, b) <= 1
    assert divergence(a, b) == pytest.approx(divergence(b, a), abs=1e-9)
    assert divergence(a, {name: count * times for name, count in a.items()}) == pytest.approx(0, abs=1e-6)
    assert divergence(a, c) <= divergence(a, b) + divergence(b, c) + 1e-6


def test_divergence_of_what_has_nothing_in_common_is_one() -> None:
    assert divergence({"a": 3}, {"b": 5}) == pytest.approx(1)
    assert divergence({}, {}) == 0
