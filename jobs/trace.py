"""Where an event is: its way from the door to the answer, stage by stage, each with its time or why it has none.

Belongs here: what the stages are, and what is said of each from the evidence (pure: `stages`, `standing`). Does not
belong here: finding the evidence in Kafka, Iceberg, Delta, logs and serving (`jobs.evidence`), printing it.

An event's statements are its records: each has its own way, and the one of greatest rank stands. A record is named by
its place in Kafka, or by load and row (`pipelines.tracing` says how that ties together what the processes say).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from jobs.controls import RUNNING
from pipelines.contracts import REASONS
from pipelines.curate import Part
from pipelines.indexing.delta import Marker
from pipelines.indexing.position import Position, from_json
from pipelines.tracing import Place, Trace

DONE, WAITING, REFUSED, UNKNOWN, NOT_NEEDED = "done", "waiting", "refused", "unknown", "not needed"
ARCHIVE = "archive"


class Record(NamedTuple):
    """A record that says something about what is asked for.

    Attributes:
        topic: The topic's name.
        place: Where it is in Kafka; None for a row of a load.
        load: Load id and row; None if it is from Kafka.
        taken_ms: The broker's time, or the load's.
        identity: The values of the identity, in the order of the contract; empty where the record is refused.
        version: Of the statement.
        is_deleted: Whether it is a tombstone.
        hashes: Content hash by curated table; None where the record does not set that family.
        event_time_ms: Where it has one.
        refusal: Reason and detail, where the contract refuses it.
    """

    topic: str
    place: Place | None
    load: tuple[str, int] | None
    taken_ms: int
    identity: tuple[str, ...] = ()
    version: int = 1
    is_deleted: bool = False
    hashes: Mapping[str, int | None] = {}
    event_time_ms: int | None = None
    refusal: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """Its place, to people."""
        return str(self.place) if self.place else "/".join(map(str, self.load or ()))

    @property
    def position(self) -> Position:
        """The least position that covers it."""
        if self.place is None:
            return Position(loads=frozenset({self.load[0]} if self.load else ()))
        return Position({self.place.topic_id: {self.place.partition: self.place.offset + 1}})


class Door(NamedTuple):
    """What the collector's log says of the request that brought a record."""

    at_ms: int
    took_ms: float
    trace_id: str
    request_id: str


class Kafka(NamedTuple):
    """What the broker has of a record: its trace, if it has the record still; why not, if not."""

    has_record: bool
    why_not: str = ""
    trace: Trace | None = None


class Commit(NamedTuple):
    """The commit that brought a record to raw; `is_exact` is false where older snapshots have expired."""

    snapshot_id: int
    at_ms: int
    incarnation: int | None
    epoch: int | None
    is_exact: bool


class Epoch(NamedTuple):
    """An epoch of a hot stream as an index's delta, or `ops.epochs`, has it."""

    lineage: str
    marker: Marker
    committed_at_ms: int | None
    is_retired: bool = False


class Folded(NamedTuple):
    """When a replica could first read a record; `how` is `folded`, or how it came to have more at once."""

    replica: str
    at_ms: int
    how: str


class Based(NamedTuple):
    """The first base that holds a record."""

    version: str
    built_at_ms: int
    published_at_ms: int | None


class OfIndex(NamedTuple):
    """What is known of a record in one index.

    Attributes:
        stream: The hot stream that feeds the index from the record's topic.
        epoch: In the delta; None if it is not there.
        folded: By replica, from serving's log.
        base: The first base that holds it; None if none does.
        served: What serving says of the index (`Follower.status`); None if it does not answer.
        version: The base version that the pointer names; None before the first.
        with_delta: Whether it is served with its delta.
    """

    stream: str
    epoch: Epoch | None = None
    folded: tuple[Folded, ...] = ()
    base: Based | None = None
    served: Mapping[str, Any] | None = None
    version: str | None = None
    with_delta: bool = True


