"""Undo on real Iceberg, Spark and Kafka: what is set back, what comes again, what is refused, and taking it back."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from jobs.cli import repair
from jobs.cli.shared import InputError, app
from pipelines import lake, undo
from pipelines.contracts import CONTRACTS, PIN_UPDATES, USER_INTERACTIONS, Contract
from pipelines.indexing.position import Position, merge_all
from pipelines.indices import INDICES
from pipelines.ingest import archive, dead_letters, writers
from pipelines.ingest import load as loader
from pipelines.ingest.producer import Producer
from pipelines.settings import Settings
from pipelines.spark import session
from quality import gates
from tests import serving_world
from tests.conftest import small_settings
from tests.topics import make_again

EVENTS, PINS, LETTERS = "raw.user_interactions", "raw.pin_updates", "raw.dead_letters"
WAIT_S = 120


@pytest.fixture
def archived(broker: Settings, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A lake of its own, and topics that are made again for each test."""
    settings = small_settings(
        tmp_path_factory.mktemp("undo") / "home",
        KAFKA__IS_EMBEDDED="false",
        KAFKA__BOOTSTRAP_SERVERS=broker.kafka.bootstrap_servers,
        STREAMS__ARCHIVE_TRIGGER_MS=300,
    )
    make_again(settings, CONTRACTS)
    return settings


def event(number: int, **changes: object) -> bytes:
    said = {"user_id": f"u{number % 7}", "event_id": str(number), "pin_id": "p", "action": "view"}
    return json.dumps(said | {"event_time": 0} | changes).encode()


def send(settings: Settings, contract: Contract, values: list[bytes]) -> Position:
    with Producer(settings) as producer:
        sent = producer.send(contract.topic, [(str(n).encode(), value) for n, value in enumerate(values)])
    return merge_all(delivery.position for delivery in sent)


def archive_until(spark: SparkSession, settings: Settings, position: Position) -> None:
    """Run the archive until the raw tables hold a position; stopped between two epochs (see test_archive)."""
    query = archive.start(spark, settings)
    try:
        deadline = time.monotonic() + WAIT_S
        while not lake.positions(settings, [EVENTS, PINS]).covers(position):
            assert query.isActive, query.exception()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        query.processAllAvailable()
    finally:
        query.stop()


def load(spark: SparkSession, settings: Settings, values: list[bytes], name: str) -> loader.LoadResult:
    rows = spark.createDataFrame(
        [(n, v.decode()) for n, v in enumerate(values)], "load_row long, value string"
    )
    return loader.load(spark, settings, USER_INTERACTIONS, rows, name)


def values(spark: SparkSession, name: str) -> Counter[bytes]:
    return Counter(bytes(row["value"]) for row in lake.read(spark, name).select("value").collect())


def now() -> datetime:
    """A time between what was committed and what will be."""
    time.sleep(0.02)
    moment = datetime.now(UTC)
    time.sleep(0.02)
    return moment


