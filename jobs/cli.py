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
from pipelines.errors import TidemarkError

if TYPE_CHECKING:
    from jobs.build import BuildReport
    from jobs.processes import Process, Status
    from pipelines.indexing.versions import Pointer, Versions
    from pipelines.ingest.load import LoadResult
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
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Processes; all of them by default.")
]
Index = Annotated[str, typer.Argument(help="An index, as `tidemark versions` lists them.")]
K = Annotated[int, typer.Option("-k", min=1, max=1000, help="How many.")]
Category = Annotated[str | None, typer.Option(help="Only pins of this category.")]
After = Annotated[
    str | None, typer.Option("--min-position", help="Wait until the answer stands at this position.")
]


class InputError(TidemarkError):
    """What was given on the command line cannot be used."""


def main() -> None:
    """The entry point: runs a command, and turns what goes wrong into one text and an exit code."""
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
    except Exception as error:  # a person gets a sentence; the trace goes to the log
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

    settings = _settings()
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

    settings = _settings()
    found = _statuses(settings, processes.local(settings))
    board = controls.Controls(settings.paths.run)
    streams, asked, addresses = board.status(), board.wanted(), urls(settings)
    is_ready = all(process["state"] == "ready" for process in found)
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
        str | None,
        typer.Option(metavar="POSITION", help="Wait first until the archive has passed this position."),
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
    is_watched = sys.stderr.isatty()

    def show(step: builder.Step) -> None:
        took = f" ({step.seconds:.0f} s)" if step.seconds is not None else ""
        if step.state != "running" or is_watched:
            report(f"{step.name}: {step.state}{took}")

    with console.step(title, settings.paths.logs / "build.log") as report:
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
        columns = (
            "table",
            "rows",
            "accepted",
            "current",
            "superseded",
            "repeated",
            "tombstones",
            "refused",
            "why",
        )
        console.table("The account: rows = accepted + refused", columns, rows)


