"""What must be true of this machine before anything is started, each answered in one sentence.

Belongs here: checks of the Python and Java at hand, of free ports and of free disk. Does not belong here: whether a
service that Tidemark started is healthy. `python -m pipelines.preflight setup` runs before anything is installed, so
this module needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.errors import TidemarkError

if TYPE_CHECKING:
    from pipelines.settings import Settings

JAVA_VERSIONS = (17, 21)
TRINO_JAVA_VERSION = 25
PYTHON_MINIMUM = (3, 11)
_FOLDERS = ("/usr/lib/jvm", "/Library/Java/JavaVirtualMachines", "/opt/java", "/opt/jdk")
SETUP_BYTES = 4 * 2**30
_INSTALL = (
    "install one (on Debian or Ubuntu: apt-get install openjdk-17-jre-headless) or set JAVA_HOME to one"
)


class PreflightError(TidemarkError):
    """This machine lacks something that Tidemark needs."""


class Java(NamedTuple):
    """A Java runtime that Spark and Kafka run on."""

    home: Path
    version: int

    @property
    def executable(self) -> Path:
        """Its `java`."""
        return self.home / "bin" / "java"


def find_java(env: Mapping[str, str] = os.environ, folders: Iterable[Path | str] = _FOLDERS) -> Java:
    """The Java to use: that of JAVA_HOME, else the one on PATH, else one in the well-known folders, if 17 or 21.

    Raises:
        PreflightError: There is none, or JAVA_HOME names one of another version.
    """
    wanted = " or ".join(map(str, JAVA_VERSIONS))
    if named := env.get("JAVA_HOME"):
        java = _java(Path(named))
        if java is None:
            raise PreflightError(
                "JAVA_HOME has no bin/java", where=named, remedy=f"set it to a Java {wanted}, or unset it"
            )
        if java.version in JAVA_VERSIONS:
            return java
        raise PreflightError(
            f"JAVA_HOME is Java {java.version}, and Spark needs Java {wanted}",
            where=named,
            remedy=f"set it to a Java {wanted}, or unset it",
        )
    others = []
    for java in _installed(env, folders):
        if java.version in JAVA_VERSIONS:
            return java
        others.append(f"Java {java.version} in {java.home}")
    if others:
        raise PreflightError(
            f"Spark needs Java {wanted}, and only others are here", where=", ".join(others), remedy=_INSTALL
        )
    raise PreflightError(f"there is no Java on this machine, and Spark needs Java {wanted}", remedy=_INSTALL)


def find_trino_java(
    home: Path | None = None, env: Mapping[str, str] = os.environ, folders: Iterable[Path | str] = _FOLDERS
) -> Java:
    """The JDK 25 that Trino runs on: the given one, else that of JAVA_HOME, on PATH or in the well-known folders.

    Raises:
        PreflightError: There is none, or the given one is none.
    """
    wanted = f"a JDK {TRINO_JAVA_VERSION}"
    if home is not None:
        java = _java(home)
        if java is None or java.version != TRINO_JAVA_VERSION or not is_jdk(java):
            raise PreflightError(
                f"this is not {wanted}",
                where=home,
                remedy="set trino.java_home to one, or to null to look for one",
            )
        return java
    named = [Path(env["JAVA_HOME"])] if env.get("JAVA_HOME") else []
    for java in (*filter(None, map(_java, named)), *_installed(env, folders)):
        if java.version == TRINO_JAVA_VERSION and is_jdk(java):
            return java
    raise PreflightError(
        f"there is no {wanted} on this machine, and Trino needs one",
        remedy=f"install one (Temurin {TRINO_JAVA_VERSION}: https://adoptium.net; on newer Debian or Ubuntu:"
        f" apt-get install openjdk-{TRINO_JAVA_VERSION}-jdk-headless) or set TIDEMARK__TRINO__JAVA_HOME to one",
    )


def is_jdk(java: Java) -> bool:
    """Whether it can compile: a runtime alone lacks the compiler's module."""
    with contextlib.suppress(OSError):
        return "jdk.compiler" in (java.home / "release").read_text("utf-8", "replace")
    return (java.home / "bin" / "javac").exists()


def _installed(env: Mapping[str, str], folders: Iterable[Path | str]) -> Iterator[Java]:
    """Every Java on PATH and in the folders."""
    found = []
    if on_path := shutil.which("java", path=env.get("PATH", os.defpath)):
        found.append(Path(on_path).resolve().parents[1])
    for folder in map(Path, folders):
        if folder.is_dir():
            found += sorted(home for inner in folder.iterdir() for home in (inner, inner / "Contents/Home"))
    yield from filter(None, map(_java, found))


