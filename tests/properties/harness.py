"""Drives a drawn history through the shipped writer, tailer, mapped base and view, and knows what was accepted.

Belongs here: the bookkeeping of what a home holds (in plain lists, for the oracle) and the calls of the product that
do the same thing for real. Does not belong here: answers; the tests of each kind of read compare those.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from hypothesis import HealthCheck, settings

from pipelines.indexing import build, delta
from pipelines.indexing import facts as fact
from pipelines.indexing.position import Position
from pipelines.indexing.replica import Follower
from pipelines.indexing.spec import IndexSpec, lineage
from pipelines.indexing.versions import VersionError, Versions
from pipelines.indexing.view import View
from tests.oracle import Statement
from tests.properties.strategies import (
    Again,
    Build,
    Compact,
    Epoch,
    History,
    Incarnation,
    Publish,
    Record,
    Restart,
    Resume,
    Rollback,
)

pa.set_cpu_count(1)  # tables of a few rows: threads only cost
pa.set_io_thread_count(1)

SCALE = float(os.environ.get("TIDEMARK_TEST_CASES", "1"))
"""More cases than CI runs, for a night: 10 runs ten times as many."""


def cases(count: int) -> settings:
    """Settings of a property test: random each time, replayable from what a failure prints."""
    return settings(
        max_examples=max(1, round(count * SCALE)),
        deadline=None,
        derandomize=False,
        print_blob=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


CASES = cases(1000)
FEWER_CASES = cases(200)


class Batch(NamedTuple):
    """One micro-batch as the stream would hand it over: whose it is, what it read and what that says."""

    stream: str
    incarnation: int
    epoch: int
    start: dict[int, int]
    end: dict[int, int]
    statements: tuple[Statement, ...]


class Candidate(NamedTuple):
    """A base, as plain statements."""

    number: int
    archived: dict[str, dict[int, int]]
    loads: tuple[str, ...]
    statements: tuple[Statement, ...]
    """everything that was given to the builder, with what the model computed"""
    given: tuple[Statement, ...]
    """the same, or what is current of it"""
    max_broker_time_ms: int | None
    shards: int
    model: int


class Ledger:
    """What a home holds, in plain Python: which batches were committed, which bases stand, which one is served."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.committed: list[Batch] = []
        self.candidates: list[Candidate] = []
        self.published: list[int] = []
        self.served: Candidate | None = None
        self.pending: Candidate | None = None
        """a base that the pointer names and that is not served yet"""
        self.is_without_delta = False
        self._incarnation = dict.fromkeys(history.logs, 0)
        self._epoch = dict.fromkeys(history.logs, 0)
        self._next = {stream: dict.fromkeys(range(len(log)), 0) for stream, log in history.logs.items()}

    def batch(self, step: Epoch) -> Batch:
        """The next micro-batch of a stream; the offsets never go back within an incarnation."""
        start = dict(self._next[step.stream])
        end = {partition: max(offset, start[partition]) for partition, offset in step.upto.items()}
        records = [
            record
            for partition, log in enumerate(self.history.logs[step.stream])
            for record in log[start[partition] : end[partition]]
        ]
        return Batch(
            step.stream,
            self._incarnation[step.stream],
            self._epoch[step.stream],
            start,
            end,
            tuple(said(records)),
        )

    def commit(self, batch: Batch) -> None:
        """The batch was committed."""
        self.committed.append(batch)
        self._next[batch.stream] = dict(batch.end)
        self._epoch[batch.stream] = batch.epoch + 1

    def earlier(self, stream: str, back: int) -> Batch | None:
        """A batch of the stream's running incarnation that was committed before."""
        mine = [
            b for b in self.committed if b.stream == stream and b.incarnation == self._incarnation[stream]
        ]
        return mine[-1 - back] if back < len(mine) else None

    def begin_incarnation(self, step: Incarnation) -> None:
        """The stream's checkpoint is gone."""
        self._incarnation[step.stream] += 1
        self._epoch[step.stream] = 0
        self._next[step.stream] = {p: max(0, o - step.reread) for p, o in self._next[step.stream].items()}

    def candidate(self, step: Build) -> Candidate:
        """The base that a build makes; a stream that the archive does not know yet stands at 0."""
        before: list[Record] = []
        taken: list[Record] = []
        for stream, log in self.history.logs.items():
            for partition, records in enumerate(log):
                cut = step.archived[stream][partition]
                before += records[:cut]
                taken += records[: cut + step.beyond]
        for load in step.loads:
            before += self.history.loads[load]
            taken += self.history.loads[load]
        models = self.history.models[step.model] if self.history.models else ()
        statements = tuple(said(taken))
        return Candidate(
            len(self.candidates),
            {stream: dict(offsets) for stream, offsets in step.archived.items()},
            step.loads,
            statements + models,
            (current(statements) if step.is_curated else statements) + models,
            max((record.broker_time_ms for record in before), default=None),
            step.shards,
            step.model,
        )

    def built(self, candidate: Candidate) -> None:
        """The candidate is on disk."""
        self.candidates.append(candidate)

    def publishable(self) -> Candidate | None:
        """The newest candidate, if it is newer than what is served."""
        if not self.candidates or (self.served and self.candidates[-1].number <= self.served.number):
            return None
        return self.candidates[-1]

    def publish(self, candidate: Candidate) -> None:
        """The candidate is served, with the delta."""
        self.served, self.pending = candidate, None
        self.is_without_delta = False
        if candidate.number not in self.published:
            self.published.append(candidate.number)

    def older(self, back: int) -> Candidate | None:
        """One of the published bases that are older than the served one."""
        if self.served is None:
            return None
        older = [number for number in self.published if number < self.served.number]
        return self.candidates[older[-1 - back]] if back < len(older) else None

    def roll_back(self, candidate: Candidate, without_delta: bool) -> None:
        """The older base is served."""
        self.served = candidate
        self.is_without_delta = without_delta

    def position(self) -> tuple[dict[str, dict[int, int]], tuple[str, ...]]:
        """How far what is visible reaches, by stream and partition, and the loads in it."""
        reached = (
            {stream: dict(offsets) for stream, offsets in self.served.archived.items()} if self.served else {}
        )
        for batch in () if self.is_without_delta else self.committed:
            mine = reached.setdefault(batch.stream, {})
            for partition, offset in batch.end.items():
                mine[partition] = max(offset, mine.get(partition, 0))
        return reached, self.served.loads if self.served else ()

    def visible(self) -> list[Statement]:
        """Everything accepted that an answer has to stand on: the base's statements and the committed batches'."""
        statements = list(self.served.statements) if self.served else []
        if not self.is_without_delta:
            statements += [statement for batch in self.committed for statement in batch.statements]
        return statements


