"""Access paths of documents: posting lists and vectors, written with each shard and searched beside the overlay.

Belongs here: the files of ``Inverted`` and ``Vector`` and the search in one shard. Which documents the delta has
changed, and merging shards and overlay, is ``rows``'.

Ordinals number the keys of a shard in the order of its ``keys`` file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing import facts as fact
from pipelines.indexing.facts import Hashes, payload_column
from pipelines.indexing.files import map_table, numbers, write_columns
from pipelines.indexing.spec import Documents, IndexSpec, Inverted, Vector

EXACT_ROWS = 20_000
"""Up to so many rows an exact scan is quicker than a graph, or as quick, and never misses a neighbour."""
GRAPH_SHARE = 400
"""A graph is used only if fewer than one in so many of its rows is asked for."""
GRAPH_LINKS, GRAPH_BREADTH = 16, 120
DENSE_SHARE = 128
"""A term that at least one in so many documents has is kept as bits once it was asked for: to mark the documents of its
posting list one by one takes ten times as long, and the bits are at most four times as large."""
FIRST_ROWS = 4096
"""An exact scan looks at so many of the longest vectors before it knows how long a vector must be."""
ROUNDING = 1e-4
"""By so much, relatively, a float32 inner product may be above the product of the lengths."""


def write_shard(
    spec: IndexSpec,
    folder: Path,
    facts: pa.Table,
    kept: dict[str, np.ndarray],
    starts_ends: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write the access paths of one shard; ``kept`` are the fact rows of each family's ``rows`` file, in its order."""
    assert isinstance(spec.read, Documents)
    start, end = starts_ends[spec.read.presence]
    is_visible = end > start
    for path in spec.access:
        if isinstance(path, Inverted):
            _write_postings(path, folder, _values(facts, kept, path), starts_ends[path.family], is_visible)
        elif isinstance(path, Vector):
            _write_vectors(path, folder, _values(facts, kept, path), starts_ends[path.family])


def _values(facts: pa.Table, kept: dict[str, np.ndarray], path: Inverted | Vector) -> pa.Array:
    payload = facts.column(payload_column(path.family)).take(kept[path.family]).combine_chunks()
    return pc.struct_field(payload, path.column)


def _ordinals(starts_ends: tuple[np.ndarray, np.ndarray], row_count: int) -> np.ndarray:
    """The ordinal of each row of a family (documents have at most one row a family)."""
    start, end = starts_ends
    holders = np.flatnonzero(end > start)
    ordinals = np.empty(row_count, np.uint32)
    ordinals[start[holders]] = holders
    return ordinals


def _write_postings(
    path: Inverted,
    folder: Path,
    values: pa.Array,
    starts_ends: tuple[np.ndarray, np.ndarray],
    is_visible: np.ndarray,
) -> None:
    ordinals = _ordinals(starts_ends, len(values))
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        ordinals = ordinals[pc.list_parent_indices(values).to_numpy()]
        values = pc.list_flatten(values)
    used = is_visible[ordinals] & pc.is_valid(values).to_numpy(zero_copy_only=False)
    ordinals, values = ordinals[used], values.filter(pa.array(used))
    encoded = values.dictionary_encode()
    terms = [term_bytes(term) for term in encoded.dictionary.to_pylist()]
    hashed = fact.hash_keys(terms)
    by_hash = np.lexsort((hashed.check, hashed.lookup))
    place = np.empty(len(terms), np.int64)
    place[by_hash] = np.arange(len(terms))
    term_of = place[encoded.indices.to_numpy()] if len(terms) else np.empty(0, np.int64)
    order = np.lexsort((ordinals, term_of))
    counts = np.bincount(term_of, minlength=len(terms))
    ends = np.cumsum(counts)
    write_columns(
        folder / f"terms-{path.name}.arrow",
        {
            "lookup": hashed.lookup[by_hash],
            "check": hashed.check[by_hash],
            "term": pa.array([terms[i] for i in by_hash], pa.binary()),
            "start": ends - counts,
            "end": ends,
        },
    )
    write_columns(folder / f"postings-{path.name}.arrow", {"ordinal": ordinals[order]})


