"""Building a base: facts to the files of its shards, and their manifest.

Belongs here: the two ways to build (``build_rows`` for Documents and Timeline, ``build_sums``), run on Spark's
executors or in this process by the same functions. Access paths are ``access``'s; the files' layout is told in
``base``. A base appears by one rename, whole or not at all.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import TidemarkError
from pipelines.indexing import access, base, packing
from pipelines.indexing import facts as fact
from pipelines.indexing.base import MANIFEST, Manifest, Shard
from pipelines.indexing.facts import VERSION_COLUMNS, Hashes, hashes, payload_column
from pipelines.indexing.files import FileEntry, entry, replace_text, write_columns
from pipelines.indexing.merge import Ranks, merge, ranks
from pipelines.indexing.position import Position
from pipelines.indexing.spec import Documents, IndexSpec, Sums, Timeline, check, declaration, lineage

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

SHARD_ENTRY = "shard.json"


class SumOverflow(TidemarkError):
    """A sum does not fit into a signed 64-bit integer."""


class Meta(NamedTuple):
    """What the builder is told about a base, beside its facts; see ``base.Manifest``."""

    version: str
    cut: Position
    horizon_time_ms: int | None = None
    models: Mapping[str, str] = MappingProxyType({})
    parameters: Mapping[str, Any] = MappingProxyType({})
    sources: Mapping[str, int] = MappingProxyType({})


class ShardJob(NamedTuple):
    """What one executor needs to write a shard (or, of Sums, one of its two halves)."""

    spec: IndexSpec
    directory: str
    horizon_from_ms: int | None
    lookup_bits: int


def build(spec: IndexSpec, facts: DataFrame, directory: Path, meta: Meta, *, shard_count: int) -> Manifest:
    """Build a base of ``facts`` on Spark's executors, a shard a task.

    Args:
        facts: Every accepted fact up to the cut, merged or not, in the columns of ``facts.schema(spec)``.
        directory: ``…/indices/<index>/<version>``; must not exist yet.
        shard_count: Into how many shards; a shard's facts must fit an executor's memory (a few million do).

    Raises:
        SumOverflow: a bucket's sum does not fit; nothing is left behind.
        TidemarkError: the directory exists.
    """
    job, building = _begin(spec, directory, meta)
    try:
        if isinstance(spec.read, Sums):
            contributions = _grouped(
                facts, "identity_hash", shard_count, _identities_task(job), _contribution_ddl(spec)
            )
            finished = _grouped(contributions, "key_hash", shard_count, _buckets_task(job), "shard int")
        else:
            finished = _grouped(facts, "key_hash", shard_count, _rows_task(job), "shard int")
        finished.collect()
        return _finish(spec, building, directory, meta, shard_count, job)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def build_local(
    spec: IndexSpec, facts: pa.Table, directory: Path, meta: Meta, *, shard_count: int = 1
) -> Manifest:
    """Build a base in this process: for small indices and tests. The same shard functions as ``build``."""
    job, building = _begin(spec, directory, meta)
    try:
        if isinstance(spec.read, Sums):
            parts = [
                write_sums_identities(job, shard, part)
                for shard, part in _parts(facts, "identity_hash", shard_count)
            ]
            for shard, part in _parts(pa.concat_tables(parts), "key_hash", shard_count) if parts else ():
                write_sums_buckets(job, shard, part)
        else:
            for shard, part in _parts(facts, "key_hash", shard_count):
                write_rows_shard(job, shard, part)
        return _finish(spec, building, directory, meta, shard_count, job)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def write_rows_shard(job: ShardJob, shard: int, facts: pa.Table) -> None:
    """Write one shard of an index that is read as Documents or Timeline."""
    spec = job.spec
    facts = merge(fact.conform(facts, spec))
    keys, times = hashes(facts.column("key_hash")), facts.column("time_ms").to_numpy()
    is_live = ~facts.column("is_deleted").to_numpy().astype(bool)
    if job.horizon_from_ms is not None:
        is_live &= times >= job.horizon_from_ms
    row_of_fact = np.full(facts.num_rows, -1, np.int32)
    folder = _shard_folder(job, shard)
    kept: dict[str, np.ndarray] = {}
    floors = np.empty(0, np.int64)
    for number, family in enumerate(spec.families):
        rows = fact.sources(facts, family.name)
        rows = rows[is_live[rows]]
        rows = rows[_order(facts, rows, keys)]
        if number == 0 and isinstance(spec.read, Timeline) and spec.read.count is not None:
            rows, floors = _newest(rows, keys, spec.read.count)
        row_of_fact[rows] = np.arange(len(rows), dtype=np.int32)
        kept[family.name] = rows
        write_columns(folder / f"rows-{family.name}.arrow", _row_columns(spec, family.name, facts.take(rows)))
    starts_ends = _write_keys(folder, spec, facts, keys, kept)
    _write_identities(folder, hashes(facts.column("identity_hash")), ranks(facts), {"row": row_of_fact})
    write_columns(
        folder / "floors.arrow",
        {
            **_hash_columns(keys.take(floors)),
            "time_ms": times[floors],
            "id": facts.column("id").take(floors),
        },
    )
    if isinstance(spec.read, Documents):
        access.write_shard(spec, folder, facts, kept, starts_ends)
    counts = {f"live_{name}": len(rows) for name, rows in kept.items()}
    counts |= {
        "identities": facts.num_rows,
        "tombstones": _count(facts, "is_deleted"),
        "truncated_keys": len(floors),
    }
    _write_entry(folder, SHARD_ENTRY, counts)


def write_sums_identities(job: ShardJob, shard: int, facts: pa.Table) -> pa.Table:
    """Write the identities of one shard of Sums; returns what they contribute: key, key_hash, bucket_ms, amounts."""
    read = job.spec.read
    assert isinstance(read, Sums)
    facts = merge(facts)
    amounts = amounts_matrix(facts, len(read.amounts))
    buckets = facts.column("time_ms").to_numpy() // read.width_ms * read.width_ms
    contributes = contributing(facts, buckets, job.horizon_from_ms)
    keys = hashes(facts.column("key_hash"))
    folder = _shard_folder(job, shard)
    _write_identities(
        folder,
        hashes(facts.column("identity_hash")),
        ranks(facts),
        {
            "row": np.where(contributes, 0, -1).astype(np.int8),
            "key_lookup": keys.lookup,
            "key_check": keys.check,
            "bucket_ms": buckets,
            **_amount_columns(amounts),
        },
    )
    counts = {
        "identities": facts.num_rows,
        "tombstones": _count(facts, "is_deleted"),
        "contributing": int(contributes.sum()),
    }
    _write_entry(folder, "identities.json", counts)
    rows = np.flatnonzero(contributes)
    flat = pa.array(amounts[rows].reshape(-1))
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * len(read.amounts))
    return pa.table(
        {
            "key": facts.column("key").take(rows),
            "key_hash": facts.column("key_hash").take(rows),
            "bucket_ms": buckets[rows],
            "amounts": pa.ListArray.from_arrays(offsets, flat),
        }
    )


def write_sums_buckets(job: ShardJob, shard: int, contributions: pa.Table) -> None:
    """Write the keys and buckets of one shard of Sums from what the identities of all shards contribute."""
    read = job.spec.read
    assert isinstance(read, Sums)
    keys = hashes(contributions.column("key_hash"))
    buckets = contributions.column("bucket_ms").to_numpy()
    order = np.lexsort((buckets, keys.check, keys.lookup))
    keys, buckets = keys.take(order), buckets[order]
    amounts = amounts_matrix(contributions, len(read.amounts))[order]
    key_starts = run_starts(keys.lookup, keys.check)
    bucket_starts = run_starts(keys.lookup, keys.check, buckets)
    starts = np.searchsorted(bucket_starts, key_starts)
    ends = np.append(starts[1:], len(bucket_starts)) if len(starts) else starts
    folder = _shard_folder(job, shard)
    write_columns(
        folder / "keys.arrow",
        {
            **_hash_columns(keys.take(key_starts)),
            "key": contributions.column("key").take(order[key_starts]),
            "start": starts.astype(np.int64),
            "end": ends.astype(np.int64),
        },
    )
    summed = sum_runs(amounts, bucket_starts)
    write_columns(folder / "buckets.arrow", {"bucket_ms": buckets[bucket_starts], **_amount_columns(summed)})
    _write_entry(folder, "buckets.json", {"keys": len(key_starts), "buckets": len(bucket_starts)})


def amounts_matrix(table: pa.Table, count: int) -> np.ndarray:
    """The column ``amounts`` as int64[rows, count]; rows without amounts (tombstones) count as zeros."""
    column = table.column("amounts")
    if len(column) == 0:
        return np.zeros((0, count), np.int64)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    matrix = np.zeros((len(column), count), np.int64)
    filled = lengths > 0
    if filled.any():
        flat = pc.list_flatten(column).to_numpy()
        matrix[filled] = flat.reshape(-1, count)
    return matrix


def contributing(facts: pa.Table, buckets: np.ndarray, horizon_from_ms: int | None) -> np.ndarray:
    """Which facts count: live, and in a bucket that begins at or after the horizon."""
    is_live = ~facts.column("is_deleted").to_numpy().astype(bool)
    return is_live if horizon_from_ms is None else np.logical_and(is_live, buckets >= horizon_from_ms)


def run_starts(*columns: np.ndarray) -> np.ndarray:
    """Where each run of equal rows begins, in columns that are sorted together."""
    if len(columns[0]) == 0:
        return np.empty(0, np.int64)
    is_start = np.ones(len(columns[0]), bool)
    is_start[1:] = False
    for column in columns:
        is_start[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(is_start)


def sum_runs(amounts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of int64[n, a] over runs, exact.

    Raises:
        SumOverflow: a sum leaves the range of int64 (NumPy would wrap).
    """
    sums, is_overflow = try_sum_runs(amounts, starts)
    if is_overflow.any():
        raise SumOverflow(
            "a sum does not fit into 64 bits",
            remedy="find the amounts that are out of proportion and correct them",
        )
    return sums


