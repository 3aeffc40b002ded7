"""Where each column of a DataFrame comes from, read off the plan that Spark has made of the code.

Belongs here: from an analyzed plan to the columns that it reads, for any DataFrame. Nothing runs, and nobody types a
lineage by hand. Does not belong here: which tables there are and by what they are computed (`derived`), and how a
lineage is shown (`assets`).

A Python function that takes whole rows (`mapInArrow`) cannot be looked into: each of its columns depends on all that it
is given, and says so (`OPAQUE`). A relation that has no name was made by the code itself, and depends on nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.errors import TidemarkError
from pipelines.settings import CATALOG

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

IDENTITY, TRANSFORMATION, AGGREGATION, OPAQUE = "identity", "transformation", "aggregation", "opaque"
CONDITION, FILTER, JOIN, GROUP_BY, SORT, WINDOW = (
    "condition",
    "filter",
    "join",
    "group_by",
    "sort",
    "window",
)
DIRECT = (IDENTITY, TRANSFORMATION, AGGREGATION, OPAQUE)
"""The value is made of the column's: as it is; by an expression; by an aggregate; by code that nobody can look into."""
INDIRECT = (CONDITION, FILTER, JOIN, GROUP_BY, SORT, WINDOW)
"""The column only decides which value, or which row, it is. (The terms are OpenLineage's.)"""


class Untraceable(TidemarkError):
    """A plan has a step that this module does not know."""


class Dependency(NamedTuple):
    """A column that another depends on, and how; inside a struct its path, as `catalogue.title`."""

    table: str
    column: str
    kind: str

    @property
    def is_direct(self) -> bool:
        """Whether the value is made of it."""
        return self.kind in DIRECT


class Lineage(NamedTuple):
    """Of each column (and of each field of a struct that the code puts together) what it depends on.

    Attributes:
        columns: Path → what its value depends on.
        rows: What decides which rows there are, and so every column.
    """

    columns: dict[str, tuple[Dependency, ...]]
    rows: tuple[Dependency, ...]

    def sources(self, path: str) -> list[tuple[str, str]]:
        """The columns that a value is made of, as (table, path), sorted."""
        return sorted({(d.table, d.column) for d in self.of(path) if d.is_direct})

    def of(self, path: str) -> tuple[Dependency, ...]:
        """What is known of a field, or else of what it is in."""
        while path not in self.columns:
            path, _, _ = path.rpartition(".")
            if not path:
                return ()
        return self.columns[path]

    def to_json(self) -> dict[str, Any]:
        """For metadata; `from_json` reads it."""
        return {
            "columns": {path: [list(d) for d in found] for path, found in self.columns.items()},
            "rows": [list(d) for d in self.rows],
        }


def from_json(value: Mapping[str, Any]) -> Lineage:
    """Read `Lineage.to_json`."""
    columns = {path: tuple(Dependency(*d) for d in found) for path, found in value["columns"].items()}
    return Lineage(columns, tuple(Dependency(*d) for d in value["rows"]))


def trace(frame: DataFrame) -> Lineage:
    """The lineage of a DataFrame's columns. Reads the plan alone: tens of milliseconds, and no job.

    Raises:
        Untraceable: The plan has a step that is not known here; the message names it.
    """
    nodes = json.loads(frame._jdf.queryExecution().analyzed().toJSON())
    step = _step(_tree(nodes), None)
    columns: dict[str, tuple[Dependency, ...]] = {}
    for name, (_, value) in zip(frame.columns, step.outputs, strict=True):
        columns |= {path: tuple(sorted(deps)) for path, deps in _flat(name, value)}
    return Lineage(columns, tuple(sorted(step.rows)))


def opaque(frame: DataFrame, schema: str) -> DataFrame:
    """A step with these columns, to be traced and not run: it stands for code that makes them of all of `frame`."""

    def never(batches: Any) -> Any:
        raise AssertionError("this plan is only looked at")

    return frame.mapInArrow(never, schema)


