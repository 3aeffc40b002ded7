"""Undo: tables set back to what they were, as sets; nothing that was accepted is lost, and all of it can be redone.

Belongs here: which snapshot was current when, what may be set back, and the commits. Does not belong here: an index's
served version (`indexing.versions`), and what it prints.

Setting a table back moves its `main` to an older snapshot: one commit that also tags what was current, so that expiry
spares it for the time of grace and `redo` finds it. It is refused where somebody committed since it was planned.

A raw table is the system of record, and says itself what it holds: set back, it no longer holds the loads that came
later, which can be loaded again, nor the Kafka records that came later, which were accepted and must come again. So the
archive's incarnation ends first, and the next one reads them from Kafka once more; where Kafka no longer has them it is
refused. `raw.dead_letters` follows its raw tables (a letter counts once its record is there) and `ops` says what
happened: neither is set back. See docs/adr/0009.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow.compute as pc
from pyiceberg.exceptions import CommitFailedException, NoSuchNamespaceError
from pyiceberg.expressions import And, EqualTo
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH

from pipelines import failpoints, index_rows, lake
from pipelines.contracts import CONTRACTS
from pipelines.errors import TidemarkError
from pipelines.indexing import streaming
from pipelines.indexing.position import EMPTY, Position, topic_name
from pipelines.indices import INDICES
from pipelines.ingest import archive, broker, writers
from pipelines.settings import Settings

_ARCHIVED = tuple(contract.raw_table for contract in CONTRACTS.values())
COPIES = frozenset(index_rows.delta_table(spec).name for spec in INDICES.values())
TAG = "undone-"
GRACE_DAYS = 7
_ATTEMPTS = 5
_DAY_MS = 86_400_000


class UndoError(TidemarkError):
    """A table cannot be set back, or must not be."""


class Conflict(UndoError):
    """Somebody committed between the plan and its execution."""


class Move(NamedTuple):
    """One table, from the snapshot that is current to the one that shall be; None: the table without any rows."""

    table: str
    from_id: int | None
    to_id: int | None
    from_at_ms: int | None
    to_at_ms: int | None
    rows_before: int
    rows_after: int
    redone_tag: str | None = None

    @property
    def is_change(self) -> bool:
        """Whether the table moves at all."""
        return self.from_id != self.to_id


class Range(NamedTuple):
    """Records of a topic's partition, [start, end), that the archive will read again."""

    topic_id: str
    partition: int
    start: int
    end: int


class Plan(NamedTuple):
    """What an undo will do.

    Attributes:
        name: Names it for `redo`.
        moves: Every table that was asked for, also those that are there already.
        loads: The loads that are undone: they can be loaded again.
        again: What the archive reads from Kafka once more.
    """

    name: str
    moves: tuple[Move, ...]
    loads: tuple[str, ...]
    again: tuple[Range, ...]

    @property
    def changes(self) -> tuple[Move, ...]:
        """The tables that move."""
        return tuple(move for move in self.moves if move.is_change)

    def to_json(self) -> dict[str, Any]:
        """For `--json`; ids as text, which a program's numbers may not hold."""
        return {
            "name": self.name,
            "tables": [
                {
                    **move._asdict(),
                    "from_id": None if move.from_id is None else str(move.from_id),
                    "to_id": None if move.to_id is None else str(move.to_id),
                }
                for move in self.moves
            ],
            "loads": list(self.loads),
            "again": [part._asdict() for part in self.again],
        }


# ------------------------------------------------------------------------------------------------ what is meant


def moment(text: str) -> datetime:
    """A time in ISO 8601; without a zone it is UTC.

    Raises:
        UndoError: It is none, or it lies ahead.
    """
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise UndoError(
            f"{text!r} is no time", remedy="give ISO 8601 in UTC, as 2024-03-01T10:00:00Z"
        ) from None
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    if when > datetime.now(UTC):
        raise UndoError(f"{text} lies ahead", remedy="give a time that has been")
    return when


