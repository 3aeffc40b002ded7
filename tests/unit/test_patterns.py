"""What a rule of patterns may say, what a step keeps and tells, and profiles and recommendations over HTTP."""

from __future__ import annotations

import copy
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from jobs import cli
from pipelines.contracts import USER_INTERACTIONS
from pipelines.contracts.contract import accepted_schema
from pipelines.indexing import build
from pipelines.indexing import view as views
from pipelines.indexing.base import open_base
from pipelines.indexing.position import EMPTY
from pipelines.indexing.spec import limited
from pipelines.indexing.timelines import TimelineView
from pipelines.serving.app import create_app
from pipelines.users import pattern_files, profiles
from pipelines.users.pattern_files import BadPattern
from pipelines.users.patterns import firing
from pipelines.users.patterns.index import spec_of
from pipelines.users.patterns.rules import Patterns, Rule
from tests import serving_world as world
from tests.conftest import small_settings
from tests.unit.test_serving import Client

MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
COUNT = {"actions": ["view"], "by": "category", "at_least": 3, "within": "10m"}
ABSENCE = {"after": ["add_to_basket"], "unless": ["purchase"], "by": "pin_id", "within": "1h"}
THEN = {"segment": "keen", "interest": 2, "lasts": "1d"}
COUNTS = {"name": "looks", "count": COUNT, "then": THEN}
WAITS = {"name": "waits", "absence": ABSENCE, "then": {"interest": 1.5, "lasts": "2d"}}
FILE = {
    "lateness": "1d",
    "interests": {"half_life": "7d", "weights": {"view": 1, "hide": -2}},
    "rules": [COUNTS, WAITS],
}
SCHEMA = accepted_schema(USER_INTERACTIONS)


def changed(at: str, value: Any) -> dict[str, Any]:
    """The good file with one thing else; `at` is its place, dotted, rules by number from 0. None: it is left out."""
    file: Any = copy.deepcopy(FILE)
    *way, last = [int(part) if part.isdigit() else part for part in at.split(".")]
    place = file
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return file


def test_a_file() -> None:
    found = pattern_files.declared(FILE, "here")
    counts = Rule("looks", "count", "category", ("view",), (), 3, 10 * MINUTE_MS, {}, "keen", 2.0, DAY_MS)
    after, unless = ("add_to_basket",), ("purchase",)
    waits = Rule("waits", "absence", "pin_id", after, unless, 0, HOUR_MS, {}, None, 1.5, 2 * DAY_MS)
    assert found == (Patterns((counts, waits), DAY_MS), 7 * DAY_MS, {"view": 1.0, "hide": -2.0})
    assert found.patterns.kept_ms == DAY_MS + 2 * HOUR_MS
    assert counts.digest != waits.digest != counts._replace(interest=3.0).digest