# ------------------------------------------------------------------------------------------------ values

Deps = frozenset[Dependency]
NOTHING: Deps = frozenset()


class _Value(NamedTuple):
    """What an expression depends on; of a struct that was put together here, its fields, too."""

    deps: Deps = NOTHING
    fields: Mapping[str, Any] = {}


class _Node(NamedTuple):
    """A node of a plan or of an expression, as Spark writes it, with its children."""

    kind: str
    said: Mapping[str, Any]
    children: tuple[_Node, ...]


class _Step(NamedTuple):
    """What a node of a plan gives: its columns in order, by Spark's id, and what decides about its rows."""

    outputs: list[tuple[int, _Value]]
    rows: Deps


def _tree(nodes: list[dict[str, Any]]) -> _Node:
    """Spark writes a tree as the list of its nodes, a parent before its children."""
    given = iter(nodes)

    def grow() -> _Node:
        said = next(given)
        return _Node(
            said["class"].rpartition(".")[2].rstrip("$"),
            said,
            tuple(grow() for _ in range(said["num-children"])),
        )

    return grow()


def _as(kind: str, deps: Iterable[Dependency]) -> Deps:
    """Dependencies of something that depends, in this way, on what has these."""
    return frozenset(d._replace(kind=_through(kind, d.kind)) for d in deps)


def _through(outer: str, inner: str) -> str:
    if outer in INDIRECT:  # what decides about something that decides, decides in the same way
        return outer
    return inner if inner in INDIRECT else max(inner, outer, key=DIRECT.index)


def _all(values: Iterable[_Value]) -> Deps:
    return frozenset().union(*(value.deps for value in values))


def _merged(values: list[_Value]) -> _Value:
    """One of several values, as of the branches of a CASE or of a union."""
    structs = [value.fields for value in values if value.fields]
    names = dict.fromkeys(name for fields in structs for name in fields)
    is_known = all(value.fields for value in values if value.deps)
    return _Value(
        _all(values),
        {n: _merged([fields[n] for fields in structs if n in fields]) for n in names} if is_known else {},
    )


def _flat(path: str, value: _Value) -> Iterable[tuple[str, Deps]]:
    yield path, value.deps
    for name, inner in value.fields.items():
        yield from _flat(f"{path}.{name}", inner)


def _with(value: _Value, deps: Deps) -> _Value:
    """A value that also depends on something else, and so do its fields."""
    if not deps:
        return value
    return _Value(value.deps | deps, {name: _with(inner, deps) for name, inner in value.fields.items()})


# ------------------------------------------------------------------------------------------------ expressions

Scope = Mapping[int, _Value]


def _value(node: _Node, scope: Scope) -> _Value:
    """What an expression depends on, where `scope` says it of the columns that it can see."""
    match node.kind:
        case "AttributeReference":
            if _id(node) not in scope:
                raise _unknown(
                    node, f"a reference to {node.said.get('name')!r}, which is outside of what it sees"
                )
            return scope[_id(node)]
        case "Alias":
            return _value(node.children[0], scope)
        case "CaseWhen":
            return _case(node.children, scope)
        case "If":
            return _case(node.children, scope)
        case "CreateNamedStruct":
            return _struct(node.children, scope)
        case "GetStructField":
            return _field(node, scope)
        case "AggregateExpression":
            function, *conditions = [_value(child, scope) for child in node.children]
            return _Value(_as(AGGREGATION, function.deps) | _as(CONDITION, _all(conditions)))
        case "WindowExpression":
            function, window = [_value(child, scope) for child in node.children]
            if not function.deps:  # a rank, a row's number: the window is all that it is made of
                return _Value(_as(TRANSFORMATION, window.deps))
            return _Value(_as(TRANSFORMATION, function.deps) | _as(WINDOW, window.deps))
        case "PythonUDF":
            return _Value(_as(OPAQUE, _all(_value(child, scope) for child in node.children)))
    if "plan" in node.said:
        raise _unknown(node, "a subquery inside an expression")
    return _Value(_as(TRANSFORMATION, _all(_value(child, scope) for child in node.children)))


