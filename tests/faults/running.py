"""Shipped processes under test, started by the shipped supervisor, with a failpoint where a test wants one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs import client, processes
from jobs.processes import Process, Record
from pipelines.settings import ROOT, Settings

PATIENCE = float(os.environ.get("TIDEMARK_TEST_PATIENCE", "1"))
"""How many times as long to wait for everything, on a machine that is busy with other things."""


def process(settings: Settings, name: str, failpoint: str | None = None) -> Process:
    """A process of the local size, perhaps with a failpoint."""
    (chosen,) = processes.choose(processes.local(settings), [name])
    chosen = chosen._replace(ready_timeout_s=chosen.ready_timeout_s * PATIENCE)
    if failpoint is None:
        return chosen
    return chosen._replace(environment=(*chosen.environment, ("TIDEMARK_FAILPOINT", failpoint)))


def start(settings: Settings, name: str, failpoint: str | None = None) -> Record:
    """Starts it, and returns when it is ready."""
    keeper = processes.supervisor(settings)
    keeper.start(process(settings, name, failpoint))
    return record(settings, name)


def start_to_die(settings: Settings, name: str, failpoint: str, timeout_s: float = 240) -> None:
    """Starts it with a failpoint that it meets by itself, and returns when that has killed it."""
    keeper = processes.supervisor(settings)
    chosen = process(settings, name, failpoint)._replace(is_ready=lambda: None)
    keeper.start(chosen)
    await_death(record(settings, name), timeout_s)


def record(settings: Settings, name: str) -> Record:
    """The running process."""
    found = Record.read(processes.supervisor(settings).pid_file(name))
    assert found is not None
    return found


def await_death(of: Record, timeout_s: float = 180) -> None:
    """Returns when the process is gone."""
    await_that(lambda: not processes.is_alive(of), f"{of.name} to die", timeout_s)


def await_that(is_true: Callable[[], bool], what: str, timeout_s: float = 180) -> None:
    """Returns when it is true; fails the test if that takes too long."""
    deadline = time.monotonic() + timeout_s * PATIENCE
    while not is_true():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


@contextmanager
def everything_stopped(settings: Settings) -> Iterator[None]:
    """Afterwards nothing of this home runs."""
    try:
        yield
    finally:
        processes.down(processes.supervisor(settings), processes.local(settings))


def tidemark(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The shipped command line."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **settings.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def serving(settings: Settings, path: str, **params: Any) -> client.Answer:
    """A GET of serving."""
    return client.request_at(f"http://{settings.serving.host}:{settings.serving.port}", path, params)


def collector(settings: Settings, path: str, body: Any) -> client.Answer:
    """A POST to the collector, whatever it answers."""
    base = f"http://{settings.collector.host}:{settings.collector.port}"
    return client.request(base, path, body=body, is_error_an_answer=True)


def tidemark_ready(settings: Settings) -> bool:
    """Whether serving says that it is ready."""
    base = f"http://{settings.serving.host}:{settings.serving.port}"
    return client.request(base, "/readyz", is_error_an_answer=True).status == 200