def target(text: str) -> datetime | int | str:
    """What `--to` means: a snapshot's id, the name of a tag (`daily-2024-03-01`), or a time.

    Raises:
        UndoError: It is none of these, or lies ahead.
    """
    if text.isdigit():
        return int(text)
    return text if re.match(r"[A-Za-z]", text) else moment(text)


def tables(settings: Settings, names: Iterable[str]) -> list[str]:
    """Tables from the names of tables and namespaces, each once.

    Raises:
        UndoError: There is no such table or namespace, or it is not one that is ever set back.
    """
    catalog = lake.catalog(settings)
    found: list[str] = []
    for name in names:
        if "." in name:
            if lake.open_table(settings, name) is None:
                raise UndoError(f"there is no table {name}", remedy="name a table, as curated.pins_offer")
            inside = [name]
        else:
            try:
                inside = sorted(".".join(identifier) for identifier in catalog.list_tables(name))
            except NoSuchNamespaceError:
                inside = []
            if not inside:
                raise UndoError(
                    f"there is neither a table nor a namespace {name!r}",
                    remedy="name tables (curated.pins_offer) or a namespace (curated), or `index NAME`",
                )
            inside = [one for one in inside if one != lake.RAW_DEAD_LETTERS.name and one not in COPIES]
        found += inside
    for name in found:
        if name == lake.RAW_DEAD_LETTERS.name:
            raise UndoError(
                "dead letters follow their raw tables, and are not set back by themselves",
                where=name,
                remedy="undo the raw table; its letters count as it holds their records",
            )
        if name in COPIES:
            raise UndoError(
                "it is a copy of what the deltas hold, and is not set back by itself",
                where=name,
                remedy=f"name {name.removesuffix(index_rows.DELTA)}, or `index NAME` for what is served",
            )
        if name.startswith("ops."):
            raise UndoError(
                "what happened is not undone",
                where=name,
                remedy="name tables of raw, curated, features, index",
            )
    return list(dict.fromkeys(found))


def log(table: Table) -> list[tuple[int, int | None]]:
    """When which snapshot became current, oldest first: (ms since 1970, snapshot id), retained ones only.

    Before the first commit a table has no rows: (0, None) says so where that is known.
    """
    metadata = table.metadata
    kept = {snapshot.snapshot_id: snapshot for snapshot in metadata.snapshots}
    entries: list[tuple[int, int | None]] = [
        (entry.timestamp_ms, entry.snapshot_id) for entry in metadata.snapshot_log
    ]
    since = entries[0][0] if entries else time.time_ns() // 1_000_000 + 1
    oldest = metadata.current_snapshot_id if not entries else entries[0][1]
    while oldest is not None and oldest in kept:  # the log may have been cut; snapshots know their parents
        snapshot = kept[oldest]
        if snapshot.timestamp_ms < since:
            entries.insert(0, (snapshot.timestamp_ms, oldest))
        oldest = snapshot.parent_snapshot_id
    if oldest is None and (entries or not metadata.snapshots):
        entries.insert(0, (0, None))
    return [entry for entry in entries if entry[1] is None or entry[1] in kept]


def current_at(table: Table, when_ms: int) -> tuple[bool, int | None]:
    """Whether it is known what was current at a time, and which snapshot that was (None: the table was empty)."""
    metadata = table.metadata
    known = {snapshot.snapshot_id for snapshot in metadata.snapshots}
    logged = [e.snapshot_id for e in metadata.snapshot_log if e.timestamp_ms <= when_ms]
    if logged:
        return logged[-1] in known, logged[-1]
    before = [entry for entry in log(table) if entry[0] <= when_ms]
    return (True, before[-1][1]) if before else (False, None)


# ------------------------------------------------------------------------------------------------ planning


