"""Commands about the ads repository and Iceberg: `ads dump`, `ads restore`, `ads integrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs import console
from jobs.cli.ads import ads_app
from jobs.cli.shared import Json, load_settings

if TYPE_CHECKING:
    from pipelines.ads.restore import Written


@ads_app.command()
def dump(as_json: Json = False) -> None:
    """Write the whole repository to the tables `repo.*`, all at one point, and publish them if they pass their audit.

    Every build does so by itself."""
    from jobs import build
    from pipelines import lake
    from pipelines.ads import dump as dumps

    settings = load_settings()
    report = build.dump(settings)
    if (problem := report.problem()) is not None:
        raise problem
    head = dumps.head(settings)
    assert head is not None
    snapshots = {name: next(lake.ancestors(settings, name, at)) for name, at in head.snapshots.items()}
    rows = {name: snapshot.rows for name, snapshot in snapshots.items()}
    if as_json:
        said = {"dump_id": head.dump_id, "point_at": head.point_at.isoformat(), "seq": head.seq, "rows": rows}
        console.emit_json(said | {"seconds": report.seconds})
        return
    console.table(f"Dump {head.dump_id}", ("table", "rows"), rows.items())


@ads_app.command()
def restore(
    head: Annotated[
        str | None, typer.Option(metavar="ID", help="A dump of `ops.repo_heads`; the newest by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge a dump into the repository: what is newer there stays. Interrupted, it goes on where it stopped."""
    from pipelines.ads import repository
    from pipelines.ads import restore as restoring

    settings = load_settings()
    _show(restoring.restore(settings, repository.opened(settings), head), as_json)


@ads_app.command()
def integrate(
    table: Annotated[str, typer.Argument(help="A table of the catalog, as `features.ad_performance`.")],
    into: Annotated[str, typer.Option(help="The repository's table, whose key TABLE has, too.")],
    version: Annotated[
        int, typer.Option(help="Of the columns: where the repository's is greater, it stays.")
    ],
    column: Annotated[
        list[str] | None, typer.Option(help="Only this column (may be given again); else all that both have.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write columns that a batch computed into the repository, where they are published as any change."""
    from pipelines.ads import repository
    from pipelines.ads import restore as restoring

    settings = load_settings()
    store = repository.opened(settings)
    _show([restoring.integrate(settings, store, table, into, version, column or ())], as_json)


def _show(written: list[Written], as_json: bool) -> None:
    if as_json:
        console.emit_json({"tables": [one._asdict() for one in written]})
        return
    rows = [
        (
            one.table,
            one.rows,
            one.skipped,
            ", ".join(f"{why} {count:,}" for why, count in one.refused.items()),
        )
        for one in written
    ]
    console.table("Written", ("table", "rows", "before", "refused"), rows)
