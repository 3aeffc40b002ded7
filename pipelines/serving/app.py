"""The application: everything that serving answers, over one replica.

Belongs here: putting the routes together, and what is said where no route answers. Starting threads and servers is
`__main__`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from pipelines import indices
from pipelines.serving.inputs import Problem
from pipelines.serving.metrics import Metrics
from pipelines.serving.routes import (
    ads,
    counters,
    follows,
    frequency,
    pages,
    pins,
    profiles,
    sequences,
    status,
    users,
)
from pipelines.serving.routing import trace_of
from pipelines.serving.standing import EVENTS, Ground
from pipelines.users import pattern_files, sequence_files
from pipelines.users.frequency import RULES_FILE, Rule, require_inside
from pipelines.users.frequency import load as load_rules

if TYPE_CHECKING:
    from pipelines.indexing.replica import Replica
    from pipelines.settings import Settings
    from pipelines.users.pattern_files import Declared

DESCRIPTION = (
    "Answers of Tidemark: each is a base version merged with what came after it, and says in its headers what it "
    "stands on. `Tidemark-Position`, or the position that the collector gave, can be passed as `min_position`."
)
log = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    replica: Replica,
    rules: Sequence[Rule] | None = None,
    patterns: Declared | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        settings: Of serving.
        replica: Of every index; whoever made it starts and stops it.
        rules: Of frequency; None: those of `conf/frequency.yaml`.
        patterns: Of profiles; None: those of `conf/patterns.yaml`.

    Raises:
        BadRule, BadPattern: Such a file has a rule that cannot be read, or that reaches back further than timelines do.
    """
    app = FastAPI(
        title="Tidemark",
        version="1",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.router.redirect_slashes = False
    app.state.metrics = Metrics(replica)
    ground = Ground(replica, settings.serving.max_wait_ms)
    declared = pattern_files.load() if patterns is None else patterns
    users.register(app, ground, declared)
    profiles.register(app, ground, declared)
    follows.register(app, ground)
    counters.register(app, ground)
    frequency.register(app, ground, _rules(settings) if rules is None else rules)
    pins.register(app, ground)
    ads.register(app, ground)
    sequences.register(app, ground, sequence_files.load())
    status.register(app, ground)
    pages.register(app, settings.paths.reports)
    paths = list(app.openapi()["paths"])

    async def unknown(request: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 404
        problem = Problem(code, "path", "there is no such route", paths)
        return Response(problem.body(), code, media_type="application/json")

    async def broken(request: Request, error: Exception) -> Response:
        trace = trace_of(request.scope)
        log.error("a request failed", exc_info=error, extra={**trace.fields, "path": request.url.path})
        problem = Problem(
            500,
            "server",
            "an error of the server; `tidemark logs --trace` with its X-Request-Id says more",
            None,
        )
        return Response(problem.body(), 500, trace.headers, "application/json")

    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, broken)
    return app


def _rules(settings: Settings) -> Sequence[Rule]:
    found = load_rules(RULES_FILE)
    require_inside(found, indices.horizon_ms(settings, indices.INDICES[EVENTS]))
    return found
