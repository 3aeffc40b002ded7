"""The web pages: `/`, which shows indices and a user's recommendations, and `/docs`, which shows the OpenAPI document.

Both are files beside this package, and load nothing from elsewhere. Under `/reports/` is what others generate: static
pages in the folder `paths.reports`, as they are at the moment.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from pipelines.serving.routing import Answer, Call, add, json_answer

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGES = Path(__file__).resolve().parents[1] / "pages"
HTML = "text/html; charset=utf-8"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


def register(app: FastAPI, reports: Path) -> None:
    """Add the pages, and those in a folder of reports; they are not part of the OpenAPI document."""
    home, docs = (PAGES / "home.html").read_bytes(), (PAGES / "docs.html").read_bytes()

    async def show_home(call: Call) -> Answer:
        return Answer(home, HEADERS, content_type=HTML)

    async def show_docs(call: Call) -> Answer:
        return Answer(docs, HEADERS, content_type=HTML)

    async def openapi(call: Call) -> Answer:
        return json_answer(app.openapi())

    for path, endpoint in (("/", show_home), ("/docs", show_docs), ("/openapi.json", openapi)):
        add(app, "GET", path, endpoint, {"summary": path}, is_documented=False)
    reports.mkdir(parents=True, exist_ok=True)
    app.mount("/reports", _Reports(directory=reports, html=True))


class _Reports(StaticFiles):
    """Files of a folder, under the rules of the other pages."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """As Starlette's, with the headers of a page."""
        response = super().file_response(*arguments, **options)
        response.headers.update({**HEADERS, "Cache-Control": "no-cache"})
        return response
