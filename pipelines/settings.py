"""Settings: the files in `conf/` and the environment, as one frozen, typed value.

Belongs here: what can be configured, where it is read from, and what follows from it alone (a URI in another spelling).
Does not belong here: anything that opens, creates or starts something.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote, urlencode, urlsplit

import yaml

from pipelines import strict_yaml
from pipelines.errors import TidemarkError

ROOT = Path(__file__).resolve().parents[1]
CATALOG = "lake"
_OVERRIDE = "TIDEMARK__"
_REFERENCE = re.compile(r"\{([a-z_]+(?:\.[a-z_]+)?)\}")


class SettingsError(TidemarkError):
    """A settings file or an environment variable says something that cannot be."""


@dataclass(frozen=True)
class Lake:
    """The Iceberg catalog `lake` and where its tables' files are."""

    catalog_uri: str
    warehouse: str

    @property
    def catalog_type(self) -> str:
        """`jdbc` (SQLite, PostgreSQL) or `rest`."""
        return "rest" if self.catalog_uri.startswith(("http://", "https://")) else "jdbc"

    @property
    def sqlite_path(self) -> Path | None:
        """The catalog's file, where the catalog is SQLite."""
        scheme, _, rest = self.catalog_uri.partition(":")
        return Path(rest) if scheme == "sqlite" else None

    @property
    def jdbc_uri(self) -> str:
        """The catalog's address for Java."""
        if path := self.sqlite_path:
            return f"jdbc:sqlite:{path}?busy_timeout=10000"
        parts = urlsplit(self.catalog_uri)
        login = {"user": unquote(parts.username or ""), "password": unquote(parts.password or "")}
        query = urlencode({name: value for name, value in login.items() if value})
        port = f":{parts.port}" if parts.port else ""
        return f"jdbc:postgresql://{parts.hostname}{port}{parts.path}" + (f"?{query}" if query else "")

    @property
    def sqlalchemy_uri(self) -> str:
        """The catalog's address for SQLAlchemy, hence for pyiceberg."""
        if path := self.sqlite_path:
            return f"sqlite:///{path}"
        return self.catalog_uri

    @property
    def pyiceberg_properties(self) -> dict[str, str]:
        """For `pyiceberg.catalog.load_catalog(CATALOG, **properties)`."""
        if self.catalog_type == "rest":
            return {"type": "rest", "uri": self.catalog_uri, "warehouse": self.warehouse}
        return {"type": "sql", "uri": self.sqlalchemy_uri, "warehouse": self.warehouse}


@dataclass(frozen=True)
class Kafka:
    """Where the broker is, and how topics are made."""

    is_embedded: bool
    port: int
    controller_port: int
    bootstrap_servers: str
    partitions: int
    replication: int
    heap_mb: int
    retention_hours: int


@dataclass(frozen=True)
class Paths:
    """Folders, all absolute."""

    indices: Path
    delta: Path
    checkpoints: Path
    code: Path
    run: Path
    logs: Path
    metrics: Path
    freshness: Path
    reports: Path
    kafka: Path
    dagster: Path
    mlflow: Path
    jars: Path


@dataclass(frozen=True)
class Jars:
    """Where Java archives are fetched from."""

    repository: str


@dataclass(frozen=True)
class Spark:
    """How a Spark session is built."""

    master: str
    driver_memory: str
    shuffle_partitions: int
    ui_enabled: bool
    extra: dict[str, str]

    @property
    def is_local(self) -> bool:
        """Whether executors run inside the driver's process."""
        return self.master.split("[")[0] == "local"


@dataclass(frozen=True)
class Streams:
    """How the streams run."""

    trigger_ms: int
    archive_trigger_ms: int
    max_rows_per_epoch: int
    max_backfill_rows_per_epoch: int
    keyed_trigger_ms: int
    keyed_partitions: int
    nice: int


@dataclass(frozen=True)
class Overlay:
    """What one replica may hold in memory."""

    max_facts: int


