"""The documents that the overlay changes, as they are now: found beside the base, which is not trusted with them.

Belongs here: parts, their terms and numbers, and which documents of a shard are hidden. Does not belong here: reading a
document, and the base's own access paths (``access``).

A part is immutable; each is made by one fold and merged with its neighbour when they are of like size, as the overlay's
runs are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pipelines.indexing import facts as fact
from pipelines.indexing.access import Filter, Vectors, term_bytes
from pipelines.indexing.base import Base, RowsShard
from pipelines.indexing.facts import Hashes
from pipelines.indexing.spec import Forward, IndexSpec, Inverted

Document = Mapping[str, Mapping[str, Any]]
Name = tuple[str, str]
"""A family and a column of it."""


class Terms(NamedTuple):
    """Which row has which term, sorted by the term's hash; a row of (uint64, uint64, int32) each."""

    hashes: Hashes
    row: np.ndarray

    def of(self, field: str, term: Any) -> np.ndarray:
        """The rows that have a term, int32."""
        wanted = fact.hash_keys([_named(field, term)])
        start = int(np.searchsorted(self.hashes.lookup, wanted.lookup[0], side="left"))
        end = int(np.searchsorted(self.hashes.lookup, wanted.lookup[0], side="right"))
        return self.row[start:end][self.hashes.check[start:end] == wanted.check[0]]


def _named(field: str, term: Any) -> bytes:
    return field.encode() + b"\0" + term_bytes(term)


class Part:
    """Changed documents: their keys, whether each is there, its terms, and its numbers (NaN where it says nothing)."""

    def __init__(
        self, keys: Sequence[bytes], is_visible: np.ndarray, terms: Terms, numbers: Mapping[Name, np.ndarray]
    ) -> None:
        self.keys = keys
        self.is_visible = is_visible
        self.terms = terms
        self.numbers = numbers
        hashed = fact.hash_keys(keys)
        self._order = np.argsort(hashed.lookup, kind="stable")
        self._hashes = hashed.take(self._order)
        self.vectors: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the base alone: read once

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Hashes) -> np.ndarray:
        """The rows of those keys that it has."""
        at = fact.find(self._hashes, keys)
        return self._order[at[at >= 0]]

    def passing(self, wanted: Filter, is_alive: np.ndarray) -> np.ndarray:
        """The rows that pass, of those that are alive and there; int64."""
        passing = is_alive & self.is_visible
        for field, terms in wanted.clauses:
            has = np.zeros(len(self), bool)
            for term in terms:
                has[self.terms.of(field, term)] = True
            passing &= has
        for field, terms in wanted.refused:
            for term in terms:
                passing[self.terms.of(field, term)] = False
        return np.flatnonzero(passing)

    def only(self, rows: np.ndarray) -> Part:
        """These rows alone."""
        place = np.full(len(self), -1, np.int32)
        place[rows] = np.arange(len(rows))
        kept = np.flatnonzero(place[self.terms.row] >= 0)
        terms = Terms(self.terms.hashes.take(kept), place[self.terms.row[kept]])
        keys = [self.keys[row] for row in rows.tolist()]
        return Part(
            keys, self.is_visible[rows], terms, {name: held[rows] for name, held in self.numbers.items()}
        )

    def followed_by(self, other: Part) -> Part:
        """These, then the others'."""
        hashes = Hashes(*map(np.concatenate, zip(self.terms.hashes, other.terms.hashes, strict=True)))
        row = np.concatenate([self.terms.row, other.terms.row + np.int32(len(self))])
        numbers = {name: np.concatenate([held, other.numbers[name]]) for name, held in self.numbers.items()}
        is_visible = np.concatenate([self.is_visible, other.is_visible])
        return Part([*self.keys, *other.keys], is_visible, _sorted(hashes, row), numbers)


def _sorted(hashes: Hashes, row: np.ndarray) -> Terms:
    order = np.argsort(hashes.lookup, kind="stable")
    return Terms(hashes.take(order), row[order])


