"""Routes about what users follow: their follows, and the inbox that these make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.serving import documents, operations
from pipelines.serving.inputs import MAX_ID_BYTES, MAX_LIMIT, cursor_of
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import CHANGES, EVENTS, FOLLOWS
from pipelines.users import inbox

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground

MAX_KEY_BYTES = 2 * MAX_ID_BYTES + 2
"""Of a place in a list of these: a kind, a user and an event."""
FEW_FOLLOWS, FEW_ROWS = 100, 2_000
"""An inbox of so few, with so few rows about what is followed, which takes 4 ms or so, is put together at once; others
aside, one at a time."""


def register(app: FastAPI, ground: Ground) -> None:
    """Add the routes."""

    async def follows(call: Call) -> Answer:
        query = call.query("limit", "cursor", "min_position")
        limit, before = query.natural("limit", 100, 1, MAX_LIMIT), query.cursor(MAX_KEY_BYTES)
        standing = await ground.at(query.min_position(), FOLLOWS)
        user = call.ids["user_id"]
        found = inbox.follows(standing.views[FOLLOWS], user, limit, before)
        following = None if found.following is None else cursor_of(*found.following)
        return json_answer(
            {
                "user_id": documents.text(user),
                "follows": documents.follows(found.follows),
                "is_complete": True,  # a follow has no horizon
                "next_cursor": following,
            },
            standing.headers,
        )

    async def box(call: Call) -> Answer:
        query = call.query("limit", "cursor", "min_position")
        limit, before = query.natural("limit", 100, 1, MAX_LIMIT), query.cursor(MAX_KEY_BYTES)
        standing = await ground.at(query.min_position(), FOLLOWS, CHANGES, EVENTS)
        views, user = standing.views, call.ids["user_id"]
        mine = inbox.follows(views[FOLLOWS], user)
        asked = (mine, views[CHANGES], views[EVENTS], limit, before)
        is_quick = len(mine.follows) <= FEW_FOLLOWS and inbox.rows_of(*asked[:3]) <= FEW_ROWS
        found = inbox.read(*asked) if is_quick else await ground.aside(inbox.read, *asked)
        return json_answer(
            {
                "user_id": documents.text(user),
                "entries": documents.inbox(found.entries),
                "follows_read": len(mine.follows),
                "has_more_follows": mine.following is not None,
                "is_complete": found.is_complete,
                "next_cursor": None if found.following is None else cursor_of(*found.following),
            },
            standing.headers,
        )

    add(app, "GET", "/v1/users/{user_id}/follows", follows, operations.FOLLOWS)
    add(app, "GET", "/v1/users/{user_id}/inbox", box, operations.INBOX)
