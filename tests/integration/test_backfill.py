"""Days computed again, and records replayed: against a whole build of the same raw rows."""

from __future__ import annotations

import datetime
import json
import random
from typing import Any

import dagster as dg
import pytest
from pyspark.sql import SparkSession

from assets.platform import Platform
from jobs.definitions import build_defs
from pipelines import backfill, lake, replay
from pipelines.backfill import BackfillError, Days, days_of
from pipelines.contracts import USER_INTERACTIONS
from pipelines.curate import SOURCES, Source, curate
from pipelines.ingest import broker as brokers
from pipelines.ingest import dead_letters, evolution, load
from pipelines.settings import Settings
from quality import gates

SOURCE = SOURCES["user_interactions"]
PART = SOURCE.parts[0]
TABLE = PART.table
FIRST = datetime.date(2024, 3, 1)
SEED = 20240301


def on_day(number: int, hour: int = 12) -> str:
    return f"{FIRST + datetime.timedelta(days=number)}T{hour:02}:00:00Z"


def history(seed: int) -> list[dict[str, Any]]:
    """Events over five days; some are edited, some edits move them to another day, some are deleted, some are bad."""
    chosen = random.Random(seed)
    records: list[dict[str, Any]] = []
    for number in range(120):
        event = {"user_id": f"u{number % 5}", "event_id": str(number), "pin_id": "p", "action": "view"}
        records.append(event | {"event_time": on_day(chosen.randrange(5))})
        if chosen.random() < 0.4:
            day = on_day(chosen.randrange(5))
            records.append(event | {"event_time": day, "version": 2, "action": "click"})
        if chosen.random() < 0.2:
            version = chosen.choice([1, 2, 3])
            records.append(
                {"op": "delete", "version": version, **{n: event[n] for n in ("user_id", "event_id")}}
            )
        if chosen.random() < 0.1:
            records.append(event | {"event_time": on_day(1), "action": "fly"})
    chosen.shuffle(records)
    return records


def put(spark: SparkSession, settings: Settings, records: list[dict[str, Any]], name: str) -> None:
    rows = [(json.dumps(record).encode(), number) for number, record in enumerate(records)]
    load.load(
        spark, settings, USER_INTERACTIONS, spark.createDataFrame(rows, "value binary, load_row long"), name
    )


def build_whole(spark: SparkSession, settings: Settings, source: Source = SOURCE) -> None:
    snapshot = lake.current_snapshot(settings, source.raw_table)
    assert snapshot is not None
    result = curate(source, lake.read(spark, source.raw_table), rows=snapshot.rows, snapshot_id=snapshot.id)
    said = {lake.POSITION: lake.position(settings, source.raw_table).to_text(), lake.MAX_BROKER_TIME_MS: "7"}
    for part in source.parts:
        lake.ensure(spark, lake.TABLES[part.table])
        lake.overwrite(result.table(part), lake.TABLES[part.table], said)
    result.close()


def rows_of(spark: SparkSession, name: str = TABLE) -> list[tuple[Any, ...]]:
    return sorted(map(tuple, lake.read(spark, name).collect()), key=repr)


@pytest.fixture
def built(own_spark: SparkSession, settings: Settings) -> SparkSession:
    put(own_spark, settings, history(SEED), "history")
    build_whole(own_spark, settings)
    return own_spark


def test_a_damaged_day_is_as_it_was_and_no_other_day_is_touched(
    built: SparkSession, settings: Settings
) -> None:
    before = rows_of(built)
    day = Days(FIRST + datetime.timedelta(days=1), FIRST + datetime.timedelta(days=2))
    lake.delete(built, lake.TABLES[TABLE], f"{day.where('event_time')} AND user_id = 'u1'")
    built.sql(f"UPDATE lake.{TABLE} SET surface = 'wrong' WHERE {day.where('event_time')} AND user_id = 'u2'")
    built.sql(f"UPDATE lake.{TABLE} SET surface = 'mine' WHERE event_time >= '{on_day(4, 0)}'")
    damaged = rows_of(built)
    said = lake.position(settings, TABLE)

    rebuilt = backfill.event_days(built, settings, SOURCE, PART, day)
    changes = backfill.changes(rebuilt, rebuilt.before(built), SOURCE.identity, PART.columns)
    rebuilt.write()
    rebuilt.close()
    lost = len([row for row in before if row not in damaged])
    assert changes.added > 0
    assert changes.by_column == {"surface": changes.changed}
    assert 0 < changes.added + changes.changed <= lost
    assert changes.removed == 0
    surface = PART.columns.index("surface")
    mended = rows_of(built)
    assert [row for row in mended if row[surface] != "mine"] == [
        row for row in before if not (row[4] and row[4].date() >= FIRST + datetime.timedelta(days=4))
    ]
    assert sum(row[surface] == "mine" for row in mended) == sum(row[surface] == "mine" for row in damaged) > 0
    newest = lake.current_snapshot(settings, TABLE)
    assert newest is not None
    assert newest.summary[lake.POSITION] == said.to_text()
    assert newest.summary[lake.MAX_BROKER_TIME_MS] == "7"


