"""The page `/reports/ads/`: what is to be seen of the ads account, drawn and in tables.

Belongs here: HTML of an `Account`. Does not belong here: what it says (`account`), and the frame of a page (`markup`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path

from pipelines import freshness
from pipelines.freshness import Minute
from pipelines.indexing.files import replace_text
from pipelines.indexing.freshness import SERVED
from pipelines.settings import Settings
from quality import markup
from quality.account import SHOWN_DAYS, SHOWN_HOURS, Account, Volume, collect, tell_prometheus
from quality.markup import cell, minute, table

FOLDER = "ads"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 960, 260, 64, 24
_TICKS_MS = (10, 100, 1_000, 10_000, 60_000, 600_000, 3_600_000, 86_400_000)
_DASHES = ("", "8 4", "2 4", "10 3 2 3", "1 3")
"""Stages are told apart by how their lines are drawn, not by colour alone."""


def report(settings: Settings) -> Account:
    """Collect the account as of now, write its page, and tell Prometheus of it."""
    found = collect(settings)
    write(settings, found)
    tell_prometheus(settings, found)
    return found


def write(settings: Settings, account: Account) -> Path:
    """Write the page; gives its file."""
    file = settings.paths.reports / FOLDER / "index.html"
    replace_text(file, page(account))
    return file


def page(account: Account) -> str:
    """The page's HTML."""
    body = [
        "<h1>The ads account</h1>",
        f"<p>As of <time>{minute(account.at)}</time> UTC.</p>",
        _alarms(account.alarms),
        f"<h2>Freshness by stage, the last {SHOWN_HOURS} hours</h2>",
        "<p>How long after its change 90 percent of each minute’s documents had come to a stage. "
        "By hour: of its worst minute.</p>",
        *[_stream(stream, minutes) for stream, minutes in account.live.items()],
        "" if account.live else "<p>No document became served.</p>",
        *[_backfill(stream, minutes) for stream, minutes in account.backfill.items()],
        f"<h2>Dropped messages, the last {SHOWN_DAYS} days</h2>",
        _dropped(account),
        "<h2>The served base</h2>",
        _base(account),
        _volumes(account.volumes),
        "<h2>Coverage of what a servable ad needs</h2>",
        _coverage(account.volumes),
    ]
    return markup.page("The ads account", "\n".join(body))


def _alarms(alarms: Sequence[str]) -> str:
    if not alarms:
        return '<p><strong class="badge passed">nothing is unusual</strong></p>'
    listed = "".join(f"<li>{escape(alarm)}</li>" for alarm in alarms)
    return f'<p><strong class="badge warned">not as usual</strong></p><ul>{listed}</ul>'


# ------------------------------------------------------------------------------------------------ freshness


def _stream(stream: str, minutes: Sequence[Minute]) -> str:
    share = freshness.within_pct(minutes)
    slowest = _seconds(minutes[-1].running_max_ms)
    documents = sum(one.documents for one in minutes)
    said = f"{documents:,} documents; {share} % of the minutes kept 60 s; the slowest {slowest}."
    return f"<h3><code>{escape(stream)}</code></h3><p>{said}</p>{_drawing(stream, minutes)}{_hours(stream, minutes)}"


def _backfill(stream: str, minutes: Sequence[Minute]) -> str:
    documents = sum(one.documents for one in minutes)
    slowest = _seconds(minutes[-1].running_max_ms)
    return f"<p>Backfill of <code>{escape(stream)}</code>: {documents:,} documents; the slowest after {slowest}.</p>"


def _drawing(stream: str, minutes: Sequence[Minute]) -> str:
    """A line for each stage over the minutes, on a logarithmic scale; the last value of each is named beside it."""
    stages = list(dict.fromkeys(stage for one in minutes for stage in one.stages))
    values = [max(10, one.stages[stage].p90_ms) for one in minutes for stage in one.stages]
    low, high = math.log(min(values) / 1.5), math.log(max(60_000, *values) * 1.5)
    begin, span = minutes[0].minute, max(minutes[-1].minute - minutes[0].minute, timedelta(minutes=1))

    def y(value_ms: float) -> float:
        return round((_HEIGHT - _BOTTOM) * (1 - (math.log(max(10.0, value_ms)) - low) / (high - low)), 1)

    def x(at: Minute) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - 120) * ((at.minute - begin) / span), 1)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 110}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text x="{_LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{_seconds(tick)}</text>'
        for tick in _TICKS_MS
        if low <= math.log(tick) <= high
    ]
    for at, anchor in ((minutes[0], "start"), (minutes[-1], "end"))[: len(minutes)]:
        parts.append(f'<text x="{x(at)}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{at.minute:%H:%M}</text>')
    lasts: list[float] = []
    for stage, dashes in zip(stages, _DASHES * len(stages), strict=False):
        points = [(x(one), y(one.stages[stage].p90_ms)) for one in minutes if stage in one.stages]
        line = " ".join(f"{at},{height}" for at, height in points)
        parts.append(f'<polyline points="{line}" stroke-dasharray="{dashes}"/>')
        parts.append(f'<circle cx="{points[-1][0]}" cy="{points[-1][1]}" r="2.5"/>')
        lasts.append(_apart(points[-1][1], lasts))
        parts.append(f'<text x="{points[-1][0] + 8}" y="{lasts[-1] + 4}">{escape(stage)}</text>')
    told = ", ".join(f"{name} {_seconds(minutes[-1].stages[name].p90_ms)}" for name in minutes[-1].stages)
    said = (
        f"{stream}: p90 by stage from {minute(begin)} to {minute(minutes[-1].minute)} UTC; at the end {told}"
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(stream)}; it scrolls sideways">'
        f'<svg class="chart" role="img" aria-label="{escape(said)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"<title>{escape(said)}</title>{''.join(parts)}</svg></div>"
    )


