"""What the command line shows: one value, as a table for people or as JSON for programs; progress; errors.

Here: rendering alone. What is shown is computed elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jobs import log_files
from pipelines import logs
from pipelines.errors import TidemarkError


def emit_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None, default=str, ensure_ascii=False))


def say(text: str) -> None:
    """A line about progress, on standard error, so that standard output stays an answer."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> None:
    """A table on standard output; numbers are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [list(row) for row in rows]
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        values = [row[place] for row in cells if row[place] is not None]
        is_number = bool(values) and all(isinstance(value, int | float) for value in values)
        shown.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        shown.add_row(*(Text(text(value)) for value in row))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(shown)
    if note:
        console.print(Text(note))


def text(value: Any) -> str:
    """A cell: thousands grouped, floats short, absent values as a dash."""
    match value:
        case None | "":
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case dict() | list():
            return json.dumps(value, ensure_ascii=False)
    return str(value)


def facts(title: str, pairs: Mapping[str, Any], note: str = "") -> None:
    """Name and value, one a line."""
    table(title, ["", ""], [(name, text(value)) for name, value in pairs.items()], note)


@contextlib.contextmanager
def step(name: str, log: Path | None = None) -> Iterator[Callable[[str], None]]:
    """Shows that a long step is at work: what it does now and for how long; on a terminal, in one moving line.

    What the step itself prints (Spark, Dagster) goes to `log`, if there is one.
    """
    began = time.monotonic()
    with _diverted(log) as screen:
        if not screen.isatty():
            print(f"• {name} …", file=screen, flush=True)
            yield lambda detail: print(f"    {detail}", file=screen, flush=True)
            print(f"  {name}: {time.monotonic() - began:.0f} s", file=screen, flush=True)
            return
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(file=screen)) as progress:
            task = progress.add_task(name, total=1)

            def show(detail: str) -> None:
                first = detail.strip().splitlines()[0] if detail.strip() else ""
                progress.update(task, description=f"{name} [dim]{first[:90].replace('[', '(')}[/dim]")

            yield show
            progress.update(task, description=name, completed=1)


@contextlib.contextmanager
def _diverted(log: Path | None) -> Iterator[TextIO]:
    """The screen; while this is open, standard output and error of this process and its children go to the log."""
    if log is None:
        yield sys.stderr
        return
    os.environ[logs.PROCESS] = log.stem
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with (
        log_files.kept(log.stem, log) as out,
        os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as screen,
    ):
        try:
            for number in kept:
                os.dup2(out, number)
            yield screen
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, before in kept.items():
                os.dup2(before, number)
                os.close(before)


def show_error(error: BaseException, as_json: bool) -> None:
    """The text of an error on standard error; with `--json`, as JSON on standard output."""
    said = str(error) if isinstance(error, TidemarkError) else first_line(error)
    if not as_json:
        print(f"error: {said}", file=sys.stderr)
    elif isinstance(error, TidemarkError):
        emit_json(error.as_json())
    else:
        emit_json({"error": type(error).__name__, "what": said, "where": None, "remedy": None})


def first_line(error: BaseException) -> str:
    """What an unexpected error says, without its trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__
