"""The doctor on a small world that every step really made: it finds nothing, and then each fault that is planted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from deltalake import DeltaTable
from pyiceberg.expressions import EqualTo
from pyiceberg.table import Table
from pyspark.sql import DataFrame, SparkSession
from typer.testing import CliRunner

from jobs.build import build
from jobs.cli import repair
from jobs.cli.shared import app
from jobs.epochs import MarkerCopy
from pipelines import lake, staging
from pipelines.contracts import CONTRACTS, USER_INTERACTIONS
from pipelines.indexing import streaming
from pipelines.indexing.position import Position
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES, KEYED, STREAMS, state
from pipelines.ingest import archive, broker
from pipelines.ingest import load as loader
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings
from quality import doctor
from tests.conftest import small_settings

pytestmark = pytest.mark.timeout(900)

EVENTS, LETTERS, OFFER = "raw.user_interactions", "raw.dead_letters", "curated.pins_offer"
EVENTS_ID, PINS_ID = "user-interactions@one", "pin-updates@two"
A_LETTER = "partition = 0 AND offset = 17"
OLD_S = time.time() - 10 * 86_400


class World(NamedTuple):
    settings: Settings
    backup: Path

    def delete(self, name: str, condition: str) -> None:
        from pipelines.spark import session

        lake.delete(session(self.settings, "faults"), lake.TABLES[name], condition)

    def repeat(self, name: str, condition: str, **changes: str) -> None:
        """Append rows that are there once more, with some columns as SQL says."""
        from pyspark.sql import functions as F

        from pipelines.spark import session

        rows = lake.read(session(self.settings, "faults"), name).filter(condition)
        for column, value in changes.items():
            rows = rows.withColumn(column, F.expr(value))
        lake.append(rows, lake.TABLES[name])

    def table(self, name: str) -> Table:
        found = lake.open_table(self.settings, name)
        assert found is not None
        return found

    def delta(self, index: str) -> Path:
        (folder,) = (self.settings.paths.delta / index).iterdir()
        return folder

    def base(self, index: str) -> Path:
        versions = Versions(self.settings.paths.indices, index)
        pointer = versions.pointer()
        assert pointer is not None
        return versions.path(pointer.version)

    def found(self, *, is_deep: bool = False) -> dict[str, set[str]]:
        """Check → severities, of what is not well; every finding says what to do."""
        said: dict[str, set[str]] = {}
        for finding in doctor.examine(self.settings, is_deep=is_deep):
            if finding.severity != doctor.OK:
                assert finding.what
                assert finding.remedy
                said.setdefault(finding.check, set()).add(finding.severity)
        return said

    def said(self, check: str) -> str:
        found = [f"{f.where}: {f.what}" for f in doctor.examine(self.settings) if f.check == check]
        return "; ".join(found)


def event(number: int, **changes: Any) -> str:
    said = {"user_id": f"u{number % 3}", "event_id": str(number), "pin_id": "p1", "action": "view"}
    return json.dumps(said | {"event_time": 1_700_000_000_000 + number} | changes)


def pin(number: int, **changes: Any) -> str:
    offer = {"price_usd_micros": 5, "is_available": True}
    labels = {"title": "t", "category": "c", "department": "d", "brand": None}
    return json.dumps({"pin_id": f"p{number}", "catalogue": labels, "offer": offer} | changes)


def batch(spark: SparkSession, records: list[tuple[str, int, int, str]]) -> DataFrame:
    """A micro-batch as Kafka's source gives it: topic id, partition, offset, value."""
    rows = [
        (topic_id.partition("@")[0], topic_id, partition, offset, None, None, datetime(2024, 3, 1, tzinfo=UTC), None,
         bytearray(value.encode()))
        for topic_id, partition, offset, value in records
    ]  # fmt: skip
    columns = "topic string, topic_id string, partition int, offset bigint, load_id string, load_row bigint"
    return spark.createDataFrame(rows, f"{columns}, broker_time timestamp, key binary, value binary")


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> World:
    from pipelines.spark import session

    folder = tmp_path_factory.mktemp("doctor")
    settings = small_settings(
        folder / "home", KAFKA__IS_EMBEDDED="false", KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1"
    )
    own = session(settings, "tests")
    contracts = tuple(CONTRACTS.values())
    for contract in contracts:
        lake.ensure(own, loader.raw_spec(contract))
    lake.ensure(own, lake.RAW_DEAD_LETTERS)
    epochs = [
        [
            (EVENTS_ID, p, e * 10 + n, "{" if n == 7 else event(e * 20 + p * 10 + n))
            for p in (0, 1)
            for n in range(10)
        ]
        for e in range(3)
    ]
    pins = [[(PINS_ID, 0, e * 5 + n, pin(e * 5 + n)) for n in range(5)] for e in range(2)]
    runs = {
        name: streaming.HotStreamRun(
            stream,
            INDICES.values(),
            deltas=settings.paths.delta,
            checkpoints=settings.paths.checkpoints,
            state=state(settings, name),
        )
        for name, stream in STREAMS.items()
        if name not in KEYED
    }
    rows = own.createDataFrame(
        [(n, event(500 + n)) for n in range(6)] + [(6, "]")], "load_row long, value string"
    )
    loader.load(own, settings, USER_INTERACTIONS, rows, "history")
    for number, records in enumerate(epochs):
        both = records + (pins[number] if number < len(pins) else [])
        archive.archive_epoch(settings, contracts, batch(own, both), 1, number)
        runs["user_interactions"].run_epoch(batch(own, records), number, 1)
    for number, records in enumerate(pins):
        runs["pin_updates"].run_epoch(batch(own, records), number, 1)
    MarkerCopy(own, settings).run()
    for name, topic_ids in (("archive", {"user-interactions": EVENTS_ID, "pin-updates": PINS_ID}),):
        streaming.begin(
            settings.paths.checkpoints, name, topic_ids, lambda: streaming.Committed(0, Position()), 2
        )
    report = build(settings)
    assert report.passed, report.problem()
    shutil.copytree(settings.home, folder / "backup")
    return World(settings, folder / "backup")


