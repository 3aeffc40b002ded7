"""Ads as the newest entries of `ads-budgets` say, ahead of their documents: what stopped or started spending.

Belongs here: entries, whose ads they concern, and a view of the index with those ads' documents made again. Does not
belong here: reading the topic, and when it is done (`pipelines.serving.bypass`).

An entry has the light columns (`schema.LIGHT`) of one row and the row's stand. A control document's version has the
stand of each row that it was made of: where the entry's is greater, the document is read with the entry's values in
place of its own, and what follows from them is made again by the handlers; else the document is newer. The documents
made again are a layer over the view, so whoever reads the view knows nothing of it. The layer stays when the view
below moves: only ads whose documents changed, or that a fresh entry concerns, are looked at again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ads import handlers, joined
from pipelines.ads.index import ADS
from pipelines.ads.schema import CONTROL, LIGHT
from pipelines.contracts import ADS_BUDGETS, Refusal, decode
from pipelines.indexing import facts
from pipelines.indexing.access import Filter
from pipelines.indexing.documents import DocumentsView, Layer

_TABLES = tuple(given.table for given in joined.INPUTS[CONTROL])
_REFERENCES = {"ad_groups": "ad_group_id", "campaigns": "campaign_id", "advertisers": "advertiser_id"}
_FIELDS = {"ad_groups": "ad_group", "campaigns": "campaign", "advertisers": "advertiser"}
"""Table → the inverted field by whose terms the ads of a row are found."""


class Entry(NamedTuple):
    """A row's light columns as they were when it had this stand."""

    table: str
    key: str
    stand: int
    values: Mapping[str, Any]


def read(value: bytes | None, broker_time_ms: int) -> Entry | Refusal:
    """The entry that a record of the topic says, or why it says none."""
    said = decode(ADS_BUDGETS, value, broker_time_ms)
    if isinstance(said, Refusal):
        return said
    return Entry(said["table"], said["key"], said["stand"], orjson.loads(said["values"]))


