"""Pages that other processes write as files, shown as they are: `/quality/index.html`, what audits found.

Belongs here: finding the file, and nothing of what it says (`quality.pages`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.serving.inputs import Problem
from pipelines.serving.routes.pages import HEADERS, HTML
from pipelines.serving.routing import Answer, Call, add

if TYPE_CHECKING:
    from fastapi import FastAPI

_NAME = re.compile(r"[a-z][a-z0-9_.]*\.html")


def register(app: FastAPI, folder: Path) -> None:
    """Add the pages of a folder; they are not part of the OpenAPI document."""

    async def show_quality(call: Call) -> Answer:
        name = call.ids["page"].decode("utf-8", "replace")
        path = folder / "quality" / name
        if not _NAME.fullmatch(name) or not path.is_file():
            raise Problem(404, "page", "there is no such page; a build makes them", "index.html")
        return Answer(path.read_bytes(), HEADERS, content_type=HTML)

    async def show_all(call: Call) -> Answer:
        return Answer(b"", {"Location": "/quality/index.html"}, 307, HTML)

    add(app, "GET", "/quality", show_all, {"summary": "/quality"}, is_documented=False)
    add(app, "GET", "/quality/{page}", show_quality, {"summary": "/quality"}, is_documented=False)
