"""Pages of quality and rendered notebooks in a real browser: they fit, load nothing, and are for everybody."""

from __future__ import annotations

import pytest

from tests.browser import written
from tests.browser.browsing import Opener, require_good


def test_the_pages_over_all_lead_to_each(open_report: Opener) -> None:
    for folder, text in (
        ("quality", written.AUDITED),
        ("notebooks", "A base, and how its delta corrects it"),
    ):
        shown = open_report(f"{folder}/")
        require_good(shown)
        shown.get_by_role("link", name=text).click()
        assert text in str(shown.text_content("h1"))
        shown.get_by_role("link", name="All").click()
        shown.wait_for_url(f"**/{folder}/index.html")


@pytest.mark.parametrize("table", [written.AUDITED, "raw.pin_updates", "features.user_vectors"])
def test_a_tables_page_shows_each_measure_with_its_trend(open_report: Opener, table: str) -> None:
    shown = open_report(f"quality/{table}.html")
    require_good(shown)
    assert shown.locator("svg[role=img]").count() >= 4
    state = {"raw.pin_updates": "not as usual", "features.user_vectors": "broken"}.get(table, "all holds")
    assert state in str(shown.locator(".badge").first.text_content())


def test_a_notebook_is_read_at_both_sizes(open_report: Opener) -> None:
    shown = open_report("notebooks/base_and_delta.html")
    require_good(shown)
    drawings = shown.locator("img").all()
    assert len(drawings) == 2
    for one in drawings:
        assert one.evaluate("image => image.complete && image.naturalWidth > 0")
        assert "delta" in str(one.get_attribute("alt"))
    code = shown.locator("pre").first
    assert not code.is_visible()
    shown.locator("summary").first.click()
    assert code.is_visible()
    for summary in shown.locator("summary").all()[1:]:
        summary.click()
    require_good(shown)


def test_the_ads_account_is_drawn_by_stage(open_report: Opener) -> None:
    shown = open_report("ads/")
    require_good(shown)
    charts = shown.locator("svg.chart").all()
    assert len(charts) == 2
    for stage in ("updated", "sent", "committed", "served"):
        assert charts[0].get_by_text(stage, exact=True).count() == 1
    assert "not as usual" in str(shown.locator(".badge").first.text_content())
