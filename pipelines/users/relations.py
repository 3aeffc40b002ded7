"""Pins as a relation that events look up: in the index as it is served by a stream, in the curated tables by a batch.

Belongs here: both ways to the same columns (`indexed.LOOKED_UP`). Does not belong here: which columns those are
(`indexed`), and what an event makes of them (`index`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import TidemarkError
from pipelines.indexing.documents import DocumentsView
from pipelines.users.indexed import FAMILIES, INDEXED, KEPT, LOOKED_UP, RELATION

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from pipelines.indexing.overlay import Overlay

Read = Callable[[str], "DataFrame"]

READS = {RELATION: tuple(f"curated.pins_{family}" for family in FAMILIES)}
"""Relation → the tables that a batch joins for it."""

log = logging.getLogger(__name__)


class PinsState:
    """The state of a stream: the index of pins, base and delta, as far as it goes when it is asked.

    It follows in the stream's own process. Where it cannot be followed, what was known last is looked up, and the log
    says why: a stream of events must not stop for pins. What was looked up so is mended by the next base.
    """

    def __init__(self, served: Callable[[], Hashable], opened: Callable[[], Overlay]) -> None:
        """``served``: says what is served, as any value; ``opened``: follows that from now on."""
        self._served, self._opened = served, opened
        self._named: Hashable = None
        self._overlay: Overlay | None = None

    def look_up(self, name: str, rows: pa.Table) -> pa.Table:
        """Rows with what their pins say; ``name`` is `RELATION`."""
        assert name == RELATION, name
        try:
            self._follow()
        except (TidemarkError, OSError, pa.ArrowException) as error:
            log.warning("events are indexed with pins as they were known before: %s", error)
        if self._overlay is None:
            return with_pins(rows, None)
        view = self._overlay.view
        assert isinstance(view, DocumentsView)
        return with_pins(rows, view)

    def _follow(self) -> None:
        named = self._served()
        if self._overlay is None or named != self._named:
            self._overlay, self._named = self._opened(), named
        else:
            self._overlay.catch_up()


def with_pins(rows: pa.Table, pins: DocumentsView | None) -> pa.Table:
    """Rows with the columns `LOOKED_UP`; ``pins``: None if nothing is known of any."""
    encoded = pc.dictionary_encode(rows.column("pin_id").combine_chunks())
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    keys = encoded.dictionary.cast(pa.binary()).to_pylist()
    found = _of_keys(pins, keys) if pins is not None and keys else None
    for field in LOOKED_UP:
        column = (
            pa.nulls(rows.num_rows, field.type) if found is None else found[field.name].take(encoded.indices)
        )
        if field.name not in INDEXED.names:
            column = pc.fill_null(column, 0)
        rows = rows.append_column(field, column)
    return rows


def _of_keys(pins: DocumentsView, keys: Sequence[bytes]) -> dict[str, pa.Array]:
    """What pins say, a value a key."""
    found = dict(zip(KEPT, pins.joined(list(KEPT.values()), keys), strict=True))
    for family in FAMILIES:
        ranks = pins.ranks(family, keys)
        stands = 2 * ranks.versions[:, 0] + ranks.is_deleted.astype(np.int64)
        found |= {f"_{family}_stand": pa.array(stands), f"_{family}_hash": pa.array(ranks.content_hash)}
    return found


def plan(rows: DataFrame, read: Read) -> DataFrame:
    """Rows with the columns `LOOKED_UP`: a join with the curated tables of pins.

    Args:
        rows: With `pin_id`.
        read: Gives a table by its name.
    """
    joined = rows
    for family, table in zip(FAMILIES, READS[RELATION], strict=True):
        kept = [
            f"CASE WHEN NOT is_deleted THEN {family}.{column} END AS _{name}"
            for name, (of, column) in KEPT.items()
            if of == family
        ]
        pins = read(table).selectExpr(
            f"pin_id AS _{family}_pin_id",
            *kept,
            f"NOT is_deleted AS _{family}_is_there",
            f"2 * version + int(is_deleted) AS _{family}_stand",
            f"{family}_hash AS _{family}_hash",
        )
        joined = joined.join(pins, joined["pin_id"] == pins[f"_{family}_pin_id"], "left")
    presence = next(iter(FAMILIES))
    columns = [f"CASE WHEN _{presence}_is_there THEN _{name} END AS {name}" for name in KEPT]
    stands = [name for name in LOOKED_UP.names if name not in KEPT]
    of_pins = [f"coalesce({name}, 0L) AS {name}" for name in stands]
    given = ("`{}`".format(name.replace("`", "``")) for name in rows.columns)
    return joined.selectExpr(*given, *columns, *of_pins)


RELATIONS: dict[str, Callable[[DataFrame, Read], DataFrame]] = {RELATION: plan}
"""Relation → how a batch joins it to rows."""
