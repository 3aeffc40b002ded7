"""Facts: what base input and delta rows are, in every index; their columns, their hashes, how a transform makes them.

A fact is a row of an Arrow table or a Spark DataFrame: the fixed columns of ``FACT_FIELDS`` and one nullable struct
column ``payload_<family>`` for each family of the index (docs/adr/0001). Merging facts is ``merge``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.indexing.spec import IndexSpec

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

VERSION_COLUMNS = ("version_1", "version_2", "version_3", "version_4")

FACT_FIELDS = (
    pa.field("identity", pa.binary()),
    pa.field("identity_hash", pa.binary()),  # sha256(identity)[:16]
    pa.field("family", pa.string()),
    *(pa.field(name, pa.int64()) for name in VERSION_COLUMNS),  # shorter versions end in zeros
    pa.field("is_deleted", pa.bool_()),
    pa.field("content_hash", pa.int64()),
    pa.field("key", pa.binary()),
    pa.field("key_hash", pa.binary()),  # sha256(key)[:16]
    pa.field("id", pa.binary()),
    pa.field("time_ms", pa.int64()),
    pa.field("amounts", pa.list_(pa.int64())),
)

LOOKUP_BITS = 64
"""How many bits of a hash are used to look it up. Only tests make it smaller, to force collisions: every look-up
verifies the second 64 bits, so answers must not change."""


class Hashes(NamedTuple):
    """128-bit hashes as two columns: ``lookup`` uint64[n] to search by, ``check`` uint64[n] to verify."""

    lookup: np.ndarray
    check: np.ndarray

    def take(self, rows: np.ndarray) -> Hashes:
        """The hashes of these rows."""
        return Hashes(self.lookup[rows], self.check[rows])


def payload_column(family: str) -> str:
    """The name of the family's payload column in facts tables."""
    return f"payload_{family}"


def schema(spec: IndexSpec) -> pa.Schema:
    """The Arrow schema of an index's facts."""
    payloads = [pa.field(payload_column(f.name), pa.struct(list(f.schema))) for f in spec.families]
    return pa.schema([*FACT_FIELDS, *payloads])


def identity_bytes(parts: Sequence[bytes]) -> bytes:
    """Parts joined, each behind its length (4 bytes, big-endian): ('a','bc') and ('ab','c') differ."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def hash_bytes(value: bytes) -> bytes:
    """The 128-bit hash of an identity or a key: the first 16 bytes of its SHA-256, the same as Spark's ``sha2``."""
    return hashlib.sha256(value).digest()[:16]


def hashes(column: pa.ChunkedArray | pa.Array) -> Hashes:
    """A column of 16-byte hashes as two uint64 columns."""
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(flat, pa.ChunkedArray):
        flat = pa.concat_arrays(flat.chunks)
    if len(flat) == 0:
        return Hashes(np.empty(0, np.uint64), np.empty(0, np.uint64))
    fixed = flat.cast(pa.binary(16)) if flat.type != pa.binary(16) else flat
    words = np.frombuffer(fixed.buffers()[1], dtype=">u8")[2 * fixed.offset : 2 * (fixed.offset + len(fixed))]
    pairs = words.reshape(-1, 2).astype(np.uint64)
    return Hashes(shorten(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))


def hash_keys(keys: Iterable[bytes]) -> Hashes:
    """The hashes of keys, in their order."""
    digests = b"".join([hashlib.sha256(key).digest()[:16] for key in keys])
    pairs = np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return Hashes(shorten(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))


def shorten(lookup: np.ndarray) -> np.ndarray:
    """The leading ``LOOKUP_BITS`` of look-up hashes."""
    return np.ascontiguousarray(lookup >> np.uint64(64 - LOOKUP_BITS))


def shard_of(hashed: Hashes, shard_count: int) -> np.ndarray:
    """The shard of each hash, int64[n]; ``shard_column`` is the same in Spark."""
    return ((hashed.check & np.uint64(0xFFFFFFFF)) % np.uint64(shard_count)).astype(np.int64)


def shard_column(hash_column: str, shard_count: int) -> Column:
    """The shard of a 16-byte hash, as a Spark expression."""
    from pyspark.sql import functions as F

    tail = F.conv(F.hex(F.substring(F.col(hash_column), 13, 4)), 16, 10).cast("bigint")
    return F.pmod(tail, F.lit(shard_count)).cast("int")


def find(held: Hashes, queries: Hashes) -> np.ndarray:
    """Where each query stands in hashes that are sorted by look-up; int64[n], -1 for none.

    Runs of equal look-up hashes are searched one by one; they are rare.
    """
    if len(held.lookup) == 0:
        return np.full(len(queries.lookup), -1, np.int64)
    if len(queries.lookup) > 256:  # sorted queries walk the pages of a mapped column in order
        order = np.argsort(queries.lookup)
        found = np.empty(len(order), np.int64)
        found[order] = _find(held, queries.take(order))
        return found
    return _find(held, queries)


