"""Data Docs: what audits found, as static pages with history and trend; a page a table, and one over all.

Belongs here: HTML of what `ops.quality` has. The pages need no script and load nothing from elsewhere, so that any file
server can serve them; `pipelines.serving` does. (Great Expectations' own site takes styles and scripts from five hosts,
and knows no trend: docs/adr/0011.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from pipelines import lake
from pipelines.contracts import CONTRACTS
from pipelines.indexing.files import replace_text
from pipelines.settings import Settings
from quality import history, markup
from quality.history import Row
from quality.judgement import DECLARED, plain
from quality.measures import WHOLE

FOLDER = "quality"
SHOWN_AUDITS = 30
SHOWN_POINTS = 40
_WIDTH, _HEIGHT, _PAD = 160, 32, 3
_STATES = {"passed": "all holds", "warned": "not as usual", "failed": "broken"}


class Point(NamedTuple):
    """A measure of a batch: its label, its value, and whether it held."""

    label: str
    value: float
    is_passed: bool | None


class Line(NamedTuple):
    """A measure as it was found last, and its trend, the oldest first."""

    row: Row
    trend: tuple[Point, ...]


def renew(settings: Settings, table: str, rows: Sequence[Row]) -> Path:
    """Write the page of a table anew, and the page over all.

    Args:
        settings: Where the pages are.
        table: The table.
        rows: What is noted of it, the oldest first.
    """
    folder = settings.paths.reports / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{table}.html"
    replace_text(page, table_page(table, rows))
    replace_text(folder / f"{table}.json", json.dumps(_summary(table, rows)))
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    replace_text(folder / "index.html", index_page(summaries))
    return page


def renew_all(settings: Settings) -> Path:
    """Write every page anew from `ops.quality`; gives the page over all."""
    for table in history.tables(settings):
        renew(settings, table, history.noted(settings, table))
    return settings.paths.reports / FOLDER / "index.html"


# ------------------------------------------------------------------------------------------------ what is shown


def _state(rows: Iterable[Row]) -> str:
    broken = [row["is_blocking"] for row in rows if row["is_passed"] is False]
    return "failed" if any(broken) else "warned" if broken else "passed"


def _audits(rows: Sequence[Row]) -> list[tuple[datetime, list[Row]]]:
    """Audits by their time, the oldest first."""
    found: dict[datetime, list[Row]] = {}
    for row in rows:
        found.setdefault(markup.utc(row["at"]), []).append(row)
    return sorted(found.items(), key=lambda one: one[0])


def _summary(table: str, rows: Sequence[Row]) -> dict[str, Any]:
    audits = _audits(rows)
    at, newest = audits[-1]
    return {
        "table": table,
        "at": at.isoformat(),
        "state": _state(newest),
        "held": sum(row["is_passed"] is True for row in newest),
        "broken": sum(row["is_passed"] is False for row in newest),
        "audits": [(when.isoformat(), _state(of)) for when, of in audits[-SHOWN_AUDITS:]],
    }


def _lines(rows: Sequence[Row]) -> list[Line]:
    """The newest audit's measures, each with what it was before."""
    trends: dict[tuple[str, str, bool], dict[str, Point]] = {}
    for row in rows:
        if row["value"] is not None:
            whole = row["batch"] == WHOLE
            label = markup.minute(row["at"]) if whole else row["batch"]
            points = trends.setdefault((row["field"], row["measure"], whole), {})
            points[label] = Point(label, row["value"], row["is_passed"])
    lines = []
    for row in history.newest(rows):
        is_whole = row["batch"] == WHOLE
        points = trends.get((row["field"], row["measure"], is_whole), {})
        until = markup.minute(row["at"]) if is_whole else row["batch"]
        trend = [points[label] for label in sorted(points) if label <= until]
        lines.append(Line(row, tuple(trend[-SHOWN_POINTS:])))
    return lines


# ------------------------------------------------------------------------------------------------ HTML


def table_page(table: str, rows: Sequence[Row]) -> str:
    """The page of a table."""
    audits = _audits(rows)
    at, newest = audits[-1]
    lines = _lines(rows)
    broken = [line for line in lines if line.row["is_passed"] is False]
    spec = lake.TABLES.get(table)
    body = [
        f'<p><a href="index.html">All tables</a></p><h1>{escape(table)}</h1>',
        f"<p>{escape(spec.doc)}.</p>" if spec else "",
        f"<p>{_badge(_state(newest))} at the audit of <time>{markup.minute(at)}</time> UTC, snapshot "
        f"<code>{newest[0]['snapshot_id']}</code>.</p>",
        _strip(audits),
        _refused(table),
        "<h2>What does not hold</h2>" + _measures(broken) if broken else "",
        "<h2>Declared</h2><p>Of all rows, by the table’s suite.</p>",
        _measures([line for line in lines if line.row["basis"] == DECLARED]),
        "<h2>Beside its history</h2>"
        "<p>Of the newest batch. A measure without bounds has too little history yet.</p>",
        _measures([line for line in lines if line.row["basis"] != DECLARED]),
    ]
    return markup.page(f"{table} – quality", "\n".join(body))


