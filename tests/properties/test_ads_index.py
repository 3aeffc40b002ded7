"""The index `ads` over a repository that moves on between epochs, against a naive fold of all that was said.

Change records go through the shipped contract, updater and publisher; keys wait in logs as Kafka's topics would hold
them, some of them long, some twice; epochs look up what the repository says by then. A base is built in the middle,
with the ends of the logs as its cut. The handlers have a test of their own: here fields that tell whose rows, and of
which time, a document is made of are folded in plain Python.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pytest

from pipelines.ads import consumer, publisher, repository
from pipelines.ads.index import ADS
from pipelines.ads.relations import RepositoryState
from pipelines.ads.repository import Repository
from pipelines.contracts import RECORD
from pipelines.indexing import build, facts
from pipelines.indexing.base import empty, open_base
from pipelines.indexing.delta import table_path
from pipelines.indexing.overlay import Overlay
from pipelines.indexing.position import Position
from pipelines.indexing.spec import lineage
from pipelines.indexing.streaming import HotStreamRun
from pipelines.indices import INDICES, STREAMS
from pipelines.ingest.producer import Delivery
from tests.properties.test_indices import topic_id

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipelines.indexing.view import View

CASES, ROUNDS, RECORDS_A_ROUND = 40, 4, 6
PARTITIONS = 2
SEED = int(os.environ.get("TIDEMARK_TEST_SEED", "0")) or random.randrange(2**32)
KEYS = {"ads": "ab", "ad_groups": "gh", "campaigns": "c", "advertisers": "v", "pins": "pq", "images": "ij"}
SAYS: dict[str, dict[str, Sequence[Any]]] = {
    "ads": {
        "ad_group_id": "gh",
        "pin_id": "pq",
        "status": ("active", "paused"),
        "clicks_7d": (1, 2, 3),
        "new": (1,),
    },
    "ad_groups": {"campaign_id": "c", "bid_usd_micros": (5, 6, 7), "status": ("active", "paused")},
    "campaigns": {"advertiser_id": "v", "status": ("active", "paused"), "name": ("x", "y")},
    "advertisers": {"status": ("active",), "industry": ("x", "y")},
    "pins": {"image_signature": "ij", "title": ("red", "blue")},
    "images": {"safety": (0.5, 1.0)},
}
"""Table → column → what it may be set to; keys are a letter behind the case's number."""
Said = dict[str, Any]


