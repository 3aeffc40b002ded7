"""The tables of an ads account: their keys, references and columns, and what a value may be.

Belongs here: the declaration that the contract of `ads-changes`, the repository, its dump, the source database and the
generator all follow, and the check of one value. Does not belong here: what is made of the columns, and how versions of
a row are merged.

A table may have more columns than are declared: they flow, are stored, and are used once they are declared.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

CONTROL, CONTENT, PERFORMANCE = "control", "content", "performance"
"""The column families: what decides whether and how an ad is served; what it shows; how it has done."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_USD_MICROS = 10**15
MAX_COUNT = 10**15
MAX_TIME_MS = 4_133_980_800_000  # the end of 2100
MAX_TEXT_BYTES = 4_096
MAX_TERM_BYTES = 256
MAX_TERMS = 1_000
DIMENSIONS = 32
"""Of an image's embedding."""

INTEGER, NUMBER, BOOLEAN, TEXT, TERMS, TIME, ID, VECTOR = (
    "integer",
    "number",
    "boolean",
    "text",
    "terms",
    "time",
    "id",
    "vector",
)
"""The types: `terms` is a list of texts, `time` is ms since 1970 (ISO 8601 is taken, too), `id` names another row,
`vector` is a list of `DIMENSIONS` numbers."""


class Column(NamedTuple):
    """A column of a source table.

    Attributes:
        name: Its name, with the unit where there is one.
        type: One of those above.
        doc: What it says.
        family: The column family that it belongs to.
        choices: The texts that it may be; empty: any.
        least: Of a number, and of each number of a vector.
        most: Of a number, and of each number of a vector.
        is_own: Whether Tidemark itself keeps it: no source has it, and it makes no row.
    """

    name: str
    type: str
    doc: str
    family: str = CONTROL
    choices: tuple[str, ...] = ()
    least: float = 0
    most: float = MAX_COUNT
    is_own: bool = False


class Reference(NamedTuple):
    """A column that holds the key of a row of another table."""

    column: str
    table: str


class Table(NamedTuple):
    """A source table: `key` names a row; `references` are columns of `columns`."""

    name: str
    key: str
    columns: tuple[Column, ...]
    references: tuple[Reference, ...] = ()

    @property
    def family(self) -> str:
        """The family whose columns say that a row is there: what has been measured of an ad does not make one."""
        return self.columns[0].family

    @property
    def sourced(self) -> tuple[Column, ...]:
        """The columns that a source has."""
        return tuple(column for column in self.columns if not column.is_own)

    def column(self, name: str) -> Column | None:
        """The declared column of that name."""
        return next((column for column in self.columns if column.name == name), None)

    def of_family(self, family: str) -> tuple[Column, ...]:
        """The columns of a family."""
        return tuple(column for column in self.columns if column.family == family)


STATUSES = ("active", "paused", "archived", "draft")
REVIEWS = ("approved", "pending", "rejected")
OBJECTIVES = ("awareness", "consideration", "conversions", "catalogue_sales", "video_views")
CREATIVES = ("image", "video", "carousel", "collection", "shopping", "coupon")
AGE_BUCKETS = ("18-24", "25-34", "35-44", "45-49", "50-54", "55-64", "65+")
GENDERS = ("female", "male", "unspecified")
DEVICES = ("web", "web_mobile", "ios_phone", "ios_tablet", "android_phone", "android_tablet")
PLACEMENTS = ("browse", "search", "related_pins", "board")
BID_STRATEGIES = ("automatic", "maximum", "target_average")
BILLING_EVENTS = ("impression", "click", "engagement", "video_view", "conversion")


def _status(what: str) -> Column:
    return Column("status", TEXT, f"whether the {what} is meant to run", choices=STATUSES)


def _usd_micros(name: str, doc: str, family: str = CONTROL) -> Column:
    return Column(name, INTEGER, doc, family, most=MAX_USD_MICROS)


def _time(name: str, doc: str, family: str = CONTROL) -> Column:
    return Column(name, TIME, doc, family, most=MAX_TIME_MS)


def _share(name: str, doc: str, family: str) -> Column:
    return Column(name, NUMBER, doc, family, most=1.0)


def _targeted(name: str, what: str, choices: tuple[str, ...] = ()) -> tuple[Column, Column]:
    return (
        Column(name, TERMS, f"only {what}; empty: any", choices=choices),
        Column(f"excluded_{name}", TERMS, f"never {what}", choices=choices),
    )


