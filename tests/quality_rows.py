"""Rows of `ops.quality` that no audit wrote, for the tests of what shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Any


def row(at: datetime, table: str, field: str, measure: str, value: float, **said: Any) -> dict[str, Any]:
    """A measure that may be at most `most` (by default 0; None: it is not judged), by its declaration."""
    most = said.get("most", 0.0)
    return {
        "at": at,
        "table": table,
        "snapshot_id": 4_620_170_873_812_487_234,
        "batch": "all",
        "kind": "nulls",
        "field": field,
        "measure": measure,
        "value": value,
        "text": None,
        "least": None,
        "most": most,
        "basis": None if most is None else "declared",
        "is_passed": None if most is None else value <= most,
        "is_blocking": False,
        "detail": "",
        "histogram": None,
        **said,
    }
