"""A real PostgreSQL against a real repository: what does not agree, by its cause, and repairs of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import psycopg
import pytest

from pipelines import postgres
from pipelines.ads import database, generator, repository, rows, sync, updater
from pipelines.ads.repository import Repository, Update
from pipelines.ads.schema import TABLES
from pipelines.ads.sync import DANGLING, DIFFERS, EXTRA, IMPOSSIBLE, MISSING, OLDER, WAITS, Unsynced
from pipelines.ads.updater import Event
from pipelines.contracts import ADS_CHANGES, Refusal, decode
from pipelines.settings import Settings

ADS, SEED = 60, 5
NOW_MS = 1_717_243_200_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    from tests.conftest import free_ports

    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("postgres")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)  # PostgreSQL runs as a user of its own
    with postgres.running(folder, port, {"wal_level": "logical", "fsync": "off"}):
        yield port


@pytest.fixture
def settings(server: int, make_settings: Callable[..., Settings]) -> Iterator[Settings]:
    found = make_settings(ADS__DATABASE_PORT=server)
    database.make(found)
    yield found
    with database.connected(found, "postgres") as connection:
        connection.execute("DROP DATABASE ads WITH (FORCE)")


@pytest.fixture
def source(settings: Settings) -> Iterator[psycopg.Connection]:
    with database.connected(settings) as connection:
        yield connection


@pytest.fixture
def store(settings: Settings) -> Iterator[Repository]:
    store = repository.opened(settings)
    yield store
    store.close()


def loaded(settings: Settings, store: Repository) -> None:
    """The same account in both; the versions of its records are as the log's."""
    database.load(settings, ADS, SEED)
    with store.writing() as connection:
        for table, found in generator.account(ADS, SEED):
            repository.write(
                connection,
                [Update(table.name, row.pop(table.key), 5, row) for row in found.to_pylist()],
            )


def unsynced(source: psycopg.Connection, store: Repository, **options: Any) -> list[Unsynced]:
    return sorted(sync.compare(source, store, grace_s=0.0, **options))


def applied(store: Repository, records: list[tuple[bytes, bytes]]) -> None:
    """As the door and the updater take them."""
    decoded = [decode(ADS_CHANGES, value, NOW_MS) for _, value in records]
    assert not [one for one in decoded if isinstance(one, Refusal)]
    updater.apply(store, [updater.event(one) for one in decoded if not isinstance(one, Refusal)])


def test_an_account_that_agrees_is_said_to_agree(
    settings: Settings, source: psycopg.Connection, store: Repository
) -> None:
    loaded(settings, store)
    assert unsynced(source, store) == []
    assert list(sync.dangling(store)) == []


def test_each_cause_is_found_and_repaired(
    settings: Settings, source: psycopg.Connection, store: Repository
) -> None:
    loaded(settings, store)
    waiting = Event(Update("ads", "a7", 6, {"status": "paused"}), 1, "t9", 2)
    updater.apply(store, [waiting])
    source.execute("UPDATE ads SET status = 'paused' WHERE ad_id = 'a7'")
    source.execute("UPDATE campaigns SET daily_budget_usd_micros = -3 WHERE campaign_id = 'c1'")
    source.execute(
        "UPDATE ad_groups SET countries = '{DE,AT}', starts_at = '2026-01-02 03:04:05.678+02' WHERE ad_group_id = 'g2'"
    )
    source.execute("DELETE FROM pins WHERE pin_id = 'p3'")
    source.execute("INSERT INTO ads (ad_id, status) VALUES ('a-new', 'draft')")
    found = unsynced(source, store)
    assert found == [
        Unsynced("ad_groups", "g2", DIFFERS, "starts_at, countries"),
        Unsynced("ads", "a-new", MISSING, ""),
        Unsynced("ads", "a7", WAITS, "transaction t9"),
        Unsynced("campaigns", "c1", IMPOSSIBLE, "daily_budget_usd_micros"),
        Unsynced("pins", "p3", EXTRA, ""),
    ]
    assert OLDER in {one.cause for one in unsynced(source, store, is_behind=lambda: True)}
    assert sync.counts(found)["ads", WAITS] == 1
    applied(store, list(sync.repairs(source, found)))
    assert unsynced(source, store) == [Unsynced("campaigns", "c1", IMPOSSIBLE, "daily_budget_usd_micros")]
    dangling = list(sync.dangling(store))
    assert Unsynced("ads", "a-new", DANGLING, "it names no ad_group_id") in dangling
    assert {one.detail for one in dangling if one.key != "a-new"} == {"pins/p3"}


def test_a_repair_overwrites_nothing_that_was_written_after_its_position(
    settings: Settings, source: psycopg.Connection, store: Repository
) -> None:
    """A writer that has begun before the position is waited for; whoever comes later has a greater position."""
    loaded(settings, store)
    source.execute("UPDATE ads SET status = 'archived' WHERE ad_id = 'a1'")
    given = unsynced(source, store)
    with database.connected(settings) as writer:
        writer.autocommit = False
        writer.execute("UPDATE ads SET status = 'draft' WHERE ad_id = 'a1'")
        committing = threading.Timer(1.0, writer.commit)
        committing.start()
        began = time.monotonic()
        ((_, record),) = sync.repairs(source, given)
        committing.join()
    assert time.monotonic() - began > 0.9
    said = orjson.loads(record)
    assert said["values"]["status"] == "draft"
    (after,) = source.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone() or ()
    assert said["version"] < after
    later = Update("ads", "a1", int(after), {"status": "active"})
    with store.writing() as connection:
        repository.write(connection, [later])
    applied(store, [(b"a1", record)])
    with store.reading() as connection:
        row = repository.read(connection, "ads", ["a1"])["a1"]
    assert rows.value(row, "status") == "active"


def test_a_run_without_the_database_compares_what_it_can(make_settings: Callable[..., Settings]) -> None:
    alone = make_settings()
    with (store := repository.opened(alone)).writing() as connection:
        repository.write(connection, [Update("ads", "a1", 1, {"ad_group_id": "g1", "pin_id": "p1"})])
    store.close()
    report = sync.run(alone, grace_s=0.0)
    assert report.note is not None and "cannot be reached" in report.note
    assert [row["rows"] for row in report.rows()] == [2, 2]
    assert orjson.loads(report.rows()[1]["examples"]) == {"a1": "pins/p1"}
    assert not report.rows()[0]["has_source"] and set(TABLES) > {report.rows()[1]["table"]}
