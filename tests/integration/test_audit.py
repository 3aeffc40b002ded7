"""An audit on real Spark: measures equal a naive count, what is wrong is named, and what is noted is read back."""

from __future__ import annotations

import csv
import json
import tarfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines import index_rows, lake
from pipelines.curate import SOURCES, curate
from pipelines.indices import INDICES
from pipelines.ingest import load, mapping
from pipelines.settings import ROOT, Settings
from pipelines.suites import SUITES, of_index
from quality import history, pages
from quality.audit import Audit, audit
from quality.measures import WHOLE

SUITE = SUITES["curated.user_interactions"]
PINS = SUITES["curated.pins_offer"]
RETAIL = ROOT.parent / "shared" / "data" / "online_retail" / "by-day.tar.gz"
SHOP_DAYS = ("2010-12-01", "2010-12-02", "2010-12-10")
START = datetime(2024, 3, 1, tzinfo=UTC)
DAYS = 10
COLUMNS = {column.name: column.type for column in lake.CURATED_USER_INTERACTIONS.columns}
SCHEMA = ", ".join(f"`{name}` {kind}" for name, kind in COLUMNS.items())
OFFERS = ", ".join(f"`{column.name}` {column.type}" for column in lake.CURATED_PINS_OFFER.columns)

Row = dict[str, Any]


def event(day: int, number: int, **changes: Any) -> Row:
    at = START + timedelta(days=day, minutes=number)
    return dict.fromkeys(COLUMNS) | {
        "user_id": f"u{number % 7}",
        "event_id": f"e{day}-{number}",
        "pin_id": f"p{number % 5}",
        "action": "view" if number % 3 else "click",
        "event_time": at,
        "version": 1,
        "is_deleted": False,
        "content_hash": 5,
        "quantity": 1 + number % 4,
        "value_usd_micros": 1_000_000 + number,
        "topic_id": "t",
        "partition": 0,
        "offset": day * 1_000 + number,
        "broker_time": at + timedelta(seconds=2),
        **changes,
    }


def tombstone(day: int, number: int) -> Row:
    nothing = dict.fromkeys(("pin_id", "action", "event_time", "quantity", "value_usd_micros"))
    return event(day, number, event_id=f"dead{day}-{number}", is_deleted=True, **nothing)


def week() -> list[Row]:
    return [event(day, number) for day in range(DAYS) for number in range(40 + day % 3)] + [tombstone(3, 1)]


def frame(spark: SparkSession, rows: list[Row]) -> DataFrame:
    return spark.createDataFrame([tuple(row[name] for name in COLUMNS) for row in rows], SCHEMA)


def audited(spark: SparkSession, rows: list[Row] | DataFrame, as_of: datetime | None = None) -> Audit:
    known = spark.createDataFrame([(f"p{n}",) for n in range(5)], "pin_id string")
    given = frame(spark, rows) if isinstance(rows, list) else rows
    tables = {"curated.pins_catalogue": known}
    return audit(SUITE, given, tables.get, [], as_of or START + timedelta(days=DAYS))


def broken(found: Audit) -> set[str]:
    return {finding.expected.label for finding in found.report.broken}


def test_good_rows_pass_and_their_measures_are_what_a_naive_count_says(spark: SparkSession) -> None:
    rows = week()
    found = audited(spark, rows)
    assert broken(found) == set()
    assert found.measured.rows == len(rows) and found.measured.live == len(rows) - 1
    assert found.measured.newest_closed == "2024-03-10"
    for day in range(DAYS):
        batch = found.measured.batches[f"2024-03-{day + 1:02}"]
        mine = [row for row in rows if row["event_time"] and row["event_time"].day == day + 1]
        assert batch.rows == batch.live == len(mine)
        assert batch.histograms["action"] == Counter(row["action"] for row in mine)
        assert batch.histograms["user_id"] == {"a9": len(mine)}
        assert batch.numbers["quantity", "distinct"] == 4
        assert batch.numbers["surface", "null_pct"] == 100
        assert batch.numbers["pin_id", "orphan_pct"] == 0
        middle = quantiles([row["value_usd_micros"] for row in mine], n=2)[0]
        assert batch.numbers["value_usd_micros", "p50"] == pytest.approx(middle, abs=1)
    judged = [finding for finding in found.report.findings if finding.passed is not None]
    assert {finding.expected.kind for finding in judged} >= {"volume", "drift", "freshness", "lateness"}


