"""Topic `pin-updates`: new pins, changed categories, prices and availabilities, deletions; keyed by pin.

    {"pin_id": "1095275", "version": 3, "event_time": "2017-01-01T00:00:00Z",
     "catalogue": {"title": "SOFT DRINKS", "category": "SOFT DRINKS", "department": "GROCERY", "brand": "National"},
     "offer": {"price_usd_micros": 990000, "is_available": true}}
    {"op": "delete", "pin_id": "1095275", "version": 4}

A record sets whole families: what a family does not say is null afterwards, and a family that the record does not name
stays as it was. One version (1 where absent) holds for the record. A deletion takes every family, and what it carries
besides its identity is not read. Fields that are not named here are allowed; inside a family they count in its content
hash, and become columns of it when they have been learned.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipelines.contracts.contract import (
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

MAX_TITLE_BYTES = 4_096
MAX_LABEL_BYTES = 512

CATALOGUE = pa.struct(
    [
        pa.field("title", pa.string()),
        pa.field("category", pa.string()),
        pa.field("department", pa.string()),
        pa.field("brand", pa.string()),
    ]
)
OFFER = pa.struct([pa.field("price_usd_micros", pa.int64()), pa.field("is_available", pa.bool_())])

ROW_SCHEMA = pa.schema(
    [
        pa.field("pin_id", pa.string()),
        pa.field("version", pa.int64()),
        pa.field("event_time", pa.timestamp("us", tz="UTC")),
        pa.field("is_deleted", pa.bool_()),
        pa.field("catalogue", CATALOGUE),
        pa.field("catalogue_hash", pa.int64()),  # null exactly if the record does not set the family
        pa.field("offer", OFFER),
        pa.field("offer_hash", pa.int64()),
    ]
)


def _parse(record: Record, broker_time_ms: int) -> Row:
    pin_id = take_id(record, "pin_id")
    version = take_version(record)
    if take_op(record):
        return (pin_id, version, None, True, None, (hashed := content_hash(record)), None, hashed)
    event_time = read_time(record, "event_time", broker_time_ms)
    catalogue, catalogue_hash = _family(record, "catalogue", _catalogue)
    offer, offer_hash = _family(record, "offer", _offer)
    if catalogue is None and offer is None:
        raise Refused(
            "no_family", "catalogue and offer are both missing; at least one must be an object", "catalogue"
        )
    return (pin_id, version, event_time, False, catalogue, catalogue_hash, offer, offer_hash)


def _family(record: Record, name: str, read: Any) -> tuple[dict[str, Any] | None, int | None]:
    found = record.get(name)
    if found is None:
        return None, None
    if type(found) is not dict:
        raise wrong_type(found, name, "an object, or absent")
    family = read(found)
    return family, content_hash(found)


def _catalogue(found: Record) -> dict[str, Any]:
    return {
        "title": read_text(found, "title", MAX_TITLE_BYTES, "catalogue."),
        "category": read_text(found, "category", MAX_LABEL_BYTES, "catalogue."),
        "department": read_text(found, "department", MAX_LABEL_BYTES, "catalogue."),
        "brand": read_text(found, "brand", MAX_LABEL_BYTES, "catalogue."),
    }


def _offer(found: Record) -> dict[str, Any]:
    price = read_integer(found, "price_usd_micros", 0, MAX_USD_MICROS, "offer.")
    if price is None:
        raise missing("offer.price_usd_micros", f"an integer from 0 to {MAX_USD_MICROS}")
    is_available = found.get("is_available")
    if type(is_available) is not bool:
        raise wrong_type(is_available, "offer.is_available", "true or false")
    return {"price_usd_micros": price, "is_available": is_available}


PIN_UPDATES = Contract(
    topic="pin-updates",
    version=1,
    key_field="pin_id",
    row_schema=ROW_SCHEMA,
    parse=_parse,
    grows=("catalogue", "offer"),
    examples=(
        {
            "pin_id": "1095275",
            "version": 3,
            "catalogue": {
                "title": "SOFT DRINKS 12/18&15PK CAN CAR, 12 OZ",
                "category": "SOFT DRINKS",
                "department": "GROCERY",
                "brand": "National",
            },
            "offer": {"price_usd_micros": 990000, "is_available": True},
        },
        {"op": "delete", "pin_id": "1095275", "version": 4},
    ),
)
