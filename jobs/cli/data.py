"""Commands about what comes in: `load`, `loads`, `send`, `dead-letters …`, `account`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import DATA, InputError, Json, app, letters_app, load_settings

if TYPE_CHECKING:
    from pipelines.ingest.load import LoadResult
    from pipelines.ingest.sources import Dialect
    from pipelines.settings import Settings


@app.command(rich_help_panel=DATA)
def load(
    source: Annotated[
        str,
        typer.Argument(
            help="`complete-journey` (the real input), or a file or folder: Parquet, CSV, JSON lines."
        ),
    ],
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic",
            "--contract",
            help="For files without a mapping: the topic whose contract they keep, as `user-interactions`.",
        ),
    ] = None,
    mapping: Annotated[Path | None, typer.Option(help="A file that says what the columns mean.")] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Print a draft of a mapping to --topic, and load nothing.")
    ] = False,
    delimiter: Annotated[str | None, typer.Option(help="For CSV; found out if not given.")] = None,
    encoding: Annotated[str | None, typer.Option(help="For CSV; found out if not given.")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="For CSV; found out if not given.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="For CSV without a header: its columns, with commas between.")
    ] = None,
    load_id: Annotated[
        str | None, typer.Option(help="Names the load for good; by default made from the content.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="For `complete-journey`: the share of its households.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Load history into the raw tables, each file once: of a folder that grows, the new files. It is served from the
    next base on."""
    from pipelines.ingest.sources import Dialect

    settings = load_settings()
    names = tuple(name.strip() for name in columns.split(",")) if columns else None
    dialect = Dialect(_character(delimiter), encoding, header, names)
    if suggest:
        print(suggested(source, topic, dialect), end="")
        return
    results, extra = run_load(settings, source, topic, load_id, fraction, mapping, dialect)
    if as_json:
        console.emit_json({"loads": [result.to_json() for result in results], **extra})
        return
    rows = []
    for r in results:
        why = ", ".join(f"{reason} {count:,}" for reason, count in r.refused.items())
        rows.append(
            (
                r.table,
                r.rows,
                r.accepted,
                r.rows - r.accepted,
                why,
                "already there" if r.is_repeat else f"{r.seconds:.0f} s",
            )
        )
    console.table("Loaded", ("table", "rows", "accepted", "refused", "why", "took"), rows)
    for result in results:
        for loaded, count in Counter(result.already_loaded.values()).items():
            console.say(f"{count:,} files already loaded by {loaded}")
        for warning in result.warnings:
            console.say(f"note: {warning}")
    console.say("`tidemark build` makes a base of it")


@app.command(rich_help_panel=DATA)
def loads(as_json: Json = False) -> None:
    """The loads that the raw tables have, the newest first."""
    from pipelines.ingest import loaded_files

    found = loaded_files.listed(load_settings())
    if as_json:
        console.emit_json({"loads": [one.to_json() for one in found]})
        return
    rows = [
        (*(one[name] for name in ("load_id", "files", "rows", "accepted", "refused")), one["loaded_at"][:19])
        for one in (load.to_json() for load in found)
    ]
    console.table("Loads", ("load", "files", "rows", "accepted", "refused", "when"), rows)


def _character(delimiter: str | None) -> str | None:
    """A delimiter as it is typed: `tab` and `\\t` are the tabulator."""
    if delimiter is None or len(delimiter) == 1:
        return delimiter
    if delimiter in ("tab", "\\t"):
        return "\t"
    raise InputError(f"{delimiter!r} is no delimiter", remedy="give one character, or tab")


def suggested(source: str, topic: str | None, dialect: Dialect) -> str:
    """A draft of a mapping for a source.

    Raises:
        LoadError: no topic is named, or the source cannot be read.
    """
    from pipelines.contracts import contract_of
    from pipelines.ingest import mapping, sources

    if topic is None:
        raise sources.LoadError("--suggest needs a contract", where=source, remedy=_NAME_A_TOPIC)
    return mapping.suggest(contract_of(topic), sources.sample(sources.files_of(source)[0], dialect))


_NAME_A_TOPIC = "add --topic user-interactions or pin-updates"


