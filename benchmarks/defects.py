"""Are defects found? 40 of 10 kinds are put into good data, one at a time; and good days must raise no alarm.

The good data are real purchases, as the curated table would have them had they come by the stream: on each day, what
had arrived by one o'clock at night, with five weeks before it; and the catalogue and offers of the same shop, a
snapshot a day. Each audit is the shipped one (`quality.audit`). A defect counts as found if one of the measures that it
names is out of bounds; an alarm of a good day is any measure that is. The size of each defect is in its line below.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines.ingest import complete_journey
from pipelines.suites import SUITES
from quality.audit import Audit, audit
from quality.measures import WHOLE, WINDOW_DAYS, Batch

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

FIRST_DAY = date(2017, 5, 1)
AFTER_MIDNIGHT = timedelta(hours=1)
EVENTS, CATALOGUE, OFFER = "curated.user_interactions", "curated.pins_catalogue", "curated.pins_offer"
SNAPSHOTS = 10
"""Good snapshots of the catalogue and of the offers before the one that a defect is put into."""

Change = Callable[["DataFrame", "Column"], "DataFrame"]
"""Rows and a condition (rows of the day; true for a table without days) → rows with the defect."""


class Defect(NamedTuple):
    """A defect: what it does, and the measures (`field.measure`) of which at least one must be out of bounds."""

    kind: str
    words: str
    table: str
    change: Change
    wanted: frozenset[str]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__, given, days=(20, "good days"), seed=(1, "chooses the rows that a defect is put into")
    )
    machine = harness.machine()
    with harness.place("defects") as settings:
        from pipelines.spark import session

        spark = session(settings, "tidemark defects")
        try:
            result = measure(World(spark, options.days), options.seed)
        finally:
            spark.stop()
    harness.publish({"benchmark": "defects", **result, **machine})
    return 0


def measure(world: World, seed: int) -> dict[str, Any]:
    """The good days, then the defects."""
    alarms: list[str] = []
    audited = 0
    for day, found in world.good():
        alarms += [f"{day}: {finding.words}" for finding in found.report.broken]
        audited += 1
        say(f"{day}: {len(found.report.broken)} alarms")
    say(f"{audited} good audits, {len(alarms)} alarms")
    missed: list[str] = []
    by_kind: dict[str, int] = {}
    seconds: list[float] = []
    chosen = defects(seed)
    for defect in chosen:
        began = time.perf_counter()
        broken = world.with_defect(defect).report.broken
        seconds.append(time.perf_counter() - began)
        seen = {finding.expected.label for finding in broken}
        is_found = bool(seen & defect.wanted)
        say(f"{'found ' if is_found else 'MISSED'} {defect.kind}: {defect.words}")
        if is_found:
            by_kind[defect.kind] = by_kind.get(defect.kind, 0) + 1
        else:
            missed.append(f"{defect.kind}: {defect.words} (alarms: {sorted(seen)})")
    return {
        "found": sum(by_kind.values()),
        "defects": len(chosen),
        "false_alarms": len(alarms),
        "good_days": world.days,
        "good_audits": audited,
        "found_by_kind": by_kind,
        "missed": missed,
        "alarms": alarms,
        "audit_s": harness.percentiles(seconds, [50, 100], digits=2),
        "beside": [],
    }


# ------------------------------------------------------------------------------------------------ good data


class World:
    """Real purchases as a stream would have brought them, and the shop's catalogue and offers."""

    def __init__(self, spark: SparkSession, days: int) -> None:
        self.days = days
        self.newest = FIRST_DAY + timedelta(days=days - 1)
        self.events = _events(spark, FIRST_DAY - timedelta(days=WINDOW_DAYS + 3), self.newest).cache()
        pins = _pins(spark).cache()
        self._tables = {
            CATALOGUE: pins.drop("offer", "offer_hash"),
            OFFER: pins.drop("catalogue", "catalogue_hash"),
        }
        if not self.events.count() or not pins.count():
            raise BenchmarkError("there are no purchases", where=str(FIRST_DAY))
        self._before: dict[str, list[Batch]] = {CATALOGUE: [], OFFER: []}

    def good(self) -> Iterator[tuple[str, Audit]]:
        """The audits of all that is good."""
        for number in range(self.days):
            day = FIRST_DAY + timedelta(days=number)
            yield str(day), self._audit(EVENTS, self._arrived(self.events, day), day)
        for table, before in self._before.items():
            for number in range(SNAPSHOTS):
                found = self._audit(table, self.snapshot(table, number), self.newest)
                before.append(found.measured.batches[WHOLE])
                yield f"{table}, snapshot {number}", found

    def with_defect(self, defect: Defect) -> Audit:
        """The audit of the newest day or snapshot with a defect in it."""
        from pyspark.sql import functions as F

        if defect.table == EVENTS:
            rows = defect.change(self.events, F.to_date("event_time") == F.lit(self.newest))
            return self._audit(EVENTS, self._arrived(rows, self.newest), self.newest)
        rows = defect.change(self.snapshot(defect.table, SNAPSHOTS), F.lit(True))
        return self._audit(defect.table, rows, self.newest)

    def snapshot(self, table: str, number: int) -> DataFrame:
        """The shop on a day: each day it has some more pins, and one in a hundred has another price."""
        from pyspark.sql import functions as F

        rows = self._tables[table].filter(_share("pin_id", 0.9 + 0.002 * number, 0))
        if table == OFFER:
            price = F.col("offer.price_usd_micros")
            other = F.when(_share("pin_id", 0.01, number + 1), (price * 1.1).cast("bigint")).otherwise(price)
            rows = rows.withColumn("offer", F.col("offer").withField("price_usd_micros", other))
        return rows

    def _arrived(self, rows: DataFrame, day: date) -> DataFrame:
        """What was there an hour after the day, with five weeks before it."""
        from pyspark.sql import functions as F

        return rows.filter(F.col("broker_time") <= F.lit(_after(day)))

    def _audit(self, table: str, rows: DataFrame, day: date) -> Audit:
        read = functools.partial(dict.get, {CATALOGUE: self._tables[CATALOGUE]})
        return audit(SUITES[table], rows, read, self._before.get(table, []), _after(day))


