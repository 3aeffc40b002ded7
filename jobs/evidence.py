"""What is known of an event: found in Kafka, in the lake, in the deltas, in the logs, and asked of serving.

Belongs here: reading, without Spark and without changing anything; whatever is down or gone is said, and all the rest
is still found. Does not belong here: what it means (`jobs.trace`).

An event's records are: the one that stands in curated, the rows of raw that are newer than curated, the dead letters
that hold its id, and what Kafka has that raw does not have yet. Records that were superseded before the last build are
looked for on request (`--all`): that reads the whole raw table.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Consumer, KafkaException, TopicPartition
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError
from pyiceberg import expressions

from jobs import client, trace
from jobs.controls import Controls
from jobs.trace import Based, Commit, Door, Epoch, Evidence, Folded, Kafka, OfIndex, Record, Stage, Standing
from pipelines import lake, logs, tracing
from pipelines.contracts import RECORD, Contract, Refusal, decode
from pipelines.curate import SOURCES, Source
from pipelines.errors import TidemarkError
from pipelines.indexing import delta
from pipelines.indexing.position import Position, from_text
from pipelines.indexing.spec import IndexSpec, lineage
from pipelines.indexing.versions import Versions
from pipelines.indices import INDICES, STREAMS
from pipelines.ingest import broker, dead_letters
from pipelines.ingest.broker import BrokerError
from pipelines.ingest.load import raw_spec
from pipelines.tracing import Place

if TYPE_CHECKING:
    from pyiceberg.expressions import BooleanExpression

    from pipelines.settings import Settings

made: Any = expressions  # whose stubs know only how they are read from JSON
SKEW_MS = 60_000
"""The clocks of the broker, the streams and serving are taken to be as near as this to each other."""
MOST_RECORDS = 500_000
"""As many records of Kafka are looked through for those that raw does not have yet."""
_TIMEOUT_S = 5.0


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
        everything: Read all of raw, for statements that were superseded before the last build, too.

    Raises:
        NoSuchEvent: Nothing of it is known; it says where was looked.
    """
    notes: list[str] = []
    with Topic(settings, contract.topic) as topic:
        records = _records(settings, contract, id_, user, topic, notes, everything)
        refused = _refused_at_the_door(settings, contract, id_, user)
        if not records and not refused:
            raise NoSuchEvent(
                f"nothing is known of {_id_field(contract)} {id_!r}" + (f" of user {user!r}" if user else ""),
                where="; ".join(["curated, raw, dead letters, Kafka and the collector's log", *notes]),
                remedy="look at the id; the other topic is --topic; older logs and records may have expired",
            )
        around = Around(settings, contract)
        evidence = {record.name: around.of(record, topic) for record in records}
    parts = SOURCES[contract.name].parts
    traced = [
        Traced(
            record,
            trace.stages(record, evidence[record.name]),
            trace.standing(record, [r for r in records if r.identity == record.identity], parts),
            trace.is_visible(record, evidence[record.name]),
        )
        for record in records
    ]
    newest = {record.identity: record for record in records if record.identity}
    answers = [_answer(settings, contract, record) for record in newest.values()]
    return Report(contract.topic, id_, traced, answers, refused, notes)


# ------------------------------------------------------------------------------------------------ which records


def _id_field(contract: Contract) -> str:
    return SOURCES[contract.name].identity[-1]


def _records(
    settings: Settings,
    contract: Contract,
    id_: str,
    user: str | None,
    topic: Topic,
    notes: list[str],
    everything: bool,
) -> list[Record]:
    source = SOURCES[contract.name]
    found: dict[str, Record] = {}
    held = Position() if everything else _curated_position(settings, source)
    for row in _rows_of_raw(settings, contract, id_, held):
        if record := _record(contract, row, id_, user):
            found[record.name] = record
    for record in _curated(settings, source, id_, user):
        known = found.get(record.name)
        found[record.name] = record if known is None else known
    for letter in dead_letters.listed(settings, topic=contract.topic, limit=None):
        if _mentions(letter.value, id_) and (user is None or _mentions(letter.value, user)):
            place = load = None
            if letter.load_id is not None:
                load = (letter.load_id, letter.load_row or 0)
            elif letter.topic_id is not None and letter.partition is not None and letter.offset is not None:
                place = Place(letter.topic_id, letter.partition, letter.offset)
            taken_ms = int(letter.broker_time.timestamp() * 1000)
            refusal = (letter.reason, letter.detail)
            record = Record(contract.topic, place, load, taken_ms, refusal=refusal)
            found[record.name] = record
    archived = lake.position(settings, raw_spec(contract).name)
    try:
        for row in topic.after(archived, notes):
            if _mentions(row["value"], id_) and (record := _record(contract, row, id_, user)):
                found.setdefault(record.name, record)
    except BrokerError as error:
        notes.append(f"Kafka could not be asked for what raw does not have yet: {error.what}")
    if found and not everything:
        notes.append("statements that were superseded before the last build are found with --all")
    return sorted(found.values(), key=lambda record: (record.identity, record.taken_ms, record.name))