def test_what_is_wrong_anywhere_is_named_and_blocks(spark: SparkSession) -> None:
    bad = [
        event(1, 500, action="stare"),
        event(2, 500, pin_id=None),
        event(2, 501, version=0),
        event(4, 500, quantity=-1),
        event(5, 0),
        event(5, 501, load_id="l"),
    ]
    found = audited(spark, [*week(), *bad])
    assert {finding.expected.label for finding in found.report.blocking} == {
        "action.unknown",
        "has_object.broken",
        "version.outside",
        "quantity.outside",
        "duplicates",
        "has_one_source.broken",
    }
    said = {finding.expected.field: finding.words for finding in found.report.blocking}
    assert said["quantity"] == ("quantity.outside is 1 (at most 0, declared): at least 1; found from -1 to 4")


def test_payloads_are_objects_of_json_where_they_are_there(spark: SparkSession) -> None:
    said = [
        event(1, 500 + n, payload=text) for n, text in enumerate(("{}", '{"rank": 1, "query": "ü"}', None))
    ]
    assert broken(audited(spark, [*week(), *said])) == set()
    texts = ("", "[1]", "1", '"rank"', '{"rank": 1', "rank", json.dumps({"query": "x" * 4_100}))
    bad = [event(2, 500 + n, payload=text) for n, text in enumerate(texts)]
    (found,) = audited(spark, [*week(), *said, *bad]).report.blocking
    assert (found.expected.label, found.expected.value) == ("payload_is_json.broken", len(texts))


def test_a_day_whose_views_come_as_impressions_and_one_without_payloads_are_told(spark: SparkSession) -> None:
    def day(number: int, looked_at: str, payload: str | None) -> list[Row]:
        actions = (*["impression"] * 8, looked_at, "click")
        return [event(number, n, action=actions[n % 10], payload=payload) for n in range(200)]

    usual = [row for number in range(DAYS - 1) for row in day(number, "view", f'{{"rank": {number}}}')]
    assert broken(audited(spark, usual + day(DAYS - 1, "view", '{"rank": 77}'))) == set()
    found = audited(spark, usual + day(DAYS - 1, "impression", '{"rank": 77}'))
    assert found.report.blocking == () and broken(found) == {"action.divergence"}
    found = audited(spark, usual + day(DAYS - 1, "view", None))
    assert found.report.blocking == () and broken(found) == {"payload.null_pct"}


def features_frame(
    spark: SparkSession, events: list[tuple[str, str]], text: str = '{"quality": 1}'
) -> DataFrame:
    """Live features of events by (user id, event id)."""
    columns = lake.CURATED_EVENT_FEATURES.columns
    said = dict.fromkeys(column.name for column in columns) | {
        "event_time": START,
        "version": 1,
        "is_deleted": False,
        "features": text,
        "features_hash": 5,
        "topic_id": "t",
        "partition": 0,
        "broker_time": START,
    }
    rows = [
        tuple((said | {"user_id": user, "event_id": event, "offset": number}).values())
        for number, (user, event) in enumerate(events)
    ]
    return spark.createDataFrame(rows, ", ".join(f"`{column.name}` {column.type}" for column in columns))


def test_features_whose_event_is_not_known_are_counted_and_stop_nothing(spark: SparkSession) -> None:
    suite, events = SUITES["curated.event_features"], frame(spark, week())
    tables = {"curated.user_interactions": events}
    known = [(row["user_id"], row["event_id"]) for row in week() if not row["is_deleted"]][:60]

    def one(of: list[tuple[str, str]], before: list[Any], text: str = '{"quality": 1}') -> Audit:
        return audit(suite, features_frame(spark, of, text), tables.get, before, START)

    first = one(known, [])
    assert broken(first) == set()
    before = [first.measured.batches[WHOLE]] * 8
    assert before[0].numbers["event_id", "orphan_pct"] == 0
    another_user = [("nobody", event) for _, event in known[:15]]
    found = one(known[15:] + another_user, before)
    assert found.measured.batches[WHOLE].numbers["event_id", "orphan_pct"] == 25
    assert found.report.blocking == () and "event_id.orphan_pct" in broken(found)
    worse = one(known, before, "quality: 1")
    assert [finding.expected.label for finding in worse.report.blocking] == ["features_is_json.broken"]


