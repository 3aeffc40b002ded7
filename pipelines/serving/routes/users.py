"""Routes about users: recommendations and events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.recommend import candidates
from pipelines.serving import documents, operations
from pipelines.serving.inputs import MAX_K, MAX_LIMIT, cursor_of
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import COUNTS, EVENTS, PINS
from pipelines.users.index import OWN

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground

SAID = ("id", "time_ms", *OWN.names, "features")
"""Of an event, what it says itself, and what was found out later."""


def register(app: FastAPI, ground: Ground) -> None:
    """Add the routes."""

    async def recommendations(call: Call) -> Answer:
        query = call.query("k", "category", "min_position")
        k, category = query.natural("k", 10, 1, MAX_K), query.text("category")
        standing = await ground.at(query.min_position(), PINS, EVENTS, COUNTS)
        pins, events, user = standing.views[PINS], standing.views[EVENTS], call.ids["user_id"]
        personal = ground.personal(pins, events)
        answer = personal.answer(pins, events, user, k, category)
        if answer is None:
            popularity = ground.popularity(standing.views[COUNTS])
            settled = set(personal.taste(pins, events, user).settled.keys)
            answer = await ground.aside(candidates.popular, pins, popularity, k, category, settled)
        return json_answer(
            {
                "user_id": documents.text(user),
                "recommendations": documents.items(answer),
                "basis": documents.basis(answer),
            },
            standing.headers,
        )

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
