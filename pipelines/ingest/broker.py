"""The broker: one embedded Kafka (KRaft, no ZooKeeper) for a single machine, and the topics on whatever broker is used.

Belongs here: starting and stopping the embedded broker, making topics, their ids. Does not belong here: what the topics
carry (`pipelines/contracts/`, which also says which of them are compacted), producing and consuming.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from pipelines import jars
from pipelines.contracts import CONTRACTS, INTERNAL
from pipelines.errors import TidemarkError
from pipelines.indexing.position import Position
from pipelines.preflight import check_port, find_java
from pipelines.settings import ROOT, Settings

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
_WITHOUT_LEADER = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)
_REQUEST_TIMEOUT_S = 10.0
_HOST = "127.0.0.1"
_COMPACTED_AFTER_MS = 3_600_000  # Kafka compacts segments that are closed
_KAFKA_BASE64 = str.maketrans("+/", "-_")  # the client spells ids otherwise than Kafka's own tools

_silent = logging.getLogger("tidemark.kafka")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False


class BrokerError(TidemarkError):
    """The broker cannot be reached, did not start, or refused a request."""


class TopicMissing(BrokerError):
    """A topic is not on the broker."""


class Broker(NamedTuple):
    """A running embedded broker."""

    pid: int
    bootstrap_servers: str


def start(settings: Settings, report: jars.Report = jars.say, timeout_s: float = READY_TIMEOUT_S) -> Broker:
    """Start the embedded broker and wait until it answers. If it runs already, that one is returned.

    Its data outlives it, whether it is stopped or killed.

    Raises:
        BrokerError: The settings name the user's own broker, or this one did not start.
        PreflightError: Its port is in use, or there is no Java.
        JarError: Its archives could not be fetched.
    """
    pid = running_pid(settings)
    if pid is None:
        check_port(_HOST, settings.kafka.port, "kafka.port")
        check_port(_HOST, settings.kafka.controller_port, "kafka.controller_port")
        pid = _launch(settings, command(settings, report))
    try:
        wait_ready(settings, timeout_s, is_alive=lambda: running_pid(settings) is not None)
    except BaseException:
        stop(settings)
        raise
    return Broker(pid, settings.kafka.bootstrap_servers)


def command(settings: Settings, report: jars.Report = jars.say) -> list[str]:
    """What runs the embedded broker in the foreground, with its storage prepared; SIGTERM stops it politely.

    Raises:
        BrokerError: The settings name the user's own broker, or the storage could not be prepared.
        JarError: Its archives could not be fetched.
    """
    if not settings.kafka.is_embedded:
        raise BrokerError(
            "there is no embedded broker in these settings",
            where="kafka.is_embedded",
            remedy="start your own, or set TIDEMARK__KAFKA__IS_EMBEDDED=true",
        )
    archives = jars.resolve("kafka", settings, report)
    configuration = _configure(settings)
    _format(settings, archives, configuration)
    return [*java(settings, archives, settings.kafka.heap_mb), "kafka.Kafka", str(configuration)]


def stop(settings: Settings, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the embedded broker: politely, then by force. Says whether one was running."""
    pid = running_pid(settings)
    if pid is None:
        _pid_file(settings).unlink(missing_ok=True)
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(timeout_s)
    _pid_file(settings).unlink(missing_ok=True)
    return True


def running_pid(settings: Settings) -> int | None:
    """The process of the embedded broker of this home, if it is alive."""
    try:
        noted = json.loads(_pid_file(settings).read_text("utf-8"))
        process = psutil.Process(noted["pid"])
        same = abs(process.create_time() - noted["started"]) < 1
        return process.pid if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None


def is_ready(settings: Settings, timeout_s: float = 2.0) -> bool:
    """Whether the broker (embedded or not) answers a request for its topics."""
    if not any(_listens(server) for server in settings.kafka.bootstrap_servers.split(",")):
        return False
    try:
        return bool(_admin(settings).list_topics(timeout=timeout_s).brokers)
    except KafkaException:
        return False


def wait_ready(
    settings: Settings, timeout_s: float = READY_TIMEOUT_S, is_alive: Callable[[], bool] = lambda: True
) -> None:
    """Return as soon as the broker answers.

    Args:
        settings: Where it is.
        timeout_s: How long to wait.
        is_alive: Whether the process that is waited for still runs, if the caller knows.

    Raises:
        BrokerError: It did not answer within the time, or its process ended.
    """
    deadline = time.monotonic() + timeout_s
    while not is_ready(settings):
        if not is_alive():
            raise BrokerError(
                f"the broker ended while it started; its last words: {_last_words(settings)}",
                where=_log_file(settings),
                remedy="read the log; `tidemark up` starts it again",
            )
        if time.monotonic() > deadline:
            raise BrokerError(
                f"no broker answered within {timeout_s:.0f} s",
                where=settings.kafka.bootstrap_servers,
                remedy=f"look at {_log_file(settings)}" if settings.kafka.is_embedded else "start it",
            )
        time.sleep(0.1)


