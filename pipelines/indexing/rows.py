"""The overlay of documents and timelines: runs, and folding facts into them.

Belongs here: runs (the overlay's immutable, sorted pieces), folding, and what ``documents`` and ``timelines`` share.
A view is never changed: folding makes a new one that shares all but the newest runs, so that a reader never sees half
an epoch.
Sums are ``sums``'; following the delta is ``overlay``'s.

An overlay is a short list of runs, newest last, each made by one fold and merged with its neighbour when they are of
like size (as in a log-structured merge tree): a fact is copied O(log n) times, and there are O(log n) runs to read.
A fold keeps only facts that outrank what base and older runs have, so the newest run that knows an identity is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing import facts as fact
from pipelines.indexing.base import Base
from pipelines.indexing.facts import Hashes, hash_keys, hashes, payload_column
from pipelines.indexing.merge import Ranks, greater, merge, ranks
from pipelines.indexing.position import Position
from pipelines.indexing.spec import IndexSpec


class Origins(NamedTuple):
    """Of each fact of a run: the base's live row of the same identity (-1: none), the number of the fold that it came
    with, and whether neither base nor overlay had known the identity until then."""

    base_row: np.ndarray
    fold: np.ndarray
    is_addition: np.ndarray

    def take(self, rows: np.ndarray) -> Origins:
        """Those of these rows."""
        return Origins(*(column[rows] for column in self))

    def followed_by(self, others: Origins) -> Origins:
        """These, then the others."""
        return Origins(*map(np.concatenate, zip(self, others, strict=True)))


class Run:
    """An immutable, merged piece of an overlay: facts sorted by key."""

    def __init__(self, spec: IndexSpec, facts: pa.Table, origins: Origins) -> None:
        keys = hashes(facts.column("key_hash"))
        order = np.lexsort((keys.check, keys.lookup))
        self.facts = facts.take(order).combine_chunks()
        self.keys = keys.take(order)
        self.origins = origins.take(order)
        self.ranks: Ranks = ranks(self.facts)
        identities = hashes(self.facts.column("identity_hash"))
        self.by_identity = np.argsort(identities.lookup, kind="stable")
        self.identities = identities.take(self.by_identity)
        names = pa.array([family.name for family in spec.families], self.facts.column("family").type)
        self.family = pc.index_in(self.facts.column("family"), names).to_numpy().astype(np.int8)
        self.times = self.facts.column("time_ms").to_numpy()
        self.is_deleted = self.ranks.is_deleted
        self._families = spec.families
        self._first = spec.families[0]
        self.last_fold = int(origins.fold.max(initial=NO_FOLD))

    def __len__(self) -> int:
        return self.facts.num_rows

    def find(self, identities: Hashes) -> np.ndarray:
        """The row of each identity, -1 for none."""
        at = fact.find(self.identities, identities)
        return np.where(at >= 0, self.by_identity[np.maximum(at, 0)], -1) if len(self) else at

    def rows_of(self, keys: Hashes) -> tuple[np.ndarray, np.ndarray]:
        """All rows of some keys, and which key each is of; both int64."""
        left = np.searchsorted(self.keys.lookup, keys.lookup, side="left")
        right = np.searchsorted(self.keys.lookup, keys.lookup, side="right")
        if (left == right).all():
            return NO_ROWS, NO_ROWS
        rows, queries = spans(left, right)
        is_same = self.keys.check[rows] == keys.check[queries]
        return (rows, queries) if is_same.all() else (rows[is_same], queries[is_same])

    def rows_of_keys(self, keys: Hashes, family: int) -> tuple[np.ndarray, np.ndarray]:
        """Of many keys the rows of one family, and which key each is of; both int64, for documents: one a key."""
        rows, held = self._of_family[family]
        at = fact.find(held, keys)
        queries = np.flatnonzero(at >= 0)
        return rows[at[queries]], queries

    @cached_property
    def _of_family(self) -> list[tuple[np.ndarray, Hashes]]:
        """The rows of each family, and their keys, still sorted."""
        rows = [np.flatnonzero(self.family == number) for number in range(len(self._families))]
        return [(of_family, self.keys.take(of_family)) for of_family in rows]

    @cached_property
    def payload(self) -> dict[str, dict[str, pa.Array]]:
        """Family → column → what every row says; null where it is of another family, or says that it is gone."""
        found = {}
        for family in self._families:
            (payload,) = self.facts.column(payload_column(family.name)).chunks  # of more it would be a copy
            found[family.name] = dict(zip(family.schema.names, payload.flatten(), strict=True))
        return found

    def value(self, family: str, row: int) -> dict[str, Any]:
        """What a row says of its family."""
        return self.facts.column(payload_column(family))[row].as_py() or {}

    def said(self, family: str, rows: np.ndarray) -> pa.StructArray:
        """What rows say of their family, in all its columns."""
        return self.facts.column(payload_column(family)).take(pa.array(rows)).combine_chunks()

    def payloads(self, family: str, rows: np.ndarray) -> list[dict[str, Any]]:
        """The same as plain values; of more than a few rows column by column, which is much quicker."""
        if len(rows) <= FEW_ROWS:
            return [self.value(family, row) for row in rows.tolist()]
        said = self.said(family, rows)
        columns = {field.name: said.field(at).to_pylist() for at, field in enumerate(said.type)}
        return [
            {name: values[place] for name, values in columns.items()} if is_said else {}
            for place, is_said in enumerate(said.is_valid().to_pylist())
        ]

    @cached_property
    def events(self) -> dict[str, pa.Array]:
        """The id, the time and the payload's columns of the first family, for every row."""
        names = [field.name for field in self._first.schema]
        payload = self.facts.column(payload_column(self._first.name)).combine_chunks()
        named = dict(zip(names, payload.flatten(), strict=True))
        return {"id": self.facts.column("id").combine_chunks(), "time_ms": pa.array(self.times), **named}


