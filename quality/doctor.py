"""The doctor: whether raw, curated, bases, delta and `ops.epochs` agree, and what to do where they do not.

Belongs here: the checks, one function each in one table, `CHECKS`. Does not belong here: mending (each finding names
the command that does), and printing. Everything is read through pyiceberg, pyarrow and deltalake: no Spark, no broker
and no process has to run, and one that runs is not disturbed. Raw tables are read column by column in batches.

What was just written is left alone: an epoch is copied a minute later, and a file lies there before its commit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from pyarrow.fs import FileSelector, FileSystem, FileType
from pyiceberg.manifest import ManifestEntryStatus
from pyiceberg.table import Table

from pipelines import lake, staging
from pipelines.contracts import CONTRACTS, PROVENANCE, RECORD, Contract, decode_table
from pipelines.curate import FATES, SOURCES, Source
from pipelines.errors import TidemarkError
from pipelines.indexing import delta
from pipelines.indexing.base import Manifest, read_manifest
from pipelines.indexing.delta import Marker
from pipelines.indexing.files import verify
from pipelines.indexing.position import EMPTY, Position, from_text, meet_all, merge_all, topic_name
from pipelines.indexing.spec import lineage
from pipelines.indexing.streaming import Committed
from pipelines.indexing.versions import Versions, reaches
from pipelines.indices import INDICES, STREAMS
from pipelines.ingest import archive, broker
from pipelines.settings import Settings
from quality.offsets import Offsets

LOSSES = lake.OPS_LOSSES.name
OK, WARNING, ERROR = "ok", "warning", "error"
EPOCH_COPY_S = 120
UNCOMMITTED_S = 3_600
ORPHAN_S = 3 * 86_400
SHOWN = 3


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        check: Which check.
        severity: ok, warning (to be looked at) or error (something is lost, doubled or broken).
        where: The table, folder or file.
        what: What is there and what should be.
        remedy: What to do, as a command where there is one.
    """

    check: str
    severity: str
    where: str
    what: str
    remedy: str


Found = tuple[str, str, str, str]  # severity, where, what, remedy


class Raw(NamedTuple):
    """What the rows of a raw table are, at one snapshot: by partition the offsets, by load the rows."""

    contract: Contract
    snapshot: lake.Snapshot | None
    position: Position
    offsets: dict[tuple[str, int], Offsets]
    loads: Counter[str]


class EpochFile(NamedTuple):
    """A data file of a delta: what its log says of it, its markers, its rows; `problem` where it cannot be read."""

    path: Path
    written_s: float
    logged_rows: int | None
    rows: int
    markers: tuple[Marker, ...]
    problem: str | None


class Delta(NamedTuple):
    """The delta of one index and lineage."""

    index: str  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    lineage: str
    path: Path
    files: tuple[EpochFile, ...]
    problem: str | None

    @property
    def markers(self) -> list[Marker]:
        """Of every epoch that can be read, in the order in which they were made."""
        found = [marker for file in self.files for marker in file.markers]
        return sorted(found, key=lambda m: (m.stream, m.incarnation, m.epoch))


class Home:
    """What the checks look at, each thing read once, when it is first needed."""

    def __init__(self, settings: Settings, is_deep: bool) -> None:
        self.settings, self.is_deep = settings, is_deep
        self.now_s = time.time()

    def table(self, name: str) -> Table | None:
        """A table of the lake, as it is now."""
        return lake.open_table(self.settings, name)

    @functools.cached_property
    def raw(self) -> list[Raw]:
        """Every raw table that holds a topic's records."""
        return [_read_raw(self.settings, contract) for contract in CONTRACTS.values()]

    @functools.cached_property
    def letters(self) -> pa.Table:
        """The dead letters, without their values."""
        table = self.table(lake.RAW_DEAD_LETTERS.name)
        names = ("topic", "topic_id", "partition", "offset", "load_id", "load_row", "ingested_at")
        if table is None:
            return pa.table({name: pa.array([], pa.int64()) for name in names})
        return table.scan(selected_fields=names).to_arrow()

    @functools.cached_property
    def losses(self) -> list[dict[str, Any]]:
        """Offsets that the broker expired before they were archived, as the archive noted them."""
        table = self.table(LOSSES)
        names = ("topic_id", "partition", "start", "end")
        return table.scan(selected_fields=names).to_arrow().to_pylist() if table is not None else []

    def is_noted(self, place: tuple[str, int], gap: tuple[int, int]) -> bool:
        """Whether a gap is a loss that is written down already."""
        return any(
            (loss["topic_id"], loss["partition"]) == place
            and loss["start"] <= gap[0]
            and gap[1] <= loss["end"]
            for loss in self.losses
        )

    @functools.cached_property
    def deltas(self) -> list[Delta]:
        """Every delta, of every lineage."""
        folders = sorted(self.settings.paths.delta.glob("*/*/_delta_log"))
        return [_read_delta(folder.parent) for folder in folders]

    @functools.cached_property
    def bases(self) -> list[tuple[str, Path, Manifest | None, str]]:
        """Every base: its index, its folder, its manifest, or why that cannot be read."""
        found: list[tuple[str, Path, Manifest | None, str]] = []
        for index in INDICES:
            versions = Versions(self.settings.paths.indices, index)
            for name in versions.names():
                try:
                    found.append((index, versions.folder / name, read_manifest(versions.folder / name), ""))
                except TidemarkError as error:
                    found.append((index, versions.folder / name, None, error.what))
        return found

    def served(self, index: str) -> tuple[str, bool] | None:
        """The version that an index serves, and whether with the delta."""
        pointer = Versions(self.settings.paths.indices, index).pointer()
        return None if pointer is None else (pointer.version, pointer.with_delta)

    def held(self) -> Position:
        """What the raw tables hold now."""
        return lake.positions(self.settings, [contract.raw_table for contract in CONTRACTS.values()])


