"""Documents: base and overlay read as one, by key, by term, or by vector.

Belongs here: the view, and what it knows of the documents that the delta has changed. The files of access paths and the
search in one shard are ``access``'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import TidemarkError
from pipelines.indexing import access, changed
from pipelines.indexing.access import Filter
from pipelines.indexing.base import Places, RowsShard
from pipelines.indexing.changed import Changed, Part, number_columns
from pipelines.indexing.facts import Hashes, hash_keys
from pipelines.indexing.position import Position
from pipelines.indexing.rows import RowsView
from pipelines.indexing.spec import Documents, Forward, Inverted, Vector


class UnknownAccess(TidemarkError):
    """A query names an access path that the index does not declare."""


class DocumentsView(RowsView):
    """Documents by key, found by key, by term, or by vector."""

    def get(
        self, keys: Sequence[bytes], families: Sequence[str] | None = None
    ) -> list[dict[str, dict[str, Any]] | None]:
        """For each key its document: family → column → value; None where there is none.

        ``families`` limits what is read (all, if None); whether there is a document does not depend on it.
        """
        read = self.spec.read
        assert isinstance(read, Documents)
        wanted = [f.name for f in self.spec.families] if families is None else list(families)
        parts: dict[str, list[Any]] = {
            name: [None] * len(keys) for name in dict.fromkeys([read.presence, *wanted])
        }
        for shard, queries, ordinals in self.base.place(keys):
            for name, values in parts.items():
                starts = shard.starts[name][ordinals]
                has = np.flatnonzero(shard.ends[name][ordinals] > starts)
                if not len(has):
                    continue
                is_wanted = name in wanted
                documents = shard.payloads(name, starts[has]) if is_wanted else [{}] * len(has)
                for query, document in zip(queries[has].tolist(), documents, strict=True):
                    values[query] = document
        if self.runs:
            self._overlay_parts(hash_keys(keys), parts)
        present = parts[read.presence]
        return [
            None
            if present[i] is None
            else {name: parts[name][i] for name in wanted if parts[name][i] is not None}
            for i in range(len(keys))
        ]

    def _overlay_parts(self, hashed: Hashes, parts: dict[str, list[Any]]) -> None:
        names = [f.name for f in self.spec.families]
        for run in self.runs:  # oldest first: a newer run outranks
            left = np.searchsorted(run.keys.lookup, hashed.lookup, side="left")
            right = np.searchsorted(run.keys.lookup, hashed.lookup, side="right")
            for query in np.flatnonzero(right > left).tolist():
                for row in range(int(left[query]), int(right[query])):
                    name = names[run.family[row]]
                    if run.keys.check[row] != hashed.check[query] or name not in parts:
                        continue
                    deleted = run.is_deleted[row]
                    parts[name][query] = None if deleted else run.value(name, row)

    def vectors(self, name: str, keys: Sequence[bytes] | Places) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of keys, float32[n, d] (zeros where there is none), and whether there is one, bool[n].

        A vector is there whether or not its document is: it comes from the base alone.
        """
        path = self._path(name, Vector)
        places = keys if isinstance(keys, Places) else self.base.places(keys)
        count = len(places.at)
        matrix, has = np.zeros((count, path.dimensions), np.float32), np.zeros(count, bool)
        for shard, queries, ordinals in self.base.place(places):
            vectors = self._vectors(shard, path)
            rows = vectors.row_of_ordinal[ordinals]
            given = rows >= 0
            matrix[queries[given]] = vectors.matrix[rows[given]]
            has[queries[given]] = True
        return matrix, has

    def match(self, where: Mapping[str, Any] | Filter, limit: int | None = None) -> list[bytes]:
        """The keys of the documents that pass, ascending.

        ``where``: a filter, or inverted field → term; all must hold.

        Raises:
            UnknownAccess: a field is not declared.
        """
        wanted = self._filter(where)
        found: list[bytes] = []
        for shard in self.base.shards:
            found += shard.key_bytes.take(np.flatnonzero(self._passing(shard, wanted))).to_pylist()
        for part, rows in self._changed.passing(wanted):
            found += [part.keys[row] for row in rows.tolist()]
        return sorted(found)[:limit]

    def ranked(
        self,
        where: Mapping[str, Any] | Filter,
        columns: Sequence[tuple[str, str]],
        score: Callable[[Mapping[tuple[str, str], np.ndarray]], np.ndarray],
        k: int,
    ) -> list[tuple[bytes, float]]:
        """The ``k`` documents of greatest score among those that pass: (key, score), best first, ties by key.

        Filter and delta are exact: a document that was changed since the base is judged as it is now.

        Args:
            where: As in ``match``.
            columns: (family, column) of numbers or truths that are declared ``Forward``.
            score: The columns, float64[n] each with NaN for null → float64[n]; NaN: the document is not answered.
            k: How many.

        Raises:
            UnknownAccess: a field or a column is not declared.
        """
        wanted = self._filter(where)
        for name in columns:
            if name not in number_columns(self.spec):
                known = ", ".join(".".join(one) for one in number_columns(self.spec))
                raise UnknownAccess(
                    f"index {self.spec.name!r} has no forward numbers {'.'.join(name)!r}",
                    remedy=f"it has: {known or 'none'}",
                )
        found: list[tuple[bytes, float]] = []
        for shard in self.base.shards:
            ordinals = np.flatnonzero(self._passing(shard, wanted))
            scores = score({name: self._numbers(shard, *name)[ordinals] for name in columns})
            best, values = _best(ordinals, scores, k)
            found += zip(shard.key_bytes.take(best).to_pylist(), values.tolist(), strict=True)
        for part, rows in self._changed.passing(wanted):
            scores = score({name: part.numbers[name][rows] for name in columns})
            best, values = _best(rows, scores, k)
            found += zip((part.keys[row] for row in best.tolist()), values.tolist(), strict=True)
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]

    def search(
        self,
        name: str,
        query: np.ndarray,
        k: int,
        where: Mapping[str, Any] | Filter | None = None,
        exclude: Collection[bytes] | Places = (),
    ) -> list[tuple[bytes, float]]:
        """The ``k`` documents of greatest inner product with ``query``: (key, score), best first, ties by key.

        The filter and the delta are exact: a document that was changed since the base is judged as it is now. A
        document without a vector is not found.

        Args:
            name: A declared ``Vector``.
            query: float32[d].
            where: As in ``match``.
            exclude: Keys that must not be answered.

        Raises:
            UnknownAccess: the vector or a field is not declared.
        """
        path = self._path(name, Vector)
        query = np.ascontiguousarray(query, np.float32)
        wanted = self._filter(where or {})
        places = exclude if isinstance(exclude, Places) else self.base.places(list(exclude))
        excluded = {id(shard): ordinals for shard, _, ordinals in self.base.place(places)}
        found: list[tuple[bytes, float]] = []
        for shard in self.base.shards:
            vectors = self._vectors(shard, path)
            hidden = self._changed.hidden(path.name, shard, vectors, self._visible(shard))
            if id(shard) in excluded:
                hidden = np.concatenate([hidden, vectors.rows_of(excluded[id(shard)])])
            rows = vectors.rows_of(np.flatnonzero(self._passing(shard, wanted))) if where else None
            found += _named(shard, vectors, vectors.nearest(query, k, rows, hidden), k)
        found += self._search_changed(name, query, k, wanted, places.keys)
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]

    def _search_changed(
        self, name: str, query: np.ndarray, k: int, wanted: Filter, exclude: Collection[bytes]
    ) -> list[tuple[bytes, float]]:
        excluded = set(exclude)
        found: list[tuple[bytes, float]] = []
        for part, passing in self._changed.passing(wanted):
            if name not in part.vectors:
                part.vectors[name] = self.vectors(name, part.keys)
            matrix, has = part.vectors[name]
            rows = passing[has[passing]]
            if excluded:
                rows = rows[[part.keys[row] not in excluded for row in rows.tolist()]]
            rows, scores = access.best(rows, matrix[rows] @ query, k)
            found += [(part.keys[i], s) for i, s in zip(rows.tolist(), scores.tolist(), strict=True)]
        return found

    def _filter(self, where: Mapping[str, Any] | Filter) -> Filter:
        wanted = where if isinstance(where, Filter) else access.equal_to(where)
        for field in wanted.fields:
            self._path(field, Inverted)
        return wanted

    def _path(self, name: str, kind: type) -> Any:
        for path in self.spec.access:
            if isinstance(path, kind) and getattr(path, "name", None) == name:
                return path
        known = [p.name for p in self.spec.access if isinstance(p, Inverted | Vector)]
        raise UnknownAccess(
            f"index {self.spec.name!r} has no {kind.__name__.lower()} access path {name!r}",
            remedy="it has: " + (", ".join(known) or "none"),
        )

    def _passing(self, shard: RowsShard, wanted: Filter) -> np.ndarray:
        """Which of the base's documents pass, of those that are there and unchanged; bool[documents of the shard]."""
        count = len(shard.keys.lookup)
        passing = np.packbits(self._visible(shard))
        for field, terms in wanted.clauses:
            passing &= self._postings(shard, field).any_of(terms)
        for field, terms in wanted.refused:
            passing &= ~self._postings(shard, field).any_of(terms)
        return np.unpackbits(passing, count=count).view(bool) & ~self._changed.of(shard)

    def _postings(self, shard: RowsShard, field: str) -> access.Postings:
        path = self._path(field, Inverted)
        folder = shard.directory if shard.has(path.family, path.column) else None
        count = len(shard.keys.lookup)
        return _opened(shard, field, lambda: access.Postings(path, folder, count))

    def _numbers(self, shard: RowsShard, family: str, column: str) -> np.ndarray:
        """A column for every document of a shard, float64; NaN where it says nothing."""

        def read() -> np.ndarray:
            start, end = shard.starts[family], shard.ends[family]
            holders = np.flatnonzero(end > start)
            numbers = np.full(len(start), np.nan)
            values = shard.payload[family][column].take(pa.array(start[holders]))
            numbers[holders] = pc.fill_null(values.cast(pa.float64(), safe=False), np.nan).to_numpy(False)
            return numbers

        return _opened(shard, f"{family}.{column}", read)

    def warm(self, path: Vector) -> None:
        """Open a vector field of every shard and read its graph into memory."""
        for shard in self.base.shards:
            _ = self._vectors(shard, path).graph

    def _visible(self, shard: RowsShard) -> np.ndarray:
        assert isinstance(self.spec.read, Documents)
        presence = self.spec.read.presence
        return _opened(shard, "visible", lambda: shard.ends[presence] > shard.starts[presence])

    def _vectors(self, shard: RowsShard, path: Vector) -> access.Vectors:
        count = len(shard.keys.lookup)
        folder = shard.directory if shard.has(path.family, path.column) else None
        return _opened(shard, path.name, lambda: access.Vectors(path, folder, count))

    def folded(self, facts: pa.Table, position: Position) -> Self:
        """A new view with these facts folded in; what changed in the access paths is found for the new facts alone."""
        view = super().folded(facts, position)
        if view.runs is self.runs:
            view.__dict__["_changed"] = self._changed
        elif self.spec.access:
            keys = pc.unique(facts.column("key")).to_pylist()
            view.__dict__["_changed"] = self._changed.with_part(self.base, view._part(keys))
        return view

    @cached_property
    def _changed(self) -> Changed:
        keys = sorted({key for run in self.runs for key in run.facts.column("key").to_pylist()})
        return Changed().with_part(self.base, self._part(keys)) if keys else Changed()

    def _part(self, keys: list[bytes]) -> Part:
        families = {path.family for path in self.spec.access if isinstance(path, Inverted | Forward)}
        return changed.part(self.spec, keys, self.get(keys, sorted(families)))


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    is_scored = ~np.isnan(scores)
    return access.best(rows[is_scored], scores[is_scored], k)


def _named(
    shard: RowsShard, vectors: access.Vectors, found: tuple[np.ndarray, np.ndarray], k: int
) -> list[tuple[bytes, float]]:
    rows, scores = found
    keys = shard.key_bytes.take(vectors.ordinals[rows]).to_pylist()
    pairs = sorted(zip(keys, scores.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return pairs[:k]


def _opened(shard: RowsShard, name: str, open_: Any) -> Any:
    """An access path of a shard, opened at its first use and kept with the shard."""
    cache = shard.__dict__.setdefault("_access", {})
    if name not in cache:
        cache[name] = open_()
    return cache[name]
