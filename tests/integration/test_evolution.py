"""Contracts that evolve while everything runs: a new field becomes a typed column, a retyped one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from pipelines import lake
from pipelines.contracts import PIN_UPDATES, RECORD, USER_INTERACTIONS, Contract, Field, extended
from pipelines.curate import SOURCES, curate
from pipelines.indexing import facts
from pipelines.indexing.spec import Family, IndexSpec, State, Timeline
from pipelines.indexing.streaming import HotStreamRun
from pipelines.indices import STREAMS, as_known
from pipelines.ingest import evolution, load
from pipelines.ingest.evolution import EvolutionError, Known
from pipelines.settings import Settings

EVENT = {"user_id": "u", "pin_id": "p", "action": "view", "event_time": 0}


def brought(
    spark: SparkSession, settings: Settings, contract: Contract, name: str, *records: dict[str, Any]
) -> Any:
    rows = [(json.dumps(record).encode(), number) for number, record in enumerate(records)]
    return load.load(
        spark, settings, contract, spark.createDataFrame(rows, "value binary, load_row long"), name
    )


def curated(spark: SparkSession, settings: Settings, contract: Contract) -> None:
    """As the asset does."""
    source = SOURCES[contract.name].under(evolution.current(settings, contract))
    snapshot = lake.current_snapshot(settings, source.raw_table)
    assert snapshot is not None
    result = curate(source, lake.read(spark, source.raw_table), rows=snapshot.rows, snapshot_id=snapshot.id)
    for part in source.parts:
        evolution.grow(settings, source.spec(part), source.contract)
        lake.ensure(spark, source.spec(part))
        lake.overwrite(result.table(part), source.spec(part))
    result.close()


def columns(spark: SparkSession, name: str) -> dict[str, str]:
    return dict(lake.read(spark, name).dtypes)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned holds at once; nobody waits a minute."""
    monkeypatch.setattr(evolution, "LEAD_MS", 0)
    monkeypatch.setattr(evolution, "REFRESH_S", 0.0)


@pytest.mark.usefixtures("at_once")
def test_a_new_field_is_a_typed_column_in_batch_and_stream_and_another_type_is_refused(
    own_spark: SparkSession, settings: Settings
) -> None:
    spark = own_spark
    brought(spark, settings, USER_INTERACTIONS, "before", {**EVENT, "event_id": "0"})
    curated(spark, settings, USER_INTERACTIONS)
    old = lake.current_snapshot(settings, "curated.user_interactions")
    first = brought(
        spark,
        settings,
        USER_INTERACTIONS,
        "first",
        {**EVENT, "event_id": "1", "dwell_ms": 70, "is_new": True, "seen": {"by": ["x"]}},
        {**EVENT, "event_id": "2", "dwell_ms": 80, "mixed": 1},
        {**EVENT, "event_id": "3", "mixed": "1"},
    )
    assert not first.refused
    second = brought(
        spark,
        settings,
        USER_INTERACTIONS,
        "second",
        {**EVENT, "event_id": "4", "dwell_ms": 90},
        {**EVENT, "event_id": "5", "dwell_ms": "long"},
        {**EVENT, "event_id": "6", "mixed": None},
    )
    assert second.refused == {"retyped_field": 1}
    letter = lake.read(spark, "raw.dead_letters").first()
    assert letter is not None
    assert 'dwell_ms is the text "long"; it has been an integer (bigint) since' in letter["detail"]

    curated(spark, settings, USER_INTERACTIONS)
    found = columns(spark, "curated.user_interactions")
    assert (found["dwell_ms"], found["is_new"], found["seen"]) == ("bigint", "boolean", "string")
    assert "mixed" not in found
    chosen = spark.sql(
        "SELECT event_id, dwell_ms, seen FROM lake.curated.user_interactions WHERE dwell_ms > 75"
    )
    assert sorted(map(tuple, chosen.collect())) == [("2", 80, None), ("4", 90, None)]
    assert old is not None
    before = lake.read(spark, "curated.user_interactions", old.id)
    assert "dwell_ms" not in before.columns
    assert before.count() == 1

    stream = as_known(STREAMS["user_interactions"], Known(settings))
    record = {field.name: pa.nulls(1, field.type) for field in RECORD}
    record["value"] = pa.array([json.dumps({**EVENT, "event_id": "7", "dwell_ms": 5}).encode()], pa.binary())
    record["broker_time"] = pa.array([4_000_000_000_000_000], RECORD.field("broker_time").type)
    rows = stream.decode(pa.table(record))
    assert rows.select(["dwell_ms", "is_new"]).to_pylist() == [{"dwell_ms": 5, "is_new": None}]


@pytest.mark.usefixtures("at_once")
def test_a_field_of_a_family_is_in_its_struct_and_can_be_retyped_and_forgotten(
    own_spark: SparkSession, settings: Settings
) -> None:
    spark = own_spark
    pin = {"pin_id": "p", "catalogue": {"title": "t", "weight": 3}}
    brought(spark, settings, PIN_UPDATES, "a", pin)
    curated(spark, settings, PIN_UPDATES)
    assert columns(spark, "curated.pins_catalogue")["catalogue"].endswith("weight:bigint>")
    first = lake.current_snapshot(settings, "curated.pins_catalogue")
    assert "weight" not in columns(spark, "curated.pins_offer")["offer"]

    evolution.add(settings, PIN_UPDATES, "catalogue.weight", "double")
    heavier = {"pin_id": "q", "catalogue": {"title": "t", "weight": 3.5}}
    assert not brought(spark, settings, PIN_UPDATES, "b", heavier).refused
    curated(spark, settings, PIN_UPDATES)
    rows = spark.sql("SELECT pin_id, catalogue.weight FROM lake.curated.pins_catalogue")
    assert sorted(map(tuple, rows.collect())) == [("p", 3.0), ("q", 3.5)]
    assert first is not None
    was = lake.read(spark, "curated.pins_catalogue", first.id).select("catalogue.weight")
    assert [tuple(row) for row in was.collect()] == [(3,)]

    evolution.forget(settings, PIN_UPDATES, "catalogue.weight")
    assert not brought(
        spark, settings, PIN_UPDATES, "c", {"pin_id": "r", "catalogue": {"weight": "heavy"}}
    ).refused
    curated(spark, settings, PIN_UPDATES)
    assert "weight" not in columns(spark, "curated.pins_catalogue")["catalogue"]
    origins = {field.path: field.origin for field in evolution.shown(settings, PIN_UPDATES)}
    assert origins["catalogue.weight"] == "forgotten"
    assert origins["catalogue.title"] == "declared"


