"""What is known of an event: found in Kafka, in the lake, in the deltas, in the logs, and asked of serving.

Belongs here: reading, without Spark and without changing anything; whatever is down or gone is said, and all the rest
is still found. Does not belong here: which records (`jobs.records`), what the evidence means (`jobs.trace`).

Logs, snapshots and deltas are read once for all records: a pin may have thousands.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from jobs import client, records, trace
from jobs.controls import Controls
from jobs.topic import TIMEOUT_S, Topic
from jobs.trace import Based, Commit, Door, Epoch, Evidence, Folded, Kafka, OfIndex, Record, Stage, Standing
from pipelines import lake, logs, tracing
from pipelines.contracts import FOLLOWED, Contract
from pipelines.curate import source_of
from pipelines.errors import TidemarkError
from pipelines.indexing import delta
from pipelines.indexing.delta import Marker
from pipelines.indexing.position import Position, from_text
from pipelines.indexing.spec import IndexSpec, lineage
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES, KEYED, STREAMS
from pipelines.ingest.load import raw_spec

if TYPE_CHECKING:
    from pipelines.settings import Settings

SKEW_MS = 60_000
"""The clocks of the broker, the streams and serving are taken to be as near as this to each other."""
MOST_FOLLOWED = 20
"""So many records are followed, the newest; a pin may have thousands."""


class NoSuchEvent(TidemarkError):
    """Nothing is known of an event."""


class Traced(NamedTuple):
    """A record's way, and what became of what it says."""

    record: Record
    stages: list[Stage]
    standing: list[Standing]
    is_visible: bool

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        r = self.record
        return {
            "record": r.name,
            "topic": r.topic,
            "identity": list(r.identity),
            "version": r.version,
            "is_deleted": r.is_deleted,
            "taken_at": trace.iso(r.taken_ms),
            "is_visible": self.is_visible,
            "stages": [stage.to_json() for stage in self.stages],
            "standing": [one._asdict() for one in self.standing],
        }


class Answer(NamedTuple):
    """What serving says of an identity now; `found` is None where it has nothing to show."""

    identity: tuple[str, ...]
    found: dict[str, Any] | None
    detail: str


class Report(NamedTuple):
    """All that is known of an event.

    Attributes:
        topic: The topic.
        id: As it was asked for.
        traced: Its records, by identity and then by time.
        answers: What serving says now of each identity.
        refused_at_the_door: Records that the collector refused; nothing but its log has them.
        notes: What could not be looked at, and what was not.
    """

    topic: str
    id: str
    traced: list[Traced]
    answers: list[Answer]
    refused_at_the_door: list[dict[str, Any]]
    notes: list[str]

    @property
    def is_visible(self) -> bool:
        """Whether everything that was found can be read, wherever it should."""
        return bool(self.traced) and all(one.is_visible for one in self.traced)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "topic": self.topic,
            "id": self.id,
            "is_visible": self.is_visible,
            "records": [one.to_json() for one in self.traced],
            "answers": [one._asdict() for one in self.answers],
            "refused_at_the_door": self.refused_at_the_door,
            "notes": self.notes,
        }


def look(
    settings: Settings, contract: Contract, id_: str, user: str | None = None, *, everything: bool = False
) -> Report:
    """Find an event and follow each of its records.

    Args:
        settings: Where everything is.
        contract: Of the topic.
        id_: An event's id, or a pin's.
        user: Only this user's event.
        everything: All of its records, also those that were superseded before the last build: reads all of raw.

    Raises:
        NoSuchEvent: Nothing of it is known; it says where was looked.
    """
    notes: list[str] = []
    with Topic(settings, contract.topic) as topic:
        found = records.find(settings, contract, id_, user, topic, notes, everything=everything)
        refused = _refused_at_the_door(settings, contract, id_, user)
        if not found and not refused:
            raise NoSuchEvent(
                f"nothing is known of {records.id_field(contract)} {id_!r}"
                + (f" of user {user!r}" if user else ""),
                where="; ".join(["curated, raw, dead letters, Kafka and the collector's log", *notes]),
                remedy="look at the id; the other topic is --topic; older logs and records may have expired",
            )
        followed = found
        if len(found) > MOST_FOLLOWED and not everything:
            followed = sorted(found, key=lambda record: (record.taken_ms, record.name))[-MOST_FOLLOWED:]
            notes.append(
                f"the newest {MOST_FOLLOWED} of {len(found)} records are followed; --all follows all"
            )
        evidence = gather(settings, contract, followed, topic)
    parts = source_of(contract).parts
    traced = [
        Traced(
            record,
            trace.stages(record, evidence[record.name]),
            trace.standing(record, [r for r in found if r.identity == record.identity], parts),
            trace.is_visible(record, evidence[record.name]),
        )
        for record in followed
    ]
    newest = {record.identity: record for record in followed if record.identity}
    answers = [_answer(settings, contract, record) for record in newest.values()]
    return Report(contract.topic, id_, traced, answers, refused, notes)


