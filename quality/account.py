"""What is to be seen of the ads account, collected: freshness, dropped messages, bases and their coverage.

Belongs here: reading what others keep, and which of it is not as it should be. Does not belong here: the page
(`account_page`), and blocking a base (`gates`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from sqlalchemy.engine import Connection

from pipelines import freshness, lake
from pipelines.ads import repository, updater
from pipelines.ads.index import ADS
from pipelines.ads.schema import CONTENT, CONTROL
from pipelines.contracts import ADS_CHANGES
from pipelines.freshness import Minute
from pipelines.indexing.base import Base, Manifest, RowsShard, open_base
from pipelines.indexing.freshness import BACKFILL, LIVE
from pipelines.indexing.versions import Versions
from pipelines.settings import Settings
from quality.gates import MAX_DROP_PCT

METRICS = "ads.prom"
SHOWN_HOURS, SHOWN_DAYS, SHOWN_BASES = 24, 14, 8
MAX_COVERAGE_LOSS_PCT = 5.0
"""So many percent of the servable ads may lose a field from a base to the next."""

CRITICAL = (
    ("image signature", CONTENT, "image_signature"),
    ("title", CONTENT, "title"),
    ("effective bid", CONTROL, "effective_bid_usd_micros"),
    ("targeting terms", CONTROL, "targeting_terms"),
    ("embedding", CONTENT, "embedding"),
)
"""What a servable ad should have: name, family, column. A column that the index does not declare is left out."""


class Dropped(NamedTuple):
    """Messages of a day that came to nothing, and why; those that wait for a person among them."""

    day: date
    reason: str
    messages: int


class Volume(NamedTuple):
    """How much a base has: documents, and those of them that may be served; and by field how many of these have it."""

    version: str
    built_at: str
    documents: int
    servable: int
    covered: Mapping[str, int]

    def coverage_pct(self, field: str) -> float | None:
        """Share of the servable ads that have a field; None: there is no servable ad."""
        return round(100 * self.covered[field] / self.servable, 2) if self.servable else None


class Account(NamedTuple):
    """All that is shown.

    Attributes:
        at: As of when.
        live: By stream, the minutes of the last day.
        backfill: The same, of what was let wait.
        dropped: Of the last two weeks, the newest first.
        served: The base that is served; None before the first.
        built_at: When it was built.
        cut_at: The newest change that is surely in it, by the broker's time; None: not known.
        volumes: Of the last bases up to the served one, the oldest first.
    """

    at: datetime
    live: Mapping[str, list[Minute]]
    backfill: Mapping[str, list[Minute]]
    dropped: tuple[Dropped, ...]
    served: str | None
    built_at: datetime | None
    cut_at: datetime | None
    volumes: tuple[Volume, ...]

    @property
    def alarms(self) -> tuple[str, ...]:
        """What is not as it should be, in words."""
        if len(self.volumes) < 2:
            return ()
        return tuple(_alarms(*self.volumes[-2:]))


def collect(settings: Settings, now: datetime | None = None) -> Account:
    """The account as of now. Needs neither Spark nor a running process."""
    at = now or datetime.now(UTC)
    minutes = freshness.noted(settings, ADS.name, at - timedelta(hours=SHOWN_HOURS))
    versions = Versions(settings.paths.indices, ADS.name)
    pointer = versions.pointer()
    held = [m for m in versions.manifests() if pointer is not None and m.version <= pointer.version]
    served = held[-1] if held else None
    since = at - timedelta(days=SHOWN_DAYS)
    return Account(
        at,
        freshness.by_stream(minutes, LIVE),
        freshness.by_stream(minutes, BACKFILL),
        tuple(sorted((d for source in SOURCES for d in source(settings, since)), reverse=True)),
        served.version if served else None,
        datetime.fromisoformat(served.built_at) if served else None,
        _cut_at(served),
        tuple(
            volume(open_base(ADS, versions.path(m.version), verify_files=False)) for m in held[-SHOWN_BASES:]
        ),
    )


def _cut_at(served: Manifest | None) -> datetime | None:
    if served is None or served.horizon_time_ms is None:
        return None
    return datetime.fromtimestamp(served.horizon_time_ms / 1_000, UTC)


# ------------------------------------------------------------------------------------------------ dropped messages


def refused(settings: Settings, since: datetime) -> Iterable[Dropped]:
    """Records of the topic that broke their contract."""
    table = lake.open_table(settings, lake.RAW_DEAD_LETTERS.name)
    if table is None:
        return ()
    wanted = f"topic = '{ADS_CHANGES.topic}' and ingested_at >= '{since.isoformat()}'"
    rows = table.scan(wanted, selected_fields=("ingested_at", "reason")).to_arrow().to_pylist()
    return _by_day((row["ingested_at"], f"refused: {row['reason']}", 1) for row in rows)


def held(settings: Settings, since: datetime) -> Iterable[Dropped]:
    """Records that wait with their transaction."""
    with _reading(settings) as connection:
        found = updater.held(connection)
    reasons = {
        updater.REFUSED: "held: one of its transaction was refused",
        updater.WAITS: "held: not all are there",
    }
    seen = ((datetime.fromtimestamp(one.seen_at_ms / 1_000, UTC), one) for one in found)
    return _by_day((at, reasons[one.state], one.arrived) for at, one in seen if at >= since)


def stale(settings: Settings, since: datetime) -> Iterable[Dropped]:
    """Keys of documents that an operator dropped from a topic."""
    with _reading(settings) as connection:
        found = repository.dropped(connection, round(since.timestamp() * 1_000))
    return _by_day(
        (datetime.fromtimestamp(one.at_ms / 1_000, UTC), f"{one.reason}: keys of {one.topic}", one.keys)
        for one in found
    )


@contextmanager
def _reading(settings: Settings) -> Iterator[Connection]:
    store = repository.opened(settings)
    try:
        with store.reading() as connection:
            yield connection
    finally:
        store.close()


def _by_day(given: Iterable[tuple[datetime, str, int]]) -> list[Dropped]:
    counts: Counter[tuple[date, str]] = Counter()
    for at, reason, messages in given:
        counts[at.astimezone(UTC).date(), reason] += messages
    return [Dropped(day, reason, count) for (day, reason), count in counts.items()]


SOURCES: tuple[Callable[[Settings, datetime], Iterable[Dropped]], ...] = (refused, held, stale)
"""Who knows of messages that were dropped since a time."""


# ------------------------------------------------------------------------------------------------ bases


def volume(base: Base) -> Volume:
    """How much a base of the index has."""
    assert base.manifest is not None
    declared = [one for one in CRITICAL if one[2] in ADS.family(one[1]).schema.names]
    documents = servable = 0
    covered = dict.fromkeys((name for name, _, _ in declared), 0)
    for shard in base.shards:
        is_there = shard.ends[CONTROL] > shard.starts[CONTROL]
        may_be = is_there & _holds(shard, CONTROL, "is_servable", lambda values: pc.fill_null(values, False))
        documents, servable = documents + int(is_there.sum()), servable + int(may_be.sum())
        for name, family, column in declared:
            covered[name] += int((may_be & _holds(shard, family, column, _says_something)).sum())
    return Volume(base.manifest.version, base.manifest.built_at, documents, servable, covered)


def _holds(shard: RowsShard, family: str, column: str, is_so: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """Whether something is so of a column, for every key of a shard; not where there is none."""
    starts, found = shard.starts[family], np.zeros(len(shard.starts[family]), bool)
    has = np.flatnonzero(shard.ends[family] > starts)
    values = shard.payload[family][column].take(pa.array(starts[has]))
    found[has] = is_so(values).to_numpy(zero_copy_only=False)
    return found


def _says_something(values: pa.Array) -> pa.Array:
    """Neither null nor an empty list."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return pc.fill_null(pc.greater(pc.list_value_length(values), 0), False)
    return pc.is_valid(values)


