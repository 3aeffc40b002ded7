"""A user's history, read in two parts or at once, is the same to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import ACTIONS
from pipelines.recommend import fold_in

PINS = st.sampled_from([*[f"p{i}" for i in range(6)], None])
EVENT = st.tuples(PINS, st.sampled_from([*ACTIONS, "glance"]))


def read(
    events: list[tuple[str | None, str]], first_ms: int, parameters: fold_in.Parameters
) -> fold_in.History:
    """The history of events, newest first; the newest at ``first_ms``, each other a minute before the next."""
    times = first_ms - 60_000 * np.arange(len(events))
    pins, actions = (pa.array([event[i] for event in events], pa.string()) for i in (0, 1))
    return fold_in.history(pins, actions, times, parameters)


def plain(history: fold_in.History) -> list[Any]:
    return [list(column) for column in history]


@given(st.lists(EVENT, max_size=12), st.lists(EVENT, max_size=12), st.integers(1, 20))
def test_newer_events_before_older_ones(
    newer: list[tuple[str | None, str]], older: list[tuple[str | None, str]], max_events: int
) -> None:
    parameters = fold_in.Parameters("m", np.eye(2), max_events=max_events)
    whole = read([*newer, *older], 10**9, parameters)
    last = read(older, 10**9 - 60_000 * len(newer), parameters)
    both, is_left = fold_in.joined(read(newer, 10**9, parameters), last, parameters)
    assert plain(both) == plain(whole)
    assert [pin for pin, left in zip(last.pins, is_left, strict=True) if left] == both.pins[
        len({pin for pin, action in newer if pin and fold_in.ACTION_WEIGHTS.get(action)}) :
    ]
    assert fold_in.strengths(both, parameters).tolist() == fold_in.strengths(whole, parameters).tolist()