@pytest.fixture
def world(made: World) -> Iterator[World]:
    """The world, as it was made, at the same place; a fault of another test is gone."""
    yield made
    home, catalog = made.settings.home, made.settings.lake.sqlite_path
    assert catalog is not None
    for folder in ("lake/warehouse", "indices", "delta", "checkpoints"):
        shutil.rmtree(home / folder)
        shutil.copytree(made.backup / folder, home / folder)
    with (  # into the file that it is: Spark and pyiceberg have it open
        contextlib.closing(sqlite3.connect(made.backup / catalog.relative_to(home))) as backup,
        contextlib.closing(sqlite3.connect(catalog)) as live,
    ):
        backup.backup(live)


def test_a_healthy_world_has_no_finding(world: World) -> None:
    assert world.found() == {}
    assert world.found(is_deep=True) == {}


def test_the_command_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "load_settings", lambda: world.settings)
    well = CliRunner().invoke(app, ["doctor", "--json"])
    assert (well.exit_code, json.loads(well.stdout)["is_healthy"]) == (0, True)
    (world.base("pins") / "manifest.json").unlink()
    sick = CliRunner().invoke(app, ["doctor"])
    assert (sick.exit_code, "which is not there" in sick.stdout, "tidemark build" in sick.stdout) == (
        1,
        True,
        True,
    )


def test_nothing_at_all_is_healthy(settings: Settings) -> None:
    assert {finding.severity for finding in doctor.examine(settings, is_deep=True)} == {doctor.OK}


ERR, WARN = {doctor.ERROR}, {doctor.WARNING}


def test_lost_records(world: World) -> None:
    world.delete(EVENTS, "partition = 1 AND offset BETWEEN 11 AND 13")
    assert world.found() == {"raw": ERR, "raw and delta": ERR}
    assert "3 offsets are missing: 11 to 13" in world.said("raw")
    assert "raw has 17" in world.said("raw and delta")


def test_records_of_which_it_is_noted_that_they_were_lost(world: World) -> None:
    from pipelines.spark import session

    world.delete(EVENTS, "partition = 1 AND offset BETWEEN 11 AND 13")
    spark = session(world.settings, "faults")
    spark.sql(
        f"CREATE TABLE IF NOT EXISTS lake.{doctor.LOSSES} "
        "(topic_id string, partition int, start bigint, end bigint, noted_at timestamp) USING iceberg"
    )
    noted = f"SELECT '{EVENTS_ID}' AS topic_id, 1 AS partition, 11L AS start, 14L AS end, now() AS noted_at"
    spark.sql(noted).writeTo(f"lake.{doctor.LOSSES}").append()
    assert world.found() == {"raw and delta": ERR}


def test_a_single_offset_may_be_a_marker_but_not_where_the_stream_read_a_record(world: World) -> None:
    world.delete(EVENTS, "partition = 0 AND offset = 12")
    assert world.found() == {"raw": WARN, "raw and delta": ERR}


def test_rows_that_end_before_the_position(world: World) -> None:
    world.delete(EVENTS, "partition = 0 AND offset >= 28")
    assert world.found() == {"raw": ERR, "raw and delta": ERR}
    assert "the rows end at offset 28, the snapshot says 30" in world.said("raw")


def test_a_record_twice(world: World) -> None:
    world.repeat(EVENTS, "partition = 0 AND offset = 4")
    assert world.found() == {"raw": ERR}
    assert "1 records are there more than once, as offset 4" in world.said("raw")


