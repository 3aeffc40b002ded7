"""Serving over real bases: answers, headers, positions, odd ids, and that nothing a client sends gives a 5xx."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as cases
from hypothesis import strategies as st

from pipelines import indices
from pipelines.indexing.position import Position
from pipelines.recommend import candidates, fold_in
from pipelines.serving.app import create_app
from pipelines.serving.bypass import Bypass, under_entries
from pipelines.users import sequence_files
from pipelines.users import sequences as declared
from tests import serving_world as world
from tests.conftest import small_settings

FIELDS = {"field", "message", "allowed"}
_LOOP = asyncio.Runner()


class Client:
    """Calls an application without a server; paths go over the wire as they are."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def call(
        self, method: str, path: str | bytes, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        return _LOOP.run(self.acall(method, path, body, headers))

    async def acall(
        self, method: str, path: str | bytes, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Reply:
        raw = path.encode() if isinstance(path, str) else path
        raw_path, _, query = raw.partition(b"?")
        said = {"content-type": "application/json"} if body and headers is None else headers or {}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": raw_path.decode("latin-1"),
            "raw_path": raw_path,
            "query_string": query,
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in said.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "root_path": "",
        }
        sent: list[dict[str, Any]] = []

        coming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not coming:
                await asyncio.Event().wait()  # a client that waits for its answer says no more
            return coming.pop()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        headers_ = {k.decode(): v.decode("latin-1") for k, v in sent[0]["headers"]}
        return Reply(sent[0]["status"], headers_, b"".join(message.get("body", b"") for message in sent[1:]))

    def get(self, path: str | bytes, status: int = 200) -> Reply:
        reply = self.call("GET", path)
        assert reply.status == status, reply.body
        return reply


class Reply:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, dict[str, str]]]:
    settings = small_settings(tmp_path_factory.mktemp("serving"), SERVING__MAX_WAIT_MS=300)
    versions = world.build_world(settings)
    with world.followed(settings) as replica:
        yield settings, replica, versions


@pytest.fixture
def replica(home: Any) -> Any:
    return world.still(home[1])


@pytest.fixture
def client(home: Any, replica: Any) -> Client:
    return Client(create_app(home[0], replica))


def path(*parts: str) -> str:
    return "/" + "/".join(quote(part, safe="") for part in parts)


# ------------------------------------------------------------------------------------------------------ recommendations


def independent(user: str, extra: tuple[tuple[str, str, int], ...] = ()) -> np.ndarray:
    """A user's vector by a dense solve over all items."""
    of_user = [h for h, _ in world.history() if h["key"] == user.encode()]
    told = [(h["payload"]["pin_id"], h["payload"]["action"], h["time_ms"]) for h in of_user] + list(extra)
    newest = max(at for _, _, at in told)
    p = world.PARAMETERS
    strength: dict[str, float] = {}
    for pin_id, action, at in told:
        recency = p.floor + (1 - p.floor) * 0.5 ** ((newest - at) / p.half_life_ms)
        strength[pin_id] = strength.get(pin_id, 0.0) + p.actions.get(action, 0.0) * recency
    wide = world.VECTORS.astype(np.float64)
    confidence = np.array([1 + p.alpha * abs(strength.get(pin_id, 0.0)) for pin_id in world.PINS])
    preference = np.array([float(strength.get(pin_id, 0.0) > 0) for pin_id in world.PINS])
    left = wide.T @ (wide * confidence[:, None]) + p.regularization * np.eye(32)
    return np.linalg.solve(left, wide.T @ (confidence * preference))


def expected(user: str, settled: set[str], vector: np.ndarray, k: int) -> list[tuple[str, float]]:
    scores = world.VECTORS.astype(np.float64) @ vector
    shown = [
        (pin_id, float(score))
        for pin_id, score in zip(world.PINS, scores, strict=True)
        if pin_id not in settled and pin_id != world.UNAVAILABLE
    ]
    return sorted(shown, key=lambda pair: (-pair[1], pair[0].encode()))[:k]


def bought(user: str) -> set[str]:
    return {h["payload"]["pin_id"] for h, _ in world.history() if h["key"] == user.encode()}


@pytest.mark.parametrize("user", ["u0", "u7", world.ODD_USER])
def test_recommendations_are_an_independent_solve(client: Client, user: str) -> None:
    said = client.get(path("v1", "users", user, "recommendations") + "?k=500").json
    wanted = expected(user, bought(user), independent(user), 500)
    assert said["user_id"] == user
    assert [item["pin_id"] for item in said["recommendations"]] == [pin_id for pin_id, _ in wanted]
    np.testing.assert_allclose(
        [item["score"] for item in said["recommendations"]], [score for _, score in wanted], rtol=1e-9
    )
    assert said["basis"]["kind"] == "folded"
    assert said["basis"]["model_id"] == world.MODEL_ID
    for item in said["recommendations"]:
        assert item["catalogue"]["title"] == f"pin {item['pin_id']}"
        assert (item["offer"] is None) == (item["pin_id"] == world.NO_OFFER)


def test_one_live_event_changes_the_answer(client: Client, replica: Any) -> None:
    before = client.get("/v1/users/u1/recommendations").json
    chosen = before["recommendations"][9]["pin_id"]
    happened, _ = world.event("u1", "live", chosen, "purchase", world.NEWEST_MS + 10)
    replica.followers["user_events"].fold([happened], Position({world.INTERACTIONS: {0: 11}}, frozenset()))
    after = client.get("/v1/users/u1/recommendations").json
    vector = independent("u1", ((chosen, "purchase", world.NEWEST_MS + 10),))
    wanted = expected("u1", bought("u1") | {chosen}, vector, 10)
    assert [item["pin_id"] for item in after["recommendations"]] == [pin_id for pin_id, _ in wanted]
    assert after["basis"]["events_used"] == before["basis"]["events_used"] + 1


