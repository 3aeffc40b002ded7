"""What is known of one ad: its rows in the source database, the archive and the repository, and its served copies.

Belongs here: reading the evidence of `explain`, each from where it lies, without any process that must run. Does not
belong here: what follows from it (`explain`), and the state of processes and streams (whoever asks knows it).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import psycopg
import pyarrow.parquet as pq
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from psycopg import sql
from psycopg.rows import dict_row
from pyiceberg import expressions
from sqlalchemy.engine import Connection

from pipelines import lake
from pipelines.ads import database, enrichment, overrides, publisher, repository, updater
from pipelines.ads import rows as registers
from pipelines.ads.database import DatabaseError
from pipelines.ads.explain import Copy, Evidence, Lag, Part, Said
from pipelines.ads.index import ADS, facts_of
from pipelines.ads.joined import INPUTS
from pipelines.ads.overrides import Entries
from pipelines.ads.repository import Repository
from pipelines.ads.schema import CONTENT, CONTROL, TABLES
from pipelines.contracts import ADS_CHANGES, RECORD, Refusal, decode
from pipelines.contracts.ads_budgets import BUDGETS
from pipelines.indexing import delta
from pipelines.indexing.base import Base
from pipelines.indexing.documents import DocumentsView
from pipelines.indexing.facts import VERSION_COLUMNS, hash_keys, identity_bytes, payload_column
from pipelines.indexing.spec import lineage
from pipelines.indexing.versions import Versions
from pipelines.ingest import broker
from pipelines.ingest.broker import TopicMissing
from pipelines.settings import Settings

MOST_SAID = 3
"""So many of the newest records about a row are shown."""
ARCHIVE_DAYS = 7
"""So far back the archive is looked through: it has no index by key."""
_READ_S = 10.0


class Told(NamedTuple):
    """What the repository says of an ad at one point: rows, what is made of them, up to which change keys were sent."""

    parts: dict[str, Part]
    made: dict[str, Copy]
    seen: int
    last: int


def of_repository(connection: Connection, ad_id: str) -> Told:
    """The rows that an ad is joined of, with their changes and what waits, and what enrichment makes of them."""
    parts: dict[str, Part] = {}
    for given in (*INPUTS[CONTROL], *INPUTS[CONTENT]):
        if given.table not in parts:
            key = ad_id if given.by is None else registers.value(parts[given.by[0]].row, given.by[1])
            parts[given.table] = _part(connection, given.table, key)
    made = {}
    for family in INPUTS:
        (fact,) = facts_of(family, enrichment.look_up(connection, family, [ad_id])).to_pylist()
        versions = [fact[name] for name in VERSION_COLUMNS[: len(INPUTS[family])]]
        made[family] = Copy(tuple(versions), fact[payload_column(family)])
    seen = repository.subscribers(connection).get(publisher.SUBSCRIBER, 0)
    return Told(parts, made, seen, repository.last_change(connection))


def _part(connection: Connection, table: str, key: str | None) -> Part:
    if key is None:
        return Part(table, None)
    row = repository.read(connection, table, [key]).get(key, registers.EMPTY)
    changes = repository.changes_of(connection, table, key)
    return Part(table, key, row, tuple(changes), tuple(updater.held_about(connection, table, key)))


# ------------------------------------------------------------------------------------------------ what is served


class Origin(NamedTuple):
    """The delta that a view was folded from (None: the base alone), and when its base was published."""

    delta: Path | None = None
    published_ms: int | None = None


def of_view(view: DocumentsView, ad_id: str, origin: Origin) -> dict[str, Copy]:
    """What base and delta have of an ad, family by family, and which of them brought it."""
    key = ad_id.encode()
    documents = view.get([key])[0] or {}
    epochs = _epochs(origin.delta, key) if origin.delta is not None else {}
    found = {}
    for family in INPUTS:
        versions = tuple(view.versions(family, [key])[0].tolist())
        document = documents.get(family)
        if not any(versions):
            found[family] = Copy(versions, None)
        elif versions == _base_versions(view.base, family, key):
            found[family] = Copy(versions, document, f"base {view.base.version}", origin.published_ms)
        else:
            found[family] = Copy(versions, document, *epochs.get((family, versions), ("the delta", None)))
    return found


def _base_versions(base: Base, family: str, key: bytes) -> tuple[int, ...]:
    identities = hash_keys([identity_bytes([family.encode(), key])])
    found: np.ndarray = base.identities(identities, hash_keys([key])).ranks.versions[0]
    return tuple(found.tolist())


def _epochs(path: Path, key: bytes) -> dict[tuple[str, tuple[int, ...]], tuple[str, int | None]]:
    """(family, versions) of an ad's facts in a delta → the first epoch that brought them, and when it was made."""
    try:
        files = DeltaTable(str(path)).file_uris()
    except TableNotFoundError:
        return {}
    found: dict[tuple[str, tuple[int, ...]], tuple[str, int | None]] = {}
    columns = ["marker", "stream", "incarnation", "epoch", "family", "key", *VERSION_COLUMNS]
    for file in files:
        rows = pq.ParquetFile(file).read(columns=columns).to_pylist()
        markers = [delta.read_marker(row["marker"]) for row in rows if row["marker"] is not None]
        by_epoch = {(marker.stream, marker.incarnation, marker.epoch): marker for marker in markers}
        for row in rows:
            if row["marker"] is None and row["key"] == key:
                marker = by_epoch[row["stream"], row["incarnation"], row["epoch"]]
                of = row["family"], tuple(row[name] for name in VERSION_COLUMNS)
                if of not in found or (marker.transformed_at_ms or 0) < (found[of][1] or 0):
                    found[of] = f"epoch {marker.name}", marker.transformed_at_ms
    return found


