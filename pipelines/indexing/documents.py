"""Documents: base and overlay read as one, by key, by term, or by vector.

Belongs here: the view, and what it knows of the documents that the delta has changed. The files of access paths and the
search in one shard are ``access``'.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import TidemarkError
from pipelines.indexing import access
from pipelines.indexing.base import Places, RowsShard
from pipelines.indexing.facts import Hashes, hash_keys
from pipelines.indexing.position import Position
from pipelines.indexing.rows import RowsView
from pipelines.indexing.spec import Documents, Inverted, Vector


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

    def match(self, where: Mapping[str, Any], limit: int | None = None) -> list[bytes]:
        """The keys of the documents that have every term, ascending; ``where``: inverted field → term."""
        found: list[bytes] = []
        for shard in self.base.shards:
            ordinals = self._passing(shard, where)
            ordinals = ordinals[~self._touched.of(shard)[ordinals]]
            found += shard.key_bytes.take(ordinals).to_pylist()
        touched = self._touched
        found += [touched.visible[i] for i in touched.passing(where).tolist()]
        return sorted(found)[:limit]

    def search(
        self,
        name: str,
        query: np.ndarray,
        k: int,
        where: Mapping[str, Any] | None = None,
        exclude: Collection[bytes] | Places = (),
    ) -> list[tuple[bytes, float]]:
        """The ``k`` documents of greatest inner product with ``query``: (key, score), best first, ties by key.

        The filter and the delta are exact: a document that was changed since the base is judged as it is now. A
        document without a vector is not found.

        Args:
            name: A declared ``Vector``.
            query: float32[d].
            where: Inverted field → term; all must hold.
            exclude: Keys that must not be answered.

        Raises:
            UnknownAccess: the vector or a field is not declared.
        """
        path = self._path(name, Vector)
        query = np.ascontiguousarray(query, np.float32)
        places = exclude if isinstance(exclude, Places) else self.base.places(list(exclude))
        excluded = {id(shard): ordinals for shard, _, ordinals in self.base.place(places)}
        found: list[tuple[bytes, float]] = []
        for shard in self.base.shards:
            vectors = self._vectors(shard, path)
            hidden = self._touched.hidden(path.name, shard, vectors, self._visible(shard))
            if id(shard) in excluded:
                hidden = np.concatenate([hidden, vectors.rows_of(excluded[id(shard)])])
            rows = vectors.rows_of(self._passing(shard, where)) if where else None
            found += _named(shard, vectors, vectors.nearest(query, k, rows, hidden), k)
        found += self._search_touched(name, query, k, where or {}, places.keys)
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]

    def _search_touched(
        self, name: str, query: np.ndarray, k: int, where: Mapping[str, Any], exclude: Collection[bytes]
    ) -> list[tuple[bytes, float]]:
        touched = self._touched
        if not touched.visible:
            return []
        matrix, has = touched.vectors(name, self)
        changed = touched.passing(where)
        changed = changed[has[changed]]
        if exclude:
            excluded = set(exclude)
            changed = changed[[touched.visible[i] not in excluded for i in changed.tolist()]]
        rows, scores = access.best(changed, matrix[changed] @ query, k)
        return [(touched.visible[i], score) for i, score in zip(rows.tolist(), scores.tolist(), strict=True)]

    def _path(self, name: str, kind: type) -> Any:
        for path in self.spec.access:
            if isinstance(path, kind) and getattr(path, "name", None) == name:
                return path
        known = [p.name for p in self.spec.access if isinstance(p, Inverted | Vector)]
        raise UnknownAccess(
            f"index {self.spec.name!r} has no {kind.__name__.lower()} access path {name!r}",
            remedy="it has: " + (", ".join(known) or "none"),
        )

    def _passing(self, shard: RowsShard, where: Mapping[str, Any]) -> np.ndarray:
        """The ordinals of the base's visible documents that have every term."""
        passing: np.ndarray | None = None
        for field, term in where.items():
            path = self._path(field, Inverted)
            folder = shard.directory if shard.has(path.family, path.column) else None
            ordinals = _opened(shard, field, lambda p=path, f=folder: access.Postings(p, f)).of(term)
            passing = ordinals if passing is None else np.intersect1d(passing, ordinals, assume_unique=True)
        return np.flatnonzero(self._visible(shard)) if passing is None else passing

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
            view.__dict__["_touched"] = self._touched
        elif self.spec.access:
            keys = pc.unique(facts.column("key")).to_pylist()
            view.__dict__["_touched"] = self._touched.updated(view, keys)
        return view

    @cached_property
    def _touched(self) -> Touched:
        keys = {key for run in self.runs for key in run.facts.column("key").to_pylist()}
        return Touched({}, {}).updated(self, sorted(keys))


