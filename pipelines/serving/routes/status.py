"""Routes about the process: indices, health, readiness, metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pipelines.serving import metrics as numbers
from pipelines.serving import operations
from pipelines.serving.routing import Answer, Call, add, json_answer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pipelines.serving.standing import Ground


def register(app: FastAPI, ground: Ground) -> None:
    """Add the routes."""

    def described() -> list[dict[str, Any]]:
        status = ground.replica.status()
        return [
            {**said, "versions": ground.replica.followers[index].versions.names()}
            for index, said in status.items()
        ]

    async def indices(call: Call) -> Answer:
        call.query()
        return json_answer({"indices": await asyncio.to_thread(described)})

    async def health(call: Call) -> Answer:
        return json_answer({"status": "ok"})

    async def ready(call: Call) -> Answer:
        waiting = [index for index, follower in ground.replica.followers.items() if not follower.is_ready]
        if waiting:
            return json_answer({"status": "starting", "waiting_for": waiting}, status=503)
        return json_answer({"status": "ready"})

    async def metrics(call: Call) -> Answer:
        return Answer(await asyncio.to_thread(app.state.metrics.text), content_type=numbers.CONTENT_TYPE)

    add(app, "GET", "/v1/indices", indices, operations.INDICES)
    add(app, "GET", "/healthz", health, operations.HEALTH)
    add(app, "GET", "/readyz", ready, operations.READY)
    add(app, "GET", "/metrics", metrics, operations.METRICS)
