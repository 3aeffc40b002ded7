"""The small real account: by its contract, always the same, and with the source's own counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from pipelines.ads import complete_journey as account
from pipelines.ads import repository, updater
from pipelines.ads.repository import Repository, Update
from pipelines.ads.schema import TABLES
from pipelines.ads.updater import Event
from pipelines.contracts import ADS_CHANGES, decode
from pipelines.ingest import complete_journey

Values = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def records() -> list[account.Record]:
    return account.records()


@pytest.fixture(scope="module")
def tables(records: list[account.Record]) -> dict[str, Values]:
    found: dict[str, Values] = defaultdict(dict)
    for record in records:
        found[record["table"]][record["key"]] = record["values"]
    return found


def source(name: str) -> list[dict[str, Any]]:
    return pq.read_table(complete_journey.folder() / f"{name}.parquet").to_pylist()


def day_of(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1000, UTC)


def test_the_contract_takes_every_record_as_it_is(records: list[account.Record]) -> None:
    for record in records:
        row = decode(ADS_CHANGES, orjson.dumps(record), 1_700_000_000_000)
        assert isinstance(row, dict), (record, row)
        assert orjson.loads(row["values"]) == record["values"]
    keys = [(record["table"], record["key"]) for record in records]
    assert len(set(keys)) == len(keys)


def test_it_is_the_same_every_time(records: list[account.Record]) -> None:
    assert orjson.dumps(account.records()) == orjson.dumps(records)


def test_references_name_rows_that_are_there(tables: dict[str, Values]) -> None:
    for name, found in tables.items():
        for reference in TABLES[name].references:
            assert {values[reference.column] for values in found.values()} == set(tables[reference.table])


def test_campaigns_and_coupons_are_those_of_the_source(tables: dict[str, Values]) -> None:
    campaigns = {str(row["campaign_id"]): row for row in source("campaign_descriptions")}
    assert len(campaigns) == 27
    assert tables["campaigns"].keys() == campaigns.keys()
    for key, values in tables["campaigns"].items():
        assert values["labels"] == [campaigns[key]["campaign_type"]]
        assert day_of(values["starts_at"]).date() == campaigns[key]["start_date"].date()
        last = day_of(values["ends_at"]) - timedelta(milliseconds=1)
        assert last.date() == campaigns[key]["end_date"].date()
    offered = defaultdict(set)
    for row in source("coupons"):
        offered[f"{row['campaign_id']}:{row['coupon_upc']}"].add(str(row["product_id"]))
    assert tables["ads"].keys() == offered.keys()
    for key, values in tables["ads"].items():
        assert values["pin_id"] in offered[key]


def test_an_ad_is_targeted_by_its_products_category(tables: dict[str, Values]) -> None:
    for key, values in tables["ads"].items():
        group = tables["ad_groups"][values["ad_group_id"]]
        assert group["campaign_id"] == key.partition(":")[0]
        assert group["interests"] == [tables["pins"][values["pin_id"]]["category"]]


def test_a_coupon_shows_its_product_that_was_bought_most_before(tables: dict[str, Values]) -> None:
    coupon = "13:10000089076"
    campaign = tables["campaigns"]["13"]
    assert coupon in tables["ads"]
    offered = [row for row in source("coupons") if f"{row['campaign_id']}:{row['coupon_upc']}" == coupon]
    products = {row["product_id"] for row in offered}
    bought: Counter[int] = Counter()
    purchases = pq.read_table(
        complete_journey.folder() / "transactions.parquet",
        columns=["product_id", "transaction_timestamp"],
        filters=[("product_id", "in", products)],
    )
    for row in purchases.to_pylist():
        if row["transaction_timestamp"].replace(tzinfo=UTC) < day_of(campaign["starts_at"]):
            bought[row["product_id"]] += 1
    most = max(bought.values())
    assert int(tables["ads"][coupon]["pin_id"]) == min(p for p, count in bought.items() if count == most)


def test_conversions_are_the_redemptions_of_the_first_week(tables: dict[str, Values]) -> None:
    begins = {key: day_of(values["starts_at"]).date() for key, values in tables["campaigns"].items()}
    used: Counter[str] = Counter()
    for row in source("coupon_redemptions"):
        begin = begins[str(row["campaign_id"])]
        is_measured = date(2017, 1, 1) <= begin <= date(2017, 12, 25)
        if is_measured and begin <= row["redemption_date"].date() < begin + timedelta(days=7):
            used[f"{row['campaign_id']}:{row['coupon_upc']}"] += 1
    counted = {key: values.get("conversions_7d", 0) for key, values in tables["ads"].items()}
    assert {key: count for key, count in counted.items() if count} == used
    assert {key.partition(":")[0] for key, v in tables["ads"].items() if "measured_at" not in v} == {
        "23",
        "24",
        "25",
        "26",
    }


def test_impressions_are_the_households_that_had_the_coupon(tables: dict[str, Values]) -> None:
    sent = Counter(str(row["campaign_id"]) for row in source("campaigns"))
    for key, values in tables["ads"].items():
        campaign = key.partition(":")[0]
        if "measured_at" in values and tables["campaigns"][campaign]["labels"] != ["Type A"]:
            assert values["impressions_7d"] == sent[campaign]
    of_8 = [v["impressions_7d"] for key, v in tables["ads"].items() if key.startswith("8:")]
    assert abs(sum(of_8) - 16 * sent["8"]) <= len(of_8) / 2  # each is rounded


def test_only_what_a_repository_does_not_know_is_left_to_send(
    records: list[account.Record], tmp_path: Path
) -> None:
    store = Repository(f"sqlite:{tmp_path / 'repository.db'}")
    try:
        assert account.unknown_to(store, records) == records
        sent = [Event(Update(r["table"], r["key"], r["version"], r["values"])) for r in records]
        updater.apply(store, sent[1:])
        assert account.unknown_to(store, records) == records[:1]
        updater.apply(store, [*sent[:1], Event(Update("campaigns", "13", 2, {"status": "paused"}))])
        assert account.unknown_to(store, records) == []
        with store.reading() as connection:
            assert repository.count(connection, "ads") == 1197
    finally:
        store.close()
