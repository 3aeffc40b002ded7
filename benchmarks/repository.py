"""Versioned writes of source transactions into the ads repository, on SQLite and on a private PostgreSQL, in turns.

An account of `--ads` ads is written first. Then the same changes go through the shipped updater into both:
transactions of one to three rows with skewed keys, in batches of `--batch` records as they come from the topic. One in
twenty is sent again, and one record in ten comes with a later batch, so that its transaction waits. Each batch is one
commit, with how far the source was read. Afterwards every row is compared with a naive fold of all records.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import BenchmarkError, say
from pipelines import postgres
from pipelines.ads import generator, repository, rows, updater
from pipelines.ads.repository import Repository, Update
from pipelines.ads.updater import Event

LATE_BY = 3
Visible = dict[tuple[str, str], dict[str, Any]]


def main(given: Sequence[str]) -> int:
    """Run it."""
    options = harness.arguments(
        __doc__,
        given,
        ads=(100_000, "of the account"),
        transactions=(50_000, "source transactions"),
        batch=(2_000, "records of a commit"),
        seed=(1, "of the account and of its changes"),
    )
    machine = harness.machine()
    account = list(generator.updates(options.ads, options.seed))
    changes = list(
        generator.transactions(options.ads, options.seed, options.transactions, account[-1].version + 1)
    )
    batches = arriving(changes, options.batch, options.seed)
    wanted = naive([*account, *(update for one in changes for update in one)])
    say(f"{len(account):,} rows, {len(changes):,} transactions, {len(batches):,} batches")
    with tempfile.TemporaryDirectory(prefix="tidemark-repository-") as made:
        folder = Path(made)
        folder.chmod(0o755)  # PostgreSQL may run as another user
        port = harness.free_ports(1)[0]
        with postgres.running(folder / "postgres", port) as uri:
            stores = {
                "sqlite": Repository(f"sqlite:{folder / 'repository.db'}"),
                "postgres": Repository(uri),
            }
            measured = measure(stores, account, batches)
            mismatches = {name: compare(store, wanted) for name, store in stores.items()}
            for store in stores.values():
                store.close()
    harness.publish(
        {
            "benchmark": "repository",
            "transactions_per_s": round(len(changes) / measured["sqlite"]["seconds"]),
            "postgres_transactions_per_s": round(len(changes) / measured["postgres"]["seconds"]),
            "mismatches": sum(mismatches.values()),
            "rows": len(account),
            "transactions": len(changes),
            "records": sum(map(len, batches)),
            "commits": len(batches),
            "stores": measured,
            "beside": ["PostgreSQL"],
            **machine,
        }
    )
    return 0


def arriving(changes: list[list[Update]], size: int, seed: int) -> list[list[Event]]:
    """The records as they come: some again, some late."""
    chance = random.Random(seed)
    events = [
        Event(update, number, f"t{number}", len(updates))
        for number, updates in enumerate(changes)
        for update in updates
    ]
    batches: list[list[Event]] = [[] for _ in range(-(-len(events) // size) + LATE_BY)]
    for place, event in enumerate(events):
        batch = place // size
        batches[batch + (LATE_BY if chance.random() < 0.1 else 0)].append(event)
        if chance.random() < 0.05:
            batches[batch + LATE_BY].append(event)
    return batches


def measure(
    stores: dict[str, Repository], account: list[Update], batches: list[list[Event]]
) -> dict[str, dict[str, Any]]:
    """The account into each store, then the batches into each in turn."""
    loaded: dict[str, float] = {}
    for name, store in stores.items():
        began = time.perf_counter()
        with store.writing() as connection:
            repository.write(connection, account)
        loaded[name] = time.perf_counter() - began
        say(f"{name}: {len(account):,} rows in {loaded[name]:.1f} s")
    took: dict[str, list[float]] = {name: [] for name in stores}
    for number, batch in enumerate(batches):
        for name, store in stores.items():
            began = time.perf_counter()
            updater.apply(store, batch, "topic", str(number))
            took[name].append(time.perf_counter() - began)
    return {
        name: {
            "seconds": round(sum(seconds), 2),
            "commit_ms": harness.percentiles(seconds, [50, 99, 100], 1000, 1),
            "account_s": round(loaded[name], 1),
        }
        for name, seconds in took.items()
    }


def naive(updates: list[Update]) -> Visible:
    """What each row is: versions only grow here, so the last word on each column."""
    found: Visible = {}
    for update in updates:
        assert update.values is not None
        found.setdefault((update.table, update.key), {}).update(update.values)
    return found


def compare(store: Repository, wanted: Visible) -> int:
    """How many rows are not as they should be.

    Raises:
        BenchmarkError: transactions still wait.
    """
    found: Visible = {}
    with store.reading() as connection:
        if waiting := updater.held(connection):
            raise BenchmarkError(f"{len(waiting)} transactions were not written", where=store.uri)
        for table in {table for table, _ in wanted}:
            found |= {
                (table, key): dict(rows.visible(row)) for key, row in repository.scan(connection, table)
            }
    return sum(
        json.dumps(found.get(at), sort_keys=True) != json.dumps(wanted.get(at), sort_keys=True)
        for at in found.keys() | wanted.keys()
    )