def part(spec: IndexSpec, keys: Sequence[bytes], documents: Sequence[Document | None]) -> Part:
    """Documents as they are now; None: there is none."""
    fields = [path for path in spec.access if isinstance(path, Inverted)]
    rows, terms = [], []
    for row, document in enumerate(documents):
        for path in fields:
            for term in _values(document, path):
                rows.append(row)
                terms.append(_named(path.name, term))
    numbers = {name: _numbers(documents, *name) for name in number_columns(spec)}
    is_visible = np.array([document is not None for document in documents], bool)
    return Part(list(keys), is_visible, _sorted(fact.hash_keys(terms), np.array(rows, np.int32)), numbers)


def _values(document: Document | None, path: Inverted) -> set[Any]:
    value = (document or {}).get(path.family, {}).get(path.column)
    values = value if isinstance(value, list) else [value]
    return {v for v in values if v is not None}


def number_columns(spec: IndexSpec) -> list[Name]:
    """The forward columns of an index that are numbers or truths: those that documents can be scored by."""
    found = []
    for path in spec.access:
        if isinstance(path, Forward):
            schema = spec.family(path.family).schema
            found += [(path.family, c) for c in path.columns if _is_number(schema.field(c).type)]
    return found


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _numbers(documents: Sequence[Document | None], family: str, column: str) -> np.ndarray:
    values = [(document or {}).get(family, {}).get(column) for document in documents]
    return np.array([np.nan if value is None else value for value in values], np.float64)


class Changed:
    """All changed documents: parts, oldest first, with which of their rows are not superseded by a newer part."""

    def __init__(
        self,
        parts: tuple[tuple[Part, np.ndarray], ...] = (),
        masks: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self._parts = parts
        self._masks = masks or {}
        self._hidden: dict[tuple[str, int], np.ndarray] = {}

    def of(self, shard: RowsShard) -> np.ndarray:
        """Which documents of a shard are changed; bool[documents of the shard]."""
        mask = self._masks.get(id(shard))
        return mask if mask is not None else np.zeros(len(shard.keys.lookup), bool)

    def hidden(self, name: str, shard: RowsShard, vectors: Vectors, is_visible: np.ndarray) -> np.ndarray:
        """The rows of a shard's vectors that are not to be found in the base: changed, or of no visible document."""
        if (name, id(shard)) not in self._hidden:
            ordinals = np.flatnonzero(self.of(shard) | ~is_visible)
            self._hidden[name, id(shard)] = vectors.rows_of(ordinals)
        return self._hidden[name, id(shard)]

    def passing(self, wanted: Filter) -> Iterator[tuple[Part, np.ndarray]]:
        """For each part its rows that pass, if any."""
        for held, is_alive in self._parts:
            rows = held.passing(wanted, is_alive)
            if len(rows):
                yield held, rows

    @cached_property
    def count(self) -> int:
        """How many documents are changed."""
        return sum(int(is_alive.sum()) for _, is_alive in self._parts)

    def with_part(self, base: Base, new: Part) -> Changed:
        """A copy that knows the documents of a part as they are there."""
        masks = dict(self._masks)
        for shard, _, ordinals in base.place(list(new.keys)):
            masks[id(shard)] = self.of(shard).copy()
            masks[id(shard)][ordinals] = True
        hashed = fact.hash_keys(new.keys)
        parts = [(held, _without(is_alive, held.find(hashed))) for held, is_alive in self._parts]
        parts.append((new, np.ones(len(new), bool)))
        while len(parts) >= 2 and 2 * len(parts[-1][0]) >= len(parts[-2][0]):
            (newer, newer_alive), (older, older_alive) = parts.pop(), parts.pop()
            merged = _alive(older, older_alive).followed_by(_alive(newer, newer_alive))
            parts.append((merged, np.ones(len(merged), bool)))
        return Changed(tuple(parts), masks)


def _without(is_alive: np.ndarray, rows: np.ndarray) -> np.ndarray:
    if not len(rows):
        return is_alive
    left = is_alive.copy()
    left[rows] = False
    return left


def _alive(held: Part, is_alive: np.ndarray) -> Part:
    return held if is_alive.all() else held.only(np.flatnonzero(is_alive))
