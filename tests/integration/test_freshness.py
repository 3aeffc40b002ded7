"""How fresh documents are, from the records of an epoch to rows of `ops.freshness`: stream, delta, replica, copy."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from typer.testing import CliRunner

import jobs.cli  # noqa: F401 - its modules add their commands
from jobs.cli.shared import app
from jobs.epochs import MarkerCopy
from jobs.minutes import MinuteCopy
from pipelines import indices, lake, views
from pipelines.ads.index import ADS, CONTENT_STREAM, CONTROL_STREAM
from pipelines.contracts import RECORD, ads_keys
from pipelines.explore import FRESHNESS_BY_STAGE
from pipelines.indexing.delta import Marker
from pipelines.indexing.freshness import Arrival, Meter, measured
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.streaming import HotStreamRun
from pipelines.serving.metrics import Metrics
from pipelines.settings import Settings

FEW, MANY = 20, 300


def records(topic: str, count: int, waited: timedelta) -> list[dict[str, object]]:
    """Keys of documents that changed so long before now, and were in the repository a second later."""
    changed = datetime.now(UTC) - waited
    times = {
        "event_time_ms": round(changed.timestamp() * 1000),
        "committed_at_ms": round(changed.timestamp() * 1000) + 1_000,
    }
    return [
        {
            "topic_id": f"{topic}@one",
            "partition": 0,
            "offset": number,
            "broker_time": changed + timedelta(seconds=2),
            "key": f"a{number}".encode(),
            "value": orjson.dumps({"ad_id": f"a{number}", "seq": number, **times}),
        }
        for number in range(count)
    ]


def test_an_epoch_becomes_served_and_a_row_of_its_minute(own_spark: SparkSession, settings: Settings) -> None:
    replica = indices.replica(settings)
    follower = replica.followers[ADS.name]
    run = HotStreamRun(
        indices.STREAMS[CONTROL_STREAM],
        [ADS],
        deltas=settings.paths.delta,
        checkpoints=settings.paths.checkpoints,
        state=indices.state(settings, CONTROL_STREAM),
    )
    live = records(ads_keys.CONTROL, FEW, timedelta(seconds=5))
    late = records(ads_keys.CONTROL_BACKFILL, MANY, timedelta(minutes=10))
    twice = live[0] | {"offset": FEW}
    began = time.time()
    follower.start()
    try:
        table = pa.Table.from_pylist([*live, twice, *late], RECORD)
        run.run_epoch(own_spark.createDataFrame(table), 0, 1)
        assert follower.wait(Position({f"{ads_keys.CONTROL}@one": {0: FEW + 1}}), 30)
        deadline = time.monotonic() + 30
        while not follower.meter.totals():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        follower.stop()
    took_ms = 1_000 * (time.time() - began)
    text = Metrics(replica).text().decode()
    labels = 'index="ads",kind="live",stage="served",stream="ads_control"'
    assert f"tidemark_freshness_seconds_count{{{labels}}} {FEW}.0" in text
    assert f"tidemark_freshness_minute_documents{{{labels}}} {FEW}.0" in text

    kept = settings.paths.freshness.parent / "kept"
    shutil.copytree(settings.paths.freshness, kept)
    assert MinuteCopy(own_spark, settings).run() == 8
    assert not list(settings.paths.freshness.glob("*.json"))
    again(kept, settings)
    assert MinuteCopy(own_spark, settings).run() == 0, "a copy that was killed before it removed the file"
    rows = {(row["kind"], row["stage"]): row for row in lake.read(own_spark, "ops.freshness").collect()}
    assert len(rows) == 8 == lake.read(own_spark, "ops.freshness").count()
    assert {row["index"] for row in rows.values()} == {"ads"}
    for kind, documents, waited_ms in (("live", FEW, 5_000), ("backfill", MANY, 600_000)):
        assert {rows[kind, stage]["documents"] for stage in ("updated", "sent", "committed", "served")} == {
            documents
        }
        assert rows[kind, "updated"]["max_ms"] == 1_000
        assert 2_000 <= rows[kind, "sent"]["p90_ms"] <= 2_010
        served, committed = rows[kind, "served"], rows[kind, "committed"]
        assert waited_ms <= committed["p50_ms"] <= served["p50_ms"] <= served["max_ms"]
        assert served["max_ms"] <= waited_ms + took_ms + 1_000

    assert MarkerCopy(own_spark, settings).run() == 1
    assert views.ensure(own_spark, settings, [FRESHNESS_BY_STAGE]) == {"freshness_by_stage": views.MADE}
    (hour,) = own_spark.table("lake.explore.freshness_by_stage").collect()
    assert (hour["epochs"], hour["records"], hour["documents"]) == (1, FEW + 1 + MANY, FEW)
    assert hour["max_served_ms"] == rows["live", "served"]["max_ms"] and hour["minutes_within_60s_pct"] == 100


def again(kept: Path, settings: Settings) -> None:
    """The files of minutes as they were."""
    for file in kept.glob("*.json"):
        shutil.copy(file, settings.paths.freshness)


def test_the_command_tells_minutes_that_nobody_copied_yet(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(ADS.name, "r", settings.paths.freshness)
    key = {"topic_id": [f"{ads_keys.CONTENT}@one"], "ad_id": ["a1"]}
    times = {name: [datetime.now(UTC)] for name in ("event_time", "committed_at", "broker_time")}
    stages = indices.STREAMS[CONTENT_STREAM].stages
    end = Position({f"{ads_keys.CONTENT}@one": {0: 1}})
    at_ms = time.time_ns() // 1_000_000 + 1_000
    marker = Marker(CONTENT_STREAM, 1, 0, EMPTY, end, ages=measured(pa.table(key | times), stages))
    meter.served([Arrival(marker, at_ms)], end)
    meter.close()
    monkeypatch.setattr("jobs.cli.ads_freshness.load_settings", lambda: settings)
    told = json.loads(CliRunner().invoke(app, ["ads", "freshness", "--json"]).stdout)
    assert told["minutes_within_60s_pct"] == 100.0
    (minute,) = told["streams"][CONTENT_STREAM]["minutes"]
    assert minute["documents"] == 1 and set(minute["stages"]) == {"updated", "sent", "committed", "served"}
    shown = CliRunner().invoke(app, ["ads", "freshness"]).stdout
    assert "ads_content, live" in shown and "minutes_within_60s_pct 100.0" in shown
    assert "no minute is noted" in CliRunner().invoke(app, ["ads", "freshness", "--backfill"]).output