def _alarms(before: Volume, now: Volume) -> Iterable[str]:
    for name in ("documents", "servable"):
        was, found = getattr(before, name), getattr(now, name)
        if abs(found - was) * 100 > MAX_DROP_PCT * was:
            yield f"{name}: {found:,} in {now.version}, {was:,} in {before.version}; {MAX_DROP_PCT} % may change"
    for field in now.covered:
        was_pct, found_pct = before.coverage_pct(field), now.coverage_pct(field)
        if was_pct is not None and found_pct is not None and found_pct < was_pct - MAX_COVERAGE_LOSS_PCT:
            yield f"{field}: {found_pct} % of the servable ads have it, {was_pct} % had it in {before.version}"


# ------------------------------------------------------------------------------------------------ Prometheus


def tell_prometheus(settings: Settings, account: Account) -> None:
    """Write what a program should watch for the text file collector of Prometheus' node exporter."""
    registry = CollectorRegistry()

    def gauge(name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(f"tidemark_ads_{name}", doc, labels, registry=registry)

    gauge("measured_seconds", "When it was measured, since 1970.").set(account.at.timestamp())
    gauge("alarms", "Things that are not as they should be.").set(len(account.alarms))
    for name, doc, since in (
        ("base_age_seconds", "Since the served base was built.", account.built_at),
        ("cut_age_seconds", "Since the newest change that is surely in the served base.", account.cut_at),
    ):
        if since is not None:
            gauge(name, doc).set((account.at - since).total_seconds())
    within = gauge("minutes_within_60s_pct", "Minutes of the last day that kept 60 seconds.", "stream")
    greatest = gauge("freshness_max_seconds", "Slowest document of the last day.", "stream")
    for stream, minutes in account.live.items():
        greatest.labels(stream).set(minutes[-1].running_max_ms / 1_000)
        if (share := freshness.within_pct(minutes)) is not None:
            within.labels(stream).set(share)
    dropped = gauge("dropped_today", "Messages that came to nothing today (UTC).", "reason")
    for one in account.dropped:
        dropped.labels(one.reason).set(one.messages if one.day == account.at.date() else 0)
    if account.volumes:
        _tell_volume(account.volumes[-1], gauge)
    settings.paths.metrics.mkdir(parents=True, exist_ok=True)
    write_to_textfile(str(settings.paths.metrics / METRICS), registry)


def _tell_volume(now: Volume, gauge: Callable[..., Gauge]) -> None:
    gauge("documents", "Documents of the served base.").set(now.documents)
    gauge("servable", "Of these, servable ones.").set(now.servable)
    covered = gauge("coverage_pct", "Share of the servable ads that have a field.", "field")
    for field in now.covered:
        if (share := now.coverage_pct(field)) is not None:
            covered.labels(field).set(share)
