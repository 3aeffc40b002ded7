"""What quality costs: the audits of a whole build over the real input, in seconds and as a share of the build.

The input is loaded, which is not timed; then `tidemark build` runs alone. Its own report says how long each check took,
the gates of the candidates among them; nothing of a build runs beside its checks. Then the declared part of a suite is
held against its table by Great Expectations' own Spark engine, and the whole suite as it is shipped, in turns, in one
warm session.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines import lake
from pipelines.settings import Settings
from pipelines.suites import SUITES, Suite
from quality import history
from quality.audit import audit
from quality.checks import build_checks

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

TABLE = "curated.user_interactions"
ROUNDS = 3


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(__doc__, given, fraction=(1.0, "share of the households"))
    machine = harness.machine()
    with harness.place("quality", options.home) as settings:
        say("loading (not timed)")
        harness.tidemark(settings, "load", "complete-journey", "--fraction", f"{options.fraction:g}")
        say("building")
        report = harness.tidemark(settings, "build")
        result = {"benchmark": "quality", **shares(report), **audits(settings), **engines(settings)}
    harness.publish(result | machine)
    return 0


def shares(report: dict[str, Any]) -> dict[str, Any]:
    """What the checks of a build took.

    Raises:
        BenchmarkError: A check of a build did not run.
    """
    names = {check.op.name.replace("__", "/") for check in build_checks}
    took = {step["name"]: step["seconds"] for step in report["steps"] if step["name"] in names}
    if not report["passed"] or took.keys() != names:
        raise BenchmarkError(
            f"these checks did not run: {sorted(names - took.keys())}", where=report["run_id"]
        )
    seconds = sum(took.values())
    return {
        "seconds": round(seconds, 1),
        "share_of_build_pct": round(100 * seconds / report["seconds"], 1),
        "build_s": report["seconds"],
        "checks": dict(sorted(took.items(), key=lambda one: -one[1])),
        "warned": report["failed_checks"],
    }


def audits(settings: Settings) -> dict[str, int]:
    """How much was measured and judged, by the newest audit of each table."""
    tables = history.tables(settings)
    newest = []
    for table in tables:
        rows = history.noted(settings, table)
        newest += [row for row in rows if row["at"] == rows[-1]["at"]]
    return {
        "tables": len(tables),
        "measures": len(newest),
        "expectations": sum(row["is_passed"] is not None for row in newest),
    }


def engines(settings: Settings) -> dict[str, Any]:
    """The same expectations by Great Expectations on Spark, and as they are shipped."""
    from pipelines.spark import session

    spark = session(settings, "tidemark quality")
    try:
        rows = lake.read(spark, TABLE)
        suite = SUITES[TABLE]
        ways: dict[str, Callable[[], bool]] = {
            "great_expectations_on_spark_s": lambda: native(suite, rows),
            "audit_s": lambda: (
                not audit(suite, rows, lambda table: None, [], datetime.now(UTC)).report.blocking
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(ROUNDS + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                if not way():
                    raise BenchmarkError("the suite does not hold", where=TABLE)
                if number:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
        return {name: round(statistics.median(took), 2) for name, took in seconds.items()}
    finally:
        spark.stop()


def native(suite: Suite, rows: DataFrame) -> bool:
    """The declared part of a suite by Great Expectations' Spark engine; whether it holds."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    live: Any = {"row_condition": "is_deleted = false", "condition_parser": "spark"}
    asked: list[Any] = [gxe.ExpectCompoundColumnsToBeUnique(column_list=list(suite.key))]
    for field in suite.fields:
        if field.is_always_required or field.is_required:
            where: Any = {} if field.is_always_required else live
            asked.append(gxe.ExpectColumnValuesToNotBeNull(column=field.path, **where))
        if field.one_of:
            asked.append(
                gxe.ExpectColumnDistinctValuesToBeInSet(column=field.path, value_set=list(field.one_of))
            )
        if field.type != "timestamp" and (field.least is not None or field.most is not None):
            between: Any = {"min_value": field.least, "max_value": field.most}
            asked.append(gxe.ExpectColumnValuesToBeBetween(column=field.path, **between))
    context: Any = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_spark(suite.table, persist=False).add_dataframe_asset(suite.table)
    batch = source.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": rows})
    found = batch.validate(
        gx.ExpectationSuite(name=suite.table, expectations=asked), result_format="BOOLEAN_ONLY"
    )
    return bool(found.success)