def examine(settings: Settings, *, is_deep: bool = False) -> list[Finding]:
    """Look at everything; a check that finds nothing says so with an ok.

    Args:
        settings: Where everything is.
        is_deep: Also what takes as long as reading everything: each record by its contract, each file's checksum.
    """
    home = Home(settings, is_deep)
    findings: list[Finding] = []
    for name, (says, check) in CHECKS.items():
        try:
            found = [Finding(name, *one) for one in check(home)]
        except (
            Exception
        ) as error:  # one thing that cannot be read must not hide what is wrong with the others
            why = str(error).strip().splitlines() or [type(error).__name__]
            remedy = "mend what other findings name, then look again"
            found = [Finding(name, ERROR, "", f"could not be looked at: {why[0][:300]}", remedy)]
        findings += found or [Finding(name, OK, "", says, "")]
    return findings


# ------------------------------------------------------------------------------------------------ raw


def _read_raw(settings: Settings, contract: Contract) -> Raw:
    name = contract.raw_table
    snapshot = lake.current_snapshot(settings, name)
    if snapshot is None:
        return Raw(contract, None, EMPTY, {}, Counter())
    table = lake.open_table(settings, name)
    assert table is not None
    offsets: dict[tuple[str, int], Offsets] = {}
    loads: Counter[str] = Counter()
    scan = table.scan(snapshot_id=snapshot.id, selected_fields=("topic_id", "partition", "offset", "load_id"))
    for batch in scan.to_arrow_batch_reader():
        rows = pa.table(batch)
        for load in rows.column("load_id").value_counts().to_pylist():
            if load["values"] is not None:
                loads[load["values"]] += load["counts"]
        rows = rows.filter(pc.is_null(rows.column("load_id")))
        for place, part in _by_partition(rows):
            offsets.setdefault(place, Offsets()).add(part)
    return Raw(contract, snapshot, lake.position(settings, name, snapshot.id), offsets, loads)


def _by_partition(rows: pa.Table) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    for place in rows.group_by(["topic_id", "partition"]).aggregate([]).to_pylist():
        is_here = pc.and_(
            pc.equal(rows.column("topic_id"), place["topic_id"]),
            pc.equal(rows.column("partition"), place["partition"]),
        )
        yield (place["topic_id"], place["partition"]), rows.filter(is_here).column("offset").to_numpy()


def _raw(home: Home) -> Iterator[Found]:
    for raw in home.raw:
        name = raw.contract.raw_table
        back = f"`tidemark undo {name} --to TIME` of before they went: Kafka brings again what came since"
        ends = {
            (topic_id, partition): end
            for topic_id, offsets in raw.position.topics.items()
            for partition, end in offsets.items()
        }
        for place in sorted(ends.keys() | raw.offsets.keys()):
            where, held = f"{name}, {place[0]}/{place[1]}", raw.offsets.get(place, Offsets())
            if held.repeats:
                what = f"{held.repeats} records are there more than once, as offset {_some(held.repeated)}"
                yield ERROR, where, what, back
            if held.end != ends.get(place, 0):
                what = f"the rows end at offset {held.end}, the snapshot says {ends.get(place, 0)}"
                yield ERROR, where, what, back
            gaps = [gap for gap in held.gaps() if not home.is_noted(place, gap)]
            if lost := [gap for gap in gaps if gap[1] - gap[0] > 1]:
                yield ERROR, where, f"{_sum(lost)} offsets are missing: {_ranges(lost)}", back
            if single := [gap for gap in gaps if gap[1] - gap[0] == 1]:
                what = f"{len(single)} single offsets are missing, as {_some([gap[0] for gap in single])}"
                yield WARNING, where, f"{what}: a transaction's marker takes one; or a lost record", back
        yield from _loads(home, raw)


def _loads(home: Home, raw: Raw) -> Iterator[Found]:
    name = raw.contract.raw_table
    committed = {
        str(s.summary[lake.LOAD_ID]): int(s.summary.get("added-records", 0))
        for s in lake.ancestors(home.settings, name, raw.snapshot.id if raw.snapshot else None)
        if lake.LOAD_ID in s.summary
    }
    for load_id in sorted(raw.position.loads | raw.loads.keys()):
        rows = raw.loads[load_id]
        said = committed.get(load_id, rows)
        remedy = f"`tidemark undo --load {load_id}`, then load it again"
        if load_id not in raw.position.loads:
            yield ERROR, f"{name}, load {load_id}", f"{rows} rows, of a load that was not committed", remedy
        elif rows != said:
            yield ERROR, f"{name}, load {load_id}", f"{rows} rows; its commit brought {said}", remedy


