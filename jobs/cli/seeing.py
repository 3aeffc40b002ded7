"""Commands that show what happens and what there is: `trace`, `logs` and `signals`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import SEEING, InputError, Json, app, load_settings

if TYPE_CHECKING:
    from jobs.evidence import Report

POLL_S = 0.5


@app.command(rich_help_panel=SEEING)
def trace(
    event: Annotated[
        str, typer.Argument(metavar="EVENT_ID", help="An event's id; for pin-updates, a pin's.")
    ],
    topic: Annotated[
        str, typer.Option(help="`user-interactions`, `pin-updates` or `user-follows`.")
    ] = "user-interactions",
    user: Annotated[str | None, typer.Option(help="Only this user's event: ids are a user's own.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Superseded statements, too: reads the whole raw table.")
    ] = False,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0, help="Wait until it can be read; exit code 1 if it cannot by then."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Where an event is: every stage from the collector to the answer with its time, or why it is not there yet.

    Works while streams, serving or the broker are down, and says what could not be asked.
    """
    from jobs import evidence
    from pipelines.contracts import contract_of

    settings, contract = load_settings(), contract_of(topic)
    deadline = time.monotonic() + (wait or 0)
    while True:
        try:
            report = evidence.look(settings, contract, event, user, everything=everything)
        except evidence.NoSuchEvent:
            if time.monotonic() >= deadline:
                raise
        else:
            if report.is_visible or time.monotonic() >= deadline:
                break
        time.sleep(POLL_S)
    if as_json:
        console.emit_json(report.to_json())
    else:
        _print_report(report)
    if wait is not None and not report.is_visible:
        raise typer.Exit(1)


def _print_report(report: Report) -> None:
    for one in report.traced:
        record = one.record
        whose = f" of user {record.identity[0]}" if len(record.identity) > 1 else ""
        what = (
            "refused"
            if record.refusal
            else f"version {record.version}{', a deletion' if record.is_deleted else ''}"
        )
        rows = [
            (
                f"{stage.stage} {stage.index}" if stage.index else stage.stage,
                stage.at_ms and _time(stage.at_ms),
                stage.lag_ms,
                stage.state,
                stage.detail,
            )
            for stage in one.stages
        ]
        said = "\n".join(f"{standing.family}: {standing.detail}" for standing in one.standing)
        title = f"{report.topic}, {report.id}{whose}: record {record.name} ({what})"
        console.table(title, ("stage", "time (UTC)", "+ms", "", "what"), rows, said)
    for answer in report.answers:
        found = f" {json.dumps(answer.found, ensure_ascii=False)}" if answer.found else ""
        print(f"serving now, {' / '.join(answer.identity)}: {answer.detail}{found}")
    for refused in report.refused_at_the_door:
        print(
            f"refused by the collector at {refused['time']}, request {refused['request_id']}: {refused['detail']}"
        )
    for note in report.notes:
        console.say(f"note: {note}")


def _time(time_ms: int) -> str:
    from jobs.trace import iso

    return iso(time_ms)


@app.command(rich_help_panel=SEEING)
def logs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[PROCESS]...", help="Whose; of all processes by default.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="From a time on (2026-01-31T12:00Z), or for as long as 30s, 15m, 2h, 1d."),
    ] = None,
    level: Annotated[str, typer.Option(help="From this level on: debug, info, warning, error.")] = "info",
    grep: Annotated[str | None, typer.Option(help="Only lines with this text in them.")] = None,
    trace_id: Annotated[
        str | None,
        typer.Option(
            "--trace", metavar="ID", help="Only about the records of this trace or request, in all processes."
        ),
    ] = None,
    lines: Annotated[int, typer.Option("-n", min=1, help="The newest so many.")] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as new ones come, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The JSON lines as they are.")] = False,
) -> None:
    """What the processes say, in order of time, for people."""
    from collections import deque

    from pipelines import logs as logging

    folder = load_settings().paths.logs
    known = sorted(
        {path.name.partition(".log")[0] for path in folder.glob("*.log*") if path.suffix != ".lock"}
    )
    for name in names or ():
        if name not in known:
            raise InputError(
                f"there is no log of {name!r}", where=str(folder), remedy=f"name one of {', '.join(known)}"
            )
    if level.upper() not in logging.LEVELS:
        raise InputError(
            f"there is no level {level!r}", remedy=f"use one of {', '.join(logging.LEVELS).lower()}"
        )
    wanted = _Wanted(logging.LEVELS.index(level.upper()), grep, _places(folder, known, trace_id), trace_id)
    files = {name: logging.files_of(folder, name) for name in names or known}
    begin = _since(since)
    ends = {
        name: (folder / f"{name}.log").stat().st_size for name in files if (folder / f"{name}.log").exists()
    }
    found = deque(
        (
            line
            for line in _merged(logging.read(paths, since=begin) for paths in files.values())
            if wanted.takes(line)
        ),
        maxlen=lines,
    )
    for line in found:
        _print_line(line, as_json)
    while follow:
        time.sleep(POLL_S)
        for name in files:
            ends[name] = _print_new(folder / f"{name}.log", ends.get(name, 0), wanted, as_json)


