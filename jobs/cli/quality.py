"""The command `quality`: what audits found, table by table or measure by measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import SEEING, InputError, Json, app, load_settings

if TYPE_CHECKING:
    from quality.history import Row


@app.command(rich_help_panel=SEEING)
def quality(
    table: Annotated[str | None, typer.Argument(help="Of this table, each measure.")] = None,
    write_pages: Annotated[
        bool, typer.Option("--pages", help="Write the pages anew from the table `ops.quality`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What the newest audit of each table found. Exit code 1 if something is broken that serving waits for."""
    from pipelines.settings import Settings
    from quality import history, pages

    settings: Settings = load_settings()
    if write_pages:
        console.say(f"written: {pages.renew_all(settings)}")
    tables = history.tables(settings)
    if table is not None and table not in tables:
        raise InputError(
            f"no audit of {table!r} is noted",
            remedy=f"`tidemark build` audits; there are {', '.join(tables) or 'none'}",
        )
    newest = {name: history.newest(history.noted(settings, name)) for name in ([table] if table else tables)}
    if as_json:
        console.emit_json({name: [_told(row) for row in rows] for name, rows in newest.items()})
    elif table is not None:
        console.table(
            table,
            ("batch", "field", "measure", "found", "least", "most", "holds", "what"),
            _measures(newest[table]),
        )
    else:
        console.table(
            "the newest audits",
            ("table", "at (UTC)", "hold", "broken", "what"),
            map(_summary, newest.values()),
        )
    if any(row["is_passed"] is False and row["is_blocking"] for rows in newest.values() for row in rows):
        raise typer.Exit(1)


def _summary(rows: list[Row]) -> tuple[Any, ...]:
    broken = [row for row in rows if row["is_passed"] is False]
    what = "; ".join(f"{row['field'] or row['batch']} {row['measure']}" for row in broken)
    held = sum(row["is_passed"] is True for row in rows)
    return rows[0]["table"], f"{rows[0]['at']:%Y-%m-%d %H:%M}", held, len(broken), what


def _measures(rows: list[Row]) -> list[tuple[Any, ...]]:
    shown = sorted(rows, key=lambda row: (row["is_passed"] is not False, row["basis"] is None))
    return [
        (
            row["batch"],
            row["field"],
            row["measure"],
            row["text"] if row["text"] is not None else row["value"],
            row["least"],
            row["most"],
            row["is_passed"],
            row["detail"],
        )
        for row in shown
    ]


def _told(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("table", "histogram")}
