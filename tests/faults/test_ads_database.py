"""Kafka Connect, what runs it, and PostgreSQL, killed within a large transaction: nothing is lost, or halved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import psycopg
import pytest

from jobs import processes
from jobs.processes import Record
from pipelines.ads import capture, consumer, database, generator, repository, rows, updater
from pipelines.ads.database import DatabaseError
from pipelines.ads.repository import IS_THERE, Repository
from pipelines.ads.schema import TABLES
from pipelines.settings import Settings
from tests import ads_source

ADS, SEED, LARGE, ENOUGH = 40, 7, 8_000, 1_000


@pytest.fixture(scope="module")
def source() -> Iterator[Settings]:
    with ads_source.home() as settings:
        ads_source.up(settings, "broker", "ads-db", "ads-connect")
        database.load(settings, ADS, SEED)
        yield settings


@contextmanager
def small_changes(settings: Settings, seed: int) -> Iterator[None]:
    """Small transactions beside, until the block ends; one that fails is written again."""
    is_over = threading.Event()

    def write() -> None:
        waiting = list(generator.transactions(ADS, seed, 5_000, 1))
        while waiting and not is_over.is_set():
            try:
                with database.connected(settings) as connection:
                    while waiting and not is_over.wait(0.02):
                        database.write(connection, waiting[0])
                        waiting.pop(0)
            except (psycopg.Error, DatabaseError):
                is_over.wait(0.2)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def write_large(settings: Settings, name: str) -> None:
    """One transaction of many rows, of which a page has one position in the log; then changes of keys."""
    with database.connected(settings) as connection:
        with connection.transaction(), connection.cursor() as cursor:
            with cursor.copy("COPY pins (pin_id) FROM STDIN") as copy:
                for number in range(LARGE):
                    copy.write_row([f"{name}{number}"])
        connection.execute("UPDATE pins SET pin_id = 'new-' || pin_id WHERE pin_id LIKE %s", [f"{name}1%"])


def kill(settings: Settings, victim: str) -> None:
    name = "ads-db" if victim == "postgresql" else "ads-connect"
    record = Record.read(processes.supervisor(settings).pid_file(name))
    assert record is not None
    pid = record.pid
    if victim == "connect":
        (child,) = psutil.Process(pid).children()
        pid = child.pid
    os.kill(pid, signal.SIGKILL)


def visible(store: Repository) -> ads_source.Visible:
    with store.reading() as connection:
        return {
            table: {
                key: {column: value for column, value in rows.visible(row).items() if value is not None}
                for key, row in repository.scan(connection, table)
                if rows.is_there(row, declared)
            }
            for table, declared in TABLES.items()
        }


def shows(store: Repository, wanted: ads_source.Visible) -> Callable[[], bool]:
    """Whether it has all that is wanted, or it is too late; looked at every two seconds."""
    deadline, looked_at = time.monotonic() + ads_source.PATIENCE_S, 0.0

    def is_over() -> bool:
        nonlocal looked_at
        if time.monotonic() < looked_at + 2:
            return False
        looked_at = time.monotonic()
        return looked_at > deadline or visible(store) == wanted

    return is_over


@pytest.mark.parametrize(
    "victim",
    [
        "connect",
        pytest.param("supervising", marks=pytest.mark.slow),
        pytest.param("postgresql", marks=pytest.mark.slow),
    ],
)
def test_kill_9_loses_nothing_and_shows_no_half(source: Settings, victim: str) -> None:
    written = {f"{victim}{number}" for number in range(LARGE)}
    renamed = {f"new-{key}" if key.startswith(f"{victim}1") else key for key in written}

    def sent() -> int:
        return sum(ads_source.ends(source).values()) - since

    with small_changes(source, SEED + len(victim)):
        ads_source.await_that(lambda: capture.is_snapshot_whole(source))  # of rows, not of transactions
        since = sum(ads_source.ends(source).values())
        write_large(source, victim)
        ads_source.await_that(lambda: sent() > ENOUGH, every_s=0.01)
        kill(source, victim)
        assert sent() < LARGE
        if victim != "connect":  # which what runs it starts again
            time.sleep(1)
            ads_source.up(source, "ads-db", "ads-connect")
    wanted, store = ads_source.stored(source), Repository(f"sqlite:{source.home}/{victim}.db")
    pages: set[str] = set()  # of the large transaction, as the changes say that they appear and go
    for batch in consumer.follow(source, store, shows(store, wanted)):
        for change in batch.changes:
            if change.key.removeprefix("new-").startswith(victim) and IS_THERE in change.changed:
                (pages.add if change.changed[IS_THERE][1] else pages.remove)(change.key)
        # One batch may hold the transaction that changes keys, too: then the old ones never appear.
        assert pages in (set(), written, renamed)
    assert pages == renamed
    assert visible(store) == wanted
    with store.reading() as connection:
        assert updater.held(connection) == []
    store.close()


@pytest.mark.slow
def test_killed_within_its_first_snapshot_it_takes_another() -> None:
    with ads_source.home() as settings:
        ads_source.up(settings, "broker", "ads-db", "ads-connect")
        database.load(settings, LARGE, SEED)
        ads_source.await_that(lambda: sum(ads_source.ends(settings).values()) > 0, every_s=0.01)
        assert not capture.is_snapshot_whole(settings)
        kill(settings, "connect")
        seen = sum(ads_source.ends(settings).values())
        write_large(settings, "between")
        wanted, store = ads_source.stored(settings), Repository(f"sqlite:{settings.home}/again.db")
        assert seen < sum(len(table) for table in wanted.values())
        for _ in consumer.follow(settings, store, shows(store, wanted)):
            pass
        assert visible(store) == wanted
        ads_source.await_that(lambda: capture.is_snapshot_whole(settings))
        store.close()
