"""Counters against a fold by hand: any events, edited, deleted and repeated, over base and delta; and SQL."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlglot
from hypothesis import given
from hypothesis import strategies as st
from sqlglot import exp

from pipelines.indexing import build, facts
from pipelines.indexing.base import empty, open_base
from pipelines.indexing.position import EMPTY
from pipelines.indexing.timelines import TimelineView
from pipelines.indexing.view import view
from pipelines.users import counter_sql, counters
from pipelines.users.counter_sql import BadSql
from pipelines.users.counters import Pairs, Query
from pipelines.users.index import USER_EVENTS
from pipelines.users.spans import MAX_SPAN_MS, MIN_SPAN_MS
from tests.properties.harness import cases

CASES = cases(200)
NOW_MS = 1_700_000_000_000
USERS = ("u1", "u2", "ü'3")
VALUES: Mapping[str, tuple[str | None, ...]] = {
    "pin_id": ("p1", "p2", "p'3"),
    "action": ("view", "click", "purchase"),
    "surface": (None, "home", "search"),
    "ad_id": (None, "a1", "a2"),
    "view_type": (None, "promoted"),
}
Said = dict[str, Any]


def said(chance: random.Random) -> Said:
    """One statement about one of a few events."""
    return {
        "user": chance.choice(USERS),
        "event": f"e{chance.randrange(6)}",
        "version": chance.randrange(1, 9),
        "is_deleted": chance.random() < 0.15,
        # what it says follows from what it is about and its version, or ranks would be equal and contents not
    }


def content(one: Said) -> dict[str, Any]:
    """What a statement says: always the same of the same version."""
    chance = random.Random(repr(sorted(one.items())))
    age = chance.choice((0, 1, MIN_SPAN_MS - 1, MIN_SPAN_MS, 10 * MIN_SPAN_MS, MAX_SPAN_MS, -1))
    return {"time_ms": NOW_MS - age, **{name: chance.choice(values) for name, values in VALUES.items()}}


def fact(one: Said) -> dict[str, Any]:
    """The same as the index has it."""
    told = content(one)
    payload = {name: told.get(name) for name in USER_EVENTS.families[0].schema.names}
    return {
        "family": "interactions",
        "identity": [one["user"].encode(), one["event"].encode()],
        "key": one["user"].encode(),
        "id": one["event"].encode(),
        "version": (one["version"],),
        "content_hash": 1,
        "is_deleted": one["is_deleted"],
        "time_ms": told["time_ms"],
        "payload": None if one["is_deleted"] else payload,
    }


def standing(given_: list[Said]) -> list[dict[str, Any]]:
    """The events that there are after all was said."""
    best: dict[tuple[str, str], Said] = {}
    for one in given_:
        held = best.get((one["user"], one["event"]))
        if held is None or (one["version"], one["is_deleted"]) > (held["version"], held["is_deleted"]):
            best[one["user"], one["event"]] = one
    return [content(one) | {"user_id": one["user"]} for one in best.values() if not one["is_deleted"]]


def viewed(chance: random.Random, given_: list[Said], folder: str) -> TimelineView:
    """A base of some, and the rest folded in, in any order, some of them again."""
    in_base = [one for one in given_ if chance.random() < 0.6]
    base = empty(USER_EVENTS)
    if in_base:
        path = Path(folder) / "base"
        build.build_local(
            USER_EVENTS, facts.table(USER_EVENTS, map(fact, in_base)), path, build.Meta("v", EMPTY)
        )
        base = open_base(USER_EVENTS, path)
    seen = view(base)
    later = [one for one in given_ if one not in in_base or chance.random() < 0.3]
    chance.shuffle(later)
    while later:
        part = [later.pop() for _ in range(min(len(later), chance.randrange(1, 5)))]
        seen = seen.folded(facts.table(USER_EVENTS, map(fact, part)), EMPTY)
    assert isinstance(seen, TimelineView)
    return seen


def holds(event: Mapping[str, Any], age_ms: int, where: Mapping[str, Any]) -> bool:
    """Whether an event is in the range and one of those asked for."""
    is_in_range = NOW_MS - age_ms < event["time_ms"] <= NOW_MS
    return is_in_range and all(event[name] in values for name, values in where.items())


def drawn_where(chance: random.Random, but: str = "") -> dict[str, tuple[str, ...]]:
    """A condition on some columns."""
    names = [name for name in VALUES if name != but and chance.random() < 0.4]
    texts = {name: [value for value in VALUES[name] if value is not None] for name in names}
    return {
        name: tuple(chance.sample(values, chance.randrange(1, len(values) + 1)))
        for name, values in texts.items()
    }


def drawn_age(chance: random.Random) -> int:
    return chance.choice((MIN_SPAN_MS, MIN_SPAN_MS + 1, 10 * MIN_SPAN_MS, MAX_SPAN_MS))


@CASES
@given(st.randoms(use_true_random=False), st.integers(0, 40))
def test_counts_equal_those_of_a_fold_by_hand(chance: random.Random, number: int) -> None:
    given_ = [said(chance) for _ in range(number)]
    events = standing(given_)
    with tempfile.TemporaryDirectory() as folder:
        seen = viewed(chance, given_, folder)
        for _ in range(3):
            check_groups(chance, seen, events)
            check_pairs(chance, seen, events)


def check_groups(chance: random.Random, seen: TimelineView, events: list[dict[str, Any]]) -> None:
    users = chance.sample([*USERS, "nobody"], chance.randrange(1, 5))
    grouped = tuple(chance.sample(["user_id", *VALUES], chance.randrange(0, 4)))
    age_ms, where = drawn_age(chance), drawn_where(chance)
    query = Query(tuple(user.encode() for user in users), age_ms, where, grouped)
    answer = counters.count(seen, query, NOW_MS)
    mine = [event for event in events if event["user_id"] in users and holds(event, age_ms, where)]
    expected = Counter(tuple(event[name] for name in grouped) for event in mine)
    if not grouped:
        expected[()] += 0
    assert dict(answer.groups) == dict(expected)
    assert len(answer.groups) == len(expected)
    order = [
        tuple(
            users.index(v) if n == "user_id" else (v is not None, v) for n, v in zip(grouped, g, strict=True)
        )
        for g, _ in answer.groups
    ]
    assert order == sorted(order)
    assert answer.incomplete == ()


def check_pairs(chance: random.Random, seen: TimelineView, events: list[dict[str, Any]]) -> None:
    about = chance.choice(("pin_id", "ad_id"))
    pairs = [
        (chance.choice([*USERS, "nobody"]), chance.choice(("p1", "p2", "p'3", "a1", "a2")))
        for _ in range(chance.randrange(1, 9))
    ]
    age_ms, where = drawn_age(chance), drawn_where(chance, but=about)
    asked = Pairs(tuple((user.encode(), value) for user, value in pairs), about, age_ms, where)
    expected = Counter((e["user_id"], e[about]) for e in events if holds(e, age_ms, where))
    assert counters.count_pairs(seen, asked, NOW_MS).events.tolist() == [expected[pair] for pair in pairs]


# ------------------------------------------------------------------------------------------------------------ SQL

GAPS = (" ", " ", " ", "\n\t ", " -- so\n", "/* so */", " /* ' */ ")
WORDS = (
    "user", '"user"', "object", "action", "age", "events", "count", "SELECT", "from", "WHERE", "GROUP BY", "AND", "IN",
    "AS", "=", "<", ",", "(", ")", "*", ";", "'view'", "'7d'", "'u''1'",
)  # fmt: skip
STRANGE = (
    "DATE(", "STRUCT<", "EXISTS(", "CASE WHEN", "NOT", "NULL", "UNION", "SHOW", "BEGIN SHOW", "::int", "a.", ".", "[",
    "{", "?", "@", "'", '"', "`", "$a$", "0x1", "1e", "/*", "--", "{#", "{%", "||", "\\", "\u017f", "\0", "\ud800",
)  # fmt: skip
NEVER = (".", "[", "{", "?", "@", "::", "7", "||", "==", "<=", "/*+ a */", "{# a #}", "N'a'", "`a`")
"""What begins no token of the grammar, wherever it stands."""


class Written(NamedTuple):
    """A sentence, token by token, and what it says."""

    tokens: list[str]
    query: Query
    names: tuple[str, ...]


def written(chance: random.Random) -> Written:
    """Any sentence of a few columns."""
    users = chance.sample(USERS, chance.randrange(1, 4))
    grouped = chance.sample(["user_id", *VALUES], chance.randrange(0, 4))
    where, (number, unit) = drawn_where(chance), chance.choice(((1, "m"), (36, "h"), (90, "d"), (2, "w")))
    named = {
        "user_id": ("user", "USER_ID", '"user"'),
        "pin_id": ("object", "pin", "pin_id"),
        "ad_id": ("Ad", "ad_id"),
    }

    def name(column: str) -> str:
        return chance.choice(named.get(column, (column, column.upper())))

    def condition(column: str, values: tuple[str, ...]) -> list[str]:
        texts = ["'" + value.replace("'", "''") + "'" for value in values]
        if len(texts) == 1 and chance.random() < 0.5:
            return [name(column), "=", *texts]
        return [name(column), chance.choice(("IN", "in")), "(", *joined([[one] for one in texts], ","), ")"]

    conditions = [condition(*one) for one in ({"user_id": tuple(users)} | where).items()]
    conditions.append(["age", "<", f"'{number}{unit}'"])
    chance.shuffle(conditions)
    names, selected = [], []
    for column in grouped:
        said, alias = name(column), f"as_{column}"
        is_named = chance.random() < 0.3
        names.append(alias if is_named else said.strip('"'))
        selected.append([said, "AS", alias] if is_named else [said])
    count = chance.choice((["count", "(", "*", ")"], ["COUNT", "(", "*", ")", "AS", "n"]))
    selected.insert(chance.randrange(len(selected) + 1), count)
    tokens = ["SELECT", *joined(selected, ","), "FROM", "events", "WHERE", *joined(conditions, "AND")]
    if grouped:
        again = [[name(column)] for column in chance.sample(grouped, len(grouped))]
        tokens += ["GROUP BY", *joined(again, ",")]
    unit_ms = {"m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}[unit]
    query = Query(tuple(user.encode() for user in users), number * unit_ms, where, tuple(grouped))
    return Written(tokens + chance.choice(([], [";"])), query, tuple(names))


def joined(parts: list[list[str]], between: str) -> list[str]:
    """The parts' tokens, with one between each two parts."""
    return [token for part in parts for token in (between, *part)][1:]