def plan(settings: Settings, names: Iterable[str], to: datetime | int | str) -> Plan:
    """What setting tables back to a time or a tag (or one table to a snapshot) would do.

    Raises:
        UndoError: A table cannot go there; the message says how far each such table can go. Or records that were
            accepted would be lost.
    """
    chosen = tables(settings, names)
    if isinstance(to, int):
        if len(chosen) != 1:
            raise UndoError("a snapshot is one table's", remedy="give a time for several tables")
        opened = _open(settings, chosen[0])
        if opened.metadata.snapshot_by_id(to) is None:
            raise UndoError(
                f"there is no snapshot {to}", where=chosen[0], remedy=f"give a time since {_since(opened)}"
            )
        return _planned(settings, {chosen[0]: to})
    opened_tables = {name: _open(settings, name) for name in chosen}
    if isinstance(to, str):
        return _planned(settings, _tagged(opened_tables, to))
    when_ms = int(to.timestamp() * 1000)
    targets: dict[str, int | None] = {}
    late = []
    for name, opened in opened_tables.items():
        is_known, targets[name] = current_at(opened, when_ms)
        if not is_known:
            late.append(f"{name} since {_since(opened)}")
    if late:
        raise UndoError(
            f"no snapshot of {to.astimezone(UTC).isoformat()} is kept of every table; there is {', '.join(late)}",
            remedy=f"give a later time, or a tag that they all have ({_common_tags(opened_tables)}), or leave these"
            " tables out; nothing was changed",
        )
    return _planned(settings, targets)


def _tagged(tables: Mapping[str, Table], label: str) -> dict[str, int]:
    """The snapshot of a tag in each table.

    Raises:
        UndoError: Not every table has the tag.
    """
    found = {name: _tags(table)[label] for name, table in tables.items() if label in _tags(table)}
    if missing := [name for name in tables if name not in found]:
        raise UndoError(
            f"{label!r} is no time, and no tag of {', '.join(missing)}",
            remedy=f"give a time in ISO 8601, as 2024-03-01T10:00:00Z, or a tag that they all have:"
            f" {_common_tags(tables)}; nothing was changed",
        )
    return found


def _common_tags(tables: Mapping[str, Table]) -> str:
    common = set.intersection(*(set(_tags(table)) for table in tables.values()))
    return ", ".join(sorted(common)) or "there is none"


def _tags(table: Table) -> dict[str, int]:
    refs = table.metadata.refs.items()
    return {label: ref.snapshot_id for label, ref in refs if ref.snapshot_ref_type == "tag"}


def plan_load(settings: Settings, load_id: str) -> Plan:
    """What setting the raw tables back to before a load would do.

    Raises:
        UndoError: No table has the load, or its commit is no longer kept.
    """
    targets: dict[str, int | None] = {}
    expired = []
    for name in (*_ARCHIVED, lake.RAW_HOUSEHOLDS.name):
        full_ids = {load_id, f"{name.partition('.')[2]}:{load_id}"}
        if not full_ids & lake.position(settings, name).loads:
            continue
        history = list(lake.ancestors(settings, name))
        made = next((s for s in history if s.summary.get(lake.LOAD_ID) in full_ids), None)
        kept = {snapshot.id for snapshot in history}
        if made is None or made.parent_id not in (None, *kept):
            expired.append(name)
        else:
            targets[name] = made.parent_id
    if expired:
        raise UndoError(
            f"what was before the load is no longer kept of {', '.join(expired)}",
            where=load_id,
            remedy="send tombstones for its records instead",
        )
    if not targets:
        raise UndoError("no raw table has this load", where=load_id, remedy="`tidemark load` printed its id")
    return _planned(settings, targets)


def plan_redo(settings: Settings, name: str) -> Plan:
    """What taking an undo back would do: what was current before it becomes current again.

    Raises:
        UndoError: There is none of this name (any more).
    """
    found = undone(settings)
    if name not in found:
        raise UndoError(
            f"there is no undo {name!r}",
            remedy=f"name one of {', '.join(found)}" if found else "none is kept",
        )
    tags = dict.fromkeys(found[name], f"{TAG}{name}")
    return _planned(settings, found[name], tags)


