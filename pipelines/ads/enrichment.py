"""From changed rows to the documents that they concern: whose they are, and the joined rows that handlers make them of.

Belongs here: looking both up in the repository, in one of its transactions. Does not belong here: what a joined row is
(`joined`), what is made of it (`handlers`), and when and where it is done.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa
from sqlalchemy.engine import Connection

from pipelines.ads import handlers, joined, prepared, repository
from pipelines.ads.joined import INPUTS
from pipelines.ads.prepared import Prepared
from pipelines.ads.repository import Change


def look_up(
    connection: Connection,
    family: str,
    ads: Iterable[str],
    tables: Mapping[str, Prepared] | None = None,
) -> pa.Table:
    """The joined rows of ads for a family of the document, in the order given; each row of a table is read once.

    An ad of which nothing was ever said has a row, too: it is not there, with a stand of 0.

    Args:
        connection: Of `Repository.reading`, so that all rows are of one point.
        family: Of the document.
        ads: Their keys.
        tables: `prepared.of_family`, for whoever looks up often; what was read before is not read again.

    Returns:
        As `joined.arrow_schema` says.
    """
    keys = list(dict.fromkeys(ads))
    tables = tables or prepared.of_family(family)
    structs: dict[str, pa.StructArray] = {}
    for given in INPUTS[family]:
        wanted = keys if given.by is None else structs[given.by[0]].field(given.by[1]).to_pylist()
        structs[given.table] = tables[given.table].look_up(connection, wanted)
    return pa.table([pa.array(keys, pa.string()), *structs.values()], schema=joined.arrow_schema(family))


def fan_out(connection: Connection, family: str, change: Change) -> Iterator[str]:
    """The ads whose documents of a family a change concerns, as they are read: whoever has enough may stop.

    None, if no handler of the family looks at what changed and no join depends on it.
    """
    if handlers.triggers(family).isdisjoint(change.names):
        return iter(())
    return joined_of(connection, family, change.table, change.key)


def fan_outs(connection: Connection, family: str, changes: Iterable[Change], most: int) -> list[list[str]]:
    """What `fan_out` says of each change, of more than so many ads the first; it asks once for each table."""
    found: list[list[str]] = []
    rows: dict[str, dict[str, list[str]]] = {}
    for change in changes:
        is_concerned = not handlers.triggers(family).isdisjoint(change.names)
        found.append(rows.setdefault(change.table, {}).setdefault(change.key, []) if is_concerned else [])
    for table, ads_of in rows.items():
        if way := joined.changed_by(family, table):
            for key, ads in repository.referring_to_each(connection, way, ads_of, most).items():
                ads_of[key] += ads
        else:
            for key, ads in ads_of.items():
                ads.append(key)
    return found


def joined_of(connection: Connection, family: str, table: str, key: str) -> Iterator[str]:
    """The ads whose documents of a family are joined of a row, as they are read."""
    found: Iterator[str] = iter((key,))
    for step in joined.changed_by(family, table):
        found = _referring(connection, *step, found)
    return found


def _referring(connection: Connection, table: str, column: str, keys: Iterator[str]) -> Iterator[str]:
    """The keys of rows that refer to these, a part of them after the other."""
    while part := list(itertools.islice(keys, 1_000)):
        yield from repository.referring(connection, table, column, part)
