"""The source database: real PostgreSQL, captured by real Debezium into a real topic, as the contract reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from jobs import processes
from pipelines import postgres
from pipelines.ads import capture, database, evidence, generator
from pipelines.ads.database import DatabaseError
from pipelines.ads.explain import Part
from pipelines.ads.repository import Update
from pipelines.ads.schema import TABLES
from pipelines.contracts import Decoded
from pipelines.settings import Settings
from tests import ads_source

ADS, SEED = 40, 7
LOADED = sum(generator.size(name, ADS) for name in TABLES)


@pytest.fixture(scope="module")
def source() -> Iterator[Settings]:
    """An account that was there before it was captured."""
    with ads_source.home() as settings:
        ads_source.up(settings, "broker", "ads-db")
        assert database.load(settings, ADS, SEED) == LOADED
        ads_source.up(settings, "ads-connect")
        yield settings


def rows(found: Decoded, **wanted: str) -> list[dict[str, Any]]:
    """Accepted rows of these values, by version."""
    chosen = [
        row for row in found.accepted.to_pylist() if all(row[name] == value for name, value in wanted.items())
    ]
    return sorted(chosen, key=lambda row: row["version"])


def test_what_is_there_comes_first_as_it_is(source: Settings) -> None:
    found = ads_source.decoded(source, {0: 0, 1: 0}, lambda d: len(rows(d)) >= LOADED)
    wanted = {(update.table, update.key): update.values for update in generator.updates(ADS, SEED)}
    of_account = [row for row in rows(found) if (row["table"], row["key"]) in wanted]
    assert {(row["table"], row["key"]): json.loads(row["values"]) for row in of_account} == wanted
    assert found.refused.num_rows == 0
    shown = ads_source.stored(source)
    assert {(table, key): row for table, of in shown.items() for key, row in of.items()} == wanted


def test_a_transaction_comes_with_its_count_and_versions_that_grow(source: Settings) -> None:
    since = ads_source.ends(source)
    with database.connected(source) as connection:
        database.write(connection, [Update("campaigns", "t1", 1, {"status": "active", "labels": ["b", "a"]})])
        several = [
            Update("campaigns", "t1", 1, {"status": "paused"}),
            Update("advertisers", "t1", 1, {"balance_usd_micros": 7}),
            Update("ads", "t1", 1, {"created_at": 1_700_000_000_123, "clicks_7d": 5}),
        ]
        database.write(connection, several)
        database.write(connection, [Update("campaigns", "t1", 1, None)])
    found = ads_source.decoded(
        source, since, lambda d: rows(d, key="t1")[-1:] != [] and rows(d, key="t1")[-1]["is_deleted"]
    )
    made, paused, deleted = rows(found, table="campaigns", key="t1")
    assert [json.loads(row["values"])["status"] for row in (made, paused)] == ["active", "paused"]
    assert json.loads(paused["values"])["labels"] == ["a", "b"]
    (ad,) = rows(found, table="ads", key="t1")
    assert json.loads(ad["values"])["created_at"] == 1_700_000_000_123
    ids = [row["transaction_id"] for row in (made, paused, deleted)]
    assert len(set(ids)) == 3 and ad["transaction_id"] == ids[1]
    counts = {row["key"]: row["transaction_count"] for row in rows(found) if row["transaction_count"]}
    assert [counts[name] for name in ids] == [1, 3, 1]
    assert found.refused.num_rows == 0


def test_a_key_that_is_changed_is_a_deletion_and_a_new_row(source: Settings) -> None:
    since = ads_source.ends(source)
    with database.connected(source) as connection:
        database.write(connection, [Update("pins", "k1", 1, {"title": "chair"})])
        connection.execute("UPDATE pins SET pin_id = 'k2' WHERE pin_id = 'k1'")
    found = ads_source.decoded(source, since, lambda d: bool(rows(d, table="pins", key="k2")))
    made, deleted = rows(found, table="pins", key="k1")
    assert not made["is_deleted"] and deleted["is_deleted"]
    assert json.loads(rows(found, table="pins", key="k2")[0]["values"])["title"] == "chair"


def test_a_table_that_grows_flows_on_and_one_that_loses_a_column_stops_alone(source: Settings) -> None:
    since = ads_source.ends(source)
    with database.connected(source) as connection:
        for statement in (
            "ALTER TABLE images ADD COLUMN photographer text",
            "INSERT INTO images (image_signature, photographer) VALUES ('g1', 'somebody')",
            "ALTER TABLE images DROP COLUMN safety",
            "INSERT INTO images (image_signature) VALUES ('g2')",
            "INSERT INTO advertisers (advertiser_id) VALUES ('g3')",
            "ALTER TABLE images ADD COLUMN safety text",
            "INSERT INTO images (image_signature, safety) VALUES ('g4', 'high')",
            "ALTER TABLE images DROP COLUMN safety, ADD COLUMN safety double precision",
            "INSERT INTO images (image_signature, safety) VALUES ('g5', 0.5)",
        ):
            connection.execute(statement.encode())
    found = ads_source.decoded(source, since, lambda d: bool(rows(d, key="g3") and rows(d, key="g5")))
    assert json.loads(rows(found, key="g1")[0]["values"])["photographer"] == "somebody"
    assert json.loads(rows(found, key="g5")[0]["values"])["safety"] == 0.5
    refused = sorted(found.refused.select(["reason", "detail"]).to_pylist(), key=lambda row: row["reason"])
    dropped, retyped = refused
    assert (
        dropped["reason"] == "missing_field" and "images has no column safety any more" in dropped["detail"]
    )
    assert retyped["reason"] == "wrong_type" and "'high' is not a number" in retyped["detail"]


def test_what_the_contract_refuses_the_database_takes(source: Settings) -> None:
    since = ads_source.ends(source)
    with database.connected(source) as connection:
        connection.execute("INSERT INTO campaigns (campaign_id, daily_budget_usd_micros) VALUES ('n1', -1)")
        connection.execute("TRUNCATE campaigns")
    found = ads_source.decoded(source, since, lambda d: d.refused.num_rows >= 2)
    assert sorted(found.refused["reason"].to_pylist()) == ["out_of_range", "unknown_op"]


def test_the_slot_moves_on_while_only_others_are_written(source: Settings) -> None:
    with database.connected(source) as connection:
        connection.execute("CREATE TABLE other AS SELECT generate_series(1, 50000) AS number")
        written = connection.execute("SELECT pg_current_wal_lsn()").fetchone()
        behind = "SELECT confirmed_flush_lsn < %s::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
        ads_source.await_that(
            lambda: connection.execute(behind, [*(written or ()), capture.SLOT]).fetchone() == (False,)
        )


def test_explain_shows_rows_as_the_database_has_them(source: Settings) -> None:
    with database.connected(source) as connection:
        database.write(connection, [Update("ads", "e1", 1, {"status": "paused", "created_at": 1_000})])
    found = evidence.of_database(source, [Part("ads", "e1"), Part("pins", "e1"), Part("images", None)])
    assert set(found) == {"ads"}
    shown = {name: value for name, value in found["ads"].items() if value is not None}
    assert shown == {"ad_id": "e1", "status": "paused", "created_at": "1970-01-01T00:00:01+00:00"}


def test_an_account_is_loaded_into_an_empty_database_only(source: Settings) -> None:
    with pytest.raises(DatabaseError, match="there is an account already"):
        database.load(source, ADS, SEED)
    database.make(source)  # again


def test_a_database_whose_log_cannot_be_captured_is_named(source: Settings) -> None:
    port = ads_source.free_port()
    with postgres.running(source.home / "other", port, {"fsync": "off"}) as address:
        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute("CREATE DATABASE ads")
        other = ads_source.with_database(source, postgres.address(port, "ads"))
        with pytest.raises(DatabaseError, match="wal_level is replica.*ALTER SYSTEM"):
            capture.prepare(other)
    with pytest.raises(DatabaseError, match="cannot be reached.*tidemark up ads-db"):
        capture.prepare(other)
    with pytest.raises(DatabaseError, match="a database of your own.*up ads-connect"):
        database.command(other)


def test_status_says_that_it_runs(source: Settings) -> None:
    keeper = processes.supervisor(source)
    states = {
        process.name: keeper.status(process).state
        for process in processes.choose(processes.local(source), ["ads-db"])
    }
    assert states == {"ads-db": "ready", "ads-connect": "ready"}