def test_recommendations_in_a_category(client: Client) -> None:
    said = client.get("/v1/users/u0/recommendations?k=50&category=bread").json
    assert {item["catalogue"]["category"] for item in said["recommendations"]} == {"bread"}
    wanted = [
        p for p, _ in expected("u0", bought("u0"), independent("u0"), 500) if world.PINS.index(p) % 3 == 1
    ]
    assert [item["pin_id"] for item in said["recommendations"]] == wanted
    assert client.get("/v1/users/u0/recommendations?category=none").json["recommendations"] == []


def test_deleted_changed_and_hidden_pins(client: Client, replica: Any) -> None:
    first, second, third, *_ = [
        r["pin_id"] for r in client.get("/v1/users/u2/recommendations").json["recommendations"]
    ]
    rows = world.pin(first, 2, is_deleted=True) + world.pin(second, 2, is_available=False)
    replica.followers["pins"].fold(rows)
    happened, _ = world.event("u2", "h", third, "hide", world.NEWEST_MS - 30 * world.DAY_MS)
    replica.followers["user_events"].fold([happened])
    shown = {r["pin_id"] for r in client.get("/v1/users/u2/recommendations?k=500").json["recommendations"]}
    assert not shown & {first, second, third}
    assert len(shown) > 20


@pytest.mark.parametrize("user", ["nobody", "newcomer", "viewer"])
def test_a_user_without_a_vector_gets_what_is_popular(client: Client, user: str) -> None:
    said = client.get(f"/v1/users/{user}/recommendations?k=8").json
    assert said["basis"] == {"kind": "popular", "events_used": 0, "model_id": None, "window_days": 7}
    scores = [item["score"] for item in said["recommendations"]]
    assert len(scores) == 8
    assert scores == sorted(scores, reverse=True)
    assert world.NO_VECTOR not in {item["pin_id"] for item in said["recommendations"]} or user != "newcomer"


def test_the_window_of_popularity_widens(client: Client) -> None:
    windows = [
        client.get(f"/v1/users/nobody/recommendations?k={k}").json["basis"]["window_days"]
        for k in (1, 20, 500)
    ]
    assert windows[0] == 1
    assert windows[1] > 7
    assert windows[2] is None
    fruit = client.get("/v1/users/nobody/recommendations?k=500&category=fruit").json["recommendations"]
    assert fruit and {item["catalogue"]["category"] for item in fruit} == {"fruit"}


def test_popular_counts_are_live(client: Client, replica: Any) -> None:
    rows = [world.event(f"n{n}", "e", "36", "save", world.NEWEST_MS)[1] for n in range(30)]
    replica.followers["pin_counts"].fold(rows)
    top = client.get("/v1/users/nobody/recommendations?k=1").json["recommendations"][0]
    assert (top["pin_id"], top["score"]) == ("36", 18.0)


def test_parameters_of_another_model_are_not_used(client: Client, replica: Any, monkeypatch: Any) -> None:
    view = replica.followers["pins"].view
    other = world.PARAMETERS._replace(model_id="pin_als/8")
    monkeypatch.setitem(view.base.manifest.parameters, "als", other.to_json())
    assert client.get("/v1/users/u0/recommendations").json["basis"]["kind"] == "popular"
    monkeypatch.setitem(view.base.manifest.parameters, "als", {"gram": "broken"})
    fresh = Client(client.app)
    assert fresh.get("/v1/users/u0/recommendations").status == 200


# ------------------------------------------------------------------------------------------------------ pins and events


def test_a_document(client: Client, replica: Any) -> None:
    said = client.get(path("v1", "pins", world.ODD_PIN)).json
    assert said["pin_id"] == world.ODD_PIN
    assert said["offer"] == {"price_usd_micros": 1_500_000, "is_available": True}
    assert client.get(path("v1", "pins", world.NO_OFFER)).json["offer"] is None
    assert client.get("/v1/pins/nothing", 404).json["error"]["field"] == "pin_id"
    replica.followers["pins"].fold(world.pin("1", 2, is_deleted=True))
    gone = client.get("/v1/pins/1", 404)
    assert gone.headers["tidemark-stale"] == "false"
    assert client.get("/v1/pins/1/counts").json["totals"]["purchase"] > 0
    replica.followers["pins"].fold(world.pin("1", 3))
    client.get("/v1/pins/1")


def test_similar(client: Client, replica: Any) -> None:
    said = client.get("/v1/pins/4/similar?k=3").json
    scores = world.VECTORS.astype(np.float64) @ world.VECTORS[4].astype(np.float64)
    scores[4] = -np.inf
    assert [item["pin_id"] for item in said["similar"]] == [world.PINS[i] for i in np.argsort(-scores)[:3]]
    assert said["basis"]["kind"] == "vector"
    milk = client.get(f"/v1/pins/{world.NO_VECTOR}/similar?k=500").json
    assert milk["basis"]["kind"] == "category"
    others = {pin_id for number, pin_id in enumerate(world.PINS) if number % 3 == 2}
    assert {item["pin_id"] for item in milk["similar"]} == others
    popular = [item["score"] for item in milk["similar"]]
    assert popular == sorted(popular, reverse=True) and popular[0] > 0 == popular[-1]
    assert client.get("/v1/pins/alone/similar").json["similar"] == []
    assert client.get("/v1/pins/4/similar?category=bread&k=500").json["similar"]
    client.get("/v1/pins/nothing/similar", 404)
    replica.followers["pins"].fold(world.pin("4", 2, is_deleted=True))
    client.get("/v1/pins/4/similar", 404)


