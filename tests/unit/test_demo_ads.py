"""What the demo asks of the small real account: its ads as the shipped handlers and retrieval give them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pyarrow as pa
import pytest

from jobs import demo_ads
from pipelines.ads import complete_journey, joined, retrieval
from pipelines.ads.retrieval import Context
from pipelines.indexing import base as bases
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.position import EMPTY
from tests import ads_world

Tables = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def records() -> list[complete_journey.Record]:
    return complete_journey.records()


def tables_of(records: list[complete_journey.Record]) -> Tables:
    found: Tables = defaultdict(dict)
    for record in records:
        found[record["table"]][record["key"]] = dict(record["values"])
    return found


def view_of(tables: Tables) -> DocumentsView:
    facts = [
        ads_world.facts_of(family, ads_world.joined_rows(family, tables, tables["ads"]))
        for family in joined.INPUTS
    ]
    return DocumentsView(bases.empty(ads_world.ADS)).folded(pa.concat_tables(facts), EMPTY)


def asked(view: DocumentsView) -> list[tuple[str, float]]:
    time_ms = int(demo_ads.ASKED_AT.timestamp() * 1000)
    found = retrieval.candidates(view, Context(interests=demo_ads.INTERESTS), time_ms, 500)
    return [(key.decode(), score) for key, score in found]


def test_the_demos_ads_are_of_several_campaigns_and_best_used_first(
    records: list[complete_journey.Record],
) -> None:
    tables = tables_of(records)
    found = asked(view_of(tables))
    assert sorted(ad for ad, _ in found) == sorted(demo_ads.eligible(records))
    campaigns = {ad.partition(":")[0] for ad, _ in found}
    assert demo_ads.CAMPAIGN in campaigns
    assert len(campaigns) > 1
    ads = tables["ads"]
    rates = [(ads[ad]["clicks_7d"] + 5) / (ads[ad]["impressions_7d"] + 1000) for ad, _ in found]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) > 1


def test_a_paused_campaign_has_none(records: list[complete_journey.Record]) -> None:
    tables = tables_of(records)
    before = asked(view_of(tables))
    tables["campaigns"][demo_ads.CAMPAIGN]["status"] = "paused"
    of_others = [(ad, score) for ad, score in before if ad.partition(":")[0] != demo_ads.CAMPAIGN]
    assert asked(view_of(tables)) == of_others
