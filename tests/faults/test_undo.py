"""An undo of a set of tables that is killed in the middle: it can be finished, and it can be taken back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from pipelines import failpoints, lake, undo
from pipelines.settings import ROOT, Settings

TABLES = ("curated.one", "curated.three", "curated.two")
CHILD = """
import sys
from datetime import datetime
from pipelines import settings, undo
s = settings.load()
undo.carry_out(s, undo.plan(s, ["curated"], datetime.fromisoformat(sys.argv[1])))
"""


def rows(settings: Settings) -> dict[str, list[int]]:
    opened = {name: lake.open_table(settings, name) for name in TABLES}
    return {name: table.scan().to_arrow().column("n").to_pylist() for name, table in opened.items() if table}


@pytest.mark.parametrize(("nth", "way"), [(1, "again"), (2, "redo")])
def test_kill_9_between_the_tables_of_a_set(settings: Settings, nth: int, way: str) -> None:
    catalog = lake.catalog(settings)
    catalog.create_namespace("curated")
    made = [catalog.create_table(name, pa.schema([("n", pa.int64())])) for name in TABLES]
    for table in made:
        table.append(pa.table({"n": [1]}))
    time.sleep(0.01)
    then = datetime.now(UTC)
    time.sleep(0.01)
    for table in made:
        table.append(pa.table({"n": [2]}))
    before, after = (dict.fromkeys(TABLES, held) for held in ([1], [2, 1]))
    assert {name: sorted(held, reverse=True) for name, held in rows(settings).items()} == after
    environment = {**os.environ, **settings.environment, failpoints.VARIABLE: f"undo.after_table:{nth}"}
    killed = subprocess.run([sys.executable, "-c", CHILD, then.isoformat()], cwd=ROOT, env=environment)
    assert killed.returncode == -9
    held = rows(settings)
    assert sum(held[name] == [1] for name in TABLES) == nth
    if way == "again":
        planned = undo.plan(settings, ["curated"], then)
        assert len(planned.changes) == len(TABLES) - nth
        undo.carry_out(settings, planned)
        assert rows(settings) == before
    names = {
        label.removeprefix(undo.TAG)
        for name in TABLES
        if (table := lake.open_table(settings, name)) is not None
        for label in table.metadata.refs
        if label.startswith(undo.TAG)
    }
    assert len(names) == (2 if way == "again" else 1)  # one of the undo that was killed, one that finished it
    for name in names:
        undo.carry_out(settings, undo.plan_redo(settings, name))
    assert {name: sorted(held, reverse=True) for name, held in rows(settings).items()} == after
