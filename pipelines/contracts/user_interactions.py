"""Topic `user-interactions`: what a user did or saw, keyed by user.

    {"user_id": "900", "event_id": "31198570044:1095275", "pin_id": "1095275", "action": "purchase",
     "event_time": "2017-01-01T11:53:26Z", "quantity": 1, "value_usd_micros": 500000, "surface": "home"}
    {"user_id": "900", "event_id": "v7:0", "pin_id": "1095275", "action": "view", "event_time": 1483271606000,
     "ad_id": "a17", "campaign_id": "c8", "advertiser_id": "v3", "category": "dairy", "view_type": "promoted"}
    {"op": "delete", "user_id": "900", "event_id": "31198570044:1095275", "version": 2}

An event is about something, and names at least one of: a pin, an ad, its campaign, its advertiser, a category. A look
into a category, or an ad that shows no pin, is an event without a pin. `view_type` says how it was shown, in words of
the product's own.

`payload` says what only events of this action have to say, as the team that sends them declares (`payloads`).

What is found out later is said in `features`, a column family of its own: a record without an action that names the
event and its time. It changes nothing else of the event, and has a version of its own; a record of an event may bring
features as well.

    {"user_id": "900", "event_id": "v7:0", "event_time": 1483271606000, "features": {"is_converted": true}}

Identity is (user_id, event_id): the same event id under another user is another event. `version` (1 where absent)
orders what was said about an event; a deletion needs neither object nor time nor action, and what it carries besides
its identity is not read. Fields that are not named here are allowed and count in the content hash; they become columns
when they have been learned.
"""

from __future__ import annotations

import pyarrow as pa

from pipelines.contracts.contract import (
    MAX_QUANTITY,
    MAX_USD_MICROS,
    Contract,
    Record,
    Refused,
    Row,
    content_hash,
    missing,
    read_integer,
    read_text,
    read_time,
    take_id,
    take_op,
    take_version,
    wrong_type,
)
from pipelines.contracts.payload_files import declared
from pipelines.contracts.payloads import FEATURES, read_payload

ACTIONS = ("purchase", "view", "click", "save", "hide", "impression", "add_to_basket", "remove_from_basket")
"""The actions by name. Their order is the order of the counters: a new one goes to the end. An impression was on the
screen; a view was looked at."""

OBJECTS = ("pin_id", "ad_id", "campaign_id", "advertiser_id", "category")
"""What an event may be about, by the field that names it."""

MAX_WORD_BYTES = 128
"""Of a surface, a category, a view type."""

ROW_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("event_id", pa.string()),
        pa.field("pin_id", pa.string()),  # null where an event is about something else
        pa.field("action", pa.string()),  # null in a tombstone, like all but identity, version and hash
        pa.field("event_time", pa.timestamp("us", tz="UTC")),
        pa.field("version", pa.int64()),
        pa.field("is_deleted", pa.bool_()),
        pa.field("content_hash", pa.int64()),  # null exactly if the record brings features alone
        pa.field("quantity", pa.int64()),
        pa.field("value_usd_micros", pa.int64()),
        pa.field("surface", pa.string()),
        pa.field("ad_id", pa.string()),
        pa.field("campaign_id", pa.string()),
        pa.field("advertiser_id", pa.string()),
        pa.field("category", pa.string()),
        pa.field("view_type", pa.string()),
        pa.field("payload", pa.string()),  # JSON, sorted keys
        pa.field("features", pa.string()),  # JSON, sorted keys; a family of its own
        pa.field("features_hash", pa.int64()),  # null exactly if the record brings none
    ]
)

_IDS = OBJECTS[:4]
_OF_INTERACTION = (*OBJECTS, "surface", "view_type", "quantity", "value_usd_micros", "payload")
_NOTHING = (None,) * 9  # what a row without an interaction has between content_hash and features
_ACTIONS = frozenset(ACTIONS)
_ACTION_RULE = f"one of {', '.join(ACTIONS)}"
_OBJECT_RULE = f"it must name at least one of {', '.join(OBJECTS)}"