def test_the_shipped_rules_can_be_read() -> None:
    assert {rule.kind for rule in pattern_files.load().patterns.rules} == {"count", "absence"}


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        ("lateness", None, "lateness"),
        ("lateness", "1s", "lateness"),
        ("lateness", "7d", "lateness"),
        ("lateness", "8d", "lateness"),
        ("more", 1, "more"),
        ("rules", {"a": 1}, "rules"),
        ("rules", [COUNTS] * 101, "rules"),
        ("interests.half_life", 7, "interests.half_life"),
        ("interests.weights.sing", 1, "interests.weights.sing"),
        ("interests.weights.view", float("nan"), "interests.weights.view"),
        ("rules.0", "a text", "the whole"),
        ("rules.0.name", "Looks", "name"),
        ("rules.0.name", None, "name"),
        ("rules.0.name", "waits", "name"),
        ("rules.0.more", 1, "more"),
        ("rules.0.count", None, "count, absence"),
        ("rules.0.absence", ABSENCE, "count, absence"),
        ("rules.0.count.actions", [], "count.actions"),
        ("rules.0.count.actions", ["view", "view"], "count.actions[1]"),
        ("rules.0.count.actions", ["veiw"], "count.actions[0]"),
        ("rules.0.count.by", "colour", "count.by"),
        ("rules.0.count.at_least", 0, "count.at_least"),
        ("rules.0.count.at_least", True, "count.at_least"),
        ("rules.0.count.at_least", 10_001, "count.at_least"),
        ("rules.0.count.within", "4d", "count.within"),
        ("rules.0.count.within", 60, "count.within"),
        ("rules.0.count.within", None, "count.within"),
        ("rules.0.count.surfaces", [], "count.surfaces"),
        ("rules.0.count.surfaces", ["home", ""], "count.surfaces[1]"),
        ("rules.0.count.unless", ["view"], "count.unless"),
        ("rules.1.absence.unless", None, "absence.unless"),
        ("rules.1.absence.after", ["sing"], "absence.after[0]"),
        ("rules.0.then", None, "then"),
        ("rules.0.then", {"lasts": "1d"}, "then"),
        ("rules.0.then.lasts", "91d", "then.lasts"),
        ("rules.0.then.segment", "so so", "then.segment"),
        ("rules.0.then.interest", 0, "then.interest"),
        ("rules.0.then.interest", "much", "then.interest"),
        ("rules.0.then.interests", 2, "then.interests"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_its_field(at: str, value: Any, field: str) -> None:
    with pytest.raises(BadPattern) as refused:
        pattern_files.declared(changed(at, value), "patterns.yaml")
    assert refused.value.what.startswith(f"{field}: "), refused.value.what
    assert str(refused.value.where).startswith("patterns.yaml")
    assert str(refused.value.remedy).startswith("allowed: ")


def test_what_was_meant_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadPattern, match="there is no veiw; did you mean `view`"):
        pattern_files.declared(changed("rules.0.count.actions", ["veiw"]), "here")
    with pytest.raises(BadPattern, match="did you mean `interest`"):
        pattern_files.declared(changed("rules.0.then.interests", 2), "here")
    with pytest.raises(BadPattern, match="within: lateness and twice the span are more than the 7d"):
        pattern_files.declared(changed("rules.0.count.within", "4d"), "here")
    for rules in (FILE["rules"], []):
        with pytest.raises(BadPattern, match="lateness: 90d leaves no rule a span.*allowed: at most 10,078m"):
            pattern_files.declared({**FILE, "lateness": "90d", "rules": rules}, "here")
    for text in ("rules: [", "", "- 1", "\x00"):
        file = tmp_path / "patterns.yaml"
        file.write_text(text)
        with pytest.raises(BadPattern):
            pattern_files.load(file)
    with pytest.raises(BadPattern, match="cannot be read"):
        pattern_files.load(tmp_path / "absent.yaml")


# ------------------------------------------------------------------------------------------------ steps


def row(event_id: str, action: str | None, time_ms: int, offset: int = 0, **said: Any) -> dict[str, Any]:
    """An accepted row of user u1; without an action a tombstone."""
    moment = datetime.datetime.fromtimestamp(time_ms / 1000, datetime.UTC)
    return {
        **dict.fromkeys(SCHEMA.names),
        "user_id": "u1",
        "event_id": event_id,
        "action": action,
        "event_time": moment if action else None,
        "version": 1,
        "is_deleted": action is None,
        "content_hash": 1,
        "offset": offset,
        "broker_time": moment,
        **said,
    }


def stepped(kept: bytes | None, *rows: dict[str, Any]) -> tuple[bytes, list[tuple[Any, ...]], int]:
    """A step by the good file: what is kept; what was told (rule, event, time, whether it is taken back); left out."""
    patterns = pattern_files.declared(FILE, "here").patterns
    made = firing.step(patterns, None, kept, pa.Table.from_pylist(list(rows), SCHEMA))
    told = [(one["id"][-2:].decode(), one["time_ms"], one["is_deleted"]) for one in made.facts.to_pylist()]
    return made.kept, told, made.left_out


def test_a_count_fires_at_the_rising_edge_and_is_taken_back_when_an_event_goes() -> None:
    views = [row(f"e{n}", "view", DAY_MS + n * MINUTE_MS, n, category="fruit") for n in range(4)]
    kept, told, _ = stepped(None, *views[:2])
    assert told == []
    kept, told, _ = stepped(kept, *views[2:])
    assert told == [("e2", DAY_MS + 2 * MINUTE_MS, False)]
    kept, told, _ = stepped(kept, row("e0", None, DAY_MS, 9, version=2))
    assert told == [("e2", DAY_MS + 2 * MINUTE_MS, True), ("e3", DAY_MS + 3 * MINUTE_MS, False)]
    assert stepped(kept, *views)[1] == []  # again, and superseded


