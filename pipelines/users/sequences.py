"""Sequences: the events of many users that a model or a ranker wants, filtered, cut and enriched as a team declared.

Belongs here: what a definition may say, and what it means over events and what is known of their pins; both pure.
What is allowed follows from the declared schemas of the two indices: a column that is added there can be declared here.
Where definitions are kept, and how they may change, is ``sequence_files``'. Who asks for those of now is serving's, and
sequences as they were at moments of the past are ``sequence_export``'s.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import ACTIONS, OBJECTS, payload_files, payloads
from pipelines.contracts.payloads import FEATURES
from pipelines.errors import TidemarkError
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.spec import Timeline
from pipelines.indexing.timelines import TimelineView, Within
from pipelines.pins.index import PINS
from pipelines.users.index import USER_EVENTS
from pipelines.users.spans import RULE as SPAN_RULE
from pipelines.users.spans import span_ms

MAX_LENGTH = 1000
MAX_TEXTS = 200
"""So many actions, surfaces or categories may be named."""
MAX_TEXT_BYTES = 512
ORDERS = NEWEST_FIRST, OLDEST_FIRST = ("newest_first", "oldest_first")

OBJECT, CATEGORY = "pin_id", "catalogue.category"
EVENT_ID = "event_id"
SAID = payloads.fields(payload_files.declared())
"""The fields of payloads and features that are declared, by name: `payload.view.dwell_ms`, `features.quality`."""
FOUND_OUT = frozenset(name for name in SAID if name.startswith(f"{FEATURES}."))
"""Those of features."""
EVENT_FIELDS: Mapping[str, pa.DataType] = {
    EVENT_ID: pa.string(),
    "time_ms": pa.int64(),
    **{field.name: field.type for field in USER_EVENTS.families[0].schema},
    **{name: payloads.TYPES[field.type] for name, field in SAID.items()},
}
"""What can be said of an event, by name."""
ENRICHMENTS: Mapping[str, pa.DataType] = {
    f"{family.name}.{field.name}": field.type for family in PINS.families for field in family.schema
}
"""What can be said of an event's pin, as it is when the sequence is read."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class BadDefinition(TidemarkError):
    """A sequence cannot be had as it is declared or asked for.

    Attributes:
        field: Of the definition, as `fields[2]`; empty: all of it.
        message: What is wrong with it.
        allowed: What would be right: a rule, or the choices.
    """

    def __init__(self, field: str, message: str, allowed: Any, where: object | None = None) -> None:
        choices = allowed if isinstance(allowed, str) else f"one of {', '.join(map(str, allowed)) or 'none'}"
        super().__init__(f"{field}: {message}" if field else message, where=where, remedy=f"use {choices}")
        self.field = field
        self.message = message
        self.allowed = allowed

    def at(self, where: object) -> BadDefinition:
        """The same, with the file that it is about."""
        return BadDefinition(self.field, self.message, self.allowed, where)


class Definition(NamedTuple):
    """A declared sequence.

    Attributes:
        max_length: Of a sequence, in events; the newest are kept.
        fields: Of each event, names in `EVENT_FIELDS`.
        name: None where a request brought it without one; so with version, description and owner.
        actions: Only these; all, if there are none. So with surfaces and categories.
        categories: Of the event's pin, as it is when the sequence is read.
        age_ms: Only events after now less this; None: all events, as far back as the index has them.
        deduplicate_by: Of events that have this column in common, the newest alone counts, and each that has none;
            None: all do.
        order: One of `ORDERS`.
        enrich: Of each event's pin, names in `ENRICHMENTS`.
    """

    max_length: int
    fields: tuple[str, ...]
    name: str | None = None
    version: int | None = None
    description: str = ""
    owner: str = ""
    actions: tuple[str, ...] = ()
    surfaces: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    age_ms: int | None = None
    deduplicate_by: str | None = None
    order: str = NEWEST_FIRST
    enrich: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """What an answer says of each event, in this order."""
        return self.fields + self.enrich

    def reach_ms(self, horizon_ms: int | None) -> int:
        """How far back its events go; without an age and a horizon, before any time that there is.

        A base's horizon is counted from when it was built, so that it holds somewhat more. Here it is counted from now:
        what a sequence means must not hang on when a base was built, for training data know no bases.
        """
        return min((ms for ms in (self.age_ms, horizon_ms) if ms is not None), default=2**62)

    def is_inside(self, horizon_ms: int | None) -> bool:
        """Whether its age reaches no further than a horizon; without one it says none that could."""
        return self.age_ms is None or horizon_ms is None or self.age_ms <= horizon_ms


