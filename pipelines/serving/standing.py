"""What an answer stands on: one view of each index that it reads, taken once, and the headers that say so.

Belongs here: taking views from a replica, waiting for a position, the headers. Does not belong here: reading the views.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipelines.errors import TidemarkError
from pipelines.indexing.position import Position
from pipelines.recommend import candidates, fold_in, tastes
from pipelines.serving.inputs import Problem

if TYPE_CHECKING:
    from pipelines.indexing.replica import Replica

PINS, EVENTS, COUNTS, ADS, PROFILES = "pins", "user_events", "pin_counts", "ads", "user_profiles"
FOLLOWS, CHANGES = "user_follows", "pin_changes"
POLL_S = 0.01
T = TypeVar("T")
BASE_VERSION, POSITION, STALE = "Tidemark-Base-Version", "Tidemark-Position", "Tidemark-Stale"
log = logging.getLogger(__name__)


class Standing(NamedTuple):
    """The views of an answer by index, and the headers about them. Views never change; the next answer has others."""

    views: dict[str, Any]
    headers: dict[str, str]


class Ground:
    """Gives answers something to stand on. One for a process; used from its event loop alone."""

    def __init__(self, replica: Replica, max_wait_ms: int) -> None:
        self.replica = replica
        self.max_wait_ms = max_wait_ms
        self._standings: dict[tuple[str, ...], tuple[tuple[bool, ...], Standing]] = {}
        self._parameters: tuple[Any, fold_in.Parameters | None] = (None, None)
        self._popularity: candidates.Popularity | None = None
        self._personal: tastes.Personal | None = None
        self._aside = ThreadPoolExecutor(1, "aside")

    def now(self, *indices: str) -> Standing:
        """The newest views of some indices."""
        followers = [self.replica.followers[index] for index in indices]
        views = [follower.view for follower in followers]
        stale = tuple(follower.is_stale for follower in followers)
        held = self._standings.get(indices)
        if held is not None and held[0] == stale and _are_same(held[1].views.values(), views):
            return held[1]
        given = dict(zip(indices, views, strict=True))
        reached = [view.position.restricted_to(f.topics) for view, f in zip(views, followers, strict=True)]
        headers = {
            BASE_VERSION: _named(indices, [view.base.version or "none" for view in views]),
            POSITION: common(reached).token(),
            STALE: _named(indices, ["true" if is_stale else "false" for is_stale in stale]),
        }
        standing = Standing(given, headers)
        self._standings[indices] = (stale, standing)
        return standing

    async def at(self, position: Position | None, *indices: str) -> Standing:
        """The views once they cover a position.

        Raises:
            Problem: 409, they did not within the limit.
        """
        if position is None:
            return self.now(*indices)
        deadline = time.monotonic() + self.max_wait_ms / 1000
        while not all(self.replica.followers[index].covers(position) for index in indices):
            if time.monotonic() >= deadline:
                raise Problem(
                    409,
                    "min_position",
                    f"the position was not reached within {self.max_wait_ms} ms",
                    "the position in the header Tidemark-Position, or one before it; or try again",
                    self.now(*indices).headers,
                )
            await asyncio.sleep(POLL_S)
        return self.now(*indices)

    async def aside(self, read: Callable[..., T], *arguments: Any) -> T:
        """Read something that may take a while in a thread of its own, one such thing at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, read, *arguments)

    def parameters(self, pins: Any) -> fold_in.Parameters | None:
        """The model parameters of a view of the pins, read once for each base."""
        if self._parameters[0] is not pins.base:
            try:
                read = candidates.parameters_of(pins)
            except TidemarkError:
                log.exception(
                    "the base %s pins parameters that cannot be used: popular pins are served",
                    pins.base.version,
                )
                read = None
            self._parameters = (pins.base, read)
        return self._parameters[1]

    def personal(self, pins: Any, events: Any) -> tastes.Personal:
        """Personal answers over the bases of these views."""
        parameters = self.parameters(pins)
        if self._personal is None or not self._personal.is_of(pins, events, parameters):
            self._personal = tastes.Personal(pins.base, events.base, parameters)
        return self._personal

    def popularity(self, counts: Any) -> candidates.Popularity:
        """What is popular in a view of the counts, computed once for each view."""
        if self._popularity is None or self._popularity.counts is not counts:
            self._popularity = candidates.Popularity(counts)
        return self._popularity


def _are_same(held: Iterable[Any], views: Iterable[Any]) -> bool:
    return all(mine is theirs for mine, theirs in zip(held, views, strict=True))


def common(reached: list[Position]) -> Position:
    """What an answer from several indices stands on: of a topic that several read the lesser offset."""
    topics: dict[str, dict[int, int]] = {}
    for position in reached:
        for topic, offsets in position.topics.items():
            held = topics.get(topic)
            topics[topic] = (
                dict(offsets) if held is None else {p: min(o, offsets.get(p, 0)) for p, o in held.items()}
            )
    return Position(topics, frozenset().union(*(position.loads for position in reached)))


def _named(indices: tuple[str, ...], values: list[str]) -> str:
    if len(indices) == 1:
        return values[0]
    return ", ".join(f"{index}={value}" for index, value in zip(indices, values, strict=True))
