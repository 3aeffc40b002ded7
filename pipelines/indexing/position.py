"""Positions: how far into its sources a base, an epoch or an answer has come.

Belongs here: the value, its order and its two encodings (JSON for files, an opaque token for clients). Reading
positions from Kafka, Iceberg or Delta belongs to whoever talks to these.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pipelines.errors import TidemarkError
from pipelines.tracing import Ranges

MAX_TOKEN_CHARS = 16_384


class BadPosition(TidemarkError):
    """A text that should be a position is not one."""


class Position(NamedTuple):
    """For each Kafka topic (by its id, ``<name>@<Kafka's id>``) the next offset of each partition, and the loads.

    Positions form a join-semilattice: ``merge`` takes the greater offset of each partition and the union of the
    loads. The topic's id, not its name, is the key: a topic that was deleted and made again restarts at offset 0.
    """

    topics: Mapping[str, Mapping[int, int]] = {}
    loads: frozenset[str] = frozenset()

    def merge(self, other: Position) -> Position:
        """The least position that covers both."""
        topics = {topic: dict(offsets) for topic, offsets in self.topics.items()}
        for topic, offsets in other.topics.items():
            mine = topics.setdefault(topic, {})
            for partition, offset in offsets.items():
                mine[partition] = max(offset, mine.get(partition, 0))
        return Position(topics, self.loads | other.loads)

    def covers(self, other: Position) -> bool:
        """Whether everything before ``other`` is also before this position."""
        return other.loads <= self.loads and all(
            offset <= self.topics.get(topic, {}).get(partition, 0)
            for topic, offsets in other.topics.items()
            for partition, offset in offsets.items()
        )

    def restricted_to(self, topics: Iterable[str]) -> Position:
        """Without the topics that are not named (a token may cover several; an index reads some of them).

        Args:
            topics: Names of topics, the part of a topic id before the last ``@``.
        """
        wanted = set(topics)
        return Position({t: o for t, o in self.topics.items() if topic_name(t) in wanted}, self.loads)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with sorted keys; ``from_json`` reads it."""
        return {
            "topics": {
                topic: {str(p): offsets[p] for p in sorted(offsets)}
                for topic, offsets in sorted(self.topics.items())
            },
            "loads": sorted(self.loads),
        }

    def to_text(self) -> str:
        """``to_json`` as one compact line, for snapshot summaries and marker rows."""
        return json.dumps(self.to_json(), separators=(",", ":"))

    def token(self) -> str:
        """The opaque, URL-safe form that clients pass back as ``min_position``."""
        return base64.urlsafe_b64encode(self.to_text().encode()).decode().rstrip("=")


EMPTY = Position()


def from_json(value: Any) -> Position:
    """Read ``Position.to_json``.

    Raises:
        BadPosition: a part is missing or of another type; the message names it.
    """
    try:
        topics = {
            str(topic): {_natural(p): _natural(o) for p, o in offsets.items()}
            for topic, offsets in value["topics"].items()
        }
        loads = frozenset(_text(load) for load in value["loads"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadPosition(
            f"not a position: {error}",
            remedy="pass a position as `tidemark send` or the collector gave it, unchanged",
        ) from error
    return Position(topics, loads)


def from_text(text: str) -> Position:
    """Read ``Position.to_text``.

    Raises:
        BadPosition: the text is no JSON, or not a position's.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPosition(f"not a position: {error}", remedy="pass a position unchanged") from error
    return from_json(value)


def from_token(token: str) -> Position:
    """Read ``Position.token``.

    Raises:
        BadPosition: the token is too long, not base64url, or does not hold a position.
    """
    remedy = "pass a position as `tidemark send` or the collector gave it, unchanged"
    if len(token) > MAX_TOKEN_CHARS:
        raise BadPosition(f"a position has at most {MAX_TOKEN_CHARS} characters", remedy=remedy)
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        text = raw.decode()
    except (binascii.Error, ValueError) as error:
        raise BadPosition("not a position: it is no base64url text", remedy=remedy) from error
    return from_text(text)


def topic_name(topic_id: str) -> str:
    """The name in a topic id ``<name>@<Kafka's id>``."""
    return topic_id.rpartition("@")[0] or topic_id


def ranges(start: Position, end: Position) -> Ranges:
    """The records between two positions, as a log line says it."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for topic, ends in end.topics.items():
        for partition, last in ends.items():
            if (first := start.topics.get(topic, {}).get(partition, 0)) < last:
                found.setdefault(topic, {})[str(partition)] = [(first, last)]
    return found


def merge_all(positions: Iterable[Position]) -> Position:
    """The least position that covers all of them; ``EMPTY`` of none."""
    merged = EMPTY
    for position in positions:
        merged = merged.merge(position)
    return merged


def meet_all(given: list[Position]) -> Position:
    """The greatest position that all of them cover; ``EMPTY`` of none."""
    if not given:
        return EMPTY
    first, *others = given
    topics: dict[str, dict[int, int]] = {}
    for topic, offsets in first.topics.items():
        for partition, offset in offsets.items():
            least = min([offset, *(other.topics.get(topic, {}).get(partition, 0) for other in others)])
            topics.setdefault(topic, {})[partition] = least
    return Position(topics, frozenset.intersection(*(p.loads for p in given)))


def _natural(value: Any) -> int:
    number = int(value)
    if isinstance(value, float | bool) or not 0 <= number < 2**63:
        raise ValueError(f"{value!r} is no partition or offset")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no load id")
    return value