def _find(held: Hashes, queries: Hashes) -> np.ndarray:
    sorted_lookup, check = held
    left = np.searchsorted(sorted_lookup, queries.lookup, side="left")
    at = np.minimum(left, len(sorted_lookup) - 1)
    found = np.where(
        (sorted_lookup[at] == queries.lookup) & (check[at] == queries.check), left, np.int64(-1)
    ).astype(np.int64)
    collided = np.flatnonzero((found < 0) & (sorted_lookup[at] == queries.lookup))
    for query in collided:
        right = np.searchsorted(sorted_lookup, queries.lookup[query], side="right")
        matches = np.flatnonzero(check[left[query] : right] == queries.check[query])
        if len(matches):
            found[query] = left[query] + matches[0]
    return found


def table(spec: IndexSpec, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A facts table from plain rows: for loads by hand and tests.

    Each row has ``family``, ``identity`` (the parts after the family, bytes), ``key``, ``version`` (1 to 4 integers),
    ``content_hash`` and may have ``id``, ``time_ms``, ``is_deleted``, ``amounts``, ``payload`` (a dict).
    """
    columns: dict[str, list[Any]] = {field.name: [] for field in schema(spec)}
    for row in rows:
        identity = identity_bytes([row["family"].encode(), *row["identity"]])
        version = (*row["version"], 0, 0, 0)[:4]
        values = {
            "identity": identity,
            "identity_hash": hash_bytes(identity),
            "family": row["family"],
            **dict(zip(VERSION_COLUMNS, version, strict=True)),
            "is_deleted": row.get("is_deleted", False),
            "content_hash": row["content_hash"],
            "key": row["key"],
            "key_hash": hash_bytes(row["key"]),
            "id": row.get("id", b""),
            "time_ms": row.get("time_ms", 0),
            "amounts": list(row.get("amounts", ())),
            payload_column(row["family"]): row.get("payload"),
        }
        for name, column in columns.items():
            column.append(values.get(name))
    return pa.table(columns, schema=schema(spec))


def conform(facts: pa.Table, spec: IndexSpec) -> pa.Table:
    """The same facts with exactly the columns of the index: missing payloads null, types cast."""
    target = schema(spec)
    columns = [
        facts.column(field.name).cast(field.type)
        if field.name in facts.column_names
        else pa.nulls(facts.num_rows, field.type)
        for field in target
    ]
    return pa.table(columns, schema=target)


def sources(facts: pa.Table, family: str) -> np.ndarray:
    """The row numbers of a family's facts."""
    return np.flatnonzero(pc.equal(facts.column("family"), family).to_numpy())


def frame(
    rows: DataFrame,
    *,
    family: str,
    identity: Sequence[str],
    key: str,
    version: Sequence[str],
    is_deleted: str,
    content_hash: str,
    payload: str,
    id: str = "''",
    time_ms: str = "0",
    amounts: Sequence[str] = (),
) -> DataFrame:
    """Facts of one family from the rows of a batch or micro-batch: what a transform ends with.

    Every argument but ``family`` is a Spark SQL expression over the rows: a stream builds its plan anew for each epoch,
    and text costs one call to the JVM where Columns cost hundreds. ``identity`` are the parts after the family, text or
    bytes; ``payload`` is a struct of the family's schema (ignored for tombstones). The same expressions run in batch
    and stream, and agree with ``table`` byte for byte.
    """
    padded = [*version, *["0"] * (4 - len(version))]
    summed = ", ".join(f"cast({value} AS bigint)" for value in amounts)
    payload_name = payload_column(family)
    staged = rows.selectExpr(
        f"concat({', '.join(map(_part, [_quoted(family), *identity]))}) AS identity",
        f"{_quoted(family)} AS family",
        *[f"cast({v} AS bigint) AS {name}" for v, name in zip(padded, VERSION_COLUMNS, strict=True)],
        f"{is_deleted} AS is_deleted",
        f"cast({content_hash} AS bigint) AS content_hash",
        f"cast({key} AS binary) AS key",
        f"cast({id} AS binary) AS id",
        f"cast({time_ms} AS bigint) AS time_ms",
        f"cast(array({summed}) AS array<bigint>) AS amounts",
        f"CASE WHEN NOT {is_deleted} THEN {payload} END AS {payload_name}",
    )
    return staged.selectExpr(
        "identity",
        f"{_hashed('identity')} AS identity_hash",
        "family",
        *VERSION_COLUMNS,
        "is_deleted",
        "content_hash",
        "key",
        f"{_hashed('key')} AS key_hash",
        "id",
        "time_ms",
        "amounts",
        payload_name,
    )


def mapped(rows: Any, make: Callable[[pa.Table], pa.Table], made: pa.Schema) -> Any:
    """What a pure function makes of rows: of an Arrow table here and now, of a DataFrame in Spark's workers.

    Args:
        rows: An Arrow table or a DataFrame.
        make: From any number of the rows to a table of the schema ``made``.
        made: Its columns.
    """
    if isinstance(rows, pa.Table):
        return make(rows)
    from pyspark.sql.pandas.types import from_arrow_schema

    def run(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            yield from make(pa.Table.from_batches([batch])).to_batches()

    return rows.mapInArrow(run, from_arrow_schema(made))


def family_schema(family: str, payload: pa.Schema) -> pa.Schema:
    """The columns of the facts of one family."""
    return pa.schema([*FACT_FIELDS, pa.field(payload_column(family), pa.struct(list(payload)))])


def documents(
    *,
    family: str,
    key: pa.Array,
    version: Sequence[pa.Array],
    is_deleted: pa.Array,
    payload: pa.StructArray,
    content_hash: pa.Array | None = None,
) -> pa.Table:
    """Facts of one family of documents from whole columns: what a transform of Arrow tables ends with.

    ``key`` is text or bytes and the identity, ``version`` one to four columns of integers, ``payload`` structs that are
    left out of tombstones. Identities and their hashes agree with ``frame`` byte for byte. ``content_hash`` is the
    payload's, where none is given.
    """
    count = len(key)
    keys = key.cast(pa.binary()).to_pylist()
    head = identity_bytes([family.encode(), b""])[:-4]
    identities = [head + len(one).to_bytes(4, "big") + one for one in keys]
    zeros = pa.array(np.zeros(count, np.int64))
    padded = [*version, *[zeros] * (4 - len(version))]
    columns = {
        "identity": pa.array(identities, pa.binary()),
        "identity_hash": pa.array([hash_bytes(one) for one in identities], pa.binary()),
        "family": pa.array([family] * count, pa.string()),
        **dict(zip(VERSION_COLUMNS, padded, strict=True)),
        "is_deleted": is_deleted,
        "content_hash": pa.array(content_hashes(payload)) if content_hash is None else content_hash,
        "key": pa.array(keys, pa.binary()),
        "key_hash": pa.array([hash_bytes(one) for one in keys], pa.binary()),
        "id": pa.array([b""] * count, pa.binary()),
        "time_ms": zeros,
        "amounts": pa.array([[]] * count, pa.list_(pa.int64())),
        payload_column(family): pc.if_else(is_deleted, pa.scalar(None, payload.type), payload),
    }
    return pa.table(columns, schema=family_schema(family, pa.schema(list(payload.type))))


_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's
_NULL, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0x9E3779B97F4A7C15)


def content_hashes(values: pa.Array) -> np.ndarray:
    """A hash of each value, int64[n], the same for the same value wherever it is computed; structs, lists and null too.

    Columns are mixed as wholes with the finaliser of splitmix64 (Steele, Lea, Flood 2014); of a text or bytes the first
    8 bytes of its SHA-256 count.
    """
    return _hashed_values(values).view(np.int64)


def _hashed_values(values: pa.Array) -> np.ndarray:
    kind = values.type
    if pa.types.is_struct(kind):
        found = np.zeros(len(values), np.uint64)
        for part in values.flatten():
            found = _mixed(found * _MIX[0] + _STEP + _hashed_values(part))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        found = _hashed_lists(values)
    elif pa.types.is_null(kind):
        found = np.zeros(len(values), np.uint64)
    elif pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        found = _mixed(_bits(values))
    else:
        encoded = values.dictionary_encode()
        texts = encoded.dictionary.cast(pa.binary()).to_pylist()
        digests = b"".join(hashlib.sha256(text).digest()[:8] for text in texts)
        by_text = np.append(np.frombuffer(digests, ">u8").astype(np.uint64), _NULL)
        found = by_text[pc.fill_null(encoded.indices.cast(pa.int64()), len(texts)).to_numpy()]
    is_null = pc.is_null(values).to_numpy(zero_copy_only=False)
    return np.where(is_null, _NULL, found)


def _bits(values: pa.Array) -> np.ndarray:
    """The 64 bits of each number; 0.0 and -0.0 are one value."""
    if pa.types.is_floating(values.type):
        numbers = pc.fill_null(values.cast(pa.float64()), 0.0).to_numpy() + 0.0
        return np.ascontiguousarray(numbers).view(np.uint64)
    return pc.fill_null(values.cast(pa.int64()), 0).to_numpy().view(np.uint64)


def _hashed_lists(values: pa.ListArray) -> np.ndarray:
    """Of each list: its length, and its items, each mixed with its place."""
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)
    items = _hashed_values(pc.list_flatten(values))
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(items)) - np.repeat(starts, lengths)
    summed = np.concatenate([[0], np.cumsum(_mixed(items + place.astype(np.uint64) * _STEP))]).astype(
        np.uint64
    )
    return _mixed(summed[starts + lengths] - summed[starts] + lengths.astype(np.uint64) * _MIX[1])


def _mixed(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


def _quoted(text: str) -> str:
    """Text as a literal of Spark SQL."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _part(expression: str) -> str:
    """`identity_bytes` of one part, in Spark SQL."""
    data = f"cast({expression} AS binary)"
    return f"unhex(lpad(hex(octet_length({data})), 8, '0')), {data}"


def _hashed(expression: str) -> str:
    """`hash_bytes`, in Spark SQL."""
    return f"substring(unhex(sha2({expression}, 256)), 1, 16)"