ADVERTISERS = Table(
    "advertisers",
    "advertiser_id",
    (
        Column("name", TEXT, "what it is called"),
        _status("advertiser"),
        Column("country", TEXT, "where it is billed; ISO 3166-1 alpha-2"),
        Column("currency", TEXT, "what it is billed in; ISO 4217"),
        Column("time_zone", TEXT, "in which its days begin; IANA"),
        Column("industry", TEXT, "what it is in"),
        Column("domain", TEXT, "whose web site it owns"),
        Column("is_domain_verified", BOOLEAN, "whether it has proved that"),
        Column("blocked_categories", TERMS, "beside what its ads are not shown"),
        _usd_micros("balance_usd_micros", "what it has left to spend"),
        _usd_micros("spend_cap_usd_micros", "what it may spend in a day over all its campaigns"),
    ),
)

CAMPAIGNS = Table(
    "campaigns",
    "campaign_id",
    (
        Column("advertiser_id", ID, "whose it is"),
        Column("name", TEXT, "what it is called"),
        _status("campaign"),
        Column("objective", TEXT, "what it is for", choices=OBJECTIVES),
        _usd_micros("daily_budget_usd_micros", "what it may spend in a day"),
        _usd_micros("lifetime_budget_usd_micros", "what it may spend at all"),
        Column("is_budget_shared", BOOLEAN, "whether its ad groups spend from its budget"),
        _time("starts_at", "from when on it runs"),
        _time("ends_at", "until when it runs"),
        Column("frequency_cap", INTEGER, "how often a user may see it", most=10_000),
        Column("frequency_cap_days", INTEGER, "in how many days", most=366),
        Column("bid_multiplier", NUMBER, "by what the bids of its ad groups are multiplied", most=100.0),
        Column("labels", TERMS, "by which its owner sorts it"),
    ),
    (Reference("advertiser_id", "advertisers"),),
)

AD_GROUPS = Table(
    "ad_groups",
    "ad_group_id",
    (
        Column("campaign_id", ID, "what it is part of"),
        Column("name", TEXT, "what it is called"),
        _status("ad group"),
        _usd_micros("bid_usd_micros", "what one billable event is worth"),
        Column("bid_strategy", TEXT, "how the bid is meant", choices=BID_STRATEGIES),
        Column("billing_event", TEXT, "what is paid for", choices=BILLING_EVENTS),
        _usd_micros("daily_budget_usd_micros", "what it may spend in a day"),
        _time("starts_at", "from when on it runs"),
        _time("ends_at", "until when it runs"),
        Column("placements", TERMS, "where its ads are shown; empty: everywhere", choices=PLACEMENTS),
        *_targeted("countries", "in these countries (ISO 3166-1 alpha-2)"),
        *_targeted("interests", "to users of these interests"),
        *_targeted("age_buckets", "to users of these ages", AGE_BUCKETS),
        *_targeted("genders", "to users of these genders", GENDERS),
        *_targeted("devices", "on these devices", DEVICES),
        *_targeted("keywords", "to searches that have one of these words"),
        *_targeted("languages", "to users of these languages (ISO 639-1)"),
        Column("is_targeting_expanded", BOOLEAN, "whether interests may be widened to like ones"),
        Column("conversion_window_days", INTEGER, "how long after a click a sale is its doing", most=366),
    ),
    (Reference("campaign_id", "campaigns"),),
)

ADS = Table(
    "ads",
    "ad_id",
    (
        Column("ad_group_id", ID, "what it is part of"),
        Column("pin_id", ID, "what it shows"),
        Column("name", TEXT, "what it is called"),
        _status("ad"),
        Column("review_status", TEXT, "what the review said", choices=REVIEWS),
        Column("creative_type", TEXT, "what kind of creative it is", choices=CREATIVES),
        Column("destination_url", TEXT, "where a click leads"),
        Column("tracking_url", TEXT, "who is told of an impression"),
        Column("call_to_action", TEXT, "what its button says"),
        Column("bid_multiplier", NUMBER, "by what its ad group's bid is multiplied", most=100.0),
        Column("is_removable", BOOLEAN, "whether a user may hide it"),
        _time("created_at", "when it was made"),
        _time("collected_at", "when garbage collection took it out")._replace(is_own=True),
        *(
            Column(f"{what}_{days}d", INTEGER, f"{what} of the last {days} days", PERFORMANCE)
            for what in ("impressions", "clicks", "saves", "closeups", "hides", "conversions")
            for days in (1, 7, 28)
        ),
        *(
            _usd_micros(f"{what}_{days}d_usd_micros", f"{what} of the last {days} days", PERFORMANCE)
            for what in ("spend", "revenue")
            for days in (1, 7, 28)
        ),
        _time("measured_at", "until when its performance was measured", PERFORMANCE),
    ),
    (Reference("ad_group_id", "ad_groups"), Reference("pin_id", "pins")),
)

