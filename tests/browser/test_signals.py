"""The catalogue of signals in a real browser: it opens from the file and from serving, and is for everybody."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from pipelines.settings import Settings
from quality.signals import catalogue, page
from tests import serving_world as world
from tests.conftest import small_settings
from tests.faults import running

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: sudo apt-get install -y chromium"),
]
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Iterator[Settings]:
    settings = small_settings(tmp_path_factory.mktemp("signals") / "home")
    world.build_world(settings)
    page.write(catalogue.collect(settings, spark), settings.paths.reports / "signals")
    with running.everything_stopped(settings):
        running.start(settings, "serving")
        running.await_that(lambda: running.tidemark_ready(settings), "serving to be ready", 30)
        yield settings


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(params=SIZES)
def opened(request: pytest.FixtureRequest, browser: Browser, served: Settings) -> Iterator[Page]:
    """The page as serving shows it; whatever its console says is an error of the test."""
    width, height = SIZES[request.param]
    scheme = "light" if request.param == "wide" else "dark"
    found = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    said: list[str] = []
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    found.goto(f"http://{served.serving.host}:{served.serving.port}/reports/signals/")
    yield found
    assert said == []
    found.close()


def require_good(shown: Page) -> None:
    """Nothing overflows, and axe-core finds nothing serious."""
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = Axe().run(shown).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


def test_it_lists_everything_and_draws_what_depends_on_what(opened: Page, served: Settings) -> None:
    require_good(opened)
    datasets = opened.locator("details").all()
    assert {"curated.pins_offer", "answer.pins"} <= {str(one.get_attribute("id")) for one in datasets}
    assert opened.locator("svg .node").count() > 20
    assert opened.locator('.edge[data-from="curated.pins_offer"][data-to="index.pins"]').count() == 1


def test_a_search_leaves_what_fits(opened: Page) -> None:
    opened.fill("input[name=q]", "price_usd_micros bigint")
    assert "field" in str(opened.text_content("#found"))
    rows = [row for row in opened.locator("tbody tr").all() if row.is_visible()]
    assert rows
    assert all("price_usd_micros" in str(row.text_content()) for row in rows)
    require_good(opened)
    opened.fill("input[name=q]", "no such signal")
    assert opened.text_content("#found") == "0 fields in 0 datasets"
    assert not any(one.is_visible() for one in opened.locator("details").all())


def test_a_node_leads_to_its_dataset_and_lights_its_neighbours(opened: Page) -> None:
    opened.locator('svg .node[data-name="index.pins"]').focus()
    opened.keyboard.press("Enter")
    opened.wait_for_url("**#index.pins")
    chosen = opened.locator('[id="index.pins"]')
    assert chosen.get_attribute("open") is not None
    assert "curated.pins_catalogue.catalogue.title" in str(chosen.text_content())
    lit = {str(e.get_attribute("data-from")) for e in opened.locator(".edge.lit").all()}
    assert {"curated.pins_catalogue", "curated.pins_offer", "features.pin_vectors", "index.pins"} == lit
    require_good(opened)


def test_it_needs_no_server(browser: Browser, served: Settings) -> None:
    shown = browser.new_page()
    path: Path = served.paths.reports / "signals" / "index.html"
    shown.goto(path.as_uri())
    assert shown.locator("details").count() > 20
    shown.close()
