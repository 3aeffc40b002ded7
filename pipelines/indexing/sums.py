"""Base and overlay read as one: sums by key and time bucket.

Belongs here: the overlay's runs of sums, folding facts into them, and the view. A fact that changes an identity takes
back, from the old key and bucket, exactly what stood for it, and adds what stands now; so a run holds the rank and
contribution of the identities it changed, and signed adjustments by key and bucket. Documents and timelines are
``rows``'; runs are kept and merged in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from pipelines.errors import TidemarkError
from pipelines.indexing import facts as fact
from pipelines.indexing.base import Base, SumsShard
from pipelines.indexing.build import SumOverflow, amounts_matrix, contributing, run_starts, try_sum_runs
from pipelines.indexing.facts import Hashes, hash_keys, hashes
from pipelines.indexing.merge import Ranks, greater, merge, ranks
from pipelines.indexing.position import Position
from pipelines.indexing.spec import Sums

INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)


class WindowTooEarly(TidemarkError):
    """A window begins before the horizon, where sums are no longer known."""


class Contributions(NamedTuple):
    """What identities add: ``keys`` (hashes), ``bucket_ms`` int64[n], ``amounts`` int64[n, a]; none where
    ``is_counted`` is False."""

    keys: Hashes
    bucket_ms: np.ndarray
    amounts: np.ndarray
    is_counted: np.ndarray

    def take(self, rows: np.ndarray) -> Contributions:
        """The contributions of these rows."""
        return Contributions(
            self.keys.take(rows), self.bucket_ms[rows], self.amounts[rows], self.is_counted[rows]
        )


class Adjustments(NamedTuple):
    """Signed sums by (key, bucket), sorted by key hash and bucket; ``key`` is null where only a base knows it.

    A (key, bucket) has one row, or several where their sum does not fit into 64 bits: folding never fails, and a later
    fact may bring the sum back into range. Whoever reads it adds up exactly.
    """

    keys: Hashes
    key: pa.Array
    bucket_ms: np.ndarray
    amounts: np.ndarray


class Run(NamedTuple):
    """An immutable, merged piece of an overlay of sums; identities are sorted by look-up hash."""

    identities: Hashes
    ranks: Ranks
    contributions: Contributions
    adjustments: Adjustments

    def __len__(self) -> int:
        return len(self.identities.lookup)


class SumsView:
    """Sums by key and bucket, of an immutable pair of base and runs."""

    def __init__(self, base: Base, position: Position | None = None, runs: tuple[Run, ...] = ()) -> None:
        assert isinstance(base.spec.read, Sums)
        self.spec = base.spec
        self.base = base
        self.runs = runs
        self.position = base.cut if position is None else position
        self._read: Sums = base.spec.read

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
        runs = _fold(self.base, self.runs, facts) if facts.num_rows else self.runs
        return type(self)(self.base, self.position.merge(position), runs)

    def held_by(self, identities: Hashes) -> Hashes:
        """The keys that identities count for now; those of identities that count for none are left out."""
        held = _base_contributions(self.base, identities, len(self._read.amounts))
        for run in self.runs:
            at = fact.find(run.identities, identities)
            hit = np.flatnonzero(at >= 0)
            for mine, theirs in zip(_arrays(held), _arrays(run.contributions), strict=True):
                mine[hit] = theirs[at[hit]]
        return held.keys.take(np.flatnonzero(held.is_counted))

    def sums(
        self, key: bytes, from_ms: int | None = None, to_ms: int | None = None
    ) -> dict[int, tuple[int, ...]]:
        """The sums of a key: bucket start (ms) → amounts, ascending; buckets of only zeros are left out.

        Buckets count that begin in [from_ms, to_ms); None: no bound.

        Raises:
            WindowTooEarly: ``from_ms`` lies before the horizon.
            SumOverflow: a sum leaves the range of int64.
        """
        self._check_window(from_ms)
        hashed = hash_keys([key])
        total: dict[int, list[int]] = {}
        for shard, _, at in _keys(self.base, hashed):
            rows = np.arange(shard.starts[at[0]], shard.ends[at[0]])
            rows = rows[_inside(shard.bucket_ms[rows], from_ms, to_ms)]
            _add(total, shard.bucket_ms[rows], _dense(shard.amounts, rows))
        for run in self.runs:
            adjusted = run.adjustments
            left = np.searchsorted(adjusted.keys.lookup, hashed.lookup[0], side="left")
            right = np.searchsorted(adjusted.keys.lookup, hashed.lookup[0], side="right")
            rows = left + np.flatnonzero(adjusted.keys.check[left:right] == hashed.check[0])
            rows = rows[_inside(adjusted.bucket_ms[rows], from_ms, to_ms)]
            _add(total, adjusted.bucket_ms[rows], adjusted.amounts[rows])
        return {bucket: _checked(total[bucket]) for bucket in sorted(total) if any(total[bucket])}

    def top(
        self, weights: Sequence[int], k: int, from_ms: int | None = None, to_ms: int | None = None
    ) -> list[tuple[bytes, int]]:
        """The ``k`` keys of greatest weighted sum in [from_ms, to_ms), if it is above 0; ties by key.

        Args:
            weights: One for each amount.
        """
        self._check_window(from_ms)
        adjusted = self._adjusted_totals(np.asarray(weights, np.int64), from_ms, to_ms)
        found: list[tuple[bytes, int]] = []
        for shard in self.base.shards:
            totals = _shard_totals(shard, tuple(weights), from_ms, to_ms)
            if id(shard) in adjusted.base:
                ordinals, changes = adjusted.base[id(shard)]
                totals = totals.copy()
                totals[ordinals] = _fitting(_exact([totals[ordinals]])[0] + changes)
            chosen = _greatest(totals, k)
            found += zip(shard.key_bytes.take(chosen).to_pylist(), totals[chosen].tolist(), strict=True)
        new = _fitting(adjusted.new_totals)
        chosen = _greatest(new, k)
        found += zip(adjusted.new_keys.take(chosen).to_pylist(), new[chosen].tolist(), strict=True)
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]

    @property
    def latest_bucket_ms(self) -> int | None:
        """The start of the newest bucket in which something stands or stood; None where there is none."""
        newest = [_latest(shard) for shard in self.base.shards if len(shard.bucket_ms)]
        newest += [
            int(run.adjustments.bucket_ms.max()) for run in self.runs if len(run.adjustments.bucket_ms)
        ]
        return max(newest, default=None)

    def _check_window(self, from_ms: int | None) -> None:
        horizon = self.base.horizon_from_ms
        if horizon is not None and (from_ms is None or from_ms < horizon):
            raise WindowTooEarly(
                f"the window begins before the horizon of {self.spec.name!r}, at {horizon} ms",
                remedy=f"begin at {horizon} ms or later",
            )

    def _adjusted_totals(self, weight: np.ndarray, from_ms: int | None, to_ms: int | None) -> _Adjusted:
        inside = [
            (run.adjustments, np.flatnonzero(_inside(run.adjustments.bucket_ms, from_ms, to_ms)))
            for run in self.runs
        ]
        if not any(len(rows) for _, rows in inside):
            return _Adjusted({}, pa.array([], pa.large_binary()), np.empty(0, np.int64))
        lookup = np.concatenate([a.keys.lookup[rows] for a, rows in inside])
        check = np.concatenate([a.keys.check[rows] for a, rows in inside])
        key = pa.concat_arrays([a.key.take(pa.array(rows)) for a, rows in inside])
        totals = np.concatenate(_exact([_weighted(a.amounts[rows], weight) for a, rows in inside]))
        is_unnamed = key.is_null().to_numpy(zero_copy_only=False)
        order = np.lexsort((is_unnamed, check, lookup))
        starts = run_starts(lookup[order], check[order])
        summed = np.add.reduceat(totals[order], starts)
        hashed, key = Hashes(lookup, check).take(order[starts]), key.take(pa.array(order[starts]))
        is_new = ~is_unnamed[order[starts]]
        base = {}
        for shard, queries, at in _keys(self.base, hashed):
            base[id(shard)] = (at, summed[queries])
            is_new[queries] = False
        new = np.flatnonzero(is_new)
        return _Adjusted(base, key.take(pa.array(new)), summed[new])


class _Adjusted(NamedTuple):
    """What the overlay adds to weighted totals: by shard to known keys (ordinals, changes), and keys that are new."""

    base: dict[int, tuple[np.ndarray, np.ndarray]]
    new_keys: pa.Array
    new_totals: np.ndarray


def _greatest(totals: np.ndarray, k: int) -> np.ndarray:
    """The places of the ``k`` greatest positive totals, and of every one that ties with the last of them."""
    chosen = np.flatnonzero(totals > 0)
    if len(chosen) > k:
        least = np.partition(totals[chosen], len(chosen) - k)[len(chosen) - k]
        chosen = chosen[totals[chosen] >= least]
    return chosen


def _fitting(totals: np.ndarray) -> np.ndarray:
    """Exact totals as int64; raises ``SumOverflow`` where one does not fit."""
    if totals.dtype != object:
        return totals
    return np.array([_checked([total])[0] for total in totals], np.int64)


def _fold(base: Base, runs: tuple[Run, ...], facts: pa.Table) -> tuple[Run, ...]:
    read = base.spec.read
    assert isinstance(read, Sums)
    facts = merge(fact.conform(facts, base.spec))
    identities, ranked = hashes(facts.column("identity_hash")), ranks(facts)
    buckets = facts.column("time_ms").to_numpy() // read.width_ms * read.width_ms
    now = Contributions(
        hashes(facts.column("key_hash")),
        buckets,
        amounts_matrix(facts, len(read.amounts)),
        contributing(facts, buckets, base.horizon_from_ms),
    )
    known = base.identities(identities, identities)
    keep = ~known.is_known | greater(ranked, known.ranks)
    before = _base_contributions(base, identities, len(read.amounts))
    for run in runs:  # oldest first: what a newer run says of an identity replaces what older ones say
        at = fact.find(run.identities, identities)
        hit = np.flatnonzero(at >= 0)
        keep[hit] &= greater(ranked.take(hit), run.ranks.take(at[hit]))
        for mine, theirs in zip(_arrays(before), _arrays(run.contributions), strict=True):
            mine[hit] = theirs[at[hit]]
    rows = np.flatnonzero(keep)
    if not len(rows):
        return runs
    added, taken = now.take(rows), before.take(rows)
    key = facts.column("key").take(rows).combine_chunks()
    adjustments = _adjustments(added, key, taken)
    return _compact((*runs, Run(identities.take(rows), ranked.take(rows), added, adjustments)))


def _arrays(c: Contributions) -> tuple[np.ndarray, ...]:
    return (c.keys.lookup, c.keys.check, c.bucket_ms, c.amounts, c.is_counted)


def _base_contributions(base: Base, identities: Hashes, amount_count: int) -> Contributions:
    n = len(identities.lookup)
    found = Contributions(
        Hashes(np.zeros(n, np.uint64), np.zeros(n, np.uint64)),
        np.zeros(n, np.int64),
        np.zeros((n, amount_count), np.int64),
        np.zeros(n, bool),
    )
    for shard, queries, at in base.locate(identities, identities):
        found.keys.lookup[queries] = shard.contributed.lookup[at]
        found.keys.check[queries] = shard.contributed.check[at]
        found.bucket_ms[queries] = shard.contributed_bucket_ms[at]
        found.amounts[queries] = _dense(shard.contributed_amounts, at)
        found.is_counted[queries] = shard.identities.row[at] >= 0
    return found


def _adjustments(added: Contributions, key: pa.Array, taken: Contributions) -> Adjustments:
    plus, minus = np.flatnonzero(added.is_counted), np.flatnonzero(taken.is_counted)
    up, down = added.take(plus), taken.take(minus)
    return _grouped(
        Hashes(
            np.concatenate([up.keys.lookup, down.keys.lookup]),
            np.concatenate([up.keys.check, down.keys.check]),
        ),
        pa.concat_arrays([key.take(plus).cast(pa.large_binary()), pa.nulls(len(minus), pa.large_binary())]),
        np.concatenate([up.bucket_ms, down.bucket_ms]),
        np.concatenate([up.amounts, -down.amounts]),
    )


def _grouped(keys: Hashes, key: pa.Array, bucket_ms: np.ndarray, amounts: np.ndarray) -> Adjustments:
    """Adjustments added up by (key, bucket); of a group's names a given one is kept."""
    is_unnamed = key.is_null().to_numpy(zero_copy_only=False)
    order = np.lexsort((is_unnamed, bucket_ms, keys.check, keys.lookup))
    keys, bucket_ms = keys.take(order), bucket_ms[order]
    amounts = amounts[order]
    starts = run_starts(keys.lookup, keys.check, bucket_ms)
    summed, is_overflow = try_sum_runs(amounts, starts)
    if is_overflow.any():
        lengths = np.diff(np.append(starts, len(amounts)))
        apart = np.flatnonzero(np.repeat(is_overflow, lengths))
        rows = np.concatenate([starts[~is_overflow], apart])
        summed = np.concatenate([summed[~is_overflow], amounts[apart]])
        by_key = np.argsort(rows, kind="stable")
        starts, summed = rows[by_key], summed[by_key]
    return Adjustments(keys.take(starts), key.take(pa.array(order[starts])), bucket_ms[starts], summed)