def spaced(chance: random.Random, tokens: list[str]) -> list[str]:
    """The same with gaps before the tokens, where it needs them, and often where not."""
    told: list[str] = []
    for token in tokens:
        is_apart = bool(told) and {told[-1][-1], token[0]} & set("=<,()*;") and chance.random() < 0.5
        told += ["" if is_apart else chance.choice(GAPS), token]
    return told


def as_sqlglot_reads(text: str) -> tuple[dict[str, set[str]], list[str], set[str]]:
    """Conditions, names of the answer's columns, columns of GROUP BY."""
    tree = sqlglot.parse_one(text)
    assert isinstance(tree, exp.Select) and tree.args["from_"].this.name == "events"
    conditions = {}
    for one in tree.args["where"].this.flatten():
        assert isinstance(one, exp.EQ | exp.In | exp.LT)
        values = one.expressions if isinstance(one, exp.In) else [one.expression]
        conditions[one.this.name.lower()] = {value.this for value in values}
    group = tree.args.get("group")
    counted = [one for one in tree.expressions if not one.find(exp.Count)]
    return conditions, [one.alias_or_name for one in counted], {one.name for one in group or ()}


@CASES
@given(st.randoms(use_true_random=False))
def test_a_sentence_says_the_query_that_it_was_written_of(chance: random.Random) -> None:
    sentence = written(chance)
    text = "".join(spaced(chance, sentence.tokens))
    found = counter_sql.parse(text)
    assert (found.query, found.names) == (sentence.query, sentence.names)
    conditions, names, grouped = as_sqlglot_reads(text)
    columns = {counter_sql.NAMES.get(name, name): texts for name, texts in conditions.items()}
    assert columns.pop("age")
    assert {name: set(values) for name, values in sentence.query.where.items()} | {
        "user_id": {user.decode() for user in sentence.query.users}
    } == columns
    assert tuple(names) == sentence.names
    assert len(grouped) == len(sentence.names)


