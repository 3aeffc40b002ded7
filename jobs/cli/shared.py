"""The application that the modules of commands add to, and the options that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.errors import TidemarkError

if TYPE_CHECKING:
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
lineage_app = typer.Typer(no_args_is_help=True, help="A changed transform or schema, beside what is served.")
app.add_typer(lineage_app, name="lineage", rich_help_panel="Bases")
app.add_typer(query_app, name="query", rich_help_panel="Answers")
app.add_typer(letters_app, name="dead-letters", rich_help_panel="Data")

PROCESSES, DATA, BASES, ANSWERS = "Processes", "Data", "Bases", "Answers"
SEEING, REPAIR, TRYING = "Seeing", "Repair", "Trying it"

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


def load_settings() -> Settings:
    """The settings of this checkout and environment."""
    from pipelines import settings

    return settings.load()