@dataclass(frozen=True)
class Build:
    """How a base is built, and from which day on days can be computed again."""

    shard_facts: int
    first_day: date
    horizon_days: dict[str, str]
    newest_events: dict[str, str]


@dataclass(frozen=True)
class Retention:
    """How many bases, and how much delta, are kept."""

    bases: int
    hours: int


@dataclass(frozen=True)
class Maintenance:
    """What maintenance takes for old, and what storage costs."""

    snapshot_hours: int
    daily_tags: int
    orphan_hours: int
    vacuum_hours: int
    usd_micros_per_gib_month: int


@dataclass(frozen=True)
class Serving:
    """The HTTP service of answers."""

    host: str
    port: int
    max_wait_ms: int


@dataclass(frozen=True)
class Collector:
    """The HTTP service that takes events."""

    host: str
    port: int


@dataclass(frozen=True)
class Dagster:
    """Dagster's web UI."""

    host: str
    port: int


@dataclass(frozen=True)
class Trino:
    """Where SQL is asked, and the Trino that the command line starts."""

    is_embedded: bool
    url: str
    port: int
    heap_mb: int
    java_home: Path | None
    user: str


@dataclass(frozen=True)
class Mlflow:
    """Where models are tracked, and the name that the live one is registered under."""

    tracking_uri: str
    artifacts_uri: str
    model_name: str


@dataclass(frozen=True)
class Ads:
    """The ads repository (`sqlite:<path>` or `postgresql://user:password@host/db`), the process that writes it, and the
    source database with what captures it."""

    repository: str = field(repr=False)
    host: str
    port: int
    database: str = field(repr=False)
    database_port: int
    connect_port: int
    connect_heap_mb: int
    gc_days: int
    gc_grace_days: int


@dataclass(frozen=True)
class Openlineage:
    """Where OpenLineage events go; nowhere without a URL."""

    url: str
    api_key: str = field(repr=False)
    namespace: str
    timeout_ms: int


@dataclass(frozen=True)
class Settings:
    """Everything that can be configured. `environment` gives a child process the same settings."""

    home: Path
    lake: Lake
    kafka: Kafka
    paths: Paths
    jars: Jars
    spark: Spark
    streams: Streams
    overlay: Overlay
    build: Build
    retention: Retention
    maintenance: Maintenance
    serving: Serving
    collector: Collector
    dagster: Dagster
    trino: Trino
    mlflow: Mlflow
    ads: Ads
    openlineage: Openlineage
    environment: dict[str, str] = field(repr=False, compare=False)


_SECTIONS: dict[str, type] = {
    name: kind for name, kind in get_type_hints(Settings).items() if name not in ("home", "environment")
}