def undone(settings: Settings) -> dict[str, dict[str, int]]:
    """The undos that can be taken back, newest first: by name the snapshot that was current in each table."""
    found: dict[str, dict[str, int]] = {}
    catalog = lake.catalog(settings)
    for namespace in catalog.list_namespaces():
        for identifier in sorted(catalog.list_tables(namespace)):
            table = catalog.load_table(identifier)
            for label, ref in table.metadata.refs.items():
                if label.startswith(TAG):
                    at = found.setdefault(label.removeprefix(TAG), {})
                    at[".".join(identifier)] = ref.snapshot_id
    return dict(sorted(found.items(), reverse=True))


def _planned(
    settings: Settings, targets: Mapping[str, int | None], tags: Mapping[str, str] | None = None
) -> Plan:
    moves = tuple(_move(settings, name, to_id, (tags or {}).get(name)) for name, to_id in targets.items())
    loads: set[str] = set()
    again: list[Range] = []
    for move in moves:
        if not move.is_change or not move.table.startswith("raw."):
            continue
        now = lake.position(settings, move.table)
        then = _position_at(settings, move.table, move.to_id)
        loads |= now.loads - then.loads
        again += _again(settings, move.table, now, then)
    require_in_kafka(settings, again)
    return Plan(_stamp(), moves, tuple(sorted(loads)), tuple(again))


def _move(settings: Settings, name: str, to_id: int | None, tag: str | None) -> Move:
    metadata = _open(settings, name).metadata
    now = metadata.current_snapshot()
    then = metadata.snapshot_by_id(to_id) if to_id is not None else None
    rows = [
        int(s.summary.additional_properties.get("total-records", 0)) if s is not None and s.summary else 0
        for s in (now, then)
    ]
    return Move(
        table=name,
        from_id=now.snapshot_id if now is not None else None,
        to_id=to_id,
        from_at_ms=now.timestamp_ms if now is not None else None,
        to_at_ms=then.timestamp_ms if then is not None else None,
        rows_before=rows[0],
        rows_after=rows[1],
        redone_tag=tag,
    )


def _position_at(settings: Settings, name: str, snapshot_id: int | None) -> Position:
    return EMPTY if snapshot_id is None else lake.position(settings, name, snapshot_id)


def _again(settings: Settings, name: str, now: Position, then: Position) -> Iterator[Range]:
    for topic_id, ends in now.topics.items():
        for partition, end in ends.items():
            start = then.topics.get(topic_id, {}).get(partition)
            if start is None:
                start = _first_offset(settings, name, topic_id, partition, end)
            if start < end:
                yield Range(topic_id, partition, start, end)


def _first_offset(settings: Settings, name: str, topic_id: str, partition: int, end: int) -> int:
    """Where the archive began with a partition."""
    of_partition = And(EqualTo("topic_id", topic_id), EqualTo("partition", partition))  # type: ignore[call-arg,arg-type]
    scan = _open(settings, name).scan(row_filter=of_partition, selected_fields=("offset",))
    firsts = (pc.min(batch.column("offset")).as_py() for batch in scan.to_arrow_batch_reader())
    return min((first for first in firsts if first is not None), default=end)


def require_in_kafka(settings: Settings, again: Iterable[Range]) -> None:
    """Whoever was told that a record is accepted keeps it: Kafka must still have what is to be read again.

    Raises:
        UndoError: It has not; the message says which records would be lost.
        BrokerError: It cannot be asked.
    """
    by_topic: dict[str, list[Range]] = {}
    for part in again:
        by_topic.setdefault(part.topic_id, []).append(part)
    for topic_id, parts in by_topic.items():
        name = topic_name(topic_id)
        try:
            there = broker.topic_ids(settings, [name])[name]
        except broker.TopicMissing:
            there = None
        kept = broker.offsets(settings, name) if there == topic_id else {}
        for part in parts:
            first, end = kept.get(part.partition, (part.end, part.end))
            if first > part.start or end < part.end:
                missing = min(first, part.end) - part.start
                raise UndoError(
                    f"{missing} records that were accepted would be lost: Kafka no longer has them",
                    where=f"{topic_id}/{part.partition}, offsets {part.start} to {part.start + missing - 1}",
                    remedy="give a later time; what a record said is corrected by a newer version or a tombstone",
                )