class Evidence(NamedTuple):
    """What was found of a record."""

    kafka: Kafka
    door: Door | None = None
    commit: Commit | None = None
    indices: Mapping[str, OfIndex] = {}
    streams: Mapping[
        str, str
    ] = {}  # what holds a stream up, if anything does; a stream that is named runs otherwise
    archive_trigger_ms: int = 10_000


class Stage(NamedTuple):
    """One stage of a record's way.

    Attributes:
        stage: collector, kafka, archive, dead letter, delta, overlay or base.
        index: Of the last three.
        state: done, waiting, refused, unknown or not needed.
        at_ms: When it was done, ms since 1970.
        lag_ms: Since the first stage.
        detail: For a person.
        facts: The same for a program.
    """

    stage: str
    index: str | None  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    state: str
    at_ms: int | None
    detail: str
    facts: Mapping[str, Any] = {}
    lag_ms: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        at = None if self.at_ms is None else iso(self.at_ms)
        return {**self._asdict(), "at": at, "facts": dict(self.facts)}


def stages(record: Record, evidence: Evidence) -> list[Stage]:
    """A record's way, in order, with the lag of each stage behind the first that has a time."""
    found = [_collector(record, evidence), _kafka(record, evidence), _archive(record, evidence)]
    if record.refusal:
        reason, detail = record.refusal
        said = f"{reason}: {detail} ({REASONS.get(reason, 'a reason of an earlier contract')})"
        found.append(Stage("dead letter", None, REFUSED, None, said, {"reason": reason}))
    else:
        for index, known in evidence.indices.items():
            found += [
                _delta(record, index, known, evidence),
                _overlay(record, index, known),
                _base(record, index, known),
            ]
    times = [stage.at_ms for stage in found if stage.at_ms is not None]
    first = min(times, default=0)
    return [s if s.at_ms is None else s._replace(lag_ms=s.at_ms - first) for s in found]


def is_visible(record: Record, evidence: Evidence) -> bool:
    """Whether every index that it is for can be read with it, or never will be."""
    return record.refusal is not None or all(
        known.served is not None and _is_served(record, known) for known in evidence.indices.values()
    )


def _collector(record: Record, evidence: Evidence) -> Stage:
    door, trace = evidence.door, evidence.kafka.trace
    if record.load:
        return Stage("collector", None, NOT_NEEDED, None, "it came by a load")
    if door:
        detail = f"request {door.request_id}" + _trace(door.trace_id, door.request_id)
        facts = {"trace_id": door.trace_id, "request_id": door.request_id, "took_ms": door.took_ms}
        return Stage("collector", None, DONE, door.at_ms, detail, facts)
    if trace:
        detail = f"request {trace.request_id}{_trace(trace.trace_id, trace.request_id)}, by the record's own header; "
        detail += (
            "the collector's log has no line of it: it was sent by another producer, or the line is gone"
        )
        facts = {"trace_id": trace.trace_id, "request_id": trace.request_id}
        return Stage("collector", None, UNKNOWN, None, detail, facts)
    detail = "nothing of a request is known: the collector's log has no line of it, and "
    detail += "its record has no header" if evidence.kafka.has_record else evidence.kafka.why_not
    return Stage("collector", None, UNKNOWN, None, detail)


def _trace(trace_id: str, request_id: str) -> str:
    return "" if trace_id == request_id else f", trace {trace_id}"


def _kafka(record: Record, evidence: Evidence) -> Stage:
    if record.place is None:
        return Stage("kafka", None, NOT_NEEDED, None, "it came by a load")
    detail = f"{record.name}" + ("" if evidence.kafka.has_record else f"; {evidence.kafka.why_not}")
    facts = {**record.place._asdict(), "has_record": evidence.kafka.has_record}
    return Stage("kafka", None, DONE, record.taken_ms, detail, facts)


