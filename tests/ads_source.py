"""A private source database that is captured, and what is read of it: for the tests of the ads database."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from confluent_kafka import Consumer, TopicPartition
from psycopg.rows import dict_row

from jobs import log_files, processes
from pipelines import postgres
from pipelines.ads import database
from pipelines.ads.schema import TABLES, TERMS, TIME
from pipelines.contracts import ADS_CHANGES, RECORD, Decoded, decode_table
from pipelines.ingest import broker
from pipelines.preflight import PreflightError
from pipelines.settings import Settings
from tests.conftest import free_ports, small_settings

PATIENCE_S = 120.0
Visible = dict[str, dict[str, dict[str, Any]]]


@contextmanager
def home() -> Iterator[Settings]:
    """Settings of a home that PostgreSQL can reach, whoever this process is; afterwards nothing of it runs."""
    try:
        postgres.programs()
    except PreflightError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)  # where this process is root, PostgreSQL is another user
        settings = small_settings(Path(made) / "home", ADS__CONNECT_HEAP_MB=256)
        keeper, known = processes.supervisor(settings), processes.local(settings)
        try:
            yield settings
        finally:
            processes.down(keeper, known)
            for process in known:
                log_files.await_whole(keeper.log_file(process.name))


def up(settings: Settings, *names: str) -> None:
    """Start processes, and what they bring unless they are all named."""
    known = processes.local(settings)
    processes.up(processes.supervisor(settings), [process for process in known if process.name in names])


def ends(settings: Settings) -> dict[int, int]:
    """Up to where the topic is filled."""
    return {partition: end for partition, (_, end) in broker.offsets(settings, ADS_CHANGES.topic).items()}


def decoded(
    settings: Settings, since: Mapping[int, int], is_enough: Callable[[Decoded], bool], times: int = 1
) -> Decoded:
    """What the contract says of the records that come after some offsets, once that is enough."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": "test",
            "enable.auto.commit": False,
        }
    )
    consumer.assign([TopicPartition(ADS_CHANGES.topic, *place) for place in since.items()])
    rows: list[dict[str, Any]] = []
    deadline = time.monotonic() + PATIENCE_S
    while True:
        for message in consumer.consume(10_000, 0.2):
            assert message.error() is None
            place = {"topic_id": "t", "partition": message.partition(), "offset": message.offset()}
            broker_time = message.timestamp()[1] * 1000
            rows.append(place | {"broker_time": broker_time, "key": message.key(), "value": message.value()})
        found = decode_table(ADS_CHANGES, pa.Table.from_pylist(rows, schema=RECORD))
        if is_enough(found):
            consumer.close()
            return found
        assert time.monotonic() < deadline, f"{found.accepted.num_rows} records are not what was waited for"


def stored(settings: Settings) -> Visible:
    """Every row of the database as the repository shows it: without nulls, terms in order, times in ms."""
    with database.connected(settings) as connection:
        return {name: dict(_rows(connection, name)) for name in TABLES}


def _rows(connection: psycopg.Connection, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    table = TABLES[name]
    for row in connection.cursor(row_factory=dict_row).execute(f"SELECT * FROM {name}".encode()):
        key = row.pop(table.key)
        for column in table.columns:
            if (value := row.get(column.name)) is not None and column.type == TIME:
                row[column.name] = round(value.timestamp() * 1000)
            elif value is not None and column.type == TERMS:
                row[column.name] = sorted(set(value))
        yield key, {column: value for column, value in row.items() if value is not None}


def await_that(is_true: Callable[[], bool], every_s: float = 0.2) -> None:
    """Returns when it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(every_s)


def free_port() -> int:
    """A port that nothing listens at."""
    return free_ports(1)[0]


def with_database(settings: Settings, address: str) -> Settings:
    """The same settings with another source database."""
    return dataclasses.replace(settings, ads=dataclasses.replace(settings.ads, database=address))
