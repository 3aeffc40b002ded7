"""The catalogue of signals in a real browser: it opens from the file and from serving, and is for everybody."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from pipelines.settings import Settings
from tests.browser.browsing import Opener, require_good


@pytest.fixture
def opened(open_report: Opener) -> Page:
    """The page as serving shows it."""
    return open_report("signals/")


def test_it_lists_everything_and_draws_what_depends_on_what(opened: Page) -> None:
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


def test_it_needs_no_server(browser: Browser, reports: Settings) -> None:
    shown = browser.new_page()
    path: Path = reports.paths.reports / "signals" / "index.html"
    shown.goto(path.as_uri())
    assert shown.locator("details").count() > 20
    shown.close()
