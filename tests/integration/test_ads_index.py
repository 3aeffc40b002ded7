"""The transforms of the index `ads` in Spark: what the handlers say, in facts of the right rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.ads import handlers, joined
from pipelines.ads.index import ADS
from pipelines.indexing import facts
from pipelines.indexing.spec import check
from tests.ads_world import Joined

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SERVED: dict[str, dict[str, Any]] = {
    "ads": {"status": "active", "review_status": "approved", "clicks_7d": 12},
    "ad_groups": {"status": "active", "countries": ["US", "CA"], "bid_usd_micros": 1_500_000},
    "campaigns": {"status": "active"},
    "advertisers": {"status": "active"},
    "pins": {"title": "A red Chair"},
}
STANDS = (7, 5, 3, 2)


class InBatch(Joined):
    """The same in Spark."""

    def look_up(self, name: str, rows: DataFrame) -> DataFrame:
        return rows.sparkSession.createDataFrame(self.rows)


def rows(family: str) -> list[dict[str, Any]]:
    """An ad with all its rows, and one that is gone."""
    there = {
        given.table: {**SERVED.get(given.table, {}), "is_there": True, "stand": stand}
        for given, stand in zip(joined.INPUTS[family], STANDS, strict=False)
    }
    return [{"ad_id": "a1", **there}, {"ad_id": "a2", "ads": {"stand": 9}}]


def test_facts_have_the_handlers_fields_the_stands_and_tombstones(spark: SparkSession) -> None:
    check(ADS)
    assert sum(len(family.schema) for family in ADS.families) > 100
    for family in ADS.families:
        given = joined.joined(family.name, rows(family.name))
        keys = given.select([joined.KEY])
        in_batch = family.transform(spark.createDataFrame(keys), InBatch(given)).toArrow()
        made = family.transform(keys, Joined(given))
        assert facts.conform(in_batch, ADS) == facts.conform(made, ADS)
        found = {fact["key"]: fact for fact in facts.conform(made, ADS).to_pylist()}
        payload = facts.payload_column(family.name)
        assert found[b"a1"][payload] == handlers.run(family.name, given).to_pylist()[0]
        assert not found[b"a1"]["is_deleted"] and found[b"a2"]["is_deleted"]
        wanted = STANDS[: len(joined.INPUTS[family.name])]
        assert [found[b"a1"][name] for name in facts.VERSION_COLUMNS][: len(wanted)] == list(wanted)
        assert found[b"a2"]["version_1"] == 9
