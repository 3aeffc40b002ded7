"""Capturing the source database: Debezium on Kafka Connect, from PostgreSQL's log into the topic `ads-changes`.

`python -m pipelines.ads.capture` runs Kafka Connect as its child until it is stopped, and begins anew when that ends or
the connector fails.

Belongs here: running Kafka Connect, the connector's properties, and whether it works. Does not belong here: the
database itself (`database`), and what a record must be (the contract of `ads-changes`).

From where it goes on says the replication slot in the database, and nothing else: after any crash PostgreSQL sends the
transactions that were not confirmed again, whole and from their beginnings. What Connect notes itself is a record
within a transaction. Going on there, Debezium counts only the rest of the transaction, and skips what has the same
position in the log: the other rows of a page that COPY wrote, the new row of a key that was changed. So its notes only
tell whether the first snapshot is whole. Where it is not, or the slot is gone, slot and snapshot are made together: a
snapshot beside an older slot would miss what is committed between the two.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
from psycopg import Connection

from pipelines import jars, logs
from pipelines.ads import database
from pipelines.ads.database import DatabaseError
from pipelines.ads.schema import TABLES
from pipelines.contracts import ADS_CHANGES
from pipelines.errors import TidemarkError
from pipelines.ingest import broker
from pipelines.settings import Settings, load

log = logging.getLogger(__name__)

NAME = "ads"
SLOT = "tidemark"
"""The replication slot in the database, and the publication."""

SNAPSHOT, GO_ON = "initial", "no_data"
"""Debezium's modes: what is there by now, then what changes; only what changes."""

_HOST = "127.0.0.1"
_SCHEMA = "public"
_IN_USE_S, _STOP_S, _LOOK_S, _AGAIN_S = 15.0, 10.0, 0.5, 1.0


def prepare(settings: Settings, report: jars.Report = jars.say) -> None:
    """Make the topic, and see that the database can be captured; what cannot be mended by waiting is said here.

    Raises:
        DatabaseError: The database cannot be reached, or keeps no log that can be captured.
        BrokerError: The broker cannot be reached.
        JarError: The archives could not be fetched.
    """
    _archives(settings, report)
    broker.ensure_topics(settings, [ADS_CHANGES.topic])
    with database.connected(settings) as connection:
        (level,) = connection.execute("SHOW wal_level").fetchone() or ("",)
        if level != "logical":
            raise DatabaseError(
                f"the database's log cannot be captured: its wal_level is {level}",
                where=f"{connection.info.host}:{connection.info.port}",
                remedy="ALTER SYSTEM SET wal_level = logical, and restart the server",
            )


def run(settings: Settings, is_over: threading.Event) -> None:
    """Run Kafka Connect until it is over, and again whenever it ends, the connector fails, or the database is gone."""
    while not is_over.is_set():
        try:
            with _connect(settings) as process:
                ended = _watch(settings, process, is_over)
        except (TidemarkError, psycopg.Error) as error:
            ended = str(error)
        if not is_over.is_set():
            log.warning("capturing begins anew: %s", ended)
            is_over.wait(_AGAIN_S)


def worker(settings: Settings) -> dict[str, str]:
    """The properties of a worker that runs one connector."""
    return {
        "bootstrap.servers": settings.kafka.bootstrap_servers,
        "listeners": f"http://{_HOST}:{settings.ads.connect_port}",
        "plugin.discovery": "only_scan",
        "key.converter": "org.apache.kafka.connect.json.JsonConverter",
        "key.converter.schemas.enable": "false",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter.schemas.enable": "false",
        "offset.storage.file.filename": str(_notes(settings)),
        "offset.flush.interval.ms": "1000",
        "producer.batch.size": str(2**18),
        "producer.linger.ms": "50",  # or each record of a transaction is a request to the broker
    }


def connector(settings: Settings, snapshot_mode: str = SNAPSHOT) -> dict[str, str]:
    """The properties of the connector, for this worker or for another.

    All tables and the ends of transactions go to one topic. A heartbeat each ten seconds is a record of the log, so
    that the slot moves on where other tables or databases of the server are written and these are not.
    """
    place = database.place(settings)
    return {
        "name": NAME,
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "tasks.max": "1",
        "database.hostname": place.host,
        "database.port": str(place.port),
        "database.user": place.user,
        "database.password": place.password,
        "database.dbname": place.database,
        "plugin.name": "pgoutput",
        "slot.name": SLOT,
        "slot.max.retries": "60",  # the server may take a moment to see that a killed reader is gone
        "slot.retry.delay.ms": "1000",
        "publication.name": SLOT,
        "publication.autocreate.mode": "filtered",
        "table.include.list": ",".join(f"{_SCHEMA}.{name}" for name in TABLES),
        "snapshot.mode": snapshot_mode,
        "topic.prefix": NAME,
        "transforms": "route",
        "transforms.route.type": "org.apache.kafka.connect.transforms.RegexRouter",
        "transforms.route.regex": f"{NAME}[.]({_SCHEMA}[.].*|transaction)",
        "transforms.route.replacement": ADS_CHANGES.topic,
        "topic.creation.default.replication.factor": str(settings.kafka.replication),
        "topic.creation.default.partitions": "1",
        "provide.transaction.metadata": "true",
        "tombstones.on.delete": "false",
        "skipped.operations": "none",  # a truncated table is seen at the door
        "decimal.handling.mode": "string",
        "time.precision.mode": "microseconds",
        "poll.interval.ms": "20",
        "errors.max.retries": "0",  # it would go on within a transaction
        "heartbeat.interval.ms": "10000",
        "heartbeat.action.query": f"SELECT pg_logical_emit_message(false, '{SLOT}', '')",
        "message.prefix.exclude.list": SLOT,
    }


