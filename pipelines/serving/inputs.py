"""What clients send, read strictly: ids in paths, query parameters, JSON bodies; and what is said when it is wrong.

Belongs here: turning the bytes of a request into values, or into a `Problem` that names the field and what is allowed.
Nothing here knows an index.

Ids are percent-decoded from the raw path, so that an id may hold a slash, a percent sign or a dot.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import orjson

from pipelines.indexing import position as positions
from pipelines.indexing.position import Position

MAX_ID_BYTES = 512
MAX_K = 500
MAX_BATCH = 500
MAX_LIMIT = 1000
MAX_BODY_BYTES = 1_048_576
MAX_TIME_MS = 4_133_980_800_000  # the end of 2100
_BROKEN_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_NATURAL = re.compile(r"[0-9]{1,18}")
_ID_RULE = f"percent-encoded UTF-8 of 1 to {MAX_ID_BYTES} bytes, without NUL"


class Problem(Exception):
    """A request that is not answered as asked: a status, the field that it is about, what is wrong and what is allowed.

    Attributes:
        status: The HTTP status, 4xx.
        field: A path part, query parameter or field of the body.
        message: What is wrong with it.
        allowed: What would be right.
        headers: For the answer.
    """

    def __init__(
        self, status: int, field: str, message: str, allowed: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.message = message
        self.allowed = allowed
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON that clients get."""
        error = {"field": self.field, "message": self.message, "allowed": self.allowed}
        return orjson.dumps({"error": error})


def segments_of(raw_path: bytes) -> list[bytes]:
    """The parts of a raw path, not decoded."""
    return raw_path.split(b"?", 1)[0].split(b"/")[1:]


def read_id(raw: bytes, field: str) -> bytes:
    """An id from one part of a raw path, as UTF-8 bytes."""
    if _BROKEN_PERCENT.search(raw):
        raise Problem(400, field, "a percent sign is not followed by two hexadecimal digits", _ID_RULE)
    return _id(unquote_to_bytes(raw), field)


def _id(value: bytes, field: str) -> bytes:
    if not value:
        raise Problem(400, field, "the id is empty", _ID_RULE)
    if len(value) > MAX_ID_BYTES:
        raise Problem(400, field, f"the id has {len(value)} bytes", _ID_RULE)
    if b"\0" in value:
        raise Problem(400, field, "the id holds the character NUL", _ID_RULE)
    try:
        value.decode()
    except UnicodeDecodeError:
        raise Problem(400, field, "the id is not UTF-8", _ID_RULE) from None
    return value


class Query:
    """The query parameters of a request, each at most once."""

    def __init__(self, raw: bytes, known: tuple[str, ...]) -> None:
        self._values: dict[str, str] = {}
        for part in raw.split(b"&") if raw else ():
            if not part:
                continue
            raw_name, _, raw_value = part.partition(b"=")
            name = _text(raw_name, "query", "names of query parameters in percent-encoded UTF-8")
            if name not in known:
                raise Problem(
                    400, _shown(name), "there is no such query parameter", list(known) or "none here"
                )
            if name in self._values:
                raise Problem(400, name, "the query parameter is there twice", "each query parameter once")
            self._values[name] = _text(raw_value, name, "percent-encoded UTF-8")

    def natural(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number between two bounds."""
        found = self.optional_natural(name, least, most)
        return default if found is None else found

    def optional_natural(self, name: str, least: int, most: int) -> int | None:
        """A whole number between two bounds; None where it is absent."""
        value = self._values.get(name)
        if value is None:
            return None
        if not _NATURAL.fullmatch(value) or not least <= int(value) <= most:
            raise Problem(
                400, name, f"{_shown(value)!r} is not allowed", f"a whole number from {least} to {most}"
            )
        return int(value)

    def text(self, name: str) -> str | None:
        """A text; None where it is absent."""
        value = self._values.get(name)
        if value is None:
            return None
        allowed = f"a text of 1 to {MAX_ID_BYTES} bytes, without NUL"
        if not value or len(value.encode()) > MAX_ID_BYTES or "\0" in value:
            raise Problem(400, name, "the text is empty, too long, or holds the character NUL", allowed)
        return value

    def min_position(self) -> Position | None:
        """The position that the answer must stand on at least; None where it is absent."""
        token = self._values.get("min_position")
        if token is None:
            return None
        allowed = "a position as the collector or `Tidemark-Position` gave it, unchanged"
        try:
            return positions.from_token(token)
        except Exception as error:
            raise Problem(400, "min_position", f"not a position: {_shown(str(error))}", allowed) from None

    def cursor(self) -> tuple[int, bytes] | None:
        """Where a page of events begins: after this (time_ms, event id); None for the first page."""
        text = self._values.get("cursor")
        if text is None:
            return None
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            time_ms, event = _TIME.unpack_from(raw)[0], raw[_TIME.size :]
            if not event or len(event) > MAX_ID_BYTES:
                raise ValueError("no event id")
        except (binascii.Error, ValueError, struct.error):
            allowed = "`next_cursor` of the page before, unchanged"
            raise Problem(400, "cursor", "not a cursor of this list", allowed) from None
        return time_ms, event


_TIME = struct.Struct(">q")


def cursor_of(time_ms: int, event: bytes) -> str:
    """The cursor of the page that begins after an event."""
    return base64.urlsafe_b64encode(_TIME.pack(time_ms) + event).decode().rstrip("=")


def _text(raw: bytes, field: str, allowed: str) -> str:
    if _BROKEN_PERCENT.search(raw):
        raise Problem(400, field, "a percent sign is not followed by two hexadecimal digits", allowed)
    try:
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        raise Problem(400, field, "the text is not UTF-8", allowed) from None


def _shown(text: str) -> str:
    """A client's text, short enough to give back."""
    return text if len(text) <= 100 else text[:100] + "…"


class Batch(NamedTuple):
    """The pins of a batch, as they were asked for and as keys."""

    ids: list[str]
    keys: list[bytes]


def read_batch(body: bytes, content_type: str) -> Batch:
    """The body of `batchGet`: {"pin_ids": ["…", …]}."""
    allowed = {
        "pin_ids": f"a list of 1 to {MAX_BATCH} ids, each a text of 1 to {MAX_ID_BYTES} bytes without NUL"
    }
    if content_type.split(";")[0].strip().lower() != "application/json":
        shown = _shown(content_type) or "absent"
        raise Problem(415, "Content-Type", f"the content type is {shown}", "application/json")
    try:
        said = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise Problem(400, "body", f"the body is not JSON: {_shown(str(error))}", allowed) from None
    if not isinstance(said, dict):
        raise Problem(400, "body", "the body is not a JSON object", allowed)
    for name in said:
        if name != "pin_ids":
            raise Problem(400, _shown(name), "there is no such field", ["pin_ids"])
    ids = said.get("pin_ids")
    if not isinstance(ids, list) or not ids:
        raise Problem(400, "pin_ids", "there is no list of ids", allowed["pin_ids"])
    if len(ids) > MAX_BATCH:
        raise Problem(400, "pin_ids", f"the list has {len(ids)} ids", allowed["pin_ids"])
    keys = []
    for place, pin in enumerate(ids):
        if not isinstance(pin, str):
            raise Problem(400, f"pin_ids[{place}]", "the id is not a text", allowed["pin_ids"])
        keys.append(_id(pin.encode(), f"pin_ids[{place}]"))
    return Batch(ids, keys)