def gather(
    settings: Settings, contract: Contract, followed: list[Record], topic: Topic
) -> dict[str, Evidence]:
    """The evidence of each record, by its name."""
    board = Controls(settings.paths.run)
    status = board.status()
    streams = {
        name: trace.stream_state(name, board.should_run(name), status) for name in (trace.ARCHIVE, *STREAMS)
    }
    fed = {
        spec.name: stream
        for spec in INDICES.values()
        for stream in spec.streams
        if contract.topic in STREAMS[stream].topics
        and stream not in KEYED  # of many records, and of most nothing
    }
    accepted = [record for record in followed if not record.refusal]
    indices = {name: _in_index(settings, name, stream, accepted) for name, stream in fed.items()}
    served, folded = _served(settings), _folded(settings, accepted)
    doors, commits = _doors(settings, followed), _commits(settings, contract, followed)
    return {
        record.name: Evidence(
            kafka=topic.has(record.place) if record.place else Kafka(False, "it came by a load"),
            door=doors.get(record.name),
            commit=commits.get(record.name),
            indices={
                name: known[record.name]._replace(
                    served=served.get(name), folded=tuple(folded.get((record.name, name), {}).values())
                )
                for name, known in indices.items()
                if record.name in known
            },
            streams=streams,
        )
        for record in followed
    }


# ------------------------------------------------------------------------------------------------ logs


def _doors(settings: Settings, followed: list[Record]) -> dict[str, Door]:
    """The collector's lines about the requests that brought records, by the records' names."""
    found: dict[str, Door] = {}
    for line in _lines(settings, "collector", followed):
        for record in followed:
            if record.place and record.name not in found and tracing.is_in(record.place, line["places"]):
                took_ms = float(line.get("took_ms", 0))
                at_ms = round(_ms(line["time"]) - took_ms)
                found[record.name] = Door(
                    at_ms, took_ms, str(line.get("trace_id")), str(line.get("request_id"))
                )
    return found


def _folded(settings: Settings, followed: list[Record]) -> dict[tuple[str, str], dict[str, Folded]]:
    """By record and index: when each replica could first read it, as serving's log says."""
    found: dict[tuple[str, str], dict[str, Folded]] = {}
    for line in _lines(settings, "serving", followed):
        replica, loads = str(line.get("replica")), line.get("loads") or ()
        how = "folded" if line.get("message") == "folded" else f"had it when it {line.get('message')}"
        for record in followed:
            has = (
                tracing.is_in(record.place, line["places"])
                if record.place
                else (record.load or ("",))[0] in loads
            )
            if has:
                by_replica = found.setdefault((record.name, str(line.get("index"))), {})
                by_replica.setdefault(replica, Folded(replica, _ms(line["time"]), how))
    return found


def _lines(settings: Settings, process: str, followed: list[Record]) -> Iterable[dict[str, Any]]:
    """The lines of a process that are about places, since the oldest of some records."""
    if not followed:
        return ()
    since = datetime.fromtimestamp(max(0, min(record.taken_ms for record in followed) - SKEW_MS) / 1000, UTC)
    lines = logs.read(logs.files_of(settings.paths.logs, process), since=since, holding='"places"')
    return (line for line in lines if "places" in line and "time" in line)


