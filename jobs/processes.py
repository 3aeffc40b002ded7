"""The local processes: started detached, watched, stopped, and never confused with anybody else's.

Here: what a process is, how it is recognised again (pid, start time and boot, and a token that all its children
inherit), and the order in which `up` and `down` handle them. Not here: what runs inside a process, and how the
command line prints it. A production deployment hands the same commands to its own supervisor instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs import code, controls, log_files
from jobs.code import Kept
from pipelines import logs, postgres, preflight, trino_server
from pipelines.errors import TidemarkError
from pipelines.settings import ROOT, Settings

TOKEN = "TIDEMARK_PROCESS"
PORT_PATIENCE_S = 5.0
EXEC_READS, EXEC_READ_EVERY_S = 20, 0.005
Say = Callable[[str], None]


class ProcessError(TidemarkError):
    """A process could not be started, did not become ready, or would not stop."""


class Process(NamedTuple):
    """How a process is started and known to be ready. `is_ready` gives None when it is, otherwise what is missing."""

    name: str
    command: Callable[[], Sequence[str]]  # called just before it is started, and may prepare what it needs
    is_ready: Callable[[], str | None]
    ports: tuple[tuple[str, int, str], ...] = ()  # (host, port, the setting that says so)
    ready_timeout_s: float = 60.0
    stop_timeout_s: float = 15.0
    environment: tuple[tuple[str, str], ...] = ()
    once_ready: Callable[[], object] = lambda: None
    is_needed_by_others: bool = False  # those after it are started only once it is ready
    folder: Path = ROOT  # where it is started: the code that it runs
    is_optional: bool = False  # started only by name
    brings: tuple[str, ...] = ()  # those that are started and stopped with it, where it is named
    stop_signal: signal.Signals = signal.SIGTERM  # what it takes for a polite request to end


class Record(NamedTuple):
    """What the pid file keeps: enough to tell this very process from a later one with the same pid."""

    name: str
    pid: int
    start_time: str
    boot_id: str
    token: str
    command: tuple[str, ...]
    started_at: float

    @classmethod
    def read(cls, path: Path) -> Record | None:
        try:
            fields = json.loads(path.read_text())
            return cls(**{**fields, "command": tuple(fields["command"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(self._asdict()))
        draft.replace(path)


class Status(NamedTuple):
    """state: ready | starting | crashed (it was started, and is gone) | stopped."""

    name: str
    state: str
    pid: int | None
    detail: str
    log: str
    uptime_s: float | None
    rss_mb: int | None
    command: str = ""


# ---------------------------------------------------------------------------------------------- which process is it?


def boot_id() -> str:
    """Names this boot of the machine: a pid file of an earlier boot describes nothing that can be alive."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = subprocess.run(["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def start_time(pid: int) -> str | None:
    """When the process with this pid began, in the kernel's own words; None when there is none (or only a zombie)."""
    _reap(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":
            _reap(pid)
            return None
        return fields[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    ps = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    state, _, began = (
        subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
    )
    return began.strip() or None if state and not state.startswith("Z") else None


def _reap(pid: int) -> None:
    """A child of this very process stays a zombie until it is waited for."""
    with contextlib.suppress(OSError):
        os.waitpid(pid, os.WNOHANG)


def is_alive(record: Record) -> bool:
    """The very process that was started, not one that was given its pid later."""
    return record.boot_id == boot_id() and start_time(record.pid) == record.start_time


def members(record: Record) -> list[int]:
    """The process and all that it started and that is still there, even when it is gone: they carry its token."""
    if record.boot_id != boot_id():
        return []
    if not Path("/proc/self/environ").exists():
        return [record.pid] if is_alive(record) else []
    needle = f"{TOKEN}={record.token}".encode()
    return [pid for pid in _pids() if needle in _environment(pid) and start_time(pid) is not None]


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> list[bytes]:
    """What it was started with; nothing when it is gone, is another user's, or is the kernel's own.

    A process shows an empty environment for a moment while it executes a new program: it is read again, else
    a sweep in that moment would leave a child behind.
    """
    try:
        for _ in range(EXEC_READS):
            if (environment := Path(f"/proc/{pid}/environ").read_bytes()) or not Path(
                f"/proc/{pid}/exe"
            ).exists():
                return environment.split(b"\0")
            time.sleep(EXEC_READ_EVERY_S)
    except OSError:
        pass
    return []


def _rss_mb(pids: Sequence[int]) -> int | None:
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20 if pages else None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until this is done, so that no process is half started or half stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda signum, frame: came.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------- start, stop, look


class Supervisor(NamedTuple):
    """Starts and stops processes whose pid files and logs are in these two folders."""

    run: Path
    logs: Path

    def pid_file(self, name: str) -> Path:
        return self.run / f"{name}.pid"

    def log_file(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    @contextlib.contextmanager
    def lock(self, wait_s: float = 120.0) -> Iterator[None]:
        """One `up`, `down`, `start` or `stop` of this home at a time."""
        self.run.mkdir(parents=True, exist_ok=True)
        path = self.run / "supervisor.lock"
        with path.open("w") as handle:
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise ProcessError(
                            "another `tidemark up` or `down` is still at work",
                            where=str(path),
                            remedy="wait until it has ended, then try again",
                        ) from None
                    time.sleep(0.2)
            yield

    def start(self, process: Process, say: Say = lambda text: None) -> bool:
        """Starts it unless it runs, and waits until it is ready. True if this call started it."""
        is_new = self.launch(process, say)
        try:
            self.await_ready(process, is_new, say)
        except BaseException:
            if is_new:
                self.stop(process)
            raise
        return is_new

    def launch(self, process: Process, say: Say = lambda text: None) -> bool:
        """Starts it unless it runs, and does not wait. True if this call started it."""
        record = Record.read(self.pid_file(process.name))
        if record is not None and is_alive(record):
            return False
        if record is not None:
            self.sweep(record)
        require_free_ports(process, 0.0 if record is None else PORT_PATIENCE_S)
        try:
            record = self._spawn(process)
        except BaseException:
            self.stop(process)
            raise
        say(f"{process.name}: started (pid {record.pid})")
        return True

    def await_ready(self, process: Process, is_new: bool, say: Say = lambda text: None) -> None:
        """Waits until a running process is ready.

        Raises:
            ProcessError: it ended, or it was not ready in time.
        """
        record = Record.read(self.pid_file(process.name))
        if record is None:
            raise ProcessError(f"{process.name} was stopped while it started", remedy="run the command again")
        self._await_ready(process, record)
        if is_new:
            process.once_ready()
        say(f"{process.name}: ready")

    def _spawn(self, process: Process) -> Record:
        command = tuple(process.command())
        token = f"{process.name}:{uuid.uuid4().hex}"
        named = {logs.PROCESS: process.name, TOKEN: token}
        environment = {**os.environ, **dict(process.environment), **named}
        with uninterrupted(), log_files.kept(process.name, self.log_file(process.name)) as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=process.folder,
                start_new_session=True,
            )
            began = start_time(child.pid) or "gone"
            record = Record(process.name, child.pid, began, boot_id(), token, command, time.time())
            record.write(self.pid_file(process.name))
        return record

    def _await_ready(self, process: Process, record: Record) -> None:
        deadline = time.monotonic() + process.ready_timeout_s
        pause = 0.05
        while (missing := process.is_ready()) is not None:
            if not is_alive(record):
                log_files.await_whole(self.log_file(process.name))
                raise ProcessError(
                    f"{process.name} ended while it was starting:\n{self.last_lines(process.name)}",
                    where=str(self.log_file(process.name)),
                    remedy="the log says why; mend it and run the command again",
                )
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"{process.name} was not ready after {process.ready_timeout_s:.0f} s: {missing}",
                    where=str(self.log_file(process.name)),
                    remedy="the log says what it waits for; then run the command again",
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)

    def stop(self, process: Process, say: Say = lambda text: None) -> bool:
        """Stops it and all that it started: asks, waits, then kills. True if anything was running."""
        record = Record.read(self.pid_file(process.name))
        if record is None:
            return False
        is_running = is_alive(record)
        if is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, process.stop_signal)
            _wait_until(lambda: not is_alive(record), process.stop_timeout_s)
        had_members = self.sweep(record)
        self.pid_file(process.name).unlink(missing_ok=True)
        if is_running or had_members:
            say(f"{process.name}: stopped")
        return is_running or had_members

    def sweep(self, record: Record) -> bool:
        """Ends whatever carries the token still: its children after a crash, or all of it when it would not listen."""
        if not (left := members(record)):
            return False
        for sent, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 5.0)):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
            _wait_until(lambda: not members(record), patience)
            if not (left := members(record)):
                return True
        raise ProcessError(
            f"{record.name} left processes that cannot be killed: {', '.join(map(str, left))}",
            where=str(self.pid_file(record.name)),
            remedy="look at them with `ps -fp PID`; they may belong to another user",
        )

    def status(self, process: Process) -> Status:
        """What a glance shows; asks the ready probe once."""
        record = Record.read(self.pid_file(process.name))
        log = str(self.log_file(process.name))
        if record is None:
            return Status(process.name, "stopped", None, "", log, None, None)
        if not is_alive(record):
            return Status(process.name, "crashed", None, "`tidemark up` starts it again", log, None, None)
        missing = process.is_ready()
        state, uptime_s = (
            ("ready" if missing is None else "starting"),
            round(time.time() - record.started_at, 1),
        )
        command = shlex.join(record.command)
        return Status(
            process.name, state, record.pid, missing or "", log, uptime_s, _rss_mb(members(record)), command
        )

    def last_lines(self, name: str, count: int = 15) -> str:
        """The end of a log, for a person."""
        try:
            with self.log_file(name).open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 65_536))
                found = [logs.readable(line) for raw in log if (line := logs.parse(raw))]
        except OSError:
            return "(no log)"
        return "\n".join(f"  {line}" for line in "\n".join(found).splitlines()[-count:])


