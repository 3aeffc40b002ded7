"""Commands about contracts: what fields a topic's records have, and what was learned of them."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import Json, app, load_settings

if TYPE_CHECKING:
    from pipelines.contracts.payloads import Schema

contracts_app = typer.Typer(
    no_args_is_help=True, help="The fields of a topic's records, and how they evolve."
)
app.add_typer(contracts_app, name="contracts", rich_help_panel="Data")
payloads_app = typer.Typer()
contracts_app.add_typer(payloads_app, name="payloads")

Topic = Annotated[str, typer.Argument(help="A topic, as user-interactions.")]
Path = Annotated[str, typer.Argument(help="A field; catalogue.NAME inside an object.")]


@contracts_app.command("show")
def show(topic: Topic, as_json: Json = False) -> None:
    """List the fields that are declared, and those that were learned from records."""
    from pipelines.contracts import contract_of
    from pipelines.ingest import evolution

    contract = contract_of(topic)
    fields = evolution.shown(load_settings(), contract)
    if as_json:
        console.emit_json(
            {
                "topic": contract.topic,
                "version": contract.version,
                "fields": [field._asdict() for field in fields],
            }
        )
        return
    rows = [(f.path, f.type or "", f.origin, _time(f.since_ms)) for f in fields]
    console.table(f"{contract.topic}, version {contract.version}", ("field", "type", "", "since"), rows)


@contracts_app.command("add")
def add(
    topic: Topic,
    path: Path,
    type: Annotated[str, typer.Argument(help="bigint, double, string, boolean or json.")],
    as_json: Json = False,
) -> None:
    """Say of which type a field is, before records do or instead of what was learned; holds a minute later."""
    from pipelines.contracts import contract_of
    from pipelines.ingest import evolution

    field = evolution.add(load_settings(), contract_of(topic), path, type)
    if as_json:
        console.emit_json(field._asdict())
    else:
        console.say(f"{field.path} is {field.type} from {_time(field.since_ms)} on")


@contracts_app.command("forget")
def forget(topic: Topic, path: Path, as_json: Json = False) -> None:
    """Make a learned field no column any more; records may say of it what they want. Holds a minute later."""
    from pipelines.contracts import contract_of
    from pipelines.ingest import evolution

    field = evolution.forget(load_settings(), contract_of(topic), path)
    if as_json:
        console.emit_json(field._asdict())
    else:
        console.say(f"{field.path} is no column from {_time(field.since_ms)} on")


@payloads_app.callback(invoke_without_command=True)
def payloads(context: typer.Context, as_json: Json = False) -> None:
    """What payloads and features may say, as declared in conf/payloads/, and what is wrong with it.

    Exit code 1 if something is wrong: nothing is decided then. docs/timelines.md says how a schema is declared, and
    how it changes.
    """
    if context.invoked_subcommand is not None:
        return
    from pipelines.contracts import payload_files
    from pipelines.contracts.payloads import rule

    library = payload_files.load()
    if as_json:
        schemas = [_told(number, one) for of in library.schemas.values() for number, one in enumerate(of, 1)]
        console.emit_json({"schemas": schemas, "problems": [error.as_json() for error in library.problems]})
    else:
        rows = [
            (one.about, str(number), _time(one.since_ms), one.owner, field.name, rule(field), field.doc)
            for of in library.schemas.values()
            for number, one in enumerate(of, 1)
            for field in one.fields.values()
        ]
        console.table("payloads", ("about", "", "since", "owner", "field", "what it may be", ""), rows)
        for error in library.problems:
            console.say(f"refused: {error}")
    if library.problems:
        raise typer.Exit(1)


@payloads_app.command("publish")
def publish(
    about: Annotated[str, typer.Argument(help="An action, or features.")],
    as_json: Json = False,
) -> None:
    """Write what a schema means into conf/payloads/published.yaml, so that it holds; commit that file.

    From then on it is only ever widened. What would refuse more is a new version, whose `since` lies ahead.
    """
    from pipelines.contracts import payload_files

    newest = payload_files.publish(payload_files.FOLDER, about, int(time.time() * 1000))
    if as_json:
        console.emit_json({"about": about, "since_ms": newest.since_ms})
    else:
        console.say(
            f"what {about} may say is published, the newest from {_time(newest.since_ms)} on: commit conf/payloads/"
        )


def _told(number: int, schema: Schema) -> dict[str, Any]:
    from pipelines.contracts.payloads import plain

    fields = [{"name": field.name, **plain(field), "doc": field.doc} for field in schema.fields.values()]
    return {**schema._asdict(), "number": number, "fields": fields}


def _time(at_ms: int | None) -> str:
    return "" if at_ms is None else f"{datetime.fromtimestamp(at_ms / 1000, UTC):%FT%TZ}"