def _curated_position(settings: Settings, source: Source) -> Position:
    """What all curated tables of a topic have."""
    from pipelines.indexing.position import meet_all

    return meet_all([lake.position(settings, part.table) for part in source.parts])


def _curated(settings: Settings, source: Source, id_: str, user: str | None) -> Iterator[Record]:
    """The statements that stand, family by family; one record may be several families'."""
    found: dict[str, Record] = {}
    for part in source.parts:
        table = lake.open_table(settings, part.table)
        if table is None:
            continue
        condition = _equal(source.identity[-1], id_)
        if user is not None and "user_id" in source.identity:
            condition = made.And(condition, _equal("user_id", user))
        for row in table.scan(row_filter=condition).to_arrow().to_pylist():
            record = _of_row(source.contract, row, {part.table: row[part.content_hash]})
            known = found.get(record.name, record)
            found[record.name] = known._replace(hashes={**known.hashes, **record.hashes})
    yield from found.values()


def _rows_of_raw(
    settings: Settings, contract: Contract, id_: str, held: Position
) -> Iterator[dict[str, Any]]:
    """The rows after a position whose value may be about an id. The value is bytes: they are searched."""
    table = lake.open_table(settings, raw_spec(contract).name)
    if table is None:
        return
    condition = _after(held) if held != Position() else made.AlwaysTrue()
    reader = table.scan(row_filter=condition, selected_fields=tuple(RECORD.names)).to_arrow_batch_reader()
    needle = id_.encode()
    for batch in reader:
        value = batch.column("value")
        may = pc.or_(*(pc.greater_equal(pc.find_substring(value, text), 0) for text in (needle, b"\\")))
        yield from batch.filter(pc.fill_null(may, False)).to_pylist()


def _after(held: Position) -> BooleanExpression:
    """The rows that a position does not cover."""
    known, loads = list(held.topics), sorted(held.loads)
    of_kafka, of_load = made.NotNull("topic_id"), made.NotNull("load_id")
    parts = [
        made.And(of_kafka, made.NotIn("topic_id", known)) if known else of_kafka,
        made.And(of_load, made.NotIn("load_id", loads)) if loads else of_load,
    ]
    for topic_id, ends in held.topics.items():
        mine = _equal("topic_id", topic_id)
        parts.append(made.And(mine, made.NotIn("partition", list(ends))))
        parts += [
            made.And(mine, _equal("partition", p), made.GreaterThanOrEqual("offset", end))
            for p, end in ends.items()
        ]
    return made.Or(*parts)


def _mentions(value: bytes | None, id_: str) -> bool:
    """Whether bytes may hold an id: as it is, or (where there is a backslash) escaped."""
    return value is not None and (id_.encode() in value or b"\\" in value)


def _record(contract: Contract, row: Mapping[str, Any], id_: str, user: str | None) -> Record | None:
    """A raw row as a record of the id that is looked for; None if it is another's, or refused."""
    taken_ms = int(row["broker_time"].timestamp() * 1000)
    decoded = decode(contract, row["value"], taken_ms)
    if isinstance(decoded, Refusal) or decoded[_id_field(contract)] != id_:
        return None
    if user is not None and decoded.get("user_id", user) != user:
        return None
    hashes = {part.table: decoded[part.content_hash] for part in SOURCES[contract.name].parts}
    return _of_row(contract, {**row, **decoded}, hashes)


def _of_row(contract: Contract, row: Mapping[str, Any], hashes: Mapping[str, int | None]) -> Record:
    is_of_load = row["load_id"] is not None
    event_time = row.get("event_time")
    return Record(
        topic=contract.topic,
        place=None if is_of_load else Place(row["topic_id"], row["partition"], row["offset"]),
        load=(row["load_id"], row["load_row"]) if is_of_load else None,
        taken_ms=int(row["broker_time"].timestamp() * 1000),
        identity=tuple(row[name] for name in SOURCES[contract.name].identity),
        version=row["version"],
        is_deleted=row["is_deleted"],
        hashes=hashes,
        event_time_ms=int(event_time.timestamp() * 1000) if event_time else None,
    )


