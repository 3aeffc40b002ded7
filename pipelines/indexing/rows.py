"""Base and overlay read as one: documents and timelines.

Belongs here: runs (the overlay's immutable, sorted pieces), folding facts into them, and the two views. A view is never
changed: folding makes a new one that shares all but the newest runs, so a reader never sees half an epoch.
Sums are ``sums``'; following the delta is ``overlay``'s.

An overlay is a short list of runs, newest last, each made by one fold and merged with its neighbour when they are of
like size (as in a log-structured merge tree): a fact is copied O(log n) times, and there are O(log n) runs to read.
A fold keeps only facts that outrank what base and older runs have, so the newest run that knows an identity is right.
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
from pipelines.indexing import facts as fact
from pipelines.indexing.base import Base, RowsShard
from pipelines.indexing.facts import Hashes, hash_keys, hashes, payload_column
from pipelines.indexing.merge import Ranks, greater, merge, ranks
from pipelines.indexing.position import Position
from pipelines.indexing.spec import Documents, IndexSpec, Inverted, Timeline, Vector


class UnknownAccess(TidemarkError):
    """A query names an access path that the index does not declare."""


class Run:
    """An immutable, merged piece of an overlay: facts sorted by key."""

    def __init__(self, spec: IndexSpec, facts: pa.Table, base_row: np.ndarray) -> None:
        """``base_row``: for each fact the base's live row of the same identity, -1 for none."""
        keys = hashes(facts.column("key_hash"))
        order = np.lexsort((keys.check, keys.lookup))
        self.facts = facts.take(order).combine_chunks()
        self.keys = keys.take(order)
        self.base_row = base_row[order]
        self.ranks: Ranks = ranks(self.facts)
        identities = hashes(self.facts.column("identity_hash"))
        self.by_identity = np.argsort(identities.lookup, kind="stable")
        self.identities = identities.take(self.by_identity)
        numbers = {family.name: n for n, family in enumerate(spec.families)}
        self.family = np.array([numbers[name] for name in self.facts.column("family").to_pylist()], np.int8)
        self.times = self.facts.column("time_ms").to_numpy()
        self.is_deleted = self.ranks.is_deleted

    def __len__(self) -> int:
        return len(self.base_row)

    def find(self, identities: Hashes) -> np.ndarray:
        """The row of each identity, -1 for none."""
        at = fact.find(self.identities, identities)
        return np.where(at >= 0, self.by_identity[np.maximum(at, 0)], -1) if len(self) else at

    def rows_of(self, key: Hashes) -> np.ndarray:
        """The rows of one key (hashes of length 1)."""
        left = np.searchsorted(self.keys.lookup, key.lookup[0], side="left")
        right = np.searchsorted(self.keys.lookup, key.lookup[0], side="right")
        if left == right:
            return _NO_ROWS
        return left + np.flatnonzero(self.keys.check[left:right] == key.check[0])

    def payload(self, family: str, rows: np.ndarray) -> pa.Table:
        """The payload of rows as a table of the family's columns."""
        column = self.facts.column(payload_column(family)).take(rows).combine_chunks()
        return pa.table(dict(zip([f.name for f in column.type], column.flatten(), strict=True)))


_NO_ROWS = np.empty(0, np.int64)


def fold(spec: IndexSpec, base: Base, runs: tuple[Run, ...], facts: pa.Table) -> tuple[Run, ...]:
    """The runs after folding facts in: facts that base or runs outrank, or already have, change nothing."""
    facts = merge(fact.conform(facts, spec))
    identities, ranked = hashes(facts.column("identity_hash")), ranks(facts)
    known = base.identities(identities, hashes(facts.column("key_hash")))
    keep = ~known.is_known | greater(ranked, known.ranks)
    for run in runs:
        at = run.find(identities)
        hit = np.flatnonzero(at >= 0)
        keep[hit] &= greater(ranked.take(hit), run.ranks.take(at[hit]))
    rows = np.flatnonzero(keep)
    if not len(rows):
        return runs
    return _compact(spec, (*runs, Run(spec, facts.take(rows), known.row[rows])))


