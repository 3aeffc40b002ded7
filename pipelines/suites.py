"""What the rows of each table must be, declared beside the table's specification: plain data, no Spark, no checks.

Belongs here: for each field whether it may be null, its range, its values, what it refers to, how its distribution is
followed; for each table its key, its batches and its rules. Much follows from the specification itself (`derived`).
Does not belong here: measuring and judging (`quality`), and what a record must be to be accepted at all (`contracts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import pyarrow as pa

from pipelines import index_rows, lake
from pipelines.ads import schema as ads
from pipelines.contracts import ACTIONS, CONTRACTS, FOLLOWED, OBJECTS, PIN_UPDATES
from pipelines.contracts.contract import MAX_USD_MICROS
from pipelines.contracts.payloads import MAX_BYTES
from pipelines.indexing import facts
from pipelines.indexing.spec import IndexSpec, Sums
from pipelines.lake import TableSpec

MAX_VERSION = 2**61 - 1
FIRST_TIME, LAST_TIME = 0, 4_133_980_799
"""1970 to the end of 2100, in seconds: what a contract takes as a time."""

Kind = Literal["number", "category", "id"]


class Field(NamedTuple):
    """A column, or a field of a struct by its path.

    Attributes:
        path: `quantity`, `offer.price_usd_micros`.
        type: Its Spark SQL type; None: any.
        is_required: Null in no live row.
        is_always_required: Null in no row, of tombstones neither.
        least: The least value, in the column's unit; of times, seconds since 1970.
        most: The greatest.
        one_of: The only values; empty: any.
        kind: How its distribution is compared with history: a number by its quantiles and octaves, a category by its
            values, an id by the shape of its text; None: not at all.
        refers_to: `table.column` that should have each value.
        refers_with: Further columns of that key, called the same here and there.
        most_distinct: So many different values at most.
    """

    path: str
    type: str | None = None
    is_required: bool = False
    is_always_required: bool = False
    least: float | None = None
    most: float | None = None
    one_of: tuple[str, ...] = ()
    kind: Kind | None = None
    refers_to: str | None = None
    refers_with: tuple[str, ...] = ()
    most_distinct: int | None = None


class Rule(NamedTuple):
    """A condition in Spark SQL that is true of each row; `words` say it."""

    name: str
    condition: str
    words: str


class Share(NamedTuple):
    """Rows of another table for each hundred of this one, by day: refused records, say."""

    name: str
    table: str
    condition: str
    day: str


class Suite(NamedTuple):
    """What a table must be.

    Attributes:
        table: Its name.
        fields: Those of which anything is asked.
        key: No two rows have the same values of these.
        live: The rows that speak of the present, in Spark SQL; None: all.
        day: The time whose days are the table's batches, each compared with the days before; None: the whole table is
            one batch, compared with what it was at earlier audits.
        arrival: The time at which a row came; with `day`, how late it was.
        rules: Of each row.
        shares: Of each day.
        blocks: Whether what is built of the table waits until all that is declared holds. Raw tables block nothing:
            what is wrong there is refused or merged by what comes after, and must not stop the rest.
    """

    table: str
    fields: tuple[Field, ...]
    key: tuple[str, ...] = ()
    live: str | None = None
    day: str | None = None
    arrival: str | None = None
    rules: tuple[Rule, ...] = ()
    shares: tuple[Share, ...] = ()
    blocks: bool = True

    @property
    def references(self) -> tuple[str, ...]:
        """The tables that fields refer to."""
        return tuple(dict.fromkeys(f.refers_to.rpartition(".")[0] for f in self.fields if f.refers_to))


def derived(spec: TableSpec) -> tuple[Field, ...]:
    """What follows from a specification: types, and by names and units what is never null, negative or out of time."""
    return tuple(_derived(column.name, column.type) for column in spec.columns)


def _derived(path: str, kind: str) -> Field:
    name = path.rpartition(".")[2]
    field = Field(path, kind)
    if kind == "timestamp":
        field = field._replace(least=FIRST_TIME, most=LAST_TIME)
    if name.startswith(("is_", "has_")) or name.endswith("_hash"):
        field = field._replace(is_always_required=True)
    if name == "version":
        field = field._replace(is_always_required=True, least=1, most=MAX_VERSION)
    if name.endswith("_usd_micros"):
        field = field._replace(least=0, most=MAX_USD_MICROS)
    if name.endswith("_pct"):
        field = field._replace(least=0, most=100)
    if name in ("partition", "offset", "load_row", "time_ms"):
        field = field._replace(least=0)
    return field


def _inside(column: str, struct: pa.StructType) -> tuple[Field, ...]:
    """The fields of a struct; what follows from their names holds where the struct is there."""
    return tuple(
        _derived(f"{column}.{field.name}", lake.sql_type(field.type))._replace(is_always_required=False)
        for field in struct
    )


def _with(fields: Iterable[Field], **by_hand: Mapping[str, object]) -> tuple[Field, ...]:
    """Fields with what is said of them by hand: path (dots as two underscores) → attributes.

    Raises:
        KeyError: There is no such field.
    """
    held = {field.path: field for field in fields}
    for name, said in by_hand.items():
        path = name.replace("__", ".")
        held[path] = held[path]._replace(**said)  # type: ignore[arg-type]
    return tuple(held.values())


_REQUIRED: dict[str, object] = {"is_always_required": True}
_ONE_SOURCE = Rule(
    "has_one_source",
    "(topic_id IS NULL) = (load_id IS NOT NULL)"
    " AND (topic_id IS NULL) = (`partition` IS NULL) AND (topic_id IS NULL) = (`offset` IS NULL)"
    " AND (load_id IS NULL) = (load_row IS NULL)",
    "a row is from a place in Kafka or from a row of a load",
)
_PLACE = ("topic_id", "partition", "offset", "load_id", "load_row")


def _raw(topic: str) -> Suite:
    spec = lake.TABLES[f"raw.{topic.replace('-', '_')}"]
    return Suite(
        spec.name,
        _with(derived(spec), broker_time=_REQUIRED, ingested_at=_REQUIRED),
        key=_PLACE,
        day="ingested_at",
        arrival="ingested_at",
        rules=(_ONE_SOURCE,),
        shares=(Share("refused_pct", lake.RAW_DEAD_LETTERS.name, f"topic = '{topic}'", "ingested_at"),),
        blocks=False,
    )


_DEAD_LETTERS = Suite(
    lake.RAW_DEAD_LETTERS.name,
    _with(
        derived(lake.RAW_DEAD_LETTERS),
        topic={**_REQUIRED, "one_of": tuple(contract.topic for contract in CONTRACTS.values())},
        reason={**_REQUIRED, "kind": "category"},
        detail=_REQUIRED,
        broker_time=_REQUIRED,
        ingested_at=_REQUIRED,
    ),
    rules=(_ONE_SOURCE,),
    blocks=False,
)

_HOUSEHOLDS = Suite(
    lake.RAW_HOUSEHOLDS.name,
    _with(
        derived(lake.RAW_HOUSEHOLDS),
        user_id={**_REQUIRED, "kind": "id"},
        age={"kind": "category"},
        income={"kind": "category"},
        household_size={"kind": "category"},
        load_id=_REQUIRED,
        load_row=_REQUIRED,
    ),
    key=("load_id", "load_row"),
    blocks=False,
)

_HAS_OBJECT = Rule(
    "has_object",
    f"is_deleted OR coalesce({', '.join(OBJECTS)}) IS NOT NULL",
    f"an event names at least one of {', '.join(OBJECTS)}",
)


def _is_object(column: str) -> Rule:
    """An object of JSON, for those who read it by `get_json_object` or `from_json`: both take what is none for null."""
    return Rule(
        f"{column}_is_json",
        f"{column} IS NULL OR (json_object_keys({column}) IS NOT NULL AND octet_length({column}) <= {MAX_BYTES})",
        f"{column} is an object of JSON of at most {MAX_BYTES:,} bytes where it is there",
    )


_USER_INTERACTIONS = Suite(
    lake.CURATED_USER_INTERACTIONS.name,
    _with(
        derived(lake.CURATED_USER_INTERACTIONS),
        user_id={**_REQUIRED, "kind": "id"},
        event_id={**_REQUIRED, "kind": "id"},
        pin_id={"kind": "id", "refers_to": "curated.pins_catalogue.pin_id"},
        action={"is_required": True, "one_of": ACTIONS, "kind": "category"},
        event_time={"is_required": True},
        quantity={"least": 1, "kind": "number"},
        value_usd_micros={"kind": "number"},
        surface={"kind": "category"},
        ad_id={"kind": "id"},
        campaign_id={"kind": "id"},
        advertiser_id={"kind": "id"},
        category={"kind": "category"},
        view_type={"kind": "category"},
        payload={"kind": "id"},  # by its shape: which fields are said, and of how many events
        broker_time=_REQUIRED,
    ),
    key=("user_id", "event_id"),
    live="NOT is_deleted",
    day="event_time",
    arrival="broker_time",
    rules=(_ONE_SOURCE, _HAS_OBJECT, _is_object("payload")),
)

_EVENT_FEATURES = Suite(
    lake.CURATED_EVENT_FEATURES.name,
    _with(
        derived(lake.CURATED_EVENT_FEATURES),
        user_id={**_REQUIRED, "kind": "id"},
        # Features may come before their event: how many did is compared with history, and stops nothing.
        event_id={
            **_REQUIRED,
            "kind": "id",
            "refers_to": "curated.user_interactions.event_id",
            "refers_with": ("user_id",),
        },
        event_time={"is_required": True},
        features={"is_required": True, "kind": "id"},
        broker_time=_REQUIRED,
    ),
    key=("user_id", "event_id"),
    live="NOT is_deleted",
    rules=(_ONE_SOURCE, _is_object("features")),
)
"""Without days: those of the newest days are still to come, at any time of the day."""


def _pins(family: str, **by_hand: Mapping[str, object]) -> Suite:
    spec = lake.TABLES[f"curated.pins_{family}"]
    fields = [field for field in derived(spec) if field.path != family]
    fields += [Field(family, is_required=True), *_inside(family, PIN_UPDATES.row_schema.field(family).type)]
    asked: dict[str, Mapping[str, object]] = {"pin_id": {**_REQUIRED, "kind": "id"}, "broker_time": _REQUIRED}
    return Suite(
        spec.name,
        _with(fields, **(asked | by_hand)),
        key=("pin_id",),
        live="NOT is_deleted",
        rules=(_ONE_SOURCE,),
    )


_USER_FOLLOWS = Suite(
    lake.CURATED_USER_FOLLOWS.name,
    _with(
        derived(lake.CURATED_USER_FOLLOWS),
        user_id={**_REQUIRED, "kind": "id"},
        kind={**_REQUIRED, "one_of": tuple(FOLLOWED), "kind": "category"},
        followed_id={**_REQUIRED, "kind": "id"},
        broker_time=_REQUIRED,
    ),
    key=("user_id", "kind", "followed_id"),
    live="NOT is_deleted",
    rules=(
        _ONE_SOURCE,
        Rule("is_of_another", "kind != 'user' OR followed_id != user_id", "nobody follows themself"),
    ),
)

_PIN_CHANGES = Suite(
    lake.CURATED_PIN_CHANGES.name,
    _with(
        derived(lake.CURATED_PIN_CHANGES),
        pin_id={**_REQUIRED, "kind": "id"},
        catalogue_hash={"is_always_required": False},
        offer_hash={"is_always_required": False},
        broker_time=_REQUIRED,
    ),
    key=("pin_id", "version", "catalogue_hash", "offer_hash"),
    live="NOT is_deleted",
    rules=(
        _ONE_SOURCE,
        Rule(
            "sets_a_family", "coalesce(catalogue_hash, offer_hash) IS NOT NULL", "a statement sets a family"
        ),
    ),
)

_IS_FINITE = Rule(
    "is_finite",
    "NOT exists(vector, x -> x IS NULL OR isnan(x) OR abs(x) = float('infinity'))",
    "each part of a vector is a finite number",
)

_PIN_VECTORS = Suite(
    lake.FEATURES_PIN_VECTORS.name,
    _with(
        derived(lake.FEATURES_PIN_VECTORS),
        pin_id={**_REQUIRED, "kind": "id", "refers_to": "curated.pins_catalogue.pin_id"},
        vector=_REQUIRED,
        model_id={**_REQUIRED, "most_distinct": 1},
    ),
    key=("pin_id",),
    rules=(_IS_FINITE,),
)

_USER_VECTORS = Suite(
    lake.FEATURES_USER_VECTORS.name,
    _with(
        derived(lake.FEATURES_USER_VECTORS),
        user_id={**_REQUIRED, "kind": "id"},
        vector=_REQUIRED,
        event_count={**_REQUIRED, "least": 1, "kind": "number"},
        model_id={**_REQUIRED, "most_distinct": 1},
    ),
    key=("user_id",),
    rules=(_IS_FINITE,),
)


def _is_void(table: ads.Table) -> Rule:
    named = " AND ".join(f"`{column.name}` IS NULL" for column in table.of_family(table.family))
    words = f"a row that is not there says nothing of its {table.family} columns"
    return Rule("is_void_where_gone", f"is_there OR ({named})", words)


def _repo(table: ads.Table) -> Suite:
    """What follows from the declaration of a source table, to which the dump is held."""
    spec, by_name = lake.REPO[f"repo.{table.name}"], {column.name: column for column in table.columns}
    refers_to = {r.column: f"repo.{r.table}.{ads.TABLES[r.table].key}" for r in table.references}
    asked: dict[str, dict[str, object]] = {table.key: dict(_REQUIRED), "registers": dict(_REQUIRED)}
    asked["deleted_version"] = {**_REQUIRED, "least": 0, "most": MAX_VERSION}
    for family in (ads.CONTROL, ads.CONTENT, ads.PERFORMANCE):
        asked[f"stand_{family}"] = {**_REQUIRED, "least": 0, "most": MAX_VERSION}
    for name, column in by_name.items():
        said: dict[str, object] = {"is_always_required": False}
        if column.type in (ads.INTEGER, ads.NUMBER):
            said |= {"least": column.least, "most": column.most}
        if column.type == ads.TIME:
            said |= {"least": column.least / 1_000, "most": column.most / 1_000}
        if column.type == ads.TEXT and column.choices:
            said |= {"one_of": column.choices, "kind": "category"}
        if name in refers_to:
            said["refers_to"] = refers_to[name]
        asked[name] = said
    return Suite(
        spec.name,
        _with(derived(spec), **asked),
        key=(table.key,),
        live="is_there",
        rules=(_is_void(table),),
    )


SUITES: dict[str, Suite] = {
    suite.table: suite
    for suite in (
        *[_raw(contract.topic) for contract in CONTRACTS.values()],
        _DEAD_LETTERS,
        _HOUSEHOLDS,
        _USER_INTERACTIONS,
        _EVENT_FEATURES,
        _pins("catalogue", catalogue__category={"kind": "category"}, catalogue__brand={"kind": "category"}),
        _pins(
            "offer",
            pin_id={**_REQUIRED, "kind": "id", "refers_to": "curated.pins_catalogue.pin_id"},
            offer__price_usd_micros={"is_required": True, "kind": "number"},
            offer__is_available={"is_required": True, "kind": "category"},
        ),
        _USER_FOLLOWS,
        _PIN_CHANGES,
        _PIN_VECTORS,
        _USER_VECTORS,
        *[_repo(table) for table in ads.TABLES.values()],
    )
}
"""The suite of each raw, curated, feature and dumped table. (`of_index` has that of `index.<name>`.)"""


def of_index(spec: IndexSpec) -> Suite:
    """The suite of the rows that a base is built of: all of it follows from the index's own specification."""
    return _of_facts(spec, index_rows.table(spec))