def _write_vectors(
    path: Vector, folder: Path, values: pa.Array, starts_ends: tuple[np.ndarray, np.ndarray]
) -> None:
    given, is_given = vectors_of(values, path.dimensions)
    ordinals = _ordinals(starts_ends, len(values))[is_given]
    order = np.lexsort((ordinals, -_lengths(given)))
    matrix = np.ascontiguousarray(given[order])
    column = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), path.dimensions)
    write_columns(folder / f"vectors-{path.name}.arrow", {"ordinal": ordinals[order], "vector": column})
    if len(matrix) > EXACT_ROWS and not path.is_scanned:
        _write_graph(folder / f"graph-{path.name}.hnsw", matrix)


def vectors_of(values: pa.Array, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a column that have these dimensions, float32[m, d], and which of its values they are, bool[n]."""
    lengths = pc.fill_null(pc.list_value_length(values), 0)
    is_given = pc.equal(lengths, dimensions).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(values.filter(pa.array(is_given))).to_numpy(zero_copy_only=False)
    return flat.reshape(-1, dimensions).astype(np.float32), is_given


def _lengths(matrix: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))


def _write_graph(file: Path, matrix: np.ndarray) -> None:
    import hnswlib

    graph = hnswlib.Index(space="ip", dim=matrix.shape[1])
    graph.init_index(max_elements=len(matrix), M=GRAPH_LINKS, ef_construction=GRAPH_BREADTH, random_seed=1)
    graph.add_items(matrix, np.arange(len(matrix)), num_threads=1)
    graph.save_index(str(file))


def term_bytes(term: Any) -> bytes:
    """A term as posting lists compare it: text as UTF-8, other values by their text."""
    if isinstance(term, bytes):
        return term
    return (term if isinstance(term, str) else str(term)).encode()


class Filter(NamedTuple):
    """Which documents pass: those that have at least one term of every clause, and none that is refused.

    A clause is an inverted field and its terms; likewise ``refused``.
    """

    clauses: tuple[tuple[str, frozenset[Any]], ...] = ()
    refused: tuple[tuple[str, frozenset[Any]], ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """The fields that it names."""
        return frozenset(field for field, _ in (*self.clauses, *self.refused))


def equal_to(where: Mapping[str, Any]) -> Filter:
    """The documents that have each of these terms; ``where``: inverted field → term."""
    return Filter(tuple((field, frozenset([term])) for field, term in where.items()))


class Postings:
    """The mapped posting lists of one field in one shard; ``folder`` None: of a base that lacks the column."""

    def __init__(self, path: Inverted, folder: Path | None, document_count: int) -> None:
        self._count = document_count
        self._dense: dict[int, np.ndarray] = {}
        if folder is None:
            nothing = np.empty(0, np.uint64)
            self.hashes, self.ordinals = Hashes(nothing, nothing), np.empty(0, np.uint32)
            return
        terms = map_table(folder / f"terms-{path.name}.arrow")
        self.hashes = Hashes(numbers(terms, "lookup"), numbers(terms, "check"))
        self.starts, self.ends = numbers(terms, "start"), numbers(terms, "end")
        self.ordinals = numbers(map_table(folder / f"postings-{path.name}.arrow"), "ordinal")

    def of(self, term: Any) -> np.ndarray:
        """The ordinals of the documents that have the term, ascending; uint32."""
        for at in self._find([term]):
            return self.ordinals[self.starts[at] : self.ends[at]]
        return self.ordinals[:0]

    def any_of(self, terms: Collection[Any]) -> np.ndarray:
        """The documents that have at least one of the terms: a bit for each, packed as numpy packs them; read only."""
        found: np.ndarray | None = None
        few: list[np.ndarray] = []
        for at in self._find(terms):
            if (self.ends[at] - self.starts[at]) * DENSE_SHARE >= self._count:
                bits = self._bits(at)
                found = bits if found is None else found | bits
            else:
                few.append(self.ordinals[self.starts[at] : self.ends[at]])
        if few or found is None:
            rest = np.packbits(_marked(self._count, few))
            found = rest if found is None else found | rest
        return found

    def _find(self, terms: Collection[Any]) -> list[int]:
        """Where those of the terms stand that are there."""
        at = fact.find(self.hashes, fact.hash_keys(map(term_bytes, terms)))
        found: list[int] = at[at >= 0].tolist()
        return found

    def _bits(self, at: int) -> np.ndarray:
        """A term that many documents have, as bits; kept."""
        if at not in self._dense:
            whole = [self.ordinals[self.starts[at] : self.ends[at]]]
            self._dense[at] = np.packbits(_marked(self._count, whole))
        return self._dense[at]


def _marked(count: int, ordinals: list[np.ndarray]) -> np.ndarray:
    marked = np.zeros(count, bool)
    for some in ordinals:
        marked[some] = True
    return marked


class Vectors:
    """The mapped vectors of one field in one shard, and their graph; ``folder`` None: of a base without the column."""

    def __init__(self, path: Vector, folder: Path | None, document_count: int) -> None:
        self.ordinals, flat = np.empty(0, np.uint32), np.empty(0, np.float32)
        if folder is not None:
            table = map_table(folder / f"vectors-{path.name}.arrow")
            self.ordinals = numbers(table, "ordinal")
            column = table.column("vector")
            flat = column.chunk(0).values.to_numpy() if column.num_chunks else flat
        self.matrix = flat.reshape(-1, path.dimensions)
        self.row_of_ordinal = np.full(document_count, -1, np.int32)
        self.row_of_ordinal[self.ordinals] = np.arange(len(self.ordinals), dtype=np.int32)
        self._file = folder / f"graph-{path.name}.hnsw" if folder else None
        self._falling = -_lengths(self.matrix)
        self._is_falling = bool(
            (np.diff(self._falling) >= 0).all()
        )  # not so in a base of before they were sorted

    def rows_of(self, ordinals: np.ndarray) -> np.ndarray:
        """The rows of documents' vectors, int64; documents without one are left out."""
        rows = self.row_of_ordinal[ordinals]
        return rows[rows >= 0].astype(np.int64)

    @cached_property
    def graph(self) -> Any:
        """The HNSW graph, read into memory once; None where the vectors are few."""
        if self._file is None or not self._file.exists():
            return None
        import hnswlib

        graph = hnswlib.Index(space="ip", dim=self.matrix.shape[1])
        graph.load_index(str(self._file), max_elements=len(self.matrix))
        graph.set_num_threads(1)
        return graph

    def nearest(
        self, query: np.ndarray, k: int, rows: np.ndarray | None, hidden: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` rows of greatest inner product, and their scores.

        Args:
            query: float32[d].
            rows: Only these rows; None: all.
            hidden: Never these rows, int64, few or many.

        The plan looks at how many rows there are to look at: an exact scan of the rows that pass when they are few or
        when many are asked for; else the graph, asked for as many more as are hidden.
        """
        if rows is None:
            wanted = k + len(hidden)
            if (
                len(self.matrix) > EXACT_ROWS
                and wanted * GRAPH_SHARE < len(self.matrix)
                and self.graph is not None
            ):
                self.graph.set_ef(max(2 * wanted, 100))
                rows = self.graph.knn_query(query, k=wanted)[0][0].astype(np.int64)
                rows = rows[~np.isin(rows, hidden)] if len(hidden) else rows
                return best(rows, self.matrix[rows] @ query, k)
            return self._scanned(query, k, hidden)
        rows = rows[~np.isin(rows, hidden)] if len(hidden) else rows
        return best(rows, self.matrix[rows] @ query, k)

    def _scanned(self, query: np.ndarray, k: int, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An exact scan, the longest vectors first. An inner product is at most the product of the lengths, so it ends
        where no vector is long enough to be among the ``k`` best any more."""
        reach = float(np.linalg.norm(query)) * (1 + ROUNDING)
        rows, scores, least = np.empty(0, np.int64), np.empty(0, np.float32), -np.inf
        start, end = 0, min(FIRST_ROWS, len(self.matrix))
        while start < end:
            part = self.matrix[start:end] @ query
            part[hidden[(hidden >= start) & (hidden < end)] - start] = -np.inf
            found = np.flatnonzero((part >= least) & (part > -np.inf))
            rows = np.concatenate([rows, found + start])
            scores = np.concatenate([scores, part[found]])
            rows, scores = best(rows, scores, k)
            start, end = end, len(self.matrix)
            if len(scores) >= k:
                least = float(scores.min())
                if self._is_falling and least > 0:
                    end = int(np.searchsorted(self._falling, -least / reach, side="right"))
        return rows, scores


def best(rows: np.ndarray | None, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` rows of greatest score and every row that ties with the last of them, in no order.

    ``rows``: which row each score is of; None: the rows in order.
    """
    if len(scores) <= k:
        return (np.arange(len(scores)) if rows is None else rows), scores
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    chosen = np.flatnonzero(scores >= threshold)
    return (chosen if rows is None else rows[chosen]), scores[chosen]
