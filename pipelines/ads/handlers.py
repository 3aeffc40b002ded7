"""What is made of an ad's rows: the fields of its document, by handlers that declare their inputs.

Belongs here: the handlers, each a pure function of whole Arrow columns, and running all those of a family. One function
is used by the batch, the streams and a call by HTTP. Does not belong here: reading the rows (`joined` says which), and
what is done with documents (`index`, the serving).

A change of a column that no handler names makes no work. A handler has no clock and no randomness.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ads import joined
from pipelines.ads.schema import CONTENT, CONTROL, PERFORMANCE, TABLES
from pipelines.errors import TidemarkError

Columns = Mapping[str, pa.Array]
"""The inputs of a handler by name (`campaigns.status`), equally long."""

INT, FLOAT, BOOL, TEXT, TEXTS = pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.list_(pa.string())
USD_MICROS_MAX = 2**62


class BadHandler(TidemarkError):
    """A handler declares something that is not there, or makes something that it did not declare."""


class Field(NamedTuple):
    """A field of the document: its type, and what it says with its unit."""

    name: str
    type: pa.DataType
    doc: str


class Handler(NamedTuple):
    """What makes some fields of a family of the document.

    Attributes:
        name: What it is called, in errors and in `tidemark ads explain`.
        family: Of the document.
        inputs: Source columns (`campaigns.status`), `<table>.is_there` too; a change of one of them triggers it.
        fields: What it makes.
        make: Columns of n values → for each field an Arrow array of n values.
    """

    name: str
    family: str
    inputs: tuple[str, ...]
    fields: tuple[Field, ...]
    make: Callable[[Columns], Mapping[str, pa.Array]]


def run(family: str, rows: pa.Table) -> pa.Table:
    """The fields of a family's documents, one row for each joined row, in their order.

    Args:
        family: Of the document.
        rows: As `joined.arrow_schema` says.

    Raises:
        BadHandler: A handler made other fields than it declares.
    """
    flat = rows.combine_chunks().flatten()
    given = {name: _whole_array(flat.column(name)) for name in flat.column_names}
    made: dict[str, pa.Array] = {}
    for handler in of_family(family):
        fields = handler.make({name: given[name] for name in handler.inputs})
        if set(fields) != {field.name for field in handler.fields}:
            raise BadHandler(f"{handler.name} made {', '.join(fields)}", where=family)
        made |= fields
    wanted = document_schema(family)
    return pa.table([made[field.name].cast(field.type) for field in wanted], schema=wanted)


def made_again(family: str, documents: pa.Table, replaced: Columns) -> pa.Table:
    """Documents of a family as they would be if some source columns had other values, by the handlers that name them.

    Args:
        family: Of the documents.
        documents: In the columns of `document_schema`.
        replaced: Source columns, and their values now. The other inputs of the handlers concerned must be `TOLD`.
    """
    made = {name: _whole_array(documents.column(name)) for name in documents.column_names}
    given = {source: pa.nulls(documents.num_rows, FLOAT) for source, field in TOLD.items() if field is None}
    given |= {source: made[field] for source, field in TOLD.items() if field in made}
    given |= replaced
    for handler in of_family(family):
        if replaced.keys() & set(handler.inputs):
            made |= handler.make({name: given[name] for name in handler.inputs})
    wanted = document_schema(family)
    return pa.table([made[field.name].cast(field.type) for field in wanted], schema=wanted)


def of_family(family: str) -> tuple[Handler, ...]:
    """The handlers of a family of the document, in their order."""
    return tuple(handler for handler in HANDLERS if handler.family == family)


@functools.cache
def document_schema(family: str) -> pa.Schema:
    """The fields that the handlers of a family make."""
    fields = [field for handler in of_family(family) for field in handler.fields]
    return pa.schema([pa.field(f.name, f.type, metadata={"doc": f.doc}) for f in fields])


@functools.cache
def triggers(family: str) -> frozenset[str]:
    """The source columns whose change makes a family's documents again: what handlers look at, and what joins follow.

    `campaigns.is_there` is among them: the row appeared, or is gone.
    """
    looked_at = {name for handler in of_family(family) for name in handler.inputs}
    followed = {joined.name_of(*given.by) for given in joined.INPUTS[family] if given.by is not None}
    return frozenset(looked_at | followed | {f"{given.table}.is_there" for given in joined.INPUTS[family]})


def _whole_array(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _renamed(family: str, name: str, fields: Mapping[str, str]) -> Handler:
    """A handler that takes source columns as they are; ``fields``: source column → field."""
    declared = {
        joined.name_of(table.name, column.name): (joined.ARROW[column.type], column.doc)
        for table, column in joined.columns(family)
    }
    for given in joined.INPUTS[family]:
        declared[joined.name_of(given.table, "is_there")] = (BOOL, f"whether {given.table} has its row")
    return Handler(
        name,
        family,
        tuple(fields),
        tuple(Field(field, *declared[source]) for source, field in fields.items()),
        lambda columns: {field: columns[source] for source, field in fields.items()},
    )


# ------------------------------------------------------------------------------------------------ control

_AS_THEY_ARE = _renamed(
    CONTROL,
    "control_columns",
    {
        "ads.ad_group_id": "ad_group_id",
        "ads.pin_id": "pin_id",
        "ads.name": "ad_name",
        "ads.status": "ad_status",
        "ads.review_status": "review_status",
        "ads.creative_type": "creative_type",
        "ads.destination_url": "destination_url",
        "ads.tracking_url": "tracking_url",
        "ads.call_to_action": "call_to_action",
        "ads.is_removable": "is_removable",
        "ads.created_at": "created_at_ms",
        "ads.collected_at": "collected_at_ms",
        "ad_groups.is_there": "has_ad_group",
        "ad_groups.campaign_id": "campaign_id",
        "ad_groups.name": "ad_group_name",
        "ad_groups.status": "ad_group_status",
        "ad_groups.bid_strategy": "bid_strategy",
        "ad_groups.billing_event": "billing_event",
        "ad_groups.conversion_window_days": "conversion_window_days",
        "ad_groups.is_targeting_expanded": "is_targeting_expanded",
        "campaigns.is_there": "has_campaign",
        "campaigns.advertiser_id": "advertiser_id",
        "campaigns.name": "campaign_name",
        "campaigns.status": "campaign_status",
        "campaigns.is_budget_shared": "is_budget_shared",
        "campaigns.objective": "objective",
        "campaigns.frequency_cap": "frequency_cap",
        "campaigns.frequency_cap_days": "frequency_cap_days",
        "campaigns.labels": "labels",
        "advertisers.is_there": "has_advertiser",
        "advertisers.name": "advertiser_name",
        "advertisers.status": "advertiser_status",
        "advertisers.country": "advertiser_country",
        "advertisers.currency": "currency",
        "advertisers.time_zone": "time_zone",
        "advertisers.industry": "industry",
        "advertisers.blocked_categories": "blocked_categories",
    },
)

_SCHEDULE = ("ad_groups.starts_at", "ad_groups.ends_at", "campaigns.starts_at", "campaigns.ends_at")
_LEVELS = (("ad", "ads"), ("ad group", "ad_groups"), ("campaign", "campaigns"), ("advertiser", "advertisers"))


def _standing(columns: Columns) -> dict[str, pa.Array]:
    """Why an ad is not served at any time, null where it may be.

    What is not there comes first, from the ad up; then the statuses from the advertiser down; then the review.
    """
    reason = pa.nulls(len(columns["ads.status"]), TEXT)
    reason = _unless("approved", columns["ads.review_status"], "review", reason)
    for what, table in _LEVELS:
        reason = _unless("active", columns[f"{table}.status"], what, reason)
    for what, table in reversed(_LEVELS[1:]):
        reason = pc.if_else(columns[f"{table}.is_there"], reason, f"{what} unknown")
    return {"blocked_by": reason, "is_servable": pc.is_null(reason)}


def _unless(wanted: str, status: pa.Array, what: str, reason: pa.Array) -> pa.Array:
    is_wanted = pc.fill_null(pc.equal(status, wanted), False)
    said = pc.binary_join_element_wise(what, pc.fill_null(status, "without a status"), " ")
    return pc.if_else(is_wanted, reason, said)


def _collected(columns: Columns) -> dict[str, pa.Array]:
    """Garbage collection counts as long as its cause holds: the ad is archived at some level, or had ended by then."""
    at = columns["ads.collected_at"]
    is_inactive = pc.less_equal(_schedule(columns)["ends_at_ms"], at)
    for _, table in _LEVELS:
        is_inactive = pc.or_kleene(is_inactive, pc.equal(columns[f"{table}.status"], "archived"))
    return {"is_collected": pc.fill_null(pc.and_kleene(pc.is_valid(at), is_inactive), False)}


def _schedule(columns: Columns) -> dict[str, pa.Array]:
    """An ad runs while its ad group and its campaign do: from the later beginning to the earlier end."""
    starts = pc.max_element_wise(columns["ad_groups.starts_at"], columns["campaigns.starts_at"])
    ends = pc.min_element_wise(columns["ad_groups.ends_at"], columns["campaigns.ends_at"])
    return {"starts_at_ms": starts, "ends_at_ms": ends}


def _money(columns: Columns) -> dict[str, pa.Array]:
    """The bid after the multipliers of ad and campaign (1 where there is none), rounded down; the tightest budget of a
    day: a campaign that shares its budget overrides those of its ad groups."""
    bid = columns["ad_groups.bid_usd_micros"]
    multiplier = pc.multiply(
        pc.fill_null(columns["ads.bid_multiplier"], 1.0),
        pc.fill_null(columns["campaigns.bid_multiplier"], 1.0),
    )
    effective = pc.floor(pc.multiply(bid.cast(FLOAT), multiplier))
    effective = pc.min_element_wise(effective, pa.scalar(float(USD_MICROS_MAX)), skip_nulls=False)
    is_shared = pc.fill_null(columns["campaigns.is_budget_shared"], False)
    of_group = pc.if_else(is_shared, pa.scalar(None, INT), columns["ad_groups.daily_budget_usd_micros"])
    of_campaign = columns["campaigns.daily_budget_usd_micros"]
    cap = columns["advertisers.spend_cap_usd_micros"]
    return {
        "bid_usd_micros": bid,
        "bid_multiplier": multiplier,
        "effective_bid_usd_micros": effective.cast(INT),
        "ad_group_daily_budget_usd_micros": columns["ad_groups.daily_budget_usd_micros"],
        "campaign_daily_budget_usd_micros": of_campaign,
        "effective_daily_budget_usd_micros": pc.min_element_wise(of_group, of_campaign, cap),
        "lifetime_budget_usd_micros": columns["campaigns.lifetime_budget_usd_micros"],
        "balance_usd_micros": columns["advertisers.balance_usd_micros"],
        "spend_cap_usd_micros": cap,
    }


TOLD: dict[str, str | None] = {
    **dict(zip(_AS_THEY_ARE.inputs, (field.name for field in _AS_THEY_ARE.fields), strict=True)),
    "ads.bid_multiplier": "bid_multiplier",
    "campaigns.bid_multiplier": None,  # it is in the document's already
    **dict.fromkeys(_SCHEDULE),  # one that had ended and was collected has no document
    "ad_groups.bid_usd_micros": "bid_usd_micros",
    "ad_groups.daily_budget_usd_micros": "ad_group_daily_budget_usd_micros",
    "campaigns.daily_budget_usd_micros": "campaign_daily_budget_usd_micros",
    "campaigns.lifetime_budget_usd_micros": "lifetime_budget_usd_micros",
    "advertisers.balance_usd_micros": "balance_usd_micros",
    "advertisers.spend_cap_usd_micros": "spend_cap_usd_micros",
}
"""Source columns of control that a document tells → the field that does; what a light change needs to be made again."""

DIMENSIONS = {
    "country": "countries",
    "interest": "interests",
    "age": "age_buckets",
    "gender": "genders",
    "device": "devices",
    "keyword": "keywords",
    "language": "languages",
}
"""What an ad is targeted by → the columns of an ad group that say so (and `excluded_` them)."""
PLACEMENT = "placement"
CATEGORY = "category"
"""What an ad is shown beside; its advertiser may have excluded it."""
ANY = "*"


def term(dimension: str, value: str) -> str:
    """A targeting term, as retrieval looks for it: `country=us`; `country=*` of an ad that takes any.

    Examples:
        >>> term("country", " US ")
        'country=us'
    """
    return f"{dimension}={normal(value)}"


def normal(text: str) -> str:
    """A text as terms are compared: NFKC, lower case, no space around."""
    return unicodedata.normalize("NFKC", text).lower().strip()


def normalised(texts: pa.Array) -> pa.Array:
    """Texts as terms are compared. (Arrow's own NFKC leaves them decomposed.)"""
    encoded = texts.cast(TEXT).dictionary_encode()
    made = [normal(text) for text in encoded.dictionary.to_pylist()]
    return pa.array(made, TEXT).take(encoded.indices)


def _targeting(columns: Columns) -> dict[str, pa.Array]:
    """Terms that a request must have one of in each dimension, and terms that it must have none of."""
    included, excluded = [], []
    named = {**DIMENSIONS, PLACEMENT: "placements"}
    for dimension, column in named.items():
        wanted = columns[f"ad_groups.{column}"]
        included += [_prefixed(dimension, wanted), _anyone(dimension, wanted)]
        if dimension != PLACEMENT:
            excluded.append(_prefixed(dimension, columns[f"ad_groups.excluded_{column}"]))
    excluded.append(_prefixed(CATEGORY, columns["advertisers.blocked_categories"]))
    count = len(columns["ad_groups.countries"])
    return {
        "targeting_terms": _lists(included, count),
        "excluded_terms": _lists(excluded, count),
        **{column: columns[f"ad_groups.{column}"] for column in named.values()},
        **{f"excluded_{column}": columns[f"ad_groups.excluded_{column}"] for column in DIMENSIONS.values()},
    }


Pairs = tuple[np.ndarray, pa.Array]
"""Which row, and the text that it has."""


def _prefixed(dimension: str, lists: pa.Array) -> Pairs:
    values = normalised(pc.list_flatten(lists))
    rows = pc.list_parent_indices(lists).to_numpy()
    return rows, pc.binary_join_element_wise(dimension, values, "=")


def _anyone(dimension: str, lists: pa.Array) -> Pairs:
    rows = np.flatnonzero(pc.equal(pc.fill_null(pc.list_value_length(lists), 0), 0).to_numpy(False))
    return rows, pa.array([f"{dimension}={ANY}"] * len(rows), TEXT)


def _lists(pairs: list[Pairs], count: int) -> pa.Array:
    """For each of ``count`` rows its texts, sorted, each once."""
    rows = np.concatenate([row for row, _ in pairs])
    texts = pa.concat_arrays([text.cast(TEXT) for _, text in pairs])
    encoded = texts.dictionary_encode()
    by_text = pc.rank(encoded.dictionary, tiebreaker="dense").to_numpy().astype(np.int64) - 1
    width = max(len(encoded.dictionary), 1)
    codes = by_text[encoded.indices.to_numpy()] if len(texts) else np.empty(0, np.int64)
    unique = np.unique(rows.astype(np.int64) * width + codes)
    ends = np.searchsorted(unique, (np.arange(count + 1)) * width)
    ordered = pc.take(encoded.dictionary, pc.sort_indices(encoded.dictionary))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), ordered.take(pa.array(unique % width)))


