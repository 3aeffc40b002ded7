"""A user's vector against an independent dense solve, and the rules around it."""

from __future__ import annotations

import json
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.recommend import evaluation, fold_in

HOUR_MS = 3_600_000
ACTIONS = ["purchase", "save", "click", "view", "hide", "sing"]


def parameters(vectors: np.ndarray, **changes: object) -> fold_in.Parameters:
    return fold_in.Parameters("pin_als/1", fold_in.gram_of(vectors), **changes)  # type: ignore[arg-type]


def dense_solve(vectors: np.ndarray, strength_of_pin: dict[int, float], p: fold_in.Parameters) -> np.ndarray:
    """The textbook: (YᵀCY + λI) x = YᵀC p over *all* items, with C and p written out."""
    wide = vectors.astype(np.float64)
    confidence, preference = np.ones(len(wide)), np.zeros(len(wide))
    for pin, strength in strength_of_pin.items():
        confidence[pin] = 1 + p.alpha * abs(strength)
        preference[pin] = float(strength > 0)
    left = wide.T @ np.diag(confidence) @ wide + p.regularization * np.eye(wide.shape[1])
    return np.linalg.inv(left) @ wide.T @ (confidence * preference)


def folded(
    vectors: np.ndarray, events: list[tuple[int, str, int]], p: fold_in.Parameters
) -> tuple[fold_in.Interests, np.ndarray | None]:
    pins = pa.array([str(pin) for pin, _, _ in events], pa.string())
    actions = pa.array([action for _, action, _ in events], pa.string())
    told = fold_in.interests(pins, actions, np.array([t for _, _, t in events], np.int64), p)
    return told, fold_in.solve(vectors[[int(pin) for pin in told.pins]], told.strengths, p)


events_of_users = st.lists(
    st.tuples(st.integers(0, 39), st.sampled_from(ACTIONS), st.integers(0, 4 * 10**12)),
    min_size=1,
    max_size=60,
).map(lambda events: sorted(events, key=lambda event: -event[2]))


@settings(deadline=None)
@given(events=events_of_users, seed=st.integers(0, 2**32 - 1), cap=st.integers(1, 80))
def test_is_the_dense_solve(events: list[tuple[int, str, int]], seed: int, cap: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(40, 8)).astype(np.float32)
    p = parameters(vectors, max_events=cap)
    told, solved = folded(vectors, events, p)
    strength: dict[int, float] = {}
    telling = [event for event in events if event[1] != "sing"]
    for pin, action, at in telling[:cap]:
        recency = p.floor + (1 - p.floor) * 0.5 ** ((telling[0][2] - at) / p.half_life_ms)
        strength[pin] = strength.get(pin, 0.0) + p.actions[action] * recency
    assert told.event_count == min(cap, len(telling))
    if not any(value > 0 for value in strength.values()):
        assert solved is None
        return
    assert solved is not None
    np.testing.assert_allclose(solved, dense_solve(vectors, strength, p), rtol=1e-6, atol=1e-9)


@settings(deadline=None)
@given(events=events_of_users, seed=st.integers(0, 2**32 - 1))
def test_what_each_event_adds_to_a_score(events: list[tuple[int, str, int]], seed: int) -> None:
    """A pin adds what is left of the dense solve if the user had preferred nothing else, with the same confidence."""
    vectors = np.random.default_rng(seed).normal(size=(40, 8)).astype(np.float32)
    p = parameters(vectors)
    told, solved = folded(vectors, events, p)
    of_pins, asked = vectors[[int(pin) for pin in told.pins]], vectors[:7]
    found = fold_in.contributions(of_pins, told.strengths, p, asked)
    wide = vectors.astype(np.float64)
    confidence = np.ones(len(wide))
    for pin, strength in zip(told.pins, told.strengths, strict=True):
        confidence[int(pin)] += p.alpha * abs(strength)
    inverse = np.linalg.inv(wide.T @ np.diag(confidence) @ wide + p.regularization * np.eye(8))
    for place, (pin, strength) in enumerate(zip(told.pins, told.strengths, strict=True)):
        alone = confidence[int(pin)] * float(strength > 0) * inverse @ wide[int(pin)]
        assert found[:, place] == pytest.approx(asked.astype(np.float64) @ alone, rel=1e-6, abs=1e-9)
    if solved is not None:
        assert found.sum(axis=1) == pytest.approx(asked.astype(np.float64) @ solved, rel=1e-6, abs=1e-9)


def test_bought_and_hidden_pins_are_settled_over_all_events() -> None:
    vectors = np.eye(6, dtype=np.float32)
    events = [(0, "view", 9), (1, "hide", 8), (2, "purchase", 7), (3, "save", 6)]
    told, _ = folded(vectors, events, parameters(vectors, max_events=1))
    assert told.settled == {b"1", b"2"}
    assert told.pins == [b"0"]


def test_a_hidden_pin_is_held_against_its_kind() -> None:
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.float32)
    p = parameters(vectors)
    _, liked = folded(vectors, [(2, "purchase", 5), (0, "purchase", 4)], p)
    _, hidden = folded(vectors, [(0, "hide", 6), (2, "purchase", 5)], p)
    assert liked is not None and hidden is not None
    assert hidden @ vectors[1] < liked @ vectors[1]