def _compact(spec: IndexSpec, runs: tuple[Run, ...]) -> tuple[Run, ...]:
    while len(runs) >= 2 and 2 * len(runs[-1]) >= len(runs[-2]):
        older, newer = runs[-2:]
        is_superseded = np.zeros(len(older), bool)
        at = older.find(newer.identities)
        is_superseded[at[at >= 0]] = True
        rest = np.flatnonzero(~is_superseded)
        facts = pa.concat_tables([older.facts.take(rest), newer.facts])
        merged = Run(spec, facts, np.concatenate([older.base_row[rest], newer.base_row]))
        runs = (*runs[:-2], merged)
    return runs


class _RowsView:
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

    def folded(self, facts: pa.Table, position: Position) -> Self:
        """A new view with these facts folded in, standing on ``position``."""
        runs = fold(self.spec, self.base, self.runs, facts) if facts.num_rows else self.runs
        return type(self)(self.base, self.position.merge(position), runs)

    def _base_rows(self, keys: Hashes) -> list[tuple[RowsShard, np.ndarray, np.ndarray]]:
        """For each shard that has some of the keys: the shard, which of them, and their ordinals."""
        located = []
        for shard, queries in self.base.split(keys):
            at = fact.find(shard.keys, keys.take(queries))
            hit = at >= 0
            if hit.any():
                located.append((shard, queries[hit], at[hit]))
        return located

    def _newest(self, key: Hashes) -> list[tuple[Run, np.ndarray]]:
        """The overlay's standing rows of a key, by run, the newest run first."""
        standing: list[tuple[Run, np.ndarray]] = []
        for run in reversed(self.runs):
            rows = run.rows_of(key)
            if not len(rows):
                continue
            if standing:
                identities = hashes(run.facts.column("identity_hash").take(rows))
                for newer, _ in standing:
                    fresh = newer.find(identities) < 0
                    rows, identities = rows[fresh], identities.take(np.flatnonzero(fresh))
            if len(rows):
                standing.append((run, rows))
        return standing