def test_counts(client: Client) -> None:
    said = client.get("/v1/pins/3/counts").json
    assert said["totals"]["purchase"] == sum(hour["purchase"] for hour in said["hours"]) > 0
    assert said["hours"] == sorted(said["hours"], key=lambda hour: hour["start_time"])
    later = client.get(f"/v1/pins/3/counts?from_ms={world.NEWEST_MS - 2 * world.DAY_MS}").json
    assert 0 < later["totals"]["purchase"] < said["totals"]["purchase"]
    unknown = client.get("/v1/pins/nothing/counts").json
    assert unknown["hours"] == [] and set(unknown["totals"].values()) == {0}
    assert client.get("/v1/pins/unknown-pin/counts").json["totals"]["purchase"] == 1


def test_batch_get(client: Client) -> None:
    asked = ["1", "nothing", world.ODD_PIN, "1"]
    reply = client.call("POST", "/v1/pins:batchGet", json.dumps({"pin_ids": asked}).encode())
    assert [one["pin_id"] for one in reply.json["documents"]] == asked
    assert [one.get("is_missing", False) for one in reply.json["documents"]] == [False, True, False, False]


def test_events_are_paged(client: Client) -> None:
    whole = client.get("/v1/users/u0/events").json
    assert whole["next_cursor"] is None and whole["is_complete"]
    assert whole["events"][0]["event_time"].endswith("Z")
    paged, cursor = [], ""
    while True:
        page = client.get(f"/v1/users/u0/events?limit=2{cursor}").json
        paged += page["events"]
        if page["next_cursor"] is None:
            break
        assert len(page["events"]) == 2
        cursor = f"&cursor={page['next_cursor']}"
    assert paged == whole["events"]
    assert client.get("/v1/users/nobody/events").json["events"] == []
    assert client.get(path("v1", "users", world.ODD_USER, "events")).json["events"][0]["event_id"] == "e/1"


# ---------------------------------------------------------------------------------------- what an answer stands on


def test_headers_name_what_an_answer_stands_on(client: Client, home: Any, replica: Any) -> None:
    versions = home[2]
    one = client.get("/v1/pins/1").headers
    assert one["tidemark-base-version"] == versions["pins"]
    assert one["tidemark-stale"] == "false"
    replica.followers["user_events"].is_stale = True
    replica.followers["user_events"].fold([], Position({world.INTERACTIONS: {0: 15}}, frozenset()))
    many = client.get("/v1/users/u0/recommendations").headers
    assert many["tidemark-base-version"] == ", ".join(
        f"{name}={versions[name]}" for name in ("pins", "user_events", "pin_counts")
    )
    assert many["tidemark-stale"] == "pins=false, user_events=true, pin_counts=false"
    folded = client.get("/v1/users/u0/events").headers["tidemark-position"]
    from pipelines.indexing.position import from_token

    assert from_token(folded).topics == {world.INTERACTIONS: {0: 15}}
    assert from_token(many["tidemark-position"]).topics == {
        world.INTERACTIONS: {0: 10},
        world.UPDATES: {0: 10},
    }


def test_min_position(client: Client, replica: Any) -> None:
    token = Position({world.INTERACTIONS: {0: 12}, world.UPDATES: {0: 10}}, frozenset()).token()
    client.get(f"/v1/pins/1?min_position={token}")  # another topic's offset is not its affair
    late = client.get(f"/v1/users/u0/events?min_position={token}", 409)
    assert late.json["error"]["field"] == "min_position"
    assert late.headers["tidemark-position"]

    async def reached() -> tuple[Reply, float]:
        began = time.monotonic()
        waiting = asyncio.create_task(client.acall("GET", f"/v1/users/u0/events?min_position={token}"))
        await asyncio.sleep(0.05)
        other = await client.acall("GET", "/v1/users/u0/events")  # the event loop is free meanwhile
        assert other.status == 200 and not waiting.done()
        happened, _ = world.event("u0", "late", "2", "view", world.NEWEST_MS)
        replica.followers["user_events"].fold(
            [happened], Position({world.INTERACTIONS: {0: 12}}, frozenset())
        )
        return await waiting, time.monotonic() - began

    reply, _ = _LOOP.run(reached())
    assert reply.status == 200
    assert "late" in {event["event_id"] for event in reply.json["events"]}


def test_the_real_replica_serves(home: Any) -> None:
    client = Client(create_app(home[0], home[1]))
    client.get("/v1/users/u0/recommendations")
    said = client.get("/v1/indices").json["indices"]
    assert {one["index"]: one["base_version"] for one in said} == home[2]
    assert said[0]["versions"]
    assert client.get("/readyz").json["status"] == "ready"
    text = client.get("/metrics").body.decode()
    assert 'tidemark_request_seconds_count{route="/v1/users/{user_id}/recommendations"}' in text
    assert 'tidemark_index_overlay_facts{index="pins"} 0.0' in text


def test_metrics_are_told_of_ads_under_entries(home: Any) -> None:
    """As `python -m pipelines.serving` serves them."""
    settings, replica, _ = home
    app = create_app(settings, under_entries(replica, settings))
    text = Client(app).get("/metrics").body.decode()
    assert 'tidemark_index_overlay_facts{index="ads"} 0.0' in text
    assert "tidemark_freshness_seconds" in text


def test_ready_and_health(client: Client, replica: Any) -> None:
    assert client.get("/healthz").json == {"status": "ok"}
    replica.followers["pins"].is_ready = False
    reply = client.get("/readyz", 503)
    assert reply.json == {"status": "starting", "waiting_for": ["pins"]}


