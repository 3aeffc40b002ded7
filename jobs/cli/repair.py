"""Commands that mend: `undo`, and `doctor`, which says what is to be mended."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import REPAIR, InputError, Json, app, load_settings

if TYPE_CHECKING:
    from jobs.moves import Return
    from pipelines.settings import Settings
    from pipelines.undo import Plan
    from quality.doctor import Finding


@app.command(rich_help_panel=REPAIR)
def undo(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TABLE]...",
            help="Tables (`raw.pin_updates`), namespaces (`curated`), or `index` and the names of indices.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="ISO 8601, UTC: 2024-03-01T10:00:00Z; or a tag, as daily-2024-03-01; or one table's snapshot.",
        ),
    ] = None,
    load: Annotated[
        str | None, typer.Option(metavar="LOAD_ID", help="The raw tables as they were before this load.")
    ] = None,
    redo: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take an undo of tables back; `--list` names them.")
    ] = None,
    is_listing: Annotated[
        bool, typer.Option("--list", help="The undos that can be taken back, and change nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Set tables, or what an index serves, back to a time: all of them or none.

    A raw table loses the loads that came later; Kafka's records come again. Then `tidemark build`.
    """
    settings = load_settings()
    names = what or []
    if sum([bool(names and to), load is not None, redo is not None, is_listing]) != 1 or (
        (load or redo or is_listing) and (names or to)
    ):
        raise InputError(
            "an undo needs what and when",
            remedy="give tables and --to TIME (or a tag), or --load LOAD_ID, or --redo NAME, or --list",
        )
    if is_listing:
        _list_undone(settings, as_json)
    elif names[:1] == ["index"]:
        _undo_indices(settings, names[1:], str(to), dry_run, as_json)
    else:
        _undo_tables(settings, names, to, load, redo, dry_run, as_json)


def _undo_tables(
    settings: Settings,
    names: list[str],
    to: str | None,
    load: str | None,
    redo: str | None,
    is_dry: bool,
    as_json: bool,
) -> None:
    from pipelines import undo as undoing

    if load is not None:
        planned = undoing.plan_load(settings, load)
    elif redo is not None:
        planned = undoing.plan_redo(settings, redo)
    else:
        planned = undoing.plan(settings, names, undoing.target(str(to)))
    if not as_json:
        _print_plan(planned)
    if not is_dry:
        undoing.carry_out(settings, planned)
    if as_json:
        console.emit_json({**planned.to_json(), "is_done": not is_dry})
    elif is_dry:
        console.say("nothing was changed: --dry-run")
    elif planned.changes:
        console.say(f"done; `tidemark undo --redo {planned.name}` takes it back")
        if any(not move.table.startswith("index.") for move in planned.changes):
            console.say("`tidemark build` makes bases of what the tables hold now")


def _print_plan(planned: Plan) -> None:
    rows = [
        (
            move.table,
            _shown_time(move.from_at_ms),
            _shown_time(move.to_at_ms),
            str(move.to_id) if move.to_id is not None else "before any snapshot",
            move.rows_before,
            move.rows_after,
            "" if move.is_change else "is there already",
        )
        for move in planned.moves
    ]
    columns = ("table", "now of", "back to", "snapshot", "rows now", "rows then", "")
    console.table("Undo", columns, rows)
    for load_id in planned.loads:
        console.say(f"the load {load_id} is undone, and can be loaded again")
    for part in planned.again:
        console.say(
            f"the archive reads {part.end - part.start:,} records again: {part.topic_id}/{part.partition}, "
            f"offsets {part.start} to {part.end - 1}"
        )


def _shown_time(ms: int | None) -> str | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def _list_undone(settings: Settings, as_json: bool) -> None:
    from pipelines import undo as undoing

    found = undoing.undone(settings)
    if as_json:
        console.emit_json({name: {t: str(at) for t, at in tables.items()} for name, tables in found.items()})
        return
    rows = [(name, ", ".join(tables)) for name, tables in found.items()]
    console.table("Undone", ("name", "tables"), rows, "" if rows else "nothing that could be taken back")


def _undo_indices(settings: Settings, names: list[str], to: str, is_dry: bool, as_json: bool) -> None:
    from jobs import moves
    from jobs.cli.bases import known_index
    from pipelines import undo as undoing
    from pipelines.indices import INDICES

    when = undoing.moment(to)
    planned = [moves.plan_return(settings, known_index(name), when) for name in names or INDICES]
    if not as_json:
        rows = [(back.index, back.served, back.version, _shown_change(back)) for back in planned]
        console.table("Undo", ("index", "serves", "served then", ""), rows)
    for back in planned if not is_dry else ():
        moves.carry_out(settings, back, console.say)
    if as_json:
        shown: list[dict[str, Any]] = [back._asdict() for back in planned]
        console.emit_json({"indices": shown, "is_done": not is_dry})
    elif is_dry:
        console.say("nothing was changed: --dry-run")


def _shown_change(back: Return) -> str:
    if not back.is_change:
        return "is served already"
    return "" if back.with_delta else "without the delta"


@app.command(rich_help_panel=REPAIR)
def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also every record by its contract, and every file's checksum.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Whether raw, curated, bases, delta and ops.epochs agree, and what to do where they do not.

    Nothing has to run, and nothing is changed. Exit code 1 if something is lost, doubled or broken.
    """
    from quality import doctor as doctoring

    findings = doctoring.examine(load_settings(), is_deep=deep)
    is_sick = any(finding.severity == doctoring.ERROR for finding in findings)
    if as_json:
        console.emit_json({"is_healthy": not is_sick, "findings": [f._asdict() for f in findings]})
    else:
        console.table("Doctor", ("check", "", "what"), [(f.check, f.severity, _shown(f)) for f in findings])
    if is_sick:
        raise typer.Exit(1)


def _shown(finding: Finding) -> str:
    text = f"{finding.where}: {finding.what}" if finding.where else finding.what
    return f"{text}\n→ {finding.remedy}" if finding.remedy else text
