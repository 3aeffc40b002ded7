"""The history of audits: the table `ops.quality`, a row a measure.

Belongs here: writing it and reading it back. Does not belong here: what follows from it (`judgement`, `pages`).

Of a table with days, a batch is noted when it is first seen, also the days before the newest: so the first audit of a
table that was loaded with a year of rows has a trend. Of a table without, a batch is an audit, and its histograms are
noted too: the next audits are compared with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pyiceberg.expressions import EqualTo

from pipelines import lake
from pipelines.settings import Settings
from quality.audit import Audit
from quality.expectations import Finding
from quality.judgement import DECLARED, KINDS, REFUSALS, Expected
from quality.measures import WHOLE, Batch

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MAX_AUDITS = 35
"""So many earlier audits are what a table without days is compared with."""

LIVE = "live"
"""The measure that says of how many rows the others are."""

Row = dict[str, Any]
"""Of `ops.quality`."""


def noted(settings: Settings, table: str) -> list[Row]:
    """All that is noted of a table, the oldest first."""
    held = lake.open_table(settings, lake.OPS_QUALITY.name)
    if held is None:
        return []
    is_of_table = EqualTo("table", table)  # type: ignore[call-arg,arg-type]  # its stubs know only JSON
    rows: list[Row] = held.scan(row_filter=is_of_table).to_arrow().to_pylist()
    return sorted(rows, key=lambda row: row["at"])


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of what is noted of a table, what its newest audit judged, or measured of its newest batch."""
    of_audit = [row for row in rows if row["at"] == rows[-1]["at"]]
    judged = {row["batch"] for row in of_audit if row["is_passed"] is not None}
    last = max((row["batch"] for row in of_audit if row["batch"] != WHOLE), default=WHOLE)
    return [row for row in of_audit if row["batch"] in judged | {WHOLE, last} and row["measure"] != LIVE]


def tables(settings: Settings) -> list[str]:
    """The tables of which anything is noted."""
    held = lake.open_table(settings, lake.OPS_QUALITY.name)
    if held is None:
        return []
    return sorted(set(held.scan(selected_fields=("table",)).to_arrow().column("table").to_pylist()))


def audits(rows: Sequence[Row], but: int | None = None) -> list[Batch]:
    """What was measured of a whole table, each snapshot once, the oldest first.

    Args:
        rows: What is noted of the table.
        but: The snapshot that is audited now.
    """
    found: dict[int, tuple[dict[tuple[str, str], float], dict[str, dict[str, int]]]] = {}
    for row in rows:
        if row["batch"] != WHOLE or row["basis"] == DECLARED or row["snapshot_id"] in (None, but):
            continue
        numbers, histograms = found.pop(row["snapshot_id"], ({}, {}))
        found[row["snapshot_id"]] = numbers, histograms  # at its newest audit
        if row["histogram"] is not None:
            histograms[row["field"]] = json.loads(row["histogram"])
        elif row["value"] is not None:
            numbers[row["field"], row["measure"]] = row["value"]
    batches = []
    for numbers, histograms in list(found.values())[-MAX_AUDITS:]:
        rows_of, live = (int(numbers.pop(("", name), 0)) for name in ("rows", LIVE))
        batches.append(Batch(rows_of, live, numbers, histograms))
    return batches


def record(spark: SparkSession, found: Audit, snapshot_id: int, before: Sequence[Row]) -> list[Row]:
    """Note an audit; gives the rows that are new.

    Args:
        spark: The session.
        found: The audit.
        snapshot_id: Of the table.
        before: What is noted of the table already.
    """
    lake.ensure(spark, lake.OPS_QUALITY)
    at = datetime.now(UTC)
    known = {row["batch"] for row in before}
    findings = [*found.report.findings, *_unjudged(found, known)]
    rows = [_row(at, found, finding, snapshot_id) for finding in findings]
    schema = spark.table(lake.OPS_QUALITY.identifier).schema
    lake.append(spark.createDataFrame(rows, schema).coalesce(1), lake.OPS_QUALITY)
    return rows


def _unjudged(found: Audit, known: set[str]) -> Iterator[Finding]:
    """What was measured and not judged: of the whole its live rows, and the days that nothing is noted of."""
    judged = {finding.expected.batch for finding in found.report.findings}
    for name, batch in found.measured.batches.items():
        if name == WHOLE:
            yield Finding(Expected(WHOLE, "volume", "", LIVE, batch.live), None)
        elif name not in judged | known:
            yield Finding(Expected(name, "volume", "", "rows", batch.rows), None)
            for (field, measure), value in batch.numbers.items():
                yield Finding(Expected(name, KINDS.get(measure, REFUSALS), field, measure, value), None)


def _row(at: datetime, found: Audit, finding: Finding, snapshot_id: int) -> Row:
    one = finding.expected
    is_text = isinstance(one.value, str)
    histogram = None
    if one.measure == "divergence" and one.batch == WHOLE:
        histogram = json.dumps(found.measured.batches[WHOLE].histograms[one.field], sort_keys=True)
    return {
        "at": at,
        "table": found.report.table,
        "snapshot_id": snapshot_id,
        "batch": one.batch,
        "kind": one.kind,
        "field": one.field,
        "measure": one.measure,
        "value": None if is_text or one.value is None else float(one.value),
        "text": one.value if is_text else None,
        "least": None if one.least is None else float(one.least),
        "most": None if one.most is None else float(one.most),
        "basis": one.basis,
        "is_passed": finding.passed,
        "is_blocking": one.is_blocking,
        "detail": one.detail,
        "histogram": histogram,
    }
