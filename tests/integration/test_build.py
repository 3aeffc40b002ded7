"""The whole asset graph in process, from loads to published bases, against plain Python over the same records."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import pytest
from pyspark.sql import DataFrame, SparkSession

from assets import columns
from assets.platform import Platform, key, reported_metadata
from jobs import build as building
from jobs import definitions, notebooks, openlineage, processes
from jobs.build import BuildReport, build
from pipelines import column_lineage, curate, derived, lake, preflight, replay, staging
from pipelines.contracts import ACTIONS, PIN_UPDATES, USER_FOLLOWS, USER_INTERACTIONS, Contract
from pipelines.indexing.base import open_base
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.position import Position
from pipelines.indexing.sums import SumsView
from pipelines.indexing.timelines import TimelineView
from pipelines.indexing.versions import Versions
from pipelines.indexing.view import View, view
from pipelines.indices import INDICES
from pipelines.ingest import load
from pipelines.recommend import registry
from pipelines.settings import Settings
from pipelines.suites import SUITES
from quality import gates
from quality.checks import table_checks
from tests import serving_world
from tests.conftest import small_settings

pytestmark = pytest.mark.timeout(1800)  # a build of everything, four times over

HOUR_MS = 3_600_000
USERS, PINS = 12, 9
Record = dict[str, Any]


def event(user: int, number: int, *, version: int = 1, action: str | None = None) -> Record:
    minute = (user * 7 + number * 31) % 60
    return {
        "user_id": f"u{user}",
        "event_id": f"e{number}",
        "pin_id": f"p{(user + number * number) % (PINS + 2)}",  # two that the catalogue lacks
        "action": action or ACTIONS[number % 3],
        "event_time": f"2024-03-{1 + number:02}T{user:02}:{minute:02}:00Z",
        "version": version,
        "quantity": 1 + number % 2,
    }


def interactions() -> list[Record | str]:
    records: list[Record | str] = [event(user, number) for user in range(USERS) for number in range(8)]
    records += [event(user, 2, version=3, action="save") for user in range(0, USERS, 3)]  # edits
    records += [
        event(user, 2, version=2, action="hide") for user in range(0, USERS, 3)
    ]  # older than the edits
    records += [
        {"op": "delete", "user_id": f"u{n}", "event_id": "e4", "version": 2} for n in range(0, USERS, 4)
    ]
    records += [event(user, 5) for user in range(USERS)]  # said before
    records += [{**event(1, 9), "quantity": 0}, {**event(1, 9), "action": "stare"}, "{", "[]"]
    return records


def pins() -> list[Record | str]:
    def catalogue(number: int, title: str) -> Record:
        return {"title": title, "category": f"c{number % 2}", "department": "d", "brand": None}

    def offer(price: int) -> Record:
        return {"price_usd_micros": price, "is_available": True}

    records: list[Record | str] = [
        {"pin_id": f"p{n}", "catalogue": catalogue(n, f"pin {n}"), "offer": offer(n * 100)}
        for n in range(PINS)
    ]
    records += [
        {"pin_id": "p1", "version": 2, "offer": offer(7)},  # the first record's catalogue still stands
        {"pin_id": "p2", "version": 2, "catalogue": catalogue(2, "again"), "offer": offer(8)},
        {"pin_id": "p3", "version": 2, "op": "delete"},
        {"pin_id": "p4", "version": 2, "op": "delete"},
        {"pin_id": "p4", "version": 3, "catalogue": catalogue(4, "back")},  # its old offer stays dead
        {"pin_id": "p20", "offer": offer(9)},  # kept, not shown
        {"pin_id": "p0", "catalogue": catalogue(0, "pin 0")},  # said before
        {"pin_id": "p5"},
    ]
    return records


def follows() -> list[Record | str]:
    """Each user follows a pin and the user before; some no more, and of these some again."""
    records: list[Record | str] = [
        {"user_id": f"u{n}", "pin_id": f"p{n % PINS}", "event_time": f"2024-03-01T{n:02}:00:00Z"}
        for n in range(USERS)
    ]
    records += [{"user_id": f"u{n}", "followed_user_id": f"u{n - 1}", "version": 1} for n in range(1, USERS)]
    records += [
        {"user_id": f"u{n}", "pin_id": f"p{n % PINS}", "version": 2, "op": "delete"}
        for n in range(0, USERS, 2)
    ]
    records += [
        {"user_id": f"u{n}", "pin_id": f"p{n % PINS}", "version": 3, "event_time": "2024-03-02T00:00:00Z"}
        for n in range(0, USERS, 4)
    ]
    records += [{"user_id": "u1", "followed_user_id": "u0", "version": 1}]  # said before
    return [*records, {"user_id": "u1", "followed_user_id": "u1"}, {"user_id": "u1"}]


def put(
    settings: Settings, spark: SparkSession, contract: Contract, records: Sequence[Record | str], name: str
) -> None:
    values = [(n, r if isinstance(r, str) else json.dumps(r)) for n, r in enumerate(records)]
    load.load(spark, settings, contract, spark.createDataFrame(values, "load_row long, value string"), name)


# ------------------------------------------------------------------------------------------------ the oracle


def is_valid(record: Record | str) -> bool:
    if isinstance(record, str):
        return False
    if record.get("op") == "delete":
        return True
    if "user_id" in record:
        return record["action"] in ACTIONS and record.get("quantity", 1) >= 1
    return "catalogue" in record or "offer" in record


def standing(
    records: Sequence[Record | str], identity: tuple[str, ...], family: str | None = None
) -> list[Record]:
    """For each identity the record of the greatest (version, is a tombstone); these histories have no other ties."""
    best: dict[tuple[Any, ...], Record] = {}
    for record in records:
        if not is_valid(record):
            continue
        assert isinstance(record, dict)
        if family is not None and family not in record and "op" not in record:
            continue
        key = tuple(record[name] for name in identity)
        if key not in best or rank(record) > rank(best[key]):
            best[key] = record
    return [record for record in best.values() if "op" not in record]


def rank(record: Record) -> tuple[int, bool]:
    return record.get("version", 1), "op" in record


def millis(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def expected_timelines(events: Sequence[Record | str]) -> dict[str, list[tuple[str, int, str, str]]]:
    found: dict[str, list[tuple[str, int, str, str]]] = {}
    for record in standing(events, ("user_id", "event_id")):
        entry = (record["event_id"], millis(record["event_time"]), record["pin_id"], record["action"])
        found.setdefault(record["user_id"], []).append(entry)
    return {
        user: sorted(entries, key=lambda e: (e[1], e[0]), reverse=True) for user, entries in found.items()
    }


def expected_counts(events: Sequence[Record | str]) -> dict[str, dict[int, tuple[int, ...]]]:
    found: Counter[tuple[str, int, str]] = Counter()
    for record in standing(events, ("user_id", "event_id")):
        hour = millis(record["event_time"]) // HOUR_MS * HOUR_MS
        found[record["pin_id"], hour, record["action"]] += 1
    sums: dict[str, dict[int, tuple[int, ...]]] = {}
    for pin, hour, _ in found:
        sums.setdefault(pin, {})[hour] = tuple(found[pin, hour, action] for action in ACTIONS)
    return sums


def expected_documents(updates: Sequence[Record | str]) -> dict[str, dict[str, Record]]:
    found: dict[str, dict[str, Record]] = {}
    for family in ("catalogue", "offer"):
        for record in standing(updates, ("pin_id",), family):
            found.setdefault(record["pin_id"], {})[family] = record[family]
    return {pin: families for pin, families in found.items() if "catalogue" in families}


def expected_follows(user: int) -> list[tuple[str, int]]:
    """The pins that a user follows, each with when."""
    if user % 4 == 2:
        return []
    began = f"2024-03-01T{user:02}:00:00Z" if user % 4 else "2024-03-02T00:00:00Z"
    return [(f"p{user % PINS}", millis(began))]


def expected_statements(updates: Sequence[Record | str], pin: str) -> list[tuple[int, str, bool, int | None]]:
    """What was said of a pin: version, family, whether it is gone, price; newest first, for all came by one load."""
    found = set()
    for record in updates:
        if is_valid(record) and isinstance(record, dict) and record["pin_id"] == pin:
            is_gone = "op" in record
            for family in ("catalogue", "offer"):
                if is_gone or family in record:
                    price = record["offer"]["price_usd_micros"] if family == "offer" and not is_gone else None
                    found.add((record.get("version", 1), family, is_gone, price))
    return sorted(found, key=lambda one: one[:2], reverse=True)


# ------------------------------------------------------------------------------------------------ one world, built once


class World(NamedTuple):
    settings: Settings
    spark: SparkSession
    first: BuildReport
    events: list[Record | str]
    updates: list[Record | str]


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> World:
    from pipelines.spark import session

    settings = small_settings(
        tmp_path_factory.mktemp("build") / "home", BUILD__SHARD_FACTS=50, TRINO__HEAP_MB=768
    )
    own = session(settings, "tests")
    events, updates = interactions(), pins()
    put(settings, own, USER_INTERACTIONS, events, "history")
    put(settings, own, PIN_UPDATES, updates, "history")
    put(settings, own, USER_FOLLOWS, follows(), "history")
    return World(settings, own, build(settings), events, updates)


def served(settings: Settings, index: str) -> View:
    versions = Versions(settings.paths.indices, index)
    pointer = versions.pointer()
    assert pointer is not None
    return view(open_base(INDICES[index], versions.path(pointer.version)))


def pointers(settings: Settings) -> dict[str, str]:
    found = {name: Versions(settings.paths.indices, name).pointer() for name in INDICES}
    return {name: pointer.version for name, pointer in found.items() if pointer}


def require_passed(report: BuildReport) -> None:
    if problem := report.problem():
        raise problem
    assert report.passed


def require_answers(
    settings: Settings, events: Sequence[Record | str], updates: Sequence[Record | str]
) -> None:
    timelines, counts, documents = (served(settings, name) for name in ("user_events", "pin_counts", "pins"))
    assert isinstance(timelines, TimelineView)
    assert isinstance(counts, SumsView)
    assert isinstance(documents, DocumentsView)
    for user, expected in expected_timelines(events).items():
        answer = timelines.timeline(user.encode())
        assert answer.is_complete
        columns = [answer.table.column(name).to_pylist() for name in ("id", "time_ms", "pin_id", "action")]
        assert [(e.decode(), t, p, a) for e, t, p, a in zip(*columns, strict=True)] == expected
    wanted = expected_counts(events)
    for number in range(PINS + 3):
        assert counts.sums(f"p{number}".encode()) == wanted.get(f"p{number}", {})
    pins_wanted = expected_documents(updates)
    keys = [f"p{number}" for number in range(PINS + 12)]
    answers = documents.get([key.encode() for key in keys], ["catalogue", "offer"])
    assert dict(zip(keys, answers, strict=True)) == {key: pins_wanted.get(key) for key in keys}


def test_everything_is_built_and_answers_as_plain_python_does(world: World) -> None:
    report = world.first
    require_passed(report)
    assert report.published == pointers(world.settings)
    assert {step.state for step in report.steps} == {"done"}
    require_answers(world.settings, world.events, world.updates)


def test_who_follows_what_and_what_was_said_of_pins_are_as_plain_python_says(world: World) -> None:
    followed, changed = (served(world.settings, name) for name in ("user_follows", "pin_changes"))
    assert isinstance(followed, TimelineView)
    assert isinstance(changed, TimelineView)
    for user in range(USERS):
        rows = followed.timeline(f"u{user}".encode()).table.to_pylist()
        assert [(r["pin_id"], r["time_ms"]) for r in rows if r["pin_id"]] == expected_follows(user)
        assert [r["followed_user_id"] for r in rows if not r["pin_id"]] == [f"u{user - 1}"] * (user > 0)
    columns = ("version", "family", "is_gone", "price_usd_micros")
    for number in range(PINS + 12):
        rows = changed.timeline(f"p{number}".encode()).table.to_pylist()
        found = [tuple(r[name] for name in columns) for r in rows]
        assert found == expected_statements(world.updates, f"p{number}")
    account = world.first.accounts["raw.user_follows"]
    assert account["refused"] == {"contradiction": 1, "missing_field": 1}
    assert (account["tombstones"], account["repeated"], account["superseded"]) == (6, 1, 6)


def test_records_replayed_beside_the_bases_say_what_was_built(world: World) -> None:
    """Nothing changed since: what stands is the same, what does not is superseded."""
    archived = replay.records(world.spark, world.settings, USER_INTERACTIONS)
    found = replay.outcome(world.spark, world.settings, USER_INTERACTIONS, archived)
    assert found.records == len(world.events)
    assert all(decision.was == decision.now for decision in found.decisions)
    for name in ("user_events", "pin_counts"):
        statuses: Counter[str] = Counter()
        for change in found.facts:
            if change.index_name == name:
                statuses[change.status] += change.facts
        assert set(statuses) == {"same", "superseded"}
        assert statuses["same"] >= sum(len(events) for events in expected_timelines(world.events).values())


def test_the_accounts_add_up(world: World) -> None:
    events, updates = world.first.accounts["raw.user_interactions"], world.first.accounts["raw.pin_updates"]
    assert events == {
        "table": "raw.user_interactions",
        "snapshot_id": events["snapshot_id"],
        "rows": len(world.events),
        "refused": {"broken_json": 1, "not_an_object": 1, "out_of_range": 1, "unknown_action": 1},
        "accepted": len(world.events) - 4,
        "tombstones": 3,
        "repeated": USERS,
        "superseded": 4 + 4 + 3,  # of the edited ones the first two, and what was deleted
        "current": sum(len(e) for e in expected_timelines(world.events).values()),
    }
    assert (updates["rows"], updates["refused"]) == (len(world.updates), {"no_family": 1})
    assert (updates["tombstones"], updates["repeated"], updates["superseded"]) == (2, 1, 3)
    assert updates["current"] == len(world.updates) - 7
    written = lake.read(world.spark, "ops.account").filter("table = 'raw.pin_updates'").collect()
    assert json.loads(written[0]["refused_by_reason"]) == {"no_family": 1}


def test_tombstones_are_kept_and_the_cut_comes_from_what_was_read(world: World) -> None:
    curated = lake.read(world.spark, "curated.user_interactions")
    assert curated.filter("is_deleted").count() == 3
    loads = {"user_interactions:history"}
    snapshot = lake.current_snapshot(world.settings, "curated.user_interactions")
    assert snapshot is not None
    assert int(snapshot.summary[lake.MAX_BROKER_TIME_MS]) > 0
    assert lake.position(world.settings, "curated.user_interactions") == Position(loads=frozenset(loads))
    for name, cut in (("user_events", loads), ("pin_counts", loads), ("pins", {"pin_updates:history"})):
        base = served(world.settings, name).base
        assert base.manifest is not None
        assert base.cut == Position(loads=frozenset(cut))
        assert base.manifest.horizon_time_ms is not None
        assert base.manifest.sources[f"index.{name}"] > 0


def test_vectors_are_of_the_live_model_and_its_parameters_are_pinned(world: World) -> None:
    documents = served(world.settings, "pins")
    assert isinstance(documents, DocumentsView)
    manifest = documents.base.manifest
    assert manifest is not None
    model_id = registry.live(world.settings)
    assert manifest.models == {"embedding": model_id}
    assert manifest.parameters["als"]["model_id"] == model_id
    vectors, has = documents.vectors("embedding", [b"p0", b"p20"])
    table, _ = registry.load(world.settings, str(model_id))
    at = table.column("pin_id").to_pylist().index("p0")
    assert list(has) == [True, False]
    assert vectors[0].tolist() == pytest.approx(table.column("vector")[at].as_py())


def test_what_happened_is_in_the_lake(world: World) -> None:
    rows = lake.read(world.spark, "ops.index_versions").filter(f"version = '{world.first.published['pins']}'")
    assert {row["event"] for row in rows.collect()} == {"built", "published"}
    tags = world.spark.sql("SELECT name FROM lake.index.pins.refs WHERE type = 'TAG'").collect()
    assert {f"base-{world.first.published['pins']}", "published"} <= {row["name"] for row in tags}
    served_in_sql = "SELECT key, catalogue_title, offer_price_usd_micros FROM lake.explore.pins_served"
    assert {tuple(row) for row in world.spark.sql(served_in_sql).collect()} == {
        (pin, said["catalogue"]["title"], said.get("offer", {}).get("price_usd_micros"))
        for pin, said in expected_documents(world.updates).items()
    }


def test_every_table_says_where_its_columns_come_from(world: World) -> None:
    """What the build told of the plans that it ran is what the same transforms say over empty tables."""
    expected = derived.lineages(world.spark)
    graph = definitions.defs.resolve_asset_graph()
    with dg.DagsterInstance.from_config(str(world.settings.paths.dagster)) as instance:
        for name, lineage in expected.items():
            said = reported_metadata(instance, key(name))
            assert column_lineage.from_json(said[columns.LINEAGE]) == lineage, name
            by_column = said["dagster/column_lineage"].deps_by_column
            assert set(by_column) == {column.name for column in derived.specs()[name].columns}
            assert {dep.asset_key for deps in by_column.values() for dep in deps} <= graph.get(
                key(name)
            ).parent_keys
        run = instance.get_run_by_id(world.first.run_id)
        assert run is not None
        told = openlineage.events(world.settings, run, instance.all_logs(run.run_id), graph)
    assert {str(event.eventType.value) for event in told} == {"START", "COMPLETE"}
    outputs = {
        one.name: one.facets for event in told for one in event.outputs if event.eventType.value == "COMPLETE"
    }
    assert {
        "lake.raw.pin_updates",
        "lake.curated.pins_offer",
        "models.pin_als",
        "base.pins",
    } <= outputs.keys()
    traced = {name.removeprefix("lake.") for name, facets in outputs.items() if "columnLineage" in facets}
    assert traced == expected.keys()


def test_a_candidate_that_fails_its_gate_is_not_published(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "MIN_PRESENCE_PCT", 10_000)
    before = pointers(world.settings)
    report = build(world.settings, indices=["pins"])
    assert not report.passed
    assert set(report.failed_checks) == {"base/pins:gate"}
    assert report.failed_steps == {}
    assert "presence_covers_offer" in report.failed_checks["base/pins:gate"]
    assert "presence_covers_offer" in str(report.problem())
    assert pointers(world.settings) == before
    candidate = Versions(world.settings.paths.indices, "pins").names()[-1]
    assert candidate > before["pins"]
    row = (
        lake.read(world.spark, "ops.index_versions")
        .filter(f"version = '{candidate}' AND event = 'refused'")
        .first()
    )
    assert row is not None
    assert "presence_covers_offer" in row["reason"]
    require_answers(world.settings, world.events, world.updates)


def test_what_its_suite_refuses_is_staged_and_never_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the code that curates. If the suite is what was wrong, its check alone lets readers see the rows."""
    curated, table = curate.Curated.table, "curated.user_interactions"

    def faulty(result: curate.Curated, part: curate.Part) -> DataFrame:
        rows = curated(result, part)
        return rows.withColumn("quantity", -rows.quantity) if part.table == table else rows

    def negative(version: str = "") -> int:
        return world.spark.sql(f"SELECT * FROM lake.{table} {version} WHERE quantity < 0").count()

    monkeypatch.setattr(curate.Curated, "table", faulty)
    before, seen = pointers(world.settings), lake.current_snapshot(world.settings, table)
    report = build(world.settings)
    assert set(report.failed_checks) == {f"{table.replace('.', '/')}:expectations"}
    assert "quantity" in str(report.problem())
    others = {"ads", "pin_changes", "user_follows"}
    assert set(report.built) == others, "which are made of no events"
    assert {n: v for n, v in pointers(world.settings).items() if n not in others} == {
        n: v for n, v in before.items() if n not in others
    }
    assert lake.current_snapshot(world.settings, table) == seen
    staged = staging.snapshot(world.settings, table)
    assert staged is not None
    assert (negative(), negative("VERSION AS OF 'staged'")) == (0, staged.rows - 3)
    assert staging.snapshot(world.settings, "curated.pins_offer") is None
    require_answers(world.settings, world.events, world.updates)

    suite = SUITES[table]
    mended = suite._replace(fields=tuple(f._replace(least=None) for f in suite.fields))
    defs = dg.Definitions(
        asset_checks=[table_checks(mended, dg.AssetKey(table.split(".")))],
        resources={"platform": Platform(lambda: world.settings, gates.examine)},
    )
    with dg.DagsterInstance.get() as instance:
        assert defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance).success
    assert lake.current_snapshot(world.settings, table) == staged
    assert negative() == staged.rows - 3