def _letters(home: Home) -> Iterator[Found]:
    by_topic = {raw.contract.topic: raw for raw in home.raw}
    name = lake.RAW_DEAD_LETTERS.name
    seen: Counter[tuple[Any, ...]] = Counter()
    beyond, strange = 0, []
    for row in home.letters.to_pylist():
        raw, place = by_topic.get(row["topic"]), _letter_place(row["topic"], row)
        if raw is None:
            strange.append(place)
        elif row["load_id"] is not None:
            if row["load_id"] not in raw.position.loads:
                beyond += _age_s(home, row["ingested_at"]) > UNCOMMITTED_S
                continue
            if not raw.loads[row["load_id"]]:
                strange.append(place)
        else:
            end = raw.position.topics.get(row["topic_id"], {}).get(row["partition"], 0)
            if row["offset"] >= end:
                beyond += _age_s(home, row["ingested_at"]) > UNCOMMITTED_S
                continue
            held = raw.offsets.get((row["topic_id"], row["partition"]), Offsets())
            if not held.has(row["offset"]):
                strange.append(place)
        seen[place] += 1
    if strange:
        what = f"{len(strange)} letters are of records that raw does not have, as {_place(strange[0])}"
        yield ERROR, name, what, "see what `tidemark doctor` says of the raw table; it is to be mended first"
    if doubled := [place for place, count in seen.items() if count > 1]:
        what = f"{len(doubled)} letters are there more than once, as {_place(doubled[0])}"
        remedy = "`tidemark undo` the raw table to before their records: both come again"
        yield ERROR, name, what, remedy
    if beyond:
        what = f"{beyond} letters of an attempt that came to nothing; they do not count"
        yield WARNING, name, what, "load again, or `tidemark start archive`: the next attempt replaces them"
    if home.is_deep:
        yield from _refused(home)


def _refused(home: Home) -> Iterator[Found]:
    """Each record once more by its contract: what is refused must have its letter, and the other way round."""
    counted = Counter(_letter_place(row["topic"], row) for row in home.letters.to_pylist())
    for raw in home.raw:
        if raw.snapshot is None:
            continue
        topic = raw.contract.topic
        without: list[tuple[Any, ...]] = []
        found: set[tuple[Any, ...]] = set()
        for _, refused in _decoded(home, raw.contract, raw.snapshot.id):
            for row in refused.select(["topic_id", "partition", "offset", "load_id", "load_row"]).to_pylist():
                place = _letter_place(topic, row)
                found.add(place)
                if not counted[place]:
                    without.append(place)
        held = {place for place in counted if place[0] == topic and _is_held(raw, place)}
        if without:
            what = f"{len(without)} records are refused and have no letter, as {_place(without[0])}"
            yield (
                ERROR,
                raw.contract.raw_table,
                what,
                "`tidemark undo` the table to before them, and archive again",
            )
        if accepted := held - found:
            what = f"{len(accepted)} letters are of records that are accepted now, as {_place(min(accepted, key=str))}"
            yield WARNING, lake.RAW_DEAD_LETTERS.name, what, "`tidemark build`: the next base has them"