def _case(children: tuple[_Node, ...], scope: Scope) -> _Value:
    """Condition, value, condition, value, …, and perhaps what else."""
    values = [_value(child, scope) for child in children]
    conditions = values[0 : len(values) - 1 : 2]
    results = values[1::2] + (values[-1:] if len(values) % 2 else [])
    return _with(_merged(results), _as(CONDITION, _all(conditions)))


def _struct(children: tuple[_Node, ...], scope: Scope) -> _Value:
    names = [str(child.said["value"]) for child in children[::2]]
    values = [_value(child, scope) for child in children[1::2]]
    return _Value(_as(TRANSFORMATION, _all(values)), dict(zip(names, values, strict=True)))


def _field(node: _Node, scope: Scope) -> _Value:
    struct, name = _value(node.children[0], scope), str(node.said.get("name") or "")
    if name in struct.fields:
        found: _Value = struct.fields[name]
        return found
    if name and all(d.kind == IDENTITY or not d.is_direct for d in struct.deps):
        inner = (d._replace(column=f"{d.column}.{name}") if d.is_direct else d for d in struct.deps)
        return _Value(frozenset(inner))
    return _Value(_as(TRANSFORMATION, struct.deps))


def _id(node: _Node) -> int:
    return int(node.said["exprId"]["id"])


def _expressions(said: Any) -> list[_Node]:
    """The expressions of a field of a plan's node: one, or a list of them."""
    if not said:
        return []
    return [_tree(said)] if isinstance(said[0], dict) else [_tree(one) for one in said]


# ------------------------------------------------------------------------------------------------ steps of a plan

_PASSED_ON = (
    "EventTimeWatermark",
    "GlobalLimit",
    "LocalLimit",
    "Offset",
    "RebalancePartitions",
    "Repartition",
    "RepartitionByExpression",
    "ResolvedHint",
    "Sample",
    "Tail",
    "View",
)
"""Steps that leave columns as they are, and do not choose rows by them."""


def _step(node: _Node, name: str | None) -> _Step:
    """What a node of a plan gives; `name` is what its relation is called, where that stands right above it."""
    if node.kind == "SubqueryAlias":
        return _step(node.children[0], _name(node.said["identifier"]))
    if not node.children:
        return _relation(node, name)
    steps = [_step(child, name if node.kind == "View" else None) for child in node.children]
    if node.kind in _STEPS:
        return _STEPS[node.kind](node, steps)
    if node.kind in _PASSED_ON:
        return steps[0]
    if node.kind.endswith(("InArrow", "InPandas", "InPySpark")):  # what Python makes of whole rows or groups
        return _opaque(node, steps)
    raise _unknown(node, f"the step {node.kind}")


def _relation(node: _Node, name: str | None) -> _Step:
    columns = _expressions(node.said.get("output"))
    if name is None:
        return _Step([(_id(column), _Value()) for column in columns], NOTHING)
    known = [(_id(c), _Value(frozenset({Dependency(name, c.said["name"], IDENTITY)}))) for c in columns]
    return _Step(known, NOTHING)


def _name(identifier: Mapping[str, Any]) -> str:
    qualifier = identifier.get("qualifier") or ""
    if isinstance(qualifier, str):  # as Scala writes a list: [lake, raw]
        qualifier = [part for part in qualifier.strip("[]").split(", ") if part]
    return ".".join([*qualifier, identifier["name"]]).removeprefix(f"{CATALOG}.")


def _scope(steps: list[_Step]) -> dict[int, _Value]:
    return {number: value for step in steps for number, value in step.outputs}


def _rows(steps: list[_Step], *more: Deps) -> Deps:
    return frozenset().union(*(step.rows for step in steps), *more)