def test_a_load_that_lacks_rows(world: World) -> None:
    world.delete(EVENTS, "load_row = 3")
    assert world.found() == {"raw": ERR}
    assert "6 rows; its commit brought 7" in world.said("raw")


def test_a_letter_that_is_gone(world: World) -> None:
    world.delete(LETTERS, A_LETTER)
    assert world.found() == {"raw and delta": ERR}
    assert world.found(is_deep=True) == {"raw and delta": ERR, "dead letters": ERR}


def test_a_letter_twice(world: World) -> None:
    world.repeat(LETTERS, A_LETTER)
    assert world.found() == {"dead letters": ERR}


def test_a_letter_of_a_record_that_is_accepted(world: World) -> None:
    world.repeat(LETTERS, A_LETTER, offset="16L")
    assert world.found() == {"raw and delta": ERR}
    assert world.found(is_deep=True) == {"raw and delta": ERR, "dead letters": WARN}


def test_a_letter_of_a_record_that_raw_lacks(world: World) -> None:
    world.delete(EVENTS, A_LETTER)
    assert world.found() == {"raw": WARN, "raw and delta": ERR, "dead letters": ERR}
    assert "1 letters are of records that raw does not have, as user-interactions" in world.said(
        "dead letters"
    )


def test_letters_of_an_attempt_that_came_to_nothing(world: World) -> None:
    world.repeat(LETTERS, A_LETTER, offset="900L", ingested_at="timestamp '2024-01-01'")
    assert world.found() == {"dead letters": WARN}


def test_what_was_undone_in_raw_is_still_in_what_was_made_of_it(world: World) -> None:
    oldest = list(lake.ancestors(world.settings, EVENTS))[-1]
    world.table(EVENTS).manage_snapshots().set_current_snapshot(oldest.id).commit()
    assert world.found() == {"curated": ERR, "bases": ERR}  # the letters are of today, and may come to count
    assert "up to 30" in world.said("curated")


def test_an_account_that_does_not_add_up(world: World) -> None:
    table = world.table("ops.account")
    rows = table.scan().to_arrow().slice(0, 1)
    place = rows.column_names.index("current")
    table.append(rows.set_column(place, rows.field(place), pa.array([10_000], pa.int64())))
    assert world.found() == {"curated": ERR}


def test_a_curated_table_that_lacks_a_row(world: World) -> None:
    world.table(OFFER).delete(EqualTo("pin_id", "p3"))  # type: ignore[call-arg,arg-type]
    assert world.found() == {}
    assert world.found(is_deep=True) == {"curated": ERR}


def test_rows_that_were_staged_and_not_published(world: World) -> None:
    table = world.table("curated.pins_offer")
    assert table.metadata.current_snapshot_id is not None
    table.manage_snapshots().create_branch(table.metadata.current_snapshot_id, staging.BRANCH).commit()
    assert world.found() == {"staged": WARN}
    assert "curated.pins_offer: " in world.said("staged")