class Entries:
    """Of each row the entry with the greatest stand. Not safe for several threads."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Entry]] = {table: {} for table in LIGHT}
        self._stands: dict[str, tuple[pa.Array, np.ndarray]] = {}  # of tables whose entries stayed since

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def add(self, entry: Entry) -> bool:
        """Take an entry; whether it is newer than what was known of its row."""
        of_table = self._held[entry.table]
        held = of_table.get(entry.key)
        if held is not None and held.stand >= entry.stand:
            return False
        of_table[entry.key] = entry
        self._stands.pop(entry.table, None)
        return True

    def of(self, table: str, key: str) -> Entry:
        """The entry of a row that has one."""
        return self._held[table][key]

    def stands(self, table: str, keys: pa.Array) -> np.ndarray:
        """The stand of the entry of each row of a table, int64[n]; -1 where there is none."""
        if table not in self._stands:
            held = self._held[table]
            stands = [-1, *(entry.stand for entry in held.values())]
            self._stands[table] = pa.array(list(held), pa.string()), np.array(stands, np.int64)
        known, found = self._stands[table]
        at = pc.fill_null(pc.index_in(keys, known), -1).to_numpy(zero_copy_only=False)
        return found[at + 1]

    def all(self) -> list[Entry]:
        """All, one a row."""
        return [entry for of_table in self._held.values() for entry in of_table.values()]


class Overridden(NamedTuple):
    """A view of the index `ads` under entries.

    Attributes:
        view: With the entries.
        plain: Without.
        newer: Ad → the entries that are newer than its document, as they stand in `view`.
        layer: The documents made again, of these ads and no others.
    """

    view: DocumentsView
    plain: DocumentsView
    newer: Mapping[bytes, tuple[Entry, ...]]
    layer: Layer = Layer()


def plain(view: DocumentsView) -> Overridden:
    """A view under no entries."""
    return Overridden(view, view, {})


def over(
    view: DocumentsView, entries: Entries, fresh: Sequence[Entry], before: Overridden | None
) -> Overridden:
    """A view under entries.

    Args:
        view: Of the index `ads`.
        entries: All.
        fresh: Those that were added since `before`.
        before: What was made of an earlier view, so that only what changed since is looked at; None: look at all.
    """
    if before is None or before.plain.base is not view.base:
        ads, before = _concerned(view, entries.all()), plain(view)
    else:
        ads = [*view.keys_since(before.plain.last_fold()), *_concerned(view, fresh)]
    ads = list(dict.fromkeys(ads))
    newer = _newer(view, entries, ads)
    past = [ad for ad in ads if ad in before.newer and ad not in newer]
    if before.plain is view and not newer and not past:
        return before
    kept = dict(before.newer)
    for ad in past:
        del kept[ad]
    made, layer = view.under(before.layer.without(ADS, past), _made_again(view, newer))
    served = Overridden(made, view, {**kept, **newer}, layer)
    _NEWER[served.view] = served.newer
    return served


def newer_than(view: DocumentsView, ad: bytes) -> tuple[Entry, ...]:
    """The entries by which a view reads an ad otherwise than its document says."""
    return _NEWER.get(view, {}).get(ad, ())


_NEWER: WeakKeyDictionary[DocumentsView, Mapping[bytes, tuple[Entry, ...]]] = WeakKeyDictionary()
"""Of each view that was made here; a view itself knows nothing of entries."""


def _concerned(view: DocumentsView, entries: Iterable[Entry]) -> list[bytes]:
    """The ads whose documents are made of these rows."""
    keys: dict[str, set[str]] = {}
    for entry in entries:
        keys.setdefault(entry.table, set()).add(entry.key)
    ads = [key.encode() for key in keys.pop("ads", ())]
    for table, rows in keys.items():
        ads += view.match(Filter(((_FIELDS[table], frozenset(rows)),)))
    return ads


def _newer(view: DocumentsView, entries: Entries, ads: list[bytes]) -> dict[bytes, tuple[Entry, ...]]:
    """Of those ads that have a document older than an entry, these entries."""
    if not len(entries) or not ads:
        return {}
    rows = dict(zip(_REFERENCES, view.columns(CONTROL, tuple(_REFERENCES.values()), ads), strict=True))
    rows[joined.ROOT] = pa.array(ads, pa.binary()).cast(pa.string())
    said = np.stack([entries.stands(table, rows[table]) for table in _TABLES], axis=1)
    some = np.flatnonzero((said >= 0).any(axis=1))  # most have no entries
    stands = view.versions(CONTROL, [ads[place] for place in some.tolist()])[:, : len(_TABLES)]
    older, of_table = np.nonzero(said[some] > stands)
    found: dict[bytes, list[Entry]] = {}
    for place, at in zip(some[older].tolist(), of_table.tolist(), strict=True):
        entry = entries.of(_TABLES[at], rows[_TABLES[at]][place].as_py())
        found.setdefault(ads[place], []).append(entry)
    is_there = view.get(list(found), ())
    return {
        ad: tuple(newer)
        for (ad, newer), held in zip(found.items(), is_there, strict=True)
        if held is not None
    }


def _made_again(view: DocumentsView, newer: Mapping[bytes, tuple[Entry, ...]]) -> pa.Table:
    """Facts of ads' control documents with these entries' values in place of their own, and the entries' stands."""
    ads = list(newer)
    if not ads:
        return facts.schema(ADS).empty_table()
    documents, stands = view.table(CONTROL, ads), view.versions(CONTROL, ads)
    replaced = {}
    for at, table in enumerate(_TABLES):
        said = [(place, e) for place, ad in enumerate(ads) for e in newer[ad] if e.table == table]
        places = np.array([place for place, _ in said], np.int64)
        stands[places, at] = [entry.stand for _, entry in said]
        is_said = np.zeros(len(ads), bool)
        is_said[places] = True
        for column in LIGHT[table]:
            field = handlers.TOLD[joined.name_of(table, column)]
            assert field is not None
            own = documents.column(field).combine_chunks()
            values = pa.array([entry.values[column] for _, entry in said], own.type)
            replaced[joined.name_of(table, column)] = pc.replace_with_mask(own, pa.array(is_said), values)
    made = handlers.made_again(CONTROL, documents, replaced)
    nothing = np.zeros(len(ads), np.int64)  # a layer has no ties for a content hash to decide
    return facts.documents(
        family=CONTROL,
        key=pa.array(ads, pa.binary()),
        version=[pa.array(column) for column in stands.T],
        is_deleted=pa.array(nothing.astype(bool)),
        content_hash=pa.array(nothing),
        payload=pa.StructArray.from_arrays(
            [column.combine_chunks() for column in made.columns], fields=list(ADS.family(CONTROL).schema)
        ),
    )
