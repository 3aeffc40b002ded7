"""The index ``user_profiles``: what fired for a user, a timeline by user.

Belongs here: the declaration and its transform. A user's interests and when the user was last seen are not stored: who
reads computes them of `user_events`, which knows loads and edits too (docs/adr/0020).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.indexing import keyed
from pipelines.indexing.spec import Family, IndexSpec, Keyed, State, Step, Timeline
from pipelines.users.patterns import firing
from pipelines.users.patterns.firing import FAMILY, FIRING, MADE
from pipelines.users.patterns.rules import Patterns

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

STREAM = "user_patterns"
USER = "user_id"


def spec_of(patterns: Callable[[], Patterns]) -> IndexSpec:
    """The index, by the rules that `patterns` gives whenever a build or a query begins."""

    def firings(rows: DataFrame, state: State) -> DataFrame:
        """Rows of `user-interactions` as all that fired of them."""
        in_force = patterns()
        make = functools.partial(firing.whole, in_force)
        return keyed.whole(rows, USER, firing.columns(in_force), make, MADE)

    def step(unread_ms: int | None) -> Step:
        return functools.partial(firing.step, patterns(), unread_ms)

    of_stream = Keyed(
        USER,
        lambda: firing.columns(patterns()),
        step,
        lambda: patterns().digest,
        lambda: patterns().kept_ms,
    )
    return IndexSpec(
        name="user_profiles",
        families=(Family(FAMILY, FIRING, STREAM, firings, keyed=of_stream),),
        read=Timeline(),
    )
