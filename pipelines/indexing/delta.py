"""The delta: an append-only Delta Lake table of facts, one commit an epoch, made once; and the tail of its log.

Belongs here: the table's layout, the writer with its guard, reading epochs from a snapshot and from the log, and
retiring old ones.
Folding epochs is the overlay's; running a stream is ``streaming``'s.

deltalake records an application's transaction version but does not enforce it: the writer compares it first and
commits with the same handle, so that of two writers of an epoch one commits and the other finds it done.
"""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction

from pipelines import failpoints
from pipelines.errors import TidemarkError
from pipelines.indexing import facts as fact
from pipelines.indexing import position as positions
from pipelines.indexing.files import replace_text
from pipelines.indexing.freshness import Ages, read_ages
from pipelines.indexing.position import Position, ranges
from pipelines.indexing.spec import IndexSpec
from pipelines.tracing import Ranges

EPOCH_FIELDS = (
    pa.field("stream", pa.string()),
    pa.field("incarnation", pa.int64()),
    pa.field("epoch", pa.int64()),
    pa.field("marker", pa.string()),  # JSON of Marker on one row of each epoch, null on its facts
)
_EPOCH = ["stream", "incarnation", "epoch"]  # which names an epoch
PARTITION = "epoch_date"
FLOOR = "_floor.json"
TARGET_FILE_BYTES = 16 * 2**20
COMMIT_ATTEMPTS = 20
INCARNATIONS_AHEAD = 64


class DeltaConflict(TidemarkError):
    """A commit lost against other writers again and again."""


class Marker(NamedTuple):
    """What an epoch says of itself, in a row of its own: where it read, what it found, when.

    ``start`` and ``end`` name the partitions that had records, as [start, end); those of an epoch that hangs on all
    before it (``keyed``) all partitions. Times are ms since 1970; those of an epoch without records are None.
    ``ages`` are those of its documents, live and backfill apart, where the stream declares its stages.
    """

    stream: str
    incarnation: int
    epoch: int
    start: Position
    end: Position
    records: int = 0
    refused: int = 0
    event_time_min_ms: int | None = None
    event_time_max_ms: int | None = None
    broker_time_min_ms: int | None = None
    broker_time_max_ms: int | None = None
    started_at_ms: int | None = None
    decoded_at_ms: int | None = None
    transformed_at_ms: int | None = None
    ages: Mapping[str, Ages] | None = None

    @property
    def name(self) -> str:
        """The epoch's name to people: stream/incarnation/epoch."""
        return f"{self.stream}/{self.incarnation}/{self.epoch}"

    @property
    def places(self) -> Ranges:
        """The records that it read."""
        return ranges(self.start, self.end)

    def to_text(self) -> str:
        """One line of JSON; ``read_marker`` reads it."""
        fields = self._asdict() | {"start": self.start.to_json(), "end": self.end.to_json()}
        ages = fields.pop("ages")
        if ages:
            fields["ages"] = {kind: said.to_json() for kind, said in ages.items()}
        return json.dumps(fields, separators=(",", ":"))


class Epoch(NamedTuple):
    """An epoch as it was committed: its marker and its facts (``facts.schema``).

    ``committed_at_ms`` is when its file was written, just before the commit; None once it lies in a file with others.
    """

    marker: Marker
    facts: pa.Table
    committed_at_ms: int | None = None


def read_marker(text: str, *, with_ages: bool = False) -> Marker:
    """Read ``Marker.to_text``. Ages are most of it: who reads the markers of days does without."""
    fields = json.loads(text)
    ages = fields.pop("ages", None)
    if ages and with_ages:
        fields["ages"] = {kind: read_ages(said) for kind, said in ages.items()}
    start, end = positions.from_json(fields.pop("start")), positions.from_json(fields.pop("end"))
    return Marker(start=start, end=end, **fields)


def schema(spec: IndexSpec) -> pa.Schema:
    """The columns of an index's delta: the epoch's, the day of its commit, and the facts'."""
    return pa.schema([*EPOCH_FIELDS, pa.field(PARTITION, pa.string()), *fact.schema(spec)])


def table_path(root: Path, index: str, lineage: str) -> Path:
    """Where the delta of a lineage lies."""
    return root / index / lineage


