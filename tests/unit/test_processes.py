"""The supervisor, with real processes: small Python scripts that do what real ones do at their worst."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import controls, processes
from jobs.processes import Process, ProcessError, Record, Supervisor
from pipelines.errors import TidemarkError

SLEEP = "import time; time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEP}"
PARENT = (
    f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], process_group=0); {SLEEP}"
)


def ready() -> str | None:
    return None


def script(
    text: str, name: str = "worker", is_ready: Callable[[], str | None] = ready, port: int | None = None
) -> Process:
    ports = (("127.0.0.1", port, "serving.port"),) if port else ()
    command = (sys.executable, "-c", text)
    return Process(name, lambda: command, is_ready, ports=ports, ready_timeout_s=30, stop_timeout_s=1)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Supervisor]:
    keeper = Supervisor(tmp_path / "run", tmp_path / "logs")
    yield keeper
    for pid_file in keeper.run.glob("*.pid"):
        keeper.stop(script(SLEEP, pid_file.stem))


def record(keeper: Supervisor, name: str = "worker") -> Record:
    found = Record.read(keeper.pid_file(name))
    assert found is not None
    return found


def await_that(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_it_starts_once_shows_its_state_and_leaves_nothing(keeper: Supervisor) -> None:
    worker = script(SLEEP)
    assert keeper.status(worker).state == "stopped"
    assert processes.up(keeper, [worker]) == ["worker"]
    pid = record(keeper).pid
    assert processes.up(keeper, [worker]) == []
    status = keeper.status(worker)
    assert (status.state, status.pid) == ("ready", pid)
    assert processes.down(keeper, [worker]) == ["worker"]
    assert processes.down(keeper, [worker]) == []
    assert processes.start_time(pid) is None
    assert not keeper.pid_file("worker").exists()


def test_children_in_their_own_group_end_with_it(keeper: Supervisor) -> None:
    worker = script(PARENT)
    keeper.start(worker)
    await_that(lambda: len(processes.members(record(keeper))) == 2)
    pids = processes.members(record(keeper))
    keeper.stop(worker)
    assert [pid for pid in pids if processes.start_time(pid)] == []


def test_a_child_in_the_middle_of_exec_belongs_to_it_already(
    keeper: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper.start(script(SLEEP))
    began = record(keeper)
    for _ in range(100):  # one in ten or so is looked at before its environment is there
        child = subprocess.Popen(["sleep", "60"], env=os.environ | {processes.TOKEN: began.token})
        monkeypatch.setattr(processes, "_pids", lambda pid=child.pid: [pid])
        try:
            assert processes.members(began) == [child.pid]
        finally:
            child.kill()
            child.wait()
    monkeypatch.undo()


def test_after_kill_9_up_ends_the_orphans_and_starts_again(keeper: Supervisor) -> None:
    worker = script(PARENT)
    keeper.start(worker)
    first = record(keeper)
    await_that(lambda: len(processes.members(first)) == 2)
    orphan = next(pid for pid in processes.members(first) if pid != first.pid)
    os.kill(first.pid, signal.SIGKILL)
    await_that(lambda: not processes.is_alive(first))
    assert keeper.status(worker).state == "crashed"
    assert keeper.start(worker)
    assert processes.start_time(orphan) is None
    assert record(keeper).pid != first.pid


def test_a_process_that_ignores_sigterm_is_killed(keeper: Supervisor) -> None:
    worker = script(STUBBORN, is_ready=lambda: None if "deaf" in keeper.last_lines("worker") else "deaf")
    keeper.start(worker)
    pid = record(keeper).pid
    keeper.stop(worker)
    assert processes.start_time(pid) is None


@pytest.mark.parametrize("field", [{"boot_id": "an earlier boot"}, {"start_time": "1"}])
def test_a_reused_pid_is_never_killed(keeper: Supervisor, field: dict[str, str]) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        began = processes.start_time(stranger.pid)
        assert began is not None
        stale = Record("worker", stranger.pid, began, processes.boot_id(), "worker:gone", (), 0.0)
        stale._replace(**field).write(keeper.pid_file("worker"))
        assert keeper.status(script(SLEEP)).state == "crashed"
        assert not keeper.stop(script(SLEEP))
        stale._replace(**field).write(keeper.pid_file("worker"))
        assert keeper.start(script(SLEEP))
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_damaged_pid_file_counts_as_none(keeper: Supervisor) -> None:
    keeper.run.mkdir(parents=True)
    keeper.pid_file("worker").write_text('{"pid": ')
    assert keeper.status(script(SLEEP)).state == "stopped"
    assert keeper.start(script(SLEEP))


def test_a_process_that_ends_at_once_is_reported_with_its_last_words(keeper: Supervisor) -> None:
    with pytest.raises(ProcessError, match="no such lake"):
        keeper.start(script("raise SystemExit('no such lake')", is_ready=lambda: "not yet"))
    assert not keeper.pid_file("worker").exists()


def test_when_one_fails_those_started_before_it_are_stopped(keeper: Supervisor) -> None:
    first, second = (
        script(SLEEP, "first"),
        script("raise SystemExit(3)", "second", is_ready=lambda: "not yet"),
    )
    with pytest.raises(ProcessError, match="second ended"):
        processes.up(keeper, [first, second])
    assert keeper.status(first).state == "stopped"


def test_a_port_in_use_is_one_sentence_before_anything_starts(keeper: Supervisor) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(TidemarkError) as caught:
            processes.up(keeper, [script(SLEEP, "first"), script(SLEEP, "serving", port=port)])
    assert f"port {port}" in str(caught.value)
    assert "TIDEMARK__SERVING__PORT" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not keeper.pid_file("first").exists()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ProcessError, match="name one of first"):
        processes.choose([script(SLEEP, "first")], ["sreaming"])


def test_a_named_process_brings_others_and_a_signal_of_its_own_stops_it(keeper: Supervisor) -> None:
    deaf_to_sigterm = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    first, brought = script(SLEEP, "first"), script(deaf_to_sigterm, "brought")
    brought = brought._replace(stop_signal=signal.SIGINT, stop_timeout_s=30)
    known = [script(SLEEP, "other"), first._replace(brings=("brought",)), brought]
    assert [p.name for p in processes.choose(known, ["first"])] == ["first", "brought"]
    assert [p.name for p in processes.choose(known, ["brought"])] == ["brought"]
    assert processes.up(keeper, processes.choose(known, ["first"])) == ["first", "brought"]
    before = time.monotonic()
    assert processes.down(keeper, processes.choose(known, ["first"])) == ["brought", "first"]
    assert time.monotonic() - before < 15


def test_the_pid_file_is_whole_or_not_there(keeper: Supervisor) -> None:
    keeper.start(script(SLEEP))
    fields = json.loads(keeper.pid_file("worker").read_text())
    assert fields["boot_id"] == processes.boot_id()
    assert [path.name for path in keeper.run.iterdir() if path.suffix == ".tmp"] == []


def test_controls_remember_what_was_asked_and_notice_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = controls.Controls(tmp_path)
    assert board.should_run("archive")
    board.ask("archive", controls.STOPPED)
    board.ask("user_events", controls.RUNNING)
    assert not board.should_run("archive")
    assert board.what_is_missing() == "the streaming process has not reported yet"
    board.report(
        {"archive": {"state": "stopped"}, "user_events": {"state": "failing", "detail": "no broker"}}
    )
    assert board.what_is_missing() == "user_events is failing (no broker)"
    board.report({"archive": {"state": "stopped"}, "user_events": {"state": "running"}})
    assert board.what_is_missing() is None
    monkeypatch.setattr(controls, "STALE_AFTER_S", -1.0)
    assert board.status() == {}
