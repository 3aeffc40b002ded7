"""The command line, `tidemark`.

Here: commands, their help, and what they print. What a command does is elsewhere, and is imported when the command
runs, so that help is quick. Errors are one text and exit code 1, wrong usage is exit code 2, and nothing is ever
answered with a stack trace (it is in the log `cli.log`, or on screen with TIDEMARK_DEBUG=1).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console

if TYPE_CHECKING:
    from jobs.build import BuildReport
    from jobs.processes import Process, Status
    from pipelines.indexing.versions import Pointer, Versions
    from pipelines.settings import Settings

app = typer.Typer(
    name="tidemark",
    help="A lakehouse for recommendations: history and live events become one fresh answer.",
    epilog="Start with `tidemark demo`. Settings: conf/local.yaml; TIDEMARK_HOME says where the data lies.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
query_app = typer.Typer(no_args_is_help=True, help="Ask the serving process, and print what it answers.")
letters_app = typer.Typer(no_args_is_help=True, help="Records that broke their contract, and why.")
app.add_typer(query_app, name="query", rich_help_panel="Answers")
app.add_typer(letters_app, name="dead-letters", rich_help_panel="Data")

PROCESSES, DATA, BASES, ANSWERS, TRYING = "Processes", "Data", "Bases", "Answers", "Trying it"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Processes; all of them by default.")]
Index = Annotated[str, typer.Argument(help="An index, as `tidemark versions` lists them.")]
K = Annotated[int, typer.Option("-k", min=1, max=1000, help="How many.")]
Category = Annotated[str | None, typer.Option(help="Only pins of this category.")]
After = Annotated[str | None, typer.Option("--min-position", help="Wait until the answer stands at this position.")]


def main() -> None:
    """The entry point: runs a command, and turns what goes wrong into one text and an exit code."""
    from pipelines.errors import TidemarkError

    as_json = "--json" in sys.argv[1:]
    try:
        app()
    except TidemarkError as error:
        console.show_error(error, as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - what is left of the output has no reader
        raise SystemExit(0) from None
    except Exception as error:  # noqa: BLE001 - a person gets a sentence; the trace goes to the log
        if os.environ.get("TIDEMARK_DEBUG"):
            raise
        console.show_error(error, as_json)
        _log_trace()
    else:
        return
    raise SystemExit(1)


def _settings() -> Settings:
    from pipelines import settings

    return settings.load()


def _log_trace() -> None:
    import contextlib
    import traceback

    with contextlib.suppress(Exception):
        log = _settings().paths.logs / "cli.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            out.write(f"$ {' '.join(sys.argv)}\n{traceback.format_exc()}\n")
        print(f"the whole trace is in {log}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ processes


@app.command(rich_help_panel=PROCESSES)
def up(names: Names = None, as_json: Json = False) -> None:
    """Start broker, collector, streams, serving and Dagster's web UI, in this order.

    What runs already is left alone, so that `up` is also what to do after a crash.
    """
    from jobs import processes
    from pipelines import preflight

    settings = _settings()
    preflight.check(settings)
    keeper, chosen = processes.supervisor(settings), processes.choose(processes.local(settings), names or [])
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

    settings = _settings()
    chosen = processes.choose(processes.local(settings), names or [])
    stopped = processes.down(processes.supervisor(settings), chosen, console.say)
    if as_json:
        console.emit_json({"stopped": stopped})
    elif not stopped:
        console.say("nothing was running")


@app.command(rich_help_panel=PROCESSES)
def start(name: Annotated[str, typer.Argument(help="A process or a stream, as `status` lists them.")], as_json: Json = False) -> None:
    """Start one process, or one stream inside the streaming process."""
    _switch(name, True, as_json)


@app.command(rich_help_panel=PROCESSES)
def stop(name: Annotated[str, typer.Argument(help="A process or a stream, as `status` lists them.")], as_json: Json = False) -> None:
    """Stop one process, or one stream; a stream stays stopped, over restarts too, until it is started by name."""
    _switch(name, False, as_json)


def _switch(name: str, is_on: bool, as_json: bool) -> None:
    from jobs import controls, processes

    settings = _settings()
    known = processes.local(settings)
    if name in [process.name for process in known]:
        keeper, chosen = processes.supervisor(settings), processes.choose(known, [name])
        changed = (processes.up if is_on else processes.down)(keeper, chosen, console.say)
        _print_switched(name, is_on, bool(changed), as_json)
        return
    streams = _stream_names()
    if name not in streams:
        raise processes.ProcessError(
            f"there is no process or stream {name!r}",
            remedy=f"name one of {', '.join([*(process.name for process in known), *streams])}",
        )
    board = controls.Controls(settings.paths.run)
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

    settings = _settings()
    found = _statuses(settings, processes.local(settings))
    board = controls.Controls(settings.paths.run)
    streams, asked = board.status(), board.wanted()
    is_ready = all(process["state"] == "ready" for process in found)
    if as_json:
        console.emit_json({"ready": is_ready, "processes": found, "streams": streams, "asked": asked, "home": str(settings.home)})
    else:
        columns = ("process", "state", "pid", "up for", "memory", "what is missing")
        console.table(
            f"Processes of {settings.home}",
            columns,
            [(p["name"], p["state"], str(p["pid"] or ""), _ago(p["uptime_s"]), _mb(p["rss_mb"]), p["detail"]) for p in found],
        )
        if streams:
            console.table(
                "Streams",
                ("stream", "state", "epoch", "rows", "took ms", "detail"),
                [
                    (name, s["state"], s.get("epoch"), s.get("rows"), s.get("duration_ms"), s.get("detail", ""))
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
    return {
        "serving": f"http://{settings.serving.host}:{settings.serving.port}/docs",
        "collector": f"http://{settings.collector.host}:{settings.collector.port}/docs",
        "dagster": f"http://{settings.dagster.host}:{settings.dagster.port}",
    }


def _print_stopped_streams(settings: Settings) -> None:
    from jobs import controls

    for name, state in controls.Controls(settings.paths.run).wanted().items():
        if state == controls.STOPPED:
            console.say(f"{name} is stopped by request; `tidemark start {name}` starts it")


# ------------------------------------------------------------------------------------------------ bases


@app.command(rich_help_panel=BASES)
def build(
    wait: Annotated[
        str | None, typer.Option(metavar="POSITION", help="Wait first until the archive has passed this position.")
    ] = None,
    index: Annotated[list[str] | None, typer.Option(help="Only this index (may be given again).")] = None,
    as_json: Json = False,
) -> None:
    """Build every base from what the archive has, check it, and publish it if it passes.

    Runs Dagster's assets in this process; Dagster's web UI shows the run. Streams and serving may run or not.
    """
    settings = _settings()
    report = run_build(settings, wait, index, "the build")
    if as_json:
        console.emit_json(report.to_json())
    else:
        console.table("Published", ("index", "version"), sorted(report.published.items()))
        print_accounts(report.accounts)
    if (problem := report.problem()) is not None:
        if as_json:
            raise typer.Exit(1)
        raise problem


def run_build(settings: Settings, wait: str | None, indices: list[str] | None, title: str) -> BuildReport:
    """A build with its steps shown as they go."""
    from jobs import build as builder
    from pipelines.indexing import position

    until = position.from_token(wait) if wait else None

    def show(step: builder.Step) -> None:
        took = f" ({step.seconds:.0f} s)" if step.seconds is not None else ""
        if step.state != "running" or sys.stderr.isatty():
            report(f"{step.name}: {step.state}{took}")

    with console.step(title) as report:
        return builder.build(settings, until, indices or None, report=show)


def print_accounts(accounts: dict[str, dict[str, Any]]) -> None:
    """The account of each raw table: what became of every row."""
    rows = []
    for name, account in sorted(accounts.items()):
        refused = account["refused"]
        by_reason = refused if isinstance(refused, dict) else {}
        count = sum(by_reason.values()) if isinstance(refused, dict) else refused
        fates = [account[fate] for fate in ("current", "superseded", "repeated", "tombstones")]
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in by_reason.items())
        rows.append((name, account["rows"], account["accepted"], *fates, count, reasons))
    if rows:
        columns = ("table", "rows", "accepted", "current", "superseded", "repeated", "tombstones", "refused", "why")
        console.table("The account: rows = accepted + refused", columns, rows)


@app.command(rich_help_panel=BASES)
def versions(
    index: Annotated[str | None, typer.Argument(help="An index; all of them by default.")] = None, as_json: Json = False
) -> None:
    """List the base versions of each index, and which one is served."""
    settings = _settings()
    found = {name: _version_rows(settings, name) for name in ([_known_index(index)] if index else _indices())}
    if as_json:
        console.emit_json(found)
        return
    for name, rows in found.items():
        console.table(
            f"Versions of {name}",
            ("version", "state", "built", "facts", "shards", "MB", "models"),
            [
                (r["version"], r["state"], r["built_at"][:19], r["facts"], r["shards"], r["bytes"] // 2**20, ", ".join(r["models"]))
                for r in rows
            ],
            "" if rows else "none yet: `tidemark build` makes one",
        )


def _indices() -> list[str]:
    from pipelines.indices import INDICES

    return list(INDICES)


def _known_index(name: str) -> str:
    from pipelines.indexing.versions import VersionError

    known = _indices()
    if name not in known:
        raise VersionError(f"there is no index {name!r}", remedy=f"name one of {', '.join(known)}")
    return name


def _versions_of(settings: Settings, index: str) -> Versions:
    from pipelines.indexing.versions import Versions

    return Versions(settings.paths.indices, _known_index(index))


def _version_rows(settings: Settings, index: str) -> list[dict[str, Any]]:
    versions = _versions_of(settings, index)
    pointer = versions.pointer()
    rows = []
    for manifest in versions.manifests():
        is_served = pointer is not None and pointer.version == manifest.version
        served = "served" if pointer is None or pointer.with_delta else "served, without the delta"
        rows.append(
            {
                "version": manifest.version,
                "state": served if is_served else "",
                "built_at": manifest.built_at,
                "facts": manifest.counts.get("identities"),
                "shards": len(manifest.shards),
                "bytes": sum(file.size_bytes for shard in manifest.shards for file in shard.files),
                "lineage": manifest.lineage,
                "models": sorted(set(manifest.models.values())),
                "cut": manifest.cut.token(),
            }
        )
    return rows


@app.command(rich_help_panel=BASES)
def publish(
    index: Index,
    version: Annotated[str, typer.Argument(help="A version that is newer than the one that is served.")],
    as_json: Json = False,
) -> None:
    """Serve a newer base that was built; returns when every local replica has swapped.

    It passes the same gate as a build's. Going back is `rollback`.
    """
    from jobs import moves

    _print_pointer(index, moves.publish(_settings(), _known_index(index), version, console.say), as_json)


@app.command(rich_help_panel=BASES)
def rollback(
    index: Index,
    to: Annotated[str | None, typer.Option("--to", metavar="VERSION", help="By default the one before the served one.")] = None,
    without_delta: Annotated[
        bool, typer.Option("--without-delta", help="Serve the base alone, until `publish` or `resume`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve an older base, with the delta since that base's own cut; returns when every local replica has swapped."""
    from jobs import moves

    pointer = moves.rollback(_settings(), _known_index(index), to, without_delta=without_delta, say=console.say)
    _print_pointer(index, pointer, as_json)


@app.command(rich_help_panel=BASES)
def resume(index: Index, as_json: Json = False) -> None:
    """Serve the delta again, after `rollback --without-delta`."""
    from jobs import moves

    _print_pointer(index, moves.resume(_settings(), _known_index(index), console.say), as_json)


def _print_pointer(index: str, pointer: Pointer, as_json: bool) -> None:
    if as_json:
        console.emit_json({"index": index, **pointer._asdict()})
    else:
        console.say(f"{index} serves {pointer.version}" + ("" if pointer.with_delta else ", without the delta"))