def test_before_the_first_base(tmp_path: Any) -> None:
    settings = small_settings(tmp_path)
    client = Client(create_app(settings, world.still(indices.replica(settings))))
    assert client.get("/v1/users/u0/recommendations").json["recommendations"] == []
    assert client.get("/v1/users/u0/recommendations").headers["tidemark-base-version"].startswith("pins=none")
    client.get("/v1/pins/1", 404)
    client.get("/v1/pins/1/similar", 404)
    assert client.get("/v1/pins/1/counts").json["hours"] == []
    (nothing,) = sequences_of(client, user_ids=["u0"], name="bought_lately").json["sequences"]
    assert nothing == {"user_id": "u0", "events": [], "is_complete": True}


def test_pages_and_openapi(client: Client) -> None:
    for page in ("/", "/docs"):
        reply = client.get(page)
        assert reply.headers["content-type"].startswith("text/html")
        assert b"http://" not in reply.body and b"https://" not in reply.body
    document = client.get("/openapi.json").json
    assert "/v1/pins:batchGet" in document["paths"]
    for said in document["paths"].values():
        for operation in said.values():
            assert operation["summary"] and operation["responses"]["200"]["content"]
    parameters = document["paths"]["/v1/users/{user_id}/recommendations"]["get"]["parameters"]
    assert [one["name"] for one in parameters] == ["user_id", "k", "category", "min_position"]


def test_reports_are_shown_as_they_are_at_the_moment_and_nothing_beside_them(
    home: Any, client: Client
) -> None:
    assert client.get("/reports/mine/", 404).json["error"]["field"] == "path"
    folder = home[0].paths.reports / "mine"
    folder.mkdir()
    (folder / "index.html").write_text("<p>one")
    (folder.parent.parent / "secret.html").write_text("not yours")
    reply = client.get("/reports/mine/")
    assert (reply.body, reply.headers["content-type"]) == (b"<p>one", "text/html; charset=utf-8")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    (folder / "index.html").write_text("<p>another")
    assert client.get("/reports/mine/index.html").body == b"<p>another"
    for path in ("/reports/../secret.html", "/reports/%2e%2e/secret.html", "/reports/mine/../../secret.html"):
        client.get(path, 404)


# ------------------------------------------------------------------------------------------------------------------ ads


def asked(client: Client, context: dict[str, Any], **more: Any) -> Any:
    body = json.dumps({"context": context, **more}).encode()
    reply = client.call("POST", "/v1/ads:candidates", body)
    assert reply.status == 200, reply.body
    return reply.json


def shown(client: Client, **context: Any) -> list[str]:
    return [ad["ad_id"] for ad in asked(client, context)["ads"]]


def test_candidates(client: Client, home: Any) -> None:
    said = asked(client, {"country": "us", "device": "web", "time_ms": 5})
    quality = 0.5 * 0.5  # nothing but sharpness is known of the image, nor how safe it is
    scores = [bid * 0.005 * (0.5 + quality) for bid in (2_000_000, 1_000_000, 500_000)]
    assert [(ad["ad_id"], ad["effective_bid_usd_micros"]) for ad in said["ads"]] == [
        ("a2", 2_000_000),
        ("a1", 1_000_000),
        ("a4", 500_000),
    ]
    np.testing.assert_allclose([ad["score"] for ad in said["ads"]], scores, rtol=1e-12)
    assert said["ads"][0].items() >= {"campaign_id": "c1", "pin_id": "p1"}.items()
    assert said["basis"] == {"kind": "light_score", "time_ms": 5}
    assert shown(client) == ["a4"]
    assert [ad["ad_id"] for ad in asked(client, {"country": "US"}, k=1)["ads"]] == ["a2"]
    assert shown(client, country="US", excluded_advertisers=["v1"]) == []
    now = asked(client, {})["basis"]["time_ms"]
    assert abs(now - time.time() * 1000) < 60_000


def test_an_ad(client: Client, home: Any) -> None:
    reply = client.get("/v1/ads/a1")
    assert reply.json["control"]["campaign_id"] == "c1"
    assert reply.json["content"]["title"] == "A red Chair"
    assert reply.json["versions"]["control"] == {"ads": 1, "ad_groups": 1, "campaigns": 1, "advertisers": 1}
    assert reply.json["overridden_by"] == []
    assert reply.headers["tidemark-base-version"] == home[2]["ads"]
    assert client.get("/v1/ads/none", 404).json["error"]["field"] == "ad_id"
    both = client.call("POST", "/v1/ads:batchGet", b'{"ad_ids": ["none", "a1"]}').json["documents"]
    assert both == [{"ad_id": "none", "is_missing": True}, reply.json]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "context"),
        ({"context": []}, "context"),
        ({"context": {}, "k": 0}, "k"),
        ({"context": {}, "k": 501}, "k"),
        ({"context": {}, "k": True}, "k"),
        ({"context": {"country": 1}}, "context.country"),
        ({"context": {"device": "toaster"}}, "context.device"),
        ({"context": {"nation": "US"}}, "context.nation"),
        ({"context": {"interests": "oak"}}, "context.interests"),
        ({"context": {"interests": ["oak", None]}}, "context.interests[1]"),
        ({"context": {"keywords": ["x"] * 201}}, "context.keywords"),
        ({"context": {"time_ms": -1}}, "context.time_ms"),
        ({"context": {}, "limit": 1}, "limit"),
    ],
)
def test_a_bad_context_is_named(client: Client, body: Any, field: str) -> None:
    reply = client.call("POST", "/v1/ads:candidates", json.dumps(body).encode())
    assert (reply.status, reply.json["error"]["field"]) == (400, field)
    assert reply.json["error"]["allowed"]


