"""A real Trino on a small lake: it answers what Spark, pyiceberg and plain Python do, and errors say where."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from pyspark.sql import Row, SparkSession
from typer.testing import CliRunner

from jobs import epochs, processes
from jobs.cli import exploring
from jobs.cli.shared import app
from pipelines import index_rows, index_views, lake, maintenance, preflight, served, sql, views
from pipelines.ads import generator
from pipelines.ads import schema as ads
from pipelines.explore import VIEWS
from pipelines.indexing import delta
from pipelines.indexing.spec import Documents, IndexSpec, Sums, Timeline, check, lineage
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES
from pipelines.settings import Settings
from pipelines.spark import session
from pipelines.users import corrections
from tests import oracle, served_indices
from tests.conftest import small_settings
from tests.properties import specs
from tests.served_indices import KEYS, SPREAD_MS

pytestmark = pytest.mark.timeout(900)

NEWEST = datetime(2024, 3, 20, 12, tzinfo=UTC)
EVENTS = lake.CURATED_USER_INTERACTIONS.name
FEATURES = lake.CURATED_EVENT_FEATURES.name
WEEK = timedelta(days=7)

OTHERS = (
    specs.joined_timeline(4),
    specs.timeline(SPREAD_MS // 2, None),
    specs.sums(SPREAD_MS // 2),
)
SPECS = {spec.name: check(spec) for spec in (*INDICES.values(), *OTHERS)}
"""The registered indices, and others with what those lack."""
SERVED = {name: served_indices.drawn(spec, seed) for seed, (name, spec) in enumerate(SPECS.items())}


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A lake with rows in every table that a view reads, and a Trino on it."""
    settings = small_settings(tmp_path_factory.mktemp("explore") / "home", TRINO__HEAP_MB=768)
    try:
        preflight.find_trino_java()
    except preflight.PreflightError as error:
        pytest.skip(str(error))
    spark = session(settings, "tests")
    fill(spark)
    for index, drawn in SERVED.items():
        served_indices.publish(spark, settings, SPECS[index], drawn.base, drawn.newest_ms)
        half = len(drawn.delta) // 2
        served_indices.commit(settings, SPECS[index], 0, drawn.delta[:half])
        served_indices.commit(settings, SPECS[index], 1, drawn.delta[half:])
    assert copied(settings) > 0
    keeper, chosen = processes.supervisor(settings), processes.choose(processes.local(settings), ["trino"])
    processes.up(keeper, chosen)
    yield settings
    processes.down(keeper, chosen)