def said(records: Iterable[Record]) -> list[Statement]:
    """The statements of the records, in their order."""
    return [statement for record in records for statement in record.statements]


def current(statements: Sequence[Statement]) -> tuple[Statement, ...]:
    """What ``curated`` would keep: of each thing the statement that stands, tombstones too."""
    standing: dict[Any, Statement] = {}
    for statement in statements:
        about = (statement.family, statement.event or (statement.key, statement.id))
        before = standing.get(about)
        if before is None or _order(statement) > _order(before):
            standing[about] = statement
    return tuple(standing.values())


def _order(statement: Statement) -> tuple[Any, ...]:
    version = statement.version + (0,) * (4 - len(statement.version))
    return version, statement.is_deleted, statement.content_hash


def rows_of(statements: Iterable[Statement]) -> list[dict[str, Any]]:
    """Statements as ``facts.table`` takes them; their identity is what they are about."""
    return [
        {
            "family": s.family,
            "identity": [s.event] if s.event else [s.key, s.id] if s.id else [s.key],
            "key": s.key,
            "id": s.id,
            "version": s.version,
            "is_deleted": s.is_deleted,
            "content_hash": s.content_hash,
            "time_ms": s.time_ms,
            "amounts": s.amounts,
            "payload": s.payload,
        }
        for s in statements
    ]