def test_ads_under_entries_of_the_bypass(home: Any, replica: Any) -> None:
    still = replica.followers["ads"]
    still.with_delta = True
    bypass = Bypass(still, home[0])
    replica.followers["ads"] = bypass
    client = Client(create_app(home[0], replica))

    def take(table: str, key: str, stand: int, **values: Any) -> None:
        said = {"table": table, "key": key, "stand": stand, "values": values}
        bypass.take(json.dumps(said).encode(), world.NEWEST_MS)
        bypass.refresh()

    limits = {"daily_budget_usd_micros": None, "lifetime_budget_usd_micros": None}
    take("campaigns", "c1", 2, status="paused", **limits)
    take("ads", "a3", 5, status="active")
    assert shown(client, country="US") == ["a4"]
    document = client.get("/v1/ads/a3").json
    assert (document["control"]["ad_status"], document["control"]["blocked_by"]) == (
        "active",
        "campaign paused",
    )
    assert document["overridden_by"] == [
        {"table": "ads", "key": "a3", "stand": 5},
        {"table": "campaigns", "key": "c1", "stand": 2},
    ]
    take("campaigns", "c1", 1, status="archived", **limits)  # late
    take("campaigns", "c1", 3, status="active", **limits)
    assert shown(client, country="US") == ["a2", "a1", "a3", "a4"]
    take("advertisers", "v1", 9, status="active", balance_usd_micros=0)
    assert shown(client, country="US") == []
    rows = {table: {key: dict(row) for key, row in of.items()} for table, of in world.account().items()}
    rows["advertisers"]["v1"] |= {"stand": 9, "balance_usd_micros": 7}
    still.view = still.view.folded(world.ads_facts(rows), Position({}))
    bypass.refresh()
    assert shown(client, country="US") == ["a2", "a1", "a3", "a4"]
    assert client.get("/v1/ads/a4").json["overridden_by"] == []
    still.with_delta = False
    bypass.refresh()
    assert shown(client, country="US") == ["a2", "a1", "a4"]
    bypass.take(b"{}", world.NEWEST_MS)
    status = bypass.status()
    assert (status["bypass_entries"], status["bypass_overridden"], status["bypass_refused"]) == (3, 0, 1)


# ------------------------------------------------------------------------------------------------------------ sequences


ARROW = {
    "content-type": "application/json",
    "accept": "application/json;q=0.5, application/vnd.apache.arrow.stream",
}
INLINE = {"max_length": 3, "fields": ["event_id", "time_ms", "pin_id"], "enrich": ["catalogue.category"]}


def sequences_of(client: Client, status: int = 200, **body: Any) -> Reply:
    reply = client.call(
        "POST", "/v1/sequences:query", json.dumps({"now_ms": world.NEWEST_MS, **body}).encode()
    )
    assert reply.status == status, reply.body
    return reply


def naive(user: str) -> list[dict[str, Any]]:
    """A user's events, newest first, with the category of their pin."""
    of_user = [h for h, _ in world.history() if h["key"] == user.encode()]
    categories = {pin_id: ("fruit", "bread", "milk")[number % 3] for number, pin_id in enumerate(world.PINS)}
    rows = [
        {
            "event_id": h["id"].decode(),
            "time_ms": h["time_ms"],
            "pin_id": h["payload"]["pin_id"],
            "catalogue.category": categories.get(h["payload"]["pin_id"]),
        }
        for h in of_user
    ]
    return sorted(rows, key=lambda row: (row["time_ms"], row["event_id"].encode()), reverse=True)


def test_sequences_by_a_definition_that_comes_along(client: Client, home: Any) -> None:
    users = ["u0", "nobody", world.ODD_USER, "u0"]
    reply = sequences_of(client, user_ids=users, definition=INLINE)
    assert reply.json == {
        "name": None,
        "version": None,
        "now_ms": world.NEWEST_MS,
        "sequences": [{"user_id": user, "events": naive(user)[:3], "is_complete": True} for user in users],
    }
    assert reply.json["sequences"][0]["events"][1]["catalogue.category"] is None  # nobody knows this pin
    assert (
        reply.headers["tidemark-base-version"]
        == f"user_events={home[2]['user_events']}, pins={home[2]['pins']}"
    )
    assert reply.headers["tidemark-stale"] == "user_events=false, pins=false"


def test_sequences_of_a_window_in_a_category(client: Client) -> None:
    wanted = {
        **INLINE,
        "age": "20d",
        "categories": ["fruit", "milk"],
        "max_length": 100,
        "order": "oldest_first",
    }
    now_ms = world.NEWEST_MS - 5 * world.DAY_MS  # the event of just then is in, that of 20 days before is not
    (found,) = sequences_of(client, user_ids=["u0"], definition=wanted, now_ms=now_ms).json["sequences"]
    assert found["events"] == [
        row
        for row in naive("u0")[::-1]
        if now_ms - 20 * world.DAY_MS < row["time_ms"] <= now_ms
        and row["catalogue.category"] in ("fruit", "milk")
    ]
    assert found["events"]
    (now,) = sequences_of(client, user_ids=["u0"], definition=wanted, now_ms=None).json["sequences"]
    assert now == {"user_id": "u0", "events": [], "is_complete": True}


