"""The documents that the overlay changes, as they are now: found beside the base, which is not trusted with them.

Belongs here: parts, their terms and numbers, and which documents of a shard are hidden. Does not belong here: reading a
document, and the base's own access paths (``access``).

A part is immutable; each is made by one fold and merged with its neighbour when they are of like size, as the overlay's
runs are.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing import facts as fact
from pipelines.indexing.access import Filter, Vectors, term_bytes
from pipelines.indexing.base import Base, Places, RowsShard
from pipelines.indexing.facts import Hashes
from pipelines.indexing.spec import Forward, IndexSpec, Inverted

Name = tuple[str, str]
"""A family and a column of it."""


class Terms(NamedTuple):
    """Which row has which term, sorted by the term's hash; a row of (uint64, uint64, int32) each."""

    hashes: Hashes
    row: np.ndarray

    def any_of(self, field: str, terms: Collection[Any]) -> np.ndarray:
        """The rows that have one of the terms, int32; a row may come several times."""
        wanted = fact.hash_keys(_named(field, term) for term in terms)
        starts = np.searchsorted(self.hashes.lookup, wanted.lookup, side="left")
        ends = np.searchsorted(self.hashes.lookup, wanted.lookup, side="right")
        found = [self.row[:0]]
        for at in np.flatnonzero(ends > starts).tolist():
            held = slice(starts[at], ends[at])
            found.append(self.row[held][self.hashes.check[held] == wanted.check[at]])
        return np.concatenate(found)


def _named(field: str, term: Any) -> bytes:
    return field.encode() + b"\0" + term_bytes(term)


Found = tuple[np.ndarray, np.ndarray]
"""The vector of each of n documents, float32[n, d] (zeros where there is none), and whether there is one, bool[n]."""


class Part:
    """Changed documents: their keys, whether each is there, its terms, its numbers (NaN where it says nothing), and its
    vectors by access path."""

    def __init__(
        self,
        keys: Sequence[bytes],
        hashed: Hashes,
        is_visible: np.ndarray,
        terms: Terms,
        numbers: Mapping[Name, np.ndarray],
        vectors: Mapping[str, Found],
    ) -> None:
        self.keys = keys
        self.hashed = hashed
        self.is_visible = is_visible
        self.terms = terms
        self.numbers = numbers
        self._order = np.argsort(hashed.lookup, kind="stable")
        self._sorted = hashed.take(self._order)
        self.vectors = dict(vectors)  # those of base-only families are added when they are first asked for
        self._places: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Hashes) -> np.ndarray:
        """The rows of those keys that it has."""
        at = fact.find(self._sorted, keys)
        return self._order[at[at >= 0]]

    def places(self, base: Base) -> np.ndarray:
        """Where its keys stand in the base, which is always the same one; as in ``Places``."""
        if self._places is None:
            self._places = base.places(self.keys).at
        return self._places

    def passing(self, wanted: Filter, is_alive: np.ndarray) -> np.ndarray:
        """The rows that pass, of those that are alive and there; int64."""
        passing = is_alive & self.is_visible
        for field, terms in wanted.clauses:
            has = np.zeros(len(self), bool)
            has[self.terms.any_of(field, terms)] = True
            passing &= has
        for field, terms in wanted.refused:
            passing[self.terms.any_of(field, terms)] = False
        return np.flatnonzero(passing)

    def only(self, rows: np.ndarray) -> Part:
        """These rows alone."""
        place = np.full(len(self), -1, np.int32)
        place[rows] = np.arange(len(rows))
        kept = np.flatnonzero(place[self.terms.row] >= 0)
        terms = Terms(self.terms.hashes.take(kept), place[self.terms.row[kept]])
        keys = [self.keys[row] for row in rows.tolist()]
        numbers = {name: held[rows] for name, held in self.numbers.items()}
        vectors = {name: (matrix[rows], has[rows]) for name, (matrix, has) in self.vectors.items()}
        return Part(keys, self.hashed.take(rows), self.is_visible[rows], terms, numbers, vectors)

    def followed_by(self, other: Part) -> Part:
        """These, then the others'."""
        hashed = _concatenated(self.hashed, other.hashed)
        hashes = _concatenated(self.terms.hashes, other.terms.hashes)
        row = np.concatenate([self.terms.row, other.terms.row + np.int32(len(self))])
        numbers = {name: np.concatenate([held, other.numbers[name]]) for name, held in self.numbers.items()}
        is_visible = np.concatenate([self.is_visible, other.is_visible])
        vectors = {
            name: (
                np.concatenate([held[0], other.vectors[name][0]]),
                np.append(held[1], other.vectors[name][1]),
            )
            for name, held in self.vectors.items()
            if name in other.vectors
        }
        return Part([*self.keys, *other.keys], hashed, is_visible, _sorted(hashes, row), numbers, vectors)


def _concatenated(first: Hashes, second: Hashes) -> Hashes:
    return Hashes(*map(np.concatenate, zip(first, second, strict=True)))


def _sorted(hashes: Hashes, row: np.ndarray) -> Terms:
    order = np.argsort(hashes.lookup, kind="stable")
    return Terms(hashes.take(order), row[order])