class Sequences(NamedTuple):
    """The sequences of k users, n events in all.

    Attributes:
        table: The definition's columns, n rows: the first user's sequence, then the second's, each in its order.
        lengths: How many rows are each user's, int64[k].
        is_complete: Whether that is all there should be, bool[k]; False: the timeline is cut off before the sequence's
            window begins, by a count or a horizon, and may have had more.
    """

    table: pa.Table
    lengths: np.ndarray
    is_complete: np.ndarray


# ----------------------------------------------------------------------------------------------- what it may say


REQUIRED = ("max_length", "fields")


def parse(said: Any, required: Collection[str] = REQUIRED) -> Definition:
    """A definition from what YAML or JSON said; ``required``: what may not be left out.

    Raises:
        BadDefinition: A field is unknown, missing, or not what it may be; with what that is.
    """
    if not isinstance(said, dict):
        raise BadDefinition("", "the definition is not a mapping", list(_READERS))
    for name in said:
        if name not in _READERS:
            raise BadDefinition(
                shown(name), f"there is no such field{nearest(name, _READERS)}", list(_READERS)
            )
    given = {
        name: read(name, said.get(name))
        for name, read in _READERS.items()
        if name in required or said.get(name) is not None
    }
    return Definition(age_ms=given.pop("age", None), **given)


