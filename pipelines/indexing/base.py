"""A base: one immutable build of an index at one cut, mapped from its files.

Belongs here: the manifest, opening a base, and the questions that one mapped shard answers. Building is ``build``'s;
bringing base and delta together is ``rows``' and ``sums``'.

Layout of ``indices/<index>/<version>/``: ``manifest.json`` and a folder a shard. Indices that are read as
``Documents`` or ``Timeline`` are sharded by key and hold
  ``keys``            sorted look-up hash and check of each key; start and end of its rows in each family
  ``rows-<family>``   live facts by (key, time, id): key, id, time_ms, payload; of timelines without the key, and packed
  ``identities``      the rank of every identity, live, deleted or truncated, and its row (-1: not live)
  ``floors``          for each truncated key the (time, id) of the oldest event that is still there
``Sums`` hold ``keys`` and ``buckets`` by key, and ``identities`` with their contribution by identity.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.errors import TidemarkError
from pipelines.indexing import facts as fact
from pipelines.indexing import position as positions
from pipelines.indexing.facts import Hashes
from pipelines.indexing.files import BrokenArtifact, FileEntry, large_type, map_table, numbers, verify
from pipelines.indexing.merge import Ranks
from pipelines.indexing.packing import value_type
from pipelines.indexing.position import Position
from pipelines.indexing.spec import BadSpec, Family, IndexSpec, Sums, read_as

MAX_PLACES = 1_000_000
"""Of so many keys a base remembers where they stand; then it begins anew."""
MAX_KEPT = 50_000
"""Of so many rows of a family a shard keeps what they say as plain values; then it begins anew."""
FORMAT = 1
MANIFEST = "manifest.json"


class BadBase(TidemarkError):
    """A folder is not a base that this code can serve."""


class Shard(NamedTuple):
    """What a manifest says of one shard: its folder, its files and what they hold."""

    name: str
    files: tuple[FileEntry, ...]
    counts: dict[str, int]


class Manifest(NamedTuple):
    """What is known of a base without opening it.

    ``horizon_time_ms`` is the greatest broker time at the cut (None: no horizon). ``parameters`` are pinned values
    that models and rankers read (a Gram matrix, IDF), ``models`` the model id of each base-only family, ``sources``
    the snapshot of each table that was read, ``declaration`` what its lineage declares (``spec.declaration``).
    """

    index: str  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    version: str
    lineage: str
    cut: Position
    horizon_time_ms: int | None
    built_at: str
    models: dict[str, str]
    parameters: dict[str, Any]
    sources: dict[str, int]
    shards: tuple[Shard, ...]
    declaration: Mapping[str, Any] = {}

    @property
    def counts(self) -> dict[str, int]:
        """The shards' counts, added up."""
        total: dict[str, int] = {}
        for shard in self.shards:
            for name, count in shard.counts.items():
                total[name] = total.get(name, 0) + count
        return total

    def to_json(self) -> dict[str, Any]:
        """What ``manifest.json`` holds."""
        return {
            "format": FORMAT,
            **self._asdict(),
            "cut": self.cut.to_json(),
            "counts": self.counts,
            "shards": [{**s._asdict(), "files": [f._asdict() for f in s.files]} for s in self.shards],
        }


