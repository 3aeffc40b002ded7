"""The route about what a user is like now: interests, segments, what fired."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.serving import documents, operations
from pipelines.serving.inputs import MAX_K, MAX_TIME_MS
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import EVENTS, PINS, PROFILES
from pipelines.users import profiles

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground
    from pipelines.users.pattern_files import Declared
    from pipelines.users.profiles import Firing, Profile

FEW_ROWS = 5_000
"""A profile of so few events and firings, which takes 2 ms or so, is read at once; others aside, one at a time."""


def register(app: FastAPI, ground: Ground, declared: Declared) -> None:
    """Add the route."""

    async def profile(call: Call) -> Answer:
        query = call.query("k", "now_ms", "min_position")
        k, asked_ms = query.natural("k", 10, 1, MAX_K), query.optional_natural("now_ms", 0, MAX_TIME_MS)
        now_ms = int(time.time() * 1000) if asked_ms is None else asked_ms
        standing = await ground.at(query.min_position(), PROFILES, EVENTS, PINS)
        of_fired, events, pins = (standing.views[name] for name in (PROFILES, EVENTS, PINS))
        user = call.ids["user_id"]
        asked = (of_fired, events, pins, declared, user, now_ms)
        is_quick = of_fired.rows_of([user]) + events.rows_of([user]) <= FEW_ROWS
        found = profiles.read(*asked) if is_quick else await ground.aside(profiles.read, *asked)
        return json_answer(
            {"user_id": documents.text(user), **_told(found, k), "basis": {"now_ms": now_ms}},
            standing.headers,
        )

    add(app, "GET", "/v1/users/{user_id}/profile", profile, operations.PROFILE)


def _told(found: Profile, k: int) -> dict[str, Any]:
    return {
        "interests": [one._asdict() for one in found.interests[:k]],
        "segments": [
            {"segment": name, "until": _time(until_ms)} for name, until_ms in found.segments.items()
        ],
        "last_seen": None if found.last_seen_ms is None else _time(found.last_seen_ms),
        "firings": [_firing(one) for one in found.firings],
    }


def _firing(one: Firing) -> dict[str, Any]:
    said = one._asdict()
    fired_at, until = _time(said.pop("at_ms")), _time(said.pop("until_ms"))
    return {"rule": said.pop("rule"), "fired_at": fired_at, "until": until, **said}


def _time(time_ms: int) -> str:
    return documents.times_of(np.array([time_ms]))[0]