def _compact(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    while len(runs) >= 2 and 2 * len(runs[-1]) >= len(runs[-2]):
        runs = (*runs[:-2], _merged(*runs[-2:]))
    return runs


def _merged(older: Run, newer: Run) -> Run:
    is_superseded = np.zeros(len(older), bool)
    at = fact.find(older.identities, newer.identities)
    is_superseded[at[at >= 0]] = True
    rest = np.flatnonzero(~is_superseded)
    lookup = np.concatenate([older.identities.lookup[rest], newer.identities.lookup])
    order = np.argsort(lookup, kind="stable")

    def both(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return np.concatenate([mine[rest], theirs])[order]

    def hashed(mine: Hashes, theirs: Hashes) -> Hashes:
        return Hashes(both(mine.lookup, theirs.lookup), both(mine.check, theirs.check))

    old, new = older.contributions, newer.contributions
    a, b = older.adjustments, newer.adjustments
    return Run(
        hashed(older.identities, newer.identities),
        Ranks(*(both(mine, theirs) for mine, theirs in zip(older.ranks, newer.ranks, strict=True))),
        Contributions(
            hashed(old.keys, new.keys),
            both(old.bucket_ms, new.bucket_ms),
            both(old.amounts, new.amounts),
            both(old.is_counted, new.is_counted),
        ),
        _grouped(
            Hashes(
                np.concatenate([a.keys.lookup, b.keys.lookup]), np.concatenate([a.keys.check, b.keys.check])
            ),
            pa.concat_arrays([a.key, b.key]),
            np.concatenate([a.bucket_ms, b.bucket_ms]),
            np.concatenate([a.amounts, b.amounts]),
        ),
    )


def _keys(base: Base, hashed: Hashes) -> list[tuple[SumsShard, np.ndarray, np.ndarray]]:
    located = []
    for shard, queries in base.split(hashed):
        at = fact.find(shard.keys, hashed.take(queries))
        hit = at >= 0
        if hit.any():
            located.append((shard, queries[hit], at[hit]))
    return located


def _dense(columns: list[np.ndarray | None], rows: np.ndarray) -> np.ndarray:
    matrix = np.zeros((len(rows), len(columns)), np.int64)
    for i, column in enumerate(columns):
        if column is not None:
            matrix[:, i] = column[rows]
    return matrix


def _inside(bucket_ms: np.ndarray, from_ms: int | None, to_ms: int | None) -> np.ndarray:
    inside = np.ones(len(bucket_ms), bool)
    if from_ms is not None:
        inside &= bucket_ms >= from_ms
    if to_ms is not None:
        inside &= bucket_ms < to_ms
    return inside


def _add(total: dict[int, list[int]], buckets: np.ndarray, amounts: np.ndarray) -> None:
    for bucket, row in zip(buckets.tolist(), amounts.tolist(), strict=True):
        total[bucket] = [a + b for a, b in zip(total[bucket], row, strict=True)] if bucket in total else row


def _checked(amounts: list[int]) -> tuple[int, ...]:
    if not all(INT64_MIN <= amount <= INT64_MAX for amount in amounts):
        raise SumOverflow("a sum does not fit into 64 bits", remedy="ask for a narrower window")
    return tuple(amounts)


def _weighted(amounts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted sum of each row: int64 where even the sum of all rows fits, exact Python integers otherwise."""
    bound = float(
        np.abs(amounts.astype(np.float64)) @ np.abs(weights.astype(np.float64)) @ np.ones(len(amounts))
    )
    if bound < 2.0**62:
        return amounts @ weights
    return amounts.astype(object) @ weights.astype(object)


def _exact(parts: list[np.ndarray]) -> list[np.ndarray]:
    """The same totals, as Python integers where adding up many of them could leave the range of int64."""
    if any(part.dtype == object for part in parts):
        return [part.astype(object) for part in parts]
    is_small = sum(float(np.abs(part.astype(np.float64)).sum()) for part in parts) < 2.0**61
    return parts if is_small else [part.astype(object) for part in parts]


def _latest(shard: SumsShard) -> int:
    cache = shard.__dict__.setdefault("_cache", {})
    if "latest" not in cache:
        cache["latest"] = int(shard.bucket_ms.max())
    return cache["latest"]


def _shard_totals(
    shard: SumsShard, weights: tuple[int, ...], from_ms: int | None, to_ms: int | None
) -> np.ndarray:
    """The weighted sum of each key in a window, int64[keys]; the last few windows are kept with the shard."""
    cache = shard.__dict__.setdefault("_totals", {})
    wanted = (weights, from_ms, to_ms)
    if wanted not in cache:
        inside = np.flatnonzero(_inside(shard.bucket_ms, from_ms, to_ms))
        totals = np.zeros(len(shard.starts), np.int64)
        if len(inside):
            key_of = np.searchsorted(shard.starts, inside, side="right") - 1
            weighted = _weighted(_dense(shard.amounts, inside), np.array(weights, np.int64))
            starts = run_starts(key_of)
            summed = np.add.reduceat(weighted, starts)
            totals[key_of[starts]] = (
                [_checked([total])[0] for total in summed] if summed.dtype == object else summed
            )
        while len(cache) >= 16:
            cache.pop(next(iter(cache)), None)
        cache[wanted] = totals
    return cache[wanted]
