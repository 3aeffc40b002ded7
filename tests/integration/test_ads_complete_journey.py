"""The pins of the small real account say of a product what its load says."""

from __future__ import annotations

import json
from typing import Any

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.ads import complete_journey as account
from pipelines.ingest import complete_journey, load


def test_pins_are_the_products_as_they_are_loaded(spark: SparkSession) -> None:
    pins = {r["key"]: r["values"] for r in account.records() if r["table"] == "pins"}
    with load.nanoseconds_as_long(spark):
        products, purchases = (
            load.read_parquet(spark, complete_journey.folder() / f"{name}.parquet").filter(
                F.col("product_id").isin([int(key) for key in pins])
            )
            for name in ("products", "transactions")
        )
        rows = complete_journey.pin_records(products, purchases).collect()
    loaded = {row["key"].decode(): json.loads(row["value"]) for row in rows}
    assert {key: shown(values) for key, values in pins.items()} == {
        key: {**pin["catalogue"], **pin.get("offer", {})} for key, pin in loaded.items()
    }


def shown(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "image_signature"}