class DocumentsView(_RowsView):
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
        hashed = hash_keys(keys)
        parts: dict[str, list[Any]] = {
            name: [None] * len(keys) for name in dict.fromkeys([read.presence, *wanted])
        }
        for shard, queries, ordinals in self._base_rows(hashed):
            for name, values in parts.items():
                starts = shard.starts[name][ordinals]
                has = np.flatnonzero(shard.ends[name][ordinals] > starts)
                if not len(has):
                    continue
                if name not in wanted:
                    documents: list[dict[str, Any]] = [{}] * len(has)
                else:
                    documents = _payload(shard, name, starts[has]).to_pylist()
                for query, document in zip(queries[has].tolist(), documents, strict=True):
                    values[query] = document
        if self.runs:
            self._overlay_parts(hashed, parts)
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
                    parts[name][query] = None if deleted else _pad(run, name, row)

    def vectors(self, name: str, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The vectors of keys, float32[n, d] (zeros where there is none), and whether there is one, bool[n].

        A vector is there whether or not its document is: it comes from the base alone.
        """
        path = self._path(name, Vector)
        matrix, has = np.zeros((len(keys), path.dimensions), np.float32), np.zeros(len(keys), bool)
        for shard, queries, ordinals in self._base_rows(hash_keys(keys)):
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
        exclude: Collection[bytes] = (),
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
        excluded = (
            {id(shard): ords for shard, _, ords in self._base_rows(hash_keys(exclude))} if exclude else {}
        )
        found: list[tuple[bytes, float]] = []
        for shard in self.base.shards:
            vectors = self._vectors(shard, path)
            is_hidden = self._touched.of(shard)
            if id(shard) in excluded:
                is_hidden = is_hidden.copy()
                is_hidden[excluded[id(shard)]] = True
            if not where and not self._are_all_visible(shard):
                is_hidden = is_hidden | ~self._visible(shard)
            hidden = vectors.row_of_ordinal[np.flatnonzero(is_hidden)]
            hidden = hidden[hidden >= 0]
            rows = None
            if where:
                rows = vectors.row_of_ordinal[self._passing(shard, where)].astype(np.int64)
                rows = rows[rows >= 0]
            found += _named(shard, vectors, vectors.nearest(query, k, rows, hidden), k)
        found += self._search_touched(name, query, k, where or {}, exclude)
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
            changed = changed[[touched.visible[i] not in exclude for i in changed.tolist()]]
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
            ordinals = _opened(shard, field, lambda p=path: access.Postings(p, shard.directory)).of(term)
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

    def _are_all_visible(self, shard: RowsShard) -> bool:
        return _opened(shard, "are all visible", lambda: bool(self._visible(shard).all()))

    def _vectors(self, shard: RowsShard, path: Vector) -> access.Vectors:
        count = len(shard.keys.lookup)
        return _opened(shard, path.name, lambda: access.Vectors(path, shard.directory, count))

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

    def of(self, shard: RowsShard) -> np.ndarray:
        """bool[documents of the shard]."""
        mask = self._masks.get(id(shard))
        return mask if mask is not None else np.zeros(len(shard.keys.lookup), bool)

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
        for shard, _, ordinals in view._base_rows(hash_keys(keys)):
            masks[id(shard)] = self.of(shard).copy()
            masks[id(shard)][ordinals] = True
        return Touched(documents, masks)


def _terms(document: dict[str, dict[str, Any]] | None, path: Inverted) -> set[bytes]:
    value = (document or {}).get(path.family, {}).get(path.column)
    values = value if isinstance(value, list) else [value]
    return {access.term_bytes(v) for v in values if v is not None}


class TimelineAnswer(NamedTuple):
    """A key's events, newest first.

    ``table`` has the columns id, time_ms and the payload's of the first family; further families are struct columns
    named like the family. Where ``is_complete`` is False the events are the exact prefix at or above the floor of a
    truncated key.
    """

    table: pa.Table
    is_complete: bool


class TimelineView(_RowsView):
    """Timelines by key."""

    def timeline(
        self, key: bytes, limit: int | None = None, before: tuple[int, bytes] | None = None
    ) -> TimelineAnswer:
        """The newest ``limit`` events of a key (all, if None), inside the horizon.

        ``before``: only events that come after this (time_ms, id) in the answer's order, for paging. A declared
        count limits the whole timeline, pages included.
        """
        read = self.spec.read
        assert isinstance(read, Timeline)
        family = self.spec.families[0].name
        hashed = hash_keys([key])
        standing = (
            [(run, rows[run.family[rows] == 0]) for run, rows in self._newest(hashed)] if self.runs else []
        )
        hidden = np.concatenate([run.base_row[rows] for run, rows in standing] or [_NO_ROWS])
        hidden = hidden[hidden >= 0]
        bounds = [n for n in (read.count, limit if before is None else None) if n is not None]
        most = min(bounds, default=None)
        pieces, floor = [], None
        for shard, _, ordinals in self._base_rows(hashed):
            ordinal = ordinals[0]
            start, end = int(shard.starts[family][ordinal]), int(shard.ends[family][ordinal])
            if most is not None:
                start = max(start, end - most - len(hidden))
            rows = np.arange(start, end)
            pieces.append(_base_piece(shard, family, rows[~np.isin(rows, hidden)] if len(hidden) else rows))
        for shard, _ in self.base.split(hashed):
            floor = _floor(shard, hashed)
        horizon = self.base.horizon_from_ms
        for run, rows in standing:
            rows = rows[~run.is_deleted[rows]]
            if horizon is not None:
                rows = rows[run.times[rows] >= horizon]
            if len(rows):
                pieces.append(_run_piece(run, family, rows))
        events = _newest_first(pieces, self.spec)
        if floor is not None:
            events = _up_to(events, floor)
        is_truncated = floor is not None and (read.count is None or events.num_rows < read.count)
        if read.count is not None:
            events = events.slice(0, read.count)
        if before is not None:
            events = _after(events, before)
        is_complete = not is_truncated or (limit is not None and events.num_rows >= limit)
        events = events.slice(0, limit)
        for joined in self.spec.families[1:]:
            events = events.append_column(joined.name, self._joined(joined.name, key, events))
        return TimelineAnswer(events, is_complete)

    def _joined(self, family: str, key: bytes, events: pa.Table) -> pa.Array:
        """Another family's payloads for events of a key, by event id; null where there is none."""
        kind = pa.struct(list(self.spec.family(family).schema))
        values: list[dict[str, Any] | None] = [None] * events.num_rows
        ids = events.column("id").to_pylist()
        identities = hash_keys([fact.identity_bytes([family.encode(), key, event]) for event in ids])
        hashed = hash_keys([key])
        repeated = Hashes(np.repeat(hashed.lookup, len(ids)), np.repeat(hashed.check, len(ids)))
        for shard, queries, at in self.base.locate(identities, repeated):
            rows = shard.identities.row[at]
            live = rows >= 0
            payloads = _payload(shard, family, rows[live]).to_pylist()
            for query, payload in zip(queries[live].tolist(), payloads, strict=True):
                values[query] = payload
        horizon = self.base.horizon_from_ms
        for run in self.runs:
            at = run.find(identities)
            for query in np.flatnonzero(at >= 0).tolist():
                row = int(at[query])
                is_gone = run.is_deleted[row] or (horizon is not None and run.times[row] < horizon)
                values[query] = None if is_gone else _pad(run, family, row)
        return pa.array(values, kind)


def _payload(shard: RowsShard, family: str, rows: np.ndarray) -> pa.Table:
    table = shard.rows[family]
    names = [name for name in table.column_names if name.startswith("payload.")]
    return table.select(names).take(rows).rename_columns([name.removeprefix("payload.") for name in names])


def _pad(run: Run, family: str, row: int) -> dict[str, Any]:
    return run.facts.column(payload_column(family))[row].as_py() or {}


def _base_piece(shard: RowsShard, family: str, rows: np.ndarray) -> pa.Table:
    table = shard.rows[family].drop_columns(["key"])
    is_slice = len(rows) and rows[-1] - rows[0] + 1 == len(rows)
    part = table.slice(int(rows[0]), len(rows)) if is_slice else table.take(rows)
    return part.rename_columns([name.removeprefix("payload.") for name in part.column_names])


def _run_piece(run: Run, family: str, rows: np.ndarray) -> pa.Table:
    payload = run.payload(family, rows)
    columns = {"id": run.facts.column("id").take(rows), "time_ms": run.times[rows]}
    return pa.table(columns | {name: payload.column(name) for name in payload.column_names})


def _newest_first(pieces: list[pa.Table], spec: IndexSpec) -> pa.Table:
    """One table of the pieces by (time, id) descending; base pieces come sorted ascending."""
    schema = pa.schema([("id", pa.binary()), ("time_ms", pa.int64()), *spec.families[0].schema])
    if not pieces:
        return schema.empty_table()
    if len(pieces) == 1 and pieces[0].schema.field("id").type == pa.large_binary():
        piece = pieces[0]
        return piece.take(np.arange(piece.num_rows)[::-1]).cast(schema)
    events = pa.concat_tables([piece.cast(schema) for piece in pieces])
    return events.sort_by([("time_ms", "descending"), ("id", "descending")])


def _floor(shard: RowsShard, hashed: Hashes) -> tuple[int, bytes] | None:
    at = fact.find(shard.floor_keys, hashed)[0]
    return (int(shard.floor_times[at]), shard.floor_ids[at].as_py()) if at >= 0 else None


def _up_to(events: pa.Table, floor: tuple[int, bytes]) -> pa.Table:
    """Events newest first, cut where they fall below the floor."""
    time, event = floor
    times = events.column("time_ms").to_numpy()
    cut = int(np.searchsorted(-times, -time, side="left"))
    last = int(np.searchsorted(-times, -time, side="right"))
    ids = events.column("id").slice(cut, last - cut).to_pylist()
    return events.slice(0, cut + sum(i >= event for i in ids))


def _after(events: pa.Table, before: tuple[int, bytes]) -> pa.Table:
    """Events newest first, from the first that comes after (time, id) on."""
    time, event = before
    times = events.column("time_ms").to_numpy()
    cut = int(np.searchsorted(-times, -time, side="left"))
    last = int(np.searchsorted(-times, -time, side="right"))
    ids = events.column("id").slice(cut, last - cut).to_pylist()
    return events.slice(cut + sum(i >= event for i in ids))


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