class DeltaWriter:
    """Commits the epochs of streams to the delta of one index and lineage."""

    def __init__(self, spec: IndexSpec, path: Path) -> None:
        self.spec = spec
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._schema = schema(spec)
        self._table = DeltaTable.create(
            str(path),
            Schema.from_arrow(self._schema),
            mode="ignore",
            partition_by=[PARTITION],
            name=f"delta.{spec.name}",
            configuration={"delta.appendOnly": "false", "delta.logRetentionDuration": "interval 7 days"},
        )

    def commit(self, marker: Marker, facts: pa.Table) -> bool:
        """Commit an epoch: its facts and its marker, once.

        Returns:
            Whether this call committed it; False: it was there already.

        Raises:
            DeltaConflict: other writers won every attempt.
        """
        application = f"{marker.stream}/{marker.incarnation}"
        action: AddAction | None = None
        for attempt in range(COMMIT_ATTEMPTS):
            self._table.update_incremental()
            stored = self._table.transaction_version(application)
            if stored is not None and stored >= marker.epoch:
                if action is not None:
                    (self.path / action.path).unlink(missing_ok=True)
                return False
            if action is None:
                action = self._write_file(marker, facts)
                failpoints.hit("delta.before_commit")
            try:
                self._table.create_write_transaction(
                    [action],
                    "append",
                    self._table.schema(),
                    partition_by=[PARTITION],
                    commit_properties=CommitProperties(
                        custom_metadata={"tidemark.epoch": marker.name},
                        app_transactions=[Transaction(application, marker.epoch)],
                    ),
                )
            except CommitFailedError:
                time.sleep(0.01 * (attempt + 1))
                continue
            failpoints.hit("delta.after_commit")
            return True
        raise DeltaConflict(
            f"epoch {marker.name} lost {COMMIT_ATTEMPTS} commits to other writers",
            where=str(self.path),
            remedy="stop the other writers of this delta",
        )

    def _write_file(self, marker: Marker, facts: pa.Table) -> AddAction:
        """The epoch's data file: the marker's row, then its facts."""
        day = datetime.datetime.now(datetime.UTC).date().isoformat()
        name = f"{PARTITION}={day}/{marker.stream}-{marker.incarnation}-{marker.epoch}-{uuid.uuid4().hex}.parquet"
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = _epoch_rows(self.spec, marker, facts)
        pq.write_table(rows, file, compression="zstd")
        with file.open("rb") as written:
            os.fsync(written.fileno())
        size = file.stat().st_size
        return AddAction(
            name,
            size,
            {PARTITION: day},
            int(time.time() * 1000),
            True,
            json.dumps({"numRecords": rows.num_rows}),
        )


def _epoch_rows(spec: IndexSpec, marker: Marker, facts: pa.Table) -> pa.Table:
    conformed = fact.conform(facts, spec)
    count = conformed.num_rows + 1
    blank = pa.table({f.name: pa.nulls(1, f.type) for f in fact.schema(spec)}, schema=fact.schema(spec))
    columns: dict[str, Any] = {
        "stream": pa.array([marker.stream] * count, pa.string()),
        "incarnation": pa.array(np.full(count, marker.incarnation)),
        "epoch": pa.array(np.full(count, marker.epoch)),
        "marker": pa.array([marker.to_text()] + [None] * (count - 1), pa.string()),
    }
    whole = pa.concat_tables([blank, conformed])
    return pa.table(columns | {name: whole.column(name) for name in whole.column_names})


def markers(path: Path, stream: str | None = None) -> list[Marker]:
    """The markers of every epoch that a delta still holds, oldest first; none if there is no table."""
    try:
        table = DeltaTable(str(path))
    except TableNotFoundError:
        return []
    chosen = [m for m in _markers(table.file_uris()) if stream is None or m.stream == stream]
    return sorted(chosen, key=lambda m: (m.stream, m.incarnation, m.epoch))


def _markers(files: Iterable[str]) -> list[Marker]:
    found = []
    for file in files:
        texts = pq.ParquetFile(file).read(columns=["marker"]).column("marker").drop_null().to_pylist()
        found += [read_marker(text) for text in texts]
    return found


def size(path: Path) -> tuple[int, int]:
    """How many data files a delta holds (an epoch each, until they are compacted), and their bytes; none: no table."""
    try:
        added = pa.table(DeltaTable(str(path)).get_add_actions(flatten=True))
    except TableNotFoundError:
        return 0, 0
    return added.num_rows, pc.sum(added.column("size_bytes")).as_py() or 0


