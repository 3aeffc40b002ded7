"""Loads that break off for real: the disk is full, the process is killed."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from pipelines import failpoints, lake
from pipelines.contracts import USER_INTERACTIONS
from pipelines.ingest import dead_letters, load, loaded_files
from pipelines.ingest.sources import LoadError
from pipelines.settings import ROOT, Settings
from pipelines.spark import session
from tests.conftest import small_settings

Resize = Callable[[int], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A disk of a few MB, and what changes its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess[str]:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        made = mount("size=2m")
    except OSError as error:
        pytest.skip(f"there is no mount here: {error}")
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    try:
        yield disk, lambda mb: mount(f"remount,size={mb}m").check_returncode()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def write(file: Path, count: int, note_bytes: int) -> None:
    """Events with a note that cannot be compressed; two break their contract."""
    with file.open("w") as opened:
        for number in range(count):
            event = {"user_id": "u", "event_id": str(number), "pin_id": "p", "event_time": 0}
            event["action"] = "stare" if number < 2 else "view"
            event["note"] = base64.b64encode(random.randbytes(note_bytes)).decode()
            opened.write(json.dumps(event) + "\n")


def test_a_full_disk_refuses_the_load_until_there_is_room(
    spark: SparkSession, tmp_path: Path, small_disk: tuple[Path, Resize]
) -> None:
    disk, resize = small_disk
    settings = small_settings(disk / "home")
    own = session(settings, "tests")
    source = tmp_path / "x.jsonl"
    write(source, 400, 20_000)  # 8 MB

    def bring() -> load.LoadResult:
        return load.load_files(own, settings, source, USER_INTERACTIONS)

    def refused() -> str:
        with pytest.raises(LoadError, match=r"the disk is full; nothing was loaded.*make room") as caught:
            bring()
        assert lake.current_snapshot(settings, "raw.user_interactions") is None
        assert dead_letters.listed(settings) == []
        assert loaded_files.listed(settings) == []
        return str(caught.value)

    assert str(settings.paths.run / "loads") in refused()  # while the file is staged
    resize(13)
    told = refused()  # at the commit: what is staged fits, and the raw table does not
    assert str(disk / "home" / "lake" / "warehouse") in told
    assert "MB free" in told
    resize(60)
    done = bring()
    assert (done.rows, done.refused) == (400, {"unknown_action": 2})
    assert lake.read(own, "raw.user_interactions").count() == 400
    assert len(dead_letters.listed(settings)) == 2
    assert bring().is_repeat


def test_a_load_that_was_killed_is_done_by_the_next(
    own_spark: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    source = tmp_path / "shop"
    source.mkdir()
    write(source / "1.jsonl", 10, 10)
    command = [sys.executable, "-m", "jobs.cli", "load", str(source), "--topic", USER_INTERACTIONS.topic]
    environment = {**os.environ, **settings.environment, failpoints.VARIABLE: "load.after_files"}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=300)
    assert killed.returncode == -9
    assert lake.open_table(settings, lake.OPS_LOADS.name) is not None
    assert loaded_files.listed(settings) == []
    assert dead_letters.listed(settings) == []
    write(source / "2.jsonl", 5, 10)
    done = load.load_files(own_spark, settings, source, USER_INTERACTIONS)
    assert (done.rows, done.refused, done.is_repeat) == (15, {"unknown_action": 4}, False)
    assert lake.read(own_spark, "raw.user_interactions").count() == 15
    assert len(dead_letters.listed(settings)) == 4
    assert [(one.files, one.rows) for one in loaded_files.listed(settings)] == [(2, 15)]
