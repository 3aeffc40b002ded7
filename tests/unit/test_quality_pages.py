"""The pages of audits: what is shown of rows of `ops.quality`, with nothing from elsewhere and no markup of theirs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

from pipelines.settings import Settings
from quality import history, pages
from tests import quality_rows

AT = datetime(2024, 3, 1, 4, tzinfo=UTC)
HOUR = timedelta(hours=1)
TABLE = "raw.pin_updates"


def row(at: datetime, field: str, measure: str, value: float, **said: Any) -> dict[str, Any]:
    return quality_rows.row(at, TABLE, field, measure, value, **said)


class Tags(HTMLParser):
    """Counts tags, and wants each closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)


def test_a_page_has_every_measure_its_trend_and_no_markup_of_the_data(settings: Settings) -> None:
    rows = [row(AT + n * HOUR, "key", "null", float(n % 2)) for n in range(4)]
    rows.append(row(AT + 3 * HOUR, "<img src=x>", "unknown", 0.0, detail="<script>alert(1)</script>"))
    page = pages.renew(settings, TABLE, rows).read_text()
    tags = Tags(page)
    assert tags.open == []
    assert "script" not in tags.seen and "img" not in tags.seen
    assert "http" not in page
    assert "&lt;script&gt;" in page and "4 values, from 0 (2024-03-01 04:00) to 1 (2024-03-01 07:00)" in page
    assert tags.seen.count("circle") == 2 * 2  # of four values two did not hold; the line is shown twice
    assert "tidemark replay dead-letters pin-updates --send" in page


def test_the_page_over_all_has_the_worst_first(settings: Settings) -> None:
    pages.renew(settings, "a.good", [row(AT, "key", "null", 0.0)])
    pages.renew(settings, "b.odd", [row(AT, "key", "null", 1.0)])
    page = pages.renew(settings, "c.broken", [row(AT, "key", "null", 1.0, is_blocking=True)])
    index = page.with_name("index.html").read_text()
    assert Tags(index).open == []
    assert index.index("c.broken.html") < index.index("b.odd.html") < index.index("a.good.html")


def test_of_days_the_newest_is_shown_and_earlier_ones_are_its_trend() -> None:
    days = [
        row(AT, "", "rows", 10.0 + n, batch=f"2024-02-0{n}", basis=None, is_passed=None) for n in range(1, 5)
    ]
    judged = row(
        AT, "", "rows", 15.0, batch="2024-02-05", basis="the 7 days before", most=99.0, is_passed=True
    )
    rows = [*days, judged, row(AT, "", history.LIVE, 1.0, basis=None, is_passed=None)]
    assert history.newest(rows) == [judged]
    (line,) = pages._lines(rows)
    assert [point.value for point in line.trend] == [11, 12, 13, 14, 15]
