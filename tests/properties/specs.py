"""The indices that the drawn histories are about: one a kind of read, with every feature that its kind has.

Belongs here: declarations alone; their transforms are never called, because the histories are facts already.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pyarrow as pa

from pipelines.indexing.spec import (
    Documents,
    Family,
    Forward,
    IndexSpec,
    Inverted,
    Sums,
    Timeline,
    Vector,
)
from tests.properties.strategies import MINUTE_MS, Feed

PAYLOAD = pa.schema([("text", pa.string()), ("number", pa.int64())])
DOCUMENT = pa.schema(
    [*PAYLOAD, pa.field("words", pa.list_(pa.string())), pa.field("shape", pa.list_(pa.float32()))]
)
VECTORS = pa.schema([("vector", pa.list_(pa.float32()))])
DIMENSIONS = 4
PRESENCE = "control"


def unchanged(rows: Any, state: Any) -> Any:
    """Drawn statements are facts already."""
    return rows


DOCUMENT_FEEDS = (
    Feed("control", "fast"),
    Feed("content", "slow"),
    Feed("price", "slow"),
    Feed("vector", None),
)
EVENT_FEEDS = (Feed("events", "clicks"),)
JOINED_FEEDS = (Feed("events", "clicks"), Feed("notes", "remarks"))
SUM_FEEDS = (Feed("views", "clicks"), Feed("sales", "orders"))
AMOUNTS = ("quantity", "value")


def families(feeds: tuple[Feed, ...], payload: pa.Schema = PAYLOAD) -> tuple[Family, ...]:
    """A family for each feed."""
    return tuple(
        Family(feed.family, VECTORS if feed.stream is None else payload, feed.stream, unchanged)
        for feed in feeds
    )


@cache
def documents() -> IndexSpec:
    """Three streamed families from two streams, and one from the base alone."""
    return IndexSpec("documents", families(DOCUMENT_FEEDS, DOCUMENT), Documents(PRESENCE))


@cache
def searchable() -> IndexSpec:
    """The same with all access paths."""
    return IndexSpec(
        "searchable",
        families(DOCUMENT_FEEDS, DOCUMENT),
        Documents(PRESENCE),
        (
            Forward("content", ("text", "number")),
            Forward("control", ("number",)),
            Inverted("by_text", "content", "text"),
            Inverted("by_number", "control", "number"),
            Inverted("by_word", "control", "words"),
            Vector("near", "vector", "vector", DIMENSIONS),
            Vector("alike", "content", "shape", DIMENSIONS),
        ),
    )


@cache
def timeline(age_ms: int | None, count: int | None) -> IndexSpec:
    """A timeline with or without horizon."""
    return IndexSpec("timeline", families(EVENT_FEEDS), Timeline(age_ms, count))


@cache
def joined_timeline(count: int | None) -> IndexSpec:
    """A timeline whose events are joined from two families."""
    return IndexSpec("joined", families(JOINED_FEEDS), Timeline(None, count))


@cache
def sums(age_ms: int | None) -> IndexSpec:
    """Two families of events that count, with or without horizon."""
    return IndexSpec(
        "sums", families(SUM_FEEDS, pa.schema([("text", pa.string())])), Sums(MINUTE_MS, AMOUNTS, age_ms)
    )
