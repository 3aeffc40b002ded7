"""When statements stood: at each moment, what one merge of all that was known by then gives."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.indexing.facts import Hashes
from pipelines.indexing.merge import FOREVER_MS, Ranks, stood, winners


@pytest.mark.parametrize("seed", range(200))
def test_what_stood_at_a_time_is_the_merge_of_what_was_known_by_then(seed: int) -> None:
    chosen = np.random.default_rng(seed)
    count = int(chosen.integers(0, 40))
    identities = Hashes(
        chosen.integers(0, 3, count).astype(np.uint64), chosen.integers(0, 2, count).astype(np.uint64)
    )
    versions = np.zeros((count, 4), np.int64)
    versions[:, 0] = chosen.integers(1, 4, count)
    ranked = Ranks(versions, chosen.random(count) < 0.3, chosen.integers(-1, 2, count))
    taken_ms = chosen.integers(0, 8, count)
    found = stood(identities, ranked, taken_ms)
    assert (found.from_ms < found.until_ms).all()
    for now_ms in (*range(-1, 9), FOREVER_MS - 1):
        known = np.flatnonzero(taken_ms <= now_ms)
        wanted = known[winners(identities.take(known), ranked.take(known))]
        standing = found.rows[(found.from_ms <= now_ms) & (now_ms < found.until_ms)]
        assert (taken_ms[standing] <= now_ms).all()
        assert sorted(said(identities, ranked, standing)) == sorted(said(identities, ranked, wanted))


def said(identities: Hashes, ranked: Ranks, rows: np.ndarray) -> list[tuple[int, ...]]:
    """Whose row each is, and its rank: rows of equal rank say the same."""
    columns = (*identities, *ranked.columns())
    return [tuple(int(column[row]) for column in columns) for row in rows]