def test_the_next_build_has_what_came_since(world: World) -> None:
    more: list[Record | str] = [
        event(1, 20, action="save"),
        event(0, 2, version=2, action="click"),
        event(1, 0),
    ]
    put(world.settings, world.spark, USER_INTERACTIONS, more, "more")
    before = pointers(world.settings)
    report = build(world.settings, Position(loads=frozenset({"user_interactions:more"})))
    require_passed(report)
    after = pointers(world.settings)
    assert all(after[name] > before[name] for name in INDICES)
    assert report.accounts["raw.user_interactions"]["rows"] == len(world.events) + len(more)
    require_answers(world.settings, [*world.events, *more], world.updates)
    corrected = lake.read(world.spark, "ops.timeline_corrections").collect()
    assert {row["version"] for row in corrected} == {after["user_events"]}
    counted = {(row["family"], row["cause"]): row["facts"] for row in corrected if row["facts"]}
    by_id = ("user_id", "event_id")
    held = standing(world.events, by_id)
    new = [one for one in standing([*world.events, *more], by_id) if one not in held]
    assert counted == {("interactions", "load"): len(new)}
    assert new


@pytest.fixture(scope="module")
def explored(world: World) -> Iterator[Settings]:
    """The world with a delta after its bases, and a Trino on it."""
    try:
        preflight.find_trino_java()
    except preflight.PreflightError as error:
        pytest.skip(str(error))
    settings = world.settings
    serving_world.correct(settings, ("p1", "p2"), ("u1", "u2"))
    keeper, chosen = processes.supervisor(settings), processes.choose(processes.local(settings), ["trino"])
    processes.up(keeper, chosen)
    yield settings
    processes.down(keeper, chosen)