def load(path: Path | str | None = None, env: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings.

    Args:
        path: A file that says what differs from `conf/local.yaml`; by default the one that TIDEMARK_CONF names, if any.
        env: The environment: TIDEMARK_HOME, TIDEMARK_CONF and TIDEMARK__SECTION__KEY are read from it.

    Raises:
        SettingsError: A file is missing or broken, a key is unknown or missing, or a value has the wrong type.

    Examples:
        >>> load(env={"TIDEMARK_HOME": "/tmp/x", "TIDEMARK__KAFKA__PORT": "19092"}).kafka.bootstrap_servers
        '127.0.0.1:19092'
    """
    home = Path(env.get("TIDEMARK_HOME") or ROOT / "var").expanduser().absolute()
    chosen = path or env.get("TIDEMARK_CONF") or None
    values = _read(ROOT / "conf" / "local.yaml")
    if chosen is not None:
        for section, entries in _read(Path(chosen).expanduser()).items():
            values[section] = values[section] | entries
    overrides = {name: value for name, value in env.items() if name.startswith(_OVERRIDE)}
    for name, value in overrides.items():
        section, key = _locate(name)
        values[section][key] = value

    resolver = _Resolver(home, values)
    sections = {
        section: kind(**{key: resolver.value(section, key) for key in get_type_hints(kind)})
        for section, kind in _SECTIONS.items()
    }
    environment = overrides | {"TIDEMARK_HOME": str(home)}
    if chosen is not None:
        environment["TIDEMARK_CONF"] = str(Path(chosen).expanduser().absolute())
    return Settings(home=home, environment=environment, **sections)


class _Resolver:
    """Gives each key its typed value, with references to others replaced."""

    def __init__(self, home: Path, values: dict[str, dict[str, Any]]) -> None:
        self.home = home
        self.values = values
        self.open: list[str] = []

    def value(self, section: str, key: str) -> Any:
        where = f"{section}.{key}"
        if key not in self.values[section]:
            raise SettingsError("a setting is missing", where=where, remedy=f"add `{key}:` to `{section}:`")
        if where in self.open:
            chain = " → ".join([*self.open, where])
            raise SettingsError("a setting refers to itself", where=chain, remedy="break the circle")
        self.open.append(where)
        try:
            return self._typed(self.values[section][key], get_type_hints(_SECTIONS[section])[key], where)
        finally:
            self.open.pop()

    def _typed(self, raw: Any, kind: Any, where: str) -> Any:
        if kind in (Path | None, Path):
            if raw is None and kind is not Path:
                return None
            return self.home / Path(self._expanded(str(raw), where)).expanduser()
        if kind is str:
            return self._expanded(str(raw), where)
        parsed = yaml.safe_load(raw) if isinstance(raw, str) else raw
        if kind == dict[str, str] and isinstance(parsed, dict):
            return {str(k): str(v).lower() if isinstance(v, bool) else str(v) for k, v in parsed.items()}
        if kind in (int, bool, date) and type(parsed) is kind:
            return parsed
        wanted = {int: "a whole number", bool: "true or false", date: "a day, as 2017-01-01"}.get(
            kind, "names with values"
        )
        raise SettingsError(f"{raw!r} is not {wanted}", where=where, remedy=f"set it to {wanted}")

    def _expanded(self, text: str, where: str) -> str:
        def replace(match: re.Match[str]) -> str:
            name = match[1]
            if name == "home":
                return str(self.home)
            section, _, key = name.partition(".")
            if section not in _SECTIONS or key not in get_type_hints(_SECTIONS[section]):
                raise SettingsError(
                    f"{{{name}}} is not a setting", where=where, remedy=_nearest(name, ["home", *_names()])
                )
            return str(self.value(section, key))

        return _REFERENCE.sub(replace, text)


def _names() -> list[str]:
    return [f"{section}.{item.name}" for section, kind in _SECTIONS.items() for item in fields(kind)]


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(known)}"


def _known(section: str, key: str, where: str) -> None:
    if section not in _SECTIONS:
        raise SettingsError(f"unknown section `{section}`", where=where, remedy=_nearest(section, _SECTIONS))
    names = list(get_type_hints(_SECTIONS[section]))
    if key not in names:
        raise SettingsError(f"unknown setting `{section}.{key}`", where=where, remedy=_nearest(key, names))


def _locate(variable: str) -> tuple[str, str]:
    section, _, key = variable.removeprefix(_OVERRIDE).lower().partition("__")
    _known(section, key, f"the environment variable {variable}")
    return section, key


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        values = strict_yaml.load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise SettingsError(
            f"cannot read the settings: {error.strerror}",
            where=path,
            remedy="point TIDEMARK_CONF at a readable file, or unset it",
        ) from error
    except yaml.YAMLError as error:
        raise SettingsError(f"not valid YAML: {error}", where=path, remedy="mend the file") from error
    if not isinstance(values, dict):
        raise SettingsError("the settings are not sections with keys", where=path, remedy="mend the file")
    for section, entries in values.items():
        if section in _SECTIONS and not isinstance(entries, dict):
            raise SettingsError(f"`{section}` has no keys", where=path, remedy=f"give `{section}:` its keys")
        for key in entries if isinstance(entries, dict) else [""]:
            _known(str(section), str(key), str(path))
    return values
