"""Rules of patterns as `conf/patterns.yaml` says them.

Belongs here: reading the file, strictly: what is wrong is told by file, rule and field, with what is allowed. Does not
belong here: what a rule means (`patterns.rules`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines import strict_yaml
from pipelines.contracts import ACTIONS, OBJECTS
from pipelines.errors import TidemarkError
from pipelines.settings import ROOT
from pipelines.users.patterns.rules import ABSENCE, COUNT, FILTERS, Patterns, Rule
from pipelines.users.spans import DAY_MS, MIN_SPAN_MS, MINUTE_MS, span_ms
from pipelines.users.spans import RULE as SPAN_RULE

PATTERNS_FILE = ROOT / "conf" / "patterns.yaml"
MAX_RULES, MAX_VALUES, MAX_VALUE_BYTES = 100, 50, 128
MAX_COUNT = 10_000
MAX_WEIGHT = 1_000_000.0
MAX_KEPT_MS = 7 * DAY_MS
"""A stream begins anew at what Kafka has, a week by default (`kafka.retention_hours`): it must find all that counts.
Where topics keep less, the stream says so when it starts."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

_NAME_RULE = "lower-case letters, digits and _, at most 64, a letter first"
_ACTIONS_RULE = f"a list of some of {', '.join(ACTIONS)}, each once"
_FILE = {
    "lateness": SPAN_RULE,
    "interests": "an object with half_life and weights",
    "rules": f"a list of at most {MAX_RULES} rules",
}
_INTERESTS = {"half_life": SPAN_RULE, "weights": f"a number for some of {', '.join(ACTIONS)}"}
_RULE = {
    "name": f"{_NAME_RULE}; of no other rule",
    COUNT: "an object with actions, by, at_least and within",
    ABSENCE: "an object with after, unless, by and within",
    "then": "an object with lasts, and segment or interest or both",
}
_FILTERS = dict.fromkeys(FILTERS, f"a list of 1 to {MAX_VALUES} texts, each once")
_BY = f"one of {', '.join(OBJECTS)}"
_COUNT = {
    "actions": _ACTIONS_RULE,
    "by": _BY,
    "at_least": f"a whole number from 1 to {MAX_COUNT:,}",
    "within": SPAN_RULE,
    **_FILTERS,
}
_ABSENCE = {"after": _ACTIONS_RULE, "unless": _ACTIONS_RULE, "by": _BY, "within": SPAN_RULE, **_FILTERS}
_THEN = {
    "segment": _NAME_RULE,
    "interest": f"a number up to {MAX_WEIGHT:,.0f}, not 0",
    "lasts": SPAN_RULE,
}


class BadPattern(TidemarkError):
    """The rules of patterns cannot be read."""


class Declared(NamedTuple):
    """What the file says: the patterns, and how a user's events weigh as interests.

    Attributes:
        patterns: The rules in force.
        half_life_ms: After which an event, or a firing, weighs half.
        weights: Action → what an event of it weighs when it happens.
    """

    patterns: Patterns
    half_life_ms: int
    weights: Mapping[str, float]


def load(path: Path = PATTERNS_FILE) -> Declared:
    """What a file declares.

    Raises:
        BadPattern: It cannot be read, or says what it cannot; the error names rule, field, and what is allowed.
    """
    try:
        said = strict_yaml.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadPattern(
            f"the patterns cannot be read: {first}", where=str(path), remedy="mend the file"
        ) from None
    return declared(said, str(path))