def _after(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1) + AFTER_MIDNIGHT


def _events(spark: SparkSession, first: date, last: date) -> DataFrame:
    from pyspark.sql import functions as F

    with complete_journey.load.nanoseconds_as_long(spark):
        bought = complete_journey.load.read_parquet(spark, complete_journey.folder() / "transactions.parquet")
    time_us = F.timestamp_seconds(F.unix_seconds("transaction_timestamp"))
    event = F.concat_ws(":", "basket_id", "product_id")
    delay_s = F.pmod(F.xxhash64(event), F.lit(600))
    rows = bought.filter("quantity > 0").select(
        F.col("household_id").cast("string").alias("user_id"),
        event.alias("event_id"),
        F.col("product_id").cast("string").alias("pin_id"),
        F.lit("purchase").alias("action"),
        time_us.alias("event_time"),
        F.lit(1).cast("bigint").alias("version"),
        F.lit(False).alias("is_deleted"),
        F.xxhash64(event).alias("content_hash"),
        F.col("quantity").cast("bigint").alias("quantity"),
        F.rint(F.col("sales_value") * 1_000_000).cast("bigint").alias("value_usd_micros"),
        F.lit(None).cast("string").alias("surface"),
        F.lit("user-interactions@1").alias("topic_id"),
        F.lit(0).alias("partition"),
        F.monotonically_increasing_id().alias("offset"),
        F.lit(None).cast("string").alias("load_id"),
        F.lit(None).cast("bigint").alias("load_row"),
        F.timestamp_seconds(F.unix_seconds(time_us) + delay_s).alias("broker_time"),
    )
    day = F.to_date("event_time")
    return rows.dropDuplicates(["user_id", "event_id"]).filter(
        (day >= F.lit(first)) & (day <= F.lit(last) + 1)
    )


def _pins(spark: SparkSession) -> DataFrame:
    from pyspark.sql import functions as F

    read = functools.partial(complete_journey.load.read_parquet, spark)
    with complete_journey.load.nanoseconds_as_long(spark):
        products = read(complete_journey.folder() / "products.parquet")
        bought = read(complete_journey.folder() / "transactions.parquet")
    usd = (
        bought.filter("quantity > 0")
        .groupBy("product_id")
        .agg(F.avg(F.col("sales_value") / F.col("quantity")).alias("_usd"))
    )
    return products.join(usd, "product_id").select(
        F.col("product_id").cast("string").alias("pin_id"),
        F.lit(1).cast("bigint").alias("version"),
        F.lit(None).cast("timestamp").alias("event_time"),
        F.lit(False).alias("is_deleted"),
        F.struct(
            F.col("product_type").alias("title"),
            F.col("product_category").alias("category"),
            "department",
            "brand",
        ).alias("catalogue"),
        F.xxhash64("product_id").alias("catalogue_hash"),
        F.struct(
            F.rint(F.col("_usd") * 1_000_000).cast("bigint").alias("price_usd_micros"),
            F.lit(True).alias("is_available"),
        ).alias("offer"),
        F.xxhash64("product_id", "_usd").alias("offer_hash"),
        F.lit(None).cast("string").alias("topic_id"),
        F.lit(None).cast("int").alias("partition"),
        F.lit(None).cast("bigint").alias("offset"),
        F.lit("pin_updates:simulated").alias("load_id"),
        F.monotonically_increasing_id().alias("load_row"),
        F.lit(datetime(2017, 1, 1, tzinfo=UTC)).alias("broker_time"),
    )