def position_of(offsets: Mapping[str, Mapping[int, int]], loads: Iterable[str] = ()) -> Position:
    """Offsets by stream as a position; a topic is named after its stream."""
    return Position({f"topic-{stream}": dict(o) for stream, o in offsets.items()}, frozenset(loads))


class Home:
    """An index's home on disk, driven through what is shipped: writer, tailer, versions, base files, swap and view.

    The follower's threads are not started: the same methods that they call are called here, one after the other, so
    that a failure can be replayed. ``test_replica`` runs the threads.
    """

    def __init__(self, spec: IndexSpec, directory: Path, topics: Iterable[str]) -> None:
        self.spec = spec
        self.indices = directory / "indices"
        self.deltas = directory / "delta"
        self.topics = frozenset(topics)
        self.versions = Versions(self.indices, spec.name)
        self.writer = delta.DeltaWriter(spec, delta.table_path(self.deltas, spec.name, lineage(spec)))
        self._names: dict[int, str] = {}
        self._is_compacted_next = False
        self._recalled: dict[Hashable, Any] = {}
        self.noted: dict[bytes, Any] = {}  # by a check, for the next one
        self.restart()

    def commit(self, batch: Batch) -> bool:
        """The stream's writer commits a batch; returns whether it was new."""
        start, end = offsets_read(batch)
        marker = delta.Marker(batch.stream, batch.incarnation, batch.epoch, start, end, len(batch.statements))
        is_new = self.writer.commit(marker, fact.table(self.spec, rows_of(batch.statements)))
        if self._is_compacted_next:
            self.compact()
        return is_new

    def compact(self, is_late: bool = False) -> None:
        """Maintenance rewrites the delta, now or after the next commit."""
        self._is_compacted_next = is_late
        if not is_late:
            delta.compact(self.writer.path)
            delta.vacuum(self.writer.path, replaced_hours=0, orphan_hours=24)

    def recall(self, name: Hashable, answer: Any) -> None:
        """What has a name that was heard before must be what it was then."""
        assert self._recalled.setdefault(name, answer) == answer, name

    def build(self, candidate: Candidate) -> None:
        """A base is built and stands on disk."""
        name = self.versions.new_version(lineage(self.spec))
        cut = position_of(candidate.archived, candidate.loads)
        build.build_local(
            self.spec,
            fact.table(self.spec, rows_of(candidate.given)),
            self.versions.new_path(name),
            build.Meta(name, cut, candidate.max_broker_time_ms),
            shard_count=candidate.shards,
        )
        self._names[candidate.number] = name

    def publish(self, candidate: Candidate) -> None:
        """The pointer names a base."""
        self.versions.publish(self._names[candidate.number])

    def is_refused(self, candidate: Candidate) -> bool:
        """Whether publishing a base is refused."""
        try:
            self.publish(candidate)
        except VersionError:
            return True
        return False

    def roll_back(self, candidate: Candidate, without_delta: bool) -> None:
        """The pointer names an older base."""
        self.versions.rollback(self._names[candidate.number], deltas=self.deltas, without_delta=without_delta)

    def restart(self) -> None:
        """Serving begins anew, from the pointer, the base's files and the delta's snapshot."""
        self.follower = Follower(
            self.spec, self.indices, self.deltas, topics=self.topics, max_facts=1_000_000
        )
        self.prepare()
        self.follow()

    def prepare(self) -> None:
        """The follower makes ready what the pointer names, beside what it serves."""
        pointer = self.versions.pointer("default")
        if pointer is not None and pointer.generation > self.follower._tried:
            self.follower._prepare_one(pointer)
            assert self.follower.status()["error"] is None

    def follow(self) -> None:
        """The follower folds what the log has, and adopts what is ready."""
        while self.follower._overlay.advance():
            pass
        self.follower._adopt()

    def view(self) -> View:
        """What is served now."""
        return self.follower.view


