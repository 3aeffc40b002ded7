"""Commands that look after the ads account: `ads explain`, `stop`, `resume`, `skip`, `sync`, `gc`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import console
from jobs.cli.ads import ads_app
from jobs.cli.shared import Json, load_settings


@ads_app.command("explain")
def explain(
    ad_id: Annotated[str, typer.Argument(help="An ad.")],
    as_json: Json = False,
) -> None:
    """Say why an ad is or is not served, and what each stage has of it, with versions and times.

    Nothing has to run: what cannot be asked is left out, and named.
    """
    from jobs import ads_evidence
    from pipelines.ads import explain as explaining

    evidence = ads_evidence.look(load_settings(), ad_id)
    verdict, stages = explaining.verdict(evidence), explaining.stages(evidence)
    if as_json:
        told = {"ad_id": ad_id, "at": explaining.iso(evidence.now_ms), **verdict._asdict()}
        console.emit_json(told | {"stages": [stage.to_json() for stage in stages], "notes": evidence.notes})
        return
    console.table(
        f"Ad {ad_id}",
        ("stage", "of", "version", "when", "what"),
        [
            (s.stage, s.what, s.version, "" if s.at_ms is None else explaining.iso(s.at_ms), s.detail)
            for s in stages
        ],
        verdict.text,
    )
    for note in evidence.notes:
        console.say(note)


@ads_app.command("stop")
def stop(as_json: Json = False) -> None:
    """Serve the base alone: no keys are sent, the streams stop, and nothing goes ahead of the documents.

    The source is still written to the repository; `ads resume` goes on from there and loses nothing.
    """
    from jobs import ads_operations
    from jobs.cli.bases import print_pointer

    print_pointer("ads", ads_operations.serve_base_alone(load_settings(), console.say), as_json)


@ads_app.command("resume")
def resume(as_json: Json = False) -> None:
    """Go back to real time after `ads stop`: keys of all that changed meanwhile are sent, the delta is served again."""
    from jobs import ads_operations
    from jobs.cli.bases import print_pointer

    pointer = ads_operations.resume(load_settings(), console.say)
    if pointer is not None:
        print_pointer("ads", pointer, as_json)
    elif as_json:
        console.emit_json({"index": "ads", "version": None})
    else:
        console.say("ads serves its delta; there is no base yet")


@ads_app.command("skip")
def skip(
    minutes: Annotated[float, typer.Option("--older-than", min=0, help="Minutes, by the broker's time.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count them, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Drop the keys that waited for longer, as after an outage; the streams go on with those that came later.

    Their documents stay as they are served until `ads refresh`, or the next base. No change record is ever dropped.
    """
    from jobs import ads_operations

    dropped = ads_operations.drop_stale(load_settings(), 60 * minutes, is_dry=dry_run)
    if as_json:
        console.emit_json({"dropped": [one._asdict() for one in dropped], "is_done": not dry_run})
        return
    title = "Would be dropped" if dry_run else "Dropped"
    note = "" if dropped else "no key has waited for so long"
    console.table(title, ("topic", "reason", "keys"), [(d.topic, d.reason, d.keys) for d in dropped], note)
    if dropped and not dry_run:
        console.say("`tidemark ads refresh --all` has these documents made again")


@ads_app.command("sync")
def sync(
    repair: Annotated[
        bool, typer.Option("--repair", help="Send what the source database has instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare the source database with the repository, and its tables with each other. Exit code 1 if some disagree.

    What is repaired goes through the topic like any change, and never overwrites something newer.
    """
    from pipelines.ads import sync as syncing
    from pipelines.ingest.producer import Producer

    settings = load_settings()
    report, sent = syncing.run(settings), 0
    if repair and report.note is None:
        with Producer(settings) as producer:
            sent = syncing.repair(settings, producer, report.unsynced)
    if as_json:
        listed = [one._asdict() for one in report.unsynced]
        console.emit_json({"unsynced": listed, "note": report.note, "repairs_sent": sent})
    else:
        rows = [(row["table"], row["cause"], row["rows"], row["examples"][:60]) for row in report.rows()[1:]]
        console.table("Unsynced", ("table", "cause", "rows", "as"), rows, "" if rows else "all agree")
        if report.note:
            console.say(f"the source database was not asked: {report.note}")
        if sent:
            console.say(f"{sent} records were sent")
    if report.unsynced:
        raise typer.Exit(1)


@ads_app.command("gc")
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")
    ] = False,
    undo: Annotated[
        int | None, typer.Option(metavar="RUN", help="Take a run back, as it names itself.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take ads out of the index that were archived, ended or deleted for `ads.gc_days`.

    For `ads.gc_grace_days` a run can be undone; then their values leave the repository.
    """
    from pipelines.ads import collection, repository
    from pipelines.ingest.producer import Producer

    settings = load_settings()
    store = repository.opened(settings)
    try:
        if undo is not None:
            with Producer(settings) as producer:
                ads = collection.undo(store, producer, undo)
            if as_json:
                console.emit_json({"undone": undo, "ads": ads})
            else:
                console.say(f"{len(ads)} ads come back")
            return
        planned = collection.plan(store, settings.ads.gc_days, settings.ads.gc_grace_days)
        runs = collection.runs(store)
        if not dry_run:
            with Producer(settings) as producer:
                collection.carry_out(store, producer, planned)
    finally:
        store.close()
    if as_json:
        told = {**planned._asdict(), "inactive": len(planned.inactive), "is_done": not dry_run}
        console.emit_json(told | {"runs": {str(run): count for run, count in runs.items()}})
        return
    done = {name: len(found) for name, found in planned._asdict().items() if name != "run"}
    console.facts("Would be done" if dry_run else f"Run {planned.run}", done)
    console.table("Can be undone", ("run", "ads"), [(str(run), count) for run, count in runs.items()])