def ensure_topics(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """Make the topics that are not there yet, with the declared partitions; topic ids by name.

    A record's time is the broker's (`LogAppendTime`), so that horizons do not depend on producers' clocks. A
    topic whose contract says so is compacted.

    Raises:
        BrokerError: The broker cannot be reached or refuses.
    """
    names = list(names)
    kafka = settings.kafka
    wanted = [
        NewTopic(name, kafka.partitions, kafka.replication, config=_options(settings, name)) for name in names
    ]
    admin = _admin(settings)  # must outlive its answers
    for name, future in admin.create_topics(wanted, request_timeout=_REQUEST_TIMEOUT_S).items():
        try:
            future.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise _refused(settings, f"cannot make the topic {name}", error) from error
    deadline = time.monotonic() + _REQUEST_TIMEOUT_S
    while True:
        try:
            return topic_ids(settings, names)
        except TopicMissing:  # made, and not yet known everywhere
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _options(settings: Settings, name: str) -> dict[str, str]:
    contract = CONTRACTS.get(name) or INTERNAL.get(name)
    if contract is not None and contract.is_compacted:
        kept = {"cleanup.policy": "compact", "segment.ms": str(_COMPACTED_AFTER_MS)}
    else:
        kept = {"cleanup.policy": "delete", "retention.ms": str(settings.kafka.retention_hours * 3_600_000)}
    return {"message.timestamp.type": "LogAppendTime", **kept}


def topic_ids(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """The id of each topic by its name, as `<name>@<Kafka's id>`.

    A topic that is deleted and made again has another id. The name before it lets whoever holds a position see which
    topics it is about without asking the broker.

    Raises:
        TopicMissing: A topic is not there.
        BrokerError: The broker cannot be reached.
    """
    return _topic_ids(_admin(settings), settings, names)


def _topic_ids(admin: AdminClient, settings: Settings, names: Iterable[str]) -> dict[str, str]:
    ids = {}  # the client must outlive its answers
    described = admin.describe_topics(TopicCollection(list(names)), request_timeout=_REQUEST_TIMEOUT_S)
    for name, future in described.items():
        try:
            found = future.result().topic_id
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise TopicMissing(
                    f"there is no topic {name}",
                    where=settings.kafka.bootstrap_servers,
                    remedy="`tidemark up` makes the topics that Tidemark reads",
                ) from error
            raise _refused(settings, f"cannot describe the topic {name}", error) from error
        ids[name] = f"{name}@{found}".translate(_KAFKA_BASE64)
    return ids


def sameness(settings: Settings, ids: Mapping[str, str]) -> Callable[[], None]:
    """A check for each epoch, which keeps its connection: raises where a topic was made again.

    Such a topic has another id, and offsets that mean other records.

    Raises:
        BrokerError: The check found another topic of the name (starting the stream again begins a new incarnation), or
            no broker.
    """
    admin = _admin(settings)

    def require_same() -> None:
        now = _topic_ids(admin, settings, ids)
        for name, topic_id in ids.items():
            if now[name] != topic_id:
                raise BrokerError(
                    f"the topic {name} was made again while it was read",
                    where=topic_id,
                    remedy="start the stream again",
                )

    return require_same


def earliest(settings: Settings, ids: Mapping[str, str]) -> Position:
    """The first offset that the broker still has of each partition of topics, given as id by name.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    found = {topic_id: offsets(settings, name) for name, topic_id in ids.items()}
    return Position(
        {topic_id: {p: first for p, (first, _) in known.items()} for topic_id, known in found.items()}
    )


def ends(settings: Settings, topics: Iterable[str]) -> Position:
    """The position that covers all that topics have; without those that were never made.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    found: dict[str, dict[int, int]] = {}
    for topic in topics:
        try:
            (topic_id,) = topic_ids(settings, [topic]).values()
        except TopicMissing:
            continue
        found[topic_id] = {number: end for number, (_, end) in offsets(settings, topic).items()}
    return Position(found)


def offsets(settings: Settings, topic: str) -> dict[int, tuple[int, int]]:
    """Of each partition of a topic the first offset that is still there, and the end.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    consumer = Consumer(
        {"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "tidemark-offsets"},
        logger=_silent,
    )
    try:
        found = consumer.list_topics(topic, timeout=_REQUEST_TIMEOUT_S).topics[topic].partitions
        return {number: _watermarks(consumer, TopicPartition(topic, number)) for number in sorted(found)}
    except KafkaException as error:
        raise _refused(settings, f"cannot ask for the offsets of {topic}", error) from error
    finally:
        consumer.close()


def _watermarks(consumer: Consumer, partition: TopicPartition) -> tuple[int, int]:
    """The first and the end offset; a topic that was made a moment ago has no leader yet."""
    deadline = time.monotonic() + _REQUEST_TIMEOUT_S
    while True:
        try:
            first, end = consumer.get_watermark_offsets(partition, timeout=_REQUEST_TIMEOUT_S)
            return first, end
        except KafkaException as error:
            if error.args[0].code() not in _WITHOUT_LEADER or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def times(settings: Settings, topic: str, offsets: Mapping[int, int]) -> dict[int, int]:
    """The broker's time (ms) of one record of each of these partitions, or of the first one after it.

    Args:
        settings: Where the broker is.
        topic: Its name.
        offsets: Partition → the record's offset.

    Returns:
        Of those partitions that answered in time.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": "tidemark-times",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        },
        logger=_silent,
    )
    found: dict[int, int] = {}
    try:
        consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in offsets.items()])
        deadline = time.monotonic() + _REQUEST_TIMEOUT_S
        while len(found) < len(offsets) and (left := deadline - time.monotonic()) > 0:
            message = consumer.poll(left)
            if message is None or message.error():
                break
            partition = message.partition()
            if partition is not None and partition not in found:
                found[partition] = message.timestamp()[1]
                consumer.pause([TopicPartition(topic, partition)])
        return found
    except KafkaException as error:
        raise _refused(settings, f"cannot read {topic}", error) from error
    finally:
        consumer.close()