@pytest.mark.parametrize("notebook", notebooks.find(), ids=lambda path: path.stem)
def test_a_notebook_runs_on_what_was_built(
    explored: Settings, notebook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(cell.get("outputs") for cell in notebooks.read(notebook).cells), (
        "outputs are not committed"
    )
    monkeypatch.setenv("ONLINE_RETAIL", str(explored.home / "none"))
    (found,) = notebooks.render(explored, [notebook])
    assert found.failure is None
    page = found.page.read_text(encoding="utf-8")
    assert "which does not answer" not in page, "Trino is up"
    assert "data:image/png" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    if notebook.stem == "dirty_source":
        assert "The invoices are not on this machine" in page
    if notebook.stem == "base_and_delta":
        assert "The delta adds 1 events to 2 timelines, and corrects 2" in page
    if notebook.stem == "user_timelines":
        assert page.count("data:image/png") >= 7


def test_waiting_in_vain_says_what_is_missing(world: World) -> None:
    with pytest.raises(building.BuildError, match="has not passed"):
        build(world.settings, Position(loads=frozenset({"nothing"})), wait_timeout_s=0.1)


def test_an_empty_home_is_built_too(spark: SparkSession, tmp_path: Path) -> None:
    settings = small_settings(tmp_path / "empty")
    report = build(settings)
    require_passed(report)
    documents, timelines = served(settings, "pins"), served(settings, "user_events")
    assert isinstance(documents, DocumentsView)
    assert isinstance(timelines, TimelineView)
    assert documents.get([b"p0"]) == [None]
    assert timelines.timeline(b"u0").table.num_rows == 0


def test_an_unknown_index_is_an_error_that_lists_them(settings: Settings) -> None:
    with pytest.raises(building.BuildError, match="pin_counts"):
        build(settings, indices=["pin"])
