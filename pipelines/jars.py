"""The Java archives that Spark, Kafka and Trino need: fetched once, checked, kept in a cache that homes share.

`conf/jars.lock` names each one by its path in a Maven repository, nothing transitive, with the sum that it must have.

Belongs here: fetching, and the check of the sums. Does not belong here: what is done with the archives (`spark.py`,
`ingest/broker.py`, `ads/capture.py`, `trino_server.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import shutil
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from pipelines.errors import TidemarkError
from pipelines.settings import ROOT, Settings

NEEDED = ("spark", "kafka")
GROUPS = (*NEEDED, "connect", "trino", "trino-iceberg")
LOCK = ROOT / "conf" / "jars.lock"
AT_ONCE = 8
ATTEMPTS = 4
TIMEOUT_S = 60.0

Report = Callable[[str], None]


class JarError(TidemarkError):
    """A Java archive could not be fetched, or is not the one that the lock names."""


def say(line: str) -> None:
    """The default report of progress: a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def locked(group: str, lock: Path = LOCK) -> dict[str, str]:
    """Path in a Maven repository → sha256 of each archive of a group, as `conf/jars.lock` has them."""
    entries = (line.split() for line in lock.read_text("utf-8").splitlines() if line.strip())
    return {name.partition("/")[2]: digest for digest, name in entries if name.startswith(f"{group}/")}


def file_name(path: str) -> str:
    """The name in the cache of what lies at a path in a repository.

    Examples:
        >>> file_name("org/yaml/snakeyaml/2.4/snakeyaml-2.4.jar")
        'org.yaml_snakeyaml-2.4.jar'
    """
    *organisation, _, _, name = path.split("/")
    return f"{'.'.join(organisation)}_{name}"


def resolve(group: str, settings: Settings, report: Report = say) -> list[Path]:
    """The archives of a group, on local disk and checked; fetched first if they are not there yet.

    Args:
        group: `spark` (beyond what pyspark has), `kafka` (the embedded broker), `connect` (beyond what `kafka`
            has), `trino` or one of its plugins.
        settings: `paths.jars` is the cache, `jars.repository` where they are fetched from.
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
    return [folder / file_name(path) for path in wanted]


def _stamp(folder: Path, wanted: dict[str, str]) -> Path:
    lock = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f".verified-{lock}"


def _signature(folder: Path, wanted: dict[str, str]) -> str:
    """What changes when one of the files does, without reading them."""
    names = map(file_name, wanted)
    stats = {name: (folder / name).stat() for name in names}
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
    found = {folder / file_name(path): digest for path, digest in wanted.items()}
    return all(file.is_file() and _digest(file) == digest for file, digest in found.items())


def _fetch(group: str, wanted: dict[str, str], folder: Path, settings: Settings, report: Report) -> None:
    report(f"fetching {len(wanted)} Java archives for {group} (once; they are kept in {settings.paths.jars})")
    context = ssl.create_default_context()
    with (
        tempfile.TemporaryDirectory(prefix=f".{group}-", dir=folder.parent) as scratch,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        fetched = [
            pool.submit(_fetch_one, settings.jars.repository, path, Path(scratch), context) for path in wanted
        ]
        try:
            for number, future in enumerate(as_completed(fetched), 1):
                report(f"  {number}: {future.result().name}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for path, digest in wanted.items():
            if _digest(Path(scratch) / file_name(path)) != digest:
                raise JarError(
                    f"{file_name(path)} is not the file that the lock names",
                    where=LOCK,
                    remedy="do not use it: find out why your repository serves another file",
                )
        folder.mkdir(exist_ok=True)
        for path in wanted:
            (Path(scratch) / file_name(path)).replace(folder / file_name(path))


def _fetch_one(repository: str, path: str, folder: Path, context: ssl.SSLContext) -> Path:
    parts = urlsplit(repository)
    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"} if parts.username else {}
    place = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(f"{place.rstrip('/')}/{path}", headers=headers)
    target = folder / file_name(path)
    for attempt in range(ATTEMPTS):
        try:
            with (
                urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer,
                target.open("wb") as file,
            ):
                shutil.copyfileobj(answer, file)
            return target
        except (OSError, http.client.HTTPException) as error:
            is_final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if is_final or attempt == ATTEMPTS - 1:
                raise JarError(
                    f"{file_name(path)} could not be fetched: {error}",
                    where=place,
                    remedy="check the network, or set TIDEMARK__JARS__REPOSITORY to a mirror of Maven Central",
                ) from error
            time.sleep(2.0**attempt)
    raise AssertionError


def forget(settings: Settings) -> None:
    """Remove the archives, so that the next start fetches them again."""
    for group in GROUPS:
        shutil.rmtree(settings.paths.jars / group, ignore_errors=True)