def test_declared_sequences(client: Client, replica: Any) -> None:
    happened, _ = world.event("u1", "again", "5", "purchase", world.NEWEST_MS)
    replica.followers["user_events"].fold([happened])
    replica.followers["pins"].fold(world.pin("5", 2, is_available=False))
    reply = sequences_of(client, user_ids=["u1"], name="bought_lately").json
    assert (reply["name"], reply["version"]) == ("bought_lately", 1)
    events = reply["sequences"][0]["events"]
    assert events[0] == {
        "pin_id": "5",
        "time_ms": world.NEWEST_MS,
        "catalogue.title": "pin 5",
        "catalogue.category": "fruit",
        "offer.price_usd_micros": 1_500_000,
        "offer.is_available": False,
    }
    assert [row["pin_id"] for row in events] == ["5", *(row["pin_id"] for row in naive("u1")[1:])]
    history = sequences_of(client, user_ids=["u1"], name="purchase_history", version=1).json["sequences"]
    assert [row["event_id"] for row in history[0]["events"]] == [
        *(f"e{n}" for n in range(7, -1, -1)),
        "again",
    ]


def test_sequences_as_an_arrow_stream(client: Client) -> None:
    users = [world.ODD_USER, "nobody", "u3"]
    body = {"user_ids": users, "definition": INLINE, "now_ms": world.NEWEST_MS}
    reply = client.call("POST", "/v1/sequences:query", json.dumps(body).encode(), ARROW)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/vnd.apache.arrow.stream"
    assert reply.headers["tidemark-position"]
    table = pa.ipc.open_stream(reply.body).read_all()
    assert table.schema.remove_metadata() == pa.schema(
        [
            ("user_id", pa.string()),
            ("event_id", pa.string()),
            ("time_ms", pa.int64()),
            ("pin_id", pa.string()),
            ("catalogue.category", pa.string()),
        ]
    )
    assert table.to_pylist() == [{"user_id": user, **row} for user in users for row in naive(user)[:3]]
    assert json.loads(table.schema.metadata[b"tidemark.sequences"]) == {
        "name": None,
        "version": None,
        "now_ms": world.NEWEST_MS,
        "users": [
            {"user_id": user, "length": length, "is_complete": True}
            for user, length in zip(users, (1, 0, 3), strict=True)
        ],
    }
    nobody = json.dumps({**body, "user_ids": ["nobody"]}).encode()
    empty = pa.ipc.open_stream(client.call("POST", "/v1/sequences:query", nobody, ARROW).body).read_all()
    assert (empty.num_rows, empty.schema.remove_metadata()) == (0, table.schema.remove_metadata())


@pytest.mark.parametrize("column", sorted(declared.ENRICHMENTS))
def test_whatever_the_index_of_pins_declares_enriches(client: Client, column: str) -> None:
    wanted = {**INLINE, "enrich": [column]}
    (found,) = sequences_of(client, user_ids=["u3"], definition=wanted).json["sequences"]
    family, _, name = column.partition(".")
    for event in found["events"]:
        document = client.get(f"/v1/pins/{event['pin_id']}").json
        if family == "embedding":
            np.testing.assert_array_equal(event[column], world.VECTORS[world.PINS.index(event["pin_id"])])
        else:
            assert event[column] == document[family][name]


def test_sequences_wait_for_a_position(client: Client, replica: Any) -> None:
    token = Position({world.INTERACTIONS: {0: 12}}, frozenset()).token()
    body = json.dumps({"user_ids": ["u0"], "definition": INLINE}).encode()
    late = client.call("POST", f"/v1/sequences:query?min_position={token}", body)
    assert (late.status, late.json["error"]["field"]) == (409, "min_position")
    happened, _ = world.event("u0", "late", "2", "view", world.NEWEST_MS + 1)
    replica.followers["user_events"].fold([happened], Position({world.INTERACTIONS: {0: 12}}, frozenset()))
    reply = client.call("POST", f"/v1/sequences:query?min_position={token}", body)
    assert reply.json["sequences"][0]["events"][0]["event_id"] == "late"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "user_ids"),
        ({"user_ids": []}, "user_ids"),
        ({"user_ids": ["u0"] * 101}, "user_ids"),
        ({"user_ids": ["u0", ""]}, "user_ids[1]"),
        ({"user_ids": ["u0"]}, "name"),
        ({"user_ids": ["u0"], "name": "bought_lately", "definition": INLINE}, "name"),
        ({"user_ids": ["u0"], "name": "bought"}, "name"),
        ({"user_ids": ["u0"], "name": 1}, "name"),
        ({"user_ids": ["u0"], "name": "bought_lately", "version": 2}, "version"),
        ({"user_ids": ["u0"], "name": "bought_lately", "version": "1"}, "version"),
        ({"user_ids": ["u0"], "definition": INLINE, "version": 1}, "version"),
        ({"user_ids": ["u0"], "definition": []}, "definition"),
        ({"user_ids": ["u0"], "definition": {**INLINE, "age": "91d"}}, "definition.age"),
        ({"user_ids": ["u0"], "definition": {**INLINE, "max_length": 1001}}, "definition.max_length"),
        ({"user_ids": ["u0"], "definition": {**INLINE, "fields": ["pinid"]}}, "definition.fields[0]"),
        ({"user_ids": ["u0"], "definition": {**INLINE, "actions": ["sing"]}}, "definition.actions[0]"),
        ({"user_ids": ["u0"], "definition": {**INLINE, "limit": 3}}, "definition.limit"),
        ({"user_ids": ["u0"], "definition": INLINE, "now_ms": -1}, "now_ms"),
        ({"user_ids": ["u0"], "definition": INLINE, "now": 1}, "now"),
    ],
)
def test_a_bad_sequence_is_named(client: Client, body: Any, field: str) -> None:
    reply = client.call("POST", "/v1/sequences:query", json.dumps(body).encode())
    assert (reply.status, reply.json["error"]["field"]) == (400, field)
    assert reply.json["error"]["message"] and reply.json["error"]["allowed"]