def _wait_until(is_done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# ------------------------------------------------------------------------------------------------ probes


def require_free_ports(process: Process, patience_s: float = 0.0) -> None:
    """One sentence, before anything is started, when somebody else listens where this process would.

    The system takes a moment to close the ports of a process that was killed: hence the patience.
    """
    _wait_until(lambda: all(preflight.is_free(host, port) for host, port, _ in process.ports), patience_s)
    for host, port, setting in process.ports:
        preflight.check_port(host, port, setting)


def http_probe(url: str) -> Callable[[], str | None]:
    """Ready when a GET of the URL gives a 2xx."""

    def probe() -> str | None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return None
        except urllib.error.HTTPError as error:
            return f"{url} answers {error.code}: {error.read(300).decode(errors='replace')}"
        except (OSError, ValueError) as error:
            return f"{url} does not answer ({error})"

    return probe


# ------------------------------------------------------------------------------------------ Tidemark's own processes


def local(settings: Settings) -> list[Process]:
    """The processes of the local size, in the order in which they start."""
    beside = [_beside(settings, entry) for entry in controls.beside(settings.paths.run)]
    processes = [
        _collector(settings),
        _ads(settings),
        _streams(settings),
        *beside,
        _serving(settings),
        _dagster(settings),
    ]
    if settings.trino.is_embedded:
        processes.append(_trino(settings))
    processes += [_ads_database(settings), _ads_connect(settings)]
    return [_broker(settings), *processes] if settings.kafka.is_embedded else processes


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _environment_of(settings: Settings) -> tuple[tuple[str, str], ...]:
    return tuple(settings.environment.items())


def _broker(settings: Settings) -> Process:
    """The embedded Kafka broker; on a cluster the broker is the user's, and no process of ours."""

    def command() -> Sequence[str]:
        from pipelines.ingest import broker

        return broker.command(settings)

    def is_ready() -> str | None:
        from pipelines.ingest import broker

        return (
            None if broker.is_ready(settings) else f"no broker answers at {settings.kafka.bootstrap_servers}"
        )

    def once_ready() -> None:
        from pipelines.contracts import CONTRACTS, INTERNAL
        from pipelines.ingest import broker

        broker.ensure_topics(settings, [*CONTRACTS, *INTERNAL])

    kafka = settings.kafka
    ports = (
        ("127.0.0.1", kafka.port, "kafka.port"),
        ("127.0.0.1", kafka.controller_port, "kafka.controller_port"),
    )
    environment = _environment_of(settings)
    return Process("broker", command, is_ready, ports, 120.0, 30.0, environment, once_ready, True)


def _collector(settings: Settings) -> Process:
    host, port = settings.collector.host, settings.collector.port
    return Process(
        "collector",
        lambda: _python("-m", "pipelines.ingest.collector"),
        http_probe(f"http://{host}:{port}/healthz"),
        ports=((host, port, "collector.port"),),
        environment=_environment_of(settings),
    )


def _ads(settings: Settings) -> Process:
    host, port = settings.ads.host, settings.ads.port
    return Process(
        "ads",
        lambda: _python("-m", "pipelines.ads.service"),
        http_probe(f"http://{host}:{port}/healthz"),
        ports=((host, port, "ads.port"),),
        environment=_environment_of(settings),
    )


def _streams(settings: Settings) -> Process:
    board = controls.Controls(settings.paths.run)

    def command() -> Sequence[str]:
        board.forget_status()
        return _python("-m", "jobs.streams")

    environment = _environment_of(settings)
    return Process("streams", command, board.what_is_missing, (), 300.0, 40.0, environment)


def _beside(settings: Settings, entry: controls.Beside) -> Process:
    """Streams of another lineage, from the code that was kept of it."""
    board = controls.Controls(settings.paths.run, entry.name)
    kept = Kept(settings.paths.code / entry.code, {})

    def command() -> Sequence[str]:
        board.forget_status()
        code.named(settings, entry.code)  # or it says what is missing
        chosen = [argument for index in entry.indices for argument in ("--index", index)]
        return _python("-m", "jobs.streams", "--beside", entry.name, *chosen)

    environment = (*_environment_of(settings), *kept.environment().items())
    missing = board.what_is_missing
    return Process(entry.name, command, missing, (), 300.0, 40.0, environment, folder=kept.folder)


def _serving(settings: Settings) -> Process:
    host, port = settings.serving.host, settings.serving.port
    return Process(
        "serving",
        lambda: _python("-m", "pipelines.serving"),
        http_probe(f"http://{host}:{port}/healthz"),
        ports=((host, port, "serving.port"),),
        ready_timeout_s=90.0,
        environment=_environment_of(settings),
    )


def _dagster(settings: Settings) -> Process:
    host, port, home = settings.dagster.host, settings.dagster.port, settings.paths.dagster

    def command() -> Sequence[str]:
        prepare_dagster_home(settings)
        return _python(
            "-m",
            "dagster",
            "dev",
            "-m",
            "jobs.definitions",
            "-h",
            host,
            "-p",
            str(port),
            "--log-format",
            "json",
        )

    return Process(
        "dagster",
        command,
        http_probe(f"http://{host}:{port}/server_info"),
        ports=((host, port, "dagster.port"),),
        ready_timeout_s=300.0,
        stop_timeout_s=25.0,
        environment=(*_environment_of(settings), ("DAGSTER_HOME", str(home))),
    )


def _trino(settings: Settings) -> Process:
    """SQL over the lake; on a cluster Trino is the user's, and no process of ours."""
    return Process(
        "trino",
        lambda: trino_server.command(settings),
        lambda: trino_server.what_is_missing(settings),
        ports=(("127.0.0.1", settings.trino.port, "trino.port"),),
        ready_timeout_s=180.0,
        stop_timeout_s=30.0,
        environment=(*_environment_of(settings), *trino_server.environment(settings).items()),
        is_optional=True,
    )


def _ads_database(settings: Settings) -> Process:
    """The private PostgreSQL of the ads account, with what captures it; a user's own is no process of ours."""
    port = settings.ads.database_port

    def command() -> Sequence[str]:
        from pipelines.ads import database

        return database.command(settings)

    def is_ready() -> str | None:
        return None if postgres.is_ready(port) else f"no PostgreSQL answers at port {port}"

    def once_ready() -> None:
        from pipelines.ads import database

        database.make(settings)

    return Process(
        "ads-db",
        command,
        is_ready,
        ports=(("127.0.0.1", port, "ads.database_port"),),
        stop_timeout_s=30.0,
        environment=_environment_of(settings),
        once_ready=once_ready,
        is_needed_by_others=True,
        folder=Path("/"),  # the user whom PostgreSQL runs as may not see the checkout
        is_optional=True,
        brings=("ads-connect",),
        stop_signal=signal.SIGINT,  # SIGTERM waits until the last client has gone
    )


def _ads_connect(settings: Settings) -> Process:
    """Kafka Connect, which captures the ads database, private or not."""

    def command() -> Sequence[str]:
        from pipelines.ads import capture

        capture.prepare(settings)
        return _python("-m", "pipelines.ads.capture")

    def is_ready() -> str | None:
        from pipelines.ads import capture

        return capture.what_is_missing(settings)

    return Process(
        "ads-connect",
        command,
        is_ready,
        ports=(("127.0.0.1", settings.ads.connect_port, "ads.connect_port"),),
        ready_timeout_s=120.0,
        stop_timeout_s=25.0,
        environment=_environment_of(settings),
        is_optional=True,
    )


def prepare_dagster_home(settings: Settings) -> None:
    """Dagster's storage lives under the home, with the project's `dagster.yaml` beside it."""
    home = settings.paths.dagster
    home.mkdir(parents=True, exist_ok=True)
    declared = ROOT / "dagster.yaml"
    if declared.exists():
        (home / "dagster.yaml").write_text(declared.read_text())


def supervisor(settings: Settings) -> Supervisor:
    """The one that keeps its files under this home."""
    return Supervisor(settings.paths.run, settings.paths.logs)


def choose(processes: Sequence[Process], names: Sequence[str]) -> list[Process]:
    """The named ones and those that they bring, in start order; all of them when none is named.

    Raises:
        ProcessError: a name is not known; the message lists those that are.
    """
    known = {process.name: process for process in processes}
    for name in names:
        if name not in known:
            raise ProcessError(
                f"there is no process {name!r}",
                remedy=f"name one of {', '.join(known)}; `tidemark status` lists all",
            )
    chosen = {brought for name in names for brought in (name, *known[name].brings)}
    return [process for process in processes if not names or process.name in chosen]


def usual(processes: Sequence[Process]) -> list[Process]:
    """Those that are started when none is named."""
    return [process for process in processes if not process.is_optional]


def up(keeper: Supervisor, processes: Sequence[Process], say: Say = lambda text: None) -> list[str]:
    """Starts what does not run, in order; gives the names that this call started.

    When one fails, or the user interrupts, what this call had started is stopped again.
    """
    started: list[Process] = []
    with keeper.lock():
        for process in processes:
            record = Record.read(keeper.pid_file(process.name))
            if record is None or not members(record):
                require_free_ports(process, 0.0 if record is None else PORT_PATIENCE_S)
        try:
            for process in processes:
                if keeper.launch(process, say):
                    started.append(process)
                if process.is_needed_by_others:
                    keeper.await_ready(process, process in started, say)
            for process in processes:
                if not process.is_needed_by_others:
                    keeper.await_ready(process, process in started, say)
        except BaseException:
            with uninterrupted():
                for process in reversed(started):
                    keeper.stop(process, say)
            raise
    return [process.name for process in started]


def down(keeper: Supervisor, processes: Sequence[Process], say: Say = lambda text: None) -> list[str]:
    """Stops what runs, in the opposite order; gives the names. Goes on when one of them resists, then says so."""
    stopped, failures = [], []
    with keeper.lock():
        for process in reversed(processes):
            try:
                if keeper.stop(process, say):
                    stopped.append(process.name)
            except ProcessError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    return stopped
