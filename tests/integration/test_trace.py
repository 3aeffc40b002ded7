"""An event followed from the collector to the answer: real broker, streams, lake, base and serving, in one process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from pyspark.sql import SparkSession
from pyspark.sql.streaming import StreamingQuery
from typer.testing import CliRunner

from jobs import cli, evidence
from jobs.controls import Controls
from jobs.evidence import NoSuchEvent, Report
from pipelines import indices, lake, logs
from pipelines.contracts import PIN_UPDATES, USER_INTERACTIONS
from pipelines.curate import SOURCES, curate
from pipelines.indexing.position import Position, from_token, merge_all
from pipelines.indexing.streaming import HotStreamRun
from pipelines.ingest import archive, collector
from pipelines.ingest import broker as brokers
from pipelines.ingest.producer import Producer
from pipelines.serving.app import create_app
from pipelines.settings import Settings
from pipelines.spark import session
from tests import serving_world as world

EVENT = {
    "user_id": "u",
    "event_id": "e:1",
    "pin_id": "p",
    "action": "view",
    "event_time": "2023-05-01T12:00:00Z",
}
WAIT_S = 120


@pytest.fixture
def said(kafka_settings: Settings) -> Iterator[None]:
    """What each part says goes where its process would write it."""
    parts = {
        "collector": ("pipelines.ingest.collector",),
        "streams": ("pipelines.ingest.archive", "pipelines.indexing.streaming"),
        "serving": ("pipelines.indexing.replica",),
    }
    kafka_settings.paths.logs.mkdir(parents=True)
    added = []
    for process, names in parts.items():
        handler = logging.FileHandler(kafka_settings.paths.logs / f"{process}.log")
        handler.setFormatter(logs.JsonLines(process))
        for name in names:
            logger = logging.getLogger(name)
            added.append((logger, handler, logger.level))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
    yield
    for logger, handler, level in added:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


def wait(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stream(spark: SparkSession, settings: Settings, position: Position) -> None:
    """Run the archive and the hot stream of events until raw and both deltas have a position."""
    hot = HotStreamRun(
        indices.STREAMS["user_interactions"],
        indices.INDICES.values(),
        deltas=settings.paths.delta,
        checkpoints=settings.paths.checkpoints,
        state=indices.state(settings, "user_interactions"),
    )
    topic_ids = brokers.topic_ids(settings, [USER_INTERACTIONS.topic])
    where = {"servers": settings.kafka.bootstrap_servers, "topic_ids": topic_ids, "partitions": 2}
    run_until(
        lambda: hot.start(spark, **where, trigger_ms=200, max_rows=1000),  # type: ignore[arg-type]
        lambda: hot.committed().position.covers(position),
    )
    run_until(lambda: archive.start(spark, settings), lambda: held(settings).covers(position))


def run_until(start: Callable[[], StreamingQuery], is_done: Callable[[], bool]) -> None:
    """Run a query until something is true; started again where SPARK-57438 ends it, as its host does."""
    deadline = time.monotonic() + WAIT_S
    while not is_done():
        query = start()
        try:
            while query.isActive and not is_done():
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            query.stop()


def held(settings: Settings) -> Position:
    return lake.position(settings, "raw.user_interactions")


@contextmanager
def serving(settings: Settings) -> Iterator[Any]:
    replica = indices.replica(settings)
    replica.start()
    config = uvicorn.Config(
        create_app(settings, replica),
        port=settings.serving.port,
        lifespan="off",
        log_config=None,
        log_level="warning",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait(lambda: server.started and replica.is_ready)
        yield replica
    finally:
        server.should_exit = True
        thread.join(10)
        replica.stop()


def look(settings: Settings, id_: str = "e:1", **options: Any) -> Report:
    return evidence.look(settings, USER_INTERACTIONS, id_, **options)


def states(report: Report, at: int = 0) -> dict[str, str]:
    """Of one record: the state of each stage, of one index where there are two."""
    return {s.stage: s.state for s in report.traced[at].stages if s.index in (None, "user_events")}


def test_an_event_is_followed_from_the_collector_to_the_answer(
    kafka_settings: Settings, spark: SparkSession, said: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = kafka_settings
    own = session(settings, "tests")
    brokers.ensure_topics(settings, [USER_INTERACTIONS.topic, PIN_UPDATES.topic])
    with pytest.raises(NoSuchEvent, match="nothing is known of event_id 'e:1'"):
        look(settings)

    events = [EVENT, {**EVENT, "user_id": "v"}, {**EVENT, "event_id": "napped", "action": "nap"}]
    with TestClient(collector.create_app(settings)) as client:
        answer = client.post("/v1/events", json={"events": events}, headers={"X-Request-Id": "complaint-7"})
    assert answer.headers["x-request-id"] == "complaint-7"
    trace_id = answer.headers["traceparent"].split("-")[1]
    with Producer(settings) as producer:
        bad = producer.send(USER_INTERACTIONS.topic, [(b"k", b'{"user_id": 7, "event_id": "bad:1"}')])
    position = merge_all([from_token(answer.json()["position"]), *(one.position for one in bad)])

    # At the door and in Kafka, before any stream has run.
    report = look(settings)
    assert [one.record.identity for one in report.traced] == [("u", "e:1"), ("v", "e:1")]
    found = states(look(settings, user="u"))
    assert found == {
        "collector": "done",
        "kafka": "done",
        **dict.fromkeys(("archive", "delta"), "waiting"),
    } | {
        "overlay": "unknown",
        "base": "waiting",
    }
    door = report.traced[0].stages[0]
    assert (door.facts["trace_id"], door.facts["request_id"]) == (trace_id, "complaint-7")
    assert "the streaming process does not run" in report.traced[0].stages[2].detail
    Controls(settings.paths.run).ask("archive", "stopped")
    assert "`tidemark start archive`" in look(settings).traced[0].stages[2].detail
    assert look(settings, "napped").refused_at_the_door[0]["request_id"] == "complaint-7"
    assert states(look(settings, "bad:1"))["dead letter"] == "refused"

    stream(own, settings, position)
    with serving(settings) as replica:
        wait(lambda: replica.covers("user_events", position) and replica.covers("pin_counts", position))
        wait(lambda: look(settings, user="u").is_visible)
        report = look(settings, user="u")
        assert states(report) == {
            **dict.fromkeys(("collector", "kafka", "archive", "delta", "overlay"), "done"),
            "base": "waiting",
        }
        by_stage = {(s.stage, s.index): s for s in report.traced[0].stages}
        times = [
            by_stage[key].at_ms for key in (("collector", None), ("kafka", None), ("delta", "user_events"))
        ]
        times.append(by_stage["overlay", "user_events"].at_ms)
        assert times == sorted(times), report.to_json()  # type: ignore[type-var]
        assert by_stage["archive", None].facts["epoch"] is not None
        steps = by_stage["delta", "pin_counts"].facts
        assert steps["started_at_ms"] <= steps["decoded_at_ms"] <= steps["committed_at_ms"]
        assert report.answers[0].found is not None
        assert report.answers[0].found["action"] == "view"
        assert report.traced[0].standing[0].detail == "stands"
        letter = look(settings, "bad:1")
        assert list(states(letter).values()) == ["unknown", "done", "done", "refused"]
        assert "wrong_type" in letter.traced[0].stages[-1].detail

        # A base takes over, and a deletion comes after it.
        cut = merge_all([position, Position({"pin-updates@x": {0: 1}})])
        row = world.event("u", "e:1", "p", "view", 1_682_942_400_000)
        version = world.publish(settings, "user_events", [row[0]], cut, {})
        wait(lambda: replica.view("user_events").base.version == version)
        with Producer(settings) as producer:
            deletion = {"op": "delete", "user_id": "u", "event_id": "e:1", "version": 2}
            deleted = producer.send_objects(USER_INTERACTIONS, [deletion])
        report = look(settings, user="u")
        assert (states(report, 0)["base"], states(report, 1)["base"]) == ("done", "waiting")
        assert (
            "which is served" in [s.detail for s in report.traced[0].stages if s.index == "user_events"][-1]
        )
        assert report.traced[0].standing[0].detail.startswith("deleted by")
        assert not report.is_visible

        stream(own, settings, deleted)
        wait(lambda: look(settings, user="u").is_visible)
        report = look(settings, user="u")
        assert report.answers[0].found is None
        assert next(s.detail for s in report.traced[1].stages if s.stage == "overlay").endswith(", folded")

    # Once curated has been built, only what stands is found at once; the rest by reading all of raw.
    source = SOURCES["user_interactions"]
    raw = lake.current_snapshot(settings, source.raw_table)
    assert raw is not None
    result = curate(source, lake.read(own, source.raw_table, raw.id), rows=raw.rows, snapshot_id=raw.id)
    for part in source.parts:
        lake.ensure(own, lake.TABLES[part.table])
        reached = lake.position(settings, source.raw_table).to_text()
        lake.overwrite(result.table(part), lake.TABLES[part.table], {lake.POSITION: reached})
    result.close()
    assert [one.record.version for one in look(settings, user="u").traced] == [2]
    assert [one.record.version for one in look(settings, user="u", everything=True).traced] == [1, 2]
    assert states(look(settings, user="u"))["overlay"] == "done"

    # One id finds the lines of every stage.
    monkeypatch.setattr("jobs.cli.seeing.load_settings", lambda: settings)
    for name in ("complaint-7", trace_id):
        shown = CliRunner().invoke(cli.app, ["logs", "--trace", name, "-n", "1000"])
        assert shown.exit_code == 0
        for words in ("took 2 of 3 records", "archived", "committed", "caught up", "serves"):
            assert words in shown.output
    told = CliRunner().invoke(cli.app, ["trace", "e:1", "--user", "u"])
    assert told.exit_code == 0
    assert "stands: it is deleted" in told.output
