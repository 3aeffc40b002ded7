"""Log files: where the output of a local process goes, one JSON object a line, in files that never grow without bound.

Belongs here: taking in what a process and all its children print, line by line, and keeping it: `python log_files.py
PROCESS FILE` reads standard input to its end. Most lines are JSON already (`pipelines.logs`) and stay as they are.
What an interpreter or a JVM says when it dies is not, and becomes the `message` of a line. Does not belong here: what
processes say. On a cluster, whatever collects standard error there does this work.

A pipe and a process of its own, because only so is everything bounded and nothing lost: a file that is handed to a
process grows until the process ends, and one that the process rotates itself loses what its JVM writes. It imports
nothing but the standard library, and takes some 10 MB.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

MAX_BYTES = 20 * 2**20
MAX_FILES = 5
MAX_LINE_BYTES = 2**20
QUIET_S = 0.2
"""Lines that are no JSON and begin with a blank belong to the one before; after so long none is waited for."""
_LEVEL = re.compile(rb"\b(DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)\b", re.IGNORECASE)
_CONTINUES = (b" ", b"\t", b"Caused by:")
_LEVELS = {"WARN": "WARNING", "FATAL": "CRITICAL"}


class LogFile:
    """A file and its older ones, `<name>.1` the youngest of them."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
        self._path, self._max_bytes, self._max_files = path, max_bytes, max_files

    def write(self, lines: list[bytes]) -> None:
        """Append lines. Whoever prints must never wait or fail because of its log: a full disk loses lines."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.writelines(line + b"\n" for line in lines)
                size = file.tell()
            if size > self._max_bytes:
                self._rotate()

    def _rotate(self) -> None:
        numbered = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, self._max_files))]
        for younger, older in reversed(list(itertools.pairwise(numbered))):
            with contextlib.suppress(FileNotFoundError):
                younger.replace(older)


class Lines:
    """What was printed, as JSON lines."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._rest = b""
        self._entry: list[bytes] = []  # lines that are no JSON, and belong together

    @property
    def is_waiting(self) -> bool:
        """Whether there are lines that another may still belong to."""
        return bool(self._entry)

    def feed(self, printed: bytes) -> list[bytes]:
        """Take in what was printed; the lines that are whole."""
        *lines, self._rest = (self._rest + printed).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        return [made for line in lines for made in self._take(line.rstrip(b"\r"))]

    def flush(self, is_end: bool = False) -> list[bytes]:
        """The lines that waited for others; at the end also one without an end."""
        made = self._take(self._rest) if is_end and self._rest else []
        self._rest = b"" if is_end else self._rest
        return made + self._close()

    def _take(self, line: bytes) -> list[bytes]:
        if line.startswith(b"{") and (said := self._object(line)) is not None:
            return [*self._close(), said]
        if not line.strip():
            return []
        is_trace = bool(self._entry) and self._entry[0].startswith(b"Traceback ")
        if self._entry and line.startswith(_CONTINUES):
            self._entry.append(line)
            return []
        if is_trace:  # the line that names the error ends a trace
            self._entry.append(line)
            return self._close()
        closed = self._close()
        self._entry = [line]
        return closed

    def _close(self) -> list[bytes]:
        if not self._entry:
            return []
        first, text = self._entry[0], b"\n".join(self._entry)
        self._entry = []
        found = _LEVEL.search(first[:200])
        level = found[1].decode().upper() if found else "ERROR" if first.startswith(b"Traceback ") else "INFO"
        return [
            self._written(
                {"level": level, "message": text[:MAX_LINE_BYTES].decode("utf-8", "backslashreplace")}
            )
        ]

    def _object(self, line: bytes) -> bytes | None:
        """A line of JSON: ours as it is, another's with our names; None if it is none."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(said, dict):
            return None
        if {"time", "level", "message"} <= said.keys():
            return line
        renamed = {"timestamp": "time", "event": "message"}  # structlog's, which Dagster uses
        return self._written({(renamed.get(name) or name): value for name, value in said.items()})

    def _written(self, said: Mapping[str, Any]) -> bytes:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": now, "level": "INFO", "process": self._process, "message": "", **said}
        level = str(line["level"]).upper()
        return json.dumps({**line, "level": _LEVELS.get(level, level)}).encode()


def keep(source: int, process: str, file: LogFile) -> None:
    """Keep what comes out of a pipe, until its last writer is gone."""
    lines = Lines(process)
    while True:
        if not select.select([source], [], [], QUIET_S if lines.is_waiting else None)[0]:
            file.write(lines.flush())
            continue
        printed = os.read(source, 2**16)
        if not printed:
            break
        file.write(lines.feed(printed))
    file.write(lines.flush(is_end=True))


@contextlib.contextmanager
def kept(process: str, path: Path) -> Iterator[int]:
    """A descriptor for the output of a process and its children. What keeps it lives until the last of them is gone."""
    with _lock_file(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # handed on, and held for as long as there is anything to keep
        keeper = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, process, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
    assert keeper.stdin is not None
    with keeper.stdin as pipe:
        yield pipe.fileno()


def await_whole(path: Path, timeout_s: float = 5.0) -> None:
    """Returns once all that was printed is in the file, if those who print have ended; otherwise after the time."""
    deadline = time.monotonic() + timeout_s
    with _lock_file(path) as lock:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.02)


def _lock_file(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_suffix(".lock").open("w")


def main(process: str, path: str) -> None:
    """Keep standard input. Asked to end, it does so when those whose output it keeps have ended."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep(0, process, LogFile(Path(path)))


if __name__ == "__main__":
    main(*sys.argv[1:])
