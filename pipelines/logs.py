"""Logs: one JSON object a line, from every process, and how they are read again.

Belongs here: what a line looks like, setting a process up to write such lines, reading and showing them. Does not
belong here: where lines go (standard error; the local supervisor's `jobs.log_files` keeps it in bounded files, a
cluster's in its own way), and the ids in them (`tracing`).

A line has `time` (ISO 8601, UTC, ms), `level`, `logger`, `process`, `message`; `exception` with the whole trace where
there was one; and whatever its author gave as `extra`: `trace_id` and `request_id` of a request, `index`, `stream`,
`incarnation`, `epoch`, `places` (ranges of records by topic id and partition). Java's lines have the same shape
(`conf/spark/log4j2.properties`, `conf/kafka/log4j2.properties`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

PROCESS = "TIDEMARK_LOG_PROCESS"
"""The variable that names the process to what it starts itself: Spark's JVM says it in its lines."""
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}
_QUIET = ("py4j", "httpx", "urllib3")


class JsonLines(logging.Formatter):
    """A record as one line of JSON. Gives a line whatever it is given."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        line: dict[str, Any] = {
            "time": _iso(record.created),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": _message(record),
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = record.stack_info
        try:
            return orjson.dumps(line, default=_shown, option=orjson.OPT_NON_STR_KEYS).decode()
        except Exception:  # half a surrogate pair, an integer of many digits, a circle: then in plain values
            return json.dumps({str(name): _plain(value) for name, value in line.items()})


def configure(process: str, level: int = logging.INFO) -> None:
    """Let this process say what it has to say as JSON lines on standard error, its last words too.

    Args:
        process: Its name, in every line.
        level: From which level on.
    """
    os.environ[PROCESS] = process
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in _QUIET:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    log = logging.getLogger(process)

    def last_words(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            log.critical("ended by an error that nobody caught", exc_info=(kind, error, trace))

    def of_thread(said: threading.ExceptHookArgs) -> None:
        if said.exc_value is not None and not isinstance(said.exc_value, SystemExit):
            told = (said.exc_type, said.exc_value, said.exc_traceback)
            name = said.thread.name if said.thread else "a thread"
            log.error("the thread %s ended by an error that nobody caught", name, exc_info=told)

    sys.excepthook, threading.excepthook = last_words, of_thread


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # a template and arguments that do not fit
        return f"{_shown(record.msg)} {_shown(record.args)}"


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _shown(value)


# ------------------------------------------------------------------------------------------------ reading


def files_of(folder: Path, process: str) -> list[Path]:
    """The log files of a process, the oldest first."""
    numbered = [path for path in folder.glob(f"{process}.log.*") if path.suffix[1:].isdigit()]
    older = sorted(numbered, key=lambda path: int(path.suffix[1:]), reverse=True)
    newest = folder / f"{process}.log"
    return [*older, newest] if newest.exists() else older


def read(
    paths: Iterable[Path], *, since: datetime | None = None, holding: str | None = None
) -> Iterator[dict[str, Any]]:
    """The lines of log files, in their order; what is no JSON line is a `message` alone.

    Args:
        paths: As `files_of` gives them.
        since: Only from this time on; a file whose last line is older is not opened.
        holding: Only lines that have this text as it is; it is looked for before a line is parsed.
    """
    earliest = _iso(since.timestamp()) if since else ""
    wanted = holding.encode() if holding is not None else b""
    for path in paths:
        try:
            if since is not None and path.stat().st_mtime < since.timestamp():
                continue
            with path.open("rb") as lines:
                for raw in lines:
                    if wanted in raw and (line := parse(raw)) and line.get("time", earliest) >= earliest:
                        yield line
        except FileNotFoundError:  # rotated away in between
            continue


def parse(raw: bytes) -> dict[str, Any]:
    """A line; what is no JSON object is a `message` alone, and an empty line is empty."""
    try:
        line = orjson.loads(raw)
    except ValueError:
        line = None
    if isinstance(line, dict):
        return line
    text = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return {"message": text} if text.strip() else {}


def readable(line: Mapping[str, Any]) -> str:
    """A line for a person: time, level, who, message, what else it says, and the trace of an exception below."""
    known = {"time", "level", "logger", "process", "message", "exception", "stack"}
    more = " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in line.items()
        if name not in known
    )
    parts = [line.get("time"), line.get("level"), line.get("logger"), line.get("message"), more]
    first = " ".join(str(part) for part in parts if part)
    rest = str(line.get("exception") or line.get("stack") or "").rstrip()
    return first + "".join(f"\n    {text}" for text in rest.splitlines())