def test_a_bad_load_is_undone_and_what_kafka_brought_since_comes_again(
    archived: Settings, spark: SparkSession
) -> None:
    settings, spark = archived, session(archived, "tests")
    first = [event(n) for n in range(30)] + [b"{"]
    archive_until(spark, settings, send(settings, USER_INTERACTIONS, first))
    good = [event(n) for n in range(200, 210)]
    load(spark, settings, good, "good")
    pins = [b'{"pin_id": "p", "catalogue": {"title": "t"}}', b"[]"]
    archive_until(spark, settings, send(settings, PIN_UPDATES, pins))
    bad = [event(n, action="stare") for n in range(300, 320)]
    load(spark, settings, bad, "bad")
    second = [event(n) for n in range(30, 70)] + [b"]"]
    everything = send(settings, USER_INTERACTIONS, second)
    archive_until(spark, settings, everything)
    assert values(spark, EVENTS) == Counter(first + good + bad + second)
    head = lake.current_snapshot(settings, EVENTS)
    assert head is not None

    planned = undo.plan_load(settings, "bad")
    assert planned.loads == ("user_interactions:bad",)
    assert sum(part.end - part.start for part in planned.again) == len(second)
    assert [move.table for move in planned.changes] == [EVENTS]
    undo.carry_out(settings, planned)
    assert values(spark, EVENTS) == Counter(first + good)
    assert sum(dead_letters.counted(settings).values()) == 2  # one event's, one pin's
    archive_until(spark, settings, everything)
    assert values(spark, EVENTS) == Counter(first + good + second)
    assert values(spark, PINS) == Counter(pins)
    assert values(spark, LETTERS) - Counter(bad) == Counter([b"{", b"[]", b"]"])
    assert sum(dead_letters.counted(settings).values()) == 3
    last = lake.committed_epoch(settings, EVENTS, archive.STREAM)
    assert last is not None
    assert last[0] == 2

    # The undo of the undo: the bad load is there again, and again nothing of Kafka's is lost or doubled.
    (found,) = undo.undone(settings)
    again = undo.plan_redo(settings, found)
    assert again.changes[0].to_id == head.id
    undo.carry_out(settings, again)
    assert values(spark, EVENTS) == Counter(first + good + bad + second)
    third = [event(n) for n in range(400, 410)]
    everything = send(settings, USER_INTERACTIONS, third)
    archive_until(spark, settings, everything)
    assert values(spark, EVENTS) == Counter(first + good + bad + second + third)

    # Undone once more, it can be loaded again, as it should have been.
    undo.carry_out(settings, undo.plan_load(settings, "bad"))
    mended = [event(n) for n in range(300, 320)]
    assert not load(spark, settings, mended, "bad").is_repeat
    archive_until(spark, settings, everything)
    assert values(spark, EVENTS) == Counter(first + good + second + third + mended)
    assert sum(dead_letters.counted(settings).values()) == 3


def test_an_archive_that_runs_begins_anew(archived: Settings, spark: SparkSession) -> None:
    settings, spark = archived, session(archived, "tests")
    first, second, third = ([event(n) for n in range(at, at + 20)] for at in (0, 20, 40))
    archive_until(spark, settings, send(settings, USER_INTERACTIONS, first))
    before = now()
    query = archive.start(spark, settings)
    everything = send(settings, USER_INTERACTIONS, second)
    deadline = time.monotonic() + WAIT_S
    while not lake.position(settings, EVENTS).covers(everything):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    undo.carry_out(settings, undo.plan(settings, ["raw"], before))
    everything = everything.merge(send(settings, USER_INTERACTIONS, third))
    while query.isActive:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "IncarnationEnded" in str(query.exception())
    assert values(spark, EVENTS) == Counter(first)
    archive_until(spark, settings, everything)
    assert values(spark, EVENTS) == Counter(first + second + third)


def test_records_that_kafka_has_no_more_are_not_given_up(archived: Settings, spark: SparkSession) -> None:
    settings, spark = archived, session(archived, "tests")
    first, second = [event(n) for n in range(20)], [event(n) for n in range(20, 40)]
    archive_until(spark, settings, send(settings, USER_INTERACTIONS, first))
    before = now()
    end = send(settings, USER_INTERACTIONS, second)
    archive_until(spark, settings, end)
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    ((topic_id, ends),) = end.topics.items()
    gone = [TopicPartition(USER_INTERACTIONS.topic, partition, offset) for partition, offset in ends.items()]
    for future in admin.delete_records(gone).values():
        future.result()
    with pytest.raises(undo.UndoError, match="Kafka no longer has them") as refused:
        undo.plan(settings, [EVENTS], before)
    assert topic_id in str(refused.value)
    assert values(spark, EVENTS) == Counter(first + second)


