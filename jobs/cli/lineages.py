"""Commands about lineages: `lineage list`, `start`, `compare`, `publish`, `back`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import Index, Json, lineage_app, load_settings

if TYPE_CHECKING:
    from quality.comparison import Comparison


@lineage_app.command("list")
def list_lineages(
    index: Annotated[str | None, typer.Argument(help="An index; all of them by default.")] = None,
    as_json: Json = False,
) -> None:
    """The lineages of each index: which is served, which this checkout has, who feeds it, how far it is behind."""
    from jobs import lineages
    from jobs.cli.bases import indices, known_index

    settings = load_settings()
    chosen = [known_index(index)] if index else indices()
    found = {name: lineages.rows(settings, name) for name in chosen}
    if as_json:
        console.emit_json({name: lineages.to_json(rows) for name, rows in found.items()})
        return
    columns = (
        "lineage",
        "state",
        "this checkout",
        "bases",
        "newest",
        "epochs",
        "MB",
        "fed by",
        "behind",
        "kept code",
    )
    for name, rows in found.items():
        console.table(
            f"Lineages of {name}",
            columns,
            [
                (
                    r.lineage,
                    r.state,
                    "yes" if r.is_here else "",
                    r.versions,
                    r.newest or "",
                    r.epochs,
                    r.delta_bytes // 2**20,
                    r.fed_by or "",
                    r.behind,
                    r.kept_code or "",
                )
                for r in rows
            ],
        )


@lineage_app.command()
def start(
    index: Annotated[
        list[str] | None, typer.Argument(help="Indices; by default those whose transform or schema changed.")
    ] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Go on to publish what was compared.")] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long to wait until it has caught up.")] = 900.0,
    as_json: Json = False,
) -> None:
    """Build a candidate of this checkout's lineage, run its streams beside the old ones, and compare.

    What is served is not touched. Broken off, it can be run again.
    """
    from jobs import build as builder
    from jobs import lineages

    settings = load_settings()
    with console.step("the candidate", settings.paths.logs / "build.log") as report:

        def show(step: builder.Step) -> None:
            if step.state != "running":
                report(f"{step.name}: {step.state}")

        found = lineages.start(settings, index, console.say, show, timeout_s)
    pointers = {name: lineages.publish(settings, name, say=console.say) for name in found if publish}
    if as_json:
        moved = {name: pointer._asdict() for name, pointer in pointers.items()}
        console.emit_json({"compared": {n: c.to_json() for n, c in found.items()}, "published": moved})
        return
    for name, comparison in found.items():
        _print_comparison(comparison)
        if not publish:
            console.say(f"publish it with `tidemark lineage publish {name}`")


@lineage_app.command()
def compare(index: Index, as_json: Json = False) -> None:
    """What is served against the candidate, each with its delta: what is only in one, and what differs where.

    Exit code 1 if the candidate lacks so much that it takes `--force` to publish it.
    """
    from jobs import lineages
    from jobs.cli.bases import known_index

    found = lineages.compare(load_settings(), known_index(index))
    if as_json:
        console.emit_json(found.to_json())
    else:
        _print_comparison(found)
    if not all(finding.passed for finding in found.findings):
        raise typer.Exit(1)


@lineage_app.command()
def publish(
    index: Index,
    force: Annotated[
        bool, typer.Option("--force", help="Although the comparison says that much is lost.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve the candidate with its delta, once it has caught up; then the old lineage's streams stop."""
    from jobs import lineages
    from jobs.cli.bases import known_index, print_pointer

    pointer = lineages.publish(load_settings(), known_index(index), is_forced=force, say=console.say)
    print_pointer(index, pointer, as_json)


@lineage_app.command()
def back(index: Index, as_json: Json = False) -> None:
    """Serve the lineage before, base and delta, and start its streams again where its code is kept."""
    from jobs import lineages
    from jobs.cli.bases import known_index

    pointer, is_fed = lineages.back(load_settings(), known_index(index), console.say)
    if as_json:
        console.emit_json({"index": index, "is_fed": is_fed, **pointer._asdict()})
    else:
        console.say(f"{index} serves {pointer.version}" + ("" if is_fed else ", marked as stale"))


def _print_comparison(found: Comparison) -> None:
    old, new = found.old, found.new
    rows: list[tuple[Any, ...]] = [
        ("keys", old.keys, new.keys, found.keys_only_old, found.keys_only_new, found.keys_differing),
        (
            "entries",
            old.entries,
            new.entries,
            found.entries_only_old,
            found.entries_only_new,
            found.entries_differing,
        ),
    ]
    left = f"; {found.keys_in_motion} keys that just change are left out" if found.keys_in_motion else ""
    note = (
        f"{old.version} against {new.version}" + left + ("; a sample of the keys" if found.is_sample else "")
    )
    columns = (found.read, "old", "new", "only old", "only new", "differing")
    console.table(f"{found.index}: what is served against the candidate", columns, rows, note)
    shown: list[tuple[Any, ...]] = [
        (c.name, c.differing, "; ".join(f"{key}/{entry}: {a!r} → {b!r}" for key, entry, a, b in c.examples))
        for c in found.columns
    ]
    shown += [(name, count, "new: filled in so many entries") for name, count in found.added.items()]
    shown += [(name, "", "gone") for name in found.removed]
    if shown:
        console.table("By column", ("column", "entries", "examples"), shown)
    for title, examples in (
        ("only in what is served", found.examples_only_old),
        ("only new", found.examples_only_new),
    ):
        if examples:
            console.say(f"{title}: {', '.join(examples)}, …")
    for finding in found.findings:
        if not finding.passed:
            console.say(f"{finding.name} does not hold: {finding.description}")