def _refused_at_the_door(
    settings: Settings, contract: Contract, id_: str, user: str | None
) -> list[dict[str, Any]]:
    """What the collector refused: only its log has it."""
    wanted = {records.id_field(contract): id_} | ({"user_id": user} if user is not None else {})
    found = []
    for line in logs.read(
        logs.files_of(settings.paths.logs, "collector"), holding=orjson.dumps(id_).decode()
    ):
        for refused in line.get("refused") or ():
            if line.get("topic") == contract.topic and wanted.items() <= refused.items():
                asked = {name: line.get(name) for name in ("time", "request_id", "trace_id")}
                found.append({**asked, **refused})
    return found


def _ms(time_text: str) -> int:
    return round(datetime.fromisoformat(time_text).timestamp() * 1000)


# ------------------------------------------------------------------------------------------------ tables


def _commits(settings: Settings, contract: Contract, followed: list[Record]) -> dict[str, Commit]:
    """By record: the oldest retained snapshot of raw that has it."""
    found: dict[str, Commit] = {}
    left, oldest = {record.name: record.position for record in followed}, None
    for snapshot in lake.ancestors(settings, raw_spec(contract).name):
        if lake.POSITION not in snapshot.summary:
            continue
        reached = from_text(snapshot.summary[lake.POSITION])
        for name in [name for name, position in left.items() if not reached.covers(position)]:
            del left[name]
            if oldest is not None:
                found[name] = _as_commit(oldest, is_exact=True)
        if not left:
            return found
        oldest = snapshot
    if oldest is not None:
        is_first = oldest.parent_id is None
        found |= {name: _as_commit(oldest, is_exact=is_first) for name in left}
    return found


def _as_commit(snapshot: lake.Snapshot, is_exact: bool) -> Commit:
    said = snapshot.summary
    incarnation, epoch = said.get(lake.INCARNATION), said.get(lake.EPOCH)
    return Commit(
        snapshot.id,
        snapshot.committed_at_ms,
        int(incarnation) if incarnation else None,
        int(epoch) if epoch else None,
        is_exact,
    )


def _in_index(settings: Settings, name: str, stream: str, followed: list[Record]) -> dict[str, OfIndex]:
    """By record: what its index's delta and bases have of it."""
    spec, versions = INDICES[name], Versions(settings.paths.indices, name)
    pointer = versions.pointer()
    version = pointer.version if pointer else None
    manifests = versions.manifests()
    lineages = dict.fromkeys([lineage(spec), *(m.lineage for m in manifests if m.version == version)])
    epochs = _epochs(settings, spec, list(lineages), followed)
    published: dict[str, int] = {}
    for change in versions.history():
        if change["action"] == "publish":
            published.setdefault(change["version"], _ms(change["changed_at"]))
    found = {}
    for record in followed:
        holding = [m for m in manifests if m.cut.covers(record.position)]
        first = next((m for m in holding if m.version in published), next(iter(holding), None))
        base = Based(first.version, _ms(first.built_at), published.get(first.version)) if first else None
        found[record.name] = OfIndex(stream, epochs.get(record.name), base=base, version=version)
    return found


def _epochs(
    settings: Settings, spec: IndexSpec, lineages: list[str], followed: list[Record]
) -> dict[str, Epoch]:
    """By record: the epoch that read it, in the delta or, once it is retired, in `ops.epochs`."""
    found: dict[str, Epoch] = {}
    left = {record.name: record.place for record in followed if record.place}
    since_ms = min((record.taken_ms for record in followed), default=0) - SKEW_MS
    for mark in lineages:
        for file, written_ms in _files_since(
            delta.table_path(settings.paths.delta, spec.name, mark), since_ms
        ):
            if not left:
                return found
            markers = _markers(file)
            for marker in markers:
                for name in [name for name, place in left.items() if tracing.is_in(place, marker.places)]:
                    del left[name]  # a file of several epochs was written when they were compacted
                    found[name] = Epoch(mark, marker, written_ms if len(markers) == 1 else None)
    for mark in lineages if left else ():
        for epoch in _copied(settings, spec, mark):
            for record in followed:
                if record.name in left and epoch.marker.end.covers(record.position):
                    del left[record.name]
                    found[record.name] = epoch
    return found


