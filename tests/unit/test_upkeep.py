"""`tidemark maintain`: one that cannot be maintained keeps no other from it."""

from __future__ import annotations

from typing import Any

import pytest

from assets import maintenance as assets
from assets.platform import Platform
from jobs.cli import upkeep
from pipelines import maintenance, storage
from pipelines.indices import INDICES
from pipelines.maintenance import IndexReport, MaintenanceError, TableReport
from pipelines.settings import Settings

BROKEN = ("raw.pin_updates", "ops.epochs")


class Stoppable:
    """Stands for Spark, which nothing here asks for anything."""

    is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


def test_it_goes_on_behind_tables_and_indices_that_fail_and_tells_of_each(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spark = Stoppable()
    tables: list[str] = []
    indices: list[str] = []
    measured: list[set[str]] = []

    def maintain_table(spark: Any, settings: Settings, spec: Any) -> TableReport:
        tables.append(spec.name)
        if spec.name in BROKEN:
            raise RuntimeError(f"no room for {spec.name}\nand a trace")
        return TableReport(spec.name)

    def maintain_index(platform: Platform, spec: Any) -> IndexReport:
        indices.append(spec.name)
        if spec.name == "pins":
            raise OSError("the disk is full")
        return IndexReport(spec.name)

    monkeypatch.setattr(Platform, "spark", spark)
    monkeypatch.setattr(maintenance, "maintain_table", maintain_table)
    monkeypatch.setattr(assets, "maintain_index", maintain_index)
    monkeypatch.setattr(storage, "survey", lambda spark, settings, orphans: measured.append(set(orphans)))
    with pytest.raises(MaintenanceError) as told:
        upkeep.run_maintenance(settings, [])
    assert tables == list(maintenance.specs()) and indices == list(INDICES)
    assert measured == [set(tables) - set(BROKEN)]
    assert spark.is_stopped
    assert [said.partition(": ")[2] for said in told.value.what.split("; ")] == [
        *[f"no room for {name}" for name in tables if name in BROKEN],
        "the disk is full",
    ]
    assert told.value.where == ", ".join([*(n for n in tables if n in BROKEN), "bases and deltas of pins"])
    trace = "".join(capsys.readouterr())
    assert "RuntimeError: no room for ops.epochs" in trace and "OSError" in trace
