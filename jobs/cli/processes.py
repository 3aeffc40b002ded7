"""Commands about processes and streams: `up`, `down`, `start`, `stop`, `status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import PROCESSES, Json, Names, app, load_settings

if TYPE_CHECKING:
    from jobs.processes import Process, Status
    from pipelines.settings import Settings


@app.command(rich_help_panel=PROCESSES)
def up(names: Names = None, as_json: Json = False) -> None:
    """Start broker, collector, ads, streams, serving and Dagster's web UI, in this order; Trino and `ads-db` by name.

    What runs already is left alone, so that `up` is also what to do after a crash.
    """
    from jobs import processes
    from pipelines import preflight

    settings = load_settings()
    preflight.check(settings)
    keeper, chosen = processes.supervisor(settings), processes.choose(processes.local(settings), names or [])
    chosen = chosen if names else processes.usual(chosen)
    started = processes.up(keeper, chosen, console.say)
    if as_json:
        console.emit_json({"started": started, "processes": _statuses(settings, chosen)})
        return
    console.say("all of it ran already" if not started else "up")
    _print_urls(settings, [process.name for process in chosen])
    _print_stopped_streams(settings)


@app.command(rich_help_panel=PROCESSES)
def down(names: Names = None, as_json: Json = False) -> None:
    """Stop what `up` or `demo` started, in the opposite order, with all that it started itself."""
    from jobs import processes

    settings = load_settings()
    chosen = processes.choose(processes.local(settings), names or [])
    stopped = processes.down(processes.supervisor(settings), chosen, console.say)
    if as_json:
        console.emit_json({"stopped": stopped})
    elif not stopped:
        console.say("nothing was running")


@app.command(rich_help_panel=PROCESSES)
def start(
    name: Annotated[str, typer.Argument(help="A process or a stream, as `status` lists them.")],
    as_json: Json = False,
) -> None:
    """Start one process, or one stream inside the streaming process."""
    _switch(name, True, as_json)


@app.command(rich_help_panel=PROCESSES)
def stop(
    name: Annotated[str, typer.Argument(help="A process or a stream, as `status` lists them.")],
    as_json: Json = False,
) -> None:
    """Stop one process, or one stream; a stream stays stopped, over restarts too, until it is started by name."""
    _switch(name, False, as_json)


def _switch(name: str, is_on: bool, as_json: bool) -> None:
    from jobs import controls, processes

    settings = load_settings()
    known = processes.local(settings)
    if name in [process.name for process in known]:
        keeper, chosen = processes.supervisor(settings), processes.choose(known, [name])
        names = (processes.up if is_on else processes.down)(keeper, chosen, console.say)
        _print_switched(name, is_on, bool(names), as_json)
        return
    board = controls.Controls(settings.paths.run)
    streams = list(board.status()) or _stream_names()
    if name not in streams:
        raise processes.ProcessError(
            f"there is no process or stream {name!r}",
            remedy=f"name one of {', '.join([*(process.name for process in known), *streams])}",
        )
    wanted = controls.RUNNING if is_on else controls.STOPPED
    changed = board.should_run(name) != is_on
    board.ask(name, wanted)
    if board.status() and not board.await_state(name, wanted):
        state = board.status().get(name, {})
        raise processes.ProcessError(
            f"{name} was asked to be {wanted}, and is {state.get('state', 'silent')}: {state.get('detail', '')}",
            where=str(settings.paths.logs / "streams.log"),
            remedy="it is tried again by itself; see `tidemark status`",
        )
    if not board.status():
        console.say("the streaming process does not run; it will keep to this when it starts")
    _print_switched(name, is_on, changed, as_json)


def _print_switched(name: str, is_on: bool, has_changed: bool, as_json: bool) -> None:
    state = "running" if is_on else "stopped"
    if as_json:
        console.emit_json({"name": name, "state": state, "changed": has_changed})
    else:
        console.say(f"{name} is {state}" + ("" if has_changed else ", as it was"))


def _stream_names() -> list[str]:
    from jobs.streams import stream_names

    return stream_names()


@app.command(rich_help_panel=PROCESSES)
def status(as_json: Json = False) -> None:
    """What runs, how the streams are doing, and what is served. Exit code 0 if every process is ready."""
    from jobs import controls, processes

    settings = load_settings()
    known = processes.local(settings)
    found = _statuses(settings, known)
    board = controls.Controls(settings.paths.run)
    streams, asked, addresses = board.status(), board.wanted(), urls(settings)
    for entry in controls.beside(settings.paths.run):
        of_entry = controls.Controls(settings.paths.run, entry.name).status()
        streams |= {f"{name} ({entry.name})": state for name, state in of_entry.items()}
    not_asked_for = {process.name for process in known if process.is_optional}
    is_ready = all(
        p["state"] == "ready" or (p["state"] == "stopped" and p["name"] in not_asked_for) for p in found
    )
    if as_json:
        console.emit_json(
            {
                "ready": is_ready,
                "processes": found,
                "streams": streams,
                "asked": asked,
                "addresses": addresses,
                "home": str(settings.home),
            }
        )
    else:
        columns = ("process", "state", "pid", "up for", "memory", "address", "what is missing")
        console.table(
            f"Processes of {settings.home}",
            columns,
            [
                (
                    p["name"],
                    p["state"],
                    str(p["pid"] or ""),
                    _ago(p["uptime_s"]),
                    _mb(p["rss_mb"]),
                    addresses.get(p["name"]) if p["pid"] else "",
                    p["detail"],
                )
                for p in found
            ],
        )
        if streams:
            console.table(
                "Streams",
                ("stream", "state", "epoch", "rows", "took ms", "detail"),
                [
                    (
                        name,
                        s["state"],
                        s.get("epoch"),
                        s.get("rows"),
                        s.get("duration_ms"),
                        s.get("detail", ""),
                    )
                    for name, s in streams.items()
                ],
            )
        _print_stopped_streams(settings)
    if not is_ready:
        raise typer.Exit(1)


def _statuses(settings: Settings, chosen: list[Process]) -> list[dict[str, Any]]:
    from jobs import processes

    keeper = processes.supervisor(settings)
    found: list[Status] = [keeper.status(process) for process in chosen]
    return [status._asdict() for status in found]


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _mb(megabytes: int | None) -> str:
    return f"{megabytes:,} MB" if megabytes else ""


def _print_urls(settings: Settings, names: list[str]) -> None:
    rows = [(name, url) for name, url in urls(settings).items() if name in names]
    if rows:
        console.table("Addresses", ("", ""), rows)


def urls(settings: Settings) -> dict[str, str]:
    """Where each process is found by a browser."""
    from pipelines import trino_server

    return {
        "serving": f"http://{settings.serving.host}:{settings.serving.port}/docs",
        "collector": f"http://{settings.collector.host}:{settings.collector.port}/docs",
        "ads": f"http://{settings.ads.host}:{settings.ads.port}/docs",
        "dagster": f"http://{settings.dagster.host}:{settings.dagster.port}",
        "trino": f"{trino_server.origin(settings)}/ui/",
    }


def _print_stopped_streams(settings: Settings) -> None:
    from jobs import controls

    for name, state in controls.Controls(settings.paths.run).wanted().items():
        if state == controls.STOPPED:
            console.say(f"{name} is stopped by request; `tidemark start {name}` starts it")