class Log:
    """A topic's partitions, as Kafka keeps them."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.ends = [0] * PARTITIONS

    def add(self, topic: str, partition: int, value: bytes) -> None:
        said = {"topic_id": topic_id(topic), "partition": partition, "offset": self.ends[partition]}
        self.records.append({**said, "broker_time": 1_704_067_200_000_000, "key": b"", "value": value})
        self.ends[partition] += 1


class Topics(NamedTuple):
    """What the publisher sends to, in place of a producer."""

    logs: dict[str, Log]
    choose: random.Random

    def send(self, topic: str, records: Sequence[tuple[bytes, bytes]]) -> list[Delivery]:
        found = []
        for _, value in records:
            for _ in range(2 if self.choose.random() < 0.1 else 1):
                place = self.choose.randrange(PARTITIONS)
                self.logs[topic].add(topic, place, value)
                found.append(Delivery(topic_id(topic), place, self.logs[topic].ends[place] - 1))
        return found

    def ends(self) -> Position:
        """Up to where keys were sent."""
        return Position({topic_id(topic): dict(enumerate(log.ends)) for topic, log in self.logs.items()})


class World(NamedTuple):
    """What was said, in the order of its versions, and what the streams and a batch in the middle made of it."""

    said: list[Said]
    folder: Path
    store: Repository


def said_in_a_round(choose: random.Random, case: int, above: int) -> list[Said]:
    """Records of a case, alone or in a transaction, in any order; their versions are above a number."""
    found: list[Said] = []
    for version in range(above + 1, above + 1 + RECORDS_A_ROUND):
        table = choose.choice([*KEYS, "ads", "ads"])
        said: Said = {"table": table, "key": f"{case}{choose.choice(KEYS[table])}", "version": version}
        if choose.random() < 0.12:
            found.append(said | {"op": "delete"})
            continue
        columns = choose.sample(list(SAYS[table]), choose.randint(1, len(SAYS[table])))
        values = {column: choose.choice(SAYS[table][column]) for column in columns}
        is_reference = {"ad_group_id", "pin_id", "campaign_id", "advertiser_id", "image_signature"}
        found.append(
            said | {"values": {c: f"{case}{v}" if c in is_reference else v for c, v in values.items()}}
        )
    size = choose.randint(0, 3)
    for one in found[:size]:
        one["transaction"] = {"id": f"t{case}-{above}", "count": size}
    choose.shuffle(found)
    return found


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A history of every case, through updater, publisher and both streams, with a base built in the middle."""
    choose = random.Random(SEED)
    folder = tmp_path_factory.mktemp("ads")
    store = Repository(f"sqlite:{folder / 'repository.db'}")
    publisher.subscribe(store)
    topics = Topics({topic: Log() for topic in publisher.TOPICS}, choose)
    streams = {
        name: HotStreamRun(
            STREAMS[name],
            INDICES.values(),
            deltas=folder / "delta",
            checkpoints=folder / "checkpoints",
            state=RepositoryState(store),
        )
        for name in ADS.streams
    }
    said: list[Said] = []
    late: list[Said] = []
    taken = dict.fromkeys(publisher.TOPICS, 0)
    for number in range(ROUNDS):
        fresh = [one for case in range(CASES) for one in said_in_a_round(choose, case, 100 * number)]
        said += fresh
        now = [*fresh, *late, *choose.sample(said, len(said) // 10)]
        choose.shuffle(now)
        late = [one for one in now if choose.random() < 0.2] if number < ROUNDS - 1 else []
        now = [one for one in now if not any(one is other for other in late)]
        for half in (now[::2], now[1::2]):
            taken_in(store, half)
            publisher.publish(store, topics, choose.choice((10, 1_000)))  # type: ignore[arg-type]
        is_last = number == ROUNDS - 1
        if is_last:
            publish_all(store, topics)
        if number == ROUNDS // 2:
            build_base(store, folder / "base", topics.ends())
        for name, stream in streams.items():
            rows = []
            for topic in STREAMS[name].topics:
                records = topics.logs[topic].records
                end = len(records) if is_last else choose.randint(taken[topic], len(records))
                rows += records[taken[topic] : end]
                taken[topic] = end
            batch = spark.createDataFrame(pa.Table.from_pylist(rows, RECORD))
            stream.run_epoch(batch, number, 1)
            stream.run_epoch(batch, number, 1)  # Spark may repeat an epoch
    yield World(said, folder, store)
    store.close()


def publish_all(store: Repository, topics: Topics) -> None:
    """Every change that is left."""
    seen, seq = -1, 0
    while seq > seen:
        seen, seq = seq, publisher.publish(store, topics).seq  # type: ignore[arg-type]


def taken_in(store: Repository, records: Sequence[Said]) -> None:
    """The updater takes change records, as they lie in the topic."""
    values = [json.dumps(record).encode() for record in records]
    columns: dict[str, Any] = {field.name: pa.nulls(len(values), field.type) for field in RECORD}
    columns["value"] = pa.array(values, pa.binary())
    columns["broker_time"] = pa.array([1_704_067_200_000_000] * len(values), RECORD.field("broker_time").type)
    batch = consumer.write(store, pa.table(columns, schema=RECORD), Position())
    assert not batch.refused


def build_base(store: Repository, directory: Path, cut: Position) -> None:
    """A base of every ad that was ever named, as the repository has it."""
    with store.reading() as connection:
        ads = [key for key, _ in repository.scan(connection, "ads")]
    rows, state = pa.table({"ad_id": ads}), RepositoryState(store)
    made = [facts.conform(family.transform(rows, state), ADS) for family in ADS.families]
    meta = build.Meta(directory.name, cut)
    build.build_local(ADS, pa.concat_tables(made), directory, meta, shard_count=2)


def folded(said: Sequence[Said]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every row that is there, as all its records together say."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in sorted(
        said, key=lambda one: (one["version"], json.dumps(one.get("values", {}), sort_keys=True))
    ):
        row = rows.setdefault((one["table"], one["key"]), {})
        if "values" in one:
            row |= one["values"]
        else:
            row.clear()
    return {name: row for name, row in rows.items() if row}


def expected(rows: dict[tuple[str, str], dict[str, Any]], ad_id: str) -> dict[str, Any] | None:
    """Some fields of an ad's document, joined by hand."""
    ad = rows.get(("ads", ad_id), {})
    if not ad.keys() - {"clicks_7d", "new"}:  # what was measured of an ad does not make one
        return None
    group = rows.get(("ad_groups", ad.get("ad_group_id", "")), {})
    campaign = rows.get(("campaigns", group.get("campaign_id", "")), {})
    advertiser = rows.get(("advertisers", campaign.get("advertiser_id", "")), {})
    pin = rows.get(("pins", ad.get("pin_id", "")), {})
    image = rows.get(("images", pin.get("image_signature", "")), {})
    return {
        "control": (
            ad.get("ad_group_id"),
            ad.get("status"),
            bool(group),
            group.get("campaign_id"),
            group.get("bid_usd_micros"),
            campaign.get("name"),
            campaign.get("status"),
            bool(advertiser),
            advertiser.get("industry"),
        ),
        "content": (pin.get("title"), bool(image), image.get("safety")),
        "performance": (ad.get("clicks_7d"),),
    }


FIELDS = {
    "control": (
        "ad_group_id",
        "ad_status",
        "has_ad_group",
        "campaign_id",
        "bid_usd_micros",
        "campaign_name",
        "campaign_status",
        "has_advertiser",
        "industry",
    ),
    "content": ("title", "has_image", "image_safety"),
    "performance": ("clicks_7d",),
}


def assert_equal(view: View, world: World) -> None:
    rows = folded(world.said)
    keys = [f"{case}{letter}" for case in range(CASES) for letter in KEYS["ads"]]
    wanted = [expected(rows, key) for key in keys]
    assert sum(one is not None for one in wanted) > CASES
    for key, found, want in zip(keys, view.get([key.encode() for key in keys]), wanted, strict=True):
        read = found and {
            family: tuple(found[family][name] for name in names) for family, names in FIELDS.items()
        }
        assert read == want, (f"TIDEMARK_TEST_SEED={SEED}", key)


def view_of(world: World, base: Path | None) -> View:
    opened = open_base(ADS, base) if base else empty(ADS)
    overlay = Overlay(opened, table_path(world.folder / "delta", ADS.name, lineage(ADS)), 10**9)
    overlay.catch_up()
    return overlay.view


def test_epochs_alone_equal_the_fold(world: World) -> None:
    assert_equal(view_of(world, None), world)


def test_a_base_and_the_epochs_after_its_cut_equal_the_fold(world: World) -> None:
    view = view_of(world, world.folder / "base")
    assert view.overlay_facts
    assert_equal(view, world)


def test_a_batch_of_the_whole_repository_equals_the_fold(world: World) -> None:
    build_base(world.store, world.folder / "whole", Position())
    assert_equal(view_of(world, world.folder / "whole"), world)
    assert_equal(Overlay(open_base(ADS, world.folder / "whole"), None, 10**9).view, world)