def declared(said: Any, where: str) -> Declared:
    """What a file says, read already.

    Raises:
        BadPattern: It says what it cannot.
    """
    said = _object(said, where, "", _FILE, required=("lateness", "rules"))
    lateness_ms = _lateness_ms(said, where)
    interests = said.get("interests")
    interests = (
        {} if interests is None else _object(interests, where, "interests.", _INTERESTS, tuple(_INTERESTS))
    )
    half_life_ms = _span(interests, where, "half_life", "interests.") if interests else 7 * DAY_MS
    weights = _weights(interests["weights"], where) if interests else {}
    listed = said["rules"]
    if not isinstance(listed, list):
        raise _bad(where, "rules", f"{_shown(listed)} is no list", _FILE["rules"])
    if len(listed) > MAX_RULES:
        raise _bad(where, "rules", f"there are {len(listed)} rules", _FILE["rules"])
    rules = tuple(read(one, f"{where}, rule {number}") for number, one in enumerate(listed, 1))
    names = [rule.name for rule in rules]
    for number, name in enumerate(names, 1):
        if name in names[: number - 1]:
            raise _bad(f"{where}, rule {number}", "name", f"there are two rules {name!r}", _RULE["name"])
    for number, rule in enumerate(rules, 1):
        if lateness_ms + 2 * rule.within_ms > MAX_KEPT_MS:
            most = (MAX_KEPT_MS - lateness_ms) // 2
            raise _bad(
                f"{where}, rule {number}",
                f"{rule.kind}.within",
                "lateness and twice the span are more than the 7d of events that a stream finds when it begins anew",
                f"at most {most // MINUTE_MS:,}m with this lateness",
            )
    return Declared(Patterns(rules, lateness_ms), half_life_ms, weights)


def _lateness_ms(said: Mapping[str, Any], where: str) -> int:
    found = _span(said, where, "lateness", "")
    most = MAX_KEPT_MS - 2 * MIN_SPAN_MS
    if found > most:
        raise _bad(
            where,
            "lateness",
            f"{_shown(said['lateness'])} leaves no rule a span: a stream that begins anew finds 7d of events",
            f"at most {most // MINUTE_MS:,}m, which is 7d less twice the shortest span",
        )
    return found


def read(said: Any, where: str) -> Rule:
    """A rule as a file says it.

    Raises:
        BadPattern: It says what a rule cannot.
    """
    said = _object(said, where, "", _RULE, required=("name", "then"))
    name = _name(said["name"], where, "name")
    kinds = [kind for kind in (COUNT, ABSENCE) if kind in said]
    if len(kinds) != 1:
        found = "both are there" if kinds else "it is neither"
        raise _bad(where, f"{COUNT}, {ABSENCE}", found, "one of them")
    then = _object(said["then"], where, "then.", _THEN, required=("lasts",))
    segment = _name(then["segment"], where, "then.segment") if "segment" in then else None
    interest = _interest(then["interest"], where) if "interest" in then else 0.0
    if segment is None and not interest:
        raise _bad(where, "then", "nothing follows", _RULE["then"])
    return Rule(
        name=name,
        **(_count(said[COUNT], where) if COUNT in said else _absence(said[ABSENCE], where)),
        segment=segment,
        interest=interest,
        lasts_ms=_span(then, where, "lasts", "then."),
    )


def _count(said: Any, where: str) -> dict[str, Any]:
    said = _object(said, where, "count.", _COUNT, required=("actions", "by", "at_least", "within"))
    at_least = said["at_least"]
    if type(at_least) is not int or not 1 <= at_least <= MAX_COUNT:
        raise _bad(where, "count.at_least", f"{_shown(at_least)} is not allowed", _COUNT["at_least"])
    return {
        "kind": COUNT,
        "by": _one_of(said["by"], where, "count.by", OBJECTS),
        "actions": _actions(said["actions"], where, "count.actions"),
        "unless": (),
        "at_least": at_least,
        "within_ms": _span(said, where, "within", "count."),
        "filters": _filters(said, where, "count."),
    }


def _absence(said: Any, where: str) -> dict[str, Any]:
    said = _object(said, where, "absence.", _ABSENCE, required=("after", "unless", "by", "within"))
    return {
        "kind": ABSENCE,
        "by": _one_of(said["by"], where, "absence.by", OBJECTS),
        "actions": _actions(said["after"], where, "absence.after"),
        "unless": _actions(said["unless"], where, "absence.unless"),
        "at_least": 0,
        "within_ms": _span(said, where, "within", "absence."),
        "filters": _filters(said, where, "absence."),
    }


