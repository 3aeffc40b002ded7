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
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import orjson

from pipelines.indexing import position as positions
from pipelines.indexing.position import Position

MAX_ID_BYTES = 512
MAX_K = 500
MAX_BATCH = 500
MAX_USERS = 100
MAX_LIMIT = 1000
MAX_TEXTS = 200
MAX_NUMBER = 1_000_000
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

    def cursor(self, most_bytes: int = MAX_ID_BYTES) -> tuple[int, bytes] | None:
        """Where a page begins: after this (time_ms, id of at most so many bytes); None for the first page."""
        text = self._values.get("cursor")
        if text is None:
            return None
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            time_ms, event = _TIME.unpack_from(raw)[0], raw[_TIME.size :]
            if not event or len(event) > most_bytes:
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
    """The ids of a batch, as they were asked for and as keys."""

    ids: list[str]
    keys: list[bytes]


def read_batch(body: bytes, content_type: str, field: str) -> Batch:
    """The body of a `batchGet`: {"pin_ids": ["…", …]}, where `pin_ids` is the field."""
    rule = ids_rule(MAX_BATCH)
    return ids_of(read_object(body, content_type, {field: rule}), field, MAX_BATCH)


def ids_rule(most: int) -> str:
    """What a list of ids may be."""
    return f"a list of 1 to {most} ids, each a text of 1 to {MAX_ID_BYTES} bytes without NUL"


def ids_of(said: Mapping[str, Any], field: str, most: int) -> Batch:
    """A list of ids of a JSON object."""
    rule, ids = ids_rule(most), said.get(field)
    if not isinstance(ids, list) or not ids:
        raise Problem(400, field, "there is no list of ids", rule)
    if len(ids) > most:
        raise Problem(400, field, f"the list has {len(ids)} ids", rule)
    keys = []
    for place, one in enumerate(ids):
        if not isinstance(one, str):
            raise Problem(400, f"{field}[{place}]", "the id is not a text", rule)
        keys.append(_id(one.encode(), f"{field}[{place}]"))
    return Batch(ids, keys)


def read_object(body: bytes, content_type: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """A body that is a JSON object; ``known``: its fields, and what each may be."""
    if content_type.split(";")[0].strip().lower() != "application/json":
        shown = _shown(content_type) or "absent"
        raise Problem(415, "Content-Type", f"the content type is {shown}", "application/json")
    try:
        said = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise Problem(400, "body", f"the body is not JSON: {_shown(str(error))}", known) from None
    return object_of(said, "body", known)


def object_of(said: Any, field: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that has none but these fields; the body, or a field of it."""
    if not isinstance(said, dict):
        what = "the body" if field == "body" else "it"
        raise Problem(400, field, f"{what} is not a JSON object", known)
    for name in said:
        if name not in known:
            shown = _shown(name)
            path = shown if field == "body" else f"{field}.{shown}"
            raise Problem(400, path, "there is no such field", list(known))
    return said


def natural_of(said: Mapping[str, Any], name: str, path: str, least: int, most: int) -> int | None:
    """A whole number of a JSON object; None where it is absent or null."""
    value = said.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise Problem(400, path, "it is not allowed", f"a whole number from {least} to {most}")
    return value


def now_ms_of(said: Mapping[str, Any]) -> int:
    """The time as of which a JSON object asks, its field `now_ms`; now, where it is absent or null."""
    found = natural_of(said, "now_ms", "now_ms", 0, MAX_TIME_MS)
    return int(time.time() * 1000) if found is None else found


def text_of(value: Any, path: str, choices: Sequence[str] = ()) -> str:
    """A text, of these if there are any."""
    rule: Any = list(choices) or f"a text of 1 to {MAX_ID_BYTES} bytes without NUL"
    if not isinstance(value, str) or (choices and value not in choices):
        raise Problem(400, path, "it is not allowed", rule)
    if not value or len(value.encode()) > MAX_ID_BYTES or "\0" in value:
        raise Problem(400, path, "the text is empty, too long, or holds the character NUL", rule)
    return value


def numbers_of(said: Mapping[str, Any], name: str, path: str, count: int) -> tuple[float, ...] | None:
    """A list of so many finite numbers of a JSON object; None where it is absent or null."""
    values = said.get(name)
    if values is None:
        return None
    is_list = isinstance(values, list) and len(values) == count
    if not is_list or not all(type(one) in (int, float) and abs(one) <= MAX_NUMBER for one in values):
        raise Problem(400, path, "it is not such a list", f"a list of {count} numbers up to {MAX_NUMBER:,}")
    return tuple(map(float, values))


def texts_of(
    said: Mapping[str, Any], name: str, path: str, most: int = MAX_TEXTS, choices: Sequence[str] = ()
) -> tuple[str, ...]:
    """A list of texts of a JSON object, each of these if there are any; none where it is absent or null."""
    values = said.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or len(values) > most:
        raise Problem(400, path, "it is not such a list", f"a list of at most {most} texts")
    return tuple(text_of(value, f"{path}[{place}]", choices) for place, value in enumerate(values))