@CASES
@given(st.randoms(use_true_random=False))
def test_a_sentence_is_refused_where_something_strange_was_put_into_it(chance: random.Random) -> None:
    told = spaced(chance, written(chance).tokens)
    place = chance.randrange(0, len(told) + 1, 2)
    before = "".join(told[:place]) + " "
    with pytest.raises(BadSql) as refused:
        counter_sql.parse(before + chance.choice(NEVER) + " " + "".join(told[place:]))
    assert refused.value.position == len(before)


@CASES
@given(st.randoms(use_true_random=False))
def test_a_sentence_that_ends_early_or_in_a_quote_is_refused_at_its_end(chance: random.Random) -> None:
    told = spaced(chance, written(chance).tokens)
    text = "".join(told[: chance.randrange(0, len(told) + 1, 2)])
    assert refused_at(text) in (None, len(text))
    assert refused_at(text + chance.choice((" 'a", ' "a', " /* a"))) == len(text) + 1


@CASES
@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join),
        st.lists(st.sampled_from(WORDS + STRANGE), max_size=40).map(" ".join),
        st.lists(st.sampled_from(WORDS + STRANGE), max_size=40).map("".join),
        st.tuples(st.sampled_from(WORDS + STRANGE), st.integers(0, 8_000)).map(lambda one: one[0] * one[1]),
    ),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
)
def test_any_text_is_read_or_refused_in_its_place_and_soon(
    text: str, kept: int, chance: random.Random
) -> None:
    told = spaced(chance, written(chance).tokens)
    for whole in (text, " ".join((*told[:kept], text, *told[kept:]))):
        began = time.thread_time()
        position = refused_at(whole)
        assert time.thread_time() - began < 2  # 60,000 characters take a tenth of that
        assert position is None or 0 <= position <= len(whole)


def refused_at(text: str) -> int | None:
    """Where a text is refused; None if it is not."""
    try:
        counter_sql.parse(text)
    except BadSql as error:
        return error.position
    return None