def run_load(
    settings: Settings,
    source: str,
    topic: str | None,
    load_id: str | None,
    fraction: float,
    mapping_file: Path | None,
    dialect: Dialect,
) -> tuple[list[LoadResult], dict[str, Any]]:
    """A load with its progress shown: of the real input, or of files."""
    from pipelines.contracts import contract_of
    from pipelines.ingest import complete_journey, mapping, sources
    from pipelines.ingest import load as loader

    is_journey = source in (complete_journey.NAME, complete_journey.NAME.replace("-", "_"))
    by = mapping.read(mapping_file) if mapping_file is not None else None
    if not is_journey:
        sources.files_of(source)
        if topic is None and by is None:
            raise sources.LoadError("files need a contract", where=source, remedy=_NAME_A_TOPIC)
    chosen = contract_of(topic) if topic is not None else None
    with console.step(f"loading {source}", settings.paths.logs / "load.log") as report:
        report("starting Spark")
        from pipelines.spark import session

        spark = session(settings, "tidemark load")
        try:
            if is_journey:
                report("purchases, products and households")
                loaded = complete_journey.load_all(spark, settings, fraction)
                return [loaded.interactions, loaded.pins], {"households": loaded.households}
            report("reading the files")
            loaded_files = loader.load_files(
                spark, settings, source, chosen, by=by, dialect=dialect, load_id=load_id
            )
            return [loaded_files], {}
        finally:
            spark.stop()


@app.command(rich_help_panel=DATA)
def send(
    records: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JSON]...", help="Records; `-` or none: one a line from standard input."),
    ] = None,
    topic: Annotated[
        str, typer.Option(help="`user-interactions`, `pin-updates` or `user-follows`.")
    ] = "user-interactions",
    file: Annotated[Path | None, typer.Option(help="A file with one record a line, or a JSON array.")] = None,
    fill: Annotated[
        bool, typer.Option("--fill", help="Give events without event_id or event_time new ones.")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Send the bytes as they are; a bad one becomes a dead letter.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send records to Kafka, and print the position that covers them once the broker has them all.

    Give that position to `query … --min-position`, or to `build --wait`.
    """
    from pipelines import tracing
    from pipelines.contracts import contract_of
    from pipelines.ingest.producer import Producer, position_of

    settings, contract, trace = load_settings(), contract_of(topic), tracing.begin()
    lines = read_records(records or [], file)
    with Producer(settings) as producer:
        if unchecked:
            sent = producer.send(contract.topic, [(None, line.encode()) for line in lines], trace)
            position = position_of(sent)
        else:
            objects = [parse_record(line, number) for number, line in enumerate(lines, 1)]
            chosen = [filled(one) for one in objects] if fill else objects
            position = producer.send_objects(contract, chosen, trace)
    if as_json:
        sent_as = {"sent": len(lines), "topic": contract.topic, "trace_id": trace.trace_id}
        console.emit_json({**sent_as, "position": position.token()})
    else:
        console.say(f"{len(lines)} sent to {contract.topic} (trace {trace.trace_id}); the position is")
        print(position.token())


def read_records(arguments: list[str], file: Path | None) -> list[str]:
    """Records as JSON texts: those of the command line, of a file, or of standard input.

    Raises:
        InputError: there are none, or the file cannot be read.
    """
    import json

    found = [text for text in arguments if text != "-"]
    if file is not None:
        try:
            content = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot read the records: {error}", where=str(file), remedy="give another file"
            ) from None
        if content.lstrip().startswith("["):
            try:
                found += [json.dumps(one) for one in json.loads(content)]
            except ValueError as error:
                raise InputError(
                    f"not a JSON array: {error}", where=str(file), remedy="mend the file"
                ) from None
        else:
            found += [line for line in content.splitlines() if line.strip()]
    if "-" in arguments or (not arguments and file is None):
        found += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not found:
        raise InputError(
            "there is nothing to send",
            remedy="give records as arguments, with --file, or one a line on standard input",
        )
    return found


def parse_record(line: str, number: int) -> dict[str, Any]:
    """One record's object."""
    import json

    try:
        one = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"record {number} is not JSON: {error}", where=line[:80], remedy="mend it; nothing was sent"
        ) from None
    if not isinstance(one, dict):
        raise InputError(
            f"record {number} is not a JSON object", where=line[:80], remedy="mend it; nothing was sent"
        )
    return one


