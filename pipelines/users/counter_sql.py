"""A small SQL for counters: one sentence that becomes a `counters.Query`.

    SELECT action, count(*) FROM events WHERE user = 'u1' AND object IN ('p1', 'p2') AND age < '7d' GROUP BY action

Belongs here: the grammar, and saying where a text leaves it. Does not belong here: what the query means (`counters`).

`sqlglot` cuts a text into tokens, and they are read once, from left to right: the text is refused at the first that
does not belong, and the time that it takes grows with its length, no faster. sqlglot's parser is not asked, because it
takes far more than this grammar, some of it in time that doubles with each bracket. A test holds that it reads every
sentence as it is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import ClassVar, NamedTuple

from sqlglot.errors import TokenError
from sqlglot.tokens import Tokenizer, TokenType

from pipelines.contracts import OBJECTS
from pipelines.contracts.contract import MAX_ID_BYTES
from pipelines.users.counters import CHOICES, COLUMNS, MAX_USERS, MAX_VALUES, USER, Query
from pipelines.users.spans import RULE as SPAN_RULE
from pipelines.users.spans import span_ms

GRAMMAR = (
    "SELECT [column [AS name], …] count(*) [AS name] FROM events WHERE user = '…' | user IN ('…', …) AND age < '7d'"
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
MAX_NAME_CHARS = 64
"""Of a name that is given with AS: each row of an answer repeats it."""

SELECT, COUNT, AS, FROM, WHERE, AND, IN, GROUP_BY = (
    "SELECT", "COUNT", "AS", "FROM", "WHERE", "AND", "IN", "GROUP BY",
)  # fmt: skip
NAME, TEXT, END, STRANGE = "a name", "a text in single quotes", "the end", "what the grammar does not have"
_WORDS = frozenset((SELECT, COUNT, AS, FROM, WHERE, AND, IN, GROUP_BY))
_SIGNS = frozenset("=<,()*;")
_NAME = re.compile(r"[^\W\d]\w*")
_GAP = re.compile(r"(?:\s|--[^\r\n]*|/\*(?!\+).*?\*/)*+", re.DOTALL)
"""What may stand between two tokens: space and comments. A comment with + is a hint, and says something."""
_TEXT_RULE = f"a text of 1 to {MAX_ID_BYTES} bytes, without NUL, in single quotes"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


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


def parse(text: str) -> Sentence:
    """Read a sentence.

    Raises:
        BadSql: It is not one; at the first token that does not belong, or at the end, where something is missing.
    """
    if len(text) > MAX_CHARS:
        raise BadSql(MAX_CHARS, f"the text has {len(text):,} characters", f"at most {MAX_CHARS:,} characters")
    reader = _Reader(text)
    names, count_name = _selected(reader)
    source = reader.take(NAME)
    if source.value.lower() != "events":
        raise BadSql(source.start, "events are counted, nothing else", "events")
    reader.take(WHERE)
    users, age_ms, where, follows = _conditions(reader)
    follows = _grouped(reader, follows, names)
    if follows.kind == ";":
        reader.take(END)
    return Sentence(Query(users, age_ms, where, tuple(names)), tuple(names.values()), count_name)


# ------------------------------------------------------------------------------------------------------ tokens


class _Tokenizer(Tokenizer):
    """sqlglot's, without commands: each SHOW would be cut twice, in time that grows with the square of the length."""

    COMMANDS: ClassVar[set[TokenType]] = set()


class _Token(NamedTuple):
    """A word or a sign of the grammar by itself, or a `NAME`, a `TEXT`, the `END`, or something `STRANGE`.

    Attributes:
        kind: Which of these.
        value: The name or text without its quotes; of the others, as it is written.
        start: Its first character's place.
    """

    kind: str
    value: str
    start: int