def try_sum_runs(amounts: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of int64[n, a] over runs, and for each run whether one of its sums does not fit, bool[runs]."""
    if len(starts) == 0:
        return np.zeros((0, amounts.shape[1]), np.int64), np.zeros(0, bool)
    high = np.add.reduceat(amounts >> 32, starts, axis=0)
    low = np.add.reduceat(amounts & 0xFFFFFFFF, starts, axis=0)
    high += low >> 32
    is_overflow = np.any((high > 2**31 - 1) | (high < -(2**31)), axis=1)
    return (high << 32) + (low & 0xFFFFFFFF), is_overflow


def _begin(spec: IndexSpec, directory: Path, meta: Meta) -> tuple[ShardJob, Path]:
    check(spec)
    if directory.exists():
        raise TidemarkError(
            f"base {directory.name} exists", where=str(directory), remedy="build under a new version"
        )
    building = directory.with_name(f"{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    return ShardJob(
        spec, str(building), base.horizon_from(spec, meta.horizon_time_ms), fact.LOOKUP_BITS
    ), building


def _finish(
    spec: IndexSpec, building: Path, directory: Path, meta: Meta, shard_count: int, job: ShardJob
) -> Manifest:
    present = {path.name for path in building.iterdir()}
    for number in range(shard_count):  # a shard that no fact fell into is there all the same
        missing = _shard_name(number) not in present
        if isinstance(spec.read, Sums):
            folder = building / _shard_name(number)
            if missing or not (folder / "identities.json").exists():
                write_sums_identities(job, number, fact.schema(spec).empty_table())
            if missing or not (folder / "buckets.json").exists():
                write_sums_buckets(job, number, _no_contributions())
        elif missing:
            write_rows_shard(job, number, fact.schema(spec).empty_table())
    shards = tuple(_read_entry(building / _shard_name(number)) for number in range(shard_count))
    manifest = Manifest(
        index=spec.name,
        lineage=lineage(spec),
        built_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        shards=shards,
        version=meta.version,
        cut=meta.cut,
        horizon_time_ms=meta.horizon_time_ms,
        models=dict(meta.models),
        parameters=dict(meta.parameters),
        sources=dict(meta.sources),
        declaration=declaration(spec),
    )
    replace_text(building / MANIFEST, json.dumps(manifest.to_json()))
    building.rename(directory)
    return manifest


def _no_contributions() -> pa.Table:
    return pa.table(
        {
            "key": pa.array([], pa.binary()),
            "key_hash": pa.array([], pa.binary()),
            "bucket_ms": pa.array([], pa.int64()),
            "amounts": pa.array([], pa.list_(pa.int64())),
        }
    )


def _order(facts: pa.Table, rows: np.ndarray, keys: Hashes) -> np.ndarray:
    """The order of rows by key, then time, then id in bytes."""
    part = facts.take(rows)
    columns = pa.table(
        {
            "lookup": keys.lookup[rows],
            "check": keys.check[rows],
            "time_ms": part.column("time_ms"),
            "id": part.column("id"),
        }
    )
    by = [(name, "ascending") for name in columns.column_names]
    return pc.sort_indices(columns, sort_keys=by).to_numpy()


def _newest(rows: np.ndarray, keys: Hashes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of rows sorted by (key, time, id) the newest ``count`` a key; and the oldest kept row of each truncated key."""
    starts = run_starts(keys.lookup[rows], keys.check[rows])
    ends = np.append(starts[1:], len(rows)) if len(starts) else starts
    first_kept = np.maximum(starts, ends - count)
    is_kept = np.zeros(len(rows) + 1, np.int64)
    np.add.at(is_kept, first_kept, 1)
    np.add.at(is_kept, ends, -1)
    floors = rows[first_kept[first_kept > starts]]
    return rows[np.cumsum(is_kept[:-1]) > 0], floors


def _row_columns(spec: IndexSpec, family: str, rows: pa.Table) -> dict[str, Any]:
    payload = rows.column(payload_column(family)).combine_chunks()
    fields = {
        f"payload.{field.name}": pc.struct_field(payload, field.name) for field in spec.family(family).schema
    }
    if isinstance(spec.read, Timeline):
        packed = {name: packing.packed(column) for name, column in fields.items()}
        return {"id": packing.packed_ids(rows.column("id")), "time_ms": rows.column("time_ms")} | packed
    return {name: rows.column(name) for name in ("key", "id", "time_ms")} | fields


def _write_keys(
    folder: Path, spec: IndexSpec, facts: pa.Table, keys: Hashes, kept: dict[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write ``keys``: each key that has a live row in some family, and its rows in each."""
    rows = np.concatenate([*kept.values(), np.empty(0, np.int64)]).astype(np.int64)
    order = np.lexsort((keys.check[rows], keys.lookup[rows]))
    rows = rows[order]
    rows = rows[run_starts(keys.lookup[rows], keys.check[rows])]
    unique = keys.take(rows)
    columns: dict[str, Any] = {**_hash_columns(unique), "key": facts.column("key").take(rows)}
    starts_ends = {}
    for family in spec.families:
        of_family = keys.take(kept[family.name])
        starts = run_starts(*of_family)
        ends = np.append(starts[1:], len(of_family.lookup)) if len(starts) else starts
        at = fact.find(unique, of_family.take(starts))
        start, end = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
        start[at], end[at] = starts, ends
        columns |= {f"start_{family.name}": start, f"end_{family.name}": end}
        starts_ends[family.name] = (start, end)
    write_columns(folder / "keys.arrow", columns)
    return starts_ends


def _write_identities(folder: Path, identities: Hashes, ranked: Ranks, columns: dict[str, Any]) -> None:
    versions = {  # a version of fewer than four integers needs fewer columns
        name: ranked.versions[:, i]
        for i, name in enumerate(VERSION_COLUMNS)
        if i == 0 or ranked.versions[:, i].any()
    }
    write_columns(
        folder / "identities.arrow",
        {
            **_hash_columns(identities),
            **versions,
            "is_deleted": ranked.is_deleted.astype(np.uint8),
            "content_hash": ranked.content_hash,
            **columns,
        },
    )


def _hash_columns(hashed: Hashes) -> dict[str, np.ndarray]:
    return {"lookup": hashed.lookup, "check": hashed.check}


def _amount_columns(amounts: np.ndarray) -> dict[str, np.ndarray]:
    """A column for each amount that is not zero throughout."""
    return {
        f"amount_{i}": np.ascontiguousarray(amounts[:, i])
        for i in range(amounts.shape[1])
        if amounts[:, i].any()
    }


def _count(facts: pa.Table, column: str) -> int:
    return int(pc.sum(facts.column(column)).as_py() or 0)


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def _shard_folder(job: ShardJob, shard: int) -> Path:
    folder = Path(job.directory) / _shard_name(shard)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_entry(folder: Path, name: str, counts: dict[str, int]) -> None:
    replace_text(folder / name, json.dumps(counts))


def _read_entry(folder: Path) -> Shard:
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.json")):
        counts |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    files: tuple[FileEntry, ...] = tuple(entry(path) for path in sorted(folder.iterdir()))
    return Shard(folder.name, files, counts)


def _parts(table: pa.Table, by: str, shard_count: int) -> Iterator[tuple[int, pa.Table]]:
    shards = fact.shard_of(hashes(table.column(by)), shard_count)
    for shard in np.unique(shards):
        yield int(shard), table.take(np.flatnonzero(shards == shard))


def _grouped(
    frame: DataFrame, by: str, shard_count: int, task: Callable[[int, pa.Table], pa.Table], ddl: str
) -> DataFrame:
    """Run a task on each shard's rows, on the executors."""
    from pyspark.sql import functions as F

    def run(keys: tuple[Any, ...], rows: pa.Table) -> pa.Table:
        return task(keys[0].as_py(), rows.drop_columns(["shard"]))

    sharded = frame.withColumn("shard", fact.shard_column(by, shard_count))
    return sharded.groupBy(F.col("shard")).applyInArrow(run, ddl)


def _rows_task(job: ShardJob) -> Callable[[int, pa.Table], pa.Table]:
    def task(shard: int, rows: pa.Table) -> pa.Table:
        fact.LOOKUP_BITS = job.lookup_bits
        write_rows_shard(job, shard, rows)
        return pa.table({"shard": pa.array([shard], pa.int32())})

    return task


def _identities_task(job: ShardJob) -> Callable[[int, pa.Table], pa.Table]:
    def task(shard: int, rows: pa.Table) -> pa.Table:
        fact.LOOKUP_BITS = job.lookup_bits
        return write_sums_identities(job, shard, rows)

    return task


def _buckets_task(job: ShardJob) -> Callable[[int, pa.Table], pa.Table]:
    def task(shard: int, rows: pa.Table) -> pa.Table:
        fact.LOOKUP_BITS = job.lookup_bits
        write_sums_buckets(job, shard, rows)
        return pa.table({"shard": pa.array([shard], pa.int32())})

    return task


def _contribution_ddl(spec: IndexSpec) -> str:
    return "key binary, key_hash binary, bucket_ms bigint, amounts array<bigint>"
