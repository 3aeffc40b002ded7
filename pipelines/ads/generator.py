"""A made-up ads account of any size, and the traffic of changes to it, from a seed.

Belongs here: the rows of every source table, and updates of them: skewed (few pins are in many ads, few rows change
often), partial, in transactions of one to three rows. Does not belong here: sending them, again and out of order too,
which is up to whoever tests that.

The same seed and size give the same account.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.ads import schema
from pipelines.ads.joined import ARROW
from pipelines.ads.repository import Update
from pipelines.ads.schema import TABLES, Column, Table

FIRST_VERSION = 1_000
DAY_MS = 86_400_000
START_MS = 1_704_067_200_000  # 2024-01-01
_ADS_PER = {"advertisers": 100, "campaigns": 20, "ad_groups": 4, "ads": 1, "pins": 2, "images": 2}
_PREFIX = {"advertisers": "v", "campaigns": "c", "ad_groups": "g", "ads": "a", "pins": "p", "images": "i"}
_WORDS = np.array(
    """
    red blue oak chair table lamp summer winter recipe garden shoe dress bag watch coffee tea bike tent camera phone
    kitchen bath wool linen silver gold paper ink candle mirror plant seed soup bread cake wine salt sugar honey
    """.split()  # noqa: SIM905
)
_CODES = {
    "country": ("US", "GB", "DE", "FR", "BR", "JP", "CA", "MX"),
    "language": ("en", "de", "fr", "es", "pt", "ja"),
    "currency": ("USD", "EUR", "GBP"),
    "time_zone": ("UTC", "America/New_York", "Europe/Berlin"),
}
_OFTEN = {
    "campaigns": ("status", "daily_budget_usd_micros", "bid_multiplier"),
    "ad_groups": ("status", "bid_usd_micros", "countries", "interests"),
    "ads": ("status", "review_status", "clicks_7d", "impressions_7d", "spend_7d_usd_micros"),
    "pins": ("title", "price_usd_micros", "is_available", "annotations"),
    "images": ("safety", "aesthetics"),
    "advertisers": ("balance_usd_micros",),
}
_SHARES = {
    "campaigns": 0.25,
    "ad_groups": 0.25,
    "ads": 0.3,
    "pins": 0.15,
    "images": 0.03,
    "advertisers": 0.02,
}


def size(table: str, ads: int) -> int:
    """How many rows a table of an account with so many ads has."""
    return max(1, ads // _ADS_PER[table])


def keys(table: str, numbers: np.ndarray) -> list[str]:
    """The keys of rows by their numbers."""
    return [f"{_PREFIX[table]}{number}" for number in numbers.tolist()]


def account(ads: int, seed: int) -> Iterator[tuple[Table, pa.Table]]:
    """Every table of an account, a table before those that refer to it; the key's column first, times in ms."""
    for place, table in enumerate(TABLES.values()):
        rng = np.random.default_rng([seed, place])
        count = size(table.name, ads)
        columns = {table.key: pa.array(keys(table.name, np.arange(count)))}
        columns |= {column.name: _values(rng, table, column, count, ads) for column in table.sourced}
        yield table, pa.table(columns)


def updates(ads: int, seed: int) -> Iterator[Update]:
    """The rows of an account as updates with versions from `FIRST_VERSION` on, each greater than the one before."""
    version = FIRST_VERSION
    for table, rows in account(ads, seed):
        for row in rows.to_pylist():
            yield Update(table.name, row.pop(table.key), version, row, START_MS)
            version += 1


def transactions(ads: int, seed: int, count: int, first_version: int) -> Iterator[list[Update]]:
    """Changes of an account's rows, in the transactions of their source; versions count up from ``first_version``.

    A change sets one to three columns. Rows that exist are changed, few of them often; in a transaction each row is
    changed once.
    """
    rng = np.random.default_rng([seed, 1_000])
    tables = list(_SHARES)
    drawn = rng.choice(len(tables), (count, 3), p=list(_SHARES.values()))
    sizes = rng.choice((1, 2, 3), count, p=(0.7, 0.2, 0.1))
    rows = rng.random((count, 3)) ** 3
    version = first_version
    for place in range(count):
        changed: dict[tuple[str, str], Update] = {}
        for number in range(sizes[place]):
            table = TABLES[tables[drawn[place, number]]]
            key = f"{_PREFIX[table.name]}{int(rows[place, number] * size(table.name, ads))}"
            often = _OFTEN[table.name]
            names = often[: 1 + int(rng.integers(min(3, len(often))))]
            values = {name: _one(rng, table, name, ads) for name in names}
            changed[table.name, key] = Update(table.name, key, version, values, START_MS + place)
            version += 1
        yield list(changed.values())


def _one(rng: np.random.Generator, table: Table, name: str, ads: int) -> Any:
    column = table.column(name)
    assert column is not None
    return _values(rng, table, column, 1, ads)[0].as_py()


def _values(rng: np.random.Generator, table: Table, column: Column, count: int, ads: int) -> pa.Array:
    """So many values of a column."""
    kind = ARROW[column.type]
    match column.type:
        case schema.ID:
            (to,) = (r.table for r in table.references if r.column == column.name)
            numbers = (rng.random(count) ** (3 if to == "pins" else 1) * size(to, ads)).astype(np.int64)
            return pa.array(keys(to, numbers), kind)
        case schema.BOOLEAN:
            return pa.array(rng.random(count) < 0.9, kind)
        case schema.NUMBER:
            return pa.array(np.round(rng.random(count) * min(column.most, 2.0), 4), kind)
        case schema.TIME:
            ahead = 400 if column.name == "ends_at" else 0
            return pa.array(START_MS + (rng.integers(0, 300, count) + ahead) * DAY_MS, kind)
        case schema.INTEGER:
            most = 50_000_000 if column.name.endswith("usd_micros") else 10_000
            drawn = (rng.random(count) ** 2 * min(column.most, most)).astype(np.int64)
            return pa.array(drawn, kind)
        case schema.TERMS:
            return _terms(rng, column, count)
        case schema.VECTOR:
            normal = rng.standard_normal((count, schema.DIMENSIONS))
            unit = normal / np.linalg.norm(normal, axis=1, keepdims=True)
            return pa.array(list(unit.round(4)), pa.list_(pa.float64()))
    if column.choices:
        return pa.array(_mostly_first(rng, np.array(column.choices), count), kind)
    if codes := _CODES.get(column.name):
        return pa.array(rng.choice(codes, count), kind)
    words = rng.choice(_WORDS, (count, 3))
    return pa.array([" ".join(row) for row in words], kind)


def _mostly_first(rng: np.random.Generator, choices: np.ndarray, count: int) -> np.ndarray:
    """Nine of ten are the first choice, as most rows of an account are active."""
    return np.where(rng.random(count) < 0.9, choices[0], rng.choice(choices, count))


def _terms(rng: np.random.Generator, column: Column, count: int) -> pa.Array:
    if column.choices:
        vocabulary = np.array(column.choices)
    elif "countries" in column.name:
        vocabulary = np.array(_CODES["country"])
    elif "languages" in column.name:
        vocabulary = np.array(_CODES["language"])
    else:
        vocabulary = _WORDS
    longest = 1 if column.name.startswith("excluded") else 3
    lengths = rng.integers(0, longest + 1, count)
    drawn = rng.choice(vocabulary, (count, 3))
    return pa.array(
        [sorted(set(row[:length])) for row, length in zip(drawn.tolist(), lengths.tolist(), strict=True)],
        ARROW[column.type],
    )