def _refused(settings: Settings, what: str, error: KafkaException) -> BrokerError:
    return BrokerError(
        f"{what}: {error.args[0].str()}",
        where=settings.kafka.bootstrap_servers,
        remedy="`tidemark status` says whether the broker runs; `tidemark up` starts it",
    )


def _admin(settings: Settings) -> AdminClient:
    # A client that is kept finds a broker that comes back within half a second, not the library's ten.
    servers = settings.kafka.bootstrap_servers
    return AdminClient({"bootstrap.servers": servers, "reconnect.backoff.max.ms": 500}, logger=_silent)


def _listens(server: str) -> bool:
    host, _, port = server.strip().rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except (OSError, ValueError):
        return False


def _pid_file(settings: Settings) -> Path:
    return settings.paths.run / "kafka.pid"


def _log_file(settings: Settings) -> Path:
    return settings.paths.logs / "kafka.log"


def _last_words(settings: Settings) -> str:
    try:
        lines = _log_file(settings).read_text("utf-8", "replace").splitlines()[-200:]
    except OSError:
        return "none"
    telling = [line for line in lines if "ERROR" in line or "Exception" in line or "Error" in line]
    return (telling or lines or ["none"])[-1].strip()


def _configure(settings: Settings) -> Path:
    """Write the broker's properties anew, so that a changed setting takes effect at the next start."""
    kafka = settings.kafka
    properties = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{_HOST}:{kafka.controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://{_HOST}:{kafka.port},CONTROLLER://{_HOST}:{kafka.controller_port}",
        "advertised.listeners": f"PLAINTEXT://{_HOST}:{kafka.port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": settings.paths.kafka / "data",
        "auto.create.topics.enable": "false",
        "num.partitions": kafka.partitions,
        "default.replication.factor": 1,
        "min.insync.replicas": 1,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 1,
        "group.initial.rebalance.delay.ms": 0,
        "num.network.threads": 2,
        "num.io.threads": 4,
        "log.segment.bytes": 128 * 2**20,
        "log.cleaner.dedupe.buffer.size": 16 * 2**20,
        # A killed broker may register again only when its old session is over.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
    }
    file = settings.paths.kafka / "server.properties"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()), "utf-8")
    return file


def java(settings: Settings, archives: Sequence[Path], heap_mb: int) -> list[str]:
    """How a program of Kafka's is run, up to its name."""
    return [
        str(find_java().executable),
        f"-Xmx{heap_mb}m",
        *("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError"),
        f"-Dlog4j2.configurationFile={ROOT / 'conf' / 'kafka' / 'log4j2.properties'}",
        f"-Dkafka.logs.dir={settings.paths.logs}",
        *("-cp", os.pathsep.join(map(str, archives))),
    ]


def _format(settings: Settings, archives: list[Path], configuration: Path) -> None:
    """Prepare the broker's storage, once in the life of a home."""
    if (settings.paths.kafka / "data" / "meta.properties").exists():
        return
    # Kafka spells ids in base64; one that began with a dash would read as an option, hence the first bit.
    cluster = base64.urlsafe_b64encode(bytes([1]) + uuid.uuid4().bytes[1:]).decode().rstrip("=")
    arguments = [
        *java(settings, archives, 128),
        *("kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", cluster, "-c", str(configuration)),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip().splitlines() or ["nothing"]
        raise BrokerError(
            f"the broker's storage could not be prepared: {said[-1]}",
            where=settings.paths.kafka,
            remedy="remove that folder if what is in it can go, and start again",
        )


def _launch(settings: Settings, arguments: list[str]) -> int:
    for folder in (settings.paths.logs, settings.paths.run):
        folder.mkdir(parents=True, exist_ok=True)
    with _log_file(settings).open("ab") as log:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=settings.paths.run,
        )
    started = psutil.Process(process.pid).create_time()
    note = _pid_file(settings).with_suffix(".new")
    note.write_text(json.dumps({"pid": process.pid, "started": started}), "utf-8")
    note.replace(_pid_file(settings))
    return process.pid
