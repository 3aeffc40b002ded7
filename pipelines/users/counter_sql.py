"""A small SQL for counters: one sentence that becomes a `counters.Query`.

    SELECT action, count(*) FROM events WHERE user = 'u1' AND object IN ('p1', 'p2') AND age < '7d' GROUP BY action

Belongs here: the grammar, and saying where a text leaves it. Does not belong here: what the query means (`counters`).

`sqlglot` parses; what it finds is read by the few forms that are allowed, so that nothing else can come through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import sqlglot
from sqlglot import exp
from sqlglot.errors import ParseError, SqlglotError

from pipelines.contracts import OBJECTS
from pipelines.users.counters import COLUMNS, MAX_USERS, MAX_VALUES, USER, Query
from pipelines.users.spans import RULE as SPAN_RULE
from pipelines.users.spans import span_ms

GRAMMAR = (
    "SELECT [column, …] count(*) [AS name] FROM events WHERE user = '…' | user IN ('…', …) AND age < '7d'"
    " [AND column = '…' | column IN ('…', …)] … [GROUP BY column, …]"
)
NAMES = (
    {"user": USER, USER: USER, "object": OBJECTS[0]}
    | {name.removesuffix("_id"): name for name in OBJECTS}
    | {name: name for name in COLUMNS}
)
"""A name in the text → the column."""
AGE = "age"
MAX_CHARS = 65_536


class BadSql(Exception):
    """A text that is no query: where it leaves the grammar (from 0, in characters), what is there, what is allowed."""

    def __init__(self, position: int, message: str, allowed: str = GRAMMAR) -> None:
        super().__init__(message)
        self.position, self.message, self.allowed = position, message, allowed


class Sentence(NamedTuple):
    """A query, and the names of its answer's columns: of the groups in the order asked for, and of the count."""

    query: Query
    names: tuple[str, ...]
    count_name: str


@lru_cache(1_024)
def parse(text: str) -> Sentence:
    """Read a sentence.

    Raises:
        BadSql: It is not one.
    """
    select = _select(text)
    columns, count_name = _selected(select)
    users, age_ms, where = _conditions(select)
    group = select.args.get("group")
    grouped = [_column(one) for one in _plain(group, {"expressions"}).expressions] if group else []
    if len(set(grouped)) != len(grouped):
        raise _bad(group or select, "a column is named twice")
    names = [name for name, _ in columns]
    if set(names) != set(grouped):
        raise _bad(group or select, "the columns that are selected are not those of GROUP BY")
    return Sentence(
        Query(users, age_ms, where, tuple(names)), tuple(alias for _, alias in columns), count_name
    )


def _select(text: str) -> exp.Select:
    if len(text) > MAX_CHARS:
        raise BadSql(MAX_CHARS, f"the text has {len(text):,} characters", f"at most {MAX_CHARS:,} characters")
    try:
        statements = sqlglot.parse(text)
    except ParseError as error:
        first = error.errors[0] if error.errors else {}
        message = str(first.get("description") or error).partition(" <")[0]
        raise BadSql(_offset(text, first), message) from None
    except (SqlglotError, RecursionError) as error:
        raise BadSql(0, f"the text is not SQL: {str(error)[:100]}") from None
    statement = statements[0] if len(statements) == 1 else None
    if statement is None:
        raise BadSql(0, "there is not one sentence")
    if not isinstance(statement, exp.Select):
        raise BadSql(_start(statement), f"{statement.key.upper()} is not allowed")
    _plain(statement, {"expressions", "from_", "where", "group"})
    return statement


def _offset(text: str, error: Mapping[str, Any]) -> int:
    """Where a parser's error is in a text: it names the line, from 1, and the column where the token ends."""
    if not error.get("line"):
        return 0
    before = sum(len(line) for line in text.splitlines(keepends=True)[: error["line"] - 1])
    return max(0, before + error["col"] - len(error.get("highlight") or ""))