def _java(home: Path) -> Java | None:
    """The Java in a folder: its version from the `release` file, else as `java -version` says it."""
    executable = home / "bin" / "java"
    if not os.access(executable, os.X_OK):
        return None
    with contextlib.suppress(OSError):
        text = (home / "release").read_text("utf-8", "replace")
        if match := re.search(r'^JAVA_VERSION="(?:1\.)?(\d+)', text, re.MULTILINE):
            return Java(home, int(match[1]))
    try:
        said = subprocess.run(
            [executable, "-version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    return Java(home, int(match[1])) if match else None


def check_python(version: tuple[int, ...] = sys.version_info[:2]) -> None:
    """Refuse a Python that is too old."""
    if version < PYTHON_MINIMUM:
        raise PreflightError(
            f"this is Python {'.'.join(map(str, version))}, and Tidemark needs 3.11 or later",
            where=sys.executable,
            remedy="make the environment again with `make clean setup PYTHON=python3.11`",
        )


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen at this address now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError:
        return False
    return True


def check_port(host: str, port: int, setting: str) -> None:
    """Refuse a port that something already listens at.

    Args:
        host: The address that the server would bind.
        port: Its port.
        setting: The setting that names the port, for the remedy.
    """
    if not is_free(host, port):
        section, _, key = setting.partition(".")
        variable = f"TIDEMARK__{section}__{key}".upper()
        raise PreflightError(
            f"port {port} on {host} is in use",
            where=setting,
            remedy=f"stop what listens there (`ss -ltnp` names it), or set {variable} to a free port",
        )


def check_ports(
    settings: Settings, services: Iterable[str] = ("kafka", "serving", "collector", "ads", "dagster")
) -> None:
    """Refuse to start if the port of one of these services is in use."""
    for service in services:
        if service == "kafka":
            if settings.kafka.is_embedded:
                check_port("127.0.0.1", settings.kafka.port, "kafka.port")
                check_port("127.0.0.1", settings.kafka.controller_port, "kafka.controller_port")
        else:
            section = getattr(settings, service)
            check_port(section.host, section.port, f"{service}.port")


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse a folder whose file system has too little room. The folder need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise PreflightError(
            f"{_gib(free)} GiB of disk are free, and {_gib(needed_bytes)} are needed",
            where=folder,
            remedy="free some space, or set TIDEMARK_HOME to a folder on a larger disk",
        )
    if not os.access(existing, os.W_OK):
        raise PreflightError(
            "this folder cannot be written",
            where=existing,
            remedy="set TIDEMARK_HOME to a folder of your own",
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def check_compiler(env: Mapping[str, str] = os.environ) -> None:
    """Refuse a machine that cannot build hnswlib, which comes as source."""
    path = env.get("PATH", os.defpath)
    if not any(shutil.which(name, path=path) for name in (env.get("CXX", "c++"), "c++", "g++", "clang++")):
        raise PreflightError(
            "there is no C++ compiler, and hnswlib is built from source",
            remedy="install one (on Debian or Ubuntu: apt-get install g++)",
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise PreflightError(
            "Python's headers are missing, and hnswlib is built with them",
            where=sys.executable,
            remedy="install them (on Debian or Ubuntu: apt-get install python3-dev)",
        )


def check_setup(checkout: Path) -> None:
    """What `make setup` needs: Python with venv, Java, a compiler, and room for the environment."""
    check_python()
    if find_spec("ensurepip") is None:
        raise PreflightError(
            "this Python cannot make virtual environments",
            where=sys.executable,
            remedy="install its venv (on Debian or Ubuntu: apt-get install python3-venv)",
        )
    find_java()
    check_compiler()
    check_disk(checkout, SETUP_BYTES)


def check(settings: Settings, services: Iterable[str] = (), needed_bytes: int = 2 * 2**30) -> Java:
    """Everything at once: Python, Java, disk, and the ports of the services that are about to start.

    Raises:
        PreflightError: The first thing that is wrong, and what to do about it.
    """
    check_python()
    java = find_java()
    check_disk(settings.home, needed_bytes)
    check_ports(settings, services)
    return java


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """`setup`, or the names of the services that are about to start: 0 if all is well, else 1 and one sentence."""
    try:
        if list(arguments) == ["setup"]:
            check_setup(Path(__file__).resolve().parents[1])
        else:
            from pipelines.settings import load  # not there yet when `setup` is asked

            check(load(), arguments)
    except TidemarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
