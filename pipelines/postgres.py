"""A private PostgreSQL: found on this machine, made in a folder, run in the foreground on loopback.

Belongs here: finding its programs, making its data, the command that runs it. Does not belong here: what is in it (the
ads database, the ads repository), and supervising it (`jobs.processes`).

PostgreSQL refuses to run as root; there it runs as the user `postgres` that its package makes, who owns the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.errors import TidemarkError
from pipelines.preflight import PreflightError

INSTALL = "apt-get install -y postgresql"
USER = "postgres"
_HOST = "127.0.0.1"
_FOLDERS = "/usr/lib/postgresql"
_READY_S = 60.0


class PostgresError(TidemarkError):
    """PostgreSQL could not be made or did not start."""


def programs() -> Path:
    """The folder of the newest PostgreSQL's programs.

    Raises:
        PreflightError: there is none.
    """
    packaged = sorted(Path(_FOLDERS).glob("*/bin/initdb"), key=lambda file: _number(file.parents[1].name))
    found = packaged[-1] if packaged else shutil.which("initdb")
    if found is None:
        raise PreflightError("there is no PostgreSQL on this machine", remedy=f"install one: {INSTALL}")
    return Path(found).parent


def command(folder: Path, port: int, options: Mapping[str, str] | None = None) -> list[str]:
    """What runs the server in the foreground, with its data made if there is none; SIGINT stops it politely.

    Anyone on this machine may log in as `postgres` over loopback, without a password.

    Args:
        folder: Where its data is.
        port: On loopback.
        options: Settings of the server.

    Raises:
        PreflightError: there is no PostgreSQL.
        PostgresError: the data could not be made.
    """
    binaries, data = programs(), folder / "data"
    as_user = _as_user()
    if not (data / "PG_VERSION").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if as_user:
            shutil.chown(folder, USER, USER)
        making = folder / "making"
        shutil.rmtree(making, ignore_errors=True)
        _run([*as_user, str(binaries / "initdb"), "-D", str(making), "-U", USER, "-A", "trust", "-E", "UTF8"])
        making.rename(data)
    given = {"listen_addresses": _HOST, "unix_socket_directories": "", "fsync": "on", **(options or {})}
    flags = [part for name, value in given.items() for part in ("-c", f"{name}={value}")]
    return [*as_user, str(binaries / "postgres"), "-D", str(data), "-p", str(port), *flags]


def address(port: int, database: str = "postgres") -> str:
    """Where a private server is, for whoever connects."""
    return f"postgresql://{USER}@{_HOST}:{port}/{database}"


def is_ready(port: int) -> bool:
    """Whether a private server answers."""
    asked = [str(programs() / "pg_isready"), "-q", "-h", _HOST, "-p", str(port)]
    return subprocess.run(asked, check=False).returncode == 0


@contextlib.contextmanager
def running(folder: Path, port: int, options: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server that ends with the block; its address.

    Raises:
        PreflightError: there is no PostgreSQL.
        PostgresError: it did not start.
    """
    started = command(folder, port, options)
    log = folder / "postgres.log"
    with log.open("ab") as output:
        process = subprocess.Popen(started, stdout=output, stderr=output, cwd="/", start_new_session=True)
    try:
        _await_ready(process, port, log)
        yield address(port)
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _await_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not is_ready(port):
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            raise PostgresError(
                f"PostgreSQL did not start: {' '.join(last)}", where=log, remedy="read the log"
            )
        time.sleep(0.1)


def _as_user() -> list[str]:
    """What makes a command run as a user whom PostgreSQL accepts."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]


def _run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise PostgresError(
            f"PostgreSQL's data could not be made: {' '.join(said)}",
            where=" ".join(arguments),
            remedy=f"where this process is root, the user {USER} must be able to reach the folder",
        )


def _number(version: str) -> float:
    try:
        return float(version)
    except ValueError:
        return 0.0
