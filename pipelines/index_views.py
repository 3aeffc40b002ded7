"""The view of an index: in SQL what serving answers of it, its served base merged with the delta after it.

Belongs here: the query, which follows from the index's specification alone. Does not belong here: what a view is
(`views`), which base is served and how SQL knows it (`served`), and the copying of the delta (`jobs.epochs`).

It is the merge of `indexing.merge` once more: of the facts with the same identity that of greatest rank stands. Of the
delta each identity's greatest is taken first. It is few rows, which an engine can hold while those of the base pass
by; of the base each identity has one row, or the gate would not have let it pass (`quality.checks`). Nothing is asked
of an epoch's place: one that the base holds already changes nothing, nor does one that was copied twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines import index_rows, lake, served
from pipelines.indexing.facts import VERSION_COLUMNS, payload_column
from pipelines.indexing.spec import Documents, Family, IndexSpec, Sums, Timeline
from pipelines.views import View

RANK = (*VERSION_COLUMNS, "is_deleted", "content_hash")

_KEY = {"key": "whose it is"}
_OF_FACT = {
    "source_version": "first part of its version: that of its source",
    "is_from_delta": "whether the delta said it; else the base",
    "committed_at": "when it was committed to the delta, UTC; null of what the base says",
}


def view(spec: IndexSpec) -> View:
    """`explore.<index>_served`: a row a document, an event, or a key and time bucket."""
    kinds = {Documents: _documents, Timeline: _timeline, Sums: _sums}
    what, columns, body = kinds[type(spec.read)](spec)
    parts = [
        _served(spec),
        _changed(spec),
        *[_standing(spec, family) for family in spec.families],
        *body[:-1],
    ]
    return View(
        name=f"{spec.name}_served",
        doc=f"{what} of the index {spec.name} as served: its base with the delta, which is copied each minute",
        sql="WITH " + ",\n".join(parts) + "\n" + body[-1],
        columns=columns,
        examples=_examples(spec),
    )


def _served(spec: IndexSpec) -> str:
    return f"""served AS (
        SELECT lineage, is_with_delta, horizon_from_ms FROM {lake.OPS_SERVED.name} WHERE "index" = '{spec.name}'
    )"""


def _changed(spec: IndexSpec) -> str:
    """Of the delta of the served lineage, the greatest fact of each identity."""
    order = ", ".join(f"d.{name} DESC" for name in RANK)
    names = dict.fromkeys(("identity", "family", *RANK, *_picked(spec), "committed_at"))
    payloads = (
        () if isinstance(spec.read, Sums) else (payload_column(family.name) for family in spec.families)
    )
    picked = ", ".join(f"d.{name}" for name in (*names, *payloads))
    return f"""changed AS (
        SELECT * FROM (
            SELECT {picked}, row_number() OVER (PARTITION BY d.identity ORDER BY {order}) AS place
            FROM {index_rows.delta_table(spec).name} AS d
            JOIN served AS s ON s.lineage = d.lineage AND s.is_with_delta
        ) AS ranked WHERE place = 1
    )"""


def _standing(spec: IndexSpec, family: Family) -> str:
    """The facts of a family that stand, tombstones too, of base and delta."""
    picked = {name: name for name in _picked(spec)}
    if not isinstance(spec.read, Sums):
        picked["payload"] = payload_column(family.name)
    sides = ", ".join(
        f"{side}.{name} AS {side}_{shown}" for shown, name in picked.items() for side in ("b", "d")
    )
    ranks = [f"({', '.join(f'{side}.{name}' for name in RANK)})" for side in ("d", "b")]
    chosen = ", ".join(
        f"CASE WHEN is_from_delta THEN d_{name} ELSE b_{name} END AS {name}" for name in picked
    )
    return f"""{_name("of", family.name)} AS (
        SELECT {chosen}, CASE WHEN is_from_delta THEN committed_at END AS committed_at, is_from_delta
        FROM (
            SELECT {sides}, d.committed_at,
                   d.identity IS NOT NULL AND (b.identity IS NULL OR {ranks[0]} > {ranks[1]}) AS is_from_delta
            FROM (
                SELECT * FROM {index_rows.table(spec).name} FOR VERSION AS OF '{served.TAG}'
                WHERE family = '{family.name}'
            ) AS b
            FULL JOIN (SELECT * FROM changed WHERE family = '{family.name}') AS d ON d.identity = b.identity
        ) AS sides
    )"""


def _picked(spec: IndexSpec) -> tuple[str, ...]:
    """What is read of a fact beside its rank and what it says."""
    if isinstance(spec.read, Sums):
        return "key", "time_ms", "is_deleted", "amounts"
    of_event = () if isinstance(spec.read, Documents) else ("id", "time_ms")
    return "key", *of_event, "version_1", "is_deleted"


Shape = tuple[str, dict[str, str], list[str]]
"""What a row is, what each column says, and the last parts of the query."""


def _documents(spec: IndexSpec) -> Shape:
    assert isinstance(spec.read, Documents)
    presence = spec.family(spec.read.presence)
    joins = "\n".join(
        f"LEFT JOIN {_name('of', family.name)} AS {_name('f', family.name)}"
        f" ON {_name('f', family.name)}.key = {_name('f', presence.name)}.key"
        f" AND NOT {_name('f', family.name)}.is_deleted"
        for family in spec.families
        if family != presence
    )
    chosen, columns = [f"from_utf8({_name('f', presence.name)}.key) AS key"], dict(_KEY)
    for family in spec.families:
        chosen += _fields(spec, family)
        columns |= _docs(spec, family)
    query = f"""SELECT {_listed(chosen)}
        FROM {_name("of", presence.name)} AS {_name("f", presence.name)}
        {joins}
        WHERE NOT {_name("f", presence.name)}.is_deleted"""
    return "the documents", columns, [query]


def _timeline(spec: IndexSpec) -> Shape:
    assert isinstance(spec.read, Timeline)
    first, *others = spec.families
    alias = _name("f", first.name)
    has_horizon = spec.read.age_ms is not None
    joins = ["CROSS JOIN served AS s"] if has_horizon else []
    joins += [
        f"LEFT JOIN {_name('of', other.name)} AS {_name('f', other.name)} ON {_name('f', other.name)}.key ="
        f" {alias}.key AND {_name('f', other.name)}.id = {alias}.id AND NOT {_name('f', other.name)}.is_deleted"
        + (f" AND {_name('f', other.name)}.time_ms >= coalesce(s.horizon_from_ms, 0)" if has_horizon else "")
        for other in others
    ]
    chosen = [f"from_utf8({alias}.key) AS key", f"from_utf8({alias}.id) AS id"]
    chosen += [f"{_time(f'{alias}.time_ms')} AS event_time"]
    columns = {**_KEY, "id": "the event's own id", "event_time": "when, UTC"}
    for family in spec.families:
        chosen += _fields(spec, family)
        columns |= _docs(spec, family)
    inside = f" AND {alias}.time_ms >= coalesce(s.horizon_from_ms, 0)" if has_horizon else ""
    if spec.read.count is not None:
        order = f"PARTITION BY {alias}.key ORDER BY {alias}.time_ms DESC, {alias}.id DESC"
        chosen.append(f"row_number() OVER ({order}) AS nth_newest")
        columns["nth_newest"] = "its place in the timeline, the newest first"
    query = f"""SELECT {_listed(chosen)}
        FROM {_name("of", first.name)} AS {alias}
        {" ".join(joins)}
        WHERE NOT {alias}.is_deleted{inside}"""
    if spec.read.count is not None:
        query = f"SELECT * FROM ({query}) AS ordered WHERE nth_newest <= {spec.read.count}"
    return "the events", columns, [query]


def _sums(spec: IndexSpec) -> Shape:
    read = spec.read
    assert isinstance(read, Sums)
    parts = "\n        UNION ALL ".join(
        f"SELECT * FROM (SELECT key, time_ms - time_ms % {read.width_ms} AS bucket_ms, amounts, is_from_delta,"
        f" is_deleted FROM {_name('of', family.name)}) AS {_name('f', family.name)}"
        for family in spec.families
    )
    inside = "" if read.age_ms is None else " AND bucket_ms >= coalesce(s.horizon_from_ms, 0)"
    joined = "" if read.age_ms is None else " CROSS JOIN served AS s"
    counted = f"""counted AS (
        SELECT key, bucket_ms, amounts, is_from_delta FROM ({parts}) AS facts{joined} WHERE NOT is_deleted{inside}
    )"""
    amounts = [
        f'sum(coalesce(element_at(amounts, {place}), 0)) AS "sum_{name}"'
        for place, name in enumerate(read.amounts, 1)
    ]
    totals = f"""totals AS (
        SELECT key, bucket_ms, {_listed(amounts)},
               count(*) AS facts, count(CASE WHEN is_from_delta THEN 1 END) AS facts_from_delta
        FROM counted GROUP BY key, bucket_ms
    )"""
    names = [f'"sum_{name}"' for name in read.amounts]
    query = f"""SELECT from_utf8(key) AS key, {_time("bucket_ms")} AS bucket_began_at, {_listed(names)},
               facts, facts_from_delta
        FROM totals WHERE {" OR ".join(f"{name} <> 0" for name in names)}"""
    columns = {
        **_KEY,
        "bucket_began_at": f"begin of the time bucket, which is {read.width_ms:,} ms wide, UTC",
        **{f"sum_{name}": f"sum of {name}" for name in read.amounts},
        "facts": "of how many facts these are the sums",
        "facts_from_delta": "how many of them the delta said",
    }
    return "the sums by key and time bucket", columns, [counted, totals, query]


def _fields(spec: IndexSpec, family: Family) -> Iterator[str]:
    """The columns of a family: what it says, and where that is from."""
    alias = _name("f", family.name)
    for field in family.schema:
        yield f'{alias}.payload."{field.name}" AS "{shown(spec, family, field.name)}"'
    yield f'{alias}.version_1 AS "{shown(spec, family, "source_version")}"'
    yield f'{alias}.is_from_delta AS "{shown(spec, family, "is_from_delta")}"'
    yield f'{alias}.committed_at AS "{shown(spec, family, "committed_at")}"'


def _docs(spec: IndexSpec, family: Family) -> dict[str, str]:
    said = {field.name: f"of the family {family.name}" for field in family.schema} | _OF_FACT
    return {shown(spec, family, name): doc for name, doc in said.items()}


def shown(spec: IndexSpec, family: Family, name: str) -> str:
    """A column's name: with its family's where there are several."""
    if len(spec.families) == 1:
        return name
    before = "is_" if name.startswith("is_") else ""
    return f"{before}{family.name}_{name.removeprefix(before)}"


def _name(before: str, family: str) -> str:
    return f'"{before}_{family}"'


def _time(ms: str) -> str:
    return f"TIMESTAMP '1970-01-01 00:00:00 UTC' + {ms} * INTERVAL '0.001' SECOND"


def _listed(parts: list[str]) -> str:
    return ",\n               ".join(parts)


def _examples(spec: IndexSpec) -> tuple[str, ...]:
    name = f"explore.{spec.name}_served"
    if isinstance(spec.read, Sums):
        return (
            f"SELECT sum(facts) AS counted, sum(facts_from_delta) AS changed FROM {name}",
            f"SELECT key, sum(facts_from_delta) AS changed FROM {name} WHERE facts_from_delta > 0 GROUP BY key"
            " ORDER BY changed DESC, key LIMIT 10",
        )
    read = spec.read
    first = spec.family(read.presence) if isinstance(read, Documents) else spec.families[0]
    flag = shown(spec, first, "is_from_delta")
    order = "key" if isinstance(read, Documents) else "key, id"
    return (
        f"SELECT {flag}, count(*) AS rows FROM {name} GROUP BY {flag} ORDER BY {flag}",
        f"SELECT * FROM {name} WHERE {flag} ORDER BY {order} LIMIT 10",
    )