def test_rows_of_timelines_are_of_two_families_and_each_says_something(spark: SparkSession) -> None:
    spec = INDICES["user_events"]
    suite = of_index(spec)
    known = [(row["user_id"], row["event_id"]) for row in week() if not row["is_deleted"]][:60]
    curated = {"user_interactions": frame(spark, week()), "event_features": features_frame(spark, known)}
    for spec_of_pins in (lake.CURATED_PINS_CATALOGUE, lake.CURATED_PINS_OFFER):  # nothing is known of any
        columns = ", ".join(f"`{column.name}` {column.type}" for column in spec_of_pins.columns)
        curated[spec_of_pins.name.partition(".")[2]] = spark.createDataFrame([], columns)
    rows = index_rows.rows(spec, lambda name: curated[name.partition(".")[2]])
    good = audit(suite, rows, lambda table: None, [], START)
    assert good.report.blocking == ()
    families = good.measured.batches[WHOLE].histograms["family"]
    assert families == {"interactions": len(week()) - 1, "features": len(known)}
    silent = rows.withColumn("payload_features", F.lit(None).cast(rows.schema["payload_features"].dataType))
    other = rows.withColumn(
        "family", F.when(F.col("family") == "features", "labels").otherwise(F.col("family"))
    )
    for bad, label in ((silent, "has_features.broken"), (other, "family.unknown")):
        (found,) = audit(suite, bad, lambda table: None, [], START).report.blocking
        assert (found.expected.label, found.expected.value) == (label, len(known))


def test_a_column_that_is_gone_or_of_another_type_is_told_and_the_rest_is_judged(spark: SparkSession) -> None:
    rows = frame(spark, [*week(), event(9, 500, version=0)])
    rows = rows.withColumnRenamed("quantity", "quantities").withColumn(
        "load_row", rows.load_row.cast("string")
    )
    found = audited(spark, rows.withColumnRenamed("is_deleted", "deleted"))
    said = {finding.words for finding in found.report.blocking}
    assert "there is no field quantity; the nearest is quantities" in said
    assert "load_row is string; declared is bigint" in said
    assert "version.outside" in broken(found)


def test_without_its_day_or_with_a_text_for_it_a_table_has_no_history_and_says_so(
    spark: SparkSession,
) -> None:
    rows = frame(spark, week())
    for other in (rows.drop("event_time"), rows.withColumn("event_time", rows.event_time.cast("string"))):
        found = audited(spark, other)
        assert {finding.expected.label for finding in found.report.blocking} == {"event_time.type"}
        assert found.measured.batches == {}


def test_a_day_unlike_the_others_warns_and_blocks_nothing(spark: SparkSession) -> None:
    odd = [event(DAYS - 1, n, pin_id="px", value_usd_micros=100) for n in range(40)]
    found = audited(
        spark, [row for row in week() if row["event_time"] is None or row["event_time"].day < DAYS] + odd
    )
    assert found.report.blocking == ()
    assert {"pin_id.orphan_pct", "value_usd_micros.p50", "value_usd_micros.divergence"} <= broken(found)


def test_silence_is_told_at_the_same_time_of_the_day(spark: SparkSession) -> None:
    assert broken(audited(spark, week(), START + timedelta(days=DAYS))) == set()
    assert "silence_s" in broken(audited(spark, week(), START + timedelta(days=DAYS + 1)))


def test_an_empty_table_holds(spark: SparkSession) -> None:
    found = audited(spark, [])
    assert found.measured.rows == 0
    assert broken(found) == set()


