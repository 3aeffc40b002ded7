"""The one merge: of all facts with the same identity, the one of greatest rank stands.

rank = (version, is_deleted, content hash), compared in this order. Maximum is associative, commutative and
idempotent, so it does not matter how facts are split, in what order they come, or how often.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.indexing.facts import VERSION_COLUMNS, Hashes, hashes


class Ranks(NamedTuple):
    """Ranks as columns: ``versions`` int64[n, 4], ``is_deleted`` bool[n], ``content_hash`` int64[n]."""

    versions: np.ndarray
    is_deleted: np.ndarray
    content_hash: np.ndarray

    def take(self, rows: np.ndarray) -> Ranks:
        """The ranks of these rows."""
        return Ranks(self.versions[rows], self.is_deleted[rows], self.content_hash[rows])

    def columns(self) -> tuple[np.ndarray, ...]:
        """The compared columns, the most significant first."""
        return (*(self.versions[:, i] for i in range(4)), self.is_deleted, self.content_hash)


def ranks(facts: pa.Table) -> Ranks:
    """The ranks of a facts table."""
    versions = np.column_stack([facts.column(name).to_numpy() for name in VERSION_COLUMNS])
    return Ranks(
        versions.astype(np.int64, copy=False).reshape(-1, 4),
        facts.column("is_deleted").to_numpy().astype(bool),
        facts.column("content_hash").to_numpy(),
    )


def greater(left: Ranks, right: Ranks) -> np.ndarray:
    """Row by row, whether ``left`` outranks ``right``; bool[n]."""
    above = np.zeros(len(left.content_hash), bool)
    level = np.ones(len(left.content_hash), bool)
    for mine, other in zip(left.columns(), right.columns(), strict=True):
        above |= level & (mine > other)
        level &= mine == other
    return above


def winners(identities: Hashes, ranked: Ranks) -> np.ndarray:
    """The rows that stand: one for each identity, the one of greatest rank; int64, sorted by look-up hash.

    One argsort of the look-up hashes; only rows whose look-up hash repeats are sorted by check and rank.
    """
    order = np.argsort(identities.lookup, kind="stable")
    lookup = identities.lookup[order]
    same_as_previous = np.zeros(len(order) + 1, bool)
    same_as_previous[1:-1] = lookup[1:] == lookup[:-1]
    repeated = same_as_previous[:-1] | same_as_previous[1:]
    if not repeated.any():
        return order
    rows = order[repeated]
    sub = ranked.take(rows)
    check = identities.check[rows]
    nested = np.lexsort((*reversed(sub.columns()), check, identities.lookup[rows]))
    rows, check = rows[nested], check[nested]
    found = identities.lookup[rows]
    last = np.ones(len(rows), bool)
    last[:-1] = (found[1:] != found[:-1]) | (check[1:] != check[:-1])
    standing = np.concatenate([order[~repeated], rows[last]])
    return standing[np.argsort(identities.lookup[standing], kind="stable")]


class Stood(NamedTuple):
    """When rows stood, for those that ever did, m of them, sorted by identity and then by time.

    Attributes:
        rows: Which, int64[m].
        from_ms: Since when each was the greatest of its identity, int64[m].
        until_ms: When a greater one was there, int64[m]; `FOREVER_MS` for what stands now.
    """

    rows: np.ndarray
    from_ms: np.ndarray
    until_ms: np.ndarray


FOREVER_MS = 2**63 - 1


def stood(identities: Hashes, ranked: Ranks, taken_ms: np.ndarray) -> Stood:
    """When each row stood, if it is known since ``taken_ms``.

    At any time the rows that stand are the ``winners`` among those taken by then. Of rows of equal rank, which say the
    same, the one that was taken first stands for all.
    """
    columns = tuple(reversed(ranked.columns()))
    by_rank = np.lexsort(columns)
    ordinal = np.empty(len(by_rank), np.int64)  # in the order of ranks, equal ones alike
    ordinal[by_rank] = np.cumsum(_differ(*(column[by_rank] for column in columns)))
    order = np.lexsort((ordinal, taken_ms, identities.check, identities.lookup))
    identity = np.cumsum(_differ(identities.lookup[order], identities.check[order]))
    heights = identity * (len(order) + 1) + ordinal[order]  # those of another identity are out of reach
    highest = np.maximum.accumulate(heights)
    rises = np.ones(len(order), bool)
    rises[1:] = heights[1:] > highest[:-1]
    rows, identity = order[rises], identity[rises]
    from_ms = taken_ms[rows]
    until_ms = np.full(len(rows), FOREVER_MS)
    has_next = np.flatnonzero(identity[1:] == identity[:-1])
    until_ms[has_next] = from_ms[has_next + 1]
    lasted = from_ms < until_ms  # not so where a greater one was taken in the same millisecond
    return Stood(rows[lasted], from_ms[lasted], until_ms[lasted])


def _differ(*columns: np.ndarray) -> np.ndarray:
    """Which rows differ from the one before them, bool[n]; the first does."""
    found = np.zeros(len(columns[0]), bool)
    found[:1] = True
    for column in columns:
        found[1:] |= column[1:] != column[:-1]
    return found


def merge(facts: pa.Table) -> pa.Table:
    """The facts that stand, sorted by the look-up hash of their identity."""
    return facts.take(pa.array(winners(hashes(facts.column("identity_hash")), ranks(facts))))
