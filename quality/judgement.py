"""What a measure may be: what a suite declares, and what history allows. Pure: numbers in, findings out.

Belongs here: bounds. Does not belong here: measuring (`measures`), and holding values against bounds
(`expectations`, by Great Expectations).

History is judged robustly: a bound is the median of the history, give or take the greatest of a floor, six robust
standard deviations (1.4826 times the median absolute deviation), and one and a half times what nine tenths of the
history kept. So one bad day in ten moves no bound, and a column that always wavers may waver. With fewer than
`MIN_HISTORY` batches there is no bound, hence no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from typing import Any, NamedTuple

import numpy as np

from pipelines.suites import Suite
from quality.measures import WHOLE, WINDOW_DAYS, Batch, Histogram, Measured

MIN_HISTORY = 7
"""So many batches before a batch, at least, or it is compared with nothing."""
MIN_ROWS = 30
"""Distributions of fewer rows are noise."""
SIGMAS = 6
MARGIN = 1.5
FLOOR_RATIO = {"rows": 1.5, "distinct": 1.5, "p5": 1.5, "p50": 1.35, "p95": 1.5}
"""What is compared by its ratio to the history: a factor up or down that is always allowed."""
FLOOR_POINTS = 3.0
"""Percents are compared by their difference: percentage points that are always allowed."""
FLOOR_DIVERGENCE = 0.08
"""Of distributions, by Jensen–Shannon distance (0 to 1, base 2)."""
FLOOR_SECONDS = {"lag_s": 3_600.0, "silence_s": 6 * 3_600.0}
SOON_S = 6 * 3_600.0
"""Where rows usually come within this, a day without any is missed as soon as the next one has some."""
REFUSALS = "refusals"
KINDS = {
    "rows": "volume",
    "null_pct": "coverage",
    "distinct": "variety",
    "p5": "distribution",
    "p50": "distribution",
    "p95": "distribution",
    "divergence": "drift",
    "orphan_pct": "references",
    "lag_s": "lateness",
    "silence_s": "freshness",
}
"""What goes wrong where a measure leaves its bounds; a suite's shares are `refusals`."""
SHOWN_BINS = 3
DECLARED = "declared"
"""The basis of a bound that a suite gives; others are from history."""


class Expected(NamedTuple):
    """A measure and what it may be.

    Attributes:
        batch: The day, or `all`.
        kind: What goes wrong when it does: types, nulls, ranges, values, rules, duplicates, references, volume,
            coverage, drift, lateness, freshness or refusals.
        field: The field or the rule; "" of the whole batch.
        measure: Its name.
        value: What was measured: a number; of types, the type as text (None: there is no such field).
        least: The least that is allowed.
        most: The greatest.
        type: The only type that is allowed.
        is_blocking: Whether what is built of the table waits for it.
        basis: Where the bounds are from, in words; None: there are none, it is only recorded.
        detail: More, for a person.
    """

    batch: str
    kind: str
    field: str
    measure: str
    value: float | str | None
    least: float | None = None
    most: float | None = None
    type: str | None = None
    is_blocking: bool = False
    basis: str | None = None
    detail: str = ""

    @property
    def label(self) -> str:
        """The measure with its field: `quantity.null_pct`."""
        return f"{self.field}.{self.measure}" if self.field else self.measure

    @property
    def name(self) -> str:
        """The same with its batch: `quantity.null_pct@2024-03-01`."""
        return self.label if self.batch == WHOLE else f"{self.label}@{self.batch}"


Past = Mapping[str, Batch]
"""Earlier batches, in their order."""


def declared(suite: Suite, measured: Measured, exact_rows: int | None = None) -> list[Expected]:
    """What a suite says of all rows; and how many there must be, where that is known."""
    found = [
        Expected(
            WHOLE, "types", path, "type", gone.found, type=_type(suite, path), detail=_gone(suite, path, gone)
        )
        for path, gone in measured.missing.items()
    ]
    words = {"null": "nulls", "outside": "ranges", "unknown": "values", "broken": "rules"}
    for (field, name), count in measured.counts.items():
        if name == "distinct":
            (most,) = [f.most_distinct for f in suite.fields if f.path == field]
            found.append(Expected(WHOLE, "values", field, "distinct", count, most=most))
        elif name == "duplicates":
            key = ", ".join(suite.key)
            found.append(
                Expected(
                    WHOLE, "duplicates", "", name, count, most=0, detail=f"more than one row of a ({key})"
                )
            )
        else:
            found.append(
                Expected(
                    WHOLE,
                    words[name],
                    field,
                    name,
                    count,
                    most=0,
                    detail=_about(suite, measured, field, name),
                )
            )
    if exact_rows is not None:
        said = "the base has an identity for each row"
        found.append(
            Expected(WHOLE, "volume", "", "all_rows", measured.rows, exact_rows, exact_rows, detail=said)
        )
    return [one._replace(is_blocking=suite.blocks, basis=DECLARED) for one in found]


def _type(suite: Suite, path: str) -> str | None:
    return next(field.type or "any" for field in suite.fields if field.path == path)