def _needed(expressions: list[_Node], scope: Scope) -> Deps:
    return _all(_value(expression, scope) for expression in expressions)


def _named(expressions: list[_Node], scope: Scope) -> list[tuple[int, _Value]]:
    return [(_id(expression), _value(expression, scope)) for expression in expressions]


def _project(node: _Node, steps: list[_Step]) -> _Step:
    return _Step(_named(_expressions(node.said["projectList"]), _scope(steps)), _rows(steps))


def _filter(node: _Node, steps: list[_Step]) -> _Step:
    needed = _needed(_expressions(node.said["condition"]), _scope(steps))
    return _Step(steps[0].outputs, _rows(steps, _as(FILTER, needed)))


def _aggregate(node: _Node, steps: list[_Step]) -> _Step:
    scope = _scope(steps)
    grouped = _needed(_expressions(node.said["groupingExpressions"]), scope)
    made = _named(_expressions(node.said["aggregateExpressions"]), scope)
    return _Step(made, _rows(steps, _as(GROUP_BY, grouped)))


def _window(node: _Node, steps: list[_Step]) -> _Step:
    made = _named(_expressions(node.said["windowExpressions"]), _scope(steps))
    return _Step([*steps[0].outputs, *made], _rows(steps))


def _join(node: _Node, steps: list[_Step]) -> _Step:
    needed = _needed(_expressions(node.said.get("condition")), _scope(steps))
    kind = json.dumps(node.said["joinType"])
    is_left_alone = "LeftSemi" in kind or "LeftAnti" in kind
    outputs = steps[0].outputs if is_left_alone else [*steps[0].outputs, *steps[1].outputs]
    return _Step(outputs, _rows(steps, _as(JOIN, needed)))


def _union(node: _Node, steps: list[_Step]) -> _Step:
    columns = zip(*(step.outputs for step in steps), strict=True)
    return _Step(
        [(column[0][0], _merged([value for _, value in column])) for column in columns], _rows(steps)
    )


def _sort(node: _Node, steps: list[_Step]) -> _Step:
    needed = _needed(_expressions(node.said["order"]), _scope(steps))
    return _Step(steps[0].outputs, _rows(steps, _as(SORT, needed)))


def _distinct(node: _Node, steps: list[_Step]) -> _Step:
    return _Step(steps[0].outputs, _rows(steps, _as(GROUP_BY, _all(v for _, v in steps[0].outputs))))


def _deduplicate(node: _Node, steps: list[_Step]) -> _Step:
    needed = _needed(_expressions(node.said["keys"]), _scope(steps))
    return _Step(steps[0].outputs, _rows(steps, _as(GROUP_BY, needed)))


def _generate(node: _Node, steps: list[_Step]) -> _Step:
    needed = _as(TRANSFORMATION, _needed(_expressions(node.said["generator"]), _scope(steps)))
    made = [(_id(column), _Value(needed)) for column in _expressions(node.said["generatorOutput"])]
    return _Step([*steps[0].outputs, *made], _rows(steps))


def _opaque(node: _Node, steps: list[_Step]) -> _Step:
    needed = _as(OPAQUE, _all(value for step in steps for _, value in step.outputs))
    made = [(_id(column), _Value(needed)) for column in _expressions(node.said["output"])]
    return _Step(made, _rows(steps))


_STEPS: dict[str, Callable[[_Node, list[_Step]], _Step]] = {
    "Aggregate": _aggregate,
    "Deduplicate": _deduplicate,
    "Distinct": _distinct,
    "Filter": _filter,
    "Generate": _generate,
    "Join": _join,
    "Project": _project,
    "Sort": _sort,
    "Union": _union,
    "Window": _window,
}


def _unknown(node: _Node, what: str) -> Untraceable:
    return Untraceable(
        f"the plan has {what}",
        where=node.said["class"],
        remedy="teach `pipelines.column_lineage` what it does with columns",
    )