def _equal(column: str, value: str | int) -> BooleanExpression:
    return made.EqualTo(column, value)


# ------------------------------------------------------------------------------------------------ Kafka


class Topic:
    """A topic of the broker, read by place. What the broker does not say is said instead of it."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._name = name
        self._problem: BrokerError | None = None
        self._id = ""
        self._consumer: Consumer | None = None
        try:
            if not broker.is_ready(settings):
                raise BrokerError("the broker does not answer", where=settings.kafka.bootstrap_servers)
            self._id = broker.topic_ids(settings, [name])[name]
            self._consumer = Consumer(
                {
                    "bootstrap.servers": settings.kafka.bootstrap_servers,
                    "group.id": "tidemark-trace",
                    "enable.auto.commit": False,
                    "auto.offset.reset": "error",
                }
            )
        except BrokerError as error:
            self._problem = error

    def __enter__(self) -> Topic:
        return self

    def __exit__(self, *error: object) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def has(self, place: Place) -> Kafka:
        """Whether the broker has a record still, and its trace."""
        if self._consumer is None:
            return Kafka(False, "the broker does not answer")
        if place.topic_id != self._id:
            return Kafka(False, "its topic was deleted and made again since")
        try:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self._name, place.partition), timeout=_TIMEOUT_S
            )
            if place.offset < low:
                return Kafka(False, "Kafka's retention has expired it")
            if place.offset >= high:
                return Kafka(False, "the broker's partition ends before it")
            for message in self._read({place.partition: place.offset}, 1):
                if message.offset() == place.offset:
                    return Kafka(True, trace=tracing.read(message.headers()))
            return Kafka(False, "the broker did not give it in time")
        except KafkaException as error:
            return Kafka(False, f"the broker does not give it ({error.args[0].str()})")

    def after(self, position: Position, notes: list[str]) -> Iterator[dict[str, Any]]:
        """The records after a position, as rows of raw, the oldest first.

        Raises:
            BrokerError: The broker does not answer.
        """
        if self._consumer is None:
            assert self._problem is not None
            raise self._problem
        try:
            known = self._consumer.list_topics(self._name, timeout=_TIMEOUT_S).topics[self._name].partitions
            ends = {
                p: self._consumer.get_watermark_offsets(TopicPartition(self._name, p), timeout=_TIMEOUT_S)
                for p in known
            }
            held = position.topics.get(self._id, {})
            starts = {p: max(held.get(p, 0), low) for p, (low, _) in ends.items()}
            starts = {p: start for p, start in starts.items() if start < ends[p][1]}
            count = sum(ends[p][1] - start for p, start in starts.items())
            if count > MOST_RECORDS:
                notes.append(
                    f"raw is {count:,} records behind Kafka; the first {MOST_RECORDS:,} of them were looked at"
                )
            for message in self._read(starts, min(count, MOST_RECORDS)):
                yield {
                    "topic_id": self._id,
                    "partition": message.partition(),
                    "offset": message.offset(),
                    "load_id": None,
                    "load_row": None,
                    "broker_time": datetime.fromtimestamp(message.timestamp()[1] / 1000, UTC),
                    "value": message.value(),
                }
        except KafkaException as error:
            raise BrokerError(error.args[0].str(), where=self._name) from error

    def _read(self, starts: Mapping[int, int], count: int) -> Iterator[Any]:
        """Up to so many records from these offsets on."""
        assert self._consumer is not None
        if not starts or not count:
            return
        self._consumer.assign([TopicPartition(self._name, p, offset) for p, offset in starts.items()])
        deadline = time.monotonic() + _TIMEOUT_S
        left = count
        while left > 0 and time.monotonic() < deadline:
            for message in self._consumer.consume(min(left, 10_000), timeout=0.5 if left > 1 else 2.0):
                if message.error() is not None:
                    raise KafkaException(message.error())
                left -= 1
                deadline = time.monotonic() + _TIMEOUT_S
                yield message
        self._consumer.unassign()


# ------------------------------------------------------------------------------------------------ logs


def _door(settings: Settings, record: Record) -> Door | None:
    """The collector's line about the request that brought a record."""
    if record.place is None:
        return None
    since = _time(record.taken_ms - SKEW_MS)
    for line in logs.read(_log_files(settings, "collector"), since=since, holding=record.place.topic_id):
        if tracing.is_in(record.place, line.get("places")):
            took_ms = float(line.get("took_ms", 0))
            at_ms = round(_ms(line["time"]) - took_ms)
            return Door(at_ms, took_ms, str(line.get("trace_id")), str(line.get("request_id")))
    return None