def read_manifest(directory: Path) -> Manifest:
    """Read a base's manifest.

    Raises:
        BadBase: there is none, it cannot be read, or it has a format that this code does not know.
    """
    path = directory / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise BadBase(
                f"{directory.name} has format {value['format']}; this code reads format {FORMAT}",
                where=str(path),
                remedy="build a new base",
            )
        shards = tuple(
            Shard(s["name"], tuple(FileEntry(**f) for f in s["files"]), s["counts"]) for s in value["shards"]
        )
        fields = {
            name: value[name] for name in Manifest._fields if name in value and name not in ("cut", "shards")
        }
        return Manifest(cut=positions.from_json(value["cut"]), shards=shards, **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadBase(
            f"{directory.name} has no readable {MANIFEST}: {error}",
            where=str(path),
            remedy="build a new base",
        ) from error


def check_files(directory: Path, manifest: Manifest) -> None:
    """Verify the size and checksum of every file; raises ``BrokenArtifact`` naming the first that differs."""
    for shard in manifest.shards:
        for file in shard.files:
            verify(directory / shard.name, file)


class Found(NamedTuple):
    """What a base knows of identities: whether at all, their ranks, and their row (-1: deleted or truncated)."""

    is_known: np.ndarray
    ranks: Ranks
    row: np.ndarray


class RowsShard:
    """One mapped shard of an index that is read as ``Documents`` or ``Timeline``.

    A base of another lineage is read as far as the two agree: a column or a family that it lacks is null, one that only
    it has is left out.
    """

    def __init__(self, spec: IndexSpec, directory: Path, files: Collection[str]) -> None:
        self.directory = directory
        self.families = frozenset(f.name for f in spec.families if f"rows-{f.name}.arrow" in files)
        keys = map_table(directory / "keys.arrow")
        self.keys = Hashes(numbers(keys, "lookup"), numbers(keys, "check"))
        nowhere = np.zeros(len(self.keys.lookup), np.int64)
        self.starts, self.ends = (
            {
                f.name: numbers(keys, f"{side}_{f.name}") if f.name in self.families else nowhere
                for f in spec.families
            }
            for side in ("start", "end")
        )
        self.key_bytes = keys.column("key")
        self.rows = {
            f.name: _row_columns(map_table(directory / f"rows-{f.name}.arrow"))
            if f.name in self.families
            else {"id": pa.array([], pa.large_binary()), "time_ms": pa.array([], pa.int64())}
            for f in spec.families
        }
        self.payload = {f.name: _payload_columns(f, self.rows[f.name]) for f in spec.families}
        self._kept: dict[str, dict[int, dict[str, Any]]] = {f.name: {} for f in spec.families}
        self.identities = _Identities(map_table(directory / "identities.arrow"))
        floors = map_table(directory / "floors.arrow")
        self.floor_keys = Hashes(numbers(floors, "lookup"), numbers(floors, "check"))
        self.floor_times, self.floor_ids = numbers(floors, "time_ms"), floors.column("id")

    def has(self, family: str, column: str) -> bool:
        """Whether the base was built with a column, and so with the access paths over it."""
        return f"payload.{column}" in self.rows[family]

    def said(self, family: str, rows: np.ndarray) -> pa.StructArray:
        """What rows of a family say, in all its columns."""
        at, columns = pa.array(rows), self.payload[family]
        return pa.StructArray.from_arrays([column.take(at) for column in columns.values()], list(columns))

    def payloads(self, family: str, rows: np.ndarray) -> list[dict[str, Any]]:
        """What rows of a family say, as plain values. Nobody may change them: they are kept for the next who asks."""
        kept, wanted = self._kept[family], rows.tolist()
        found = [kept.get(row) for row in wanted]
        unread = [i for i, payload in enumerate(found) if payload is None]
        if unread:
            read = self._read(family, [wanted[i] for i in unread])
            if len(kept) + len(read) > MAX_KEPT:
                kept.clear()
            for i, payload in zip(unread, read, strict=True):
                found[i] = kept[wanted[i]] = payload
        return found  # type: ignore[return-value]

    def _read(self, family: str, rows: list[int]) -> list[dict[str, Any]]:
        columns, at = self.payload[family], pa.array(rows)
        if not columns:
            return [{} for _ in rows]
        values = [column.take(at).to_pylist() for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def events(self, family: str) -> dict[str, pa.Array]:
        """The id, the time and the payload's columns of a family."""
        rows = self.rows[family]
        return {"id": rows["id"], "time_ms": rows["time_ms"], **self.payload[family]}


def _row_columns(table: pa.Table) -> dict[str, pa.Array]:
    """The mapped columns of a ``rows`` file, each in one piece."""
    columns = {name: table.column(name) for name in table.column_names}
    return {name: c.chunk(0) if c.num_chunks else pa.array([], c.type) for name, c in columns.items()}


def _payload_columns(family: Family, rows: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """The columns that the family declares, as the base has them; null where it lacks one."""
    count = len(rows["id"])
    found = {}
    for field in family.schema:
        kind = large_type(field.type)
        column = rows.get(f"payload.{field.name}")
        if column is None:
            column = pa.nulls(count, kind)
        found[field.name] = column if value_type(column) == kind else column.cast(kind)
    return found


class SumsShard:
    """One mapped shard of an index that is read as ``Sums``: buckets of its keys, ranks of its identities."""

    def __init__(self, spec: IndexSpec, directory: Path, files: Collection[str]) -> None:
        assert isinstance(spec.read, Sums)
        count = len(spec.read.amounts)
        keys = map_table(directory / "keys.arrow")
        self.keys = Hashes(numbers(keys, "lookup"), numbers(keys, "check"))
        self.starts, self.ends = numbers(keys, "start"), numbers(keys, "end")
        self.key_bytes = keys.column("key")
        buckets = map_table(directory / "buckets.arrow")
        self.bucket_ms = numbers(buckets, "bucket_ms")
        self.amounts = _amounts(buckets, count)
        identities = map_table(directory / "identities.arrow")
        self.identities = _Identities(identities)
        self.contributed = Hashes(numbers(identities, "key_lookup"), numbers(identities, "key_check"))
        self.contributed_bucket_ms = numbers(identities, "bucket_ms")
        self.contributed_amounts = _amounts(identities, count)


class _Identities:
    """The ``identities`` file of a shard: sorted look-up hashes, checks, ranks, rows."""

    def __init__(self, table: pa.Table) -> None:
        self.hashes = Hashes(numbers(table, "lookup"), numbers(table, "check"))
        self.versions = [numbers(table, n) if n in table.column_names else None for n in fact.VERSION_COLUMNS]
        self.is_deleted = numbers(table, "is_deleted")
        self.content_hash = numbers(table, "content_hash")
        self.row = numbers(table, "row")

    def ranks(self, at: np.ndarray) -> Ranks:
        versions = np.zeros((len(at), 4), np.int64)
        for i, column in enumerate(self.versions):
            if column is not None:
                versions[:, i] = column[at]
        return Ranks(versions, self.is_deleted[at].astype(bool), self.content_hash[at])


def _amounts(table: pa.Table, count: int) -> list[np.ndarray | None]:
    names = [f"amount_{i}" for i in range(count)]
    return [numbers(table, name) if name in table.column_names else None for name in names]


class Places(NamedTuple):
    """Keys, and where each stands in one base: shard << 32 | ordinal, int64; -1: in none. For who asks about the same
    keys again."""

    keys: Sequence[bytes]
    at: np.ndarray


class Base:
    """An opened base. Immutable; safe to read from many threads."""

    def __init__(self, spec: IndexSpec, manifest: Manifest | None, shards: tuple[Any, ...]) -> None:
        self.spec = spec
        self.manifest = manifest
        self.shards = shards
        self._places: dict[bytes, int] = {}  # as in Places

    @property
    def version(self) -> str | None:
        """The base version; None for the empty base that stands before the first build."""
        return self.manifest.version if self.manifest else None

    @property
    def cut(self) -> Position:
        """The position up to which this base holds everything."""
        return self.manifest.cut if self.manifest else positions.EMPTY

    @property
    def horizon_from_ms(self) -> int | None:
        """The earliest event time that is answered; None: no horizon. Sums round it up to a whole bucket."""
        age_ms = getattr(self.spec.read, "age_ms", None)
        if age_ms is None or self.manifest is None or self.manifest.horizon_time_ms is None:
            return None
        return horizon_from(self.spec, self.manifest.horizon_time_ms)

    def identities(self, identities: Hashes, shard_by: Hashes) -> Found:
        """What this base knows of identities; ``shard_by`` are the hashes that place them in shards."""
        count = len(identities.lookup)
        known, row = np.zeros(count, bool), np.full(count, -1, np.int64)
        versions, deleted, content = (
            np.zeros((count, 4), np.int64),
            np.zeros(count, bool),
            np.zeros(count, np.int64),
        )
        for shard, queries, at in self.locate(identities, shard_by):
            ranked = shard.identities.ranks(at)
            known[queries], row[queries] = True, shard.identities.row[at]
            versions[queries], deleted[queries] = ranked.versions, ranked.is_deleted
            content[queries] = ranked.content_hash
        return Found(known, Ranks(versions, deleted, content), row)

    def locate(self, identities: Hashes, shard_by: Hashes) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """For each shard that knows some of the identities: the shard, which of them, and where it has them."""
        located = []
        for shard, queries in self.split(shard_by):
            at = fact.find(shard.identities.hashes, identities.take(queries))
            hit = at >= 0
            if hit.any():
                located.append((shard, queries[hit], at[hit]))
        return located

    def places(self, keys: Sequence[bytes]) -> Places:
        """Where keys stand. That never changes, and the same keys are asked for again and again: it is remembered."""
        found = list(map(self._places.get, keys))
        if None in found:
            unknown = [i for i, place in enumerate(found) if place is None]
            for i, place in zip(unknown, self._look_up([keys[i] for i in unknown]), strict=True):
                found[i] = place
        return Places(keys, np.array(found, np.int64))

    def place(self, keys: Sequence[bytes] | Places) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """For each shard that has some of the keys: the shard, which of them, and their ordinals, both int64."""
        at = (keys if isinstance(keys, Places) else self.places(keys)).at
        ordinals = at & 0xFFFFFFFF
        return [(self.shards[n], queries, ordinals[queries]) for n, queries in _by_number(at >> 32)]

    def hashes(self, places: Places) -> Hashes:
        """The hashes of keys; of those that stand in this base they are read, which is quicker than to compute them."""
        count = len(places.at)
        found = Hashes(np.empty(count, np.uint64), np.empty(count, np.uint64))
        for shard, queries, ordinals in self.place(places):
            found.lookup[queries], found.check[queries] = shard.keys.take(ordinals)
        unknown = np.flatnonzero(places.at < 0)
        found.lookup[unknown], found.check[unknown] = fact.hash_keys(
            [places.keys[i] for i in unknown.tolist()]
        )
        return found

    def _look_up(self, keys: Sequence[bytes]) -> list[int]:
        hashed = fact.hash_keys(keys)
        at = np.full(len(keys), -1, np.int64)
        of_shard = fact.shard_of(hashed, len(self.shards)) if self.shards else at
        for number, queries in _by_number(of_shard):
            ordinals = fact.find(self.shards[number].keys, hashed.take(queries))
            at[queries] = np.where(ordinals >= 0, ordinals | number << 32, -1)
        if len(self._places) + len(keys) > MAX_PLACES:
            self._places.clear()
        found: list[int] = at.tolist()
        self._places.update(zip(keys, found, strict=True))
        return found

    def split(self, hashed: Hashes) -> list[tuple[Any, np.ndarray]]:
        """Which of the hashes belong to which shard."""
        if len(self.shards) <= 1:
            return [(shard, np.arange(len(hashed.lookup))) for shard in self.shards]
        of_shard = fact.shard_of(hashed, len(self.shards))
        return [(self.shards[number], queries) for number, queries in _by_number(of_shard)]


def _by_number(shards: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Of n things' shards, -1 for none, each with which of the things are its.

    Only those that have any are looked at: a base has hundreds of shards, and an answer is about a few keys.
    """
    there = np.flatnonzero(np.bincount(shards[shards >= 0])).tolist()
    return [(number, np.flatnonzero(shards == number)) for number in there]


def horizon_from(spec: IndexSpec, horizon_time_ms: int | None) -> int | None:
    """Where the horizon of an index begins that ends at ``horizon_time_ms``; Sums round up to a whole bucket."""
    age_ms = getattr(spec.read, "age_ms", None)
    if age_ms is None or horizon_time_ms is None:
        return None
    start = horizon_time_ms - age_ms
    if isinstance(spec.read, Sums):
        return -(-start // spec.read.width_ms) * spec.read.width_ms
    return start


def empty(spec: IndexSpec) -> Base:
    """What stands before the first build: no shard, no horizon, nothing cut off."""
    return Base(spec, None, ())


def open_base(spec: IndexSpec, directory: Path, *, verify_files: bool = True) -> Base:
    """Map a base; one of another lineage is read as far as it and the code agree, and by its own horizon.

    Raises:
        BadBase: no manifest, an unknown format, a base of another index, or one that this code cannot read.
        BrokenArtifact: a file is missing or differs from its checksum.
    """
    manifest = read_manifest(directory)
    if manifest.index != spec.name:
        raise BadBase(
            f"{directory} is a base of {manifest.index!r}, not of {spec.name!r}", where=str(directory)
        )
    if verify_files:
        check_files(directory, manifest)
    kind = SumsShard if isinstance(spec.read, Sums) else RowsShard
    try:
        spec = read_as(spec, manifest.declaration)
        shards = tuple(
            kind(spec, directory / shard.name, {file.name for file in shard.files})
            for shard in manifest.shards
        )
    except (BadSpec, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadBase(
            f"{directory.name} is of the lineage {manifest.lineage}, which this code cannot read: {error}",
            where=str(directory),
            remedy=getattr(error, "remedy", None) or "serve it with the code of its own lineage",
        ) from error
    except KeyError as error:
        raise BrokenArtifact(
            f"{directory.name} lacks a column: {error}", where=str(directory), remedy="build the base again"
        ) from error
    return Base(spec, manifest, shards)