def is_snapshot_whole(settings: Settings) -> bool:
    """Whether the first snapshot was sent to its end, so that only the slot says where to go on."""
    notes, whole = _notes(settings), _whole(settings)
    with contextlib.suppress(FileNotFoundError):
        if b'"lsn_proc"' in notes.read_bytes():  # it is there once something after the snapshot was sent
            return True
    return whole.exists()


def what_is_missing(settings: Settings, timeout_s: float = 5.0) -> str | None:
    """None if the connector and its task run, else what Connect says or why it does not answer."""
    try:
        parts = _parts(settings, timeout_s)
    except urllib.error.HTTPError as error:
        return f"{_status_url(settings)} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{_status_url(settings)} does not answer ({error})"
    state = next((part["state"] for part in parts if part["state"] != "RUNNING"), None)
    if state is not None:
        return f"the connector {NAME} is {state}"
    return None if len(parts) > 1 else f"the connector {NAME} has no task yet"


def _status_url(settings: Settings) -> str:
    return f"http://{_HOST}:{settings.ads.connect_port}/connectors/{NAME}/status"


def _parts(settings: Settings, timeout_s: float = 5.0) -> list[dict[str, Any]]:
    """What Connect says of the connector, then of each task."""
    with urllib.request.urlopen(_status_url(settings), timeout=timeout_s) as answer:
        said = json.load(answer)
    return [said["connector"], *said["tasks"]]


def _watch(settings: Settings, process: subprocess.Popen[bytes], is_over: threading.Event) -> str:
    """Wait until Connect ends, the connector fails or it is over; says which."""
    while not is_over.wait(_LOOK_S):
        if (code := process.poll()) is not None:
            return f"Kafka Connect ended with {code}"
        with contextlib.suppress(OSError, ValueError):
            for part in _parts(settings):
                if part["state"] == "FAILED":
                    return f"the connector failed: {part.get('trace', '')}"
    return "it is over"


@contextlib.contextmanager
def _connect(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Kafka Connect with the connector, which ends with the block."""
    folder = settings.paths.run / "connect"
    files = [folder / "worker.properties", folder / "connector.properties"]
    connecting = connector(settings, _snapshot_mode(settings))
    for file, properties in zip(files, (worker(settings), connecting), strict=True):
        _write(file, properties)
    java = broker.java(settings, _archives(settings), settings.ads.connect_heap_mb)
    main = "org.apache.kafka.connect.cli.ConnectStandalone"
    process = subprocess.Popen([*java, main, *map(str, files)])
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        process.kill()
        process.wait()


def _archives(settings: Settings, report: jars.Report = jars.say) -> list[Path]:
    return [*jars.resolve("connect", settings, report), *jars.resolve("kafka", settings, report)]


def _snapshot_mode(settings: Settings) -> str:
    """Whether a slot goes on where it is; the slot and the notes of one that does not are dropped."""
    whole = _whole(settings)
    if is_snapshot_whole(settings):
        whole.touch()
    _notes(settings).unlink(missing_ok=True)
    with database.connected(settings) as connection:
        usable = "SELECT 1 FROM pg_replication_slots WHERE slot_name = %s AND wal_status <> 'lost'"
        if whole.exists() and connection.execute(usable, [SLOT]).fetchone():
            return GO_ON
        whole.unlink(missing_ok=True)
        _drop_slot(connection)
    return SNAPSHOT


def _notes(settings: Settings) -> Path:
    """Beside the data of the broker: with its topics, what is known of the snapshot in them is gone, too."""
    return settings.paths.kafka / "connect.offsets"


def _whole(settings: Settings) -> Path:
    return _notes(settings).with_suffix(".snapshot")


def _drop_slot(connection: Connection) -> None:
    drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s"
    deadline = time.monotonic() + _IN_USE_S  # the server may not have seen yet that a killed reader is gone
    while True:
        try:
            connection.execute(drop, [SLOT])
            return
        except psycopg.errors.ObjectInUse:
            if time.monotonic() > deadline:
                raise DatabaseError(
                    f"the replication slot {SLOT} is in use",
                    where=f"{connection.info.host}:{connection.info.port}/{connection.info.dbname}",
                    remedy="stop the other Kafka Connect that captures this database",
                ) from None
            time.sleep(0.2)


def _write(file: Path, properties: Mapping[str, str]) -> None:
    """As Java reads them, and for nobody else: there is a password among them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(0o600)
    escaped = {name: value.replace("\\", "\\\\") for name, value in properties.items()}
    file.write_text("".join(f"{name}={value}\n" for name, value in escaped.items()), "utf-8")


def main() -> None:
    """Capture until the process is told to end."""
    logs.configure("ads-connect")
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: is_over.set())
    run(load(), is_over)


if __name__ == "__main__":
    main()
