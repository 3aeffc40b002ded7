"""Frequency: rules about how often a user may, or must, have met something, and how tired of it the user is.

Belongs here: what a rule may say, reading them from a file, and judging candidates by a user's timeline. Does not
belong here: counting for its own sake (`counters`), HTTP (`serving.routes.counters`).

A rule counts a user's events with an object (`per`) in the last while. `at_most: 3` allows to show it a third time, not
a fourth: fewer than three events are there. `at_least: 1` allows what was met before. `fatigue` weighs events by action
and lets them fade: a view of twelve hours ago is half a view, where that is the half-life; what is tired of more than
`at_most` is not allowed. Events count as in `counters`: t - within < event time ≤ t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from pipelines import strict_yaml
from pipelines.contracts import ACTIONS, OBJECTS
from pipelines.errors import TidemarkError
from pipelines.settings import ROOT
from pipelines.users.spans import RULE as SPAN_RULE
from pipelines.users.spans import span_ms, written

if TYPE_CHECKING:
    from pipelines.indexing.timelines import TimelineView

RULES_FILE = ROOT / "conf" / "frequency.yaml"
MAX_RULES = 100
MAX_EVENTS = 1_000_000
MAX_WEIGHT = 1_000_000.0
_KINDS = ("at_most", "at_least", "fatigue")
_FIELDS = {
    "name": "a text, of no other rule",
    "per": f"one of {', '.join(OBJECTS)}",
    "actions": f"a list of some of {', '.join(ACTIONS)}",
    "within": SPAN_RULE,
    "at_most": f"a whole number from 0 to {MAX_EVENTS:,}",
    "at_least": f"a whole number from 1 to {MAX_EVENTS:,}",
    "fatigue": "an object with half_life, weights and at_most",
}
_FATIGUE = {
    "half_life": SPAN_RULE,
    "weights": f"a number for some of {', '.join(ACTIONS)}",
    "at_most": "a number",
}


class BadRule(TidemarkError):
    """A rule cannot be read."""


class Rule(NamedTuple):
    """One rule. It allows what has fewer than ``at_most`` events, at least ``at_least``, no more than ``fatigue``.

    Attributes:
        name: Its name.
        per: Of `OBJECTS`: whose events count together.
        weights: Action → what an event of it counts: 1, but for fatigue.
        within_ms: How far back.
        kind: ``at_most``, ``at_least`` or ``fatigue``.
        limit: What its kind says.
        half_life_ms: After which an event counts half; None: it counts the same all the while.
    """

    name: str
    per: str
    weights: Mapping[str, float]
    within_ms: int
    kind: str
    limit: float
    half_life_ms: int | None


class Broken(NamedTuple):
    """A rule that does not allow a candidate: the object, and its events (of fatigue: what they weigh now)."""

    rule: Rule
    value: str
    measured: float


class Checked(NamedTuple):
    """What the rules say.

    Attributes:
        broken: For each candidate the rules that do not allow it; none: it may be shown.
        incomplete: Rules that may have measured too little: the user's timeline is cut off, by a count or a horizon,
            within their time.
    """

    broken: list[list[Broken]]
    incomplete: tuple[Rule, ...]


Candidate = Mapping[str, str]
"""What would be shown: column of `OBJECTS` → its value. A rule about another column does not concern it."""


def load(path: Path = RULES_FILE) -> tuple[Rule, ...]:
    """The rules of a file.

    Raises:
        BadRule: It cannot be read, or one of them says what a rule cannot.
    """
    try:
        said = strict_yaml.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadRule(f"the rules cannot be read: {error}", where=str(path), remedy="mend the file") from None
    if not isinstance(said, dict) or set(said) != {"rules"} or not isinstance(said["rules"], list):
        raise BadRule("there is no list of rules", where=str(path), remedy="begin it with `rules:`")
    if len(said["rules"]) > MAX_RULES:
        raise BadRule(f"there are {len(said['rules'])} rules", where=str(path), remedy=f"at most {MAX_RULES}")
    rules = tuple(read(one, f"{path}, rule {number}") for number, one in enumerate(said["rules"], 1))
    seen: set[str] = set()
    for number, rule in enumerate(rules, 1):
        if rule.name in seen:
            raise _bad(
                f"{path}, rule {number}", "name", f"there are two rules {rule.name!r}", _FIELDS["name"]
            )
        seen.add(rule.name)
    return rules


def read(said: Any, where: str) -> Rule:
    """A rule as a file says it.

    Raises:
        BadRule: It says what a rule cannot; the error names the field and what is allowed.
    """
    said = _fields(said, where, "", _FIELDS)
    name = said.get("name")
    if not isinstance(name, str) or not name:
        raise _bad(where, "name", "there is no name", _FIELDS["name"])
    kinds = [kind for kind in _KINDS if kind in said]
    if len(kinds) != 1:
        raise _bad(where, kinds[1] if kinds else "at_most", "a rule has one limit", ", ".join(_KINDS))
    (kind,) = kinds
    if said.get("per") not in OBJECTS:
        raise _bad(where, "per", f"there is no {said.get('per')!r}", _FIELDS["per"])
    common = {"name": name, "per": said["per"], "within_ms": _span(said, where, "within"), "kind": kind}
    if kind == "fatigue":
        if "actions" in said:
            raise _bad(where, "actions", "fatigue has weights of actions", "no actions beside fatigue")
        return _fatigue(said["fatigue"], where, common)
    least = 0 if kind == "at_most" else 1
    limit = said[kind]
    if type(limit) is not int or not least <= limit <= MAX_EVENTS:
        raise _bad(where, kind, f"{limit!r} is not allowed", _FIELDS[kind])
    return Rule(**common, weights=_actions(said.get("actions"), where), limit=limit, half_life_ms=None)


def require_inside(rules: Sequence[Rule], horizon_ms: int | None, where: Path = RULES_FILE) -> None:
    """Whether the rules reach no further back than timelines do.

    Raises:
        BadRule: One does: it would forget what it is about, and allow what it should not.
    """
    for rule in rules:
        if horizon_ms is not None and rule.within_ms > horizon_ms:
            raise _bad(
                f"{where}, rule {rule.name}",
                "within",
                f"it reaches {written(rule.within_ms)} back, timelines {written(horizon_ms)}",
                f"at most {written(horizon_ms)}, or more days of user_events in build.horizon_days",
            )


def check(
    view: TimelineView, rules: Sequence[Rule], user: bytes, candidates: Sequence[Candidate], now_ms: int
) -> Checked:
    """Judge candidates by rules.

    Args:
        view: The timelines of users.
        rules: Those to keep.
        user: To whom it would be shown.
        candidates: What would be shown.
        now_ms: When.
    """
    broken: list[list[Broken]] = [[] for _ in candidates]
    if not rules:
        return Checked(broken, ())
    columns = ["time_ms", "action", *dict.fromkeys(rule.per for rule in rules)]
    widest_ms = max(rule.within_ms for rule in rules)
    within = view.within([user], now_ms - widest_ms + 1, now_ms + 1)
    events = within.read(columns)
    for rule in rules:
        asked = [(place, one[rule.per]) for place, one in enumerate(candidates) if rule.per in one]
        values = list(dict.fromkeys(value for _, value in asked))
        measured = dict(zip(values, _measured(events, rule, values, now_ms).tolist(), strict=True))
        for place, value in asked:
            if not _allows(rule, measured[value]):
                broken[place].append(Broken(rule, value, measured[value]))
    return Checked(broken, () if within.is_complete[0] else _incomplete(view, rules, user, now_ms))


def _incomplete(view: TimelineView, rules: Sequence[Rule], user: bytes, now_ms: int) -> tuple[Rule, ...]:
    """The rules in whose time events may be missing; of a short time, none may be where some are of a long one."""
    whole = {
        reach_ms: bool(view.within([user], now_ms - reach_ms + 1, now_ms + 1).is_complete[0])
        for reach_ms in {rule.within_ms for rule in rules}
    }
    return tuple(rule for rule in rules if not whole[rule.within_ms])


def _allows(rule: Rule, measured: float) -> bool:
    match rule.kind:
        case "at_most":
            return measured < rule.limit
        case "at_least":
            return measured >= rule.limit
        case _:
            return measured <= rule.limit


def _measured(events: pa.Table, rule: Rule, values: Sequence[str], now_ms: int) -> np.ndarray:
    """What the events with each value weigh by a rule; float64[values]."""
    of = pc.index_in(events.column(rule.per), pa.array(values, pa.string())).fill_null(-1).to_numpy()
    kind = pc.index_in(events.column("action"), pa.array(list(rule.weights), pa.string()))
    kinds = kind.fill_null(-1).to_numpy()
    ages_ms = now_ms - events.column("time_ms").to_numpy()
    counts = (of >= 0) & (kinds >= 0) & (ages_ms < rule.within_ms)
    weights = np.array(list(rule.weights.values()), np.float64)[kinds[counts]]
    if rule.half_life_ms is not None:
        weights = weights * 0.5 ** (ages_ms[counts] / rule.half_life_ms)
    return np.bincount(of[counts], weights, len(values))


# ------------------------------------------------------------------------------------------------ reading rules


def _fatigue(said: Any, where: str, common: Mapping[str, Any]) -> Rule:
    said = _fields(said, where, "fatigue.", _FATIGUE)
    weights = said.get("weights")
    if not isinstance(weights, dict) or not weights:
        raise _bad(where, "fatigue.weights", "there are no weights", _FATIGUE["weights"])
    for action, weight in weights.items():
        if action not in ACTIONS or not _is_number(weight):
            raise _bad(where, f"fatigue.weights.{action}", "it is not allowed", _FATIGUE["weights"])
    if not _is_number(said.get("at_most")):
        raise _bad(where, "fatigue.at_most", "it is not allowed", _FATIGUE["at_most"])
    half_life_ms = _span(said, where, "half_life", "fatigue.")
    return Rule(
        **common,
        weights={action: float(weight) for action, weight in weights.items()},
        limit=float(said["at_most"]),
        half_life_ms=half_life_ms,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_WEIGHT


def _actions(said: Any, where: str) -> dict[str, float]:
    if not isinstance(said, list) or not said or len(set(map(str, said))) != len(said):
        raise _bad(where, "actions", "it is not such a list", _FIELDS["actions"])
    for action in said:
        if action not in ACTIONS:
            raise _bad(where, "actions", f"there is no action {action!r}", _FIELDS["actions"])
    return dict.fromkeys(said, 1.0)


def _span(said: Mapping[str, Any], where: str, name: str, path: str = "") -> int:
    found = span_ms(said.get(name))
    if found is None:
        raise _bad(where, path + name, f"{said.get(name)!r} is not such a time", SPAN_RULE)
    return found


def _fields(said: Any, where: str, path: str, known: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise _bad(where, path.rstrip(".") or "rule", "it is not an object", ", ".join(known))
    for name in said:
        if name not in known:
            raise _bad(where, f"{path}{name}", "there is no such field", ", ".join(known))
    return said


def _bad(where: str, field: str, message: str, allowed: str) -> BadRule:
    return BadRule(f"{field}: {message}", where=where, remedy=f"allowed: {allowed}")