def _share(column: str, share: float, seed: int) -> Column:
    """True for this share of the values of a column, the same ones for the same seed."""
    from pyspark.sql import functions as F

    return F.pmod(F.xxhash64(column, F.lit(seed)), F.lit(100_000)) < F.lit(round(share * 100_000))


# ------------------------------------------------------------------------------------------------ defects


def defects(seed: int) -> list[Defect]:
    """The 40 defects; `seed` chooses the rows of those that are in a share of them."""

    def some(share: float, column: str = "event_id") -> str:
        return f"pmod(xxhash64({column}, {seed}), 100000) < {round(share * 100_000)}"

    few, few_pins = some(0.001), some(0.0002, "pin_id")
    value, price = "value_usd_micros", "offer.price_usd_micros"
    return [
        _defect("volume", "three in four rows are lost", EVENTS, _lose(some(0.75)), "rows"),
        _defect("volume", "all comes three times, with other ids", EVENTS, _more("8", "9"), "rows"),
        _defect(
            "volume",
            "nothing is there of the hours after noon",
            EVENTS,
            _lose("hour(event_time) >= 12"),
            "rows",
        ),
        _defect("volume", "half of the offers are gone", OFFER, _lose(some(0.5, "pin_id")), "rows"),
        _defect(
            "nulls",
            "a tenth of the values are null",
            EVENTS,
            _put(value, "NULL", some(0.1)),
            f"{value}.null_pct",
        ),
        _defect("nulls", "a few rows have no pin", EVENTS, _put("pin_id", "NULL", few), "pin_id.null"),
        _defect("nulls", "no row has a quantity", EVENTS, _put("quantity", "NULL"), "quantity.null_pct"),
        _defect(
            "nulls",
            "a tenth of the pins have no category",
            CATALOGUE,
            _put("catalogue.category", "NULL", some(0.1, "pin_id")),
            "catalogue.category.null_pct",
        ),
        _defect("duplicates", "a few rows are there twice", EVENTS, _again(few), "duplicates"),
        _defect("duplicates", "a twentieth is there twice", EVENTS, _again(some(0.05)), "duplicates"),
        _defect("duplicates", "the day is there twice", EVENTS, _again("true"), "duplicates"),
        _defect("duplicates", "a few pins are there twice", CATALOGUE, _again(few_pins), "duplicates"),
        _defect(
            "ranges",
            "a few quantities are negative",
            EVENTS,
            _put("quantity", "-quantity", few),
            "quantity.outside",
        ),
        _defect(
            "ranges",
            "a few events are of 2105",
            EVENTS,
            _put("event_time", "timestamp'2105-01-01'", few),
            "event_time.outside",
        ),
        _defect("ranges", "a few versions are 0", EVENTS, _put("version", "0L", few), "version.outside"),
        _defect(
            "ranges",
            "a few prices are negative",
            OFFER,
            _put(price, f"-1 - {price}", few_pins),
            f"{price}.outside",
        ),
        _defect("types", "quantities are texts", EVENTS, _cast("quantity", "string"), "quantity.type"),
        _defect(
            "types",
            "pin ids went through a float",
            EVENTS,
            _put("pin_id", "concat(pin_id, '.0')"),
            "pin_id.divergence",
        ),
        _defect(
            "types", "user ids are hashes", EVENTS, _put("user_id", "md5(user_id)"), "user_id.divergence"
        ),
        _defect("types", "prices are floats", OFFER, _cast(price, "double"), f"{price}.type"),
        _defect(
            "drift",
            "half of the purchases are views",
            EVENTS,
            _put("action", "'view'", some(0.5)),
            "action.divergence",
        ),
        _defect(
            "drift",
            "a third of the quantities are three to seven more",
            EVENTS,
            _put("quantity", "quantity + 3 + pmod(xxhash64(event_id), 5)", some(0.33)),
            "quantity.divergence",
        ),
        _defect(
            "drift",
            "nothing is cheaper than three dollars",
            EVENTS,
            _lose(f"{value} < 3000000"),
            f"{value}.divergence",
            f"{value}.p50",
        ),
        _defect(
            "drift",
            "half of the brands become private ones",
            CATALOGUE,
            _put("catalogue.brand", "'Private'", some(0.5, "pin_id")),
            "catalogue.brand.divergence",
        ),
        _defect(
            "orphans",
            "a tenth of the pins are unknown",
            EVENTS,
            _put("pin_id", "concat('9', pin_id, '9')", some(0.1)),
            "pin_id.orphan_pct",
        ),
        _defect(
            "orphans",
            "the pins are of another shop",
            EVENTS,
            _put("pin_id", "concat(pin_id, '77')"),
            "pin_id.orphan_pct",
        ),
        _defect(
            "orphans",
            "a twentieth of the pins are too new for the catalogue",
            EVENTS,
            _put("pin_id", "concat('new', pin_id)", some(0.05)),
            "pin_id.orphan_pct",
        ),
        _defect(
            "orphans",
            "a tenth of the offers are of no known pin",
            OFFER,
            _put("pin_id", "concat(pin_id, '77')", some(0.1, "pin_id")),
            "pin_id.orphan_pct",
        ),
        _defect("late", "the day has not come, but the next has begun", EVENTS, _lose("true"), "rows"),
        _defect("late", "nothing has come since six in the morning", EVENTS, _stop_at(6), "silence_s"),
        _defect(
            "late",
            "a third of what came is three days old",
            EVENTS,
            _put("event_time", "event_time - INTERVAL 3 DAYS", some(0.33)),
            "lag_s",
        ),
        _defect("late", "what came is of the day before", EVENTS, _put_off_yesterday, "lag_s"),
        _defect("frozen", "all values are the same", EVENTS, _put(value, "1990000L"), f"{value}.distinct"),
        _defect("frozen", "all pins are the same", EVENTS, _put("pin_id", "'1029743'"), "pin_id.distinct"),
        _defect("frozen", "all users are the same", EVENTS, _put("user_id", "'900'"), "user_id.distinct"),
        _defect("frozen", "all prices are the same", OFFER, _put(price, "1990000L"), f"{price}.distinct"),
        _defect("unit change", "values are cents", EVENTS, _put(value, f"{value} div 10000"), f"{value}.p50"),
        _defect(
            "unit change", "values are dollars", EVENTS, _put(value, f"{value} div 1000000"), f"{value}.p50"
        ),
        _defect(
            "unit change",
            "quantities are thousandths",
            EVENTS,
            _put("quantity", "quantity * 1000"),
            "quantity.p50",
        ),
        _defect(
            "unit change",
            "prices are a hundred times as high",
            OFFER,
            _put(price, f"{price} * 100"),
            f"{price}.p50",
        ),
    ]


