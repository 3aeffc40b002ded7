"""Routes about users: recommendations and events."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipelines.recommend import candidates
from pipelines.serving import documents, operations
from pipelines.serving.inputs import MAX_K, MAX_LIMIT, cursor_of
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import COUNTS, EVENTS, PINS, PROFILES
from pipelines.users import profiles
from pipelines.users.index import OWN

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground, Standing
    from pipelines.users.pattern_files import Declared

SAID = ("id", "time_ms", *OWN.names, "features")
"""Of an event, what it says itself, and what was found out later."""


def register(app: FastAPI, ground: Ground, declared: Declared) -> None:
    """Add the routes."""

    async def recommendations(call: Call) -> Answer:
        query = call.query("k", "category", "min_position")
        k, category = query.natural("k", 10, 1, MAX_K), query.text("category")
        standing = await ground.at(query.min_position(), PINS, EVENTS, COUNTS)
        user, now_ms = call.ids["user_id"], int(time.time() * 1000)
        of_fired = ground.now(PROFILES).views[
            PROFILES
        ]  # what fired is used as far as it is told: nobody waits for it
        firings = profiles.lasting(of_fired, standing.views[PINS], declared, user, now_ms)
        if firings:
            standing = ground.now(PINS, EVENTS, COUNTS, PROFILES)
        answer = await _best(ground, standing, user, k, category)
        basis = documents.basis(answer)
        if firings:
            weights = profiles.of_firings(firings, declared, now_ms)
            liked = [name for name, weight in weights.items() if weight > 0][: candidates.MOST_LIKED]
            liked = [] if category is not None else liked
            of_liked = [(await _best(ground, standing, user, k, name)).items for name in liked]
            answer = answer._replace(items=candidates.mixed(answer, of_liked, k))
            used = [{"category": name, "weight": weights[name]} for name in liked]
            basis |= {"interests": used, "segments": list(profiles.segments(firings))}
        said = {"user_id": documents.text(user), "recommendations": documents.items(answer), "basis": basis}
        return json_answer(said, standing.headers)

    async def events(call: Call) -> Answer:
        query = call.query("limit", "cursor", "min_position")
        limit, before = query.natural("limit", 100, 1, MAX_LIMIT), query.cursor()
        standing = await ground.at(query.min_position(), EVENTS)
        user = call.ids["user_id"]
        found = standing.views[EVENTS].timeline(user, limit + 1, before, SAID)
        page = found.table.slice(0, limit)
        following = None
        if found.table.num_rows > limit:
            following = cursor_of(page.column("time_ms")[-1].as_py(), page.column("id")[-1].as_py())
        return json_answer(
            {
                "user_id": documents.text(user),
                "events": documents.events(page),
                "is_complete": found.is_complete or following is not None,
                "next_cursor": following,
            },
            standing.headers,
        )

    add(app, "GET", "/v1/users/{user_id}/recommendations", recommendations, operations.RECOMMENDATIONS)
    add(app, "GET", "/v1/users/{user_id}/events", events, operations.EVENTS)


async def _best(
    ground: Ground, standing: Standing, user: bytes, k: int, category: str | None
) -> candidates.Answer:
    """What to recommend by the user's vector, or else what is popular; of one category, or of all."""
    pins, events = standing.views[PINS], standing.views[EVENTS]
    personal = ground.personal(pins, events)
    answer = personal.answer(pins, events, user, k, category)
    if answer is not None:
        return answer
    popularity = ground.popularity(standing.views[COUNTS])
    settled = set(personal.taste(pins, events, user).settled.keys)
    return await ground.aside(candidates.popular, pins, popularity, k, category, settled)
