"""The route about what may be shown by rules of frequency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.contracts import OBJECTS
from pipelines.serving import documents, operations
from pipelines.serving.inputs import (
    MAX_K,
    Problem,
    now_ms_of,
    object_of,
    read_object,
    text_of,
    texts_of,
)
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import EVENTS
from pipelines.users import frequency
from pipelines.users.frequency import Broken, Rule

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground

_CANDIDATE = dict.fromkeys(OBJECTS, "a text")
_BODY = {
    "user_id": "an id",
    "candidates": [_CANDIDATE],
    "rules": "a list of one or more names of rules; all, if it is absent",
    "now_ms": "ms since 1970; now, if it is absent",
}
Said = dict[str, Any]


def register(app: FastAPI, ground: Ground, rules: Sequence[Rule]) -> None:
    """Add the route."""
    by_name = {rule.name: rule for rule in rules}

    async def check(call: Call) -> Answer:
        position = call.query("min_position").min_position()
        said = read_object(await call.body(), call.header(b"content-type"), _BODY)
        user = text_of(said.get("user_id"), "user_id").encode()
        candidates, asked = _candidates(said), _rules(said, by_name)
        now_ms = now_ms_of(said)
        standing = await ground.at(position, EVENTS)
        found = frequency.check(standing.views[EVENTS], asked, user, candidates, now_ms)
        judged = [{"is_allowed": not of_one, "broken": list(map(_told, of_one))} for of_one in found.broken]
        basis = {
            "now_ms": now_ms,
            "rules": [rule.name for rule in asked],
            "is_complete": not found.incomplete,
            "incomplete_rules": [rule.name for rule in found.incomplete],
        }
        answer = {"user_id": documents.text(user), "candidates": judged, "basis": basis}
        return json_answer(answer, standing.headers)

    add(app, "POST", "/v1/frequency:check", check, operations.FREQUENCY)


def _told(broken: Broken) -> Said:
    rule, measured = broken.rule, broken.measured
    return {
        "rule": rule.name,
        rule.per: broken.value,
        rule.kind: rule.limit,
        "measured": measured if rule.kind == "fatigue" else int(measured),
    }


def _candidates(said: Said) -> list[dict[str, str]]:
    given, allowed = (
        said.get("candidates"),
        f"a list of 1 to {MAX_K} objects with some of {', '.join(OBJECTS)}",
    )
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_K:
        raise Problem(400, "candidates", "it is not such a list", allowed)
    found = []
    for place, one in enumerate(given):
        path = f"candidates[{place}]"
        named = object_of(one, path, _CANDIDATE)
        if not named:
            raise Problem(400, path, "it names nothing", allowed)
        found.append({name: text_of(value, f"{path}.{name}") for name, value in named.items()})
    return found


def _rules(said: Said, by_name: dict[str, Rule]) -> list[Rule]:
    if said.get("rules") is None:
        return list(by_name.values())
    names = texts_of(said, "rules", "rules")
    if not names:
        raise Problem(400, "rules", "there are no names of rules", list(by_name))
    return [by_name[text_of(name, f"rules[{place}]", list(by_name))] for place, name in enumerate(names)]