def _gone(suite: Suite, path: str, gone: Any) -> str:
    if gone.found is not None:
        return f"{path} is {gone.found}; declared is {_type(suite, path)}"
    return f"there is no field {path}" + (f"; the nearest is {gone.nearest}" if gone.nearest else "")


def _about(suite: Suite, measured: Measured, field: str, name: str) -> str:
    if name == "broken":
        return next(rule.words for rule in suite.rules if rule.name == field)
    asked = next(f for f in suite.fields if f.path == field)
    if name == "unknown":
        return f"one of {', '.join(asked.one_of)}"
    if name == "outside":
        low, high = measured.extremes[field]
        bounds = [f"at least {plain(asked.least)}" if asked.least is not None else ""]
        bounds.append(f"at most {plain(asked.most)}" if asked.most is not None else "")
        return f"{' and '.join(filter(None, bounds))}; found from {plain(low)} to {plain(high)}"
    return "in no row" if asked.is_always_required else "in no live row"


def against_history(suite: Suite, measured: Measured, audits: Sequence[Batch]) -> list[Expected]:
    """The newest batches beside those before them. These warn: a day may be unlike others and right.

    Args:
        suite: What the table must be.
        measured: What was measured now.
        audits: Of a table without days, what earlier audits measured, the oldest first.
    """
    if suite.day is None:
        past = {str(number): batch for number, batch in enumerate(audits)}
        newest = measured.batches.get(WHOLE)
        return list(_compared(WHOLE, newest, past, is_open=False)) if newest else []
    found: list[Expected] = []
    days = sorted(measured.batches)
    closed = [day for day in days if measured.newest_closed is not None and day <= measured.newest_closed]
    for day in [*closed[-1:], *days[len(closed) :][:1]]:
        found += _compared(day, measured.batches[day], _before(measured, day), is_open=day not in closed)
    if (skipped := _skipped(measured)) is not None:
        found += _compared(skipped, Batch(0, 0, {}, {}), _before(measured, skipped), is_open=False)
    return found + list(_arrived(measured.arrived))


def _before(measured: Measured, day: str) -> Past:
    return {other: batch for other, batch in measured.batches.items() if _is_before(other, day)}


def _is_before(other: str, day: str) -> bool:
    there = date.fromisoformat(day)
    return there - timedelta(days=WINDOW_DAYS) <= date.fromisoformat(other) < there


def _skipped(measured: Measured) -> str | None:
    """Yesterday, if nothing is there of it although rows come today, and usually come on their day.

    Not where the day a week before is empty too: a shop may be closed on Saturdays.
    """
    if not measured.arrived:
        return None
    today = max(measured.arrived)
    yesterday, week_before = (
        (date.fromisoformat(today) - timedelta(days=days)).isoformat() for days in (1, 8)
    )
    lags = [b.numbers["", "lag_s"] for b in measured.arrived.values() if ("", "lag_s") in b.numbers]
    comes_on_its_day = len(lags) >= MIN_HISTORY and float(np.median(lags)) < SOON_S
    is_empty = yesterday not in measured.batches and week_before in measured.batches
    return yesterday if is_empty and comes_on_its_day and measured.arrived[today].rows else None


def _compared(batch: str, now: Batch, past: Past, *, is_open: bool) -> Iterator[Expected]:
    """Every measure of a batch; a batch that is still open may have fewer rows yet, of fewer kinds."""
    low, high = _ratio_bounds("rows", [float(b.rows) for b in past.values()])
    yield _judged(batch, "", "rows", now.rows, None if is_open else low, high, len(past))
    if now.live < MIN_ROWS:
        return
    past = {name: b for name, b in past.items() if b.live >= MIN_ROWS}
    usual = float(np.median([b.live for b in past.values()])) if past else 0.0
    noise = max(1.0, math.sqrt(usual / now.live))  # of fewer rows than usual, more is chance
    for (field, measure), value in now.numbers.items():
        history = [b.numbers[field, measure] for b in past.values() if (field, measure) in b.numbers]
        if measure in FLOOR_RATIO:
            low, high = _ratio_bounds(measure, history, noise)
            if is_open and measure == "distinct":
                low = None
        else:
            low, high = None, _points_bound(history, now.live)
        yield _judged(batch, field, measure, value, low, high, len(history))
    for field, histogram in now.histograms.items():
        history_of = [b.histograms[field] for b in past.values() if field in b.histograms]
        pooled = _pooled(history_of)
        apart = [divergence(h, _without(pooled, h)) for h in history_of] if len(history_of) > 1 else []
        _, high = _bounds(apart, FLOOR_DIVERGENCE, noise)
        apart_now = divergence(histogram, pooled) if pooled else None
        found = _judged(batch, field, "divergence", apart_now, None, high, len(apart))
        yield found._replace(detail=_moved(histogram, pooled))


