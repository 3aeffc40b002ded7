"""The ads repository when its writer is killed, and when many open it at once; on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pipelines import failpoints, postgres
from pipelines.ads import generator, repository, rows, updater
from pipelines.ads.repository import Repository, Update
from pipelines.ads.updater import Event
from pipelines.preflight import PreflightError
from pipelines.settings import ROOT
from tests.conftest import free_ports

ADS, TRANSACTIONS, BATCH, SEED = 20, 60, 12, 7
CHILD = "import sys; from tests.faults import test_ads_repository as it; it.go_on(sys.argv[1])"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the address of a database on it begins with."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if request.param == "sqlite":
            yield f"sqlite:{folder}/"
            return
        folder.chmod(0o755)  # where this process is root, PostgreSQL is another user
        try:
            with postgres.running(folder / "postgres", free_ports(1)[0], {"fsync": "off"}) as found:
                yield found.removesuffix("postgres")
        except PreflightError as error:
            pytest.skip(str(error))


@pytest.fixture
def uri(server: str) -> str:
    """A repository that was never opened."""
    name = f"test_{uuid.uuid4().hex}"
    if server.startswith("postgresql"):
        with psycopg.connect(f"{server}postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
    return f"{server}{name}"


def batches() -> list[list[Event]]:
    """Transactions whose records are spread: most batches leave some that wait."""
    said = list(generator.transactions(ADS, SEED, TRANSACTIONS, 1))
    events = [
        Event(update, number, f"t{number}", len(updates))
        for number, updates in enumerate(said)
        for update in updates
    ]
    spread = [*events[::2], *events[1::2]]
    return [spread[start : start + BATCH] for start in range(0, len(spread), BATCH)]


def go_on(uri: str) -> None:
    """Read the batches on from where the repository says that they were read to."""
    store = Repository(uri)
    with store.reading() as connection:
        done = int(repository.progress(connection).get("topic", 0))
    for number, batch in enumerate(batches()[done:], done + 1):
        updater.apply(store, batch, "topic", str(number))
    store.close()


def naive(events: list[Event]) -> dict[tuple[str, str], dict[str, object]]:
    """What the whole transactions among the events say; the generator's versions only grow."""
    found: dict[tuple[str, str], dict[str, object]] = {}
    whole = [
        event.update
        for event in events
        if sum(one.transaction_id == event.transaction_id for one in events) == event.transaction_count
    ]
    for update in sorted((one for one in whole if one is not None), key=lambda one: one.version):
        assert update.values is not None
        found.setdefault((update.table, update.key), {}).update(update.values)
    return found


def seen(store: Repository) -> tuple[int, dict[tuple[str, str], dict[str, object]]]:
    with store.reading() as connection:
        done = int(repository.progress(connection).get("topic", 0))
        return done, {
            (table, key): rows.visible(row)
            for table in repository.TABLES
            for key, row in repository.scan(connection, table)
        }


@pytest.mark.parametrize("place", ["updater.written", "updater.committed"])
def test_kill_9_loses_nothing_and_repeats_nothing(uri: str, place: str) -> None:
    given = batches()
    store = Repository(uri)
    environment = {**os.environ, failpoints.VARIABLE: f"{place}:4"}
    killed = subprocess.run([sys.executable, "-c", CHILD, uri], cwd=ROOT, env=environment, check=False)
    assert killed.returncode == -9
    done, found = seen(store)
    assert done == (3 if place == "updater.written" else 4)
    assert found == naive([event for batch in given[:done] for event in batch])
    go_on(uri)
    done, found = seen(store)
    assert done == len(given)
    assert found == naive([event for batch in given for event in batch])
    with store.reading() as connection:
        assert updater.held(connection) == []
    store.close()


def test_many_open_a_new_repository_at_once(uri: str) -> None:
    at_once, problems = threading.Barrier(8), []

    def open_it() -> None:
        at_once.wait()
        try:
            Repository(uri).close()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(at_once.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_to_open_a_repository_waits_for_no_writer(uri: str) -> None:
    store = Repository(uri)
    with store.writing() as connection:
        repository.write(connection, [Update("campaigns", "c1", 1, {"status": "paused"})])
        beside = Repository(uri)
        with beside.reading() as other:
            assert repository.read(other, "campaigns", ["c1"]) == {}
        beside.close()
    store.close()
