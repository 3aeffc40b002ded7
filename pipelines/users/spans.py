"""Spans of time as people write them: `7d`.

Belongs here: reading one, and the bounds that whatever looks back in timelines keeps. Nothing else.
"""

from __future__ import annotations

import re

MINUTE_MS = 60_000
DAY_MS = 1_440 * MINUTE_MS
MIN_SPAN_MS, MAX_SPAN_MS = MINUTE_MS, 90 * DAY_MS
RULE = "a whole number with m, h, d or w, from 1m to 90d, as 7d"
PATTERN = r"([1-9][0-9]{0,8})\s*([mhdw])"
_SPAN = re.compile(PATTERN)
_UNIT_MS = {"m": MINUTE_MS, "h": 60 * MINUTE_MS, "d": DAY_MS, "w": 7 * DAY_MS}


def written(ms: int) -> str:
    """Milliseconds as a span, in the largest unit but weeks of which it is a whole number; else in ms."""
    for unit in ("d", "h", "m"):
        if ms % _UNIT_MS[unit] == 0:
            return f"{ms // _UNIT_MS[unit]}{unit}"
    return f"{ms} ms"


def span_ms(text: object) -> int | None:
    """The milliseconds of a span inside the bounds; None where it is none."""
    found = _SPAN.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    ms = int(found[1]) * _UNIT_MS[found[2]] if found else 0
    return ms if MIN_SPAN_MS <= ms <= MAX_SPAN_MS else None