def _judged(
    batch: str,
    field: str,
    measure: str,
    value: float | None,
    least: float | None,
    most: float | None,
    history: int,
) -> Expected:
    kind = KINDS.get(measure, REFUSALS)
    if history < MIN_HISTORY or value is None:
        return Expected(batch, kind, field, measure, value)
    what = "audits" if batch == WHOLE else "days"
    return Expected(batch, kind, field, measure, value, least, most, basis=f"the {history} {what} before")


def _arrived(arrived: Past) -> Iterator[Expected]:
    """How long nothing has come by now, and how late the rows are that came on the last day and on this one."""
    if not arrived:
        return
    *closed, now = sorted(arrived)
    having = [day for day in closed if ("", "lag_s") in arrived[day].numbers]
    lags = having[-1:] + [now] * (("", "lag_s") in arrived[now].numbers and arrived[now].rows >= MIN_ROWS)
    for measure, day in [*(("lag_s", day) for day in lags), ("silence_s", now)]:
        before = [batch for other, batch in arrived.items() if other < day]
        history = [batch.numbers["", measure] for batch in before if ("", measure) in batch.numbers]
        _, high = _bounds(history, FLOOR_SECONDS[measure])
        value = arrived[day].numbers["", measure]
        yield _judged(day, "", measure, value, None, high, sum(batch.rows > 0 for batch in before))


# ------------------------------------------------------------------------------------------------ bounds


def _bounds(history: Sequence[float], floor: float, noise: float = 1.0) -> tuple[float | None, float | None]:
    """The median, give or take what is usual and at least `floor`; nothing where there is too little history."""
    if len(history) < MIN_HISTORY:
        return None, None
    values = np.asarray(history, float)
    median = float(np.median(values))
    apart = np.abs(values - median)
    usual = max(SIGMAS * 1.4826 * float(np.median(apart)), MARGIN * float(np.quantile(apart, 0.9)))
    allowed = noise * max(floor, usual)
    return median - allowed, median + allowed


def _ratio_bounds(
    measure: str, history: Sequence[float], noise: float = 1.0
) -> tuple[float | None, float | None]:
    """As `_bounds`, by ratio; where a value may be zero or less, by difference. One more or less is no news."""
    floor = FLOOR_RATIO[measure]
    if not history or min(history) <= 0:
        scale = float(np.median(np.abs(history))) if history else 0.0
        low, high = _bounds(history, (floor - 1) * scale, noise)
    else:
        low, high = _bounds([math.log(value) for value in history], math.log(floor), noise)
        low, high = (None if b is None else math.exp(b) for b in (low, high))
    if low is None or high is None:
        return None, None
    median = float(np.median(history))
    return min(low, median - 1), max(high, median + 1)


def _points_bound(history: Sequence[float], rows: int) -> float | None:
    """The greatest percent: the history's, with what chance adds in so many rows."""
    _, high = _bounds(history, FLOOR_POINTS)
    if high is None:
        return None
    share = min(max(float(np.median(history)) / 100, 0.0), 1.0)
    return min(100.0, high + 400 * math.sqrt(share * (1 - share) / rows))


# ------------------------------------------------------------------------------------------------ distributions


def divergence(left: Histogram, right: Histogram) -> float:
    """The Jensen–Shannon distance of two histograms to the base 2: 0 of the same shares, 1 where no bin is in both.

    Source: Lin, Divergence measures based on the Shannon entropy, 1991; its square root is a metric (Endres and
    Schindelin, 2003).
    """
    names = sorted(left.keys() | right.keys())
    p, q = (np.array([h.get(name, 0) for name in names], float) for h in (left, right))
    if not p.sum() or not q.sum():
        return 0.0 if p.sum() == q.sum() else 1.0
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    return math.sqrt(max(0.0, (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2))


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    return float(np.sum(p[there] * np.log2(p[there] / q[there])))


def _pooled(histograms: Sequence[Histogram]) -> Histogram:
    pooled: Histogram = {}
    for histogram in histograms:
        for name, count in histogram.items():
            pooled[name] = pooled.get(name, 0) + count
    return pooled


def _without(pooled: Histogram, one: Histogram) -> Histogram:
    return {name: count - one.get(name, 0) for name, count in pooled.items()}


def _moved(now: Histogram, before: Histogram) -> str:
    """The bins whose share changed most, in percent; without history, those with the most rows."""
    total, of_before = sum(now.values()), sum(before.values())
    if not of_before:
        top = sorted(now, key=lambda name: (-now[name], name))[:SHOWN_BINS]
        return ", ".join(f"{name}: {100 * now[name] / total:.1f} %" for name in top)
    shares = {
        name: (100 * before.get(name, 0) / of_before, 100 * now.get(name, 0) / total)
        for name in now.keys() | before.keys()
    }
    most = sorted(shares, key=lambda name: (-abs(shares[name][1] - shares[name][0]), name))[:SHOWN_BINS]
    return ", ".join(f"{name}: {shares[name][0]:.1f} → {shares[name][1]:.1f} %" for name in most)


def plain(value: float | int | str | None) -> str:
    """A number as people read it."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return value
    if float(value).is_integer() or abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