def _defect(kind: str, words: str, table: str, change: Change, *wanted: str) -> Defect:
    return Defect(kind, words, table, change, frozenset(wanted))


def _put(column: str, expression: str, where: str = "true") -> Change:
    """Another value in some rows, as an expression of Spark SQL."""

    def change(rows: DataFrame, day: Column) -> DataFrame:
        from pyspark.sql import functions as F

        new = F.when(day & F.expr(where), F.expr(expression)).otherwise(F.col(column))
        return _with(rows, column, new)

    return change


def _cast(column: str, kind: str) -> Change:
    from pyspark.sql import functions as F

    return lambda rows, day: _with(rows, column, F.col(column).cast(kind))


def _with(rows: DataFrame, column: str, value: Column) -> DataFrame:
    from pyspark.sql import functions as F

    struct, _, field = column.rpartition(".")
    return (
        rows.withColumn(struct, F.col(struct).withField(field, value))
        if struct
        else rows.withColumn(column, value)
    )


def _lose(where: str) -> Change:
    def change(rows: DataFrame, day: Column) -> DataFrame:
        from pyspark.sql import functions as F

        return rows.filter(~(day & F.expr(where)))

    return change


def _stop_at(hour: int) -> Change:
    """Nothing comes after this hour of the day, nor on the next one."""

    def change(rows: DataFrame, day: Column) -> DataFrame:
        from pyspark.sql import functions as F

        comes = F.hour("event_time") < hour
        return rows.filter((day & comes) | (F.to_date("event_time") < _newest(rows, day)))

    return change


def _newest(rows: DataFrame, day: Column) -> Column:
    from pyspark.sql import functions as F

    newest = rows.filter(day).select(F.to_date("event_time").alias("day")).first()
    assert newest is not None
    return F.lit(newest["day"])


def _again(where: str) -> Change:
    return lambda rows, day: rows.unionByName(rows.filter(day).filter(where))


def _more(*suffixes: str) -> Change:
    def change(rows: DataFrame, day: Column) -> DataFrame:
        from pyspark.sql import functions as F

        of_day = rows.filter(day)
        copies = [of_day.withColumn("event_id", F.concat("event_id", F.lit(suffix))) for suffix in suffixes]
        return functools.reduce(lambda held, copy: held.unionByName(copy), copies, rows)

    return change


def _put_off_yesterday(rows: DataFrame, day: Column) -> DataFrame:
    """The events of the day before the newest arrive a day later."""
    from pyspark.sql import functions as F

    is_yesterday = F.to_date("event_time") == F.date_sub(_newest(rows, day), 1)
    later = F.col("broker_time") + F.expr("INTERVAL 1 DAY")
    return rows.withColumn("broker_time", F.when(is_yesterday, later).otherwise(F.col("broker_time")))