_folds = itertools.count()  # no two folds of a process have the same number
NO_FOLD = -1
NO_ROWS = np.empty(0, np.int64)
FEW_ROWS = 4
"""Up to so many rows are read one by one: their columns, dozens of them, would cost more."""


def spans(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of half-open spans, one after the other, and which span each is of; both int64."""
    counts = ends - starts
    of = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(of)) + (starts - np.cumsum(counts) + counts)[of], of


def fold(spec: IndexSpec, base: Base, runs: tuple[Run, ...], facts: pa.Table) -> tuple[Run, ...]:
    """The runs after folding facts in: facts that base or runs outrank, or already have, change nothing."""
    facts = merge(fact.conform(facts, spec))
    identities, ranked = hashes(facts.column("identity_hash")), ranks(facts)
    known = base.identities(identities, hashes(facts.column("key_hash")))
    keep = ~known.is_known | greater(ranked, known.ranks)
    is_addition = ~known.is_known
    for run in runs:
        at = run.find(identities)
        hit = np.flatnonzero(at >= 0)
        keep[hit] &= greater(ranked.take(hit), run.ranks.take(at[hit]))
        is_addition[hit] = False
    rows = np.flatnonzero(keep)
    if not len(rows):
        return runs
    origins = Origins(known.row[rows], np.full(len(rows), next(_folds)), is_addition[rows])
    return _compact(spec, (*runs, Run(spec, facts.take(rows), origins)))


def above(spec: IndexSpec, runs: tuple[Run, ...], facts: pa.Table) -> tuple[Run, ...]:
    """The runs, and facts that stand above them whatever their rank; one fact an identity."""
    facts = fact.conform(facts, spec)
    count = facts.num_rows
    nowhere, fold_number = np.full(count, -1, np.int64), np.full(count, next(_folds))
    return _compact(spec, (*runs, Run(spec, facts, Origins(nowhere, fold_number, np.zeros(count, bool)))))


def without(spec: IndexSpec, runs: tuple[Run, ...], keys: Hashes) -> tuple[Run, ...]:
    """The runs without all that they say of these keys."""
    gone, left = keys.take(np.argsort(keys.lookup)), list[Run]()
    for run in runs:
        rows = np.flatnonzero(fact.find(gone, run.keys) < 0)
        if len(rows) == len(run):
            left.append(run)
        elif len(rows):
            left.append(Run(spec, run.facts.take(rows), run.origins.take(rows)))
    return tuple(left)


def _compact(spec: IndexSpec, runs: tuple[Run, ...]) -> tuple[Run, ...]:
    while len(runs) >= 2 and 2 * len(runs[-1]) >= len(runs[-2]):
        older, newer = runs[-2:]
        is_superseded = np.zeros(len(older), bool)
        at = older.find(newer.identities)
        is_superseded[at[at >= 0]] = True
        rest = np.flatnonzero(~is_superseded)
        facts = pa.concat_tables([older.facts.take(rest), newer.facts])
        merged = Run(spec, facts, older.origins.take(rest).followed_by(newer.origins))
        runs = (*runs[:-2], merged)
    return runs


class RowsView:
    """What documents and timelines share: the pair of base and runs, and folding."""

    def __init__(self, base: Base, position: Position | None = None, runs: tuple[Run, ...] = ()) -> None:
        self.spec = base.spec
        self.base = base
        self.runs = runs
        self.position = base.cut if position is None else position

    @property
    def overlay_facts(self) -> int:
        """How many facts the overlay holds."""
        return sum(len(run) for run in self.runs)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters pinned with the base; empty before the first."""
        return self.base.manifest.parameters if self.base.manifest else {}

    def last_fold(self, key: bytes | None = None) -> int:
        """The number of the fold that changed something last, of a key or at all; ``NO_FOLD``: the base alone speaks.

        Of two views of one base that have the same number, the answers are the same.
        """
        if key is None:
            return max((run.last_fold for run in self.runs), default=NO_FOLD)
        hashed = hash_keys([key])
        of_key = [run.origins.fold[run.rows_of(hashed)[0]].max(initial=NO_FOLD) for run in self.runs]
        return int(max(of_key, default=NO_FOLD))

    def keys_since(self, fold: int) -> list[bytes]:
        """The keys of which something changed after a fold: of no other does an earlier view of the same base and delta
        whose ``last_fold`` it was answer otherwise."""
        recent = [
            run.facts.column("key").filter(pa.array(run.origins.fold > fold))
            for run in self.runs
            if run.last_fold > fold
        ]
        return list(dict.fromkeys(key for column in recent for key in column.to_pylist()))

    def folded(self, facts: pa.Table, position: Position) -> Self:
        """A new view with these facts folded in, standing on ``position``."""
        runs = fold(self.spec, self.base, self.runs, facts) if facts.num_rows else self.runs
        return type(self)(self.base, self.position.merge(position), runs)

    def _newest(self, keys: Hashes) -> list[tuple[Run, np.ndarray, np.ndarray]]:
        """The overlay's standing rows of some keys: by run, the newest run first, its rows and which key each is of."""
        standing: list[tuple[Run, np.ndarray, np.ndarray]] = []
        for run in reversed(self.runs):
            rows, queries = run.rows_of(keys)
            if not len(rows):
                continue
            if standing:
                identities = hashes(run.facts.column("identity_hash").take(rows))
                for newer, _, _ in standing:
                    fresh = np.flatnonzero(newer.find(identities) < 0)
                    rows, queries, identities = rows[fresh], queries[fresh], identities.take(fresh)
            if len(rows):
                standing.append((run, rows, queries))
        return standing
