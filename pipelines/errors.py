"""The one root of every error that Tidemark raises on purpose.

Belongs here: the root class and nothing else; a module that has errors of its own derives them from it. An error says
what was wrong, where, and what to do about it, in words for the person who reads it.
"""

from __future__ import annotations

from typing import Any


class TidemarkError(Exception):
    """Something is wrong that a person can understand and mend.

    Args:
        what: What was wrong, as a sentence without its full stop.
        where: The file, table, topic, setting or address that it is about.
        remedy: What to do now, as an imperative.

    Examples:
        >>> print(TidemarkError("port 9092 is in use", where="kafka.port", remedy="stop what listens there"))
        port 9092 is in use (kafka.port): stop what listens there.
    """

    def __init__(self, what: str, *, where: object | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        text = self.what.rstrip(".")
        if self.where:
            text += f" ({self.where})"
        if self.remedy:
            text += f": {self.remedy.rstrip('.')}"
        return text if text.endswith("?") else text + "."

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object, for `--json` and for HTTP bodies."""
        return {"error": type(self).__name__, "what": self.what, "where": self.where, "remedy": self.remedy}
