"""Routes about pins: documents, counts, similar pins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.contracts import ACTIONS
from pipelines.errors import TidemarkError
from pipelines.recommend import candidates
from pipelines.serving import documents, operations
from pipelines.serving.inputs import MAX_K, MAX_TIME_MS, Problem, read_batch
from pipelines.serving.routing import Answer, Call, add, json_answer
from pipelines.serving.standing import COUNTS, PINS, Standing

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground


def register(app: FastAPI, ground: Ground) -> None:
    """Add the routes."""

    async def pin(call: Call) -> Answer:
        standing = await ground.at(call.query("min_position").min_position(), PINS)
        key = call.ids["pin_id"]
        found = standing.views[PINS].get([key], candidates.FAMILIES)[0]
        if found is None:
            raise _no_pin(standing)
        return json_answer(documents.document(key, found), standing.headers)

    async def counts(call: Call) -> Answer:
        query = call.query("from_ms", "to_ms", "min_position")
        from_ms, to_ms = (
            query.optional_natural("from_ms", 0, MAX_TIME_MS),
            query.optional_natural("to_ms", 0, MAX_TIME_MS),
        )
        standing = await ground.at(query.min_position(), COUNTS)
        view, key = standing.views[COUNTS], call.ids["pin_id"]
        try:
            hours = view.sums(key, view.base.horizon_from_ms if from_ms is None else from_ms, to_ms)
        except TidemarkError as error:  # before the horizon, or too much for 64 bits
            raise Problem(
                400, "from_ms", error.what, error.remedy or "a narrower window", standing.headers
            ) from None
        totals = [sum(column) for column in zip(*hours.values(), strict=True)] or [0] * len(ACTIONS)
        return json_answer(
            {
                "pin_id": documents.text(key),
                "totals": _by_action(totals),
                "hours": [
                    {"start_time": time, **_by_action(amounts)}
                    for time, amounts in zip(
                        documents.times_of(np.array(list(hours), np.int64)), hours.values(), strict=True
                    )
                ],
            },
            standing.headers,
        )

    async def similar(call: Call) -> Answer:
        query = call.query("k", "category", "min_position")
        k, category = query.natural("k", 10, 1, MAX_K), query.text("category")
        standing = await ground.at(query.min_position(), PINS, COUNTS)
        pins, key = standing.views[PINS], call.ids["pin_id"]
        found = pins.get([key], ("catalogue",))[0]
        if found is None:
            raise _no_pin(standing)
        answer = candidates.similar(pins, ground.parameters(pins), key, k, category)
        if answer is None:
            popularity = ground.popularity(standing.views[COUNTS])
            category = category or found["catalogue"]["category"]
            answer = await ground.aside(candidates.of_category, pins, popularity, category, k, {key})
        return json_answer(
            {
                "pin_id": documents.text(key),
                "similar": documents.items(answer),
                "basis": documents.basis(answer),
            },
            standing.headers,
        )

    async def batch_get(call: Call) -> Answer:
        position = call.query("min_position").min_position()
        batch = read_batch(await call.body(), call.header(b"content-type"), "pin_ids")
        standing = await ground.at(position, PINS)
        found = standing.views[PINS].get(batch.keys, candidates.FAMILIES)
        written = [
            documents.missing(pin) if one is None else documents.document(key, one)
            for pin, key, one in zip(batch.ids, batch.keys, found, strict=True)
        ]
        return json_answer({"documents": written}, standing.headers)

    add(app, "GET", "/v1/pins/{pin_id}", pin, operations.PIN_DOCUMENT)
    add(app, "GET", "/v1/pins/{pin_id}/counts", counts, operations.COUNTS)
    add(app, "GET", "/v1/pins/{pin_id}/similar", similar, operations.SIMILAR)
    add(app, "POST", "/v1/pins:batchGet", batch_get, operations.BATCH_GET)


def _by_action(amounts: list[int] | tuple[int, ...]) -> dict[str, int]:
    return dict(zip(ACTIONS, amounts, strict=True))


def _no_pin(standing: Standing) -> Problem:
    return Problem(
        404, "pin_id", "there is no such pin, or it was deleted", "the id of a pin", standing.headers
    )