def _refused_at_the_door(
    settings: Settings, contract: Contract, id_: str, user: str | None
) -> list[dict[str, Any]]:
    """What the collector refused: only its log has it."""
    wanted = {_id_field(contract): id_} | ({"user_id": user} if user is not None else {})
    found = []
    for line in logs.read(_log_files(settings, "collector"), holding=orjson.dumps(id_).decode()):
        for refused in line.get("refused") or ():
            if line.get("topic") == contract.topic and wanted.items() <= refused.items():
                asked = {name: line.get(name) for name in ("time", "request_id", "trace_id")}
                found.append({**asked, **refused})
    return found


def _folded(settings: Settings, records: Iterable[Record], index: str) -> dict[str, tuple[Folded, ...]]:
    """By record, when each replica could first read it in an index, as serving's log says."""
    records = list(records)
    found: dict[str, dict[str, Folded]] = {record.name: {} for record in records}
    if not records:
        return {}
    since = _time(min(record.taken_ms for record in records) - SKEW_MS)
    for line in logs.read(_log_files(settings, "serving"), since=since, holding='"places"'):
        if line.get("index") != index:
            continue
        replica, loads = str(line.get("replica")), line.get("loads") or ()
        for record in records:
            held = (
                tracing.is_in(record.place, line.get("places"))
                if record.place
                else (record.load or ("",))[0] in loads
            )
            if held and replica not in found[record.name]:
                how = "folded" if line.get("message") == "folded" else f"had it when it {line.get('message')}"
                found[record.name][replica] = Folded(replica, _ms(line["time"]), how)
    return {name: tuple(by_replica.values()) for name, by_replica in found.items()}


def _log_files(settings: Settings, process: str) -> list[Path]:
    return logs.files_of(settings.paths.logs, process)


def _time(time_ms: int) -> datetime:
    return datetime.fromtimestamp(max(0, time_ms) / 1000, UTC)


def _ms(time_text: str) -> int:
    return round(datetime.fromisoformat(time_text).timestamp() * 1000)


# ------------------------------------------------------------------------------------------------ tables


def _commit(settings: Settings, record: Record, contract: Contract) -> Commit | None:
    """The oldest retained snapshot of raw that has a record."""
    oldest: lake.Snapshot | None = None
    for snapshot in lake.ancestors(settings, raw_spec(contract).name):
        if lake.POSITION not in snapshot.summary:
            continue
        if not from_text(snapshot.summary[lake.POSITION]).covers(record.position):
            if oldest is not None:
                return _as_commit(oldest, is_exact=True)
            return None
        oldest = snapshot
    return _as_commit(oldest, is_exact=oldest.parent_id is None) if oldest else None


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


def _epoch(settings: Settings, spec: IndexSpec, lineages: Iterable[str], record: Record) -> Epoch | None:
    """The epoch that read a record: in the delta, or, once it is retired, in `ops.epochs`."""
    if record.place is None:
        return None
    for mark in dict.fromkeys(lineages):
        for file, modified_ms in _files_since(
            delta.table_path(settings.paths.delta, spec.name, mark), record.taken_ms
        ):
            markers = _markers(file)
            for marker in markers:
                if tracing.is_in(record.place, marker.places):
                    return Epoch(mark, marker, modified_ms if len(markers) == 1 else None)
        if copied := _copied(settings, spec, mark, record):
            return copied
    return None


def _files_since(path: Path, taken_ms: int) -> list[tuple[Path, int]]:
    """The data files of a delta that were written since, the oldest first, and when that was."""
    try:
        added = pa.table(DeltaTable(str(path)).get_add_actions(flatten=True))
    except TableNotFoundError:
        return []
    files = []
    for row in added.select(["path", "modification_time"]).to_pylist():
        at = row["modification_time"]
        at_ms = round(at.replace(tzinfo=UTC).timestamp() * 1000) if isinstance(at, datetime) else int(at)
        if at_ms >= taken_ms - SKEW_MS:
            files.append((path / row["path"], at_ms))
    return sorted(files, key=lambda file: file[1])


def _markers(file: Path) -> list[delta.Marker]:
    import pyarrow.parquet as pq

    try:
        texts = pq.ParquetFile(file).read(columns=["marker"]).column("marker").drop_null().to_pylist()
    except FileNotFoundError:  # vacuumed in between
        return []
    return [delta.read_marker(text) for text in texts]


