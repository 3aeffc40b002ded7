"""What the tests of pages share: a browser, and a serving process with reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pipelines.settings import Settings
from tests import serving_world as world
from tests.browser.browsing import CHROMIUM, SIZES, Opener, is_foreign
from tests.conftest import small_settings
from tests.faults import running

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a browser, the tests of this folder are skipped and say how to get one."""
    for item in items:
        if CHROMIUM is None and Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="no browser: sudo apt-get install -y chromium"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One for the run."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Iterator[Settings]:
    """A serving process that shows the catalogue of signals, pages of quality, and notebooks."""
    from tests.browser import written

    settings = small_settings(tmp_path_factory.mktemp("reports") / "home")
    world.build_world(settings)
    written.signals(settings, spark)
    written.quality(settings)
    written.account(settings)
    written.notebooks(settings)
    with running.everything_stopped(settings):
        running.start(settings, "serving")
        running.await_that(lambda: running.tidemark_ready(settings), "serving to be ready", 30)
        yield settings


@pytest.fixture(params=SIZES)
def open_report(request: pytest.FixtureRequest, browser: Browser, reports: Settings) -> Iterator[Opener]:
    """Opens pages under `/reports/` at both sizes, the wide one light and the narrow one dark.

    Whatever the console says, and whatever is asked of another host, is an error of the test.
    """
    width, height = SIZES[request.param]
    scheme = "light" if request.param == "wide" else "dark"
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    origin = f"http://{reports.serving.host}:{reports.serving.port}"
    said: list[str] = []
    asked: list[str] = []

    def opened(path: str) -> Page:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda one: asked.append(one.url))
        answer = page.goto(f"{origin}/reports/{path}")
        assert answer is not None and answer.ok
        return page

    yield opened
    context.close()
    assert said == []
    assert [url for url in asked if is_foreign(url, urlsplit(origin).netloc)] == []
