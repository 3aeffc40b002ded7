"""The switchboard of the streams: which of them should run, and what became of each.

Two small JSON files for each streaming process under the home's `run` folder. The command line writes what is wanted,
the streaming process reads it and writes back what is. Nothing here knows Spark, so that the command line stays quick.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RUNNING, STOPPED, ENDED = "running", "stopped", "ended"
STALE_AFTER_S = 20.0
BESIDE = "streams.beside.json"


class Controls(NamedTuple):
    """The two files of a streaming process under this folder."""

    run: Path
    process: str = "streams"

    @property
    def wanted_file(self) -> Path:
        return self.run / f"{self.process}.wanted.json"

    @property
    def status_file(self) -> Path:
        return self.run / f"{self.process}.status.json"

    def wanted(self) -> dict[str, str]:
        """What was asked for by name; a stream that is not named should run."""
        found = _read(self.wanted_file)
        return {name: state for name, state in found.items() if state in (RUNNING, STOPPED)}

    def should_run(self, name: str) -> bool:
        return self.wanted().get(name, RUNNING) == RUNNING

    def ask(self, name: str, state: str) -> None:
        """Asks for a stream to run or to stop; holds until the opposite is asked for, over restarts too."""
        _write(self.wanted_file, {**self.wanted(), name: state})

    def report(self, streams: Mapping[str, Mapping[str, Any]]) -> None:
        """Called by the streaming process every second or so."""
        _write(self.status_file, {"pid": os.getpid(), "at": time.time(), "streams": streams})

    def forget_status(self) -> None:
        """Before a new streaming process: what the last one said is no longer true."""
        self.status_file.unlink(missing_ok=True)

    def status(self) -> dict[str, dict[str, Any]]:
        """What the streaming process said last, by stream; empty when it says nothing (any more)."""
        found = _read(self.status_file)
        is_fresh = time.time() - float(found.get("at", 0)) < STALE_AFTER_S
        return dict(found.get("streams", {})) if is_fresh else {}

    def what_is_missing(self) -> str | None:
        """None when each stream does what is wanted of it; a failing one that is tried again counts as missing.

        A stream whose lineages have ended has nothing left to do.
        """
        streams = self.status()
        if not streams:
            return "the streaming process has not reported yet"
        late = [
            f"{name} is {status['state']}" + (f" ({status['detail']})" if status.get("detail") else "")
            for name, status in streams.items()
            if status["state"] not in (RUNNING if self.should_run(name) else STOPPED, ENDED)
        ]
        return "; ".join(late) or None

    def await_state(self, name: str, state: str, timeout_s: float = 60.0) -> bool:
        """Whether the stream was in this state before the time was over."""
        deadline = time.monotonic() + timeout_s
        while self.status().get(name, {}).get("state") != state:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


class Beside(NamedTuple):
    """A streaming process beside the main one: it feeds some indices with code that is kept (`jobs.code`)."""

    name: str
    code: str
    indices: tuple[str, ...]


def beside(run: Path) -> list[Beside]:
    """The streaming processes that should run beside the main one."""
    rows = _read(run / BESIDE).get("processes", [])
    return [Beside(row["name"], row["code"], tuple(row["indices"])) for row in rows]


def set_beside(run: Path, processes: Iterable[Beside]) -> None:
    """From now on these should run; holds over restarts."""
    _write(run / BESIDE, {"processes": [process._asdict() for process in processes]})


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(value))
    draft.replace(path)