def test_the_answer_does_not_depend_on_the_clock() -> None:
    vectors = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    events = [(i, "purchase", 10**12 - i * HOUR_MS) for i in range(9)]
    later = [(pin, action, at + 10**11) for pin, action, at in events]
    p = parameters(vectors)
    first, second = folded(vectors, events, p)[1], folded(vectors, later, p)[1]
    assert first is not None and second is not None
    np.testing.assert_array_equal(first, second)


def test_the_newest_event_leads_and_history_counts() -> None:
    vectors = np.eye(2, dtype=np.float32)
    p = parameters(vectors)
    _, both = folded(vectors, [(0, "purchase", 10**12), (1, "purchase", 10**12 - 1000 * HOUR_MS)], p)
    assert both is not None
    assert both[0] > both[1] > 0.1


def test_users_without_a_vector() -> None:
    vectors = np.eye(2, dtype=np.float32)
    p = parameters(vectors)
    assert folded(vectors, [(0, "hide", 5)], p)[1] is None
    assert fold_in.solve(np.empty((0, 2), np.float32), np.empty(0), p) is None
    assert (
        fold_in.interests(pa.array([], pa.string()), pa.array([], pa.string()), np.empty(0, np.int64), p).pins
        == []
    )


def test_chunks_and_dictionaries_are_read_alike() -> None:
    p = parameters(np.eye(2, dtype=np.float32))
    times = np.array([3, 2, 1], np.int64)
    plain = fold_in.interests(pa.array(["b", "a", "b"]), pa.array(["view"] * 3), times, p)
    chunked = pa.chunked_array([["b"], ["a", "b"]])
    encoded = pa.array(["view"] * 3).dictionary_encode()
    other = fold_in.interests(chunked, encoded, times, p)
    assert plain.pins == other.pins == [b"b", b"a"]
    np.testing.assert_array_equal(plain.strengths, other.strengths)


def test_equal_scores_are_ordered_by_id() -> None:
    keys = [b"b", b"a", b"c", "é".encode()]
    assert fold_in.ranked(keys, np.array([1.0, 1.0, 2.0, 1.0]), 3) == [(b"c", 2.0), (b"a", 1.0), (b"b", 1.0)]


def test_parameters_survive_a_manifest() -> None:
    p = parameters(np.random.default_rng(2).normal(size=(50, 32)).astype(np.float32))
    again = fold_in.from_json(json.loads(json.dumps(p.to_json())))
    np.testing.assert_array_equal(again.gram, p.gram)
    assert again._replace(gram=None) == p._replace(gram=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "broken",
    [
        {"gram": None},
        {"gram": [[1.0, 2.0]]},
        {"gram": [[float("nan")]]},
        {"lambda": 0},
        {"half_life_ms": "soon"},
        {"actions": 1},
    ],
)
def test_broken_parameters_are_refused(broken: dict[str, object]) -> None:
    good = parameters(np.eye(2, dtype=np.float32)).to_json()
    with pytest.raises(fold_in.BadParameters):
        fold_in.from_json(good | broken)
    with pytest.raises(fold_in.BadParameters):
        fold_in.from_json({key: value for key, value in good.items() if key not in broken})


def test_five_hundred_events_take_less_than_half_a_millisecond() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(300, 32)).astype(np.float32)
    p = parameters(vectors)
    pins, actions = pa.array([str(i) for i in rng.integers(0, 300, 500)]), pa.array(["purchase"] * 500)
    times = np.sort(rng.integers(0, 10**12, 500))[::-1].copy()

    def once() -> float:
        began = time.perf_counter()
        told = fold_in.interests(pins, actions, times, p)
        fold_in.solve(vectors[: len(told.pins)], told.strengths, p)
        return time.perf_counter() - began

    assert min(once() for _ in range(200)) < 0.0005


def test_measures() -> None:
    found, targets = [b"a", b"b", b"c"], {b"a", b"c", b"x"}
    assert evaluation.recall_at(found, targets, 3) == pytest.approx(2 / 3)
    assert evaluation.ndcg_at(found, targets, 3) == pytest.approx((1 + 0.5) / (1 + 1 / np.log2(3) + 0.5))
    assert evaluation.ndcg_at([b"x", b"a", b"c"], targets, 3) == pytest.approx(1.0)


def test_the_last_visit_is_the_test_and_only_new_pins_are_targets() -> None:
    table = pa.table(
        {
            "user_id": ["u", "u", "u", "u", "once", "views"],
            "pin_id": ["new", "old", "old", "seen", "p", "q"],
            "action": ["purchase", "purchase", "purchase", "view", "purchase", "view"],
            "time_ms": pa.array([10 * HOUR_MS, 10 * HOUR_MS - 5, HOUR_MS, 2 * HOUR_MS, 1, 1], pa.int64()),
        }
    )
    (case,) = evaluation.cases(table)
    assert case.targets == {b"new"}
    assert case.pins.to_pylist() == [b"seen", b"old"]
    assert evaluation.cases(table.slice(0, 0)) == []
