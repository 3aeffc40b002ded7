"""Commands to try the whole: `demo` and `bench`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.cli.shared import TRYING, InputError, Json, app, load_settings


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

    raise typer.Exit(show.run(load_settings(), once, fraction))


@app.command(
    rich_help_panel=TRYING,
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],  # a benchmark answers for itself
    },
)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which; a name that is none lists them.")],
    as_json: Json = False,
) -> None:
    """Run a benchmark on a home of its own; the last line that it prints is its result as JSON.

    `bench NAME --help` has its options.
    """
    import importlib

    from pipelines.settings import ROOT

    known = sorted(
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if path.stem not in ("__init__", "harness", "events")
    )
    if name in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    name = name.replace("-", "_")
    if name not in known:
        raise InputError(f"there is no benchmark {name!r}", remedy=f"choose one of {', '.join(known)}")
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"benchmarks.{name}")
    raise typer.Exit(module.main(context.args))