def _open(settings: Settings, name: str) -> Table:
    table = lake.open_table(settings, name)
    if table is None:
        raise UndoError(f"there is no table {name}", remedy="name a table, as curated.pins_offer")
    return table


def _since(table: Table) -> str:
    entries = log(table)
    if not entries:
        return "never (nothing was written)"
    first = entries[0][0] if entries[0][0] or len(entries) == 1 else entries[1][0]
    return datetime.fromtimestamp(first / 1000, UTC).isoformat(timespec="milliseconds")


def _stamp() -> str:
    return re.sub(r"\D", "", datetime.now(UTC).isoformat(timespec="milliseconds")[:23])


# ------------------------------------------------------------------------------------------------ doing it


def carry_out(settings: Settings, planned: Plan) -> None:
    """Do what was planned, for all tables or for none.

    Raises:
        Conflict: Somebody committed since; the tables that had moved already are as they were, or are named.
        WriterBusy: A load or the archive writes, and goes on writing.
    """
    moves = planned.changes
    is_archived = any(move.table in _ARCHIVED for move in moves)
    is_raw = any(move.table.startswith("raw.") for move in moves)
    with writers.alone(settings) if is_raw else nullcontext():
        if (
            is_archived
        ):  # first: to begin anew at what is held is harmless, to go on after what is not is a loss
            streaming.end(settings.paths.checkpoints, archive.STREAM, _last_incarnation(settings))
        done: list[Move] = []
        try:
            for move in moves:
                _set(settings, move, planned.name)
                done.append(move)
                failpoints.hit("undo.after_table")
        except BaseException as error:
            left = [
                move.table for move in reversed(done) if not _was_taken_back(settings, move, planned.name)
            ]
            if left:
                raise Conflict(
                    f"{error}; moved, and not taken back: {', '.join(left)}",
                    remedy=f"`tidemark undo --redo {planned.name}` takes them back",
                ) from error
            raise


def _set(settings: Settings, move: Move, name: str) -> None:
    for attempt in range(_ATTEMPTS):
        table = _open(settings, move.table)
        if table.metadata.current_snapshot_id != move.from_id:
            raise Conflict(
                "somebody committed to the table since the undo was planned",
                where=move.table,
                remedy="look at what came, and undo again; nothing was changed",
            )
        changes = table.manage_snapshots()
        if move.from_id is not None:
            age_ms = time.time_ns() // 1_000_000 - (
                move.from_at_ms or 0
            )  # expiry counts from the snapshot's own time
            changes.create_tag(move.from_id, f"{TAG}{name}", max(0, age_ms) + GRACE_DAYS * _DAY_MS)
        if move.redone_tag is not None:
            changes.remove_tag(move.redone_tag)
        if move.to_id is None:
            changes.remove_branch(MAIN_BRANCH)
        else:
            changes.set_current_snapshot(move.to_id)
        try:
            changes.commit()
            return
        except CommitFailedException:  # maybe of a tag alone: look again
            if attempt == _ATTEMPTS - 1:
                raise Conflict(
                    "others commit to the table all the time",
                    where=move.table,
                    remedy="stop what writes it, and undo again; nothing was changed",
                ) from None
            time.sleep(0.05 * 2**attempt)


def _was_taken_back(settings: Settings, move: Move, name: str) -> bool:
    table = _open(settings, move.table)
    if table.metadata.current_snapshot_id != move.to_id or move.from_id is None:
        return False
    try:
        table.manage_snapshots().remove_tag(f"{TAG}{name}").set_current_snapshot(move.from_id).commit()
    except CommitFailedException:
        return False
    return True


def _last_incarnation(settings: Settings) -> int:
    """The greatest incarnation of the archive in any snapshot that is kept, also of what was undone."""
    found = [0]
    for name in _ARCHIVED:
        table = lake.open_table(settings, name)
        for snapshot in table.metadata.snapshots if table is not None else ():
            said = snapshot.summary.additional_properties if snapshot.summary is not None else {}
            if said.get(lake.STREAM) == archive.STREAM:
                found.append(int(said[lake.INCARNATION]))
    return max(found)
