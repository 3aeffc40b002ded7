"""Log lines: JSON whatever is said, kept in bounded files whatever is printed, and readable again."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import log_files
from pipelines import logs


class Unshowable:
    def __repr__(self) -> str:
        raise ValueError("no")


def line_of(
    message: object, *args: object, extra: dict[str, Any] | None = None, error: Any = None
) -> dict[str, Any]:
    record = logging.getLogger("tests").makeRecord(
        "tests", logging.INFO, "f", 1, message, args, error, extra=extra
    )
    text = logs.JsonLines("unit").format(record)
    assert "\n" not in text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_line_says_when_who_and_what() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    line = line_of("took %d", 3, extra={"epoch": 7, "places": {"t@1": {"0": [(1, 4)]}}})
    assert before <= datetime.fromisoformat(line["time"]) <= datetime.now(UTC)
    assert line["time"].endswith("Z") and len(line["time"]) == len("2026-01-01T00:00:00.000Z")
    del line["time"]
    assert line == {
        "level": "INFO",
        "logger": "tests",
        "process": "unit",
        "message": "took 3",
        "epoch": 7,
        "places": {"t@1": {"0": [[1, 4]]}},
    }


def test_an_exception_is_one_field_of_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = line_of("failed", error=sys.exc_info())
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: two\nlines")


@pytest.mark.parametrize(
    "odd",
    [
        b"\xff",
        {1, 2},
        Path("x"),
        Unshowable(),
        10**40,
        float("nan"),
        "\ud800",
        {"\ud800": 1},
        datetime.now(UTC),
    ],
)
def test_what_json_does_not_know_is_shown_in_some_way(odd: object) -> None:
    assert "odd" in line_of("said", extra={"odd": odd})
    assert "message" in line_of(odd)


def test_a_circle_and_a_template_that_does_not_fit() -> None:
    circle: list[object] = []
    circle.append(circle)
    assert "odd" in line_of("said", extra={"odd": circle})
    assert line_of("%d", "no number")["message"] == "%d ('no number',)"


@given(
    st.text(),
    st.dictionaries(st.sampled_from("abc"), st.floats() | st.text() | st.integers() | st.lists(st.floats())),
)
def test_every_line_is_json(message: str, extra: dict[str, Any]) -> None:
    assert line_of(message.replace("%", ""), extra=extra).keys() >= extra.keys()


def lines_of(printed: bytes, step: int = 10**9) -> list[dict[str, Any]]:
    taken = log_files.Lines("old")
    made = [line for at in range(0, len(printed), step) for line in taken.feed(printed[at : at + step])]
    return [json.loads(line) for line in made + taken.flush(is_end=True)]


TRACE = b'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nValueError: no\n'


@pytest.mark.parametrize("step", [1, 7, 10**9])
def test_what_is_printed_becomes_lines_however_it_comes(step: int) -> None:
    ours = b'{"time":"2026-01-01T00:00:00.000Z","level":"INFO","message":"m","x":1}\n'
    theirs = b'{"event": "e", "level": "warning", "timestamp": "2026-01-01T00:00:01Z"}\n'
    java = b"WARN odd\n\tat a.b.C\nCaused by: d\n"
    lines = lines_of(ours + b"plain\n" + theirs + TRACE + b"after\n\n" + java + b"[1]\n{not json\n\xff", step)
    assert lines[0] == {"time": "2026-01-01T00:00:00.000Z", "level": "INFO", "message": "m", "x": 1}
    told = [(line["level"], line["message"]) for line in lines[1:]]
    assert told == [
        ("INFO", "plain"),
        ("WARNING", "e"),
        ("ERROR", TRACE.decode().strip()),
        ("INFO", "after"),
        ("WARNING", java.decode().strip()),
        ("INFO", "[1]"),
        ("INFO", "{not json"),
        ("INFO", "\\xff"),
    ]
    assert lines[2]["time"] == "2026-01-01T00:00:01Z"
    assert all(line["process"] == "old" for line in lines[1:])


def test_a_line_without_end_takes_no_memory_without_end() -> None:
    taken = log_files.Lines("old")
    taken.feed(b"x" * (log_files.MAX_LINE_BYTES + 10))
    (line,) = taken.flush()
    assert len(json.loads(line)["message"]) == log_files.MAX_LINE_BYTES


def test_files_are_bounded_and_read_in_order(tmp_path: Path) -> None:
    file = log_files.LogFile(tmp_path / "a.log", max_bytes=100, max_files=3)
    for number in range(40):
        file.write([json.dumps({"time": f"2026-01-01T00:00:{number:02}.000Z", "message": number}).encode()])
    files = logs.files_of(tmp_path, "a")
    assert [path.name for path in files] == ["a.log.2", "a.log.1"]
    assert all(path.stat().st_size < 200 for path in tmp_path.iterdir())
    read = [line["message"] for line in logs.read(files)]
    assert read == list(range(40))[-len(read) :]
    since = datetime.fromisoformat("2026-01-01T00:00:39Z")
    assert [line["message"] for line in logs.read(files, since=since)] == [39]
    assert [line["message"] for line in logs.read(files, holding='"message": 39')] == [39]


def test_a_process_that_is_killed_has_its_last_words_kept(tmp_path: Path) -> None:
    """Through a real pipe, after whoever started it let go of it."""
    script = f"print({TRACE.decode()!r}, flush=True); import os; os.kill(os.getpid(), 9)"
    with log_files.kept("victim", tmp_path / "logs" / "victim.log") as output:
        child = subprocess.Popen([sys.executable, "-c", script], stdout=output)
    assert child.wait() == -9
    log_files.await_whole(tmp_path / "logs" / "victim.log")
    found = list(logs.read(logs.files_of(tmp_path / "logs", "victim")))
    assert found[0]["message"] == TRACE.decode().strip()
    assert logs.readable(found[0]).splitlines()[-1] == "ValueError: no"


def test_a_process_says_its_last_words_itself(tmp_path: Path) -> None:
    script = (
        "import logging, threading, warnings; from pipelines import logs; logs.configure('unit')\n"
        "logging.getLogger('a').info('b', extra={'index': 'pins'}); warnings.warn('odd')\n"
        "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join(); raise ValueError('no')"
    )
    root = Path(logs.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["INFO", "WARNING", "ERROR", "CRITICAL"]
    assert lines[0]["index"] == "pins"
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert "ValueError: no" in lines[3]["exception"]
