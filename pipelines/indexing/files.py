"""Arrow IPC files that are mapped into memory, and their checksums.

Belongs here: how a column gets to disk and back. What the columns mean is ``build``'s and ``base``'s.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.errors import TidemarkError


class BrokenArtifact(TidemarkError):
    """A file of a base is missing or is not what its manifest says."""


class FileEntry(NamedTuple):
    """What a manifest says of one file."""

    name: str
    size_bytes: int
    sha256: str


def write_columns(path: Path, columns: dict[str, Any]) -> None:
    """Write columns (Arrow or numpy) as one Arrow IPC file of one batch, uncompressed, so that it can be mapped."""
    table = pa.table({name: _large(column) for name, column in columns.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        batches = table.combine_chunks().to_batches()
        for batch in batches or [pa.RecordBatch.from_pylist([], schema=table.schema)]:
            writer.write_batch(batch)


def map_table(path: Path) -> pa.Table:
    """Map an Arrow IPC file; no byte is read until it is used.

    Raises:
        BrokenArtifact: the file is missing or no Arrow file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise BrokenArtifact(
            f"cannot map {path.name}: {error}", where=str(path), remedy="roll back, or build the base again"
        ) from error


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-width column without nulls as a numpy view on the mapping."""
    chunked = table.column(column)
    if chunked.num_chunks == 1:
        return chunked.chunk(0).to_numpy(zero_copy_only=True)
    return chunked.to_numpy()


def entry(path: Path) -> FileEntry:
    """Size and checksum of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(path.name, path.stat().st_size, digest)


def verify(directory: Path, expected: FileEntry) -> None:
    """Raise ``BrokenArtifact`` naming the file if it is missing, cut short or changed."""
    path = directory / expected.name
    if not path.exists():
        problem = "is missing"
    elif path.stat().st_size != expected.size_bytes:
        problem = f"has {path.stat().st_size} bytes, not {expected.size_bytes}"
    elif entry(path).sha256 != expected.sha256:
        problem = "does not have the checksum that its manifest gives"
    else:
        return
    raise BrokenArtifact(
        f"{directory.name}/{expected.name} {problem}",
        where=str(path),
        remedy="roll back to another version, or build the base again",
    )


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all: a temporary one beside it, synced, then an atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def large_type(kind: pa.DataType) -> pa.DataType:
    """The same type with 64-bit offsets, so that one batch may hold more than 2 GiB of text."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.large_list(large_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, large_type(f.type), f.nullable) for f in kind])
    return kind


def _large(column: Any) -> pa.ChunkedArray | pa.Array:
    array = column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column)
    kind = large_type(array.type)
    return array if array.type == kind else array.cast(kind)