def filled(event: dict[str, Any]) -> dict[str, Any]:
    """An event with an id and a time."""
    import uuid
    from datetime import UTC, datetime

    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"event_id": uuid.uuid4().hex, "event_time": now, **event}


@letters_app.command("list")
def list_letters(
    topic: Annotated[str | None, typer.Option(help="Only of this topic.")] = None,
    reason: Annotated[str | None, typer.Option(help="Only for this reason.")] = None,
    load_id: Annotated[str | None, typer.Option(help="Only of this load.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """How many records were refused and why, and the newest of them."""
    from pipelines.ingest import dead_letters

    settings = load_settings()
    letters = dead_letters.listed(settings, topic=topic, reason=reason, load_id=load_id, limit=limit)
    totals = dead_letters.counted(settings, topic=topic, load_id=load_id)
    if as_json:
        counts = [{"topic": name, "reason": why, "count": count} for (name, why), count in totals.items()]
        console.emit_json({"counts": counts, "letters": [letter.to_json() for letter in letters]})
        return
    console.table(
        "Refused", ("topic", "reason", "records"), [(*names, count) for names, count in totals.items()]
    )
    if letters:
        rows = [
            (letter.place, str(letter.broker_time)[:19], letter.reason, letter.detail) for letter in letters
        ]
        note = "`tidemark dead-letters explain PLACE` shows one with its bytes"
        console.table("The newest", ("place", "taken", "reason", "detail"), rows, note)


@letters_app.command("explain")
def explain_letter(
    place: Annotated[
        str, typer.Argument(help="topic/partition/offset or topic/load/row, as `list` shows it.")
    ],
    as_json: Json = False,
) -> None:
    """One refused record: why, what it holds, and what its contract says of it now."""
    from pipelines.ingest import dead_letters

    found = dead_letters.explain(load_settings(), place)
    if as_json:
        console.emit_json(found.to_json())
        return
    letter = found.letter
    now = "it would be accepted" if found.now is None else f"{found.now.reason}: {found.now.detail}"
    shown = {
        "taken": str(letter.broker_time),
        "reason": f"{letter.reason}: {found.meaning}",
        "detail": letter.detail,
        "by today's contract": now,
        "key": dead_letters.readable(letter.key),
        "value": found.text,
        "first bytes": found.hex,
    }
    console.facts(f"Dead letter {place}", shown)


@app.command(rich_help_panel=DATA)
def account(as_json: Json = False) -> None:
    """What became of every row: rows in `raw` = accepted + refused, as of the newest build."""
    settings = load_settings()
    found = read_accounts(settings)
    if as_json:
        console.emit_json(found)
    elif found:
        print_accounts(found)
    else:
        console.say("no account yet: `tidemark build` makes it")


def print_accounts(accounts: dict[str, dict[str, Any]]) -> None:
    """The account of each raw table: what became of every row."""
    rows = []
    for name, account in sorted(accounts.items()):
        refused = account["refused"]
        by_reason = refused if isinstance(refused, dict) else {}
        count = sum(by_reason.values()) if isinstance(refused, dict) else refused
        fates = [account[fate] for fate in ("current", "superseded", "repeated", "tombstones")]
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in by_reason.items())
        rows.append((name, account["rows"], account["accepted"], *fates, count, reasons))
    if rows:
        columns = (
            "table",
            "rows",
            "accepted",
            "current",
            "superseded",
            "repeated",
            "tombstones",
            "refused",
            "why",
        )
        console.table("The account: rows = accepted + refused", columns, rows)


def read_accounts(settings: Settings) -> dict[str, dict[str, Any]]:
    """The newest account of each raw table, from `ops.account`."""
    import json

    from pipelines import lake

    table = lake.open_table(settings, lake.OPS_ACCOUNT.name)
    rows = table.scan().to_arrow().to_pylist() if table is not None else []
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({row["table"] for row in rows}):
        places = {snapshot.id: place for place, snapshot in enumerate(lake.ancestors(settings, name))}
        mine = [row for row in rows if row["table"] == name]
        known = [row for row in mine if row["snapshot_id"] in places]
        # Snapshots expire, the oldest first; of those that did, the newest has the most rows.
        newest = min(known, key=lambda row: places[row["snapshot_id"]], default=None)
        newest = newest or max(mine, key=lambda row: row["rows"])
        found[name] = {**newest, "refused": json.loads(newest["refused_by_reason"])}
    return found
