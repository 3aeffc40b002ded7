"""The records that say something about an event, or a pin: found in curated, raw, the dead letters and Kafka.

Belongs here: finding them by an id, without Spark. Does not belong here: what became of each (`jobs.evidence`).

They are the one that stands in curated, the rows of raw that are newer than curated, the dead letters that hold the id,
and what Kafka has that raw does not have yet. Records that were superseded before the last build are looked for on
request: that reads the whole raw table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from pyiceberg import expressions

from jobs.topic import Topic
from jobs.trace import Record
from pipelines import lake
from pipelines.contracts import RECORD, Contract, Refusal, decode
from pipelines.curate import Source, source_of
from pipelines.indexing.position import Position, meet_all
from pipelines.ingest import dead_letters
from pipelines.ingest.broker import BrokerError
from pipelines.ingest.load import raw_spec
from pipelines.tracing import Place

if TYPE_CHECKING:
    from pyiceberg.expressions import BooleanExpression

    from pipelines.settings import Settings

made: Any = expressions  # whose stubs know only how they are read from JSON


def find(
    settings: Settings,
    contract: Contract,
    id_: str,
    user: str | None,
    topic: Topic,
    notes: list[str],
    *,
    everything: bool = False,
) -> list[Record]:
    """The records, by identity and then by time.

    Args:
        settings: Where everything is.
        contract: Of the topic.
        id_: An event's id, or a pin's.
        user: Only this user's event.
        topic: To ask Kafka.
        notes: What could not be looked at is added.
        everything: Read all of raw.
    """
    source = source_of(contract)
    found = {record.name: record for record in _letters(settings, contract, id_, user)}
    held = Position() if everything else _curated_position(settings, source)
    for row in _rows_of_raw(settings, contract, id_, held):
        if record := _record(contract, row, id_, user):
            found[record.name] = record
    for record in _curated(settings, source, id_, user):
        found.setdefault(record.name, record)
    try:
        for row in topic.after(lake.position(settings, raw_spec(contract).name), notes):
            if _may_mention(row["value"], id_) and (record := _record(contract, row, id_, user)):
                found.setdefault(record.name, record)
    except BrokerError as error:
        notes.append(f"Kafka could not be asked for what raw does not have yet: {error.what}")
    if found and not everything:
        notes.append("statements that were superseded before the last build are found with --all")
    return sorted(found.values(), key=lambda record: (record.identity, record.taken_ms, record.name))


def id_field(contract: Contract) -> str:
    """The field that holds the id that a topic's records are asked for by."""
    return source_of(contract).identity[-1]


def _letters(settings: Settings, contract: Contract, id_: str, user: str | None) -> Iterator[Record]:
    for letter in dead_letters.listed(settings, topic=contract.topic, limit=None):
        if not _names(letter.value, id_) or (user is not None and not _names(letter.value, user)):
            continue
        row = {**letter._asdict(), "refusal": (letter.reason, letter.detail)}
        yield _of_row(contract, row, {})


def _curated_position(settings: Settings, source: Source) -> Position:
    """What all curated tables of a topic have."""
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


def _may_mention(value: bytes | None, id_: str) -> bool:
    """Whether a value may be about an id: it has it as it is, or (where there is a backslash) escaped."""
    return value is not None and (id_.encode() in value or b"\\" in value)


def _names(value: bytes | None, id_: str) -> bool:
    """Whether a value that its contract refuses has an id in it, as a whole word: its fields cannot be trusted."""
    spelt = {id_.encode(), json.dumps(id_)[1:-1].encode()}
    word = b"|".join(re.escape(one) for one in spelt)
    return value is not None and re.search(rb"(?<![\w-])(?:" + word + rb")(?![\w-])", value) is not None


def _record(contract: Contract, row: Mapping[str, Any], id_: str, user: str | None) -> Record | None:
    """A raw row as a record of the id that is looked for; None if it is another's."""
    decoded = decode(contract, row["value"], int(row["broker_time"].timestamp() * 1000))
    if isinstance(decoded, Refusal):
        is_about = _names(row["value"], id_) and (user is None or _names(row["value"], user))
        refusal = (decoded.reason, decoded.detail)
        return _of_row(contract, {**row, "refusal": refusal}, {}) if is_about else None
    if decoded[id_field(contract)] != id_:
        return None
    if user is not None and decoded.get("user_id", user) != user:
        return None
    hashes = {part.table: decoded[part.content_hash] for part in source_of(contract).parts}
    return _of_row(contract, {**row, **decoded}, hashes)


def _of_row(contract: Contract, row: Mapping[str, Any], hashes: Mapping[str, int | None]) -> Record:
    is_of_load, refusal = row["load_id"] is not None, row.get("refusal")
    event_time = row.get("event_time")
    return Record(
        topic=contract.topic,
        place=None if is_of_load else Place(row["topic_id"], row["partition"], row["offset"]),
        load=(row["load_id"], row["load_row"]) if is_of_load else None,
        taken_ms=int(row["broker_time"].timestamp() * 1000),
        identity=() if refusal else tuple(row[name] for name in source_of(contract).identity),
        version=row.get("version", 1),
        is_deleted=row.get("is_deleted", False),
        hashes=hashes,
        event_time_ms=int(event_time.timestamp() * 1000) if event_time else None,
        refusal=refusal,
    )


def _equal(column: str, value: str | int) -> BooleanExpression:
    return made.EqualTo(column, value)