def test_an_absence_is_dated_ahead_and_taken_back_when_the_other_comes() -> None:
    kept, told, _ = stepped(None, row("e0", "add_to_basket", DAY_MS, pin_id="p"))
    assert told == [("e0", DAY_MS + HOUR_MS, False)]
    assert stepped(kept, row("e1", "purchase", DAY_MS + HOUR_MS + 1, pin_id="p"))[1] == []
    assert stepped(kept, row("e1", "purchase", DAY_MS + HOUR_MS, pin_id="q"))[1] == []
    assert stepped(kept, row("e1", "purchase", DAY_MS + HOUR_MS, pin_id="p"))[1] == [
        ("e0", DAY_MS + HOUR_MS, True)
    ]


def test_what_comes_too_late_is_left_to_the_next_base_and_counted() -> None:
    kept, _, left_out = stepped(None, row("e0", "view", 10 * DAY_MS, category="fruit"))
    assert left_out == 0
    late = row("e1", "add_to_basket", 9 * DAY_MS - 2 * HOUR_MS, pin_id="p")
    later, told, left_out = stepped(kept, late, row("e2", "add_to_basket", DAY_MS, pin_id="p"))
    assert (told, left_out) == ([], 2)
    assert len(json.loads(later)[4]) == 2, "what is older than all that can count is not kept"


def test_little_is_kept() -> None:
    kept = None
    for day in range(1, 30):
        views = [row(f"{day}-{n}", "view", day * DAY_MS + n, category="fruit") for n in range(10)]
        kept, _, _ = stepped(kept, *views)
    assert kept is not None
    assert len(json.loads(kept)[4]) <= 20
    impressions = [row(f"i{n}", "impression", 29 * DAY_MS + n, category="fruit") for n in range(100)]
    more, _, _ = stepped(kept, *impressions)
    assert len(more) - len(kept) < 100 * len('"i10":[1,false,1,2592000000000],'), "of these their ranks"


def test_what_no_rule_looks_at_is_not_too_late_and_what_may_have_been_forgotten_is() -> None:
    kept, _, _ = stepped(None, row("e0", "view", 10 * DAY_MS, category="fruit"))
    assert stepped(kept, row("e1", "impression", 7 * DAY_MS))[2] == 0
    assert stepped(kept, row("e1", None, 10 * DAY_MS))[2] == 0, "nothing was forgotten"
    kept, told, _ = stepped(None, row("b0", "add_to_basket", DAY_MS, pin_id="p"))
    assert told == [("b0", DAY_MS + HOUR_MS, False)]
    kept, _, _ = stepped(kept, row("e0", "view", 10 * DAY_MS, category="fruit"))
    _, told, left_out = stepped(kept, row("b0", None, 10 * DAY_MS, version=2))
    assert (told, left_out) == ([], 1), "the firing stands until the next base"


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_base_knew_is_not_cut_off(tmp_path: Path, count: int) -> None:
    patterns = pattern_files.declared(FILE, "here").patterns
    spec = limited(spec_of(lambda: patterns), DAY_MS, count)
    basket = row("b0", "add_to_basket", 30 * DAY_MS, 1, pin_id="p")
    bought = row("b1", "purchase", 30 * DAY_MS + 1, 2, pin_id="p")
    facts = firing.whole(patterns, pa.Table.from_pylist([basket, bought], SCHEMA))
    build.build_local(spec, facts, tmp_path / "b", build.Meta("b", EMPTY, horizon_time_ms=30 * DAY_MS))
    told = firing.step(patterns, None, None, pa.Table.from_pylist([basket], SCHEMA)).facts
    view = views.view(open_base(spec, tmp_path / "b")).folded(told, EMPTY)
    assert isinstance(view, TimelineView)
    assert profiles.fired(view, pattern_files.declared(FILE, "here"), b"u1", 40 * DAY_MS) == []