def _copied(settings: Settings, spec: IndexSpec, mark: str, record: Record) -> Epoch | None:

    table = lake.open_table(settings, lake.OPS_EPOCHS.name)
    if table is None:
        return None
    mine = made.And(_equal("index", spec.name), _equal("lineage", mark))
    rows = [
        row for row in table.scan(row_filter=mine).to_arrow().to_pylist() if row["stream"] in spec.streams
    ]
    for row in sorted(rows, key=lambda row: (row["incarnation"], row["epoch"])):
        end = from_text(row["position"])
        if end.covers(record.position):
            stages = orjson.loads(row["stages"])
            times = {
                name: stages.get(name) for name in ("started_at_ms", "decoded_at_ms", "transformed_at_ms")
            }
            marker = delta.Marker(row["stream"], row["incarnation"], row["epoch"], Position(), end, **times)
            return Epoch(mark, marker, round(row["committed_at"].timestamp() * 1000), is_retired=True)
    return None


def _based(versions: Versions, record: Record) -> Based | None:
    """The first base that has a record; a base that was deleted since is not known."""
    published: dict[str, int] = {}
    for change in versions.history():
        if change["action"] == "publish":
            published.setdefault(change["version"], _ms(change["changed_at"]))
    holding = [m for m in versions.manifests() if m.cut.covers(record.position)]
    first = next((m for m in holding if m.version in published), next(iter(holding), None))
    return Based(first.version, _ms(first.built_at), published.get(first.version)) if first else None


# ------------------------------------------------------------------------------------------------ all of it


class Around:
    """What is the same for all records of a topic, asked for once: streams, serving, which indices there are."""

    def __init__(self, settings: Settings, contract: Contract) -> None:
        self._settings, self._contract = settings, contract
        board = Controls(settings.paths.run)
        status = board.status()
        problems = {
            name: trace.stream_problem(name, board.should_run(name), status)
            for name in (trace.ARCHIVE, *STREAMS)
        }
        self._streams = {name: problem for name, problem in problems.items() if problem}
        self._served = _served(settings)
        self._fed = {
            spec.name: stream
            for spec in INDICES.values()
            for stream in spec.streams
            if contract.topic in STREAMS[stream].topics
        }

    def of(self, record: Record, topic: Topic) -> Evidence:
        """The evidence of one record."""
        indices = {} if record.refusal else {name: self._in_index(record, name) for name in self._fed}
        return Evidence(
            kafka=topic.has(record.place) if record.place else Kafka(False, "it came by a load"),
            door=_door(self._settings, record),
            commit=_commit(self._settings, record, self._contract),
            indices=indices,
            streams=self._streams,
            archive_trigger_ms=self._settings.streams.archive_trigger_ms,
        )

    def _in_index(self, record: Record, name: str) -> OfIndex:
        spec, versions = INDICES[name], Versions(self._settings.paths.indices, name)
        pointer, served = versions.pointer(), self._served.get(name)
        lineages = [lineage(spec), *([served["lineage"]] if served else [])]
        return OfIndex(
            stream=self._fed[name],
            epoch=_epoch(self._settings, spec, lineages, record),
            folded=_folded(self._settings, [record], name).get(record.name, ()),
            base=_based(versions, record),
            served=served,
            version=pointer.version if pointer else None,
        )


def _served(settings: Settings) -> dict[str, dict[str, Any]]:
    """What serving says of each index; empty where it does not answer."""
    try:
        answer = client.request(_serving(settings), "/v1/indices", timeout_s=_TIMEOUT_S)
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
                _serving(settings), f"/v1/pins/{key}", timeout_s=_TIMEOUT_S, is_error_an_answer=True
            )
            if said.status == 200:
                return Answer(record.identity, said.body, "served")
            return Answer(record.identity, None, "there is no such pin, or it was deleted")
        # A deletion has no time: then the newest events are looked through.
        params: dict[str, Any] = {"limit": 1000}
        if record.event_time_ms is not None:
            params["cursor"] = cursor_of(record.event_time_ms + 1, b"\0")
        said = client.request(_serving(settings), f"/v1/users/{key}/events", params, timeout_s=_TIMEOUT_S)
    except client.ServiceError as error:
        return Answer(record.identity, None, f"not known: {error.what}")
    for event in said.body["events"]:
        if event["event_id"] == record.identity[1]:
            return Answer(record.identity, event, "served")
    return Answer(record.identity, None, "it is not among the user's events")
