"""Commands about the ads account: `ads update`, `enrich`, `refresh`, `held`, `release`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import InputError, Json, app, load_settings

if TYPE_CHECKING:
    from pipelines.settings import Settings

ads_app = typer.Typer(
    no_args_is_help=True, help="The ads account: changes, documents made again, what waits."
)
app.add_typer(ads_app, name="ads", rich_help_panel="Data")

Ads = Annotated[list[str] | None, typer.Argument(metavar="[AD_ID]...", help="Ads.")]
Families = Annotated[
    list[str] | None, typer.Option("--family", help="Of the document; may be given again. All by default.")
]


@ads_app.command("update")
def update(
    records: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JSON]...", help="Records; `-` or none: one a line from standard input."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one record a line, or a JSON array.")] = None,
    wait: Annotated[
        bool,
        typer.Option(help="Until documents are on their way; print the position at which they are served."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Send changes of rows to the process `ads`, and print what became of each that was not simply written.

    Exit code 1 if one was refused (the others are written), or with `--wait` not on its way in time.
    """
    from jobs.cli.data import parse_record, read_records
    from pipelines.ads.calls import MAX_WAIT_MS
    from pipelines.indexing.position import EMPTY, from_token
    from pipelines.ingest.http import MAX_RECORDS

    settings, reached, is_published = load_settings(), EMPTY, True
    options = {"wait_ms": MAX_WAIT_MS} if wait else {}
    lines = read_records(records or [], file)
    given = [parse_record(line, number) for number, line in enumerate(lines, 1)]
    results: list[dict[str, Any]] = []
    waiting: dict[str, Any] = {}
    for start in range(0, len(given), MAX_RECORDS):
        part = given[start : start + MAX_RECORDS]
        answer = _call(settings, "update", {"changes": part} | options, partly=True)
        if answer["position"] is not None:
            reached = reached.merge(from_token(answer["position"]))
        is_published &= answer["is_published"]
        results += [one | {"index": start + one["index"]} for one in answer["results"]]
        waiting |= {one["transaction"]: one for one in answer["waiting"]}
    refused = [one for one in results if one["status"] == "refused"]
    visible = sum(one.get("visible") is not None for one in results)
    if as_json:
        told = {"position": reached.token(), "is_published": is_published}
        console.emit_json({"results": results, "waiting": list(waiting.values())} | told)
    else:
        console.say(f"{len(results) - len(refused)} accepted, {visible} of them changed what is seen")
        for one in refused:
            console.say(f"record {one['index'] + 1} is refused: {one['reason']}: {one['message']}")
        for one in waiting.values():
            expected = "an unknown number" if one["expected"] is None else one["expected"]
            console.say(f"transaction {one['transaction']} waits: {one['arrived']} of {expected} are there")
        if wait and is_published:
            print(reached.token())
        elif wait:
            console.say(
                f"after {MAX_WAIT_MS // 1000} s not all documents are on their way: see `tidemark status`"
            )
    if refused or (wait and not is_published):
        raise typer.Exit(1)


@ads_app.command("enrich")
def enrich(ads: Ads = None, families: Families = None, as_json: Json = False) -> None:
    """Show what documents are made of the rows as they are now, and why an ad is not servable."""
    if not ads:
        raise InputError("no ad is named", remedy="name some: `tidemark ads enrich AD_ID`")
    body = {"ad_ids": ads} | ({"families": families} if families else {})
    found = _call(load_settings(), "enrich", body)["ads"]
    if as_json:
        console.emit_json({"ads": found})
        return
    for ad in found:
        for family, made in ad["families"].items():
            note = ad["not_servable"] or "servable"
            console.facts(
                f"{ad['ad_id']}: {family}", {"version": made["version"]} | (made["document"] or {}), note
            )


@ads_app.command("refresh")
def refresh(
    ads: Ads = None,
    where: Annotated[
        str | None, typer.Option(metavar="COLUMN=KEY", help="Those of a row, as campaign_id=c1.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    families: Families = None,
    as_json: Json = False,
) -> None:
    """Have documents made again: the keys of ads to the hot streams' topics for what may wait."""
    from pipelines.ads import publisher, refresh, repository
    from pipelines.ingest import broker
    from pipelines.ingest.producer import Producer

    choice, settings = _choice(ads, where, everything), load_settings()
    broker.ensure_topics(settings, publisher.TOPICS)
    store = repository.opened(settings)
    try:
        with Producer(settings) as producer:
            sent = refresh.send(store, producer, choice, families or refresh.FAMILIES)
    finally:
        store.close()
    if as_json:
        console.emit_json({"sent": sent})
    else:
        console.table("Sent", ("topic", "keys"), list(sent.items()))


def _choice(ads: list[str] | None, where: str | None, everything: bool) -> Any:
    from pipelines.ads.refresh import Choice

    if sum((bool(ads), where is not None, everything)) != 1:
        raise InputError(
            "ads are chosen in exactly one way", remedy="name some, or use --where COLUMN=KEY, or --all"
        )
    if where is None:
        return Choice(ad_ids=tuple(ads)) if ads else Choice()
    column, separator, key = where.partition("=")
    if not separator or not key:
        raise InputError(f"{where!r} is not COLUMN=KEY", where="--where", remedy="say it as campaign_id=c1")
    return Choice(where=(column, key))


@ads_app.command("held")
def held(as_json: Json = False) -> None:
    """List the source transactions that are not written: how many records are there, and why they wait."""
    from pipelines.ads import repository, updater

    store = repository.opened(load_settings())
    try:
        with store.reading() as connection:
            found = updater.held(connection)
    finally:
        store.close()
    if as_json:
        console.emit_json({"held": [one._asdict() for one in found]})
        return
    if not found:
        console.say("no transaction waits")
        return
    rows = [
        (
            h.id,
            h.state,
            h.arrived,
            "" if h.expected is None else h.expected,
            _time(h.seen_at_ms),
            h.detail or "",
        )
        for h in found
    ]
    console.table("Held", ("transaction", "state", "arrived", "of", "since", "why"), rows)


@ads_app.command("release")
def release(
    transaction: Annotated[str, typer.Argument(help="A transaction, as `tidemark ads held` lists it.")],
    as_json: Json = False,
) -> None:
    """Write what has arrived of a transaction that waits; what comes later of it is written at once."""
    from pipelines.ads import repository, updater

    store = repository.opened(load_settings())
    try:
        with store.reading() as connection:
            is_held = bool(updater.held(connection, [transaction]))
        if not is_held:
            raise InputError(
                f"no transaction {transaction!r} waits", remedy="`tidemark ads held` lists those that do"
            )
        changes = updater.release(store, transaction)
    finally:
        store.close()
    if as_json:
        console.emit_json({"transaction": transaction, "changed_rows": len(changes)})
    else:
        console.say(f"{transaction} is written: {len(changes)} rows changed")


def _call(settings: Settings, name: str, body: Any, *, partly: bool = False) -> dict[str, Any]:
    """The answer of the process `ads`; with `partly` also that to records of which none was accepted."""
    from jobs import client

    base = f"http://{settings.ads.host}:{settings.ads.port}"
    answer = client.request(base, f"/v1/ads:{name}", body=body, service="ads", is_error_an_answer=True)
    if answer.status >= 400 and not (partly and answer.status == 400 and "results" in answer.body):
        return client.checked(answer, f"{base}/v1/ads:{name}").body
    return answer.body


def _time(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%FT%TZ}"