def test_each_step_outranks_the_steps_before_it_whatever_the_clocks_say() -> None:
    patterns, kept, versions = pattern_files.declared(FILE, "here").patterns, None, []
    basket = row("b", "add_to_basket", DAY_MS, 5, pin_id="p", partition=0)
    bought = row("p", "purchase", DAY_MS + 1, 1, pin_id="p", partition=1)
    for one, broker_s in (
        (basket, 100),
        (bought, 90),
        (row("p", None, DAY_MS, 2, version=2, partition=1), 95),
    ):
        moment = datetime.datetime.fromtimestamp(broker_s, datetime.UTC)
        table = pa.Table.from_pylist([{**one, "broker_time": moment}], SCHEMA)
        made = firing.step(patterns, None, kept, table)
        kept, (told,) = made.kept, made.facts.to_pylist()
        versions.append((tuple(told[f"version_{n}"] for n in (1, 2, 3)), told["is_deleted"]))
    assert versions == [((100_000, 5, 6), False), ((100_000, 5, 8), True), ((100_000, 5, 9), False)]


def test_what_may_have_been_otherwise_after_a_part_of_a_step_is_told_again() -> None:
    basket = row("b0", "add_to_basket", DAY_MS, 1, pin_id="p")
    kept, told, _ = stepped(None, basket)
    bought = row("p", "purchase", DAY_MS + 1, 2, pin_id="p")
    _, again, _ = stepped(kept, bought, row("p", None, DAY_MS, 3, version=2))
    assert again == told == [("b0", DAY_MS + HOUR_MS, False)], "a base may know the purchase alone"
    views = [row(f"e{n}", "view", DAY_MS + n, n, category="fruit") for n in range(4)]
    assert stepped(None, *views)[1] == [("e2", DAY_MS + 2, False)], "one by one it fired nowhere else"
    late = [{**one, "offset": 9 - n} for n, one in enumerate(views)]
    assert stepped(None, *late)[1] == [("e2", DAY_MS + 2, False), ("e3", DAY_MS + 3, True)]


def test_a_life_that_did_not_begin_at_the_beginning_judges_what_it_knows_all_of() -> None:
    patterns = pattern_files.declared(FILE, "here").patterns

    def told(unread_ms: int | None, *rows: dict[str, Any]) -> list[str]:
        made = firing.step(patterns, unread_ms, None, pa.Table.from_pylist(list(rows), SCHEMA))
        return [one["id"][-2:].decode() for one in made.facts.to_pylist() if not one["is_deleted"]]

    begun = 10 * DAY_MS
    early = [row(f"e{n}", "view", begun + n, category="fruit") for n in range(3)]
    later = [
        row(f"f{n}", "view", begun + HOUR_MS + 20 * MINUTE_MS + 1 + n, category="fruit") for n in range(3)
    ]
    assert told(None, *early, *later) == ["e2", "f2"]
    assert told(begun, *early, *later) == ["f2"], "an event may be an hour ahead of the broker's time"
    assert told(40 * DAY_MS, *early, *later) == [], "an old log, read late"
    beyond = [row(f"g{n}", "view", begun + patterns.kept_ms + 1 + n, category="fruit") for n in range(3)]
    assert told(40 * DAY_MS, *early, *beyond) == ["g2"], "nobody is later than the lateness"


def test_of_a_user_with_too_many_events_the_oldest_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing, "MAX_EVENTS", 50)
    patterns = pattern_files.declared(FILE, "here").patterns
    views = [row(f"e{n:03}", "view", DAY_MS + n * MINUTE_MS, n, category="fruit") for n in range(200)]
    made = firing.step(patterns, None, None, pa.Table.from_pylist(views, SCHEMA))
    assert (made.left_out, made.crowded_out, len(json.loads(made.kept)[4])) == (0, 150, 50)
    early = row("e0-1", "view", DAY_MS + 1, 200, category="fruit")
    assert stepped(made.kept, early)[1] == [], "what it hangs on may be forgotten"
    after = [row(f"f{n}", "view", DAY_MS + HOUR_MS * 5 + n, 300 + n, category="fruit") for n in range(3)]
    assert stepped(made.kept, *after)[1] == [("f2", DAY_MS + HOUR_MS * 5 + 2, False)]


