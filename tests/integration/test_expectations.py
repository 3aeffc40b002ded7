"""Expectations on real Spark: what is valid passes, and each thing that is not is named with what was seen."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from quality import expectations

NOW = datetime(2024, 3, 1, tzinfo=UTC)
SCHEMA = (
    "user_id string, event_id string, pin_id string, action string, event_time timestamp, version long,"
    " is_deleted boolean, content_hash long, quantity long, value_usd_micros long"
)


def rows(spark: SparkSession, *changes: dict[str, Any]) -> DataFrame:
    live = {
        "user_id": "u",
        "event_id": "e",
        "pin_id": "p",
        "action": "view",
        "event_time": NOW,
        "version": 1,
        "is_deleted": False,
        "content_hash": 5,
        "quantity": None,
        "value_usd_micros": 0,
    }
    nothing = dict.fromkeys(("pin_id", "action", "event_time", "value_usd_micros"))
    dead = {**live, "event_id": "dead", "is_deleted": True, **nothing}
    values = [dead, *[{**live, "event_id": f"e{n}", **change} for n, change in enumerate(changes)]]
    return spark.createDataFrame([tuple(value[name] for name in live) for value in values], SCHEMA)


def run(frame: DataFrame) -> expectations.Report:
    return expectations.run("t", expectations.user_interactions(), frame)


def test_valid_rows_pass_and_tombstones_need_neither_pin_nor_time(spark: SparkSession) -> None:
    report = run(rows(spark, {}, {"quantity": 3}))
    assert report.passed
    assert report.failed == ()
    assert set(report.findings.values()) == {"holds"}


def test_what_is_broken_is_named(spark: SparkSession) -> None:
    twice = {"event_id": "same"}
    report = run(rows(spark, twice, twice, {"action": "stare"}, {"pin_id": None}, {"version": 0}))
    assert not report.passed
    kinds = {what.partition("(")[0] for what in report.failed}
    assert kinds == {
        "compound_columns_to_be_unique",
        "column_distinct_values_to_be_in_set",
        "column_values_to_not_be_null",
        "column_values_to_be_between",
    }
    assert len(report.failed) == 4
    assert any("stare" in report.findings[what] for what in report.failed)
