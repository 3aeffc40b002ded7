"""Follows and inboxes over HTTP: pages, positions, odd ids, and what is said when something is left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipelines.indexing.position import Position
from pipelines.serving.app import create_app
from pipelines.serving.inputs import cursor_of
from pipelines.users import inbox
from tests import serving_world as world
from tests.conftest import small_settings
from tests.serving_world import DAY_MS, NEWEST_MS, ODD_PIN, ODD_USER
from tests.unit.test_serving import Client, path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, dict[str, str]]]:
    settings = small_settings(tmp_path_factory.mktemp("follows"), SERVING__MAX_WAIT_MS=300)
    versions = world.build_world(settings)
    with world.followed(settings) as replica:
        yield settings, replica, versions


@pytest.fixture
def replica(home: Any) -> Any:
    return world.still(home[1])


@pytest.fixture
def client(home: Any, replica: Any) -> Client:
    return Client(create_app(home[0], replica))


def told(client: Client, user: str = "fan", query: str = "") -> list[tuple[Any, ...]]:
    """The entries of an inbox: what, of which pin or user, and what changed."""
    entries = client.get(f"/v1/users/{user}/inbox{query}").json["entries"]
    return [
        (e["what"], e["pin_id"], {c["field"]: (c["from"], c["to"]) for c in e["changes"]})
        if e["kind"] == "pin"
        else (e["what"], e["user_id"], e["pin_id"])
        for e in entries
    ]


CHEAPER = {"price_usd_micros": (2_000_000, 1_500_000)}


def test_what_a_user_follows_the_newest_first(client: Client) -> None:
    said = client.get("/v1/users/fan/follows").json
    assert (said["user_id"], said["is_complete"], said["next_cursor"]) == ("fan", True, None)
    found = [(f["pin_id"], f["followed_user_id"]) for f in said["follows"]]
    assert found == [("2", None), (ODD_PIN, None), (None, "u1"), (None, ODD_USER), ("1", None)]
    assert said["follows"][0]["since"] == "2023-11-12T22:13:20.000Z"


def test_follows_are_paged(client: Client) -> None:
    whole, found, query = client.get("/v1/users/fan/follows").json["follows"], [], "limit=2"
    while query:
        said = client.get(f"/v1/users/fan/follows?{query}").json
        found += said["follows"]
        query = said["next_cursor"] and f"limit=2&cursor={said['next_cursor']}"
    assert found == whole


def test_an_inbox_has_what_became_of_pins_since_they_are_followed(client: Client, home: Any) -> None:
    reply = client.get("/v1/users/fan/inbox")
    assert told(client) == [("changed", ODD_PIN, CHEAPER), ("changed", "1", CHEAPER)]
    said = reply.json
    assert (said["follows_read"], said["has_more_follows"], said["is_complete"]) == (5, False, True)
    assert (said["entries"][1]["title"], said["entries"][1]["version"]) == ("pin 1", 2)
    named = ("user_follows", "pin_changes", "user_events")
    wanted = ", ".join(f"{index}={home[2][index]}" for index in named)
    assert reply.headers["tidemark-base-version"] == wanted


def test_what_comes_is_there_at_once_and_a_position_can_be_waited_for(client: Client, replica: Any) -> None:
    rows = world.change("1", 3, NEWEST_MS, price_usd_micros=1_500_000, is_available=False)
    rows += world.change("2", 3, NEWEST_MS - 1, is_gone=True)
    end = Position({world.UPDATES: {0: 12}})
    client.get(f"/v1/users/fan/inbox?min_position={end.token()}", 409)
    replica.followers["pin_changes"].fold(rows, end)
    found = told(client, query=f"?min_position={end.token()}")
    assert found[:2] == [("changed", "1", {"is_available": (True, False)}), ("gone", "2", {})]
    replica.followers["pin_changes"].fold(world.change("2", 4, NEWEST_MS, title="again"))
    assert told(client)[0] == ("back", "2", {"title": (None, "again")})


def test_what_changes_nothing_makes_no_entry(client: Client, replica: Any) -> None:
    before = told(client)
    rows = world.change("1", 3, NEWEST_MS, price_usd_micros=1_500_000, is_available=True)
    rows += world.change("1", 1, NEWEST_MS + 1, title="an older version that comes late")
    rows += world.change("5", 1, NEWEST_MS, title="followed by nobody")
    replica.followers["pin_changes"].fold(rows)
    assert told(client) == before


def test_of_a_followed_user_public_actions_are_told_and_no_others(client: Client, replica: Any) -> None:
    seen = [
        world.event("u1", "s1", "7", "save", NEWEST_MS),
        world.event("u1", "v1", "7", "view", NEWEST_MS),
        world.event("u1", "s0", "7", "save", NEWEST_MS - 5 * DAY_MS),  # before the follow
        world.event(ODD_USER, "s/2", "8", "save", NEWEST_MS + 1),
        world.event("u3", "s1", "7", "save", NEWEST_MS),
    ]
    replica.followers["user_events"].fold([happened for happened, _ in seen])
    assert told(client)[:2] == [("save", ODD_USER, "8"), ("save", "u1", "7")]
    assert len(told(client)) == 4
    replica.followers["user_follows"].fold(
        [world.follow("fan", NEWEST_MS, followed="u1", version=2, is_deleted=True)]
    )
    assert told(client)[:2] == [("save", ODD_USER, "8"), ("changed", ODD_PIN, CHEAPER)]


def test_following_again_begins_anew(client: Client, replica: Any) -> None:
    replica.followers["user_follows"].fold([world.follow("fan", NEWEST_MS, pin="1", version=2)])
    assert told(client) == [("changed", ODD_PIN, CHEAPER)]


def test_an_inbox_is_paged_over_entries_of_one_time(client: Client, replica: Any) -> None:
    rows = [world.follow("many", 0, pin=f"x{n}") for n in range(30)]
    replica.followers["user_follows"].fold(rows)
    made = [world.change(f"x{n}", 1, NEWEST_MS - n // 10, title="t") for n in range(30)]
    replica.followers["pin_changes"].fold([row for one in made for row in one])
    whole = [one[1] for one in told(client, "many")]
    assert whole == sorted(whole, key=lambda pin: (-(int(pin[1:]) // 10), pin.encode()), reverse=True)
    found, query = [], "?limit=7"
    while query:
        said = client.get(f"/v1/users/many/inbox{query}").json
        found += [e["pin_id"] for e in said["entries"]]
        query = said["next_cursor"] and f"?limit=7&cursor={said['next_cursor']}"
    assert found == whole


def test_an_unknown_user_has_an_empty_inbox_and_an_odd_one_is_found(client: Client, replica: Any) -> None:
    said = client.get("/v1/users/nobody/inbox").json
    assert (said["entries"], said["is_complete"], said["follows_read"]) == ([], True, 0)
    assert client.get("/v1/users/nobody/follows").json["follows"] == []
    replica.followers["user_follows"].fold([world.follow(ODD_USER, 0, pin="1")])
    found = client.get(path("v1", "users", ODD_USER, "inbox")).json["entries"]
    assert [e["what"] for e in found] == ["changed", "new"]


def test_what_is_left_out_is_said(client: Client, replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = replica.followers["user_follows"].view
    changes, events = (replica.followers[name].view for name in ("pin_changes", "user_events"))
    mine = inbox.follows(view, b"fan", 2)
    assert len(mine.follows) == 2 and mine.following is not None
    assert not inbox.read(mine, changes, events, 10).is_complete
    early = inbox.Follows([inbox.Follow(None, b"u1", 0, 1)], None)
    assert inbox.read(early, changes, events, 10).is_complete
    monkeypatch.setattr(inbox, "MAX_EVENTS", 3)
    assert not inbox.read(early, changes, events, 10).is_complete
    here = client.get("/v1/users/fan/inbox").json
    assert here["has_more_follows"] is False
    for few in ("FEW_FOLLOWS", "FEW_ROWS"):
        with monkeypatch.context() as patched:
            patched.setattr(f"pipelines.serving.routes.follows.{few}", 0)  # aside, and the same
            assert client.get("/v1/users/fan/inbox").json == here


@pytest.mark.parametrize("time_ms", [-(2**63), -1, 0, 2**63 - 1])
@pytest.mark.parametrize("route", ["inbox", "follows"])
def test_any_cursor_is_answered(client: Client, route: str, time_ms: int) -> None:
    for key in (b"\0", b"p" * 1026):
        client.get(f"/v1/users/fan/{route}?cursor={cursor_of(time_ms, key)}")
    client.get(f"/v1/users/fan/{route}?cursor={cursor_of(0, b'p' * 1027)}", 400)


def test_many_things_at_once_are_in_their_order(client: Client, replica: Any) -> None:
    """More than a portion of entries that make none stand before one that is."""
    chance = np.random.default_rng(3)
    replica.followers["user_follows"].fold([world.follow("busy", 0, pin="b")])
    rows = world.change("b", 1, 1, title="t", price_usd_micros=1, is_available=True)
    for version in chance.permutation(np.arange(2, 400)).tolist():
        rows += world.change("b", version, version, price_usd_micros=1 + version // 399, is_available=True)
    replica.followers["pin_changes"].fold(rows)
    found = told(client, "busy", "?limit=2")
    assert found[0] == ("changed", "b", {"price_usd_micros": (1, 2)})
    assert found[1][0] == "new"
