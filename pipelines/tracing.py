"""The ids that tie together what is said about one event, from the door to the answer.

Belongs here: the trace of a request, how it travels (W3C Trace Context's `traceparent`, and the older `X-Request-Id`),
and how records are named. Does not belong here: log lines (`logs`), and following an event (`jobs.trace`).

At the door a request has a trace: its client's, or a new one. It travels in the headers of the request's records, so
that whoever reads the topic can go on with it. From the broker on, work is done by the epoch, for thousands of records
at once, and a record is named by its place: topic id, partition and offset. The raw tables keep it, an epoch says the
range of it that it read, and the door's log line says which places a trace's records got. The two together are the
correlation id: a trace names places, a place is in ranges, and no table needs a column for it (ADR 10).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

TRACEPARENT, REQUEST_ID = "traceparent", "x-request-id"
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class Trace(NamedTuple):
    """The trace of a request.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits: this process's part of it.
        request_id: What the client calls its request; the trace id where it says nothing.
        flags: W3C's, as they came.
    """

    trace_id: str
    span_id: str
    request_id: str
    flags: str = "00"

    @property
    def traceparent(self) -> str:
        """As W3C Trace Context writes it."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    @property
    def fields(self) -> dict[str, str]:
        """What a log line says of it."""
        return {"trace_id": self.trace_id, "request_id": self.request_id}

    @property
    def headers(self) -> dict[str, str]:
        """For an answer, and for the records of the request."""
        return {TRACEPARENT: self.traceparent, REQUEST_ID: self.request_id}

    @property
    def record_headers(self) -> list[tuple[str, str | bytes | None]]:
        """The same, as Kafka takes them."""
        return [(name, value.encode()) for name, value in self.headers.items()]


def begin(traceparent: str | None = None, request_id: str | None = None) -> Trace:
    """Go on with a client's trace, or begin one; what is not well formed is as if it were not there.

    Examples:
        >>> begin("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").trace_id
        '4bf92f3577b34da6a3ce929d0e0e4736'
    """
    found = _TRACEPARENT.fullmatch(traceparent or "")
    trace_id, flags = (found[1], found[3]) if found else (_random(16), "00")
    named = request_id if request_id and _REQUEST_ID.fullmatch(request_id) else trace_id
    return Trace(trace_id, _random(8), named, flags)


def read(record_headers: Iterable[tuple[str, bytes | None]] | None) -> Trace | None:
    """The trace in a record's headers; None if there is none."""
    said = {name: (value or b"").decode("utf-8", "replace") for name, value in record_headers or ()}
    found = _TRACEPARENT.fullmatch(said.get(TRACEPARENT, ""))
    return Trace(found[1], found[2], said.get(REQUEST_ID) or found[1], found[3]) if found else None


class Place(NamedTuple):
    """Where a record is in Kafka: what names it from there on."""

    topic_id: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic_id}/{self.partition}/{self.offset}"


Ranges = dict[str, dict[str, list[tuple[int, int]]]]
"""Topic id → partition → ranges [start, end) of offsets: the shape of `places` in a log line."""


def ranges_of(places: Iterable[Place]) -> Ranges:
    """Places as ranges, for a log line.

    Examples:
        >>> ranges_of([Place("t@1", 0, 7), Place("t@1", 0, 5), Place("t@1", 0, 6)])
        {'t@1': {'0': [(5, 8)]}}
    """
    found: Ranges = {}
    for topic_id, partition, offset in sorted(places):
        ranges = found.setdefault(topic_id, {}).setdefault(str(partition), [])
        if ranges and ranges[-1][1] >= offset:
            ranges[-1] = (ranges[-1][0], offset + 1)
        else:
            ranges.append((offset, offset + 1))
    return found


def is_in(place: Place, ranges: object) -> bool:
    """Whether a place is in the `places` of a log line (whatever that is)."""
    if not isinstance(ranges, Mapping):
        return False
    try:
        mine = ranges.get(place.topic_id, {}).get(str(place.partition), ())
        return any(start <= place.offset < end for start, end in mine)
    except (AttributeError, TypeError, ValueError):
        return False


def _random(count: int) -> str:
    """So many random bytes in hexadecimal, not all zero."""
    while not any(found := os.urandom(count)):
        pass
    return found.hex()