def last_incarnation(path: Path, stream: str, known: int = 0) -> int:
    """The greatest incarnation of a stream that committed here, also one whose epochs were retired; 0: none.

    ``known``: one that is known to have committed, to begin the search at.
    """
    try:
        table = DeltaTable(str(path))
    except TableNotFoundError:
        return known
    candidates = range(known + 1, known + 1 + INCARNATIONS_AHEAD)  # some may have begun and committed nothing
    return max([known, *(n for n in candidates if table.transaction_version(f"{stream}/{n}") is not None)])


def floor(path: Path) -> Position:
    """Up to where epochs were retired: only a base whose cut covers it can be served with this delta."""
    try:
        return positions.from_text((path / FLOOR).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return positions.EMPTY


def retire(path: Path, before: datetime.date) -> int:
    """Delete the epochs of the days before ``before``; returns how many. Their files go with the next vacuum.

    The floor is raised first: a crash in between leaves a delta that promises less than it has.
    """
    try:
        table = DeltaTable(str(path))
    except TableNotFoundError:
        return 0
    by_day = _by_day(table)
    retired = [day for day in by_day if day < before.isoformat()]
    gone = _markers(file for day in retired for file in by_day[day])
    replace_text(path / FLOOR, positions.merge_all([floor(path), *(m.end for m in gone)]).to_text())
    for day in retired:
        table.delete(f"{PARTITION} = '{day}'")
    return len(gone)


def _by_day(table: DeltaTable) -> dict[str, list[str]]:
    """The data files of each day, the oldest day first."""
    found: dict[str, list[str]] = {}
    for file in sorted(table.file_uris()):
        found.setdefault(Path(file).parent.name.partition("=")[2], []).append(file)
    return dict(sorted(found.items()))


def first_needed_day(path: Path, cuts: Iterable[Position], young: datetime.date) -> datetime.date:
    """The first day with an epoch that is not wholly in all of these cuts; `young` if there is none before it."""
    try:
        table = DeltaTable(str(path))
    except TableNotFoundError:
        return young
    cuts = list(cuts)
    for day, files in _by_day(table).items():
        if day >= young.isoformat() or any(not cut.covers(m.end) for m in _markers(files) for cut in cuts):
            return min(young, datetime.date.fromisoformat(day))
    return young


def newest_day(path: Path) -> datetime.date:
    """The day of the newest epoch; of the folder where there is none (any more)."""
    days = list(_by_day(DeltaTable(str(path))))
    made = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date()
    return datetime.date.fromisoformat(days[-1]) if days else made


def compact(path: Path) -> int:
    """Merge the small files of each day, beside writers and tailers; how many were. Facts and markers stay the same."""
    done = DeltaTable(str(path)).optimize.compact(target_size=TARGET_FILE_BYTES)
    return int(done["numFilesRemoved"])


def vacuum(path: Path, replaced_hours: int, orphan_hours: int) -> int:
    """Remove the files that were replaced or retired so long ago, and those that died before their commit; how many.

    The log gets a checkpoint, and its entries from before the table's log retention go too.
    """
    table = DeltaTable(str(path))
    removed = table.vacuum(replaced_hours, dry_run=False, enforce_retention_duration=False)
    removed += table.vacuum(orphan_hours, dry_run=False, enforce_retention_duration=False, full=True)
    table.create_checkpoint()
    table.cleanup_metadata()
    return len(removed)


def days(path: Path) -> set[str]:
    """The days (ISO) of which a delta holds epochs; none if there is no table."""
    try:
        return set(_by_day(DeltaTable(str(path))))
    except TableNotFoundError:
        return set()


def sizes(path: Path) -> dict[str, list[int]]:
    """The sizes of the data files of each day, in bytes."""
    found: dict[str, list[int]] = {}
    for file in pa.table(DeltaTable(str(path)).get_add_actions(flatten=True)).to_pylist():
        found.setdefault(file[f"partition.{PARTITION}"], []).append(file["size_bytes"])
    return found


class Ends:
    """How far a delta has come: reads the markers that are there once, then those of each new commit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = -1
        self._position = positions.EMPTY

    def position(self) -> Position:
        """The merged ends of every epoch that was committed; ``EMPTY`` before the first."""
        if self._version < 0:
            try:
                table = DeltaTable(str(self._path))
            except TableNotFoundError:
                return positions.EMPTY
            self._version = int(table.version())
            self._add(table.file_uris())
        while (entry := self._path / "_delta_log" / f"{self._version + 1:020d}.json").exists():
            added = [json.loads(line).get("add") for line in entry.read_text(encoding="utf-8").splitlines()]
            files = [str(self._path / action["path"]) for action in added if action]
            self._add([file for file in files if Path(file).exists()])  # one that is gone was rewritten since
            self._version += 1
        return self._position

    def _add(self, files: Iterable[str]) -> None:
        ends = (marker.end for marker in _markers(files))
        self._position = positions.merge_all([self._position, *ends])


class Tailer:
    """Follows a delta: the epochs of its snapshot, then those of each new commit. One thread uses it."""

    def __init__(self, spec: IndexSpec, path: Path) -> None:
        self.spec = spec
        self.path = path
        self.version = -1  # of the log, up to which epochs were read
        self._log = path / "_delta_log"
        self._checkpoint = (0, -1)  # of the last one that was looked at: when it was written, its version

    def head(self) -> int:
        """The newest version of the log; -1 if there is no table yet."""
        try:
            return int(DeltaTable(str(self.path)).version())
        except TableNotFoundError:
            return -1

    def snapshot(self) -> Iterator[Epoch]:
        """Every epoch of the table as it is now; from here on ``poll`` gives what comes after."""
        if not self._log.exists():  # asked often before the first epoch
            return
        try:
            table = DeltaTable(str(self.path))
        except TableNotFoundError:
            return
        version = int(table.version())
        for file in table.file_uris():
            yield from self._read(Path(file))
        self.version = version

    def poll(self) -> list[Epoch] | None:
        """The epochs of the next commit; empty if there is none; None where only ``snapshot`` can go on.

        Removals and rewrites are ignored: they do not change which facts were accepted.
        """
        entry = self._log / f"{self.version + 1:020d}.json"
        if not entry.exists():  # nearly always so: it costs two system calls
            return None if self._was_cleaned_up() else []
        lines = entry.read_text(encoding="utf-8").splitlines()
        epochs: list[Epoch] = []
        for line in lines:
            added = json.loads(line).get("add")
            if added and added.get("dataChange", True):
                try:
                    epochs += self._read(self.path / added["path"])
                except FileNotFoundError:  # compacted and vacuumed since: the snapshot has its facts
                    return None
        self.version += 1
        return epochs

    def _was_cleaned_up(self) -> bool:
        file = self._log / "_last_checkpoint"
        try:
            written_ns = file.stat().st_mtime_ns
            if written_ns != self._checkpoint[0]:
                version = int(json.loads(file.read_text(encoding="utf-8"))["version"])
                self._checkpoint = (written_ns, version)
        except (FileNotFoundError, ValueError, KeyError):
            return False
        return self._checkpoint[1] > self.version

    def _read(self, file: Path) -> list[Epoch]:
        return epochs_in(self.spec, file)


def epochs_in(spec: IndexSpec, file: Path) -> list[Epoch]:
    """The epochs of one data file; a file that compaction wrote holds several."""
    table = pq.ParquetFile(file).read()
    families = pa.array([family.name for family in spec.families])
    rows = table.filter(pc.is_in(table.column("family"), families))  # an older lineage may have had others
    texts = table.column("marker").drop_null().to_pylist()
    marked = [read_marker(text, with_ages=True) for text in texts]
    written_at_ms = file.stat().st_mtime_ns // 1_000_000 if len(marked) == 1 else None
    parts = _by_epoch(rows) if len(marked) > 1 else {}
    epochs = []
    for marker in marked:
        this = (marker.stream, marker.incarnation, marker.epoch)
        mine = parts.get(this, rows.slice(0, 0)) if len(marked) > 1 else rows
        facts = fact.conform(mine.drop_columns([f.name for f in EPOCH_FIELDS]), spec)
        epochs.append(Epoch(marker, facts, written_at_ms))
    return epochs


def _by_epoch(rows: pa.Table) -> dict[tuple[str, int, int], pa.Table]:
    """The rows of each epoch, of one sort: a compacted file has an epoch a second."""
    counted = rows.group_by(_EPOCH).aggregate([([], "count_all")]).sort_by([(n, "ascending") for n in _EPOCH])
    ordered = rows.sort_by([(name, "ascending") for name in _EPOCH])
    found, start = {}, 0
    for epoch in counted.to_pylist():
        count = epoch.pop("count_all")
        found[epoch["stream"], epoch["incarnation"], epoch["epoch"]] = ordered.slice(start, count)
        start += count
    return found