_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>[^/?#:]+)"


def _destination(columns: Columns) -> dict[str, pa.Array]:
    """Where a click leads, and whether that is the advertiser's own, proven site or a part of it."""
    host = pc.utf8_lower(pc.struct_field(pc.extract_regex(columns["ads.destination_url"], _HOST), "host"))
    host = pc.replace_substring_regex(host, r"^www\.", "")
    domain = pc.replace_substring_regex(pc.utf8_lower(columns["advertisers.domain"]), r"^www\.", "")
    dotted = pc.binary_join_element_wise("", domain, ".")  # a part of example.com ends with .example.com
    is_of_site = pc.or_(pc.equal(host, domain), _ends_with(host, dotted))
    is_own = pc.and_(is_of_site, columns["advertisers.is_domain_verified"])
    return {"destination_domain": host, "is_destination_verified": pc.fill_null(is_own, False)}


def _ends_with(texts: pa.Array, tails: pa.Array) -> pa.Array:
    """Whether each text ends with its own tail; null where one is missing."""
    pairs = zip(texts.to_pylist(), tails.to_pylist(), strict=True)
    return pa.array([None if a is None or b is None else a.endswith(b) for a, b in pairs], BOOL)


def _targeted_fields() -> tuple[Field, ...]:
    doc = {column.name: column.doc for column in TABLES["ad_groups"].columns}
    names = ["placements", *DIMENSIONS.values(), *(f"excluded_{name}" for name in DIMENSIONS.values())]
    ordered = [*DIMENSIONS.values(), "placements", *(name for name in names if name.startswith("excluded_"))]
    return tuple(Field(name, TEXTS, doc[name]) for name in ordered)


_CONTROL = (
    _AS_THEY_ARE,
    Handler(
        "standing",
        CONTROL,
        (
            "ads.status",
            "ads.review_status",
            *(f"{table}.{what}" for _, table in _LEVELS[1:] for what in ("status", "is_there")),
        ),
        (
            Field("blocked_by", TEXT, "why it is not served, whatever the time; null: it may be"),
            Field("is_servable", BOOL, "whether it may be served while it runs"),
        ),
        _standing,
    ),
    Handler(
        "collected",
        CONTROL,
        ("ads.collected_at", *(f"{table}.status" for _, table in _LEVELS), *_SCHEDULE),
        (
            Field(
                "is_collected", BOOL, "whether garbage collection has taken it out: then there is no document"
            ),
        ),
        _collected,
    ),
    Handler(
        "schedule",
        CONTROL,
        _SCHEDULE,
        (
            Field("starts_at_ms", INT, "from when on it runs; ms since 1970; null: always has"),
            Field("ends_at_ms", INT, "until when it runs; ms since 1970; null: for ever"),
        ),
        _schedule,
    ),
    Handler(
        "money",
        CONTROL,
        (
            "ads.bid_multiplier",
            "ad_groups.bid_usd_micros",
            "ad_groups.daily_budget_usd_micros",
            "campaigns.bid_multiplier",
            "campaigns.daily_budget_usd_micros",
            "campaigns.lifetime_budget_usd_micros",
            "campaigns.is_budget_shared",
            "advertisers.balance_usd_micros",
            "advertisers.spend_cap_usd_micros",
        ),
        (
            Field("bid_usd_micros", INT, "what one billable event is worth, before multipliers"),
            Field("bid_multiplier", FLOAT, "of the ad times of the campaign"),
            Field("effective_bid_usd_micros", INT, "the bid times the multiplier"),
            Field("ad_group_daily_budget_usd_micros", INT, "what the ad group may spend in a day"),
            Field("campaign_daily_budget_usd_micros", INT, "what the campaign may spend in a day"),
            Field("effective_daily_budget_usd_micros", INT, "the least of what may be spent in a day"),
            Field("lifetime_budget_usd_micros", INT, "what the campaign may spend at all"),
            Field("balance_usd_micros", INT, "what the advertiser has left"),
            Field("spend_cap_usd_micros", INT, "what the advertiser may spend in a day"),
        ),
        _money,
    ),
    Handler(
        "targeting",
        CONTROL,
        (
            "ad_groups.placements",
            *(f"ad_groups.{column}" for column in DIMENSIONS.values()),
            *(f"ad_groups.excluded_{column}" for column in DIMENSIONS.values()),
            "advertisers.blocked_categories",
        ),
        (
            Field("targeting_terms", TEXTS, "a request must have one of them in each dimension"),
            Field("excluded_terms", TEXTS, "a request must have none of them"),
            *_targeted_fields(),
        ),
        _targeting,
    ),
    Handler(
        "destination",
        CONTROL,
        ("ads.destination_url", "advertisers.domain", "advertisers.is_domain_verified"),
        (
            Field("destination_domain", TEXT, "the host that a click leads to, without www"),
            Field("is_destination_verified", BOOL, "whether that is the advertiser's own, proven site"),
        ),
        _destination,
    ),
)

# ------------------------------------------------------------------------------------------------ content

_SHOWN = _renamed(
    CONTENT,
    "content_columns",
    {
        "pins.is_there": "has_pin",
        "pins.image_signature": "image_signature",
        "pins.title": "title",
        "pins.description": "description",
        "pins.link": "link",
        "pins.category": "category",
        "pins.department": "department",
        "pins.brand": "brand",
        "pins.language": "pin_language",
        "pins.price_usd_micros": "price_usd_micros",
        "pins.is_available": "is_available",
        "pins.saves": "pin_saves",
        "pins.created_at": "pin_created_at_ms",
        "images.is_there": "has_image",
        "images.width_px": "image_width_px",
        "images.height_px": "image_height_px",
        "images.dominant_color": "dominant_color",
        "images.objects": "objects",
        "images.is_animated": "is_animated",
        "images.text_share": "image_text_share",
        "images.safety": "image_safety",
        "images.visual_embedding": "visual_embedding",
    },
)

_WORD = r"[^\p{L}\p{N}]+"


def _words(texts: pa.Array) -> Pairs:
    """The words of each text: runs of letters and digits, as terms are compared."""
    spaced = pc.utf8_trim_whitespace(pc.replace_substring_regex(normalised(texts), _WORD, " "))
    lists = pc.utf8_split_whitespace(spaced)
    words = pc.list_flatten(lists)
    rows = pc.list_parent_indices(lists).to_numpy()
    is_word = pc.greater(pc.utf8_length(words), 0)
    return rows[is_word.to_numpy(False)], words.filter(is_word)


def _whole(lists: pa.Array) -> Pairs:
    return pc.list_parent_indices(lists).to_numpy(), normalised(pc.list_flatten(lists))


def _text(columns: Columns) -> dict[str, pa.Array]:
    """The words that an ad is found by, and its annotations and interests from pin and image."""
    count = len(columns["pins.title"])
    texts = [columns[f"pins.{name}"] for name in ("title", "description", "brand", "category")]
    texts += [_joined_words(columns[f"{table}.annotations"]) for table in ("pins", "images")]
    annotations = [_whole(columns["pins.annotations"]), _whole(columns["images.annotations"])]
    rows, words = _words(pa.concat_arrays(texts))  # at once: making the pattern ready is most of it
    terms = _lists([(rows % max(count, 1), words)], count)
    return {
        "text_terms": terms,
        "text_term_count": pc.list_value_length(terms).cast(INT),
        "annotations": _lists(annotations, count),
        "pin_interests": _lists([_whole(columns["pins.interests"])], count),
    }


def _joined_words(lists: pa.Array) -> pa.Array:
    return pc.binary_join(lists, " ")


def _image_quality(columns: Columns) -> dict[str, pa.Array]:
    """How good the creative is, from 0 to 1: the mean of sharpness, aesthetics and size, less what is text, times its
    safety. A missing measure counts as a half; without an image it is 0."""
    width, height = columns["images.width_px"], columns["images.height_px"]
    pixels = pc.multiply(width.cast(FLOAT), height.cast(FLOAT))
    size = pc.min_element_wise(pc.divide(pixels, 1_000_000.0), pa.scalar(1.0), skip_nulls=False)
    parts = [columns["images.sharpness"], columns["images.aesthetics"], size]
    total = functools.reduce(pc.add, [pc.fill_null(part, 0.5) for part in parts])
    text = pc.subtract(1.0, pc.multiply(0.5, pc.fill_null(columns["images.text_share"], 0.0)))
    safety = pc.fill_null(columns["images.safety"], 0.5)
    score = pc.multiply(pc.multiply(pc.divide(total, 3.0), text), safety)
    has_height = pc.if_else(pc.greater(height, 0), height.cast(FLOAT), pa.scalar(None, FLOAT))
    return {
        "quality_score": pc.if_else(columns["images.is_there"], score, 0.0),
        "aspect_ratio": pc.divide(width.cast(FLOAT), has_height),
        "image_megapixels": pc.divide(pixels, 1_000_000.0),
    }


_CONTENT = (
    _SHOWN,
    Handler(
        "text",
        CONTENT,
        (
            "pins.title",
            "pins.description",
            "pins.brand",
            "pins.category",
            "pins.annotations",
            "pins.interests",
            "images.annotations",
        ),
        (
            Field("text_terms", TEXTS, "the words that it is found by"),
            Field("text_term_count", INT, "how many they are"),
            Field("annotations", TEXTS, "words that describe pin and image"),
            Field("pin_interests", TEXTS, "whom the pin interests"),
        ),
        _text,
    ),
    Handler(
        "image_quality",
        CONTENT,
        (
            "images.is_there",
            "images.width_px",
            "images.height_px",
            "images.text_share",
            "images.sharpness",
            "images.safety",
            "images.aesthetics",
        ),
        (
            Field("quality_score", FLOAT, "how good the creative is, from 0 to 1"),
            Field("aspect_ratio", FLOAT, "width by height"),
            Field("image_megapixels", FLOAT, "millions of pixels"),
        ),
        _image_quality,
    ),
)

# ------------------------------------------------------------------------------------------------ performance

_COUNTED = _renamed(
    PERFORMANCE,
    "performance_columns",
    {
        f"ads.{column.name}": "measured_at_ms" if column.name == "measured_at" else column.name
        for column in TABLES["ads"].of_family(PERFORMANCE)
    },
)
PRIOR_IMPRESSIONS = 1_000.0
PRIOR_CLICKS = 5.0
"""What an ad that nobody has seen is taken to have had: half a per cent of clicks."""


def _rates(columns: Columns) -> dict[str, pa.Array]:
    """Clicks and conversions an impression (smoothed by a prior), hides an impression, and what a click has cost."""
    made: dict[str, pa.Array] = {}
    for days in (7, 28):
        shown = pc.fill_null(columns[f"ads.impressions_{days}d"], 0).cast(FLOAT)
        clicks = pc.fill_null(columns[f"ads.clicks_{days}d"], 0).cast(FLOAT)
        hides = pc.fill_null(columns[f"ads.hides_{days}d"], 0).cast(FLOAT)
        sold = pc.fill_null(columns[f"ads.conversions_{days}d"], 0).cast(FLOAT)
        spent = pc.fill_null(columns[f"ads.spend_{days}d_usd_micros"], 0).cast(FLOAT)
        made[f"click_rate_{days}d"] = pc.divide(
            pc.add(clicks, PRIOR_CLICKS), pc.add(shown, PRIOR_IMPRESSIONS)
        )
        made[f"hide_rate_{days}d"] = pc.divide(hides, pc.add(shown, PRIOR_IMPRESSIONS))
        made[f"conversion_rate_{days}d"] = pc.divide(sold, pc.add(clicks, PRIOR_CLICKS))
        paid = pc.if_else(pc.greater(clicks, 0.0), clicks, pa.scalar(None, FLOAT))
        made[f"click_cost_{days}d_usd_micros"] = pc.floor(pc.divide(spent, paid)).cast(INT)
    return made


_PERFORMANCE = (
    _COUNTED,
    Handler(
        "rates",
        PERFORMANCE,
        tuple(
            f"ads.{what}_{days}d{unit}"
            for days in (7, 28)
            for what, unit in (
                ("impressions", ""),
                ("clicks", ""),
                ("hides", ""),
                ("conversions", ""),
                ("spend", "_usd_micros"),
            )
        ),
        tuple(
            field
            for days in (7, 28)
            for field in (
                Field(f"click_rate_{days}d", FLOAT, f"clicks an impression, smoothed, of {days} days"),
                Field(f"hide_rate_{days}d", FLOAT, f"hides an impression, smoothed, of {days} days"),
                Field(f"conversion_rate_{days}d", FLOAT, f"conversions a click, smoothed, of {days} days"),
                Field(f"click_cost_{days}d_usd_micros", INT, f"what a click cost in {days} days"),
            )
        ),
        _rates,
    ),
)

HANDLERS: tuple[Handler, ...] = (*_CONTROL, *_CONTENT, *_PERFORMANCE)
"""Every handler; those of a family make its documents' fields, in this order."""


def check(handlers: tuple[Handler, ...] = HANDLERS) -> None:
    """Raises `BadHandler` where a handler names a column that is not joined, or two make the same field."""
    for family in joined.INPUTS:
        known = set(joined.names(family))
        makers: dict[str, str] = {}
        for handler in (one for one in handlers if one.family == family):
            for name in handler.inputs:
                if name not in known:
                    raise BadHandler(
                        f"{handler.name} names {name!r}, which {family} is not joined of",
                        remedy="it has: " + ", ".join(sorted(known)),
                    )
            for field in handler.fields:
                if field.name in makers:
                    raise BadHandler(f"{handler.name} and {makers[field.name]} both make {field.name}")
                makers[field.name] = handler.name


check()
