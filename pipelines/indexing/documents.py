"""Documents: base and overlay read as one, by key, by term, or by vector.

Belongs here: the view, and what it knows of the documents that the delta has changed. The files of access paths and the
search in one shard are ``access``'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import TidemarkError
from pipelines.indexing import access, changed
from pipelines.indexing.access import Filter
from pipelines.indexing.base import Places, RowsShard
from pipelines.indexing.changed import Changed, Part, number_columns
from pipelines.indexing.facts import Hashes, hash_keys, identity_bytes
from pipelines.indexing.merge import Ranks
from pipelines.indexing.position import Position
from pipelines.indexing.rows import RowsView, Run, above, without
from pipelines.indexing.spec import Documents, IndexSpec, Inverted, Vector

FEW_ROWS = 8_192
"""So many documents that pass are looked at one and all; of more the best are tried first."""


class UnknownAccess(TidemarkError):
    """A query names an access path that the index does not declare."""


Numbers = Mapping[tuple[str, str], np.ndarray]
"""(family, column) that is declared ``Forward`` → a number or a truth for each document, float64; NaN for null."""


class Ranking(NamedTuple):
    """By what documents are ranked. Make it once: what the documents of a base score is kept by it.

    Attributes:
        columns: What the score is made of.
        score: Of each document alone, float64[n]; NaN: it is not answered.
    """

    columns: tuple[tuple[str, str], ...]
    score: Callable[[Numbers], np.ndarray]


class Condition(NamedTuple):
    """What the numbers of documents must fulfil; ``holds`` says for each whether they do, bool[n]."""

    columns: tuple[tuple[str, str], ...]
    holds: Callable[[Numbers], np.ndarray]


class Layer(NamedTuple):
    """Documents that stand above a view's for as long as somebody says so, ready to be read above a later view too."""

    runs: tuple[Run, ...] = ()
    parts: changed.Parts = ()

    def without(self, spec: IndexSpec, keys: Collection[bytes]) -> Layer:
        """The layer without these keys: the view below answers for them."""
        if not keys:
            return self
        gone = hash_keys(keys)
        return Layer(without(spec, self.runs, gone), changed.pruned(changed.without(self.parts, gone)))


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
            self._overlay_parts(hash_keys(keys), parts, wanted)
        present = parts[read.presence]
        return [
            None
            if present[i] is None
            else {name: parts[name][i] for name in wanted if parts[name][i] is not None}
            for i in range(len(keys))
        ]

    def _overlay_parts(self, hashed: Hashes, parts: dict[str, list[Any]], wanted: Collection[str]) -> None:
        names = [f.name for f in self.spec.families]
        standing: dict[tuple[str, int], tuple[Run, int]] = {}
        for run in self.runs:  # oldest first: a newer run outranks
            left = np.searchsorted(run.keys.lookup, hashed.lookup, side="left")
            right = np.searchsorted(run.keys.lookup, hashed.lookup, side="right")
            for query in np.flatnonzero(right > left).tolist():
                for row in range(int(left[query]), int(right[query])):
                    name = names[run.family[row]]
                    if run.keys.check[row] == hashed.check[query] and name in parts:
                        standing[name, query] = (run, row)
        live: dict[tuple[str, Run], list[tuple[int, int]]] = {}
        for (name, query), (run, row) in standing.items():
            parts[name][query] = None if run.is_deleted[row] else {}
            if parts[name][query] is not None and name in wanted:
                live.setdefault((name, run), []).append((query, row))
        for (name, run), places in live.items():
            said = run.payloads(name, np.array([row for _, row in places]))
            for (query, _), document in zip(places, said, strict=True):
                parts[name][query] = document

    def versions(self, family: str, keys: Sequence[bytes]) -> np.ndarray:
        """The version at which a family of each key stands, its deletion's too; zeros where nothing is known of it.

        Returns:
            int64[n, 4].
        """
        return self.ranks(family, keys).versions

    def ranks(self, family: str, keys: Sequence[bytes]) -> Ranks:
        """The rank at which a family of each key stands, its deletion's too; zeros where nothing is known of it."""
        named = self.spec.family(family).name.encode()
        identities = hash_keys([identity_bytes([named, key]) for key in keys])  # a family has one fact a key
        found = self.base.identities(identities, hash_keys(keys)).ranks
        for run in self.runs:  # oldest first: a newer run outranks
            at = run.find(identities)
            known, rows = at >= 0, at[at >= 0]
            for mine, theirs in zip(found, run.ranks, strict=True):
                mine[known] = theirs[rows]
        return found

    def values(self, family: str, columns: Sequence[str], keys: Sequence[bytes]) -> list[list[Any]]:
        """`columns` as plain values."""
        return [column.to_pylist() for column in self.columns(family, columns, keys)]

    def columns(self, family: str, names: Sequence[str], keys: Sequence[bytes]) -> list[pa.Array]:
        """A few columns of a family for many keys; null where a value, the family or the document is missing.

        Much quicker than ``get`` where few of a document's columns are asked for.

        Returns:
            For each column its n values.
        """
        return self.joined([(family, name) for name in names], keys)

    def joined(self, columns: Sequence[tuple[str, str]], keys: Sequence[bytes]) -> list[pa.Array]:
        """The same of several families: columns by (family, column)."""
        places = self.base.places(keys)
        hashed = self.base.hashes(places)
        is_there = self._is_there(places, hashed)
        found: dict[tuple[str, str], pa.Array] = {}
        for family in dict.fromkeys(family for family, _ in columns):
            names = [name for of, name in columns if of == family]
            values = self._columns(family, names, places, hashed, is_there)
            found |= {(family, name): column for name, column in zip(names, values, strict=True)}
        return [found[column] for column in columns]

    def _columns(
        self, family: str, names: Sequence[str], places: Places, hashed: Hashes, is_there: np.ndarray
    ) -> list[pa.Array]:
        fields = [self.spec.family(family).schema.field(name) for name in names]
        parts: list[list[pa.Array]] = [[pa.array([], field.type)] for field in fields]
        place, count = np.full(len(is_there), -1, np.int64), 0
        for holder, rows, queries in self._holders(family, places, hashed):
            of_holder = pa.array(rows)
            for field, part in zip(fields, parts, strict=True):
                part.append(holder.payload[family][field.name].take(of_holder).cast(field.type))
            place[queries] = count + np.arange(len(rows))
            count += len(rows)
        at = pa.array(place, mask=(place < 0) | ~is_there)
        return [pa.concat_arrays(part).take(at) for part in parts]

    def _is_there(self, places: Places, hashed: Hashes) -> np.ndarray:
        """Which keys have a document, bool[n]."""
        assert isinstance(self.spec.read, Documents)
        found = np.zeros(len(places.at), bool)
        for _, _, queries in self._holders(self.spec.read.presence, places, hashed):
            found[queries] = True
        return found

    def table(self, family: str, keys: Sequence[bytes]) -> pa.Table:
        """A family of many keys in whole columns, a row a key; null where the family is missing."""
        schema = self.spec.family(family).schema
        kind = pa.struct(list(schema))
        place, parts, count = np.full(len(keys), -1, np.int64), [pa.array([], kind)], 0
        places = self.base.places(keys)
        for holder, rows, queries in self._holders(family, places, self.base.hashes(places)):
            parts.append(holder.said(family, rows).cast(kind))
            place[queries] = count + np.arange(len(rows))
            count += len(rows)
        found = pa.concat_arrays(parts).take(pa.array(place, mask=place < 0))
        return pa.Table.from_arrays(found.flatten(), schema=schema)

    def _holders(
        self, family: str, places: Places, hashed: Hashes
    ) -> list[tuple[RowsShard | Run, np.ndarray, np.ndarray]]:
        """Who says what a family of keys is: each with its rows, and which keys these are of; a key at most once."""
        nobody = -1
        holders: list[RowsShard | Run] = []
        held_by, row_of = np.full(len(places.at), nobody), np.zeros(len(places.at), np.int64)
        for shard, queries, ordinals in self.base.place(places):
            starts = shard.starts[family][ordinals]
            is_held = shard.ends[family][ordinals] > starts
            held_by[queries[is_held]], row_of[queries] = len(holders), starts
            holders.append(shard)
        number = [f.name for f in self.spec.families].index(family)
        for run in self.runs:  # oldest first: a newer run outranks
            rows, queries = run.rows_of_keys(hashed, number)
            held_by[queries], row_of[queries] = np.where(run.is_deleted[rows], nobody, len(holders)), rows
            holders.append(run)
        found = []
        for at, holder in enumerate(holders):
            queries = np.flatnonzero(held_by == at)
            if len(queries):
                found.append((holder, row_of[queries], queries))
        return found

    def vectors(self, name: str, keys: Sequence[bytes] | Places) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of keys, float32[n, d] (zeros where there is none), and whether there is one, bool[n].

        A vector is there whether or not its document is. That of a base-only family comes from the base alone.
        """
        path = self._path(name, Vector)
        places = keys if isinstance(keys, Places) else self.base.places(keys)
        if self._is_streamed(path):
            return self._vectors_now(path, places, self.base.hashes(places))
        count = len(places.at)
        matrix, has = np.zeros((count, path.dimensions), np.float32), np.zeros(count, bool)
        for shard, queries, ordinals in self.base.place(places):
            vectors = self._vectors(shard, path)
            rows = vectors.row_of_ordinal[ordinals]
            given = rows >= 0
            matrix[queries[given]] = vectors.matrix[rows[given]]
            has[queries[given]] = True
        return matrix, has

    def _is_streamed(self, path: Vector) -> bool:
        return self.spec.family(path.family).stream is not None

    def _vectors_now(self, path: Vector, places: Places, hashed: Hashes) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of a streamed family, as base and delta say."""
        whole = np.ones(len(places.at), bool)
        (column,) = self._columns(path.family, [path.column], places, hashed, whole)
        given, has = access.vectors_of(column, path.dimensions)
        matrix = np.zeros((len(has), path.dimensions), np.float32)
        matrix[has] = given
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
        ranking: Ranking,
        k: int,
        condition: Condition | None = None,
    ) -> list[tuple[bytes, float]]:
        """The ``k`` documents of greatest score among those that pass: (key, score), best first, ties by key.

        Filter and delta are exact: a document that was changed since the base is judged as it is now. What the base's
        documents score is computed once; where many pass, they are tried from the greatest score down.

        Args:
            where: As in ``match``.
            ranking: By what they are ranked.
            k: How many.
            condition: What their numbers must fulfil, too.

        Raises:
            UnknownAccess: a field or a column is not declared.
        """
        wanted = self._filter(where)
        self._require_numbers([*ranking.columns, *(condition.columns if condition else ())])
        found: list[tuple[bytes, float]] = []
        for shard in self.base.shards:
            rows, values = self._best_of(shard, self._passing(shard, wanted), ranking, k, condition)
            found += zip(shard.key_bytes.take(rows).to_pylist(), values.tolist(), strict=True)
        for part, rows in self._changed_holding(wanted, condition):
            scores = ranking.score({name: part.numbers[name][rows] for name in ranking.columns})
            rows, values = _best(rows, scores, k)
            found += zip((part.keys[row] for row in rows.tolist()), values.tolist(), strict=True)
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]

    def _changed_holding(
        self, wanted: Filter, condition: Condition | None
    ) -> Iterator[tuple[Part, np.ndarray]]:
        """For each part of changed documents those that pass, and fulfil a condition."""
        for part, rows in self._changed.passing(wanted):
            if condition is not None:
                rows = rows[condition.holds({name: part.numbers[name][rows] for name in condition.columns})]
            yield part, rows

    def _best_of(
        self, shard: RowsShard, passing: np.ndarray, ranking: Ranking, k: int, condition: Condition | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` documents of a shard of greatest score that pass, and all that tie with the last of them."""
        scores, falling = self._scores(shard, ranking)

        def kept(rows: np.ndarray) -> np.ndarray:
            return self._holding(shard, rows, condition)

        count = int(np.count_nonzero(passing))
        if count <= FEW_ROWS:
            rows = kept(np.flatnonzero(passing))
            return _best(rows, scores[rows], k)
        found, start, size = [], 0, max(FEW_ROWS, 2 * k * len(passing) // count)
        left, least = k, -np.inf
        while start < len(falling) and scores[falling[start]] >= least:
            tried = falling[start : start + size]
            found.append(kept(tried[passing[tried]]))
            start, size, left = start + size, 2 * size, left - len(found[-1])
            if left <= 0 and least == -np.inf:
                least = np.partition(scores[np.concatenate(found)], -k)[-k]
        rows = np.concatenate([*found, np.empty(0, np.int64)]).astype(np.int64)
        return _best(rows, scores[rows], k)

    def _holding(self, shard: RowsShard, rows: np.ndarray, condition: Condition | None) -> np.ndarray:
        """Those of a shard's documents that fulfil a condition."""
        if condition is None:
            return rows
        numbers = {name: self._numbers(shard, *name)[rows] for name in condition.columns}
        return rows[condition.holds(numbers)]

    def _scores(self, shard: RowsShard, ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
        """What a shard's documents score, float64, and the ordinals of those that do, from the greatest down."""

        def scored() -> tuple[np.ndarray, np.ndarray]:
            scores = ranking.score({name: self._numbers(shard, *name) for name in ranking.columns})
            falling = np.argsort(-scores, kind="stable")  # NaN is last
            return scores, falling[: len(falling) - int(np.isnan(scores).sum())]

        return _opened(shard, ranking, scored)

    def _require_numbers(self, columns: Sequence[tuple[str, str]]) -> None:
        declared = number_columns(self.spec)
        for name in columns:
            if name not in declared:
                known = ", ".join(".".join(one) for one in declared)
                raise UnknownAccess(
                    f"index {self.spec.name!r} has no forward numbers {'.'.join(name)!r}",
                    remedy=f"it has: {known or 'none'}",
                )

    def search(
        self,
        name: str,
        query: np.ndarray,
        k: int,
        where: Mapping[str, Any] | Filter | None = None,
        exclude: Collection[bytes] | Places = (),
        condition: Condition | None = None,
    ) -> list[tuple[bytes, float]]:
        """The ``k`` documents of greatest inner product with ``query``: (key, score), best first, ties by key.

        The filter and the delta are exact: a document that was changed since the base is judged as it is now. A
        document without a vector is not found.

        Args:
            name: A declared ``Vector``.
            query: float32[d].
            where: As in ``match``.
            exclude: Keys that must not be answered.
            condition: What their numbers must fulfil, too.

        Raises:
            UnknownAccess: the vector, a field or a column is not declared.
        """
        path = self._path(name, Vector)
        query = np.ascontiguousarray(query, np.float32)
        wanted = self._filter(where or {})
        self._require_numbers(condition.columns if condition else ())
        places = exclude if isinstance(exclude, Places) else self.base.places(list(exclude))
        excluded = {id(shard): ordinals for shard, _, ordinals in self.base.place(places)}
        found: list[tuple[bytes, float]] = []
        for shard in self.base.shards:
            vectors = self._vectors(shard, path)
            hidden = self._changed.hidden(path.name, shard, vectors, self._visible(shard))
            if id(shard) in excluded:
                hidden = np.concatenate([hidden, vectors.rows_of(excluded[id(shard)])])
            rows = None
            if where or condition:
                passing = np.flatnonzero(self._passing(shard, wanted))
                rows = vectors.rows_of(self._holding(shard, passing, condition))
            found += _named(shard, vectors, vectors.nearest(query, k, rows, hidden), k)
        found += self._search_changed(name, query, k, self._changed_holding(wanted, condition), places.keys)
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]

    def _search_changed(
        self,
        name: str,
        query: np.ndarray,
        k: int,
        changed: Iterable[tuple[Part, np.ndarray]],
        exclude: Collection[bytes],
    ) -> list[tuple[bytes, float]]:
        excluded = set(exclude)
        found: list[tuple[bytes, float]] = []
        for part, passing in changed:
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

    def under(self, layer: Layer, facts: pa.Table) -> tuple[Self, Layer]:
        """A view on which a layer stands, with these facts on top, and the layer with them.

        They stand whatever their rank, and apart from the runs below: it costs as much as the layer's keys and the new
        facts, and what the layer has is not made again when the view below moves.

        Args:
            layer: Made over an earlier view of the same base; of a key in which that view and this differ it must have
                nothing.
            facts: One an identity.
        """
        if facts.num_rows:
            layer = layer._replace(runs=above(self.spec, layer.runs, facts))
        view = type(self)(self.base, self.position, (*self.runs, *layer.runs))
        if facts.num_rows:
            part = view._part(pc.unique(facts.column("key")).to_pylist())
            layer = layer._replace(parts=changed.with_part(layer.parts, part))
        view.__dict__["_changed"] = self._changed.under(self.base, layer.parts)
        return view, layer

    @cached_property
    def _changed(self) -> Changed:
        keys = sorted({key for run in self.runs for key in run.facts.column("key").to_pylist()})
        return Changed().with_part(self.base, self._part(keys)) if keys else Changed()

    def _part(self, keys: list[bytes]) -> Part:
        places, hashed = self.base.places(keys), hash_keys(keys)
        is_there = self._is_there(places, hashed)
        values = {
            (family, name): said
            for family, names in changed.columns(self.spec).items()
            for name, said in zip(names, self._columns(family, names, places, hashed, is_there), strict=True)
        }
        vectors = {
            path.name: self._vectors_now(path, places, hashed)
            for path in self.spec.access
            if isinstance(path, Vector) and self._is_streamed(path)
        }
        return changed.part(self.spec, keys, hashed, is_there, values, vectors)


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


def _opened(shard: RowsShard, name: Hashable, open_: Any) -> Any:
    """An access path of a shard, opened at its first use and kept with the shard."""
    cache = shard.__dict__.setdefault("_access", {})
    if name not in cache:
        cache[name] = open_()
    return cache[name]
