"""Commands about contracts: what fields a topic's records have, and what was learned of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from jobs import console
from jobs.cli.shared import Json, app, load_settings

contracts_app = typer.Typer(
    no_args_is_help=True, help="The fields of a topic's records, and how they evolve."
)
app.add_typer(contracts_app, name="contracts", rich_help_panel="Data")

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


@contracts_app.command("payloads")
def payloads(as_json: Json = False) -> None:
    """Read the schemas of conf/payloads/, and list what payloads and features may say; an error says what is wrong."""
    from pipelines.contracts.payloads import declared, rule

    schemas = [(number, one) for of in declared().values() for number, one in enumerate(of, 1)]
    if as_json:
        plain = [
            {**one._asdict(), "number": number, "fields": [f._asdict() for f in one.fields.values()]}
            for number, one in schemas
        ]
        console.emit_json({"schemas": plain})
        return
    rows = [
        (one.about, str(number), _time(one.since_ms), one.owner, field.name, rule(field), field.doc)
        for number, one in schemas
        for field in one.fields.values()
    ]
    console.table("payloads", ("about", "", "since", "owner", "field", "what it may be", ""), rows)


def _time(at_ms: int | None) -> str:
    return "" if at_ms is None else f"{datetime.fromtimestamp(at_ms / 1000, UTC):%FT%TZ}"
