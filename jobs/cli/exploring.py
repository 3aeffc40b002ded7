"""The commands that look into the lake: `sql`, for one statement, for a file of them, or as a prompt; `notebooks`."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import SEEING, InputError, Json, app, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.settings import Settings
    from pipelines.sql import Answer

SHOWN_ROWS = 1000
HISTORY = "sql_history"
_WORD = re.compile(r"[\w.\"]+")


@app.command(rich_help_panel=SEEING)
def sql(
    statement: Annotated[
        str | None, typer.Argument(help="A statement; without one, standard input or a prompt.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with a header.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    limit: Annotated[
        int, typer.Option(min=1, help="How many rows a table shows; CSV and JSON have all.")
    ] = SHOWN_ROWS,
) -> None:
    """Ask Trino about the lake: `tidemark up trino` starts one.

    Tables are `raw.…`, `curated.…`, `features.…`, `index.…`, `ops.…`; `explore.…` has views for common questions.
    """
    settings = load_settings()
    if as_csv and as_json:
        raise InputError("an answer has one format", remedy="give --csv or --json, not both")
    show = _as_csv if as_csv else _as_json if as_json else lambda answer: _as_table(answer, limit)
    if statement is not None:
        statements = split(statement)
        if not statements:
            raise InputError("the statement is empty", remedy="give one, as `tidemark sql 'SHOW SCHEMAS'`")
        for one in statements:
            _run(settings, one, show)
    elif sys.stdin.isatty():
        _prompt(settings, show)
    else:
        for one in split(sys.stdin.read()):
            _run(settings, one, show)


def split(text: str) -> list[str]:
    """The statements of a text, without their semicolons and without those that are only comments."""
    import sqlparse

    found = (one.strip().rstrip(";").rstrip() for one in sqlparse.split(text))
    return [one for one in found if sqlparse.format(one, strip_comments=True).strip("; \n")]


def _run(settings: Settings, statement: str, show: Callable[[Answer], None]) -> None:
    from pipelines import sql as asking

    try:
        with asking.answering(settings, statement) as answer:
            show(answer)
    except asking.SqlError as error:
        if excerpt := asking.excerpt(statement, error):
            console.say(excerpt)
        raise


# ------------------------------------------------------------------------------------------------ formats


def _as_table(answer: Answer, limit: int) -> None:
    rows = list(itertools.islice(answer.rows, limit + 1))
    if not answer.columns:
        console.say("done")
        return
    note = (
        f"the first {limit:,} rows; --limit shows more, --csv all"
        if len(rows) > limit
        else f"{len(rows):,} row{'s' * (len(rows) != 1)}"
    )
    shown = [tuple(cell(value) for value in row) for row in rows[:limit]]
    console.table("", [column.name for column in answer.columns], shown, note)


def _as_csv(answer: Answer) -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow([column.name for column in answer.columns])
    out.writerows([cell(value) for value in row] for row in answer.rows)


def _as_json(answer: Answer) -> None:
    names = _distinct(column.name for column in answer.columns)
    rows = [{name: plain(value) for name, value in zip(names, row, strict=True)} for row in answer.rows]
    columns = [
        {"name": name, "type": column.type} for name, column in zip(names, answer.columns, strict=True)
    ]
    console.emit_json({"columns": columns, "rows": rows, "query_id": answer.query_id})


def _distinct(names: Iterable[str]) -> list[str]:
    """An object has each name once: what comes again gets a number."""
    found: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{n}" for n in itertools.count(2))
        found[next(one for one in itertools.chain([name], numbered) if one not in found)] = None
    return list(found)


def cell(value: Any) -> str:
    """A value as text for a person and for CSV; null is empty."""
    made = plain(value)
    if made is None:
        return ""
    return made if isinstance(made, str) else json.dumps(made, ensure_ascii=False)


def plain(value: Any) -> Any:
    """A value as JSON has it: times in ISO 8601, decimals as text, bytes in hex."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        names = getattr(value, "__annotations__", {}).get("names") or []  # of a Trino row
        is_named = len(set(names)) == len(value) and all(names)
        made = [plain(one) for one in value]
        return dict(zip(names, made, strict=True)) if is_named and names else made
    return value


# ------------------------------------------------------------------------------------------------ the prompt


def _prompt(settings: Settings, show: Callable[[Answer], None]) -> None:
    """Statements end with a semicolon. Ctrl-C drops what is typed or cancels what runs, Ctrl-D ends."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.lexers import PygmentsLexer
    from pygments.lexers.sql import SqlLexer

    from pipelines import trino_server
    from pipelines.errors import TidemarkError
    from pipelines.sql import away

    if missing := trino_server.what_is_missing(settings):
        raise away(settings, missing)
    settings.paths.run.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(settings.paths.run / HISTORY)),
        lexer=PygmentsLexer(SqlLexer),
        completer=_completer(settings),
        complete_while_typing=True,
    )
    console.say("a statement ends with ;  Tab completes, Ctrl-C cancels, Ctrl-D or exit ends")
    typed = ""
    while True:
        try:
            typed += session.prompt("   ...> " if typed else "trino> ") + "\n"
        except KeyboardInterrupt:
            typed = ""
            continue
        except EOFError:
            return
        text = typed.strip()
        if text.lower().rstrip(";") in ("exit", "quit"):
            return
        if not text.endswith(";"):
            typed = typed if text else ""
            continue
        typed = ""
        for one in split(text):
            try:
                _run(settings, one, show)
            except TidemarkError as error:
                console.say(str(error))
            except KeyboardInterrupt:
                console.say("cancelled")


def _completer(settings: Settings) -> Any:
    """Keywords, tables with their schema, and columns; as they were when the prompt began."""
    from prompt_toolkit.completion import WordCompleter
    from pygments.lexers._sql_builtins import KEYWORDS

    return WordCompleter(
        [*names(settings), *sorted(KEYWORDS)], ignore_case=True, pattern=_WORD, match_middle=False
    )


def names(settings: Settings) -> list[str]:
    """Every table with its schema, and every column, once."""
    from pipelines import sql as asking

    found: Sequence[tuple[Any, ...]] = asking.rows(
        settings,
        "SELECT table_schema, table_name, column_name FROM information_schema.columns"
        " WHERE table_schema <> 'information_schema'",
    )
    tables = dict.fromkeys(f"{schema}.{table}" for schema, table, _ in found)
    return [*tables, *dict.fromkeys(str(column) for _, _, column in found)]


# ------------------------------------------------------------------------------------------------ notebooks


@app.command(rich_help_panel=SEEING)
def notebooks(
    name: Annotated[list[str] | None, typer.Argument(help="Only these; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """Run the notebooks on this home's lake, and write a page of each that serving shows.

    Cells that ask Trino need one: `tidemark up trino`. Exit code 1 if a notebook failed; the others are rendered all
    the same.
    """
    from jobs import notebooks as running

    settings = load_settings()
    paths = running.find(name or [])
    with console.step("notebooks", settings.paths.logs / "notebooks.log") as report:
        found = running.render(settings, paths, report)
    if as_json:
        console.emit_json([one.to_json() for one in found])
    else:
        for one in found:
            console.say(f"{one.name}: {one.failure or 'rendered'} ({one.seconds:.0f} s)")
        serving = settings.serving
        console.say(f"pages: {found[0].page.parent / running.INDEX}")
        console.say(f"with serving up: http://{serving.host}:{serving.port}/reports/{running.FOLDER}/")
    if any(one.failure for one in found):
        raise typer.Exit(1)
