"""What an event keeps of its pin as it was when the event was indexed: which columns, by which names, at which stand.

Belongs here: the columns, and those that a look-up adds to the rows of a batch or of an epoch. Does not belong here:
looking them up (`relations`), and the facts that are made of them (`index`).

Which statement of an event stands is decided by the event alone: its version, a deletion, the hash of what it says. Of
facts that say the same of the event the one of the newer pin stands: by the stands of the pin's families, then by their
hashes. So a base, which looks up anew, stands over what a stream looked up before it, and what is read twice only moves
forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pipelines.pins.index import CATALOGUE, OFFER

PREFIX = "indexed_"
FAMILIES: Mapping[str, pa.Schema] = {"catalogue": CATALOGUE, "offer": OFFER}
"""The families of the pin that are looked up; the first is the one without which there is no pin."""

KEPT: Mapping[str, tuple[str, str]] = {
    f"{PREFIX}{column}": (family, column)
    for family, column in (
        ("catalogue", "category"),
        ("catalogue", "department"),
        ("catalogue", "brand"),
        ("offer", "price_usd_micros"),
        ("offer", "is_available"),
    )
}
"""Name in an event → family and column of the pin. A title is left out: it would take as much room as all of these."""

INDEXED = pa.schema([(name, FAMILIES[family].field(column).type) for name, (family, column) in KEPT.items()])
"""The columns of an event; null where nothing is known of its pin, or it has none."""

RELATION = "pins"
LOOKED_UP = pa.schema(
    [
        *INDEXED,
        *((f"_{family}_{part}", pa.int64()) for family in FAMILIES for part in ("stand", "hash")),
    ]
)
"""What a look-up adds to rows: the columns, and of each family its stand (twice its version, and one more if it is
deleted) and its content hash; 0 where nothing was ever said of it."""

MAX = 2**63 - 1
VERSION = (
    "version",
    f"CASE WHEN is_deleted THEN {MAX} ELSE least(content_hash, {MAX - 1}) END",
    "_catalogue_stand",
    "_offer_stand",
)
"""The version of a fact, in Spark SQL: what ranks statements of the event, then the stands of its pin."""

CONTENT_HASH = (
    "CASE WHEN is_deleted THEN content_hash ELSE (_catalogue_hash & -4294967296) |"
    " ((shiftright(_offer_hash, 32) & 4294967295) ^ 2147483648) END"
)
"""The content hash of a fact, in Spark SQL: the upper halves of the hashes of the pin's families, in the order in which
they rank."""