def nearest(name: Any, known: Iterable[str]) -> str:
    """A hint at the known name that is most like this one; empty where none is."""
    close = difflib.get_close_matches(str(name)[:100], list(known), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def shown(value: Any) -> str:
    """What somebody wrote, short enough to give back."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "a mapping"
    text = str(value).encode("utf-8", "backslashreplace").decode()  # so that it can be given back
    return text if len(text) <= 100 else text[:100] + "…"


Reader = Callable[[str, Any], Any]
"""Field, what was said → its value; or `BadDefinition`."""


def _refused(field: str, value: Any, allowed: Any, hint: str = "") -> BadDefinition:
    what = "it is missing" if value is None else f"{shown(value)} is not allowed{hint}"
    return BadDefinition(field, what, allowed)


def _name(field: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _refused(field, value, "lower-case letters, digits and _, at most 64, a letter first")
    return value


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
        raise _refused(field, value, "a text")
    return value.strip()


def _whole(least: int, most: int | None = None) -> Reader:
    def read(field: str, value: Any) -> int:
        if type(value) is not int or value < least or (most is not None and value > most):
            raise _refused(field, value, f"a whole number from {least} " + (f"to {most}" if most else "on"))
        return value

    return read


def _age(field: str, value: Any) -> int:
    age_ms = span_ms(value)
    if age_ms is None:
        raise _refused(field, value, SPAN_RULE)
    return age_ms


def _one_of(choices: Collection[str]) -> Reader:
    def read(field: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _refused(field, value, list(choices), nearest(value, choices))
        return value

    return read


def _any_text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not _is_unicode(value) or not 0 < len(value.encode()) <= MAX_TEXT_BYTES:
        raise _refused(field, value, f"a text of 1 to {MAX_TEXT_BYTES} bytes of UTF-8")
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: one with half of a surrogate pair, as of `\\ud800`, cannot."""
    return not any("\ud800" <= one <= "\udfff" for one in text)


def _several(one: Reader, most: int = MAX_TEXTS) -> Reader:
    def read(field: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not 0 < len(value) <= most:
            raise _refused(field, value, f"a list of 1 to {most} texts")
        found = tuple(one(f"{field}[{place}]", item) for place, item in enumerate(value))
        for place, item in enumerate(found):
            if item in found[:place]:
                raise BadDefinition(f"{field}[{place}]", f"{shown(item)} is there twice", "each once")
        return found

    return read


_READERS: Mapping[str, Reader] = {
    "name": _name,
    "version": _whole(1),
    "description": _text,
    "owner": _text,
    "actions": _several(_one_of(ACTIONS)),
    "surfaces": _several(_any_text),
    "categories": _several(_any_text),
    "age": _age,
    "max_length": _whole(1, MAX_LENGTH),
    "deduplicate_by": _one_of(OBJECTS),
    "order": _one_of(ORDERS),
    "fields": _several(_one_of(EVENT_FIELDS)),
    "enrich": _several(_one_of(ENRICHMENTS)),
}
FIELDS = tuple(_READERS)
"""What a definition may say."""


# ------------------------------------------------------------------------------------------------- what it means


def read(
    view: TimelineView, pins: DocumentsView, definition: Definition, keys: Sequence[bytes], now_ms: int
) -> Sequences:
    """The sequences of some users, as base and delta know them, at a time.

    An event counts if it happened after ``now_ms`` less the definition's age, and no later than ``now_ms``. Where the
    index has a horizon, none counts that is as old as that. An unknown user has an empty sequence. A user may be named
    more than once.

    Args:
        view: Of `user_events`.
        pins: The view of `pins`, for categories and enrichments.
        definition: What is wanted.
        keys: Of k users.
        now_ms: In ms since 1970.
    """
    horizon_ms = _horizon_ms(view)
    from_ms = now_ms - definition.reach_ms(horizon_ms) + 1
    within = view.within(keys, from_ms, now_ms + 1, _most(definition))
    return arranged(
        within._replace(is_complete=within.is_complete & definition.is_inside(horizon_ms)),
        definition,
        lambda pin_ids, of, names: _of_pins(pins, pin_ids, names),
        lambda ids, of: pc.struct_field(view.joined(FEATURES, keys, of, ids), FEATURES),
    )


def _horizon_ms(view: TimelineView) -> int | None:
    """How far back a view reaches at least; None: as far as there is anything, as before the first base."""
    read = view.spec.read
    assert isinstance(read, Timeline)
    return None if view.base.horizon_from_ms is None else read.age_ms


def _most(definition: Definition) -> int | None:
    """How many of a user's newest events are enough; None: any may be needed, for those before it may not count."""
    leaves_out = (
        definition.actions or definition.surfaces or definition.categories or definition.deduplicate_by
    )
    return None if leaves_out else definition.max_length


PinValues = Callable[[pa.ChunkedArray, np.ndarray, Sequence[str]], Sequence[pa.Array]]
"""Pin ids of n events, which user each event is of, and names of `ENRICHMENTS` → for each name what the pins say, a
value an event; null where nothing is known of one."""


FeatureValues = Callable[[pa.ChunkedArray, np.ndarray], pa.Array]
"""Ids of n events, which user each is of → what was found out of each, as JSON; null where nothing was."""


def arranged(
    events: Within, definition: Definition, of_pins: PinValues, of_features: FeatureValues
) -> Sequences:
    """The sequences that k users' events in the window make: filtered, each once, in order, cut, and enriched.

    Args:
        events: Those that happened in the window; an event's id is called `id`, as in a view.
        definition: What is wanted.
        of_pins: What is known of pins.
        of_features: What was found out of events.
    """
    rows = _passing(events, definition, of_pins)
    rows = rows[_newest_first(events.read(["time_ms", "id"], rows), events.of[rows])]
    if definition.deduplicate_by is not None:
        objects = events.read([definition.deduplicate_by], rows).column(0)
        rows = rows[_first_of_each(objects, events.of[rows])]
    rows = _cut(rows, events.of[rows], definition)
    lengths = np.bincount(events.of[rows], minlength=len(events.is_complete))
    return Sequences(
        _written(events, rows, definition, of_pins, of_features),
        lengths,
        events.is_complete | (lengths >= definition.max_length),
    )


def _passing(events: Within, definition: Definition, of_pins: PinValues) -> np.ndarray:
    """The numbers of the events that have one of the actions, surfaces and categories, ascending."""
    rows = np.arange(len(events.of))
    for column, wanted in (("action", definition.actions), ("surface", definition.surfaces)):
        if wanted:
            rows = rows[_is_one_of(events.read([column], rows).column(0), wanted)]
    if definition.categories:
        (category,) = of_pins(events.read([OBJECT], rows).column(0), events.of[rows], (CATEGORY,))
        rows = rows[_is_one_of(category, definition.categories)]
    return rows


def _is_one_of(column: pa.Array | pa.ChunkedArray, wanted: Collection[str]) -> np.ndarray:
    found: np.ndarray = pc.is_in(column, value_set=pa.array(wanted, column.type)).to_numpy(
        zero_copy_only=False
    )
    return found


def _newest_first(events: pa.Table, of: np.ndarray) -> np.ndarray:
    """The order of rows by user, then by (time, id) descending."""
    keys = pa.table({"of": of, "time_ms": events.column("time_ms"), "id": events.column("id")})
    by = [("of", "ascending"), ("time_ms", "descending"), ("id", "descending")]
    order: np.ndarray = pc.sort_indices(keys, sort_keys=by).to_numpy()
    return order


def _first_of_each(column: pa.ChunkedArray, of: np.ndarray) -> np.ndarray:
    """Of each user's rows with the same value the first, and each without a value; ascending."""
    codes = _encoded(column).indices.to_numpy().astype(np.int64)
    has_none = column.is_null().to_numpy()
    codes = np.where(has_none, len(codes) + np.arange(len(codes)), codes)
    _, first = np.unique(of * (2 * len(codes) + 1) + codes, return_index=True)
    return np.sort(first)


def _cut(rows: np.ndarray, of: np.ndarray, definition: Definition) -> np.ndarray:
    """Of each user's rows, which come newest first, the first ``max_length``, in the order that is wanted."""
    place = np.arange(len(rows)) - np.searchsorted(of, of)
    kept = place < definition.max_length
    rows, of, place = rows[kept], of[kept], place[kept]
    return rows if definition.order == NEWEST_FIRST else rows[np.lexsort((-place, of))]


def _written(
    events: Within,
    rows: np.ndarray,
    definition: Definition,
    of_pins: PinValues,
    of_features: FeatureValues,
) -> pa.Table:
    """The columns of the answer."""
    own = {name: "id" if name == EVENT_ID else name for name in definition.fields if name not in SAID}
    payload, features = (
        [name for name in definition.fields if name in SAID and (name in FOUND_OUT) == is_later]
        for is_later in (False, True)
    )
    needed = (
        ["id"] * bool(features) + ["action", "payload"] * bool(payload) + [OBJECT] * bool(definition.enrich)
    )
    read = events.read(list(dict.fromkeys([*own.values(), *needed])), rows)
    said = {name: read.column(held).cast(EVENT_FIELDS[name]) for name, held in own.items()}
    if payload:
        said |= _extracted(read.column("payload"), payload, read.column("action"))
    if features:
        said |= _extracted(of_features(read.column("id"), events.of[rows]), features)
    said = {name: said[name] for name in definition.fields}
    if definition.enrich:
        enriched = of_pins(read.column(OBJECT), events.of[rows], definition.enrich)
        said |= dict(zip(definition.enrich, enriched, strict=True))
    return pa.table(said)


def _extracted(
    written: pa.Array | pa.ChunkedArray, names: Sequence[str], actions: pa.ChunkedArray | None = None
) -> dict[str, pa.Array]:
    """Fields of payloads, or of features; ``actions``: of the events, whose payloads mean different things."""
    parsed = [None if text is None else orjson.loads(text) for text in written.to_pylist()]
    found = {}
    for name in names:
        field, mine = SAID[name], parsed
        if actions is not None:
            about = name.split(".")[1]
            mine = [
                one if action == about else None
                for one, action in zip(parsed, actions.to_pylist(), strict=True)
            ]
        found[name] = pa.array([payloads.value_of(one, field) for one in mine], EVENT_FIELDS[name])
    return found


def _of_pins(pins: DocumentsView, pin_ids: pa.ChunkedArray, names: Sequence[str]) -> list[pa.Array]:
    """What pins say now under some names of `ENRICHMENTS`, a value an event; null where nothing is known of one."""
    encoded = _encoded(pin_ids)
    keys = encoded.dictionary.cast(pa.binary()).fill_null(b"").to_pylist()
    columns = [(family, column) for family, _, column in (name.partition(".") for name in names)]
    return [values.take(encoded.indices) for values in pins.joined(columns, keys)]


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column in which each value stands once, null too."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pc.dictionary_encode(whole, null_encoding="encode")