def of_delta(spec: IndexSpec) -> Suite:
    """The suite of the copied facts of the deltas: what is declared of a fact holds for them too."""
    of_epoch = ("lineage", "epoch_date", "stream", "incarnation", "epoch", "committed_at")
    suite = _of_facts(spec, index_rows.delta_table(spec))
    return suite._replace(fields=_with(suite.fields, **dict.fromkeys(of_epoch, _REQUIRED)), blocks=False)


def _of_facts(spec: IndexSpec, table: TableSpec) -> Suite:
    families = tuple(family.name for family in spec.families)
    asked: dict[str, Mapping[str, object]] = {
        name: dict(_REQUIRED) for name in ("identity", "identity_hash", "key_hash", "version_1")
    }
    payloads = [facts.payload_column(name) for name in families]
    rules = [
        Rule(
            f"has_{name}",
            f"is_deleted OR family != '{name}' OR `{payload}` IS NOT NULL",
            f"a live fact of {name} says something",
        )
        for name, payload in zip(families, payloads, strict=True)
        if not isinstance(spec.read, Sums)
    ]
    return Suite(
        table.name,
        _with(
            [f for f in derived(table) if f.path not in payloads],
            **asked,
            family={**_REQUIRED, "one_of": families, "kind": "category"},
        ),
        live="NOT is_deleted",
        rules=tuple(rules),
    )