def offsets_read(batch: Batch) -> tuple[Position, Position]:
    """Where a batch began and ended, in the partitions of which it read anything."""
    read = [p for p, offset in batch.end.items() if offset > batch.start[p]]
    return (
        position_of({batch.stream: {p: batch.start[p] for p in read}} if read else {}),
        position_of({batch.stream: {p: batch.end[p] for p in read}} if read else {}),
    )


SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a commit syncs its file: memory is quicker
Check = Callable[[Home, Ledger], None]


def drive(spec: IndexSpec, history: History, check: Check) -> None:
    """Run a history in an empty home and check the answers after each step."""
    directory = Path(tempfile.mkdtemp(prefix="tidemark-", dir=SCRATCH))
    bits, fact.LOOKUP_BITS = fact.LOOKUP_BITS, history.lookup_bits
    try:
        home = Home(spec, directory, (f"topic-{stream}" for stream in history.logs))
        ledger = Ledger(history)
        for step in history.steps:
            take(step, home, ledger)
            check_all(home, ledger, check)
            if ledger.pending and not isinstance(step, Publish):  # one step later the slow swap is over
                swap(home, ledger)
                check_all(home, ledger, check)
        if ledger.pending:
            swap(home, ledger)
            check_all(home, ledger, check)
        if history.ends_with_restart:
            home.restart()
            check_all(home, ledger, check)
    finally:
        fact.LOOKUP_BITS = bits
        shutil.rmtree(directory)


def check_all(home: Home, ledger: Ledger, check: Check) -> None:
    """The answers, and where the view says that it stands."""
    check(home, ledger)
    stands, expected = home.view().position, position_of(*ledger.position())
    assert stands.covers(expected), "the view stands before what it holds"
    assert expected.covers(stands), "the view says that it stands after what it holds"


def swap(home: Home, ledger: Ledger) -> None:
    """What was made ready is adopted."""
    assert ledger.pending
    home.follow()
    ledger.publish(ledger.pending)


def take(step: Any, home: Home, ledger: Ledger) -> None:
    """Do one step for real and in the ledger; a step that makes no sense now is left out."""
    match step:
        case Epoch():
            batch = ledger.batch(step)
            assert home.commit(batch), "a new epoch was taken for one that is there"
            ledger.commit(batch)
        case Again(stream, back):
            if earlier := ledger.earlier(stream, back):
                assert not home.commit(earlier), "an epoch was committed twice"
        case Incarnation():
            ledger.begin_incarnation(step)
        case Build():
            candidate = ledger.candidate(step)
            home.build(candidate)
            ledger.built(candidate)
        case Publish(is_slow):
            publish(home, ledger, is_slow)
        case Rollback(back, without_delta):
            if not ledger.pending and (older := ledger.older(back)):
                assert home.is_refused(older), "an older base was published; that is a roll back"
                home.roll_back(older, without_delta)
                home.prepare()
                home.follow()
                ledger.roll_back(older, without_delta)
        case Resume():
            if ledger.served and not ledger.pending:
                home.versions.resume()
                home.prepare()
                home.follow()
                ledger.is_without_delta = False
        case Compact(is_late):
            home.compact(is_late)
        case Restart():
            home.restart()
            if ledger.pending:
                ledger.publish(ledger.pending)
    if ledger.pending:
        while home.follower._overlay.advance():  # the old view goes on
            pass
    else:
        home.follow()


def publish(home: Home, ledger: Ledger, is_slow: bool) -> None:
    """The newest candidate is published, if it is newer than what is served; a slow swap is left half done."""
    newest = ledger.publishable()
    if newest is None or ledger.pending:
        return
    home.publish(newest)
    home.prepare()
    ledger.pending = newest
    if not is_slow:
        swap(home, ledger)