def _parse(record: Record, broker_time_ms: int) -> Row:
    user_id = take_id(record, "user_id")
    event_id = take_id(record, "event_id")
    version = take_version(record)
    if take_op(record):
        hashed = content_hash(record)  # a deletion takes both families
        return (user_id, event_id, None, None, None, version, True, hashed, *_NOTHING, None, hashed)
    features = read_payload(record, "features", FEATURES, broker_time_ms, declared())
    said = record.pop("features", None)
    features_hash = None if features is None else content_hash(said)
    if features is not None and record.get("action") is None and not any(map(record.get, _OF_INTERACTION)):
        event_time = _time(record, broker_time_ms)
        row = (user_id, event_id, None, None, event_time, version, False, None)
        return (*row, *_NOTHING, features, features_hash)
    pin_id, ad_id, campaign_id, advertiser_id = (_id(record, name) for name in _IDS)
    category = _word(record, "category")
    if not (pin_id or ad_id or campaign_id or advertiser_id or category):
        raise Refused("missing_field", f"the event names nothing that it is about; {_OBJECT_RULE}", "pin_id")
    action = record.get("action")
    if type(action) is not str:
        raise wrong_type(action, "action", _ACTION_RULE)
    if action not in _ACTIONS:
        raise Refused("unknown_action", f"action is {action[:40]!r}; it must be {_ACTION_RULE}", "action")
    event_time = _time(record, broker_time_ms)
    quantity = read_integer(record, "quantity", 1, MAX_QUANTITY)
    value_usd_micros = read_integer(record, "value_usd_micros", 0, MAX_USD_MICROS)
    surface, view_type = _word(record, "surface"), _word(record, "view_type")
    payload = read_payload(record, "payload", action, broker_time_ms, declared())
    return (
        user_id,
        event_id,
        pin_id,
        action,
        event_time,
        version,
        False,
        content_hash(record),
        quantity,
        value_usd_micros,
        surface,
        ad_id,
        campaign_id,
        advertiser_id,
        category,
        view_type,
        payload,
        features,
        features_hash,
    )


def _time(record: Record, broker_time_ms: int) -> int:
    found = read_time(record, "event_time", broker_time_ms)
    if found is None:
        raise missing("event_time", "ISO 8601 in UTC or milliseconds since 1970")
    return found


def _word(record: Record, name: str) -> str | None:
    return read_text(record, name, MAX_WORD_BYTES) if name in record else None


def _id(record: Record, name: str) -> str | None:
    """An optional id; null is absent."""
    if name not in record:
        return None
    if record[name] is None:
        return record.pop(name)
    record[name] = found = take_id(record, name)
    return found


USER_INTERACTIONS = Contract(
    topic="user-interactions",
    version=1,
    key_field="user_id",
    row_schema=ROW_SCHEMA,
    parse=_parse,
    examples=(
        {
            "user_id": "900",
            "event_id": "31198570044:1095275",
            "pin_id": "1095275",
            "action": "purchase",
            "event_time": "2017-01-01T11:53:26Z",
            "quantity": 1,
            "value_usd_micros": 500000,
        },
        {
            "user_id": "900",
            "event_id": "v7:0",
            "pin_id": "1095275",
            "action": "view",
            "event_time": 1483271606000,
            "surface": "home",
            "ad_id": "a17",
            "campaign_id": "c8",
            "advertiser_id": "v3",
            "category": "dairy",
            "view_type": "promoted",
        },
        {
            "user_id": "900",
            "event_id": "v8:0",
            "action": "view",
            "event_time": 1483271607000,
            "category": "dairy",
            "payload": {"dwell_ms": 4200},
        },
        {
            "user_id": "900",
            "event_id": "v7:0",
            "event_time": 1483271606000,
            "features": {"is_converted": True},
        },
        {"op": "delete", "user_id": "900", "event_id": "31198570044:1095275", "version": 2},
    ),
)