@pytest.mark.parametrize("seed", [1, 2])
def test_every_day_alone_makes_what_a_whole_build_makes(
    own_spark: SparkSession, settings: Settings, seed: int
) -> None:
    put(own_spark, settings, history(seed), "history")
    build_whole(own_spark, settings)
    whole = rows_of(own_spark)
    for number in range(-1, 6):
        day = FIRST + datetime.timedelta(days=number)
        rebuilt = backfill.event_days(own_spark, settings, SOURCE, PART, Days(day, day))
        assert backfill.changes(rebuilt, rebuilt.before(own_spark), SOURCE.identity, PART.columns)[1:5] == (
            sum(row[4] is not None and row[4].date() == day for row in whole),
            0,
            0,
            0,
        )
        rebuilt.write()
        rebuilt.close()
    assert rows_of(own_spark) == whole


def test_a_commit_in_between_is_not_lost(built: SparkSession, settings: Settings) -> None:
    day = Days(FIRST, FIRST)
    rebuilt = backfill.event_days(built, settings, SOURCE, PART, day)
    row = lake.read(built, TABLE).filter(day.where("event_time")).limit(1)
    lake.append(row, lake.TABLES[TABLE])
    with pytest.raises(BackfillError, match="another commit changed these days"):
        rebuilt.write()
    rebuilt.close()
    elsewhere = backfill.event_days(built, settings, SOURCE, PART, day)
    other = Days(FIRST + datetime.timedelta(days=3), FIRST + datetime.timedelta(days=3))
    lake.append(lake.read(built, TABLE).filter(other.where("event_time")).limit(1), lake.TABLES[TABLE])
    elsewhere.write()
    elsewhere.close()


def test_dead_letters_of_a_day_are_decided_again(built: SparkSession, settings: Settings) -> None:
    spec = lake.RAW_DEAD_LETTERS
    letters = rows_of(built, spec.name)
    assert letters
    today = datetime.datetime.now(datetime.UTC).date()
    good = lake.read(built, "raw.user_interactions").selectExpr(
        "'user-interactions' AS topic", "*", "'too_long' AS reason", "'by an older rule' AS detail"
    )
    lake.append(good.filter("load_row < 3"), spec)  # as if an older contract had refused them
    built.sql(f"UPDATE lake.{spec.name} SET reason = 'older' WHERE reason = 'unknown_action'")
    rebuilt = backfill.letter_days(built, settings, Days(today - datetime.timedelta(days=1), today))
    changes = backfill.changes(rebuilt, rebuilt.before(built), backfill.PLACE, ("reason", "detail"))
    rebuilt.write()
    rebuilt.close()
    refused_too = sum(row[5] == "user_interactions:history" and row[6] < 3 for row in letters)
    assert (changes.rows, changes.changed) == (len(letters), len(letters))
    assert changes.removed == 3 - refused_too
    assert rows_of(built, spec.name) == letters
    long_ago = backfill.letter_days(built, settings, Days(FIRST, FIRST))
    assert long_ago.rows.isEmpty()
    long_ago.close()


def test_where_nothing_was_ever_refused_there_are_no_letters(
    own_spark: SparkSession, settings: Settings
) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    with pytest.raises(BackfillError, match="nothing was archived yet"):
        backfill.letter_days(own_spark, settings, Days(today, today))
    event = {"user_id": "u", "event_id": "1", "pin_id": "p", "action": "view", "event_time": 0}
    put(own_spark, settings, [event], "good")
    rebuilt = backfill.letter_days(own_spark, settings, Days(today, today))
    rebuilt.write()
    assert rebuilt.rows.isEmpty()
    rebuilt.close()