def index_page(summaries: Sequence[dict[str, Any]]) -> str:
    """The page over all tables."""
    order = {"failed": 0, "warned": 1, "passed": 2}
    cells = []
    for one in sorted(summaries, key=lambda one: (order[one["state"]], one["table"])):
        when = [(datetime.fromisoformat(at), state) for at, state in one["audits"]]
        cells.append(
            "<tr>"
            + markup.cell("Table", f'<a href="{escape(one["table"])}.html">{escape(one["table"])}</a>')
            + markup.cell("State", _badge(one["state"]))
            + markup.cell("Broken", f"{one['broken']:,}", "number")
            + markup.cell("Hold", f"{one['held']:,}", "number")
            + markup.cell("Audits, the newest last", _squares(when))
            + markup.cell("Newest (UTC)", markup.minute(datetime.fromisoformat(one["at"])))
            + "</tr>"
        )
    heads = ("Table", "State", "Broken", "Hold", "Audits, the newest last", "Newest (UTC)")
    body = f"""<h1>Quality</h1>
<p>What the newest audit of each table found. What is broken keeps what is built of the table from being served; what is
not as usual is only told.</p>
{markup.table("Tables", heads, cells)}"""
    return markup.page("Quality", body)


def _refused(table: str) -> str:
    topics = [topic for topic in CONTRACTS if table == f"raw.{topic.replace('-', '_')}"]
    if table == lake.RAW_DEAD_LETTERS.name:
        topics = list(CONTRACTS)
    said = [
        f"<p>Refused records: <code>tidemark dead-letters list --topic {topic}</code>; once a rule is mended: "
        f"<code>tidemark replay dead-letters {topic} --send</code>.</p>"
        for topic in topics
    ]
    return "".join(said)


def _measures(lines: Sequence[Line]) -> str:
    if not lines:
        return "<p>Nothing.</p>"
    cells = []
    for line in lines:
        row = line.row
        where = row["field"] or "the whole"
        measured = row["text"] if row["text"] is not None else plain(row["value"])
        cells.append(
            "<tr>"
            + markup.cell("Field", f"<code>{escape(where)}</code>")
            + markup.cell(
                "Measure", escape(f"{row['measure']}{'' if row['batch'] == WHOLE else ' on ' + row['batch']}")
            )
            + markup.cell("Found", escape(measured), "number")
            + markup.cell("Allowed", escape(_allowed(row)))
            + markup.cell("State", _mark(row))
            + markup.cell("Trend", _spark(line))
            + markup.cell("", escape(row["detail"] or ""))
            + "</tr>"
        )
    return markup.table("Measures", ("Field", "Measure", "Found", "Allowed", "State", "Trend", "What"), cells)


def _allowed(row: Row) -> str:
    if row["basis"] is None or row["kind"] == "types":
        return "–"
    least, most = row["least"], row["most"]
    if least is None:
        return f"≤ {plain(most)}"
    return f"≥ {plain(least)}" if most is None else f"{plain(least)} to {plain(most)}"


def _mark(row: Row) -> str:
    if row["is_passed"] is None:
        return "not judged"
    return "holds" if row["is_passed"] else _badge("failed" if row["is_blocking"] else "warned")


def _spark(line: Line) -> str:
    """The trend as a line, the bounds as a band, what did not hold as dots."""
    values = [point.value for point in line.trend]
    if len(values) < 2:
        return "–"
    bounds = [line.row[name] for name in ("least", "most") if line.row[name] is not None]
    low, high = min([*values, *bounds]), max([*values, *bounds])
    span = (high - low) or 1.0

    def y(value: float) -> float:
        return round(_HEIGHT - _PAD - (value - low) / span * (_HEIGHT - 2 * _PAD), 1)

    def x(place: int) -> float:
        return round(_PAD + place * (_WIDTH - 2 * _PAD) / (len(values) - 1), 1)

    band = ""
    if bounds:
        top, bottom = (
            y(end if given is None else given)
            for given, end in ((line.row["most"], high), (line.row["least"], low))
        )
        band = f'<rect class="band" x="0" y="{top}" width="{_WIDTH}" height="{max(1.0, round(bottom - top, 1))}"/>'
    path = " ".join(f"{x(place)},{y(value)}" for place, value in enumerate(values))
    dots = "".join(
        f'<circle class="bad" cx="{x(place)}" cy="{y(point.value)}" r="3"/>'
        for place, point in enumerate(line.trend)
        if point.is_passed is False
    )
    first, last = line.trend[0], line.trend[-1]
    said = f"{len(values)} values, from {plain(first.value)} ({first.label}) to {plain(last.value)} ({last.label})"
    return (
        f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}"><title>{escape(said)}</title>{band}<polyline points="{path}"/>{dots}</svg>'
    )


def _strip(audits: Sequence[tuple[datetime, list[Row]]]) -> str:
    shown = [(at, _state(rows)) for at, rows in audits[-SHOWN_AUDITS:]]
    return f"<p>The newest {len(shown)} audits: {_squares(shown)}</p>"


def _squares(states: Sequence[tuple[datetime, str]]) -> str:
    said = ", ".join(f"{markup.minute(at)} {_STATES[state]}" for at, state in states)
    marks = {"passed": "✓", "warned": "!", "failed": "×"}
    squares = "".join(
        f'<i class="{state}" title="{markup.minute(at)}">{marks[state]}</i>' for at, state in states
    )
    return f'<span class="strip" role="img" aria-label="{escape(said)}">{squares}</span>'


def _badge(state: str) -> str:
    return f'<strong class="badge {state}">{_STATES[state]}</strong>'
