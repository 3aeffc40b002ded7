"""Patterns on Spark: a batch, and the dry run over history, say what a naive evaluator says."""

from __future__ import annotations

import collections
import datetime
import json
import random
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
import yaml

from benchmarks import patterns as replayed
from pipelines import lake
from pipelines.contracts import RECORD, USER_INTERACTIONS, decode_table
from pipelines.indexing.spec import NoState
from pipelines.indices import INDICES
from pipelines.settings import Settings
from pipelines.users import pattern_dry_run, pattern_files
from tests import pattern_oracle
from tests.pattern_oracle import Firing

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def log() -> replayed.Log:
    return replayed.replay_log(random.Random(5), 2_000, 40)


def curated(spark: SparkSession, log: replayed.Log) -> DataFrame:
    """The statements that stand, as the curated table has them."""
    raw: dict[str, Any] = {field.name: pa.nulls(len(log.records), field.type) for field in RECORD}
    raw["value"] = pa.array([json.dumps(record).encode() for record in log.records], pa.binary())
    raw["offset"] = pa.array(range(len(log.records)), pa.int64())
    raw["broker_time"] = pa.array(
        [1_500_000_000_000_000] * len(log.records), RECORD.field("broker_time").type
    )
    rows = decode_table(USER_INTERACTIONS, pa.table(raw, schema=RECORD)).accepted
    spark.createDataFrame(rows).createOrReplaceTempView("said")
    greatest = "max_by(struct(*), struct(version, is_deleted, content_hash))"
    return spark.sql(f"SELECT w.* FROM (SELECT {greatest} AS w FROM said GROUP BY user_id, event_id)")


def expected(log: replayed.Log) -> set[Firing]:
    rules = yaml.safe_load(pattern_files.PATTERNS_FILE.read_text(encoding="utf-8"))["rules"]
    return pattern_oracle.firings(rules, log.said)


def test_the_facts_of_a_batch(spark: SparkSession, log: replayed.Log) -> None:
    (family,) = INDICES["user_profiles"].families
    facts = family.transform(curated(spark, log), NoState()).toArrow().to_pylist()
    found = {
        Firing(said["rule"], one["key"].decode(), said["event_id"], one["time_ms"], said["value"])
        for one in facts
        if (said := one["payload_firings"])["rule"] is not None
    }
    assert found == expected(log)
    assert len(facts) - len(found) == len({one.user for one in log.said}), "one a user says what is known"


def test_a_dry_run(own_spark: SparkSession, settings: Settings, log: replayed.Log) -> None:
    patterns = pattern_files.load().patterns
    with pytest.raises(pattern_dry_run.NoHistory):
        pattern_dry_run.run(own_spark, settings, patterns)
    lake.ensure(own_spark, lake.CURATED_USER_INTERACTIONS)
    rows = curated(own_spark, log)
    rows.select(*[column.name for column in lake.CURATED_USER_INTERACTIONS.columns]).writeTo(
        f"lake.{pattern_dry_run.TABLE}"
    ).append()
    newest_ms = max(one["event_time"] for one in pattern_oracle.standing(log.said).values())
    from_ms, to_ms = replayed.BEGAN_MS + DAY_MS, replayed.BEGAN_MS + 3 * DAY_MS
    for start, end in ((None, None), (from_ms, to_ms)):
        found = pattern_dry_run.run(own_spark, settings, patterns, start, end)
        last = newest_ms + 1 if end is None else min(end, newest_ms + 1)
        told = [one for one in expected(log) if (start or 0) <= one.at_ms < last]
        assert len(told) > 20
        for tried in found.rules:
            mine = [one for one in told if one.rule == tried.rule]
            assert (tried.fired, tried.users) == (len(mine), len({one.user for one in mine}))
            assert tried.by_day == dict(collections.Counter(map(day, mine)))


def day(one: Firing) -> str:
    return datetime.datetime.fromtimestamp(one.at_ms / 1000, datetime.UTC).date().isoformat()