def test_what_is_learned_holds_only_after_every_process_can_know_it(
    own_spark: SparkSession, settings: Settings
) -> None:
    known = Known(settings)
    assert known(USER_INTERACTIONS) is USER_INTERACTIONS
    record = {**EVENT, "event_id": "1", "dwell_ms": 1}
    brought(own_spark, settings, USER_INTERACTIONS, "a", record)
    learned = evolution.current(settings, USER_INTERACTIONS).fields
    (raw,) = lake.read(own_spark, "raw.user_interactions").collect()
    lead_ms = learned[0].since_ms - raw["broker_time"].timestamp() * 1000
    assert lead_ms >= evolution.LEAD_MS > 2 * evolution.REFRESH_S * 1000
    assert not brought(own_spark, settings, USER_INTERACTIONS, "b", {**record, "dwell_ms": "x"}).refused


def test_a_declaration_that_breaks_what_was_promised_is_refused_and_names_both(
    own_spark: SparkSession, settings: Settings
) -> None:
    brought(own_spark, settings, USER_INTERACTIONS, "a", {**EVENT, "event_id": "1", "dwell_ms": 1})

    def declaring(schema: pa.Schema, version: int = 1) -> Contract:
        fields = {name: getattr(USER_INTERACTIONS, name) for name in ("topic", "key_field", "parse")}
        return Contract(version=version, row_schema=schema, **fields)

    schema = USER_INTERACTIONS.row_schema
    at = schema.get_field_index("surface")
    evolution.declare(settings, declaring(schema.append(pa.field("dwell_ms", pa.int64()))))
    for changed, said in [
        (schema.remove(at), "surface was string, and now there is no such field"),
        (schema.set(at, pa.field("surface", pa.int64())), "surface was string, and is now int64"),
        (schema.append(pa.field("dwell_ms", pa.string())), "dwell_ms was int64, and is now string"),
    ]:
        with pytest.raises(EvolutionError, match=said):
            evolution.declare(settings, declaring(changed))
    with pytest.raises(EvolutionError, match="holds records of v1, not of v2"):
        evolution.declare(settings, declaring(schema, version=2))


@pytest.mark.usefixtures("at_once")
def test_fields_are_added_by_hand_and_what_cannot_be_is_told(
    own_spark: SparkSession, settings: Settings
) -> None:
    with pytest.raises(EvolutionError, match="nothing was archived yet"):
        evolution.add(settings, USER_INTERACTIONS, "dwell_ms", "bigint")
    brought(own_spark, settings, USER_INTERACTIONS, "a", {**EVENT, "event_id": "1"})
    field = evolution.add(settings, USER_INTERACTIONS, "dwell_ms", "bigint")
    assert evolution.current(settings, USER_INTERACTIONS).fields == (field,)
    assert field == Field("dwell_ms", "bigint", field.since_ms)
    for path, kind, said in [
        ("surface", "bigint", "declares surface as string, so it cannot be bigint"),
        ("x.y", "bigint", "in no part that grows"),
        ("x", "int", "there is no type 'int'"),
        ("two words", "string", "cannot be a column"),
    ]:
        with pytest.raises(EvolutionError, match=said):
            evolution.add(settings, USER_INTERACTIONS, path, kind)
    with pytest.raises(EvolutionError, match="has learned no field height"):
        evolution.forget(settings, USER_INTERACTIONS, "height")
    assert extended(USER_INTERACTIONS, (field,)).row_schema.names[-1] == "dwell_ms"


def with_a_default(rows: DataFrame, state: State) -> DataFrame:
    return facts.frame(
        rows,
        family="views",
        identity=["user_id", "event_id"],
        key="user_id",
        id="event_id",
        version=["version"],
        is_deleted="is_deleted",
        content_hash="content_hash",
        payload="named_struct('surface', coalesce(surface, 'home'))",
    )


def test_a_payload_that_spark_holds_for_never_null_takes_tombstones(
    spark: SparkSession, tmp_path: Path
) -> None:
    family = Family("views", pa.schema([("surface", pa.string())]), "user_interactions", with_a_default)
    spec = IndexSpec("views", (family,), Timeline())
    run = HotStreamRun(STREAMS["user_interactions"], [spec], deltas=tmp_path, checkpoints=tmp_path)
    records = [{**EVENT, "event_id": "1"}, {"op": "delete", "user_id": "u", "event_id": "2"}]
    raw = {field.name: pa.nulls(len(records), field.type) for field in RECORD}
    raw["value"] = pa.array([json.dumps(record).encode() for record in records], pa.binary())
    raw["broker_time"] = pa.array([4_000_000_000_000_000] * 2, RECORD.field("broker_time").type)
    rows = STREAMS["user_interactions"].decode(pa.table(raw))
    for _ in range(2):
        made = run.facts(spec, rows, spark)
        assert made.column("payload_views").to_pylist() == [{"surface": "home"}, None]