def _apart(height: float, others: Sequence[float]) -> float:
    """A height at which a name covers none of the others."""
    while any(abs(height - other) < 13 for other in others):
        height -= 13
    return height


def _hours(stream: str, minutes: Sequence[Minute]) -> str:
    """The same by hour, as numbers: of each stage the worst minute."""
    hours: dict[str, list[Minute]] = {}
    for one in minutes:
        hours.setdefault(f"{one.minute:%Y-%m-%d %H:00}", []).append(one)
    stages = list(dict.fromkeys(stage for one in minutes for stage in one.stages))
    heads = (
        "Hour (UTC)",
        "Documents",
        *(f"{stage} p90" for stage in stages),
        "Slowest",
        "Within 60 s",
    )
    rows = []
    for hour, found in reversed(hours.items()):
        p90s = [max((m.stages[s].p90_ms for m in found if s in m.stages), default=None) for s in stages]
        slowest = max((m.stages[SERVED].max_ms for m in found if SERVED in m.stages), default=None)
        values = [hour, f"{sum(m.documents for m in found):,}", *map(_seconds, p90s), _seconds(slowest)]
        rows.append(_row(heads, [*values, f"{freshness.within_pct(found)} %"]))
    return table(f"Freshness of {stream} by hour", heads, rows)


# ------------------------------------------------------------------------------------------------ the rest


def _dropped(account: Account) -> str:
    if not account.dropped:
        return "<p>None.</p>"
    heads = ("Day (UTC)", "Reason", "Messages")
    rows = [_row(heads, [f"{one.day}", one.reason, f"{one.messages:,}"]) for one in account.dropped]
    how = (
        "<p>Refused ones: <code>tidemark dead-letters list --topic ads-changes</code>; "
        "held ones: <code>tidemark ads held</code>.</p>"
    )
    return how + table("Dropped messages", heads, rows)


def _base(account: Account) -> str:
    if account.served is None or account.built_at is None:
        return "<p>No base is served yet.</p>"
    said = f"<code>{escape(account.served)}</code>, built {_ago(account.at - account.built_at)} ago"
    if account.cut_at is not None:
        said += f"; what it holds goes up to {_ago(account.at - account.cut_at)} ago"
    return f"<p>{said}. What changed since is in the delta.</p>"


def _volumes(volumes: Sequence[Volume]) -> str:
    if not volumes:
        return ""
    heads = ("Base", "Built (UTC)", "Documents", "Change", "Servable", "Change of servable")
    rows = []
    for before, now in zip([None, *volumes], volumes, strict=False):
        documents = _change(before.documents if before else None, now.documents)
        servable = _change(before.servable if before else None, now.servable)
        built_at = now.built_at[:16].replace("T", " ")
        counts = (f"{now.documents:,}", documents, f"{now.servable:,}", servable)
        rows.append(_row(heads, [now.version, built_at, *counts]))
    return table("Bases", heads, rows[::-1])


def _coverage(volumes: Sequence[Volume]) -> str:
    if not volumes or not volumes[-1].servable:
        return "<p>No ad is servable.</p>"
    heads = ("Field", "Servable ads that have it", "Share", "In the base before")
    now, before = volumes[-1], volumes[-2] if len(volumes) > 1 else None
    rows = []
    for field, count in now.covered.items():
        was = before.coverage_pct(field) if before else None
        share = f"{now.coverage_pct(field)} %"
        rows.append(_row(heads, [field, f"{count:,}", share, "–" if was is None else f"{was} %"]))
    return table("Coverage", heads, rows)


def _row(heads: Iterable[str], values: Iterable[str]) -> str:
    cells = zip(heads, values, strict=True)
    return f"<tr>{''.join(cell(head, escape(value), 'number') for head, value in cells)}</tr>"


def _change(before: int | None, now: int) -> str:
    if not before:
        return "–"
    return f"{100 * (now - before) / before:+.1f} %"


def _seconds(ms: int | None) -> str:
    if ms is None:
        return "–"
    for unit, name in ((3_600_000, "h"), (60_000, "min"), (1_000, "s")):
        if ms >= unit:
            return f"{ms / unit:.3g} {name}"
    return f"{ms} ms"


def _ago(passed: timedelta) -> str:
    return _seconds(max(0, round(passed / timedelta(milliseconds=1))))
