"""Frequency rules against a loop over a user's events, over base and delta."""

from __future__ import annotations

import math
import random
import tempfile
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.users import frequency
from pipelines.users.frequency import Rule
from pipelines.users.spans import MAX_SPAN_MS, MIN_SPAN_MS
from tests.properties.harness import cases
from tests.properties.test_counters import NOW_MS, said, standing, viewed

SPANS = (MIN_SPAN_MS, 10 * MIN_SPAN_MS, 10 * MIN_SPAN_MS + 1, MAX_SPAN_MS)
OBJECTS = {"pin_id": ("p1", "p2", "p9"), "ad_id": ("a1", "a2", "a9")}


def drawn(chance: random.Random, number: int) -> Rule:
    kind = chance.choice(("at_most", "at_least", "fatigue"))
    actions = chance.sample(("view", "click", "purchase", "hide"), chance.randrange(1, 5))
    is_fatigue = kind == "fatigue"
    return Rule(
        f"rule {number}",
        chance.choice(list(OBJECTS)),
        {action: chance.choice((-1.5, 0.5, 3.0)) if is_fatigue else 1.0 for action in actions},
        chance.choice(SPANS),
        kind,
        chance.choice((-1.25, 0.3, 2.2)) if is_fatigue else chance.randrange(1, 4),
        chance.choice(SPANS) if is_fatigue else None,
    )


def expected(rule: Rule, events: list[dict[str, Any]], value: str) -> tuple[bool, float]:
    """Whether a rule allows a value, and what its events weigh."""
    total = 0.0
    for event in events:
        age_ms = NOW_MS - event["time_ms"]
        if event[rule.per] == value and event["action"] in rule.weights and 0 <= age_ms < rule.within_ms:
            fade = 1.0 if rule.half_life_ms is None else math.pow(2, -age_ms / rule.half_life_ms)
            total += rule.weights[event["action"]] * fade
    if rule.kind == "at_least":
        return total >= rule.limit, total
    return (total < rule.limit if rule.kind == "at_most" else total <= rule.limit), total


@cases(200)
@given(st.randoms(use_true_random=False), st.integers(0, 40))
def test_what_may_be_shown_is_what_a_loop_over_the_events_says(chance: random.Random, number: int) -> None:
    given_ = [said(chance) for _ in range(number)]
    standing_, user = standing(given_), chance.choice(("u1", "u2", "nobody"))
    events = [event for event in standing_ if event["user_id"] == user]
    rules = [drawn(chance, n) for n in range(chance.randrange(0, 5))]
    candidates = [
        {name: chance.choice(values) for name, values in OBJECTS.items() if chance.random() < 0.8}
        for _ in range(chance.randrange(1, 5))
    ]
    with tempfile.TemporaryDirectory() as folder:
        seen = viewed(chance, given_, folder)
        found, incomplete = frequency.check(seen, rules, user.encode(), candidates, NOW_MS)
    assert incomplete == ()
    assert len(found) == len(candidates)
    for candidate, broken in zip(candidates, found, strict=True):
        judged = [
            (rule, *expected(rule, events, candidate[rule.per])) for rule in rules if rule.per in candidate
        ]
        not_allowed = [(rule, total) for rule, is_allowed, total in judged if not is_allowed]
        assert [one.rule for one in broken] == [rule for rule, _ in not_allowed]
        for one, (rule, total) in zip(broken, not_allowed, strict=True):
            assert one.value == candidate[rule.per]
            assert math.isclose(one.measured, total, rel_tol=1e-9, abs_tol=1e-12)
