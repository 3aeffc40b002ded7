"""Commands about what is kept and what it takes up: `maintain`, `storage`."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import console
from jobs.cli.shared import DATA, InputError, Json, app, load_settings

if TYPE_CHECKING:
    from pipelines.maintenance import IndexReport, TableReport
    from pipelines.settings import Settings


@app.command(rich_help_panel=DATA)
def maintain(
    tables: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TABLE]...",
            help="Tables, as `raw.pin_updates`; by default all, and the bases and deltas of every index.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compact tables, expire old snapshots, remove orphans, drop old bases and delta epochs.

    What Dagster does each hour by itself, orphans included. Streams, builds and serving may run beside it.
    """
    settings = load_settings()
    done, indices = run_maintenance(settings, tables or [])
    if as_json:
        found = {
            "tables": [report.to_json() for report in done],
            "indices": [one.to_json() for one in indices],
        }
        console.emit_json(found)
        return
    console.table(
        "Tables",
        ("table", "files", "became", "manifests", "snapshots", "old rows", "orphans", "retries", "took"),
        [
            (
                r.table,
                r.files_rewritten,
                r.files_written,
                r.manifests_rewritten,
                r.snapshots_expired,
                r.rows_deleted,
                r.orphans.files if r.orphans else "",
                r.retries,
                f"{r.seconds:.0f} s",
            )
            for r in done
        ],
    )
    if indices:
        console.table(
            "Indices",
            (
                "index",
                "bases dropped",
                "lineages dropped",
                "epochs retired",
                "delta files",
                "removed",
                "took",
            ),
            [
                (
                    r.name,
                    len(r.bases_dropped),
                    len(r.lineages_dropped),
                    r.epochs_retired,
                    r.files_rewritten,
                    r.files_removed,
                    f"{r.seconds:.0f} s",
                )
                for r in indices
            ],
        )
    console.say("`tidemark storage` shows what is left")


def run_maintenance(settings: Settings, names: list[str]) -> tuple[list[TableReport], list[IndexReport]]:
    """Maintenance of the named tables, or of everything, with its progress shown.

    Raises:
        InputError: there is no such table.
        MaintenanceError: some could not be maintained; all others were.
    """
    from assets.maintenance import maintain_index
    from assets.platform import Platform
    from pipelines import maintenance
    from pipelines.indices import INDICES
    from pipelines.storage import survey
    from quality import gates

    specs = maintenance.specs()
    for name in names:
        if name not in specs:
            raise InputError(f"no table {name!r} is declared", remedy=f"name some of {', '.join(specs)}")
    with console.step("maintenance", settings.paths.logs / "maintenance.log") as report:
        report("starting Spark")
        platform = Platform(lambda: settings, gates.examine)
        spark = platform.spark
        try:
            tables, indices = [], []
            failed: dict[str, str] = {}
            for name in names or specs:
                with _noting(failed, name, report):
                    if (done := maintenance.maintain_table(spark, settings, specs[name])) is not None:
                        tables.append(done)
            for spec in () if names else INDICES.values():
                with _noting(failed, f"bases and deltas of {spec.name}", report):
                    indices.append(maintain_index(platform, spec))
            report("measuring")
            survey(spark, settings, {one.table: one.orphans for one in tables})
        finally:
            spark.stop()
    if failed:
        raise maintenance.MaintenanceError(
            "; ".join(f"{name}: {why}" for name, why in failed.items()),
            where=", ".join(failed),
            remedy=f"all else is done; read {settings.paths.logs / 'maintenance.log'}, then run it again",
        )
    return tables, indices


@contextlib.contextmanager
def _noting(failed: dict[str, str], what: str, report: Callable[[str], None]) -> Iterator[None]:
    """One that cannot be maintained must not keep the others from it."""
    report(what)
    try:
        yield
    except Exception as error:
        traceback.print_exc()  # to the step's log
        failed[what] = str(error).strip().splitlines()[0]
        report(f"{what} failed: {failed[what]}")


@app.command(rich_help_panel=DATA)
def storage(as_json: Json = False) -> None:
    """What each table, delta and index took up when it was measured last, and what that costs."""
    from pipelines.storage import newest

    rows = newest(load_settings())
    if as_json:
        console.emit_json({"storage": rows})
        return
    if not rows:
        console.say("nothing was measured yet: `tidemark maintain` does")
        return
    columns = ("", "files", "small %", "MB", "with history", "snapshots", "tags", "orphans", "USD a month")
    console.table("Storage", columns, [_shown(row) for row in rows], f"measured {str(rows[0]['at'])[:19]}")


def _shown(row: dict[str, Any]) -> tuple[object, ...]:
    megabytes = [f"{row[name] / 2**20:,.1f}" for name in ("bytes", "stored_bytes")]
    counts = ["" if row[n] is None else row[n] for n in ("snapshots", "tags", "orphan_files")]
    name = row["name"] if row["kind"] == "table" else f"{row['kind']} of {row['name']}"
    small = "" if row["small_file_pct"] is None else row["small_file_pct"]
    return name, row["files"], small, *megabytes, *counts, f"{row['cost_usd_micros_month'] / 1e6:.6f}"