def test_dagster_computes_a_range_of_days_in_one_run(built: SparkSession, settings: Settings) -> None:
    before = rows_of(built)
    damaged = Days(FIRST, FIRST + datetime.timedelta(days=1))
    lake.delete(built, lake.TABLES[TABLE], damaged.where("event_time"))
    assert len(rows_of(built)) < len(before)
    defs = build_defs({"platform": Platform(lambda: settings, gates.examine)})
    tags = {
        "dagster/asset_partition_range_start": str(FIRST),
        "dagster/asset_partition_range_end": str(FIRST + datetime.timedelta(days=1)),
    }
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("backfill").execute_in_process(instance=instance, tags=tags)
        assert result.success
        days = [
            event.partition
            for event in result.get_asset_materialization_events()
            if event.asset_key == dg.AssetKey(["curated_days", "user_interactions"])
        ]
        reported = instance.get_latest_materialization_event(dg.AssetKey(["curated", "user_interactions"]))
    assert days == ["2024-03-01", "2024-03-02"]
    assert rows_of(built) == before
    newest = lake.current_snapshot(settings, TABLE)
    assert newest is not None
    assert reported is not None
    assert reported.asset_materialization is not None
    assert reported.asset_materialization.metadata["snapshot_id"].value == str(newest.id)


def test_days_are_read_and_what_is_no_day_is_told(own_spark: SparkSession, settings: Settings) -> None:
    assert days_of("2024-03-01..2024-03-02") == Days(FIRST, FIRST + datetime.timedelta(days=1))
    assert str(days_of("2024-03-01")) == "2024-03-01"
    for text, said in [
        ("yesterday", "is no day"),
        ("2024-03-02..2024-03-01", "is before"),
        ("2024-02-30", "no day"),
    ]:
        with pytest.raises(BackfillError, match=said):
            days_of(text)
    with pytest.raises(BackfillError, match="was never written"):
        backfill.event_days(own_spark, settings, SOURCE, PART, Days(FIRST, FIRST))


def test_dead_letters_are_shown_sent_again_once_and_marked(
    spark: SparkSession, kafka_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.spark import session

    monkeypatch.setattr(evolution, "LEAD_MS", 0)
    settings, own = kafka_settings, session(kafka_settings, "tests")
    brokers.ensure_topics(settings, [USER_INTERACTIONS.topic])
    event = {"user_id": "u", "pin_id": "p", "action": "view", "event_time": 0}
    put(own, settings, [event | {"event_id": "1", "size": 1}], "first")
    put(
        own,
        settings,
        [event | {"event_id": "2", "size": "L"}, event | {"event_id": "3", "action": "swim"}],
        "more",
    )
    letters = replay.letters(own, settings, USER_INTERACTIONS)
    found = replay.outcome(own, settings, USER_INTERACTIONS, letters, as_new=True)
    assert [tuple(one) for one in found.decisions] == [
        ("retyped_field", "retyped_field", 1),
        ("unknown_action", "unknown_action", 1),
    ]
    assert (found.records, found.facts, found.examples) == (2, (), ())
    assert replay.accepted_now(settings, USER_INTERACTIONS, letters).isEmpty()

    evolution.forget(settings, USER_INTERACTIONS, "size")
    found = replay.outcome(own, settings, USER_INTERACTIONS, letters, as_new=True)
    assert ("retyped_field", None, 1) in [tuple(one) for one in found.decisions]
    assert [one["was"] for one in found.examples] == ["retyped_field"]
    good = replay.accepted_now(settings, USER_INTERACTIONS, letters)
    sent = replay.send(own, settings, USER_INTERACTIONS, good)
    ((topic_id, offsets),) = sent.topics.items()
    ((partition, end),) = offsets.items()
    left = replay.letters(own, settings, USER_INTERACTIONS)
    assert [json.loads(bytes(row["value"]))["event_id"] for row in left.collect()] == ["3"]
    marked = {letter.place: letter.replayed_as for letter in dead_letters.listed(settings)}
    assert marked == {
        "user-interactions/user_interactions:more/0": f"user-interactions/{partition}/{end - 1}",
        "user-interactions/user_interactions:more/1": None,
    }
    assert topic_id.startswith("user-interactions@")


def test_a_range_of_positions_is_shown_beside_the_base(spark: SparkSession, kafka_settings: Settings) -> None:
    from pipelines.replay import Range, ReplayError
    from pipelines.spark import session

    own = session(kafka_settings, "tests")
    with pytest.raises(ReplayError, match="nothing was archived yet"):
        replay.records(own, kafka_settings, USER_INTERACTIONS, Range("user-interactions", 0, 0, 1))
    put(own, kafka_settings, history(4)[:5], "few")
    with pytest.raises(ReplayError, match="raw does not hold 0 to 1"):
        replay.records(own, kafka_settings, USER_INTERACTIONS, Range("user-interactions", 0, 0, 1))
