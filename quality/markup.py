"""The frame of generated pages, and their tables: no script, nothing loaded from elsewhere, narrow and wide.

Belongs here: what all such pages share. Does not belong here: what one shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape


def table(caption: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """Rows as a table that becomes a stack where it is narrow; ``rows``: of `cell`."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return (
        f'<table class="stack"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def cell(name: str, content: str, kind: str = "") -> str:
    """A cell; ``content`` is HTML, ``name`` its column's."""
    return f'<td class="{kind}" data-name="{escape(name)}"><span>{content}</span></td>'


def minute(at: datetime) -> str:
    """A time, to the minute."""
    return f"{utc(at):%Y-%m-%d %H:%M}"


def utc(at: datetime) -> datetime:
    """A time in UTC; one without a zone is."""
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)


def page(title: str, body: str) -> str:
    """A whole page; ``body`` is HTML."""
    return _PAGE.replace("{title}", escape(title)).replace("{body}", body)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; --line: #8886; --accent: #0b63c5; --good: #1a7f37; --odd: #8a5a00; --bad: #b3261e; }
  @media (prefers-color-scheme: dark) {
    :root { --accent: #7db8ff; --good: #6fdd8b; --odd: #f0c000; --bad: #ff9a92; }
  }
  html { background: Canvas; color: CanvasText; }
  @media (prefers-color-scheme: dark) { html { background: #121212; color: #eee; } .chart text { fill: #eee; } }
  * { box-sizing: border-box; }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
  h1 { margin: 0; overflow-wrap: anywhere; } h2 { margin: 2rem 0 .25rem; } p { margin: .4rem 0; }
  a { color: var(--accent); }
  code { font-size: .9em; overflow-wrap: anywhere; }
  table { border-collapse: collapse; width: 100%; }
  caption { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  th, td { text-align: start; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
  td { overflow-wrap: anywhere; } th { white-space: nowrap; }
  .number { font-variant-numeric: tabular-nums; }
  .badge { font-weight: 600; white-space: nowrap; } .badge::before { content: "● "; }
  .passed { color: var(--good); } .warned { color: var(--odd); } .failed { color: var(--bad); }
  .strip { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
  .strip i { font-style: normal; font-weight: 700; display: inline-block; width: .7em; text-align: center; }
  svg { display: block; max-width: 100%; }
  polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; }
  .scroll { overflow-x: auto; } .scroll:focus-visible { outline: 3px solid var(--accent); }
  .chart { width: 100%; max-width: none; min-width: 44rem; height: auto; margin: .5rem 0; }
  .chart text { font: 12px system-ui, sans-serif; fill: CanvasText; }
  .chart .grid { stroke: var(--line); } .chart circle { fill: var(--accent); }
  .band { fill: #8883; } .bad { fill: var(--bad); }
  @media (max-width: 48rem) {
    table.stack thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
    table.stack, table.stack tbody { display: block; }
    table.stack tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
    table.stack td { display: grid; grid-template-columns: 6.5rem minmax(0, 1fr); gap: .5rem; }
    table.stack td { border: 0; padding: .1rem 0; }
    table.stack td::before { content: attr(data-name); opacity: .75; }
  }
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
