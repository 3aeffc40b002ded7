"""How the demo tells its story: headlines, lines, and what must hold."""

from __future__ import annotations

from typing import NamedTuple

from jobs import console
from pipelines.errors import TidemarkError


class DemoError(TidemarkError):
    """The demo cannot go on."""


class Check(NamedTuple):
    """One thing that must hold, and what was found."""

    what: str
    holds: bool
    found: str


def say(text: str) -> None:
    """A line under the headline."""
    console.say(f"  {text}")


def headline(text: str) -> None:
    """What comes next."""
    console.say(f"\n{text}")
