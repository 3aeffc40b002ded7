"""Exploration queries on the full demo lake: the same query on the same tables by Trino, Spark and DuckDB, in turns.

Each query is written once, in Trino's dialect, and translated. Trino is the one that `tidemark up trino` starts, Spark
a session of this process; both read Iceberg. DuckDB reads the data files of the same snapshots, as pyiceberg plans
them. Every engine runs every query once before it is timed, then in turns; the answers of all rounds must be the same.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import duckdb
import sqlglot
from sqlglot import exp

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines import lake, sql, views
from pipelines.explore import VIEWS
from pipelines.settings import Settings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EVENTS, CATALOGUE, OFFER = "curated.user_interactions", "curated.pins_catalogue", "curated.pins_offer"
QUERIES = {
    "rows by action": f"SELECT action, count(*) AS events FROM {EVENTS} GROUP BY action",
    "a day": f"SELECT count(*) AS events, count(DISTINCT user_id) AS users FROM {EVENTS}"
    " WHERE event_time >= TIMESTAMP '2017-06-01 00:00:00 UTC' AND event_time < TIMESTAMP '2017-06-02 00:00:00 UTC'",
    "sales by month": "SELECT date_trunc('month', event_time) AS month, sum(quantity) AS quantity,"
    f" sum(value_usd_micros) AS value_usd_micros FROM {EVENTS} GROUP BY 1",
    "busiest users": f"SELECT user_id, count(*) AS events, max(event_time) AS last FROM {EVENTS}"
    " GROUP BY user_id ORDER BY events DESC, user_id LIMIT 20",
    "one user": f"SELECT event_time, event_id, pin_id, quantity FROM {EVENTS}"
    f" WHERE user_id IN (SELECT min(user_id) FROM {EVENTS})"
    " ORDER BY event_time DESC, event_id LIMIT 50",
    "best pins": f"SELECT i.pin_id, max(c.catalogue.title) AS title, sum(i.quantity) AS quantity FROM {EVENTS} AS i"
    f" JOIN {CATALOGUE} AS c ON c.pin_id = i.pin_id GROUP BY i.pin_id ORDER BY quantity DESC, i.pin_id LIMIT 20",
    "departments": "SELECT c.catalogue.department AS department, count(*) AS events, count(DISTINCT i.user_id) AS users"
    f" FROM {EVENTS} AS i JOIN {CATALOGUE} AS c ON c.pin_id = i.pin_id GROUP BY 1",
    "bought together": f"WITH baskets AS (SELECT DISTINCT user_id, pin_id FROM {EVENTS}"
    " WHERE event_time >= TIMESTAMP '2017-12-25 00:00:00 UTC')"
    " SELECT a.pin_id, b.pin_id AS other, count(*) AS users FROM baskets AS a"
    " JOIN baskets AS b ON a.user_id = b.user_id AND a.pin_id < b.pin_id"
    " GROUP BY a.pin_id, b.pin_id ORDER BY users DESC, a.pin_id, other LIMIT 20",
    "never sold": f"SELECT count(*) AS pins FROM {CATALOGUE} AS c LEFT JOIN {EVENTS} AS i ON i.pin_id = c.pin_id"
    " WHERE i.pin_id IS NULL",
    "distinct pairs": f"SELECT count(*) AS pairs FROM (SELECT DISTINCT user_id, pin_id FROM {EVENTS}) AS pairs",
    "rank in category": "SELECT category, pin_id, events FROM (SELECT c.catalogue.category AS category, i.pin_id,"
    " count(*) AS events,"
    " row_number() OVER (PARTITION BY c.catalogue.category ORDER BY count(*) DESC, i.pin_id) AS place"
    f" FROM {EVENTS} AS i JOIN {CATALOGUE} AS c ON c.pin_id = i.pin_id"
    " GROUP BY c.catalogue.category, i.pin_id) AS ranked"
    " WHERE place <= 3",
    "raw by day": "SELECT load_id, count(*) AS records, max(load_row) AS last, count(value) AS values_held"
    " FROM raw.user_interactions GROUP BY load_id",
    "refused": "SELECT reason, count(*) AS letters FROM raw.dead_letters GROUP BY reason",
    "households": "SELECT h.income, count(DISTINCT h.user_id) AS users, count(*) AS events FROM raw.households AS h"
    f" JOIN {EVENTS} AS i ON i.user_id = h.user_id GROUP BY h.income",
    "prices": "SELECT is_available, count(*) AS pins, min(price) AS least, max(price) AS most"
    f" FROM (SELECT offer.is_available AS is_available, offer.price_usd_micros AS price FROM {OFFER}) AS offers"
    " GROUP BY is_available",
    "weekly sales": VIEWS["weekly_sales"].sql,
}
ROUNDS = 5
Ask = Callable[[str], list[Any]]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__, given, rounds=(ROUNDS, "timed rounds"), fraction=(1.0, "share of the real input in the lake")
    )
    machine = harness.machine()
    with harness.place("trino", options.home) as settings:
        harness.prepare_base(settings, options.fraction)
        harness.start(settings, ["trino"])
        from pipelines.spark import session

        spark = session(settings, "tidemark exploration")
        try:
            result = measure(spark, settings, options.rounds)
        finally:
            spark.stop()
    harness.publish({"benchmark": "trino", **result, "base_fraction": options.fraction, **machine})
    return 0


def measure(spark: SparkSession, settings: Settings, rounds: int) -> dict[str, Any]:
    """Every query on every engine, in turns."""
    duck = _duckdb(settings)
    engines: dict[str, Ask] = {
        "trino": lambda query: sql.rows(settings, views.in_dialect(query, "trino")),
        "spark": lambda query: [tuple(row) for row in spark.sql(views.in_dialect(query, "spark")).collect()],
        "duckdb": lambda query: duck.execute(_for_duckdb(query)).fetchall(),
    }
    seconds: dict[str, dict[str, float]] = {}
    differing = []
    for name, query in QUERIES.items():
        took: dict[str, list[float]] = {engine: [] for engine in engines}
        answers = set()
        for number in range(rounds + 1):
            order = list(engines)
            for engine in order[number % 3 :] + order[: number % 3]:
                began = time.perf_counter()
                rows = engines[engine](query)
                took[engine].append(time.perf_counter() - began)
                answers.add(frozenset(Counter(map(_same, rows)).items()))
        if len(answers) != 1:
            differing.append(name)
        if not any(answers):
            raise BenchmarkError(f"{name!r} has no rows: it says nothing about an engine")
        seconds[name] = {engine: round(statistics.median(of[1:]), 4) for engine, of in took.items()}
        say(f"{name}: {seconds[name]}{', and they differ' if len(answers) != 1 else ''}")
    medians = {
        f"{e}_median_s": round(statistics.median(of[e] for of in seconds.values()), 4) for e in engines
    }
    return {
        "queries": len(QUERIES),
        **medians,
        "disagreements": len(differing),
        "differing": differing,
        "rounds": rounds,
        "by_query_s": seconds,
        "beside": ["Trino, and the session of Spark"],
    }


def _duckdb(settings: Settings) -> duckdb.DuckDBPyConnection:
    """A connection with a view on the data files of every table that a query reads.

    Raises:
        BenchmarkError: A table has rows that were deleted without its files being written anew.
    """
    duck = duckdb.connect()
    duck.execute("SET TimeZone = 'UTC'")
    named = {table for query in QUERIES.values() for table in views.View("", "", query, {}).tables}
    for table in sorted(named):
        opened = lake.open_table(settings, table)
        planned = list(opened.scan().plan_files()) if opened is not None else []
        if not planned or any(task.delete_files for task in planned):
            raise BenchmarkError(f"{table} cannot be read as its files alone")
        namespace, name = table.split(".")
        duck.execute(f"CREATE SCHEMA IF NOT EXISTS {namespace}")
        files = ", ".join(f"'{urlsplit(task.file.file_path).path}'" for task in planned)
        duck.execute(
            f"CREATE VIEW {namespace}.{name} AS SELECT * FROM read_parquet([{files}], hive_partitioning = false)"
        )
    return duck


def _for_duckdb(query: str) -> str:
    tree = sqlglot.parse_one(query, dialect="trino")
    for table in tree.find_all(exp.Table):
        table.set("catalog", None)
    return tree.sql(dialect="duckdb")


def _same(row: Sequence[Any]) -> tuple[Any, ...]:
    """A row in the words that all engines share."""
    return tuple(map(_shared, row))


def _shared(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).isoformat()
    if isinstance(value, float | Decimal):
        return int(value) if value == int(value) else float(f"{value:.9g}")
    return value
