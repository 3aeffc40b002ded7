"""Commands about declared sequences: `sequences`, `sequences check`, `sequences publish`, `sequences export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import Json, app, load_settings

if TYPE_CHECKING:
    from pipelines.users.sequence_files import Library
    from pipelines.users.sequences import Definition

sequences_app = typer.Typer()
app.add_typer(sequences_app, name="sequences", rich_help_panel="Answers")


@sequences_app.callback(invoke_without_command=True)
def declared(context: typer.Context, as_json: Json = False) -> None:
    """Sequences of users' events, as declared in conf/sequences/; without a command, a list of them.

    docs/sequences.md says how one is declared, asked for and changed.
    """
    if context.invoked_subcommand is not None:
        return
    from pipelines.users import sequence_files

    library = sequence_files.load()
    found = [_told(library, definition) for _, definition in sorted(library.definitions.items())]
    if as_json:
        console.emit_json({"sequences": found, "problems": [error.as_json() for error in library.problems]})
        return
    columns = ("name", "version", "is_published", "owner", "description")
    console.table("Sequences", columns, [[one[name] for name in columns] for one in found])
    for error in library.problems:
        console.say(f"not served: {error}")


@sequences_app.command("check")
def check(as_json: Json = False) -> None:
    """Check every declared sequence: what it says, and that a published version means what was published.

    Exit code 1 if something is wrong.
    """
    from pipelines.users import sequence_files

    library = sequence_files.load()
    if as_json:
        problems = [error.as_json() for error in library.problems]
        console.emit_json({"checked": len(library.definitions) + len(problems), "problems": problems})
    else:
        for error in library.problems:
            print(error)
        console.say(
            f"{len(library.definitions)} sequences are well declared, {len(library.problems)} are not"
        )
    if library.problems:
        raise typer.Exit(1)


@sequences_app.command("publish")
def publish(
    name: Annotated[str, typer.Argument(help="A sequence, as `tidemark sequences` lists it.")],
    version: Annotated[
        int | None, typer.Option(min=1, help="Which; the newest that is declared, by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what a version means into conf/sequences/published.yaml, so that others can rely on it; commit that file.

    From then on a change that breaks it needs a new version. Serving takes it up when it starts.
    """
    from pipelines.users import sequence_files

    found = sequence_files.publish(sequence_files.FOLDER, name, version)
    if as_json:
        console.emit_json(_told(sequence_files.load(), found))
    else:
        console.say(f"version {found.version} of {found.name} is published: commit conf/sequences/")


@sequences_app.command("export")
def export(
    name: Annotated[str, typer.Argument(help="A sequence, as `tidemark sequences` lists it.")],
    labels: Annotated[
        str,
        typer.Option(help="A table with `user_id`, `label_time` and any other columns, as training.labels."),
    ],
    to: Annotated[
        str | None,
        typer.Option(help="The table to write, replaced as a whole; training.<name>_v<version>, by default."),
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="Which; the newest that is published, by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write training data: each label with its user's sequence as it was to be had at the label's time.

    An event counts if it had happened by then and was known by then; what was corrected later is seen as it was.
    """
    from pipelines.spark import session
    from pipelines.users import sequence_export, sequence_files

    settings = load_settings()
    definition = sequence_files.load().find(name, version)
    with console.step(f"exporting {name}", settings.paths.logs / "export.log") as report:
        report("starting Spark")
        spark = session(settings, "tidemark sequences export")
        try:
            report("merging what was known at each label's time")
            target = to or f"training.{definition.name}_v{definition.version}"
            found = sequence_export.export(spark, settings, definition, labels, target)
        finally:
            spark.stop()
    if as_json:
        console.emit_json(found._asdict())
        return
    console.say(
        f"{found.labels:,} labels with version {found.version} of {found.name} are in {found.table}; "
        f"{found.empty:,} of the sequences are empty, {found.incomplete:,} may lack events of before the horizon"
    )


def _told(library: Library, definition: Definition) -> dict[str, Any]:
    return {**definition._asdict(), "is_published": library.is_published(definition)}