class _Wanted:
    """Which lines are shown."""

    def __init__(self, level: int, text: str | None, places: list[Any] | None, trace_id: str | None) -> None:
        self._level, self._text, self._places, self._trace_id = level, text, places, trace_id

    def takes(self, line: dict[str, Any]) -> bool:
        """Whether a line is shown."""
        from pipelines import logs as logging
        from pipelines import tracing

        said = line.get("level", "INFO")
        if said in logging.LEVELS and logging.LEVELS.index(said) < self._level:
            return False
        if self._text is not None and self._text not in logging.readable(line):
            return False
        if self._places is None:
            return True
        is_named = self._trace_id in (line.get("trace_id"), line.get("request_id"))
        return is_named or any(tracing.is_in(place, line.get("places")) for place in self._places)


def _places(folder: Path, known: list[str], trace_id: str | None) -> list[Any] | None:
    """The places of the records of a trace: what names them in the lines of all later stages."""
    from pipelines import logs as logging
    from pipelines.tracing import Place

    if trace_id is None:
        return None
    return [
        Place(topic_id, int(partition), offset)
        for name in known
        for line in logging.read(logging.files_of(folder, name), holding=trace_id)
        if trace_id in (line.get("trace_id"), line.get("request_id"))
        for topic_id, partitions in (line.get("places") or {}).items()
        for partition, ranges in partitions.items()
        for start, end in ranges
        for offset in range(start, end)
    ]


def _merged(logs: Iterable[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    import heapq

    return heapq.merge(*logs, key=lambda line: str(line.get("time", "")))


def _print_line(line: dict[str, Any], as_json: bool) -> None:
    from pipelines import logs as logging

    print(json.dumps(line) if as_json else f"{line.get('process', '')} {logging.readable(line)}", flush=True)


def _print_new(path: Path, end: int, wanted: _Wanted, as_json: bool) -> int:
    """Print the lines after a place of a file; gives the new end. A file that was rotated begins again."""
    from pipelines import logs as logging

    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < end:
                end = 0
            file.seek(end)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                end += len(raw)
                if (line := logging.parse(raw)) and wanted.takes(line):
                    _print_line(line, as_json)
    except FileNotFoundError:
        return 0
    return end


def _since(text: str | None) -> datetime | None:
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    if text[:-1].isdigit() and text[-1] in units:
        return datetime.now(UTC) - timedelta(seconds=int(text[:-1]) * units[text[-1]])
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{text!r} is no time", remedy="give 30s, 15m, 2h, 1d, or 2026-01-31T12:00Z"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


@app.command(rich_help_panel=SEEING)
def signals(
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default the one that serving shows.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the catalogue of all signals: each field of each table and index, where it comes from, who uses it.

    One page that needs no server, and signals.json. From the specifications and the code, with coverage and freshness
    of what the lake holds.
    """
    from pipelines.spark import session
    from quality.signals import catalogue, page

    settings = load_settings()
    with console.step("signals", settings.paths.logs / "signals.log") as report:
        report("starting Spark")
        spark = session(settings, "tidemark signals")
        try:
            report("reading specifications and plans")
            found = catalogue.collect(settings, spark)
        finally:
            spark.stop()
    folder = out or settings.paths.reports / "signals"
    path = page.write(found, folder)
    fields = sum(len(dataset.fields) for dataset in found.datasets)
    if as_json:
        console.emit_json({"page": str(path), "datasets": len(found.datasets), "fields": fields})
        return
    console.say(f"{fields} fields of {len(found.datasets)} datasets: {path}")
    if out is None:
        serving = settings.serving
        console.say(f"with serving up: http://{serving.host}:{serving.port}/reports/signals/")