def _files_since(path: Path, since_ms: int) -> list[tuple[Path, int]]:
    """The data files of a delta that were written since, the oldest first, and when that was."""
    try:
        added = pa.table(DeltaTable(str(path)).get_add_actions(flatten=True))
    except TableNotFoundError:
        return []
    files = []
    for row in added.select(["path", "modification_time"]).to_pylist():
        at = row["modification_time"]
        at_ms = round(at.replace(tzinfo=UTC).timestamp() * 1000) if isinstance(at, datetime) else int(at)
        if at_ms >= since_ms:
            files.append((path / row["path"], at_ms))
    return sorted(files, key=lambda file: file[1])


def _markers(file: Path) -> list[Marker]:
    try:
        texts = pq.ParquetFile(file).read(columns=["marker"]).column("marker").drop_null().to_pylist()
    except FileNotFoundError:  # vacuumed in between
        return []
    return [delta.read_marker(text) for text in texts]


def _copied(settings: Settings, spec: IndexSpec, mark: str) -> list[Epoch]:
    """The epochs of `ops.epochs`, in order: of those that end after a record, the first is the one that read it."""
    table = lake.open_table(settings, lake.OPS_EPOCHS.name)
    if table is None:
        return []
    rows = table.scan(row_filter=f"index = '{spec.name}' and lineage = '{mark}'").to_arrow().to_pylist()
    found = []
    for row in sorted(rows, key=lambda row: (row["incarnation"], row["epoch"])):
        stages = orjson.loads(row["stages"])
        times = {name: stages.get(name) for name in ("started_at_ms", "decoded_at_ms", "transformed_at_ms")}
        end = from_text(row["position"])
        marker = Marker(row["stream"], row["incarnation"], row["epoch"], Position(), end, **times)
        found.append(Epoch(mark, marker, round(row["committed_at"].timestamp() * 1000), is_retired=True))
    return found


# ------------------------------------------------------------------------------------------------ serving


def _served(settings: Settings) -> dict[str, dict[str, Any]]:
    """What serving says of each index; empty where it does not answer."""
    try:
        answer = client.request(_serving(settings), "/v1/indices", timeout_s=TIMEOUT_S)
    except client.ServiceError:
        return {}
    return {said["index"]: said for said in answer.body["indices"]}


def _serving(settings: Settings) -> str:
    return f"http://{settings.serving.host}:{settings.serving.port}"


def _answer(settings: Settings, contract: Contract, record: Record) -> Answer:
    """What serving says of an identity now."""
    from pipelines.serving.inputs import cursor_of

    key = client.quote(record.identity[0])
    try:
        if contract.topic == "pin-updates":
            said = client.request(
                _serving(settings), f"/v1/pins/{key}", timeout_s=TIMEOUT_S, is_error_an_answer=True
            )
            if said.status == 200:
                return Answer(record.identity, said.body, "served")
            return Answer(record.identity, None, "there is no such pin, or it was deleted")
        if contract.topic == "user-follows":
            said = client.request(
                _serving(settings), f"/v1/users/{key}/follows", {"limit": 1000}, timeout_s=TIMEOUT_S
            )
            field = FOLLOWED[record.identity[1]]
            found = [one for one in said.body["follows"] if one[field] == record.identity[2]]
            if found:
                return Answer(record.identity, found[0], "served")
            return Answer(record.identity, None, "it is not among what the user follows (the newest 1000)")
        # A deletion has no time: then the newest events are looked through.
        params: dict[str, Any] = {"limit": 1000}
        if record.event_time_ms is not None:
            params["cursor"] = cursor_of(record.event_time_ms + 1, b"\0")
        said = client.request(_serving(settings), f"/v1/users/{key}/events", params, timeout_s=TIMEOUT_S)
    except client.ServiceError as error:
        return Answer(record.identity, None, f"not known: {error.what}")
    for event in said.body["events"]:
        if event["event_id"] == record.identity[1]:
            return Answer(record.identity, event, "served")
    return Answer(record.identity, None, "it is not among the user's events")