@pytest.mark.skipif(not RETAIL.exists(), reason=f"no {RETAIL}")
def test_a_dirty_shop_day_by_day(own_spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    """What is refused of each day, and what the audits find of all, is what a naive reading of the files finds."""
    with tarfile.open(RETAIL) as archive:
        for day in SHOP_DAYS:
            archive.extract(f"by-day/{day}.csv", tmp_path, filter="data")
    by = mapping.read(ROOT / "conf" / "mappings" / "online-retail.yaml")
    kept: dict[str, set[tuple[str, ...]]] = {}
    refused: Counter[str] = Counter()
    for day in SHOP_DAYS:
        file = tmp_path / "by-day" / f"{day}.csv"
        rows = list(csv.DictReader(file.open(encoding="utf-8")))
        nulls = [row for row in rows if not row["CustomerID"]]
        negative = [row for row in rows if row["CustomerID"] and int(row["Quantity"]) < 1]
        found = load.load_files(own_spark, settings, file, by=by)
        assert found.refused == {"missing_field": len(nulls), "out_of_range": len(negative)}
        refused.update(found.refused)
        good = [row for row in rows if row["CustomerID"] and int(row["Quantity"]) >= 1]
        names = ("CustomerID", "InvoiceNo", "StockCode", "Quantity", "UnitPrice")
        kept[day] = {tuple(row[name] for name in names) for row in good}
    source = SOURCES["user_interactions"]

    def read(table: str) -> DataFrame | None:
        return lake.read(own_spark, table) if lake.current_snapshot(settings, table) else None

    raw = lake.read(own_spark, source.raw_table)
    now = datetime.now(UTC)
    of_raw = audit(SUITES[source.raw_table], raw, read, [], now).measured
    (today,) = of_raw.batches.values()
    assert today.numbers["", "refused_pct"] == pytest.approx(100 * refused.total() / of_raw.rows)
    of_letters = audit(SUITES["raw.dead_letters"], lake.read(own_spark, "raw.dead_letters"), read, [], now)
    assert of_letters.measured.batches[WHOLE].histograms["reason"] == refused
    curated = curate(source, raw, rows=of_raw.rows, snapshot_id=1)
    found = audit(SUITE, curated.table(source.parts[0]), read, [], now)
    curated.close()
    assert found.report.blocking == ()
    assert {day: batch.rows for day, batch in found.measured.batches.items()} == {
        day: len(events) for day, events in kept.items()
    }


def offers(spark: SparkSession, factor: int = 1) -> DataFrame:
    rows = [
        (f"p{n}", 1, None, False, (factor * (1_000_000 + 10_000 * n), True), 5, "t", 0, n, None, None, START)
        for n in range(60)
    ]
    return spark.createDataFrame(rows, OFFERS)


def test_audits_are_noted_read_back_and_judge_the_next_one(
    own_spark: SparkSession, settings: Settings
) -> None:
    def one(rows: DataFrame, snapshot: int) -> Audit:
        noted = history.noted(settings, PINS.table)
        found = audit(PINS, rows, lambda table: None, history.audits(noted, but=snapshot), datetime.now(UTC))
        new = history.record(own_spark, found, snapshot, noted)
        pages.renew(settings, PINS.table, [*noted, *new])
        return found

    first = one(offers(own_spark), 1)
    assert all(finding.expected.basis in (None, "declared") for finding in first.report.findings)
    assert history.audits(history.noted(settings, PINS.table)) == [first.measured.batches[WHOLE]]
    noted = history.noted(settings, PINS.table)
    more = [row | {"snapshot_id": snapshot} for snapshot in range(2, 9) for row in noted]
    found = audit(
        PINS, offers(own_spark, 100), lambda table: None, history.audits([*noted, *more]), datetime.now(UTC)
    )
    assert "offer.price_usd_micros.p50" in broken(found)
    new = history.record(own_spark, found, 9, noted)
    page = pages.renew(settings, PINS.table, [*noted, *new]).read_text()
    assert "not as usual" in page and "offer.price_usd_micros" in page
    assert page == (pages.renew_all(settings).parent / f"{PINS.table}.html").read_text()
    assert f'<a href="{PINS.table}.html">' in (settings.paths.reports / "quality" / "index.html").read_text()