def test_a_declared_sequence_with_a_problem_is_not_served_and_the_others_are(
    home: Any, replica: Any, tmp_path: Any, monkeypatch: Any, caplog: Any
) -> None:
    for path in sequence_files.FOLDER.iterdir():
        text = path.read_text()
        (tmp_path / path.name).write_text(
            text.replace("max_length: 256", "max_length: 255") if path.stem == "purchase_history" else text
        )
    second = (tmp_path / "bought_lately.yaml").read_text().replace("version: 1", "version: 2")
    (tmp_path / "bought_lately.v2.yaml").write_text(second.replace("max_length: 100", "max_length: 1"))
    monkeypatch.setattr(sequence_files, "FOLDER", tmp_path)
    client = Client(create_app(home[0], replica))
    assert "version 1 was published with another meaning: max_length was 256 and is 255" in caplog.text
    assert sequences_of(client, 400, user_ids=["u0"], name="purchase_history").json["error"]["allowed"] == [
        "bought_lately"
    ]
    for version, asked_for, length in ((1, None, 8), (1, 1, 8), (2, 2, 1)):  # version 2 is not published
        said = sequences_of(client, user_ids=["u1"], name="bought_lately", version=asked_for).json
        assert (said["version"], len(said["sequences"][0]["events"])) == (version, length)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ("/v1/users/u0/recommendations?k=0", "k"),
        ("/v1/users/u0/recommendations?k=501", "k"),
        ("/v1/users/u0/recommendations?k=NaN", "k"),
        ("/v1/users/u0/recommendations?k=99999999999999999999999999", "k"),
        ("/v1/users/u0/recommendations?k=1&k=2", "k"),
        ("/v1/users/u0/recommendations?k=%D9%A3", "k"),
        ("/v1/users/u0/recommendations?category=", "category"),
        ("/v1/users/u0/recommendations?category=%FF", "category"),
        ("/v1/users/u0/recommendations?catgory=x", "catgory"),
        ("/v1/users/u0/recommendations?min_position=x", "min_position"),
        (
            "/v1/users/u0/recommendations?min_position=eyJ0b3BpY3MiOnsiYSI6eyIwIjoxZTk5OX19LCJsb2FkcyI6W119",
            "min_position",
        ),
        ("/v1/users/u0/events?limit=-1", "limit"),
        ("/v1/users/u0/events?cursor=abc", "cursor"),
        ("/v1/users/u0/events?cursor=%E2%98%83", "cursor"),
        ("/v1/users//events", "user_id"),
        ("/v1/users/a%00b/events", "user_id"),
        ("/v1/users/%ED%A0%80/events", "user_id"),
        ("/v1/users/%zz/events", "user_id"),
        ("/v1/users/" + "x" * 513 + "/events", "user_id"),
        ("/v1/pins/%FF", "pin_id"),
        ("/v1/pins/1/counts?from_ms=1.5", "from_ms"),
        ("/v1/indices?x=1", "x"),
    ],
)
def test_bad_input_is_named(client: Client, asked: str, field: str) -> None:
    error = client.get(asked, 400).json["error"]
    assert set(error) == FIELDS
    assert error["field"] == field
    assert error["message"] and error["allowed"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 415, "Content-Type"),
        (b"{", 400, "body"),
        (b"[1]", 400, "body"),
        (b"{}", 400, "pin_ids"),
        (b'{"pin_ids": []}', 400, "pin_ids"),
        (b'{"pin_ids": "1"}', 400, "pin_ids"),
        (b'{"pin_ids": ["1", 2]}', 400, "pin_ids[1]"),
        (b'{"pin_ids": ["\\ud800"]}', 400, "body"),
        (b'{"pin_ids": ["a\\u0000"]}', 400, "pin_ids[0]"),
        (b'{"pin_ids": [NaN]}', 400, "body"),
        (b'{"pin_ids": ["1"], "k": 1}', 400, "k"),
        (json.dumps({"pin_ids": ["1"] * 501}).encode(), 400, "pin_ids"),
        (b"[" * 100_000, 400, "body"),
        (b" " * 1_100_000, 413, "body"),
    ],
)
def test_bad_bodies_are_named(client: Client, body: bytes, status: int, field: str) -> None:
    reply = client.call("POST", "/v1/pins:batchGet", body)
    assert (reply.status, reply.json["error"]["field"]) == (status, field)


def test_other_content_types_and_methods(client: Client) -> None:
    reply = client.call(
        "POST", "/v1/pins:batchGet", b"pin_ids=1", {"content-type": "application/x-www-form-urlencoded"}
    )
    assert reply.status == 415
    for method, where in (
        ("POST", "/v1/pins/1"),
        ("GET", "/v1/pins:batchGet2/"),
        ("DELETE", "/"),
        ("QUERY", "/healthz"),
    ):
        reply = client.call(method, where)
        assert reply.status in (404, 405)
        assert set(reply.json["error"]) == FIELDS
    assert client.call("PUT", "/v1/pins/1").headers["allow"] == "GET"