def _archive(record: Record, evidence: Evidence) -> Stage:
    commit = evidence.commit
    if commit is None:
        return Stage("archive", None, WAITING, None, _not_yet(ARCHIVE, evidence))
    by = f"load {record.load[0]}, row {record.load[1]}" if record.load else "by another hand"
    if commit.epoch is not None and not record.load:
        by = f"epoch {ARCHIVE}/{commit.incarnation}/{commit.epoch}"
    late = "" if commit.is_exact else "; older snapshots have expired: it was there by then"
    facts = {"snapshot_id": commit.snapshot_id, "incarnation": commit.incarnation, "epoch": commit.epoch}
    return Stage("archive", None, DONE, commit.at_ms, f"{by}, snapshot {commit.snapshot_id}{late}", facts)


def _not_yet(stream: str, evidence: Evidence) -> str:
    return f"not yet: {evidence.streams[stream]}"


def _delta(record: Record, index: str, known: OfIndex, evidence: Evidence) -> Stage:
    epoch = known.epoch
    if record.load:
        return Stage("delta", index, NOT_NEEDED, None, "a load is served from the next base on")
    if epoch is not None:
        marker = epoch.marker
        at_ms = epoch.committed_at_ms or marker.transformed_at_ms
        steps = [
            (name, at)
            for name, at in (
                ("started", marker.started_at_ms),
                ("decoded", marker.decoded_at_ms),
                ("transformed", marker.transformed_at_ms),
                ("committed", epoch.committed_at_ms),
            )
            if at is not None
        ]
        told = ", ".join(f"{name} {_clock(at)}" for name, at in steps)
        detail = f"epoch {marker.name}: {told}"
        if epoch.is_retired:
            detail += "; retired from the delta since"
        facts = {
            "epoch": marker.name,
            "lineage": epoch.lineage,
            **{f"{name}_at_ms": at for name, at in steps},
        }
        return Stage("delta", index, DONE, at_ms, detail, facts)
    if known.base is not None:
        detail = "no epoch of the delta has it (retired, or its stream had not come so far): the base has"
        return Stage("delta", index, UNKNOWN, None, detail)
    return Stage("delta", index, WAITING, None, _not_yet(known.stream, evidence))


def _overlay(record: Record, index: str, known: OfIndex) -> Stage:
    if known.folded:
        first = min(known.folded, key=lambda folded: folded.at_ms)
        told = "; ".join(f"replica {f.replica} {_clock(f.at_ms)}, {f.how}" for f in known.folded)
        facts = {"replicas": {f.replica: f.at_ms for f in known.folded}}
        hidden = known.served is not None and not _is_served(record, known)
        lost = "; it is not in what is served now" + _why_not_served(known) if hidden else ""
        return Stage("overlay", index, WAITING if hidden else DONE, first.at_ms, told + lost, facts)
    if record.load:
        return Stage("overlay", index, NOT_NEEDED, None, "a load is served from the next base on")
    if known.served is None:
        return Stage(
            "overlay", index, UNKNOWN, None, "serving does not answer, and its log has no line of it"
        )
    if _is_served(record, known):
        if _covers(known.served["cut"], record):
            return Stage("overlay", index, NOT_NEEDED, None, "the base that is served has it")
        return Stage("overlay", index, UNKNOWN, None, "it is served; serving's log no longer says since when")
    if known.epoch is None:
        return Stage("overlay", index, WAITING, None, "not yet: the delta does not have it")
    return Stage(
        "overlay", index, WAITING, None, "not yet" + (_why_not_served(known) or ": its epoch is on its way")
    )


def _why_not_served(known: OfIndex) -> str:
    served = known.served or {}
    if not served.get("with_delta", True):
        return f": the base is served without its delta; `tidemark resume {served['index']}` ends that"
    if served.get("is_overlay_full"):
        return ": the overlay is full; `tidemark build` makes a base that empties it"
    if served.get("error"):
        return f": {served['error']}"
    return ""