def origin(settings: Settings, view: DocumentsView) -> Origin:
    """Where a view of what is served is from."""
    versions = Versions(settings.paths.indices, ADS.name)
    pointer, manifest = versions.pointer(), view.base.manifest
    path = delta.table_path(settings.paths.delta, ADS.name, manifest.lineage if manifest else lineage(ADS))
    published = [
        int(datetime.fromisoformat(entry["changed_at"]).timestamp() * 1000)
        for entry in versions.history()
        if entry["version"] == view.base.version and entry["action"] == "publish"
    ]
    has_delta = pointer is None or pointer.with_delta
    return Origin(path if has_delta else None, published[0] if published else None)


# ------------------------------------------------------------------------------------------------ topics and sources


def of_archive(settings: Settings, parts: Iterable[Part]) -> dict[tuple[str, str], tuple[Said, ...]]:
    """The newest records about rows in `raw.ads_changes`, by (table, key); refused ones too, if they name it."""
    table = lake.open_table(settings, lake.RAW_ADS_CHANGES.name)
    wanted = {(part.table, part.key) for part in parts if part.key is not None}
    if table is None or not wanted:
        return {}
    spelt = {key.encode() for _, key in wanted}
    spelt |= {orjson.dumps({TABLES[name].key: key}) for name, key in wanted}  # as Debezium names a row
    since = datetime.now(UTC) - timedelta(days=ARCHIVE_DAYS)
    condition = expressions.And(
        expressions.GreaterThanOrEqual("ingested_at", since.isoformat()),  # type: ignore[call-arg,arg-type]
        expressions.In("key", spelt),  # type: ignore[call-arg,arg-type]
    )
    found: dict[tuple[str, str], list[Said]] = {}
    for row in table.scan(row_filter=condition, selected_fields=tuple(RECORD.names)).to_arrow().to_pylist():
        if (said := _said(row)) is not None and (said.table, said.key) in wanted:
            found.setdefault((said.table, said.key), []).append(said)
    return {of: tuple(sorted(said, key=lambda one: one.at_ms)[-MOST_SAID:]) for of, said in found.items()}