PINS = Table(
    "pins",
    "pin_id",
    (
        Column("image_signature", ID, "its image's fingerprint", CONTENT),
        Column("title", TEXT, "its title", CONTENT),
        Column("description", TEXT, "what it says", CONTENT),
        Column("link", TEXT, "where it leads", CONTENT),
        Column("category", TEXT, "what kind of thing it shows", CONTENT),
        Column("department", TEXT, "the category's", CONTENT),
        Column("brand", TEXT, "whose product it is", CONTENT),
        Column("language", TEXT, "of its text; ISO 639-1", CONTENT),
        _usd_micros("price_usd_micros", "what the product costs", CONTENT),
        Column("is_available", BOOLEAN, "whether the product can be had", CONTENT),
        Column("annotations", TERMS, "words that describe it", CONTENT),
        Column("interests", TERMS, "whom it interests", CONTENT),
        Column("saves", INTEGER, "how often it was saved", CONTENT),
        _time("created_at", "when it was made", CONTENT),
    ),
    (Reference("image_signature", "images"),),
)

IMAGES = Table(
    "images",
    "image_signature",
    (
        Column("width_px", INTEGER, "its width", CONTENT, most=100_000),
        Column("height_px", INTEGER, "its height", CONTENT, most=100_000),
        Column("dominant_color", TEXT, "its main color; #rrggbb", CONTENT),
        Column("annotations", TERMS, "words for what is seen on it", CONTENT),
        Column("objects", TERMS, "things that were found on it", CONTENT),
        _share("text_share", "how much of it is text", CONTENT),
        _share("sharpness", "how sharp it is", CONTENT),
        _share("safety", "how sure it is that everybody may see it", CONTENT),
        _share("aesthetics", "how pleasing it is", CONTENT),
        Column("is_animated", BOOLEAN, "whether it moves", CONTENT),
        Column(
            "visual_embedding", VECTOR, "near those of images that look alike", CONTENT, least=-1e3, most=1e3
        ),
    ),
)

TABLES: dict[str, Table] = {
    table.name: table for table in (ADVERTISERS, CAMPAIGNS, AD_GROUPS, ADS, PINS, IMAGES)
}
"""Every table by its name; a table comes after those that refer to none of it."""

LIGHT: dict[str, tuple[str, ...]] = {
    "advertisers": ("status", "balance_usd_micros"),
    "campaigns": ("status", "daily_budget_usd_micros", "lifetime_budget_usd_micros"),
    "ad_groups": ("status", "daily_budget_usd_micros"),
    "ads": ("status",),
}
"""The columns whose changes are served ahead of the documents that they are part of: what stops or starts spending."""


def light(table: str) -> tuple[Column, ...]:
    """The columns of `LIGHT` of a table."""
    return tuple(column for column in TABLES[table].columns if column.name in LIGHT.get(table, ()))


WIDEST = max(len(table.columns) for table in TABLES.values())


class Impossible(ValueError):
    """A value that a column cannot have; the message says what it may be, the reason is a slug of a contract's."""

    def __init__(self, message: str, reason: str = "wrong_type") -> None:
        super().__init__(message)
        self.reason = reason


def checked(column: Column, value: Any) -> Any:
    """A JSON value as the repository keeps it; None stays None, terms are sorted and each is there once.

    Raises:
        Impossible: It has another type, or is outside the limits.
    """
    if value is None:
        return None
    return _CHECKS[column.type](column, value)


def valid(column: Column, values: list[Any]) -> list[Any]:
    """The values; null for one that is impossible: it came before its column was declared, and counts as never said."""
    return values if are_kept(column, values) else [_valid(column, value) for value in values]


def _valid(column: Column, value: Any) -> Any:
    try:
        return checked(column, value)
    except Impossible:
        return None


