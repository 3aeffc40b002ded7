"""Handlers of whole columns against a naive account of one ad at a time; and a row alone has the same fields."""

from __future__ import annotations

import math
import unicodedata
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ads import handlers, joined
from pipelines.ads.schema import CONTENT, CONTROL, DIMENSIONS, PERFORMANCE, TABLES

WORDS = st.text("aZé ß中٣²_-,.ﬁİ\t", max_size=8)
HOSTS = st.sampled_from(
    [
        "https://www.shop.example.com/a",
        "http://EXAMPLE.com",
        "https://badexample.com/",
        "ftp://a@example.com:80/x",
        "no",
    ]
)
VALUES = {
    pa.int64(): st.integers(0, 10**12),
    pa.float64(): st.floats(0, 100, allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.string(): WORDS,
    pa.list_(pa.string()): st.lists(WORDS, max_size=4),
    pa.list_(pa.float32()): st.lists(st.floats(-9, 9, width=32), min_size=DIMENSIONS, max_size=DIMENSIONS),
}
STATUS = st.sampled_from(["active", "active", "paused", "archived"])
SPECIAL = {
    "ads.review_status": st.sampled_from(["approved", "approved", "rejected"]),
    "ads.destination_url": HOSTS,
    "advertisers.domain": st.sampled_from(["example.com", "www.Example.com", "other.org"]),
}


def rows(family: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(row(family), max_size=12)


@st.composite
def row(draw: st.DrawFn, family: str) -> dict[str, Any]:
    made: dict[str, Any] = {"ad_id": draw(WORDS)}
    for given_table in joined.INPUTS[family]:
        is_there = draw(st.booleans()) or draw(st.booleans())
        made[f"{given_table.table}.is_there"] = is_there
        for table, column in joined.columns(family):
            if table.name != given_table.table or not is_there:
                continue
            name = joined.name_of(table.name, column.name)
            known = STATUS if column.name == "status" else VALUES[joined.ARROW[column.type]]
            made[name] = draw(st.none() | SPECIAL.get(name, known))
    return made


def nested(family: str, flat: list[dict[str, Any]]) -> pa.Table:
    """Rows of `table.column` as joined rows."""
    whole = []
    for row in flat:
        tables: dict[str, Any] = {"ad_id": row["ad_id"]}
        for name, value in row.items():
            table, dot, column = name.partition(".")
            if dot:
                tables.setdefault(table, {})[column] = value
        whole.append(tables)
    return joined.joined(family, whole)


def normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower().strip()


def words(text: str | None) -> set[str]:
    if text is None:
        return set()
    kept = (c if unicodedata.category(c)[0] in "LN" else " " for c in normal(text))
    return set("".join(kept).split())


def reason(of: dict[str, Any]) -> str | None:
    for what, table in (("ad group", "ad_groups"), ("campaign", "campaigns"), ("advertiser", "advertisers")):
        if not of.get(f"{table}.is_there"):
            return f"{what} unknown"
    for what, table in (
        ("advertiser", "advertisers"),
        ("campaign", "campaigns"),
        ("ad group", "ad_groups"),
        ("ad", "ads"),
    ):
        status = of.get(f"{table}.status")
        if status != "active":
            return f"{what} {status or 'without a status'}"
    review = of.get("ads.review_status")
    return None if review == "approved" else f"review {review or 'without a status'}"


def is_collected(of: dict[str, Any]) -> bool:
    at, ends = of.get("ads.collected_at"), least(of.get("ad_groups.ends_at"), of.get("campaigns.ends_at"))
    tables = ("ads", "ad_groups", "campaigns", "advertisers")
    is_archived = any(of.get(f"{table}.status") == "archived" for table in tables)
    return at is not None and (is_archived or (ends is not None and ends <= at))


def least(*values: Any) -> Any:
    known = [value for value in values if value is not None]
    return min(known) if known else None


def greatest(*values: Any) -> Any:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def or_(value: Any, default: Any) -> Any:
    return default if value is None else value


def domain(text: str | None) -> str | None:
    return None if text is None else text.lower().removeprefix("www.")


def terms(of: dict[str, Any], prefix: str) -> set[str]:
    found = set()
    for dimension, column in {**handlers.DIMENSIONS, "placement": "placements"}.items():
        listed = of.get(f"ad_groups.{prefix}{column}")
        if not prefix and not listed:
            found.add(f"{dimension}=*")
        found |= {f"{dimension}={normal(value)}" for value in listed or []}
    return found


@settings(deadline=None)
@given(rows(CONTROL))
def test_control(given_rows: list[dict[str, Any]]) -> None:
    made = handlers.run(CONTROL, nested(CONTROL, given_rows)).to_pylist()
    for of, found in zip(given_rows, made, strict=True):
        assert found["blocked_by"] == reason(of)
        assert found["is_servable"] == (reason(of) is None)
        assert found["is_collected"] == is_collected(of)
        assert found["starts_at_ms"] == greatest(of.get("ad_groups.starts_at"), of.get("campaigns.starts_at"))
        assert found["ends_at_ms"] == least(of.get("ad_groups.ends_at"), of.get("campaigns.ends_at"))
        assert found["targeting_terms"] == sorted(terms(of, ""))
        blocked = {f"category={normal(value)}" for value in of.get("advertisers.blocked_categories") or []}
        assert found["excluded_terms"] == sorted(terms(of, "excluded_") | blocked)
        assert found["countries"] == of.get("ad_groups.countries")
        bid = of.get("ad_groups.bid_usd_micros")
        times = or_(of.get("ads.bid_multiplier"), 1.0) * or_(of.get("campaigns.bid_multiplier"), 1.0)
        assert found["effective_bid_usd_micros"] == (None if bid is None else math.floor(bid * times))
        of_group = of.get("ad_groups.daily_budget_usd_micros")
        budget = least(
            None if of.get("campaigns.is_budget_shared") else of_group,
            of.get("campaigns.daily_budget_usd_micros"),
            of.get("advertisers.spend_cap_usd_micros"),
        )
        assert found["effective_daily_budget_usd_micros"] == budget
        host = domain(urlsplit(of.get("ads.destination_url") or "").hostname)
        site = domain(of.get("advertisers.domain"))
        assert found["destination_domain"] == host
        is_of_site = host is not None and site is not None and (host == site or host.endswith(f".{site}"))
        assert found["is_destination_verified"] == (
            is_of_site and bool(of.get("advertisers.is_domain_verified"))
        )


@settings(deadline=None)
@given(rows(CONTENT))
def test_content(given_rows: list[dict[str, Any]]) -> None:
    made = handlers.run(CONTENT, nested(CONTENT, given_rows)).to_pylist()
    for of, found in zip(given_rows, made, strict=True):
        texts = [of.get(f"pins.{name}") for name in ("title", "description", "brand", "category")]
        listed = {
            name: [x for x in of.get(f"{name}.annotations") or [] if x is not None]
            for name in ("pins", "images")
        }
        said = set().union(*map(words, texts), *(words(x) for xs in listed.values() for x in xs))
        assert found["text_terms"] == sorted(said)
        assert found["text_term_count"] == len(said)
        assert found["annotations"] == sorted({normal(x) for xs in listed.values() for x in xs})
        assert found["title"] == of.get("pins.title")
        assert found["visual_embedding"] == of.get("images.visual_embedding")
        measure = {
            name.partition(".")[2]: value for name, value in of.items() if name.startswith("images.")
        }.get
        pixels = (
            None
            if None in (measure("width_px"), measure("height_px"))
            else measure("width_px") * measure("height_px")
        )
        parts = [
            measure("sharpness"),
            measure("aesthetics"),
            None if pixels is None else min(pixels / 1e6, 1.0),
        ]
        score = sum(or_(part, 0.5) for part in parts) / 3 * (1 - 0.5 * or_(measure("text_share"), 0.0))
        score = score * or_(measure("safety"), 0.5) if of.get("images.is_there") else 0.0
        assert math.isclose(found["quality_score"], score, rel_tol=1e-9, abs_tol=1e-12)


@settings(deadline=None)
@given(rows(PERFORMANCE))
def test_performance(given_rows: list[dict[str, Any]]) -> None:
    made = handlers.run(PERFORMANCE, nested(PERFORMANCE, given_rows)).to_pylist()
    for of, found in zip(given_rows, made, strict=True):
        for days in (7, 28):
            count = lambda name, of=of, days=days: or_(of.get(f"ads.{name}_{days}d"), 0)  # noqa: E731
            assert math.isclose(
                found[f"click_rate_{days}d"], (count("clicks") + 5) / (count("impressions") + 1000)
            )
            spent = or_(of.get(f"ads.spend_{days}d_usd_micros"), 0)
            cost = spent // count("clicks") if count("clicks") else None
            assert found[f"click_cost_{days}d_usd_micros"] == cost
        assert found["measured_at_ms"] == of.get("ads.measured_at")


@settings(deadline=None)
@given(st.data(), st.sampled_from([CONTROL, CONTENT, PERFORMANCE]))
def test_a_rows_fields_do_not_depend_on_its_neighbours(data: st.DataObject, family: str) -> None:
    whole = nested(family, data.draw(rows(family)))
    at = data.draw(st.integers(0, whole.num_rows))
    parts = [handlers.run(family, whole.slice(0, at)), handlers.run(family, whole.slice(at))]
    assert pa.concat_tables(parts).to_pylist() == handlers.run(family, whole).to_pylist()


def test_every_declared_column_of_a_table_is_a_handlers_or_unused_on_purpose() -> None:
    used = {name for family in joined.INPUTS for name in handlers.triggers(family)}
    declared = {f"{table.name}.{column.name}" for table in TABLES.values() for column in table.columns}
    assert declared - used == set()