def _said(row: Mapping[str, Any]) -> Said | None:
    at_ms = int(row["broker_time"].timestamp() * 1000)
    place = f"{row['topic_id']}/{row['partition']}/{row['offset']}"
    decoded = decode(ADS_CHANGES, row["value"], at_ms)
    if isinstance(decoded, Refusal):
        try:
            value = orjson.loads(row["value"])
            table, key = str(value["table"]), str(value["key"])
        except (ValueError, KeyError, TypeError):
            return None
        return Said(table, key, 0, (), place, at_ms, f"{decoded.reason}: {decoded.detail}")
    if decoded["table"] is None:
        return None
    columns = None if decoded["is_deleted"] else tuple(orjson.loads(decoded["values"]))
    return Said(decoded["table"], decoded["key"], decoded["version"], columns, place, at_ms)


def of_database(settings: Settings, parts: Iterable[Part]) -> dict[str, Mapping[str, Any]]:
    """The rows in the source database, by table; those that it has.

    Raises:
        DatabaseError: It cannot be reached, or has no such tables.
    """
    found: dict[str, Mapping[str, Any]] = {}
    with database.connected(settings) as connection, connection.cursor(row_factory=dict_row) as cursor:
        for part in parts:
            if part.key is None:
                continue
            table = TABLES[part.table]
            select = sql.SQL("SELECT * FROM {} WHERE {} = %s").format(
                sql.Identifier(table.name), sql.Identifier(table.key)
            )
            try:
                row = cursor.execute(select, [part.key]).fetchone()
            except psycopg.Error as error:
                raise DatabaseError(
                    f"{table.name} cannot be read: {' '.join(str(error).split())}", where="ads.database"
                ) from None
            if row is not None:
                found[part.table] = {name: _plain(value) for name, value in row.items()}
    return found


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def of_bypass(settings: Settings, rows: Iterable[tuple[str, str]]) -> Entries:
    """What `ads-budgets` says of rows (table, key); it is read from its beginning: compacted, it is short.

    Raises:
        BrokerError: The broker cannot be reached.
    """
    found, wanted = Entries(), {f"{table}/{key}".encode() for table, key in rows}
    try:
        broker.topic_ids(settings, [BUDGETS])
    except TopicMissing:
        return found
    ends = {partition: end for partition, (_, end) in broker.offsets(settings, BUDGETS).items() if end}
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": "tidemark-explain",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )
    try:
        consumer.assign([TopicPartition(BUDGETS, partition, OFFSET_BEGINNING) for partition in ends])
        deadline = time.monotonic() + _READ_S
        while time.monotonic() < deadline and _is_before(consumer, ends):
            for message in consumer.consume(10_000, 0.2):
                if message.error() is None and message.key() in wanted:
                    entry = overrides.read(message.value(), message.timestamp()[1])
                    if not isinstance(entry, Refusal):
                        found.add(entry)
        return found
    finally:
        consumer.close()


def _is_before(consumer: Consumer, ends: Mapping[int, int]) -> bool:
    reached = consumer.position([TopicPartition(BUDGETS, partition) for partition in ends])
    return any(place.offset < ends[place.partition] for place in reached)


# ------------------------------------------------------------------------------------------------ all of it


def gather(
    store: Repository, view: DocumentsView, ad_id: str, lag: Lag, entries: Entries, origin: Origin
) -> Evidence:
    """What the repository and a view say of an ad.

    Args:
        store: The repository.
        view: Of the index `ads`, without entries.
        ad_id: The ad.
        lag: Its `seen` and `last` are the repository's; the rest stays.
        entries: What goes ahead of documents; none, where the base is served alone.
        origin: Where the view is from.
    """
    with store.reading() as connection:
        told = of_repository(connection, ad_id)
    lag = lag._replace(seen=told.seen, last=told.last)
    under = overrides.over(view, entries, [], None).view.get([ad_id.encode()], [CONTROL])[0]
    return Evidence(
        ad_id,
        time.time_ns() // 1_000_000,
        told.parts,
        told.made,
        of_view(view, ad_id, origin),
        lag,
        answered=under and under[CONTROL],
        bypass=tuple(entries.all()),
    )