def test_a_burst_costs_about_as_much_as_it_is_long() -> None:
    def took_s(count: int) -> float:
        views = [
            row(f"e{n}", "view", DAY_MS + n * 7919 % (10 * MINUTE_MS), n, category="fruit")
            for n in range(count)
        ]
        began = time.process_time()
        stepped(None, *views)
        return time.process_time() - began

    took_s(100)
    assert took_s(8_000) < 16 * 4 * took_s(500)


# ------------------------------------------------------------------------------------------------ over HTTP


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    settings = small_settings(tmp_path_factory.mktemp("serving"), SERVING__MAX_WAIT_MS=300)
    world.build_world(settings)
    with world.followed(settings) as replica:
        yield settings, replica


@pytest.fixture
def replica(home: Any) -> Any:
    return world.still(home[1])


@pytest.fixture
def client(home: Any, replica: Any) -> Client:
    return Client(create_app(home[0], replica, patterns=pattern_files.declared(FILE, "here")))


def fire(replica: Any, *rows: dict[str, Any], user: str = "u1") -> None:
    """What a stream tells of rows, in the view."""
    patterns = pattern_files.declared(FILE, "here").patterns
    table = pa.Table.from_pylist([{**one, "user_id": user} for one in rows], SCHEMA)
    follower = replica.followers["user_profiles"]
    follower.view = follower.view.folded(firing.step(patterns, None, None, table).facts, EMPTY)


def test_a_profile(client: Client, replica: Any) -> None:
    now_ms = world.NEWEST_MS
    before = client.get(f"/v1/users/nobody/profile?now_ms={now_ms}").json
    assert before == {
        "user_id": "nobody",
        "interests": [],
        "segments": [],
        "last_seen": None,
        "firings": [],
        "basis": {"now_ms": now_ms},
    }
    happened, _ = world.event("nobody", "v", "1", "view", now_ms - 7 * DAY_MS)  # pin 1 is bread
    replica.followers["user_events"].fold([happened])
    views = [row(f"e{n}", "view", now_ms - 7 * MINUTE_MS + n, category="milk") for n in range(3)]
    basket = row("b0", "add_to_basket", now_ms - 8 * DAY_MS, pin_id="0")
    soon = row("b1", "add_to_basket", now_ms - HOUR_MS + 1, pin_id="2")
    fire(replica, *views, basket, soon, user="nobody")
    said = client.get(f"/v1/users/nobody/profile?now_ms={now_ms}").json
    assert said["last_seen"] == "2023-11-07T22:13:20.000Z"
    assert [(one["category"], one["of_events"]) for one in said["interests"]] == [
        ("milk", 0.0),
        ("bread", 0.5),
    ]
    assert said["interests"][0]["weight"] == pytest.approx(2.0, rel=0.01)
    (fired,) = said["firings"]
    assert fired["rule"] == "looks" and fired["event_id"] == "e2" and fired["value"] == "milk"
    assert said["segments"] == [{"segment": "keen", "until": fired["until"]}]
    later = client.get(f"/v1/users/nobody/profile?now_ms={now_ms + 1}").json
    assert [one["category"] for one in later["firings"]] == ["milk", "milk"], "the basket's is by its pin"
    assert client.get(f"/v1/users/nobody/profile?now_ms={now_ms + 3 * DAY_MS}").json["firings"] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [("k=0", "k"), ("now_ms=x", "now_ms"), ("more=1", "more"), ("min_position=x", "min_position")],
)
def test_a_bad_question_is_refused_by_its_field(client: Client, query: str, field: str) -> None:
    assert client.get(f"/v1/users/u1/profile?{query}", 400).json["error"]["field"] == field


