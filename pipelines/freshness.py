"""How fresh what is served was, minute by minute: what `ops.freshness` holds, and what a period of it comes to.

Belongs here: reading the rows, also those that wait to be copied, and figures over a period. Does not belong here: how
they are measured (`indexing.freshness`), copying them into the lake (`jobs.minutes`) and printing them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipelines import lake
from pipelines.indexing.freshness import LIVE, SERVED
from pipelines.settings import Settings

WITHIN_MS = 60_000
"""So soon nine in ten of a minute's documents should be served."""

Row = Mapping[str, Any]


class Ages(NamedTuple):
    """How long after their first stage documents came to a later one, in ms."""

    p50_ms: int
    p90_ms: int
    p99_ms: int
    max_ms: int


class Minute(NamedTuple):
    """A minute of serving a stream's documents.

    Attributes:
        minute: When it began.
        documents: How many were served first in it.
        stages: Stage → ages at it; of several replicas, the worst.
        running_max_ms: The greatest age of a served document up to its end.
    """

    minute: datetime
    documents: int
    stages: Mapping[str, Ages]
    running_max_ms: int


def files(settings: Settings) -> list[Path]:
    """The files of finished minutes that wait to be copied."""
    return sorted(settings.paths.freshness.glob("*.json"))


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a minute's file; none once it is copied and gone."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [_row(row) for row in said]


def _row(said: Row) -> dict[str, Any]:
    told = {**said, "minute": datetime.fromisoformat(said["minute"])}
    return {column.name: told[column.name] for column in lake.OPS_FRESHNESS.columns}


def copied(settings: Settings, since: datetime) -> list[dict[str, Any]]:
    """The rows of `ops.freshness` from a minute on. Needs no Spark."""
    table = lake.open_table(settings, lake.OPS_FRESHNESS.name)
    if table is None:
        return []
    found: list[dict[str, Any]] = table.scan(f"minute >= '{since.isoformat()}'").to_arrow().to_pylist()
    return found


def noted(settings: Settings, index: str, since: datetime) -> list[dict[str, Any]]:
    """All rows of an index from a minute on, copied or not yet, each once."""
    waiting = [
        row for file in files(settings) for row in rows_of(file)
    ]  # first: copied meanwhile, they are in both
    rows = {tuple(row.items()): row for row in (*copied(settings, since), *waiting)}
    return [row for row in rows.values() if row["index"] == index and row["minute"] >= since]


def by_stream(rows: Iterable[Row], kind: str = LIVE) -> dict[str, list[Minute]]:
    """Rows of an index as the minutes of each of its streams, the oldest first."""
    found: dict[str, dict[datetime, list[Row]]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["stream"], {}).setdefault(row["minute"], []).append(row)
    return {stream: _minutes(of) for stream, of in sorted(found.items())}


def _minutes(found: Mapping[datetime, list[Row]]) -> list[Minute]:
    minutes: list[Minute] = []
    for at in sorted(found):
        rows = found[at]
        stages = {stage: _worst(row for row in rows if row["stage"] == stage) for stage in _stages(rows)}
        greatest = stages[SERVED].max_ms if SERVED in stages else 0
        running = max(greatest, minutes[-1].running_max_ms if minutes else 0)
        documents = max((row["documents"] for row in rows if row["stage"] == SERVED), default=0)
        minutes.append(Minute(at, documents, stages, running))
    return minutes


def _stages(rows: Iterable[Row]) -> list[str]:
    """In the order in which they are passed, as far as ages tell it."""
    least: dict[str, int] = {}
    for row in rows:
        least[row["stage"]] = max(row["p50_ms"], least.get(row["stage"], 0))
    return sorted(least, key=lambda stage: (stage == SERVED, least[stage]))


def _worst(rows: Iterable[Row]) -> Ages:
    columns = zip(*([row[name] for name in Ages._fields] for row in rows), strict=True)
    return Ages(*map(max, columns))


def within_pct(minutes: Iterable[Minute], limit_ms: int = WITHIN_MS) -> float | None:
    """Of how many percent of the minutes 90 percent of the documents were served in time; None: there are no minutes.

    Minutes in which nothing was served first do not count.
    """
    held = [minute.stages[SERVED].p90_ms <= limit_ms for minute in minutes if SERVED in minute.stages]
    return round(100 * sum(held) / len(held), 3) if held else None