def test_a_first_load_is_undone_to_an_empty_table(settings: Settings, spark: SparkSession) -> None:
    spark = session(settings, "tests")
    bad, good = [event(n) for n in range(5)], [event(n) for n in range(7)]
    load(spark, settings, bad, "first")
    planned = undo.plan_load(settings, "first")
    assert planned.moves[0].to_id is None
    served, candidate = bases(settings, "user_interactions:first")
    assert failing(settings, served) == set()
    assert failing(settings, candidate) == {"cut_goes_forward", "keeps_identities", "keeps_live_interactions"}
    undo.carry_out(settings, planned)
    assert lake.read(spark, EVENTS).count() == 0
    assert lake.position(settings, EVENTS) == Position()
    assert failing(settings, candidate) == set()  # a base without the load may be published now
    load(spark, settings, good, "first")
    assert values(spark, EVENTS) == Counter(good)
    undo.carry_out(settings, undo.plan_redo(settings, planned.name))
    assert values(spark, EVENTS) == Counter(bad)


def bases(settings: Settings, load_id: str) -> tuple[str, str]:
    """A base that is served and has a load, and a candidate without it and its events."""
    rows = [serving_world.event("u", str(n), "p", "view", serving_world.NEWEST_MS)[0] for n in range(20)]
    publish = functools.partial(serving_world.publish, settings, "user_events")
    candidate = publish(rows[:2], Position(), {})
    return publish(rows, Position(loads=frozenset({load_id})), {}), candidate


def failing(settings: Settings, version: str) -> set[str]:
    findings = gates.examine(settings, INDICES["user_events"], version)
    return {finding.name for finding in findings if not finding.passed}


CURATED = ("curated.pins_catalogue", "curated.pins_offer")


def write(spark: SparkSession, name: str, count: int) -> None:
    spec = lake.TABLES[name]
    lake.ensure(spark, spec)
    columns = ", ".join(f"cast(null as {c.type}) AS `{c.name}`" for c in spec.columns if c.name != "pin_id")
    rows = spark.sql(f"SELECT cast(id as string) AS pin_id, {columns} FROM range({count})")
    lake.overwrite(rows, spec)


def counts(settings: Settings) -> list[int]:
    found = [lake.current_snapshot(settings, name) for name in CURATED]
    return [snapshot.rows if snapshot else 0 for snapshot in found]


def test_a_set_of_tables_goes_back_as_one_or_not_at_all(settings: Settings, spark: SparkSession) -> None:
    spark = session(settings, "tests")
    too_early = now()
    for rows in (3, 5):
        for name in CURATED:
            write(spark, name, rows)
        if rows == 3:
            before = now()
    with pytest.raises(undo.UndoError, match="neither a table nor a namespace"):
        undo.plan(settings, ["currated"], before)
    planned = undo.plan(settings, ["curated"], before)
    assert [(m.table, m.rows_before, m.rows_after) for m in planned.moves] == [(n, 5, 3) for n in CURATED]
    write(spark, CURATED[1], 9)  # the last one of the set: the first has moved by the time that it is found
    with pytest.raises(undo.Conflict, match="since the undo was planned"):
        undo.carry_out(settings, planned)
    assert counts(settings) == [5, 9]
    assert undo.undone(settings) == {}
    undo.carry_out(settings, undo.plan(settings, ["curated"], before))
    assert counts(settings) == [3, 3]
    write(spark, CURATED[0], 4)
    assert counts(settings) == [4, 3]
    (name,) = undo.undone(settings)
    undo.carry_out(settings, undo.plan_redo(settings, name))
    assert counts(settings) == [5, 9]
    undo.carry_out(settings, undo.plan(settings, ["curated"], before))
    assert counts(settings) == [3, 3]
    assert undo.plan(settings, [CURATED[0]], too_early).moves[0].to_id is None  # it had no rows yet
    empty = undo.plan(settings, [CURATED[0]], undo.moment("1999-01-01"))
    undo.carry_out(settings, empty)
    assert lake.read(spark, CURATED[0]).count() == 0