@app.command(rich_help_panel=BASES)
def versions(
    index: Annotated[str | None, typer.Argument(help="An index; all of them by default.")] = None,
    as_json: Json = False,
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
                (
                    r["version"],
                    r["state"],
                    r["built_at"][:19],
                    r["facts"],
                    r["shards"],
                    r["bytes"] // 2**20,
                    ", ".join(r["models"]),
                )
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
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="By default the one before the served one.")
    ] = None,
    without_delta: Annotated[
        bool, typer.Option("--without-delta", help="Serve the base alone, until `publish` or `resume`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve an older base, with the delta since that base's own cut; returns when every local replica has swapped."""
    from jobs import moves

    pointer = moves.rollback(
        _settings(), _known_index(index), to, without_delta=without_delta, say=console.say
    )
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
        console.say(
            f"{index} serves {pointer.version}" + ("" if pointer.with_delta else ", without the delta")
        )


# ------------------------------------------------------------------------------------------------ answers


def _ask(path: str, params: dict[str, Any] | None = None, body: Any = None) -> Any:
    from jobs import client

    settings = _settings()
    return client.request_at(f"http://{settings.serving.host}:{settings.serving.port}", path, params, body)


def _stands_on(answer: Any) -> str:
    headers = answer.headers
    stale = "; it is stale" if "true" in headers.get("tidemark-stale", "") else ""
    return f"stands on {headers.get('tidemark-base-version')}, position {headers.get('tidemark-position')}{stale}"


def _with_headers(answer: Any) -> dict[str, Any]:
    named = {
        name: answer.headers.get(f"tidemark-{name.replace('_', '-')}")
        for name in ("base_version", "position", "stale")
    }
    return {**answer.body, "stands_on": named}


@query_app.command()
def recommendations(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    k: K = 10,
    category: Category = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """What to recommend to a user, by all that is known up to this second."""
    from jobs import client

    path = f"/v1/users/{client.quote(user)}/recommendations"
    answer = _ask(path, {"k": k, "category": category, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    basis = answer.body["basis"]
    how = {"folded": f"from {basis['events_used']} events", "popular": "no history: what is popular"}
    _print_items(
        f"For user {user} ({how.get(basis['kind'], basis['kind'])})", answer.body["recommendations"], answer
    )


@query_app.command()
def similar(
    pin: Annotated[str, typer.Argument(help="A pin's id.")],
    k: K = 10,
    category: Category = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """Pins like a pin."""
    from jobs import client

    path = f"/v1/pins/{client.quote(pin)}/similar"
    answer = _ask(path, {"k": k, "category": category, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
    else:
        _print_items(f"Like pin {pin} (by {answer.body['basis']['kind']})", answer.body["similar"], answer)


def _print_items(title: str, items: list[dict[str, Any]], answer: Any) -> None:
    columns = ("", "pin", "score", "title", "category", "price")
    rows = [
        (
            place,
            item["pin_id"],
            round(item["score"], 5),
            item["catalogue"]["title"],
            item["catalogue"]["category"],
            _price(item),
        )
        for place, item in enumerate(items, 1)
    ]
    console.table(title, columns, rows, _stands_on(answer))


def _price(document: dict[str, Any]) -> str:
    offer = document.get("offer")
    if not offer or offer.get("price_usd_micros") is None:
        return ""
    return f"${offer['price_usd_micros'] / 1e6:,.2f}" + ("" if offer.get("is_available") else " (sold out)")


@query_app.command()
def events(
    user: Annotated[str, typer.Argument(help="A user's id.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest.")] = 20,
    cursor: Annotated[
        str | None, typer.Option(help="Where a page before said that the next one begins.")
    ] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """A user's events, the newest first."""
    from jobs import client

    path = f"/v1/users/{client.quote(user)}/events"
    answer = _ask(path, {"limit": limit, "cursor": cursor, "min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    rows = [
        (e["event_time"], e["action"], e["pin_id"], e["quantity"], _value(e), e["event_id"])
        for e in answer.body["events"]
    ]
    more = f"\nmore: --cursor {answer.body['next_cursor']}" if answer.body.get("next_cursor") else ""
    columns = ("time (UTC)", "action", "pin", "quantity", "value", "event")
    console.table(f"Events of user {user}", columns, rows, _stands_on(answer) + more)


def _value(event: dict[str, Any]) -> str:
    micros = event.get("value_usd_micros")
    return "" if micros is None else f"${micros / 1e6:,.2f}"


@query_app.command()
def pin(
    pin: Annotated[str, typer.Argument(help="A pin's id.")], min_position: After = None, as_json: Json = False
) -> None:
    """What a pin is, and what it costs."""
    from jobs import client

    answer = _ask(f"/v1/pins/{client.quote(pin)}", {"min_position": min_position})
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    shown = {**answer.body["catalogue"], "price": _price(answer.body)}
    console.facts(f"Pin {pin}", shown, _stands_on(answer))


@query_app.command()
def counts(
    pin: Annotated[str, typer.Argument(help="A pin's id.")],
    from_ms: Annotated[
        int | None, typer.Option(min=0, help="Hours from this time on, in ms since 1970.")
    ] = None,
    to_ms: Annotated[int | None, typer.Option(min=0, help="Hours that begin before this time.")] = None,
    min_position: After = None,
    as_json: Json = False,
) -> None:
    """How often a pin was acted on, by action and hour."""
    from jobs import client

    params = {"from_ms": from_ms, "to_ms": to_ms, "min_position": min_position}
    answer = _ask(f"/v1/pins/{client.quote(pin)}/counts", params)
    if as_json:
        console.emit_json(_with_headers(answer))
        return
    totals, hours = answer.body["totals"], answer.body["hours"]
    rows = [
        ("in all", *totals.values()),
        *((h["start_time"], *(h[name] for name in totals)) for h in hours[-24:]),
    ]
    console.table(
        f"Counts of pin {pin} (the last {min(24, len(hours))} of {len(hours)} hours)",
        ("hour (UTC)", *totals),
        rows,
        _stands_on(answer),
    )


@app.command(rich_help_panel=ANSWERS)
def indices(as_json: Json = False) -> None:
    """What the serving process stands on: base, cut, overlay and staleness of each index."""
    answer = _ask("/v1/indices")
    if as_json:
        console.emit_json(answer.body)
        return
    rows = [
        (
            s["index"],
            s["base_version"],
            s["overlay_facts"],
            s["last_epoch"],
            s["is_stale"],
            s["is_ready"],
            s["error"],
        )
        for s in answer.body["indices"]
    ]
    columns = ("index", "base version", "overlay facts", "last epoch", "stale", "ready", "error")
    console.table("Indices", columns, rows)


# ------------------------------------------------------------------------------------------------ data


@app.command(rich_help_panel=DATA)
def load(
    source: Annotated[
        str, typer.Argument(help="`complete-journey` (the real input), or a Parquet file or folder.")
    ],
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic",
            "--contract",
            help="For Parquet: the topic whose contract its columns keep, as `user-interactions`.",
        ),
    ] = None,
    load_id: Annotated[
        str | None, typer.Option(help="Names the load for good; by default made from the content.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="For `complete-journey`: the share of its households.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Load history into the raw tables, once: doing it again changes nothing. It is served from the next base on."""
    settings = _settings()
    results, extra = run_load(settings, source, topic, load_id, fraction)
    if as_json:
        console.emit_json({"loads": [result.to_json() for result in results], **extra})
        return
    rows = []
    for r in results:
        why = ", ".join(f"{reason} {count:,}" for reason, count in r.refused.items())
        rows.append(
            (
                r.table,
                r.rows,
                r.accepted,
                r.rows - r.accepted,
                why,
                "already there" if r.is_repeat else f"{r.seconds:.0f} s",
            )
        )
    console.table("Loaded", ("table", "rows", "accepted", "refused", "why", "took"), rows)
    for result in results:
        for warning in result.warnings:
            console.say(f"note: {warning}")
    console.say("`tidemark build` makes a base of it")


def run_load(
    settings: Settings, source: str, topic: str | None, load_id: str | None, fraction: float
) -> tuple[list[LoadResult], dict[str, Any]]:
    """A load with its progress shown: of the real input, or of Parquet."""
    from pipelines.contracts import contract_of
    from pipelines.ingest import complete_journey
    from pipelines.ingest import load as loader

    is_journey = source in (complete_journey.NAME, complete_journey.NAME.replace("-", "_"))
    if not is_journey:
        loader.parquet_files(source)
        if topic is None:
            raise loader.LoadError(
                "a Parquet file needs a contract",
                where=source,
                remedy="add --topic user-interactions or pin-updates",
            )
    chosen = contract_of(topic) if topic is not None else None
    with console.step(f"loading {source}", settings.paths.logs / "load.log") as report:
        report("starting Spark")
        from pipelines.spark import session

        spark = session(settings, "tidemark load")
        try:
            if is_journey:
                report("purchases, products and households")
                loaded = complete_journey.load_all(spark, settings, fraction)
                return [loaded.interactions, loaded.pins], {"households": loaded.households}
            assert chosen is not None
            return [loader.load_parquet(spark, settings, chosen, source, load_id)], {}
        finally:
            spark.stop()


@app.command(rich_help_panel=DATA)
def send(
    records: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JSON]...", help="Records; `-` or none: one a line from standard input."),
    ] = None,
    topic: Annotated[str, typer.Option(help="`user-interactions` or `pin-updates`.")] = "user-interactions",
    file: Annotated[Path | None, typer.Option(help="A file with one record a line, or a JSON array.")] = None,
    fill: Annotated[
        bool, typer.Option("--fill", help="Give events without event_id or event_time new ones.")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Send the bytes as they are; a bad one becomes a dead letter.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send records to Kafka, and print the position that covers them once the broker has them all.

    Give that position to `query … --min-position`, or to `build --wait`.
    """
    from pipelines.contracts import contract_of
    from pipelines.ingest.producer import Producer

    settings, contract = _settings(), contract_of(topic)
    lines = read_records(records or [], file)
    with Producer(settings) as producer:
        if unchecked:
            from pipelines.indexing.position import merge_all

            sent = producer.send(contract.topic, [(None, line.encode()) for line in lines])
            position = merge_all(delivery.position for delivery in sent)
        else:
            objects = [parse_record(line, number) for number, line in enumerate(lines, 1)]
            position = producer.send_objects(contract, [filled(one) for one in objects] if fill else objects)
    if as_json:
        console.emit_json({"sent": len(lines), "topic": contract.topic, "position": position.token()})
    else:
        console.say(f"{len(lines)} sent to {contract.topic}; the position is")
        print(position.token())


def read_records(arguments: list[str], file: Path | None) -> list[str]:
    """Records as JSON texts: those of the command line, of a file, or of standard input.

    Raises:
        InputError: there are none, or the file cannot be read.
    """
    import json

    found = [text for text in arguments if text != "-"]
    if file is not None:
        try:
            content = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot read the records: {error}", where=str(file), remedy="give another file"
            ) from None
        if content.lstrip().startswith("["):
            try:
                found += [json.dumps(one) for one in json.loads(content)]
            except ValueError as error:
                raise InputError(
                    f"not a JSON array: {error}", where=str(file), remedy="mend the file"
                ) from None
        else:
            found += [line for line in content.splitlines() if line.strip()]
    if "-" in arguments or (not arguments and file is None):
        found += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not found:
        raise InputError(
            "there is nothing to send",
            remedy="give records as arguments, with --file, or one a line on standard input",
        )
    return found


def parse_record(line: str, number: int) -> dict[str, Any]:
    """One record's object."""
    import json

    try:
        one = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"record {number} is not JSON: {error}", where=line[:80], remedy="mend it; nothing was sent"
        ) from None
    if not isinstance(one, dict):
        raise InputError(
            f"record {number} is not a JSON object", where=line[:80], remedy="mend it; nothing was sent"
        )
    return one


def filled(event: dict[str, Any]) -> dict[str, Any]:
    """An event with an id and a time."""
    import uuid
    from datetime import UTC, datetime

    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"event_id": uuid.uuid4().hex, "event_time": now, **event}


@letters_app.command("list")
def list_letters(
    topic: Annotated[str | None, typer.Option(help="Only of this topic.")] = None,
    reason: Annotated[str | None, typer.Option(help="Only for this reason.")] = None,
    load_id: Annotated[str | None, typer.Option(help="Only of this load.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """How many records were refused and why, and the newest of them."""
    from pipelines.ingest import dead_letters

    settings = _settings()
    letters = dead_letters.listed(settings, topic=topic, reason=reason, load_id=load_id, limit=limit)
    totals = dead_letters.counted(settings, topic=topic, load_id=load_id)
    if as_json:
        counts = [{"topic": name, "reason": why, "count": count} for (name, why), count in totals.items()]
        console.emit_json({"counts": counts, "letters": [letter.to_json() for letter in letters]})
        return
    console.table(
        "Refused", ("topic", "reason", "records"), [(*names, count) for names, count in totals.items()]
    )
    if letters:
        rows = [
            (letter.place, str(letter.broker_time)[:19], letter.reason, letter.detail) for letter in letters
        ]
        note = "`tidemark dead-letters explain PLACE` shows one with its bytes"
        console.table("The newest", ("place", "taken", "reason", "detail"), rows, note)


@letters_app.command("explain")
def explain_letter(
    place: Annotated[
        str, typer.Argument(help="topic/partition/offset or topic/load/row, as `list` shows it.")
    ],
    as_json: Json = False,
) -> None:
    """One refused record: why, what it holds, and what its contract says of it now."""
    from pipelines.ingest import dead_letters

    found = dead_letters.explain(_settings(), place)
    if as_json:
        console.emit_json(found.to_json())
        return
    letter = found.letter
    now = "it would be accepted" if found.now is None else f"{found.now.reason}: {found.now.detail}"
    shown = {
        "taken": str(letter.broker_time),
        "reason": f"{letter.reason}: {found.meaning}",
        "detail": letter.detail,
        "by today's contract": now,
        "key": dead_letters.readable(letter.key),
        "value": found.text,
        "first bytes": found.hex,
    }
    console.facts(f"Dead letter {place}", shown)


@app.command(rich_help_panel=DATA)
def account(as_json: Json = False) -> None:
    """What became of every row: rows in `raw` = accepted + refused, as of the newest build."""
    settings = _settings()
    found = read_accounts(settings)
    if as_json:
        console.emit_json(found)
    elif found:
        print_accounts(found)
    else:
        console.say("no account yet: `tidemark build` makes it")


def read_accounts(settings: Settings) -> dict[str, dict[str, Any]]:
    """The newest account of each raw table, from `ops.account`."""
    import json

    from pipelines import lake

    table = lake.open_table(settings, lake.OPS_ACCOUNT.name)
    rows = table.scan().to_arrow().to_pylist() if table is not None else []
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({row["table"] for row in rows}):
        places = {snapshot.id: place for place, snapshot in enumerate(lake.ancestors(settings, name))}
        known = [row for row in rows if row["table"] == name and row["snapshot_id"] in places]
        if known:
            newest = min(known, key=lambda row: places[row["snapshot_id"]])
            found[name] = {**newest, "refused": json.loads(newest["refused_by_reason"])}
    return found


# ------------------------------------------------------------------------------------------------ trying it


@app.command(rich_help_panel=TRYING)
def demo(
    once: Annotated[
        bool, typer.Option("--once", help="Exit after the check: 0 only if everything holds.")
    ] = False,
    fraction: Annotated[
        float, typer.Option(min=0.01, max=1, help="A share of the households, for a quicker look.")
    ] = 1.0,
) -> None:
    """Real purchases to a served answer, then one live purchase that changes it within seconds."""
    from jobs import demo as show

    raise typer.Exit(show.run(_settings(), once, fraction))


@app.command(
    rich_help_panel=TRYING, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`freshness`, `serving` or `build`.")],
    as_json: Json = False,
) -> None:
    """Run a benchmark on a home of its own; the last line that it prints is its result as JSON.

    `bench NAME --help` has its options.
    """
    import importlib

    from pipelines.settings import ROOT

    known = sorted(
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("__init__", "harness")
    )
    if name not in known:
        raise InputError(f"there is no benchmark {name!r}", remedy=f"choose one of {', '.join(known)}")
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"benchmarks.{name}")
    raise typer.Exit(module.main(context.args))


if __name__ == "__main__":
    main()
