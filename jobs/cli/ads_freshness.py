"""The commands `ads freshness` and `ads report`: how fresh the account is served, and all else that is to be seen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.ads import ads_app
from jobs.cli.shared import Json, load_settings

if TYPE_CHECKING:
    from pipelines.freshness import Minute

INDEX = "ads"


@ads_app.command("freshness")
def freshness(
    hours: Annotated[float, typer.Option(min=0.01, help="So far back.")] = 1.0,
    backfill: Annotated[bool, typer.Option("--backfill", help="Of what was let wait, instead.")] = False,
    as_json: Json = False,
) -> None:
    """How long after its change each minute's documents were served, and what share of the minutes kept a minute.

    A minute keeps it if 90 percent of the documents that it served first were no later than 60 seconds.
    """
    from pipelines import freshness as minutes
    from pipelines.indexing.freshness import BACKFILL, LIVE

    settings = load_settings()
    since = datetime.now(UTC) - timedelta(hours=hours)
    kind = BACKFILL if backfill else LIVE
    streams = minutes.by_stream(minutes.noted(settings, INDEX, since), kind)
    within = minutes.within_pct(minute for found in streams.values() for minute in found)
    if as_json:
        told = {stream: _told(found, minutes.within_pct(found)) for stream, found in streams.items()}
        console.emit_json(
            {
                "index": INDEX,
                "kind": kind,
                "since": since.isoformat(),
                "minutes_within_60s_pct": within,
                "streams": told,
            }
        )
        return
    if not streams:
        console.say(f"no minute is noted since {since:%Y-%m-%d %H:%M} UTC; one is when it is over")
    for stream, found in streams.items():
        note = f"minutes_within_60s_pct {minutes.within_pct(found)}; times in ms after the change"
        stages = list(dict.fromkeys(stage for minute in found for stage in minute.stages))
        heads = ("minute (UTC)", "documents", *(f"{stage} p90" for stage in stages), "p99", "max", "so far")
        console.table(f"{stream}, {kind}", heads, [_line(minute, stages) for minute in found], note)


@ads_app.command("report")
def report(as_json: Json = False) -> None:
    """Write the page /reports/ads/ and var/metrics/ads.prom anew; exit code 1 if something is not as usual.

    Freshness by stage, dropped messages by reason and day, the age of the served base, its volume, and how many of the
    servable ads have what they need. Each build does the same.
    """
    from quality import account_page

    settings = load_settings()
    found = account_page.report(settings)
    page = settings.paths.reports / account_page.FOLDER / "index.html"
    if as_json:
        console.emit_json({"page": str(page), "alarms": list(found.alarms)})
    else:
        console.say(f"written: {page}")
        for alarm in found.alarms:
            console.say(alarm)
    if found.alarms:
        raise typer.Exit(1)


def _line(minute: Minute, stages: list[str]) -> tuple[Any, ...]:
    p90s = [minute.stages[stage].p90_ms if stage in minute.stages else None for stage in stages]
    served = minute.stages.get("served")
    last = (served.p99_ms, served.max_ms) if served else (None, None)
    return f"{minute.minute:%Y-%m-%d %H:%M}", minute.documents, *p90s, *last, minute.running_max_ms


def _told(found: list[Minute], within: float | None) -> dict[str, Any]:
    return {
        "minutes_within_60s_pct": within,
        "max_ms": found[-1].running_max_ms,
        "minutes": [
            {
                "minute": minute.minute.isoformat(),
                "documents": minute.documents,
                "running_max_ms": minute.running_max_ms,
                "stages": {stage: ages._asdict() for stage, ages in minute.stages.items()},
            }
            for minute in found
        ],
    }