def test_a_base_with_a_changed_byte(world: World) -> None:
    file = next(world.base("pins").glob("*/keys.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert world.found() == {"bases": ERR}
    assert "keys.arrow" in world.said("bases")


def test_a_base_without_a_manifest_that_can_be_read(world: World) -> None:
    (world.base("pins") / "manifest.json").write_text("{")
    found = world.found()
    assert found["bases"] == {doctor.ERROR, doctor.WARNING}  # its tags are nobody's now
    assert set(found) == {"bases"}


def test_a_pointer_to_nothing(world: World) -> None:
    shutil.rmtree(world.base("user_events"))
    assert doctor.ERROR in world.found()["bases"]
    assert "which is not there" in world.said("bases")


def test_a_tag_that_is_gone_and_one_too_many(world: World) -> None:
    table = world.table("index.pins")
    (label,) = (name for name in table.metadata.refs if name.startswith("base-"))
    table.manage_snapshots().remove_tag(label).commit()
    assert world.found() == {"bases": WARN}
    snapshot_id = table.metadata.current_snapshot_id
    assert snapshot_id is not None
    table.refresh().manage_snapshots().create_tag(snapshot_id, label).create_tag(
        snapshot_id, "base-x"
    ).commit()
    assert world.found() == {"bases": WARN}
    assert "as base-x" in world.said("bases")


def test_a_build_that_broke_off(world: World) -> None:
    left = world.settings.paths.indices / "pins" / "x.building"
    left.mkdir()
    assert world.found() == {}
    os.utime(left, (OLD_S, OLD_S))
    assert world.found() == {"bases": WARN}


def test_a_base_of_another_lineage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "lineage", lambda spec: "another")
    assert world.found() == {"bases": WARN}


def test_a_file_of_the_delta_that_is_gone(world: World) -> None:
    files = [Path(file) for file in DeltaTable(str(world.delta("pins"))).file_uris()]
    next(file for file in files if file.name.startswith("pin_updates-1-0-")).unlink()
    assert world.found() == {"delta": ERR}
    assert "is missing; the log names it" in world.said("delta")


def test_an_epoch_that_is_gone(world: World) -> None:
    DeltaTable(str(world.delta("pin_counts"))).delete("epoch = 1")
    assert world.found() == {"delta": ERR}
    assert "user_interactions/1/2 epochs are missing" in world.said("delta")
    assert "offsets 10 to 19: 10 records" in world.said("delta")


def test_a_log_that_cannot_be_read(world: World) -> None:
    (world.delta("pins") / "_delta_log" / f"{0:020d}.json").write_text("{")
    found = world.found()
    assert found["delta"] == ERR


def test_a_delta_that_was_retired_beyond_the_served_base(world: World) -> None:
    floor = Position({PINS_ID: {0: 999}})
    (world.delta("pins") / "_floor.json").write_text(floor.to_text())
    assert world.found() == {"delta": ERR}
    assert "retired beyond the cut" in world.said("delta")


def test_a_file_of_an_epoch_that_was_not_committed(world: World) -> None:
    file = Path(DeltaTable(str(world.delta("pins"))).file_uris()[0])
    copy = file.with_name("left.parquet")
    shutil.copyfile(file, copy)
    assert world.found() == {}
    os.utime(copy, (OLD_S, OLD_S))
    assert world.found() == {"delta": WARN}


def test_epochs_that_were_copied_twice_or_passed_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EPOCH_COPY_S", -1)
    world.repeat("ops.epochs", "epoch = 1 AND index = 'pins'")
    assert world.found() == {"ops.epochs": ERR}
    assert "1 epochs are there twice" in world.said("ops.epochs")
    world.delete("ops.epochs", "epoch = 1 AND index = 'pin_counts'")
    assert "were passed over" in world.said("ops.epochs")
    world.repeat("ops.epochs", "epoch = 2 AND index = 'pin_counts'", epoch="1L")
    assert world.found() == {"ops.epochs": ERR}
    assert "another position" in world.said("ops.epochs")


def test_epochs_that_are_not_copied_yet(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EPOCH_COPY_S", -1)
    world.delete("ops.epochs", "epoch = 2 AND index = 'pin_counts'")
    assert world.found() == {"ops.epochs": WARN}


def test_a_checkpoint_from_before(world: World) -> None:
    file = world.settings.paths.checkpoints / "archive" / "incarnation.json"
    file.write_text(file.read_text().replace('"number": 1', '"number": 0'))
    assert world.found() == {"checkpoints": ERR}


def test_offsets_that_kafka_lost_or_expired(kafka_settings: Settings) -> None:
    (topic_id,) = broker.ensure_topics(kafka_settings, ["examined"]).values()
    with Producer(kafka_settings) as producer:
        producer.send("examined", [(b"k", b"{}")] * 10)
    partition, (_, end) = max(broker.offsets(kafka_settings, "examined").items(), key=lambda known: known[1])
    assert end == 10
    admin = AdminClient({"bootstrap.servers": kafka_settings.kafka.bootstrap_servers})
    for future in admin.delete_records([TopicPartition("examined", partition, 4)]).values():
        future.result()
    home = doctor.Home(kafka_settings, is_deep=False)

    def found(stream: str, offset: int, of: str = topic_id) -> list[tuple[str, str]]:
        seen = doctor._in_kafka(home, stream, Position({of: {partition: offset}}))
        return [(severity, what) for severity, _, what, _ in seen]

    assert found("archive", 4) == found("archive", 10) == []
    assert found("archive", 11) == [
        (doctor.ERROR, "committed up to offset 11; Kafka ends at 10: it has lost records")
    ]
    expired = "offsets 1 to 3 have expired before they were read"
    assert (found("archive", 1), found("pins", 1)) == ([(doctor.ERROR, expired)], [(doctor.WARNING, expired)])
    assert found("archive", 11, of="examined@another") == found("archive", 1, of="gone@another") == []


def test_a_data_file_that_is_gone_and_one_that_nobody_names(world: World) -> None:
    file = Path(world.table(OFFER).inspect.data_files().column("file_path")[0].as_py().removeprefix("file:"))
    stray = file.with_name("stray.parquet")
    shutil.copyfile(file, stray)
    assert world.found() == {}
    os.utime(stray, (OLD_S, OLD_S))
    assert world.found() == {"files": WARN}
    file.unlink()
    assert world.found() == {"files": {doctor.ERROR, doctor.WARNING}}
