"""A real browser, and what every page must keep."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
Opener = Callable[[str], Page]


def require_good(shown: Page) -> None:
    """Nothing overflows, and axe-core finds nothing serious."""
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = Axe().run(shown).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"][:120] for node in one["nodes"][:3]]) for one in serious] == []


def is_foreign(url: str, own: str) -> bool:
    """Whether a request goes to another host than the page's own."""
    parts = urlsplit(url)
    return parts.scheme not in ("data", "blob") and parts.netloc != own
