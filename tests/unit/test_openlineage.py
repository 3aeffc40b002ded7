"""OpenLineage events of a run, sent to a real HTTP server: what they say, and what becomes of them while it is down."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import dagster as dg
import pytest
from openlineage.client.event_v2 import RunEvent

from assets import columns
from jobs import definitions, openlineage
from jobs.openlineage import OVERLAP_S, Place, lineage_sensor, sender, tell
from pipelines import derived
from pipelines.column_lineage import Dependency, Lineage
from pipelines.settings import Settings
from tests.conftest import free_ports

OFFER = derived.specs()["curated.pins_offer"]
RAW, CURATED = dg.AssetKey(["raw", "pin_updates"]), dg.AssetKey(["curated", "pins_offer"])
LINEAGE = Lineage(
    {
        "pin_id": (Dependency("raw.pin_updates", "value", "opaque"),),
        "version": (
            Dependency("raw.pin_updates", "offset", "identity"),
            Dependency("raw.pin_updates", "key", "condition"),
        ),
    },
    (Dependency("raw.pin_updates", "broker_time", "filter"),),
)


class Endpoint:
    """A server that takes events, or answers with what it is told to."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status = 201
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if endpoint.status == 201:
                    assert self.path == "/api/v1/lineage"
                    endpoint.taken.append(json.loads(body))
                    endpoint.headers.append(dict(self.headers))
                self.send_response(endpoint.status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    yield found
    found.close()


@pytest.fixture
def told(endpoint: Endpoint, make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(OPENLINEAGE__URL=endpoint.url, OPENLINEAGE__API_KEY="secret")


@dg.asset(key=RAW)
def raw() -> None: ...


@dg.asset(key=CURATED, deps=[RAW])
def offers(context):  # type: ignore[no-untyped-def]  # Dagster reads annotations as they are
    if context.run.tags.get("fails"):
        raise dg.Failure("the disk is full", allow_retries=False)
    described = {"rows": 7, "bytes": 99, "snapshot_id": "12"}
    return dg.MaterializeResult(
        metadata=described | columns.lineage_metadata(LINEAGE, OFFER) | columns.declared(OFFER)
    )


@dg.asset(key=["maintenance", "raw", "pin_updates"], group_name="maintenance")
def maintained() -> None: ...


DEFS = dg.Definitions(assets=[raw, offers, maintained])
GRAPH = DEFS.resolve_asset_graph()


def ran(instance: dg.DagsterInstance, **tags: str) -> str:
    result = dg.materialize([raw, offers, maintained], instance=instance, tags=tags, raise_on_error=False)
    return result.run_id


def all_of(
    settings: Settings, instance: dg.DagsterInstance, place: Place | None = None
) -> tuple[Place, int, str | None, list[str]]:
    refused: list[str] = []
    place = place or Place(time.time() + OVERLAP_S - 3600, {}, {})
    return *tell(settings, instance, GRAPH, place, sender(settings, refused.append)), refused


def test_each_step_begins_and_ends_with_what_it_read_and_wrote(told: Settings, endpoint: Endpoint) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run_id = ran(instance)
        place, count, stopped, _ = all_of(told, instance)
        assert (count, stopped) == (4, None)
        assert all_of(told, instance, place)[1] == 0, "each is sent once"
    states = [(event["job"]["name"].rpartition(".")[2], event["eventType"]) for event in endpoint.taken]
    assert sorted(states[:2] + states[2:]) == [
        ("curated__pins_offer", "COMPLETE"),
        ("curated__pins_offer", "START"),
        ("raw__pin_updates", "COMPLETE"),
        ("raw__pin_updates", "START"),
    ], "maintenance is no part of a build"
    start, complete = [event for event in endpoint.taken if "offer" in event["job"]["name"]]
    assert start["run"]["runId"] == complete["run"]["runId"] != run_id
    assert complete["run"]["facets"]["parent"]["run"]["runId"] == run_id
    assert start["eventTime"] <= complete["eventTime"]
    warehouse = told.lake.warehouse
    assert [(i["namespace"], i["name"]) for i in complete["inputs"]] == [(warehouse, "lake.raw.pin_updates")]
    (output,) = complete["outputs"]
    assert (output["namespace"], output["name"]) == (warehouse, "lake.curated.pins_offer")
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == 7
    assert output["facets"]["version"]["datasetVersion"] == "12"
    fields = output["facets"]["schema"]["fields"]
    assert [f["name"] for f in fields] == [c.name for c in OFFER.columns]
    lineage = output["facets"]["columnLineage"]
    (of_pin,) = lineage["fields"]["pin_id"]["inputFields"]
    assert (of_pin["name"], of_pin["field"]) == ("lake.raw.pin_updates", "value")
    assert of_pin["transformations"][0]["type"] == "DIRECT"
    assert {
        t["subtype"] for f in lineage["fields"]["version"]["inputFields"] for t in f["transformations"]
    } == {
        "IDENTITY",
        "CONDITIONAL",
    }
    assert [(f["field"], f["transformations"][0]["subtype"]) for f in lineage["dataset"]] == [
        ("broker_time", "FILTER")
    ]
    assert all(headers["Authorization"] == "Bearer secret" for headers in endpoint.headers)
    assert "secret" not in repr(told)


def test_a_step_that_failed_says_why(told: Settings, endpoint: Endpoint) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ran(instance, fails="yes")
        all_of(told, instance)
    (failed,) = [event for event in endpoint.taken if event["eventType"] == "FAIL"]
    assert failed["run"]["facets"]["errorMessage"]["message"] == "the disk is full"
    assert "outputFacets" not in failed["outputs"][0] or not failed["outputs"][0]["outputFacets"]


def test_while_the_endpoint_is_down_nothing_is_lost_and_nothing_waits_long(
    told: Settings, endpoint: Endpoint, make_settings: Callable[..., Settings]
) -> None:
    away = make_settings(OPENLINEAGE__URL=f"http://127.0.0.1:{free_ports(1)[0]}", OPENLINEAGE__TIMEOUT_MS=500)
    with dg.DagsterInstance.ephemeral() as instance:
        ran(instance)
        ran(instance)
        started = time.monotonic()
        place, count, stopped, _ = all_of(away, instance)
        assert time.monotonic() - started < 5
        assert count == 0
        assert stopped is not None
        assert "takes no events" in stopped
        endpoint.status = 503
        place, count, stopped, _ = all_of(told, instance, place)
        assert (count, "503" in str(stopped)) == (0, True)
        endpoint.status = 201
        place, count, stopped, _ = all_of(told, instance, place)
        assert (count, stopped, place.sent) == (8, None, {})
    assert len({event["run"]["runId"] for event in endpoint.taken}) == 4


def test_an_event_that_is_refused_is_said_and_left_out(told: Settings, endpoint: Endpoint) -> None:
    endpoint.status = 400
    with dg.DagsterInstance.ephemeral() as instance:
        ran(instance)
        place, count, stopped, refused = all_of(told, instance)
        assert (count, stopped, place.sent) == (4, None, {})
    assert len(refused) == 4
    assert all(said.endswith(": 400") for said in refused)


def test_a_run_that_goes_on_is_told_as_far_as_it_is(told: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the log first, all of it later: the events of the whole log begin with those of the half."""
    with dg.DagsterInstance.ephemeral() as instance:
        run_id = ran(instance)
        run = instance.get_run_by_id(run_id)
        assert run is not None
        log = instance.all_logs(run_id, of_type=openlineage._TOLD)
        whole = [said(event) for event in openlineage.events(told, run, log, GRAPH)]
        for length in range(len(log)):
            half = [said(event) for event in openlineage.events(told, run, log[:length], GRAPH)]
            assert half == whole[: len(half)]


def said(event: RunEvent) -> tuple[Any, ...]:
    return event.eventType, event.eventTime, event.job.name, event.run.runId


def test_the_sensor_is_there_where_an_endpoint_is_and_begins_with_what_comes(
    told: Settings, endpoint: Endpoint
) -> None:
    assert not [s for s in definitions.defs.sensors or () if s.name == "openlineage"], "off by default"
    sensor = lineage_sensor(told)
    with dg.DagsterInstance.ephemeral() as instance:
        ran(instance)
        repository = DEFS.get_repository_def()
        with dg.build_sensor_context(instance=instance, repository_def=repository) as context:
            first = sensor.evaluate_tick(context)
        assert first.cursor is not None
        with dg.build_sensor_context(
            instance=instance, repository_def=repository, cursor=first.cursor
        ) as context:
            second = sensor.evaluate_tick(context)
        assert not endpoint.taken
        ran(instance)
        with dg.build_sensor_context(
            instance=instance, repository_def=repository, cursor=second.cursor
        ) as context:
            third = sensor.evaluate_tick(context)
    assert (len(endpoint.taken), third.skip_message) == (4, "4 events sent")
