"""Great Expectations suites: what every row of a curated table, and of an index's rows, must be.

Belongs here: suites and running them on a Spark DataFrame in a context that leaves nothing behind. Great Expectations
takes seconds to import: it is imported when a suite runs, never when a code location loads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.contracts import ACTIONS
from pipelines.indexing.spec import IndexSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

MAX_VERSION = 2**61 - 1


class Report(NamedTuple):
    """What a suite found: whether all held, and each expectation in words with what was observed."""

    passed: bool
    findings: dict[str, str]
    failed: tuple[str, ...]


def user_interactions() -> list[Any]:
    """Of `curated.user_interactions`."""
    gx = _expectations()
    live = {"row_condition": "is_deleted = false", "condition_parser": "spark"}
    return [
        *[
            gx.ExpectColumnValuesToNotBeNull(column=name)
            for name in ("user_id", "event_id", "is_deleted", "content_hash")
        ],
        gx.ExpectColumnValuesToBeBetween(column="version", min_value=1, max_value=MAX_VERSION),
        *[
            gx.ExpectColumnValuesToNotBeNull(column=name, **live)
            for name in ("pin_id", "action", "event_time")
        ],
        gx.ExpectColumnDistinctValuesToBeInSet(column="action", value_set=list(ACTIONS)),
        gx.ExpectColumnValuesToBeBetween(column="quantity", min_value=1),
        gx.ExpectColumnValuesToBeBetween(column="value_usd_micros", min_value=0),
        gx.ExpectCompoundColumnsToBeUnique(column_list=["user_id", "event_id"]),
    ]


def pins(family: str) -> list[Any]:
    """Of `curated.pins_<family>`."""
    gx = _expectations()
    live = {"row_condition": "is_deleted = false", "condition_parser": "spark"}
    return [
        *[
            gx.ExpectColumnValuesToNotBeNull(column=name)
            for name in ("pin_id", "is_deleted", f"{family}_hash")
        ],
        gx.ExpectColumnValuesToBeBetween(column="version", min_value=1, max_value=MAX_VERSION),
        gx.ExpectColumnValuesToNotBeNull(column=family, **live),
        gx.ExpectColumnValuesToBeUnique(column="pin_id"),
    ]


CURATED: dict[str, Callable[[], list[Any]]] = {
    "curated.user_interactions": user_interactions,
    "curated.pins_catalogue": lambda: pins("catalogue"),
    "curated.pins_offer": lambda: pins("offer"),
}
"""The suite of each curated table."""


def index_rows(spec: IndexSpec, identities: int) -> list[Any]:
    """Of the rows that a candidate base was built of; `identities` is how many the base says it has."""
    gx = _expectations()
    return [
        *[
            gx.ExpectColumnValuesToNotBeNull(column=name)
            for name in ("identity_hash", "key_hash", "version_1", "is_deleted")
        ],
        gx.ExpectColumnDistinctValuesToBeInSet(
            column="family", value_set=[family.name for family in spec.families]
        ),
        gx.ExpectColumnValuesToBeBetween(column="time_ms", min_value=0),
        gx.ExpectTableRowCountToEqual(value=identities),
    ]


def run(name: str, expectations: list[Any], rows: DataFrame) -> Report:
    """Hold rows against expectations.

    Args:
        name: Names the suite in what is logged.
        expectations: Of one of the suites here.
        rows: A Spark DataFrame; read several times.
    """
    import great_expectations as gx

    context: Any = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    batch = (
        context.data_sources.add_spark(name, persist=False)
        .add_dataframe_asset(name)
        .add_batch_definition_whole_dataframe("all")
        .get_batch({"dataframe": rows})
    )
    for number, expectation in enumerate(expectations):
        expectation.meta = {"number": number}  # results come in an order of their own
    result = batch.validate(
        gx.ExpectationSuite(name=name, expectations=expectations), result_format="BOOLEAN_ONLY"
    )
    findings = {_words(one.expectation_config): "holds" for one in result.results}
    broken = [
        expectations[one.expectation_config.meta["number"]] for one in result.results if not one.success
    ]
    if broken:  # only then is it worth the time to see what was observed
        again = batch.validate(
            gx.ExpectationSuite(name=f"{name}-broken", expectations=broken), result_format="BASIC"
        )
        findings |= {
            _words(one.expectation_config): f"does not hold: {_observed(one)}" for one in again.results
        }
    failed = tuple(what for what, said in findings.items() if said != "holds")
    return Report(not failed and bool(result.success), findings, failed)


def _expectations() -> Any:
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations.expectations as gxe

    return gxe


def _words(config: Any) -> str:
    about = {k: v for k, v in config.kwargs.items() if k not in ("batch_id", "condition_parser")}
    return f"{config.type.removeprefix('expect_')}({', '.join(f'{k}={v}' for k, v in about.items())})"


def _observed(result: Any) -> str:
    error = next(
        (v.get("exception_message") for v in _exceptions(result) if v.get("exception_message")), None
    )
    if error:
        return str(error)
    seen = {
        k: v
        for k, v in (result.result or {}).items()
        if k in ("observed_value", "unexpected_count", "partial_unexpected_list")
    }
    return ", ".join(f"{k} {v}" for k, v in seen.items())


def _exceptions(result: Any) -> list[dict[str, Any]]:
    info = result.exception_info or {}
    return [info] if "exception_message" in info else [v for v in info.values() if isinstance(v, dict)]
