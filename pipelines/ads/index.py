"""The index ``ads``: what decides whether and how an ad is served, what it shows, and how it has done.

Belongs here: the declaration and the transforms of its families. Their rows are joined rows (`joined`), from the
repository in a stream and from its dump in batch; what is made of them is `handlers`'.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ads import handlers, joined
from pipelines.ads.schema import CONTENT, CONTROL, PERFORMANCE
from pipelines.indexing import facts
from pipelines.indexing.spec import Documents, Family, Forward, IndexSpec, Inverted, State

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

CONTROL_STREAM, CONTENT_STREAM = "ads_control", "ads_content"


def control(rows: DataFrame, state: State) -> DataFrame:
    """Joined rows as facts of the family ``control``; an ad that is gone is a tombstone."""
    return _family(rows, CONTROL)


def content(rows: DataFrame, state: State) -> DataFrame:
    """Joined rows as facts of the family ``content``; an ad that is gone is a tombstone."""
    return _family(rows, CONTENT)


def performance(rows: DataFrame, state: State) -> DataFrame:
    """Joined rows as facts of the family ``performance``; an ad that is gone is a tombstone."""
    return _family(rows, PERFORMANCE)


def _family(rows: DataFrame, family: str) -> DataFrame:
    from pyspark.sql.pandas.types import from_arrow_schema

    def made(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            yield from _made(family, pa.Table.from_batches([batch])).to_batches()

    given = rows.select(*joined.arrow_schema(family).names)
    documents = given.mapInArrow(made, from_arrow_schema(_schema(family)))
    return facts.frame(
        documents,
        family=family,
        identity=[joined.KEY],
        key=joined.KEY,
        version=[f"versions[{place}]" for place in range(len(joined.versions(family)))],
        is_deleted="is_deleted",
        content_hash="xxhash64(is_deleted, document)",
        payload="document",
    )


def _schema(family: str) -> pa.Schema:
    return pa.schema(
        [
            pa.field(joined.KEY, pa.string()),
            pa.field("versions", pa.list_(pa.int64())),
            pa.field("is_deleted", pa.bool_()),
            pa.field("document", pa.struct(list(_document(family)))),
        ]
    )


def _made(family: str, rows: pa.Table) -> pa.Table:
    """Joined rows as their key, their versions, whether the ad is gone, and the document that handlers make."""
    given = rows.cast(joined.arrow_schema(family))
    flat = given.flatten()
    stands = zip(*(flat.column(name).to_pylist() for name in joined.versions(family)), strict=True)
    columns = {
        joined.KEY: flat.column(joined.KEY),
        "versions": list(stands),
        "is_deleted": pc.invert(flat.column("ads.is_there")),
        "document": handlers.run(family, given).to_struct_array(),
    }
    return pa.table(columns, schema=_schema(family))


def _document(family: str) -> pa.Schema:
    return handlers.document_schema(family).remove_metadata()


ADS = IndexSpec(
    name="ads",
    families=(
        Family(CONTROL, _document(CONTROL), CONTROL_STREAM, control),
        Family(CONTENT, _document(CONTENT), CONTENT_STREAM, content),
        Family(PERFORMANCE, _document(PERFORMANCE), CONTENT_STREAM, performance),
    ),
    read=Documents(presence=CONTROL),
    access=(
        Inverted("targeting", CONTROL, "targeting_terms"),
        Inverted("excluded", CONTROL, "excluded_terms"),
        Inverted("servable", CONTROL, "is_servable"),
        Inverted("text", CONTENT, "text_terms"),
        Inverted("campaign", CONTROL, "campaign_id"),
        Inverted("advertiser", CONTROL, "advertiser_id"),
        Forward(CONTROL, ("effective_bid_usd_micros", "starts_at_ms", "ends_at_ms", "balance_usd_micros")),
        Forward(CONTENT, ("quality_score", "is_available")),
        Forward(PERFORMANCE, ("click_rate_7d", "hide_rate_7d")),
    ),
)
