"""What is measured of a table: few Spark jobs, each of which computes all that one pass over the rows can.

Belongs here: measuring what a suite asks for. Does not belong here: what a measure may be (`judgement`), and who judges
it (`expectations`).

Great Expectations makes a Spark job of nearly every expectation; measured here, the whole demo lake costs a few seconds
(docs/adr/0011).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.suites import Field, Rule, Suite

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame
    from pyspark.sql.types import DataType

WINDOW_DAYS = 35
"""How many days before a batch are its history."""
WHOLE = "all"
"""The one batch of a table that has no days."""
QUANTILES = (0.05, 0.5, 0.95)
MAX_CATEGORIES = 1_000
"""Of more values than this, values are counted together by a hash."""
_ACCURACY = 1_000
_SHAPE_CHARACTERS = 32

Histogram = dict[str, int]
Number = float | int | None


class Batch(NamedTuple):
    """What was measured of a batch, of its live rows.

    Attributes:
        rows: All rows.
        live: Live ones: the measures are of these.
        numbers: (field, measure) → value. The measures are `null_pct`, `distinct`, `p5`, `p50`, `p95` and `orphan_pct`;
            of the batch itself (field "") the shares, `lag_s` and `silence_s`.
        histograms: Field → bin → rows.
    """

    rows: int
    live: int
    numbers: Mapping[tuple[str, str], float]
    histograms: Mapping[str, Histogram]


class Missing(NamedTuple):
    """A field that is not there, or has another type: `found`; `nearest` is a field of nearly that name."""

    found: str | None
    nearest: str | None


class Measured(NamedTuple):
    """What was measured of a table.

    Attributes:
        rows: How many there are.
        live: How many are live.
        counts: (field or rule, `null`, `outside`, `unknown`, `broken` or `distinct`) → rows; (``""``, `duplicates`).
        extremes: Field → the least and the greatest value, of those that have a range.
        missing: Fields that could not be measured.
        batches: Day (ISO), or `all`, → what was measured of it.
        newest_closed: The newest of the days that is over.
        arrived: Day of arrival → `lag_s` and `silence_s`, as a batch.
    """

    rows: int
    live: int
    counts: Mapping[tuple[str, str], int]
    extremes: Mapping[str, tuple[Number, Number]]
    missing: Mapping[str, Missing]
    batches: Mapping[str, Batch]
    newest_closed: str | None
    arrived: Mapping[str, Batch]


Reader = Callable[[str], "DataFrame | None"]
"""The rows of another table; None where it is not there yet."""


def measure(suite: Suite, rows: DataFrame, read: Reader, as_of: datetime) -> Measured:
    """Measure a table.

    Args:
        suite: What is asked of it.
        rows: Its rows, read a few times.
        read: For what fields refer to, and for shares.
        as_of: Now, in UTC.
    """
    from pyspark.sql import functions as F

    types = _types(rows.schema)
    missing = {f.path: found for f in suite.fields if (found := _missing(f, types)) is not None}
    fields = [f for f in suite.fields if f.path not in missing]
    rules = [rule for rule in suite.rules if _can_be_asked(rows, rule.condition, missing)]
    is_live = suite.live if suite.live and _can_be_asked(rows, suite.live, missing) else "true"
    marked = rows.withColumn("_live", F.expr(is_live))
    has_days = suite.day in types and suite.day not in missing
    day = F.to_date(_quoted(str(suite.day))) if has_days else F.lit(None).cast("date")
    totals = _totals(fields, rules, marked, types, F.when(day < F.lit(as_of.date()), day))
    counts = _counts(fields, rules, totals)
    if suite.key and set(suite.key) <= types.keys():
        counts["", "duplicates"] = totals["rows"] - _distinct_keys(suite.key, rows)
    batches: dict[str, Batch] = {}
    arrived: dict[str, Batch] = {}
    if totals["rows"]:
        if suite.day is None:
            batches = _batches(suite, fields, marked.withColumn("_batch", F.lit(WHOLE)), read, types, None)
        elif has_days:
            newest = totals["newest_closed"] or as_of.date()
            first = newest - timedelta(days=WINDOW_DAYS)
            window = marked.filter(F.col(_quoted(str(suite.day))) >= F.lit(_midnight(first)))
            window = window.withColumn("_batch", day.cast("string"))
            batches = _batches(suite, fields, window, read, types, first)
        if has_days and suite.arrival in types and suite.arrival not in missing:
            arrived = _arrivals(suite, marked, as_of)
    return Measured(
        rows=totals["rows"],
        live=totals["live"],
        counts=counts,
        extremes=_extremes(fields, totals),
        missing=missing,
        batches=batches,
        newest_closed=totals["newest_closed"].isoformat() if totals["newest_closed"] else None,
        arrived=arrived,
    )


# ------------------------------------------------------------------------------------------------ fields


def _types(schema: DataType, prefix: str = "") -> dict[str, str]:
    """The path of each field, inside structs too → its type."""
    from pyspark.sql.types import StructType

    assert isinstance(schema, StructType)
    found = {}
    for field in schema:
        path = prefix + field.name
        found[path] = field.dataType.simpleString()
        if isinstance(field.dataType, StructType):
            found |= _types(field.dataType, path + ".")
    return found


def _missing(field: Field, types: Mapping[str, str]) -> Missing | None:
    found = types.get(field.path)
    if found is None:
        return Missing(None, next(iter(difflib.get_close_matches(field.path, types, 1, 0.5)), None))
    return None if field.type in (None, found) else Missing(found, None)


def _can_be_asked(rows: DataFrame, condition: str, missing: Mapping[str, Missing]) -> bool:
    """Whether the rows have the columns that a condition names, as declared; what is not is told as `Missing`."""
    from pyspark.errors import AnalysisException
    from pyspark.sql import functions as F

    if any(path in condition for path in missing):
        return False
    try:
        rows.select(F.expr(condition))  # a filter would also find columns that were renamed
    except AnalysisException:
        return False
    return True


def _quoted(path: str) -> str:
    return ".".join(f"`{part}`" for part in path.split("."))


def _column(path: str) -> Column:
    from pyspark.sql import functions as F

    return F.col(_quoted(path))


def _number(field: Field, kind: str) -> Column:
    """A field as a number: times are seconds since 1970."""
    from pyspark.sql import functions as F

    return F.unix_seconds(_column(field.path)) if kind == "timestamp" else _column(field.path)


# ------------------------------------------------------------------------------------------------ the whole table


def _totals(
    fields: list[Field], rules: list[Rule], rows: DataFrame, types: Mapping[str, str], closed_day: Column
) -> Mapping[str, Any]:
    """All counts over all rows, in one job, by names that `_counts` and `_extremes` know."""
    from pyspark.sql import functions as F

    live = F.col("_live")
    asked = [F.count(F.lit(1)).alias("rows"), F.count_if(live).alias("live")]
    for at, field in enumerate(fields):
        column = _column(field.path)
        if field.is_always_required:
            asked.append(F.count_if(column.isNull()).alias(f"null_{at}"))
        elif field.is_required:
            asked.append(F.count_if(live & column.isNull()).alias(f"null_{at}"))
        if field.least is not None or field.most is not None:
            number = _number(field, types[field.path])
            asked += [F.min(number).alias(f"min_{at}"), F.max(number).alias(f"max_{at}")]
            asked.append(F.count_if(_is_outside(field, number)).alias(f"outside_{at}"))
        if field.one_of:
            asked.append(F.count_if(column.isNotNull() & ~column.isin(*field.one_of)).alias(f"unknown_{at}"))
        if field.most_distinct is not None:
            asked.append(F.approx_count_distinct(column).alias(f"distinct_{at}"))
    for at, rule in enumerate(rules):
        asked.append(F.count_if(~F.coalesce(F.expr(rule.condition), F.lit(False))).alias(f"broken_{at}"))
    asked.append(F.max(closed_day).alias("newest_closed"))
    found = rows.agg(*asked).first()
    assert found is not None
    return found.asDict()


def _is_outside(field: Field, number: Column) -> Column:
    from pyspark.sql import functions as F

    outside = F.isnan(number.cast("double"))
    if field.least is not None:
        outside = outside | (number < F.lit(field.least))
    if field.most is not None:
        outside = outside | (number > F.lit(field.most))
    return number.isNotNull() & outside


def _counts(fields: list[Field], rules: list[Rule], totals: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    found = {}
    for at, field in enumerate(fields):
        for name in ("null", "outside", "unknown", "distinct"):
            if f"{name}_{at}" in totals:
                found[field.path, name] = totals[f"{name}_{at}"]
    for at, rule in enumerate(rules):
        found[rule.name, "broken"] = totals[f"broken_{at}"]
    return found


def _extremes(fields: list[Field], totals: Mapping[str, Any]) -> dict[str, tuple[Number, Number]]:
    return {
        field.path: (totals[f"min_{at}"], totals[f"max_{at}"])
        for at, field in enumerate(fields)
        if f"min_{at}" in totals
    }


def _distinct_keys(key: tuple[str, ...], rows: DataFrame) -> int:
    """How many different keys there are, by two 64-bit hashes of them: long keys are not carried through a shuffle."""
    from pyspark.sql import functions as F

    columns = [_quoted(name) for name in key]
    hashed = rows.select(F.xxhash64(*columns).alias("a"), F.xxhash64(F.lit(1), *columns).alias("b"))
    return hashed.distinct().count()


# ------------------------------------------------------------------------------------------------ batches


def _batches(
    suite: Suite,
    fields: list[Field],
    rows: DataFrame,
    read: Reader,
    types: Mapping[str, str],
    first: date | None,
) -> dict[str, Batch]:
    """What is measured of each batch; `rows` have `_batch` and `_live`."""
    from pyspark.sql import functions as F

    rows, orphans = _with_orphans(fields, rows, read)
    live = F.col("_live")
    asked = [F.count(F.lit(1)).alias("rows"), F.count_if(live).alias("live")]
    followed = [f for f in fields if f.kind is not None]
    for at, field in enumerate(followed):
        column = F.when(live, _column(field.path))
        asked.append(F.count(column).alias(f"filled_{at}"))
        asked.append(F.approx_count_distinct(column).alias(f"distinct_{at}"))
        if field.kind == "number":
            number = F.when(live, _number(field, types[field.path]))
            wanted = F.array(*[F.lit(q) for q in QUANTILES])
            asked.append(F.percentile_approx(number, wanted, F.lit(_ACCURACY)).alias(f"quantiles_{at}"))
    for at, _ in enumerate(orphans):
        asked.append(F.count_if(live & F.col(f"_orphan_{at}")).alias(f"orphans_{at}"))
    measured = {row["_batch"]: row.asDict() for row in rows.groupBy("_batch").agg(*asked).collect()}
    measured.pop(None, None)
    histograms = _histograms(followed, rows.filter(live), types, measured)
    shares = _shares(suite, read, first) if suite.shares else {}
    return {
        batch: Batch(
            found["rows"],
            found["live"],
            dict(_numbers(found, followed, orphans))
            | _share_numbers(shares.get(batch, {}), suite, found["rows"]),
            histograms.get(batch, {}),
        )
        for batch, found in measured.items()
    }


def _numbers(
    found: Mapping[str, Any], followed: list[Field], orphans: list[Field]
) -> Iterator[tuple[tuple[str, str], float]]:
    live = found["live"]
    for at, field in enumerate(followed):
        if not live:
            continue
        yield (field.path, "null_pct"), 100 * (live - found[f"filled_{at}"]) / live
        if not found[f"filled_{at}"]:
            continue
        yield (field.path, "distinct"), found[f"distinct_{at}"]
        for name, value in zip(("p5", "p50", "p95"), found.get(f"quantiles_{at}") or (), strict=False):
            yield (field.path, name), float(value)
    for at, field in enumerate(orphans):
        if live:
            yield (field.path, "orphan_pct"), 100 * found[f"orphans_{at}"] / live


def _with_orphans(fields: list[Field], rows: DataFrame, read: Reader) -> tuple[DataFrame, list[Field]]:
    """Rows with `_orphan_<n>`: whether the n-th of the fields that refer somewhere has a value that is not there."""
    from pyspark.sql import functions as F

    found: list[Field] = []
    for field in fields:
        if field.refers_to is None:
            continue
        table, _, column = field.refers_to.rpartition(".")
        there = read(table)
        wanted = (column, *field.refers_with)
        if there is None or not set(wanted) <= set(there.columns):  # which its own audit tells
            continue
        name = f"_there_{len(found)}"
        names = [name, *(f"{name}_{other}" for other in field.refers_with)]
        known = there.select(*(F.col(of).alias(to) for of, to in zip(wanted, names, strict=True))).distinct()
        is_same = _column(field.path) == F.col(name)
        for other, to in zip(field.refers_with, names[1:], strict=True):
            is_same &= _column(other) == F.col(to)
        # Keys of one column are those of a catalogue, and few; those of several may be every event that there is.
        rows = rows.join(known if field.refers_with else F.broadcast(known), is_same, "left")
        is_orphan = _column(field.path).isNotNull() & F.col(name).isNull()
        rows = rows.withColumn(f"_orphan_{len(found)}", is_orphan).drop(*names)
        found.append(field)
    return rows, found


def _histograms(
    followed: list[Field], rows: DataFrame, types: Mapping[str, str], measured: Mapping[str, Any]
) -> dict[str, dict[str, Histogram]]:
    """Batch → field → bin → rows, in one job: each row becomes a (field, bin) for each field."""
    from pyspark.sql import functions as F

    if not followed:
        return {}
    most = {
        at: max((m[f"distinct_{at}"] for m in measured.values()), default=0) for at in range(len(followed))
    }
    bins = [
        F.struct(F.lit(at).alias("field"), _bin(field, types[field.path], most[at]).alias("bin"))
        for at, field in enumerate(followed)
    ]
    counted = (
        rows.select("_batch", F.explode(F.array(*bins)).alias("_one"))
        .groupBy("_batch", F.col("_one.field").alias("field"), F.col("_one.bin").alias("bin"))
        .count()
        .collect()
    )
    found: dict[str, dict[str, Histogram]] = {}
    for row in counted:
        if row["bin"] is not None:
            of_batch = found.setdefault(row["_batch"], {})
            of_batch.setdefault(followed[row["field"]].path, {})[row["bin"]] = row["count"]
    return found


def _bin(field: Field, kind: str, distinct: int) -> Column:
    from pyspark.sql import functions as F

    if field.kind == "number":  # half octaves: a factor of 1.4 is a bin
        number = _number(field, kind).cast("double")
        octave = F.floor(2 * F.log2(F.abs(number) + 1)).cast("string")
        return F.when(number < 0, F.concat(F.lit("-"), octave)).otherwise(octave)
    text = _column(field.path).cast("string")
    if field.kind == "id":
        shape = F.regexp_replace(F.substring(text, 1, _SHAPE_CHARACTERS), "[0-9]+", "9")
        return F.regexp_replace(shape, r"\p{L}+", "a")
    if distinct > MAX_CATEGORIES:
        return F.concat(F.lit("#"), F.pmod(F.xxhash64(text), F.lit(MAX_CATEGORIES)).cast("string"))
    return F.substring(text, 1, 64)


def _shares(suite: Suite, read: Reader, first: date | None) -> dict[str, dict[str, int]]:
    """Day → share → rows of the other table."""
    from pyspark.sql import functions as F

    found: dict[str, dict[str, int]] = {}
    for share in suite.shares:
        there = read(share.table)
        if there is None:
            continue
        chosen = there.filter(share.condition)
        if first is not None:
            chosen = chosen.filter(F.col(share.day) >= F.lit(_midnight(first)))
        day = F.to_date(share.day).cast("string").alias("day")
        for row in chosen.groupBy(day).count().collect():
            found.setdefault(row["day"], {})[share.name] = row["count"]
    return found


def _share_numbers(counted: Mapping[str, int], suite: Suite, rows: int) -> dict[tuple[str, str], float]:
    return {("", share.name): 100 * counted.get(share.name, 0) / rows for share in suite.shares}


# ------------------------------------------------------------------------------------------------ arrival


def _arrivals(suite: Suite, rows: DataFrame, as_of: datetime) -> dict[str, Batch]:
    """By day of arrival: how late the rows were that came, and how long nothing had come at this time of the day."""
    from pyspark.sql import functions as F

    arrival, day = _column(str(suite.arrival)), _column(str(suite.day))
    first = (as_of - timedelta(days=WINDOW_DAYS)).date()
    second = as_of.hour * 3600 + as_of.minute * 60 + as_of.second
    by_now = F.pmod(F.unix_seconds(arrival), F.lit(86_400)) <= second
    lag = F.unix_seconds(arrival) - F.unix_seconds(day)
    found = (
        rows.filter((arrival >= F.lit(_midnight(first))) & (arrival <= F.lit(as_of)))
        .groupBy(F.to_date(arrival).alias("day"))
        .agg(
            F.count(F.lit(1)).alias("rows"),
            F.percentile_approx(lag, F.lit(0.95), F.lit(_ACCURACY)).alias("lag_s"),
            F.max(F.unix_seconds(arrival)).alias("last"),
            F.max(F.when(by_now, F.unix_seconds(arrival))).alias("last_by_now"),
        )
        .collect()
    )
    held = {row["day"]: row for row in found}
    batches: dict[str, Batch] = {}
    if not held:
        return batches
    last: int | None = None  # the newest arrival of the days before
    for number in range((as_of.date() - min(held)).days + 1):
        at = min(held) + timedelta(days=number)
        row = held.get(at)
        then = int(as_of.timestamp()) - (as_of.date() - at).days * 86_400
        newest = row["last_by_now"] if row and row["last_by_now"] is not None else last
        numbers = {} if newest is None else {("", "silence_s"): float(then - newest)}
        if row and row["lag_s"] is not None and suite.arrival != suite.day:
            numbers["", "lag_s"] = float(max(0, row["lag_s"]))
        batches[at.isoformat()] = Batch(row["rows"] if row else 0, row["rows"] if row else 0, numbers, {})
        last = row["last"] if row else last
    return batches


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