def _filters(said: Mapping[str, Any], where: str, path: str) -> dict[str, tuple[str, ...]]:
    found = {}
    for name in (name for name in FILTERS if name in said):
        values = said[name]
        if not isinstance(values, list) or not 1 <= len(values) <= MAX_VALUES:
            raise _bad(where, path + name, f"{_shown(values)} is not such a list", _FILTERS[name])
        for place, value in enumerate(values):
            if not isinstance(value, str) or not 0 < len(value.encode("utf-8", "replace")) <= MAX_VALUE_BYTES:
                allowed = f"a text of 1 to {MAX_VALUE_BYTES} bytes"
                raise _bad(where, f"{path}{name}[{place}]", f"{_shown(value)} is not allowed", allowed)
            if value in values[:place]:
                raise _bad(where, f"{path}{name}[{place}]", f"{value!r} is there twice", "each once")
        found[name] = tuple(values)
    return found


def _actions(said: Any, where: str, path: str) -> tuple[str, ...]:
    if not isinstance(said, list) or not said:
        raise _bad(where, path, f"{_shown(said)} is not such a list", _ACTIONS_RULE)
    for place, action in enumerate(said):
        _one_of(action, where, f"{path}[{place}]", ACTIONS)
        if action in said[:place]:
            raise _bad(where, f"{path}[{place}]", f"{action} is there twice", _ACTIONS_RULE)
    return tuple(said)


def _weights(said: Any, where: str) -> dict[str, float]:
    if not isinstance(said, dict) or not said:
        raise _bad(where, "interests.weights", f"{_shown(said)} is not allowed", _INTERESTS["weights"])
    for action, weight in said.items():
        _one_of(action, where, f"interests.weights.{_shown(action)}", ACTIONS)
        if not _is_number(weight):
            raise _bad(
                where,
                f"interests.weights.{action}",
                f"{_shown(weight)} is not allowed",
                _INTERESTS["weights"],
            )
    return {action: float(weight) for action, weight in said.items()}


def _interest(said: Any, where: str) -> float:
    if not _is_number(said) or not said:
        raise _bad(where, "then.interest", f"{_shown(said)} is not allowed", _THEN["interest"])
    return float(said)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_WEIGHT


def _name(said: Any, where: str, path: str) -> str:
    if not isinstance(said, str) or not _NAME.fullmatch(said):
        raise _bad(where, path, f"{_shown(said)} is not allowed", _NAME_RULE)
    return said


def _one_of(said: Any, where: str, path: str, choices: Collection[str]) -> str:
    if not isinstance(said, str) or said not in choices:
        raise _bad(
            where,
            path,
            f"there is no {_shown(said)}{_nearest(said, choices)}",
            f"one of {', '.join(choices)}",
        )
    return said


def _span(said: Mapping[str, Any], where: str, name: str, path: str) -> int:
    found = span_ms(said.get(name))
    if found is None:
        raise _bad(where, path + name, f"{_shown(said.get(name))} is not such a time", SPAN_RULE)
    return found


def _object(
    said: Any, where: str, path: str, known: Mapping[str, str], required: Iterable[str] = ()
) -> dict[str, Any]:
    """A mapping that has none but these fields, and all that are required."""
    if not isinstance(said, dict):
        raise _bad(
            where, path.rstrip(".") or "the whole", f"{_shown(said)} is not an object", ", ".join(known)
        )
    for name in said:
        if name not in known:
            raise _bad(
                where, path + _shown(name), f"there is no such field{_nearest(name, known)}", ", ".join(known)
            )
    for name in required:
        if name not in said:
            raise _bad(where, path + name, "it is missing", known[name])
    return said


def _nearest(said: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(said)[:100], list(known), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""


def _shown(value: Any) -> str:
    """What somebody wrote, short enough to give back."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    text = str(value)
    return text if len(text) <= 100 else text[:100] + "…"


def _bad(where: str, field: str, message: str, allowed: str) -> BadPattern:
    return BadPattern(f"{field}: {message}", where=where, remedy=f"allowed: {allowed}")
