"""The index ``ads``: what decides whether and how an ad is served, what it shows, and how it has done.

Belongs here: the declaration and the transforms of its families. Their rows name ads; what an ad is joined of is looked
up (`joined`), in the repository by a stream and in its dump by a batch; what is made of it is `handlers`'.
"""

from __future__ import annotations

import functools
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ads import handlers, joined
from pipelines.ads.schema import CONTENT, CONTROL, DIMENSIONS, PERFORMANCE
from pipelines.indexing import facts
from pipelines.indexing.spec import Documents, Family, Forward, IndexSpec, Inverted, State, Vector

CONTROL_STREAM, CONTENT_STREAM = "ads_control", "ads_content"


def control(rows: Any, state: State) -> Any:
    """Rows that name ads as facts of the family ``control``; an ad that is gone is a tombstone."""
    return _family(rows, state, CONTROL)


def content(rows: Any, state: State) -> Any:
    """Rows that name ads as facts of the family ``content``; an ad that is gone is a tombstone."""
    return _family(rows, state, CONTENT)


def performance(rows: Any, state: State) -> Any:
    """Rows that name ads as facts of the family ``performance``; an ad that is gone is a tombstone."""
    return _family(rows, state, PERFORMANCE)


def _family(rows: Any, state: State, family: str) -> Any:
    found = state.look_up(joined.relation(family), rows).select(joined.arrow_schema(family).names)
    return facts.mapped(
        found, functools.partial(facts_of, family), facts.family_schema(family, _document(family))
    )


def facts_of(family: str, rows: pa.Table) -> pa.Table:
    """Joined rows as facts: the documents that handlers make, at the stands of what they are joined of; an ad that is
    gone, or collected, is a tombstone."""
    given = rows.cast(joined.arrow_schema(family))
    flat = given.combine_chunks().flatten()
    column = {name: pa.concat_arrays(flat.column(name).chunks) for name in flat.column_names if flat.num_rows}
    if not column:
        return facts.family_schema(family, _document(family)).empty_table()
    made = handlers.run(family, given).combine_chunks()
    is_deleted = pc.invert(column["ads.is_there"])
    if family == CONTROL:
        is_deleted = pc.or_(is_deleted, pa.concat_arrays(made.column("is_collected").chunks))
    return facts.documents(
        family=family,
        key=column[joined.KEY],
        version=[column[name] for name in joined.versions(family)],
        is_deleted=is_deleted,
        payload=pa.concat_arrays(made.to_struct_array().chunks),
    )


def _document(family: str) -> pa.Schema:
    return handlers.document_schema(family).remove_metadata()


ADS = IndexSpec(
    name="ads",
    families=(
        Family(CONTROL, _document(CONTROL), CONTROL_STREAM, control, takes_arrow=True),
        Family(CONTENT, _document(CONTENT), CONTENT_STREAM, content, takes_arrow=True),
        Family(PERFORMANCE, _document(PERFORMANCE), CONTENT_STREAM, performance, takes_arrow=True),
    ),
    read=Documents(presence=CONTROL),
    access=(
        Inverted("targeting", CONTROL, "targeting_terms"),
        Inverted("excluded", CONTROL, "excluded_terms"),
        Inverted("servable", CONTROL, "is_servable"),
        Inverted("text", CONTENT, "text_terms"),
        Inverted("category", CONTENT, "category"),
        Inverted("ad_group", CONTROL, "ad_group_id"),
        Inverted("campaign", CONTROL, "campaign_id"),
        Inverted("advertiser", CONTROL, "advertiser_id"),
        Vector("visual", CONTENT, "visual_embedding", DIMENSIONS, is_scanned=True),
        Forward(CONTROL, ("effective_bid_usd_micros", "starts_at_ms", "ends_at_ms", "balance_usd_micros")),
        Forward(CONTROL, ("effective_daily_budget_usd_micros", "lifetime_budget_usd_micros")),
        Forward(CONTENT, ("has_pin", "has_image", "is_available", "quality_score")),
        Forward(PERFORMANCE, ("click_rate_7d", "hide_rate_7d")),
    ),
)
