"""The web pages of serving in a real browser: what their scripts make of real answers."""

from __future__ import annotations

import html
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.settings import Settings
from tests import serving_world as world
from tests.browser.browsing import CHROMIUM
from tests.conftest import small_settings
from tests.faults import running

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=4000",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    settings = small_settings(tmp_path_factory.mktemp("pages") / "home")
    world.build_world(settings)
    with running.everything_stopped(settings):
        running.start(settings, "serving")
        running.await_that(lambda: running.tidemark_ready(settings), "serving to be ready", 30)
        yield settings


@pytest.fixture
def page(served: Settings, tmp_path: Path) -> Opener:
    return Opener(served, tmp_path)


class Opener:
    """Opens a page and gives its text once its scripts have run."""

    def __init__(self, settings: Settings, profile: Path) -> None:
        self._url = f"http://{settings.serving.host}:{settings.serving.port}"
        self._profile = profile

    def __call__(self, path: str) -> str:
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}", "--dump-dom", self._url + path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        body = re.sub(r"<script.*?</script>|<style.*?</style>", " ", done.stdout, flags=re.DOTALL)
        return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_the_home_page_shows_every_index_and_what_it_stands_on(page: Opener, served: Settings) -> None:
    text = page("/")
    for index in running.serving(served, "/v1/indices").body["indices"]:
        assert index["index"] in text
        assert index["base_version"] in text
    assert "Loading" not in text


def test_a_link_to_a_user_shows_the_recommendations_that_serving_gives(
    page: Opener, served: Settings
) -> None:
    answer = running.serving(served, "/v1/users/u0/recommendations", k=5).body
    text = page("/?user=u0&k=5")
    assert f"5 for user u0 {' '.join(heads())}" in text
    for item in answer["recommendations"]:
        assert item["pin_id"] in text
        assert f"{item['score']:.5f}" in text
    assert f"{answer['basis']['kind']}, {answer['basis']['events_used']} events" in text


def heads() -> list[str]:
    return ["Pin", "Title", "Category", "Price", "Score"]


def test_what_serving_refuses_is_said_on_the_page(page: Opener) -> None:
    assert "k: " in page("/?user=u0&k=0")


def test_markup_in_a_name_stays_text(page: Opener) -> None:
    text = page("/?user=%3Cimg%20src%3Dx%20onerror%3D%22document.title%3D1%22%3E&k=1")
    assert "for user <img src=x onerror" in text


def test_the_documentation_lists_every_route(page: Opener, served: Settings) -> None:
    text = page("/docs")
    for path in running.serving(served, "/openapi.json").body["paths"]:
        assert path in text