def copied(settings: Settings, *indices: str) -> int:
    """How many facts the streaming process copies in a minute; of a process that has just begun."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(epochs, "INDICES", {name: SPECS[name] for name in indices or SPECS})
        return epochs.FactCopy(session(settings, "tests"), settings).run()


def fill(spark: SparkSession) -> None:
    chance = random.Random(5)
    pins, users = [f"p{n}" for n in range(30)], [f"ü{n}" for n in range(12)]
    place = {"topic_id": "t@1", "partition": 0, "offset": 1, "broker_time": NEWEST}
    events = [
        {
            "user_id": chance.choice(users),
            "event_id": f"e{number}",
            "pin_id": chance.choice([*pins, "unknown"]),
            "action": chance.choice(("purchase", "purchase", "view")),
            "event_time": NEWEST - timedelta(seconds=chance.randrange(20 * 86_400)),
            "quantity": chance.choice((None, 1, 3)),
            "value_usd_micros": chance.choice((None, 10, 2_500_000)),
            "version": 1,
            "is_deleted": number % 10 == 0,
            "payload": f'{{"rank": {number}}}' if number % 7 == 0 else None,
            **place,
        }
        for number in range(400)
    ]
    events += [
        dict(events[1], event_id=f"edge{n}", event_time=NEWEST - n * WEEK, action="purchase")
        for n in (0, 1, 2)
    ]
    write(spark, EVENTS, events)
    features = [
        {
            **{name: event[name] for name in ("user_id", "event_id", "event_time")},
            "version": 1 + number % 2,
            "is_deleted": number % 9 == 0,
            "features": json.dumps({"is_converted": number % 2 == 0, "quality": number / 400}),
            **place,
            "broker_time": NEWEST + timedelta(seconds=number - 5),
        }
        for number, event in enumerate(events[::3])
    ]
    write(spark, FEATURES, [*features, {**features[1], "event_id": "of no event"}])
    of_pin = [{"pin_id": pin, "version": 1, "is_deleted": pin == "p3", **place} for pin in pins]
    write(
        spark,
        lake.CURATED_PINS_CATALOGUE.name,
        [
            {
                **row,
                "catalogue": Row(
                    title=f"title {row['pin_id']}", category=f"c{n % 4}", department=None, brand="b"
                ),
            }
            for n, row in enumerate(of_pin)
        ],
    )
    write(
        spark,
        lake.CURATED_PINS_OFFER.name,
        [
            {**row, "offer": Row(price_usd_micros=n * 1000, is_available=n % 2 == 0)}
            for n, row in enumerate(of_pin[:20])
        ],
    )
    of_place = {"version": 2, "event_time": NEWEST, **place}
    write(
        spark,
        lake.CURATED_USER_FOLLOWS.name,
        [
            {"user_id": user, "kind": kind, "followed_id": one, "is_deleted": n == 3, **of_place}
            for n, user in enumerate(users)
            for kind, one in (("pin", pins[n % 5]), ("pin", "unknown"), ("user", users[n - 1]))
        ],
    )
    write(
        spark,
        lake.CURATED_PIN_CHANGES.name,
        [
            {
                "pin_id": pin,
                **of_place,
                "version": version,
                "event_time": None if n % 2 else NEWEST - n * WEEK,
                "is_deleted": version == 3,
            }
            for n, pin in enumerate(pins)
            for version in range(1, 2 + n % 3)
        ],
    )
    for table, column, names in (
        (lake.FEATURES_PIN_VECTORS.name, "pin_id", pins[:25]),
        (lake.FEATURES_USER_VECTORS.name, "user_id", users[:8]),
    ):
        rows = [
            {column: name, "vector": [chance.randrange(-64, 64) / 32 for _ in range(8)]} for name in names
        ]
        models = [
            {"model_id": "other" if n == 0 and column == "user_id" else "m/1"} for n in range(len(rows))
        ]
        write(
            spark, table, [row | model | {"event_count": 3} for row, model in zip(rows, models, strict=True)]
        )
    letters = [
        {
            "topic": "user-interactions",
            "reason": chance.choice(("out_of_range", "not_json")),
            "detail": f"detail {n}",
            "load_id": chance.choice((None, "a load")),
            "ingested_at": NEWEST - timedelta(hours=n),
        }
        for n in range(50)
    ]
    write(spark, lake.RAW_DEAD_LETTERS.name, letters)
    epochs = []
    for n in range(40):
        began = int(NEWEST.timestamp() * 1000) + n * 300_000
        stages = {"broker_time_min_ms": began - n, "started_at_ms": began, "decoded_at_ms": began + 20}
        stages |= {"transformed_at_ms": began + 50}
        at = datetime.fromtimestamp((began + 61) / 1000, UTC)
        one = {"index": f"i{n % 2}", "stream": "s", "epoch": n, "rows": n, "stages": json.dumps(stages)}
        epochs.append({**one, "committed_at": at})
    write(spark, lake.OPS_EPOCHS.name, epochs)
    minutes = [
        {
            "index": "i0",
            "stream": "s",
            "kind": kind,
            "stage": stage,
            "minute": (NEWEST + timedelta(minutes=n)).replace(second=0, microsecond=0),
            "replica": replica,
            "documents": n + 1,
            "p90_ms": n * 3_000,
            "max_ms": n * 4_000 + 7,
        }
        for n in range(40)
        for replica in ("one", "two")[: 1 + n % 2]
        for kind, stage in (("live", "served"), ("live", "sent"), ("backfill", "served"))
    ]
    write(spark, lake.OPS_FRESHNESS.name, minutes)
    versions = [
        {
            "index": "pins",
            "version": f"v{n // 2}",
            "event": ("built", "published")[n % 2],
            "rows": n,
            "at": NEWEST + n * WEEK,
        }
        for n in range(5)
    ]
    of_events = [dict(versions[0], index="user_events", version=f"b{n}", rows=400) for n in (1, 2)]
    write(spark, lake.OPS_INDEX_VERSIONS.name, [*versions, *of_events])
    corrected = [
        {
            "at": NEWEST + timedelta(hours=n),
            "index": "user_events",
            "version": f"b{n}",
            "before": f"b{n - 1}",
            "family": family,
            "cause": cause,
            "facts": place_ * n,
        }
        for n in (1, 2, 30)
        for family in ("interactions", "features")
        for place_, cause in enumerate(corrections.CAUSES)
    ]
    write(spark, lake.OPS_TIMELINE_CORRECTIONS.name, corrected)
    for declared, rows_of in generator.account(400, seed=3):
        rows = [
            {
                **{name: time_of(value) if name in times(declared) else value for name, value in row.items()},
                "is_there": number not in (1, 7),
                "stand_control": 1,
            }
            for number, row in enumerate(rows_of.to_pylist())
        ]
        write(spark, f"repo.{declared.name}", rows)


def times(declared: ads.Table) -> set[str]:
    """The names of a table's times."""
    return {column.name for column in declared.columns if column.type == ads.TIME}