def _base(record: Record, index: str, known: OfIndex) -> Stage:
    base = known.base
    if base is None:
        now = f"{known.version} is served, and its cut is before it" if known.version else "no base is served"
        return Stage(
            "base", index, WAITING, None, f"not yet: {now}; the next build has it (`tidemark build`)"
        )
    facts = {"version": base.version, "built_at_ms": base.built_at_ms, "served_version": known.version}
    if base.published_at_ms is None:
        detail = f"{base.version} has it and was not published"
        return Stage("base", index, WAITING, None, detail, facts)
    detail = f"since {base.version}, built {_clock(base.built_at_ms)}"
    if known.version and known.version < base.version:
        detail += f"; rolled back since to {known.version}, which does not have it"
        return Stage("base", index, WAITING, base.published_at_ms, detail, facts)
    served = known.version if known.version != base.version else None
    detail += f"; served is {served}" if served else ", which is served"
    return Stage("base", index, DONE, base.published_at_ms, detail, facts)


def _is_served(record: Record, known: OfIndex) -> bool:
    return known.served is not None and _covers(known.served["position"], record)


def _covers(position: Mapping[str, Any], record: Record) -> bool:
    return from_json(position).covers(record.position)


# ------------------------------------------------------------------------------------------------ what stands


class Standing(NamedTuple):
    """What became of a record's statement about one family.

    Attributes:
        family: The curated table that holds it.
        stands: Whether it is the one of greatest rank.
        by: The record that stands instead.
        detail: For a person.
    """

    family: str
    stands: bool
    by: str | None
    detail: str


def standing(record: Record, of_identity: Iterable[Record], parts: Sequence[Part]) -> list[Standing]:
    """Whether what a record says stands, among all that is known of its identity: by rank, as everywhere."""
    known = [other for other in of_identity if not other.refusal]
    found = []
    for part in parts if not record.refusal else ():
        mine = _rank(record, part)
        if mine is None:
            continue
        best = max(known, key=lambda other: _rank(other, part) or (0, False, 0), default=record)
        top = _rank(best, part) or mine
        family = part.table.partition(".")[2]
        if mine == top:
            said = "stands: it is deleted" if record.is_deleted else "stands"
            same = [other.name for other in known if other.name != record.name and _rank(other, part) == mine]
            said += f"; {', '.join(same)} says the same" if same else ""
            found.append(Standing(family, True, None, said))
        else:
            how = "deleted" if best.is_deleted else "superseded"
            said = f"{how} by {best.name}, version {best.version} (this one is {record.version})"
            found.append(Standing(family, False, best.name, said))
    return found


def _rank(record: Record, part: Part) -> tuple[int, bool, int] | None:
    hashed = record.hashes.get(part.table)
    return None if hashed is None else (record.version, record.is_deleted, hashed)


def iso(time_ms: int) -> str:
    """A time as ISO 8601 in UTC."""
    return (
        datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )


def _clock(time_ms: int) -> str:
    """A time of day, for a sentence beside a whole time."""
    return iso(time_ms)[11:]


def stream_state(name: str, is_wanted: bool, status: Mapping[str, Mapping[str, Any]]) -> str:
    """How a stream is doing, from what the streaming process says: why it does not have a record yet."""
    if not is_wanted:
        return f"the stream {name} is stopped by request; `tidemark start {name}`"
    if not status:
        return "the streaming process does not run; `tidemark up streams`"
    mine = status.get(name, {})
    if mine.get("state", RUNNING) == RUNNING:
        newest = (
            f"its newest epoch, {mine['epoch']}, began {mine['at'][11:]}"
            if "epoch" in mine
            else "it has begun"
        )
        return f"the stream {name} runs; {newest}"
    why = f" ({mine['detail']})" if mine.get("detail") else ""
    return f"the stream {name} is {mine['state']}{why}"
