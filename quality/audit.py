"""An audit of a table: measured, and held against its suite and its history.

Belongs here: the one way from rows to findings, for Dagster's checks, benchmarks and tests alike. Does not belong here:
what is measured (`measures`), what may be (`judgement`), what is kept of it (`history`) and how it looks (`pages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from pipelines.suites import Suite
from quality import expectations, judgement, measures
from quality.expectations import Report
from quality.measures import Batch, Measured

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


class Audit(NamedTuple):
    """What was measured, and what was found."""

    measured: Measured
    report: Report


def audit(
    suite: Suite,
    rows: DataFrame,
    read: measures.Reader,
    before: Sequence[Batch],
    as_of: datetime,
    exact_rows: int | None = None,
) -> Audit:
    """Measure rows, and hold them against their suite and their history.

    Args:
        suite: What they must be.
        rows: The rows.
        read: Gives the rows of other tables that the suite names.
        before: What earlier audits measured, where the table has no days: `history.audits`.
        as_of: Now, in UTC.
        exact_rows: How many rows there must be, where that is known.
    """
    measured = measures.measure(suite, rows, read, as_of)
    expected = judgement.declared(suite, measured, exact_rows)
    expected += judgement.against_history(suite, measured, before)
    return Audit(measured, expectations.hold(suite.table, expected))