def part(
    spec: IndexSpec,
    keys: Sequence[bytes],
    hashed: Hashes,
    is_visible: np.ndarray,
    values: Mapping[Name, pa.Array],
    vectors: Mapping[str, Found],
) -> Part:
    """Documents as they are now.

    Args:
        spec: The index.
        keys: The documents'.
        hashed: Their hashes.
        is_visible: Which are there.
        values: What each says in the columns of ``columns``, null where nothing.
        vectors: By access path, of families that a stream feeds.
    """
    rows, hashes = [np.empty(0, np.int32)], [fact.hash_keys(())]
    for path in spec.access:
        if isinstance(path, Inverted):
            row, terms = _terms(values[path.family, path.column])
            encoded = terms.dictionary_encode()  # most documents have terms that others have
            named = fact.hash_keys(_named(path.name, term) for term in encoded.dictionary.to_pylist())
            rows.append(row)
            hashes.append(named.take(encoded.indices.to_numpy()))
    terms_of = _sorted(functools.reduce(_concatenated, hashes), np.concatenate(rows))
    numbers = {name: _numbers(values[name]) for name in number_columns(spec)}
    return Part(list(keys), hashed, is_visible, terms_of, numbers, vectors)


def columns(spec: IndexSpec) -> dict[str, tuple[str, ...]]:
    """The columns of each family that documents are found or scored by."""
    found: dict[str, dict[str, None]] = {}
    for path in spec.access:
        if isinstance(path, Inverted):
            found.setdefault(path.family, {})[path.column] = None
    for family, column in number_columns(spec):
        found.setdefault(family, {})[column] = None
    return {family: tuple(names) for family, names in found.items()}


def _terms(values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Each term that is not null, after the row that has it."""
    row = np.arange(len(values), dtype=np.int32)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        row, values = row[pc.list_parent_indices(values).to_numpy()], pc.list_flatten(values)
    is_said = values.is_valid()
    return row[is_said.to_numpy(zero_copy_only=False)], values.filter(is_said)


def number_columns(spec: IndexSpec) -> list[Name]:
    """The forward columns of an index that are numbers or truths: those that documents can be scored by."""
    found = []
    for path in spec.access:
        if isinstance(path, Forward):
            schema = spec.family(path.family).schema
            found += [(path.family, c) for c in path.columns if _is_number(schema.field(c).type)]
    return found


def _is_number(kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _numbers(values: pa.Array) -> np.ndarray:
    found = pc.fill_null(values.cast(pa.float64(), safe=False), np.nan)
    return np.array(found.to_numpy(zero_copy_only=False), np.float64)


Parts = tuple[tuple[Part, np.ndarray], ...]
"""Parts, oldest first, with which of their rows are not superseded by a newer part."""


class Changed:
    """All changed documents, and which documents of the base these are."""

    def __init__(self, parts: Parts = (), masks: Mapping[int, np.ndarray] | None = None) -> None:
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
        return Changed(with_part(self._parts, new), self._masked(base, new.places(base)))

    def under(self, base: Base, above: Parts) -> Changed:
        """A copy in which the documents of other parts stand as they are there; these stay apart, so nothing is merged
        again each time."""
        parts, places = self._parts, [np.empty(0, np.int64)]
        for part, is_alive in above:
            parts = without(parts, part.hashed.take(np.flatnonzero(is_alive)))
            places.append(part.places(base)[is_alive])
        return Changed((*parts, *above), self._masked(base, np.concatenate(places)))

    def _masked(self, base: Base, places: np.ndarray) -> dict[int, np.ndarray]:
        masks = dict(self._masks)
        for shard, _, ordinals in base.place(Places((), places)):
            masks[id(shard)] = self.of(shard).copy()
            masks[id(shard)][ordinals] = True
        return masks


def with_part(parts: Parts, new: Part) -> Parts:
    """These and a newer one."""
    stacked = [*without(parts, new.hashed), _whole(new)]
    while len(stacked) >= 2 and 2 * len(stacked[-1][0]) >= len(stacked[-2][0]):
        (newer, newer_alive), (older, older_alive) = stacked.pop(), stacked.pop()
        merged = _alive(older, older_alive).followed_by(_alive(newer, newer_alive))
        stacked.append(_whole(merged))
    return tuple(stacked)


def without(parts: Parts, keys: Hashes) -> Parts:
    """The same parts, but the documents of these keys are superseded."""
    return tuple((held, _without(is_alive, held.find(keys))) for held, is_alive in parts)


def pruned(parts: Parts) -> Parts:
    """The same documents in parts of which at least half is not superseded."""
    return tuple(
        (held, is_alive) if 2 * is_alive.sum() >= len(held) else _whole(_alive(held, is_alive))
        for held, is_alive in parts
        if is_alive.any()
    )


def _whole(held: Part) -> tuple[Part, np.ndarray]:
    return held, np.ones(len(held), bool)


def _without(is_alive: np.ndarray, rows: np.ndarray) -> np.ndarray:
    if not len(rows):
        return is_alive
    left = is_alive.copy()
    left[rows] = False
    return left


def _alive(held: Part, is_alive: np.ndarray) -> Part:
    return held if is_alive.all() else held.only(np.flatnonzero(is_alive))
