"""How pins, events and items are written as JSON.

Belongs here: the shapes of answers, and the examples of them in the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pyarrow as pa

from pipelines.recommend.candidates import Answer
from pipelines.users.inbox import Follow, InboxEntry, PinEntry

if TYPE_CHECKING:
    from pipelines.ads.overrides import Entry

CATALOGUE = {
    "title": "FLUID MILK WHITE ONLY",
    "category": "FLUID MILK PRODUCTS",
    "department": "GROCERY",
    "brand": "Private",
}
OFFER = {"price_usd_micros": 1_990_000, "is_available": True}
EXAMPLE_DOCUMENT = {"pin_id": "1029743", "catalogue": CATALOGUE, "offer": OFFER}
EXAMPLE_BASIS = {"kind": "folded", "events_used": 412, "model_id": "pin_als/3", "window_days": None}
EXAMPLE_ITEM = {"pin_id": "1029743", "score": 0.8130927205085754, "catalogue": CATALOGUE, "offer": OFFER}
EXAMPLE_EVENT = {
    "event_id": "31198570044:1095275",
    "event_time": "2017-01-01T11:53:26.000Z",
    "pin_id": "1095275",
    "action": "purchase",
    "quantity": 1,
    "value_usd_micros": 500_000,
    "surface": None,
    "ad_id": None,
    "campaign_id": None,
    "advertiser_id": None,
    "category": None,
    "view_type": None,
    "payload": None,
    "features": None,
}
EXAMPLE_FOLLOW = {
    "pin_id": "1029743",
    "followed_user_id": None,
    "since": "2017-01-01T11:53:26.000Z",
    "version": 1,
}
EXAMPLE_PIN_ENTRY = {
    "kind": "pin",
    "time": "2017-02-01T08:00:00.000Z",
    "what": "changed",
    "pin_id": "1029743",
    "version": 7,
    "title": "FLUID MILK WHITE ONLY",
    "changes": [
        {"field": "price_usd_micros", "from": 2_490_000, "to": 1_990_000},
        {"field": "is_available", "from": False, "to": True},
    ],
}
EXAMPLE_USER_ENTRY = {
    "kind": "user",
    "time": "2017-02-01T07:59:00.000Z",
    "what": "save",
    "user_id": "17",
    "event_id": "s1",
    "pin_id": "1095275",
    "category": None,
}
EXAMPLE_AD = {
    "ad_id": "a17",
    "control": {"campaign_id": "c0", "ad_status": "active", "is_servable": True},
    "content": {"title": "an oak chair", "quality_score": 0.62},
    "performance": {"click_rate_7d": 0.0052},
    "versions": {
        "control": {"ads": 4051, "ad_groups": 3020, "campaigns": 2040, "advertisers": 1007},
        "content": {"ads": 4051, "pins": 9012, "images": 8011},
        "performance": {"ads": 5000},
    },
    "overridden_by": [],
}


def text(key: bytes) -> str:
    """An id as text."""
    return key.decode("utf-8", "replace")


def document(pin: bytes, found: Mapping[str, Any]) -> dict[str, Any]:
    """A pin's document."""
    return {"pin_id": text(pin), "catalogue": found["catalogue"], "offer": found.get("offer")}


def missing(pin: str) -> dict[str, Any]:
    """What stands for a pin that there is no document of."""
    return {"pin_id": pin, "catalogue": None, "offer": None, "is_missing": True}


def ad(
    key: bytes, found: Mapping[str, Any], versions: Mapping[str, Any], newer: Iterable[Entry]
) -> dict[str, Any]:
    """An ad's document; ``versions``: by family, then by the table whose row's stand it is."""
    overridden = [{"table": entry.table, "key": entry.key, "stand": entry.stand} for entry in newer]
    families = {family: found.get(family) for family in versions}
    return {"ad_id": text(key), **families, "versions": versions, "overridden_by": overridden}


def missing_ad(ad: str) -> dict[str, Any]:
    """What stands for an ad that there is no document of."""
    return {"ad_id": ad, "is_missing": True}


def items(answer: Answer) -> list[dict[str, Any]]:
    """Scored pins."""
    return [
        {
            "pin_id": text(pin),
            "score": score,
            "catalogue": found["catalogue"],
            "offer": found.get("offer"),
        }
        for pin, score, found in answer.items
    ]


def basis(answer: Answer) -> dict[str, Any]:
    """What an answer was made from."""
    return answer.basis._asdict()


def events(table: pa.Table) -> list[dict[str, Any]]:
    """Events, in the table's order."""
    columns = {
        name: table.column(name).to_pylist() for name in table.column_names if name not in ("id", "time_ms")
    }
    columns["payload"] = list(map(as_json, columns["payload"]))
    columns["features"] = [as_json(one and one["features"]) for one in columns["features"]]
    ids, times = table.column("id").to_pylist(), times_of(table.column("time_ms").to_numpy())
    return [
        {"event_id": text(event), "event_time": time}
        | {name: column[row] for name, column in columns.items()}
        for row, (event, time) in enumerate(zip(ids, times, strict=True))
    ]


def as_json(written: str | None) -> orjson.Fragment | None:
    """What is kept as JSON, as a part of an answer."""
    return None if written is None else orjson.Fragment(written)


def follows(found: Iterable[Follow]) -> list[dict[str, Any]]:
    """What a user follows, in the order given."""
    found = list(found)
    times = times_of(np.array([one.since_ms for one in found], np.int64))
    return [
        {
            "pin_id": None if one.pin_id is None else text(one.pin_id),
            "followed_user_id": None if one.followed_user_id is None else text(one.followed_user_id),
            "since": time,
            "version": one.version,
        }
        for one, time in zip(found, times, strict=True)
    ]


def inbox(entries: Iterable[InboxEntry]) -> list[dict[str, Any]]:
    """Entries of an inbox, in the order given."""
    entries = list(entries)
    times = times_of(np.array([entry.time_ms for entry in entries], np.int64))
    return [_entry(entry, time) for entry, time in zip(entries, times, strict=True)]


def _entry(entry: InboxEntry, time: str) -> dict[str, Any]:
    if isinstance(entry, PinEntry):
        return {
            "kind": "pin",
            "time": time,
            "what": entry.what,
            "pin_id": text(entry.pin_id),
            "version": entry.version,
            "title": entry.title,
            "changes": [{"field": c.field, "from": c.was, "to": c.is_now} for c in entry.changes],
        }
    return {
        "kind": "user",
        "time": time,
        "what": entry.action,
        "user_id": text(entry.user_id),
        "event_id": text(entry.event_id),
        "pin_id": entry.pin_id,
        "category": entry.category,
    }


def times_of(times_ms: np.ndarray) -> list[str]:
    """Times in ms as ISO 8601 in UTC."""
    if not len(times_ms):
        return []
    return np.datetime_as_string(times_ms.astype("datetime64[ms]"), unit="ms", timezone="UTC").tolist()