def are_kept(column: Column, values: Sequence[Any]) -> bool:
    """Whether `checked` gives every one of these values back as it is: told of the column as a whole, which is quicker.

    False may also mean that it is too odd to tell.
    """
    wanted = _KINDS[column.type]
    if column.type == VECTOR:
        return all(value is None or _is_vector(column, value) for value in values)
    items = values
    if column.type == TERMS:
        if {type(value) for value in values} - {list, type(None)}:
            return False
        items = [term for value in values if value for term in value]
    if {type(value) for value in items} - {wanted, type(None)}:
        return False
    distinct = set(items)
    if column.type == TERMS:
        lists = [value for value in values if value]
        if None in distinct or max(map(len, lists), default=0) > MAX_TERMS:
            return False
        if not all(all(map(operator.lt, value, value[1:])) for value in lists):
            return False
    distinct.discard(None)
    if wanted in (int, float):
        return all(column.least <= value <= column.most for value in distinct)
    if wanted is bool:
        return True
    if column.choices:
        return distinct <= set(column.choices)
    most_bytes = {TERMS: MAX_TERM_BYTES, ID: 512}.get(column.type, MAX_TEXT_BYTES)
    return not (column.type == ID and "" in distinct) and all(
        4 * len(text) <= most_bytes and "\0" not in text for text in distinct
    )


def _number(column: Column, value: Any) -> Any:
    is_whole = column.type != NUMBER
    wanted = (int,) if is_whole else (int, float)
    if type(value) not in wanted:
        raise Impossible(f"{_shown(value)} is not {'an integer' if is_whole else 'a number'}")
    if not column.least <= value <= column.most:
        raise Impossible(f"{_shown(value)} is not from {column.least:,} to {column.most:,}", "out_of_range")
    return value if is_whole else float(value)


def _time_ms(column: Column, value: Any) -> int:
    """Milliseconds since 1970 as they are; ISO 8601 in UTC, as PostgreSQL's timestamptz comes from Debezium, down to
    the millisecond."""
    if type(value) is not str:
        return _number(column, value)
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        time = None
    if time is None or time.utcoffset() != timedelta(0):
        raise Impossible(f"{_shown(value)} is neither ISO 8601 in UTC nor milliseconds", "bad_time")
    return _number(column, (time - _EPOCH) // timedelta(milliseconds=1))


def _boolean(column: Column, value: Any) -> bool:
    if type(value) is not bool:
        raise Impossible(f"{_shown(value)} is neither true nor false")
    return value


def _text(column: Column, value: Any, most_bytes: int = MAX_TEXT_BYTES) -> str:
    if type(value) is not str:
        raise Impossible(f"{_shown(value)} is not a text")
    if column.choices and value not in column.choices:
        raise Impossible(f"{_shown(value)} is none of {', '.join(column.choices)}", "out_of_range")
    if "\0" in value:
        raise Impossible("it holds the character NUL", "nul_character")
    if len(value.encode()) > most_bytes:
        raise Impossible(f"it has more than {most_bytes:,} bytes", "too_long")
    return value


def _terms(column: Column, value: Any) -> list[str]:
    if type(value) is not list:
        raise Impossible(f"{_shown(value)} is not a list of texts")
    if len(value) > MAX_TERMS:
        raise Impossible(f"it has {len(value):,} terms, more than {MAX_TERMS:,}", "too_long")
    return sorted({_text(column, term, MAX_TERM_BYTES) for term in value})


def _is_vector(column: Column, value: Any) -> bool:
    is_list = (
        type(value) is list and len(value) == DIMENSIONS and {type(number) for number in value} == {float}
    )
    return is_list and column.least <= min(value) and max(value) <= column.most


def _vector(column: Column, value: Any) -> list[float]:
    if type(value) is not list or len(value) != DIMENSIONS:
        raise Impossible(f"{_shown(value)} is not a list of {DIMENSIONS} numbers")
    each = column._replace(type=NUMBER)
    return [_number(each, number) for number in value]


def _id(column: Column, value: Any) -> str:
    found = _text(column, value, 512)
    if not found:
        raise Impossible("an id is a text that is not empty", "empty_id")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_KINDS = {
    INTEGER: int,
    NUMBER: float,
    TIME: int,
    BOOLEAN: bool,
    TEXT: str,
    TERMS: str,
    ID: str,
    VECTOR: float,
}
_CHECKS = {
    INTEGER: _number,
    NUMBER: _number,
    TIME: _time_ms,
    BOOLEAN: _boolean,
    TEXT: _text,
    TERMS: _terms,
    ID: _id,
    VECTOR: _vector,
}
