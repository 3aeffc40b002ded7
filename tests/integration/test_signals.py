"""The catalogue of signals, collected from the real specifications, the real plans and a real lake."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from pipelines import derived, lake
from pipelines.settings import Settings
from quality.signals import catalogue, page
from quality.signals.catalogue import KINDS, Catalogue, Dataset, Field

OFFER = lake.CURATED_PINS_OFFER
NEWEST_MS = 1_700_000_000_000


@pytest.fixture
def collected(own_spark: SparkSession, settings: Settings) -> Catalogue:
    lake.ensure(own_spark, OFFER)
    schema = own_spark.table(OFFER.identifier).schema
    offers: list[dict[str, Any] | None] = [
        {"price_usd_micros": 5, "is_available": True},
        {"price_usd_micros": 7, "is_available": None},
        {"price_usd_micros": 0, "is_available": False},
        None,
    ]
    rows = [
        dict.fromkeys(schema.names)
        | {"pin_id": f"p{n}", "version": 1, "is_deleted": offer is None, "offer": offer}
        | {"broker_time": dt.datetime.fromtimestamp(NEWEST_MS / 1000, dt.UTC)}
        for n, offer in enumerate(offers)
    ]
    said = {lake.MAX_BROKER_TIME_MS: str(NEWEST_MS)}
    lake.overwrite(own_spark.createDataFrame(rows, schema), OFFER, said)
    return catalogue.collect(settings, own_spark)


def test_everything_that_is_declared_is_in_it_and_hangs_together(
    collected: Catalogue, settings: Settings, tmp_path: Path
) -> None:
    named = {dataset.name: dataset for dataset in collected.datasets}
    assert derived.specs().keys() <= named.keys()
    assert {dataset.kind for dataset in collected.datasets} == set(KINDS)
    for name, spec in derived.specs().items():
        assert {c.name for c in spec.columns} <= {f.path for f in named[name].fields}
        assert named[name].owner == spec.owner
    for dataset in collected.datasets:
        assert set(dataset.inputs) <= named.keys(), dataset.name
        for field in dataset.fields:
            assert field.type
            assert field.doc
            if field.path.endswith("_usd_micros"):
                assert field.unit == "micro-dollars"

    price = of(named["curated.pins_offer"], "offer.price_usd_micros")
    assert price == Field(
        "offer.price_usd_micros",
        "bigint",
        "micro-dollars",
        price.doc,
        ("raw.pin_updates, by code",),
        (
            "index.pins.payload_offer.price_usd_micros",
            "index.user_events.payload_interactions.indexed_price_usd_micros",
        ),
        75.0,
    )
    assert of(named["curated.pins_offer"], "offer.is_available").coverage_pct == 50.0
    assert of(named["curated.pins_offer"], "pin_id").coverage_pct == 100.0
    assert of(named["curated.pins_offer"], "load_id").coverage_pct == 0.0
    indexed = of(named["index.pins"], "payload_offer.price_usd_micros")
    assert indexed.sources == ("curated.pins_offer.offer.price_usd_micros",)
    assert indexed.consumers == ("answer.pins.offer.price_usd_micros",)
    assert of(named["answer.pins"], "catalogue.category").consumers == (
        "read for many at once",
        "searched as category",
    )
    assert "curated.pins_catalogue (12 fields)" in of(named["raw.pin_updates"], "value").consumers

    fresh = named["curated.pins_offer"].freshness
    assert (fresh.rows, fresh.holds_until_ms) == (4, NEWEST_MS)
    assert fresh.updated_at_ms is not None
    assert fresh.expected == "renewed within 5 h, at most 9 h"
    assert named["curated.pins_catalogue"].freshness.updated_at_ms is None, "never written here"

    ways = {(one, dataset.name) for dataset in collected.datasets for one in dataset.inputs}
    assert {
        ("topic.pin-updates", "stream.archive"),
        ("stream.archive", "raw.pin_updates"),
        ("raw.pin_updates", "curated.pins_offer"),
        ("curated.pins_offer", "index.pins"),
        ("models.pin_als", "features.pin_vectors"),
        ("features.pin_vectors", "index.pins"),
        ("index.pins", "base.pins"),
        ("stream.pin_updates", "delta.pins"),
        ("base.pins", "answer.pins"),
        ("delta.pins", "answer.pins"),
    } <= ways

    written = page.write(collected, tmp_path)
    assert json.loads((tmp_path / "signals.json").read_text()) == json.loads(json.dumps(collected.to_json()))
    assert 'data-from="curated.pins_offer" data-to="index.pins"' in written.read_text(encoding="utf-8")


def of(dataset: Dataset, path: str) -> Field:
    return next(field for field in dataset.fields if field.path == path)
