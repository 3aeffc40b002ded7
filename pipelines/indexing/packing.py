"""How a base keeps the columns of its timelines: texts that repeat once, ids that are UUIDs in 16 bytes.

Belongs here: packing a column when a shard is written, and giving rows of it as they were. What a row says is the same
either way; which form a column has, its Arrow type says, so that bases of before are read as they are.

A timeline is far longer than a document is wide: of a hundred million events each byte is a tenth of a gigabyte of
pages. Most columns of events repeat few values (actions, surfaces, campaigns) or say nothing, and an offset of 8 bytes
costs more than the text.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

REPEATS = 4
"""A text column is kept as a dictionary where each text is there so often on average."""
UUID_BYTES = pa.binary(16)
_IS_UUID = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
_UUID_TEXT_BYTES = 36
_DIGITS = np.array([at for at in range(_UUID_TEXT_BYTES) if at not in (8, 13, 18, 23)])
_HEXADECIMAL = np.array([list(b"%02x" % byte) for byte in range(256)], np.uint8)


def packed(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A payload column, its texts once each and a number for every row, where that is smaller."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = whole.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return whole
    encoded = pc.dictionary_encode(whole)
    if REPEATS * len(encoded.dictionary) > len(whole) - whole.null_count:
        return whole
    indices = encoded.indices.cast(_narrowest(len(encoded.dictionary)))
    return pa.DictionaryArray.from_arrays(indices, encoded.dictionary.cast(pa.large_string()))


def _narrowest(values: int) -> pa.DataType:
    if values <= 2**7:
        return pa.int8()
    return pa.int16() if values <= 2**15 else pa.int32()


def packed_ids(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Ids in 16 bytes each where all of them are UUIDs as they are usually written; else as they are.

    The order of the bytes is that of the texts.
    """
    whole = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    lengths = pc.binary_length(whole)
    if not len(whole) or pc.min_max(lengths).as_py() != {"min": _UUID_TEXT_BYTES, "max": _UUID_TEXT_BYTES}:
        return whole
    try:
        texts = whole.cast(pa.large_string())
    except pa.ArrowInvalid:  # not UTF-8
        return whole
    if not pc.all(pc.match_substring_regex(texts, _IS_UUID)).as_py():
        return whole
    digits = "".join(pc.replace_substring(texts, "-", "").to_pylist())
    return pa.FixedSizeBinaryArray.from_buffers(
        UUID_BYTES, len(whole), [None, pa.py_buffer(bytes.fromhex(digits))]
    )


def taken(column: pa.Array, rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Rows of a column, packed or not, as values of a type."""
    found = column.take(pa.array(rows))
    if pa.types.is_dictionary(found.type):
        found = found.dictionary_decode()
    elif found.type == UUID_BYTES and kind != UUID_BYTES:
        found = _written(found)
    return found if found.type == kind else found.cast(kind)


def _written(ids: pa.FixedSizeBinaryArray) -> pa.Array:
    """UUIDs as they are usually written, all at once."""
    words = np.frombuffer(ids.buffers()[1], np.uint8)[16 * ids.offset : 16 * (ids.offset + len(ids))]
    texts = np.full((len(ids), _UUID_TEXT_BYTES), ord("-"), np.uint8)
    texts[:, _DIGITS] = _HEXADECIMAL[words].reshape(len(ids), 32)
    ends = np.arange(len(ids) + 1, dtype=np.int32) * _UUID_TEXT_BYTES
    return pa.Array.from_buffers(pa.binary(), len(ids), [None, pa.py_buffer(ends), pa.py_buffer(texts)])


def value_type(column: pa.Array) -> pa.DataType:
    """The type of a column's values, packed or not."""
    return column.type.value_type if pa.types.is_dictionary(column.type) else column.type
