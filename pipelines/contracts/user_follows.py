"""Topic `user-follows`: whom and what a user follows, keyed by user.

    {"user_id": "900", "pin_id": "1095275", "version": 1, "event_time": "2017-01-01T11:53:26Z"}
    {"user_id": "900", "followed_user_id": "17", "version": 1}
    {"op": "delete", "user_id": "900", "pin_id": "1095275", "version": 2}

A record is about one user and one thing that the user follows: a pin, or another user. A deletion ends it, and a
greater version after that begins it anew. Nobody follows themself.

Identity is (user_id, kind, followed_id); in the row the two fields that name what is followed are one, with its kind.
`version` (1 where absent) orders what was said of it. `event_time` is when it was followed; where it is absent, when
the record was taken. Fields that are not named here are allowed and count in the content hash; they become columns when
they have been learned.
"""

from __future__ import annotations

import pyarrow as pa

from pipelines.contracts.contract import (
    Contract,
    Record,
    Refused,
    Row,
    content_hash,
    read_time,
    take_id,
    take_op,
    take_version,
)

PIN, USER = "pin", "user"
KINDS = (PIN, USER)
"""What can be followed."""

FOLLOWED = {PIN: "pin_id", USER: "followed_user_id"}
"""Kind → the field of a record that names it."""

ROW_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("followed_id", pa.string()),
        pa.field("event_time", pa.timestamp("us", tz="UTC")),  # null where it is not said, and in a tombstone
        pa.field("version", pa.int64()),
        pa.field("is_deleted", pa.bool_()),
        pa.field("content_hash", pa.int64()),
    ]
)

_RULE = f"exactly one of {' and '.join(FOLLOWED.values())}"


def _parse(record: Record, broker_time_ms: int) -> Row:
    user_id = take_id(record, "user_id")
    kind, followed_id = _followed(record)
    if kind == USER and followed_id == user_id:
        raise Refused(
            "contradiction", "followed_user_id is the user's own; it must be another user", FOLLOWED[USER]
        )
    version = take_version(record)
    if take_op(record):
        return (user_id, kind, followed_id, None, version, True, content_hash(record))
    event_time = read_time(record, "event_time", broker_time_ms)
    return (user_id, kind, followed_id, event_time, version, False, content_hash(record))


def _followed(record: Record) -> tuple[str, str]:
    """What is followed, taken out of the record; a field that is null is absent."""
    named = [kind for kind, name in FOLLOWED.items() if record.get(name) is not None]
    if not named:
        raise Refused("missing_field", f"the record names nothing to follow; it must name {_RULE}", "pin_id")
    if len(named) > 1:
        raise Refused(
            "contradiction", f"the record names both a pin and a user; it must name {_RULE}", "pin_id"
        )
    found = take_id(record, FOLLOWED[named[0]])
    for name in FOLLOWED.values():
        record.pop(name, None)
    return named[0], found


USER_FOLLOWS = Contract(
    topic="user-follows",
    version=1,
    key_field="user_id",
    row_schema=ROW_SCHEMA,
    parse=_parse,
    examples=(
        {"user_id": "900", "pin_id": "1095275", "version": 1, "event_time": "2017-01-01T11:53:26Z"},
        {"user_id": "900", "followed_user_id": "17"},
        {"op": "delete", "user_id": "900", "pin_id": "1095275", "version": 2},
    ),
)
