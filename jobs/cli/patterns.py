"""Commands about patterns: `patterns`, `patterns check`, `patterns dry-run`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import InputError, Json, app, load_settings

if TYPE_CHECKING:
    from pipelines.users.patterns.rules import Patterns, Rule

patterns_app = typer.Typer()
app.add_typer(patterns_app, name="patterns", rich_help_panel="Answers")

File = Annotated[Path | None, typer.Option("--file", help="Another file than conf/patterns.yaml.")]


@patterns_app.callback(invoke_without_command=True)
def declared(context: typer.Context, as_json: Json = False) -> None:
    """Rules over what users do, as declared in conf/patterns.yaml; without a command, a list of them.

    docs/patterns.md says how one is declared, tried and changed.
    """
    if context.invoked_subcommand is not None:
        return
    from pipelines.users import pattern_files

    rules = pattern_files.load().patterns.rules
    if as_json:
        console.emit_json({"rules": [{**rule._asdict(), "hash": rule.digest} for rule in rules]})
        return
    columns = ("rule", "fires", "segment", "interest", "lasts")
    rows = [
        (rule.name, _fires(rule), rule.segment, rule.interest or None, _span(rule.lasts_ms)) for rule in rules
    ]
    console.table("Patterns", columns, rows)


@patterns_app.command("check")
def check(file: File = None, as_json: Json = False) -> None:
    """Check the file of rules. What is wrong is told by rule and field, with what is allowed; exit code 1."""
    from pipelines.users import pattern_files

    rules = _load(file).rules
    if as_json:
        console.emit_json({"checked": len(rules), "file": str(file or pattern_files.PATTERNS_FILE)})
    else:
        console.say(f"{len(rules)} rules are well declared")


@patterns_app.command("dry-run")
def dry_run(
    name: Annotated[
        str | None, typer.Argument(metavar="[RULE]", help="One of the rules; all by default.")
    ] = None,
    file: File = None,
    since: Annotated[
        str | None, typer.Option("--from", help="Only what fired from this day or time on, in UTC.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--to", help="Only what fired before this day or time, in UTC.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How often rules would have fired in the curated history: in all, for how many users, by day."""
    from pipelines.spark import session
    from pipelines.users import pattern_dry_run

    settings, patterns = load_settings(), _chosen(_load(file), name)
    from_ms, to_ms = _time_ms("--from", since), _time_ms("--to", until)
    if from_ms is not None and to_ms is not None and from_ms >= to_ms:
        raise InputError("--from is not before --to", remedy="choose an earlier --from")
    with console.step("dry run", settings.paths.logs / "dry-run.log") as report:
        report("starting Spark")
        spark = session(settings, "tidemark patterns dry-run")
        try:
            report("asking the curated history")
            found = pattern_dry_run.run(spark, settings, patterns, from_ms, to_ms)
        finally:
            spark.stop()
    if as_json:
        console.emit_json({**found._asdict(), "rules": [one._asdict() for one in found.rules]})
        return
    rows: list[tuple[Any, ...]] = [(one.rule, "all", one.fired, one.users) for one in found.rules]
    rows += [(one.rule, day, count, None) for one in found.rules for day, count in one.by_day.items()]
    console.table(
        "What would have fired",
        ("rule", "day", "fired", "users"),
        rows,
        f"of {found.events:,} curated events",
    )


def _load(file: Path | None) -> Patterns:
    from pipelines.users import pattern_files

    return (pattern_files.load() if file is None else pattern_files.load(file)).patterns


def _chosen(patterns: Patterns, name: str | None) -> Patterns:
    if name is None:
        return patterns
    chosen = tuple(rule for rule in patterns.rules if rule.name == name)
    if not chosen:
        names = ", ".join(rule.name for rule in patterns.rules)
        raise InputError(
            f"there is no rule {name!r}", remedy=f"choose of {names or 'none: the file has no rules'}"
        )
    return patterns._replace(rules=chosen)


def _time_ms(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{option}: {text[:100]!r} is no day or time",
            remedy="write it as 2017-03-01 or 2017-03-01T12:00:00",
        ) from None
    aware = found.replace(tzinfo=datetime.UTC) if found.tzinfo is None else found
    return round(aware.timestamp() * 1000)


def _fires(rule: Rule) -> str:
    actions, by, span = " or ".join(rule.actions), rule.by, _span(rule.within_ms)
    if rule.kind == "count":
        return f"{rule.at_least} × {actions} of one {by} within {span}"
    return f"{actions}, and no {' or '.join(rule.unless)} of its {by} within {span}"


def _span(ms: int) -> str:
    for unit, of_unit in (("d", 86_400_000), ("h", 3_600_000)):
        if ms % of_unit == 0:
            return f"{ms // of_unit}{unit}"
    return f"{ms // 60_000}m"