class DocumentState(NamedTuple):
    """A changed document as it is now: whether it is there, and its (inverted field, term) pairs."""

    is_visible: bool
    terms: frozenset[tuple[str, bytes]]


class Touched:
    """The documents that the overlay changes: as they are now, and a bitmap over each shard of what not to trust."""

    def __init__(self, documents: dict[bytes, DocumentState], masks: dict[int, np.ndarray]) -> None:
        self._documents = documents
        self._masks = masks
        self._matrices: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._hidden: dict[tuple[str, int], np.ndarray] = {}

    def of(self, shard: RowsShard) -> np.ndarray:
        """bool[documents of the shard]."""
        mask = self._masks.get(id(shard))
        return mask if mask is not None else np.zeros(len(shard.keys.lookup), bool)

    def hidden(
        self, name: str, shard: RowsShard, vectors: access.Vectors, is_visible: np.ndarray
    ) -> np.ndarray:
        """The rows of a shard's vectors that are not to be found in the base: changed, or of no visible document."""
        if (name, id(shard)) not in self._hidden:
            ordinals = np.flatnonzero(self.of(shard) | ~is_visible)
            self._hidden[name, id(shard)] = vectors.rows_of(ordinals)
        return self._hidden[name, id(shard)]

    @cached_property
    def visible(self) -> list[bytes]:
        """The keys of the changed documents that are there."""
        return [key for key, state in self._documents.items() if state.is_visible]

    @cached_property
    def _by_term(self) -> dict[tuple[str, bytes], list[int]]:
        holders: dict[tuple[str, bytes], list[int]] = {}
        for number, key in enumerate(self.visible):
            for term in self._documents[key].terms:
                holders.setdefault(term, []).append(number)
        return holders

    def passing(self, where: Mapping[str, Any]) -> np.ndarray:
        """Which of ``visible`` have every term, as indices into it."""
        passing = np.arange(len(self.visible))
        for field, term in where.items():
            holders = self._by_term.get((field, access.term_bytes(term)), [])
            passing = np.intersect1d(passing, np.array(holders, np.int64), assume_unique=True)
        return passing

    def vectors(self, name: str, view: DocumentsView) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of ``visible`` (see ``DocumentsView.vectors``), gathered once."""
        if name not in self._matrices:
            self._matrices[name] = view.vectors(name, self.visible)
        return self._matrices[name]

    def updated(self, view: DocumentsView, keys: list[bytes]) -> Touched:
        """A copy that knows these keys as ``view`` has them."""
        fields = [path for path in view.spec.access if isinstance(path, Inverted)]
        documents, masks = dict(self._documents), dict(self._masks)
        for key, document in zip(keys, view.get(keys), strict=True):
            terms = frozenset((path.name, term) for path in fields for term in _terms(document, path))
            documents[key] = DocumentState(document is not None, terms)
        for shard, _, ordinals in view.base.place(keys):
            masks[id(shard)] = self.of(shard).copy()
            masks[id(shard)][ordinals] = True
        return Touched(documents, masks)


def _terms(document: dict[str, dict[str, Any]] | None, path: Inverted) -> set[bytes]:
    value = (document or {}).get(path.family, {}).get(path.column)
    values = value if isinstance(value, list) else [value]
    return {access.term_bytes(v) for v in values if v is not None}


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