class _Reader:
    """The tokens of a text, from left to right."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)

    def take(self, *kinds: str) -> _Token:
        """The next token, which is one of these kinds.

        Raises:
            BadSql: It is of another kind.
        """
        token = next(self._tokens)
        if token.kind not in kinds:
            choices = " or ".join(repr(kind) if kind in _SIGNS else kind for kind in kinds)
            raise BadSql(token.start, _wrong(token), f"{choices}, as in {GRAMMAR}")
        return token


def _wrong(token: _Token) -> str:
    if token.kind == END:
        return "the sentence is not whole"
    if token.kind == STRANGE and token.value.startswith(("'", '"')):
        return "its quote is not closed"
    return "it cannot stand here"


def _tokens(text: str) -> Iterator[_Token]:
    """All tokens, the last of them `END`, or `STRANGE` where sqlglot finds no token or a comment is of another kind."""
    tokenizer = _Tokenizer()
    with suppress(TokenError):  # a quote is not closed: the tokens before it are there
        tokenizer.tokenize(text)
    start = _gap_end(text, 0)
    for token in tokenizer.tokens:
        if token.start != start:
            break
        yield _token(token.token_type, token.text, text[start : token.end + 1], start)
        start = _gap_end(text, token.end + 1)
    yield _Token(END if start == len(text) else STRANGE, text[start:], start)


def _gap_end(text: str, start: int) -> int:
    found = _GAP.match(text, start)
    return found.end() if found else start


def _token(kind: TokenType, value: str, source: str, start: int) -> _Token:
    """One token, by how it is written: sqlglot has several ways for most."""
    if kind is TokenType.STRING and source.startswith("'"):
        return _Token(TEXT, value, start)
    if kind is TokenType.IDENTIFIER and source.startswith('"'):
        return _Token(NAME, value, start)
    word = " ".join(source.upper().split()) if source.isascii() else source
    if word in _WORDS or word in _SIGNS:
        return _Token(word, source, start)
    return _Token(NAME if _NAME.fullmatch(source) else STRANGE, source, start)


# ------------------------------------------------------------------------------------------------- the sentence


def _selected(reader: _Reader) -> tuple[dict[str, str], str]:
    """Column → its name in the answer, and the count's name; FROM is taken."""
    names: dict[str, str] = {}
    kind = reader.take(SELECT).kind
    while kind != FROM:
        said = reader.take(NAME, COUNT)
        if said.kind == COUNT:
            for sign in "(*)":
                reader.take(sign)
        column = COUNT if said.kind == COUNT else _column(said)
        if column in names:
            raise BadSql(said.start, f"{'count(*)' if column == COUNT else column} is selected twice")
        follows = reader.take(",", AS, FROM)
        named = said._replace(value="count") if said.kind == COUNT else said
        if follows.kind == AS:
            named, follows = reader.take(NAME, COUNT), reader.take(",", FROM)
        if not 1 <= len(named.value) <= MAX_NAME_CHARS:
            rule = f"1 to {MAX_NAME_CHARS} characters"
            raise BadSql(named.start, f"the name has {len(named.value)} characters", rule)
        if named.value in names.values():
            raise BadSql(named.start, "two columns of the answer have one name")
        names[column], kind = named.value, follows.kind
    if COUNT not in names:
        raise BadSql(follows.start, "count(*) is not selected")
    return names, names.pop(COUNT)


def _conditions(reader: _Reader) -> tuple[tuple[bytes, ...], int, dict[str, tuple[str, ...]], _Token]:
    """Whose events, of what age, and which; and the token that follows."""
    said: dict[str, tuple[str, ...]] = {}
    age_ms: int | None = None
    kind = AND
    while kind == AND:
        name = reader.take(NAME)
        column = AGE if name.value.lower() == AGE else _column(name)
        if column in said or (column == AGE and age_ms is not None):
            raise BadSql(name.start, f"{column} is bounded twice")
        if column == AGE:
            reader.take("<")
            age_ms = _age(reader.take(TEXT))
        else:
            said[column] = _values(reader, column)
        follows = reader.take(AND, GROUP_BY, ";", END)
        kind = follows.kind
    if USER not in said:
        raise BadSql(follows.start, "the conditions do not say whose events: AND user = '…' is missing")
    if age_ms is None:
        raise BadSql(follows.start, "the conditions do not say of what age: AND age < '7d' is missing")
    users = tuple(user.encode() for user in said.pop(USER))
    return users, age_ms, said, follows


def _values(reader: _Reader, column: str) -> tuple[str, ...]:
    """The texts that a column may be, each once."""
    if reader.take("=", IN).kind == "=":
        return (_value(reader.take(TEXT), column),)
    most = MAX_USERS if column == USER else MAX_VALUES
    values: dict[str, None] = {}
    kind = reader.take("(").kind
    while kind != ")":
        token = reader.take(TEXT)
        values[_value(token, column)] = None
        if len(values) > most:
            raise BadSql(token.start, f"there are more than {most:,} values", f"at most {most:,} values")
        kind = reader.take(",", ")").kind
    return tuple(values)


def _grouped(reader: _Reader, follows: _Token, names: dict[str, str]) -> _Token:
    """Reads GROUP BY, which names each selected column once; gives the token that follows."""
    left = list(names)
    while follows.kind in (GROUP_BY, ","):
        name = reader.take(NAME)
        column = _column(name)
        if column not in left:
            what = "named twice" if column in names else "not selected"
            raise BadSql(
                name.start, f"{column} is {what}", f"each of the selected columns once: {', '.join(names)}"
            )
        left.remove(column)
        follows = reader.take(",", ";", END)
    if left:
        raise BadSql(follows.start, f"GROUP BY does not name {', '.join(left)}, which is selected")
    return follows


def _column(name: _Token) -> str:
    if name.value.lower() not in NAMES:
        raise BadSql(name.start, f"there is no column {name.value[:40]!r}", f"one of {', '.join(NAMES)}")
    return NAMES[name.value.lower()]


def _value(token: _Token, column: str) -> str:
    value, choices = token.value, CHOICES.get(column)
    if choices and value not in choices:
        raise BadSql(token.start, f"there is no {column} {value[:40]!r}", f"one of {', '.join(choices)}")
    if not value or _NO_TEXT.search(value) or len(value.encode()) > MAX_ID_BYTES:
        raise BadSql(token.start, "the text is empty, too long, or holds the character NUL", _TEXT_RULE)
    return value


def _age(token: _Token) -> int:
    found = span_ms(token.value)
    if found is None:
        raise BadSql(token.start, f"{token.value[:40]!r} is not an age", SPAN_RULE)
    return found
