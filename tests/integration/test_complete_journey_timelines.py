"""The real input as timelines: the shipped loader and builder on it, and pandas over the source's own file.

Every timeline, and random counters and sequences of all times, say what pandas says. The whole of it is slow; a share
of the households runs with the other tests. What is expected shares no code with the product: it is read by pyarrow,
counted and sorted by pandas.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs import demo_timelines
from jobs.build import build
from pipelines.indexing import base as bases
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.timelines import TimelineView
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES
from pipelines.ingest import complete_journey
from pipelines.spark import session
from pipelines.users import counters, sequences
from tests.conftest import small_settings

DAY_MS = 86_400_000
ASKED = 500
HOUSEHOLDS = 2_469
FIELDS = ("event_id", "time_ms", "pin_id", "quantity", "value_usd_micros")


class World(NamedTuple):
    """What was built, and what pandas knows: the purchases of each household, by (time, event id) ascending."""

    view: TimelineView
    purchases: dict[str, pd.DataFrame]
    chance: random.Random


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(0.02, id="a share"),
        pytest.param(1.0, id="the whole", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def world(
    request: pytest.FixtureRequest, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> World:
    settings = small_settings(tmp_path_factory.mktemp("journey") / "home")
    loaded = complete_journey.load_all(session(settings, "tests"), settings, request.param)
    report = build(settings, loaded.interactions.position, indices=["user_events"])
    if problem := report.problem():
        raise problem
    versions = Versions(settings.paths.indices, "user_events")
    pointer = versions.pointer()
    assert pointer is not None
    base = bases.open_base(INDICES["user_events"], versions.path(pointer.version))
    kept = {key.decode() for shard in base.shards for key in shard.key_bytes.to_pylist()}
    source = read_source()
    source = source[source["user_id"].isin(kept)]
    # The loader chose the households by a hash of Spark's; that it lost none of them, the number of rows says.
    assert len(source) == loaded.interactions.rows
    assert len(kept) == HOUSEHOLDS if request.param == 1 else 20 < len(kept) < 100
    refused = int((source["quantity"] < 1).sum())
    assert refused > 0 and report.accounts["raw.user_interactions"]["refused"] == {"out_of_range": refused}
    purchases = source[source["quantity"] >= 1].sort_values(["time_ms", "event_id"])
    return World(TimelineView(base), dict(iter(purchases.groupby("user_id"))), random.Random(11))


def read_source() -> pd.DataFrame:
    """The source's purchases in the words of the contract."""
    raw = pq.read_table(complete_journey.folder() / "transactions.parquet").to_pandas()
    product = raw["product_id"].astype(str)
    return pd.DataFrame(
        {
            "user_id": raw["household_id"].astype(str),
            "event_id": raw["basket_id"].astype(str) + ":" + product,
            "time_ms": raw["transaction_timestamp"].astype("datetime64[ms]").astype("int64"),
            "pin_id": product,
            "quantity": raw["quantity"],
            "value_usd_micros": np.rint(raw["sales_value"] * 1e6).astype("int64"),
        }
    )


def test_every_timeline_has_exactly_the_purchases_of_the_source(world: World) -> None:
    for user, wanted in world.purchases.items():
        answer = world.view.timeline(user.encode())
        assert answer.is_complete
        table = answer.table
        found = {name: table.column(name).to_pylist() for name in FIELDS[1:]}
        found["event_id"] = [event.decode() for event in table.column("id").to_pylist()]
        newest_first = wanted[::-1]
        assert found == {name: newest_first[name].tolist() for name in FIELDS}
        assert set(table.column("action").to_pylist()) == {"purchase"}
        assert table.column("payload").null_count == table.column("features").null_count == table.num_rows


def test_the_demos_own_totals_are_those_of_the_timelines(world: World) -> None:
    """What the demo holds every household against, is what was just compared event by event."""
    source = demo_timelines.source()
    totals = demo_timelines.totals_of(source[source["user_id"].isin(list(world.purchases))])
    served = demo_timelines.totals_of(pd.concat(list(world.purchases.values())))
    check = demo_timelines.compare(totals, served, is_whole=True)
    assert check.holds, check.found
    short = served.copy()
    short.iloc[0, 0] -= 1
    assert not demo_timelines.compare(totals, short, is_whole=True).holds
    assert not demo_timelines.compare(totals, served.iloc[1:], is_whole=True).holds
    assert demo_timelines.compare(totals, served.iloc[1:], is_whole=False).holds


