"""How far streams are behind, where nothing runs: it is said, and nothing fails."""

from __future__ import annotations

import json

import dagster as dg
import pytest

from assets import streams
from assets.platform import Platform
from jobs import lag
from jobs.controls import Controls
from jobs.lag import Lag, stream_lag
from pipelines import indices
from pipelines.errors import TidemarkError
from pipelines.indexing import delta, lineages
from pipelines.indexing.delta import DeltaWriter, Marker
from pipelines.indexing.facts import table
from pipelines.indexing.position import EMPTY, Position
from pipelines.indexing.spec import IndexSpec, lineage
from pipelines.ingest import broker
from pipelines.settings import Settings
from quality import gates

NAMES = {"archive", *indices.STREAMS}


class NoBroker(TidemarkError):
    pass


@pytest.fixture
def no_broker(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A broker that is away, and how often it was asked: a real one would be waited for."""
    asked: list[str] = []

    def topic_ids(settings: Settings, names: list[str]) -> dict[str, str]:
        asked.extend(names)
        raise NoBroker("no broker answers", where="127.0.0.1:9", remedy="`tidemark up`")

    monkeypatch.setattr(broker, "topic_ids", topic_ids)
    return asked


def commit(settings: Settings, spec: IndexSpec, epoch: int, end: Position) -> None:
    path = delta.table_path(settings.paths.delta, spec.name, lineage(spec))
    (stream,) = spec.streams
    DeltaWriter(spec, path).commit(Marker(stream, 1, epoch, EMPTY, end), table(spec, []))


def observed(settings: Settings, cursor: str | None = None):  # type: ignore[no-untyped-def]
    resources = {"platform": Platform(lambda: settings, gates.examine)}
    with dg.build_sensor_context(cursor=cursor, resources=resources) as context:
        return stream_lag.evaluate_tick(context)


def test_without_broker_and_streams_it_is_said_what_is_missing(
    settings: Settings, no_broker: list[str]
) -> None:
    found = {one.stream: one for one in lag.lags(settings)}
    assert found.keys() == NAMES
    for one in found.values():
        assert (one.state, one.records_behind, one.seconds_behind) == (lag.NOT_RUNNING, None, None)
        assert "no broker answers" in one.missing
        assert "tidemark up streams" in one.missing
        assert "records_behind" not in one.metadata()
    assert len(no_broker) == 1, "one wait is enough"


def test_what_the_streaming_process_says_is_told(settings: Settings, no_broker: list[str]) -> None:
    Controls(settings.paths.run).report({"archive": {"state": "failing", "detail": "disk full", "epoch": 7}})
    found = {one.stream: one for one in lag.lags(settings)}
    assert (found["archive"].state, found["archive"].epoch) == ("failing", 7)
    assert found["archive"].missing.startswith("disk full; ")


def test_a_stream_is_where_the_last_of_its_deltas_is(settings: Settings, no_broker: list[str]) -> None:
    events, counts = indices.INDICES["user_events"], indices.INDICES["pin_counts"]
    commit(settings, events, 0, Position({"user-interactions@1": {0: 5, 1: 3}}))
    commit(settings, counts, 0, Position({"user-interactions@1": {0: 4, 1: 9}}))
    found = {one.stream: one for one in lag.lags(settings)}
    assert found["user_interactions"].position == Position({"user-interactions@1": {0: 4, 1: 3}})
    assert found["pin_updates"].position == EMPTY
    lineages.end(delta.table_path(settings.paths.delta, "pin_counts", lineage(counts)))
    found = {one.stream: one for one in lag.lags(settings)}
    assert found["user_interactions"].position == Position({"user-interactions@1": {0: 5, 1: 3}})


def test_every_look_is_an_observation_and_only_what_is_alive_is_fresh(
    settings: Settings, no_broker: list[str]
) -> None:
    spec = indices.INDICES["pins"]
    first = observed(settings)
    assert [type(event) for event in first.asset_events] == [dg.AssetObservation] * len(NAMES)
    assert {event.asset_key for event in first.asset_events} == {streams.key(name) for name in NAMES}
    assert set(json.loads(str(first.cursor))) == NAMES
    commit(settings, spec, 0, Position({"pin-updates@1": {0: 5}}))
    second = observed(settings, first.cursor)
    fresh = [e.asset_key for e in second.asset_events if isinstance(e, dg.AssetMaterialization)]
    assert fresh == [streams.key("pin_updates")], "it went on"
    third = observed(settings, second.cursor)
    versions = [
        {e.asset_key: e.tags["dagster/data_version"] for e in tick.asset_events}
        for tick in (first, second, third)
    ]
    assert versions[1] == versions[2] != versions[0], (
        "what is built of a stream is out of date when it went on"
    )
    assert not [e for e in third.asset_events if isinstance(e, dg.AssetMaterialization)]


def test_a_stream_that_has_caught_up_is_fresh() -> None:
    caught_up = Lag("archive", "running", 3, EMPTY, 0, 0.0)
    assert [type(e) for e in lag._events(caught_up, None)] == [dg.AssetObservation, dg.AssetMaterialization]
    behind = caught_up._replace(records_behind=2, seconds_behind=4.5)
    (only,) = lag._events(behind, EMPTY.to_text())
    assert only.metadata["records_behind"].value == 2
    assert only.metadata["seconds_behind"].value == 4.5
