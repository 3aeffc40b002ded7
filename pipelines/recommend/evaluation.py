"""How good recommendations are: what a user did last, hidden from the model, against what it would have answered.

Belongs here: the split of a user's events, and the measures. The user's vector is folded in by the code that serving
runs (`fold_in`), so that what is measured is what is served. Does not belong here: training (`als`).

A user's last visit is the test: the purchases within an hour of the user's newest purchase. The targets are the pins in
it that the user had not bought before, because serving does not recommend what was bought.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.recommend import fold_in

VISIT_MS = 3_600_000


class Case(NamedTuple):
    """A user's history, newest first, and the pins that came after it."""

    pins: pa.Array
    actions: pa.Array
    times_ms: np.ndarray
    targets: frozenset[bytes]


def recall_at(found: Sequence[bytes], targets: Collection[bytes], k: int) -> float:
    """The share of the targets among the first ``k``, where at most ``k`` could be."""
    return sum(pin in targets for pin in found[:k]) / min(k, len(targets))


def ndcg_at(found: Sequence[bytes], targets: Collection[bytes], k: int) -> float:
    """The discounted gain of the first ``k``, as a share of the greatest that there could be."""
    gain = sum(1 / np.log2(place + 2) for place, pin in enumerate(found[:k]) if pin in targets)
    return float(gain / sum(1 / np.log2(place + 2) for place in range(min(k, len(targets)))))


def cases(events: pa.Table) -> list[Case]:
    """One case for each user that has a history and a visit with pins that are new to the user.

    Args:
        events: user_id, pin_id, action, time_ms (int64), in any order.
    """
    ordered = events.sort_by([("user_id", "ascending"), ("time_ms", "descending"), ("pin_id", "ascending")])
    users = ordered.column("user_id").combine_chunks()
    if not len(users):
        return []
    runs = pc.run_end_encode(users).run_ends.to_numpy()
    pins = ordered.column("pin_id").combine_chunks().cast(pa.binary())
    actions = ordered.column("action").combine_chunks()
    times = ordered.column("time_ms").to_numpy()
    is_purchase = pc.equal(actions, fold_in.PURCHASE).to_numpy(zero_copy_only=False)
    found = (
        _case(pins[start:end], actions[start:end], times[start:end], is_purchase[start:end])
        for start, end in zip([0, *runs[:-1].tolist()], runs.tolist(), strict=True)
    )
    return [case for case in found if case is not None]


def visit_start_ms(newest_purchase_ms: int) -> int:
    """When a user's last visit begins."""
    return newest_purchase_ms - VISIT_MS


def _case(pins: pa.Array, actions: pa.Array, times: np.ndarray, is_purchase: np.ndarray) -> Case | None:
    if not is_purchase.any():
        return None
    start = visit_start_ms(int(times[is_purchase].max()))
    before = times < start
    if not before.any():
        return None
    later = set(pins.filter(pa.array(is_purchase & ~before)).to_pylist())
    targets = later - set(pins.filter(pa.array(is_purchase & before)).to_pylist())
    if not targets:
        return None
    history = pa.array(before)
    return Case(pins.filter(history), actions.filter(history), times[before], frozenset(targets))


class Catalogue:
    """Item vectors by pin, for evaluation in one process."""

    def __init__(self, pins: Iterable[bytes], vectors: np.ndarray) -> None:
        self.pins = list(pins)
        self.vectors = vectors
        self._row: Mapping[bytes, int] = {pin: row for row, pin in enumerate(self.pins)}

    def rows(self, pins: Iterable[bytes]) -> np.ndarray:
        """The rows of pins; -1 where a pin has no vector."""
        return np.array([self._row.get(pin, -1) for pin in pins], np.int64)

    def best(self, user: np.ndarray, settled: Collection[bytes], k: int) -> list[bytes]:
        """The first ``k`` pins for a user's vector, as serving ranks them."""
        scores = self.vectors.astype(np.float32) @ user.astype(np.float32)
        hidden = self.rows(settled)
        scores[hidden[hidden >= 0]] = -np.inf
        near = np.argpartition(-scores, min(2 * k, len(scores) - 1))[: 2 * k]
        exact = self.vectors[near].astype(np.float64) @ user
        exact[np.isneginf(scores[near])] = -np.inf
        return [
            pin for pin, score in fold_in.ranked([self.pins[i] for i in near], exact, k) if score > -np.inf
        ]


def evaluate(
    tests: Sequence[Case], catalogue: Catalogue, parameters: fold_in.Parameters, k: int = 10
) -> dict[str, float]:
    """Fold each case's history in, recommend, and measure.

    Returns:
        `users`, `recall_at_<k>`, `ndcg_at_<k>` (means over the users; a user without a vector counts 0) and
        `coverage_at_<k>`: the share of pins with a vector that somebody is shown.
    """
    recalls, gains, shown = [], [], set[bytes]()
    for case in tests:
        found = recommend(case, catalogue, parameters, k)
        recalls.append(recall_at(found, case.targets, k))
        gains.append(ndcg_at(found, case.targets, k))
        shown.update(found)
    return {
        "users": float(len(tests)),
        f"recall_at_{k}": float(np.mean(recalls)) if recalls else 0.0,
        f"ndcg_at_{k}": float(np.mean(gains)) if gains else 0.0,
        f"coverage_at_{k}": len(shown) / max(len(catalogue.pins), 1),
    }


def recommend(case: Case, catalogue: Catalogue, parameters: fold_in.Parameters, k: int) -> list[bytes]:
    """What would have been recommended after a case's history; nothing if no event has a vector."""
    told = fold_in.interests(case.pins, case.actions, case.times_ms, parameters)
    rows = catalogue.rows(told.pins)
    has = rows >= 0
    user = fold_in.solve(catalogue.vectors[rows[has]], told.strengths[has], parameters)
    return [] if user is None else catalogue.best(user, told.settled, k)
