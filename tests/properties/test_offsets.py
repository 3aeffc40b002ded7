"""A set of offsets against Python's own."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quality import offsets

near_edges = st.integers(0, 70)


@given(st.lists(st.lists(near_edges, max_size=60), max_size=5), near_edges, near_edges)
def test_the_set_is_what_python_says(batches: list[list[int]], start: int, end: int) -> None:
    with mock.patch.object(offsets, "BLOCK", 16):  # so that blocks get full
        require_alike(batches, start, end)


def require_alike(batches: list[list[int]], start: int, end: int) -> None:
    held = offsets.Offsets()
    for batch in batches:
        held.add(np.array(batch, np.int64))
    counted = Counter(number for batch in batches for number in batch)
    assert held.rows == counted.total()
    assert held.repeats == counted.total() - len(counted)
    assert set(held.repeated) <= {number for number, count in counted.items() if count > 1}
    assert (held.first, held.end) == ((min(counted), max(counted) + 1) if counted else (0, 0))
    assert held.count(start, end) == sum(start <= number < end for number in counted)
    assert held.has(start) == (start in counted)
    missing = [n for low, high in held.gaps() for n in range(low, high)]
    assert set(missing) == set(range(held.first, held.end)) - set(counted)
    assert all(low < high for low, high in held.gaps())


def test_a_full_block_is_counted_like_any_other() -> None:
    held = offsets.Offsets()
    held.add(np.arange(10, 3 * offsets.BLOCK))
    held.add(np.array([offsets.BLOCK + 5, 3 * offsets.BLOCK + 7]))
    assert (held.repeats, held.repeated) == (1, [offsets.BLOCK + 5])
    assert held.gaps() == [(3 * offsets.BLOCK, 3 * offsets.BLOCK + 7)]
    assert held.count(0, 10**9) == 3 * offsets.BLOCK - 10 + 1
