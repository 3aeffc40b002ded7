"""What a rule of frequency may say, and how candidates are judged over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.indexing.replica import Replica
from pipelines.serving.app import create_app
from pipelines.users import frequency
from pipelines.users.frequency import BadRule, Rule
from tests import serving_world as world
from tests.conftest import small_settings
from tests.unit.test_horizons import NOW_MS, built
from tests.unit.test_serving import Client

DAY_MS = 86_400_000
GOOD = {"name": "daily", "per": "ad_id", "actions": ["view"], "within": "1d", "at_most": 3}
TIRED = {
    "name": "tired",
    "per": "ad_id",
    "within": "7d",
    "fatigue": {"half_life": "12h", "weights": {"view": 1, "click": -2.5}, "at_most": 5},
}


def test_rules() -> None:
    assert frequency.read(GOOD, "here") == Rule("daily", "ad_id", {"view": 1.0}, DAY_MS, "at_most", 3, None)
    weights = {"view": 1.0, "click": -2.5}
    assert frequency.read(TIRED, "here") == Rule(
        "tired", "ad_id", weights, 7 * DAY_MS, "fatigue", 5.0, DAY_MS // 2
    )


def test_the_shipped_rules_can_be_read() -> None:
    assert {rule.kind for rule in frequency.load()} == {"at_most", "fatigue"}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"name": ""}, "name"),
        ({"per": "colour"}, "per"),
        ({"per": None}, "per"),
        ({"actions": []}, "actions"),
        ({"actions": ["view", "view"]}, "actions"),
        ({"actions": ["sing"]}, "actions"),
        ({"actions": [["view"]]}, "actions"),
        ({"within": "91d"}, "within"),
        ({"within": 60}, "within"),
        ({"at_most": -1}, "at_most"),
        ({"at_most": True}, "at_most"),
        ({"at_least": 1}, "at_least"),
        ({"more": 1}, "more"),
        ({"fatigue": TIRED["fatigue"]}, "fatigue"),
    ],
)
def test_a_rule_that_says_what_it_cannot_is_refused_by_its_field(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRule) as refused:
        frequency.read(GOOD | wrong, "rules.yaml, rule 1")
    assert refused.value.what.startswith(f"{field}: ")
    assert (refused.value.where, bool(refused.value.remedy)) == ("rules.yaml, rule 1", True)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"half_life": "1s"}, "fatigue.half_life"),
        ({"weights": {}}, "fatigue.weights"),
        ({"weights": {"sing": 1}}, "fatigue.weights.sing"),
        ({"weights": {"view": "1"}}, "fatigue.weights.view"),
        ({"weights": {"view": float("nan")}}, "fatigue.weights.view"),
        ({"at_most": None}, "fatigue.at_most"),
        ({"more": 1}, "fatigue.more"),
    ],
)
def test_fatigue_that_says_what_it_cannot_is_refused_by_its_field(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRule) as refused:
        frequency.read(TIRED | {"fatigue": TIRED["fatigue"] | wrong}, "here")  # type: ignore[operator]
    assert refused.value.what.startswith(f"{field}: ")


@pytest.mark.parametrize(
    "text",
    [
        *("", "rules: 5", "{", "rules: []\nmore: 1", "rules: []\nrules: []", "\x00"),
        json.dumps({"rules": [GOOD, GOOD]}),
    ],
)
def test_a_file_that_has_no_rules_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(BadRule) as refused:
        frequency.load(path)
    assert str(path) in (refused.value.where or "")
    with pytest.raises(BadRule):
        frequency.load(tmp_path / "nowhere.yaml")


def test_a_rule_that_reaches_further_than_timelines_do_is_refused() -> None:
    rules = [frequency.read(one, "here") for one in (GOOD, TIRED)]
    for horizon_ms in (None, 7 * DAY_MS, 90 * DAY_MS):
        frequency.require_inside(rules, horizon_ms)
    with pytest.raises(BadRule, match="it reaches 7d back.*rule tired.*build.horizon_days"):
        frequency.require_inside(rules, 7 * DAY_MS - 1)


def test_serving_does_not_start_with_such_a_rule(tmp_path: Path) -> None:
    month = small_settings(tmp_path, BUILD__HORIZON_DAYS="{user_events: 30}")
    with pytest.raises(BadRule, match="it reaches 90d back, timelines 30d .*rule hidden_pin"):
        create_app(month, Replica({}))


@pytest.mark.parametrize(
    ("age_ms", "count", "short"),
    [(None, None, []), (3 * DAY_MS, None, ["tired"]), (None, 2, ["tired"]), (None, 1, ["daily", "tired"])],
)
def test_rules_that_may_measure_too_little_are_told(
    tmp_path: Path, age_ms: int | None, count: int | None, short: list[str]
) -> None:
    rules = [frequency.read(one, "here") for one in (GOOD, TIRED)]
    found = frequency.check(built(tmp_path, age_ms, count), rules, b"u", [{"ad_id": "a1"}], NOW_MS)
    assert [rule.name for rule in found.incomplete] == short


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    settings = small_settings(tmp_path_factory.mktemp("frequency"), SERVING__MAX_WAIT_MS=300)
    world.build_world(settings)
    met = {"name": "met", "per": "pin_id", "actions": ["purchase"], "within": "90d", "at_least": 1}
    with world.followed(settings) as replica:
        still = world.still(replica)
        seen = [
            world.event("u0", f"v{n}", "3", "view", world.NEWEST_MS - n * DAY_MS // 2, ad_id="a1")
            for n in range(4)
        ]
        still.followers["user_events"].fold([happened for happened, _ in seen])  # type: ignore[attr-defined]
        rules = [frequency.read(one, "here") for one in (GOOD | {"at_most": 2}, TIRED, met)]
        yield Client(create_app(settings, still, rules))


def judged(client: Client, *candidates: dict[str, str], **more: Any) -> Any:
    body = {"user_id": "u0", "now_ms": world.NEWEST_MS, "candidates": candidates} | more
    reply = client.call("POST", "/v1/frequency:check", json.dumps(body).encode())
    assert reply.status == 200, reply.body
    return [(one["is_allowed"], one["broken"]) for one in reply.json["candidates"]]


def test_candidates_are_judged_by_the_rules_that_concern_them(client: Client) -> None:
    daily = {"rule": "daily", "ad_id": "a1", "at_most": 2, "measured": 2}
    never = {"rule": "met", "pin_id": "unseen", "at_least": 1, "measured": 0}
    assert judged(client, {"ad_id": "a1"}, {"ad_id": "a2"}, {"ad_id": "a1", "pin_id": "unseen"}) == [
        (False, [daily]),
        (True, []),
        (False, [daily, never]),
    ]
    assert judged(client, {"campaign_id": "c1"}) == [(True, [])]
    assert judged(client, {"ad_id": "a1"}, now_ms=world.NEWEST_MS + DAY_MS) == [(True, [])]
    assert judged(client, {"ad_id": "a1"}, rules=["tired"]) == [(True, [])]  # 1 + 1/2 + 1/4 + 1/8 views
    assert judged(client, {"ad_id": "a1"}, user_id="nobody") == [(True, [])]


def test_an_answer_says_what_it_may_lack(client: Client) -> None:
    asked = {"user_id": "u0", "now_ms": world.NEWEST_MS, "candidates": [{"ad_id": "a1"}]}
    reply = client.call("POST", "/v1/frequency:check", json.dumps(asked).encode())
    assert reply.json["basis"] == {
        "now_ms": world.NEWEST_MS,
        "rules": ["daily", "tired", "met"],
        "is_complete": True,
        "incomplete_rules": [],
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"candidates": []}, "candidates"),
        ({"candidates": [{}]}, "candidates[0]"),
        ({"candidates": [{"colour": "red"}]}, "candidates[0].colour"),
        ({"candidates": [{"ad_id": 1}]}, "candidates[0].ad_id"),
        ({"candidates": [{"ad_id": "a"}] * 501}, "candidates"),
        ({"rules": ["nothing"]}, "rules[0]"),
        ({"rules": "daily"}, "rules"),
        ({"rules": []}, "rules"),
        ({"now_ms": "now"}, "now_ms"),
        ({"more": 1}, "more"),
    ],
)
def test_a_bad_question_is_refused_by_its_field(client: Client, body: Any, field: str) -> None:
    asked = {"user_id": "u0", "candidates": [{"ad_id": "a1"}]} | body
    reply = client.call("POST", "/v1/frequency:check", json.dumps(asked).encode())
    assert (reply.status, reply.json["error"]["field"]) == (400, field), reply.body
    assert reply.json["error"]["allowed"]
