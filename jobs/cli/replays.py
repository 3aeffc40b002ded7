"""Commands that take records again through the present code: `replay dead-letters`, `positions`, `day`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import Json, app, load_settings

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from pipelines.backfill import Changes
    from pipelines.contracts import Contract
    from pipelines.replay import Outcome
    from pipelines.settings import Settings

replay_app = typer.Typer(
    no_args_is_help=True, help="Records again through the present code: what changes, and making it so."
)
app.add_typer(replay_app, name="replay", rich_help_panel="Data")

Send = Annotated[
    bool, typer.Option("--send", help="Send those that would be accepted again, as new records.")
]


@replay_app.command("dead-letters")
def dead_letters(
    topic: Annotated[str, typer.Argument(help="A topic, as user-interactions.")],
    reason: Annotated[str | None, typer.Option(help="Only those refused for this reason.")] = None,
    load_id: Annotated[str | None, typer.Option(help="Only of this load.")] = None,
    send: Send = False,
    as_json: Json = False,
) -> None:
    """Refused records, decided as if they came now. Those that were sent again before are left out."""
    from pipelines import replay
    from pipelines.contracts import contract_of

    settings, contract = load_settings(), contract_of(topic)
    spark = _spark(settings)
    chosen = replay.letters(spark, settings, contract, reason, load_id)
    _show(spark, settings, contract, chosen, send, as_json, as_new=True)


@replay_app.command("positions")
def positions(
    topic: Annotated[str, typer.Argument(help="A topic, as user-interactions.")],
    partition: Annotated[int, typer.Argument(min=0, help="One of its partitions.")],
    start: Annotated[int, typer.Argument(min=0, help="The first offset.")],
    end: Annotated[int, typer.Argument(min=1, help="The offset after the last.")],
    send: Send = False,
    as_json: Json = False,
) -> None:
    """Archived records of a range of offsets: how they are decided now, and their facts beside the newest bases."""
    from pipelines import replay
    from pipelines.contracts import contract_of

    settings, contract = load_settings(), contract_of(topic)
    spark = _spark(settings)
    chosen = replay.records(spark, settings, contract, replay.Range(contract.topic, partition, start, end))
    _show(spark, settings, contract, chosen, send, as_json, as_new=send)


@replay_app.command("day")
def day(
    days: Annotated[str, typer.Argument(metavar="DAY", help="2026-11-20, or 2026-11-20..2026-11-22.")],
    apply: Annotated[
        bool, typer.Option("--apply", help="Replace these days in the tables; Dagster's UI shows the run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Days computed again from raw: curated tables by day of event, dead letters by day of ingest."""
    from jobs import build as builder
    from pipelines import backfill

    settings, chosen = load_settings(), backfill.days_of(days)
    with console.step(f"the days {chosen}", settings.paths.logs / "build.log"):
        found = builder.backfill(settings, chosen) if apply else _preview(settings, chosen)
    if as_json:
        console.emit_json({"days": str(chosen), "is_applied": apply, "tables": [c.to_json() for c in found]})
        return
    rows = [(c.table, c.rows, c.added, c.removed, c.changed, _columns(c)) for c in found]
    note = "`tidemark build` takes them to the bases" if apply else "nothing was written: --apply does it"
    title = f"{'Replaced' if apply else 'What would change'}, {chosen}"
    console.table(title, ("table", "rows", "added", "removed", "changed", "in"), rows, note)
    _print_examples([{"table": c.table, **one} for c in found for one in c.examples])


def _preview(settings: Settings, days: Any) -> list[Changes]:
    from pipelines import backfill
    from pipelines.curate import SOURCES

    spark = _spark(settings)
    found = []
    for source in SOURCES.values():
        for part in backfill.by_event_day(source):
            rebuilt = backfill.event_days(spark, settings, source, part, days)
            found.append(backfill.changes(rebuilt, rebuilt.before(spark), source.identity, part.columns))
            rebuilt.close()
    rebuilt = backfill.letter_days(spark, settings, days)
    found.append(
        backfill.changes(
            rebuilt, rebuilt.before(spark), backfill.PLACE, (*backfill.PLACE, "reason", "detail")
        )
    )
    rebuilt.close()
    return found


def _columns(changes: Changes) -> str:
    return ", ".join(f"{name}: {count}" for name, count in changes.by_column.items())


def _show(
    spark: SparkSession,
    settings: Settings,
    contract: Contract,
    chosen: DataFrame,
    send: bool,
    as_json: bool,
    *,
    as_new: bool,
) -> None:
    from pipelines import replay

    chosen = chosen.persist()
    try:
        found = replay.outcome(spark, settings, contract, chosen, as_new=as_new)
        position = None
        if send:
            position = replay.send(spark, settings, contract, replay.accepted_now(settings, contract, chosen))
    finally:
        chosen.unpersist()
    token = position.token() if position is not None else None
    if as_json:
        console.emit_json({**found.to_json(), "is_sent": send, "position": token})
        return
    _print_outcome(found)
    if token:
        console.say(f"sent; `tidemark query … --min-position {token}` waits for them")


def _print_outcome(found: Outcome) -> None:
    decisions = [(one.was or "accepted", one.now or "accepted", one.records) for one in found.decisions]
    console.table(f"{found.records} records", ("was", "now", "records"), decisions)
    facts = [(one.index_name, one.family, one.status, one.facts) for one in found.facts]
    console.table("Their facts, beside the newest bases", ("index", "family", "status", "facts"), facts)
    _print_examples(list(found.examples))


def _print_examples(examples: list[dict[str, Any]]) -> None:
    if examples:
        names = tuple(examples[0])
        rows = [tuple(_cut(one[name]) for name in names) for one in examples]
        console.table("For example", names, rows)


def _cut(value: Any) -> str:
    text = " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)
    return text if len(text) <= 120 else text[:120] + "…"


def _spark(settings: Settings) -> SparkSession:
    from pipelines.spark import session

    return session(settings, "tidemark replay")