def _letter_place(topic: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Topic, then load id and row, or topic id, partition and offset."""
    if row["load_id"] is not None:
        return topic, row["load_id"], None, row["load_row"]
    return topic, row["topic_id"], row["partition"], row["offset"]


def _is_held(raw: Raw, place: tuple[Any, ...]) -> bool:
    _, source, partition, number = place
    if partition is None:
        return source in raw.position.loads
    return bool(number < raw.position.topics.get(source, {}).get(partition, 0))


def _decoded(home: Home, contract: Contract, snapshot_id: int) -> Iterator[tuple[pa.Table, pa.Table]]:
    table = home.table(contract.raw_table)
    assert table is not None
    scan = table.scan(snapshot_id=snapshot_id, selected_fields=(*PROVENANCE.names, "key", "value"))
    for batch in scan.to_arrow_batch_reader():
        decoded = decode_table(contract, pa.table(batch).select(RECORD.names))
        yield decoded.accepted, decoded.refused


# ------------------------------------------------------------------------------------------------ curated


def _curated(home: Home) -> Iterator[Found]:
    held = home.held()
    for source in SOURCES.values():
        for part in source.tables:
            said = _said_position(home, part.table)
            if not held.covers(said):
                what = f"it holds {_beyond(said, held)}, which {source.raw_table} does not"
                yield ERROR, part.table, what, "`tidemark build`, or `tidemark undo` of the table as well"
    yield from _accounts(home)
    if home.is_deep:
        for source in SOURCES.values():
            yield from _identities(home, source)


def _accounts(home: Home) -> Iterator[Found]:
    table = home.table(lake.OPS_ACCOUNT.name)
    if table is None:
        return
    rows_of: dict[int, int] = {}
    for raw in home.raw:
        rows_of |= {s.id: s.rows for s in lake.ancestors(home.settings, raw.contract.raw_table)}
    for row in table.scan().to_arrow().to_pylist():
        where = f"{lake.OPS_ACCOUNT.name}, {row['table']} at {row['snapshot_id']}"
        fates = sum(row[fate] for fate in FATES)
        refused = sum(json.loads(row["refused_by_reason"]).values())
        numbers = (
            f"{row['rows']} rows, {row['accepted']} accepted ({fates} by fate), {row['refused']} refused"
        )
        is_even = row["rows"] == row["accepted"] + row["refused"]
        if not is_even or row["accepted"] != fates or row["refused"] != refused:
            yield ERROR, where, f"{numbers}: it does not add up", "`tidemark build` makes a new account"
        elif row["rows"] != rows_of.get(row["snapshot_id"], row["rows"]):
            what = f"{numbers}; the snapshot has {rows_of[row['snapshot_id']]}"
            yield ERROR, where, what, "`tidemark build` makes a new account"


def _identities(home: Home, source: Source) -> Iterator[Found]:
    """Counted again: a curated table has each identity of raw's accepted records once."""
    at: list[tuple[Position, int]] = []
    for one in reversed(list(lake.ancestors(home.settings, source.raw_table))):
        at.append(((at[-1][0] if at else EMPTY).merge(_own_position(one)), one.id))
    for part in source.parts:
        snapshot = lake.current_snapshot(home.settings, part.table)
        said = _said_position(home, part.table)
        raw_id = next((id_ for held, id_ in reversed(at) if held == said), None)
        if snapshot is None or raw_id is None:
            continue
        known: pa.Table | None = None
        for accepted, _ in _decoded(home, source.contract, raw_id):
            says = accepted.filter(pc.is_valid(accepted.column(part.content_hash)))
            more = says.select(list(source.identity))
            known = more if known is None else pa.concat_tables([known, more])
            known = known.group_by(list(source.identity)).aggregate([])
        count = 0 if known is None else known.num_rows
        if count != snapshot.rows:
            what = f"{snapshot.rows} rows; raw has {count} identities at snapshot {raw_id}"
            yield ERROR, part.table, what, "`tidemark build`"


# ------------------------------------------------------------------------------------------------ bases


def _bases(home: Home) -> Iterator[Found]:
    held = home.held()
    known: dict[str, set[str]] = {}
    for index, folder, manifest, problem in home.bases:
        known.setdefault(index, set()).add(folder.name)
        served = home.served(index)
        is_served = served is not None and served[0] == folder.name
        other = f"`tidemark rollback {index}`, or `tidemark build`" if is_served else "`tidemark build`"
        if manifest is None:
            yield ERROR, str(folder), problem, other
            continue
        yield from _files(home, folder, manifest, is_served, other)
        if not held.covers(manifest.cut):
            what = f"its cut has {_beyond(manifest.cut, held)}, which raw does not have (any more)"
            remedy = f"`tidemark build`, or `tidemark undo index {index} --to TIME`"
            yield ERROR if is_served else WARNING, str(folder), what, remedy
        if is_served and manifest.lineage != lineage(INDICES[index]):
            what = f"lineage {manifest.lineage} is served; this code's is {lineage(INDICES[index])}: it gets stale"
            yield WARNING, str(folder), what, "`tidemark build`"
    for index in INDICES:
        served = home.served(index)
        if served is not None and served[0] not in known.get(index, set()):
            where = str(home.settings.paths.indices / index / "pointer.json")
            yield ERROR, where, f"it serves {served[0]}, which is not there", "`tidemark build`"
        for folder in (home.settings.paths.indices / index).glob("*.building"):
            if home.now_s - folder.stat().st_mtime > UNCOMMITTED_S:
                yield WARNING, str(folder), "a build broke off", f"`rm -r {folder}`, if no build runs"
    yield from _tags(home)


def _files(home: Home, folder: Path, manifest: Manifest, is_served: bool, remedy: str) -> Iterator[Found]:
    for shard in manifest.shards:
        for file in shard.files:
            path = folder / shard.name / file.name
            if home.is_deep or is_served:
                try:
                    verify(folder / shard.name, file)
                except TidemarkError as error:
                    yield ERROR, str(path), error.what, remedy
            elif not path.exists() or path.stat().st_size != file.size_bytes:
                size = path.stat().st_size if path.exists() else "no"
                yield ERROR, str(path), f"has {size} bytes, not {file.size_bytes}", remedy


def _tags(home: Home) -> Iterator[Found]:
    expected: dict[str, dict[str, int]] = {}
    for _, _, manifest, _ in home.bases:
        if manifest is None:
            continue
        for name, snapshot_id in manifest.sources.items():
            expected.setdefault(name, {})[f"base-{manifest.version}"] = snapshot_id
    for name in sorted(_table_names(home)):
        table = home.table(name)
        if table is None:
            continue
        tags = {
            label: ref.snapshot_id for label, ref in table.metadata.refs.items() if label.startswith("base-")
        }
        for label, snapshot_id in expected.get(name, {}).items():
            if table.metadata.snapshot_by_id(snapshot_id) is None:
                what = f"snapshot {snapshot_id}, which {label} was built of, is gone"
                yield ERROR, name, what, "`tidemark build` makes a base whose sources are kept"
            elif tags.get(label) != snapshot_id:
                what = f"the tag {label} of snapshot {snapshot_id} is missing: expiry would not spare it"
                yield WARNING, name, what, "`tidemark build` makes a base whose sources are tagged"
        if stale := sorted(set(tags) - set(expected.get(name, {}))):
            what = f"{len(stale)} tags of bases that are gone, as {stale[0]}: they keep old snapshots"
            yield WARNING, name, what, "`tidemark maintain`"


def _staged(home: Home) -> Iterator[Found]:
    for name in sorted(_table_names(home)):
        if (staged := staging.snapshot(home.settings, name)) is not None:
            at = datetime.fromtimestamp(staged.committed_at_ms / 1000, UTC).isoformat(timespec="seconds")
            what = f"{staged.rows} rows staged at {at} are not published: refused, or a build is under way"
            yield WARNING, name, what, f"`tidemark quality {name}` says why; `tidemark build` stages anew"


# ------------------------------------------------------------------------------------------------ delta


def _read_delta(path: Path) -> Delta:
    index, mark = path.parent.name, path.name
    try:
        table = DeltaTable(str(path))
        added = pa.table(table.get_add_actions(flatten=True)).to_pylist()
    except TableNotFoundError:
        return Delta(index, mark, path, (), None)
    except Exception as error:
        return Delta(index, mark, path, (), f"its log cannot be read: {_first_line(error)}")
    files = [_read_epochs(path, action) for action in added]
    return Delta(index, mark, path, tuple(files), None)


def _read_epochs(folder: Path, action: dict[str, Any]) -> EpochFile:
    path = folder / action["path"]
    at = action["modification_time"]
    written_s = at.timestamp() if isinstance(at, datetime) else at / 1000
    rows = action.get("num_records")
    try:
        if path.stat().st_size != action["size_bytes"]:
            problem = f"has {path.stat().st_size} bytes; the log says {action['size_bytes']}"
            return EpochFile(path, written_s, rows, 0, (), problem)
        texts = pq.ParquetFile(path).read(columns=["marker"]).column("marker")
        markers = tuple(delta.read_marker(text) for text in texts.drop_null().to_pylist())
        return EpochFile(path, written_s, rows, len(texts), markers, None)
    except FileNotFoundError:
        return EpochFile(path, written_s, rows, 0, (), "is missing; the log names it")
    except Exception as error:
        return EpochFile(path, written_s, rows, 0, (), f"cannot be read: {_first_line(error)}")


def _delta(home: Home) -> Iterator[Found]:
    for one in home.deltas:
        where = f"delta {one.index}/{one.lineage}"
        if one.problem is not None:
            remedy = f"`tidemark rollback {one.index} --without-delta`, then restore {one.path}"
            yield ERROR, where, one.problem, remedy
            continue
        for file in one.files:
            if file.problem is not None:
                remedy = (
                    "`tidemark build`: the next base has what it held; then "
                    f"`python -c \"from deltalake import DeltaTable as T; T('{one.path}').repair()\"`"
                )
                yield ERROR, str(file.path), file.problem, remedy
            elif file.logged_rows not in (None, file.rows):
                what = f"{file.rows} rows; the log says {file.logged_rows}"
                yield ERROR, str(file.path), what, "`tidemark build`: the next base has what it held"
        yield from _epochs_of(home, one, where)
        yield from _left_files(home, one)
    for index in INDICES:
        served = home.served(index)
        manifest = next(
            (m for i, f, m, _ in home.bases if m and i == index and served and f.name == served[0]), None
        )
        if manifest and served and served[1] and not reaches(home.settings.paths.delta, manifest):
            what = f"the delta was retired beyond the cut of {served[0]}, which is served: facts are missing between"
            yield ERROR, f"index {index}", what, "`tidemark build`"


def _epochs_of(home: Home, one: Delta, where: str) -> Iterator[Found]:
    """Epochs follow each other without a gap, in their numbers and in what they read."""
    retired = delta.floor(one.path)
    remedy = "`tidemark build`: the next base has what the stream missed"
    before: Marker | None = None
    ends = EMPTY
    for marker in one.markers:
        same_stream = before is not None and before.stream == marker.stream
        ends = ends if same_stream else EMPTY
        same_life = same_stream and before is not None and before.incarnation == marker.incarnation
        if same_life and before is not None and marker.epoch <= before.epoch:
            yield ERROR, where, f"the epoch {marker.name} is there twice", remedy
        elif same_life and before is not None and marker.epoch > before.epoch + 1:
            yield ERROR, where, f"between {before.name} and {marker.name} epochs are missing", remedy
        elif not same_life and marker.epoch > 0 and retired == EMPTY:
            yield ERROR, where, f"the epochs before {marker.name} are missing, and none was retired", remedy
        for topic_id, starts in marker.start.topics.items():
            for partition, start in starts.items():
                end = ends.topics.get(topic_id, {}).get(partition)
                if end is not None and start > end:
                    yield from _gap(home, where, marker, topic_id, partition, end, start, remedy)
        read = sum(
            end - marker.start.topics.get(topic_id, {}).get(partition, 0)
            for topic_id, of_topic in marker.end.topics.items()
            for partition, end in of_topic.items()
        )
        if marker.records > read or marker.refused > marker.records:
            what = f"{marker.name} says {marker.records} records, {marker.refused} refused, of {read} offsets"
            yield ERROR, where, what, remedy
        ends, before = ends.merge(marker.end), marker


def _gap(
    home: Home, where: str, marker: Marker, topic_id: str, partition: int, start: int, end: int, remedy: str
) -> Iterator[Found]:
    """Offsets that no epoch read; where raw has no record either there was none (a transaction's marker takes one)."""
    raw = next((r for r in home.raw if (topic_id, partition) in r.offsets), None)
    what = f"before {marker.name} no epoch read {topic_id}/{partition}, offsets {start} to {end - 1}"
    if raw is not None and raw.position.topics.get(topic_id, {}).get(partition, 0) >= end:
        if lost := raw.offsets[topic_id, partition].count(start, end):
            yield ERROR, where, f"{what}: {lost} records", remedy
    else:
        yield WARNING if end - start == 1 else ERROR, where, what, remedy


def _left_files(home: Home, one: Delta) -> Iterator[Found]:
    named = {file.path for file in one.files}
    left = [
        path
        for path in one.path.glob(f"{delta.PARTITION}=*/*.parquet")
        if path not in named and home.now_s - path.stat().st_mtime > UNCOMMITTED_S
    ]
    if not left:
        return
    logged: set[Path] = set()
    for entry in (one.path / "_delta_log").glob("*.json"):
        for line in entry.read_text(encoding="utf-8").splitlines():
            action = json.loads(line)
            logged |= {one.path / action[kind]["path"] for kind in ("add", "remove") if action.get(kind)}
    if orphans := [path for path in left if path not in logged]:
        size = sum(path.stat().st_size for path in orphans)
        what = f"{len(orphans)} files, {size:,} bytes, that no commit names, as {orphans[0].name}"
        yield WARNING, str(one.path), what, "`tidemark maintain`; they are of epochs that were not committed"


def _ops_epochs(home: Home) -> Iterator[Found]:
    table = home.table(lake.OPS_EPOCHS.name)
    names = ("index", "lineage", "stream", "incarnation", "epoch", "position")
    rows = table.scan(selected_fields=names).to_arrow().to_pylist() if table is not None else []
    copied: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        copied.setdefault(tuple(row[name] for name in names[:5]), []).append(row["position"])
    name = lake.OPS_EPOCHS.name
    if doubled := [epoch for epoch, found in copied.items() if len(found) > 1]:
        yield ERROR, name, f"{len(doubled)} epochs are there twice, as {_place(doubled[0])}", _EPOCHS_AGAIN
    newest: dict[tuple[Any, ...], tuple[int, int]] = {}
    for index, mark, stream, incarnation, epoch in copied:
        at = (index, mark, stream)
        newest[at] = max(newest.get(at, (0, -1)), (incarnation, epoch))
    missing: list[tuple[Any, ...]] = []
    late: list[tuple[Any, ...]] = []
    other: list[tuple[Any, ...]] = []
    for one in home.deltas:
        for file in one.files:
            for marker in file.markers if home.now_s - file.written_s > EPOCH_COPY_S else ():
                epoch_id = (one.index, one.lineage, marker.stream, marker.incarnation, marker.epoch)
                found = copied.get(epoch_id)
                if found is None:
                    is_passed = newest.get(epoch_id[:3], (0, -1)) > (marker.incarnation, marker.epoch)
                    (missing if is_passed else late).append(epoch_id)
                elif from_text(found[0]) != marker.end:
                    other.append(epoch_id)
    if missing:
        what = f"{len(missing)} epochs of the deltas were passed over, as {_place(missing[0])}"
        yield ERROR, name, what, _EPOCHS_AGAIN
    if late:
        what = f"{len(late)} epochs are not copied yet, as {_place(late[0])}"
        yield WARNING, name, what, "`tidemark up streams` copies them within a minute"
    if other:
        what = f"{len(other)} epochs have another position than their markers, as {_place(other[0])}"
        yield ERROR, name, what, _EPOCHS_AGAIN


_EPOCHS_AGAIN = (
    '`tidemark down streams`, `spark-sql -e "DELETE FROM lake.ops.epochs WHERE …"` of that stream, '
    "`tidemark up streams` copies them anew"
)


def _raw_delta(home: Home) -> Iterator[Found]:
    """In the ranges that epochs claim raw has as many records, and as many of them are dead letters."""
    letters = _letter_offsets(home)
    seen: set[tuple[Any, ...]] = set()
    for one in home.deltas:
        for marker in one.markers:
            parts = [
                (topic_id, partition, marker.start.topics.get(topic_id, {}).get(partition, 0), end)
                for topic_id, ends in marker.end.topics.items()
                for partition, end in ends.items()
            ]
            raws = [_raw_of(home, topic_id) for topic_id, *_ in parts]
            is_passed = [
                raw is not None and raw.position.topics.get(topic_id, {}).get(partition, 0) >= end
                for raw, (topic_id, partition, _, end) in zip(raws, parts, strict=True)
            ]
            if not parts or not all(is_passed) or (marker.name, marker.end.to_text()) in seen:
                continue
            seen.add((marker.name, marker.end.to_text()))
            held = sum(
                raw.offsets.get((topic_id, partition), Offsets()).count(start, end)
                for raw, (topic_id, partition, start, end) in zip(raws, parts, strict=True)
                if raw is not None
            )
            refused = sum(
                int(np.searchsorted(places, end) - np.searchsorted(places, start))
                for topic_id, partition, start, end in parts
                for places in (letters.get((topic_id, partition), np.empty(0, np.int64)),)
            )
            shown = ", ".join(f"{t}/{p} {s} to {e - 1}" for t, p, s, e in parts)
            where = f"delta {one.index}/{one.lineage}, {marker.name}"
            if held < marker.records:
                what = f"the stream read {marker.records} records ({shown}); raw has {held}"
                yield (
                    ERROR,
                    where,
                    what,
                    f"`tidemark undo {_raw_name(parts[0][0])} --to TIME` of before they went",
                )
            elif held > marker.records:
                what = f"raw has {held} records ({shown}); the stream read {marker.records}"
                yield ERROR, where, what, "`tidemark build`: the next base has what the stream missed"
            if refused != marker.refused:
                what = f"the stream refused {marker.refused} records ({shown}); {refused} are dead letters"
                yield ERROR, where, what, "`tidemark doctor --deep` says which; then `tidemark build`"


def _letter_offsets(home: Home) -> dict[tuple[str, int], np.ndarray]:
    if not home.letters.num_rows:
        return {}
    rows = home.letters.filter(pc.is_valid(home.letters.column("offset")))
    return {place: np.unique(part) for place, part in _by_partition(rows)}


# ------------------------------------------------------------------------------------------------ checkpoints, orphans


def _checkpoints(home: Home) -> Iterator[Found]:
    settings = home.settings
    targets = {archive.STREAM: archive.held(settings, CONTRACTS.values())}
    for name in STREAMS:
        targets[name] = _committed(home, name)
    for name, committed in targets.items():
        folders = [settings.paths.checkpoints / name, *settings.paths.checkpoints.glob(f"{name}-*")]
        found = [folder / "incarnation.json" for folder in folders if (folder / "incarnation.json").exists()]
        for file in found:
            try:
                number = int(json.loads(file.read_text(encoding="utf-8"))["number"])
            except (ValueError, KeyError, TypeError):
                number = -1
            if number < committed.incarnation and len(found) == 1:
                what = f"it is of incarnation {number}; {committed.incarnation} has committed: its epochs count as done"
                remedy = f"`tidemark stop {name}`, `rm -r {file.parent}`, `tidemark start {name}`: a new incarnation"
                yield ERROR, str(file), what, remedy
    if broker.is_ready(settings):
        for name, committed in targets.items():
            yield from _in_kafka(home, name, committed.position)


def _committed(home: Home, stream: str) -> Committed:
    """As `HotStreamRun.committed`, of what can be read: a file that is gone is another check's."""
    number, ends = 0, []
    for spec in INDICES.values():
        if stream not in spec.streams:
            continue
        path = delta.table_path(home.settings.paths.delta, spec.name, lineage(spec))
        mine = [m for one in home.deltas if one.path == path for m in one.markers if m.stream == stream]
        number = max([number, *(marker.incarnation for marker in mine)])
        with contextlib.suppress(Exception):  # a log that cannot be read is another check's, too
            number = delta.last_incarnation(path, stream, number)
        ends.append(merge_all(marker.end for marker in mine))
    return Committed(number, meet_all(ends))


def _in_kafka(home: Home, stream: str, committed: Position) -> Iterator[Found]:
    for topic_id, ends in committed.topics.items():
        name = topic_name(topic_id)
        try:
            if broker.topic_ids(home.settings, [name])[name] != topic_id:
                continue  # made again since: other records, which have offsets of their own
        except broker.TopicMissing:
            continue
        there = broker.offsets(home.settings, name)
        for partition, offset in ends.items():
            first, end = there.get(partition, (0, 0))
            where = f"{stream}, {topic_id}/{partition}"
            if offset > end:
                what = f"committed up to offset {offset}; Kafka ends at {end}: it has lost records"
                yield ERROR, where, what, f"make the topic {name} again: what is archived stays"
            elif offset < first:
                what = f"offsets {offset} to {first - 1} have expired before they were read"
                is_archive = stream == archive.STREAM
                remedy = "send them again: raw does not have them" if is_archive else "`tidemark build`"
                yield ERROR if is_archive else WARNING, where, what, remedy


def _orphans(home: Home) -> Iterator[Found]:
    for name in sorted(_table_names(home)):
        table = home.table(name)
        if table is None:
            continue
        listed = _listed(f"{table.location()}/data")
        named, current = _named(table)
        for path, size in current.items():
            there = listed.get(_plain(path))
            if there is None or there[0] != size:
                what = "is missing" if there is None else f"has {there[0]} bytes, not {size}"
                remedy = f"restore it, or `tidemark undo {name} --to TIME` of before it was written"
                yield ERROR, path, f"{what}; the current snapshot of {name} names it", remedy
        left = {
            path: size
            for path, (size, written_s) in listed.items()
            if path not in named and home.now_s - written_s > ORPHAN_S
        }
        if left:
            what = f"{len(left)} files, {sum(left.values()):,} bytes, that no snapshot names, as {Path(min(left)).name}"
            yield WARNING, name, what, "`tidemark maintain`"


def _listed(location: str) -> dict[str, tuple[int, float]]:
    """Files below a location: path → (bytes, when written)."""
    system, path = FileSystem.from_uri(location)
    found = system.get_file_info(FileSelector(path, allow_not_found=True, recursive=True))
    return {
        file.path: (file.size, file.mtime_ns / 1e9)
        for file in found
        if file.type == FileType.File and not file.base_name.startswith((".", "_"))
    }


def _named(table: Table) -> tuple[set[str], dict[str, int]]:
    """The files that any snapshot names, and with their size those of the current one."""
    named: set[str] = set()
    current: dict[str, int] = {}
    seen: dict[str, dict[str, int]] = {}
    for snapshot in table.metadata.snapshots:
        is_current = snapshot.snapshot_id == table.metadata.current_snapshot_id
        for manifest in snapshot.manifests(table.io):
            if manifest.manifest_path not in seen:
                entries = manifest.fetch_manifest_entry(table.io, discard_deleted=False)
                seen[manifest.manifest_path] = {
                    e.data_file.file_path: e.data_file.file_size_in_bytes
                    for e in entries
                    if e.status != ManifestEntryStatus.DELETED
                }
                named |= {_plain(path) for path in seen[manifest.manifest_path]}
            if is_current:
                current |= seen[manifest.manifest_path]
    return named, current


# ------------------------------------------------------------------------------------------------ the table of checks

Check = Callable[[Home], Iterator[Found]]
CHECKS: dict[str, tuple[str, Check]] = {
    "raw": ("every offset is there once, up to the position; every load has its rows", _raw),
    "dead letters": ("each is of a record that raw has, once", _letters),
    "curated": ("nothing that raw lacks; the accounts add up", _curated),
    "staged": ("all that was written is seen by readers", _staged),
    "bases": ("files, sources, tags, cuts and pointers are right", _bases),
    "delta": ("every epoch can be read and follows the one before; the served base is in reach", _delta),
    "ops.epochs": ("each epoch is copied once", _ops_epochs),
    "raw and delta": ("what the streams read, raw has, and refuses the same", _raw_delta),
    "checkpoints": (
        "they agree with what is committed, and with Kafka where it can be reached",
        _checkpoints,
    ),
    "files": ("every file that a table needs is there, and none for long that nothing names", _orphans),
}
"""By name what a check says when all is well, and the check."""


def _table_names(home: Home) -> Iterator[str]:
    catalog = lake.catalog(home.settings)
    for namespace in catalog.list_namespaces():
        for identifier in catalog.list_tables(namespace):
            yield ".".join(identifier)


def _own_position(snapshot: lake.Snapshot) -> Position:
    """What a snapshot itself says that the table holds."""
    return from_text(snapshot.summary[lake.POSITION]) if lake.POSITION in snapshot.summary else EMPTY


def _said_position(home: Home, name: str) -> Position:
    """Of a table that is written whole, what was written last: compaction, say, adds snapshots that say nothing."""
    written = (s for s in lake.ancestors(home.settings, name) if lake.POSITION in s.summary)
    newest = next(written, None)
    return _own_position(newest) if newest is not None else EMPTY


def _raw_of(home: Home, topic_id: str) -> Raw | None:
    return next((raw for raw in home.raw if raw.contract.topic == topic_name(topic_id)), None)


def _raw_name(topic_id: str) -> str:
    return f"raw.{topic_name(topic_id).replace('-', '_')}"


def _beyond(held: Position, covered: Position) -> str:
    said = [f"the load {load}" for load in sorted(held.loads - covered.loads)[:SHOWN]]
    said += [
        f"{topic_id}/{partition} up to {offset}"
        for topic_id, offsets in held.topics.items()
        for partition, offset in offsets.items()
        if offset > covered.topics.get(topic_id, {}).get(partition, 0)
    ]
    return ", ".join(said)


def _age_s(home: Home, at: datetime) -> float:
    return home.now_s - at.timestamp()


def _plain(location: str) -> str:
    """A file's path as its file system lists it; Spark writes file:/x, pyiceberg file:///x."""
    parts = urlsplit(location)
    return parts.path if parts.scheme in ("", "file") else parts.netloc + parts.path


def _place(parts: Sequence[Any]) -> str:
    return "/".join(str(part) for part in parts if part is not None)


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (" …" if len(numbers) > SHOWN else "")


def _sum(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{start} to {end - 1}" for start, end in ranges[:SHOWN])
    return shown + (" …" if len(ranges) > SHOWN else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


__all__ = ["CHECKS", "ERROR", "OK", "WARNING", "Finding", "Home", "examine"]
