"""Commands about bases: `build`, `versions`, `publish`, `rollback`, `resume`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import BASES, Index, Json, app, load_settings

if TYPE_CHECKING:
    from jobs.build import BuildReport
    from pipelines.indexing.versions import Pointer, Versions
    from pipelines.settings import Settings


@app.command(rich_help_panel=BASES)
def build(
    wait: Annotated[
        str | None,
        typer.Option(metavar="POSITION", help="Wait first until the archive has passed this position."),
    ] = None,
    index: Annotated[list[str] | None, typer.Option(help="Only this index (may be given again).")] = None,
    after_curated: Annotated[
        bool, typer.Option("--after-curated", help="Take the curated tables as they are: after a backfill.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build every base from what the archive has, check it, and publish it if it passes.

    Runs Dagster's assets in this process; Dagster's web UI shows the run. Streams and serving may run or not.
    """
    from jobs.cli.data import print_accounts

    settings = load_settings()
    report = run_build(settings, wait, index, "the build", after_curated=after_curated)
    if as_json:
        console.emit_json(report.to_json())
    else:
        console.table("Published", ("index", "version"), sorted(report.published.items()))
        print_accounts(report.accounts)
    if (problem := report.problem()) is not None:
        if as_json:
            raise typer.Exit(1)
        raise problem


def run_build(
    settings: Settings,
    wait: str | None,
    indices: list[str] | None,
    title: str,
    *,
    after_curated: bool = False,
) -> BuildReport:
    """A build with its steps shown as they go."""
    from jobs import build as builder
    from pipelines.indexing import position

    until = position.from_token(wait) if wait else None
    is_watched = sys.stderr.isatty()

    def show(step: builder.Step) -> None:
        took = f" ({step.seconds:.0f} s)" if step.seconds is not None else ""
        if step.state != "running" or is_watched:
            report(f"{step.name}: {step.state}{took}")

    with console.step(title, settings.paths.logs / "build.log") as report:
        return builder.build(settings, until, indices or None, after_curated=after_curated, report=show)


@app.command(rich_help_panel=BASES)
def versions(
    index: Annotated[str | None, typer.Argument(help="An index; all of them by default.")] = None,
    as_json: Json = False,
) -> None:
    """List the base versions of each index, and which one is served."""
    settings = load_settings()
    found = {name: _version_rows(settings, name) for name in ([known_index(index)] if index else indices())}
    if as_json:
        console.emit_json(found)
        return
    for name, rows in found.items():
        console.table(
            f"Versions of {name}",
            ("version", "state", "built", "facts", "shards", "MB", "models"),
            [
                (
                    r["version"],
                    r["state"],
                    r["built_at"][:19],
                    r["facts"],
                    r["shards"],
                    r["bytes"] // 2**20,
                    ", ".join(r["models"]),
                )
                for r in rows
            ],
            "" if rows else "none yet: `tidemark build` makes one",
        )


def indices() -> list[str]:
    from pipelines.indices import INDICES

    return list(INDICES)


def known_index(name: str) -> str:
    """The name of an index, if there is one of that name."""
    from pipelines.indexing.versions import VersionError

    known = indices()
    if name not in known:
        raise VersionError(f"there is no index {name!r}", remedy=f"name one of {', '.join(known)}")
    return name


def _versions_of(settings: Settings, index: str) -> Versions:
    from pipelines.indexing.versions import Versions

    return Versions(settings.paths.indices, known_index(index))


def _version_rows(settings: Settings, index: str) -> list[dict[str, Any]]:
    versions = _versions_of(settings, index)
    pointer = versions.pointer()
    rows = []
    for manifest in versions.manifests():
        is_served = pointer is not None and pointer.version == manifest.version
        served = "served" if pointer is None or pointer.with_delta else "served, without the delta"
        rows.append(
            {
                "version": manifest.version,
                "state": served if is_served else "",
                "built_at": manifest.built_at,
                "facts": manifest.counts.get("identities"),
                "shards": len(manifest.shards),
                "bytes": sum(file.size_bytes for shard in manifest.shards for file in shard.files),
                "lineage": manifest.lineage,
                "models": sorted(set(manifest.models.values())),
                "cut": manifest.cut.token(),
            }
        )
    return rows


@app.command(rich_help_panel=BASES)
def publish(
    index: Index,
    version: Annotated[str, typer.Argument(help="A version that is newer than the one that is served.")],
    as_json: Json = False,
) -> None:
    """Serve a newer base that was built; returns when every local replica has swapped.

    It passes the same gate as a build's. Going back is `rollback`.
    """
    from jobs import moves

    print_pointer(index, moves.publish(load_settings(), known_index(index), version, console.say), as_json)


@app.command(rich_help_panel=BASES)
def rollback(
    index: Index,
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="By default the one before the served one.")
    ] = None,
    without_delta: Annotated[
        bool, typer.Option("--without-delta", help="Serve the base alone, until `publish` or `resume`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serve an older base, with the delta since that base's own cut; returns when every local replica has swapped."""
    from jobs import moves

    pointer = moves.rollback(
        load_settings(), known_index(index), to, without_delta=without_delta, say=console.say
    )
    print_pointer(index, pointer, as_json)


@app.command(rich_help_panel=BASES)
def resume(index: Index, as_json: Json = False) -> None:
    """Serve the delta again, after `rollback --without-delta`."""
    from jobs import moves

    print_pointer(index, moves.resume(load_settings(), known_index(index), console.say), as_json)


def print_pointer(index: str, pointer: Pointer, as_json: bool) -> None:
    if as_json:
        console.emit_json({"index": index, **pointer._asdict()})
    else:
        console.say(
            f"{index} serves {pointer.version}" + ("" if pointer.with_delta else ", without the delta")
        )
