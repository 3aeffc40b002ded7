"""Garbage collection of ads: those that nobody can be shown any more leave the index, then the repository.

Belongs here: which ads are inactive and since when, taking them out, taking that back, and what is left of them in the
end. Does not belong here: when it runs (`assets.ads`), and what a collected ad's document is (`handlers`).

An ad is inactive if it was deleted, is archived at some level, or has ended. The repository knows versions, not times:
a run notes when it first saw an ad so. After `ads.gc_days` the ad is collected: a record of the topic sets its column
`collected_at`, which only this sets. So it flows like any change, and its document goes. It counts only as long as the
ad is inactive: an ad that is made active again is served again at once, whatever was collected.

A run is named by its time, and can be undone for `ads.gc_grace_days`. Then the ad is deleted, at the greatest version
that its source gave it: only what is newer than all that was known of it brings it back. Of deleted rows the values go,
and the versions stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import orjson
from sqlalchemy.engine import Connection

from pipelines.ads import enrichment, joined, repository
from pipelines.ads import rows as registers
from pipelines.ads.repository import Repository
from pipelines.ads.rows import Row
from pipelines.ads.schema import ADS, CONTROL
from pipelines.contracts import ADS_CHANGES
from pipelines.errors import TidemarkError

COLUMN = "collected_at"
_DAY_MS = 86_400_000
_AT_ONCE = 1_000


class NoSuchRun(TidemarkError):
    """Nothing of that run can be taken back."""


class Sender(Protocol):
    """Who takes records to a topic."""

    def send(self, topic: str, records: Any) -> object:
        """Send (key, value) records."""


class Plan(NamedTuple):
    """What a run does.

    Attributes:
        run: Its name: its time, in ms since 1970.
        inactive: Ad → since when it is known to be inactive.
        collected: The ads that it takes out.
        released: The ads that were collected and are active again: the mark goes.
        purged: The ads whose grace is over: they are deleted.
        stripped: The ads that were deleted long enough ago: their values go.
    """

    run: int
    inactive: dict[str, int]
    collected: list[str]
    released: list[str]
    purged: list[str]
    stripped: list[str]


def plan(store: Repository, days: float, grace_days: float, now_ms: int | None = None) -> Plan:
    """What is to be done now; nothing is changed."""
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    found = Plan(now_ms, {}, [], [], [], [])
    aged, graced = now_ms - days * _DAY_MS, now_ms - grace_days * _DAY_MS
    with store.reading() as connection:
        known = repository.inactive_since(connection)
        for ad, row, is_inactive in _ads(connection, now_ms):
            collected_at = registers.value(row, COLUMN)
            if not is_inactive:
                if collected_at is not None:
                    found.released.append(ad)
                continue
            since = found.inactive.setdefault(ad, known.get(ad, now_ms))
            if not registers.is_there(row, ADS):
                if since <= aged - grace_days * _DAY_MS and registers.stripped(row) != row:
                    found.stripped.append(ad)
            elif collected_at is None:
                if since <= aged:
                    found.collected.append(ad)
            elif collected_at <= graced:
                found.purged.append(ad)
    return found


def carry_out(store: Repository, producer: Sender, planned: Plan) -> None:
    """Do what was planned: records to the topic `ads-changes`, and what is known of inactive ads to the repository.

    Raises:
        NotDelivered: The broker did not take a record; the next run does it again.
    """
    with store.reading() as connection:
        records = [
            *_records(connection, planned.collected, lambda row: _marked(row, planned.run)),
            *_records(connection, planned.released, lambda row: _marked(row, None)),
            *_records(connection, planned.purged, _deleted),
        ]
    _send(producer, records)
    with store.writing() as connection:
        repository.set_inactive(connection, planned.inactive)
        repository.strip(connection, ADS.name, planned.stripped)


def undo(store: Repository, producer: Sender, run: int) -> list[str]:
    """Take a run back: the ads that it collected, and that were not deleted since, count as inactive from now on.

    Raises:
        NoSuchRun: There is none.
        NotDelivered: The broker did not take a record; repeat it.
    """
    with store.reading() as connection:
        ads = [
            ad
            for ad, row in repository.scan(connection, ADS.name)
            if registers.is_there(row, ADS) and registers.value(row, COLUMN) == run
        ]
        if not ads:
            raise NoSuchRun(
                f"no ad is collected by a run {run}",
                remedy="`tidemark ads gc --dry-run` lists the runs that can be undone",
            )
        records = list(_records(connection, ads, lambda row: _marked(row, None)))
    _send(producer, records)
    with store.writing() as connection:
        since = repository.inactive_since(connection)
        repository.set_inactive(connection, since | dict.fromkeys(ads, time.time_ns() // 1_000_000))
    return ads


def runs(store: Repository) -> dict[int, int]:
    """The runs that can be undone, by their time: how many ads each has collected."""
    found: dict[int, int] = {}
    with store.reading() as connection:
        for _, row in repository.scan(connection, ADS.name):
            run = registers.value(row, COLUMN)
            if run is not None and registers.is_there(row, ADS):
                found[run] = found.get(run, 0) + 1
    return dict(sorted(found.items()))


def _ads(connection: Connection, now_ms: int) -> Iterator[tuple[str, Row, bool]]:
    """Every ad of which anything is known, and whether it is inactive."""
    after, part = "", True
    while part:
        rows = dict(_page(connection, after))
        part = bool(rows)
        if not part:
            return
        after = max(rows)
        flat = enrichment.look_up(connection, CONTROL, rows).flatten()
        columns = {name: flat.column(name).to_pylist() for name in _LOOKED_AT}
        for place, (ad, row) in enumerate(rows.items()):
            yield ad, row, _is_inactive({name: values[place] for name, values in columns.items()}, now_ms)


def _page(connection: Connection, after: str) -> Iterator[tuple[str, Row]]:
    for number, one in enumerate(repository.scan(connection, ADS.name, after)):
        if number == _AT_ONCE:
            return
        yield one


_STATUSES = tuple(f"{given.table}.status" for given in joined.INPUTS[CONTROL])
_ENDS = ("ad_groups.ends_at", "campaigns.ends_at")
_LOOKED_AT = ("ads.is_there", *_STATUSES, *_ENDS)


def _is_inactive(of: dict[str, Any], now_ms: int) -> bool:
    is_over = any(of[name] is not None and of[name] <= now_ms for name in _ENDS)
    return not of["ads.is_there"] or is_over or any(of[name] == "archived" for name in _STATUSES)


def _records(connection: Connection, ads: Iterable[str], say: Any) -> Iterator[tuple[bytes, bytes]]:
    found = repository.read(connection, ADS.name, ads)
    for ad, row in found.items():
        yield ad.encode(), orjson.dumps({"table": ADS.name, "key": ad, **say(row)})


def _marked(row: Row, run: int | None) -> dict[str, Any]:
    """Its version is above whatever hides the column: the time, or one more."""
    above = max(row.versions.get(COLUMN, 0), row.deleted_version)
    return {"version": max(time.time_ns() // 1_000_000, above + 1), "values": {COLUMN: run}}


def _deleted(row: Row) -> dict[str, Any]:
    sourced = (row.versions.get(column.name, 0) for column in ADS.sourced)
    return {"version": max(*sourced, row.deleted_version), "op": "delete"}


def _send(producer: Sender, records: list[tuple[bytes, bytes]]) -> None:
    for start in range(0, len(records), _AT_ONCE):
        producer.send(ADS_CHANGES.topic, records[start : start + _AT_ONCE])
