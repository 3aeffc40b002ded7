"""A transform is edited while everything runs: the whole way by the shipped commands and processes, then back again.

The old code is this checkout; the new one is a copy of it with an edited transform, as a second checkout would be.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jobs import controls, processes
from pipelines import failpoints
from pipelines.contracts import USER_INTERACTIONS
from pipelines.ingest.producer import Producer
from pipelines.settings import ROOT, Settings
from tests.conftest import small_settings
from tests.faults import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

EDITED = "pipelines/users/index.py"
EDITS = (
    (
        '        ("surface", pa.string()),\n',
        '        ("surface", pa.string()),\n        ("is_large", pa.bool_()),\n',
    ),
    (
        """        payload=f"struct({', '.join(payload.names)})",\n""",
        """        payload=f"struct({', '.join(payload.names)})\""""
        '.replace("surface", "upper(surface) AS surface").replace("is_large", "quantity > 2 AS is_large"),\n',
    ),
)


class World(NamedTuple):
    settings: Settings
    new_code: Path
    sent: set[str]

    def tidemark(
        self, *arguments: str, is_new: bool = True, timeout_s: float = 900, killed_at: str = ""
    ) -> Any:
        """A command of one of the two checkouts; what it answered with `--json`. Or it is killed at a place."""
        folder = self.new_code if is_new else ROOT
        environment = {**os.environ, **self.settings.environment, "PYTHONPATH": str(folder)}
        environment |= {failpoints.VARIABLE: killed_at} if killed_at else {}
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments, "--json"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s * running.PATIENCE,
        )
        if killed_at:
            assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
            return None
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def send(self, count: int, user: str = "u") -> None:
        """Events of one user; returns when the broker has them."""
        ids = [f"e-{uuid.uuid4().hex[:12]}" for _ in range(count)]
        rows = [
            {
                "user_id": user,
                "event_id": name,
                "pin_id": "p1",
                "action": "view",
                "event_time": int(time.time() * 1000),
                "surface": "home",
                "quantity": 1 + number % 4,
            }
            for number, name in enumerate(ids)
        ]
        with Producer(self.settings) as producer:
            producer.send_objects(USER_INTERACTIONS, rows)
        self.sent.update(ids)

    def served(self, user: str = "u") -> dict[str, Any]:
        answer = running.serving(self.settings, f"/v1/users/{user}/events", limit=1000)
        return {event["event_id"]: event for event in answer.body["events"]}

    def require_fresh(self, count: int = 3) -> None:
        """What is sent now is answered soon, with all that was ever sent."""
        self.send(count)
        running.await_that(lambda: self.sent <= set(self.served()), "new events to be served", 90)
        assert self.sent == set(self.served())

    def index(self, name: str = "user_events") -> dict[str, Any]:
        found = running.serving(self.settings, "/v1/indices").body["indices"]
        return next(status for status in found if status["index"] == name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("lineages")
    settings = small_settings(folder / "home", STREAMS__ARCHIVE_TRIGGER_MS=1000, STREAMS__NICE=0)
    new_code = folder / "checkout"
    for part in ("pipelines", "assets", "quality", "jobs", "conf"):
        shutil.copytree(ROOT / part, new_code / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "dagster.yaml", new_code)
    text = (new_code / EDITED).read_text(encoding="utf-8")
    for old, new in EDITS:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (new_code / EDITED).write_text(text, encoding="utf-8")
    with running.everything_stopped(settings):
        for name in ("broker", "collector", "streams", "serving"):
            running.start(settings, name)
        yield World(settings, new_code, set())


def test_an_edited_transform_is_started_beside_killed_published_and_gone_back_from(world: World) -> None:
    world.send(20)
    world.require_fresh()
    world.tidemark("build", is_new=False)
    old = world.index()["lineage"]
    world.require_fresh()

    compared = world.tidemark("lineage", "start")["compared"]
    assert sorted(compared) == ["pin_counts", "user_events"]
    found = compared["user_events"]
    assert found["added"] == {"interactions.is_large": found["new"]["entries"]}
    assert [column["name"] for column in found["columns"]] == ["interactions.surface"]
    assert (found["entries_only_old"], found["entries_only_new"]) == (0, 0)
    assert compared["pin_counts"]["entries_differing"] == 0
    (beside,) = controls.beside(world.settings.paths.run)
    assert world.index()["lineage"] == old
    world.require_fresh()

    # Killed, the main streams come back with the old code, although the command is the new checkout's.
    os.kill(running.record(world.settings, "streams").pid, signal.SIGKILL)
    os.kill(running.record(world.settings, beside.name).pid, signal.SIGKILL)
    world.tidemark("up", "streams", beside.name)
    listed = world.tidemark("lineage", "list", "user_events")["user_events"]
    assert [(r["state"], r["is_here"]) for r in listed] == [("served", False), ("candidate", True)]
    world.require_fresh()
    assert not world.index()["is_stale"]

    # Killed after each of its steps, publishing goes on from there; what is asked for is fresh all the while.
    for place in ("moves.after_pointer", "moves.after_swap", "moves.after_end"):
        world.tidemark("lineage", "publish", "user_events", killed_at=place)
        world.require_fresh()
    world.tidemark("lineage", "publish", "user_events")
    world.require_fresh()
    world.tidemark("lineage", "publish", "pin_counts", killed_at="lineages.after_main")
    world.require_fresh()
    world.tidemark("lineage", "publish", "pin_counts")
    world.require_fresh()
    new = world.index()["lineage"]
    assert new != old
    assert controls.beside(world.settings.paths.run) == []
    assert {event["surface"] for event in world.served().values()} == {"HOME"}
    listed = world.tidemark("lineage", "list", "user_events")["user_events"]
    assert [(r["lineage"], r["state"]) for r in listed] == [(new, "served"), (old, "former")]

    answer = world.tidemark("lineage", "back", "user_events")
    assert answer["is_fed"]
    running.await_that(lambda: not world.index()["is_stale"], "the old lineage to catch up")
    assert world.index()["lineage"] == old
    world.require_fresh()
    assert {event["surface"] for event in world.served().values()} == {"home"}

    names = [process.name for process in processes.local(world.settings)]
    assert any(name.startswith("streams-") for name in names)
    world.tidemark("lineage", "publish", "user_events")
    world.require_fresh()
    assert world.index()["lineage"] == new
