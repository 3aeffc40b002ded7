"""The Java archives that Spark and the embedded broker need: fetched once, checked, kept in a cache that homes share.

Belongs here: resolution by the Ivy that pyspark carries, and the check against `conf/jars.lock`. Does not belong here:
what is done with the archives (`spark.py`, `ingest/broker.py`).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import TidemarkError
from pipelines.preflight import find_java
from pipelines.settings import ROOT, Settings

GROUPS = ("spark", "kafka")
LOCK = ROOT / "conf" / "jars.lock"
_IVY = ROOT / "conf" / "ivy"

Report = Callable[[str], None]


class JarError(TidemarkError):
    """A Java archive could not be fetched, or is not the one that the lock names."""


def say(line: str) -> None:
    """The default report of progress: a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def locked(group: str, lock: Path = LOCK) -> dict[str, str]:
    """File name → sha256 of each archive of a group, as `conf/jars.lock` has them."""
    entries = (line.split() for line in lock.read_text("utf-8").splitlines() if line.strip())
    return {name.partition("/")[2]: digest for digest, name in entries if name.startswith(f"{group}/")}


def resolve(group: str, settings: Settings, report: Report = say) -> list[Path]:
    """The archives of a group, on local disk and checked; fetched first if they are not there yet.

    Args:
        group: `spark` (beyond what pyspark has) or `kafka` (the embedded broker).
        settings: `paths.jars` is the cache; `spark.ivy_settings` says where to fetch from, if not Maven Central.
        report: Is told what is going on while archives are fetched.

    Raises:
        JarError: An archive cannot be fetched or differs from the lock.
    """
    wanted = locked(group)
    folder = settings.paths.jars / group
    if not _is_verified(folder, wanted):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{group}.lock").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not _is_verified(folder, wanted):
                if not _are_good(folder, wanted):
                    _fetch(group, wanted, folder, settings, report)
                _stamp(folder, wanted).write_text(_signature(folder, wanted), "utf-8")
    return [folder / name for name in wanted]


def _stamp(folder: Path, wanted: dict[str, str]) -> Path:
    lock = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f".verified-{lock}"


def _signature(folder: Path, wanted: dict[str, str]) -> str:
    """What changes when one of the files does, without reading them."""
    stats = {name: (folder / name).stat() for name in wanted}
    return json.dumps({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()})


def _is_verified(folder: Path, wanted: dict[str, str]) -> bool:
    try:
        return _stamp(folder, wanted).read_text("utf-8") == _signature(folder, wanted)
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _are_good(folder: Path, wanted: dict[str, str]) -> bool:
    return all(
        (folder / name).is_file() and _digest(folder / name) == digest for name, digest in wanted.items()
    )


def _fetch(group: str, wanted: dict[str, str], folder: Path, settings: Settings, report: Report) -> None:
    report(f"fetching {len(wanted)} Java archives for {group} (once; they are kept in {settings.paths.jars})")
    with tempfile.TemporaryDirectory(prefix=f".{group}-", dir=folder.parent) as scratch:
        fetched = Path(scratch) / "jars"
        output = _run_ivy(group, Path(scratch), fetched, settings, report)
        for name, digest in wanted.items():
            if not (fetched / name).is_file():
                raise JarError(
                    f"{name} could not be fetched; Ivy says: {_reason(output)}",
                    where=f"conf/ivy/{group}.xml",
                    remedy="check the network, or set TIDEMARK__SPARK__IVY_SETTINGS to a file that names your mirror",
                )
            if _digest(fetched / name) != digest:
                raise JarError(
                    f"{name} is not the file that the lock names",
                    where=LOCK,
                    remedy="do not use it: find out why your mirror serves another file",
                )
        folder.mkdir(exist_ok=True)
        for name in wanted:
            (fetched / name).replace(folder / name)


def _run_ivy(group: str, scratch: Path, fetched: Path, settings: Settings, report: Report) -> list[str]:
    command = [
        str(find_java().executable),
        "-Xmx256m",
        f"-Duser.home={scratch}",
        f"-Dtidemark.ivy.cache={scratch / 'cache'}",
        "-jar",
        str(ivy_jar()),
        *("-settings", str(settings.spark.ivy_settings or _IVY / "settings.xml")),
        *("-ivy", str(_IVY / f"{group}.xml"), "-confs", "default", "-types", "jar", "bundle"),
        *("-retrieve", f"{fetched}/[organisation]_[artifact]-[revision].[ext]"),
    ]
    output = []
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ivy:
        assert ivy.stdout is not None
        for line in ivy.stdout:
            output.append(line.strip())
            if "[SUCCESSFUL ]" in line:
                done += 1
                report(f"  {done}: {line.split('[SUCCESSFUL ]')[1].split('!')[0].strip()}")
    return output


def _reason(output: list[str]) -> str:
    telling = [
        line
        for line in output
        if any(word in line for word in ("not found", "Exception", "refused", "SERVER"))
    ]
    return (telling or output or ["nothing"])[-1]


@functools.cache
def ivy_jar() -> Path:
    """The Ivy inside pyspark, found without importing pyspark."""
    spec = find_spec("pyspark")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [jar for place in places for jar in sorted(Path(place, "jars").glob("ivy-*.jar"))]
    if not found:
        raise JarError("pyspark is not installed here", where=sys.executable, remedy="run `make setup`")
    return found[-1]


def forget(settings: Settings) -> None:
    """Remove the archives, so that the next start fetches them again."""
    for group in GROUPS:
        shutil.rmtree(settings.paths.jars / group, ignore_errors=True)