def time_of(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1000, UTC)


def write(spark: SparkSession, table: str, rows: list[dict[str, Any]]) -> None:
    lake.ensure(spark, lake.TABLES[table])
    schema = spark.table(lake.TABLES[table].identifier).schema
    shaped = [tuple(row.get(name) for name in schema.names) for row in rows]
    lake.append(spark.createDataFrame(shaped, schema), lake.TABLES[table])


def same(value: Any) -> Any:
    """A value in the words that all engines share."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, dict):
        return tuple(same(one) for one in value.values())
    if isinstance(value, list | tuple):
        return tuple(same(one) for one in value)
    return value


def counted(rows: Any) -> Counter[Any]:
    return Counter(same(tuple(row)) for row in rows)


def of_spark(settings: Settings, query: str) -> list[Any]:
    return [tuple(row) for row in session(settings, "tests").sql(views.in_dialect(query, "spark")).collect()]


@pytest.fixture(scope="module")
def explored(world: Settings) -> Settings:
    done = views.ensure(session(world, "tests"), world, list(VIEWS.values()))
    of_indices = {index_views.view(spec).name for spec in INDICES.values()}  # which the copying keeps, too
    assert done == {name: views.KEPT if name in of_indices else views.MADE for name in VIEWS}
    return world


@pytest.mark.parametrize("table", [EVENTS, lake.CURATED_PINS_OFFER.name, lake.FEATURES_PIN_VECTORS.name])
def test_tables_have_the_rows_that_pyiceberg_reads(world: Settings, table: str) -> None:
    opened = lake.open_table(world, table)
    assert opened is not None
    found = opened.scan().to_arrow().to_pylist()
    assert counted(row.values() for row in found) == counted(sql.rows(world, f"SELECT * FROM {table}"))


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_says_the_same_to_trino_and_to_spark(explored: Settings, name: str) -> None:
    view = VIEWS[name]
    with sql.answering(explored, f"SELECT * FROM {view.identifier}") as answer:
        assert [column.name for column in answer.columns] == list(view.columns)
        rows = list(answer.rows)
    assert rows
    assert counted(rows) == counted(of_spark(explored, f"SELECT * FROM {view.identifier}"))
    for example in view.examples:
        found = sql.rows(explored, example)
        assert found
        assert same(tuple(found)) == same(tuple(of_spark(explored, example)))


def test_weekly_sales_are_those_that_plain_python_adds_up(explored: Settings) -> None:
    opened = lake.open_table(explored, EVENTS)
    assert opened is not None
    sold = [
        row
        for row in opened.scan().to_arrow().to_pylist()
        if row["action"] == "purchase" and not row["is_deleted"]
    ]
    newest = max(row["event_time"] for row in sold)
    wanted: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in sold:
        age = newest - row["event_time"]
        if age < 2 * WEEK:
            quantity = 1 if row["quantity"] is None else row["quantity"]
            wanted[row["pin_id"]][int(age >= WEEK)] += quantity
    found = sql.rows(explored, "SELECT pin_id, quantity, quantity_before FROM explore.weekly_sales")
    assert {pin: [now, before] for pin, now, before in found} == wanted


def live(settings: Settings, table: str) -> list[dict[str, Any]]:
    """The rows of a table that are no tombstones."""
    opened = lake.open_table(settings, table)
    assert opened is not None
    return [row for row in opened.scan().to_arrow().to_pylist() if not row["is_deleted"]]


def test_a_timelines_row_is_what_plain_python_counts(explored: Settings) -> None:
    mine: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in live(explored, EVENTS):
        mine[row["user_id"]].append(row)
    names = (
        "user_id",
        "events",
        "purchase_events",
        "view_events",
        "pins",
        "active_days",
        "span_days",
        "payloads",
    )
    found = sql.rows(explored, f"SELECT {', '.join(names)} FROM explore.timelines")
    wanted = []
    for user, rows in mine.items():
        days = {row["event_time"].date() for row in rows}
        actions = Counter(row["action"] for row in rows)
        payloads = sum(row["payload"] is not None for row in rows)
        pins, span = len({row["pin_id"] for row in rows}), (max(days) - min(days)).days
        counts = (len(rows), actions["purchase"], actions["view"], pins, len(days), span, payloads)
        wanted.append((user, *counts))
    assert counted(found) == counted(wanted)


def test_repurchase_gaps_are_those_that_plain_python_finds(explored: Settings) -> None:
    categories = {
        row["pin_id"]: row["catalogue"]["category"]
        for row in live(explored, lake.CURATED_PINS_CATALOGUE.name)
    }
    days: dict[tuple[str, str], set[date]] = defaultdict(set)
    for row in live(explored, EVENTS):
        category = categories.get(row["pin_id"], row["category"])
        if row["action"] == "purchase" and category is not None:
            days[category, row["user_id"]].add(row["event_time"].date())
    wanted = []
    for category in {category for category, _ in days}:
        of = [sorted(found) for (name, _), found in days.items() if name == category]
        gaps = sorted((b - a).days for one in of for a, b in itertools.pairwise(one))
        at = [gaps[math.ceil(len(gaps) * share / 10) - 1] for share in (1, 5, 9)]
        again = sum(len(one) > 1 for one in of)
        wanted.append((category, len(of), again, sum(map(len, of)), len(gaps), *at))
    assert counted(sql.rows(explored, "SELECT * FROM explore.repurchase_gaps")) == counted(wanted)


def test_features_stand_beside_their_live_events(explored: Settings) -> None:
    features = {(row["user_id"], row["event_id"]): row for row in live(explored, FEATURES)}
    wanted = []
    for row in live(explored, EVENTS):
        place = row["user_id"], row["event_id"]
        found = features.get(place)
        lag = int((found["broker_time"] - row["broker_time"]).total_seconds()) if found else None
        wanted.append((*place, row["payload"], found["features"] if found else None, lag))
    asked = "SELECT user_id, event_id, payload, features, features_lag_s FROM explore.event_features"
    assert counted(sql.rows(explored, asked)) == counted(wanted)
    assert 0 < sum(one[3] is not None for one in wanted) < len(features)


def test_an_ad_is_active_if_all_that_it_is_part_of_is(explored: Settings) -> None:
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for declared in ads.TABLES.values():
        opened = lake.open_table(explored, f"repo.{declared.name}")
        assert opened is not None
        there = [row for row in opened.scan().to_arrow().to_pylist() if row["is_there"]]
        rows[declared.name] = {row[declared.key]: row for row in there}
    wanted = {}
    for name, ad in rows["ads"].items():
        group = rows["ad_groups"].get(ad["ad_group_id"], {})
        campaign = rows["campaigns"].get(group.get("campaign_id"), {})
        advertiser = rows["advertisers"].get(campaign.get("advertiser_id"), {})
        statuses = {one.get("status") for one in (ad, group, campaign, advertiser)}
        wanted[name] = statuses == {"active"} and ad["review_status"] == "approved"
    found = sql.rows(explored, "SELECT ad_id, is_active FROM explore.ads_account")
    assert dict(found) == wanted
    assert set(wanted.values()) == {True, False}
    clicks = {name: sum(r["clicks_7d"] for r in of) for name, of in by_campaign(rows).items()}
    found = sql.rows(explored, "SELECT campaign_id, clicks_7d FROM explore.campaign_performance")
    assert dict(found) == {name: clicks.get(name, 0) for name in rows["campaigns"]}


def by_campaign(rows: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The ads of each campaign, through ad groups that are there."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for ad in rows["ads"].values():
        if (group := rows["ad_groups"].get(ad["ad_group_id"])) is not None:
            found[group["campaign_id"]].append(ad)
    return found


def test_a_score_is_the_product_of_the_two_vectors(explored: Settings) -> None:
    vectors = {
        table: {
            row[0]: (np.array(row[1], np.float64), row[2])
            for row in sql.rows(explored, f"SELECT {column}, vector, model_id FROM features.{table}")
        }
        for table, column in (("user_vectors", "user_id"), ("pin_vectors", "pin_id"))
    }
    found = sql.rows(explored, "SELECT user_id, pin_id, score FROM explore.interactions_scored")
    scored = 0
    for user, pin, score in found:
        of_user, of_pin = vectors["user_vectors"].get(user), vectors["pin_vectors"].get(pin)
        if of_user is None or of_pin is None or of_user[1] != of_pin[1]:
            assert score is None
        else:
            scored += 1
            assert math.isclose(score, float(of_user[0] @ of_pin[0]), rel_tol=1e-6, abs_tol=1e-9)
    assert 0 < scored < len(found)


@pytest.mark.parametrize("index", SPECS)
def test_what_sql_says_of_an_index_is_what_serving_answers_and_what_was_said(
    world: Settings, index: str
) -> None:
    spec, drawn = SPECS[index], SERVED[index]
    name = index_views.view(spec).identifier
    with sql.answering(world, f"SELECT * FROM {name}") as answer:
        columns = [column.name for column in answer.columns]
        rows = [dict(zip(columns, row, strict=True)) for row in answer.rows]
    assert counted(row.values() for row in rows) == counted(of_spark(world, f"SELECT * FROM {name}"))
    told = [*drawn.base, *drawn.delta]
    of_serving: Any = served_indices.serving(world, spec)
    keys = [key.encode() for key in KEYS]
    if isinstance(spec.read, Documents):
        found: Any = {row["key"].encode(): document(spec, row) for row in rows}
        assert len(found) == len(rows)
        assert found == same_payloads(oracle.documents(told, spec.read.presence))
        answers = zip(keys, of_serving.get(keys), strict=True)
        assert found == same_payloads({key: one for key, one in answers if one is not None})
    elif isinstance(spec.read, Timeline):
        horizon = oracle.horizon_ms(spec.read.age_ms, drawn.newest_ms)
        names = [family.name for family in spec.families]
        for key in keys:
            mine = sorted((row for row in rows if row["key"].encode() == key), key=place, reverse=True)
            wanted = oracle.events(told, key, names, horizon)[: spec.read.count]
            assert [(row["id"].encode(), millis(row["event_time"])) for row in mine] == [
                e[:2] for e in wanted
            ]
            assert [document(spec, row) for row in mine] == [same_payloads(e.payloads) for e in wanted]
            answer_ = of_serving.timeline(key)
            assert answer_.table.column("id").to_pylist() == [
                e.id for e in wanted[: answer_.table.num_rows if not answer_.is_complete else None]
            ]
    else:
        horizon = oracle.horizon_ms(spec.read.age_ms, drawn.newest_ms, spec.read.width_ms)
        sums: dict[bytes, dict[int, tuple[int, ...]]] = defaultdict(dict)
        for row in rows:
            added = tuple(row[f"sum_{amount}"] for amount in spec.read.amounts)
            sums[row["key"].encode()][millis(row["bucket_began_at"])] = added
        assert sums == oracle.sums(told, spec.read.width_ms, horizon)
        assert sums == {key: found for key in keys if (found := of_serving.sums(key, horizon))}
        assert 0 < sum(row["facts_from_delta"] for row in rows) < sum(row["facts"] for row in rows)
    streamed = [family for family in spec.families if family.stream and not isinstance(spec.read, Sums)]
    for flag in (index_views.shown(spec, family, "is_from_delta") for family in streamed):
        assert {True, False} <= {row[flag] for row in rows}


def document(spec: IndexSpec, row: dict[str, Any]) -> dict[str, Any]:
    """A row of a view as its families say it, without those that are not there."""
    shown = {
        family.name: (
            row[index_views.shown(spec, family, "source_version")],
            {field: same(row[index_views.shown(spec, family, field)]) for field in family.schema.names},
        )
        for family in spec.families
    }
    return {name: said for name, (version, said) in shown.items() if version is not None}


def same_payloads(found: Any) -> Any:
    return {k: same_payloads(v) if isinstance(v, dict) else same(v) for k, v in found.items()}


def place(row: dict[str, Any]) -> tuple[int, bytes]:
    return millis(row["event_time"]), row["id"].encode()


def millis(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def test_a_fact_is_copied_once_and_sql_follows_what_is_served(world: Settings) -> None:
    spark, spec, drawn = session(world, "tests"), INDICES["pins"], SERVED["pins"]
    table = index_rows.delta_table(spec)

    def held() -> Counter[Any]:
        return counted(
            lake.read(spark, table.name).select("lineage", "epoch", "identity", "content_hash").collect()
        )

    def answered() -> dict[bytes, Any]:
        with sql.answering(world, "SELECT * FROM explore.pins_served") as answer:
            columns = [column.name for column in answer.columns]
            rows = [dict(zip(columns, row, strict=True)) for row in answer.rows]
        return {row["key"].encode(): document(spec, row) for row in rows}

    def wanted(*told: list[oracle.Statement]) -> dict[bytes, Any]:
        found: dict[bytes, Any] = same_payloads(
            oracle.documents([s for part in told for s in part], "catalogue")
        )
        return found

    before = held()
    path = delta.table_path(world.paths.delta, spec.name, lineage(spec))
    assert delta.compact(path) > 0
    assert copied(world, "pins") == 0  # begun anew, and of files that were rewritten
    late = served_indices.drawn(spec, 99).delta
    served_indices.commit(world, spec, 2, late)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(epochs, "INDICES", {"pins": spec})
        copy = epochs.FactCopy(spark, world)
        with pytest.MonkeyPatch.context() as failing:
            failing.setattr(epochs.Table, "append", lost_answer(epochs.Table.append))
            with pytest.raises(ConnectionError):
                copy.run()
        assert copy.run() == 0  # the commit was made, though nobody was told
    assert (held() - before).total() == len(late)
    assert answered() == wanted(drawn.base, drawn.delta, late)

    served_indices.commit(world, spec, 0, served_indices.drawn(spec, 7).delta, mark="another")
    assert copied(world, "pins") > 0
    assert answered() == wanted(drawn.base, drawn.delta, late)  # which is not served
    versions = Versions(world.paths.indices, spec.name)
    first = versions.names()[0]
    more = served_indices.drawn(spec, 100).base
    served_indices.publish(spark, world, spec, more, drawn.newest_ms)
    assert answered() == wanted(more, drawn.delta, late)
    versions.rollback(first, deltas=world.paths.delta, without_delta=True)
    assert served.record(world, spec) and not served.record(world, spec)
    assert answered() == wanted(drawn.base)
    versions.resume()
    assert copied(world, "pins") == 0  # which says, too, what is served
    assert answered() == wanted(drawn.base, drawn.delta, late)

    whole = held()
    spark.sql(
        f"ALTER TABLE {table.identifier} DROP COLUMN payload_offer"
    )  # as if the code had another schema
    assert copied(world, "pins") == whole.total() and held() == whole
    assert answered() == wanted(drawn.base, drawn.delta, late)

    shutil.rmtree(path.parent / "another")
    assert maintenance.drop_copied_days(world, spec) == 1
    assert maintenance.drop_copied_days(world, spec) == 0
    assert sql.rows(world, f"SELECT DISTINCT lineage FROM {table.name}") == [(lineage(spec),)]


def lost_answer(append: Any) -> Any:
    def appended(*given: Any, **named: Any) -> None:
        append(*given, **named)
        raise ConnectionError("the answer was lost")

    return appended


def test_a_view_is_kept_made_anew_or_waits(world: Settings) -> None:
    spark = session(world, "tests")
    view = views.View("one", "a number", "SELECT count(*) AS n FROM ops.epochs", {"n": "how many"})
    assert view.tables == ("ops.epochs",)
    assert views.ensure(spark, world, [view]) == {"one": views.MADE}
    assert views.ensure(spark, world, [view]) == {"one": views.KEPT}
    changed = view._replace(sql="SELECT count(*) + 1 AS n FROM ops.epochs")
    assert views.ensure(spark, world, [changed]) == {"one": views.MADE}
    assert (
        sql.rows(world, "SELECT n FROM explore.one")
        == of_spark(world, "SELECT n FROM explore.one")
        == [(41,)]
    )
    waiting = view._replace(name="two", sql="SELECT count(*) AS n FROM ops.none CROSS JOIN ops.epochs")
    assert views.ensure(spark, world, [waiting]) == {"two": "waits for ops.none"}
    with pytest.raises(views.ViewError, match="it has the columns n"):
        views.ensure(spark, world, [view._replace(name="three", columns={"m": "how many"})])


def test_time_travel(world: Settings) -> None:
    table = lake.RAW_DEAD_LETTERS.name
    before = lake.current_snapshot(world, table)
    assert before is not None
    spark = session(world, "tests")
    lake.tag(spark, table, before.id, "daily-2024-03-20")
    write(spark, table, [{"topic": "late", "reason": "r", "ingested_at": NEWEST - 9 * WEEK}])
    for asked in (str(before.id), "'daily-2024-03-20'"):
        assert sql.rows(world, f"SELECT count(*) FROM {table} FOR VERSION AS OF {asked}") == [(50,)]
    assert sql.rows(world, f"SELECT count(*) FROM {table}") == [(51,)]
    assert sql.rows(world, 'SELECT count(*) FROM raw."dead_letters$snapshots"')[0][0] >= 2


def test_the_command_line(world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploring, "load_settings", lambda: world)
    query = "SELECT 1 AS a, 'ü;' AS b, CAST(NULL AS bigint) AS c, DECIMAL '1.50' AS a, ARRAY[1, NULL] AS e"

    def run(*arguments: str, typed: str | None = None) -> Any:
        return CliRunner().invoke(app, ["sql", *arguments], input=typed)

    document = json.loads(run(query, "--json").stdout)
    assert document["rows"] == [{"a": 1, "b": "ü;", "c": None, "a_2": "1.50", "e": [1, None]}]
    assert document["columns"][0] == {"name": "a", "type": "integer"}
    assert list(csv.reader(io.StringIO(run(query, "--csv").stdout))) == [
        ["a", "b", "c", "a", "e"],
        ["1", "ü;", "", "1.50", "[1, null]"],
    ]
    table = run("SELECT * FROM UNNEST(sequence(1, 30)) AS t(n)", "--limit", "5")
    assert "the first 5 rows" in table.output
    both = run("--csv", typed="-- two\nSELECT 1 AS x; SELECT ';' AS y;\n-- and no third\n")
    assert both.stdout == "x\n1\ny\n;\n"

    wrong = run("SELECT pin_id,\n  titel FROM curated.pins_catalogue")
    assert isinstance(wrong.exception, sql.SqlError)
    assert "Column 'titel' cannot be resolved" in str(wrong.exception)
    assert "(line 2, column 3)" in str(wrong.exception)
    assert "  titel FROM curated.pins_catalogue\n  ^" in wrong.output
    assert isinstance(run("SELECT 1 / 0").exception, sql.SqlError)
    for empty in ("", " ; -- nothing"):
        assert "empty" in str(run(empty).exception)


def test_the_prompt_goes_on_after_errors_and_ends_when_told(
    world: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = exploring.names(world)
    assert {EVENTS, "raw.dead_letters", "event_time"} <= set(names)
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text("SELEC;\nSELECT 40\n + 2 AS answer;\nexit\n")
        exploring._prompt(world, exploring._as_csv)
    out = capsys.readouterr()
    assert out.out == "answer\n42\n"
    assert "mismatched input 'SELEC'" in out.err
    history = (world.paths.run / exploring.HISTORY).read_text()
    assert "+ 2 AS answer" in history


def test_a_trino_that_is_down_is_named_with_the_command_that_starts_it(settings: Settings) -> None:
    with pytest.raises(sql.TrinoAway, match="`tidemark up trino` starts it"):
        sql.rows(settings, "SELECT 1")