def drawn_time(world: World, users: list[str], age_ms: int | None) -> int:
    """A time of the year; often one at which an event just happened, or just leaves the range."""
    events = world.purchases[world.chance.choice(users)]["time_ms"]
    at = int(events.iloc[world.chance.randrange(len(events))])
    return at + world.chance.choice(
        (0, -1, 1, age_ms or 0, (age_ms or 0) - 1, world.chance.randrange(-30 * DAY_MS, 90 * DAY_MS))
    )


def of_users(world: World, users: list[str], age_ms: int | None, now_ms: int) -> pd.DataFrame:
    """Their events in the range."""
    found = pd.concat([world.purchases[user] for user in users])
    is_inside = found["time_ms"] <= now_ms
    if age_ms is not None:
        is_inside &= found["time_ms"] > now_ms - age_ms
    return found[is_inside]


def drawn_age(world: World) -> int:
    return world.chance.choice(
        (60_000, DAY_MS, 7 * DAY_MS, 90 * DAY_MS, world.chance.randrange(60_000, 90 * DAY_MS))
    )


def test_random_counters_are_what_pandas_counts(world: World) -> None:
    events = 0
    for _ in range(ASKED):
        users = world.chance.sample(sorted(world.purchases), world.chance.randint(1, 12))
        age_ms = drawn_age(world)
        now_ms = drawn_time(world, users, age_ms)
        pins = pd.concat([world.purchases[user]["pin_id"] for user in users]).tolist()
        where: dict[str, list[str]] = {}
        if world.chance.random() < 0.5:
            where["action"] = world.chance.choice((["purchase"], ["purchase", "view"], ["view"]))
        if world.chance.random() < 0.5:
            where["pin_id"] = list(dict.fromkeys(world.chance.choices([*pins, "unknown"], k=40)))
        group_by = tuple(name for name in ("user_id", "pin_id", "action") if world.chance.random() < 0.4)
        asked = counters.Query(tuple(user.encode() for user in users), age_ms, where, group_by)
        found = counters.count(world.view, asked, now_ms)
        wanted = of_users(world, users, age_ms, now_ms).assign(action="purchase")
        for name, values in where.items():
            wanted = wanted[wanted[name].isin(values)]
        if group_by:
            sizes = wanted.groupby(list(group_by), as_index=False).size()
            expected = {tuple(row[:-1]): int(row[-1]) for row in sizes.itertuples(index=False)}
        else:
            expected = {(): len(wanted)}
        assert {group.values: group.events for group in found.groups} == expected
        assert found.incomplete == ()
        events += len(wanted)
    assert events > ASKED


def test_random_sequences_are_what_pandas_sorts_out(world: World) -> None:
    pins, events = DocumentsView(bases.empty(INDICES["pins"])), 0
    for _ in range(ASKED):
        users = world.chance.sample(sorted(world.purchases), world.chance.randint(1, 6))
        age_ms = world.chance.choice((None, drawn_age(world)))
        now_ms = drawn_time(world, users, age_ms)
        said: dict[str, Any] = {
            "max_length": world.chance.choice((1, 10, 100, 1000)),
            "fields": world.chance.sample(FIELDS, world.chance.randint(1, len(FIELDS))),
            "order": world.chance.choice(sequences.ORDERS),
        }
        if world.chance.random() < 0.5:
            said["deduplicate_by"] = "pin_id"
        if world.chance.random() < 0.5:
            said["actions"] = ["purchase", "save"]
        definition = sequences.parse(said)._replace(age_ms=age_ms)
        found = sequences.read(world.view, pins, definition, [user.encode() for user in users], now_ms)
        assert found.is_complete.all()
        wanted = []
        for user in users:
            mine = of_users(world, [user], age_ms, now_ms)
            if definition.deduplicate_by:
                mine = mine.drop_duplicates("pin_id", keep="last")
            mine = mine.tail(definition.max_length)
            wanted.append(mine if definition.order == sequences.OLDEST_FIRST else mine[::-1])
        assert found.lengths.tolist() == [len(one) for one in wanted]
        together = pd.concat(wanted)
        assert found.table.to_pydict() == {name: together[name].tolist() for name in said["fields"]}
        events += len(together)
    assert events > ASKED
