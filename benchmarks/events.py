"""What users did, made up: events of any number, skewed, and the bases of timelines and pins, built by Spark.

Here: which events and pins there are, which follows from their numbers and a seed alone, and a home that serves them.
What is asked of them is a benchmark's own.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import harness
from benchmarks.harness import say
from pipelines.indexing import build
from pipelines.indexing.base import read_manifest
from pipelines.indexing.build import Meta
from pipelines.indexing.position import EMPTY
from pipelines.indexing.spec import IndexSpec, NoState, lineage
from pipelines.indexing.versions import Versions
from pipelines.pins.index import PINS, catalogue, offer
from pipelines.settings import Settings
from pipelines.users.index import USER_EVENTS, interactions
from pipelines.users.indexed import RELATION
from pipelines.users.relations import RELATIONS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

DAY_MS = 86_400_000
SPAN_MS = 90 * DAY_MS


class Population(NamedTuple):
    """How many events, and of how many users, pins and ads; the newest happened at ``until_ms``.

    Users, pins and ads are skewed: that of number n is met in proportion to 1/sqrt(n). Times lie closer together the
    newer they are.
    """

    events: int
    users: int
    pins: int
    ads: int
    until_ms: int
    seed: int


class Built(NamedTuple):
    """What a base of events is: its seconds, its bytes on disk, and the same events and their pins as Parquet."""

    seconds: float
    bytes: int
    parquet: Path
    pins: Path


def of_size(events: int, seed: int) -> Population:
    """A hundred events a user; the newest are of the last minute."""
    users = max(10, events // 100)
    return Population(
        events, users, max(100, users // 5), max(100, users // 50), int(time.time() * 1000), seed
    )


def rows(spark: SparkSession, given: Population) -> DataFrame:
    """The events in the columns of `curated.user_interactions` that their transform reads."""
    from pyspark.sql import functions as F

    def chance(number: int) -> str:
        """A number from 0 to 1 that follows from the event's, the seed's and its own."""
        return f"(pmod(xxhash64(id, {given.seed}L, {number}), 9007199254740992L) / 9007199254740992D)"

    def skewed(number: int, count: int) -> str:
        return f"CAST(floor({count} * {chance(number)} * {chance(number)}) AS BIGINT)"

    ad = skewed(4, given.ads)
    of_ad = f"{chance(5)} < 0.4"
    columns = {
        "user_id": f"concat('u', {skewed(1, given.users)})",
        "event_id": "concat('e', id)",
        "pin_id": f"concat('p', {skewed(2, given.pins)})",
        "action": f"""CASE WHEN {chance(3)} < 0.80 THEN 'view' WHEN {chance(3)} < 0.92 THEN 'click'
            WHEN {chance(3)} < 0.96 THEN 'save' WHEN {chance(3)} < 0.98 THEN 'purchase' ELSE 'hide' END""",
        "event_time": f"timestamp_millis({given.until_ms} - CAST({SPAN_MS} * pow({chance(6)}, 2) AS BIGINT))",
        "version": "1L",
        "is_deleted": "false",
        "content_hash": "id",
        "quantity": "CAST(NULL AS BIGINT)",
        "value_usd_micros": "CAST(NULL AS BIGINT)",
        "surface": f"element_at(array('home', 'search', 'related'), CAST(1 + floor(3 * {chance(7)}) AS INT))",
        "ad_id": f"CASE WHEN {of_ad} THEN concat('a', {ad}) END",
        "campaign_id": f"CASE WHEN {of_ad} THEN concat('c', {ad} div 10) END",
        "advertiser_id": f"CASE WHEN {of_ad} THEN concat('v', {ad} div 50) END",
        "category": f"concat('category ', CAST(floor(40 * {chance(8)}) AS INT))",
        "view_type": f"CASE WHEN {of_ad} THEN 'promoted' ELSE 'organic' END",
        "payload": "CAST(NULL AS STRING)",
    }
    parts = max(2, math.ceil(given.events / 500_000))
    return spark.range(0, given.events, 1, parts).select(
        *[F.expr(what).alias(name) for name, what in columns.items()]
    )


def pins(spark: SparkSession, given: Population) -> DataFrame:
    """The pins that events name, in the columns that the transforms of `catalogue` and `offer` read.

    Of one in 50 nothing is known, and one in 10 has no offer.
    """
    from pyspark.sql import functions as F

    columns = {
        "pin_id": "concat('p', id)",
        "version": "1L",
        "is_deleted": "false",
        "catalogue_hash": "id",
        "catalogue": """named_struct(
            'title', concat('A thing of many words, the ', id, 'th "of its kind"'),
            'category', concat('category ', id % 40), 'department', concat('department ', id % 8),
            'brand', CASE WHEN id % 3 > 0 THEN concat('brand ', id % 300) END)""",
        "offer_hash": "CASE WHEN id % 10 > 0 THEN id END",
        "offer": "CASE WHEN id % 10 > 0 THEN named_struct("
        "'price_usd_micros', 10000 * (1 + id % 9999), 'is_available', id % 7 > 0) END",
    }
    known = spark.range(0, given.pins, 1, 2).filter("id % 50 > 0")
    return known.select(*[F.expr(what).alias(name) for name, what in columns.items()])


def with_pins(events: DataFrame, given: Population) -> DataFrame:
    """Events as a build reads them: with what was known of their pins."""
    tables = {
        f"curated.pins_{family}": pins(events.sparkSession, given).filter(f"{family}_hash IS NOT NULL")
        for family in ("catalogue", "offer")
    }
    return RELATIONS[RELATION](events, tables.__getitem__)


def kept_or_served(settings: Settings, events: int, seed: int) -> tuple[Population, Built]:
    """What a kept home serves already, if it is as many events of the same seed; else `serve`, with Parquet."""
    note = settings.home / "events.json"
    if note.exists():
        said = json.loads(note.read_text())
        population, paths = Population(**said["population"]), ("parquet", "pins")
        if (population.events, population.seed) == (events, seed):
            say("the home serves these events already")
            return population, Built(**said["built"] | {name: Path(said["built"][name]) for name in paths})
    population = of_size(events, seed)
    built = serve(settings, population, with_parquet=True)
    note.write_text(json.dumps({"population": population._asdict(), "built": built._asdict()}, default=str))
    return population, built


def serve(settings: Settings, given: Population, *, with_parquet: bool) -> Built:
    """Build the timelines of events, and their pins, and publish both."""
    from pipelines.spark import session

    spark = session(settings, "tidemark benchmark")
    parquet, pins_parquet = settings.home / "events.parquet", settings.home / "pins.parquet"
    try:
        if with_parquet:
            say(f"{given.events:,} events as Parquet")
            rows(spark, given).write.mode("overwrite").parquet(str(parquet))
            pins(spark, given).write.mode("overwrite").parquet(str(pins_parquet))
        say(f"{given.events:,} events of {given.users:,} users: building their timelines")
        began = time.perf_counter()
        facts = interactions(with_pins(rows(spark, given), given), NoState())
        shards = max(1, math.ceil(given.events / settings.build.shard_facts))
        path = _publish(settings, USER_EVENTS, facts, shards)
        seconds = round(time.perf_counter() - began, 1)
        families = [family(pins(spark, given), None) for family in (catalogue, offer)]  # type: ignore[arg-type]
        _publish(settings, PINS, families[0].unionByName(families[1], allowMissingColumns=True), 1)
    finally:
        spark.stop()
    files = [file for shard in read_manifest(path).shards for file in shard.files]
    size = sum(file.size_bytes for file in files)
    say(f"built in {seconds} s: {size / given.events:.0f} bytes an event")
    return Built(seconds, size, parquet, pins_parquet)


def _publish(settings: Settings, spec: IndexSpec, facts: DataFrame, shards: int) -> Path:
    """Build a base of facts, and publish it; its folder."""
    versions = Versions(settings.paths.indices, spec.name)
    version = versions.new_version(lineage(spec))
    path = versions.new_path(version)
    build.build(spec, facts, path, Meta(version, EMPTY), shard_count=shards)
    versions.publish(version)
    return path


def start(settings: Settings) -> float:
    """Start serving alone; the seconds until it is ready."""
    began = time.perf_counter()
    harness.start(settings, ["serving"])
    harness.await_ready(settings)
    return round(time.perf_counter() - began, 2)
