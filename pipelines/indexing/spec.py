"""What an index declares: families of columns, how it is read, and its access paths.

Belongs here: the declaration and what follows from it alone (schemas, lineage, mistakes in it). A new index is one
module that builds an ``IndexSpec``, and one line in ``pipelines.indices``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from pipelines.errors import TidemarkError


class BadSpec(TidemarkError):
    """An index declares something that does not fit together."""


class State(Protocol):
    """What a transform may look up, as it stands at one point. It only moves forward."""

    def look_up(self, name: str, rows: Any) -> Any:
        """Rows joined with what the named relation says of them; what the rows have, and the join gives, the index's
        domain declares. In batch they are a DataFrame of the table that the family reads, in a stream an Arrow table of
        its records; what is given back is of the same kind."""
        ...


class NoState:
    """The state of transforms that look nothing up."""

    def look_up(self, name: str, rows: Any) -> Any:
        """Raises ``BadSpec``: there is no state here."""
        raise BadSpec(
            f"a transform looks up {name!r}, but was given no state",
            remedy="give the stream or build a State",
        )


class Stepped(NamedTuple):
    """What a step makes of a key's new rows.

    Attributes:
        kept: The bytes to keep of the key.
        facts: Those that changed.
        left_out: How many of the rows were too old to be judged, which the next base makes good.
        crowded_out: How much of the key is not kept any more, for there is too much of it.
    """

    kept: bytes
    facts: pa.Table
    left_out: int
    crowded_out: int = 0


Step = Callable[[bytes | None, pa.Table], Stepped]
"""What was kept of a key (None: nothing), and its new rows → what a stream tells and keeps. Pure, and the order of rows
must not matter."""


class Keyed(NamedTuple):
    """How a stream makes a family of all that is known of a key together, rather than of each row.

    Attributes:
        key: The column of the rows by which they belong together; a text.
        columns: Gives the columns that a step reads, the key among them.
        step: Gives the step. It is asked once a query, and what it holds goes to Spark's workers. It is given up to
            which broker time (ms) there were records that the stream never read; None: it began at the beginning.
        meaning: Gives the fingerprint of what steps hold beside their code: another one must not meet what was kept.
        reach_ms: Gives how far behind what is new a step has to know all.
    """

    key: str
    columns: Callable[[], tuple[str, ...]]
    step: Callable[[int | None], Step]
    meaning: Callable[[], str]
    reach_ms: Callable[[], int]


class Family(NamedTuple):
    """A column family: facts of one schema, from one stream or (``stream=None``) from batch alone.

    ``takes_arrow``: whether the transform takes an Arrow table as well as a DataFrame, and gives the same kind. A
    stream then runs it in its own process: a job of Spark's costs more than the few rows of an epoch.
    ``looks_up``: relations whose columns the rows must have before the transform is given them; see `looked_up`.
    ``keyed``: the transform is of a whole table, and a stream goes by steps instead (``keyed.KeyedRun``).
    """

    name: str
    schema: pa.Schema
    stream: str | None
    transform: Callable[[Any, State], Any]
    takes_arrow: bool = False
    looks_up: tuple[str, ...] = ()
    keyed: Keyed | None = None


def looked_up(family: Family, rows: Any, state: State) -> Any:
    """Rows with what the relations that a family looks up say of them: what its transform is given.

    In a stream they are an Arrow table still, so that a look-up costs no job of Spark's.
    """
    for name in family.looks_up:
        rows = state.look_up(name, rows)
    return rows


class Documents(NamedTuple):
    """The families of a key, joined. Without a live fact in ``presence`` there is no document."""

    presence: str


class Timeline(NamedTuple):
    """A key's events by (time, id), newest first; the first family is the event, others are joined to it by id.

    ``age_ms`` counts back from the greatest broker time at the base's cut; ``count`` is the number of newest events
    that a base keeps for a key. None: no limit.
    """

    age_ms: int | None = None
    count: int | None = None  # type: ignore[assignment]  # hides tuple.count, which nobody needs


class Sums(NamedTuple):
    """Sums of ``amounts`` by key and time bucket of ``width_ms``, inside the horizon of ``age_ms`` (None: all)."""

    width_ms: int
    amounts: tuple[str, ...]
    age_ms: int | None = None


class Forward(NamedTuple):
    """Columns of a family that can be read for many documents at once."""

    family: str
    columns: tuple[str, ...]


class Inverted(NamedTuple):
    """Posting lists: the documents whose ``column`` of ``family`` equals a term."""

    name: str
    family: str
    column: str


class Vector(NamedTuple):
    """Nearest neighbours by inner product over a column of float32[dimensions].

    Of a family that a stream feeds, a vector is as its document is now; of a base-only one, as the base has it.
    ``is_scanned``: it is always asked for with a filter, which a graph is of no use for, so none is built.
    """

    name: str
    family: str
    column: str
    dimensions: int
    is_scanned: bool = False


Read = Documents | Timeline | Sums
Access = Forward | Inverted | Vector


class IndexSpec(NamedTuple):
    """An index: everything that builder, delta, overlay, view, checks and tests need to know about it."""

    name: str
    families: tuple[Family, ...]
    read: Read
    access: tuple[Access, ...] = ()

    def family(self, name: str) -> Family:
        """The family of that name; raises ``BadSpec`` naming those there are."""
        for family in self.families:
            if family.name == name:
                return family
        raise BadSpec(
            f"index {self.name!r} has no family {name!r}",
            remedy="it has: " + ", ".join(f.name for f in self.families),
        )

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that feed this index, each once."""
        return tuple(dict.fromkeys(f.stream for f in self.families if f.stream is not None))