PARTS = st.one_of(
    st.sampled_from(
        [
            "v1",
            "users",
            "pins",
            "u0",
            "1",
            "events",
            "recommendations",
            "similar",
            "counts",
            "..",
            "",
            "pins:batchGet",
            "ads",
            "a1",
            "ads:candidates",
            "counters:query",
        ]
    ),
    st.text(max_size=6).map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe="")),
    st.binary(max_size=6).map(lambda raw: quote(raw, safe="")),
    st.sampled_from(["%", "%0", "%00", "%ED%A0%80", "%2F", "%25"]),
)
SHAPES = st.sampled_from(
    [
        "/v1/users/{}/recommendations",
        "/v1/users/{}/events",
        "/v1/pins/{}",
        "/v1/pins/{}/counts",
        "/v1/pins/{}/similar",
        "/v1/ads/{}",
    ]
)
PATHS = st.one_of(
    st.lists(PARTS, max_size=6).map(lambda parts: "/" + "/".join(parts)),
    st.tuples(SHAPES, PARTS).map(lambda pair: pair[0].format(pair[1])),
    st.sampled_from(
        [
            "/v1/pins:batchGet",
            "/v1/ads:batchGet",
            "/v1/ads:candidates",
            "/v1/counters:query",
            "/v1/frequency:check",
            "/v1/sequences:query",
            "/v1/indices",
            "/healthz",
            "/readyz",
            "/metrics",
            "/",
            "/docs",
            "/openapi.json",
        ]
    ),
    PARTS.map(lambda part: f"/reports/{part}"),
)
VALUES = st.one_of(
    st.sampled_from(
        [
            "",
            "0",
            "1",
            "10",
            "500",
            "501",
            "-1",
            "NaN",
            "1e3",
            "9" * 30,
            "bread",
            "%00",
            "%FF",
            "%",
            "AAAAAAAAAAFh",
        ]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.text(max_size=8).map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe="")),
)
NAMES = st.sampled_from(["k", "category", "limit", "cursor", "min_position", "from_ms", "to_ms", "x", ""])
QUERIES = st.lists(st.tuples(NAMES, VALUES), max_size=3).map(
    lambda pairs: "&".join(f"{n}={v}" for n, v in pairs)
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
CONTEXTS = ANY_JSON | st.dictionaries(
    st.sampled_from(
        ["country", "device", "interests", "keywords", "time_ms", "excluded_advertisers", "category"]
    ),
    ANY_JSON | st.lists(st.text(max_size=5), max_size=3),
)
BODIES = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    ANY_JSON.map(lambda value: json.dumps(value).encode()),
    ANY_JSON.map(lambda value: json.dumps({"pin_ids": value}).encode()),
    st.lists(st.text(max_size=5), max_size=4).map(lambda ids: json.dumps({"pin_ids": ids}).encode()),
    st.tuples(CONTEXTS, ANY_JSON).map(lambda pair: json.dumps({"context": pair[0], "k": pair[1]}).encode()),
)
TYPES = st.sampled_from(
    ["application/json", "application/json; charset=utf-8", "text/plain", "", "☃".encode().decode("latin-1")]
)


@cases(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "X"]),
    where=PATHS,
    query=QUERIES,
    body=BODIES,
    content_type=TYPES,
)
def test_nothing_that_a_client_sends_gives_a_5xx(
    home: Any, method: str, where: str, query: str, body: bytes, content_type: str
) -> None:
    client = Client(create_app_once(home))
    reply = client.call(method, f"{where}?{query}", body, {"content-type": content_type})
    assert reply.status < 500, reply.body
    if reply.status >= 400:
        assert set(reply.json["error"]) == FIELDS
    assert reply.headers["content-length"] == str(len(reply.body))


DEFINITIONS = ANY_JSON | st.fixed_dictionaries(
    {"max_length": st.just(3) | ANY_JSON, "fields": st.just(["pin_id"]) | ANY_JSON},
    optional={
        name: ANY_JSON
        | st.sampled_from(["90d", "pin_id", "oldest_first", ["view"], ["offer.is_available"], ["x"]])
        for name in ("actions", "surfaces", "age", "deduplicate_by", "order", "enrich")
    },
)
SEQUENCES = st.fixed_dictionaries(
    {"user_ids": st.just(["u0", "x"]) | ANY_JSON},
    optional={
        "definition": DEFINITIONS,
        "name": st.just("bought_lately") | ANY_JSON,
        "version": ANY_JSON,
        "now_ms": ANY_JSON,
    },
)


@cases(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=SEQUENCES, is_arrow=st.booleans())
def test_no_sequence_that_a_client_wants_gives_a_5xx(home: Any, body: Any, is_arrow: bool) -> None:
    client = Client(create_app_once(home))
    reply = client.call("POST", "/v1/sequences:query", json.dumps(body).encode(), ARROW if is_arrow else None)
    assert reply.status in (200, 400), reply.body
    if reply.status == 400:
        assert set(reply.json["error"]) == FIELDS


_APPS: dict[int, Any] = {}


def create_app_once(home: Any) -> Any:
    return _APPS.setdefault(id(home), create_app(home[0], world.still(home[1])))


def test_over_a_real_server(home: Any) -> None:
    """uvicorn hands the raw path on, so that odd ids arrive whole."""
    import threading

    import uvicorn

    config = uvicorn.Config(
        create_app(home[0], world.still(home[1])),
        host="127.0.0.1",
        port=home[0].serving.port,
        loop="uvloop",
        http="httptools",
        lifespan="off",
        log_level="warning",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{home[0].serving.port}") as client:
            for pin_id in (world.ODD_PIN, "1"):
                reply = client.get(path("v1", "pins", pin_id))
                assert reply.status_code == 200 and reply.json()["pin_id"] == pin_id
            assert client.get(path("v1", "users", world.ODD_USER, "events")).json()["events"]
            assert client.get(path("v1", "pins", "..")).status_code in (400, 404)
            assert (
                client.post("/v1/pins:batchGet", json={"pin_ids": ["1"]}).json()["documents"][0]["pin_id"]
                == "1"
            )
            assert client.post("/v1/pins:batchGet", content=b"x" * 2_000_000).status_code in (413, 415)
            assert client.get("/nothing").status_code == 404
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def test_available() -> None:
    assert candidates.is_available({"catalogue": {}})
    assert candidates.is_available({"offer": {"is_available": None}})
    assert not candidates.is_available({"offer": {"is_available": False}})
    assert fold_in.PURCHASE in candidates.POPULARITY
