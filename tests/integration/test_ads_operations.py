"""Operating the ads index on a real broker: the base alone and back, stale keys dropped, an older base served."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from assets.platform import Platform
from jobs import ads_operations, moves
from jobs.ads_jobs import ads_refresh
from jobs.controls import RUNNING, STOPPED, Controls
from pipelines.ads import bypass, enrichment, publisher, refresh, repository
from pipelines.ads.index import ADS
from pipelines.ads.joined import INPUTS
from pipelines.ads.refresh import Choice
from pipelines.ads.repository import Repository, Update
from pipelines.contracts import ADS_BUDGETS
from pipelines.contracts.ads_keys import CONTROL, CONTROL_BACKFILL
from pipelines.indexing import delta
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import VersionError
from pipelines.indices import overlay
from pipelines.ingest import broker
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings
from tests import ads_world
from tests.ads_world import written


@pytest.fixture
def store(kafka_settings: Settings) -> Iterator[Repository]:
    broker.ensure_topics(kafka_settings, [*publisher.TOPICS, ADS_BUDGETS.topic])
    store = repository.opened(kafka_settings)
    publisher.subscribe(store)
    bypass.subscribe(store)
    yield store
    store.close()


def ad(key: str, version: int, status: str = "active") -> Update:
    return Update("ads", key, version, {"status": status})


def facts(store: Repository, ads: list[str]) -> pa.Table:
    with store.reading() as connection:
        made = [ads_world.facts_of(f, enrichment.look_up(connection, f, ads)) for f in INPUTS]
    return pa.concat_tables(made)


def committed(settings: Settings, store: Repository, epoch: int, ads: list[str], end: Position) -> None:
    """An epoch of the delta, as the streams would make it."""
    path = delta.table_path(settings.paths.delta, ADS.name, lineage(ADS))
    DeltaWriter(ADS, path).commit(Marker("ads_control", 1, epoch, EMPTY, end), facts(store, ads))


def statuses(settings: Settings, *ads: str) -> list[str | None]:
    """What is served."""
    view = overlay(settings, ADS.name).view
    assert isinstance(view, DocumentsView)
    found = view.values("control", ["ad_status"], [key.encode() for key in ads])[0]
    return list(found)


def kept(settings: Settings, topic: str) -> int:
    return sum(end - first for first, end in broker.offsets(settings, topic).values())


def test_the_base_alone_and_back_loses_nothing(kafka_settings: Settings, store: Repository) -> None:
    settings, board = kafka_settings, Controls(kafka_settings.paths.run)
    with pytest.raises(VersionError, match="no base"):
        ads_operations.serve_base_alone(settings)
    with store.reading() as connection:
        assert not repository.paused(connection)  # nothing was changed
    written(store, ad("a1", 1))
    base = ads_world.publish(settings, facts(store, ["a1"]))
    with Producer(settings) as producer:
        publisher.publish(store, producer), bypass.send(store, producer)
        written(store, ad("a1", 2, "paused"))
        committed(settings, store, 0, ["a1"], Position({"ads-control@x": {0: 1}}))
        assert statuses(settings, "a1") == ["paused"]

        for _ in range(2):  # it may be repeated
            assert ads_operations.serve_base_alone(settings)[:2] == (base, False)
        assert statuses(settings, "a1") == ["active"]
        assert {board.wanted()[name] for name in ADS.streams} == {STOPPED}
        written(store, ad("a2", 3))
        before = kept(settings, CONTROL), kept(settings, ADS_BUDGETS.topic)
        assert sum(publisher.publish(store, producer).keys.values()) == 0
        assert bypass.send(store, producer).records == 0
        assert (kept(settings, CONTROL), kept(settings, ADS_BUDGETS.topic)) == before

        for _ in range(2):
            pointer = ads_operations.resume(settings)
            assert pointer is not None and pointer[:2] == (base, True)
        assert statuses(settings, "a1") == ["paused"]
        assert {board.wanted()[name] for name in ADS.streams} == {RUNNING}
        assert publisher.publish(store, producer).keys[CONTROL] == 2  # a1's pause, and a2
        assert bypass.send(store, producer).records == 1


def test_stale_keys_that_nobody_has_taken_are_dropped_and_counted(
    kafka_settings: Settings, store: Repository
) -> None:
    settings = kafka_settings
    written(store, *(ad(f"a{n}", 1) for n in range(9)))
    for topic in publisher.TOPICS:  # of other tests: the broker is the run's
        _take_all(settings, store, topic)
    before = {topic: ends(settings, topic) for topic in publisher.TOPICS}
    with Producer(settings) as producer:
        publisher.publish(store, producer)
        time.sleep(1.0)
        cut = time.time()
        time.sleep(1.0)
        young_from = {topic: ends(settings, topic) for topic in publisher.TOPICS}
        refresh.send(store, producer, Choice(), ["control"])
    taken_of = next(place for place, end in young_from[CONTROL].items() if end > before[CONTROL][place])
    topic_id = broker.topic_ids(settings, [CONTROL])[CONTROL]
    committed(settings, store, 99, ["a1"], Position({topic_id: {taken_of: before[CONTROL][taken_of] + 1}}))

    planned = ads_operations.drop_stale(settings, time.time() - cut, is_dry=True)
    assert (planned[0].topic, planned[0].keys) == (CONTROL, 9 - 1)
    dropped = ads_operations.drop_stale(settings, time.time() - cut)
    assert {(one.topic, one.reason): one.keys for one in dropped} == {
        (CONTROL, "stale"): 8,
        ("ads-content", "stale"): 9,
    }
    for topic in publisher.TOPICS:
        firsts = {number: first for number, (first, _) in broker.offsets(settings, topic).items()}
        assert all(firsts[number] <= young_from[topic][number] for number in firsts)
    assert kept(settings, CONTROL) == 0 and kept(settings, CONTROL_BACKFILL) >= 9  # the young ones are there
    with store.reading() as connection:
        assert repository.dropped(connection, dropped[0].at_ms) == sorted(dropped)
        assert repository.count(connection, "ads") == 9
    assert ads_operations.drop_stale(settings, time.time() - cut) == []
    assert all(Controls(settings.paths.run).should_run(name) for name in ADS.streams)


def ends(settings: Settings, topic: str) -> dict[int, int]:
    return {number: end for number, (_, end) in broker.offsets(settings, topic).items()}


def _take_all(settings: Settings, store: Repository, topic: str) -> None:
    topic_id = broker.topic_ids(settings, [topic])[topic]
    epoch = publisher.TOPICS.index(topic)
    committed(settings, store, epoch, ["a1"], Position({topic_id: ends(settings, topic)}))


def test_an_older_base_is_served_with_and_without_the_delta(
    kafka_settings: Settings, store: Repository
) -> None:
    settings = kafka_settings
    written(store, ad("a1", 1))
    good = ads_world.publish(settings, facts(store, ["a1"]))
    written(store, ad("a1", 2, "paused"), ad("a2", 2))
    committed(settings, store, 0, ["a1", "a2"], Position({"ads-control@x": {0: 2}}))
    bad = ads_world.publish(settings, facts(store, ["a1", "a2"]), Position({"ads-control@x": {0: 2}}))
    assert statuses(settings, "a1", "a2") == ["paused", "active"] and bad > good
    assert moves.rollback(settings, ADS.name, good, without_delta=False).version == good
    assert statuses(settings, "a1", "a2") == ["paused", "active"]  # its delta has what came since
    assert moves.rollback(settings, ADS.name, good, without_delta=True).version == good
    assert statuses(settings, "a1", "a2") == ["active", None]
    assert moves.resume(settings, ADS.name).with_delta
    assert statuses(settings, "a1", "a2") == ["paused", "active"]


def test_a_refresh_by_a_predicate_is_a_job(kafka_settings: Settings, store: Repository) -> None:
    written(
        store,
        Update("ad_groups", "g1", 1, {"campaign_id": "c1"}),
        *(Update("ads", f"a{n}", 1, {"ad_group_id": "g1" if n < 4 else "g2"}) for n in range(9)),
    )
    before = kept(kafka_settings, CONTROL_BACKFILL)
    platform = Platform(lambda: kafka_settings, lambda *_: [])
    config = {
        "ops": {"send_keys": {"config": {"column": "campaign_id", "key": "c1", "families": ["control"]}}}
    }
    assert ads_refresh.execute_in_process(run_config=config, resources={"platform": platform}).success
    assert kept(kafka_settings, CONTROL_BACKFILL) == before + 4