def _selected(select: exp.Select) -> tuple[list[tuple[str, str]], str]:
    """The columns and their names in the answer, and the count's."""
    columns, counts = [], []
    for one in select.expressions:
        named = one.this if isinstance(one, exp.Alias) else one
        alias = one.alias if isinstance(one, exp.Alias) else None
        if isinstance(named, exp.Count):
            if not isinstance(named.this, exp.Star) or named.args.get("distinct") or named.expressions:
                raise _bad(named, "only count(*) counts")
            counts.append(alias or "count")
        else:
            column = _column(named)
            columns.append((column, alias or named.name))
    if len(counts) != 1:
        raise _bad(select, "count(*) is not selected once")
    answered = [*(alias for _, alias in columns), *counts]
    if len(set(answered)) != len(answered):
        raise _bad(select, "two columns of the answer have one name")
    return columns, counts[0]


def _conditions(select: exp.Select) -> tuple[tuple[bytes, ...], int, dict[str, tuple[str, ...]]]:
    """Whose events, of what age, and which."""
    source = select.args.get("from_")
    table = source.this if source else select
    if not isinstance(table, exp.Table) or table.sql().lower() != "events":
        raise _bad(table, "events are counted, nothing else")
    where = select.args.get("where")
    if where is None:
        raise _bad(select, "there is no WHERE")
    said: dict[str, tuple[str, ...]] = {}
    age: int | None = None
    for one in _anded(where.this):
        if isinstance(one, exp.LT) and _name(one.this) == AGE:
            if age is not None:
                raise _bad(one, "age is bounded twice")
            age = _age(one.expression)
            continue
        column, values = _values(one)
        if column in said:
            raise _bad(one, f"{column} is bounded twice")
        most = MAX_USERS if column == USER else MAX_VALUES
        if len(values) > most:
            raise _bad(one, f"there are {len(values):,} values", f"at most {most:,} values")
        said[column] = values
    if USER not in said:
        raise _bad(where, "it does not say whose events")
    if age is None:
        raise _bad(where, "it does not say of what age")
    users = tuple(user.encode() for user in said.pop(USER))
    return users, age, said


def _anded(condition: exp.Expr) -> Iterator[exp.Expr]:
    """The conditions that all hold, from left to right."""
    waiting = [condition]
    while waiting:
        one = waiting.pop()
        if isinstance(one, exp.And):
            waiting += [one.expression, one.this]
        elif isinstance(one, exp.Paren):
            waiting.append(one.this)
        else:
            yield one


def _values(condition: exp.Expr) -> tuple[str, tuple[str, ...]]:
    """The column of a condition, and the texts that it may be, each once."""
    if isinstance(condition, exp.EQ):
        given = [condition.expression]
    elif isinstance(condition, exp.In) and condition.expressions:
        given = _plain(condition, {"this", "expressions"}).expressions
    else:
        raise _bad(condition, "it is none of the conditions")
    return _column(condition.this), tuple(dict.fromkeys(_text(one) for one in given))


def _column(named: exp.Expr) -> str:
    name = _name(named)
    if name not in NAMES:
        raise _bad(named, f"there is no column {named.sql()[:40]!r}", f"one of {', '.join(NAMES)}")
    return NAMES[name]


def _name(named: exp.Expr) -> str | None:
    """The name of a column as it is written, in lower case."""
    return named.name.lower() if isinstance(named, exp.Column) and not named.table else None


def _text(value: exp.Expr) -> str:
    if not isinstance(value, exp.Literal) or not value.is_string:
        raise _bad(value, "it is not a text", "a text in single quotes")
    if not value.this or "\0" in value.this:
        raise _bad(value, "the text is empty or holds NUL", "a text in single quotes")
    return str(value.this)


def _age(value: exp.Expr) -> int:
    found = span_ms(value.this) if isinstance(value, exp.Literal) and value.is_string else None
    if found is None:
        raise _bad(value, f"{value.sql()[:40]} is not an age", SPAN_RULE)
    return found


def _plain(part: exp.Expr, known: set[str]) -> exp.Expr:
    """The same, which has nothing but these parts: no HAVING, no ORDER BY, no DISTINCT."""
    for name, value in part.args.items():
        if value and name not in known:
            first = value[0] if isinstance(value, list) else value
            there = first if isinstance(first, exp.Expr) else part
            raise _bad(there, f"{name.strip('_').upper().replace('_', ' ')} is not allowed")
    return part


def _bad(part: exp.Expr, message: str, allowed: str = GRAMMAR) -> BadSql:
    """The error at the first character of a part."""
    return BadSql(_start(part), message, allowed)


def _start(part: exp.Expr) -> int:
    return min((one.meta["start"] for one in part.walk() if "start" in one.meta), default=0)
