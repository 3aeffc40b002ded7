"""Reports to look at, as their own code writes them: of a small world, and of planted audits.

Belongs here: writing them. Does not belong here: what is shown of which data, which the tests of each report say.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from jobs import notebooks as running
from pipelines.settings import Settings
from quality import account_page, pages
from quality.signals import catalogue, page
from tests import account_world, quality_rows
from tests import serving_world as world

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

AUDITED = "curated.user_interactions"


def signals(settings: Settings, spark: SparkSession) -> None:
    """The catalogue."""
    page.write(catalogue.collect(settings, spark), settings.paths.reports / "signals")


def account(settings: Settings) -> None:
    """The ads account: two streams of a day, a backfill, dropped messages, and two bases."""
    account_page.write(settings, account_world.shown(settings))


def quality(settings: Settings) -> None:
    """Three tables: one that holds, one that is not as usual, one that is broken; with long names and many audits."""
    for place, table in enumerate((AUDITED, "raw.pin_updates", "features.user_vectors")):
        rows = [
            row
            for audit in range(40)
            for row in (
                _measure(table, audit, "event_time", "null", 0.0),
                _measure(
                    table, audit, "value_usd_micros", "divergence", 0.1 * (audit % 7), least=0.0, most=0.9
                ),
                _measure(table, audit, "a_rule_with_a_long_name.broken", "rows", float(audit), most=None),
                _measure(
                    table, audit, "pin_id", "orphan_pct", float(place and audit == 39), is_blocking=place == 2
                ),
            )
        ]
        pages.renew(settings, table, rows)


def _measure(table: str, audit: int, field: str, measure: str, value: float, **said: Any) -> dict[str, Any]:
    return quality_rows.row(
        datetime(2024, 3, 1, tzinfo=UTC) + timedelta(hours=4 * audit),
        table,
        field,
        measure,
        value,
        detail=f"{field} of {measure}: a sentence that says what was found, and is longer than a narrow page",
        **{"basis": None if said.get("most", 0.0) is None else "history"} if measure != "null" else {},
        **said,
    )


def notebooks(settings: Settings) -> None:
    """The notebook about base and delta, with a delta that adds, edits and deletes."""
    world.correct(settings, ("1", "2"), ("u1", "u2"))
    (found,) = running.render(settings, running.find(["base_and_delta"]))
    assert found.failure is None