def test_the_command_line(settings: Settings, spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "load_settings", lambda: settings)
    spark = session(settings, "tests")
    write(spark, CURATED[0], 3)
    at = now()
    write(spark, CURATED[0], 5)
    arguments = ["undo", "curated", "--to", at.isoformat()]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert json.loads(dry.stdout)["is_done"] is False
    assert lake.read(spark, CURATED[0]).count() == 5
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, "curated.pins_catalogue" in done.stdout) == (0, True)
    assert lake.read(spark, CURATED[0]).count() == 3
    (name,) = json.loads(CliRunner().invoke(app, ["undo", "--list", "--json"]).stdout)
    assert name in done.stderr
    assert CliRunner().invoke(app, ["undo", "--redo", name]).exit_code == 0
    assert lake.read(spark, CURATED[0]).count() == 5
    first = list(lake.ancestors(settings, CURATED[0]))[-1]
    assert CliRunner().invoke(app, ["undo", CURATED[0], "--to", str(first.id)]).exit_code == 0
    assert lake.read(spark, CURATED[0]).count() == 3
    for wrong in (["undo", "curated"], ["undo", "--to", "2024-01-01"], ["undo", "--list", "--load", "x"]):
        assert isinstance(CliRunner().invoke(app, wrong).exception, InputError)


def test_an_expired_history_is_refused_by_name(settings: Settings, spark: SparkSession) -> None:
    spark = session(settings, "tests")
    for rows in (1, 2, 3):
        write(spark, CURATED[0], rows)
        write(spark, CURATED[1], rows)
        if rows == 1:
            before = now()
    cut = now()
    spark.sql(
        f"CALL lake.system.expire_snapshots(table => '{CURATED[0]}', older_than => TIMESTAMP "
        f"'{(cut + timedelta(hours=1)).strftime('%Y-%m-%d %H:%M:%S')}', retain_last => 1)"
    )
    with pytest.raises(undo.UndoError, match=f"{CURATED[0]} since 20") as refused:
        undo.plan(settings, ["curated"], before)
    assert CURATED[1] not in str(refused.value)
    assert counts(settings) == [3, 3]


def test_a_set_goes_back_to_a_tag_that_all_of_it_has(
    settings: Settings, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "load_settings", lambda: settings)
    spark = session(settings, "tests")
    for rows in (1, 2):
        for name in CURATED:
            write(spark, name, rows)
            found = lake.current_snapshot(settings, name)
            assert found is not None
            if rows == 1:
                lake.tag(spark, name, found.id, "daily-2024-03-01")
    with pytest.raises(undo.UndoError, match=f"no tag of {CURATED[0]}, {CURATED[1]}") as unknown:
        undo.plan(settings, CURATED, "dayly-2024-03-01")
    assert "daily-2024-03-01" in str(unknown.value)
    done = CliRunner().invoke(app, ["undo", *CURATED, "--to", "daily-2024-03-01"])
    assert done.exit_code == 0
    assert counts(settings) == [1, 1]


def test_what_is_never_set_back(settings: Settings, spark: SparkSession) -> None:
    spark = session(settings, "tests")
    load(spark, settings, [event(1), b"{"], "one")
    lake.ensure(spark, lake.OPS_EPOCHS)
    for name, why in (
        (LETTERS, "follow their raw tables"),
        ("ops.epochs", "not undone"),
        ("raw.nothing", "no table"),
    ):
        with pytest.raises(undo.UndoError, match=why):
            undo.plan(settings, [name], now())
    assert undo.tables(settings, ["raw"]) == [EVENTS]
    with pytest.raises(undo.UndoError, match="no raw table has this load"):
        undo.plan_load(settings, "two")


def test_a_load_that_is_being_written_is_waited_for(settings: Settings) -> None:
    with writers.appending(settings), writers.appending(settings):
        with pytest.raises(writers.WriterBusy, match="has been writing"), writers.alone(settings, 0.3):
            pass
    with writers.alone(settings):
        entered = threading.Event()

        def append() -> None:
            with writers.appending(settings):
                entered.set()

        thread = threading.Thread(target=append)
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join()
