"""The embedded Trino: one node for a single machine, on the same catalog as Spark and pyiceberg.

Belongs here: what runs it (archives, plugin folder, flags, environment), and whether it answers. Does not belong here:
asking it (`sql`), the process around it (`jobs.processes`), the configuration itself (`conf/trino/`, which also has the
files for a user's own cluster).

Trino is published as archives without a main class, and as a plugin without the file that names it: a class of one line
(`conf/trino/Launch.java`, which Java compiles as it starts) and a jar of one entry stand in.
"""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pipelines import jars, lake
from pipelines.errors import TidemarkError
from pipelines.preflight import find_trino_java
from pipelines.settings import ROOT, Settings

VERSION = "483"
CONFIGURATION = ROOT / "conf" / "trino"
_PLUGIN = "META-INF/services/io.trino.spi.Plugin"
_PLUGINS = {"iceberg": "io.trino.plugin.iceberg.IcebergPlugin"}
_FLAGS = (
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-OmitStackTraceInFastThrow",
    "-Djdk.attach.allowAttachSelf=true",
    "--add-modules=jdk.incubator.vector",
    "--enable-native-access=ALL-UNNAMED",
    "--sun-misc-unsafe-memory-access=allow",
)


class TrinoServerError(TidemarkError):
    """The embedded Trino cannot be started with these settings."""


def command(settings: Settings, report: jars.Report = jars.say) -> list[str]:
    """What runs the embedded Trino in the foreground, with its folders prepared; SIGTERM stops it politely.

    Raises:
        TrinoServerError: The settings name the user's own Trino, or a catalog that is not on this machine.
        PreflightError: There is no Java 25.
        JarError: Its archives could not be fetched.
    """
    if not settings.trino.is_embedded:
        raise TrinoServerError(
            "there is no embedded Trino in these settings",
            where="trino.is_embedded",
            remedy="start your own (conf/trino/cluster/ has its catalog), or set TIDEMARK__TRINO__IS_EMBEDDED=true",
        )
    if settings.lake.sqlite_path is None:
        raise TrinoServerError(
            "the embedded Trino reads a catalog in SQLite",
            where="lake.catalog_uri",
            remedy="start your own Trino with a file of conf/trino/cluster/, and set TIDEMARK__TRINO__URL",
        )
    java = find_trino_java(settings.trino.java_home)
    lake.catalog(settings)  # Trino reads its tables, and does not make them
    core = jars.resolve("trino", settings, report)
    _plugins(settings, report)
    data = settings.paths.run / "trino" / "data"
    data.mkdir(parents=True, exist_ok=True)
    return [
        str(java.executable),
        f"-Xmx{settings.trino.heap_mb}m",
        *_FLAGS,
        "-Dnode.environment=tidemark",
        f"-Dnode.id={socket.gethostname()}",
        f"-Dnode.data-dir={data}",
        "-Dnode.bind-ip=127.0.0.1",
        "-Dnode.internal-address=127.0.0.1",
        f"-Dconfig={CONFIGURATION / 'config.properties'}",
        "-cp",
        os.pathsep.join(map(str, core)),
        str(CONFIGURATION / "Launch.java"),
        VERSION,
    ]


def environment(settings: Settings) -> dict[str, str]:
    """What the files in `conf/trino/` refer to."""
    return {
        "TIDEMARK_TRINO_PORT": str(settings.trino.port),
        "TIDEMARK_TRINO_CATALOGS": str(CONFIGURATION / "local"),
        "TIDEMARK_TRINO_PLUGINS": str(_plugin_folder(settings)),
        "TIDEMARK_CATALOG_JDBC_URL": settings.lake.jdbc_uri,
        "TIDEMARK_WAREHOUSE": settings.lake.warehouse,
    }


def what_is_missing(settings: Settings, timeout_s: float = 5.0) -> str | None:
    """None if Trino answers (embedded or not), else what it says or why it does not."""
    url = f"{origin(settings)}/v1/info"
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return f"{url} is still starting" if json.load(answer).get("starting") else None
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{url} does not answer ({error})"


def origin(settings: Settings) -> str:
    """Scheme, host and port of Trino, without a user and a password."""
    parts = urlsplit(settings.trino.url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _plugin_folder(settings: Settings) -> Path:
    return settings.paths.run / "trino" / "plugin"


def _plugins(settings: Settings, report: jars.Report) -> None:
    """A folder for each plugin: its archives, and the jar that names its class."""
    for name, plugin in _PLUGINS.items():
        folder = _plugin_folder(settings) / name
        folder.mkdir(parents=True, exist_ok=True)
        archives = jars.resolve(f"trino-{name}", settings, report)
        _link(folder, archives)
        with zipfile.ZipFile(folder / "tidemark-plugin.jar", "w") as jar:
            jar.writestr(_PLUGIN, f"{plugin}\n")


def _link(folder: Path, archives: Sequence[Path]) -> None:
    for old in folder.iterdir():
        if old.is_symlink():
            old.unlink()
    for archive in archives:
        (folder / archive.name).symlink_to(archive)