def check(spec: IndexSpec) -> IndexSpec:
    """The same spec, or ``BadSpec`` with the first thing in it that does not fit together."""
    names = [f.name for f in spec.families]
    if not names or len(set(names)) != len(names):
        raise BadSpec(f"index {spec.name!r} needs families with different names; it has {names}")
    if any(f.keyed for f in spec.families) and len(spec.families) > 1:
        raise BadSpec(f"index {spec.name!r}: a keyed family is the only one of its index")
    if isinstance(spec.read, Documents):
        spec.family(spec.read.presence)
    elif spec.access:
        raise BadSpec(f"index {spec.name!r}: only an index that is read as Documents has access paths")
    if isinstance(spec.read, Sums) and (spec.read.width_ms <= 0 or not spec.read.amounts):
        raise BadSpec(f"index {spec.name!r}: Sums need a positive width_ms and at least one amount")
    for access in spec.access:
        _check_access(spec, access)
    return spec


def _check_access(spec: IndexSpec, access: Access) -> None:
    family = spec.family(access.family)
    columns = access.columns if isinstance(access, Forward) else (access.column,)
    for column in columns:
        if column not in family.schema.names:
            raise BadSpec(
                f"index {spec.name!r}: family {family.name!r} has no column {column!r}",
                remedy="it has: " + ", ".join(family.schema.names),
            )
    if isinstance(access, Vector):
        wanted = pa.list_(pa.float32())
        if (kind := family.schema.field(access.column).type) != wanted:
            raise BadSpec(
                f"index {spec.name!r}: vector {access.name!r} needs a column of {wanted}, and {access.column} is {kind}"
            )


def lineage(spec: IndexSpec) -> str:
    """Fingerprint of an index's transforms and schemas: 12 hexadecimal digits.

    A horizon and a count are no part of it: they say how much of the same facts a base keeps, and each base declares
    its own.

    Comments and docstrings do not count, so that explaining a transform does not begin a new lineage. The whole
    module of a transform counts, because its helper functions do, and so do the modules of its own package that it
    imports.
    """
    described = {
        "name": spec.name,
        "read": [type(spec.read).__name__, *map(str, limited(spec, None, None).read)],
        "families": [
            [f.name, str(f.schema.remove_metadata()), f.stream, _code(f.transform)] for f in spec.families
        ],
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]


def limited(spec: IndexSpec, age_ms: int | None, count: int | None) -> IndexSpec:
    """The same index with another horizon, and of a timeline another count; Documents have neither."""
    match spec.read:
        case Timeline():
            return spec._replace(read=spec.read._replace(age_ms=age_ms, count=count))
        case Sums():
            return spec._replace(read=spec.read._replace(age_ms=age_ms))
    return spec


def declaration(spec: IndexSpec) -> dict[str, Any]:
    """What a lineage declares, for a manifest: how it is read, and each family's columns with their types."""
    return {
        "read": {"kind": type(spec.read).__name__, **spec.read._asdict()},
        "families": {f.name: {field.name: str(field.type) for field in f.schema} for f in spec.families},
    }


def read_as(spec: IndexSpec, declared: Mapping[str, Any]) -> IndexSpec:
    """The specification that a base of another lineage is read by: the code's families, the base's own way of reading.

    A horizon, a count or a presence are a base's own, because it was cut off by them.

    Args:
        declared: The base's ``declaration``; empty in one of before it was written.

    Raises:
        BadSpec: the two are read in ways that have nothing to do with each other.
    """
    if not declared:
        return spec
    theirs = dict(declared["read"])
    kind, ours = theirs.pop("kind"), type(spec.read)
    if isinstance(spec.read, Sums):
        theirs["amounts"] = tuple(theirs["amounts"])
    read = ours(**theirs) if kind == ours.__name__ else None
    if read is None or (isinstance(read, Sums) and read[:2] != spec.read[:2]):  # width and amounts
        raise BadSpec(
            f"it is read as {kind} of {theirs}, and this code reads {spec.name!r} as {spec.read}",
            remedy="serve it with the code of its lineage, or start serving anew with the code of the one to come",
        )
    return spec._replace(read=read)


@functools.cache
def _code(function: Callable[..., object]) -> str:
    module = inspect.getmodule(function)
    if module is None:
        return hashlib.sha256(_said(inspect.getsource(function))).hexdigest()
    sources = [_said(inspect.getsource(part)) for part in _parts(module)]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()


def _said(source: str) -> bytes:
    """What code does, without its comments and docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ]
    return ast.dump(tree).encode()


def _parts(module: ModuleType) -> list[ModuleType]:
    """A module, and those of its own package that it imports, and they, each once."""
    package = module.__name__.rpartition(".")[0]
    found = [module]
    for part in found:
        imports = (n for n in ast.walk(ast.parse(inspect.getsource(part))) if isinstance(n, ast.ImportFrom))
        named = {
            f"{n.module}.{name.name}" if n.module == package else n.module
            for n in imports
            for name in n.names
        }
        mine = sorted(name for name in named if name and name.startswith(f"{package}."))
        found += [m for m in map(importlib.import_module, mine) if m not in found]
    return found