@pytest.mark.parametrize("user", ["u1", "nobody"])
def test_an_interest_that_fired_is_in_the_next_recommendations(
    client: Client, replica: Any, user: str
) -> None:
    url = f"/v1/users/{user}/recommendations"
    before = client.get(f"{url}?k=9")
    assert set(before.json["basis"]) == {"kind", "events_used", "model_id", "window_days"}
    assert "user_profiles" not in before.headers["tidemark-base-version"]
    now_ms = int(time.time() * 1000)
    fire(replica, *[row(f"e{n}", "view", now_ms - 3 + n, category="milk") for n in range(3)], user=user)
    after = client.get(f"{url}?k=9")
    (interest,) = after.json["basis"]["interests"]
    assert interest["category"] == "milk" and interest["weight"] == pytest.approx(2.0, rel=0.01)
    assert after.json["basis"]["segments"] == ["keen"]
    assert "user_profiles" in after.headers["tidemark-base-version"]
    pins = [one["pin_id"] for one in after.json["recommendations"]]
    plain = [one["pin_id"] for one in before.json["recommendations"]]
    of_category = client.get(f"{url}?k=9&category=milk").json["recommendations"]
    milk = [one["pin_id"] for one in of_category]
    assert len(set(pins)) == len(pins) == 9
    assert pins[:2] == plain[:2] and {pins[2], pins[5], pins[8]} <= set(milk)
    assert all(after.json["recommendations"][n]["catalogue"]["category"] == "milk" for n in (2, 5, 8))
    everything = [one["pin_id"] for one in client.get(f"{url}?k=500").json["recommendations"]]
    assert len(set(everything)) == len(everything) and world.UNAVAILABLE not in everything


def test_a_firing_of_a_rule_that_has_changed_is_not_shown(home: Any, replica: Any) -> None:
    now_ms = int(time.time() * 1000)
    fire(replica, *[row(f"e{n}", "view", now_ms - 3 + n, category="milk") for n in range(3)])
    other = pattern_files.declared(changed("rules.0.count.at_least", 2), "here")
    said = Client(create_app(home[0], replica, patterns=other)).get("/v1/users/u1/profile").json
    assert said["firings"] == []


# ------------------------------------------------------------------------------------------------ the command line


def test_rules_are_listed_and_checked(tmp_path: Path) -> None:
    run, file = CliRunner(), tmp_path / "patterns.yaml"
    listed = json.loads(run.invoke(cli.app, ["patterns", "--json"]).stdout)["rules"]
    assert [rule["name"] for rule in listed] == [rule.name for rule in pattern_files.load().patterns.rules]
    assert run.invoke(cli.app, ["patterns"]).exit_code == 0
    file.write_text(yaml.safe_dump(FILE))
    assert run.invoke(cli.app, ["patterns", "check", "--file", str(file)]).exit_code == 0
    file.write_text(yaml.safe_dump(changed("rules.0.count.by", "colour")))
    assert isinstance(run.invoke(cli.app, ["patterns", "check", "--file", str(file)]).exception, BadPattern)
    for arguments in (["nobody"], ["--from", "soon"], ["--from", "2017-02-01", "--to", "2017-01-01"]):
        assert run.invoke(cli.app, ["patterns", "dry-run", *arguments]).exit_code == 1


def test_what_lasts_is_what_fired_and_is_not_over(client: Client, replica: Any) -> None:
    """What fired too long ago to last is not read; the profile of a user with many firings is that of the few."""
    declared = pattern_files.declared(FILE, "here")
    start_ms = world.NEWEST_MS - 60 * DAY_MS
    days = [row(f"e{n}", "view", start_ms + n * HOUR_MS // 60, category="milk") for n in range(3)]
    for day in range(30):
        moved = [one | {"event_id": f"{day}{one['event_id']}"} for one in days]
        later = datetime.timedelta(days=day)
        fire(replica, *(one | {"event_time": one["event_time"] + later} for one in moved), user="often")
    views = [replica.followers[name].view for name in ("user_profiles", "pins")]
    longest_ms = max(rule.lasts_ms for rule in declared.patterns.rules)
    found = profiles.fired(views[0], declared, b"often", world.NEWEST_MS)
    assert len(found) == 30
    ends = {one.until_ms + by for one in found for by in (-1, 0)}
    for now_ms in sorted({start_ms, start_ms + longest_ms, world.NEWEST_MS, *ends}):
        begun = profiles.fired(views[0], declared, b"often", now_ms)
        wanted = [one for one in begun if now_ms < one.until_ms]
        assert profiles.lasting(views[0], views[1], declared, b"often", now_ms) == wanted
    before = client.get(f"/v1/users/often/profile?now_ms={found[0].at_ms}").json
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.serving.routes.profiles.FEW_ROWS", 0)  # aside, and the same
        assert client.get(f"/v1/users/often/profile?now_ms={found[0].at_ms}").json == before
