"""A real Trino on a small lake: it answers what Spark, pyiceberg and plain Python do, and errors say where."""

from __future__ import annotations

import csv
import io
import json
import math
import random
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

from jobs import processes
from jobs.cli import exploring
from jobs.cli.shared import app
from pipelines import lake, preflight, sql, views
from pipelines.explore import VIEWS
from pipelines.settings import Settings
from pipelines.spark import session
from tests.conftest import small_settings

pytestmark = pytest.mark.timeout(900)

NEWEST = datetime(2024, 3, 20, 12, tzinfo=UTC)
EVENTS = lake.CURATED_USER_INTERACTIONS.name
WEEK = timedelta(days=7)


@pytest.fixture(scope="module")
def world(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A lake with rows in every table that a view reads, and a Trino on it."""
    settings = small_settings(tmp_path_factory.mktemp("explore") / "home", TRINO__HEAP_MB=768)
    try:
        preflight.find_trino_java()
    except preflight.PreflightError as error:
        pytest.skip(str(error))
    fill(session(settings, "tests"))
    keeper, chosen = processes.supervisor(settings), processes.choose(processes.local(settings), ["trino"])
    processes.up(keeper, chosen)
    yield settings
    processes.down(keeper, chosen)


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
            **place,
        }
        for number in range(400)
    ]
    events += [
        dict(events[1], event_id=f"edge{n}", event_time=NEWEST - n * WEEK, action="purchase")
        for n in (0, 1, 2)
    ]
    write(spark, EVENTS, events)
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
    write(spark, lake.OPS_INDEX_VERSIONS.name, versions)


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
    assert done == dict.fromkeys(VIEWS, views.MADE)
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
