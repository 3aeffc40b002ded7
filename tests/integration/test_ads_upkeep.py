"""The daily care of the ads account as Dagster runs it, and a stream that goes on behind keys that were dropped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from pyspark.sql import SparkSession

from assets.ads import ads_assets
from assets.platform import Platform
from jobs import ads_operations
from jobs.streams import hosted_streams
from pipelines import lake
from pipelines.ads import collection, consumer, publisher, repository
from pipelines.ads.index import ADS, CONTROL_STREAM
from pipelines.ads.repository import Repository, Update
from pipelines.ads.schema import CONTROL
from pipelines.contracts import ADS_CHANGES
from pipelines.indexing.documents import DocumentsView
from pipelines.indices import overlay
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings
from pipelines.spark import session
from tests.ads_source import await_that
from tests.ads_world import has_document, written
from tests.conftest import small_settings
from tests.topics import make_again


@pytest.fixture
def settings(broker: Settings, spark: SparkSession, tmp_path: Path) -> Settings:
    """No source database; what is inactive is collected at once; topics that nobody has written to."""
    settings = small_settings(
        tmp_path / "home",
        KAFKA__IS_EMBEDDED="false",
        KAFKA__BOOTSTRAP_SERVERS=broker.kafka.bootstrap_servers,
        ADS__GC_DAYS=0,
        STREAMS__TRIGGER_MS=200,
    )
    make_again(settings, [ADS_CHANGES.topic, *publisher.TOPICS])
    session(settings, "tests")
    return settings


@pytest.fixture
def store(settings: Settings) -> Iterator[Repository]:
    store = repository.opened(settings)
    publisher.subscribe(store)
    yield store
    store.close()


def test_a_daily_run_writes_what_does_not_agree_and_collects_what_is_over(
    settings: Settings, store: Repository
) -> None:
    written(
        store,
        Update("ad_groups", "g1", 1, {"campaign_id": "gone", "status": "active"}),
        Update("ads", "a1", 1, {"ad_group_id": "g1", "status": "active"}),
        Update("ads", "a2", 1, {"ad_group_id": "g1", "status": "archived"}),
    )
    done = dg.materialize(ads_assets, resources={"platform": Platform(lambda: settings, lambda *_: [])})
    assert done.success
    (collected,) = done.asset_materializations_for_node("ads_upkeep__collected")
    assert collected.metadata["collected"].value == 1
    rows = lake.open_table(settings, lake.OPS_ADS_UNSYNCED.name)
    assert rows is not None
    found = {(row["table"], row["cause"]): row for row in rows.scan().to_arrow().to_pylist()}
    assert found["ad_groups", "dangling"]["rows"] == 1 and "g1" in found["ad_groups", "dangling"]["examples"]
    assert {row["has_source"] for row in found.values()} == {False}

    assert has_document(store) == {"a1", "a2"}
    for _ in consumer.follow(settings, store, lambda: bool(collection.runs(store))):
        pass
    assert has_document(store) == {"a1"}


def names(settings: Settings) -> list[str | None]:
    """What is served of three ads."""
    view = overlay(settings, ADS.name).view
    assert isinstance(view, DocumentsView)
    found = view.values(CONTROL, ["ad_name"], [b"a1", b"a2", b"a3"])[0]
    return list(found)


def test_a_stream_goes_on_behind_keys_that_were_dropped(settings: Settings, store: Repository) -> None:
    hosted = {one.name: one for one in hosted_streams(session(settings, "tests"), settings, [ADS.name])}

    def published(version: int, *ads: str) -> None:
        written(store, *(Update("ads", ad, version, {"name": f"version {version}"}) for ad in ads))
        with Producer(settings) as producer:
            publisher.publish(store, producer)

    def run_until(wanted: list[str | None]) -> None:
        query = hosted[CONTROL_STREAM].begin()
        try:
            await_that(lambda: names(settings) == wanted)
            assert query.isActive
        finally:
            query.stop()

    published(1, "a1", "a2")
    run_until(["version 1", "version 1", None])
    published(2, "a1", "a3")
    time.sleep(0.1)
    dropped = {one.topic: one.keys for one in ads_operations.drop_stale(settings, 0.0)}
    assert dropped[publisher.ROUTES[0].topic] == 2
    published(3, "a2")
    run_until(["version 1", "version 3", None])
